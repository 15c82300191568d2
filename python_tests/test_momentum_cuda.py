"""The CUDA kernels without a GPU: what the compiler makes of them, and what they compute when executed on the CPU.

Neither is a run on a GPU; there, `make gpu` runs test_momentum.py with the backend "cuda".
"""

import itertools
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from native.build import cached
from native.emulation import (
    ARCHITECTURES,
    CSRC,
    DTYPES,
    EMULATION,
    MODES,
    ORDERS,
    Emulation,
    emulated,
    environment,
    execute,
    needs_emulation,
    needs_nvcc,
    poisoned,
    spread,
    stride,
)
from problems import MomentumProblem, assert_nearest_even, canonical_structure, momentum_at_ties

from benchmarks import machine_code
from unrolled_kernels.ops.momentum import function, manual, native
from unrolled_kernels.ops.momentum import stopping as stopping_op
from unrolled_kernels.ops.momentum.reference import NO_PROX
from unrolled_kernels.testing import STRUCTURES

STEMS = sorted(p.stem for p in (CSRC / "cuda").glob("*.cu"))

# what the compiler makes of the kernels


def _describe(symbol):
    """(name, D) of a float32 kernel's mangled name, D None where it has none; the name says whether it has a map."""
    match = re.search(r"\d+((?:momentum|rnn|sum)[a-z_]*?_kernel)I(?:f(?:Li(\d+)E)?(Li\d+E)?)?", symbol)
    assert match, symbol
    if re.search(r"(dense|spectral)_kernelIf\w+?Lb1EEEv", symbol):
        return match[1] + " that stops", int(match[2])
    if re.search(r"diagonal_backward_kernelIf\w+?Lb1EEEv", symbol):
        return match[1] + " of constant coefficients", None
    if re.search(r"diagonal_backward_kernelIf\w+?Lb1ELb0EEEv", symbol):
        return match[1] + " of second order", None
    proximal = " with a map" if re.search(r"(Lb[01]E|shared_(backward_)?kernelIf)Lb1E", symbol) else ""
    return match[1] + proximal, int(match[2]) if match[2] and not match[3] else None


# registers of a thread, by D where it is a tile's: with 96 a multiprocessor holds 20 warps, with 128 sixteen, with 168
# twelve, with 255 eight
TILES = {4: 96, 5: 96, 8: 168, 16: 128, 32: 128, 64: 255, 128: 255}
BACKWARD_TILES = {4: 168, 5: 168, 8: 255, 16: 168, 32: 168, 64: 255, 128: 255}
REGISTERS = {
    "momentum_dense_kernel": TILES,
    "momentum_dense_backward_kernel": BACKWARD_TILES,
    "momentum_dense_second_order_kernel": {d: 168 if d < 8 else 255 for d in TILES},
    "momentum_diagonal_kernel": {None: 80},
    "momentum_diagonal_backward_kernel": {None: 128},
    "momentum_diagonal_backward_kernel of constant coefficients": {None: 128},
    "momentum_diagonal_backward_kernel of second order": {None: 168},
    "momentum_dense_kernel that stops": TILES | {4: 168, 5: 168, 8: 255, 16: 168, 32: 168},
    "momentum_spectral_kernel that stops": TILES,
    "momentum_diagonal_stopping_kernel": {8: 80, 32: 80, 256: 80},
    "momentum_dense_kernel with a map": TILES | {16: 168},
    "momentum_dense_backward_kernel with a map": BACKWARD_TILES | {16: 255},
    "momentum_diagonal_kernel with a map": {None: 80},
    "momentum_diagonal_backward_kernel with a map": {None: 168},
    "momentum_resident_kernel": {256: 255, 512: 255, 1024: 255},
    "momentum_resident_backward_kernel": {256: 255, 512: 255, 1024: 255},
    "momentum_shared_kernel": {None: 64},
    "momentum_shared_kernel with a map": {None: 64},
    "momentum_shared_backward_kernel": {None: 80},
    "momentum_shared_backward_kernel with a map": {None: 128},
    "momentum_shared_sum_kernel": {None: 40},
    "momentum_spectral_kernel": TILES,
    "momentum_spectral_backward_kernel": BACKWARD_TILES,
    "rnn_kernel": {None: 128},
    "rnn_backward_kernel": {None: 192},
    "sum_partials_kernel": {None: 40},
    "sum_rnn_partials_kernel": {None: 40},
}
# where the compiler takes more than for sm_90
MORE = {
    ("momentum_dense_backward_kernel with a map", 32): {"80": 255},
    ("rnn_backward_kernel", None): {"120": 200},
}
# bytes of local memory: where a tile can't be halved, of the RNN's widest tile, and of short rows that stop
LOCAL = {
    ("momentum_dense_second_order_kernel", 128): {"100": 32, "120": 384},
    ("rnn_kernel", None): {"100": 32, "120": 60},
    ("momentum_diagonal_stopping_kernel", 8): {"80": 28},
}


