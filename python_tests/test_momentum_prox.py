"""The test law for steps that end with a proximal map: constraints and sparsity, on every backend."""

import itertools
import math
import runpy
from pathlib import Path

import problems
import pytest
import torch
from conftest import BACKENDS, device_of, interpreted
from problems import DTYPES, MomentumProblem, compare

import unrolled_kernels as uk
import unrolled_kernels.functional as F
from unrolled_kernels.ops.momentum import function
from unrolled_kernels.prox import L1, Box, NonNegative, SoftThreshold
from unrolled_kernels.testing import STRUCTURES, random_quadratic

MAPS = ("box", "lower", "l1", "soft_threshold")

backends = pytest.mark.parametrize("backend", BACKENDS)
structures = pytest.mark.parametrize("structure", STRUCTURES)
maps = pytest.mark.parametrize("prox", MAPS)
methods = pytest.mark.parametrize("method", ["gd", "momentum"])


def skip_interpreted(backend, but):
    """Of what takes the interpreter a second, run ``but`` a few."""
    if interpreted(backend) and not but:
        pytest.skip("interpreted, a second")


@backends
@structures
@maps
@methods
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients(backend, structure, prox, method, dtype):
    # a spectral Q runs as a dense one
    few = (
        structure == "dense" or (structure == "diagonal" and method == "momentum") or structure + prox == "tikhonovbox"
    )
    skip_interpreted(backend, few and dtype == "f32")
    for (B, d, k), trajectory in zip(((3, 5, 7), (19, 33, 4)), (True, False), strict=True):
        problem = MomentumProblem(
            structure, (B,), d, k, method=method, prox=prox, trajectory=trajectory, device=device_of(backend)
        )
        compare(problem, backend, DTYPES[dtype])


@backends
@structures
@maps
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_schedule_forms_and_shared_Q(backend, structure, prox, shared):
    skip_interpreted(backend, structure in ("dense", "diagonal") and (prox == "l1") != shared)
    forms = ("scalar", "both") if interpreted(backend) else ("scalar", "step", "sample", "both")
    for form, batch, warm in itertools.product(forms, ((2, 5), (70,)), (False, True)):
        if interpreted(backend) and (batch == (70,)) == warm:
            continue
        options = {"form": form, "shared": shared, "warm": warm, "prox": prox, "device": device_of(backend)}
        compare(MomentumProblem(structure, batch, 6, 5, **options), backend, torch.float32)


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] == "cpu"])
@maps
@methods
def test_one_large_matrix(backend, prox, method, monkeypatch):
    """Kept iterates of a soft threshold give the gradients that replayed ones do; those of a clamp are replayed."""
    problem = MomentumProblem("dense", (40,), 130, 4, method=method, prox=prox, shared=True)
    kept = compare(problem, backend, torch.float32)
    monkeypatch.setattr(function, "KEPT_BYTES", 0)
    for name, x in problem.run(backend, torch.float32).items():
        torch.testing.assert_close(kept[name], x, rtol=1e-5, atol=1e-6, msg=name)


@backends
@structures
@maps
def test_edges(backend, structure, prox):
    skip_interpreted(backend, (structure, prox) in (("dense", "box"), ("diagonal", "l1")))
    for k, B, d in itertools.product((0, 1, 3), (0, 1, 3), (1, 5)):
        problem = MomentumProblem(structure, (B,), d, k, form="step", prox=prox, device=device_of(backend), seed=3)
        compare(problem, backend, torch.float32)


@backends
@maps
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("d", [2, 8, 9, 16, 17, 32, 64, 65, 130, 2500])
def test_sizes(backend, structure, prox, d):
    few = d in ((9, 64, 130) if structure == "dense" else (2500,)) and prox in ("box", "soft_threshold")
    skip_interpreted(backend, few and (d < 130 or structure == "diagonal" or prox == "box"))
    if d > 130 and structure == "dense":
        pytest.skip("a product of this size takes seconds")
    few = d > 130 or (d == 130 and interpreted(backend))
    for B, form in ((2, "sample"),) if few else ((2, "sample"), (19, "step")):
        problem = MomentumProblem(structure, (B,), d, 3, form=form, prox=prox, device=device_of(backend), seed=d)
        compare(problem, backend, torch.float32)


