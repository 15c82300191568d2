"""The specification of the momentum recurrence: a plain loop that autograd differentiates. Also the backend "eager".

m_t     = y_t - y_{t-1}                              (y_{-1} = y_0)
z_t     = y_t + γ_t m_t
v_t     = y_t + β_t m_t - φ_t (Q z_t + b)
y_{t+1} = p_t(v_t)                                   t = 0 … k-1; p_t the proximal map, else y_{t+1} = v_t
"""

from typing import NamedTuple

import torch

from unrolled_kernels.ops.common import matvec


class Prox(NamedTuple):
    """The proximal map that ends a step: a clamp, a soft threshold at φ_t weight, or one at threshold_t."""

    lower: torch.Tensor | None = None
    upper: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    threshold: torch.Tensor | None = None


NO_PROX = Prox()


def with_nesterov(forward):
    """A forward that takes μ too, beside one that takes β and γ only."""

    def run(matrix, diagonal, observed, b, y0, phi, beta, gamma, mu, *rest, **options):
        if mu is not None:
            beta = gamma = nesterov_momentum(phi, mu)
        return forward(matrix, diagonal, observed, b, y0, phi, beta, gamma, *rest, **options)

    return run


@with_nesterov
def forward(
    matrix,
    diagonal,
    observed,
    b,
    y0,
    step_sizes,
    momentum,
    extrapolation,
    lower,
    upper,
    weight,
    threshold,
    num_steps,
    trajectory,
):
    """Run the recurrence on canonical arguments (see the package's docstring)."""
    storage, compute = b.dtype, step_sizes.dtype
    schedule, prox = (step_sizes, momentum, extrapolation), Prox(lower, upper, weight, threshold)
    matrix, diagonal, observed, b, y0 = (x if x is None else x.to(compute) for x in (matrix, diagonal, observed, b, y0))
    if observed is not None:
        diagonal, b = 1 + diagonal * diagonal, b - observed
    y0 = torch.zeros_like(b) if y0 is None else y0
    if diagonal is None:
        ys, _ = iterates(lambda z: matvec(matrix, z), b, y0, schedule, num_steps, prox)
    elif matrix is None:
        ys, _ = iterates(lambda z: diagonal * z, b, y0, schedule, num_steps, prox)
    else:
        # Q = R diag(λ) Rᵀ: the same recurrence, diagonal in the eigenbasis; y_0 itself is never rotated
        b, y0_rotated = matvec(matrix.mT, b), matvec(matrix.mT, y0)
        ys, _ = iterates(lambda z: diagonal * z, b, y0_rotated, schedule, num_steps)
        rotated = ys[1:] if trajectory else ys[-1:]
        ys = [y0] + [matvec(matrix, y) for y in rotated if num_steps > 0]
    y = torch.stack(ys) if trajectory else ys[-1]
    # without a step y_0 itself comes back, and an output never aliases an input
    return y.to(storage, copy=num_steps == 0)


def iterates(apply_Q, b, y0, schedule, num_steps, prox=NO_PROX):
    """The lists y_0 … y_k and v_0 … v_(k-1) of ``[B, d]`` tensors; ``apply_Q`` maps z ``[B, d]`` to Q z."""
    gradient_descent = schedule[1] is None
    phi, beta, gamma = (columns(x, num_steps) for x in schedule)
    taus = thresholds(prox, phi, num_steps)
    ys, vs = [y0], []
    for t in range(num_steps):
        y = ys[t]
        if gradient_descent:
            v = y - phi[t] * (apply_Q(y) + b)
        else:
            m = y - ys[max(t - 1, 0)]
            v = y + beta[t] * m - phi[t] * (apply_Q(y + gamma[t] * m) + b)
        vs.append(v)
        ys.append(proximal_map(v, prox, taus[t]))
    return ys, vs


def thresholds(prox, phi, num_steps):
    """τ_t of each step's soft threshold, ``[B or 1, d or 1]``; None where there is none."""
    if prox.weight is not None:
        weight = prox.weight.clamp(min=0)
        return [(phi_t * weight).clamp(min=0) for phi_t in phi[:num_steps]]
    if prox.threshold is not None:
        return [tau.clamp(min=0) for tau in columns(prox.threshold, num_steps)[:num_steps]]
    return [None] * num_steps


def proximal_map(v, prox, tau):
    """p_t(v), ``[B, d]``; its derivatives are those of torch's clamp and softshrink, at kinks too."""
    if tau is not None:
        return v.sign() * (v.abs() - tau).relu()
    if prox.lower is None and prox.upper is None:
        return v
    return v.clamp(prox.lower, prox.upper)


def nesterov_momentum(step_size, mu):
    """β = (1-√(μφ))/(1+√(μφ)) for tensors φ, μ (paper, Eq. 9)."""
    # (1-r)/(1+r) = -tanh(log(r)/2): fewer operations, which is what a small call waits for
    return (-0.25 * (step_size * mu).log()).tanh()


def columns(coefficient, num_steps):
    """Split a schedule coefficient into one column ``[B or 1, 1]`` a step, or one number."""
    if coefficient is None:
        return None
    if coefficient.dim() == 0 or coefficient.shape[1] == 1:
        return [coefficient] * num_steps
    return coefficient.split(1, dim=1)
