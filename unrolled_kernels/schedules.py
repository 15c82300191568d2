"""Schedules (φ_t, β_t, γ_t) of the classical first-order methods, for the recurrence of ``functional.momentum``.

Each function returns three float64 tensors ``[num_steps]``: step sizes, momentum, extrapolation. With
m_t = y_t - y_{t-1} a step is y_{t+1} = y_t + β_t m_t - φ_t (Q (y_t + γ_t m_t) + b).
"""

import math

import torch

from unrolled_kernels.annotations import Number, Schedule
from unrolled_kernels.ops.momentum import reference


def gd(num_steps: int, step_size: float) -> Schedule:
    """Gradient descent: β = γ = 0 (paper, Eq. 9)."""
    zero = _constant(num_steps, 0.0)
    return _constant(num_steps, step_size), zero, zero


def nag(num_steps: int, step_size: float, mu: float) -> Schedule:
    """Nesterov's method for a μ-strongly convex energy: β = γ = (1-√(μφ))/(1+√(μφ)) (paper, Eq. 9)."""
    beta = _constant(num_steps, nesterov_momentum(float(step_size), float(mu)))
    return _constant(num_steps, step_size), beta, beta


def heavy_ball(num_steps: int, step_size: float, momentum: float) -> Schedule:
    """Polyak's heavy ball: constant β, γ = 0."""
    return _constant(num_steps, step_size), _constant(num_steps, momentum), _constant(num_steps, 0.0)


def fista(num_steps: int, step_size: float) -> Schedule:
    """FISTA's momentum: β_t = γ_t = (s_t - 1)/s_{t+1}, s_1 = 1, s_{t+1} = (1+√(1+4s_t²))/2, and β_0 = 0.

    Step t + 1 of Beck, Teboulle (2009), A fast iterative shrinkage-thresholding algorithm, (4.1)-(4.3), starts from
    y_t + β_t (y_t - y_{t-1}); its first two steps have no momentum.
    """
    beta, s = [0.0], 1.0
    for _ in range(1, num_steps):
        s_next = (1 + math.sqrt(1 + 4 * s * s)) / 2
        beta.append((s - 1) / s_next)
        s = s_next
    momentum = torch.tensor(beta[:num_steps], dtype=torch.float64)
    return _constant(num_steps, step_size), momentum, momentum.clone()


def chebyshev(num_steps: int, mu: float, L: float) -> Schedule:
    """Chebyshev semi-iteration on the spectrum [μ, L]: the smallest worst-case error of any k-step schedule.

    With θ = (L+μ)/2, δ = (L-μ)/2, ρ_0 = δ/θ and ρ_t = 1/(2θ/δ - ρ_{t-1}): φ_0 = 1/θ, β_0 = 0, φ_t = 2ρ_t/δ,
    β_t = ρ_t ρ_{t-1}, γ = 0 (Saad, Iterative Methods for Sparse Linear Systems, Algorithm 12.1).

    Raises:
        ValueError: not 0 < mu <= L.
    """
    if not 0 < mu <= L:
        raise ValueError(f"mu, L: expected 0 < mu <= L, got mu={mu}, L={L}")
    theta, delta = (L + mu) / 2, (L - mu) / 2
    phi, beta, rho = [1 / theta], [0.0], delta / theta
    for _ in range(1, num_steps):
        # 2ρ_t/δ written without the division by δ, which is 0 for L = μ
        rho_next = delta / (2 * theta - delta * rho)
        phi.append(2 / (2 * theta - delta * rho))
        beta.append(rho_next * rho)
        rho = rho_next
    step_sizes, momentum = (torch.tensor(x[:num_steps], dtype=torch.float64) for x in (phi, beta))
    return step_sizes, momentum, torch.zeros_like(momentum)


def nesterov_momentum(step_size: Number, mu: Number) -> Number:
    """β = (1-√(μφ))/(1+√(μφ)) for floats or tensors φ, μ (paper, Eq. 9)."""
    product = step_size * mu
    if isinstance(product, torch.Tensor):
        return reference.nesterov_momentum(step_size, mu)
    root = math.sqrt(product) if product >= 0 else math.nan
    return (1 - root) / (1 + root)


def _constant(num_steps, value):
    return torch.full((num_steps,), float(value), dtype=torch.float64)
