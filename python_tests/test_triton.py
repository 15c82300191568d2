"""What is particular to Triton: that its kernels compile well for GPUs that are not there, and how their ops register.

The test law itself is test_momentum.py, run on a GPU, or with ``TRITON_INTERPRET=1 pytest -k triton`` on the CPU. A
process either compiles or interprets, so each test below says which of the two it needs.
"""

import ast
import itertools
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED, device_of
from problems import canonical_structure

import unrolled_kernels
import unrolled_kernels.functional as F
from unrolled_kernels import Diagonal, _backend
from unrolled_kernels.ops.momentum import reference as momentum_reference
from unrolled_kernels.ops.momentum.reference import NO_PROX
from unrolled_kernels.ops.rnn.reference import weight_shapes
from unrolled_kernels.prox import L1, Box, SoftThreshold
from unrolled_kernels.testing import STRUCTURES, assert_as_close_as_eager, random_quadratic

triton = pytest.importorskip("triton", reason="triton is not installed")
from benchmarks import machine_code  # noqa: E402
from benchmarks.ahead_of_time import launches, resources, shuffles  # noqa: E402

compiles = pytest.mark.skipif(INTERPRETED, reason="compiles ahead of time: needs a process without TRITON_INTERPRET")
runs = pytest.mark.skipif(_backend.unavailable_reason("triton") is not None, reason="needs a GPU or TRITON_INTERPRET=1")
structures = pytest.mark.parametrize("structure", STRUCTURES)

# dynamic shared memory that a program may use, and the register file of a multiprocessor
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536
# bytes a lane: Triton 3.6 spills two registers at d = 5
SPILLS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 8

B, K = 64, 10
SHAPES = {"scalar": (), "step": (K,), "sample": (B, 1), "both": (B, K)}


def call(
    structure,
    d,
    *,
    method="gradient_descent",
    coefficients="float",
    y0=False,
    trajectory=False,
    shared=False,
    cotangent="expanded",
    wanted=("Q", "b"),
    dtype=torch.float32,
    num_steps=K,
    prox=None,
    **options,
):
    """A call of a public function as users write it, and its backward pass for the gradients that are ``wanted``."""
    leaves, make_Q, b = random_quadratic(structure, (B,), d, shared=shared, dtype=dtype)
    for x in leaves:
        x.requires_grad_("Q" in wanted)
    b.requires_grad_("b" in wanted)
    start = torch.zeros(B, d, dtype=dtype, requires_grad="y0" in wanted) if y0 else None
    compute = torch.promote_types(dtype, torch.float32)

    def coefficient():
        if coefficients == "float":
            return 0.5
        return torch.full(SHAPES[coefficients], 0.5, dtype=compute, requires_grad="schedule" in wanted)

    numbers = {"gradient_descent": 1, "nesterov": 2, "momentum": 3}.get(method, 0)
    rest = [coefficient() for _ in range(numbers)]
    if method == "rnn":
        W1, W2, *inner, V = (
            torch.zeros(shape, dtype=compute, requires_grad="schedule" in wanted)
            for shape in weight_shapes(coefficients, d)
        )
        rest = [(W1, W2, inner, V)]
    if prox is not None:
        bound = lambda: torch.zeros(B, d, dtype=compute, requires_grad="prox" in wanted)
        threshold = torch.zeros(SHAPES.get(coefficients, ()), dtype=compute, requires_grad="prox" in wanted)
        options["prox"] = {
            "box": lambda: Box(bound(), bound()),
            "number": lambda: Box(None, 0.5),
            "l1": lambda: L1(bound()),
            "soft_threshold": lambda: SoftThreshold(threshold),
        }[prox]()
    y = getattr(F, method)(make_Q(*leaves), b, *rest, num_steps, y0=start, return_trajectory=trajectory, **options)
    if y.requires_grad:
        (y.sum() if cotangent == "expanded" else y.square().sum()).backward()


# what a training step asks for, plain and with all there is
ORDINARY = (
    {},
    {"method": "nesterov", "coefficients": "step", "y0": True, "wanted": ("Q", "b", "y0", "schedule")},
)


def check(found, capability, spills=False):
    """Compile for ``capability`` and look at what came out."""
    assert found
    for launch in found:
        kernel, name, num_warps = launch.compile(capability), launch.name, launch.options["num_warps"]
        registers, stack = resources(kernel.asm["cubin"])
        assert registers * 32 * num_warps <= REGISTERS, f"{name}: {registers} registers a lane in {num_warps} warps"
        assert spills or stack <= SPILLS, f"{name}: {stack} bytes of registers spilled a lane"
        assert kernel.metadata.shared <= SHARED_MEMORY[capability], f"{name}: {kernel.metadata.shared} bytes shared"
        ptx = kernel.asm["ptx"]
        assert "tf32" not in ptx, f"{name}: products in TF32"
        assert not re.search(r"\b(atom|red)\.", ptx), f"{name}: atomics, whose order varies"
        # states are written and read back within a kernel, which the read-only cache would not see
        assert "global.nc" not in ptx, f"{name}: loads through the read-only cache"


