"""Launcher of the C++ and CUDA kernels: the ops of csrc/momentum.cpp, as torch.compile sees them."""

from unrolled_kernels import _backend
from unrolled_kernels.ops import common


def fake_forward(matrix, eigenvalues, observed, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory):
    """Shape and dtype of y."""
    return b.new_empty((num_steps + 1, *b.shape) if trajectory else b.shape)


def fake_backward(
    grad_y, matrix, eigenvalues, observed, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory, needs
):
    """Shapes and dtypes of the gradients."""
    schedule = (step_sizes, momentum, extrapolation)
    return (
        *common.fake_gradients((matrix, eigenvalues, observed, b, y0), needs, like=b),
        *common.fake_gradients(schedule, needs >> 5, like=step_sizes),
    )


forward = backward = None  # without the extension
if _backend.extension() is not None:
    forward = common.register("momentum", fake_forward)
    backward = common.register("momentum_backward", fake_backward)
