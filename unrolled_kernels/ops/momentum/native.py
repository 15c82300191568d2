"""Launcher of the C++ and CUDA kernels: the ops of csrc/momentum.cpp, as torch.compile sees them."""

from unrolled_kernels import _backend
from unrolled_kernels.ops import common
from unrolled_kernels.ops.momentum import manual, reference


def fake_forward(matrix, eigenvalues, observed, b, *rest):
    """Shape and dtype of y."""
    *_, num_steps, trajectory = rest
    return b.new_empty((num_steps + 1, *b.shape) if trajectory else b.shape)


def fake_backward(grad_y, matrix, eigenvalues, observed, b, y0, step_sizes, momentum, extrapolation, mu, *rest):
    """Shapes and dtypes of the gradients."""
    *prox, _, _, needs = rest[:7]
    compute = (step_sizes, momentum, extrapolation, mu, *prox)
    return (
        *common.fake_gradients((matrix, eigenvalues, observed, b, y0), needs, like=b),
        *common.fake_gradients(compute, needs >> 5, like=step_sizes),
    )


class Cuda:
    """The same ops on a GPU, where torch computes what follows from μ."""

    @staticmethod
    @reference.with_nesterov
    def forward(*arguments):
        return forward(*arguments[:8], None, *arguments[8:])

    @staticmethod
    @manual.with_nesterov
    def backward(*arguments):
        return backward(*arguments[:9], None, *arguments[9:])


forward = backward = None  # without the extension
if _backend.extension() is not None:
    backward = common.register("momentum_backward", fake_backward)
    forward = common.register("momentum", fake_forward, backward, manual.backward)
