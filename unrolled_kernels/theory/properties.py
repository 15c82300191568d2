"""The properties of algorithm layers (paper, Sec. 3, Tables 1 and 2), as functions of depth, step size and spectrum.

The spectrum of Q lies in [μ, L], y_0 = 0, k is the number of steps, φ the step size, s = √(φμ). The paper prints orders
in k; the constants here are derived. Numbers and tensors broadcast against each other and give tensors: float64 where
every argument is a Python number. Everything is differentiable in what is not a number of steps. Floating-point tensors
are not read, so that nothing waits for a device: that φ lies in the stable region is checked for floats only.
"""

import math
from typing import NamedTuple

import torch

from unrolled_kernels import _check
from unrolled_kernels.annotations import Number, Schedule, Steps, Weights
from unrolled_kernels.regions import CellNorms, check_spectrum, largest_stable_step

ALGORITHMS = ("gd", "nag")


class Stability(NamedTuple):
    """Lipschitz constants of Alg^k(Q, b): in Q, for the spectral norm, and in b."""

    wrt_Q: torch.Tensor
    wrt_b: torch.Tensor


def stable_region(algorithm: str, mu: Number, L: Number) -> tuple[float, Number]:
    """The paper's range of step sizes whose iterates stay bounded for any k (Table 1).

        GD: (0, 2/(μ+L)],   NAG: (0, 4/(μ+3L)]

    The range of an RNN is ``rnn_contraction(weights, ...) < 1`` (Table 2).

    Args:
        algorithm: ``"gd"`` or ``"nag"``.
        mu, L: bounds of the spectrum of Q, floats or tensors.
    Returns:
        The pair (0, largest step size).
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    check_algorithm(algorithm)
    check_spectrum(mu, L)
    return 0.0, largest_stable_step(algorithm, mu, L)


def convergence_rate(algorithm: str, num_steps: Steps, step_size: Number, mu: Number) -> torch.Tensor:
    """Cvg(k, φ): the largest ‖y_k - y*‖ / ‖y_0 - y*‖ of the class (paper, Eq. 6 and Table 1; constants derived).

        GD: (1 - φμ)^k,   NAG: (1 + ks)(1 - s)^k

    Attained at the eigenvalue μ, for φ in the stable region.

    Args:
        algorithm: ``"gd"`` or ``"nag"``.
        num_steps: k ≥ 0, an int or a tensor of integers.
        step_size: φ.
        mu: μ > 0.
    Returns:
        The rate, a tensor of the broadcast shape.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    k, phi, mu = _arguments(algorithm, num_steps, step_size, mu)
    if algorithm == "gd":
        return (1 - phi * mu) ** k
    s = (phi * mu).sqrt()
    return (1 + k * s) * (1 - s) ** k


