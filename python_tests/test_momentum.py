"""The test law for the op family ``momentum``: every backend against the float64 reference, every row of the law."""

import functools
import itertools

import problems
import pytest
import torch
from conftest import BACKENDS, device_of, interpreted
from problems import DTYPES, MomentumProblem, compare
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import unrolled_kernels as uk
import unrolled_kernels.functional as F
from unrolled_kernels import prox
from unrolled_kernels.ops.momentum import function, native, reference
from unrolled_kernels.ops.momentum.reference import NO_PROX
from unrolled_kernels.testing import (
    STRUCTURES,
    bytes_kept_for_backward,
    poisoned_memory,
    random_quadratic,
)

METHODS = ("gd", "momentum")

backends = pytest.mark.parametrize("backend", BACKENDS)
structures = pytest.mark.parametrize("structure", STRUCTURES)
methods = pytest.mark.parametrize("method", METHODS)
trajectories = pytest.mark.parametrize("trajectory", [False, True], ids=["last", "trajectory"])


@backends
@structures
@methods
@trajectories
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "d", "k"), [(3, 5, 7), (19, 33, 4)], ids=["B3-d5-k7", "B19-d33-k4"])
def test_forward_and_gradients(backend, structure, method, trajectory, dtype, B, d, k):
    if interpreted(backend) and B > 3 and (dtype != "bf16" or method == "gd"):
        pytest.skip("interpreted, a second: the small problem has every dtype and method")
    problem = MomentumProblem(structure, (B,), d, k, method=method, trajectory=trajectory, device=device_of(backend))
    compare(problem, backend, DTYPES[dtype])


@backends
@structures
@methods
@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_edges(backend, structure, method, dtype, warm):
    if interpreted(backend) and dtype == "f64":
        pytest.skip("interpreted: the arithmetic of float64 is that of float32")
    steps, sizes = ((0, 1, 3), (1, 5)) if interpreted(backend) else ((0, 1, 7), (1, 5, 33))
    for k, B, d, trajectory in itertools.product(steps, (0, 1, 3), sizes, (False, True)):
        problem = MomentumProblem(
            structure, (B,), d, k, method=method, warm=warm, trajectory=trajectory, device=device_of(backend), seed=3
        )
        compare(problem, backend, DTYPES[dtype])


@backends
@structures
@trajectories
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_without_a_step_nothing_else_counts(backend, structure, trajectory, bad):
    """y_0 itself, its cotangent for gradient, and zero for every other, whatever they are."""
    B, d, device = 40, 20, device_of(backend)
    full = lambda *shape: torch.full(shape, bad, device=device, requires_grad=True)
    maps = [None]
    if structure != "spectral" and backend in ("manual", "cpu"):
        maps += [prox.Box(lower=full(d)), prox.L1(full(d)), prox.SoftThreshold(full(B, 1))]
    for shared, map_ in itertools.product((False, True), maps):
        leaves, make_Q, b = random_quadratic(structure, (B,), d, shared=shared, device=device)
        y0, inputs, phi, mu = b.requires_grad_(), [full(*x.shape) for x in leaves], full(), full(B, 1)
        options = {"y0": y0, "prox": map_, "return_trajectory": trajectory, "backend": backend}
        y = F.nesterov(make_Q(*inputs), full(B, d), phi, mu, 0, **options)
        cotangent = torch.randn_like(y)
        assert torch.equal(y, y0.unsqueeze(0) if trajectory else y0)
        of_y0, *others = torch.autograd.grad(y, (y0, *inputs, phi, mu), cotangent)
        assert torch.equal(of_y0, cotangent.view_as(y0))
        assert not any(x.any() for x in others)


