"""The layer whose steps are learned: k cells of a recurrent network on the energy 1/2 yᵀQy + bᵀy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from unrolled_kernels import _check
from unrolled_kernels import functional as F
from unrolled_kernels.annotations import Quadratic, Weights
from unrolled_kernels.layers import _check_region, _Unrolled
from unrolled_kernels.regions import rnn_contraction

__all__ = ["UnrolledRNN"]

# what c_φ is held below in the stable region: two starts, or two energies, end within a multiple of 1/(1 - c_φ)
_LARGEST_CONTRACTION = 0.99


class UnrolledRNN(_Unrolled):
    """k cells of a learned recurrent algorithm as a layer.

        g_t = Q y_t + b,   h¹ = relu(W₁ y_t + W₂ g_t),   hˡ = relu(Wˡ hˡ⁻¹),   y_{t+1} = V hᴸ      (paper, Eq. 20)

    Parameters: ``W1``, ``W2`` ``[h_1, d]``, ``W`` (a list of Wˡ ``[h_l, h_(l-1)]``, l = 2 … L), ``V`` ``[d, h_L]``.

    Args:
        num_steps: k ≥ 0.
        dim: d, the size of the state.
        hidden_dims: the widths h_1 … h_L.
        init: ``"default"``: every matrix Glorot uniform. ``"gd"``: the cell is a gradient-descent step, by
            y = relu(y) - relu(-y): W₁ = [I; -I], W₂ = -φ[I; -I], Wˡ = I, V = [I, -I], zeros where a width exceeds 2d
            (such units have no gradient until their weights are perturbed).
        step_size: φ of ``init="gd"``.
        stable_region: ``(mu, L)``, bounds of the spectrum of a symmetric Q: keeps c_φ, the Lipschitz constant of a cell
            (paper, Table 2), below 1 whatever is learned. The cell runs with V · min(1, 0.99 / c), where
            c = ‖V‖ (‖W₁ + (μ+L)/2 W₂‖ + (L-μ)/2 ‖W₂‖) Π ‖Wˡ‖ ≥ c_φ in exact spectral norms, for L + 2 small singular
            value decompositions a call. Power iteration would be cheaper, and no bound.
        backward_steps: differentiate the last n ≥ 1 cells alone, with the state before them as a constant.
        backend: ``"auto"``, ``"eager"``, ``"cpu"``, ``"cuda"`` or ``"triton"``.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """

    _shown = ("dim", "hidden_dims")

    if TYPE_CHECKING:
        # no return_info: its cells do not stop
        def __call__(  # type: ignore[override]
            self, Q: Quadratic, b: torch.Tensor, y0: torch.Tensor | None = None, return_trajectory: bool = False
        ) -> torch.Tensor: ...

    def __init__(
        self,
        num_steps: int,
        dim: int,
        hidden_dims: Sequence[int] = (20, 20, 20),
        *,
        init: Literal["default", "gd"] = "default",
        step_size: float = 1.0,
        stable_region: tuple[float, float] | None = None,
        backward_steps: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(num_steps, backend, backward_steps=backward_steps)
        self.dim, self.hidden_dims = _check_sizes(dim, hidden_dims)
        if init not in ("default", "gd"):
            raise ValueError(f"init: expected 'default' or 'gd', got {init!r}")
        self.stable_region = None if stable_region is None else _check_region(stable_region)
        first, last = self.hidden_dims[0], self.hidden_dims[-1]
        self.W1 = nn.Parameter(torch.empty(first, dim))
        self.W2 = nn.Parameter(torch.empty(first, dim))
        pairs = zip(self.hidden_dims[1:], self.hidden_dims, strict=False)
        self.W = nn.ParameterList(nn.Parameter(torch.empty(rows, columns)) for rows, columns in pairs)
        self.V = nn.Parameter(torch.empty(dim, last))
        if init == "gd":
            self._start_as_gradient_descent(step_size)
        else:
            for parameter in self.parameters():
                nn.init.xavier_uniform_(parameter)

    @torch.no_grad()
    def _start_as_gradient_descent(self, step_size):
        _check.check_number("step_size", step_size)
        d = self.dim
        if self.stable_region is not None:
            raise ValueError(
                "init: gradient descent as an RNN has c_φ up to 2 (1 - step_size mu), outside the stable region; "
                "use init='default' with stable_region"
            )
        if min(self.hidden_dims) < 2 * d:
            raise ValueError(f"hidden_dims: init='gd' needs widths of at least 2 dim = {2 * d}, got {self.hidden_dims}")
        for parameter in self.parameters():
            parameter.zero_()
        signs = torch.cat([torch.eye(d), -torch.eye(d)])
        self.W1[: 2 * d] = signs
        self.W2[: 2 * d] = -step_size * signs
        for W in self.W:
            W[: 2 * d, : 2 * d] = torch.eye(2 * d)
        self.V[:, : 2 * d] = signs.mT

    @property
    def weights(self) -> Weights:
        """``(W1, W2, [W^2 … W^L], V)`` as the cells use them, V scaled into the stable region if there is one."""
        weights = (self.W1, self.W2, list(self.W), self.V)
        if self.stable_region is None:
            return weights
        mu, L = self.stable_region
        scale = (_LARGEST_CONTRACTION / rnn_contraction(weights, mu=mu, L=L)).clamp(max=1)
        return (*weights[:3], self.V * scale.to(self.V.dtype))

    def contraction_factor(self, Q: Quadratic) -> torch.Tensor:
        """c_φ = sup ‖V‖ ‖W₁ + W₂Q‖ Π_{l≥2} ‖Wˡ‖ over the batch, in spectral norms; see ``theory.rnn_contraction``.

        Where it is below 1, two starts approach each other by at least this factor a cell (paper, Sec. 6).

        Args:
            Q: ``[*batch, d, d]`` tensor, or a ``Diagonal`` / ``Spectral``.
        Returns:
            A 0-dim tensor, differentiable in Q and the parameters.
        """
        return rnn_contraction(self.weights, Q=Q)

    def forward(
        self, Q: Quadratic, b: torch.Tensor, y0: torch.Tensor | None = None, return_trajectory: bool = False
    ) -> torch.Tensor:
        """``y_k`` ``[*batch, d]`` or y_0 … y_k ``[num_steps + 1, *batch, d]``; see ``functional.rnn``."""
        return F.rnn(
            Q,
            b,
            self.weights,
            self.num_steps,
            y0=y0,
            return_trajectory=return_trajectory,
            backward_steps=self.backward_steps,
            backend=self.backend,
        )


def _check_sizes(dim, hidden_dims):
    positive = lambda x: isinstance(x, int) and not isinstance(x, bool) and x > 0
    if not positive(dim):
        raise ValueError(f"dim: expected a positive int, got {dim!r}")
    if not isinstance(hidden_dims, (tuple, list)) or not hidden_dims or not all(map(positive, hidden_dims)):
        raise ValueError(f"hidden_dims: expected a non-empty tuple of positive ints, got {hidden_dims!r}")
    return dim, tuple(hidden_dims)
