"""What is particular to Triton: that its kernels compile well for GPUs that are not there, and how their ops register.

The test law itself is test_momentum.py, run on a GPU, or with ``TRITON_INTERPRET=1 pytest -k triton`` on the CPU. A
process either compiles or interprets, so each test below says which of the two it needs.
"""

import ast
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED, device_of

import unrolled_kernels
import unrolled_kernels.functional as F
from unrolled_kernels import Diagonal, _backend
from unrolled_kernels.ops.rnn.reference import weight_shapes
from unrolled_kernels.testing import STRUCTURES, assert_as_close_as_eager, random_quadratic

triton = pytest.importorskip("triton", reason="triton is not installed")

compiles = pytest.mark.skipif(INTERPRETED, reason="compiles ahead of time: needs a process without TRITON_INTERPRET")
runs = pytest.mark.skipif(_backend.unavailable_reason("triton") is not None, reason="needs a GPU or TRITON_INTERPRET=1")
structures = pytest.mark.parametrize("structure", STRUCTURES)

# dynamic shared memory that a program may use, and the register file of a multiprocessor
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536
# bytes a lane: the tables are made for the newest Triton; 3.6 spills a little at d = 5
SPILLS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 256


class FakeDriver:
    """Enough of a driver for Triton to compile for ``capability`` as if such a GPU were the current device."""

    def __init__(self, capability):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    # kernels are cached by device
    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda

    @staticmethod
    def is_active():
        return True


@pytest.fixture
def compiled(monkeypatch):
    """A function of a capability to a list, which the kernels of later launches go to, compiled and not started."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels.append((self.__name__, options["num_warps"], kernel))
        return kernel

    # leaves everything as it was where there is a GPU
    def target(capability):
        monkeypatch.setattr(driver, "_active", FakeDriver(capability))
        return kernels

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return target


def resources(cubin):
    """Registers and bytes of stack a lane, from the binary itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", out.stdout + out.stderr).groups()
    return int(registers), int(stack) + int(local)


def gradients_of(structure):
    """How many of the tensors before b have a gradient of their own: what tikhonov observed has not."""
    return 2 if structure == "spectral" else 1


def compile_ops(structure, d, k, dtype=torch.float32, *, momentum=True, form="step", shared=False, trajectory=False):
    """Run the forward and the backward op on tensors of such a call; the launchers choose the configuration."""
    B = 64
    compute = torch.promote_types(dtype, torch.float32)
    empty = lambda *shape: torch.empty(shape, dtype=dtype)
    matrix = empty(1 if shared else B, d, d)
    operands = {
        "dense": (matrix,),
        "diagonal": (empty(B, d),),
        "spectral": (empty(B, d), matrix),
        "tikhonov": (empty(B, d), empty(B, d)),
    }[structure]
    shape = {"scalar": (1, 1), "step": (1, k), "sample": (B, 1), "both": (B, k)}[form]
    schedule = [torch.empty(shape, dtype=compute) if i == 0 or momentum else None for i in range(3)]
    grad_y = empty(k + 1, B, d) if trajectory else empty(B, d)
    rest = (*operands, empty(B, d), empty(B, d), *schedule, k, trajectory)
    ops = torch.ops.unrolled_kernels
    getattr(ops, f"momentum_{structure}_triton")(*rest)
    getattr(ops, f"momentum_{structure}_triton_backward")(grad_y, *rest, *[True] * gradients_of(structure), True)


def compile_rnn_ops(structure, d, hidden_dims, dtype=torch.float32, *, trajectory=False):
    """The same for the RNN; ``structure`` may be "shared"."""
    B, k = 64, 10
    empty = lambda *shape: torch.empty(shape, dtype=dtype)
    Q = {"dense": empty(B, d, d), "shared": empty(1, d, d), "diagonal": empty(B, d)}[structure]
    compute = torch.promote_types(dtype, torch.float32)
    weights = [torch.empty(shape, dtype=compute) for shape in weight_shapes(hidden_dims, d)]
    grad_y = empty(k + 1, B, d) if trajectory else empty(B, d)
    rest = (Q, empty(B, d), empty(B, d), weights, k, trajectory)
    name = "diagonal" if structure == "diagonal" else "dense"
    getattr(torch.ops.unrolled_kernels, f"rnn_{name}_triton")(*rest)
    getattr(torch.ops.unrolled_kernels, f"rnn_{name}_triton_backward")(grad_y, *rest, True, True)


