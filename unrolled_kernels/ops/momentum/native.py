"""Launcher of the C++ and CUDA kernels: the ops that the extension registers, as torch.compile sees them."""

import torch

from unrolled_kernels import _backend


class Launcher:
    """Forward and backward through the registered ops ``momentum_{dense,diagonal,spectral}``, a suffix for a backend."""

    def __init__(self, suffix=""):
        self.suffix = suffix

    def forward(self, eigenvalues, matrix, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory):
        """Run the recurrence on canonical arguments (see the package's docstring)."""
        name, operands = _operands(eigenvalues, matrix)
        return _call(
            f"momentum_{name}{self.suffix}",
            (*operands, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory),
        )

    def backward(
        self,
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
        name, operands = _operands(eigenvalues, matrix)
        rest = (b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory)
        needs = {"dense": (needs_matrix,), "diagonal": (needs_eigenvalues,)}.get(
            name, (needs_eigenvalues, needs_matrix)
        )
        grads = _call(f"momentum_{name}{self.suffix}_backward", (grad_y, *operands, *rest, *needs, needs_schedule))
        if name == "dense":
            return (b.new_empty(0), *grads)
        if name == "diagonal":
            return (grads[0], b.new_empty(0), *grads[1:])
        return grads


def _operands(eigenvalues, matrix):
    if eigenvalues is None:
        return "dense", (matrix,)
    if matrix is None:
        return "diagonal", (eigenvalues,)
    return "spectral", (eigenvalues, matrix)


def _call(name, arguments):
    op = getattr(torch.ops.unrolled_kernels, name).default
    if torch.compiler.is_compiling():
        return op(*arguments)
    # inside a Function there is nothing for autograd to do: its kernel, which is Python, costs as much as the launch
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


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
