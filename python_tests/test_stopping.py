"""Samples that stop by themselves: against a plain loop that freezes them, on every backend."""

import pytest
import torch
from conftest import BACKENDS, device_of, interpreted
from torch._subclasses.fake_tensor import FakeTensorMode

import unrolled_kernels as uk
import unrolled_kernels.functional as F
from unrolled_kernels.ops.momentum import stopping as op
from unrolled_kernels.testing import STRUCTURES, random_quadratic

backends = pytest.mark.parametrize("backend", [pytest.param("eager", id="eager"), *BACKENDS])
structures = pytest.mark.parametrize("structure", STRUCTURES)
METHODS = {
    "gd": lambda Q, b, phi, k, **options: F.gradient_descent(Q, b, phi, k, **options),
    "nesterov": lambda Q, b, phi, k, **options: F.nesterov(Q, b, phi, 0.1, k, **options),
    "momentum": lambda Q, b, phi, k, **options: F.momentum(Q, b, phi, 0.4 * phi, 0.3, k, **options),
}


def frozen_loop(run, y0, k, tolerance):
    """y, steps and last residual, one step more at a time, each sample on its own; ``run(k)`` is y after k steps."""
    batch = y0.shape[:-1]
    steps = torch.full(batch, k)
    y, residual = y0, torch.zeros(batch, dtype=torch.float64)
    for t in range(k):
        after = run(t + 1)
        change = (after - y).abs().amax(-1)
        moving = steps == k
        residual = torch.where(moving, change, residual)
        stops = moving & (change <= tolerance * after.abs().amax(-1).clamp(min=1)) & (t + 1 < k)
        steps = torch.where(stops, t + 1, steps)
        y = torch.where(moving.unsqueeze(-1), after, y)
    return y, steps, residual


@backends
@structures
@pytest.mark.parametrize("method", METHODS)
def test_counts_results_and_gradients_are_those_of_a_loop(backend, structure, method):
    if interpreted(backend) and method == "gd":
        pytest.skip("interpreted: two methods")
    device, k, tolerance = device_of(backend), 25, 2e-2
    leaves, make_Q, b = random_quadratic(structure, (4, 3), 5, dtype=torch.float64, device=device)
    b = b * torch.linspace(0.01, 30, 12, dtype=torch.float64, device=device).reshape(4, 3, 1)
    y0 = 0.1 * torch.randn_like(b)
    phi = (0.3 + 0.2 * torch.rand(k, dtype=torch.float64, device=device)).requires_grad_()
    inputs = [x.requires_grad_() for x in (*leaves, b)]
    y, info = METHODS[method](make_Q(*leaves), b, phi, k, y0=y0, tolerance=tolerance, return_info=True, backend=backend)
    run = lambda t: METHODS[method](make_Q(*leaves), b, phi[:t], t, y0=y0, backend="eager")
    expected, steps, residual = frozen_loop(run, y0, k, tolerance)
    assert torch.equal(info.num_steps, steps)
    assert info.num_steps.dtype == torch.int64
    assert len(steps.unique()) > 1
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(info.residual, residual.detach())
    assert not info.residual.requires_grad
    cotangent = torch.randn_like(y)
    actual, wanted = (torch.autograd.grad(x, [*inputs, phi], cotangent) for x in (y, expected))
    torch.testing.assert_close(actual, wanted)
    assert not actual[-1][int(steps.max()) :].any()
    plain = METHODS[method](make_Q(*leaves), b, phi, k, y0=y0, tolerance=tolerance, backend=backend)
    assert torch.equal(plain, y)


