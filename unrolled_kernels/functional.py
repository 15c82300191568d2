"""The layers as functions: k steps of a first-order method on a batch of energies 1/2 yᵀQy + bᵀy.

Shapes: ``*batch`` are the batch dimensions of Q and b, broadcast against each other; d is the size of the state. Every
coefficient (step size, μ, momentum, extrapolation) broadcasts to ``(*batch, num_steps)``: a float, a 0-dim tensor,
``(num_steps,)`` per step, ``(*batch, 1)`` per sample, ``(*batch, num_steps)`` both. Gradients of what was broadcast
are summed. All functions are differentiable to second order and beyond in every tensor, and keep nothing for backward
but their inputs; of other gradients also y_k, or where the last steps begin. With one dense Q for the batch, d > 128,
the kernels in C++ and CUDA keep the iterates too, half of what the eager loop keeps, if those take at most
``UNROLLED_KERNELS_KEPT_BYTES`` (environment variable; 2^28 by default).

Under autocast all of them take float16, bfloat16 and float32 side by side, compute in float32, as torch's own sums do,
and return float32.
"""

import math
import operator
import sys
import warnings
from typing import Literal, NamedTuple, TypedDict, Unpack, overload

import torch

from unrolled_kernels import _backend, _check
from unrolled_kernels.annotations import Number, Quadratic, Weights
from unrolled_kernels.ops.momentum import gradients as _gradients
from unrolled_kernels.ops.momentum import stopping as _stopping
from unrolled_kernels.ops.momentum.function import ALL_STEPS as _ALL_STEPS
from unrolled_kernels.ops.momentum.function import MINIMIZER as _MINIMIZER
from unrolled_kernels.ops.momentum.function import dense as _dense_op
from unrolled_kernels.ops.momentum.reference import NO_PROX
from unrolled_kernels.ops.rnn.function import rnn as _rnn_op
from unrolled_kernels.prox import Prox, SoftThreshold, check_prox
from unrolled_kernels.quadratics import Spectral, Structure, Tikhonov, once, same_shape, smallest_eigenvalue
from unrolled_kernels.schedules import nesterov_momentum

__all__ = ["Info", "gradient_descent", "minimize", "momentum", "nesterov", "rnn"]


class Info(NamedTuple):
    """What ``return_info=True`` returns beside y."""

    num_steps: torch.Tensor  # [*batch] int64, the steps taken
    residual: torch.Tensor  # [*batch], max_i |y_k - y_(k-1)| of the last step taken; not differentiable


class _Options(TypedDict, total=False):
    y0: torch.Tensor | None
    return_trajectory: bool
    prox: Prox | None
    backward: Literal["unrolled", "implicit"]
    backward_steps: int | None
    tolerance: float | None
    backend: str | None


