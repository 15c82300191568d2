"""Gradients other than those of all k steps: truncated, and implicit.

Both are derived in ``manual``, take the canonical arguments of the package's docstring, and are made of the op itself,
so they hold for every backend; on a CPU kernels take most of them (``has_kernel``).
"""

import functools
import math

import torch

from unrolled_kernels import _torch_private
from unrolled_kernels.ops import common
from unrolled_kernels.ops.common import Function
from unrolled_kernels.ops.momentum import function, native, reference
from unrolled_kernels.ops.momentum.function import momentum as run
from unrolled_kernels.ops.momentum.reference import NO_PROX, Prox

# positions among the tensors; a threshold is a coefficient, too
_B, _Y0, _PHI, _MOMENTUM, _MU = 3, 4, 5, 6, 8
_COEFFICIENTS = (5, 6, 7, 8, 12)


def op(differentiated):
    """``momentum`` with the gradients of ``function.ALL_STEPS``, ``MINIMIZER`` or so many of the last steps."""
    if differentiated == function.ALL_STEPS:
        return run
    if differentiated == function.MINIMIZER:
        return implicit
    return functools.partial(truncated, backward_steps=differentiated)


def truncated(backend, *arguments, backward_steps):
    """``momentum`` of which the last ``backward_steps`` are differentiated, and what comes before is constant."""
    *tensors, num_steps, trajectory = arguments
    first = num_steps - backward_steps
    if first <= 0:
        return run(backend, *arguments)
    rounded = tensors[_B].dtype != tensors[_PHI].dtype
    # a diagonal or spectral Q goes through the first steps once more, a dense one keeps what they come to
    has_kernel = tensors[1] is not None or not (rounded or trajectory)
    if backend == "cpu" and has_kernel and not _is_transformed():
        y = function.in_cpp(*arguments, differentiated=backward_steps)
        return TruncatedFunction.apply(*arguments, first) if y is None else y
    if rounded:
        # the iterate in between is not
        return _in_compute_dtype(truncated, backend, *arguments, backward_steps=backward_steps)
    return _composed(backend, tensors, num_steps, trajectory, backward_steps)


def _is_transformed():
    return torch.compiler.is_compiling() or _torch_private.transforms_are_active() or common.runs_in_eager()


def _composed(backend, tensors, num_steps, trajectory, backward_steps, as_constant=lambda y: y):
    """``truncated`` as calls of the op; y_(k-n) and y_(k-n-1) are made constant."""
    if function.is_spectral(tensors):
        return _composed_in_eigenbasis(backend, tensors, num_steps, trajectory, backward_steps)
    first, previous = num_steps - backward_steps, None
    with torch.no_grad():
        begun = run(backend, *_steps(tensors, 0, first), first, trajectory)
        if tensors[_MOMENTUM] is not None or tensors[_MU] is not None:
            # the last step goes on as momentum
            shorter = (*_steps(tensors, 0, first - 1), first - 1)
            previous = begun[-2] if trajectory else run(backend, *shorter, False)
    # detached: forward mode knows no torch.no_grad
    begun, previous = (x if x is None else x.detach() for x in (begun, previous))
    start = as_constant(begun[-1] if trajectory else begun)
    previous = previous if previous is None else as_constant(previous)
    last = _last_steps(backend, _steps(tensors, first, num_steps), start, previous, backward_steps, trajectory)
    return torch.cat([begun, last[1:]]) if trajectory else last


def _composed_in_eigenbasis(backend, tensors, num_steps, trajectory, backward_steps):
    """``_composed`` of a spectral Q: y_t is what is constant, and not ŷ_t = Rᵀy_t."""
    matrix = tensors[0]
    rotate, back = (lambda x, R=R: common.matvec(R, x) for R in (matrix.mT, matrix))

    def as_constant(y_hat):
        # a value to which no rotation adds an error, with the derivatives of one
        with torch.no_grad():
            y = back(y_hat)
        rotated = rotate(y.detach())
        return y_hat + (rotated - rotated.detach())

    b_hat, y0_hat = (x if x is None else rotate(x) for x in tensors[_B:_PHI])
    diagonal = [None, tensors[1], None, b_hat, y0_hat, *tensors[_PHI:]]
    y_hat = _composed(backend, diagonal, num_steps, trajectory, backward_steps, as_constant)
    if not trajectory:
        return back(y_hat)
    # y_0 itself is never rotated
    begin = torch.zeros_like(tensors[_B]) if tensors[_Y0] is None else tensors[_Y0]
    before, after = back(y_hat[1:]).tensor_split([num_steps - backward_steps])
    return torch.cat([begin.detach().unsqueeze(0), before.detach(), after])