@backends
@pytest.mark.parametrize(
    ("structure", "B", "d", "shared"),
    [
        *(("dense", B, d, shared) for B, d in ((5, 20), (20, 150)) for shared in (False, True)),
        *(("spectral", B, d, shared) for B, d in ((5, 20), (3, 150)) for shared in (False, True)),
        ("diagonal", 3, 9000, False),
        ("tikhonov", 5, 700, False),
    ],
)
def test_sizes(backend, structure, B, d, shared):
    """Where matrices and rows are too large for a program, and where they serve the batch."""
    device, k = device_of(backend), 16
    leaves, make_Q, b = random_quadratic(structure, (B,), d, mu=0.3, shared=shared, dtype=torch.float64, device=device)
    b = b * 2.0 ** -torch.arange(B, dtype=torch.float64, device=device).unsqueeze(-1)
    run = lambda backend: F.nesterov(make_Q(*leaves), b, 0.5, 0.3, k, tolerance=0.1, return_info=True, backend=backend)
    (y, info), (expected, stops) = run(backend), run("eager")
    torch.testing.assert_close((y, info.residual), (expected, stops.residual))
    assert torch.equal(info.num_steps, stops.num_steps)
    assert (info.num_steps < k).all()


@backends
def test_the_schedule_with_zeros(backend):
    """To the bit what the op makes of the coefficients with zeros, trajectory, thresholds and all."""
    device, k = device_of(backend), 30
    (q,), make_Q, b = random_quadratic("diagonal", (6,), 5, dtype=torch.float64, device=device)
    threshold = torch.tensor(0.05, dtype=torch.float64, device=device)

    def run(phi, beta, threshold, **options):
        options |= {"prox": uk.prox.SoftThreshold(threshold), "return_trajectory": True, "backend": backend}
        return F.momentum(make_Q(q), b, phi, beta, beta, k, **options)

    phi, beta = (torch.tensor(x, dtype=torch.float64, device=device) for x in (0.8, 0.3))
    ys, info = run(phi, beta, threshold, tolerance=1e-2, return_info=True)
    moves = torch.arange(k, device=device) < info.num_steps.unsqueeze(1)
    assert not moves.all()
    assert torch.equal(ys, run(phi * moves, beta * moves, threshold * moves))
    for i, n in enumerate(info.num_steps.tolist()):
        assert torch.equal(ys[n:, i], ys[n, i].expand(k + 1 - n, 5))


@backends
def test_info_without_a_tolerance_and_edges(backend):
    device = device_of(backend)
    (Q,), _, b = random_quadratic("dense", (3,), 4, dtype=torch.float32, device=device)
    y, info = F.gradient_descent(Q, b, 0.5, 6, return_info=True, backend=backend)
    shorter = F.gradient_descent(Q, b, 0.5, 5, backend=backend)
    assert info.num_steps.tolist() == [6] * 3
    torch.testing.assert_close(info.residual, (y - shorter).abs().amax(-1))
    assert torch.equal(y, F.gradient_descent(Q, b, 0.5, 6, backend=backend))
    y, info = F.gradient_descent(Q, b, 0.5, 0, tolerance=0.1, return_info=True, backend=backend)
    assert not y.any()
    assert info.num_steps.tolist() == info.residual.tolist() == [0] * 3
    # a minimizer is left alone after one look; nothing hangs on NaN
    y, info = F.gradient_descent(Q, 0 * b, 0.5, 9, tolerance=0.0, return_info=True, backend=backend)
    assert info.num_steps.tolist() == [1] * 3
    b[1, 2] = float("nan")
    y, info = F.gradient_descent(Q, b, 0.5, 9, tolerance=10.0, return_info=True, backend=backend)
    assert info.num_steps.tolist() == [1, 9, 1]
    assert y[[0, 2]].isfinite().all()
    empty = F.gradient_descent(Q[:0], b[:0], 0.5, 9, tolerance=0.1, return_info=True, backend=backend)
    assert empty[1].num_steps.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_counts_as_float32_does(dtype):
    (q,), make_Q, b = random_quadratic("diagonal", (40,), 5, dtype=torch.float32)
    q, b = q.to(dtype), b.to(dtype)
    y, info = F.nesterov(make_Q(q), b, 0.8, 0.1, 60, tolerance=1e-3, return_info=True)
    _, expected = F.nesterov(make_Q(q.float()), b.float(), 0.8, 0.1, 60, tolerance=1e-3, return_info=True)
    assert y.dtype == dtype
    assert torch.equal(info.num_steps, expected.num_steps)


