"""The properties of ``theory.properties`` measured: the largest ratio that the layers reach on energies of the class.

Every function draws energies with spectrum in [μ, L], adds those on which the bounds are attained, runs the layers in
float64 and returns the supremum after each of 0 … k steps.
"""

import math
from typing import NamedTuple, TypeAlias

import torch

from unrolled_kernels import _check
from unrolled_kernels.annotations import Number
from unrolled_kernels.layers import UnrolledGD, UnrolledNAG
from unrolled_kernels.prox import Prox
from unrolled_kernels.regions import check_spectrum, largest_stable_step
from unrolled_kernels.theory.properties import Stability, check_algorithm, stability

_TINY = 1e-6
Device: TypeAlias = torch.device | str | None


class Pairs(NamedTuple):
    """Pairs of energies of the class: Q, Q' ``[N, d, d]`` and b, b' ``[N, d]``, float64."""

    Q: torch.Tensor
    Q2: torch.Tensor
    b: torch.Tensor
    b2: torch.Tensor


class Order(NamedTuple):
    """The fit log v = a + power · log k + k log rate."""

    power: float
    rate: float


def random_energies(
    num_samples: int, mu: float, L: float, *, dim: int = 5, seed: int = 0, device: Device = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies 1/2 yᵀQy + bᵀy with spectrum in [μ, L] and random eigenvectors.

    Half of the spectra are uniform, a quarter has only the values μ and L, and an eighth each stays close to μ or to L.
    The first has all eigenvalues at μ, where the bounds are attained.

    Args:
        num_samples: N.
        mu, L: bounds of the spectrum.
        dim: d.
        seed, device: of the tensors.
    Returns:
        Q ``[N, d, d]`` and b ``[N, d]`` of norm 1, float64.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    generator = torch.Generator().manual_seed(seed)
    values, vectors = _spectra(num_samples, mu, L, dim, generator)
    values[:1] = mu
    b = _unit(torch.randn(num_samples, dim, generator=generator, dtype=torch.float64))
    return _dense(values, vectors).to(device), b.to(device)


def random_pairs(num_pairs: int, mu: float, L: float, *, dim: int = 5, seed: int = 0, device: Device = None) -> Pairs:
    """Pairs of energies whose matrices do not commute, from almost equal to unrelated.

    Args:
        num_pairs, mu, L, dim, seed, device: as in ``random_energies``; mu < L.
    Returns:
        ``Pairs``; the distance of a pair is spread over four decades.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    generator = torch.Generator().manual_seed(seed)
    values, vectors = _spectra(num_pairs, mu, L, dim, generator)
    if not mu < L:
        raise ValueError(f"mu, L: expected mu < L, for matrices that do not commute, got mu={mu}, L={L}")
    uniform = torch.rand(num_pairs, 1, generator=generator, dtype=torch.float64)
    normal = lambda *shape: torch.randn(num_pairs, *shape, generator=generator, dtype=torch.float64)
    distance = 10 ** (4 * uniform - 3)
    # reflected at the ends: clamping could make all eigenvalues equal
    position = ((values - mu) / (L - mu) + distance * normal(dim)) % 2
    moved = mu + (L - mu) * torch.minimum(position, 2 - position)
    turned = _rotations(vectors + distance.unsqueeze(-1) * normal(dim, dim))
    b = _unit(normal(dim))
    b2 = b + distance * normal(dim)
    pairs = Pairs(_dense(values, vectors), _dense(moved, turned), b, b2)
    return Pairs(*(x.to(device) for x in pairs))


def measure_convergence(
    algorithm: str,
    num_steps: int,
    step_size: Number,
    mu: float,
    L: float,
    *,
    dim: int = 5,
    num_samples: int = 1000,
    seed: int = 0,
    device: Device = None,
) -> torch.Tensor:
    """The largest ‖y_t - y*‖ / ‖y_0 - y*‖ that a layer shows, to compare with ``convergence_rate``.

    The layer runs with b = 0, whose minimizer is 0: y_t is the error itself, to its last digit.

    Args:
        algorithm, num_steps, step_size, mu: as in ``convergence_rate``; num_steps an int, step_size a float or a
            tensor ``[N, 1]``.
        L: the largest eigenvalue of the class.
        dim, num_samples, seed, device: of the energies, as in ``random_energies``.
    Returns:
        ``[num_steps + 1]`` float64.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    Q, start = random_energies(num_samples, mu, L, dim=dim, seed=seed, device=device)
    layer = make_layer(algorithm, num_steps, step_size, mu)
    ys = layer(Q, torch.zeros_like(start), y0=start, return_trajectory=True)
    return (ys.norm(dim=-1) / start.norm(dim=-1)).amax(-1)


def measure_stability(
    algorithm: str,
    num_steps: int,
    step_size: float,
    mu: float,
    L: float,
    *,
    dim: int = 5,
    num_pairs: int = 1000,
    seed: int = 0,
    device: Device = None,
) -> Stability:
    """The largest ‖Δy_t‖/(‖ΔQ‖₂ ‖b‖) and ‖Δy_t‖/‖Δb‖ that a layer shows, to compare with ``stability``.

    Args:
        algorithm, num_steps, step_size, mu, L, dim, seed, device: as in ``measure_convergence``; step_size a float.
        num_pairs: N.
    Returns:
        A ``Stability`` of two ``[num_steps + 1]`` float64 tensors.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    Q, Q2, b, b2 = random_pairs(num_pairs, mu, L, dim=dim, seed=seed, device=device)
    # where the bounds are attained: all eigenvalues μ, and a step towards L
    flat = mu * torch.eye(dim, dtype=Q.dtype, device=Q.device)
    Q, Q2 = torch.cat([Q, flat[None]]), torch.cat([Q2, flat[None] * (1 + _TINY * (L - mu) / mu)])
    b, b2 = (torch.cat([x, x[:1]]) for x in (b, b2))
    layer = make_layer(algorithm, num_steps, step_size, mu)
    y, in_Q, in_b = (layer(*energy, return_trajectory=True) for energy in ((Q, b), (Q2, b), (Q, b2)))
    distance = torch.linalg.matrix_norm(Q - Q2, 2) * b.norm(dim=-1)
    wrt_Q = (y - in_Q).norm(dim=-1) / distance.clamp(min=1e-300)
    wrt_b = (y - in_b).norm(dim=-1) / (b - b2).norm(dim=-1)
    return Stability(wrt_Q.amax(-1), wrt_b.amax(-1))


def stability_ratio(algorithm: str, num_steps: int, step_size: Number, mu: float, pairs: Pairs) -> torch.Tensor:
    """Both sides of Eq. 7 for pairs of energies: ‖Δy_t‖ / (wrt_Q ‖ΔQ‖₂ + wrt_b ‖Δb‖), at most 1 by the theory.

    Args:
        algorithm, num_steps, mu: as in ``measure_convergence``.
        step_size: φ, a float or a tensor ``[N, 1]``, one for each pair.
        pairs: ``Pairs``, e.g. of ``random_pairs``.
    Returns:
        ``[num_steps, N]`` float64, after 1 … k steps.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    layer = make_layer(algorithm, num_steps, step_size, mu)
    Q, Q2, b, b2 = pairs
    y, y2 = layer(Q, b, return_trajectory=True), layer(Q2, b2, return_trajectory=True)
    k = torch.arange(1, num_steps + 1, device=Q.device).unsqueeze(-1)  # [k, 1]
    phi = step_size.squeeze(-1) if isinstance(step_size, torch.Tensor) else step_size
    # the path over (Q', b) or over (Q, b'): the smaller norm of b counts
    bound = stability(algorithm, k, phi, mu, b_norm=torch.minimum(b.norm(dim=-1), b2.norm(dim=-1)))
    right = bound.wrt_Q * torch.linalg.matrix_norm(Q - Q2, 2) + bound.wrt_b * (b - b2).norm(dim=-1)
    return (y - y2)[1:].norm(dim=-1) / right


def ascend_stability_ratio(
    algorithm: str,
    num_steps: int,
    step_size: float,
    mu: float,
    L: float,
    *,
    dim: int = 5,
    restarts: int = 16,
    ascent_steps: int = 80,
    seed: int = 0,
) -> float:
    """Search for pairs of energies that violate Eq. 7: gradient ascent on ``stability_ratio`` through the layers.

    Args:
        algorithm, num_steps, step_size, mu, L, dim, seed: as in ``measure_stability``.
        restarts: pairs that ascend side by side.
        ascent_steps: of Adam.
    Returns:
        The largest ratio after k steps that was seen, a float.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    check_spectrum(mu, L)
    generator = torch.Generator().manual_seed(seed)
    shapes = {"spectrum": (2, restarts, dim), "angles": (2, restarts, dim, dim), "b": (2, restarts, dim)}
    start = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}
    free = {name: x.requires_grad_() for name, x in start.items()}
    optimizer = torch.optim.Adam(free.values(), lr=0.1)
    largest = 0.0
    for _ in range(ascent_steps):
        values = mu + (L - mu) * torch.sigmoid(free["spectrum"])
        vectors = torch.matrix_exp(free["angles"] - free["angles"].mT)
        pairs = Pairs(*_dense(values, vectors), *free["b"])
        ratio = stability_ratio(algorithm, num_steps, step_size, mu, pairs)[-1]
        largest = max(largest, ratio.max().item())
        optimizer.zero_grad()
        (-ratio.log().sum()).backward()
        optimizer.step()
    return largest


def measure_sensitivity(
    algorithm: str,
    num_steps: int,
    smallest_step_size: float,
    mu: float,
    L: float,
    *,
    dim: int = 5,
    num_samples: int = 1000,
    seed: int = 0,
    device: Device = None,
) -> torch.Tensor:
    """The largest ‖y_t(φ) - y_t(φ')‖ / (|φ - φ'| ‖b‖) that a layer shows, to compare with ``sensitivity``.

    Args:
        algorithm, num_steps, mu, L, dim, num_samples, seed, device: as in ``measure_convergence``.
        smallest_step_size: c₀; φ and φ' are drawn from [c₀, largest stable step size], and c₀ itself is tried.
    Returns:
        ``[num_steps + 1]`` float64.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    check_algorithm(algorithm)
    Q, b = random_energies(num_samples, mu, L, dim=dim, seed=seed, device=device)
    largest = largest_stable_step(algorithm, mu, L)
    if not 0 < smallest_step_size < largest:
        raise ValueError(
            f"smallest_step_size: expected a value inside the stable region (0, {largest:.6g}), "
            f"got {smallest_step_size}"
        )
    generator = torch.Generator().manual_seed(seed + 1)
    phi = torch.rand(2, num_samples, 1, generator=generator, dtype=torch.float64)
    # a quarter of the pairs starts at c₀, and another is almost equal there
    kind = torch.arange(num_samples).unsqueeze(-1) // 8 % 4
    phi[0][kind < 2] = 0
    phi[1][kind == 0] = _TINY
    phi = (smallest_step_size + (largest - smallest_step_size) * phi).to(b.device)
    y, y2 = (make_layer(algorithm, num_steps, p, mu)(Q, b, return_trajectory=True) for p in phi)
    return ((y - y2).norm(dim=-1) / (phi[0] - phi[1]).abs().squeeze(-1)).amax(-1)


def fit_order(num_steps: torch.Tensor, values: torch.Tensor) -> Order:
    """Fit v = C k^power rate^k by least squares in log v, to read off an order in k such as O(k (1-s)^k).

    Args:
        num_steps: k ≥ 1, a tensor ``[m]``, m ≥ 3.
        values: v > 0, ``[m]``.
    Returns:
        An ``Order``, two floats.
    Raises:
        ValueError: fewer than three points, or one that is not positive.
    """
    k, v = num_steps.double(), values.detach().double()
    if k.dim() != 1 or k.shape != v.shape or len(k) < 3:
        raise ValueError(
            f"num_steps, values: expected two vectors of one length ≥ 3, got {list(k.shape)} and {list(v.shape)}"
        )
    if not bool(((k > 0) & (v > 0)).all()):
        raise ValueError("num_steps, values: expected positive numbers, whose logarithms are fitted")
    design = torch.stack([torch.ones_like(k), k.log(), k], -1)
    _, power, log_rate = torch.linalg.lstsq(design, v.log().unsqueeze(-1)).solution.squeeze(-1).tolist()
    return Order(power, math.exp(log_rate))


def measured_orders(
    algorithm: str,
    step_size: float,
    mu: float,
    L: float,
    *,
    num_steps: tuple[int, int] = (20, 60),
    device: Device = None,
) -> dict[str, tuple[Order, float]]:
    """Fits of the layers' measured convergence, stability and sensitivity, beside the orders of Table 1.

    Stability is fitted by its distance from its limit, 1 - μ Stab.

    Args:
        algorithm, step_size, mu, L: as in ``measure_convergence``; sensitivity is taken at c₀ = step_size.
        num_steps: first and last k of the fit; five times these for the convergence.
        device: of the layers.
    Returns:
        A dict from ``"convergence"``, ``"stability"`` and ``"sensitivity"`` to the measured ``Order`` and the rate
        1 - φμ or 1 - √(φμ) that Table 1 prints.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    first, last = (_check.check_num_steps(k) for k in num_steps)
    k = torch.arange(first, last + 1)
    # the error itself has no rounding floor: five times as deep, where 1 + ks is all k
    convergence = measure_convergence(algorithm, 5 * last, step_size, mu, L, num_samples=64, device=device)
    stab = measure_stability(algorithm, last, step_size, mu, L, num_pairs=64, device=device).wrt_b
    sens = measure_sensitivity(algorithm, last, step_size, mu, L, num_samples=256, device=device)
    fits = {
        "convergence": fit_order(5 * k, convergence.cpu()[5 * k]),
        "stability": fit_order(k, (1 - mu * stab).cpu()[k]),
        "sensitivity": fit_order(k, sens.cpu()[k]),
    }
    rate = 1 - step_size * mu if algorithm == "gd" else 1 - (step_size * mu) ** 0.5
    return {name: (order, rate) for name, order in fits.items()}


def make_layer(
    algorithm: str, num_steps: int, step_size: Number, mu: Number, prox: Prox | None = None
) -> UnrolledGD | UnrolledNAG:
    """The layer of an algorithm; μ goes to those that have one."""
    check_algorithm(algorithm)
    if algorithm == "nag":
        return UnrolledNAG(num_steps, step_size, mu, prox=prox)
    return UnrolledGD(num_steps, step_size, prox=prox)


def _spectra(count, mu, L, dim, generator):
    """Eigenvalues ``[count, d]`` that are never all equal, and eigenvectors ``[count, d, d]``."""
    check_spectrum(mu, L)
    position = torch.rand(count, dim, generator=generator, dtype=torch.float64)
    kind = torch.arange(count).unsqueeze(-1) % 8
    ends = position.round()
    ends[:, :1], ends[:, -1:] = 0, 1
    position = position.where(kind < 4, ends.where(kind < 6, 0.01 * position))
    position = position.where(kind < 7, 1 - position)
    vectors = _rotations(torch.randn(count, dim, dim, generator=generator, dtype=torch.float64))
    return mu + (L - mu) * position, vectors


def _dense(eigenvalues, eigenvectors):
    return (eigenvectors * eigenvalues.unsqueeze(-2)) @ eigenvectors.mT


def _rotations(matrices):
    return torch.linalg.qr(matrices)[0]


def _unit(x):
    return x / x.norm(dim=-1, keepdim=True)
