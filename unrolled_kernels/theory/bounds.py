"""The paper's bounds with their constants written out: approximation (Sec. 4) and generalization (Sec. 5).

σ_b² I = E[bbᵀ], M = sup ‖Opt(Q, b)‖, ℓ = ‖y_k - y*‖ is a sample's loss (Eq. 10) and P the mean over all samples.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from unrolled_kernels import _check
from unrolled_kernels.annotations import Number, Quadratic, Schedule, Steps
from unrolled_kernels.regions import check_spectrum
from unrolled_kernels.theory.properties import convergence_rate, schedule_convergence, schedule_stability, stability

REGIMES = ("under", "about_right", "over")


class Constants(NamedTuple):
    """σ_b and M of the problem setting (paper, Sec. 2)."""

    sigma_b: float
    M: float


class Comparison(NamedTuple):
    """Both sides of an inequality left ≤ right.

    ``addends``: the part of the model and the part M Cvg of the algorithm; ``right`` is their sum in Lemma 4.1 and the
    square of their sum in Lemma 4.2.
    """

    left: float
    right: float
    addends: tuple[float, float]

    @property
    def holds(self) -> bool:
        return self.left <= self.right

    @property
    def slack(self) -> float:
        """right/left, how many times larger than need be the bound is."""
        return self.right / self.left if self.left else math.inf


class LocalRademacherBound(NamedTuple):
    """Theorem 5.1: ``total`` = ``perception`` (Eq. 15) + ``sensitivity`` (Eq. 16); C_1, C_2, C_3 of Eq. 15.

    ``convergence_part``, ``covering_part`` and the constant 4 are the three addends under the root of Eq. 15:
    (Cvg M + √r)² C_1, C_2 + C_3, 4. Which is the largest decides how the bound moves with k; a class of one function
    has no complexity, so that ``log_covering`` = 0 tells nothing about a network.
    """

    total: float
    perception: float
    sensitivity: float
    C1: float
    C2: float
    C3: float
    convergence_part: float
    covering_part: float

    @property
    def regime(self) -> str:
        """The case of Sec. 5 that the largest addend decides: ``"under"``, ``"about_right"`` or ``"over"``."""
        addends = {"under": 4.0, "about_right": self.convergence_part, "over": self.covering_part}
        return max(addends, key=addends.__getitem__)


def problem_constants(b: torch.Tensor, mu: float) -> Constants:
    """σ_b and M from the linear terms of the data (paper, Sec. 2).

        σ_b² = mean ‖b‖²/d,   M = max ‖b‖/μ

    Args:
        b: ``[n, d]``.
        mu: lower bound of the spectrum of Q.
    Returns:
        ``Constants``, two floats.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    b = _vectors("b", b, 2)
    _check.check_positive("mu", mu)
    return Constants(b.square().mean().sqrt().item(), b.norm(dim=-1).max().item() / float(mu))


def approximation_bound(
    q_error: Number, convergence: Number, *, mu: float, sigma_b: float, M: float
) -> tuple[float, float]:
    """The right side of Lemma 4.1 for one model, in two addends (paper, Eq. 11).

        P ℓ ≤ σ_b μ⁻² P‖Q_θ - Q*‖_F + M Cvg(k, φ)

    The lemma takes the infimum over the model and the supremum over Q* on both sides; its proof shows this for each.

    Args:
        q_error: P‖Q_θ - Q*‖_F.
        convergence: Cvg(k, φ).
        mu: lower bound of the spectra.
        sigma_b, M: as in ``problem_constants``.
    Returns:
        The neural and the algorithmic addend, two floats.
    """
    return sigma_b / mu**2 * float(q_error), M * float(convergence)


