"""The CUDA kernels of `rnn` executed on the CPU; what the compiler makes of them is in test_momentum_cuda.py."""

import itertools

import pytest
import torch
from native.emulation import (
    CSRC,
    DTYPES,
    EMULATION,
    Emulation,
    execute,
    needs_emulation,
    poisoned,
    stride,
)
from native.emulation import spread as spread_rows
from problems import RnnProblem, assert_nearest_even, rnn_at_ties

from unrolled_kernels.ops.rnn import manual
from unrolled_kernels.ops.rnn.native import hidden_dims_of

pytestmark = needs_emulation
structures = pytest.mark.parametrize("structure", ["dense", "shared", "diagonal"])
MAX_LAYERS = 6


class Rnn(Emulation):
    """The contract of ``manual.forward`` and ``manual.backward``, fulfilled by the executed kernels."""

    family, reference = "rnn", manual
    sources = (CSRC / "cuda" / "rnn.cu", EMULATION / "rnn_driver.cpp")

    def forward(self, matrix, diagonal, b, y0, weights, k, trajectory):
        y = poisoned((k + 1, *b.shape) if trajectory else b.shape, b.dtype)
        return self._run(False, matrix, diagonal, b, y0, weights, k, trajectory, [y])[0]

    def backward(self, grad_y, matrix, diagonal, b, y0, weights, k, trajectory, needs):
        tensors = (matrix, diagonal, b, y0, _pack(weights))
        outputs = [
            poisoned(x.shape, x.dtype) if x is not None and needs >> i & 1 else None for i, x in enumerate(tensors)
        ]
        *grads, d_weights = self._run(True, matrix, diagonal, b, y0, weights, k, trajectory, [grad_y, *outputs])
        grads = (b.new_empty(0) if x is None else x for x in grads)
        d_weights = [] if d_weights is None else d_weights.split([W.numel() for W in weights])
        return *grads, [g.view(W.shape) for g, W in zip(d_weights, weights, strict=False)]

    def _run(self, backward, matrix, diagonal, b, y0, weights, k, trajectory, rest):
        hidden_dims = hidden_dims_of(weights)
        numbers = [
            int(backward),
            list(DTYPES.values()).index(b.dtype),
            self.shift * b.element_size(),
            *b.shape,
            k,
            int(trajectory),
            *(stride(x, 0) for x in (matrix, diagonal, b, y0)),
            len(hidden_dims),
            *hidden_dims,
            *[0] * (MAX_LAYERS - len(hidden_dims)),
        ]
        arrays = [matrix, diagonal, b, y0, _pack(weights), *rest]
        arrays += [None] * (11 - len(arrays))
        return execute(self.executable, self.environment, numbers, arrays, rest[int(backward) :])


def _pack(weights):
    return torch.cat([W.reshape(-1) for W in weights])


def _problem(structure, B, d, hidden_dims, k, **options):
    """(grad_y, matrix, λ, b, y0, weights): canonical arguments of the op in float64, rounded to bfloat16."""
    kind = "diagonal" if structure == "diagonal" else "dense"
    problem = RnnProblem(kind, (B,), d, k, hidden_dims, shared=structure == "shared", **options)
    grad = problem.normal(*((k + 1, B, d) if problem.trajectory else (B, d)))
    return _canonical(problem, grad.bfloat16().double())


def _canonical(problem, grad):
    b, y0, Q = (problem.leaves.get(name) for name in ("b", "y0", "Q0"))
    matrix, diagonal = (Q.reshape(-1, *Q.shape[-2:]), None) if Q.shape != b.shape else (None, Q)
    return [grad, matrix, diagonal, b, y0, [x for name, x in problem.leaves.items() if name.startswith("W")]]


def _run(implementation, tensors, k, dtype, needs=31):
    """y, and the gradients by name."""
    compute = torch.promote_types(dtype, torch.float32)
    grad, matrix, diagonal, b, y0 = (x if x is None else x.to(dtype) for x in tensors[:5])
    weights = [W.to(compute) for W in tensors[5]]
    call = (matrix, diagonal, b, y0, weights, k, grad.dim() == 3)
    d_matrix, d_diagonal, db, dy0, d_weights = implementation.backward(grad, *call, needs)
    results = {"y": implementation.forward(*call), "d_diagonal": d_diagonal, "d_matrix": d_matrix}
    return results | {"db": db, "dy0": dy0} | {f"d_weights {i}": g for i, g in enumerate(d_weights)}


def _check(emulation, tensors, k, dtype, needs=31):
    return emulation.check(lambda implementation, dtype: _run(implementation, tensors, k, dtype, needs), dtype)


def _in_every_order(tensors, k, dtype, **options):
    Rnn.check_every_order(lambda implementation, dtype: _run(implementation, tensors, k, dtype), dtype, **options)


