"""The differentiable momentum op: forward and backward of a backend, as a pair of ``torch.autograd.Function``.

The first Function's backward is the second, whose own backward differentiates the hand-written one in eager torch, so
gradients of every order are those of the specification. Both take canonical arguments (see the package's docstring).
"""

import torch

from unrolled_kernels.ops.momentum import manual, native, reference, triton_kernels

_NATIVE = native.Launcher()
_LAUNCHERS = {"manual": manual, "cpu": _NATIVE, "cuda": _NATIVE, "triton": triton_kernels.LAUNCHER}


def momentum(backend, num_steps, trajectory, eigenvalues, matrix, b, y0, step_sizes, momentum, extrapolation):
    """Run the recurrence on ``backend``, differentiably in every tensor."""
    tensors = (eigenvalues, matrix, b, y0, step_sizes, momentum, extrapolation)
    if backend == "eager":
        return reference.forward(*tensors, num_steps, trajectory)
    return MomentumFunction.apply(backend, num_steps, trajectory, *tensors)


class _Function(torch.autograd.Function):
    @classmethod
    def apply(cls, *args):
        # Function.apply binds default arguments through inspect, several times the cost of a small launch; ours have
        # none. Its base is what it ends up calling where no torch.func transform is active.
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)


class MomentumFunction(_Function):
    """y_k, or y_0 … y_k, of the recurrence; keeps its inputs for backward and nothing else."""

    # torch.compile counts the arguments of forward: no *args here
    @staticmethod
    def forward(backend, num_steps, trajectory, eigenvalues, matrix, b, y0, step_sizes, momentum, extrapolation):
        tensors = (eigenvalues, matrix, b, y0, step_sizes, momentum, extrapolation)
        return _LAUNCHERS[backend].forward(*tensors, num_steps, trajectory)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.num_steps, ctx.trajectory, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_y):
        needs = ctx.needs_input_grad[3:]
        needs_flags = (needs[0], needs[1], any(needs[4:]))
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            grads = MomentumBackwardFunction.apply(
                ctx.backend, ctx.num_steps, ctx.trajectory, needs_flags, grad_y, *ctx.saved_tensors
            )
        else:
            # nothing will differentiate this backward: straight to the launcher
            grads = _LAUNCHERS[ctx.backend].backward(
                grad_y, *ctx.saved_tensors, ctx.num_steps, ctx.trajectory, *needs_flags
            )
        return (None, None, None, *(g if needed else None for g, needed in zip(grads, needs, strict=True)))

    @staticmethod
    def vmap(info, in_dims, backend, num_steps, trajectory, *tensors):
        dims = in_dims[3:]
        sizes = [_batch_size(x, dim) for x, dim in zip(tensors, dims, strict=True)]
        batch = sizes[2]
        folded = (
            # what neither the batch nor vmap varies stays shared
            x if x is None or (dim is None and size == 1 != batch) else _fold(x, dim, info.batch_size, batch)
            for x, dim, size in zip(tensors, dims, sizes, strict=True)
        )
        y = MomentumFunction.apply(backend, num_steps, trajectory, *folded)
        return y.unflatten(int(trajectory), (info.batch_size, batch)), int(trajectory)


class MomentumBackwardFunction(_Function):
    """The gradients of ``MomentumFunction`` as a differentiable function of the cotangent and of the inputs."""

    @staticmethod
    def forward(
        backend, num_steps, trajectory, needs, grad_y, eigenvalues, matrix, b, y0, step_sizes, momentum, extrapolation
    ):
        tensors = (eigenvalues, matrix, b, y0, step_sizes, momentum, extrapolation)
        return _LAUNCHERS[backend].backward(grad_y, *tensors, num_steps, trajectory, *needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.num_steps, ctx.trajectory, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        tensors = ctx.saved_tensors
        present = [i for i, x in enumerate(tensors) if x is not None]

        def gradients(*args):
            full = [None] * len(tensors)
            for i, x in zip(present, args, strict=True):
                full[i] = x
            return manual.backward(*full, ctx.num_steps, ctx.trajectory, *ctx.needs)

        _, vjp = torch.func.vjp(gradients, *(tensors[i] for i in present))
        grads = [None] * len(tensors)
        for i, g in zip(present, vjp(cotangents), strict=True):
            grads[i] = g
        return (None, None, None, None, *grads)

    @staticmethod
    def vmap(info, in_dims, backend, num_steps, trajectory, needs, grad_y, *tensors):
        dims = in_dims[5:]
        sizes = [_batch_size(x, dim) for x, dim in zip(tensors, dims, strict=True)]
        batch = sizes[2]
        # what is shared is repeated: each vmapped row needs a gradient of its own
        folded = [
            None if x is None else _fold(x, dim, info.batch_size, batch) for x, dim in zip(tensors, dims, strict=True)
        ]
        grad_y = _fold(grad_y, in_dims[4], info.batch_size, batch, batch_dim=int(trajectory))
        grads = MomentumBackwardFunction.apply(backend, num_steps, trajectory, needs, grad_y, *folded)
        unfolded = [
            g.expand(info.batch_size, 0) if g.dim() == 1 else _unfold(g, info.batch_size, batch, size)
            for g, size in zip(grads, sizes, strict=True)
        ]
        return tuple(unfolded), (0,) * len(unfolded)


def _batch_size(x, vmap_dim):
    """Size of the batch dimension of x, the first one that is not vmapped; None for None."""
    return None if x is None else x.shape[1 if vmap_dim == 0 else 0]


def _fold(x, vmap_dim, vmap_size, batch, batch_dim=0):
    """Merge the vmapped dimension of x (None: not vmapped) into its batch dimension, expanded to ``batch``."""
    if vmap_dim is None:
        x = x.unsqueeze(batch_dim).expand(*x.shape[:batch_dim], vmap_size, *x.shape[batch_dim:])
    else:
        x = x.movedim(vmap_dim, batch_dim)
    shape = list(x.shape)
    shape[batch_dim + 1] = batch
    return x.expand(shape).flatten(batch_dim, batch_dim + 1)


def _unfold(x, vmap_size, batch, size):
    """Undo ``_fold`` on a gradient; ``size`` is the batch size the argument had, 1 where it was shared."""
    x = x.unflatten(0, (vmap_size, batch))
    return x.sum(1, keepdim=True) if size == 1 != batch else x