@backends
@structures
@maps
def test_gradcheck(backend, structure, prox):
    skip_interpreted(backend, (structure, prox) in (("dense", "l1"), ("diagonal", "box")))
    cases = {"dense": ("gd", "scalar"), "diagonal": ("momentum", "both")}
    for method, form in (cases[structure],) if interpreted(backend) else cases.values():
        problem = MomentumProblem(
            structure, (2,), 3, 3, method=method, form=form, prox=prox, trajectory=True, device=device_of(backend)
        )
        names = list(problem.leaves)
        leaves = [problem.leaves[n].requires_grad_() for n in names]
        function = lambda *xs, names=names, p=problem: p.call(backend, dict(zip(names, xs, strict=True)))
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@backends
@structures
def test_layouts_and_subsets(backend, structure):
    """Strides, cotangents and unwanted gradients change nothing."""
    skip_interpreted(backend, structure == "dense")
    for prox in MAPS[::3] if interpreted(backend) else MAPS:
        problem = MomentumProblem(structure, (4,), 6, 3, prox=prox, device=device_of(backend))
        full = problem.run(backend, torch.float32)
        for layout in problems.LAYOUTS.values():
            moved = MomentumProblem(structure, (4,), 6, 3, prox=prox, device=device_of(backend))
            cast = moved.cast
            moved.cast = lambda dtype, cast=cast, layout=layout: {n: layout(x) for n, x in cast(dtype).items()}
            for name, x in moved.run(backend, torch.float32).items():
                torch.testing.assert_close(x, full[name], rtol=1e-5, atol=1e-6, msg=name)
        for without in problem.leaves:
            partial = problem.run(backend, torch.float32, without=(without,))
            for name, x in partial.items():
                torch.testing.assert_close(x, full[name], rtol=1e-5, atol=1e-6, msg=f"{name} without {without}")


@backends
@structures
@maps
def test_semantics(backend, structure, prox):
    skip_interpreted(backend, (structure, prox) in (("dense", "soft_threshold"), ("diagonal", "box")))
    problem = MomentumProblem(structure, (6,), 5, 4, prox=prox, device=device_of(backend))
    problems.assert_reruns_are_bit_equal(problem, backend)
    problems.assert_nothing_unwritten_is_read(problem, backend)
    # a clamp makes infinity a bound
    values = (math.nan,) if prox in ("box", "lower") else (math.nan, math.inf)
    problems.assert_bad_values_stay_in_their_row(problem, backend, ("y",), values)


@backends
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_derivatives_at_kinks_are_torchs(backend, structure):
    """clamp passes the cotangent where v is on a bound, softshrink passes none where |v| is the threshold."""
    device = device_of(backend)
    v = torch.tensor([[-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]], dtype=torch.float64, device=device)
    d = v.shape[1]
    Q = torch.zeros(1, d, d).to(v) if structure == "dense" else uk.Diagonal(torch.zeros(1, d).to(v))
    bounds = torch.full((d,), -1.0).to(v), torch.full((d,), 1.0).to(v)
    cases = [
        (Box(*bounds), lambda x: torch.clamp(x, *bounds)),
        (NonNegative(), lambda x: x.clamp(min=0)),
        (L1(1.0), lambda x: torch.nn.functional.softshrink(x, 1.0)),
        (SoftThreshold(0.0), lambda x: torch.nn.functional.softshrink(x, 0.0)),
    ]
    for prox, expected in cases:
        # from y_0 = v, a step of Q = 0 and b = 0 with φ = 1 is the map itself
        x, z = v.clone().requires_grad_(), v.clone().requires_grad_()
        y = F.gradient_descent(Q, torch.zeros_like(v), 1.0, 1, y0=x, prox=prox, backend=backend)
        torch.testing.assert_close(y, expected(z), rtol=0, atol=0)
        actual, wanted = (torch.autograd.grad(out.sum(), i)[0] for out, i in ((y, x), (expected(z), z)))
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@backends
def test_a_nan_of_the_map_does_not_vanish(backend):
    b, weight, threshold = torch.ones(4, 5), torch.full((4, 5), 0.1), torch.full((4, 3), 0.1)
    weight[1, 2] = threshold[2, 1] = math.nan
    b, weight, threshold = (x.to(device_of(backend)) for x in (b, weight, threshold))
    for Q in (uk.Diagonal(torch.ones_like(b)), torch.eye(5).to(b)):
        y = F.gradient_descent(Q, b, 0.5, 3, prox=L1(weight), backend=backend)
        assert y.isnan()[1, 2]
        assert not y.isnan()[[0, 2, 3]].any()
        y = F.gradient_descent(Q, b, 0.5, 3, prox=SoftThreshold(threshold), backend=backend)
        assert y.isnan().all(1).tolist() == [False, False, True, False]