# few samples, then so many that each of the two blocks of the emulated device takes a second, larger tile, and again
@structures
@pytest.mark.parametrize("B", [11, 71, 290])
@pytest.mark.parametrize(("d", "hidden_dims"), [(5, (10, 20, 20)), (3, (7,)), (13, (6, 33))], ids=str)
def test_tiles(structure, B, d, hidden_dims):
    _in_every_order(_problem(structure, B, d, hidden_dims, 3, seed=d), 3, torch.float32)


@structures
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trajectory", [False, True], ids=["last", "trajectory"])
def test_dtypes(structure, dtype, trajectory):
    for B, d, hidden_dims, k in ((19, 5, (10, 20, 20), 4), (2, 17, (9, 3, 4, 5, 6, 7), 2)):
        tensors = _problem(structure, B, d, hidden_dims, k, trajectory=trajectory, seed=3)
        _check(Rnn(order="7", copies="late"), tensors, k, DTYPES[dtype])


@structures
@pytest.mark.parametrize("trajectory", [False, True], ids=["last", "trajectory"])
def test_edges(structure, trajectory):
    for k, B, (d, hidden_dims, warm) in itertools.product((0, 1, 7), (0, 1, 3), ((1, (1,), True), (6, (2, 9), False))):
        tensors = _problem(structure, B, d, hidden_dims, k, warm=warm, trajectory=trajectory, seed=5)
        for dtype in (torch.float32, torch.float64):
            _check(Rnn(), tensors, k, dtype)


@structures
def test_largest(structure):
    """d = 64 and widths of 128: the weights stay in global memory, whose L2 serves them."""
    hidden_dims = (128, 128, 128)
    _check(Rnn(), _problem(structure, 3, 64, hidden_dims, 2), 2, torch.float32)


@structures
def test_what_does_not_fit_in_shared_memory(structure):
    """Trajectories, gradients, matrices, weights and at last vectors in the workspace instead."""
    hidden_dims = (12, 20)
    for limit in (34000, 20000, 14000, 9000, 3000):
        tensors = _problem(structure, 18, 9, hidden_dims, 6, seed=4)
        _in_every_order(tensors, 6, torch.float32, CUDA_ON_CPU_SHARED_MEMORY=str(limit))


@structures
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_strides_and_alignment(structure, dtype):
    hidden_dims = (6, 10)
    grad, *operands, weights = _problem(structure, 5, 7, hidden_dims, 3, seed=6)
    spread = [spread_rows(x if x is None else x.to(DTYPES[dtype])) for x in operands]
    matrix, diagonal, b, y0 = operands
    expanded = [matrix, diagonal, b[:1].expand(5, 7), y0[:1].expand(5, 7)]
    for case in (spread, expanded):
        _check(Rnn(shift=1), [grad, *case, weights], 3, DTYPES[dtype])


@structures
def test_gradients_that_are_not_needed(structure):
    for needs in range(32):
        tensors = _problem(structure, 9, 6, (5, 8), 4, seed=2)
        _check(Rnn(), tensors, 4, torch.float32, needs)


@structures
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_results_are_rounded_once(structure, dtype):
    for d in (6, 40):
        kind = "diagonal" if structure == "diagonal" else "dense"
        problem = rnn_at_ties(kind, d, DTYPES[dtype], B=1 if structure == "shared" else 3)
        tensors = _canonical(problem, torch.ones(problem.leaves["b"].shape, dtype=torch.float64))
        actual = _run(Rnn(), tensors, 1, DTYPES[dtype])
        assert_nearest_even(actual, _run(manual, tensors, 1, torch.float64), DTYPES[dtype])


def test_nan_stays_in_its_row():
    for structure, B in itertools.product(("dense", "diagonal"), (9, 70, 260)):
        tensors = _problem(structure, B, 6, (5, 8), 3, seed=8)
        clean = _run(Rnn(), tensors, 3, torch.float32)
        tensors[3][1, 3] = torch.nan
        spoiled = _run(Rnn(), tensors, 3, torch.float32)
        others = [i for i in range(B) if i != 1]
        assert spoiled["y"][1].isnan().all()
        for name in ("y", "db", "dy0"):
            assert torch.equal(clean[name][others], spoiled[name][others]), name


def test_sizes_beyond_the_kernels_are_refused():
    with pytest.raises(AssertionError, match="at most 8192 expected; use backend='eager'"):
        _run(Rnn(), _problem("diagonal", 1, 1, (8193,), 1), 1, torch.float32)


@structures
@pytest.mark.parametrize("mode", ["address", pytest.param("thread", marks=pytest.mark.slow)])
def test_sanitizers(structure, mode):
    hidden_dims = (7, 12, 9)
    for B, trajectory in itertools.product((1, 10, 71, 290), (False, True)):
        tensors = _problem(structure, B, 5, hidden_dims, 3, trajectory=trajectory, seed=9)
        _check(Rnn(mode, order="7", copies="late", shift=1), tensors, 3, torch.float32)
    for limit in (12000, 2000):
        tensors = _problem(structure, 18, 6, hidden_dims, 4)
        _check(Rnn(mode, CUDA_ON_CPU_SHARED_MEMORY=str(limit)), tensors, 4, torch.float32)