@needs_nvcc
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=[] if a == "90" else pytest.mark.slow, id=f"sm_{a}") for a in ARCHITECTURES],
)
@pytest.mark.parametrize(
    "stem",
    [pytest.param(s, marks=[] if s in ("momentum_dense", "momentum_diagonal") else pytest.mark.slow) for s in STEMS],
)
def test_resources(stem, architecture):
    """float32 kernels of tiles keep to their budget of registers, and but for ``LOCAL`` use no local memory."""
    seen = set()
    _, report = machine_code.compile_source(stem, architecture)
    for symbol, (registers, local) in machine_code.resources(report).items():
        name, D = _describe(symbol)
        if "streamed" in name:
            continue
        assert local <= LOCAL.get((name, D), {}).get(architecture, 0), f"{name} D={D}: {local} bytes spilled"
        most = MORE.get((name, D), {}).get(architecture, REGISTERS[name][D])
        assert registers <= most, f"{name} D={D}: {registers} registers"
        seen.add((name, D))
    sums = "sum_rnn_partials_kernel" if stem == "rnn" else "sum_partials_kernel"
    second = "second_order" in stem
    names = [n for n in REGISTERS if n.startswith((f"{stem}_", sums)) and (second or "second_order" not in n)]
    assert seen == {(name, D) for name in names for D in REGISTERS[name]}


# what they compute


class Momentum(Emulation):
    """The contract of ``manual.forward`` and ``manual.backward``, fulfilled by the executed kernels."""

    family, reference = "momentum", manual
    sources = (*sorted((CSRC / "cuda").glob("momentum_*.cu")), EMULATION / "momentum_driver.cpp")

    def forward(self, *arguments):
        (*tensors, _), prox, (k, trajectory) = arguments[:9], arguments[9:13], arguments[-2:]
        b = tensors[3]
        y = poisoned((k + 1, *b.shape) if trajectory else b.shape, b.dtype)
        return self._run(0, *tensors, prox, k, trajectory, [y])[0]

    tolerance = -1.0

    def stopping(self, *arguments):
        (*tensors, _), prox, (k, self.tolerance) = arguments[:9], arguments[9:13], arguments[-2:]
        b, phi = tensors[3], tensors[5]
        taken = torch.full(b.shape[:1], -1)
        outputs = [poisoned(b.shape, b.dtype), taken, poisoned(b.shape[:1], phi.dtype)]
        return self._run(0, *tensors, prox, k, False, outputs)

    iterates = None  # y_0 … y_k for backward

    def backward(self, grad_y, *arguments):
        tensors, (k, trajectory, needs) = arguments[:13], arguments[-3:]
        wanted = [x is not None and bool(needs >> i & 1) for i, x in enumerate(tensors)]
        matrix, diagonal, _, b, y0, phi, beta, gamma, _, lower, upper, weight, threshold = tensors
        # the kernels have the gradients of a schedule all together, and that of what was observed as that of b
        schedule = any(wanted[5:8]) or wanted[12]
        asked = [*wanted[:2], wanted[2] or wanted[3], wanted[4], *[schedule] * 4, *wanted[9:12]]
        like = (matrix, diagonal, b, y0, phi, beta, gamma, threshold, lower, upper, weight)
        outputs = [
            poisoned(x.shape, x.dtype) if x is not None and need else None for x, need in zip(like, asked, strict=True)
        ]
        prox = (lower, upper, weight, threshold)
        d_matrix, d_diagonal, db, *rest = self._run(1, *tensors[:8], prox, k, trajectory, [grad_y, *outputs])
        dy0, *d_schedule, d_threshold, d_lower, d_upper, d_weight = rest
        # none of μ, which the kernels know as β and γ
        grads = (d_matrix, d_diagonal, -db if wanted[2] else None, db, dy0, *d_schedule, None)
        grads += (d_lower, d_upper, d_weight, d_threshold)
        empty = [grad_y.new_empty(0)] * 5 + [phi.new_empty(0)] * 8
        return tuple(g if need else e for g, e, need in zip(grads, empty, wanted, strict=True))

    def second_order(self, grad_y, *arguments):
        """The contract of ``native.second_order``, without μ."""
        (matrix, diagonal, *tensors, _), directions, (k, trajectory, needs) = (
            arguments[:8], arguments[8:15], arguments[-3:],
        )  # fmt: skip
        inputs = (grad_y, matrix, diagonal, *tensors)
        wanted = [x is not None and bool(needs >> i & 1) for i, x in enumerate(inputs)]
        # the kernels have the gradients of a schedule all together
        wanted[5:] = [any(wanted[5:]) and x is not None for x in inputs[5:]]
        outputs = [poisoned(x.shape, x.dtype) if w else None for x, w in zip(inputs, wanted, strict=True)]
        rest = [grad_y, *outputs[1:], *[None] * 4, outputs[0]]
        *grads, _, _, _, _, y = self._run(2, matrix, diagonal, None, *tensors, NO_PROX, k, trajectory, rest, directions)
        return y, *grads, None

    def _run(
        self, backward, matrix, diagonal, observed, b, y0, phi, beta, gamma, prox, k, trajectory, rest, directions=()
    ):
        *bounds, threshold = prox
        # the kernels know tikhonov as a diagonal with something observed
        structure = 0 if diagonal is None else 1 if matrix is None else 2
        numbers = [
            structure,
            backward,
            list(DTYPES.values()).index(b.dtype),
            self.shift * b.element_size(),
            *b.shape,
            k,
            int(trajectory),
            *(stride(x, 0) for x in (matrix, diagonal, b, y0, observed)),
            *(stride(c, dim) for c in (phi, beta, gamma, threshold) for dim in (0, 1)),
            *(stride(x, dim) for x in bounds for dim in (0, 1)),
            int(np.float64(self.tolerance).view(np.int64)),
        ]
        arrays = [matrix, diagonal, b, y0, observed, phi, beta, gamma, threshold, *bounds, self.iterates]
        arrays += [*directions, *[None] * (7 - len(directions)), *rest]
        arrays += [None] * (33 - len(arrays))
        return execute(self.executable, self.environment, numbers, arrays, rest[int(backward > 0) :])


