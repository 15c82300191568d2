"""What the launchers of the Triton kernels share: configurations, arguments as the kernels take them, partial sums."""

import contextlib
import functools
from typing import NamedTuple

import torch

# By D for a 4-byte compute dtype: samples a program, lanes that share a row, warps. Chosen from the generated code so
# that the matrices take at most 128 registers a lane, none of the state spills, and lanes exchange least.
DENSE_FORWARD = {
    1: (32, 1, 1), 2: (32, 1, 1), 4: (32, 1, 1), 8: (32, 1, 1),
    16: (4, 2, 1), 32: (2, 2, 1), 64: (1, 4, 1), 128: (1, 8, 8),
}  # fmt: skip
DENSE_BACKWARD = {
    1: (32, 1, 1), 2: (32, 1, 1), 4: (32, 1, 1), 8: (16, 1, 1),
    16: (4, 2, 1), 32: (2, 4, 1), 64: (1, 8, 2), 128: (1, 8, 8),
}  # fmt: skip
# where the batch shares Q, its gradient stays in registers beside it
DENSE_BACKWARD_SHARED = {
    1: (32, 1, 1), 2: (32, 1, 1), 4: (32, 1, 1), 8: (16, 1, 1), 16: (4, 2, 1), 32: (2, 4, 2), 64: (1, 8, 4),
}  # fmt: skip
# the states are columns, of which each lane holds the fewer the more lanes share a row
SPECTRAL_FORWARD = DENSE_FORWARD | {64: (1, 8, 1), 128: (1, 32, 8)}
SPECTRAL_BACKWARD = DENSE_BACKWARD | {64: (1, 16, 2), 128: (1, 32, 8)}


class Tile(NamedTuple):
    """How a program holds matrices in registers (triton_tile): ``samples`` of them, W columns to a vector of lanes."""

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


def launch(kernel, programs, *args, num_warps, maxnreg=None, **constants):
    """Start ``programs`` programs of a kernel on the current stream of its tensors' device, without waiting."""
    device = args[0].device
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


def as_rows(x):
    """``[B, d]`` with adjacent entries, and the stride between rows (0 where the batch shares one row)."""
    if x is None:
        return None, 0
    x = x if x.stride(1) == 1 else x.contiguous()
    return x, x.stride(0)


def as_matrices(matrix):
    """``[B or 1, d, d]`` with each matrix contiguous, and the stride between matrices."""
    d = matrix.shape[-1]
    matrix = matrix if matrix.stride()[1:] == (d, 1) else matrix.contiguous()
    return matrix, matrix.stride(0)


def cotangent_strides(grad_y, trajectory):
    """Strides of ``grad_y`` over steps, samples and entries; a stride-0 expanded cotangent is not copied."""
    return grad_y.stride() if trajectory else (0, *grad_y.stride())


def schedule_arguments(step_sizes, momentum, extrapolation):
    """Pointers of φ, β, γ, then the strides of each over samples and steps, 0 where it is shared."""
    schedule = (step_sizes, momentum, extrapolation)
    strides = [0 if c is None or c.shape[dim] == 1 else c.stride(dim) for c in schedule for dim in range(2)]
    return (*schedule, *strides)


def zero_gradients(operands, b, schedule, needs_operands, needs_schedule):
    """The gradients of an empty batch."""
    d_operands = [x.new_zeros(x.shape if needed else 0) for x, needed in zip(operands, needs_operands, strict=True)]
    d_schedule = [schedule[0].new_zeros(c.shape if needs_schedule and c is not None else 0) for c in schedule]
    return (*d_operands, b.new_zeros(b.shape), b.new_zeros(b.shape), *d_schedule)


class ScheduleGradient(NamedTuple):
    """Where the kernels put φ̄, β̄, γ̄: a row for each sample, ``pieces`` times over, or for each program."""

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