@backends
@pytest.mark.parametrize("structure", ["dense", "diagonal", "spectral"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("wanted", ["all", "schedule"])
@pytest.mark.parametrize("d", [20, 130])
def test_a_start_at_zero_does_not_ask_for_its_gradient(backend, structure, shared, wanted, d):
    """Which overflows here: its product with y_0 = 0 would be NaN, in every other gradient."""
    B = 40 if d == 20 else 2
    leaves, make_Q, b = random_quadratic(structure, (B,), d, shared=shared, dtype=torch.float64)
    leaves = (leaves[0] * 1e38, *leaves[1:])

    def run(name, dtype):
        device = device_of(name) if name != "eager" else "cpu"
        tensors = [x.to(device, dtype) for x in (*leaves, b, *(torch.full((B, 1), c) for c in (0.5, 0.4, 0.3)))]
        needed = tensors if wanted == "all" else tensors[-3:]
        for x in needed:
            x.requires_grad_()
        *parts, g, phi, beta, gamma = tensors
        y = F.momentum(make_Q(*parts), g, phi, beta, gamma, 1, backend=name)
        return torch.autograd.grad(y, needed, torch.full_like(y, 100.0), allow_unused=True, materialize_grads=True)

    for grad, exact in zip(run(backend, torch.float32), run("eager", torch.float64), strict=True):
        torch.testing.assert_close(grad.double().cpu(), exact, rtol=1e-4, atol=1e-4)


@backends
@structures
def test_gradients_of_a_schedule_without_samples(backend, structure):
    """Zero for what all samples share, whatever the shapes of the other coefficients."""
    leaves, make_Q, b = random_quadratic(structure, (0,), 3, device=device_of(backend))
    for shapes in itertools.product([(), (2,), (0, 1), (0, 2)], repeat=2):
        one, two = (torch.full(shape, 0.3, device=b.device, requires_grad=True) for shape in shapes)
        with poisoned_memory():
            for y in (
                F.nesterov(make_Q(*leaves), b, one, two, 2, backend=backend),
                F.momentum(make_Q(*leaves), b, one, two, two, 2, backend=backend),
            ):
                for x, grad in zip((one, two), torch.autograd.grad(y.sum(), (one, two)), strict=True):
                    assert torch.equal(grad, torch.zeros_like(x))


@backends
@structures
@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("d", [2, 3, 4, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 48, 64, 65, 100, 128, 130, 256])
def test_sizes(backend, structure, dtype, d):
    # interpreted: one batch, of several blocks where that is cheap; 130 stands for 256
    if interpreted(backend) and (d == 256 or dtype == "f64"):
        pytest.skip("interpreted, a product of this size takes seconds; the arithmetic of float64 is that of float32")
    for B in (37 if 8 < d <= 16 else 3,) if interpreted(backend) else (1, 5, 37):
        problem = MomentumProblem(structure, (B,), d, 3, form="step", device=device_of(backend), seed=d)
        compare(problem, backend, DTYPES[dtype])


@backends
@structures
@methods
@pytest.mark.parametrize("form", ["scalar", "step", "sample", "both"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_schedule_forms_and_shared_Q(backend, structure, method, form, shared):
    cases = itertools.product(((6,), (2, 5), (70,)), (False, True), (torch.float64, torch.float32))
    if interpreted(backend):
        cases = ((2, 5), True, torch.float64), ((70,), False, torch.float32)
    for batch, trajectory, dtype in cases:
        problem = MomentumProblem(
            structure,
            batch,
            6,
            5,
            method=method,
            form=form,
            shared=shared,
            trajectory=trajectory,
            device=device_of(backend),
        )
        compare(problem, backend, dtype)


@backends
@pytest.mark.parametrize("structure", ["dense", "spectral"])
@methods
@trajectories
def test_one_large_matrix_for_the_batch(backend, structure, method, trajectory):
    """Rows of several tiles against a matrix of several panels, whole ones and not, each form of schedule once."""
    cases = [(2, 33, 0, "step"), (2, 17, 1, "scalar"), (3, 48, 4, "sample"), (27, 64, 3, "both"), (100, 56, 3, "step")]
    cases += [(40, 130, 4, "both")]  # the iterates are kept
    cases += [(24, 33, 30, "step")]  # more terms of Q's gradient than are summed in one go
    for B, d, k, form in cases[2:3] if interpreted(backend) else cases:
        for dtype in (torch.float32,) if interpreted(backend) else (torch.float64, torch.float32, torch.bfloat16):
            problem = MomentumProblem(
                structure,
                (B,),
                d,
                k,
                method=method,
                form=form,
                warm=B % 2 == 1,
                shared=True,
                trajectory=trajectory,
                device=device_of(backend),
            )
            compare(problem, backend, dtype)


@backends
@structures
def test_broadcast_batches(backend, structure):
    device = device_of(backend)
    (*leaves,), make_Q, _ = random_quadratic(structure, (4, 1), 5, dtype=torch.float64, device=device)
    b = torch.randn(3, 5, dtype=torch.float64, device=device)
    y0 = torch.randn(5, dtype=torch.float64, device=device)
    phi = torch.rand(4, 1, 1, dtype=torch.float64, device=device)
    results = []
    for name in ("eager", backend):
        inputs = [x.clone().requires_grad_() for x in (*leaves, b, y0, phi)]
        *q, b_, y0_, phi_ = inputs
        y = F.nesterov(make_Q(*q), b_, phi_, 0.1, 4, y0=y0_, backend=name)
        assert y.shape == (4, 3, 5)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for actual, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(actual, expected)


@backends
def test_diagonal_of_an_image(backend):
    device = device_of(backend)
    q, b = (torch.rand(2, 3, 9, 11, dtype=torch.float64, device=device) for _ in range(2))
    for phi in (0.5, torch.rand(2, 1, 1, 1, dtype=torch.float64, device=device), torch.rand(2, 3, 1, 4).to(b)):
        actual, expected = (F.gradient_descent(uk.Diagonal(q), b, phi, 4, backend=n) for n in (backend, "eager"))
        torch.testing.assert_close(actual, expected)


@backends
@structures
@trajectories
def test_gradcheck(backend, structure, trajectory):
    cases = (("gd", "scalar"), ("momentum", "both"), ("momentum", "step"))
    for method, form in cases[int(trajectory) :][:1] if interpreted(backend) else cases:
        problem = MomentumProblem(
            structure, (2,), 3, 3, method=method, form=form, trajectory=trajectory, device=device_of(backend)
        )
        # no kernels of Triton differentiate a gradient: one way through torch does for all structures
        second = not interpreted(backend) or (structure == "diagonal" and not trajectory)
        problems.assert_gradients_pass_gradcheck(problem, backend, second=second)


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension was not built")
@pytest.mark.parametrize("structure", ["dense", "diagonal", "tikhonov"])
@pytest.mark.parametrize("method", [*METHODS, "nesterov"])
def test_second_order_in_kernels_is_that_of_the_derivation(structure, method, monkeypatch):
    """The VJP of a backward pass in every layout, for all cotangents and for some."""
    calls = []
    kernels = native.second_order
    monkeypatch.setattr(native, "second_order", lambda *args: calls.append(args) or kernels(*args))
    cases = [(3, 5, 4, "both"), (20, 3, 1, "number"), (33, 6, 3, "step"), (5, 20, 3, "sample"), (2, 70, 2, "step")]
    cases += [(2, 64, 2, "both"), (40, 20, 3, "both")] if structure == "dense" else [(1, 2100, 2, "both")]
    for n, (B, d, k, form) in enumerate(cases):
        rand = functools.partial(torch.rand, dtype=torch.float64)
        trajectory, warm = n % 2 == 0, n % 3 != 0
        matrix = rand(1 if B > 30 else B, d, d) / d - 0.2 if structure == "dense" else None
        diagonal = None if structure == "dense" else rand(B, d)
        observed = rand(B, d) if structure == "tikhonov" else None
        shape = {"number": (), "step": (1, k), "sample": (B, 1), "both": (B, k)}[form]
        phi, *moving = (rand(shape) for _ in range(3))
        beta, gamma = moving if method == "momentum" else (None, None)
        mu = moving[0] if method == "nesterov" else None
        grad_y = rand(k + 1, B, d) - 0.5 if trajectory else rand(B, d) - 0.5
        tensors = (grad_y, matrix, diagonal, observed, rand(B, d), rand(B, d) if warm else None, phi, beta, gamma, mu)
        needs = sum(1 << i for i, x in enumerate(tensors[1:]) if x is not None)
        if mu is not None:
            # with those of coefficients torch computes what follows from μ
            needs &= 0b11111
        for chosen in (slice(None), slice(1, 2)):
            results = []
            for name in ("manual", "cpu"):
                leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
                arguments = (*leaves, *[None] * 4, k, trajectory, needs)
                grads = function._differentiable_backward(name, *arguments)
                grads = [g for g in grads if g.numel() > 0 and g.requires_grad][chosen]
                inputs = [x for x in leaves if x is not None]
                torch.manual_seed(0)
                options = {"allow_unused": True, "materialize_grads": True}
                cotangents = [torch.randn_like(g) for g in grads]
                results.append(torch.autograd.grad(grads, inputs, cotangents, **options))
            torch.testing.assert_close(*results)
    assert len(calls) == 2 * len(cases)


@backends
@structures
def test_second_order_needs_no_first_order_copy(backend, structure):
    problem = MomentumProblem(structure, (3,), 4, 5, device=device_of(backend))
    problems.assert_second_order_is_that_of_eager(problem, backend)


# `needs` of the raw op: a gradient of each of its thirteen tensors
ALL = (1 << 13) - 1


def _canonical(structure, method, k, B, device, *, permuted=False, trajectory=False):
    """A cotangent and the arguments of the raw op, optionally with every layout a user's tensors may have."""
    d = 5
    leaves, _, b = random_quadratic(structure, (B,), d, dtype=torch.float64, device=device)
    y0 = torch.randn(B, d, dtype=torch.float64, device=device)
    schedule = [torch.rand(B, k, dtype=torch.float64, device=device) for _ in range(3)]
    if method != "momentum":
        schedule[1] = schedule[2] = None
    grad = torch.randn((k + 1, B, d) if trajectory else (B, d), dtype=torch.float64, device=device)
    tensors = (grad, *problems.canonical_structure(structure, leaves), b, y0, *schedule)
    if permuted:
        tensors = (x if x is None else x.mT.contiguous().mT for x in tensors)
    grad, *tensors = tensors
    mu = torch.rand(B, k, dtype=torch.float64, device=device) if method == "nesterov" else None
    return grad, (*tensors, mu, *NO_PROX, k, trajectory)


native_backends = pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] in ("cpu", "cuda")])
# the raw op takes μ on a CPU
raw_methods = pytest.mark.parametrize(
    ("backend", "method"),
    [
        pytest.param(p.values[0], method, marks=p.marks, id=f"{p.id or p.values[0]}-{method}")
        for p in BACKENDS
        for method in {"cpu": (*METHODS, "nesterov"), "cuda": METHODS}.get(p.values[0], ())
    ],
)


@raw_methods
@structures
@trajectories
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_opcheck(backend, structure, method, trajectory, permuted):
    grad, arguments = _canonical(structure, method, 4, 3, device_of(backend), permuted=permuted, trajectory=trajectory)
    # the op of the backward refuses autograd by design, which opcheck's autograd tests would report
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.unrolled_kernels.momentum.default, arguments, test_utils=tests)
    for needs in (ALL, 0, 1 << 3 | 1 << 5, 1 << 2 | 1 << 4):
        backward = torch.ops.unrolled_kernels.momentum_backward.default
        torch.library.opcheck(backward, (grad, *arguments, needs), test_utils=tests)