def test_implicit_gradients_of_samples_that_stopped():
    (Q,), _, b = random_quadratic("dense", (3,), 4, mu=0.3, dtype=torch.float64)
    inputs = [Q.requires_grad_(), b.requires_grad_()]
    layer = uk.UnrolledNAG(500, 0.8, 0.3, tolerance=1e-12, backward="implicit")
    y, info = layer(Q, b, return_info=True)
    assert (info.num_steps < 200).all()
    expected = torch.autograd.grad(F.minimize(Q, b).pow(3).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(y.pow(3).sum(), inputs, retain_graph=True), expected)
    assert "tolerance=1e-12" in repr(layer)
    expected = torch.autograd.functional.hvp(lambda b: F.minimize(Q, b).pow(3).sum(), b, torch.ones_like(b))[1]
    (first,) = torch.autograd.grad(y.pow(3).sum(), b, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), b)[0], expected)


@backends
@structures
def test_an_implicit_gradient_of_what_has_not_converged_says_so(backend, structure):
    """Nothing is refused: the residual is larger than the tolerance, and the gradient that of the formula."""
    leaves, make_Q, b = random_quadratic(structure, (3,), 4, dtype=torch.float64, device=device_of(backend))
    b.requires_grad_()
    options = {"tolerance": 1e-9, "backward": "implicit", "backend": backend}
    y, info = F.gradient_descent(make_Q(*leaves), b, 0.3, 4, return_info=True, **options)
    assert info.num_steps.tolist() == [4] * 3
    assert (info.residual > 1e-9 * y.abs().amax(-1).clamp(min=1)).all()
    cotangent = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, b, cotangent)
    # Q is symmetric; tikhonov's b comes with an x, which is not ȳ's
    Q = make_Q(*leaves)
    Q = Q if structure == "dense" else Q.to_dense()
    torch.testing.assert_close(grad, F.gradient_descent(Q, cotangent, 0.3, 4, backend="eager"))