def _problem(structure, B, d, k, **options):
    """grad_y and the canonical arguments but μ, in float64, rounded to bfloat16."""
    problem = MomentumProblem(structure, (B,), d, k, **options)
    grad = problem.normal(*((k + 1, B, d) if problem.trajectory else (B, d)))
    return _canonical(structure, problem, grad.bfloat16().double())


def _canonical(structure, problem, grad):
    operands = [x for name, x in problem.leaves.items() if name.startswith("Q")]
    names = ("b", "y0", "phi", "beta", "gamma", "threshold", "lower", "upper", "weight")
    b, y0, *rest = (problem.leaves.get(name) for name in names)
    # [1 or B, 1 or k]
    *schedule, threshold = (c if c is None or c.dim() == 2 else c.reshape(1, -1) for c in rest[:4])
    tensors = (grad, *canonical_structure(structure, operands), b, y0, *schedule, *rest[4:], threshold)
    return [x if x is None else x.contiguous() for x in tensors]


EVERY = (1 << 13) - 1


def _run(implementation, tensors, k, dtype, needs=EVERY):
    """y, and the gradients by name; those of the schedule as one vector, since a single number may cancel by chance."""
    compute = torch.promote_types(dtype, torch.float32)
    grad, *tensors = (x if x is None else x.to(compute if i > 5 else dtype) for i, x in enumerate(tensors))
    bounds = (x if x is None else x.expand(tensors[3].shape) for x in tensors[8:11])
    arguments = (*tensors[:8], None, *bounds, tensors[11], k, grad.dim() == 3)
    grads = implementation.backward(grad, *arguments, needs)
    names = ("d_matrix", "d_diagonal", "d_observed", "db", "dy0")
    results = {"y": implementation.forward(*arguments)} | dict(zip(names, grads[:5], strict=True))
    results |= zip(("d_lower", "d_upper", "d_weight"), grads[9:12], strict=True)
    # without y0 there is no gradient of it
    return results | {"d_schedule": torch.cat([x.flatten() for x in (*grads[5:9], grads[12])])}


def _check(emulation, tensors, k, dtype, needs=EVERY):
    return emulation.check(lambda implementation, dtype: _run(implementation, tensors, k, dtype, needs), dtype)


def _in_every_order(tensors, k, dtype, **options):
    Momentum.check_every_order(lambda implementation, dtype: _run(implementation, tensors, k, dtype), dtype, **options)


# enough samples that every warp takes a second item, with a remainder; the emulated device runs two blocks
BATCHES = {3: 260, 4: 300, 5: 131, 8: 330, 11: 37, 16: 85, 20: 9, 32: 11, 33: 3, 64: 5, 100: 3, 128: 3, 140: 3}


@needs_emulation
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("d", BATCHES)
def test_tilings(structure, d):
    _in_every_order(_problem(structure, BATCHES[d], d, 3, seed=d), 3, torch.float32)


@needs_emulation
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trajectory", [False, True], ids=["last", "trajectory"])
def test_dtypes(structure, dtype, trajectory):
    for B, d, k in ((3, 5, 7), (2, 16, 2), (5, 24, 4), (2, 40, 2), (1, 72, 2), (1, 132, 2)):
        tensors = _problem(structure, B, d, k, form="step", trajectory=trajectory, seed=3)
        _check(Momentum(order="7", copies="late"), tensors, k, DTYPES[dtype])


@needs_emulation
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", ["gd", "momentum"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_schedule_forms(structure, method, shared):
    for form, (B, d) in itertools.product(("scalar", "step", "sample", "both"), ((37, 6), (3, 36), (3, 130))):
        tensors = _problem(structure, B, d, 5, form=form, method=method, shared=shared, warm=form != "step", seed=1)
        _check(Momentum(order="down", copies="late"), tensors, 5, torch.float64)


@needs_emulation
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("trajectory", [False, True], ids=["last", "trajectory"])
def test_edges(structure, trajectory):
    for k, B, (d, warm) in itertools.product((0, 1, 9), (0, 1), ((1, True), (6, False), (70, True), (129, False))):
        for form, shared in (("step", True), ("sample", False)):
            tensors = _problem(structure, B, d, k, form=form, shared=shared, warm=warm, trajectory=trajectory, seed=5)
            _check(Momentum(), tensors, k, torch.float64)


@needs_emulation
@pytest.mark.parametrize("structure", ["diagonal", "tikhonov"])
@pytest.mark.parametrize("method", ["gd", "momentum"])
def test_constant_coefficients(structure, method):
    """Backward leaves what they weigh to the end, over several segments of steps and wherever their iterates are."""
    for B, d, k, form, limit in ((5, 6, 37, "scalar", 0), (3, 132, 20, "sample", 0), (2, 132, 20, "scalar", 12000)):
        tensors = _problem(structure, B, d, k, method=method, form=form, warm=B != 3, shared=B == 5, seed=8)
        _in_every_order(tensors, k, torch.float32, **({"CUDA_ON_CPU_SHARED_MEMORY": str(limit)} if limit else {}))


@needs_emulation
@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_does_not_fit_in_shared_memory(structure):
    """Iterates, vectors and matrices in the workspace instead; diagonal ones keep at least one iterate on chip."""
    least = 12000 if structure in ("diagonal", "tikhonov") else 1000
    for B, d, k, limit in ((7, 6, 40, 40000), (3, 40, 40, 24000), (2, 132, 5, 30000), (2, 132, 5, least)):
        tensors = _problem(structure, B, d, k, form="step", seed=4)
        _in_every_order(tensors, k, torch.float32, CUDA_ON_CPU_SHARED_MEMORY=str(limit))