@raw_methods
@structures
def test_gradients_that_are_not_needed(backend, structure, method):
    """Whatever else is asked for, each gradient is the same to the bit, and what is not asked for is None."""
    grad, arguments = _canonical(structure, method, 4, 9, device_of(backend), trajectory=True)
    backward = torch.ops.unrolled_kernels.momentum_backward
    every = backward(grad, *arguments, ALL)
    for x, g in zip(arguments, every, strict=False):
        assert g is None if x is None else g.shape == x.shape
    present = [1 << i for i, x in enumerate(arguments[:13]) if x is not None]
    for needs in map(sum, itertools.product(*((0, bit) for bit in present))):
        for i, (g, whole) in enumerate(zip(backward(grad, *arguments, needs), every, strict=True)):
            if needs >> i & 1:
                torch.testing.assert_close(g, whole)
            else:
                assert g is None


@backends
@structures
@pytest.mark.parametrize("forms", [((), ()), ((), (4,)), ((3, 1), (4,)), ((3, 4), (3, 1))], ids=str)
def test_nesterov_in_one_node(backend, structure, forms):
    """β and its derivatives are inside the op's node, whatever dimensions φ and μ vary in."""
    device = device_of(backend)
    leaves, make_Q, b = random_quadratic(structure, (3,), 5, dtype=torch.float64, device=device)
    phi, mu = (0.2 + 0.3 * torch.rand(form, dtype=torch.float64, device=device) for form in forms)
    inputs = [x.requires_grad_() for x in (*leaves, b, phi, mu)]

    def run(*inputs, backend=backend):
        *leaves, b, phi, mu = inputs
        return F.nesterov(make_Q(*leaves), b, phi, mu, 4, backend=backend)

    y = run(*inputs)
    if forms == ((), ()):
        node = y.grad_fn if "Momentum" in y.grad_fn.name() else y.grad_fn.next_functions[0][0]
        reached = {function for function, _ in node.next_functions}
        assert reached.issuperset(torch.autograd.graph.get_gradient_edge(x).node for x in (phi, mu))
    grads = torch.autograd.grad(y.pow(3).sum(), inputs)
    expected = torch.autograd.grad(run(*inputs, backend="eager").pow(3).sum(), inputs)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)
    if not interpreted(backend):
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@backends
def test_one_number_under_vmap(backend):
    """A coefficient of one number, the same for all or one for each vmapped call."""
    device = device_of(backend)
    q, b = (0.1 + torch.rand(6, 3, 5, dtype=torch.float64, device=device) for _ in range(2))
    phi = 0.2 + 0.1 * torch.rand(6, dtype=torch.float64, device=device)
    run = lambda q, b, phi: F.nesterov(uk.Diagonal(q), b, phi, 0.3, 4, backend=backend).square().sum()
    gradients = torch.func.grad(run, argnums=(0, 1, 2))
    for own in (True, False):
        vmapped = torch.func.vmap(gradients, in_dims=(0, 0, 0 if own else None))(q, b, phi if own else phi[0])
        single = [gradients(q[i], b[i], phi[i if own else 0]) for i in range(6)]
        for actual, expected in zip(vmapped, zip(*single, strict=True), strict=True):
            torch.testing.assert_close(actual, torch.stack(expected))


