"""The test law for the op family ``rnn``: every backend against the float64 reference, every row of the law."""

import itertools

import problems
import pytest
import torch
from conftest import BACKENDS, device_of, interpreted
from problems import DTYPES, RnnProblem, compare, nested, random_weights

import unrolled_kernels as uk
import unrolled_kernels.functional as F
from unrolled_kernels.ops.rnn import native, reference
from unrolled_kernels.testing import bytes_kept_for_backward, random_quadratic

backends = pytest.mark.parametrize("backend", BACKENDS)
native_backends = pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] in ("cpu", "cuda")])
structures = pytest.mark.parametrize("structure", ["dense", "diagonal"])
trajectories = pytest.mark.parametrize("trajectory", [False, True], ids=["last", "trajectory"])


@backends
@structures
@trajectories
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "d", "k", "hidden_dims"),
    [(3, 5, 7, (10, 20, 20)), (19, 33, 3, (40, 9))],
    ids=["B3-d5-k7-h10-20-20", "B19-d33-k3-h40-9"],
)
def test_forward_and_gradients(backend, structure, trajectory, dtype, B, d, k, hidden_dims):
    if interpreted(backend) and B > 3 and dtype != "bf16":
        pytest.skip("interpreted, a second: the small problem has every dtype")
    problem = RnnProblem(structure, (B,), d, k, hidden_dims, trajectory=trajectory, device=device_of(backend))
    compare(problem, backend, DTYPES[dtype])


@backends
@structures
@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_edges(backend, structure, dtype, warm):
    if interpreted(backend) and dtype == "f64":
        pytest.skip("interpreted: the arithmetic of float64 is that of float32")
    steps, sizes = ((0, 3), (1, 5)) if interpreted(backend) else ((0, 1, 7), (1, 5, 33))
    for k, B, d, trajectory in itertools.product(steps, (0, 1, 3), sizes, (False, True)):
        options = {"warm": warm, "trajectory": trajectory, "device": device_of(backend), "seed": 3}
        compare(RnnProblem(structure, (B,), d, k, **options), backend, DTYPES[dtype])


@backends
@structures
@trajectories
def test_without_a_step_nothing_else_counts(backend, structure, trajectory):
    """y_0 itself, its cotangent for gradient, and zero for every other, whatever they are."""
    (Q,), make_Q, b = random_quadratic(structure, (40,), 20, device=device_of(backend))
    y0, bad = b.clone().requires_grad_(), torch.full_like(b, float("inf"), requires_grad=True)
    Q = torch.full_like(Q, float("nan"), requires_grad=True)
    weights = [torch.full(shape, float("nan"), device=b.device, requires_grad=True) for shape in ((20, 20),) * 3]
    W1, W2, V = weights
    y = F.rnn(make_Q(Q), bad, (W1, W2, [], V), 0, y0=y0, return_trajectory=trajectory, backend=backend)
    cotangent = torch.randn_like(y)
    assert torch.equal(y, y0.unsqueeze(0) if trajectory else y0)
    first, *others = torch.autograd.grad(y, (y0, Q, bad, *weights), cotangent)
    assert torch.equal(first, cotangent.view_as(y0))
    assert not any(x.any() for x in others)


@backends
@structures
@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("d", [2, 3, 4, 7, 8, 15, 17, 32, 64, 65])
def test_sizes(backend, structure, dtype, d):
    if interpreted(backend) and (d > 32 or dtype == "f64"):
        pytest.skip("interpreted, products of this size take seconds; the arithmetic of float64 is that of float32")
    for B in (5,) if interpreted(backend) else (1, 5, 37):
        compare(RnnProblem(structure, (B,), d, 2, device=device_of(backend), seed=d), backend, DTYPES[dtype])