@needs_emulation
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_strides_and_alignment(structure, dtype):
    for d, shift in ((8, 1), (7, 0), (32, 3), (40, 1), (136, 1)):
        grad, *structured, b, y0, phi, beta, gamma = _problem(structure, 5, d, 3, seed=6)[:-4]
        wide = [x if x is None else spread(x.to(DTYPES[dtype])) for x in (*structured, b, y0)]
        _check(Momentum(shift=shift), [grad, *wide, phi, beta, gamma, *NO_PROX], 3, DTYPES[dtype])
        expanded = [grad, *structured, b[:1].expand(5, d), y0[:1].expand(5, d), phi, beta, gamma, *NO_PROX]
        _check(Momentum(shift=shift), expanded, 3, DTYPES[dtype])


@needs_emulation
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_that_are_not_needed(structure):
    needs_of = (0, EVERY, *(255 - (1 << i) for i in range(5)), *(1 << i for i in range(5)), 255 - 224, 224)
    for needs, d in itertools.product(needs_of, (6, 40, 130)):
        _check(Momentum(), _problem(structure, 3, d, 4, seed=2), 4, torch.float64, needs)


@needs_emulation
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_results_are_rounded_once(structure, dtype):
    for d in (6, 20, 40, 130):
        for shared in (False, True):
            problem = momentum_at_ties(structure, d, DTYPES[dtype], shared=shared, method="gd")
            tensors = _canonical(structure, problem, torch.ones(d, d, dtype=torch.float64))
            actual = _run(Momentum(), tensors, 1, DTYPES[dtype])
            assert_nearest_even(actual, _run(manual, tensors, 1, torch.float64), DTYPES[dtype])