def subsets(names):
    return [c for n in range(len(names) + 1) for c in itertools.combinations(names, n)]


def calls(structure, methods, coefficients, sizes):
    """Every combination of what a call can be, in an order that does not vary."""
    choices = {
        "d": sizes,
        "method": methods,
        "coefficients": coefficients,
        "y0": (False, True),
        "trajectory": (False, True),
        "shared": (False, True) if structure in ("dense", "spectral") else (False,),
        "cotangent": ("expanded", "strided"),
        "prox": (None, *MAPS) if methods != ("rnn",) and structure != "spectral" else (None,),
        "wanted": subsets(("Q", "b", "y0", "schedule")),
    }
    for values in itertools.product(*choices.values()):
        row = dict(zip(choices, values, strict=True))
        if (row["y0"] or "y0" not in row["wanted"]) and (
            row["coefficients"] != "float" or "schedule" not in row["wanted"]
        ):
            yield row


def with_every_pair(things, values=dict):
    """Some of ``things`` that have every pair that there is of ``values(thing)``, a dictionary."""
    things = list(things)
    random.Random(0).shuffle(things)
    pairs = [set(itertools.combinations(values(thing).items(), 2)) for thing in things]
    missing = set().union(*pairs)
    for least in (20, 10, 5, 1):
        for thing, own in zip(things, pairs, strict=True):
            if len(own & missing) >= least:
                missing -= own
                yield thing


MAPS = ("box", "number", "l1", "soft_threshold")
COEFFICIENTS = ("float", *SHAPES)
METHODS = ("gradient_descent", "nesterov", "momentum")
# one for each kernel; 5: no vectors
SIZES = {"dense": (5, 16, 150), "spectral": (5, 16, 150), "diagonal": (5, 512), "tikhonov": (5, 512)}
capabilities = pytest.mark.parametrize("capability", SHARED_MEMORY, ids=lambda c: f"sm_{c}")


def constants(launch):
    """What a kernel is compiled for, by name: its constants, arguments that are not there, and strides of one."""
    names = launch.source.fn.arg_names
    # the members of a tuple have a path of indices
    return {(launch.name, names[path[0]], *path[1:]): str(value) for path, value in launch.source.constants.items()}


@compiles
@pytest.mark.parametrize(
    ("structures", "methods", "coefficients", "sizes"),
    [
        *(((structure,), METHODS, COEFFICIENTS, SIZES[structure]) for structure in ("dense", "spectral")),
        (("diagonal", "tikhonov"), METHODS, COEFFICIENTS, SIZES["diagonal"]),
        (("dense", "diagonal"), ("rnn",), ((20,), (10, 20, 20)), (5, 16)),
    ],
    ids=["dense", "spectral", "diagonal", "rnn"],
)
def test_every_call_translates(structures, methods, coefficients, sizes):
    """Each value of each argument with each of every other, and each set of gradients that is asked for; of what
    these calls launch, enough that every two constants of a kernel meet."""
    with launches() as found:
        for structure in structures:
            for row in with_every_pair(calls(structure, methods, coefficients, sizes)):
                call(structure, **row)
    assert len(found) > 20
    chosen = list(with_every_pair(found, constants))
    assert {launch.name for launch in chosen} == {launch.name for launch in found}
    for launch in chosen:
        launch.translate()


@compiles
@pytest.mark.slow
@structures
def test_every_combination_compiles(structure):
    with launches() as found:
        for row in calls(structure, METHODS, COEFFICIENTS, SIZES[structure]):
            call(structure, **row)
    for launch in found:
        launch.compile(90)


def sizes(*on_every_gpu, only_90=()):
    """Sizes for each GPU; those of ``only_90`` for the others when there is time."""
    return [
        pytest.param(
            d,
            capability,
            id=f"d{d}-sm_{capability}",
            marks=[pytest.mark.slow] if d in only_90 and capability != 90 else [],
        )
        for d in (*on_every_gpu, *only_90)
        for capability in SHARED_MEMORY
    ]


