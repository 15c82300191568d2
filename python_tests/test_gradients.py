"""Gradients of the last steps alone, and those of the minimizer: against loops that say so, on every backend."""

import runpy
from pathlib import Path

import problems
import pytest
import torch
from conftest import BACKENDS, device_of, interpreted
from problems import DTYPES, MomentumProblem, RnnProblem, compare

import unrolled_kernels as uk
import unrolled_kernels.functional as F
from unrolled_kernels.ops.momentum import function
from unrolled_kernels.testing import STRUCTURES, bytes_kept_for_backward, random_quadratic

IMPLICIT = {"backward": "implicit"}
MODES = {"one": {"backward_steps": 1}, "three": {"backward_steps": 3}, "implicit": IMPLICIT}

backends = pytest.mark.parametrize("backend", [pytest.param("eager", id="eager"), *BACKENDS])
structures = pytest.mark.parametrize("structure", STRUCTURES)
methods = pytest.mark.parametrize("method", ["gd", "momentum"])
modes = pytest.mark.parametrize("mode", MODES)


def truncated_loop(structure, leaves, b, y0, phi, beta, gamma, k, n, prox=None):
    """y_0 … y_k by a loop that autograd cannot follow beyond y_(k-n) and y_(k-n-1)."""
    R = leaves[1] if structure == "spectral" else None
    Q = uk.Diagonal(leaves[0]) if structure == "spectral" else STRUCTURES[structure](*leaves)
    rotate = (lambda x: x) if R is None else lambda x: (R.mT @ x.unsqueeze(-1)).squeeze(-1)
    back = (lambda x: x) if R is None else lambda x: (R @ x.unsqueeze(-1)).squeeze(-1)
    if structure == "tikhonov":
        Q, b = Q.as_diagonal(b)
    apply_Q = (lambda x: (Q @ x.unsqueeze(-1)).squeeze(-1)) if structure == "dense" else Q.matvec
    # spectral: the recurrence of ŷ = Rᵀy
    y, previous, b, ys = rotate(y0), rotate(y0), rotate(b), [y0]
    for t in range(k):
        if t == k - n > 0:
            y, previous = rotate(ys[t].detach()), rotate(ys[t - 1].detach())
        step_size, momentum, extrapolation = (c[:, t : t + 1] for c in (phi, beta, gamma))
        m = y - previous
        y, previous = y + momentum * m - step_size * (apply_Q(y + extrapolation * m) + b), y
        y = y if prox is None else proximal_map(y, step_size, *prox, t)
        ys.append(back(y))
    return torch.stack(ys)


@backends
@pytest.mark.parametrize("structure", ["dense", "diagonal", "spectral"])
def test_the_implicit_solution_may_be_larger_than_float16_holds(backend, structure):
    """b̄ is 10⁶, y 10⁻³: what is neither is q̄ or Q̄, their product."""
    leaves, make_Q, _ = random_quadratic(structure, (3,), 4, mu=1.0, L=1.0, dtype=torch.float64)

    def gradients(name, dtype):
        to = lambda x: x.to(device_of(name) if name != "eager" else "cpu", dtype)
        inputs = [to(x).requires_grad_() for x in leaves]
        b, y0 = to(torch.zeros(3, 4)), to(torch.full((3, 4), 1e-5))
        y = F.gradient_descent(make_Q(*inputs), b, -9.0, 2, y0=y0, backward="implicit", backend=name)
        return torch.autograd.grad(y, inputs, torch.full_like(y, 10_000))

    for grad, exact in zip(gradients(backend, torch.float16), gradients("eager", torch.float64), strict=True):
        error = (grad.cpu().double() - exact).abs().max()
        assert error <= 4e-3 * exact.abs().max()


@backends
@pytest.mark.parametrize("structure", ["dense", "diagonal", "spectral"])
def test_the_gradient_of_gamma_does_not_cancel(backend, structure):
    """-φ (Qᵀa)ᵀm, as exact where Q is tiny as anywhere: aᵀm is a million times larger."""
    leaves, make_Q, b = random_quadratic(structure, (3,), 4, mu=1e-7, L=1e-6, dtype=torch.float64)

    def gradient(name, dtype):
        to = lambda x: x.to(device_of(name) if name != "eager" else "cpu", dtype)
        gamma = to(torch.tensor(0.6)).requires_grad_()
        Q, g = make_Q(*map(to, leaves)), to(b)
        y = F.momentum(Q, g, 0.5, 0.4, gamma, 3, backward_steps=1, backend=name)
        return torch.autograd.grad(y.sum(), gamma)[0].double().cpu()

    torch.testing.assert_close(gradient(backend, torch.float32), gradient("eager", torch.float64), rtol=2e-5, atol=0)