def stability(algorithm: str, num_steps: Steps, step_size: Number, mu: Number, *, b_norm: Number = 1.0) -> Stability:
    """Stab(k, φ): how far y_k moves with the energy (paper, Eq. 7 and Table 1; constants derived).

        ‖Alg^k(Q, b) - Alg^k(Q', b')‖ ≤ wrt_Q ‖Q - Q'‖₂ + wrt_b ‖b - b'‖
        wrt_b(k) = φ Σ_{j<k} p_j = (1 - Cvg(k, φ))/μ,   wrt_Q = φ‖b‖ Σ_{j<k} p_{k-1-j} q_j
        GD:  p_j = (1 - φμ)^j,       q_j = wrt_b(j)
        NAG: p_j = (j+1)(1 - s)^j,   q_j = wrt_b(j) + φ j (1 - s)^j/(1 + s)

    p_{k-1-j} is how much of an error in the gradient of step j is left at step k, and q_j ‖b‖ how far from zero that
    gradient is taken, both at the eigenvalue μ.

    wrt_Q ≤ (‖b‖/μ) wrt_b. Both are attained where all eigenvalues are μ; Q and Q' need not commute.

    Args:
        algorithm, num_steps, step_size, mu: as in ``convergence_rate``.
        b_norm: ‖b‖; where b and b' differ, the smaller norm will do.
    Returns:
        A ``Stability``, two tensors of the broadcast shape.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    k, phi, mu = _arguments(algorithm, num_steps, step_size, mu)
    # sums of positive terms in a last dimension: the closed forms lose their digits for small φμ
    j = torch.arange(int(k.max()) if k.numel() else 0, dtype=k.dtype, device=k.device)
    k, phi, mu = (x.unsqueeze(-1) for x in (k, phi, mu))
    after = (k - 1 - j).clamp(min=0)
    if algorithm == "gd":
        factor = 1 - phi * mu
        p, p_after = factor**j, factor**after
        q = phi * (p.cumsum(-1) - p)
    else:
        s = (phi * mu).sqrt()
        decay = (1 - s) ** j
        p, p_after = (j + 1) * decay, (after + 1) * (1 - s) ** after
        q = phi * (p.cumsum(-1) - p + j * decay / (1 + s))
    past = j >= k
    wrt_b = (phi * p).masked_fill(past, 0).sum(-1)
    wrt_Q = (phi * p_after * q).masked_fill(past, 0).sum(-1)
    return Stability(b_norm * wrt_Q, wrt_b)


def sensitivity(
    algorithm: str, num_steps: Steps, smallest_step_size: Number, mu: Number, *, b_norm: Number = 1.0
) -> torch.Tensor:
    """Sens(k): how far y_k moves with the step size (paper, Eq. 8 and Table 1; constants derived).

        ‖Alg_φ^k(Q, b) - Alg_φ'^k(Q, b)‖ ≤ Sens(k) |φ - φ'|      for φ, φ' in [c₀, largest stable step size]
        GD: ‖b‖ k (1 - c₀μ)^{k-1},   NAG: ‖b‖ k(k+1)/2 · (1 - √(c₀μ))^{k-1}

    Attained at the eigenvalue μ for φ, φ' → c₀. The paper prints the order k³ for NAG; k² is enough.

    Args:
        algorithm, num_steps, mu: as in ``convergence_rate``.
        smallest_step_size: c₀ > 0.
        b_norm: ‖b‖.
    Returns:
        A tensor of the broadcast shape.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    k, c0, mu = _arguments(algorithm, num_steps, smallest_step_size, mu, name="smallest_step_size")
    before = (k - 1).clamp(min=0)
    if algorithm == "gd":
        return b_norm * k * (1 - c0 * mu) ** before
    return b_norm * k * (k + 1) / 2 * (1 - (c0 * mu).sqrt()) ** before


def schedule_convergence(schedule: Schedule, mu: float, L: float, *, points: int = 513) -> torch.Tensor:
    """Cvg(t), t = 0 … k, of any schedule φ, β, γ: the largest |e_t(λ)/e_0| over the spectrum (paper, Eq. 6).

    The error of a first-order method is a polynomial of Q, so that its largest value is found on scalar energies λ:
    the recurrence runs on a grid of λ that is dense at the ends of [μ, L].

    Args:
        schedule: φ, β, γ, each ``[k]``, e.g. of ``schedules.chebyshev``.
        mu, L: bounds of the spectrum of Q.
        points: of the grid.
    Returns:
        ``[k + 1]`` float64.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    phi, beta, gamma, grid = _on_grid(schedule, mu, L, points)
    one = torch.ones_like(grid)
    return torch.stack([e.abs().amax() for e, _ in _recurrence(phi, beta, gamma, grid, one, one, 0.0)])


def schedule_stability(schedule: Schedule, mu: float, L: float, *, points: int = 513) -> Stability:
    """Stab(t), t = 0 … k, of any schedule φ, β, γ, for ‖b‖ = 1 (paper, Eq. 7).

        wrt_b(t) = max_λ |y_t(λ)|,   wrt_Q(t) = Σ_{j<t} φ_j max_λ |p_{tj}(λ)| max_λ |z_j(λ)|

    y and the extrapolated z are the states on the scalar energies λ with b = 1, and p_{tj} is what is left at step t of
    an error in the gradient of step j. Q and Q' need not commute, so the two maxima are taken apart: wrt_Q is a bound,
    and attained where both are at one λ, as they are at μ for GD and NAG (``stability``).

    Args:
        schedule, mu, L, points: as in ``schedule_convergence``.
    Returns:
        A ``Stability`` of two ``[k + 1]`` float64 tensors.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    phi, beta, gamma, grid = _on_grid(schedule, mu, L, points)
    zero, k = torch.zeros_like(grid), len(phi)
    states = list(_recurrence(phi, beta, gamma, grid, zero, zero, 1.0))
    wrt_b = torch.stack([y.abs().amax() for y, _ in states])
    reach = torch.stack([z.abs().amax() for _, z in states])
    wrt_Q = torch.zeros_like(wrt_b)
    # row j: an error of 1 that enters with y_{j+1}; it was not there at step j
    left, before = (torch.zeros(k, len(grid), dtype=grid.dtype) for _ in range(2))
    for t in range(k):
        move = left[:t] - before[:t]
        step = left[:t] + beta[t] * move - phi[t] * grid * (left[:t] + gamma[t] * move)
        before[:t], left[:t] = left[:t].clone(), step
        left[t] = 1
        wrt_Q[t + 1] = (phi.abs() * reach[:-1])[: t + 1] @ left[: t + 1].abs().amax(1)
    return Stability(wrt_Q, wrt_b)


