"""Samples that stop where their steps have become small: how many each takes, and the recurrence that takes no more.

A sample stops after the first step with max_i |y_{t+1} - y_t| ≤ tolerance · max(1, max_i |y_{t+1}|). What it does from
there on is the recurrence with φ_t = β_t = γ_t = 0 and a threshold of 0, which leaves y where it is; so gradients of
the steps that it takes are those of the op, and the others' coefficients get zero. Nothing waits for the device.
"""

import torch

from unrolled_kernels import _torch_private
from unrolled_kernels.ops import common
from unrolled_kernels.ops.momentum.function import LAUNCHERS, of_known_iterate
from unrolled_kernels.ops.momentum.function import momentum as exact
from unrolled_kernels.ops.momentum.gradients import implicit, of_known_minimizer
from unrolled_kernels.ops.momentum.reference import nesterov_momentum

# positions among the tensors
_Y0, _PHI, _BETA, _GAMMA, _MU, _THRESHOLD = 4, 5, 6, 7, 8, 12


def run(op, backend, *arguments, tolerance):
    """y of ``op``, one of ``gradients``, the steps that each sample takes, ``[B]`` int64, and the size of the last.

    The kernels leave a tile, on a GPU a problem or the few of a team, with the last of its samples. On a CPU backward
    leaves out what comes after the last sample of the batch, which changes no result. Where there is no such kernel,
    y is one of the iterates that a run keeps for a moment.
    """
    *tensors, num_steps, trajectory = arguments
    if tolerance is not None and tensors[_MU] is not None:
        # kernels round what follows from μ otherwise
        tensors[_BETA] = tensors[_GAMMA] = nesterov_momentum(tensors[_PHI], tensors[_MU])
        tensors[_MU] = None
    may_know = _may_know(backend, num_steps, trajectory)
    # where a sample has nothing that moves no kernel looks at it
    launcher = LAUNCHERS[backend] if may_know and bool(tensors[_Y0 - 1].shape[1] > 0) else None
    found = None
    with torch.no_grad():
        if hasattr(launcher, "stopping"):
            never = -1.0
            found = launcher.stopping(*tensors, num_steps, never if tolerance is None else tolerance)
        y, taken, residual = found or measure(backend, *tensors, num_steps, tolerance=tolerance)
    if may_know and not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)):
        return y, taken, residual
    if tolerance is not None:
        tensors = stopped(tensors, taken, num_steps)
        # a number of steps that a trace or a fake tensor would not have, and for which a GPU would be waited for
        if found and backend == "cpu" and type(taken) is torch.Tensor and not torch.jit.is_tracing() and len(taken) > 0:
            tensors, num_steps = _first_steps(tensors, num_steps, int(taken.max()))
    if op is exact and may_know:
        y = of_known_iterate(y, backend, *tensors, num_steps)
    elif op is implicit and may_know:
        y = of_known_minimizer(y, backend, *tensors, num_steps)
    else:
        y = op(backend, *tensors, num_steps, trajectory)
    return y, taken, residual


def _may_know(backend, num_steps, trajectory):
    """Whether y of an op on ``backend`` can be that of another call."""
    if trajectory or num_steps == 0 or backend == "eager":
        return False
    return not (torch.compiler.is_compiling() or common.runs_in_eager() or _torch_private.transforms_are_active())


def _first_steps(tensors, num_steps, last):
    tensors = list(tensors)
    for i in (_PHI, _BETA, _GAMMA, _THRESHOLD):
        if tensors[i] is not None and tensors[i].shape[1] == num_steps:
            tensors[i] = tensors[i][:, :last]
    return tensors, last


def measure(backend, *arguments, tolerance):
    """y where each sample stops, and what ``run`` says of it; all steps where there is no tolerance."""
    *tensors, num_steps = arguments
    b, compute = tensors[_Y0 - 1], tensors[_PHI].dtype
    # unrounded, as the loop is
    tensors = [x if x is None else x.detach() for x in tensors]
    tensors[: _Y0 + 1] = [x if x is None else x.to(compute) for x in tensors[: _Y0 + 1]]
    ys = exact(backend, *tensors, num_steps, True)
    if num_steps == 0:
        return ys[0].to(b.dtype), b.new_zeros(b.shape[0], dtype=torch.int64), ys.new_zeros(b.shape[0])
    largest = lambda x: x.abs().amax(-1) if x.shape[-1] > 0 else x.sum(-1)  # of nothing: 0
    change = largest(ys[1:] - ys[:-1])
    if tolerance is None:
        return ys[-1].to(b.dtype, copy=True), torch.full_like(change[0], num_steps, dtype=torch.int64), change[-1]
    small = change <= tolerance * largest(ys[1:]).clamp(min=1)
    before = (small.cumsum(0) == 0).sum(0)  # steps before the first small one
    taken = (before + 1).clamp(max=num_steps)
    y = ys.gather(0, taken.reshape(1, -1, 1).expand(1, *b.shape)).squeeze(0)
    return y.to(b.dtype), taken, change.gather(0, taken.unsqueeze(0) - 1).squeeze(0)


def stopped(tensors, taken, num_steps):
    """The tensors of the recurrence that leaves each sample alone after the steps it has ``taken`` ``[B]``."""
    tensors = list(tensors)
    steps = torch.arange(num_steps, device=taken.device)
    moves = steps < taken.unsqueeze(1)  # [B, k]
    for i in (_PHI, _BETA, _GAMMA, _THRESHOLD):
        if tensors[i] is not None:
            tensors[i] = torch.where(moves, tensors[i], 0.0)
    return tensors