@native_backends
@structures
@methods
def test_gradients_of_the_raw_op(backend, structure, method):
    """What a program from torch.export calls: gradients of every order, and none of the op of the backward alone."""
    grad, (*tensors, k, trajectory) = _canonical(structure, method, 4, 3, device_of(backend), trajectory=True)
    leaves = [x.requires_grad_() for x in tensors if x is not None]
    ops = torch.ops.unrolled_kernels
    results = []
    for run in (ops.momentum, reference.forward):
        first = torch.autograd.grad(run(*tensors, k, trajectory), leaves, grad)
        graph = torch.autograd.grad(run(*tensors, k, trajectory), leaves, grad, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in graph), leaves)
        results.append((first, second))
    torch.testing.assert_close(*results)
    with pytest.raises(RuntimeError, match="op of a backward pass is not differentiable by itself"):
        ops.momentum_backward(grad, *tensors, k, trajectory, 8)[3].sum().backward()


@pytest.mark.parametrize("call", ["gradient_descent", "nesterov", "momentum", "rnn"])
@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "backward"])
def test_compile_counts_steps_dynamically(call, differentiated):
    """One dynamic graph for any number of steps, after that of the first call."""
    torch._dynamo.reset()
    compiled = CompileCounter() if not differentiated else "aot_eager"
    d = 5
    weights = problems.nested(list(problems.random_weights((6, 4), d, torch.Generator().manual_seed(0))))
    call = {
        "gradient_descent": lambda Q, b, k: F.gradient_descent(Q, b, 0.3, k),
        "nesterov": lambda Q, b, k: F.nesterov(Q, b, 0.3, 0.5, k),
        "momentum": lambda Q, b, k: F.momentum(
            uk.Diagonal(Q[0] + 1), b, 0.3, 0.2, 0.1, k, prox=prox.L1(0.1), tolerance=0.01
        ),
        "rnn": lambda Q, b, k: F.rnn(Q, b, weights, k),
    }[call]
    Q, b = torch.eye(d, dtype=torch.float64, requires_grad=differentiated), torch.ones(d, dtype=torch.float64)
    function = torch.compile(call, fullgraph=True, backend=compiled)
    with torch._dynamo.config.patch(recompile_limit=3):
        for k in range(12):
            y, expected = function(Q, b, k), call(Q, b, k)
            torch.testing.assert_close(y, expected)
            if differentiated and k > 0:
                grads = (torch.autograd.grad(x.square().sum(), Q)[0] for x in (y, expected))
                torch.testing.assert_close(*grads)
    if not differentiated:
        # k = 0 and k = 1 are special to torch.compile, the others share a graph
        assert compiled.frame_count <= 3


