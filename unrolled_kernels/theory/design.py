"""Help for the designer of a layer: the spectrum of Q, whether a layer is safe on it, and which layer to take."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unrolled_kernels import _check, schedules
from unrolled_kernels.annotations import Number, Quadratic
from unrolled_kernels.layers import UnrolledGD, UnrolledMomentum, UnrolledNAG
from unrolled_kernels.prox import Prox, check_prox
from unrolled_kernels.quadratics import Diagonal
from unrolled_kernels.regions import check_spectrum
from unrolled_kernels.theory.bounds import check_regime, predicted_error, schedule_error
from unrolled_kernels.theory.empirical import make_layer
from unrolled_kernels.theory.properties import ALGORITHMS, convergence_rate, schedule_convergence, stable_region

# up to this size a full eigendecomposition is as fast as the products of Lanczos
_EXACT_DIM = 256
_LANCZOS_BLOCK = 32
_GRID = 257
# inside the region by a hundredth, so that a learned step size held in it can start there
_MARGIN = 0.99
CANDIDATES = ("gd", "nag", "chebyshev")
# fitted to the test errors of the synthetic study on the authors' samples, n = 100, hidden sizes 0, 16, 32
GAP_FACTORS = {"under": 0.055, "about_right": 0.65, "over": 0.12}


@dataclass(frozen=True, eq=False)
class LayerCheck:
    """What ``check`` found, one value for each sample.

    Attributes:
        mu: lower bound of the spectrum of Q, ``[*batch]``.
        L: its upper bound, ``[*batch]``.
        largest_step_size: the upper end of the paper's stable region for this spectrum; None for ``UnrolledMomentum``.
        in_stable_region: bool ``[*batch]``, every step size is inside it; None for ``UnrolledMomentum``. Sufficient for
            ``stable`` only.
        stable: bool ``[*batch]``, the error shrinks when the layer's schedule goes on, repeated for ever.
        rate: the factor of the error for one step in the long run, ``[*batch]``.
        error_factor: the largest ‖y_k - y*‖ / ‖y_0 - y*‖ of any b with this spectrum, ``[*batch]``; with a prox an
            upper bound of it, and for momentum and a prox NaN: none is known.
    """

    mu: torch.Tensor
    L: torch.Tensor
    largest_step_size: torch.Tensor | None
    in_stable_region: torch.Tensor | None
    stable: torch.Tensor
    rate: torch.Tensor
    error_factor: torch.Tensor

    def __str__(self) -> str:
        samples = self.stable.numel()
        if not samples:
            return "no samples"
        spectrum = f"spectrum in [{self.mu.min():.4g}, {self.L.max():.4g}]"
        unstable = int((~self.stable).sum())
        verdict = f"UNSTABLE on {unstable} of {samples} samples" if unstable else "stable"
        worst = self.error_factor.max()
        factor = "no bound of the error factor" if worst.isnan() else f"error factor at most {worst:.4g}"
        lines = [f"{verdict}: {spectrum}, {factor}"]
        if self.in_stable_region is not None and self.largest_step_size is not None:
            inside = int(self.in_stable_region.sum())
            largest = self.largest_step_size.min()
            lines.append(f"inside the paper's stable region (step sizes up to {largest:.4g}): {inside} of {samples}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Recommendation:
    """What ``recommend`` advises.

    Attributes:
        algorithm: ``"gd"``, ``"nag"`` or ``"chebyshev"``.
        step_size: φ; None for Chebyshev's schedule, which follows from μ and L.
        num_steps: k.
        mu, L: bounds of the spectrum.
        error_factor: Cvg(k, φ).
        predicted_error: what is left of the test error of no step, see ``bounds.predicted_error``.
        reason: why, in a sentence or two.
        prox: that of the layer, or None.
    """

    algorithm: str
    step_size: float | None
    num_steps: int
    mu: float
    L: float
    error_factor: float
    predicted_error: float
    reason: str
    prox: Prox | None = None

    def make_layer(self) -> UnrolledGD | UnrolledNAG | UnrolledMomentum:
        """The layer with this algorithm, step size, depth and prox."""
        if self.step_size is None:
            return UnrolledMomentum.chebyshev(self.num_steps, self.mu, self.L, learnable=False)
        return make_layer(self.algorithm, self.num_steps, self.step_size, self.mu, prox=self.prox)


def spectrum_bounds(
    Q: Quadratic, *, method: str = "auto", tolerance: float = 1e-3, max_steps: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds [μ, L] of the spectrum of each sample's Q: exact, or for a large dense Q by Lanczos iteration.

    Lanczos with full reorthogonalisation from a fixed random start, all samples at once. Its extreme Ritz values lie
    inside the spectrum; they are moved outwards by their residuals, so that each end is a bound unless the start misses
    an extreme eigenvector altogether.

    Args:
        Q: symmetric ``[*batch, d, d]`` tensor, or a ``Diagonal`` / ``Spectral``, which are exact whatever the method.
        method: ``"exact"`` (all eigenvalues), ``"lanczos"``, or ``"auto"``: exact for d ≤ 256.
        tolerance: Lanczos stops where the residual of both ends is at most this part of their Ritz value.
        max_steps: products with Q at most; at d the result is exact.
    Returns:
        Two tensors ``[*batch]``, detached, float32 at least.
    Raises:
        TypeError: Q of the wrong type.
        ValueError: Q is not square or not symmetric, or an unknown method; the message names it.
    """
    _check.check_tensors(_check.check_Q(Q))
    if method not in ("auto", "exact", "lanczos"):
        raise ValueError(f"method: expected one of ('auto', 'exact', 'lanczos'), got {method!r}")
    if Q.shape[-1] == 0:
        raise ValueError("Q: expected matrices of size d ≥ 1, got d = 0")
    if not isinstance(Q, torch.Tensor):
        low, high = (x.detach() for x in Q.spectrum_bounds())
        work = torch.promote_types(low.dtype, torch.float32)
        return low.to(work), high.to(work)
    eps = torch.finfo(Q.dtype).eps
    Q = Q.detach().to(torch.promote_types(Q.dtype, torch.float32))
    _refuse_asymmetric(Q, eps)
    if method == "exact" or (method == "auto" and Q.shape[-1] <= _EXACT_DIM):
        eigenvalues = torch.linalg.eigvalsh(Q)
        return eigenvalues[..., 0], eigenvalues[..., -1]
    low, high = _lanczos(Q.reshape(-1, *Q.shape[-2:]), tolerance, max_steps)
    return low.reshape(Q.shape[:-2]), high.reshape(Q.shape[:-2])