@backends
@structures
@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize(
    "hidden_dims",
    [(1,), (6,), (33, 2), (2, 11, 5, 17), (3, 4, 5, 6, 7, 8), (128, 16), (70, 95), (129,), (4, 4, 4, 4, 4, 4, 4)],
    ids=lambda h: "-".join(map(str, h)),
)
def test_widths_and_depths(backend, structure, dtype, hidden_dims):
    """Unequal widths, one layer to the most that is fused, and what is beyond."""
    if interpreted(backend) and dtype == "f64":
        pytest.skip("interpreted: the arithmetic of float64 is that of float32")
    problem = RnnProblem(structure, (37,), 4, 3, hidden_dims, trajectory=True, device=device_of(backend))
    compare(problem, backend, DTYPES[dtype])


@backends
@pytest.mark.parametrize(("k", "hidden_dims"), [(40, (20, 20, 20)), (150, (20, 20, 20)), (40, (90, 70))], ids=str)
def test_many_steps(backend, k, hidden_dims):
    """More steps than backward treats in one go, of few weights and of many."""
    if interpreted(backend):
        pytest.skip("interpreted, this many steps take minutes")
    problem = RnnProblem("dense", (50,), 6, k, hidden_dims, trajectory=True, device=device_of(backend))
    compare(problem, backend, torch.float32)


@backends
@pytest.mark.parametrize("d", [6, 40])
def test_shared_Q(backend, d):
    cases = ((2, 5), True, torch.float64), ((70,), False, torch.float32)
    for batch, trajectory, dtype in cases[: 1 if interpreted(backend) and d > 6 else 2]:
        options = {"shared": True, "trajectory": trajectory, "device": device_of(backend)}
        compare(RnnProblem("dense", batch, d, 4, **options), backend, dtype)


@backends
@structures
def test_broadcast_batches(backend, structure):
    problem = RnnProblem(structure, (4, 1), 5, 4, device=device_of(backend))
    problem.leaves |= {"b": problem.leaves["b"][0].expand(3, 5).clone(), "y0": problem.leaves["y0"][0, 0]}
    assert problem.call(backend, problem.leaves).shape == (4, 3, 5)
    compare(problem, backend, torch.float64)


@backends
def test_spectral_runs_as_dense(backend):
    (values, vectors), make_Q, b = random_quadratic("spectral", (4,), 5, dtype=torch.float64, device=device_of(backend))
    weights = nested([W.to(b) for W in random_weights((8, 6), 5, torch.Generator().manual_seed(0))])
    results = []
    for apply in (make_Q, lambda *x: make_Q(*x).to_dense()):
        leaves = [x.clone().requires_grad_() for x in (values, vectors)]
        y = F.rnn(apply(*leaves), b, weights, 4, backend=backend)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@backends
@structures
@trajectories
def test_gradcheck(backend, structure, trajectory):
    problem = RnnProblem(structure, (2,), 3, 2, (4, 3), trajectory=trajectory, device=device_of(backend))
    second = not (interpreted(backend) and trajectory)
    problems.assert_gradients_pass_gradcheck(problem, backend, second=second)


@backends
@structures
def test_second_order_needs_no_first_order_copy(backend, structure):
    problem = RnnProblem(structure, (3,), 4, 5, device=device_of(backend))
    problems.assert_second_order_is_that_of_eager(problem, backend)


def _canonical(structure, k, B, device, *, permuted=False, trajectory=False):
    """Arguments of the raw ops, optionally with every layout a user's tensors may have."""
    problem = RnnProblem(structure, (B,), 5, k, (6, 4), device=device)
    Q, b, y0, *weights = problem.leaves.values()
    grad = torch.randn((k + 1, B, 5) if trajectory else (B, 5), dtype=torch.float64, device=device)
    if permuted:
        turn = lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)
        Q, b, y0, grad, *weights = map(turn, (Q, b, y0, grad, *weights))
    matrix, diagonal = (None, Q) if structure == "diagonal" else (Q, None)
    return grad, (matrix, diagonal, b, y0, weights, k, trajectory)