@backends
def test_crossed_bounds_and_negative_weights(backend):
    """For tensors lower > upper gives upper, as torch.clamp, and what is below zero counts as zero."""
    device = device_of(backend)
    b = torch.randn(4, 5, dtype=torch.float64, device=device)
    q = torch.rand(4, 5, dtype=torch.float64, device=device)
    for Q in (uk.Diagonal(q), torch.diag_embed(q)):
        lower, upper = (x.clone().requires_grad_() for x in (0.1 * b.abs(), -0.1 * b.abs()))
        y = F.gradient_descent(Q, b, 0.5, 3, prox=Box(lower, upper), backend=backend)
        torch.testing.assert_close(y, upper, rtol=0, atol=0)
        grads = torch.autograd.grad(y.sum(), (lower, upper))
        torch.testing.assert_close(grads, (torch.zeros_like(lower), torch.ones_like(upper)))
        weight = torch.full((5,), -1.0, dtype=torch.float64, device=device, requires_grad=True)
        for prox in (L1(weight), SoftThreshold(weight[:3])):
            y = F.gradient_descent(Q, b, 0.5, 3, prox=prox, backend=backend)
            torch.testing.assert_close(y, F.gradient_descent(Q, b, 0.5, 3, backend=backend))
            assert not torch.autograd.grad(y.sum(), weight)[0].any()


@backends
def test_fixed_points_are_solutions(backend):
    """Box and L1 in float64 at the conditions of optimality, to 1e-10."""
    (Q,), _, b = random_quadratic("dense", (8,), 6, dtype=torch.float64)
    Q, b = Q.to(device_of(backend)), 3 * b.to(device_of(backend))
    gradient = lambda y: (Q @ y.unsqueeze(-1)).squeeze(-1) + b
    steps = 60 if interpreted(backend) else 2000
    y = F.nesterov(Q, b, 1.0, 0.1, steps, prox=Box(-1.0, 0.5), backend=backend)
    residual = (y - (y - gradient(y)).clamp(-1.0, 0.5)).abs().max()
    assert residual < (1e-3 if interpreted(backend) else 1e-10)
    y = F.nesterov(Q, b, 1.0, 0.1, steps, prox=L1(0.7), backend=backend)
    residual = (y - torch.nn.functional.softshrink(y - gradient(y), 0.7)).abs().max()
    assert residual < (1e-3 if interpreted(backend) else 1e-10)
    assert (y == 0).any()


def test_solutions_are_those_of_a_solver_of_quadratic_programs():
    quadprog = pytest.importorskip("quadprog")
    (Q,), _, b = random_quadratic("dense", (8,), 12, dtype=torch.float64)
    lower, upper = torch.full((12,), -0.5, dtype=torch.float64), torch.linspace(0.1, 1, 12, dtype=torch.float64)
    y = F.nesterov(Q, 3 * b, 1.0, 0.1, 500, prox=Box(lower, upper))
    assert ((y == lower) | (y == upper)).any()
    eye = torch.eye(12, dtype=torch.float64)
    constraints = torch.cat([eye, -eye], 1).numpy(), torch.cat([lower, -upper]).numpy()
    for Q_i, b_i, y_i in zip(Q, b, y, strict=True):
        expected = torch.from_numpy(quadprog.solve_qp(Q_i.numpy(), -3 * b_i.numpy(), *constraints)[0])
        torch.testing.assert_close(y_i, expected, rtol=0, atol=1e-8)