def representation_bound(
    squared_loss: Number, convergence: Number, *, L: float, sigma_b: float, M: float
) -> tuple[float, float]:
    """The root of the right side of Lemma 4.2, in two addends (paper, Eq. 12).

        P‖Q_θ - Q*‖²_F ≤ σ_b⁻² L⁴ (√(P ℓ²) + M Cvg(k, φ))²

    Args:
        squared_loss: P ℓ².
        convergence: Cvg(k, φ).
        L: upper bound of the spectra.
        sigma_b, M: as in ``problem_constants``.
    Returns:
        L² σ_b⁻¹ √(P ℓ²) and L² σ_b⁻¹ M Cvg(k, φ), two floats; the bound is the square of their sum.
    """
    scale = L**2 / sigma_b
    return scale * math.sqrt(squared_loss), scale * M * float(convergence)


def check_lemmas(
    losses: torch.Tensor,
    Q_theta: Quadratic,
    Q_star: Quadratic,
    convergence: Number,
    *,
    mu: float,
    L: float,
    sigma_b: float,
    M: float,
) -> tuple[Comparison, Comparison]:
    """Both sides of Lemma 4.1 and Lemma 4.2 for a trained model, from its samples (paper, Eqs. 11 and 12).

    Both need b independent of x with E[bbᵀ] = σ_b² I; with the means of n samples they hold up to their deviations.

    Args:
        losses: ‖y_k - y*‖ of each sample, ``[n]``.
        Q_theta, Q_star: ``[n, d, d]`` tensor, or a ``Diagonal`` / ``Spectral``.
        convergence: Cvg(k, φ) of the model's layer, e.g. of ``convergence_rate``.
        mu, L: bounds of the spectra.
        sigma_b, M: as in ``problem_constants``.
    Returns:
        Two ``Comparison``s: of Lemma 4.1 (P ℓ against Eq. 11) and of Lemma 4.2 (P‖Q_θ - Q*‖²_F against Eq. 12).
    Raises:
        TypeError, ValueError: an argument out of its range, or shapes that differ; the message names it.
    """
    check_spectrum(mu, L)
    losses = _vectors("losses", losses, 1)
    theta, star = _dense("Q_theta", Q_theta), _dense("Q_star", Q_star)
    if theta.shape != star.shape or len(theta) != len(losses):
        raise ValueError(
            f"Q_theta, Q_star: expected one matrix for each of the {len(losses)} losses, "
            f"got shapes {list(theta.shape)} and {list(star.shape)}"
        )
    q_errors = torch.linalg.matrix_norm(theta - star)
    neural, algorithm = approximation_bound(q_errors.mean(), convergence, mu=mu, sigma_b=sigma_b, M=M)
    first = Comparison(losses.mean().item(), neural + algorithm, (neural, algorithm))
    model, algorithm = representation_bound(losses.square().mean(), convergence, L=L, sigma_b=sigma_b, M=M)
    second = Comparison(q_errors.square().mean().item(), (model + algorithm) ** 2, (model, algorithm))
    return first, second


