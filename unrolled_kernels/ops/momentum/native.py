"""Launcher of the C++ and CUDA kernels: the ops that the extension registers, as torch.compile sees them."""

import torch

from unrolled_kernels import _backend


def forward(eigenvalues, matrix, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory):
    """Run the recurrence on canonical arguments (see the package's docstring)."""
    ops = torch.ops.unrolled_kernels
    rest = (b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory)
    if eigenvalues is None:
        return ops.momentum_dense(matrix, *rest)
    if matrix is None:
        return ops.momentum_diagonal(eigenvalues, *rest)
    return ops.momentum_spectral(eigenvalues, matrix, *rest)


def backward(
    grad_y,
    eigenvalues,
    matrix,
    b,
    y0,
    step_sizes,
    momentum,
    extrapolation,
    num_steps,
    trajectory,
    needs_eigenvalues,
    needs_matrix,
    needs_schedule,
):
    """Gradients of the canonical arguments; the contract of ``manual.backward``."""
    ops = torch.ops.unrolled_kernels
    rest = (b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory)
    if eigenvalues is None:
        d_matrix, *d_rest = ops.momentum_dense_backward(grad_y, matrix, *rest, needs_matrix, needs_schedule)
        return (b.new_empty(0), d_matrix, *d_rest)
    if matrix is None:
        d_eigenvalues, *d_rest = ops.momentum_diagonal_backward(
            grad_y, eigenvalues, *rest, needs_eigenvalues, needs_schedule
        )
        return (d_eigenvalues, b.new_empty(0), *d_rest)
    return ops.momentum_spectral_backward(
        grad_y, eigenvalues, matrix, *rest, needs_eigenvalues, needs_matrix, needs_schedule
    )


def _fake_forward(b, num_steps, trajectory):
    return b.new_empty((num_steps + 1, *b.shape) if trajectory else b.shape)


def _fake_backward(operands, b, schedule, needs_operands, needs_schedule):
    d_operands = [x.new_empty(x.shape if needed else (0,)) for x, needed in zip(operands, needs_operands, strict=True)]
    d_schedule = [
        c.new_empty(c.shape) if needs_schedule and c is not None else schedule[0].new_empty(0) for c in schedule
    ]
    return (*d_operands, b.new_empty(b.shape), b.new_empty(b.shape), *d_schedule)


def _not_differentiable(ctx, *grads):
    # torch.compile(torch.func.grad(f)) ignores the backward of an autograd.Function and reaches the raw ops
    raise RuntimeError(
        "unrolled_kernels: this transform bypasses the layer's backward and would silently give zeros; "
        "use torch.func outside torch.compile, or backend='eager'"
    )


def register(num_operands, name):
    """Give op ``name`` and its backward, of ``num_operands`` tensors for Q, a fake kernel and a loud autograd."""
    n = num_operands

    def fake_forward(*args):
        b, num_steps, trajectory = args[n], args[n + 5], args[n + 6]
        return _fake_forward(b, num_steps, trajectory)

    def fake_backward(*args):
        # grad_y, operands…, b, y0, φ, β, γ, num_steps, trajectory, needs_operands…, needs_schedule
        operands, b, schedule = args[1 : n + 1], args[n + 1], args[n + 3 : n + 6]
        return _fake_backward(operands, b, schedule, args[n + 8 : 2 * n + 8], args[2 * n + 8])

    for op, fake in ((name, fake_forward), (f"{name}_backward", fake_backward)):
        torch.library.register_fake(f"unrolled_kernels::{op}", fake)
        torch.library.register_autograd(f"unrolled_kernels::{op}", _not_differentiable)


if _backend.extension() is not None:
    register(1, "momentum_dense")
    register(1, "momentum_diagonal")
    register(2, "momentum_spectral")