@backends
@structures
def test_compile(backend, structure):
    device = device_of(backend)
    layer = uk.UnrolledNAG(4, 0.5, learn_step_size=True, backend=backend).to(device)
    (*leaves,), make_Q, b = random_quadratic(structure, (3,), 5, dtype=torch.float32, device=device)

    def loss(*args):
        return layer(make_Q(*args[:-1]), args[-1]).square().sum()

    inputs = [x.requires_grad_() for x in (*leaves, b)]
    expected = torch.autograd.grad(loss(*inputs), [*inputs, layer.step_size])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*inputs), [*inputs, layer.step_size])
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


@backends
def test_compile_dynamic(backend):
    """Down to the compiler's own code, where the op is a call in it."""
    device = device_of(backend)
    compiler = "aot_eager" if backend == "manual" or interpreted(backend) else "inductor"
    compiled = torch.compile(
        lambda Q, b: F.gradient_descent(Q, b, 0.5, 4, backend=backend),
        fullgraph=True,
        dynamic=True,
        backend=compiler,
    )
    for B, d in ((3, 4), (5, 6), (9, 7)):
        (Q,), _, b = random_quadratic("dense", (B,), d, dtype=torch.float32, device=device)
        torch.testing.assert_close(compiled(Q, b), F.gradient_descent(Q, b, 0.5, 4, backend="eager"))


@backends
@structures
def test_layouts(backend, structure):
    """Sliced, transposed and expanded inputs give what contiguous ones give."""
    device = device_of(backend)
    (*leaves,), make_Q, b = random_quadratic(structure, (6,), 5, symmetric=False, dtype=torch.float64, device=device)
    phi = torch.rand(6, 4, dtype=torch.float64, device=device)
    expected = F.gradient_descent(make_Q(*leaves), b, phi, 4, backend="eager")
    for layout in problems.LAYOUTS.values():
        y = F.gradient_descent(make_Q(*(layout(x) for x in leaves)), layout(b), layout(phi), 4, backend=backend)
        torch.testing.assert_close(y, expected)
    expanded = F.gradient_descent(make_Q(*leaves), b[:1].expand(6, 5), phi[:1].expand(6, 4), 4, backend=backend)
    same = F.gradient_descent(make_Q(*leaves), b[:1], phi[:1], 4, backend="eager")
    torch.testing.assert_close(expanded, same)


@backends
@structures
@trajectories
def test_cotangent_layouts(backend, structure, trajectory):
    problem = MomentumProblem(structure, (5,), 6, 4, trajectory=trajectory, device=device_of(backend))
    for cotangent in problems.cotangents():
        compare(problem, backend, torch.float64, cotangent=cotangent)


@backends
@structures
def test_some_inputs_without_gradient(backend, structure):
    problem = MomentumProblem(structure, (4,), 5, 4, device=device_of(backend))
    names = list(problem.leaves)
    for without in [(n,) for n in names] + [tuple(m for m in names if m != n) for n in names]:
        compare(problem, backend, torch.float64, without=without)


@backends
@structures
def test_steps_compose(backend, structure):
    """k₁ gradient steps, then k₂ from there, are k₁ + k₂ steps."""
    device = device_of(backend)
    (*leaves,), make_Q, b = random_quadratic(structure, (4,), 6, dtype=torch.float64, device=device)
    Q = make_Q(*leaves)
    first = F.gradient_descent(Q, b, 0.7, 3, backend=backend)
    then = F.gradient_descent(Q, b, 0.7, 4, y0=first, backend=backend)
    torch.testing.assert_close(then, F.gradient_descent(Q, b, 0.7, 7, backend=backend))


@backends
@structures
@pytest.mark.parametrize("d", [5, 40])
def test_rows_are_independent(backend, structure, d):
    problem = MomentumProblem(structure, (21,), d, 5, device=device_of(backend))
    whole = problem.call(backend, problem.leaves)
    for i in (0, 7, 20):
        row = problem.call(backend, {n: x[i : i + 1] for n, x in problem.leaves.items()})
        torch.testing.assert_close(row, whole[i : i + 1])


# one Q for the batch whose gradient the CPU adds up in several sums, each of whole tiles, and in one, slab by slab
LARGE_SHARED = ((300, 70), (60, 300))


@backends
@structures
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_reruns_are_bit_equal(backend, structure, shared):
    batch = (100 if interpreted(backend) else 333,)
    problem = MomentumProblem(structure, batch, 7, 6, form="step", shared=shared, device=device_of(backend))
    problems.assert_reruns_are_bit_equal(problem, backend)
    for B, d in LARGE_SHARED if shared and not interpreted(backend) else ():
        problem = MomentumProblem(structure, (B,), d, 20, form="step", shared=True, device=device_of(backend))
        problems.assert_reruns_are_bit_equal(problem, backend)


@backends
@pytest.mark.parametrize("structure", ["dense", "spectral"])
@pytest.mark.parametrize(("B", "d"), LARGE_SHARED)
def test_gradient_of_one_Q_with_more_terms_than_a_cache_holds(backend, structure, B, d):
    if interpreted(backend):
        pytest.skip("interpreted, products of this size take minutes")
    problem = MomentumProblem(structure, (B,), d, 20, form="both", warm=True, shared=True, device=device_of(backend))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        compare(problem, backend, dtype)


@backends
@structures
@trajectories
def test_nothing_unwritten_is_read(backend, structure, trajectory):
    # interpreted, as few as have every kind of memory
    sizes = ((17, 9), (2, 40)) if interpreted(backend) else ((3, 5), (17, 9), (2, 40))
    for B, d in sizes:
        for warm in (trajectory,) if interpreted(backend) else (False, True):
            problem = MomentumProblem(
                structure, (B,), d, 4, warm=warm, trajectory=trajectory, device=device_of(backend)
            )
            problems.assert_nothing_unwritten_is_read(problem, backend)