@native_backends
@structures
@trajectories
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_opcheck(backend, structure, trajectory, permuted):
    grad, arguments = _canonical(structure, 4, 3, device_of(backend), permuted=permuted, trajectory=trajectory)
    # the op of the backward refuses autograd by design, which opcheck's autograd tests would report
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.unrolled_kernels.rnn.default, arguments, test_utils=tests)
    for needs in (31, 0, 1 << 4, 1 << 2 | 1):
        torch.library.opcheck(
            torch.ops.unrolled_kernels.rnn_backward.default, (grad, *arguments, needs), test_utils=tests
        )


@native_backends
@structures
def test_gradients_that_are_not_needed(backend, structure):
    """Whatever else is asked for, each gradient is the same, and what is not asked for is empty."""
    grad, arguments = _canonical(structure, 4, 9, device_of(backend), trajectory=True)
    backward = torch.ops.unrolled_kernels.rnn_backward
    every = backward(grad, *arguments, 31)
    for needs in range(32):
        *grads, d_weights = backward(grad, *arguments, needs)
        for i, (x, g, whole) in enumerate(zip(arguments, grads, every, strict=False)):
            wanted = x is not None and needs >> i & 1
            assert torch.equal(g, whole) if wanted else g.shape == (0,)
        assert len(d_weights) == (len(arguments[4]) if needs >> 4 else 0)
        assert all(map(torch.equal, d_weights, every[4]))


@native_backends
@structures
def test_gradients_of_the_raw_op(backend, structure):
    """What a program from torch.export calls: gradients of every order, and none of the op of the backward alone."""
    grad, (*tensors, weights, k, trajectory) = _canonical(structure, 4, 3, device_of(backend))
    leaves = [x.requires_grad_() for x in (*tensors, *weights) if x is not None]
    ops = torch.ops.unrolled_kernels
    results = []
    for run in (ops.rnn, reference.forward):
        first = torch.autograd.grad(run(*tensors, weights, k, trajectory), leaves, grad)
        graph = torch.autograd.grad(run(*tensors, weights, k, trajectory), leaves, grad, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in graph), leaves)
        results.append((first, second))
    torch.testing.assert_close(*results)
    with pytest.raises(RuntimeError, match="op of a backward pass is not differentiable by itself"):
        ops.rnn_backward(grad, *tensors, weights, k, trajectory, 4)[2].sum().backward()


@backends
@structures
def test_compile(backend, structure):
    device = device_of(backend)
    layer = uk.UnrolledRNN(2, 5, (6, 4), backend=backend).to(device)
    (leaf,), make_Q, b = random_quadratic(structure, (3,), 5, dtype=torch.float32, device=device)
    inputs = [x.requires_grad_() for x in (leaf, b)]

    def loss(leaf, b):
        return layer(make_Q(leaf), b).square().sum()

    wanted = [*inputs, *layer.parameters()]
    expected = torch.autograd.grad(loss(*inputs), wanted)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), wanted)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


@backends
def test_compile_dynamic(backend):
    device = device_of(backend)
    weights = nested([W.float().to(device) for W in random_weights((6, 4), 5, torch.Generator().manual_seed(0))])
    compiler = "aot_eager" if backend == "manual" or interpreted(backend) else "inductor"
    compiled = torch.compile(
        lambda Q, b: F.rnn(Q, b, weights, 2, backend=backend), fullgraph=True, dynamic=True, backend=compiler
    )
    for B in (3, 5, 9):
        (Q,), _, b = random_quadratic("dense", (B,), 5, dtype=torch.float32, device=device)
        torch.testing.assert_close(compiled(Q, b), F.rnn(Q, b, weights, 2, backend="eager"))


@backends
@structures
def test_layouts(backend, structure):
    """Sliced, transposed and expanded inputs, weights too, give what contiguous ones give."""
    problem = RnnProblem(structure, (6,), 5, 4, device=device_of(backend))
    expected = problem.call("eager", problem.leaves)
    for layout in problems.LAYOUTS.values():
        y = problem.call(backend, {n: layout(x) for n, x in problem.leaves.items()})
        torch.testing.assert_close(y, expected)
    expanded = problem.leaves | {n: problem.leaves[n][:1].expand(6, 5) for n in ("b", "y0")}
    torch.testing.assert_close(problem.call(backend, expanded), problem.call("eager", expanded))


