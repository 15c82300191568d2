"""Types that the signatures share, for the annotations of your own code too."""

from collections.abc import Sequence
from typing import TypeAlias

import torch

from unrolled_kernels.quadratics import Diagonal, Spectral, Tikhonov

Number: TypeAlias = float | torch.Tensor
"""A coefficient; a layer's tensors broadcast to ``(*batch, num_steps)``."""

Steps: TypeAlias = int | torch.Tensor
"""k: one number of steps, or a tensor of integers."""

Quadratic: TypeAlias = torch.Tensor | Diagonal | Spectral | Tikhonov
"""Q: a plain tensor is dense."""

Schedule: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""φ, β, γ, each ``[num_steps]``."""

Weights: TypeAlias = tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor], torch.Tensor]
"""W₁, W₂, [W² … Wᴸ], V of a cell."""
