"""Samples that stop where their steps have become small: how many each takes, and the recurrence that takes no more.

A sample stops after the first step with max_i |y_{t+1} - y_t| ≤ tolerance · max(1, max_i |y_{t+1}|). What it does from
there on is the recurrence with φ_t = β_t = γ_t = 0 and a threshold of 0, which leaves y where it is; so gradients of
the steps that it takes are those of the op, and the others' coefficients get zero. Nothing waits for the device.
"""

import torch

from unrolled_kernels import _torch_private
from unrolled_kernels.ops import common
from unrolled_kernels.ops.momentum import native
from unrolled_kernels.ops.momentum.function import momentum as exact
from unrolled_kernels.ops.momentum.function import of_known_iterate
from unrolled_kernels.ops.momentum.reference import nesterov_momentum

# positions among the tensors
_Y0, _PHI, _BETA, _GAMMA, _MU, _THRESHOLD = 4, 5, 6, 7, 8, 12


def run(op, backend, *arguments, tolerance):
    """y of ``op``, one of ``gradients``, and what ``measure`` says of it.

    A dense Q on a CPU has a kernel that stops with the last sample of a tile, and what comes after the last sample of
    the batch is left out there, which changes no result.
    """
    *tensors, num_steps, trajectory = arguments
    if tolerance is not None and tensors[_MU] is not None:
        # kernels round what follows from μ otherwise
        tensors[_BETA] = tensors[_GAMMA] = nesterov_momentum(tensors[_PHI], tensors[_MU])
        tensors[_MU] = None
    y = None
    leaves_out = backend == "cpu" and not (trajectory or torch.compiler.is_compiling() or common.runs_in_eager())
    leaves_out = leaves_out and num_steps > 0 and not _torch_private.transforms_are_active()
    if leaves_out and _has_kernel(*tensors[:4]):
        with torch.no_grad():
            never = -1.0
            y, taken, residual = native.stopping(*tensors, num_steps, never if tolerance is None else tolerance)
    else:
        taken, residual = measure(backend, *tensors, num_steps, tolerance=tolerance)
    if tolerance is not None:
        tensors = stopped(tensors, taken, num_steps)
        # a number of steps that a trace or a fake tensor would not have
        if leaves_out and type(taken) is torch.Tensor and not torch.jit.is_tracing() and len(taken) > 0:
            tensors, num_steps = _first_steps(tensors, num_steps, int(taken.max()))
    if y is not None and op is exact:
        return of_known_iterate(y, *tensors, num_steps), taken, residual
    return op(backend, *tensors, num_steps, trajectory), taken, residual


def _has_kernel(matrix, diagonal, observed, b):
    """Not one large Q for all samples: it is multiplied by many of them at once."""
    return matrix is None or matrix.shape[0] == b.shape[0] or matrix.shape[-1] <= 16


def _first_steps(tensors, num_steps, last):
    tensors = list(tensors)
    for i in (_PHI, _BETA, _GAMMA, _THRESHOLD):
        if tensors[i] is not None and tensors[i].shape[1] == num_steps:
            tensors[i] = tensors[i][:, :last]
    return tensors, last


def measure(backend, *arguments, tolerance):
    """The steps that each sample takes, ``[B]`` int64, and max_i |y_{t+1} - y_t| of the last of them, ``[B]``.

    Args:
        tolerance: None: all steps.
    """
    *tensors, num_steps = arguments
    b, compute = tensors[_Y0 - 1], tensors[_PHI].dtype
    with torch.no_grad():
        # unrounded, as the loop is
        tensors = [x if x is None else x.detach() for x in tensors]
        tensors[: _Y0 + 1] = [x if x is None else x.to(compute) for x in tensors[: _Y0 + 1]]
        y = exact(backend, *tensors, num_steps, True)
        if num_steps == 0:
            return b.new_zeros(b.shape[0], dtype=torch.int64), y.new_zeros(b.shape[0])
        change = (y[1:] - y[:-1]).abs().amax(-1)
        if tolerance is None:
            return torch.full_like(change[0], num_steps, dtype=torch.int64), change[-1]
        small = change <= tolerance * y[1:].abs().amax(-1).clamp(min=1)
        before = (small.cumsum(0) == 0).sum(0)  # steps before the first small one
        taken = (before + 1).clamp(max=num_steps)
        return taken, change.gather(0, taken.unsqueeze(0) - 1).squeeze(0)


def stopped(tensors, taken, num_steps):
    """The tensors of the recurrence that leaves each sample alone after the steps it has ``taken`` ``[B]``."""
    tensors = list(tensors)
    steps = torch.arange(num_steps, device=taken.device)
    moves = steps < taken.unsqueeze(1)  # [B, k]
    for i in (_PHI, _BETA, _GAMMA, _THRESHOLD):
        if tensors[i] is not None:
            tensors[i] = torch.where(moves, tensors[i], 0.0)
    return tensors
