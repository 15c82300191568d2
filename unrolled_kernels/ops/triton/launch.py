"""What the launchers share: configurations, arguments as the kernels take them, partial sums."""

import contextlib
import functools
from typing import NamedTuple

import torch

# By D for a 4-byte compute dtype: samples a program, lanes that share a row, warps. Chosen from the generated code so
# that the matrices take at most 128 registers a lane, none of the state spills, and lanes exchange least.
DENSE_FORWARD = {
    1: (32, 1, 1), 2: (32, 1, 1), 4: (32, 1, 1), 8: (32, 1, 1),
    16: (4, 1, 1), 32: (2, 1, 1), 64: (1, 2, 1), 128: (1, 4, 8),
}  # fmt: skip
# Qᵀa is a sum over the rows, and so over fewer lanes the more of them share a row
DENSE_BACKWARD = {
    1: (32, 1, 1), 2: (32, 1, 1), 4: (32, 1, 1), 8: (16, 1, 1),
    16: (4, 2, 1), 32: (2, 4, 1), 64: (1, 8, 2), 128: (1, 8, 8),
}  # fmt: skip
# where the batch shares Q, its gradient stays in registers beside it
DENSE_BACKWARD_SHARED = {
    1: (32, 1, 1), 2: (32, 1, 1), 4: (32, 1, 1), 8: (16, 1, 1), 16: (4, 2, 1), 32: (2, 4, 2), 64: (1, 8, 4),
}  # fmt: skip
# the states are columns, of which each lane holds the fewer the more lanes share a row
SPECTRAL_FORWARD = DENSE_FORWARD | {16: (4, 2, 1), 32: (2, 2, 1), 64: (1, 8, 1), 128: (1, 32, 8)}
SPECTRAL_BACKWARD = DENSE_BACKWARD | {64: (1, 16, 2), 128: (1, 32, 8)}