@overload
def gradient_descent(
    Q: Quadratic,
    b: torch.Tensor,
    step_size: Number,
    num_steps: int,
    *,
    return_info: Literal[False] = False,
    **options: Unpack[_Options],
) -> torch.Tensor: ...
@overload
def gradient_descent(
    Q: Quadratic,
    b: torch.Tensor,
    step_size: Number,
    num_steps: int,
    *,
    return_info: Literal[True],
    **options: Unpack[_Options],
) -> tuple[torch.Tensor, Info]: ...
def gradient_descent(
    Q: Quadratic,
    b: torch.Tensor,
    step_size: Number,
    num_steps: int,
    *,
    y0: torch.Tensor | None = None,
    return_trajectory: bool = False,
    prox: Prox | None = None,
    backward: Literal["unrolled", "implicit"] = "unrolled",
    backward_steps: int | None = None,
    tolerance: float | None = None,
    return_info: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, Info]:
    """Run ``num_steps`` gradient-descent steps on a batch of quadratic energies.

        y_{t+1} = y_t - step_size (Q y_t + b)                  (paper, Eq. 9)

    Args:
        Q: ``[*batch, d, d]`` tensor, or a ``Diagonal``, ``Spectral`` or ``Tikhonov``; float16, bfloat16, float32 or
            float64.
        b: ``[*batch, d]``, dtype and device of Q.
        step_size: φ, a float or a tensor that broadcasts to ``(*batch, num_steps)``; stable for φ ≤ 2/(μ + L).
        num_steps: k ≥ 0.
        y0: start, broadcastable to ``[*batch, d]``; zero by default.
        return_trajectory: return every iterate instead of the last.
        prox: a constraint or a sparsity term g of ``unrolled_kernels.prox``: every step ends with its proximal map,
            y_{t+1} = prox_{φ_t g}(…). A ``Spectral`` then runs as the dense matrix that it is.
        backward: ``"unrolled"``: the gradients of all k steps. ``"implicit"``: those of the minimizer, with y_k in its
            place, by k steps of the same method on Qᵀ; y0 and the coefficients get zero. It is as good as y_k is close.
        backward_steps: the gradients of the last n ≥ 1 steps alone, with y_{k-n} as a constant; 1 is known as one-step
            or Jacobian-free. None: of all steps.
        tolerance: ≥ 0: a sample (of the last dimension, whatever Q is) stops after the first step with
            max_i |y_{t+1} - y_t| ≤ tolerance · max(1, max_i |y_{t+1}|); from there on its coefficients count as zero,
            and get zero. ``num_steps`` stays the bound. With the trajectory all of the steps are computed.
        return_info: return ``(y, info)``, with the steps that each sample took and the size of the last.
        backend: ``"auto"``, ``"eager"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; default: ``use_backend``'s, the
            environment variable ``UNROLLED_KERNELS_BACKEND``'s, else the fastest available.
    Returns:
        ``y_k``, shape ``[*batch, d]``, dtype of ``b``; with ``return_trajectory`` the iterates y_0 … y_k,
        ``[num_steps + 1, *batch, d]``; with ``return_info`` a pair of that and an ``Info``.
    Raises:
        TypeError: an argument of the wrong type or dtype; the message names it.
        ValueError: shapes that do not broadcast, dtypes or devices that differ, a negative ``num_steps`` or
            ``tolerance``, ``backward_steps`` below 1 or beside ``"implicit"`` or a tolerance, an unknown or unavailable
            backend; the message names the argument, what was got and what was expected.
    """
    num_steps = _check.check_num_steps(num_steps)
    names, schedule = ("step_size", None, None, None), (step_size, None, None, None)
    return _run(
        Q,
        b,
        names,
        schedule,
        num_steps,
        y0,
        return_trajectory,
        prox,
        (backward, backward_steps),
        (tolerance, return_info),
        backend,
    )


