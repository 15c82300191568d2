"""What the op families share: the Function that launches cheaply, its second order, vmap, and registered ops."""

import contextlib

import torch

from unrolled_kernels import _torch_private
from unrolled_kernels._torch_private import pytree


def matvec(matrix, z):
    """``matrix`` ``[B or 1, d, d]`` times each row of z ``[B, d]``."""
    if matrix.shape[0] == 1:
        return z @ matrix[0].mT
    return (matrix @ z.unsqueeze(-1)).squeeze(-1)


class Function(torch.autograd.Function):
    """The base of every op's pair of Functions, forward and backward."""

    def __init_subclass__(cls):
        cls._launch = _torch_private.launcher(cls)

    @classmethod
    def apply(cls, *args):
        if _torch_private.transforms_are_active():
            return super().apply(*args)
        return cls._launch(*args)


def runs_in_eager():
    """Whether the call is differentiated or translated by what has no rule for the Functions and ops here.

    That is forward mode; under torch.compile every transform of torch.func, since tracing looks into a Function and
    loses its rules; and an export to ONNX. All of them take the plain loop.
    """
    if torch.compiler.is_compiling() and (_torch_private.transforms_are_active() or torch.onnx.is_in_onnx_export()):
        return True
    return _torch_private.forward_mode_is_active()


def is_differentiated():
    """Whether the backward that runs now may itself be differentiated; else it can go straight to the launcher."""
    return torch.is_grad_enabled() or _torch_private.transforms_are_active()


def alive(tensors):
    """Saved tensors, for a backward that is differentiated: torch.func.vjp runs it when its own transform has ended."""
    if torch.compiler.is_compiling():
        return tensors
    return [x if x is None else _torch_private.unwrap_if_dead(x) for x in tensors]


def without_autocast(device_type):
    """Products in the dtype of what is multiplied, also where a backward pass is called under autocast."""
    return torch.autocast(device_type, enabled=False) if is_autocasting(device_type) else contextlib.nullcontext()


def is_autocasting(device_type):
    """Whether torch's own products are in half precision, those of a backward pass that is called now among them."""
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


def mask(needs):
    """The bools ``needs`` as the bits of one int, the first of them the lowest."""
    bits = 0
    for needed in reversed(needs):
        bits = bits << 1 | needed
    return bits


def second_order(manual_backward, cotangents, tensors, *constants):
    """The VJP of a hand-written backward in eager torch: how second-order gradients of every backend are computed.

    Args:
        manual_backward: maps ``(*tensors, *constants)`` to a tuple of gradients, out of place.
        cotangents: of what it returns; None for zeros.
        tensors: some of them may be None.
    Returns:
        The gradients of ``tensors``, None for None.
    """
    present = [i for i, x in enumerate(tensors) if x is not None]

    def gradients(*args):
        full = [None] * len(tensors)
        for i, x in zip(present, args, strict=True):
            full[i] = x
        return manual_backward(*full, *constants)

    with without_autocast(tensors[present[0]].device.type):
        outputs, vjp = torch.func.vjp(gradients, *(tensors[i] for i in present))
        found = vjp(tuple(torch.zeros_like(x) if c is None else c for x, c in zip(outputs, cotangents, strict=True)))
    grads = [None] * len(tensors)
    for i, g in zip(present, found, strict=True):
        grads[i] = g
    return grads


def vmap_forward(run, vmap_size, dims, tensors, trajectory, b):
    """vmap of a forward ``run(*tensors)``: the vmapped dimension becomes part of the batch.

    Args:
        run: maps tensors that begin with a batch dimension to y ``[B, d]`` or ``[k + 1, B, d]``.
        vmap_size, dims: size of the vmapped dimension, and where each tensor has it (None: it has not).
        b: which of the tensors is b, whose batch dimension is never shared.
    Returns:
        y and its vmapped dimension.
    """
    tensors = [_as_row(x, dim) for x, dim in zip(tensors, dims, strict=True)]
    sizes = [_batch_size(x, dim) for x, dim in zip(tensors, dims, strict=True)]
    batch = sizes[b]
    folded = (
        # what neither the batch nor vmap varies stays shared
        x if x is None or (dim is None and size == 1 != batch) else _fold(x, dim, vmap_size, batch)
        for x, dim, size in zip(tensors, dims, sizes, strict=True)
    )
    return run(*folded).unflatten(int(trajectory), (vmap_size, batch)), int(trajectory)


