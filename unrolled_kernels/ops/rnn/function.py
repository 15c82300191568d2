"""The differentiable RNN op: forward and backward of a backend, as a pair of ``torch.autograd.Function``.

The first Function's backward is the second, whose own backward differentiates the hand-written one in eager torch, so
gradients of every order are those of the specification. Both take canonical arguments (see the package's docstring).
"""

import itertools

import torch

from unrolled_kernels.ops import common
from unrolled_kernels.ops.common import Function
from unrolled_kernels.ops.rnn import manual, native, reference, triton_ops

# each with a forward and a backward; "manual", the derivation that the kernels implement, is for tests
_LAUNCHERS = {"manual": manual, "cpu": native.LAUNCHER, "cuda": native.LAUNCHER, "triton": triton_ops.LAUNCHER}


def rnn(backend, matrix, diagonal, b, y0, weights, num_steps, trajectory, backward_steps=None):
    """Run the cells on ``backend``, differentiably in every tensor.

    Args:
        backward_steps: how many of the last cells are differentiated; what comes before is then constant.
    """
    if backward_steps is not None and backward_steps < num_steps:
        storage, compute, first = b.dtype, weights[0].dtype, num_steps - backward_steps
        # the state in between is not rounded
        tensors = [x if x is None or storage == compute else x.to(compute) for x in (matrix, diagonal, b, y0)]
        with torch.no_grad():
            begun = rnn(backend, *tensors, weights, first, trajectory)
        begun = begun.detach()  # forward mode knows no torch.no_grad
        y0 = begun[-1] if trajectory else begun
        y = rnn(backend, *tensors[:3], y0, weights, backward_steps, trajectory)
        return (torch.cat([begun, y[1:]]) if trajectory else y).to(storage)
    if backend == "eager" or common.runs_in_eager():
        return reference.forward(matrix, diagonal, b, y0, weights, num_steps, trajectory)
    tensors = (matrix, diagonal, b, y0, *weights)
    if torch.compiler.is_compiling():
        differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        if not differentiated or _is_fused(backend, b, weights):
            # the op and its own gradients: of a Function the compiler does not see that what it saved is written into,
            # and where nothing is differentiated torch.compile counts the arguments of forward, and stumbles over
            # *weights
            return RnnFunction.forward(backend, num_steps, trajectory, *tensors)
    return RnnFunction.apply(backend, num_steps, trajectory, *tensors)


def _is_fused(backend, b, weights):
    """Whether an op with gradients of its own takes the call."""
    return backend != "manual" and _LAUNCHERS[backend].is_fused(b, weights)


class RnnFunction(Function):
    """y_k, or y_0 … y_k, of the RNN; keeps its inputs for backward and nothing else.

    The weights are arguments of their own: one packed tensor would cost two nodes of autograd's graph for each of them.
    """

    @staticmethod
    def forward(backend, num_steps, trajectory, matrix, diagonal, b, y0, *weights):
        return _LAUNCHERS[backend].forward(matrix, diagonal, b, y0, weights, num_steps, trajectory)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.num_steps, ctx.trajectory, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_y):
        needs = ctx.needs_input_grad[3:]
        bits = needs[0] | needs[1] << 1 | needs[2] << 2 | needs[3] << 3 | any(needs[4:]) << 4
        arguments = (ctx.num_steps, ctx.trajectory, bits)
        matrix, diagonal, b, y0, *weights = ctx.saved_tensors
        if common.is_differentiated():
            tensors = common.alive((grad_y, matrix, diagonal, b, y0, *weights))
            grads = RnnBackwardFunction.apply(ctx.backend, *arguments, *tensors)
        else:
            # nothing will differentiate this backward: straight to the launcher
            tensors = (grad_y, matrix, diagonal, b, y0, weights)
            *grads, d_weights = _LAUNCHERS[ctx.backend].backward(*tensors, *arguments)
            grads += d_weights
        return (None, None, None, *(g if needed else None for g, needed in itertools.zip_longest(grads, needs)))

    @staticmethod
    def vmap(info, in_dims, backend, num_steps, trajectory, *tensors):
        run = lambda *tensors: RnnFunction.apply(backend, num_steps, trajectory, *tensors)
        dims, weight_dims = in_dims[3:7], in_dims[7:]
        if any(dim is not None for dim in weight_dims):
            return common.vmap_loop(run, info.batch_size, (*dims, *weight_dims), tensors)
        tensors, weights = tensors[:4], tensors[4:]
        return common.vmap_forward(lambda *x: run(*x, *weights), info.batch_size, dims, tensors, trajectory, b=2)


class RnnBackwardFunction(Function):
    """The gradients of ``RnnFunction`` as a differentiable function of the cotangent and of the inputs."""

    @staticmethod
    def forward(backend, num_steps, trajectory, needs, grad_y, matrix, diagonal, b, y0, *weights):
        tensors = (grad_y, matrix, diagonal, b, y0, weights)
        *grads, d_weights = _LAUNCHERS[backend].backward(*tensors, num_steps, trajectory, needs)
        return (*grads, *d_weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.num_steps, ctx.trajectory, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        def gradients(*tensors):
            constants = (ctx.num_steps, ctx.trajectory, ctx.needs)
            *grads, d_weights = manual.backward(*tensors[:5], tensors[5:], *constants)
            return (*grads, *d_weights)

        return (None, None, None, None, *common.second_order(gradients, cotangents, ctx.saved_tensors))

    @staticmethod
    def vmap(info, in_dims, backend, num_steps, trajectory, needs, *tensors):
        run = lambda *tensors: RnnBackwardFunction.apply(backend, num_steps, trajectory, needs, *tensors)
        dims, weight_dims = in_dims[4:9], in_dims[9:]
        if needs >> 4 or any(dim is not None for dim in weight_dims):
            # each vmapped row has a gradient of the weights of its own, where the kernels sum over the batch
            return common.vmap_loop(run, info.batch_size, (*dims, *weight_dims), tensors)
        tensors, weights = tensors[:5], tensors[5:]
        return common.vmap_backward(lambda *x: run(*x, *weights), info.batch_size, dims, tensors, trajectory, b=2)
