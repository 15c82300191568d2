"""Launcher of the C++ and CUDA kernels: the ops that the extension registers, as torch.compile sees them."""

from unrolled_kernels import _backend
from unrolled_kernels.ops import common


class Launcher:
    """Forward and backward by the registered ops ``momentum_<structure>``, with a suffix for a backend."""

    def __init__(self, suffix=""):
        self.suffix = suffix

    def forward(self, eigenvalues, matrix, *rest):
        """The contract of ``reference.forward``."""
        *rest, observed = rest
        name, operands = _operands(eigenvalues, matrix, observed)
        return common.call(f"momentum_{name}{self.suffix}", (*operands, *rest))

    def backward(self, grad_y, eigenvalues, matrix, *rest):
        """The contract of ``manual.backward``."""
        *rest, needs_eigenvalues, needs_matrix, needs_schedule, observed = rest
        name, operands = _operands(eigenvalues, matrix, observed)
        needs = {"dense": (needs_matrix,), "spectral": (needs_eigenvalues, needs_matrix)}.get(
            name, (needs_eigenvalues,)
        )
        arguments = (grad_y, *operands, *rest, *needs, needs_schedule)
        grads = common.call(f"momentum_{name}{self.suffix}_backward", arguments)
        nothing = grad_y.new_empty(0)
        if name == "dense":
            return (nothing, *grads)
        if name == "spectral":
            return grads
        return (grads[0], nothing, *grads[1:])


def _operands(eigenvalues, matrix, observed):
    if eigenvalues is None:
        return "dense", (matrix,)
    if observed is not None:
        return "tikhonov", (eigenvalues, observed)
    if matrix is None:
        return "diagonal", (eigenvalues,)
    return "spectral", (eigenvalues, matrix)


def _fake_forward(b, num_steps, trajectory):
    return b.new_empty((num_steps + 1, *b.shape) if trajectory else b.shape)


def _fake_backward(operands, b, schedule, needs_operands, needs_schedule):
    d_operands = [x.new_empty(x.shape if needed else (0,)) for x, needed in zip(operands, needs_operands, strict=True)]
    d_schedule = [
        c.new_empty(c.shape) if needs_schedule and c is not None else schedule[0].new_empty(0) for c in schedule
    ]
    return (*d_operands, b.new_empty(b.shape), b.new_empty(b.shape), *d_schedule)


def register(num_operands, name, num_gradients=None):
    """Give op ``name`` and its backward a fake kernel and a loud autograd.

    Args:
        num_operands: how many tensors stand before b.
        num_gradients: how many of them, the first ones, have a gradient; default all.
    """
    n, m = num_operands, num_operands if num_gradients is None else num_gradients

    def fake_forward(*args):
        b, num_steps, trajectory = args[n], args[n + 5], args[n + 6]
        return _fake_forward(b, num_steps, trajectory)

    def fake_backward(*args):
        # grad_y, operands…, b, y0, φ, β, γ, num_steps, trajectory, needs_operands…, needs_schedule
        operands, b, schedule = args[1 : m + 1], args[n + 1], args[n + 3 : n + 6]
        return _fake_backward(operands, b, schedule, args[n + 8 : n + m + 8], args[n + m + 8])

    common.register(name, fake_forward, fake_backward)


if _backend.extension() is not None:
    register(1, "momentum_dense")
    register(1, "momentum_diagonal")
    register(2, "momentum_spectral")
    register(2, "momentum_tikhonov", num_gradients=1)
