"""Launcher of the C++ and CUDA kernels: the ops that the extension registers, as torch.compile sees them."""

from unrolled_kernels import _backend
from unrolled_kernels.ops import common
from unrolled_kernels.ops.rnn import manual

# csrc/rnn.h: max_rnn_dim, max_rnn_width, max_rnn_layers
MAX_DIM, MAX_WIDTH, MAX_LAYERS = 64, 128, 6


def is_fused(d, hidden_dims, max_width=MAX_WIDTH):
    """Whether the kernels take this size. Beyond, the products are large enough for eager torch, backward by hand."""
    return d <= MAX_DIM and len(hidden_dims) <= MAX_LAYERS and max(hidden_dims) <= max_width


class Launcher:
    """Forward and backward by the registered ops ``rnn_{dense,diagonal}``, a suffix for a backend."""

    def __init__(self, suffix="", max_width=MAX_WIDTH):
        self.suffix, self.max_width = suffix, max_width

    def forward(self, eigenvalues, matrix, b, y0, weights, num_steps, trajectory):
        """The contract of ``reference.forward``."""
        if not is_fused(b.shape[-1], hidden_dims_of(weights), self.max_width):
            return manual.forward(eigenvalues, matrix, b, y0, weights, num_steps, trajectory)
        name, Q = _operand(eigenvalues, matrix)
        return common.call(f"rnn_{name}{self.suffix}", (Q, b, y0, weights, num_steps, trajectory))

    def backward(self, grad_y, eigenvalues, matrix, b, y0, weights, *rest):
        """The contract of ``manual.backward``."""
        if not is_fused(b.shape[-1], hidden_dims_of(weights), self.max_width):
            return manual.backward(grad_y, eigenvalues, matrix, b, y0, weights, *rest)
        *steps, needs_eigenvalues, needs_matrix, needs_weights = rest
        name, Q = _operand(eigenvalues, matrix)
        needs = (needs_matrix if eigenvalues is None else needs_eigenvalues, needs_weights)
        arguments = (grad_y, Q, b, y0, weights, *steps, *needs)
        d_Q, db, dy0, d_weights = common.call(f"rnn_{name}{self.suffix}_backward", arguments)
        nothing = b.new_empty(0)
        d_structure = (nothing, d_Q) if eigenvalues is None else (d_Q, nothing)
        return (*d_structure, db, dy0, *d_weights)


def _operand(eigenvalues, matrix):
    return ("dense", matrix) if eigenvalues is None else ("diagonal", eigenvalues)


def hidden_dims_of(weights):
    """The widths h_1 … h_L."""
    return [weights[0].shape[0], *(W.shape[0] for W in weights[2:-1])]


def _fake_forward(Q, b, y0, weights, num_steps, trajectory):
    return b.new_empty((num_steps + 1, *b.shape) if trajectory else b.shape)


def _fake_backward(grad_y, Q, b, y0, weights, num_steps, trajectory, needs_Q, needs_weights):
    return (
        Q.new_empty(Q.shape if needs_Q else (0,)),
        b.new_empty(b.shape),
        b.new_empty(b.shape),
        [W.new_empty(W.shape) for W in weights] if needs_weights else [],
    )


def register(name):
    """Give the op ``name`` and its backward a fake kernel and a loud autograd."""
    common.register(name, _fake_forward, _fake_backward)


if _backend.extension() is not None:
    register("rnn_dense")
    register("rnn_diagonal")
