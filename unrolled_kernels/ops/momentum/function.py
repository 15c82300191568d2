"""The differentiable momentum op: forward and backward of a backend, as a pair of ``torch.autograd.Function``.

The first Function's backward is the second, whose own backward differentiates the hand-written one in eager torch, so
gradients of every order are those of the specification. Both take canonical arguments (see the package's docstring).
"""

from unrolled_kernels.ops import common
from unrolled_kernels.ops.common import Function
from unrolled_kernels.ops.momentum import manual, native, reference, triton_ops

# each with a forward and a backward; "manual", the derivation that the kernels implement, is for tests
_LAUNCHERS = {"manual": manual, "cpu": native, "cuda": native.Cuda, "triton": triton_ops}


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
    mu,
    lower,
    upper,
    weight,
    threshold,
    num_steps,
    trajectory,
):
    """Run the recurrence on ``backend``, differentiably in every tensor.

    Args:
        mu: Nesterov's method for μ, shaped like a coefficient; ``momentum`` and ``extrapolation`` are then None. That
            both follow from it costs no node of autograd's graph.
    """
    if backend != "eager" and not common.runs_in_eager():
        return MomentumFunction.apply(
            backend,
            matrix,
            eigenvalues,
            observed,
            b,
            y0,
            step_sizes,
            momentum,
            extrapolation,
            mu,
            lower,
            upper,
            weight,
            threshold,
            num_steps,
            trajectory,
        )
    tensors = (matrix, eigenvalues, observed, b, y0, step_sizes, momentum, extrapolation, mu)
    return reference.forward(*tensors, lower, upper, weight, threshold, num_steps, trajectory)


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
        mu,
        lower,
        upper,
        weight,
        threshold,
        num_steps,
        trajectory,
    ):
        tensors = (matrix, eigenvalues, observed, b, y0, step_sizes, momentum, extrapolation, mu)
        return _LAUNCHERS[backend].forward(*tensors, lower, upper, weight, threshold, num_steps, trajectory)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, *tensors, num_steps, trajectory = inputs
        ctx.constants = num_steps, trajectory
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_y):
        # written out: a loop over the thirteen takes as long as a small kernel
        _, Q, q, x, b, y0, phi, beta, gamma, mu, lower, upper, weight, tau, _, _ = ctx.needs_input_grad
        needs = Q | q << 1 | x << 2 | b << 3 | y0 << 4 | phi << 5 | beta << 6 | gamma << 7 | mu << 8
        needs |= lower << 9 | upper << 10 | weight << 11 | tau << 12
        arguments = (grad_y, *ctx.saved_tensors, *ctx.constants, needs)
        if common.is_differentiated():
            grads = MomentumBackwardFunction.apply(ctx.backend, *arguments)
        else:
            # nothing will differentiate this backward: straight to the launcher
            grads = _LAUNCHERS[ctx.backend].backward(*arguments)
        d_matrix, d_eigenvalues, d_observed, db, dy0, d_phi, d_beta, d_gamma, d_mu, *d_prox = grads
        d_lower, d_upper, d_weight, d_tau = d_prox
        return (
            None,
            d_matrix if Q else None,
            d_eigenvalues if q else None,
            d_observed if x else None,
            db if b else None,
            dy0 if y0 else None,
            d_phi if phi else None,
            d_beta if beta else None,
            d_gamma if gamma else None,
            d_mu if mu else None,
            d_lower if lower else None,
            d_upper if upper else None,
            d_weight if weight else None,
            d_tau if tau else None,
            None,
            None,
        )

    @staticmethod
    def vmap(info, in_dims, backend, *arguments):
        *tensors, num_steps, trajectory = arguments
        run = lambda *tensors: MomentumFunction.apply(backend, *tensors, num_steps, trajectory)
        return common.vmap_forward(run, info.batch_size, in_dims[1:14], tensors, trajectory, b=3)


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
        mu,
        lower,
        upper,
        weight,
        threshold,
        num_steps,
        trajectory,
        needs,
    ):
        tensors = (matrix, eigenvalues, observed, b, y0, step_sizes, momentum, extrapolation, mu)
        prox = (lower, upper, weight, threshold)
        return _LAUNCHERS[backend].backward(grad_y, *tensors, *prox, num_steps, trajectory, needs)

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
        return common.vmap_backward(run, info.batch_size, in_dims[1:15], tensors, trajectory, b=3)
