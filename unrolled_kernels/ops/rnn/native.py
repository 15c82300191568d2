"""Launcher of the C++ and CUDA kernels: the ops of csrc/rnn.cpp, as torch.compile sees them."""

from unrolled_kernels import _backend
from unrolled_kernels.ops import common
from unrolled_kernels.ops.rnn import manual

# csrc/rnn.h: max_rnn_dim, max_rnn_width, max_rnn_layers
MAX_DIM, MAX_WIDTH, MAX_LAYERS = 64, 128, 6


def is_fused(d, hidden_dims, max_width=MAX_WIDTH):
    """Whether the kernels take this size. Beyond, the products are large enough for eager torch, backward by hand."""
    return d <= MAX_DIM and len(hidden_dims) <= MAX_LAYERS and max(hidden_dims) <= max_width


def hidden_dims_of(weights):
    """The widths h_1 … h_L."""
    return [weights[0].shape[0], *(W.shape[0] for W in weights[2:-1])]


def fake_forward(matrix, diagonal, b, y0, weights, num_steps, trajectory):
    """Shape and dtype of y."""
    return b.new_empty((num_steps + 1, *b.shape) if trajectory else b.shape)


def fake_backward(grad_y, matrix, diagonal, b, y0, weights, num_steps, trajectory, needs):
    """Shapes and dtypes of the gradients."""
    d_weights = [W.new_empty(W.shape) for W in weights] if needs >> 4 & 1 else []
    return (*common.fake_gradients((matrix, diagonal, b, y0), needs, like=b), d_weights)


class Launcher:
    """Forward and backward by a pair of ops, for layers up to ``max_width``; wider ones by ``manual``."""

    def __init__(self, name, max_width=MAX_WIDTH):
        self.max_width = max_width
        arguments = "matrix diagonal b y0 weights num_steps trajectory"
        self._backward = common.register(f"{name}_backward", fake_backward, arguments=f"grad_y {arguments} needs")
        self._forward = common.register(name, fake_forward, self._backward, manual.backward, arguments)

    def is_fused(self, b, weights):
        """Whether the ops take this call."""
        return is_fused(b.shape[-1], hidden_dims_of(weights), self.max_width)

    def forward(self, matrix, diagonal, b, y0, weights, num_steps, trajectory):
        """The contract of ``reference.forward``."""
        fused = self.is_fused(b, weights)
        forward = self._forward if fused else manual.forward
        return forward(matrix, diagonal, b, y0, weights, num_steps, trajectory)

    def backward(self, grad_y, matrix, diagonal, b, y0, weights, num_steps, trajectory, needs):
        """The contract of ``manual.backward``."""
        fused = self.is_fused(b, weights)
        if fused:
            return self._backward(grad_y, matrix, diagonal, b, y0, weights, num_steps, trajectory, needs)
        with common.without_autocast(b.device.type):
            return manual.backward(grad_y, matrix, diagonal, b, y0, weights, num_steps, trajectory, needs)


LAUNCHER = None if _backend.extension() is None else Launcher("rnn")
