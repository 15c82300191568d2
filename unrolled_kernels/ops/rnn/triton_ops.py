"""Launcher of the Triton kernels, as ops that torch.compile and torch.export see. Imports Triton at the first call."""

import functools
import importlib

import torch

from unrolled_kernels.ops.rnn import native

# the schemas of csrc/rnn.cpp; CompositeExplicitAutograd is CUDA, and the CPU for Triton's interpreter
_library = torch.library.Library("unrolled_kernels", "FRAGMENT")
_library.define(
    "rnn_triton(Tensor? matrix, Tensor? diagonal, Tensor b, Tensor? y0, Tensor[] weights, SymInt num_steps, "
    "bool trajectory) -> Tensor"
)
_library.define(
    "rnn_triton_backward(Tensor grad_y, Tensor? matrix, Tensor? diagonal, Tensor b, Tensor? y0, Tensor[] weights, "
    "SymInt num_steps, bool trajectory, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])"
)


@functools.cache
def _kernels():
    """The module of the kernels, which imports Triton."""
    return importlib.import_module("unrolled_kernels.ops.rnn.triton_cell")


def _forward(matrix, diagonal, *rest):
    return _kernels().forward(matrix if diagonal is None else diagonal, *rest)


def _backward(grad_y, matrix, diagonal, b, y0, weights, num_steps, trajectory, needs):
    Q, needs_Q = (matrix, needs & 1) if diagonal is None else (diagonal, needs & 2)
    wanted = (bool(needs_Q), bool(needs & 4), bool(needs & 8) and y0 is not None, bool(needs & 16))
    *gradients, d_weights = _kernels().backward(grad_y, Q, b, y0, weights, num_steps, trajectory, *wanted)
    d_Q, db, dy0 = (b.new_empty(0) if g is None else g for g in gradients)
    return (*((d_Q, b.new_empty(0)) if diagonal is None else (b.new_empty(0), d_Q)), db, dy0, d_weights)


_library.impl("rnn_triton", _forward, "CompositeExplicitAutograd")
_library.impl("rnn_triton_backward", _backward, "CompositeExplicitAutograd")

# wider layers take minutes to compile, and the operands of their products spill
LAUNCHER = native.Launcher("rnn_triton", max_width=64)