@needs_emulation
def test_nan_stays_in_its_row():
    for structure, (B, d) in itertools.product(STRUCTURES, ((37, 6), (9, 20), (3, 40), (3, 130))):
        tensors = _problem(structure, B, d, 3, seed=8)
        clean = _run(Momentum(), tensors, 3, torch.float32)
        tensors[4][1, d // 2] = torch.nan
        spoiled = _run(Momentum(), tensors, 3, torch.float32)
        others = [i for i in range(B) if i != 1]
        assert not spoiled["y"][1].isfinite().all()
        for name in ("y", "db", "dy0"):
            assert torch.equal(clean[name][others], spoiled[name][others]), name


@needs_emulation
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_a_start_at_zero_does_not_ask_for_its_gradient(structure, shared):
    """Which overflows here: its product with y_0 = 0 would be NaN, in every other gradient."""
    for d in (6, 20, 40, 130):
        tensors = _problem(structure, 3, d, 1, shared=shared, warm=False, seed=7)
        of_Q, size = (1, 1e38) if structure == "dense" else (2, 1e19 if structure == "tikhonov" else 1e38)
        tensors[of_Q] = tensors[of_Q] * size
        tensors[0] = tensors[0] * 100
        _check(Momentum(), tensors, 1, torch.float32)


@needs_emulation
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("mode", ["address", pytest.param("thread", marks=pytest.mark.slow)])
def test_sanitizers(structure, mode):
    for (B, d), shared in itertools.product(((5, 5), (18, 11), (5, 20), (3, 33), (1, 66), (3, 130)), (False, True)):
        tensors = _problem(structure, B, d, 5, form="step", shared=shared, trajectory=shared, seed=9)
        _check(Momentum(mode, order="7", copies="late"), tensors, 5, torch.float32)
        if structure != "spectral":
            tensors = _problem(structure, B, d, 3, shared=shared, prox=("box", "soft_threshold")[shared], seed=9)
            _check(Momentum(mode, order="7", copies="late"), tensors, 3, torch.float32)
    _check(Momentum(mode, CUDA_ON_CPU_SHARED_MEMORY="12000"), _problem(structure, 3, 40, 9), 9, torch.float32)
    _check(Momentum(mode, shift=1), _problem(structure, 3, 34, 3), 3, torch.float32)


# own Q beyond the tiles, in one block or in a cluster of them

# d and blocks a problem, by the shared memory of the emulated device
RESIDENT = {
    "1": ((130, {}), (200, {"CUDA_ON_CPU_SHARED_MEMORY": "150000"}), (256, {}), (141, {})),
    "2": ((256, {"CUDA_ON_CPU_SHARED_MEMORY": "70000"}), (300, {}), (257, {})),
    "4": ((300, {"CUDA_ON_CPU_SHARED_MEMORY": "100000"}), (512, {})),
    "8": ((520, {}), (331, {"CUDA_ON_CPU_SHARED_MEMORY": "60000"})),
    "16": ((1024, {}), (523, {"CUDA_ON_CPU_SHARED_MEMORY": "130000"})),
}
cluster_sizes = pytest.mark.parametrize("blocks", RESIDENT)


def _resident(blocks, seeds, **problem):
    """(the problem, k, the environment) for each d; problems take what there is in turns."""
    forms = itertools.cycle(("scalar", "step", "sample", "both"))
    for (d, memory), seed, form in zip(RESIDENT[blocks], seeds, forms, strict=False):
        B, k = (1, 2) if d > 512 else (3, 4)  # of two or three samples a block or cluster takes a second one
        options = {"method": ("gd", "momentum")[seed % 2], "warm": seed % 3 > 0, "trajectory": seed % 4 == 1}
        tensors = _problem("dense", B, d, k, **{"form": form, "seed": seed} | options | problem)
        yield tensors, k, {"UNROLLED_KERNELS_CLUSTERS": "1"} | memory


@needs_emulation
@cluster_sizes
def test_resident_matrices(blocks):
    for tensors, k, memory in (*_resident(blocks, range(4)), *_resident(blocks, range(5, 9))):
        _in_every_order(tensors, k, torch.float32, **memory)


@needs_emulation
@cluster_sizes
def test_resident_matrices_of_other_kinds(blocks):
    cases = zip(_resident(blocks, range(1, 5)), itertools.cycle(("bf16", "f16")), strict=False)
    for (tensors, k, memory), dtype in cases:
        _check(Momentum(order="7", copies="late", shift=int(k > 2), **memory), tensors, k, DTYPES[dtype])
    for prox in ("box", "l1", "soft_threshold"):
        for tensors, k, memory in _resident(blocks, (3, 4), prox=prox):
            _check(Momentum(order="down", copies="late", **memory), tensors, k, torch.float32)
    for tensors, k, memory in _resident(blocks, (1, 2)):
        for needs in (0, 1, 1 << 3, 255 - 224, 224):
            _check(Momentum(**memory), tensors, k, torch.float32, needs)


@needs_emulation
@cluster_sizes
def test_resident_samples_stop_by_themselves(blocks, monkeypatch):
    for tensors, k, memory in _resident(blocks, (2, 7)):
        sizes = 0.5 ** (6 * torch.arange(len(tensors[4]))).unsqueeze(-1)
        tensors[3:6] = [x if x is None else x * sizes for x in tensors[3:6]]
        with monkeypatch.context() as patch:
            for name, value in memory.items():
                patch.setenv(name, value)
            taken = _stops_as_said(tensors, k, 0.05, torch.float32)
        assert len(taken) == 1 or taken.min() < taken.max()


@needs_emulation
def test_matrices_are_streamed_where_clusters_cannot_be():
    for d, memory in ((300, {"CUDA_ON_CPU_CLUSTERS": "1"}), (600, {"CUDA_ON_CPU_CLUSTERS": "2"}), (1030, {})):
        tensors = _problem("dense", 1, d, 2, seed=d)
        streamed = _run(Momentum(UNROLLED_KERNELS_CLUSTERS="0"), tensors, 2, torch.float32)
        without = _run(Momentum(UNROLLED_KERNELS_CLUSTERS="1", **memory), tensors, 2, torch.float32)
        for name in streamed:
            assert torch.equal(streamed[name], without[name]), name
    tensors = _problem("dense", 1, 600, 3, seed=600)
    streamed, in_a_cluster = (_run(Momentum(UNROLLED_KERNELS_CLUSTERS=on), tensors, 3, torch.float32) for on in "01")
    # which adds up the rows of Q'a in another order
    assert not torch.equal(in_a_cluster["db"], streamed["db"])


@needs_emulation
@pytest.mark.parametrize("mode", ["address", pytest.param("thread", marks=pytest.mark.slow)])
def test_sanitizers_of_resident_matrices(mode):
    for blocks in ("1", "4", "16"):
        for tensors, k, memory in _resident(blocks, (1, 2), form="both"):
            _check(Momentum(mode, order="7", copies="late", **memory), tensors, k, torch.float32)


# one Q for the batch, beyond the tiles


@needs_emulation
@pytest.mark.parametrize("method", ["gd", "momentum"])
@pytest.mark.parametrize("form", ["scalar", "step", "sample", "both"])
def test_batches_taken_in_pieces(form, method):
    """Where the iterates of all samples would take too much memory; and as all at once, but for the order of sums."""
    for i, prox in enumerate((None, "box", None, "soft_threshold")):
        warm, trajectory = i in (1, 2), i >= 2
        options = {"form": form, "method": method, "shared": True, "warm": warm, "trajectory": trajectory, "prox": prox}
        tensors = _problem("dense", 7, 130, 4, **options, seed=i)
        # of three samples, with the states between the products; and of one, although it does not fit
        for kept in (3 * 4 * 130 * (2 * 4 + 7 + (4 if prox else 0)), 1):
            _check(Momentum(CUDA_ON_CPU_KEPT_BYTES=str(kept)), tensors, 4, torch.float32)
    _in_every_order(tensors, 4, torch.float32, CUDA_ON_CPU_KEPT_BYTES="20000")


@needs_emulation
@pytest.mark.parametrize("method", ["gd", "momentum"])
@pytest.mark.parametrize("needs", [EVERY, EVERY - 1])
def test_kept_iterates_replace_the_replay(method, needs):
    for kept, warm in itertools.product((1 << 28, 20000), (False, True)):
        tensors = _problem("dense", 5, 130, 4, form="step", method=method, shared=True, warm=warm, seed=3)
        replayed, reads = (Momentum(CUDA_ON_CPU_KEPT_BYTES=str(kept)) for _ in range(2))
        _, *rest = (x if x is None else x.float() for x in tensors)
        reads.iterates = replayed.forward(*rest[:8], None, *NO_PROX, 4, True)
        results = [_run(emulation, tensors, 4, torch.float32, needs) for emulation in (replayed, reads)]
        # other pieces add up in another order
        same = torch.equal if kept > 20000 else torch.allclose
        for name in results[0]:
            assert same(results[0][name], results[1][name]), name
        # they are read
        reads.iterates = reads.iterates + 1
        assert not torch.equal(_run(reads, tensors, 4, torch.float32)["d_schedule"], results[0]["d_schedule"])


@needs_emulation
def test_products_by_torch():
    """What makes the products on a GPU, on tensors of the CPU: in the compute type, also under autocast."""
    installed = Path(torch.__file__).parent
    source = EMULATION / "torch_products.cpp"
    command = lambda output: [
        "g++", "-shared", "-fPIC", "-O1", "-std=c++17", "-fvisibility=hidden", f"-I{CSRC}",
        f"-isystem{installed / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000", str(source),
        "-o", str(output), f"-L{installed / 'lib'}", "-ltorch_cpu",
    ]  # fmt: skip
    sources = [source, CSRC / "cuda/torch_products.h", CSRC / "cuda/momentum_kernels.h", CSRC / "common/tensors.h"]
    torch.ops.load_library(str(cached("torch_products", command, sources)[0]))
    for dtype in DTYPES.values():
        compute = torch.promote_types(dtype, torch.float32)
        Q, (x, a) = torch.randn(150, 150).to(dtype), torch.randn(2, 40, 150, dtype=compute)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            forward, transposed = (torch.ops.test_products.multiply(Q, x, t) for t in (False, True))
            outer = torch.ops.test_products.outer(a, x)
        for actual, exact in ((forward, x @ Q.to(compute).T), (transposed, x @ Q.to(compute)), (outer, a.T @ x)):
            torch.testing.assert_close(actual, exact)


# steps that end with a proximal map

proximal_structures = pytest.mark.parametrize("structure", ["dense", "diagonal", "tikhonov"])
maps = pytest.mark.parametrize("prox", ["box", "lower", "l1", "soft_threshold"])


def _with_one_number(tensors):
    """The same bounds or weight for all entries."""
    return [*tensors[:-4], *(x if x is None else x.flatten()[0] for x in tensors[-4:-1]), tensors[-1]]


@needs_emulation
@proximal_structures
@maps
def test_proximal_maps(structure, prox):
    """Every tiling, form of the schedule and of the bounds, with what else there is in turns."""
    forms = itertools.cycle(("scalar", "step", "sample", "both"))
    for i, (d, form) in enumerate(zip((1, 4, 5, 8, 16, 32, 33, 64, 128, 140), forms, strict=False)):
        options = {"method": ("gd", "momentum")[i % 2], "shared": i % 3 == 0, "warm": i % 4 < 2}
        options |= {"form": form, "trajectory": i % 3 == 1, "prox": prox, "seed": d}
        tensors = _problem(structure, BATCHES.get(d, 7), d, 5, **options)
        if i % 4 > 1:
            tensors = _with_one_number(tensors)
        elif prox == "box" and i % 4 == 1:
            tensors[-4:-2] = tensors[-4:-2][::-1]  # crossed
        _check(Momentum(order="7", copies="late"), tensors, 5, torch.float32)
    _in_every_order(_problem(structure, 11, 20, 3, prox=prox), 3, torch.float32)


@needs_emulation
@proximal_structures
@maps
def test_proximal_edges(structure, prox):
    for k, B, d, warm in ((0, 1, 6, True), (1, 0, 6, False), (1, 3, 6, False), (1, 3, 130, True), (2, 1, 130, False)):
        tensors = _problem(structure, B, d, k, form="step", prox=prox, warm=warm, trajectory=warm, seed=5)
        _check(Momentum(), tensors, k, torch.float64)
    # bounds and the weight, without and alone, the threshold, and nothing
    for d, needs in ((6, EVERY - (7 << 9)), (6, 7 << 9), (130, 1 << 9), (130, EVERY - (1 << 10)), (6, 1 << 12), (6, 0)):
        _check(Momentum(), _problem(structure, 3, d, 2, prox=prox), 2, torch.float64, needs)


@needs_emulation
@proximal_structures
@pytest.mark.parametrize("dtype", DTYPES)
def test_proximal_dtypes_and_memory(structure, dtype):
    """Also with iterates in the workspace, and more steps than a segment of them."""
    cases = (("box", 9, 6, 20, 40000), ("l1", 3, 40, 5, 24000), ("soft_threshold", 2, 132, 3, 30000))
    for prox, B, d, k, limit in cases:
        for memory in ({}, {"CUDA_ON_CPU_SHARED_MEMORY": str(limit)}):
            tensors = _problem(structure, B, d, k, form="step", prox=prox, trajectory=not memory, seed=6)
            _check(Momentum(**memory), tensors, k, DTYPES[dtype])


# samples that stop by themselves


def _stops_as_said(tensors, k, tolerance, dtype, orders=ORDERS):
    """The steps taken; they, y and the size of the last are to the bit those of a run of all steps."""
    compute = torch.promote_types(dtype, torch.float32)
    _, *tensors = (x if x is None else x.to(compute if i > 5 else dtype) for i, x in enumerate(tensors))
    bounds = (x if x is None else x.expand(tensors[3].shape) for x in tensors[8:11])
    arguments = (*tensors[:8], None, *bounds, tensors[11], k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping_op, "exact", lambda backend, *args: backend.forward(*args))
        expected = stopping_op.measure(Momentum(), *arguments, tolerance=tolerance)
    for order, copies in orders:
        actual = Momentum(order=order, copies=copies).stopping(*arguments, tolerance)
        assert all(map(torch.equal, actual, expected)), (order, actual[1], expected[1])
    return expected[1]


@needs_emulation
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_samples_stop_by_themselves(structure, shared):
    forms = itertools.cycle(("scalar", "step", "sample", "both"))
    for i, (d, form) in enumerate(zip((1, 4, 5, 8, 16, 20, 33, 64, 128, 140, 300), forms, strict=False)):
        B = BATCHES.get(d, 7)
        prox = (None, "box", None, "l1", "soft_threshold")[i % 5] if structure != "spectral" else None
        options = {"method": ("gd", "momentum")[i % 2], "shared": shared, "warm": i % 4 < 2, "form": form}
        tensors = _problem(structure, B, d, 12, prox=prox, seed=d, **options)
        sizes = 0.5 ** (7 * torch.arange(B) % 13).unsqueeze(-1)
        tensors[3:6] = [x if x is None else x * sizes for x in tensors[3:6]]
        taken = _stops_as_said(tensors, 12, 2e-2, torch.float32, ORDERS[i % 3 :][:1])
        assert taken.min() < taken.max(), d


@needs_emulation
@pytest.mark.parametrize("structure", STRUCTURES)
def test_edges_of_stopping(structure):
    for dtype, (B, d) in itertools.product(("f64", "bf16"), ((5, 3), (3, 40), (2, 130))):
        tensors = _problem(structure, B, d, 6, form="step", warm=False, seed=2)
        for tolerance in (0.0, 0.1):
            _stops_as_said(tensors, 6, tolerance, DTYPES[dtype])
        tensors[3:5] = [x if x is None else 0 * x for x in tensors[3:5]]
        assert _stops_as_said(tensors, 6, 0.0, DTYPES[dtype]).tolist() == [1] * B
    # nothing hangs on a NaN, and what does not fit on chip is elsewhere
    for B, d in ((5, 3), (3, 20), (3, 130), (2, 300)):
        tensors = _problem(structure, B, d, 6, seed=3)
        tensors[4][1, d // 2] = torch.nan
        y, taken, _ = _stopping(Momentum(CUDA_ON_CPU_SHARED_MEMORY="12000"), tensors, 6, 10.0)
        assert taken[1] == 6
        assert (taken[torch.arange(B) != 1] == 1).all()
        assert y[torch.arange(B) != 1].isfinite().all()


def _stopping(emulation, tensors, k, tolerance):
    _, *tensors = (x if x is None else x.float() for x in tensors)
    return emulation.stopping(*tensors[:8], None, *tensors[8:], k, tolerance)


@needs_emulation
@pytest.mark.parametrize("mode", ["address", pytest.param("thread", marks=pytest.mark.slow)])
def test_sanitizers_of_stopping(mode):
    for structure, (B, d) in itertools.product(STRUCTURES, ((5, 5), (18, 11), (3, 33), (1, 66), (3, 130), (2, 300))):
        tensors = _problem(structure, B, d, 6, form="step", shared=B == 3, seed=9)
        _stopping(Momentum(mode, order="7", copies="late"), tensors, 6, 0.05)


# second order


def _second_order(implementation, tensors, cotangents, k, dtype, needs):
    """The gradients of a backward pass's inputs by name, those of its coefficients as one vector."""
    tensors, cotangents = ([x if x is None else x.to(dtype) for x in group] for group in (tensors, cotangents))
    (grad, matrix, diagonal, _, b, y0, phi, beta, gamma), nothing = tensors[:9], [None] * 4
    trajectory = grad.dim() == 3
    needs |= 7 << 5 if needs & 7 << 5 else 0
    if implementation is manual:
        X, x_q, x_b, x_y0, *of_schedule = cotangents
        given = [X, x_q, None, x_b, x_y0, *of_schedule, *[None] * 5]
        inputs = (grad, matrix, diagonal, None, b, y0, phi, beta, gamma, None, *nothing)
        grads = list(function._second_order_in_torch(given, *inputs, k, trajectory, EVERY))
        grads = [*grads[:3], *grads[4:9]]
        grads = [x if needs >> i & 1 else None for i, x in enumerate(grads)]
    else:
        inputs = (grad, matrix, diagonal, b, y0, phi, beta, gamma, None)
        grads = implementation.second_order(*inputs, *cotangents, k, trajectory, needs)
    names = ("grad_y", "matrix", "diagonal", "b", "y0")
    results = {name: g for name, g in zip(names, grads[:5], strict=True) if g is not None}
    schedule = [g.flatten() for g in grads[5:8] if g is not None]
    return results | ({"schedule": torch.cat(schedule)} if schedule else {})


def _cotangents(tensors, given):
    """One for each gradient that bit i of ``given`` asks for, those of coefficients all together or not."""
    _, matrix, diagonal, _, b, y0, *schedule = tensors[:9]
    generator = torch.Generator().manual_seed(given)
    normal = lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16().double()
    wanted = [given & 1, given & 2, given & 4, given & 8, *[given & 16] * 3]
    inputs = zip((matrix, diagonal, b, y0, *schedule), wanted, strict=True)
    return [normal(x) if x is not None and asked else None for x, asked in inputs]


EVERY_INPUT = (1 << 8) - 1


second_order_structures = pytest.mark.parametrize("structure", ["dense", "diagonal"])


def _check_second_order(emulation, tensors, k, dtype, given=31, needs=EVERY_INPUT, every_order=False):
    cotangents = _cotangents(tensors, given)
    run = lambda implementation, dtype: _second_order(implementation, tensors, cotangents, k, dtype, needs)
    return (Momentum.check_every_order if every_order else emulation.check)(run, dtype)


@needs_emulation
@second_order_structures
@pytest.mark.parametrize("method", ["gd", "momentum"])
def test_second_order(structure, method):
    """Every tiling and form of the schedule, with what else there is in turns, in every order of the threads."""
    forms = itertools.cycle(("scalar", "step", "sample", "both"))
    sizes = (1, 4, 5, 8, 11, 16, 20, 32, 33, 64, 100, 128, *([1030] if structure == "diagonal" else []))
    for i, (d, form) in enumerate(zip(sizes, forms, strict=False)):
        options = {"method": method, "shared": i % 3 == 0, "warm": i % 4 < 2, "trajectory": i % 2 == 0, "form": form}
        tensors = _problem(structure, BATCHES.get(d, 70) if d < 1000 else 2, d, 3, seed=d, **options)
        _check_second_order(None, tensors, 3, torch.float32, every_order=True)
        one = Momentum(order="7", copies="late")
        _check_second_order(one, tensors, 3, torch.float64 if d <= 64 else torch.float32, 1 + 16 * (i % 2))


@needs_emulation
@second_order_structures
def test_edges_of_second_order(structure):
    for k, B, d in ((1, 0, 6), (1, 1, 6), (9, 3, 1), (2, 3, 40)):
        for form, warm in (("step", False), ("sample", True)):
            options = {"form": form, "warm": warm, "shared": warm, "trajectory": B == 3}
            _check_second_order(Momentum(), _problem(structure, B, d, k, seed=5, **options), k, torch.float64)
    # gradients that are not needed, and cotangents that are not there
    tensors = _problem(structure, 5, 7, 3, form="step", seed=2)
    for given, needs in itertools.product((0, 1, 2, 4, 8, 16), (0, EVERY_INPUT, *(1 << i for i in range(8)))):
        _check_second_order(Momentum(), tensors, 3, torch.float64, given, needs)
    # what does not fit in shared memory
    for B, d, k, limit in ((7, 6, 40, 40000), (3, 40, 9, 32000), (2, 70, 3, 70000)):
        small = Momentum(CUDA_ON_CPU_SHARED_MEMORY=str(limit))
        _check_second_order(small, _problem(structure, B, d, k, form="step", seed=4), k, torch.float32)
    # neither aligned nor next to each other
    grad, matrix, diagonal, _, b, y0, *schedule = _problem(structure, 5, 8, 3, seed=6)
    wide = [x if x is None else spread(x.float()) for x in (matrix, diagonal, None, b, y0)]
    _check_second_order(Momentum(shift=4), [grad, *wide, *schedule], 3, torch.float32)


@needs_emulation
@second_order_structures
@pytest.mark.parametrize("mode", ["address", pytest.param("thread", marks=pytest.mark.slow)])
def test_sanitizers_of_second_order(structure, mode):
    for (B, d), shared in itertools.product(((5, 5), (9, 7), (18, 11), (5, 20), (3, 33), (1, 66)), (False, True)):
        tensors = _problem(structure, B, d, 3, form="step", shared=shared, trajectory=shared, seed=9)
        _check_second_order(Momentum(mode, order="7", copies="late"), tensors, 3, torch.float32)


@needs_emulation
@proximal_structures
@pytest.mark.parametrize("method", ["gd", "momentum", "nesterov"])
def test_second_order_through_autograd(structure, method, monkeypatch):
    """The kernels are called, and give what the derivation gives."""
    emulation, calls = Momentum(), []
    monkeypatch.setitem(function.LAUNCHERS, "cuda", emulation)
    monkeypatch.setattr(native, "second_order", lambda *args: calls.append(1) or emulation.second_order(*args))
    B, d, k = 5, 6, 3
    rand = lambda *shape: torch.rand(*shape, dtype=torch.float64)
    matrix = rand(B, d, d) / d if structure == "dense" else None
    diagonal = None if structure == "dense" else rand(B, d)
    observed = rand(B, d) if structure == "tikhonov" else None
    moving = [rand(1, k) for _ in range(2)]
    beta, gamma = moving if method == "momentum" else (None, None)
    mu = moving[0] if method == "nesterov" else None
    tensors = (rand(B, d), matrix, diagonal, observed, rand(B, d), rand(B, d), rand(1, k), beta, gamma, mu)
    needs = sum(1 << i for i, x in enumerate(tensors[1:]) if x is not None)
    results = []
    for name in ("manual", "cuda"):
        leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
        grads = function._differentiable_backward(name, *leaves, *NO_PROX, k, False, needs)
        loss = sum(g.square().sum() for g in grads if g.numel() > 0)
        results.append(torch.autograd.grad(loss, [x for x in leaves if x is not None]))
    assert calls
    torch.testing.assert_close(*results)


# what the emulation finds

# the mode that has to find each bug of planted_bugs.cu, in at least one order
BUGS = {
    1: "plain",
    2: "address",
    3: "plain",
    4: "plain",
    5: "plain",
    6: "address",
    7: "plain",
    8: "plain",
    9: "plain",
    10: "plain",
    11: "plain",
    12: "thread",
    13: "plain",
    14: "plain",
}
ALL_BUGS = [
    pytest.param(bug, mode, marks=[] if bug in (4, 6, 11, 12, 13) else [pytest.mark.slow]) for bug, mode in BUGS.items()
]


def _exit_codes(bug, mode):
    executable = emulated(f"bug{bug}", mode, [EMULATION / "planted_bugs.cu"], [f"-DBUG={bug}"])
    return [
        subprocess.run([executable], env=environment(*order), capture_output=True, timeout=60).returncode
        for order in ORDERS
    ]


@needs_emulation
@pytest.mark.parametrize(("bug", "mode"), ALL_BUGS)
def test_planted_bug_is_found(bug, mode):
    assert any(_exit_codes(bug, mode))


@needs_emulation
@pytest.mark.parametrize("mode", MODES)
def test_no_bug_is_not_found(mode):
    assert not any(_exit_codes(0, mode))