def run_whole(patch):
    """Where samples stop is said of all iterates, and y is that of the op whose coefficients are zero from there on."""
    patch.setattr(op.LAUNCHERS["cpu"], "stopping", lambda *args: op.measure("cpu", *args[:-1], tolerance=args[-1]))
    patch.setattr(op, "of_known_iterate", lambda y, *args: op.exact(*args, False))
    patch.setattr(op, "of_known_minimizer", lambda y, *args: op.implicit(*args, False))


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension is not built")
@pytest.mark.parametrize(
    ("structure", "shared"),
    [
        pytest.param("dense", False, id="own"),
        pytest.param("dense", True, id="shared"),
        pytest.param("diagonal", False, id="diagonal"),
        pytest.param("tikhonov", False, id="tikhonov"),
        pytest.param("spectral", False, id="spectral"),
        pytest.param("spectral", True, id="spectral-shared"),
    ],
)
@pytest.mark.parametrize(
    ("B", "d", "method", "dtype"),
    [
        (40, 5, "gd", torch.float32),
        (3, 5, "momentum", torch.float64),
        (40, 1, "nesterov", torch.float32),
        (40, 12, "momentum", torch.float32),
        (3, 12, "nesterov", torch.bfloat16),
        (9, 20, "gd", torch.float32),
        (9, 33, "nesterov", torch.float64),
        (3, 64, "nesterov", torch.float32),
        (1, 130, "gd", torch.float16),
        (2, 40, "momentum", torch.float32),
    ],
)
def test_the_kernel_stops_where_a_whole_run_says(B, d, method, dtype, structure, shared, monkeypatch):
    """To the bit, gradients too, in every layout, with and without a map, whatever the number of threads."""
    compute, k = torch.promote_types(dtype, torch.float32), 30
    leaves, make_Q, b = random_quadratic(structure, (B,), d, mu=0.2, shared=shared, dtype=compute)
    b = b * 2.0 ** -torch.arange(B, dtype=compute).unsqueeze(-1)
    phi = torch.linspace(0.4, 0.9, k, dtype=compute).requires_grad_()
    inputs = [x.detach().to(dtype).requires_grad_() for x in (*leaves, b)]

    def run(tolerance, prox, backward="unrolled"):
        options = {"prox": prox, "tolerance": tolerance, "return_info": True, "backend": "cpu", "backward": backward}
        y, info = METHODS[method](make_Q(*inputs[:-1]), inputs[-1], phi, k, **options)
        grads = torch.autograd.grad(y.float().square().sum(), [*inputs, phi], materialize_grads=True)
        return [y, *info, *grads]

    box, l1 = uk.prox.Box(-0.5, 0.4), uk.prox.L1(0.01)
    cases = [(None, None), (0.0, box), (1e-2, box, "implicit"), (1e-2, None, "implicit"), (1e-2, l1), (1e-2, None)]
    for case in cases:
        actual = run(*case)
        with monkeypatch.context() as patch:
            run_whole(patch)
            expected = run(*case)
        assert all(map(torch.equal, actual, expected))
    if B == 40:
        assert len(actual[1].unique()) > 1
    torch.set_num_threads(3)
    again = run(*case)
    torch.set_num_threads(1)
    assert all(map(torch.equal, actual, again))


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension is not built")
def test_a_long_sample_stops_as_a_whole(monkeypatch):
    # of several strips, which do not stop by themselves
    (q,), make_Q, b = random_quadratic("diagonal", (2,), 5000, mu=0.2, dtype=torch.float32)
    run = lambda: F.nesterov(make_Q(q), b, 0.8 * torch.ones(30), 0.2, 30, tolerance=1e-2, return_info=True)
    y, info = run()
    assert (info.num_steps < 30).all()
    run_whole(monkeypatch)
    expected, steps = run()
    assert torch.equal(y, expected)
    assert all(map(torch.equal, info, steps))


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension is not built")
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("B", [1, 2, 40])
def test_lanes_without_an_element_do_not_move(B, structure):
    """A bound that is one number holds nothing there: a sample at its minimizer stops after one look."""
    q, b = torch.ones(B, 21), torch.full((B, 21), -5.0)
    Q = q.diag_embed() if structure == "dense" else uk.Diagonal(q)
    options = {"y0": -b, "prox": uk.prox.Box(lower=3.0), "tolerance": 1e-3, "return_info": True, "backend": "cpu"}
    y, info = F.gradient_descent(Q, b, 0.5, 9, **options)
    assert info.num_steps.tolist() == [1] * B
    assert info.residual.tolist() == [0] * B
    assert torch.equal(y, -b)


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    Q, b, phi = torch.eye(4, dtype=dtype).expand(3, 4, 4), torch.ones(3, 4, dtype=dtype), torch.tensor(0.5)
    tests = ("test_schema", "test_faketensor")
    for structure in ((Q, None, None), (None, b, None), (None, b, b), (Q, b, None)):
        arguments = (*structure, b, None, phi, phi, phi, *[None] * 5, 6, 0.1)
        torch.library.opcheck(torch.ops.unrolled_kernels.momentum_stopping.default, arguments, test_utils=tests)


def test_compile_and_vmap():
    # the number of steps of one input is none of another's
    layer = uk.UnrolledGD(30, 0.5, tolerance=1e-1)
    (Q,), _, b = random_quadratic("dense", (3,), 4, dtype=torch.float64)
    traced = torch.jit.trace(layer, (Q, b), check_trace=False)
    torch.testing.assert_close(traced(Q, 1000 * b), layer(Q, 1000 * b))
    with FakeTensorMode():
        assert layer(torch.empty(3, 4, 4), torch.empty(3, 4)).shape == (3, 4)
    (Q,), _, b = random_quadratic("dense", (3, 2), 4, dtype=torch.float64)
    layer = uk.UnrolledGD(9, 0.5, tolerance=1e-1)
    expected, info = layer(Q, b, return_info=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda Q, b: layer(Q, b, return_info=True), fullgraph=True, backend="aot_eager")
    for run in (compiled, torch.func.vmap(lambda Q, b: layer(Q, b, return_info=True))):
        y, (num_steps, _) = run(Q, b)
        torch.testing.assert_close(y, expected)
        assert torch.equal(num_steps, info.num_steps)
