"""Samples that stop where their steps have become small: how many each takes, and the recurrence that takes no more.

A sample stops after the first step with max_i |y_{t+1} - y_t| ≤ tolerance · max(1, max_i |y_{t+1}|). What it does from
there on is the recurrence with φ_t = β_t = γ_t = 0 and a threshold of 0, which leaves y where it is; so gradients of
the steps that it takes are those of the op, and the others' coefficients get zero. Nothing waits for the device.
"""

import torch

from unrolled_kernels.ops.momentum.function import momentum as run
from unrolled_kernels.ops.momentum.reference import nesterov_momentum

# positions among the tensors
_Y0, _PHI, _BETA, _GAMMA, _MU, _THRESHOLD = 4, 5, 6, 7, 8, 12


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
        y = run(backend, *tensors, num_steps, True)
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
    if tensors[_MU] is not None:
        tensors[_BETA] = tensors[_GAMMA] = nesterov_momentum(tensors[_PHI], tensors[_MU])
        tensors[_MU] = None
    steps = torch.arange(num_steps, device=taken.device)
    moves = steps < taken.unsqueeze(1)  # [B, k]
    for i in (_PHI, _BETA, _GAMMA, _THRESHOLD):
        if tensors[i] is not None:
            tensors[i] = torch.where(moves, tensors[i], 0.0)
    return tensors