def local_rademacher_bound(
    num_samples: int,
    radius: float,
    log_covering: float,
    *,
    stability: Number,
    convergence: Number,
    sensitivity: Number,
    step_size_range: float,
    dim: int,
    mu: float,
    L: float,
    sigma_b: float,
    M: float,
) -> LocalRademacherBound:
    """Theorem 5.1, repaired: a bound of the local Rademacher complexity of a model with an algorithm layer.

        √2 d n^{-1/2} Stab(k) √((Cvg(k) M + √r)² C_1 + C_2 + C_3 + 4)  +  Sens(k) B_Φ

    The paper (Eqs. 15 and 16) has N as the covering number of ℓ_Q, the class of the *norms* ‖Q_θ - Q*‖_F. That is
    false: norms do not tell Q* + E from Q* - E, whose losses differ (docs/counterexample.md). Here N = N(1/√n, {Q_θ}),
    the covering number of the matrix-valued class in sup_x ‖·‖_F. Stab is the one in Q: Eq. 17, from which all
    follows, multiplies it by ‖Q_θ - Q_θ'‖. The paper gives the orders of C_1, C_2, C_3; with
    F = (L-μ)√d ≥ ‖Q_θ - Q*‖_F and c = 8√2 F log N/√n these choices make the bound follow, derived:

        C_1 = 4 L⁴ σ_b⁻² log N/d²,   C_3 = c/d²,   C_2 = (8 log N/n + c (c + 4d - 1 + 4√(2 log N/n)))/d²

    Derivation. Eq. 18 becomes R_n ℓ_F ≤ √2 Stab(k) R_n 𝒬 by vector contraction, with
    R_n 𝒬 = E sup_θ (1/n) Σ_i ⟨σ_i, Q_θ(x_i) - Q*(x_i)⟩, σ_i a matrix of d² signs. Let Z = √n E R_n 𝒬^loc(r_q),
    u = √(2 log N/n), S the largest P_n‖Q_θ - Q*‖²_F of the local class. Each member is 1/√n close to one of N, whose
    norm is at most √S + 1/√n; what lies between costs ‖σ_i‖_F/√n = d/√n, and Massart's lemma the rest:
    Z ≤ d + u + √(2 log N · E S). Symmetrization and contraction (‖·‖²_F is 2F-Lipschitz) give E S ≤ r_q + 4√2 F Z/√n.
    The quadratic inequality (Z - h)² ≤ a + cZ with h = d + u, a = 2 r_q log N has Z² ≤ 2a + 2h² + 4ch + c², and
    2h² ≤ 4d² + 8 log N/n. Lemma 4.2 bounds r_q by L⁴ σ_b⁻² (Cvg M + √r)². The paper's t, of an event of probability
    1 - e^{-t}, does not come up, because the expectation is bounded directly.

    Args:
        num_samples: n.
        radius: r, the local level: models with P ℓ² ≤ r.
        log_covering: log N, of the matrix-valued class at radius 1/√n, see ``log_covering_parametric``.
        stability: Stab(k), the supremum over φ of ``Stability.wrt_Q`` with ‖b‖ = μM.
        convergence: Cvg(k), the supremum over φ.
        sensitivity: Sens(k).
        step_size_range: sup |φ - φ'|, so B_Φ is half of it; 0 for a fixed step size.
        dim: d.
        mu, L: bounds of the spectra.
        sigma_b, M: as in ``problem_constants``.
    Returns:
        A ``LocalRademacherBound`` of floats.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    check_spectrum(mu, L)
    _check.check_positive("num_samples", num_samples)
    for name, value in (("radius", radius), ("log_covering", log_covering), ("step_size_range", step_size_range)):
        if value < 0:
            raise ValueError(f"{name}: expected a number ≥ 0, got {value}")
    n = num_samples
    c = 8 * math.sqrt(2) * (L - mu) * math.sqrt(dim) * log_covering / math.sqrt(n)
    C1 = 4 * L**4 / sigma_b**2 * log_covering / dim**2
    C2 = (8 * log_covering / n + c * (c + 4 * dim - 1 + 4 * math.sqrt(2 * log_covering / n))) / dim**2
    C3 = c / dim**2
    convergence_part = (float(convergence) * M + math.sqrt(radius)) ** 2 * C1
    root = math.sqrt(convergence_part + C2 + C3 + 4)
    perception = math.sqrt(2) * dim / math.sqrt(n) * float(stability) * root
    in_phi = float(sensitivity) * step_size_range / 2
    return LocalRademacherBound(perception + in_phi, perception, in_phi, C1, C2, C3, convergence_part, C2 + C3)


def model_bound(
    algorithm: str,
    num_steps: int,
    step_size: float,
    *,
    num_samples: int,
    radius: float,
    log_covering: float,
    dim: int,
    mu: float,
    L: float,
    sigma_b: float,
    M: float,
) -> LocalRademacherBound:
    """``local_rademacher_bound`` of a model whose layer has a fixed step size (so Eq. 16 is zero).

    Args:
        algorithm, num_steps, step_size: of the layer; ints and floats.
        num_samples, radius, log_covering, dim, mu, L, sigma_b, M: as in ``local_rademacher_bound``.
    Returns:
        A ``LocalRademacherBound``.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    return local_rademacher_bound(
        num_samples,
        radius,
        log_covering,
        stability=stability(algorithm, num_steps, step_size, mu, b_norm=mu * M).wrt_Q,
        convergence=convergence_rate(algorithm, num_steps, step_size, mu),
        sensitivity=0.0,
        step_size_range=0.0,
        dim=dim,
        mu=mu,
        L=L,
        sigma_b=sigma_b,
        M=M,
    )