# a size for every row of the tables in ops/triton/launch.py (those below 8 are alike), then one beyond them
@compiles
@pytest.mark.parametrize(("d", "capability"), sizes(5, 32, 256, only_90=(3, 8, 16, 64, 128)))
def test_dense_compiles_without_spills(d, capability):
    with launches() as found:
        for arguments in ORDINARY:
            call("dense", d, **arguments)
    check(found, capability)


@compiles
@pytest.mark.parametrize("d", [16, 32, 64, 128])
def test_lanes_exchange_little(d):
    """A layout that gives a row of Q to many lanes costs three times the instructions: every one is an FMA's place."""
    with launches() as found:
        call("dense", d)
    forward, backward = (shuffles(launch.compile(90).asm["cubin"]) for launch in found)
    assert forward <= 8
    # Qᵀa sums over lanes
    assert backward <= 96


# for 32 FMAs, at most; with Triton 3.6 another layout of the same tile once took 440 for 64, of them 144 exchanges
@compiles
@pytest.mark.parametrize(
    ("d", "slots"),
    [pytest.param(16, 67, marks=pytest.mark.slow), (32, 60), (64, 56), pytest.param(128, 60, marks=pytest.mark.slow)],
)
def test_forward_steps_issue_little(d, slots):
    rows = [r for r in machine_code.triton_rows([("dense", d)]) if r["kernel"] == "momentum_dense_kernel"]
    assert [r["method"] for r in rows] == ["gd", "momentum"]
    for row in rows:
        assert row["slots_per_32_fma"] <= slots, row
        assert row["SHFL"] <= 4, row
        assert row["local_bytes"] == 0, row


@compiles
@pytest.mark.parametrize(("d", "capability"), sizes(5, only_90=(16, 32, 64, 128)))
def test_shared_dense_compiles_without_spills(d, capability):
    with launches() as found:
        for arguments in ORDINARY:
            call("dense", d, **arguments, shared=True)
    check(found, capability)


@compiles
@pytest.mark.parametrize(("d", "capability"), sizes(512))
def test_diagonal_compiles_without_spills(d, capability):
    with launches() as found:
        for arguments in ORDINARY:
            call("diagonal", d, **arguments, num_steps=K)
            call("tikhonov", d, **arguments, num_steps=K)
        # more steps than a segment has
        call("diagonal", d, method="momentum", num_steps=24)
    check(found, capability)


@compiles
@pytest.mark.parametrize(("d", "capability"), sizes(5, 32, only_90=(16, 64, 128)))
def test_spectral_compiles_without_spills(d, capability):
    with launches() as found:
        for arguments in ORDINARY:
            call("spectral", d, **arguments)
    check(found, capability)


@compiles
@structures
def test_forms_and_trajectories_compile_without_spills(structure):
    everything = ("Q", "b", "y0", "schedule")
    with launches() as found:
        call(structure, 16, method="momentum", coefficients="both", y0=True, trajectory=True, wanted=everything)
        call(structure, 16, coefficients="scalar", cotangent="strided", wanted=everything)
    check(found, 90)


@compiles
@pytest.mark.parametrize(
    ("structure", "d"),
    [
        pytest.param(s, d, marks=[pytest.mark.slow] if d in (8, 16, 64, 128) else [])
        for s, d in (*(("dense", d) for d in (5, 8, 16, 32, 64, 128, 150)), ("tikhonov", 512))
    ],
)
def test_proximal_steps_compile_without_spills(structure, d):
    wanted = ("Q", "b", "schedule", "prox")
    with launches() as found:
        call(structure, d, prox="box", wanted=wanted)
        call(structure, d, method="momentum", coefficients="step", prox="l1", wanted=wanted)
        call(
            structure,
            d,
            coefficients="step",
            prox="soft_threshold",
            shared=structure == "dense" and d < 16,
            wanted=wanted,
        )
    check(found, 90)


@compiles
@pytest.mark.parametrize(
    ("structure", "d"),
    [
        *(("dense", d) for d in (5, 16, 32, 64, 128, 150)),
        *(("spectral", d) for d in (16, 32, 128)),
        ("diagonal", 5),
        ("tikhonov", 300),
        ("diagonal", 8192),
    ],
)
def test_kernels_of_samples_that_stop_compile(structure, d):
    with launches() as found:
        for shared in (False, True) if structure in ("dense", "spectral") else (False,):
            options = {"wanted": (), "shared": shared, "tolerance": 1e-3}
            call(structure, d, **options)
            options["prox"] = "box" if structure != "spectral" else None
            call(structure, d, method="nesterov", coefficients="step", **options)
    # 8 bytes a lane of the streamed kernel with a map, beside products that read Q from L2
    check([launch for launch in found if "momentum" in launch.name], 90, spills=d == 150)