def check(kernels, capability, spills=False):
    assert kernels
    for name, num_warps, kernel in kernels:
        registers, stack = resources(kernel.asm["cubin"])
        assert registers * 32 * num_warps <= REGISTERS, f"{name}: {registers} registers a lane in {num_warps} warps"
        assert spills or stack <= SPILLS, f"{name}: {stack} bytes of registers spilled a lane"
        assert kernel.metadata.shared <= SHARED_MEMORY[capability], f"{name}: {kernel.metadata.shared} bytes shared"
        ptx = kernel.asm["ptx"]
        assert "tf32" not in ptx, f"{name}: products in TF32"
        assert not re.search(r"\b(atom|red)\.", ptx), f"{name}: atomics, whose order varies"
        # states are written and read back within a kernel, which the read-only cache would not see
        assert "global.nc" not in ptx, f"{name}: loads through the read-only cache"


capabilities = pytest.mark.parametrize("capability", SHARED_MEMORY, ids=lambda c: f"sm_{c}")


# a size for every row of the tables in triton_launch.py (those below 8 are alike), then one beyond them
@compiles
@capabilities
@pytest.mark.parametrize("d", [3, 5, 8, 16, 32, 64, 128, 256])
def test_dense_compiles_without_spills(compiled, capability, d):
    kernels = compiled(capability)
    compile_ops("dense", d, 10)
    check(kernels, capability)


@compiles
@capabilities
@pytest.mark.parametrize("d", [5, 16, 32, 64, 128])
def test_shared_dense_compiles_without_spills(compiled, capability, d):
    kernels = compiled(capability)
    compile_ops("dense", d, 10, shared=True)
    check(kernels, capability)


@compiles
@capabilities
@pytest.mark.parametrize("momentum", [False, True], ids=["gd", "momentum"])
def test_diagonal_compiles_without_spills(compiled, capability, momentum):
    kernels = compiled(capability)
    compile_ops("diagonal", 512, 24, momentum=momentum)
    check(kernels, capability)


@compiles
@capabilities
@pytest.mark.parametrize("d", [5, 16, 32, 64, 128])
def test_spectral_compiles_without_spills(compiled, capability, d):
    kernels = compiled(capability)
    compile_ops("spectral", d, 10)
    check(kernels, capability)


@compiles
@structures
def test_forms_and_trajectories_compile_without_spills(compiled, structure):
    kernels = compiled(90)
    compile_ops(structure, 16, 10, form="both", trajectory=True)
    compile_ops(structure, 16, 10, form="scalar", momentum=False)
    check(kernels, 90)


@compiles
@structures
@pytest.mark.parametrize(
    ("dtype", "d", "shared"),
    [(torch.float64, 32, False), (torch.float64, 256, True), (torch.bfloat16, 16, False)],
    ids=["f64", "f64-shared", "bf16"],
)
def test_other_dtypes_compile(compiled, structure, dtype, d, shared):
    kernels = compiled(90)
    compile_ops(structure, d, 10, dtype, shared=shared and structure in ("dense", "spectral"))
    check(kernels, 90, spills=True)


@compiles
@capabilities
@pytest.mark.parametrize(("d", "hidden_dims"), [(5, (10, 20, 20)), (16, (16,)), (32, (32, 32))], ids=str)
def test_rnn_compiles_without_spills(compiled, capability, d, hidden_dims):
    kernels = compiled(capability)
    compile_rnn_ops("dense", d, hidden_dims)
    check(kernels, capability)


@compiles
@pytest.mark.parametrize("structure", ["shared", "diagonal"])
def test_rnn_structures_compile_without_spills(compiled, structure):
    kernels = compiled(90)
    compile_rnn_ops(structure, 5, (10, 20, 20), trajectory=True)
    check(kernels, 90)