def test_solutions_are_those_of_a_lasso_solver():
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    X, target = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((40, 20), (40,)))
    Q, b = X.mT @ X / 40, -X.mT @ target / 40
    solver = linear_model.Lasso(alpha=0.05, fit_intercept=False, tol=1e-14, max_iter=100_000)
    expected = torch.from_numpy(solver.fit(X.numpy(), target.numpy()).coef_)
    assert 0 < (expected == 0).sum() < 20
    step_size = 1 / torch.linalg.matrix_norm(Q, 2).item()
    for layer in (
        uk.UnrolledGD(3000, step_size, prox=L1(0.05)),
        uk.UnrolledNAG(1000, step_size, None, prox=L1(0.05)),
        uk.UnrolledMomentum.fista(3000, step_size, prox=L1(torch.full((20,), 0.05)), learnable=False),
    ):
        torch.testing.assert_close(layer(Q, b), expected, rtol=0, atol=1e-8)


def test_a_step_of_every_method_is_the_papers_with_the_map():
    """FISTA as published: y_{t+1} = prox(z_t - φ ∇E(z_t)), z_{t+1} = y_{t+1} + (s_t - 1)/s_{t+1} (y_{t+1} - y_t)."""
    (Q,), _, b = random_quadratic("dense", (4,), 6, dtype=torch.float64)
    y = z = torch.zeros_like(b)
    s = 1.0
    for _ in range(9):
        s_next = (1 + math.sqrt(1 + 4 * s * s)) / 2
        y_next = torch.nn.functional.softshrink(z - 0.9 * ((Q @ z.unsqueeze(-1)).squeeze(-1) + b), 0.9 * 0.3)
        z = y_next + (s - 1) / s_next * (y_next - y)
        y, s = y_next, s_next
    layer = uk.UnrolledMomentum.fista(9, 0.9, prox=L1(0.3), learnable=False)
    torch.testing.assert_close(layer(Q, b), y)


def test_layers_hold_the_tensors_of_their_map():
    (Q,), _, b = random_quadratic("dense", (4,), 5, dtype=torch.float64)
    lower, upper = torch.full((5,), -0.2, dtype=torch.float64), torch.full((5,), 0.1, dtype=torch.float64)
    fixed = uk.UnrolledGD(6, 0.5, prox=Box(lower, upper))
    assert sorted(fixed.state_dict()) == ["prox_lower", "prox_upper"]
    assert not list(fixed.parameters())
    torch.testing.assert_close(fixed(Q, b), F.gradient_descent(Q, b, 0.5, 6, prox=Box(lower, upper)))
    for layer in (
        uk.UnrolledGD(6, 0.5, prox=L1(0.1), learn_prox=True),
        uk.UnrolledNAG(6, 0.5, prox=SoftThreshold(torch.full((6,), 0.1)), learn_prox=True),
        uk.UnrolledMomentum.fista(6, 0.5, prox=Box(lower, None), learn_prox=True, learnable=False),
    ):
        layer(Q, b).square().sum().backward()
        (parameter,) = layer.parameters()
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()
        other = uk.UnrolledGD(6, 0.5, prox=layer.prox, learn_prox=True)
        other.load_state_dict({name: x for name, x in layer.state_dict().items() if name.startswith("prox_")})
        assert repr(other).endswith(", backend='auto')")
    assert "prox=Box(lower=[5] (learned), upper=None), backend" in repr(other)
    assert "prox=L1(weight=0.1), backend" in repr(uk.UnrolledGD(6, 0.5, prox=L1(0.1)))
    assert type(fixed.prox) is Box
    assert fixed.double().prox.lower.dtype == torch.float64