@compiles
@structures
@pytest.mark.parametrize(
    ("dtype", "d", "shared"),
    [(torch.float64, 32, False), (torch.float64, 256, True), (torch.bfloat16, 16, False)],
    ids=["f64", "f64-shared", "bf16"],
)
def test_other_dtypes_compile(structure, dtype, d, shared):
    shared = shared and structure in ("dense", "spectral")
    with launches() as found:
        call(structure, d, method="nesterov", coefficients="step", dtype=dtype, shared=shared)
    check(found, 90, spills=True)


@compiles
@pytest.mark.parametrize("hidden_dims", [(10, 20, 20), (16,), (32, 32)], ids=str)
@capabilities
def test_rnn_compiles_without_spills(hidden_dims, capability):
    d = {(10, 20, 20): 5, (16,): 16, (32, 32): 32}[hidden_dims]
    with launches(capability) as found:
        call("dense", d, method="rnn", coefficients=hidden_dims, wanted=("Q", "b", "schedule"))
    check(found, capability)


@compiles
@pytest.mark.parametrize("structure", ["shared", "diagonal"])
def test_rnn_structures_compile_without_spills(structure):
    shared = structure == "shared"
    with launches() as found:
        call(
            "dense" if shared else structure,
            5,
            method="rnn",
            coefficients=(10, 20, 20),
            shared=shared,
            trajectory=True,
            wanted=("Q", "b", "schedule"),
        )
    check(found, 90)


@compiles
@pytest.mark.parametrize(
    ("d", "hidden_dims", "dtype"),
    [(64, (64, 64), torch.float32), (5, (10, 20), torch.float64), (5, (10, 20), torch.bfloat16)],
    ids=["largest", "f64", "bf16"],
)
def test_rnn_compiles_beyond_the_table(d, hidden_dims, dtype):
    with launches() as found:
        call("dense", d, method="rnn", coefficients=hidden_dims, dtype=dtype, wanted=("Q", "b", "schedule"))
    check(found, 90, spills=True)


def device_functions():
    """The file and the syntax tree of every function under ``@triton.jit``."""
    for path in sorted(Path(unrolled_kernels.__file__).parent.glob("ops/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(x) for x in node.decorator_list):
                yield path.name, node


def test_device_functions_return_only_at_their_end():
    """Code after a ``return`` in a branch is compiled even where the branch is taken at compile time: the interpreter
    runs such a function, the compiler refuses it."""
    functions = list(device_functions())
    assert len(functions) > 20
    for file, function in functions:
        returns = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
        assert returns in ([], [function.body[-1]]), f"{file}: {function.name} returns in the middle"


def _arguments(structure, trajectory, permuted):
    device = device_of("triton")
    B, d, k = 3, 5, 4
    leaves, _, b = random_quadratic(structure, (B,), d, dtype=torch.float64, device=device)
    schedule = [torch.rand(B, k, dtype=torch.float64, device=device) for _ in range(3)]
    grad = torch.randn((k + 1, B, d) if trajectory else (B, d), dtype=torch.float64, device=device)
    turn = lambda x: x if x is None or not permuted else x.mT.contiguous().mT
    tensors = (*canonical_structure(structure, leaves), b, b)
    return turn(grad), [turn(x) for x in tensors], [turn(x) for x in schedule], k


@runs
@structures
@pytest.mark.parametrize("trajectory", [False, True], ids=["last", "trajectory"])
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_opcheck(structure, trajectory, permuted):
    grad, tensors, schedule, k = _arguments(structure, trajectory, permuted)
    forward = torch.ops.unrolled_kernels.momentum_triton.default
    backward = torch.ops.unrolled_kernels.momentum_triton_backward.default
    # the op of the backward refuses autograd by design, which opcheck's autograd tests would report
    tests = ("test_schema", "test_faketensor")
    for coefficients in (schedule, (schedule[0], None, None)):
        rest = (*tensors, *coefficients, None, *NO_PROX, k, trajectory)
        torch.library.opcheck(forward, rest, test_utils=tests)
        for needs in (255, 0, 1 << 2, 1 << 3 | 1 << 5):
            torch.library.opcheck(backward, (grad, *rest, needs), test_utils=tests)


@runs
def test_gradients_of_the_raw_op():
    """What a program from torch.export calls."""
    grad, tensors, schedule, k = _arguments("dense", False, False)
    leaves = [x.requires_grad_() for x in (*tensors, *schedule) if x is not None]
    results = []
    for run in (torch.ops.unrolled_kernels.momentum_triton, momentum_reference.forward):
        results.append(torch.autograd.grad(run(*tensors, *schedule, None, *NO_PROX, k, False), leaves, grad))
    torch.testing.assert_close(*results)


@runs
@structures
def test_export(structure):
    """The exported graph holds the op itself."""
    leaves, make_Q, b = random_quadratic(structure, (3,), 4, device=device_of("triton"))

    class Model(torch.nn.Module):
        def forward(self, *args):
            return F.nesterov(make_Q(*args[:-1]), args[-1], 0.5, 0.1, 3, backend="triton")

    exported = torch.export.export(Model(), (*leaves, b))
    assert "momentum_triton" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*leaves, b), Model()(*leaves, b))