@backends
@structures
def test_nan_and_inf_stay_in_their_row(backend, structure):
    problem = MomentumProblem(structure, (20,), 6, 5, device=device_of(backend))
    problems.assert_bad_values_stay_in_their_row(problem, backend, ("y", "b", "Q0"))


@backends
@structures
@trajectories
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_results_are_rounded_once(backend, structure, trajectory, dtype):
    cases = ((40, False), (6, True), (6, False), (40, True))
    for d, shared in cases[:2] if interpreted(backend) else cases:
        options = {"shared": shared, "trajectory": trajectory, "device": device_of(backend)}
        for method in METHODS[: 1 if interpreted(backend) else 2]:
            problem = problems.momentum_at_ties(structure, d, DTYPES[dtype], method=method, **options)
            problems.assert_rounded_once(problem, backend, DTYPES[dtype])


@backends
@structures
@pytest.mark.parametrize("form", ["scalar", "step"])
@pytest.mark.parametrize("dtype", ["f64", "f32"])
def test_sums_over_many_samples(backend, structure, form, dtype):
    """The gradients of a shared Q and of a shared schedule, from more pieces of the batch than two."""
    B = 90 if interpreted(backend) else 1200 if structure in ("dense", "spectral") else 6000
    problem = MomentumProblem(structure, (B,), 6, 5, form=form, shared=True, device=device_of(backend))
    # of one sign, so that the sums do not cancel
    problem.leaves |= {name: problem.leaves[name].abs() for name in ("b", "y0")}
    compare(problem, backend, DTYPES[dtype], cotangent=torch.ones_like)
    if backend == "cpu":
        from unrolled_kernels._C import kernel_plan

        # tikhonov's kernels are those of a diagonal
        kernels = "diagonal" if structure == "tikhonov" else structure
        plan = kernel_plan(kernels, B, 6, 5, {"f64": "float64", "f32": "float32"}[dtype], backward=True, shared=True)
        assert plan["chunks"] > 2


def test_a_step_size_rounds_no_more_than_its_terms():
    """Its gradient sums d^2 products for each sample: what rounding leaves is of the size of eps times their norm."""
    leaves, make_Q, b = random_quadratic("dense", (1,), 2048, dtype=torch.float64)
    cotangent = torch.randn(b.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = {}
    for dtype, backend in ((torch.float64, "eager"), (torch.float32, "cpu")):
        values = [x.to(dtype).detach().requires_grad_() for x in (*leaves, b, torch.tensor(0.9))]
        y = F.nesterov(make_Q(*values[:-2]), values[-2], values[-1], 0.5, 4, backend=backend)
        gradients[dtype] = torch.autograd.grad(y, values, cotangent.to(dtype))
    *terms, exact = gradients[torch.float64]
    size = max((x * g).norm().item() for x, g in zip((*leaves, b), terms, strict=True))
    error = abs(gradients[torch.float32][-1].double() - exact).item()
    assert error <= 16 * torch.finfo(torch.float32).eps * size


@backends
@structures
@pytest.mark.parametrize("form", ["step", "both"])
def test_many_steps(backend, structure, form):
    """More steps than are held at once, each with coefficients of its own."""
    problem = MomentumProblem(structure, (3,), 5, 21, form=form, trajectory=True, device=device_of(backend))
    compare(problem, backend, torch.float64)


@backends
@structures
def test_diverging_steps_overflow_as_eager_does(backend, structure):
    problem = MomentumProblem(structure, (4,), 5, 200, method="gd", form="scalar", device=device_of(backend))
    problem.leaves["phi"] = torch.tensor(1e3, dtype=torch.float64, device=device_of(backend))
    actual, eager = (problem.run(name, torch.float32)["y"] for name in (backend, "eager"))
    assert not actual.isfinite().all()
    assert not eager.isfinite().all()


@backends
@structures
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_step_that_overflows_gives_no_wrong_number(backend, structure, k):
    """Of entry 1 of sample 1 Q φ is above float32's largest: y is right or not finite, and other samples never know."""
    device = device_of(backend)
    q = torch.full((3, 2), 0.5)
    q[1, 1] = 2.0**127
    y, usual = [], torch.full_like(q, 0.5)
    for values, dtype in ((q, torch.float32), (usual, torch.float32), (q, torch.float64)):
        values, eye = values.to(device, dtype), torch.eye(2, dtype=dtype, device=device).repeat(3, 1, 1)
        f = torch.where(values > 1, 2.0**100, values)
        parts = {
            "dense": (torch.diag_embed(values),),
            "diagonal": (values,),
            "spectral": (values, eye),
            "tikhonov": (f, torch.zeros_like(f)),
        }[structure]
        b = torch.ones(3, 2, dtype=dtype, device=device)
        name = "eager" if backend == "manual" or dtype == torch.float64 else backend
        y.append(F.gradient_descent(STRUCTURES[structure](*parts), b, 8.0, k, backend=name))
    actual, beside, exact = y
    assert torch.equal(actual[[0, 2]], beside[[0, 2]])
    right = actual[1].double() == exact[1]
    assert (right | ~actual[1].isfinite()).all()
    assert right[0] or structure in ("dense", "spectral")  # which multiply every entry with those of the others
    # as the page on interoperability says: 1 - φq is formed, and meets y_0 = 0
    if backend == "cpu" and structure != "dense":
        assert actual[1, 1].isnan()


@backends
@pytest.mark.parametrize("trajectory", [False, True], ids=["last", "trajectory"])
def test_zero_stays_zero_where_its_neighbours_diverge(backend, trajectory):
    """No power of 1 - φq is formed on its own: it overflows, and 0 times that would be NaN."""
    device = device_of(backend)
    q, b = torch.full((2, 3), 1e3, device=device), torch.tensor([[0.0, 1.0, 1.0]] * 2, device=device)
    b.requires_grad_()
    y = F.gradient_descent(uk.Diagonal(q), b, 1.0, 30, return_trajectory=trajectory, backend=backend)
    last = y[-1] if trajectory else y
    assert (last[:, 0] == 0).all()
    assert not last[:, 1:].isfinite().any()
    (grad_b,) = torch.autograd.grad(last, b, torch.tensor([[1.0, 1.0, 0.0]] * 2, device=device))
    assert not grad_b[:, :2].isfinite().any()
    assert (grad_b[:, 2] == 0).all()


@backends
@structures
@pytest.mark.parametrize("k", [3, 300])
def test_backward_keeps_only_the_inputs(backend, structure, k):
    """Bytes that autograd holds between the passes: those of the inputs, whatever k is."""
    device = device_of(backend)
    (*leaves,), make_Q, b = random_quadratic(structure, (8,), 6, dtype=torch.float32, device=device)
    inputs = [x.requires_grad_() for x in (*leaves, b)]
    call = lambda: F.gradient_descent(make_Q(*inputs[:-1]), inputs[-1], 0.1, k, backend=backend)
    step_size_bytes = 4
    held = sum(x.untyped_storage().nbytes() for x in inputs)
    assert bytes_kept_for_backward(call) == held + step_size_bytes


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension is not built")
@methods
def test_iterates_of_one_large_matrix_are_kept_up_to_a_limit(method, monkeypatch):
    B, d, k = 40, 130, 5
    problem = MomentumProblem("dense", (B,), d, k, method=method, form="both", warm=True, shared=True)
    grads, kept = [], []
    for limit in (4 * (k + 1) * B * d, 4 * (k + 1) * B * d - 1):
        monkeypatch.setattr(function, "KEPT_BYTES", limit)
        compare(problem, "cpu", torch.float64)
        compare(problem, "cpu", torch.float32)
        grads.append(problem.run("cpu", torch.float32))
        leaves = {name: x.requires_grad_() for name, x in problem.cast(torch.float32).items()}
        kept.append(bytes_kept_for_backward(functools.partial(problem.call, "cpu", leaves)))
    assert kept[0] - kept[1] == 4 * (k + 1) * B * d
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])


@backends
@structures
def test_func_transforms(backend, structure):
    device = device_of(backend)
    (*leaves,), make_Q, b = random_quadratic(structure, (3, 2), 4, dtype=torch.float64, device=device)
    phi = torch.rand(3, dtype=torch.float64, device=device)

    def loss(name, *args):
        *q, b, phi = args
        return F.momentum(make_Q(*q), b, phi, 0.5 * phi, 0.3, 3, backend=name).square().sum()

    n = len(leaves) + 2
    args = (*leaves, b, phi)
    for in_dims in ((0,) * n, (*(0,) * len(leaves), None, 0), (*(None,) * len(leaves), 0, 0)):
        picked = [x if dim == 0 else x[0] for x, dim in zip(args, in_dims, strict=True)]
        actual, expected = (
            torch.func.vmap(torch.func.grad(lambda *a, name=name: loss(name, *a), tuple(range(n))), in_dims)(*picked)
            for name in (backend, "eager")
        )
        torch.testing.assert_close(actual, expected)
    point = [x[0] for x in args]
    actual, expected = (
        torch.func.jacrev(torch.func.jacrev(lambda b, name=name: loss(name, *point[:-2], b, point[-1])))(point[-2])
        for name in (backend, "eager")
    )
    torch.testing.assert_close(actual, expected)
    problems.assert_forward_mode_agrees(lambda *args: loss(backend, *args), point)


@native_backends
def test_compiled_func_transforms(backend):
    problem = MomentumProblem("dense", (3,), 4, 3, device=device_of(backend))
    problems.assert_compiled_transforms_agree(problem, backend)


@pytest.fixture(params=["C++", "Python"])
def node(request, monkeypatch):
    """The autograd of a CPU's calls, with the node of csrc/autograd and as where it was not built."""
    if request.param == "C++" and function._node is None:
        pytest.skip("csrc/autograd is not built for this torch: pip install --no-build-isolation .")
    if request.param == "Python":
        monkeypatch.setattr(function, "_node", None)
    return request.param


def _plain_inputs():
    (Q,), _, b = random_quadratic("dense", (3,), 5, dtype=torch.float64, device="cpu")
    return [x.detach().requires_grad_() for x in (Q, b, torch.tensor(0.3).double(), torch.tensor(0.2).double())]


def _run_plain(Q, b, phi, mu, **options):
    return F.nesterov(Q, b, phi, mu, 4, backend="cpu", **options)


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension is not built")
def test_the_node_is_what_autograd_expects(node):
    inputs = _plain_inputs()
    y = _run_plain(*inputs)
    assert ("CppNode" in y.grad_fn.name()) == (node == "C++")
    expected = torch.autograd.grad(F.nesterov(*inputs, 4, backend="eager").pow(3).sum(), inputs)
    for chosen in ([0], [1], [2], [3], [0, 3], [0, 1, 2, 3]):
        grads = torch.autograd.grad(y.pow(3).sum(), [inputs[i] for i in chosen], retain_graph=True)
        for i, grad in zip(chosen, grads, strict=True):
            torch.testing.assert_close(grad, expected[i])
    several = torch.autograd.grad(y, inputs, torch.stack([3 * y.detach() ** 2, y.detach()]), is_grads_batched=True)
    for grad, one in zip(several, expected, strict=True):
        torch.testing.assert_close(grad[0], one)
    assert torch.autograd.gradgradcheck(_run_plain, inputs, fast_mode=True)
    # of Q's and b's gradients the second derivatives are a node too, and those of third order are Python's
    Q, b, *numbers = inputs
    numbers = [x.detach() for x in numbers]

    def differentiated(Q, b):
        (grad,) = torch.autograd.grad(_run_plain(Q, b, *numbers).pow(3).sum(), Q, create_graph=True)
        assert ("CppNode" in grad.grad_fn.name()) == (node == "C++")
        return grad

    assert torch.autograd.gradcheck(differentiated, (Q, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(differentiated, (Q, b), fast_mode=True)
    of_both = torch.autograd.grad(differentiated(Q, b).pow(2).sum(), (Q, b))
    for x, wanted in zip((Q, b), of_both, strict=True):
        torch.testing.assert_close(torch.autograd.grad(differentiated(Q, b).pow(2).sum(), x)[0], wanted)
    # what is kept is the inputs, packed and unpacked by hooks
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or len(packed) - 1, packed.__getitem__):
        hooked = _run_plain(*inputs)
    assert [x.data_ptr() for x in packed] == [x.data_ptr() for x in inputs]
    torch.testing.assert_close(torch.autograd.grad(hooked.pow(3).sum(), inputs), expected)
    y = _run_plain(*inputs)
    with torch.no_grad():
        inputs[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension is not built")
def test_the_node_leaves_what_it_does_not_know_to_python(node):
    """Transforms, modes, subclasses, profilers and anomaly mode see what they see of a Function in Python."""
    Q, b, phi, mu = inputs = _plain_inputs()
    at_b = lambda b: _run_plain(Q, b, phi, mu)
    tangent = torch.ones_like(b)
    expected = torch.autograd.functional.jvp(at_b, b, tangent)[1]
    torch.testing.assert_close(torch.func.jvp(at_b, (b,), (tangent,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = at_b(torch.autograd.forward_ad.make_dual(b, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected)
    torch.testing.assert_close(torch.vmap(at_b)(torch.stack([b, b]))[1], at_b(b))
    with FakeTensorMode():
        assert isinstance(_run_plain(torch.empty(3, 5, 5), torch.empty(3, 5), 0.1, 0.2), FakeTensor)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        at_b(b).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"unrolled_kernels::momentum", "unrolled_kernels::momentum_backward"} <= names

    class Own(torch.Tensor):
        pass

    assert type(_run_plain(Q.detach().as_subclass(Own), b, phi, mu)) is Own
    with torch.autograd.set_detect_anomaly(True):
        y = _run_plain(*inputs)
        y.register_hook(lambda grad: grad * float("nan"))
        # the warning shows the call that made the node
        with (
            pytest.warns(UserWarning, match="(?s)Momentum.*_run_plain"),
            pytest.raises(RuntimeError, match=r"MomentumFunction.* returned nan values"),
        ):
            y.sum().backward()
    # one plain call is the same to the bit on both ways
    first = torch.autograd.grad(_run_plain(*inputs).sum(), inputs)
    with torch.autograd.graph.save_on_cpu():
        again = torch.autograd.grad(_run_plain(*inputs).sum(), inputs)
    assert all(map(torch.equal, first, again))


@pytest.mark.skipif(function._node is None, reason="csrc/autograd is not built for this torch")
@structures
@trajectories
def test_both_nodes_give_the_same_bits(structure, trajectory, monkeypatch):
    leaves, make_Q, b = random_quadratic(structure, (3,), 5, device="cpu")
    phi = 0.1 + torch.rand(3, 4)
    inputs = [x.detach().requires_grad_() for x in (*leaves, b, phi)]

    def run():
        *leaves, b, phi = inputs
        y = F.momentum(make_Q(*leaves), b, phi, 0.3, phi / 2, 4, y0=b, return_trajectory=trajectory, backend="cpu")
        return [y, *torch.autograd.grad(y.pow(3).sum(), inputs)]

    in_cpp = run()
    monkeypatch.setattr(function, "_node", None)
    assert all(map(torch.equal, in_cpp, run()))


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension was not built")
def test_a_schedule_of_no_samples_is_not_read():
    """It has no entry, whatever its strides are; nothing is where it would be."""
    mu = torch.empty(0).as_strided((0, 2), (0, 1)).requires_grad_()
    b, phi = torch.ones(0, 3, requires_grad=True), torch.full((1, 2), 0.3, requires_grad=True)
    y = F.nesterov(uk.Diagonal(torch.ones(0, 3)), b, phi, mu, 2, backend="cpu")
    grads = torch.autograd.grad(y.sum(), [b, phi, mu])
    assert [g.shape for g in grads] == [(0, 3), (1, 2), (0, 2)]
    assert not grads[1].any()