def test_refusals():
    Q, b = torch.eye(3).expand(2, 3, 3), torch.ones(2, 3)
    layer = uk.UnrolledGD
    cases = [
        (ValueError, "lower: expected lower <= upper, got lower=1.0 and upper=0.0", lambda: Box(1.0, 0.0)),
        (ValueError, "upper: expected a number, got nan", lambda: Box(None, math.nan)),
        (ValueError, "weight: expected a number >= 0, got -1", lambda: L1(-1)),
        (ValueError, "threshold: expected a number >= 0, got nan", lambda: SoftThreshold(math.nan)),
        (TypeError, "weight: expected a float or a floating-point tensor, got 'a'", lambda: L1("a")),
        (
            TypeError,
            "lower: expected a float or a floating-point tensor, got a tensor of",
            lambda: Box(torch.arange(3)),
        ),
        (TypeError, "prox: expected None or an object of unrolled_kernels.prox", lambda: layer(3, prox=0.1)),
        (TypeError, "prox: expected None or an object", lambda: F.nesterov(Q, b, 0.1, 0.1, 3, prox=torch.relu)),
        (
            ValueError,
            r"weight: shape \[4\] does not broadcast to \(\*batch, d\) = \[2, 3\]",
            lambda: F.gradient_descent(Q, b, 0.1, 3, prox=L1(torch.ones(4))),
        ),
        (
            ValueError,
            r"threshold: shape \[4\] does not broadcast to \(\*batch, num_steps\) = \[2, 3\]",
            lambda: layer(3, prox=SoftThreshold(torch.ones(4)))(Q, b),
        ),
        (ValueError, "learn_prox: there is nothing to learn", lambda: layer(3, learn_prox=True)),
        (TypeError, "prox", lambda: uk.UnrolledRNN(3, 4, prox=L1(0.1))),
        (TypeError, "prox", lambda: F.rnn(Q, b, (), 3, prox=L1(0.1))),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] == "cpu"])
@pytest.mark.parametrize("structure", ["dense", "diagonal", "tikhonov"])
@maps
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_opcheck(backend, structure, prox, permuted):
    problem = MomentumProblem(structure, (3,), 5, 4, prox=prox, trajectory=True)
    operands = [x for n, x in problem.leaves.items() if n.startswith("Q")]
    names = ("b", "y0", "phi", "beta", "gamma", "mu", "lower", "upper", "weight", "threshold")
    leaves = {n: x.expand(3, 5) if n == "upper" else x for n, x in problem.leaves.items()}
    tensors = [*problems.canonical_structure(structure, operands), *(leaves.get(n) for n in names)]
    turn = lambda x: x if x is None or not permuted else x.mT.contiguous().mT
    arguments = (*map(turn, tensors), 4, True)
    grad = turn(problem.normal(5, 3, 5))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.unrolled_kernels.momentum.default, arguments, test_utils=tests)
    backward = torch.ops.unrolled_kernels.momentum_backward
    every = backward(grad, *arguments, (1 << 13) - 1)
    for needs in ((1 << 13) - 1, 0, 1 << 9, 1 << 10 | 1, 1 << 11 | 1 << 3, 1 << 12):
        torch.library.opcheck(backward.default, (grad, *arguments, needs), test_utils=tests)
        for i, (g, whole) in enumerate(zip(backward(grad, *arguments, needs), every, strict=True)):
            assert torch.equal(g, whole) if needs >> i & 1 and arguments[i] is not None else g is None, i


@pytest.mark.parametrize("example", ["lista", "box_qp"])
def test_examples(example):
    main = runpy.run_path(str(Path(__file__).parents[1] / "examples" / f"{example}.py"))["main"]
    if example == "box_qp":
        assert main(d=8, steps=60, batch=64) < 0.05
    else:
        nmse = main(n=60, m=30, num_steps=6, steps=150, batch=64)
        assert nmse["LISTA"] < nmse["ISTA"] - 2


def test_compile_export_and_vmap():
    (Q,), _, b = random_quadratic("dense", (4,), 5, dtype=torch.float32)
    weight = torch.full((5,), 0.1, requires_grad=True)
    run = lambda Q, b, weight: F.nesterov(Q, b, 0.5, 0.1, 6, prox=L1(weight))
    expected = run(Q, b, weight)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(Q, b, weight)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(y.square().sum(), weight)[0] for y in (compiled, expected)), rtol=1e-5, atol=1e-6
    )
    weights = torch.rand(3, 5)
    batched = torch.func.vmap(run, in_dims=(None, None, 0))(Q, b, weights)
    torch.testing.assert_close(batched, torch.stack([run(Q, b, w) for w in weights]))
    layer = uk.UnrolledGD(6, 0.5, prox=NonNegative())
    program = torch.export.export(layer, (Q, b))
    torch.testing.assert_close(program.module()(Q, b), layer(Q, b))