@runs
def test_long_diagonal_schedules():
    """Beyond a segment of steps the backward replays from checkpoints; blocks outnumber the programs."""
    device = device_of("triton")
    q, b = (torch.rand(2, 200, dtype=torch.float64, device=device) for _ in range(2))
    # crossed bounds: the upper one stops everything
    crossed = Box(*(torch.linspace(a, -a, 200, dtype=torch.float64, device=device) for a in (-0.1, 0.1)))
    maps = (None, crossed, SoftThreshold(torch.full((2, 1), 0.1, dtype=torch.float64, device=device)))
    for (steps, shape), prox in itertools.product(((25, (25,)), (17, (2, 1)), (9, (2, 9))), maps):
        results = []
        for backend in ("eager", "triton"):
            phi, beta = (torch.full(shape, v, dtype=torch.float64, device=device) for v in (0.7, 0.4))
            tensors = (q, b, phi, beta, *([] if prox is None else vars(prox).values()))
            leaves = [x.clone().requires_grad_() for x in tensors]
            options = {"prox": None if prox is None else type(prox)(*leaves[4:]), "backend": backend}
            y = F.momentum(Diagonal(leaves[0]), leaves[1], leaves[2], leaves[3], 0.2, steps, **options)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for actual, expected in zip(*results[::-1], strict=True):
            torch.testing.assert_close(actual, expected)


@runs
@pytest.mark.parametrize("structure", ["dense", "spectral"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_shared_matrices_beyond_the_registers(structure, dtype):
    """Products of streamed tiles with 16 samples, of which the second block is not full."""
    device = device_of("triton")
    leaves, make_Q, b = random_quadratic(structure, (19,), 130, symmetric=False, shared=True, dtype=torch.float64)
    leaves = [*leaves, b, torch.rand(3, dtype=torch.float64), torch.rand(19, 3, dtype=torch.float64)]

    def run(backend, dtype):
        inputs = [x.to(device, dtype, copy=True).requires_grad_() for x in leaves]
        *q, b, phi, beta = inputs
        y = F.momentum(make_Q(*q), b, phi, beta, 0.3, 3, return_trajectory=True, backend=backend)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=device).to(dtype).reshape(y.shape)
        return y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)

    exact, eager, actual = run("eager", torch.float64), run("eager", torch.float32), run("triton", dtype)
    for one, reference, own in zip(actual, exact, eager, strict=True):
        assert_as_close_as_eager(one, reference, own)


def _python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_import_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, unrolled_kernels as uk
Q, b = torch.eye(2), torch.ones(2)
uk.functional.gradient_descent(Q, b, 0.5, 3)
assert "triton" not in uk.available_backends()
try:
    uk.functional.gradient_descent(Q, b, 0.5, 3, backend="triton")
except ValueError as error:
    assert "pip install triton" in str(error), error
else:
    raise SystemExit("expected a ValueError")
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_import_does_not_import_the_kernels():
    # torch itself imports triton where it is installed
    code = """
import sys
import unrolled_kernels.functional
assert "unrolled_kernels.ops.momentum.triton_ops" in sys.modules
assert "unrolled_kernels.ops.triton.tile" not in sys.modules
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr


@compiles
def test_the_roof_is_multiply_adds_in_registers():
    """The loop that a GPU's arithmetic is compared with: 128 FMAs, its counter, and no memory."""
    from benchmarks import roofs_triton

    with launches() as found:
        roofs_triton.run(torch.empty(1024))
    (launch,) = found
    binary = launch.compile(90)
    assert resources(binary.asm["cubin"])[1] == 0
    loop = re.search(r"^(\$L__BB0_\d+):.*\n((?:.*\n)*?).*bra\s+\1;", binary.asm["ptx"], re.MULTILINE)[2]
    instructions = [line.split()[0] for line in loop.splitlines() if line.strip() and line.split()[0][0] not in ".$/"]
    assert instructions.count("fma.rn.f32") == 128
    assert len(instructions) <= 128 + 3
    assert not any(name.startswith(("ld.", "st.")) for name in instructions)