@backends
@structures
@pytest.mark.parametrize("trajectory", [False, True], ids=["last", "trajectory"])
@pytest.mark.parametrize("n", [1, 2, 4, 5, 6])
def test_truncated_is_autograd_with_a_detach(backend, structure, trajectory, n):
    if interpreted(backend) and n not in (2, 6):
        pytest.skip("interpreted: two numbers of steps")
    device, k = device_of(backend), 5
    leaves, make_Q, b = random_quadratic(structure, (3,), 4, symmetric=False, dtype=torch.float64, device=device)
    y0, phi, beta, gamma = (torch.rand(3, size, dtype=torch.float64, device=device) for size in (4, k, k, k))
    inputs = [x.requires_grad_() for x in (*leaves, b, y0, phi, beta, gamma)]
    options = {"y0": y0, "return_trajectory": trajectory, "backward_steps": n, "backend": backend}
    actual = F.momentum(make_Q(*leaves), b, phi, beta, gamma, k, **options)
    expected = truncated_loop(structure, leaves, b, y0, phi, beta, gamma, k, n)
    if trajectory and n < k:
        # what comes before is constant as an output too
        expected = torch.cat([expected[: k - n + 1].detach(), expected[k - n + 1 :]])
    expected = expected if trajectory else expected[-1]
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(actual)
    grads, references = (
        torch.autograd.grad(y, inputs, cotangent, allow_unused=True, materialize_grads=True) for y in (actual, expected)
    )
    for grad, reference in zip(grads, references, strict=True):
        torch.testing.assert_close(grad, reference)
    if n < k:
        assert not grads[len(leaves) + 1].any()  # y0
        assert not grads[-3][:, : k - n].any()  # φ of the steps before


@backends
@structures
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_implicit_is_the_gradient_of_the_minimizer(backend, structure, shared):
    """Once the steps have converged; before, as the formulas have it: k steps on the transposed Q."""
    device = device_of(backend)
    leaves, make_Q, b = random_quadratic(
        structure, (3,), 4, mu=0.3, symmetric=False, shared=shared, dtype=torch.float64, device=device
    )
    phi, mu = (torch.tensor(x, dtype=torch.float64, device=device, requires_grad=True) for x in (0.5, 0.3))
    inputs = [x.requires_grad_() for x in (*leaves, b, torch.randn_like(b))]
    run = lambda k, **options: F.nesterov(
        make_Q(*leaves), b, phi, mu, k, y0=inputs[-1], backward="implicit", backend=backend, **options
    )
    cotangent = torch.randn_like(b)
    *actual, d_y0, d_phi, d_mu = torch.autograd.grad(run(120), [*inputs, phi, mu], cotangent)
    expected = torch.autograd.grad(F.minimize(make_Q(*leaves), b), inputs[:-1], cotangent)
    torch.testing.assert_close(actual, list(expected))
    for zero in (d_y0, d_phi, d_mu):
        assert not zero.any()
    if structure == "dense":
        y = run(4)
        d_Q, db = torch.autograd.grad(y, [leaves[0], b], cotangent)
        torch.testing.assert_close(db, F.nesterov(leaves[0].mT, cotangent, phi, mu, 4, backend="eager"))
        outer = db.unsqueeze(-1) * y.unsqueeze(-2)
        torch.testing.assert_close(d_Q, outer.sum(0) if shared else outer)
        torch.testing.assert_close(y, F.nesterov(leaves[0], b, phi, mu, 4, y0=inputs[-1], backend="eager"))


@backends
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_no_step_is_no_rotation(backend, shared):
    """Implicitly, too: y_0 comes back whatever R is, and nothing has a gradient."""
    device = device_of(backend)
    R = torch.rand(*(() if shared else (3,)), 4, 4, dtype=torch.float64, device=device)
    leaves = [x.requires_grad_() for x in (torch.rand(3, 4).to(R), R, torch.rand(3, 4).to(R), torch.rand(3, 4).to(R))]
    q, R, b, y0 = leaves
    y = F.gradient_descent(uk.Spectral(q, R), b, 0.5, 0, y0=y0, backward="implicit", backend=backend)
    assert torch.equal(y, y0)
    for grad in torch.autograd.grad(y.sum(), leaves, allow_unused=True, materialize_grads=True):
        assert not grad.any()