@compiles
@pytest.mark.parametrize(
    ("d", "hidden_dims", "dtype"),
    [(64, (64, 64), torch.float32), (5, (10, 20), torch.float64), (5, (10, 20), torch.bfloat16)],
    ids=["largest", "f64", "bf16"],
)
def test_rnn_compiles_beyond_the_table(compiled, d, hidden_dims, dtype):
    kernels = compiled(90)
    compile_rnn_ops("dense", d, hidden_dims, dtype)
    check(kernels, 90, spills=True)


def device_functions():
    """The file and the syntax tree of every function under ``@triton.jit``."""
    for path in sorted(Path(unrolled_kernels.__file__).parent.glob("ops/**/triton_*.py")):
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
    turn = (lambda x: x.mT.contiguous().mT) if permuted else lambda x: x
    return turn(grad), tuple(turn(x) for x in (*leaves, b, b)), [turn(x) for x in schedule], k, gradients_of(structure)


@runs
@structures
@pytest.mark.parametrize("trajectory", [False, True], ids=["last", "trajectory"])
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_opcheck(structure, trajectory, permuted):
    grad, tensors, schedule, k, operands = _arguments(structure, trajectory, permuted)
    forward = getattr(torch.ops.unrolled_kernels, f"momentum_{structure}_triton").default
    backward = getattr(torch.ops.unrolled_kernels, f"momentum_{structure}_triton_backward").default
    # the raw ops refuse autograd by design, which opcheck's autograd tests would report
    tests = ("test_schema", "test_faketensor")
    for rest in ((*tensors, *schedule, k, trajectory), (*tensors, schedule[0], None, None, k, trajectory)):
        torch.library.opcheck(forward, rest, test_utils=tests)
        for wanted in (True, False):
            torch.library.opcheck(backward, (grad, *rest, *[wanted] * operands, wanted), test_utils=tests)


@runs
def test_raw_ops_refuse_autograd():
    _, (Q, b, y0), schedule, k, _ = _arguments("dense", False, False)
    y = torch.ops.unrolled_kernels.momentum_dense_triton(Q.requires_grad_(), b, y0, *schedule, k, False)
    with pytest.raises(RuntimeError, match="bypasses the layer's backward"):
        y.sum().backward()


@runs
@structures
def test_export(structure):
    """The exported graph holds the op itself."""
    leaves, make_Q, b = random_quadratic(structure, (3,), 4, device=device_of("triton"))

    class Model(torch.nn.Module):
        def forward(self, *args):
            return F.nesterov(make_Q(*args[:-1]), args[-1], 0.5, 0.1, 3, backend="triton")

    exported = torch.export.export(Model(), (*leaves, b))
    assert f"momentum_{structure}_triton" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*leaves, b), Model()(*leaves, b))


@runs
def test_long_diagonal_schedules():
    """Beyond a segment of steps the backward replays from checkpoints; blocks outnumber the programs."""
    device = device_of("triton")
    q, b = (torch.rand(2, 200, dtype=torch.float64, device=device) for _ in range(2))
    for steps, shape in ((25, (25,)), (17, (2, 1)), (9, (2, 9))):
        results = []
        for backend in ("eager", "triton"):
            phi, beta = (torch.full(shape, v, dtype=torch.float64, device=device) for v in (0.7, 0.4))
            leaves = [x.clone().requires_grad_() for x in (q, b, phi, beta)]
            y = F.momentum(Diagonal(leaves[0]), leaves[1], leaves[2], leaves[3], 0.2, steps, backend=backend)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for actual, expected in zip(*results[::-1], strict=True):
            torch.testing.assert_close(actual, expected)


@runs
@pytest.mark.parametrize("structure", ["dense", "spectral"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_shared_matrices_beyond_the_registers(structure, dtype):
    """Products of streamed tiles with 16 samples, of which the second block is not full."""
    device = device_of("triton")
    leaves, make_Q, b = random_quadratic(structure, (37,), 130, symmetric=False, shared=True, dtype=torch.float64)
    leaves = [*leaves, b, torch.rand(3, dtype=torch.float64), torch.rand(37, 3, dtype=torch.float64)]

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
assert "unrolled_kernels.ops.momentum.triton_kernels" in sys.modules
assert "unrolled_kernels.ops.momentum.triton_tile" not in sys.modules
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr
