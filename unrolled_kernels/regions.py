"""The regions in which iterates stay bounded for any depth: step sizes of GD and NAG, and the contraction of an RNN.

The paper's Tables 1 and 2 have them. Layers keep what they learn inside, and the theory says what holds there.
"""

import math
from typing import NamedTuple

import torch

from unrolled_kernels import _check
from unrolled_kernels.annotations import Number, Quadratic, Weights


def largest_stable_step(algorithm: str, mu: Number, L: Number) -> Number:
    """The upper end of the stable region of step sizes for a spectrum in [μ, L] (paper, Table 1).

        GD: 2/(μ+L),   NAG: 4/(μ+3L)

    Args:
        algorithm: ``"gd"`` or ``"nag"``.
        mu, L: bounds of the spectrum of Q, floats or tensors.
    Returns:
        The step size, a float or a tensor of the broadcast shape.
    """
    return 2 / (mu + L) if algorithm == "gd" else 4 / (mu + 3 * L)


def rnn_contraction(
    weights: Weights, *, Q: Quadratic | None = None, mu: Number | None = None, L: Number | None = None
) -> torch.Tensor:
    """c_φ = sup_Q ‖V‖ ‖W₁ + W₂Q‖ Π_{l≥2} ‖Wˡ‖ of an RNN cell, stable where c_φ < 1 (paper, Sec. 6 and Table 2).

    The supremum is taken over given matrices, or bounded over all with spectrum in [μ, L]:
    ‖W₁ + W₂Q‖ ≤ ‖W₁ + (μ+L)/2 W₂‖ + (L-μ)/2 ‖W₂‖.

    Args:
        weights: (W₁ ``[h, d]``, W₂ ``[h, d]``, [W² … Wᴸ], V ``[d, h]``), as in ``functional.rnn``.
        Q: ``[*batch, d, d]`` tensor, or a ``Diagonal`` / ``Spectral``.
        mu, L: bounds of the spectrum, instead of Q.
    Returns:
        A 0-dim tensor, differentiable in the weights.
    Raises:
        TypeError, ValueError: an argument out of its range, or neither or both of Q and (mu, L); the message names it.
    """
    if (Q is None) == (mu is None and L is None):
        raise ValueError("Q, mu, L: expected either Q or both mu and L")
    if Q is None:
        return CellNorms.of(weights, mu, L).contraction
    W1, W2, inner, V = _unpack(weights)
    _check.check_Q(Q)
    dense = Q if isinstance(Q, torch.Tensor) else Q.to_dense()
    norms = [_norm(V), *(_norm(W) for W in inner)]
    return _norm(W1 + W2 @ dense).amax() * math.prod(norms)


def check_spectrum(mu, L):
    """0 < mu ≤ L; the values of tensors are not read."""
    for name, value in (("mu", mu), ("L", L)):
        _check.check_number(name, value)
        _check.check_positive(name, value)
    if not isinstance(mu, torch.Tensor) and not isinstance(L, torch.Tensor) and not mu <= L:
        raise ValueError(f"mu, L: expected 0 < mu <= L, got mu={mu}, L={L}")


class CellNorms(NamedTuple):
    """Upper bounds of the spectral norms of a cell's weights; ``input`` is that of W₁ + W₂Q for Q in the class."""

    V: torch.Tensor
    inner: list
    W2: torch.Tensor
    input: torch.Tensor

    @classmethod
    def of(cls, weights, mu, L, radius=0.0):
        check_spectrum(mu, L)
        W1, W2, inner, V = _unpack(weights)
        first = _norm(W1 + (mu + L) / 2 * W2) + (L - mu) / 2 * _norm(W2) + radius * (1 + L)
        return cls(_norm(V) + radius, [_norm(W) + radius for W in inner], _norm(W2) + radius, first)

    @property
    def contraction(self):
        return math.prod([self.V, *self.inner]) * self.input

    @property
    def kappa(self):
        return math.prod([self.V, *self.inner]) * self.W2


def _unpack(weights):
    W1, W2, *inner, V = _check.check_weights(weights)
    return W1, W2, inner, V


def _norm(matrix):
    # half precision has no decompositions
    return torch.linalg.matrix_norm(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), 2)
