"""Launcher of the C++ and CUDA kernels: the ops of csrc/momentum.cpp, as torch.compile sees them."""

import torch

from unrolled_kernels import _backend
from unrolled_kernels.ops import common
from unrolled_kernels.ops.momentum import manual, reference


def fake_forward(matrix, diagonal, observed, b, *rest):
    """Shape and dtype of y."""
    *_, num_steps, trajectory = rest
    return b.new_empty((num_steps + 1, *b.shape) if trajectory else b.shape)


def fake_begun(matrix, b, y0, phi, beta, gamma, mu, *rest):
    """Shapes and dtypes of y_k and of the state before the last steps."""
    return tuple(b.new_empty(b.shape) for _ in range(3))


def fake_stopping(matrix, diagonal, observed, b, *rest):
    """Shapes and dtypes of y, of the steps that each sample takes, and of how large the last was."""
    compute = rest[1].dtype
    return b.new_empty(b.shape), b.new_empty(b.shape[:1], dtype=torch.int64), b.new_empty(b.shape[:1], dtype=compute)


def fake_backward(grad_y, *arguments):
    """Shapes and dtypes of the gradients, None for what is not needed."""
    tensors, needs = arguments[:13], arguments[15]
    return tuple(None if x is None or not needs >> i & 1 else x.new_empty(x.shape) for i, x in enumerate(tensors))


def fake_second_order(*arguments):
    """Shapes and dtypes of the gradients of a backward pass, None for what is not needed."""
    inputs, needs = arguments[:9], arguments[-1]
    return tuple(None if x is None or not needs >> i & 1 else x.new_empty(x.shape) for i, x in enumerate(inputs))


class Cuda:
    """The same ops on a GPU, where torch computes what follows from μ."""

    @staticmethod
    @reference.with_nesterov
    def forward(*arguments):
        return forward(*arguments[:8], None, *arguments[8:])

    @staticmethod
    @reference.with_nesterov
    def stopping(*arguments):
        return stopping(*arguments[:8], None, *arguments[8:])

    @staticmethod
    def backward(*arguments):
        # behind `needs` come the iterates, where they were kept
        run = lambda *known: backward(*known[:9], None, *known[9:], *arguments[17:])
        return manual.with_nesterov(run)(*arguments[:17])


forward = backward = begun = stopping = second_order = None  # without the extension
if _backend.extension() is not None:
    schedule, bounds = "step_sizes momentum extrapolation mu", "lower upper weight threshold"
    inputs = f"matrix diagonal observed b y0 {schedule} {bounds} num_steps"
    backward = common.register(
        "momentum_backward",
        fake_backward,
        arguments=f"grad_y {inputs} trajectory needs iterates first y_begun m_begun minimizer",
    )
    second_order = common.register(
        "momentum_second_order",
        fake_second_order,
        arguments=f"grad_y matrix diagonal b y0 {schedule} d_matrix d_diagonal d_b d_y0 d_step_sizes d_momentum "
        "d_extrapolation num_steps trajectory needs",
    )
    begun = common.register("momentum_begun", fake_begun, arguments=f"matrix b y0 {schedule} {bounds} num_steps begun")
    stopping = common.register("momentum_stopping", fake_stopping, arguments=f"{inputs} tolerance")
    forward = common.register("momentum", fake_forward, backward, manual.backward, f"{inputs} trajectory")