def vmap_backward(run, vmap_size, dims, tensors, trajectory, b):
    """vmap of a backward ``run(grad_y, *tensors)``: it returns a gradient, or an empty one, for each of the tensors."""
    (grad_y, *given), (grad_dim, *dims) = tensors, dims
    tensors = [_as_row(x, dim) for x, dim in zip(given, dims, strict=True)]
    sizes = [_batch_size(x, dim) for x, dim in zip(tensors, dims, strict=True)]
    batch = sizes[b]
    # what is shared is repeated: each vmapped row needs a gradient of its own
    folded = [None if x is None else _fold(x, dim, vmap_size, batch) for x, dim in zip(tensors, dims, strict=True)]
    grads = run(_fold(grad_y, grad_dim, vmap_size, batch, batch_dim=int(trajectory)), *folded)
    unfolded = [
        g.expand(vmap_size, 0) if g.dim() == 1 else _unfold(g, vmap_size, batch, size)
        for g, size in zip(grads, sizes, strict=False)
    ]
    unfolded = [
        g if x is row or g.numel() == 0 else g.reshape(vmap_size)
        for g, x, row in zip(unfolded, given, tensors, strict=False)
    ]
    return tuple(unfolded), (0,) * len(unfolded)


def _as_row(x, vmap_dim):
    """A tensor of one number as ``[1, 1]``, whether vmapped or not; others, and None, as they are."""
    return x if x is None or x.dim() > (vmap_dim is not None) else x.reshape(*x.shape, 1, 1)


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


def vmap_loop(run, vmap_size, dims, tensors):
    """vmap as a loop over ``run(*tensors)``, for arguments that the kernels share by the whole batch."""
    pick = lambda x, dim, i: x if dim is None else x.select(dim, i)
    results = [run(*(pick(x, dim, i) for x, dim in zip(tensors, dims, strict=True))) for i in range(vmap_size)]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(x) for x in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def other_sources(found):
    """The error of an extension that does not fit these sources, by what was found."""
    return RuntimeError(
        f"unrolled_kernels: {found}: it was built from other sources than these; build it again (`make build`, or "
        "`pip install .`)"
    )


def register(name, fake, backward=None, manual_backward=None, arguments=None):
    """Give the op ``unrolled_kernels::name`` a fake kernel and gradients.

    Args:
        backward, manual_backward: what computes the gradients, as an op and hand-written in torch, where a program
            calls the op itself: torch.export keeps what a Function's forward calls, and drops its backward. None: the
            op is not differentiable.
        arguments: the names of what the op is given here, separated by spaces. None: it is defined here too.
    Returns:
        The op as it is called inside a Function.
    Raises:
        RuntimeError: the extension does not have the op, or has one of other arguments: it was built from the sources
            of another version.
    """
    if not hasattr(torch.ops.unrolled_kernels, name):
        raise other_sources(f"the compiled extension has no op {name}")
    op = getattr(torch.ops.unrolled_kernels, name).default
    taken = " ".join(argument.name for argument in op._schema.arguments)
    if arguments is not None and taken != arguments:
        raise other_sources(f"the compiled op {name} takes ({taken}), expected ({arguments})")
    torch.library.register_fake(f"unrolled_kernels::{name}", fake)
    if backward is None:
        torch.library.register_autograd(f"unrolled_kernels::{name}", _not_differentiable)
    else:
        gradients = lambda ctx, grad_y: _gradients(ctx, grad_y, backward, manual_backward)
        torch.library.register_autograd(f"unrolled_kernels::{name}", gradients, setup_context=_keep_inputs)

    def call(*arguments):
        if torch.compiler.is_compiling():
            return op(*arguments)
        with _torch_private.below_autograd():
            return op(*arguments)

    return call


def _keep_inputs(ctx, inputs, output):
    *tensors, ctx.num_steps, ctx.trajectory = inputs
    leaves, ctx.structure = pytree.tree_flatten(tensors)  # of which one may be a list
    ctx.save_for_backward(*leaves)


def _gradients(ctx, grad_y, backward, manual_backward):
    if torch.is_grad_enabled():
        backward = manual_backward  # which can be differentiated in turn
    needs = [any(x) if isinstance(x, (list, tuple)) else bool(x) for x in ctx.needs_input_grad[:-2]]
    tensors = pytree.tree_unflatten(ctx.saved_tensors, ctx.structure)
    grads = backward(grad_y, *tensors, ctx.num_steps, ctx.trajectory, mask(needs))
    # nothing in the place of a list is a list of nothing
    nothing = [[None] * len(x) if isinstance(x, (list, tuple)) else None for x in tensors]
    found = (g if needed else none for g, none, needed in zip(grads, nothing, needs, strict=True))
    return (*found, None, None)


def fake_gradients(tensors, needs, like):
    """Shapes and dtypes of the gradients of ``tensors``: empty, and like another tensor, where a bit is not set."""
    return [
        like.new_empty(0) if x is None or not needs >> i & 1 else x.new_empty(x.shape) for i, x in enumerate(tensors)
    ]


def zero_gradients(tensors, needs, like):
    """What ``fake_gradients`` describes, of zeros."""
    return [g.zero_() for g in fake_gradients(tensors, needs, like)]


def _not_differentiable(ctx, *grads):
    raise RuntimeError(
        "unrolled_kernels: the op of a backward pass is not differentiable by itself; call the layer or the function "
        "that it belongs to, with create_graph=True"
    )
