"""The differentiable momentum op: forward and backward of a backend, as a pair of ``torch.autograd.Function``.

The first Function's backward is the second, whose own backward differentiates the hand-written one in eager torch, so
gradients of every order are those of the specification. Where there are kernels for it (``_has_second_order``), they
take the place of that for gradients of second order. Both Functions take canonical arguments (see the
package's docstring).

Where csrc/autograd was built, a CPU's calls of plain tensors go to its nodes, which are both Functions in C++: at
(B, d, k) = (50, 5, 30) Python's part of autograd takes longer than the kernels. What the first's backward cannot do it
hands to the second Function here.
"""

import functools
import math
import os

import torch

from unrolled_kernels import _backend, _torch_private
from unrolled_kernels.ops import common
from unrolled_kernels.ops.common import Function
from unrolled_kernels.ops.momentum import manual, native, reference, triton_ops

# each with a forward and a backward; "manual", the derivation that the kernels implement, is for tests
LAUNCHERS = {"manual": manual, "cpu": native, "cuda": native.Cuda, "triton": triton_ops}


def momentum(
    backend,
    matrix,
    diagonal,
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
    tensors = (matrix, diagonal, observed, b, y0, step_sizes, momentum, extrapolation, mu)
    prox = (lower, upper, weight, threshold)
    arguments = (*tensors, *prox, num_steps, trajectory)
    if backend == "eager" or common.runs_in_eager():
        return reference.forward(*arguments)
    # on a GPU nobody reads v_t off y_(t+1)
    reads_iterates = backend == "cpu" or (backend == "cuda" and weight is None and threshold is None)
    may_keep = reads_iterates and matrix is not None and matrix.shape[0] == 1 and not trajectory
    if may_keep and _keeps_iterates(tensors, prox, num_steps):
        return KeptMomentumFunction.apply(backend, *tensors, *prox, num_steps, True)[0]
    if torch.compiler.is_compiling():
        # the op and its own gradients: of a Function the compiler does not see that what it saved is written into
        return LAUNCHERS[backend].forward(*arguments)
    if backend == "cpu":
        y = in_cpp(*arguments)
        if y is not None:
            return y
    return MomentumFunction.apply(backend, *arguments)


# what is differentiated, as csrc/autograd has it: these, or the number of the last steps
ALL_STEPS, MINIMIZER = 0, -1


def in_cpp(*arguments, differentiated=ALL_STEPS):
    """y of the canonical arguments on a CPU, by the node in C++; None where it leaves them to Python or is absent."""
    return None if _node is None else _node.canonical(*arguments, differentiated)


def dense(Q, b, step_size, momentum, extrapolation, mu, num_steps, trajectory, differentiated):
    """What ``momentum`` gives on a CPU for Q ``[B, d, d]``, b ``[B, d]`` and numbers, if a node in C++ can tell.

    Args:
        step_size, momentum, extrapolation, mu: floats or tensors of one number in the dtype of b; None where absent.
        differentiated: as ``ALL_STEPS``.
    Returns:
        y, or None where the arguments are others, or not all of them plain tensors: then ``momentum`` has to be called.
    """
    if _node is None or torch.compiler.is_compiling():
        return None
    return _node.dense(Q, b, step_size, momentum, extrapolation, mu, num_steps, trajectory, differentiated)


# with one Q for the batch, the iterates are kept for backward where they take no more bytes than this
KEPT_BYTES = int(os.environ.get("UNROLLED_KERNELS_KEPT_BYTES") or 2**28)


def _keeps_iterates(tensors, prox, num_steps):
    """Whether, with one matrix for the batch, backward reads the iterates instead of replaying them.

    A replay takes one product in four; the iterates are half of what the eager loop keeps.
    """
    (_, diagonal, _, b, *_), (lower, upper, _, _) = tensors, prox
    # y_(t+1) shows on which side of a soft threshold v_t was, but not whether it was on a bound or beyond
    if diagonal is not None or lower is not None or upper is not None:
        return False
    if torch.compiler.is_compiling() or _torch_private.transforms_are_active() or not torch.is_grad_enabled():
        return False
    size = (num_steps + 1) * b.numel() * b.element_size()
    # where products are not what takes the time, or the iterates are rounded, nothing is gained
    if not (b.shape[0] > 1 and b.shape[1] > 128 and b.element_size() >= 4 and size <= KEPT_BYTES):
        return False
    return any(x is not None and x.requires_grad for x in (*tensors, *prox))


class MomentumFunction(Function):
    """y_k, or y_0 … y_k, of the recurrence; keeps its inputs for backward and nothing else."""

    # torch.compile counts the arguments of forward: no *args here
    @staticmethod
    def forward(
        backend,
        matrix,
        diagonal,
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
        tensors = (matrix, diagonal, observed, b, y0, step_sizes, momentum, extrapolation, mu)
        return LAUNCHERS[backend].forward(*tensors, lower, upper, weight, threshold, num_steps, trajectory)

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
        saved = ctx.saved_tensors
        arguments = (grad_y, *saved[:13], *ctx.constants, needs)
        grads = run_backward(ctx.backend, *arguments, *saved[13:])
        d_matrix, d_diagonal, d_observed, db, dy0, d_phi, d_beta, d_gamma, d_mu, *d_prox = grads
        d_lower, d_upper, d_weight, d_tau = d_prox
        return (
            None,
            d_matrix if Q else None,
            d_diagonal if q else None,
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


def run_backward(backend, *arguments):
    """The gradients of all steps, differentiable where they may be differentiated."""
    if common.is_differentiated():
        return _differentiable_backward(backend, *arguments[:17])
    # nothing will differentiate this backward: straight to the launcher
    return LAUNCHERS[backend].backward(*arguments)


class KeptMomentumFunction(MomentumFunction):
    """y_k, and for backward y_0 … y_k, which have no gradient."""

    @staticmethod
    def forward(*arguments):
        ys = MomentumFunction.forward(*arguments)
        # not a part of all the others, which live as long as it does
        return ys[-1].clone(), ys

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, *tensors, num_steps, _ = inputs
        ctx.constants = num_steps, False
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx, grad_y, _):
        return MomentumFunction.backward(ctx, grad_y)


def known(function):
    """The Function with the gradients of another whose y somebody has computed: its first argument is (backend, y)."""

    def forward(known, *arguments):
        return known[1]

    def setup_context(ctx, inputs, output):
        (backend, _), *arguments = inputs
        function.setup_context(ctx, (backend, *arguments), output)

    own = {"forward": staticmethod(forward), "setup_context": staticmethod(setup_context)}
    # the node of a graph is named after it
    return type(function)(f"Known{function.__name__}", (function,), own)


_KnownMomentumFunction = known(MomentumFunction)


def of_known_iterate(y, backend, *arguments):
    """y, with the gradients that ``momentum`` would have for its tensors and number of steps."""
    return _KnownMomentumFunction.apply((backend, y), *arguments, False)


# bits of `needs`
_COEFFICIENTS = 0b1111 << 5


def _differentiable_backward(backend, *arguments):
    """The gradients as torch differentiates them, what μ and tikhonov's f stand for as ordinary functions of them."""
    arguments = (*common.alive(arguments[:14]), *arguments[14:])
    grad_y, *tensors = arguments[:14]
    num_steps, trajectory, needs = arguments[14:]
    plain = not (_torch_private.transforms_are_active() or common.is_autocasting(grad_y.device.type))
    if backend in _LARGEST and is_spectral(tensors) and num_steps > 0 and plain:
        # the rotations are torch's
        run = lambda *tensors: in_eigenbasis(momentum, backend, *tensors, num_steps, trajectory)
        return backward_in_torch(run, grad_y, tensors, needs)
    if backend != "cpu" or needs & _COEFFICIENTS:
        run = lambda *args: MomentumBackwardFunction.apply(backend, *args[:9], None, *args[9:])
        return manual.with_nesterov(_of_diagonal(run) if backend in _LARGEST else run)(*arguments)
    # the kernels of second order take μ where no gradient of a coefficient is differentiated
    return _of_diagonal(functools.partial(MomentumBackwardFunction.apply, "cpu"))(*arguments)


def is_spectral(tensors):
    """Whether the canonical tensors are those of a ``Spectral`` Q."""
    return tensors[0] is not None and tensors[1] is not None


def in_eigenbasis(run, backend, *arguments):
    """What ``run`` gives for a spectral Q, as a diagonal one between rotations that torch differentiates."""
    matrix, diagonal, _, b, y0, *rest = arguments
    storage, compute, trajectory = b.dtype, rest[0].dtype, rest[-1]
    matrix, diagonal, b, y0 = (x if x is None else x.to(compute) for x in (matrix, diagonal, b, y0))
    b_hat, y0_hat = (x if x is None else common.matvec(matrix.mT, x) for x in (b, y0))
    y_hat = run(backend, None, diagonal, None, b_hat, y0_hat, *rest)
    y = common.matvec(matrix, y_hat[1:] if trajectory else y_hat)
    if trajectory:
        # y_0 itself is never rotated
        y = torch.cat([(torch.zeros_like(b) if y0 is None else y0).unsqueeze(0), y])
    return y.to(storage)


def backward_in_torch(run, grad_y, tensors, needs):
    """The gradients ``needs`` of the 13 canonical tensors, None for the others, as torch differentiates ``run``."""
    wanted = [i for i in range(13) if needs >> i & 1]
    grads = [None] * 13
    with torch.enable_grad(), common.without_autocast(grad_y.device.type):
        # as variables of their own: a tensor may follow from another
        tensors = [x if x is None else x.view_as(x) for x in tensors]
        y = run(*tensors)
        found = torch.autograd.grad(
            y, [tensors[i] for i in wanted], grad_y, create_graph=True, allow_unused=True, materialize_grads=True
        )
    for i, g in zip(wanted, found, strict=True):
        grads[i] = g
    return grads


def _of_diagonal(backward):
    """A backward that takes tikhonov's f, g and x too, beside one that takes q and b only."""

    def run(grad_y, matrix, diagonal, observed, b, y0, phi, *rest):
        if observed is None or b.dtype != phi.dtype:
            return backward(grad_y, matrix, diagonal, observed, b, y0, phi, *rest)
        *rest, needs = rest
        q, shifted = 1 + diagonal * diagonal, b - observed
        b_needed = 0b1000 if needs & 0b1100 else 0
        grads = backward(grad_y, None, q, None, shifted, y0, phi, *rest, needs & ~0b1100 | b_needed)
        nothing, dq, db = grads[0], grads[1], grads[3]
        df = 2 * diagonal * dq if needs & 0b10 else dq
        dx, dg = -db if needs & 0b100 else nothing, db if needs & 0b1000 else nothing
        return (nothing, df, dx, dg, *grads[4:])

    return run


class MomentumBackwardFunction(Function):
    """The gradients of ``MomentumFunction`` as a differentiable function of the cotangent and of the inputs."""

    @staticmethod
    def forward(
        backend,
        grad_y,
        matrix,
        diagonal,
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
        tensors = (matrix, diagonal, observed, b, y0, step_sizes, momentum, extrapolation, mu)
        prox = (lower, upper, weight, threshold)
        grads = LAUNCHERS[backend].backward(grad_y, *tensors, *prox, num_steps, trajectory, needs)
        # a Function's outputs are tensors
        return tuple(b.new_empty(0) if g is None else g for g in grads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, *tensors, ctx.num_steps, ctx.trajectory, ctx.needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        if _has_second_order(ctx.backend, ctx.saved_tensors, ctx.num_steps):
            return _second_order(ctx, cotangents)
        constants = ctx.num_steps, ctx.trajectory, ctx.needs
        return (None, *_second_order_in_torch(cotangents, *ctx.saved_tensors, *constants), None, None, None)

    @staticmethod
    def vmap(info, in_dims, backend, *arguments):
        *tensors, num_steps, trajectory, needs = arguments
        run = lambda *tensors: MomentumBackwardFunction.apply(backend, *tensors, num_steps, trajectory, needs)
        return common.vmap_backward(run, info.batch_size, in_dims[1:15], tensors, trajectory, b=3)


def _second_order_in_torch(cotangents, *arguments):
    """The gradients of a backward pass's 14 tensors, differentiable where they may be differentiated."""
    tensors, constants = arguments[:14], arguments[14:]
    return common.second_order(lambda *tensors: manual.backward(*tensors, *constants), cotangents, tensors)


def _has_second_order(backend, tensors, num_steps):
    """Whether the kernels of second order take the arguments of a backward pass, and nothing differentiates them."""
    _, matrix, _, observed, b, _, phi, _, _, _, *prox = tensors
    if is_spectral(tensors[1:]) or observed is not None or prox != [None] * 4 or common.is_differentiated():
        return False
    if backend not in _LARGEST or num_steps == 0 or b.dtype != phi.dtype:
        return False
    return matrix is None or b.shape[1] <= _LARGEST[backend](b.dtype, shared=matrix.shape[0] != b.shape[0])


# the largest d of a dense Q that they take: beyond, one Q for the batch is faster in torch's products of matrices, and
# on a GPU there is no tile (csrc/cuda/tile.cuh)
_LARGEST = {
    "cpu": lambda dtype, shared: 40 if shared else math.inf,
    "cuda": lambda dtype, shared: 128 if dtype == torch.float32 else 64,
}


def _second_order(ctx, cotangents):
    """What ``MomentumBackwardFunction.backward`` returns, by the kernels."""
    grad_y, matrix, diagonal, _, b, y0, *coefficients, mu = ctx.saved_tensors[:10]
    # an output that was not needed is empty
    cotangents = [None if c is None or c.numel() == 0 else c for c in cotangents[:8]]
    d_matrix, d_diagonal, _, db, dy0, *d_coefficients = cotangents
    if any(c is not None for c in d_coefficients):
        d_coefficients = [
            torch.zeros_like(x) if c is None and x is not None else c
            for c, x in zip(d_coefficients, coefficients, strict=True)
        ]
    _, *needed = ctx.needs_input_grad[:11]
    needs = common.mask((*needed[:3], *needed[4:]))
    inputs = grad_y, matrix, diagonal, b, y0, *coefficients, mu
    arguments = *inputs, d_matrix, d_diagonal, db, dy0, *d_coefficients
    grads = native.second_order(*arguments, ctx.num_steps, ctx.trajectory, needs)
    grads = [g if needs >> i & 1 else None for i, g in enumerate(grads)]
    return (None, *grads[:3], None, *grads[3:], *[None] * 7)


_node = _backend.autograd_extension()


def set_python_backward(last_steps, minimizer):
    """Hand the node in C++ what it leaves to Python: ``run_backward`` and the like of the other gradients."""
    if _node is not None:
        all_steps = functools.partial(run_backward, "cpu")
        try:
            _node.set_python_backward(all_steps, last_steps, minimizer, _second_order_in_torch)
        except RuntimeError as error:
            raise common.other_sources("the compiled autograd node wants other functions") from error