@overload
def nesterov(
    Q: Quadratic,
    b: torch.Tensor,
    step_size: Number,
    mu: Number | None,
    num_steps: int,
    *,
    return_info: Literal[False] = False,
    **options: Unpack[_Options],
) -> torch.Tensor: ...
@overload
def nesterov(
    Q: Quadratic,
    b: torch.Tensor,
    step_size: Number,
    mu: Number | None,
    num_steps: int,
    *,
    return_info: Literal[True],
    **options: Unpack[_Options],
) -> tuple[torch.Tensor, Info]: ...
def nesterov(
    Q: Quadratic,
    b: torch.Tensor,
    step_size: Number,
    mu: Number | None,
    num_steps: int,
    *,
    y0: torch.Tensor | None = None,
    return_trajectory: bool = False,
    prox: Prox | None = None,
    backward: Literal["unrolled", "implicit"] = "unrolled",
    backward_steps: int | None = None,
    tolerance: float | None = None,
    return_info: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, Info]:
    """Run ``num_steps`` of Nesterov's accelerated gradient method on a batch of quadratic energies.

        y_{t+1} = z_t - step_size (Q z_t + b),   z_{t+1} = y_{t+1} + β (y_{t+1} - y_t),   z_0 = y_0
        β = (1 - √(μ step_size)) / (1 + √(μ step_size))        (paper, Eq. 9)

    Args:
        Q, b, num_steps, y0, return_trajectory, prox, backward, backward_steps, tolerance, return_info,
            backend: as in ``gradient_descent``.
        step_size: φ, a float or a tensor that broadcasts to ``(*batch, num_steps)``; stable for φ ≤ 4/(μ + 3L).
        mu: strong convexity constant μ > 0, a float or a tensor that broadcasts to ``(*batch, num_steps)``; None: the
            smallest eigenvalue of each sample's Q (of its symmetric part), detached, and 1e-6 where it is not above:
            Nesterov's method is for positive definite Q, which ``theory.check`` looks for.
    Returns:
        As ``gradient_descent``.
    Raises:
        TypeError, ValueError: as ``gradient_descent``, and ``mu <= 0``.
    """
    num_steps = _check.check_num_steps(num_steps)
    _check.check_number("step_size", step_size)
    if mu is None:
        _check.check_tensors(_check.check_Q(Q))
        mu = smallest_eigenvalue(Q).unsqueeze(-1)
    _check.check_number("mu", mu)
    _check.check_positive("mu", mu)
    names: tuple[str | None, ...]
    schedule: tuple[Number | None, ...]
    if isinstance(step_size, torch.Tensor) or isinstance(mu, torch.Tensor):
        names, schedule = ("step_size", None, None, "mu"), (step_size, None, None, mu)
    else:
        beta = nesterov_momentum(step_size, mu)
        names, schedule = ("step_size", "mu", "mu", None), (step_size, beta, beta, None)
    return _run(
        Q,
        b,
        names,
        schedule,
        num_steps,
        y0,
        return_trajectory,
        prox,
        (backward, backward_steps),
        (tolerance, return_info),
        backend,
    )


@overload
def momentum(
    Q: Quadratic,
    b: torch.Tensor,
    step_sizes: Number,
    momentum: Number,
    extrapolation: Number,
    num_steps: int,
    *,
    return_info: Literal[False] = False,
    **options: Unpack[_Options],
) -> torch.Tensor: ...
@overload
def momentum(
    Q: Quadratic,
    b: torch.Tensor,
    step_sizes: Number,
    momentum: Number,
    extrapolation: Number,
    num_steps: int,
    *,
    return_info: Literal[True],
    **options: Unpack[_Options],
) -> tuple[torch.Tensor, Info]: ...
def momentum(
    Q: Quadratic,
    b: torch.Tensor,
    step_sizes: Number,
    momentum: Number,
    extrapolation: Number,
    num_steps: int,
    *,
    y0: torch.Tensor | None = None,
    return_trajectory: bool = False,
    prox: Prox | None = None,
    backward: Literal["unrolled", "implicit"] = "unrolled",
    backward_steps: int | None = None,
    tolerance: float | None = None,
    return_info: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, Info]:
    """Run ``num_steps`` of a first-order method with a free schedule on a batch of quadratic energies.

        m_t = y_t - y_{t-1},   y_{t+1} = y_t + β_t m_t - φ_t (Q (y_t + γ_t m_t) + b)

    Gradient descent is β = γ = 0, Nesterov's method γ = β, the heavy ball γ = 0; ``schedules`` has the classical ones.

    Args:
        Q, b, num_steps, y0, return_trajectory, prox, backward, backward_steps, tolerance, return_info,
            backend: as in ``gradient_descent``.
        step_sizes, momentum, extrapolation: φ, β, γ, each a float or a tensor that broadcasts to
            ``(*batch, num_steps)``.
    Returns:
        As ``gradient_descent``.
    Raises:
        TypeError, ValueError: as ``gradient_descent``.
    """
    num_steps = _check.check_num_steps(num_steps)
    _check.check_number("momentum", momentum)
    _check.check_number("extrapolation", extrapolation)
    names, schedule = ("step_sizes", "momentum", "extrapolation", None), (step_sizes, momentum, extrapolation, None)
    return _run(
        Q,
        b,
        names,
        schedule,
        num_steps,
        y0,
        return_trajectory,
        prox,
        (backward, backward_steps),
        (tolerance, return_info),
        backend,
    )