PROXES = {
    "box": (uk.prox.Box, ((3, 4), (4,))),
    "lower": (lambda lower: uk.prox.Box(lower), ((4,),)),
    "upper": (lambda upper: uk.prox.Box(None, upper), ((3, 4),)),
    "l1": (uk.prox.L1, ((3, 4),)),
    "threshold": (uk.prox.SoftThreshold, ((6,),)),
}


def prox_values(name, k, dtype=torch.float64):
    """Tensors that hold some entries and leave others."""
    shapes = [(k,) if name == "threshold" else shape for shape in PROXES[name][1]]
    first = torch.full(shapes[0], 0.3 if name in ("upper", "l1", "threshold") else -0.3, dtype=dtype)
    return [first, torch.full(shapes[-1], 1.0, dtype=dtype)][: len(shapes)]


@backends
@pytest.mark.parametrize("structure", ["dense", "diagonal", "tikhonov"])
@pytest.mark.parametrize("name", PROXES)
def test_implicit_with_a_prox(backend, structure, name):
    """Once the steps have converged the gradients of all of them say the same."""
    device = device_of(backend)
    if interpreted(backend):
        pytest.skip("so many steps take seconds, interpreted")
    leaves, make_Q, b = random_quadratic(
        structure, (3,), 4, mu=0.3, symmetric=False, dtype=torch.float64, device=device
    )
    k = 100
    values = [x.requires_grad_() for x in prox_values(name, k)]
    inputs = [x.requires_grad_() for x in (*leaves, b, *values)]
    cotangent = torch.randn_like(b)
    run = lambda **options: F.nesterov(make_Q(*leaves), b, 0.5, 0.3, k, prox=PROXES[name][0](*values), **options)
    y = run(backward="implicit", backend=backend)
    held = (y == 0) | (y == -0.3) | (y == 0.3) | (y == 1.0)
    assert 0 < held.sum() < held.numel()
    actual = torch.autograd.grad(y, inputs, cotangent)
    expected = torch.autograd.grad(run(backend="eager"), inputs, cotangent)
    if name == "threshold":
        # which counts as a coefficient
        assert not actual[-1].any()
        actual, expected = actual[:-1], expected[:-1]
    torch.testing.assert_close(actual, expected)

    def loss(*args):
        options = {"prox": PROXES[name][0](*args[len(leaves) + 1 :]), "backward": "implicit", "backend": backend}
        return (F.nesterov(make_Q(*args[: len(leaves)]), args[len(leaves)], 0.5, 0.3, k, **options) * cotangent).sum()

    point = [x.detach() for x in inputs]
    direction = [torch.randn_like(x) for x in point]
    along = torch.func.jvp(loss, tuple(point), tuple(direction))[1]
    gradient = torch.func.grad(loss, tuple(range(len(point))))(*point)
    torch.testing.assert_close(along, sum((g * v).sum() for g, v in zip(gradient, direction, strict=True)))


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension is not built")
@methods
@pytest.mark.parametrize(
    ("structure", "shared"), [("dense", False), ("dense", True), ("diagonal", False), ("tikhonov", False)]
)
@pytest.mark.parametrize("name", PROXES)
@pytest.mark.parametrize(("B", "d", "k"), [(40, 5, 9), (3, 12, 1), (9, 33, 60), (2, 130, 6), (1, 3000, 5)])
def test_the_implicit_kernels_hold_what_the_map_held(structure, shared, name, method, B, d, k):
    """In every layout, converged or not, with the bounds themselves left alone, which no kernel differentiates."""
    d = min(d, 200) if structure == "dense" else d
    leaves, make_Q, b = random_quadratic(
        structure, (B,), d, mu=0.3, symmetric=False, shared=shared, dtype=torch.float64, device="cpu"
    )
    first = torch.full((k,) if name == "threshold" else (B, d), -0.2 if name == "box" else 0.2, dtype=torch.float64)
    if name == "l1":
        first[:, ::2] = -0.1  # which counts as zero
        first.requires_grad_()
    values = [first, torch.full((d,), 0.5, dtype=torch.float64)][: len(PROXES[name][1])]
    inputs = [x.requires_grad_() for x in (*leaves, b)] + [x for x in values if x.requires_grad]
    cotangent = torch.randn_like(b)

    def gradients(backend):
        options = {"prox": PROXES[name][0](*values), "backward": "implicit", "backend": backend}
        if method == "gd":
            y = F.gradient_descent(make_Q(*leaves), b, 0.5, k, **options)
        else:
            y = F.nesterov(make_Q(*leaves), b, 0.5, 0.3, k, **options)
        return torch.autograd.grad(y, inputs, cotangent)

    torch.testing.assert_close(gradients("cpu"), gradients("eager"))


