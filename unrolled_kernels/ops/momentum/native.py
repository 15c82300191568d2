"""Launcher of the C++ and CUDA kernels: the ops of csrc/momentum.cpp, as torch.compile sees them."""

from unrolled_kernels import _backend
from unrolled_kernels.ops import common
from unrolled_kernels.ops.momentum import manual, reference


def fake_forward(matrix, eigenvalues, observed, b, y0, step_sizes, momentum, extrapolation, mu, num_steps, trajectory):
    """Shape and dtype of y."""
    return b.new_empty((num_steps + 1, *b.shape) if trajectory else b.shape)


def fake_backward(
    grad_y, matrix, eigenvalues, observed, b, y0, step_sizes, momentum, extrapolation, mu, num_steps, trajectory, needs
):
    """Shapes and dtypes of the gradients."""
    schedule = (step_sizes, momentum, extrapolation, mu)
    return (
        *common.fake_gradients((matrix, eigenvalues, observed, b, y0), needs, like=b),
        *common.fake_gradients(schedule, needs >> 5, like=step_sizes),
    )


forward = backward = None  # without the extension
if _backend.extension() is not None:
    _forward = common.register("momentum", fake_forward)
    _backward = common.register("momentum_backward", fake_backward)
    # on a GPU torch computes what follows from μ
    _forward_on_gpu = reference.with_nesterov(lambda *x: _forward(*x[:8], None, *x[8:]))
    _backward_on_gpu = manual.with_nesterov(lambda *x: _backward(*x[:9], None, *x[9:])[:8])

    def forward(*arguments):
        """The contract of ``reference.forward``."""
        return (_forward if arguments[3].is_cpu else _forward_on_gpu)(*arguments)

    def backward(*arguments):
        """The contract of ``manual.backward``."""
        return (_backward if arguments[4].is_cpu else _backward_on_gpu)(*arguments)