def rnn(
    Q: Quadratic,
    b: torch.Tensor,
    weights: Weights,
    num_steps: int,
    *,
    y0: torch.Tensor | None = None,
    return_trajectory: bool = False,
    backward_steps: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Run ``num_steps`` cells of a learned recurrent algorithm on a batch of quadratic energies.

        g_t = Q y_t + b,   h¹ = relu(W₁ y_t + W₂ g_t),   hˡ = relu(Wˡ hˡ⁻¹),   y_{t+1} = V hᴸ      (paper, Eq. 20)

    Args:
        Q: as in ``gradient_descent``; a ``Spectral`` runs as the dense matrix that it is, a
            ``Tikhonov`` as a ``Diagonal``.
        b, num_steps, y0, return_trajectory, backward_steps, backend: as in ``gradient_descent``.
        weights: ``(W1, W2, [W^2 … W^L], V)``, shared by the batch: W₁, W₂ ``[h_1, d]``, Wˡ ``[h_l, h_(l-1)]``,
            V ``[d, h_L]``, in the dtype of b, or float32 where b is float16 or bfloat16.
    Returns:
        As ``gradient_descent``.
    Raises:
        TypeError, ValueError: as ``gradient_descent``, and weights whose shapes do not chain from d to d.
    """
    num_steps = _check.check_num_steps(num_steps)
    _check.check_flag("return_trajectory", return_trajectory)
    if backward_steps is not None:
        _check.check_backward("unrolled", backward_steps)
    matrices = _check.check_weights(weights)
    if isinstance(b, torch.Tensor) and _autocasting(b.device.type):
        with torch.autocast(b.device.type, enabled=False):
            Q, b, y0 = _to_float32(Q), _to_float32(b), _to_float32(y0)
            W1, W2, *inner, V = map(_to_float32, matrices)
            weights = (W1, W2, inner, V)
            return rnn(
                Q,
                b,
                weights,
                num_steps,
                y0=y0,
                return_trajectory=return_trajectory,
                backward_steps=backward_steps,
                backend=backend,
            )
    shape = tuple(b.shape) if y0 is None and _is_plain(Q, b) else _full_shape(Q, b, y0)
    _check.check_weight_tensors(matrices, shape[-1], b)
    chosen = _backend.resolve(backend, b.device, "rnn")
    matrix = diagonal = None
    if isinstance(Q, torch.Tensor):
        matrix = Q
    elif isinstance(Q, Spectral):
        matrix = once(Q).to_dense()
    elif isinstance(Q, Tikhonov):
        energy, b = Q.as_diagonal(b)
        diagonal = energy.q
    else:
        diagonal = Q.q
    flat = (math.prod(shape[:-1]), shape[-1])
    diagonal, b, y0 = (_reshape(x, shape, flat) for x in (diagonal, b, y0))
    matrix = None if matrix is None else _flatten_matrix(matrix, shape[:-1])
    compute = torch.promote_types(b.dtype, torch.float32)
    matrices = tuple(W if W.dtype == compute else W.to(compute) for W in matrices)
    try:
        y = _rnn_op(chosen, matrix, diagonal, b, y0, matrices, num_steps, return_trajectory, backward_steps)
    except NotImplementedError:
        if isinstance(Q, torch.Tensor):
            _check.check_tensors({"Q": Q, "b": b})
        raise
    final_shape = (num_steps + 1, *shape) if return_trajectory else shape
    return y if same_shape(y.shape, final_shape) else y.reshape(final_shape)


def minimize(Q: Quadratic, b: torch.Tensor) -> torch.Tensor:
    """The exact minimizer -Q⁻¹b of the energy 1/2 yᵀQy + bᵀy, ``Opt`` of the paper (Sec. 2).

    Args:
        Q: ``[*batch, d, d]`` tensor, or a ``Diagonal`` / ``Spectral`` / ``Tikhonov``.
        b: ``[*batch, d]``, dtype and device of Q.
    Returns:
        ``[*batch, d]``, differentiable in Q and b. float16 and bfloat16 are solved in float32.
    Raises:
        TypeError, ValueError: as ``gradient_descent``. A singular dense Q raises ``torch.linalg.LinAlgError``.
    """
    if isinstance(b, torch.Tensor) and _autocasting(b.device.type):
        with torch.autocast(b.device.type, enabled=False):
            return minimize(_to_float32(Q), _to_float32(b))
    shape = _full_shape(Q, b)
    if isinstance(Q, Tikhonov):
        Q, b = Q.as_diagonal(b)
    work = torch.promote_types(b.dtype, torch.float32)
    if isinstance(Q, torch.Tensor):
        matrix, rhs = once(Q).to(work), b.to(work).expand(shape)
        if math.prod(matrix.shape[:-2]) == 1:
            # factored once for all of the batch
            rows = rhs.reshape(math.prod(shape[:-1]), shape[-1])
            y = torch.linalg.solve(matrix.reshape(matrix.shape[-2:]), rows.mT).mT.reshape(shape)
        else:
            y = torch.linalg.solve(matrix, rhs.unsqueeze(-1)).squeeze(-1)
        return -y.to(b.dtype)
    return -Q.to(work).solve(b.to(work)).to(b.dtype)


def _run(Q, b, names, schedule, num_steps, y0, return_trajectory, prox, gradients, stopping, backend):
    """Validate, bring the arguments to canonical form, run, and give the result its shape back.

    Args:
        names: which arguments φ, β, γ and μ are; None for what is absent.
        schedule: φ, β, γ and μ.
    """
    differentiated = _ALL_STEPS if gradients == _EXACT else _differentiated(*gradients, return_trajectory)
    plain = y0 is None and prox is None and stopping == _NO_STOPPING
    if plain and getattr(b, "is_cpu", False) and _backend.decide(backend, "cpu") == "cpu":
        # where there is nothing to check or to reshape, checks cost a small call more than its kernel
        y = _dense_op(Q, b, *schedule, num_steps, return_trajectory, differentiated)
        if y is not None:
            return y
    tolerance, return_info = stopping
    _check.check_flag("return_trajectory", return_trajectory)
    check_prox(prox)
    if stopping != _NO_STOPPING:
        _check.check_tolerance(tolerance, gradients[1])
        _check.check_flag("return_info", return_info)
    if isinstance(b, torch.Tensor) and _autocasting(b.device.type):
        # iterating is a reduction over steps: under autocast it runs in float32, as sums do
        with torch.autocast(b.device.type, enabled=False):
            Q, b, y0 = _to_float32(Q), _to_float32(b), _to_float32(y0)
            return _run(Q, b, names, schedule, num_steps, y0, return_trajectory, prox, gradients, stopping, backend)
    op = _gradients.op(differentiated)
    if y0 is None and prox is None and stopping == _NO_STOPPING and _is_plain(Q, b):
        try:
            plain = _plain_schedule(names, schedule, b)
            if plain is not None:
                chosen = _backend.resolve(backend, b.device)
                return op(chosen, Q, None, None, b, None, *plain, *NO_PROX, num_steps, return_trajectory)
        except NotImplementedError:
            # sparse tensors, which have no kernels: to ask for them beforehand is a fiftieth of a small call
            _check.check_tensors({"Q": Q, "b": b})
            raise
    shape = _full_shape(Q, b, y0)
    chosen = _backend.resolve(backend, b.device, _kind(Q, shape))
    schedule = [
        None if name is None else _check_coefficient(name, c, shape[:-1], num_steps, b)
        for name, c in zip(names, schedule, strict=True)
    ]
    if stopping != _NO_STOPPING:
        # every sample has a row of its own
        schedule[0] = schedule[0].expand(*shape[:-1], schedule[0].shape[-1] if schedule[0].dim() > 0 else 1)
    if prox is None:
        *tensors, batch = _canonical(Q, b, y0, shape, schedule)
        prox = NO_PROX
    else:
        if isinstance(Q, Spectral):
            # the map is not diagonal in the eigenbasis: two products a step there and back, where Q itself takes one
            Q = once(Q).to_dense()
        rows, threshold = _check_prox_tensors(prox, shape, num_steps, b)
        *tensors, batch = _canonical(Q, b, y0, shape, (*schedule, threshold), rows)
        flat = tuple(tensors[3].shape)
        prox = (*(_reshape(x, shape, flat) for x in rows), None if threshold is None else _rows(threshold, batch))
    schedule = [None if c is None else _rows(c, batch) for c in schedule]
    tensors = (*tensors, *schedule, *prox)
    arguments = (chosen, *tensors, num_steps, return_trajectory)
    if stopping == _NO_STOPPING:
        y = op(*arguments)
    else:
        tolerance = None if tolerance is None else float(tolerance)
        y, taken, residual = _stopping.run(op, *arguments, tolerance=tolerance)
        info = Info(taken.reshape(shape[:-1]), residual.reshape(shape[:-1]))
    final_shape = (num_steps + 1, *shape) if return_trajectory else shape
    y = y if same_shape(y.shape, final_shape) else y.reshape(final_shape)
    return (y, info) if return_info else y


_EXACT = ("unrolled", None)
_NO_STOPPING = (None, False)


def _differentiated(backward, backward_steps, return_trajectory):
    """How many of the last steps are differentiated, or that the minimizer is."""
    _check.check_backward(backward, backward_steps)
    if backward == "unrolled":
        return min(operator.index(backward_steps), sys.maxsize)
    if return_trajectory:
        raise ValueError(
            "return_trajectory: backward='implicit' takes the last iterate for the minimizer and has no gradient for "
            "the others; expected False, got True"
        )
    return _MINIMIZER


def _kind(Q, shape):
    """What a call is, by structure and size, in the table of what ``backend="auto"`` takes."""
    if isinstance(Q, torch.Tensor):
        return "products" if _multiplies_matrices(Q, shape) else "dense"
    return "spectral" if isinstance(Q, Spectral) else "diagonal"


def _multiplies_matrices(Q, shape):
    """Whether one Q serves many samples, beyond what the GPU kernels hold in registers."""
    if not (isinstance(Q, torch.Tensor) and Q.dim() == 2 and shape[-1] > 128):
        return False
    # an exported program takes batches of any size: none is compared; elsewhere the branch makes a symbolic bool a bool
    return True if torch.compiler.is_exporting() or math.prod(shape[:-1]) > 128 else False  # noqa: SIM210


def _is_plain(Q, b):
    """Whether Q is ``[B, d, d]`` and b ``[B, d]``, alike in a dtype that is computed in: canonical as they are."""
    if not (isinstance(Q, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    dtype = b.dtype
    if Q.dtype != dtype or (dtype != torch.float32 and dtype != torch.float64) or Q.device != b.device:
        return False
    q_shape, b_shape = Q.shape, b.shape
    return len(q_shape) == 3 and len(b_shape) == 2 and q_shape[:2] == b_shape and q_shape[1] == q_shape[2]


def _plain_schedule(names, schedule, b):
    """The coefficients where each is a float or one number in the dtype and on the device of b; else None."""
    plain, dtype, device = [], b.dtype, b.device
    for name, c in zip(names, schedule, strict=True):
        if type(c) is float:
            c = b.new_full((), c)
        elif name is not None and not (
            isinstance(c, torch.Tensor) and c.dim() == 0 and c.dtype == dtype and c.device == device
        ):
            return None
        plain.append(c)
    return plain


def _full_shape(Q, b, y0=None):
    """Check Q, b and y0 against each other; returns ``(*batch, d)``."""
    tensors = _check.check_Q(Q)
    tensors["b"] = b
    if y0 is not None:
        tensors["y0"] = y0
    _check.check_tensors(tensors)
    if b.dim() < 1:
        raise ValueError("b: expected [*batch, d], got a scalar tensor")
    q_shape = Q.shape[:-1] if isinstance(Q, torch.Tensor) else Q.state_shape
    if q_shape[-1] != b.shape[-1]:
        raise ValueError(
            f"b: expected last dimension d = {q_shape[-1]} to fit Q {_shape_of(Q)}, got shape {list(b.shape)}"
        )
    if same_shape(q_shape, b.shape):
        shape = b.shape
    else:
        try:
            shape = torch.broadcast_shapes(q_shape, b.shape)
        except RuntimeError:
            raise ValueError(
                f"Q, b: batch dimensions do not broadcast: Q is {_shape_of(Q)}, b has shape {list(b.shape)}"
            ) from None
    if y0 is not None and not same_shape(y0.shape, shape):
        _check.check_broadcast("y0", y0.shape, shape, "(*batch, d)")
    return tuple(shape)


def _shape_of(Q):
    return f"of shape {list(Q.shape)}" if isinstance(Q, torch.Tensor) else Q.describe()


def _check_coefficient(name, value, batch, num_steps, b):
    """One of φ, β, γ, μ as a tensor in the compute dtype that broadcasts to ``(*batch, num_steps)``."""
    _check.check_number(name, value)
    compute = torch.promote_types(b.dtype, torch.float32)
    if not isinstance(value, torch.Tensor):
        return b.new_full((), value if isinstance(value, float) else float(value), dtype=compute)
    if value.device != b.device:
        if value.dim() > 0 or value.is_meta:
            raise ValueError(f"device: b is on {b.device} but {name} is on {value.device}; move one of them")
        value = value.to(b.device)
    if value.dtype != compute:
        value = value.to(compute)
    if value.dim() == 0:
        return value
    _check.check_broadcast(name, value.shape, (*batch, num_steps), "(*batch, num_steps)")
    # in a traced program sizes would become guards
    if 1 < value.dim() <= len(batch) and not torch.compiler.is_compiling():
        _warn_if_ambiguous(name, value.shape, batch)
    return value


def _warn_if_ambiguous(name, shape, batch, last="num_steps"):
    """Warn where a value's dimensions fit the first of the batch as well as the last, to which they belong."""
    own = shape[:-1]
    if own != batch[: len(own)] or math.prod(own) == 1:
        return
    ones = [1] * (len(batch) - len(own))
    full = f"(*batch, {last}) = {[*batch, last]}".replace("'", "")
    warnings.warn(
        f"{name}: shape {list(shape)} broadcasts to the last dimensions of {full}, and would fit the first too; write "
        f"{[*ones, *shape]} for the last, {[*own, *ones, shape[-1]]} for the first",
        stacklevel=2,
    )


class _Batch(NamedTuple):
    shape: tuple  # the dimensions that the canonical batch dimension stands for
    dims: int  # how many batch dimensions a coefficient may have


def _check_prox_tensors(prox, shape, num_steps, b):
    """The bounds and the weight of ``prox``, which broadcast to ``(*batch, d)``, and its threshold."""
    if isinstance(prox, SoftThreshold):
        return (None, None, None), _check_coefficient("threshold", prox.threshold, shape[:-1], num_steps, b)
    names = ("lower", "upper", "weight")
    values = (getattr(prox, name, None) for name in names)
    return tuple(
        None if x is None else _check_rows(name, x, shape, b) for name, x in zip(names, values, strict=True)
    ), None


def _check_rows(name, value, shape, b):
    """``value`` as a tensor in the compute dtype that broadcasts to ``(*batch, d)``."""
    compute = torch.promote_types(b.dtype, torch.float32)
    if not isinstance(value, torch.Tensor):
        return b.new_full((), value if isinstance(value, float) else float(value), dtype=compute)
    if value.device != b.device:
        if value.dim() > 0 or value.is_meta:
            raise ValueError(f"device: b is on {b.device} but {name} is on {value.device}; move one of them")
        value = value.to(b.device)
    _check.check_broadcast(name, value.shape, shape, "(*batch, d)")
    # [*batch, 1] is a value of each sample, where [*batch, d] may be an image that all share
    if 1 < value.dim() < len(shape) and value.shape[-1] != shape[-1] and not torch.compiler.is_compiling():
        _warn_if_ambiguous(name, value.shape, shape[:-1], "d")
    return value if value.dtype == compute else value.to(compute)


def _canonical(Q, b, y0, shape, schedule, bounds=()):
    """Matrix, diagonal, observed, b, y0 as the ops take them, and the batch to flatten the coefficients to."""
    matrix, diagonal, observed = (Q, None, None) if isinstance(Q, torch.Tensor) else Q.operands
    leading = rows = len(shape) - 1
    whole = [x for x in (*bounds, diagonal, observed, b, y0) if x is not None and x.dim() > 0]
    if matrix is None and all(same_shape(x.shape, shape) for x in whole):
        # elementwise: as few rows as the schedule can tell apart, as long as nothing is broadcast
        rows = max(_varying_dims(c, leading) for c in schedule if c is not None)
    batch, flat = shape[:rows], (math.prod(shape[:rows]), math.prod(shape[rows:]))
    diagonal, observed, b, y0 = (_reshape(x, shape, flat) for x in (diagonal, observed, b, y0))
    matrix = None if matrix is None else _flatten_matrix(matrix, batch)
    return matrix, diagonal, observed, b, y0, _Batch(batch, leading)


def _reshape(x, shape, flat):
    """x broadcast to ``shape`` and then of shape ``flat``; as it is where nothing has to be done."""
    if x is None or same_shape(x.shape, flat):
        return x
    return (x if same_shape(x.shape, shape) else x.expand(shape)).reshape(flat)


def _flatten_matrix(matrix, batch):
    """``[*batch, d, d]`` as ``[B, d, d]``, or ``[1, d, d]`` where all of the batch shares it."""
    d = matrix.shape[-1]
    if matrix.dim() == 3 and same_shape(matrix.shape[:-2], batch):
        return matrix
    if math.prod(matrix.shape[:-2]) == 1:
        return matrix.reshape(1, d, d)
    return matrix.expand(*batch, d, d).reshape(math.prod(batch), d, d)


def _varying_dims(coefficient, leading):
    """How many of the ``leading`` batch dimensions, counted from the left, the coefficient tells apart."""
    own = coefficient.shape[:-1]
    for i, size in reversed(list(enumerate(own))):
        if size != 1:
            return leading - len(own) + i + 1
    return 0


def _rows(coefficient, batch):
    """A checked coefficient as ``[B or 1, num_steps or 1]``, or ``[]`` as it is."""
    if coefficient.dim() == 0:
        return coefficient
    steps = coefficient.shape[-1]
    if same_shape(coefficient.shape[:-1], (1,)):
        return coefficient
    if math.prod(coefficient.shape[:-1]) == 1:
        return coefficient.reshape(1, steps)
    padded = coefficient.reshape((1,) * (batch.dims - coefficient.dim() + 1) + tuple(coefficient.shape))
    kept = padded.reshape(*padded.shape[: len(batch.shape)], steps)
    return kept.expand(*batch.shape, steps).reshape(math.prod(batch.shape), steps)


def _autocasting(device_type):
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


def _to_float32(x):
    if isinstance(x, Structure):
        return x.map(_to_float32)
    if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        return once(x).float().expand(x.shape) if x.dim() > 2 else x.float()
    return x