@backends
@structures
@trajectories
def test_cotangent_layouts(backend, structure, trajectory):
    problem = RnnProblem(structure, (5,), 6, 4, trajectory=trajectory, device=device_of(backend))
    for cotangent in problems.cotangents():
        compare(problem, backend, torch.float64, cotangent=cotangent)


@backends
@structures
def test_some_inputs_without_gradient(backend, structure):
    problem = RnnProblem(structure, (4,), 5, 3, (6, 4), device=device_of(backend))
    names = list(problem.leaves)
    frozen = tuple(n for n in names if n.startswith("W"))
    for without in [(n,) for n in names] + [tuple(m for m in names if m != n) for n in names] + [frozen]:
        compare(problem, backend, torch.float64, without=without)


@backends
@structures
def test_steps_compose(backend, structure):
    """k₁ cells, then k₂ from there, are k₁ + k₂ cells."""
    problem = RnnProblem(structure, (4,), 6, 7, device=device_of(backend))
    whole = problem.call(backend, problem.leaves)
    problem.k = 3
    first = problem.call(backend, problem.leaves)
    problem.k = 4
    torch.testing.assert_close(problem.call(backend, problem.leaves | {"y0": first}), whole)


@backends
@structures
@trajectories
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_results_are_rounded_once(backend, structure, trajectory, dtype):
    for d in (6, 17) if interpreted(backend) else (6, 40):
        problem = problems.rnn_at_ties(structure, d, DTYPES[dtype], trajectory=trajectory, device=device_of(backend))
        problems.assert_rounded_once(problem, backend, DTYPES[dtype])


@backends
@structures
@pytest.mark.parametrize("dtype", ["f64", "f32"])
def test_sums_over_many_samples(backend, structure, dtype):
    """The gradients of the weights and of a shared Q, from more pieces of the batch than two."""
    B = 40 if interpreted(backend) else 1500
    problem = RnnProblem(structure, (B,), 6, 4, (7, 5), shared=structure == "dense", device=device_of(backend))
    problem.leaves |= {name: problem.leaves[name].abs() for name in ("b", "y0")}
    compare(problem, backend, DTYPES[dtype], cotangent=torch.ones_like)
    if backend == "cpu":
        from unrolled_kernels._C import kernel_plan

        plan = kernel_plan(
            structure, B, 6, 4, {"f64": "float64", "f32": "float32"}[dtype], backward=True, hidden_dims=(7, 5)
        )
        assert plan["chunks"] > 2


@backends
@structures
@pytest.mark.parametrize("d", [5, 40])
def test_rows_are_independent(backend, structure, d):
    problem = RnnProblem(structure, (21,), d, 3, device=device_of(backend))
    whole = problem.call(backend, problem.leaves)
    for i in (0, 7, 20):
        row = {n: x if n.startswith("W") else x[i : i + 1] for n, x in problem.leaves.items()}
        torch.testing.assert_close(problem.call(backend, row), whole[i : i + 1])


@backends
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_reruns_are_bit_equal(backend, shared):
    batch = (40 if interpreted(backend) else 333,)
    problem = RnnProblem("dense", batch, 7, 6, shared=shared, device=device_of(backend))
    problems.assert_reruns_are_bit_equal(problem, backend)


@backends
@structures
@trajectories
def test_nothing_unwritten_is_read(backend, structure, trajectory):
    # interpreted, as few as have every kind of memory
    sizes = ((17, 9), (2, 40)) if interpreted(backend) else ((3, 5), (17, 9), (2, 40))
    for B, d in sizes:
        for warm in (trajectory,) if interpreted(backend) else (False, True):
            problem = RnnProblem(structure, (B,), d, 3, warm=warm, trajectory=trajectory, device=device_of(backend))
            problems.assert_nothing_unwritten_is_read(problem, backend)