def log_covering_bound(
    radius: float,
    *,
    stability: Number,
    sensitivity: Number,
    log_covering_Q: Callable[[float], float],
    log_covering_step_size: Callable[[float], float],
) -> float:
    """The standard bound: the logarithm of the covering number of the losses (paper, Eq. 19); Cvg plays no role in it.

        N(ε, ℓ_F, L₂(P_n)) ≤ N(ε/(2 Stab(k)), Q, L₂(P_n)) · N(ε/(2 Sens(k)), Φ, ‖·‖)

    Args:
        radius: ε > 0.
        stability: Stab(k), that is the supremum over φ of ``Stability.wrt_Q``.
        sensitivity: Sens(k).
        log_covering_Q, log_covering_step_size: functions from a radius to the logarithm of the covering number of the
            neural modules and of the step sizes.
    Returns:
        A float.
    Raises:
        ValueError: ``radius`` is not positive.
    """
    _check.check_positive("radius", radius)
    half = lambda lipschitz: radius / (2 * lipschitz) if lipschitz else math.inf
    return float(log_covering_Q(half(float(stability))) + log_covering_step_size(half(float(sensitivity))))


def log_covering_parametric(radius: float, num_parameters: int, parameter_radius: float, lipschitz: float) -> float:
    """log N(ε) ≤ p log(1 + 2BG/ε): a class with p parameters in a ball of radius B, G-Lipschitz in them.

    Args:
        radius: ε > 0.
        num_parameters: p.
        parameter_radius: B.
        lipschitz: G, of the map from parameters to functions, in the norm of the covering.
    Returns:
        A float.
    Raises:
        ValueError: ``radius`` is not positive.
    """
    _check.check_positive("radius", radius)
    return num_parameters * math.log1p(2 * parameter_radius * lipschitz / radius)


def log_covering_interval(radius: float, low: float, high: float) -> float:
    """log N(ε) of the step sizes [low, high]: ⌈(high - low)/(2ε)⌉ intervals of half-width ε, at least one.

    Args:
        radius: ε > 0.
        low, high: ends of the interval.
    Returns:
        A float.
    Raises:
        ValueError: ``radius`` is not positive.
    """
    _check.check_positive("radius", radius)
    return math.log(max(1, math.ceil((high - low) / (2 * radius))))


