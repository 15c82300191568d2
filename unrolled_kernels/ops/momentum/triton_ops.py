"""Launcher of the Triton kernels, as ops that torch.compile and torch.export see. Imports Triton at the first call."""

import functools
import importlib

import torch

from unrolled_kernels.ops import common
from unrolled_kernels.ops.momentum import manual, native, reference
from unrolled_kernels.ops.triton.launch import Stopping

# the schemas of csrc/momentum.cpp; CompositeExplicitAutograd is CUDA, and the CPU for Triton's interpreter
_library = torch.library.Library("unrolled_kernels", "FRAGMENT")
_library.define(
    "momentum_triton(Tensor? matrix, Tensor? diagonal, Tensor? observed, Tensor b, Tensor? y0, Tensor step_sizes, "
    "Tensor? momentum, Tensor? extrapolation, Tensor? mu, Tensor? lower, Tensor? upper, Tensor? weight, "
    "Tensor? threshold, SymInt num_steps, bool trajectory) -> Tensor"
)
_library.define(
    "momentum_triton_stopping(Tensor? matrix, Tensor? diagonal, Tensor? observed, Tensor b, Tensor? y0, "
    "Tensor step_sizes, Tensor? momentum, Tensor? extrapolation, Tensor? mu, Tensor? lower, Tensor? upper, "
    "Tensor? weight, Tensor? threshold, SymInt num_steps, float tolerance) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "momentum_triton_backward(Tensor grad_y, Tensor? matrix, Tensor? diagonal, Tensor? observed, Tensor b, "
    "Tensor? y0, Tensor step_sizes, Tensor? momentum, Tensor? extrapolation, Tensor? mu, Tensor? lower, "
    "Tensor? upper, Tensor? weight, Tensor? threshold, SymInt num_steps, bool trajectory, int needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@functools.cache
def _kernels(structure):
    """The module of ``structure``'s kernels, which imports Triton."""
    return importlib.import_module(f"unrolled_kernels.ops.momentum.triton_{structure}")


def _arguments(rest):
    """y0, (φ, β, γ, threshold) as ``[B or 1, num_steps or 1]``, (lower, upper, weight), num_steps, trajectory."""
    y0, *schedule, lower, upper, weight, threshold, num_steps, trajectory = rest
    schedule = tuple(c if c is None or c.dim() == 2 else c.reshape(1, 1) for c in (*schedule, threshold))
    return y0, schedule, (lower, upper, weight), num_steps, trajectory


def _forward(*arguments):
    num_steps = arguments[-2]
    return (_steps if num_steps > 0 else reference.forward)(*arguments)


@reference.with_nesterov
def _steps(matrix, diagonal, observed, b, *rest, **stopping):
    rest = _arguments(rest)
    if diagonal is None:
        return _kernels("dense").forward(matrix, b, *rest, **stopping)
    if matrix is None:
        return _kernels("diagonal").forward(diagonal, b, *rest, observed=observed, **stopping)
    y0, schedule, _, *constants = rest
    return _kernels("spectral").forward(diagonal, matrix, b, y0, schedule, *constants, **stopping)


def _stopping_steps(*arguments):
    *arguments, tolerance = arguments
    b, phi = arguments[3], arguments[5]
    outputs = Stopping.allocate(b, phi.dtype, tolerance)
    y = _steps(*arguments, False, stopping=outputs)
    return y, outputs.taken, outputs.residual


def stopping(*arguments):
    """y where each sample stops, and what is said of it, of one step and one entry or more; None without a kernel."""
    matrix, diagonal, _, b, _, phi = arguments[:6]
    if matrix is not None and diagonal is not None:
        has_kernel = _kernels("spectral").stops_by_itself(b, phi.dtype)
    else:
        has_kernel = matrix is not None or b.shape[1] <= _kernels("diagonal").LONGEST_THAT_STOPS
    return _stopping(*arguments) if has_kernel else None


@manual.with_no_steps
@manual.with_nesterov
def _backward(grad_y, matrix, diagonal, observed, b, *rest):
    *rest, needs = rest
    # of y0, φ, β, γ, lower, upper, weight, threshold
    coefficients, bounds = (*rest[1:4], rest[7]), rest[4:7]
    rest = _arguments(rest)
    needs_matrix, needs_diagonal, needs_observed, needs_b, needs_y0 = (bool(needs >> i & 1) for i in range(5))
    needs_schedule = [bool(needs >> i & 1) and c is not None for i, c in zip((5, 6, 7, 12), coefficients, strict=True)]
    needs_bounds = [bool(needs >> i & 1) and x is not None for i, x in zip((9, 10, 11), bounds, strict=True)]
    needs_observed = needs_observed and observed is not None
    needs_y0 = needs_y0 and rest[0] is not None
    # what was observed counts against b
    common_needs = (needs_b or needs_observed, needs_y0, any(needs_schedule))
    d_matrix = d_diagonal = None
    d_bounds = (None,) * 3
    if diagonal is None:
        arguments = (grad_y, matrix, b, *rest, needs_matrix, *common_needs, needs_bounds)
        d_matrix, db, dy0, d_schedule, d_bounds = _kernels("dense").backward(*arguments)
    elif matrix is None:
        arguments = (grad_y, diagonal, b, *rest, needs_diagonal, *common_needs, needs_bounds)
        d_diagonal, db, dy0, d_schedule, d_bounds = _kernels("diagonal").backward(*arguments, observed=observed)
    else:
        y0, schedule, _, *constants = rest
        arguments = (grad_y, diagonal, matrix, b, y0, schedule, *constants, needs_diagonal, needs_matrix, *common_needs)
        d_diagonal, d_matrix, db, dy0, d_schedule = _kernels("spectral").backward(*arguments)
    d_observed = -db if needs_observed else None
    gradients = (d_matrix, d_diagonal, d_observed, db if needs_b else None, dy0 if needs_y0 else None)
    # each its own: no two outputs of an op are the same tensor
    nothing = lambda: coefficients[0].new_empty(0)
    *d_schedule, d_threshold = (
        g.reshape(c.shape) if needed else nothing()
        for g, c, needed in zip(d_schedule, coefficients, needs_schedule, strict=True)
    )
    return (
        *(b.new_empty(0) if g is None else g for g in gradients),
        *d_schedule,
        nothing(),  # μ's, which is made of those of β and γ
        *(g if needed else nothing() for g, needed in zip(d_bounds, needs_bounds, strict=True)),
        d_threshold,
    )


def _fake_backward(grad_y, *arguments):
    """Shapes and dtypes of the gradients, empty where they are not needed."""
    likes = [arguments[3]] * 5 + [arguments[5]] * 8
    grads = native.fake_backward(grad_y, *arguments)
    return tuple(like.new_empty(0) if g is None else g for g, like in zip(grads, likes, strict=True))


_library.impl("momentum_triton_stopping", _stopping_steps, "CompositeExplicitAutograd")
_library.impl("momentum_triton", _forward, "CompositeExplicitAutograd")
_library.impl("momentum_triton_backward", _backward, "CompositeExplicitAutograd")
_stopping = common.register("momentum_triton_stopping", native.fake_stopping)
backward = common.register("momentum_triton_backward", _fake_backward)
forward = common.register("momentum_triton", native.fake_forward, backward, manual.backward)