@backends
@structures
def test_nan_and_inf_stay_in_their_row_and_do_not_vanish(backend, structure):
    problem = RnnProblem(structure, (20,), 6, 5, device=device_of(backend))
    problems.assert_bad_values_stay_in_their_row(problem, backend, ("y", "b", "Q0"))


@backends
def test_relu_passes_nothing_at_zero(backend):
    """Units that get exactly 0 have gradient 0, as in torch."""
    problem = RnnProblem("dense", (3,), 4, 3, (6, 5), device=device_of(backend))
    problem.leaves["W0"][2] = problem.leaves["W1"][2] = 0
    problem.leaves["W2"][1] = 0
    compare(problem, backend, torch.float64)


@backends
@structures
@pytest.mark.parametrize("k", [3, 100])
def test_backward_keeps_only_the_inputs(backend, structure, k):
    """Bytes that autograd holds between the passes: those of the inputs, whatever k is."""
    if interpreted(backend) and k > 3:
        pytest.skip("interpreted, this many steps take minutes")
    problem = RnnProblem(structure, (8,), 6, k, warm=False, device=device_of(backend))
    leaves = {n: x.requires_grad_() for n, x in problem.cast(torch.float32).items()}
    held = sum(x.untyped_storage().nbytes() for x in leaves.values())
    assert bytes_kept_for_backward(lambda: problem.call(backend, leaves)) == held


@backends
@structures
def test_func_transforms(backend, structure):
    device = device_of(backend)
    problem = RnnProblem(structure, (3, 2), 4, 2, (5, 3), device=device)
    args = tuple(problem.leaves.values())

    def loss(name, *args):
        return problem.call(name, dict(zip(problem.leaves, args, strict=True))).square().sum()

    n, num_weights = len(args), len(args) - 3
    shared_weights = (*(0,) * 3, *(None,) * num_weights)
    per_sample = (0, None, 0, *(None,) * num_weights)
    stacked = (None, None, 0, *(0,) * num_weights)
    for in_dims, argnums in ((shared_weights, tuple(range(n))), (per_sample, (0, 1, 2)), (stacked, tuple(range(n)))):
        picked = [
            (x if i < 3 else torch.stack([x, 0.5 * x, -x])) if dim == 0 else x[0] if i < 3 else x
            for i, (x, dim) in enumerate(zip(args, in_dims, strict=True))
        ]
        actual, expected = (
            torch.func.vmap(torch.func.grad(lambda *a, name=name: loss(name, *a), argnums), in_dims)(*picked)
            for name in (backend, "eager")
        )
        torch.testing.assert_close(actual, expected)
    point = [x[0] if i < 3 else x for i, x in enumerate(args)]
    function = lambda name: lambda b: loss(name, point[0], b, *point[2:])
    actual, expected = (torch.func.jacrev(torch.func.jacrev(function(name)))(point[1]) for name in (backend, "eager"))
    torch.testing.assert_close(actual, expected)
    problems.assert_forward_mode_agrees(lambda *args: loss(backend, *args), point)


@native_backends
def test_compiled_func_transforms(backend):
    problem = RnnProblem("dense", (3,), 4, 2, (5,), device=device_of(backend))
    problems.assert_compiled_transforms_agree(problem, backend)


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] == "cpu"])
def test_plan_knows_what_is_fused(backend):
    from unrolled_kernels._C import kernel_plan

    for d, hidden_dims in ((64, (128,) * 6), (65, (4,)), (4, (129,)), (4, (4,) * 7)):
        plan = kernel_plan("dense", 10, d, 3, "float32", hidden_dims=hidden_dims)
        assert (plan["variant"] == "samples in lanes") == native.is_fused(d, hidden_dims)
        assert ("scratch_bytes" in plan) == native.is_fused(d, hidden_dims)
