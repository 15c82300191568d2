"""The differentiable RNN op: forward and backward of a backend, as a pair of ``torch.autograd.Function``.

The first Function's backward is the second, whose own backward differentiates the hand-written one in eager torch, so
gradients of every order are those of the specification. Both take canonical arguments (see the package's docstring).
"""

import functools

from unrolled_kernels.ops import common
from unrolled_kernels.ops.common import Function
from unrolled_kernels.ops.rnn import manual, native, reference, triton_kernels

_NATIVE = native.Launcher()
_LAUNCHERS = {"manual": manual, "cpu": _NATIVE, "cuda": _NATIVE, "triton": triton_kernels.LAUNCHER}


def rnn(backend, hidden_dims, num_steps, trajectory, eigenvalues, matrix, b, y0, weights):
    """Run the cells on ``backend``, differentiably in every tensor."""
    tensors = (eigenvalues, matrix, b, y0, weights)
    if backend == "eager":
        return reference.forward(*tensors, hidden_dims, num_steps, trajectory)
    return RnnFunction.apply(backend, hidden_dims, num_steps, trajectory, *tensors)


class RnnFunction(Function):
    """y_k, or y_0 … y_k, of the RNN; keeps its inputs for backward and nothing else."""

    # torch.compile counts the arguments of forward: no *args here
    @staticmethod
    def forward(backend, hidden_dims, num_steps, trajectory, eigenvalues, matrix, b, y0, weights):
        tensors = (eigenvalues, matrix, b, y0, weights)
        return _LAUNCHERS[backend].forward(*tensors, hidden_dims, num_steps, trajectory)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.hidden_dims, ctx.num_steps, ctx.trajectory, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_y):
        needs = ctx.needs_input_grad[4:]
        needs_flags = (needs[0], needs[1], needs[4])
        constants = (ctx.hidden_dims, ctx.num_steps, ctx.trajectory)
        if common.is_differentiated():
            grads = RnnBackwardFunction.apply(ctx.backend, *constants, needs_flags, grad_y, *ctx.saved_tensors)
        else:
            # nothing will differentiate this backward: straight to the launcher
            grads = _LAUNCHERS[ctx.backend].backward(grad_y, *ctx.saved_tensors, *constants, *needs_flags)
        return (None, None, None, None, *(g if needed else None for g, needed in zip(grads, needs, strict=True)))

    @staticmethod
    def vmap(info, in_dims, backend, hidden_dims, num_steps, trajectory, *tensors):
        run = functools.partial(RnnFunction.apply, backend, hidden_dims, num_steps, trajectory)
        *dims, weights_dim = in_dims[4:]
        if weights_dim is not None:
            return common.vmap_loop(run, info.batch_size, (*dims, weights_dim), tensors)
        *tensors, weights = tensors
        return common.vmap_forward(lambda *x: run(*x, weights), info.batch_size, dims, tensors, trajectory)


class RnnBackwardFunction(Function):
    """The gradients of ``RnnFunction`` as a differentiable function of the cotangent and of the inputs."""

    @staticmethod
    def forward(backend, hidden_dims, num_steps, trajectory, needs, grad_y, eigenvalues, matrix, b, y0, weights):
        tensors = (eigenvalues, matrix, b, y0, weights)
        return _LAUNCHERS[backend].backward(grad_y, *tensors, hidden_dims, num_steps, trajectory, *needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.hidden_dims, ctx.num_steps, ctx.trajectory, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        constants = (ctx.hidden_dims, ctx.num_steps, ctx.trajectory, *ctx.needs)
        grads = common.second_order(manual.backward, cotangents, ctx.saved_tensors, *constants)
        return (None, None, None, None, None, *grads)

    @staticmethod
    def vmap(info, in_dims, backend, hidden_dims, num_steps, trajectory, needs, *tensors):
        run = functools.partial(RnnBackwardFunction.apply, backend, hidden_dims, num_steps, trajectory, needs)
        *dims, weights_dim = in_dims[5:]
        if weights_dim is not None or needs[2]:
            # each vmapped row has a gradient of the weights of its own, where the kernels sum over the batch
            return common.vmap_loop(run, info.batch_size, (*dims, weights_dim), tensors)
        *tensors, weights = tensors
        without_weights = lambda *x: run(*x, weights)[:-1]
        grads, out_dims = common.vmap_backward(without_weights, info.batch_size, dims, tensors, trajectory)
        return (*grads, weights.new_empty(info.batch_size, 0)), (*out_dims, 0)
