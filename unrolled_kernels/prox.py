"""Constraints and sparsity in the step: functions g whose proximal map ends every step of the recurrence.

    y_{t+1} = prox_{φ_t g}( y_t + β_t m_t - φ_t (Q (y_t + γ_t m_t) + b) )
    prox_{φ g}(v) = argmin_u g(u) + ‖u - v‖²/(2φ)

With it the layers solve min 1/2 yᵀQy + bᵀy + g(y): projected gradient descent and box-constrained quadratic programs
with ``Box``, ISTA and FISTA with ``L1``, LISTA with ``SoftThreshold``. A proximal map is non-expansive, so the stable
regions of the step sizes stay what they are.

A map is not diagonal in the eigenbasis of a ``Spectral``, which runs as the dense matrix that it is: one product a step
instead of the two there and back.
"""

from dataclasses import dataclass

import torch

from unrolled_kernels import _check
from unrolled_kernels.annotations import Number

__all__ = ["L1", "Box", "NonNegative", "Prox", "SoftThreshold"]


class Prox:
    """The base of what ``prox=`` takes; its tensors are its fields."""


@dataclass(frozen=True, eq=False)
class Box(Prox):
    """lower ≤ y ≤ upper: the step ends with a clamp.

    The derivative is that of ``torch.clamp``: an entry strictly outside passes its cotangent to the bound that it met,
    one inside or on a bound to the step. Where tensors have lower > upper the result is upper, as ``torch.clamp``'s.

    Args:
        lower, upper: a float or a tensor that broadcasts to ``(*batch, d)``; None: no bound on that side.
    Raises:
        TypeError: neither a number, nor a floating-point tensor, nor None.
        ValueError: both are numbers and lower > upper, or one is NaN.
    """

    lower: Number | None = None
    upper: Number | None = None

    def __post_init__(self) -> None:
        for name, value in (("lower", self.lower), ("upper", self.upper)):
            if value is not None:
                _check.check_number(name, value)
                _check.check_not_nan(name, value)
        lower, upper = self.lower, self.upper
        if isinstance(lower, (int, float)) and isinstance(upper, (int, float)) and lower > upper:
            raise ValueError(f"lower: expected lower <= upper, got lower={self.lower} and upper={self.upper}")


class NonNegative(Box):
    """y ≥ 0: ``Box(0, None)``."""

    def __init__(self) -> None:
        super().__init__(0.0, None)


@dataclass(frozen=True, eq=False)
class L1(Prox):
    """g(y) = Σ_i weight_i ∣y_i∣: the step ends with a soft threshold at φ_t weight_i (ISTA, FISTA).

    An entry at or below the threshold becomes zero and passes no cotangent, as in ``torch.nn.functional.softshrink``.

    Args:
        weight: a float or a tensor that broadcasts to ``(*batch, d)``; entries of a tensor below zero count as zero.
    Raises:
        TypeError: neither a number nor a floating-point tensor.
        ValueError: a number below zero or NaN.
    """

    weight: Number

    def __post_init__(self) -> None:
        _check.check_number("weight", self.weight)
        _check.check_not_negative("weight", self.weight)


@dataclass(frozen=True, eq=False)
class SoftThreshold(Prox):
    """A soft threshold of its own for every step, whatever the step size is (LISTA).

    Args:
        threshold: a float or a tensor that broadcasts to ``(*batch, num_steps)``, like a step size; entries of a tensor
            below zero count as zero.
    Raises:
        TypeError: neither a number nor a floating-point tensor.
        ValueError: a number below zero or NaN.
    """

    threshold: Number

    def __post_init__(self) -> None:
        _check.check_number("threshold", self.threshold)
        _check.check_not_negative("threshold", self.threshold)


# numbers, tensors and their names: torch.load(weights_only=True) may make one
torch.serialization.add_safe_globals([Box, NonNegative, L1, SoftThreshold])


def check_prox(prox):
    """None, or an object of this module."""
    if prox is not None and not isinstance(prox, Prox):
        raise TypeError(
            "prox: expected None or an object of unrolled_kernels.prox (Box, NonNegative, L1, SoftThreshold), "
            f"got {prox!r} ({type(prox).__name__})"
        )


def rebuild(cls, values):
    """An object of ``cls`` with these fields, which were checked before."""
    prox = object.__new__(cls)
    for field, value in zip(cls.__dataclass_fields__, values, strict=True):
        object.__setattr__(prox, field, value)
    return prox
