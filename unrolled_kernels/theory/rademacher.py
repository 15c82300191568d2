"""Rademacher complexities and covering numbers of finite sets of models, computed from their losses."""

from typing import NamedTuple

import torch

from unrolled_kernels import _check

# 2^16 sign vectors at most are enumerated
_EXACT_SAMPLES = 16
_CHUNK = 4096


class Complexity(NamedTuple):
    """A mean over sign vectors and its standard error, which is 0 where all were enumerated."""

    value: float
    standard_error: float


def rademacher_complexity(losses: torch.Tensor, *, num_signs: int | None = 10_000, seed: int = 0) -> Complexity:
    """The empirical Rademacher complexity of a finite set of models (paper, Sec. 5).

        R_n ℓ_F = E_σ max_m (1/n) Σ_i σ_i ℓ_m(x_i, b_i),   σ uniform on {±1}ⁿ

    Args:
        losses: ``[m, n]``, the loss of each model on each of the n samples.
        num_signs: sign vectors of the Monte Carlo mean; None: all 2ⁿ, for n ≤ 16.
        seed: of the sign vectors; equal seeds give equal numbers.
    Returns:
        A ``Complexity``.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    losses = _losses(losses)
    n = losses.shape[1]
    if num_signs is None:
        if n > _EXACT_SAMPLES:
            raise ValueError(f"num_signs: None enumerates 2^n sign vectors, for n ≤ {_EXACT_SAMPLES}; got n = {n}")
        bits = torch.arange(2**n, device=losses.device).unsqueeze(-1) >> torch.arange(n, device=losses.device)
        suprema = _suprema(losses, bits & 1)
        return Complexity(suprema.mean().item(), 0.0)
    if num_signs < 2:
        raise ValueError(f"num_signs: expected at least 2, got {num_signs}")
    generator = torch.Generator().manual_seed(seed)
    suprema = torch.cat(
        [
            _suprema(losses, torch.randint(2, (min(_CHUNK, num_signs - i), n), generator=generator).to(losses.device))
            for i in range(0, num_signs, _CHUNK)
        ]
    )
    return Complexity(suprema.mean().item(), (suprema.std() / num_signs**0.5).item())


def local_rademacher_complexity(
    losses: torch.Tensor,
    radius: float,
    *,
    second_moments: torch.Tensor | None = None,
    num_signs: int | None = 10_000,
    seed: int = 0,
) -> Complexity:
    """The empirical Rademacher complexity of the models with P ℓ² ≤ r (paper, Eq. 14).

    Args:
        losses: ``[m, n]``, the loss of each model on each of the n samples.
        radius: r.
        second_moments: P ℓ² of each model, ``[m]``, from many samples; by default the mean over the n samples, P_n ℓ².
        num_signs, seed: as in ``rademacher_complexity``.
    Returns:
        A ``Complexity``; 0 where at most one model is that good.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    losses = _losses(losses)
    if radius < 0:
        raise ValueError(f"radius: expected a number ≥ 0, got {radius}")
    moments = losses.square().mean(1) if second_moments is None else torch.as_tensor(second_moments)
    if moments.shape != losses.shape[:1]:
        raise ValueError(
            f"second_moments: expected one number for each of the {len(losses)} models, got shape {list(moments.shape)}"
        )
    good = losses[moments.to(losses.device) <= radius]
    if len(good) <= 1:
        return Complexity(0.0, 0.0)
    return rademacher_complexity(good, num_signs=num_signs, seed=seed)


def cover(distances: torch.Tensor, radius: float) -> list[int]:
    """Centres of balls of a radius that cover a finite set, chosen greedily: farthest point first.

    Args:
        distances: ``[m, m]``, between all points.
        radius: ε ≥ 0.
    Returns:
        Indices of the centres, a list of ints: its length bounds the covering number N(ε) from above.
    Raises:
        ValueError: ``distances`` is not square, or the radius is negative.
    """
    if distances.dim() != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"distances: expected shape [m, m], got {list(distances.shape)}")
    if radius < 0:
        raise ValueError(f"radius: expected a number ≥ 0, got {radius}")
    if not len(distances):
        return []
    centres = [0]
    nearest = distances[0]
    while nearest.max() > radius:
        centres.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distances[centres[-1]])
    return centres


def _suprema(losses, bits):
    signs = (2 * bits - 1).to(losses.dtype)
    return (signs @ losses.mT / losses.shape[1]).amax(-1)


def _losses(losses):
    losses = torch.as_tensor(losses)
    _check.check_number("losses", losses)
    if losses.dim() != 2 or 0 in losses.shape:
        raise ValueError(f"losses: expected shape [m, n] with m, n ≥ 1, got {list(losses.shape)}")
    return losses.detach().double()