def check(layer: UnrolledGD | UnrolledNAG | UnrolledMomentum, Q: Quadratic) -> LayerCheck:
    """Is a layer safe on these energies, and how much of the error does it remove?

    The layer itself runs on the scalar energies λy²/2 for a grid of λ over [μ, L]: y_k/y_0 is there the factor p_k(λ)
    by which it multiplies the part of the error in the eigenspace of λ, for any schedule.

    A prox changes neither the region nor ``stable`` and ``rate``. Its map is non-expansive, so that a step of gradient
    descent keeps its contraction max_λ |1 - φ_t λ|, and the product of these is ``error_factor``. In the long run the
    map keeps the same entries free and moves none of the others: the steps are then those on a principal submatrix of
    Q, whose spectrum lies in [μ, L] (Cauchy's interlacing).

    Args:
        layer: an ``UnrolledGD``, ``UnrolledNAG`` or ``UnrolledMomentum``.
        Q: symmetric ``[*batch, d, d]`` tensor, or a ``Diagonal`` / ``Spectral``.
    Returns:
        A ``LayerCheck``; print it for a summary.
    Raises:
        TypeError: layer or Q of the wrong type.
        ValueError: Q is not square or not symmetric, or the layer's coefficients do not fit its batch.
    """
    if not isinstance(layer, (UnrolledGD, UnrolledNAG, UnrolledMomentum)):
        raise TypeError(
            f"layer: expected an UnrolledGD, UnrolledNAG or UnrolledMomentum, got {type(layer).__name__}; "
            "for an RNN see theory.rnn_contraction"
        )
    mu, L = (x.double() for x in spectrum_bounds(Q))
    with torch.no_grad():
        # Chebyshev points, dense at the ends, where the factor is largest
        points = (1 - torch.linspace(0, torch.pi, _GRID, dtype=mu.dtype, device=mu.device).cos()) / 2
        grid = mu.unsqueeze(-1) + (L - mu).unsqueeze(-1) * points  # [*batch, grid]
        phi, beta, gamma = (c.to(grid).expand(*mu.shape, -1) for c in _schedule(layer, mu))
        rate = _long_run_rate(grid, phi, beta, gamma, layer.num_steps)
        if layer.prox is None:
            factors = layer(Diagonal(grid), torch.zeros_like(grid), y0=torch.ones_like(grid))
            factor = factors.abs().amax(-1)
        elif bool((beta == 0).all()) and bool((gamma == 0).all()):
            # the largest of each step, where without a prox it is that of their product
            steps = phi.expand(*phi.shape[:-1], layer.num_steps).unsqueeze(-2)
            factor = (1 - steps * grid.unsqueeze(-1)).abs().amax(-2).prod(-1)
        else:
            factor = torch.full_like(mu, torch.nan)
    largest = inside = None
    if not isinstance(layer, UnrolledMomentum):
        largest = torch.as_tensor(layer.largest_stable_step(mu, L))
        # the end belongs to the region, and the eigenvalues carry the rounding of their dtype
        inside = ((phi > 0) & (phi <= largest.unsqueeze(-1) * (1 + 1e-6)) & (mu > 0).unsqueeze(-1)).all(-1)
    # max() of a NaN is NaN, and NaN is not stable
    stable = (mu > 0) & ((rate < 1) if layer.num_steps else torch.isfinite(rate))
    return LayerCheck(mu, L, largest, inside, stable, rate, factor)