@backends
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("name", PROXES)
def test_truncated_with_a_prox(backend, structure, name):
    if interpreted(backend):
        pytest.skip("so many steps take seconds, interpreted")
    k, n = 6, 2
    leaves, make_Q, b = random_quadratic(structure, (3,), 4, dtype=torch.float64)
    y0, phi, beta, gamma = (torch.rand(3, size, dtype=torch.float64) for size in (4, k, k, k))
    values = prox_values(name, k)
    inputs = [x.requires_grad_() for x in (*leaves, b, y0, phi, beta, gamma, *values)]
    options = {"y0": y0, "prox": PROXES[name][0](*values), "backward_steps": n, "backend": backend}
    actual = F.momentum(make_Q(*leaves), b, phi, beta, gamma, k, **options)
    expected = truncated_loop(structure, leaves, b, y0, phi, beta, gamma, k, n, (name, values))[-1]
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(actual)
    grads = (
        torch.autograd.grad(y, inputs, cotangent, allow_unused=True, materialize_grads=True) for y in (actual, expected)
    )
    torch.testing.assert_close(*grads)


def proximal_map(v, step_size, name, values, t):
    """The map of ``PROXES`` with torch's own functions."""
    if name in ("l1", "threshold"):
        tau = values[0][t] if name == "threshold" else step_size * values[0]
        return v.sign() * (v.abs() - tau).relu()
    lower, upper = values if name == "box" else (values[0], None) if name == "lower" else (None, values[0])
    return v.clamp(lower, upper)


@backends
@structures
@methods
@modes
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(backend, structure, method, mode, dtype):
    if interpreted(backend) and dtype != "bf16":
        pytest.skip("interpreted: one dtype")
    if backend == "eager":
        pytest.skip("is the reference")
    cases = [(3, 5, "both", False), (7, 33, "step", True)]
    if structure in ("dense", "spectral") and backend == "cpu":
        # each layout of the kernels
        cases += [(9, 20, "both", False), (2, 64, "sample", False), (40, 20, "step", True), (40, 5, "scalar", True)]
    for B, d, form, shared in cases:
        problem = MomentumProblem(
            structure, (B,), d, 5, method=method, form=form, shared=shared, device=device_of(backend)
        )
        problem.gradients = MODES[mode]
        compare(problem, backend, DTYPES[dtype])


@backends
@structures
@modes
def test_second_order_is_that_of_eager(backend, structure, mode):
    for method in ("gd", "momentum"):
        problem = MomentumProblem(structure, (3,), 4, 5, method=method, device=device_of(backend))
        problem.gradients = MODES[mode]
        problems.assert_second_order_is_that_of_eager(problem, backend)


@structures
@methods
@modes
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_gradients_that_may_be_differentiated(structure, method, mode, dtype):
    """They come another way, and are as close to the exact ones; those of float32 are float32's under autocast, too."""
    problem = MomentumProblem(structure, (3,), 4, 8, method=method, form="step", device="cpu")
    problem.gradients = MODES[mode]
    expected = compare(problem, "cpu", DTYPES[dtype], create_graph=True)
    if dtype == "f32":
        with torch.autocast("cpu", torch.bfloat16):
            actual = problem.run("cpu", DTYPES[dtype], create_graph=True)
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@backends
@structures
@modes
def test_func_transforms(backend, structure, mode):
    device = device_of(backend)
    leaves, make_Q, b = random_quadratic(structure, (3, 2), 4, dtype=torch.float64, device=device)
    phi = torch.rand(3, dtype=torch.float64, device=device)

    def loss(name, *args):
        *q, b, phi = args
        return F.momentum(make_Q(*q), b, phi, 0.5 * phi, 0.3, 5, backend=name, **MODES[mode]).square().sum()

    args = (*leaves, b, phi)
    gradient = lambda name: torch.func.grad(lambda *a: loss(name, *a), tuple(range(len(args))))
    actual, expected = (torch.func.vmap(gradient(name))(*args) for name in (backend, "eager"))
    torch.testing.assert_close(actual, expected)
    point = [x[0] for x in args]
    direction = [torch.randn_like(x) for x in point]
    along = torch.func.jvp(lambda *a: loss(backend, *a), tuple(point), tuple(direction))[1]
    products = (g * v for g, v in zip(gradient(backend)(*point), direction, strict=True))
    torch.testing.assert_close(along, sum(x.sum() for x in products))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["gd", "momentum", "rnn"])