def predicted_gap(algorithm: str, num_steps: Steps, regime: str, step_size: Number, mu: Number) -> torch.Tensor:
    """How the generalization gap moves with k, up to a constant factor (paper, Sec. 5 (i) to (iii)).

        under- and over-parameterized: Stab(k),   about right: Stab(k) Cvg(k)

    Stab is that in Q: it stands before ‖Q_θ - Q_θ'‖ in Eq. 17, and so in Eq. 18 and Theorem 5.1. After one step from
    zero nothing depends on Q, and the prediction is 0.

    Args:
        algorithm, num_steps, step_size, mu: as in ``convergence_rate``.
        regime: ``"under"``, ``"about_right"`` or ``"over"``.
    Returns:
        A tensor of the broadcast shape, for ‖b‖ = 1.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    check_regime(regime)
    stab = stability(algorithm, num_steps, step_size, mu).wrt_Q
    if regime == "about_right":
        return stab * convergence_rate(algorithm, num_steps, step_size, mu)
    return stab


def predicted_error(
    algorithm: str, num_steps: Steps, regime: str, step_size: Number, mu: Number, *, gap_factor: Number
) -> torch.Tensor:
    """What test error is left after k steps, as a part of that of no step: bias and generalization gap together.

        Cvg(k) + g μ² Stab(k)    under- and over-parameterized
        Cvg(k) (1 + g μ² Stab(k))    about right

    μ² Stab(k), with Stab in Q and ‖b‖ = 1, grows from 0 to 1. What no depth changes, the network's own error, is left
    out: it does not matter to a choice.

    Args:
        algorithm, num_steps, regime, step_size, mu: as in ``predicted_gap``.
        gap_factor: g ≥ 0, which falls like 1/√n with the number of training samples; see ``recommend``.
    Returns:
        A tensor of the broadcast shape.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    check_regime(regime)
    stab = stability(algorithm, num_steps, step_size, mu).wrt_Q
    return _error(convergence_rate(algorithm, num_steps, step_size, mu), stab, regime, mu, gap_factor)


def schedule_error(schedule: Schedule, regime: str, mu: float, L: float, *, gap_factor: Number) -> torch.Tensor:
    """``predicted_error`` after t = 0 … k steps of any schedule φ, β, γ.

    Args:
        schedule: φ, β, γ, each ``[k]``, e.g. of ``schedules.chebyshev``.
        mu, L: bounds of the spectrum of Q.
        regime, gap_factor: as in ``predicted_error``.
    Returns:
        ``[k + 1]`` float64.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    check_regime(regime)
    stab = schedule_stability(schedule, mu, L).wrt_Q
    return _error(schedule_convergence(schedule, mu, L), stab, regime, mu, gap_factor)


def predicted_order(num_steps: torch.Tensor, regime: str, step_size: Number, mu: Number) -> torch.Tensor:
    """Which of GD and NAG has the larger generalization gap at each k, by ``predicted_gap``.

    Args:
        num_steps: k, a tensor of integers.
        regime, step_size, mu: as in ``predicted_gap``; both algorithms take the same step size.
    Returns:
        A tensor in the shape of ``num_steps``: 1 where NAG's is larger, -1 where GD's is, 0 where they are equal.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    gd, nag = (predicted_gap(algorithm, num_steps, regime, step_size, mu) for algorithm in ("gd", "nag"))
    equal = torch.isclose(gd, nag, rtol=1e-9, atol=0)
    return torch.where(equal, 0, torch.sign(nag - gd)).to(torch.int64)


def check_regime(regime):
    """One of ``REGIMES``."""
    if regime not in REGIMES:
        raise ValueError(f"regime: expected one of {REGIMES}, got {regime!r}")


def _error(cvg, stab, regime, mu, gap_factor):
    """Bias and gap, ``predicted_error``."""
    if not isinstance(gap_factor, torch.Tensor) and not gap_factor >= 0:
        raise ValueError(f"gap_factor: expected a number ≥ 0, got {gap_factor}")
    gap = stab * cvg if regime == "about_right" else stab
    return cvg + gap_factor * mu**2 * gap


def _vectors(name, x, dims):
    x = torch.as_tensor(x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected floating-point numbers, got dtype {x.dtype}")
    if x.dim() != dims or not x.numel():
        expected = "[n]" if dims == 1 else "[n, d]"
        raise ValueError(f"{name}: expected shape {expected} with n ≥ 1, got {list(x.shape)}")
    return x.detach().double()


def _dense(name, Q):
    if not isinstance(Q, torch.Tensor) and hasattr(Q, "to_dense"):
        Q = Q.to_dense()
    Q = torch.as_tensor(Q)
    if Q.dim() != 3 or Q.shape[-1] != Q.shape[-2]:
        raise ValueError(f"{name}: expected shape [n, d, d], got {list(Q.shape)}")
    return Q.detach().double()
