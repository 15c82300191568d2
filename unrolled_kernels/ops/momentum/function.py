"""The differentiable momentum op: forward and backward of a backend, as a pair of ``torch.autograd.Function``.

The first Function's backward is the second, whose own backward differentiates the hand-written one in eager torch, so
gradients of every order are those of the specification. Both take canonical arguments (see the package's docstring).
"""

from unrolled_kernels.ops import common
from unrolled_kernels.ops.common import Function
from unrolled_kernels.ops.momentum import manual, native, reference, triton_ops

# each with a forward and a backward; "manual", the derivation that the kernels implement, is for tests
_LAUNCHERS = {"manual": manual, "cpu": native, "cuda": native, "triton": triton_ops}


def momentum(
    backend,
    matrix,
    eigenvalues,
    observed,
    b,
    y0,
    step_sizes,
    momentum,
    extrapolation,
    num_steps,
    trajectory,
):
    """Run the recurrence on ``backend``, differentiably in every tensor."""
    arguments = (matrix, eigenvalues, observed, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory)
    if backend == "eager":
        return reference.forward(*arguments)
    return MomentumFunction.apply(backend, *arguments)


class MomentumFunction(Function):
    """y_k, or y_0 … y_k, of the recurrence; keeps its inputs for backward and nothing else."""

    # torch.compile counts the arguments of forward: no *args here
    @staticmethod
    def forward(
        backend,
        matrix,
        eigenvalues,
        observed,
        b,
        y0,
        step_sizes,
        momentum,
        extrapolation,
        num_steps,
        trajectory,
    ):
        return _LAUNCHERS[backend].forward(
            matrix, eigenvalues, observed, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, *tensors, ctx.num_steps, ctx.trajectory = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_y):
        needs = ctx.needs_input_grad[1:9]
        arguments = (grad_y, *ctx.saved_tensors, ctx.num_steps, ctx.trajectory, common.mask(needs))
        if common.is_differentiated():
            grads = MomentumBackwardFunction.apply(ctx.backend, *arguments)
        else:
            # nothing will differentiate this backward: straight to the launcher
            grads = _LAUNCHERS[ctx.backend].backward(*arguments)
        return (None, *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None)

    @staticmethod
    def vmap(info, in_dims, backend, *arguments):
        *tensors, num_steps, trajectory = arguments
        run = lambda *tensors: MomentumFunction.apply(backend, *tensors, num_steps, trajectory)
        return common.vmap_forward(run, info.batch_size, in_dims[1:9], tensors, trajectory, b=3)


class MomentumBackwardFunction(Function):
    """The gradients of ``MomentumFunction`` as a differentiable function of the cotangent and of the inputs."""

    @staticmethod
    def forward(
        backend,
        grad_y,
        matrix,
        eigenvalues,
        observed,
        b,
        y0,
        step_sizes,
        momentum,
        extrapolation,
        num_steps,
        trajectory,
        needs,
    ):
        tensors = (matrix, eigenvalues, observed, b, y0, step_sizes, momentum, extrapolation)
        return _LAUNCHERS[backend].backward(grad_y, *tensors, num_steps, trajectory, needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *tensors, ctx.num_steps, ctx.trajectory, ctx.needs = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        gradients = lambda *tensors: manual.backward(*tensors, ctx.num_steps, ctx.trajectory, ctx.needs)
        return (None, *common.second_order(gradients, cotangents, ctx.saved_tensors), None, None, None)

    @staticmethod
    def vmap(info, in_dims, backend, *arguments):
        *tensors, num_steps, trajectory, needs = arguments
        run = lambda *tensors: MomentumBackwardFunction.apply(backend, *tensors, num_steps, trajectory, needs)
        return common.vmap_backward(run, info.batch_size, in_dims[1:10], tensors, trajectory, b=3)