def test_compile_and_export(method, mode):
    """Traced programs keep the mode: their gradients are not the exact ones."""
    if method == "rnn" and mode == "implicit":
        pytest.skip("the RNN has no fixed point of a known equation")
    options = MODES[mode]
    layer = {
        "gd": lambda: uk.UnrolledGD(5, 0.5, learn_step_size=True, **options),
        "momentum": lambda: uk.UnrolledMomentum.heavy_ball(5, 0.5, 0.2, **options),
        "rnn": lambda: uk.UnrolledRNN(5, 4, (6,), **options),
    }[method]().double()
    (Q,), _, b = random_quadratic("dense", (3,), 4, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (Q, b)]
    expected = torch.autograd.grad(layer(*inputs).pow(3).sum(), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    program = torch.export.export(layer, (Q, b)).module()
    for run in (compiled, program):
        torch.testing.assert_close(torch.autograd.grad(run(*inputs).pow(3).sum(), inputs), expected)


@backends
@structures
def test_what_is_kept_for_backward(backend, structure):
    """The inputs, and of what is computed y_k or the iterates that the last steps begin with, whatever k is."""
    if backend in ("eager", "manual"):
        pytest.skip("eager keeps every step")
    device = device_of(backend)
    leaves, make_Q, b = random_quadratic(structure, (8,), 6, dtype=torch.float32, device=device)
    inputs = [x.requires_grad_() for x in (*leaves, b)]
    for options in ({"backward_steps": 2}, IMPLICIT):
        kept = [
            bytes_kept_for_backward(
                lambda k=k, options=options: F.gradient_descent(make_Q(*leaves), b, 0.1, k, backend=backend, **options)
            )
            for k in (5, 300)
        ]
        assert kept[0] == kept[1]
        # torch's rotations keep b̂, ŷ_k, and the constant as ŷ and as y
        states = 4 if structure == "spectral" and backend != "cpu" else 1
        assert kept[0] <= sum(x.untyped_storage().nbytes() for x in inputs) + states * b.nbytes + 4


@pytest.mark.parametrize("backend", [pytest.param("eager", id="eager"), *BACKENDS])
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("trajectory", [False, True], ids=["last", "trajectory"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_truncated_rnn(backend, structure, trajectory, n):
    """k - n cells, and from their state n more."""
    problem = RnnProblem(structure, (3,), 4, 3, (6, 5), trajectory=trajectory, device=device_of(backend))
    leaves = {name: x.requires_grad_() for name, x in problem.leaves.items()}
    problem.gradients = {"backward_steps": n}
    actual = problem.call(backend, leaves)
    problem.gradients, problem.trajectory = {}, True
    whole = problem.call("eager", leaves)
    if n < 3:
        problem.k = n
        rest = problem.call("eager", leaves | {"y0": whole[3 - n].detach()})
        whole = torch.cat([whole[: 3 - n + 1].detach(), rest[1:]])
    expected = whole if trajectory else whole[-1]
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(actual)
    grads = (
        torch.autograd.grad(y, list(leaves.values()), cotangent, allow_unused=True, materialize_grads=True)
        for y in (actual, expected)
    )
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_truncated_rnn_in_every_dtype(backend, dtype):
    problem = RnnProblem("dense", (3,), 4, 5, (6, 5), device=device_of(backend))
    problem.gradients = {"backward_steps": 2}
    compare(problem, backend, DTYPES[dtype])


def test_bias_on_the_papers_task():
    """What docs/mathematics.md says of it: truncated gradients stay wrong, and the implicit one is right in the end."""
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "gradient_bias.py"))
    for modes in example["main"]().values():
        at = {k: {mode: errors[i] for mode, errors in modes.items()} for i, k in enumerate(example["DEPTHS"])}
        assert at[100]["implicit"] < 1e-4 < 0.02 < at[100]["10 steps"] < at[100]["5 steps"] < at[100]["one step"]
        assert at[5]["5 steps"] < 1e-12 < at[8]["5 steps"] < at[8]["implicit"]


# structure, dtype, prox, trajectory of the modes that csrc/autograd has a node for
IN_CPP = {
    "dense": ("dense", torch.float32, False, False),
    "diagonal": ("diagonal", torch.float32, False, False),
    "tikhonov": ("tikhonov", torch.float64, False, False),
    "dense-prox": ("dense", torch.float64, True, False),
    "diagonal-prox": ("diagonal", torch.float32, True, True),
    "diagonal-bf16": ("diagonal", torch.bfloat16, False, True),
    "spectral": ("spectral", torch.float32, False, False),
    "spectral-bf16": ("spectral", torch.bfloat16, False, True),
}


@pytest.mark.skipif(function._node is None, reason="csrc/autograd is not built for this torch")
@methods
@modes
@pytest.mark.parametrize("case", IN_CPP)
def test_both_nodes_give_the_same_bits(case, mode, method, monkeypatch):
    structure, dtype, prox, trajectory = IN_CPP[case]
    if mode == "implicit" and trajectory:
        pytest.skip("a Function in Python")
    leaves, make_Q, b = random_quadratic(structure, (3,), 5, dtype=torch.float64, device="cpu")
    compute = torch.promote_types(dtype, torch.float32)
    phi, weight = 0.1 + torch.rand(3, 4, dtype=compute), torch.full((5,), 0.05, dtype=compute)
    inputs = [x.detach().to(dtype).requires_grad_() for x in (*leaves, b, b / 2)]
    inputs += [phi.requires_grad_(), weight.requires_grad_()] if prox else [phi.requires_grad_()]

    def run():
        *Q, g, y0, phi = inputs[: len(leaves) + 3]
        options = {"y0": y0, "return_trajectory": trajectory, "backend": "cpu", **MODES[mode]}
        options |= {"prox": uk.prox.L1(inputs[-1])} if prox else {}
        if method == "gd":
            return F.gradient_descent(make_Q(*Q), g, phi, 4, **options)
        return F.momentum(make_Q(*Q), g, phi, 0.3, phi / 2, 4, **options)

    def gradients(y, **options):
        return torch.autograd.grad(y.float().pow(3).sum(), inputs, materialize_grads=True, **options)

    def all_of_it():
        """y and its gradients plainly, with hooks on what is kept, watched, and of second order."""
        kept, hooks = [], torch.autograd.graph.saved_tensors_hooks
        with hooks(lambda x: kept.append(x) or len(kept) - 1, kept.__getitem__):
            hooked = run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            watched = gradients(run())
        y = run()
        found = [y, *gradients(y, retain_graph=True), *gradients(hooked), *watched]
        if dtype == torch.float64:
            squares = sum(g.square().sum() for g in gradients(y, create_graph=True))
            found += torch.autograd.grad(squares, inputs, materialize_grads=True)
        return y, found

    y, in_cpp = all_of_it()
    assert _is_of_cpp(y)
    monkeypatch.setattr(function, "_node", None)
    y, in_python = all_of_it()
    assert not _is_of_cpp(y)
    assert all(map(torch.equal, in_cpp, in_python))


def _is_of_cpp(y):
    """Whether a node of csrc/autograd is among those that y comes of."""
    nodes = [y.grad_fn]
    for node in nodes:
        nodes += [x for x, _ in node.next_functions if x is not None]
    return any("CppNode" in node.name() for node in nodes)


def test_all_steps_are_the_exact_gradient():
    layer, more = uk.UnrolledNAG(4, 0.5), uk.UnrolledNAG(4, 0.5, backward_steps=9)
    (Q,), _, b = random_quadratic("dense", (3,), 4)
    Q.requires_grad_()
    assert torch.equal(*(torch.autograd.grad(run(Q, b).sum(), Q)[0] for run in (layer, more)))