@functools.cache
def capability(device):
    """Compute capability of a GPU, 90 for 9.0; that of none in particular for the CPU, which interprets."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class Tile(NamedTuple):
    """How a program holds matrices in registers (tile.py): ``samples`` of them, W columns to a vector of lanes."""

    d: int
    D: int
    W: int
    samples: int
    num_warps: int

    @classmethod
    def find(cls, table, d, storage, compute):
        """The tile for d from one of the tables above; None beyond it."""
        D = 1 << (d - 1).bit_length()
        if D not in table:
            return None
        samples, lanes, num_warps = table[D]
        if compute == torch.float64:
            # twice the registers: half the samples where that keeps a warp busy, else twice the warps
            if samples > 1:
                samples //= 2
            elif max(table) != D:
                num_warps *= 2
            else:
                return None
        vector = 16 // storage.itemsize if d * storage.itemsize % 16 == 0 else 1
        return cls(d, D, min(D, vector * lanes), samples, num_warps)

    def constants(self):
        return {"d": self.d, "D": self.D, "W": self.W, "BB": self.samples}


class Matrices(NamedTuple):
    """``[B or 1, d, d]``, each matrix contiguous, as one argument of a kernel."""

    pointer: torch.Tensor
    stride: int  # 0: one matrix for all samples

    @classmethod
    def of(cls, matrix):
        d = matrix.shape[-1]
        matrix = matrix if matrix.stride()[1:] == (d, 1) else matrix.contiguous()
        return cls(matrix, 0 if matrix.shape[0] == 1 else matrix.stride(0))


class Vectors(NamedTuple):
    """``[B, d]``, or a cotangent ``[num_steps + 1, B, d]``, as one argument of a kernel; zeros without a pointer."""

    pointer: torch.Tensor | None
    sample: int = 0  # strides
    entry: int = 1
    step: int = 0

    @classmethod
    def rows(cls, x):
        """Of b, y_0 or λ, whose entries become adjacent."""
        if x is None:
            return cls(None)
        x = x if x.stride(1) == 1 else x.contiguous()
        return cls(x, x.stride(0))

    @classmethod
    def strided(cls, x):
        """Of a bound, which may be one number for all."""
        return cls(None) if x is None else cls(x, *x.stride())

    @classmethod
    def cotangent(cls, grad_y, trajectory):
        """In whatever layout it comes: one that is expanded from a number is not copied."""
        step, sample, entry = grad_y.stride() if trajectory else (0, *grad_y.stride())
        return cls(grad_y, sample, entry, step)


class Schedule(NamedTuple):
    """φ, β, γ and a threshold as one argument of a kernel; a stride is None where samples, or steps, share one."""

    phi: torch.Tensor
    beta: torch.Tensor | None
    gamma: torch.Tensor | None
    threshold: torch.Tensor | None
    phi_sample: int | None
    phi_step: int | None
    beta_sample: int | None
    beta_step: int | None
    gamma_sample: int | None
    gamma_step: int | None
    threshold_sample: int | None
    threshold_step: int | None

    @classmethod
    def of(cls, schedule):
        strides = [None if c is None or c.shape[dim] == 1 else c.stride(dim) for c in schedule for dim in range(2)]
        return cls(*schedule, *strides)


class Bounds(NamedTuple):
    """What a proximal map has ``[B, d]`` of as one argument of a kernel, absent ones without a pointer."""

    lower: Vectors
    upper: Vectors
    weight: Vectors

    @classmethod
    def of(cls, bounds):
        return cls(*map(Vectors.strided, bounds))


class Stopping(NamedTuple):
    """Samples that stop by themselves as one argument of a kernel; none do without the tensors."""

    tolerance: torch.Tensor | None = None  # one number in the compute dtype
    taken: torch.Tensor | None = None  # outputs [B]: the steps that a sample takes, and how large the last of them was
    residual: torch.Tensor | None = None

    @classmethod
    def allocate(cls, b, compute, tolerance):
        batch = b.shape[0]
        return cls(
            b.new_full((), tolerance, dtype=compute),
            b.new_empty(batch, dtype=torch.int64),
            b.new_empty(batch, dtype=compute),
        )


NO_STOPPING = Stopping()


class BoundGradients(NamedTuple):
    """Where the kernels add up their gradients, ``[B, d]``; None where not needed."""

    lower: torch.Tensor | None
    upper: torch.Tensor | None
    weight: torch.Tensor | None

    @classmethod
    def allocate(cls, bounds, needs):
        return cls(*(x.new_empty(x.shape) if needed else None for x, needed in zip(bounds, needs, strict=True)))


def launch(kernel, device, programs, *args, num_warps, maxnreg=None, **constants):
    """Start ``programs`` programs of a kernel on the current stream of ``device``, without waiting."""
    guard = contextlib.nullcontext()
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        guard = torch.cuda.device(device)
    with guard:
        kernel[(programs,)](
            *args,
            **constants,
            num_warps=num_warps,
            num_stages=1,
            maxnreg=maxnreg,
            # part of the results: not left to a default that changes between versions of Triton
            enable_fp_fusion=True,
        )


@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


def resident_programs(device, blocks, num_warps):
    """How many programs walk through ``blocks``: as many as can be resident at 16 warps a multiprocessor."""
    # the interpreter runs one program after the other: few, so that each walks through several blocks
    resident = _multiprocessors(device) * max(1, 16 // num_warps) if device.type == "cuda" else 2
    return min(blocks, resident)


def is_proximal(schedule, bounds):
    """Whether a proximal map ends the steps."""
    return any(x is not None for x in (schedule[3], *bounds))


def zero_gradients(operands, b, schedule, needs_operands, needs_schedule):
    """The gradients of an empty batch."""
    d_operands = [x.new_zeros(x.shape if needed else 0) for x, needed in zip(operands, needs_operands, strict=True)]
    d_schedule = [schedule[0].new_zeros(c.shape if needs_schedule and c is not None else 0) for c in schedule]
    return *d_operands, b.new_zeros(b.shape), b.new_zeros(b.shape), d_schedule


class ScheduleGradient(NamedTuple):
    """Where the kernels put φ̄, β̄, γ̄, threshold̄: a row for each sample, ``pieces`` times over, or for each program."""

    parts: tuple
    rows: bool  # some coefficient differs between samples
    steps: bool  # some coefficient differs between steps
    pieces: int

    @classmethod
    def allocate(cls, schedule, batch, num_steps, programs, needed, pieces=1):
        present = [c for c in schedule if c is not None]
        rows = any(c.shape[0] != 1 for c in present)
        steps = any(c.shape[1] != 1 for c in present)
        shape = (pieces * batch if rows else programs, num_steps if steps else 1)
        parts = tuple(c.new_empty(shape) if needed and c is not None else None for c in schedule)
        return cls(parts, rows, steps, pieces)

    def reduce(self, schedule):
        """The gradients in the shapes of the coefficients, summed in an order that does not vary; ``[0]`` if absent."""
        return [
            schedule[0].new_empty(0) if part is None else self._sum(part).sum_to_size(c.shape)
            for part, c in zip(self.parts, schedule, strict=True)
        ]

    def _sum(self, part):
        return part.unflatten(0, (self.pieces, -1)).sum(0) if self.rows and self.pieces > 1 else part
