"""The differentiable momentum op: forward and backward of a backend, as a pair of ``torch.autograd.Function``.

The first Function's backward is the second, whose own backward differentiates the hand-written one in eager torch, so
gradients of every order are those of the specification. Both take canonical arguments (see the package's docstring).
"""

import functools

from unrolled_kernels.ops import common
from unrolled_kernels.ops.common import Function
from unrolled_kernels.ops.momentum import manual, native, reference, triton_kernels

_NATIVE = native.Launcher()
_LAUNCHERS = {"manual": manual, "cpu": _NATIVE, "cuda": _NATIVE, "triton": triton_kernels.LAUNCHER}


def momentum(backend, num_steps, trajectory, eigenvalues, matrix, b, y0, step_sizes, momentum, extrapolation, observed):
    """Run the recurrence on ``backend``, differentiably in every tensor."""
    tensors = (eigenvalues, matrix, b, y0, step_sizes, momentum, extrapolation)
    if backend == "eager":
        return reference.forward(*tensors, num_steps, trajectory, observed)
    return MomentumFunction.apply(backend, num_steps, trajectory, *tensors, observed)


class MomentumFunction(Function):
    """y_k, or y_0 … y_k, of the recurrence; keeps its inputs for backward and nothing else."""

    # torch.compile counts the arguments of forward: no *args here
    @staticmethod
    def forward(
        backend, num_steps, trajectory, eigenvalues, matrix, b, y0, step_sizes, momentum, extrapolation, observed
    ):
        tensors = (eigenvalues, matrix, b, y0, step_sizes, momentum, extrapolation)
        return _LAUNCHERS[backend].forward(*tensors, num_steps, trajectory, observed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.num_steps, ctx.trajectory, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_y):
        needs = ctx.needs_input_grad[3:]
        needs_flags = (needs[0], needs[1], any(needs[4:7]))
        if common.is_differentiated():
            grads = MomentumBackwardFunction.apply(
                ctx.backend, ctx.num_steps, ctx.trajectory, needs_flags, grad_y, *ctx.saved_tensors
            )
        else:
            # nothing will differentiate this backward: straight to the launcher
            *tensors, observed = ctx.saved_tensors
            grads = _LAUNCHERS[ctx.backend].backward(
                grad_y, *tensors, ctx.num_steps, ctx.trajectory, *needs_flags, observed
            )
        # what was observed counts against b
        grads = (*grads, -grads[2] if needs[7] else None)
        return (None, None, None, *(g if needed else None for g, needed in zip(grads, needs, strict=True)))

    @staticmethod
    def vmap(info, in_dims, backend, num_steps, trajectory, *tensors):
        run = functools.partial(MomentumFunction.apply, backend, num_steps, trajectory)
        return common.vmap_forward(run, info.batch_size, in_dims[3:], tensors, trajectory)


class MomentumBackwardFunction(Function):
    """The gradients of ``MomentumFunction`` as a differentiable function of the cotangent and of the inputs."""

    @staticmethod
    def forward(
        backend,
        num_steps,
        trajectory,
        needs,
        grad_y,
        eigenvalues,
        matrix,
        b,
        y0,
        step_sizes,
        momentum,
        extrapolation,
        observed,
    ):
        tensors = (eigenvalues, matrix, b, y0, step_sizes, momentum, extrapolation)
        return _LAUNCHERS[backend].backward(grad_y, *tensors, num_steps, trajectory, *needs, observed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.num_steps, ctx.trajectory, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        def gradients(*tensors):
            *tensors, observed = tensors
            return manual.backward(*tensors, ctx.num_steps, ctx.trajectory, *ctx.needs, observed)

        return (None, None, None, None, *common.second_order(gradients, cotangents, ctx.saved_tensors))

    @staticmethod
    def vmap(info, in_dims, backend, num_steps, trajectory, needs, *tensors):
        run = functools.partial(MomentumBackwardFunction.apply, backend, num_steps, trajectory, needs)
        return common.vmap_backward(run, info.batch_size, in_dims[4:], tensors, trajectory)