def recommend(
    mu: Number,
    L: Number,
    num_steps: int,
    regime: str,
    *,
    algorithms: Sequence[str] | None = None,
    gap_factor: float | None = None,
    tolerance: float = 1.0,
    prox: Prox | None = None,
) -> Recommendation:
    """Which algorithm, step size and depth have the smallest predicted test error (paper, Sec. 5).

    Accuracy and gap are predicted together, ``bounds.predicted_error``, for every algorithm and every depth in the
    budget, GD and Nesterov's method with 0.99 of their largest stable step size. Of those within a factor 1 + tolerance
    of the smallest, the most steps are taken: a gap is predicted to a factor of two at best, and in the synthetic study
    too few steps cost more than too many (docs/synthetic).

    Args:
        mu, L: bounds of the spectrum of Q, 0 < mu ≤ L.
        num_steps: the budget of steps, at least 1.
        regime: ``"under"``, ``"about_right"`` or ``"over"``, the parameterization of the neural module.
        algorithms: to choose from, of ``"gd"``, ``"nag"`` and ``"chebyshev"``, default all; the last is for bounds that
            are sure, since outside [μ, L] its error grows, and not for a prox.
        gap_factor: g, how much a network that sees n samples adds to the test error, as a part of that of no step,
            where Stab has come to its limit. It falls like 1/√n. Default: that of the synthetic study at n = 100,
            ``GAP_FACTORS``; measure your own by one trained layer.
        tolerance: how much predicted error, relative to the smallest, more steps may cost.
        prox: what ends the layer's steps. The predictions are those without it; Nesterov's method then takes no step
            beyond 1/L, up to where its rate is proved with a prox (docs/mathematics.md).
    Returns:
        A ``Recommendation``.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    mu, L = (x.item() if isinstance(x, torch.Tensor) else x for x in (mu, L))
    check_spectrum(mu, L)
    check_regime(regime)
    budget = _check.check_num_steps(num_steps)
    if budget < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected a number ≥ 0, got {tolerance}")
    check_prox(prox)
    candidates = CANDIDATES if prox is None else ALGORITHMS
    algorithms = candidates if algorithms is None else algorithms
    if not algorithms or not set(algorithms) <= set(candidates):
        ending = "" if prox is None else " with a prox, which Chebyshev's schedule is not made for"
        raise ValueError(f"algorithms: expected some of {candidates}{ending}, got {algorithms!r}")
    g = GAP_FACTORS[regime] if gap_factor is None else gap_factor
    steps = {name: _MARGIN * float(stable_region(name, mu, L)[1]) for name in algorithms if name != "chebyshev"}
    if prox is not None and "nag" in steps:
        steps["nag"] = min(steps["nag"], 1 / L)
    depths = torch.arange(1, budget + 1)
    errors = {name: predicted_error(name, depths, regime, phi, mu, gap_factor=g) for name, phi in steps.items()}
    if "chebyshev" in algorithms:
        schedule = schedules.chebyshev(budget, mu, L)
        errors["chebyshev"] = schedule_error(schedule, regime, mu, L, gap_factor=g)[1:]
    algorithm, depth = deepest_within(errors, tolerance)
    error, phi = errors[algorithm][depth - 1].item(), steps.get(algorithm)
    reason = f"{depth} steps of {algorithm} leave {error:.3g} of the test error of none, gap included."
    for other, values in errors.items():
        if other != algorithm:
            reason += f" {other} leaves {values.min():.3g} at best within {budget}, at {int(values.argmin()) + 1}."
    if phi is None:
        factor = schedule_convergence(schedules.chebyshev(depth, mu, L), mu, L)[-1].item()
    else:
        factor = convergence_rate(algorithm, depth, phi, mu).item()
    return Recommendation(algorithm, phi, depth, mu, L, factor, error, reason, prox)


def deepest_within(errors: dict[str, torch.Tensor], tolerance: float) -> tuple[str, int]:
    """The deepest choice whose error is within a tolerance of the smallest, of those the one of least error.

    Args:
        errors: of k = 1, 2 … steps of each algorithm, infinite where that depth is not to be chosen.
        tolerance: relative to the smallest.
    Returns:
        The algorithm and k.
    """
    limit = (1 + tolerance) * min(values.min().item() for values in errors.values())
    depth, _, algorithm = max(
        (k, -value, name)
        for name, values in errors.items()
        for k, value in enumerate(values.tolist(), start=1)
        if value <= limit
    )
    return algorithm, depth


def _refuse_asymmetric(Q, eps):
    """Rounding of Q = R diag(λ) Rᵀ in its own dtype is forgiven."""
    if Q.numel() and not bool((Q - Q.mT).abs().amax() <= 64 * eps * Q.abs().amax()) and bool(Q.isfinite().all()):
        raise ValueError(
            "Q: expected symmetric matrices, got one with |Q - Qᵀ| up to "
            f"{(Q - Q.mT).abs().amax():.3g}; its eigenvalues may not bound the algorithm"
        )


def _lanczos(Q, tolerance, max_steps):
    """Outer bounds of the spectrum of Q ``[B, d, d]``, two tensors ``[B]``."""
    B, d, _ = Q.shape
    steps = min(d, max_steps)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(B, d, generator=generator, dtype=torch.float64).to(Q)
    basis = Q.new_zeros(B, steps, d)
    diagonal, off = Q.new_zeros(B, steps), Q.new_zeros(B, steps)
    v = v / v.norm(dim=-1, keepdim=True)
    for j in range(steps):
        basis[:, j] = v
        w = (Q @ v.unsqueeze(-1)).squeeze(-1)
        # past the end of an invariant subspace v = 0: a Rayleigh quotient there, inside the spectrum, changes no bound
        ended = off[:, j - 1] == 0 if j else torch.zeros_like(off[:, 0], dtype=torch.bool)
        diagonal[:, j] = torch.where(ended, diagonal[:, 0], (w * v).sum(-1))
        # twice is enough (Parlett, The Symmetric Eigenvalue Problem, Sec. 6.9)
        known = basis[:, : j + 1]
        for _ in range(2):
            w = w - ((known @ w.unsqueeze(-1)).mT @ known).squeeze(-2)
        norm = w.norm(dim=-1)
        rounding = 16 * torch.finfo(Q.dtype).eps * diagonal.abs().amax(-1)
        off[:, j] = torch.where(ended | (norm <= rounding), 0, norm)
        v = torch.where(off[:, j : j + 1] > 0, w / norm.unsqueeze(-1), 0)
        last = j + 1 == steps
        if last or (j + 1) % _LANCZOS_BLOCK == 0:
            side = torch.diag_embed(off[:, :j], 1)
            ritz, vectors = torch.linalg.eigh(torch.diag_embed(diagonal[:, : j + 1]) + side + side.mT)
            ends = ritz[:, [0, -1]]
            residuals = off[:, j : j + 1] * vectors[:, -1, [0, -1]].abs()
            if last or bool((residuals <= tolerance * ends.abs()).all()):
                break
    return ends[:, 0] - residuals[:, 0], ends[:, 1] + residuals[:, 1]


def _schedule(layer, mu):
    """φ, β, γ of a layer, each broadcastable to ``(*batch, num_steps)`` and at least 1-dim."""
    if isinstance(layer, UnrolledMomentum):
        coefficients = layer.step_sizes, layer.momentum, layer.extrapolation
    elif isinstance(layer, UnrolledNAG):
        beta = schedules.nesterov_momentum(layer.step_size, mu.unsqueeze(-1) if layer.mu is None else layer.mu)
        coefficients = layer.step_size, beta, beta
    else:
        coefficients = layer.step_size, 0.0, 0.0
    coefficients = (torch.as_tensor(c, dtype=mu.dtype, device=mu.device) for c in coefficients)
    return tuple(c.unsqueeze(0) if c.dim() == 0 else c for c in coefficients)


def _long_run_rate(grid, phi, beta, gamma, num_steps):
    """Largest spectral radius over the grid of one period of (y_t, y_{t-1}) ↦ (y_{t+1}, y_t), for each step of it."""
    period = num_steps if max(c.shape[-1] for c in (phi, beta, gamma)) > 1 else min(num_steps, 1)
    phi, beta, gamma = (c.expand(*c.shape[:-1], period) for c in (phi, beta, gamma))
    product = torch.eye(2, dtype=grid.dtype, device=grid.device).expand(*grid.shape, 2, 2)
    for t in range(period):
        p, m, g = (c[..., t : t + 1] for c in (phi, beta, gamma))
        first = torch.stack([1 + m - p * grid * (1 + g), p * grid * g - m], -1)  # [*batch, grid, 2]
        second = torch.tensor([1.0, 0.0], dtype=grid.dtype, device=grid.device).expand_as(first)
        product = torch.stack([first, second], -2) @ product
    trace, determinant = product.diagonal(dim1=-2, dim2=-1).sum(-1), torch.linalg.det(product)
    discriminant = trace**2 - 4 * determinant
    # both roots of r² - trace r + determinant: real, or a conjugate pair of modulus √determinant
    real = (trace.abs() + discriminant.clamp(min=0).sqrt()) / 2
    radius = torch.where(discriminant < 0, determinant.clamp(min=0).sqrt(), real)
    return radius.amax(-1) ** (1 / max(period, 1))