def rnn_stability(weights: Weights, num_steps: Steps, *, mu: Number, L: Number, b_norm: Number = 1.0) -> Stability:
    """Stab(k, φ) of an RNN cell (paper, Table 2; constants derived).

        wrt_b = κ (1 - c^k)/(1 - c),   wrt_Q = κ² ‖b‖ ((1 - c^k)/(1 - c))²,   κ = ‖V‖ ‖W₂‖ Π_{l≥2} ‖Wˡ‖

    with c from ``rnn_contraction``; bounds, whether c < 1 or not, but bounded in k only for c < 1.

    Args:
        weights, mu, L: as in ``rnn_contraction``.
        num_steps: k ≥ 0, an int or a tensor of integers.
        b_norm: ‖b‖.
    Returns:
        A ``Stability`` in the shape of ``num_steps``, differentiable in the weights.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    norms = CellNorms.of(weights, mu, L)
    growth = norms.kappa * _geometric(norms.contraction, num_steps)
    return Stability(b_norm * growth**2, growth)


def rnn_sensitivity(
    weights: Weights, num_steps: Steps, *, mu: Number, L: Number, radius: float = 0.0, b_norm: Number = 1.0
) -> torch.Tensor:
    """Sens(k) of an RNN cell near its weights φ (paper, Table 2; constants derived).

        ‖RNN_φ'^k(Q, b) - RNN_φ''^k(Q, b)‖ ≤ Sens(k) ‖φ' - φ''‖_F     for ‖φ' - φ‖_F, ‖φ'' - φ‖_F ≤ radius

    One cell moves by at most a = √(Σ_j a_j²) per unit of φ, with a_j the product of all norms but that of weight j; k
    cells by a (1 - c^k)/(1 - c). Norms and c are those at the edge of the ball, and the state is at most
    κ‖b‖(1 - c^k)/(1 - c).

    Args:
        weights, num_steps, mu, L, b_norm: as in ``rnn_stability``.
        radius: of the ball, in the Frobenius norm of all weights together.
    Returns:
        A tensor in the shape of ``num_steps``, differentiable in the weights.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    if radius < 0:
        raise ValueError(f"radius: expected a number ≥ 0, got {radius}")
    norms = CellNorms.of(weights, mu, L, radius)
    growth = _geometric(norms.contraction, num_steps)
    state = norms.kappa * b_norm * growth
    hidden = norms.input * state + norms.W2 * b_norm
    chain = [norms.V, *norms.inner]
    # the first layer: V̂ Π‖Wˡ‖ times ‖y‖ for W₁ and times ‖Qy + b‖ for W₂
    slopes = [math.prod(chain) * state, math.prod(chain) * (L * state + b_norm)]
    slopes += [math.prod([*chain[:i], *chain[i + 1 :]]) * hidden for i in range(len(chain))]
    return torch.stack(slopes).square().sum(0).sqrt() * growth