def _last_steps(backend, tensors, begun, previous, num_steps, trajectory):
    """``num_steps`` from y_0 = ``begun``, and y_{-1} = ``previous`` where there is momentum."""
    tensors[_Y0] = begun
    if previous is None:
        return run(backend, *tensors, num_steps, trajectory)
    ys = _steps_with_momentum(backend, tensors, previous, num_steps)
    return torch.stack(ys) if trajectory else ys[-1]


class TruncatedFunction(Function):
    """The last steps on a CPU; keeps its inputs, and where they begin if Q is dense."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, num_steps, trajectory, first = arguments
        if tensors[1] is not None:
            y, *begun = native.forward(*tensors, num_steps, trajectory), None, None
        else:
            y, *begun = native.begun(tensors[0], *tensors[_B:], num_steps, first)
        ctx.constants = num_steps, trajectory
        ctx.first = first
        ctx.save_for_backward(*tensors, *begun)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        *tensors, y_begun, m_begun = ctx.saved_tensors
        needs = common.mask(ctx.needs_input_grad[:13])
        grads = _backward_of_last_steps(grad_y, *tensors, *ctx.constants, needs, ctx.first, y_begun, m_begun)
        return (*grads, None, None, None)


def _backward_of_last_steps(grad_y, *arguments):
    """Gradients of the 13 tensors, None where they are not needed, for what the forward pass left of step ``first``."""
    *tensors, num_steps, trajectory, needs, first = arguments[:17]
    begun = arguments[17:]
    if not common.is_differentiated():
        return native.backward(grad_y, *tensors, num_steps, trajectory, needs, None, first, *begun)

    def last_steps(backend, *arguments):
        *tensors, num_steps, trajectory = arguments
        return _composed(backend, tensors, num_steps, trajectory, num_steps - first)

    run = lambda *tensors: _in_compute_dtype(last_steps, "cpu", *tensors, num_steps, trajectory)
    return function.backward_in_torch(run, grad_y, tensors, needs)


def _in_compute_dtype(function, backend, *arguments, **options):
    """What ``function`` gives for the same numbers in the compute dtype, rounded once."""
    tensors = [x if x is None else x.to(arguments[_PHI].dtype) for x in arguments[: _Y0 + 1]]
    return function(backend, *tensors, *arguments[_Y0 + 1 :], **options).to(arguments[_B].dtype)


def _steps_with_momentum(backend, tensors, previous, num_steps):
    """The list y_0 … y_n from y_0 and y_{-1} = ``previous``, each step one of gradient descent from z_t.

    y_{t+1} = p_t(z_t - φ_t (Q z_t + b) + (β_t - γ_t) m_t)
    """
    matrix, diagonal, observed, b, y, phi, beta, gamma, mu, *prox = tensors
    if mu is not None:
        beta = gamma = reference.nesterov_momentum(phi, mu)
    prox, ys = Prox(*prox), [y]
    phi, betas, gammas = (reference.columns(c, num_steps) for c in (phi, beta, gamma))
    taus = reference.thresholds(prox, phi, num_steps)
    for t in range(num_steps):
        m = ys[t] - previous
        gamma_t = gammas[t]
        # where γ is learned, by itself: through z less m its gradient would be a difference that cancels
        by_itself = beta is not gamma and gamma_t.requires_grad
        if by_itself:
            gamma_t = gamma_t.detach()
        z = ys[t] + gamma_t * m
        v = run(backend, matrix, diagonal, observed, b, z, phi[t], None, None, None, *NO_PROX, 1, False)
        if beta is not gamma:
            v = v + (betas[t] - gamma_t) * m
        if by_itself:
            v = v - (gammas[t] - gamma_t) * phi[t] * _times_Q(matrix, diagonal, observed, m)
        previous = ys[t]
        ys.append(reference.proximal_map(v, prox, taus[t]))
    return ys


def _steps(tensors, first, last):
    """The tensors of the steps ``first`` … ``last - 1``."""
    tensors = list(tensors)
    for i in _COEFFICIENTS:
        c = tensors[i]
        if c is not None and c.dim() == 2 and c.shape[1] != 1:
            tensors[i] = c[:, first:last]
    return tensors


def implicit(backend, *arguments):
    """``momentum`` with the gradients that its last iterate would have if it were the minimizer."""
    *tensors, num_steps, _ = arguments
    if tensors[_B].dtype != tensors[_PHI].dtype:
        # the solution for ȳ may be larger than any gradient
        return _in_compute_dtype(implicit, backend, *arguments)
    matrix, diagonal, observed, b, _, *schedule = tensors[:9]
    has_kernel = backend == "cpu" and not _is_transformed()
    if has_kernel:
        y = function.in_cpp(*arguments, differentiated=function.MINIMIZER)
        if y is not None:
            return y
    elif function.is_spectral(tensors) and num_steps > 0:
        # y_0 itself is never rotated
        return function.in_eigenbasis(implicit, backend, *arguments)
    if not (common.runs_in_eager() or torch.compiler.is_exporting()):
        return ImplicitFunction.apply(backend, *tensors, num_steps)
    # forward mode and exported programs keep no Function: y_k + K (Q y_k + b), whose value is y_k, and of which all but
    # the Q and the b that are seen is constant. K c, k steps of the method with c for b, stands for -Q⁻¹c
    constant = lambda x: x if x is None else x.detach()
    y = run(backend, *map(constant, tensors), num_steps, False).detach()
    held = _Held(y, Prox(*tensors[9:]))
    y = held.with_bounds(y)
    gradient = _energy_gradient(matrix, diagonal, observed, b, y) + held.weight_at(y)
    change = gradient - gradient.detach()
    constants = constant(matrix), constant(diagonal), _zero(observed), change, None, *map(constant, schedule)
    return y + run(backend, *constants, *held.at_zero(schedule[0].dtype), num_steps, False)


def _energy_gradient(matrix, diagonal, observed, b, y):
    """Q y + b."""
    return _times_Q(matrix, diagonal, observed, y) + (b if observed is None else b - observed)


def _times_Q(matrix, diagonal, observed, y):
    if diagonal is None:
        return common.matvec(matrix, y)
    return (diagonal if observed is None else 1 + diagonal * diagonal) * y


def _zero(observed):
    return None if observed is None else observed.new_zeros(()).expand_as(observed)


class _Held:
    """Which entries of a fixed point y its proximal map holds, at a bound or at zero."""

    def __init__(self, y, prox):
        self.prox, self.at_lower, self.at_upper, self.entries = prox, None, None, None
        if prox.weight is not None or prox.threshold is not None:
            self.entries = y == 0
            return
        # a bound is met as it is stored
        if prox.upper is not None:
            self.entries = self.at_upper = y >= prox.upper.to(y.dtype)
        if prox.lower is not None:
            self.at_lower = y <= prox.lower.to(y.dtype)
            if prox.upper is not None:
                self.at_lower = self.at_lower & ~self.at_upper
            self.entries = self.at_lower if self.entries is None else self.entries | self.at_lower

    def at_zero(self, compute):
        """The proximal map that holds the same entries at zero, and no others."""
        if self.entries is None:
            return NO_PROX
        # a lower bound above the upper one: the result is the upper, and nothing passes where the argument is 0 too
        lower, upper = (torch.where(self.entries, *x).to(compute) for x in ((1.0, -math.inf), (0.0, math.inf)))
        return Prox(lower=lower, upper=upper)

    def with_bounds(self, y):
        """y as a function of the bounds that hold it."""
        for entries, bound in ((self.at_lower, self.prox.lower), (self.at_upper, self.prox.upper)):
            if entries is not None:
                y = torch.where(entries, bound.to(y.dtype), y)
        return y

    def weight_at(self, y):
        """The gradient of the weighted 1-norm where it has one."""
        return 0.0 if self.prox.weight is None else self.prox.weight.clamp(min=0) * y.detach().sign()

    def gradients(self, grad_y, adjoint_of_y, db, y):
        """Of lower, upper, weight and threshold: ``grad_y + adjoint_of_y()`` is what a held entry gets."""
        lower, upper, weight, threshold = self.prox
        d_lower = d_upper = d_weight = None
        if lower is not None or upper is not None:
            total = (grad_y + adjoint_of_y()).to((upper if lower is None else lower).dtype)
            if lower is not None:
                d_lower = torch.where(self.at_lower, total, 0.0).sum_to_size(lower.shape)
            if upper is not None:
                d_upper = torch.where(self.at_upper, total, 0.0).sum_to_size(upper.shape)
        if weight is not None:
            d_weight = torch.where(weight >= 0, db.to(weight.dtype) * y.sign(), 0.0).sum_to_size(weight.shape)
        return d_lower, d_upper, d_weight, None if threshold is None else torch.zeros_like(threshold)


class ImplicitFunction(Function):
    """y_k of the recurrence, differentiated as the minimizer; keeps its inputs and y_k for backward."""

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
    ):
        tensors = (matrix, diagonal, observed, b, y0, step_sizes, momentum, extrapolation, mu)
        if backend == "cpu":
            return native.forward(*tensors, lower, upper, weight, threshold, num_steps, False)
        return run(backend, *tensors, lower, upper, weight, threshold, num_steps, False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, *tensors, ctx.num_steps = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx, grad_y):
        *tensors, y = common.alive(ctx.saved_tensors) if common.is_differentiated() else ctx.saved_tensors
        needs = common.mask(ctx.needs_input_grad[1:14])
        return None, *_backward_of_minimizer(ctx.backend, grad_y, *tensors, ctx.num_steps, False, needs, y), None

    @staticmethod
    def vmap(info, in_dims, backend, *arguments):
        *tensors, num_steps = arguments
        run_all = lambda *tensors: ImplicitFunction.apply(backend, *tensors, num_steps)
        return common.vmap_forward(run_all, info.batch_size, in_dims[1:14], tensors, False, b=3)


_KnownImplicitFunction = function.known(ImplicitFunction)


def of_known_minimizer(y, backend, *arguments):
    """y, with the gradients that ``implicit`` would have for its tensors and number of steps."""
    has_kernel = backend == "cpu" and not _is_transformed()
    if arguments[_B].dtype != arguments[_PHI].dtype or (function.is_spectral(arguments) and not has_kernel):
        # of y unrounded, or in the eigenbasis
        return implicit(backend, *arguments, False)
    return _KnownImplicitFunction.apply((backend, y), *arguments)


def _backward_of_minimizer(backend, grad_y, *arguments):
    """Gradients of the 13 tensors, more of them than are needed it may be, where ``y`` is taken for it."""
    *tensors, num_steps, _, needs, y = arguments
    matrix, diagonal, observed, b, y0, *schedule = tensors[:9]
    needed = [bool(needs >> i & 1) for i in range(13)]
    prox = tensors[9:]
    # the bounds take one product more
    if backend == "cpu" and not (needed[9] or needed[10]) and not common.is_differentiated():
        return native.backward(grad_y, *tensors, num_steps, False, needs, None, 0, None, None, y)
    if function.is_spectral(tensors) and num_steps > 0:
        run_rotated = lambda *tensors: function.in_eigenbasis(implicit, backend, *tensors, num_steps, False)
        return function.backward_in_torch(run_rotated, grad_y, tensors, needs)
    # y_k forgets where it began and how it got there
    others = (torch.zeros_like(x) if wanted else None for x, wanted in zip((y0, *schedule), needed[_Y0:9], strict=True))
    held = _Held(y, Prox(*prox))
    # b̄ is what the same method makes of Qᵀ, with ȳ for b and the entries held at zero
    transposed = None if matrix is None else matrix.mT
    adjoint = (transposed, diagonal, _zero(observed), grad_y, None, *schedule, *held.at_zero(schedule[0].dtype))
    differentiate = implicit if common.is_differentiated() else run
    db = differentiate(backend, *adjoint, num_steps, False)
    d_matrix = d_diagonal = None
    if needed[0]:
        shared = matrix.shape[0] != b.shape[0]
        d_matrix = (db.mT @ y).unsqueeze(0) if shared else db.unsqueeze(-1) * y.unsqueeze(-2)
    if needed[1]:
        d_diagonal = db * y if observed is None else 2 * diagonal * (db * y)
    d_observed = -db if needed[2] else None
    adjoint_of_y = lambda: _energy_gradient(transposed, diagonal, _zero(observed), 0.0, db)
    d_prox = held.gradients(grad_y, adjoint_of_y, db, y)
    return d_matrix, d_diagonal, d_observed, db, *others, *d_prox


function.set_python_backward(_backward_of_last_steps, functools.partial(_backward_of_minimizer, "cpu"))
