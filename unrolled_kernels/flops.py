"""What the ops count in ``torch.utils.flop_counter.FlopCounterMode``, from the import of this module on.

Products are counted as torch counts its own: two for each multiply-add, those that a backward pass repeats included,
and nothing for what is elementwise. A module of its own because torch's counter imports triton.
"""

from collections.abc import Callable
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

from unrolled_kernels.ops.momentum import function as _momentum_ops  # noqa: F401  which register the ops
from unrolled_kernels.ops.rnn import function as _rnn_ops  # noqa: F401

# bits of `needs`: of the matrix, of b, of y_0, of φ, β, γ and μ, of the RNN's weights
_MATRIX, _B, _Y0, _SCHEDULE, _WEIGHTS = 1 << 0, 1 << 3, 1 << 4, 0b1111 << 5, 1 << 4


def _momentum(matrix, diagonal, observed, b, y0, *rest, out_shape=None):
    num_steps, trajectory = rest[-2:]
    if matrix is None or num_steps == 0:
        return 0
    products = num_steps
    if diagonal is not None:
        # b and y_0 into the eigenbasis, what is returned out of it
        products = 1 + (y0 is not None) + (num_steps if trajectory else 1)
    return _product(b) * products


def _momentum_begun(matrix, b, *rest, out_shape=None):
    num_steps = rest[-2]
    return _product(b) * num_steps


def _momentum_stopping(*arguments, out_shape=None):
    # all steps, as the samples may take them; whether one stops is said of what comes out of an eigenbasis
    *tensors, num_steps, _ = arguments
    return _momentum(*tensors, num_steps, True)


def _momentum_backward(grad_y, matrix, diagonal, observed, b, y0, *rest, out_shape=None):
    *prox, num_steps, trajectory, needs = rest[4:11]
    iterates, first, y_begun, _, minimizer = rest[11:] + (None, 0, None, None, None)[len(rest) - 11 :]
    if matrix is None or num_steps == 0:
        return 0
    if diagonal is None:
        replays = iterates is None and (
            needs & _SCHEDULE or (needs & _MATRIX and minimizer is None) or any(x is not None for x in prox)
        )
        if y_begun is not None:
            y0, num_steps = y_begun, num_steps - first
        terms = num_steps if minimizer is None else 1
        # Qᵀ times the adjoint of y_1 is y_0's gradient and no other's
        adjoints = num_steps - (y0 is None)
        return _product(b) * (num_steps * bool(replays) + adjoints + terms * bool(needs & _MATRIX))
    # b, y_0 and the cotangents, which are also the terms of the gradient; then the gradients of b and y_0
    terms = 1 + (y0 is not None) + (num_steps if trajectory else 1)
    back = bool(needs & _B) + bool(needs & _Y0 and y0 is not None)
    return _product(b) * (terms * (1 + bool(needs & _MATRIX)) + back)


def _momentum_second_order(grad_y, matrix, diagonal, b, *rest, out_shape=None):
    d_matrix, num_steps, needs = rest[5], rest[-3], rest[-1]
    if matrix is None:
        return 0
    # of a state and its tangent with Q, and of the state with Q's tangent, replayed and for the adjoints
    products = 2 * (2 + (d_matrix is not None))
    # the gradient of Q has a term of either; grad_y is before it
    return _product(b) * num_steps * (products + 2 * bool(needs & _MATRIX << 1))


def _rnn(matrix, diagonal, b, y0, weights, num_steps, trajectory, out_shape=None):
    return num_steps * (_weights(b, weights) + (0 if matrix is None else _product(b)))


def _rnn_backward(grad_y, matrix, diagonal, b, y0, weights, num_steps, trajectory, needs, out_shape=None):
    of_weights, of_matrix = _weights(b, weights), 0 if matrix is None else _product(b)
    # replayed, for the adjoints, and for the gradients
    per_step = (2 + bool(needs & _WEIGHTS)) * of_weights + (2 + bool(needs & _MATRIX)) * of_matrix
    return num_steps * per_step


def _product(b):
    """Of a matrix and a state, for all samples."""
    B, d = b
    return 2 * B * d * d


def _weights(b, weights):
    return 2 * b[0] * sum(prod(shape) for shape in weights)


_FORMULAS: dict[str, Callable[..., int]] = {
    "momentum": _momentum,
    "momentum_begun": _momentum_begun,
    "momentum_stopping": _momentum_stopping,
    "momentum_backward": _momentum_backward,
    "momentum_second_order": _momentum_second_order,
    "momentum_triton": _momentum,
    "momentum_triton_stopping": _momentum_stopping,
    "momentum_triton_backward": _momentum_backward,
    "rnn": _rnn,
    "rnn_backward": _rnn_backward,
    "rnn_triton": _rnn,
    "rnn_triton_backward": _rnn_backward,
}
for name, formula in _FORMULAS.items():
    # without the extension there are only those of Triton
    if hasattr(torch.ops.unrolled_kernels, name):
        register_flop_formula(getattr(torch.ops.unrolled_kernels, name))(formula)
