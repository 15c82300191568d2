"""Launcher of the Triton kernels, as ops that torch.compile and torch.export see. Imports Triton at the first call."""

import functools
import importlib

import torch

from unrolled_kernels.ops import common
from unrolled_kernels.ops.momentum import manual, native, reference

# the schemas of csrc/momentum.cpp; CompositeExplicitAutograd is CUDA, and the CPU for Triton's interpreter
_library = torch.library.Library("unrolled_kernels", "FRAGMENT")
_library.define(
    "momentum_triton(Tensor? matrix, Tensor? diagonal, Tensor? observed, Tensor b, Tensor? y0, Tensor step_sizes, "
    "Tensor? momentum, Tensor? extrapolation, Tensor? mu, Tensor? lower, Tensor? upper, Tensor? weight, "
    "Tensor? threshold, SymInt num_steps, bool trajectory) -> Tensor"
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
    """y0, φ, β, γ, num_steps, trajectory; the coefficients as ``[B or 1, num_steps or 1]``, one number too."""
    y0, *schedule, lower, upper, weight, threshold, num_steps, trajectory = rest
    if (lower, upper, weight, threshold) != (None,) * 4:
        raise RuntimeError("unrolled_kernels: the Triton kernels know no proximal map")
    schedule = (c if c is None or c.dim() == 2 else c.reshape(1, 1) for c in schedule)
    return y0, *schedule, num_steps, trajectory


def _forward(*arguments):
    num_steps = arguments[-2]
    return (_steps if num_steps > 0 else reference.forward)(*arguments)


@reference.with_nesterov
def _steps(matrix, diagonal, observed, b, *rest):
    rest = _arguments(rest)
    if diagonal is None:
        return _kernels("dense").forward(matrix, b, *rest)
    if matrix is None:
        return _kernels("diagonal").forward(diagonal, b, *rest, observed=observed)
    return _kernels("spectral").forward(diagonal, matrix, b, *rest)


@manual.with_no_steps
@manual.with_nesterov
def _backward(grad_y, matrix, diagonal, observed, b, *rest):
    *rest, needs = rest
    coefficients, rest = rest[1:4], _arguments(rest)
    needs_matrix, needs_diagonal, needs_observed, needs_b, needs_y0, *needs_schedule = (
        bool(needs >> i & 1) for i in range(8)
    )
    needs_observed = needs_observed and observed is not None
    needs_y0 = needs_y0 and rest[0] is not None
    # what was observed counts against b
    common_needs = (needs_b or needs_observed, needs_y0, any(needs_schedule))
    d_matrix = d_diagonal = None
    if diagonal is None:
        arguments = (grad_y, matrix, b, *rest, needs_matrix, *common_needs)
        d_matrix, db, dy0, *d_schedule = _kernels("dense").backward(*arguments)
    elif matrix is None:
        arguments = (grad_y, diagonal, b, *rest, needs_diagonal, *common_needs)
        d_diagonal, db, dy0, *d_schedule = _kernels("diagonal").backward(*arguments, observed=observed)
    else:
        arguments = (grad_y, diagonal, matrix, b, *rest, needs_diagonal, needs_matrix, *common_needs)
        d_diagonal, d_matrix, db, dy0, *d_schedule = _kernels("spectral").backward(*arguments)
    d_observed = -db if needs_observed else None
    gradients = (d_matrix, d_diagonal, d_observed, db if needs_b else None, dy0 if needs_y0 else None)
    return (
        *(b.new_empty(0) if g is None else g for g in gradients),
        *(
            g.reshape(c.shape) if needed and c is not None else g.new_empty(0)
            for g, c, needed in zip(d_schedule, coefficients, needs_schedule, strict=True)
        ),
        *(coefficients[0].new_empty(0) for _ in range(5)),
    )


def _fake_backward(grad_y, *arguments):
    """Shapes and dtypes of the gradients, empty where they are not needed."""
    likes = [arguments[3]] * 5 + [arguments[5]] * 8
    grads = native.fake_backward(grad_y, *arguments)
    return tuple(like.new_empty(0) if g is None else g for g, like in zip(grads, likes, strict=True))


_library.impl("momentum_triton", _forward, "CompositeExplicitAutograd")
_library.impl("momentum_triton_backward", _backward, "CompositeExplicitAutograd")
backward = common.register("momentum_triton_backward", _fake_backward)
forward = common.register("momentum_triton", native.fake_forward, backward, manual.backward)