def rnn_best_convergence_rate(num_steps: Steps, mu: Number, L: Number) -> torch.Tensor:
    """min_φ Cvg(k, φ) of an RNN is at most ((L-μ)/(L+μ))^k: its cell can be gradient descent (paper, Table 2).

    Hidden width 2d, W₁ = [I; -I], W₂ = -φ[I; -I], Wˡ = I, V = [I, -I] give the step y - φ(Qy + b). In the worst case an
    RNN does not converge at all. Those weights have c_φ up to 2(1 - φμ), often above 1: the region is sufficient only.

    Args:
        num_steps: k ≥ 0, an int or a tensor of integers.
        mu, L: bounds of the spectrum.
    Returns:
        A tensor in the shape of ``num_steps``.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    return convergence_rate("gd", num_steps, stable_region("gd", mu, L)[1], mu)


def _on_grid(schedule, mu, L, points):
    """φ, β, γ ``[k]`` and Chebyshev points of [μ, L], float64."""
    check_spectrum(mu, L)
    if not isinstance(schedule, (tuple, list)) or len(schedule) != 3:
        raise TypeError(f"schedule: expected the three tensors φ, β, γ, got {type(schedule).__name__}")
    phi, beta, gamma = (torch.as_tensor(x).detach().double().cpu() for x in schedule)
    if phi.dim() != 1 or phi.shape != beta.shape or phi.shape != gamma.shape:
        shapes = ", ".join(str(list(x.shape)) for x in (phi, beta, gamma))
        raise ValueError(f"schedule: expected φ, β, γ of one shape [num_steps], got {shapes}")
    grid = mu + (L - mu) * (1 - torch.linspace(0, math.pi, points, dtype=torch.float64).cos()) / 2
    return phi, beta, gamma, grid


def _recurrence(phi, beta, gamma, grid, y, before, b):
    """(y_t, z_t) for t = 0 … k on the scalar energies ``grid``, from y_0 and y_{-1}; z is the extrapolated point."""
    for f, m, g in zip(phi, beta, gamma, strict=True):
        step = y - before
        z = y + g * step
        yield y, z
        before, y = y, y + m * step - f * (grid * z + b)
    yield y, y


def check_algorithm(algorithm):
    """``"gd"`` or ``"nag"``."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: expected one of {ALGORITHMS}, got {algorithm!r}")


def _geometric(c, num_steps):
    """Σ_{i<k} c^i = (1 - c^k)/(1 - c), also at c = 1."""
    k = _steps(num_steps).to(c.device, c.dtype)
    i = torch.arange(int(k.max()) if k.numel() else 0, dtype=c.dtype, device=c.device)
    return torch.where(i < k.unsqueeze(-1), c**i, 0).sum(-1)


def _steps(num_steps):
    if not isinstance(num_steps, torch.Tensor):
        return torch.tensor(_check.check_num_steps(num_steps))
    if num_steps.is_floating_point() or num_steps.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"num_steps: expected an int or a tensor of integers, got a tensor of dtype {num_steps.dtype}")
    return num_steps


def _arguments(
    algorithm: str, num_steps: Steps, step_size: Number, mu: Number, name: str = "step_size"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k, φ, μ as floating-point tensors of one dtype on one device."""
    check_algorithm(algorithm)
    for argument, value in ((name, step_size), ("mu", mu)):
        _check.check_number(argument, value)
        _check.check_positive(argument, value)
    if not isinstance(step_size, torch.Tensor) and not isinstance(mu, torch.Tensor) and step_size * mu > 1 + 1e-12:
        raise ValueError(
            f"{name}: expected a value in the stable region, at most 1/mu = {1 / mu:.6g} for any L, got {step_size}"
        )
    tensors = [x for x in (step_size, mu) if isinstance(x, torch.Tensor)]
    dtype = tensors[0].dtype if len(tensors) == 1 else torch.float64
    if len(tensors) == 2:
        dtype = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
    k = _steps(num_steps)
    placed = [x for x in (*tensors, k) if x.dim() > 0] or tensors or [k]
    place = lambda x: torch.as_tensor(x, dtype=dtype, device=placed[0].device)
    return place(k), place(step_size), place(mu)
