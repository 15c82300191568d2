"""The specification of the RNN: a plain loop over cells that autograd differentiates. Also the backend "eager".

g_t     = Q y_t + b
h¹      = relu(W₁ y_t + W₂ g_t)
hˡ      = relu(Wˡ hˡ⁻¹)                             l = 2 … L
y_{t+1} = V hᴸ                                      t = 0 … k-1
"""

import torch

from unrolled_kernels.ops.common import matvec


def forward(matrix, diagonal, b, y0, weights, num_steps, trajectory):
    """Run the cells on canonical arguments (see the package's docstring)."""
    storage, compute = b.dtype, weights[0].dtype
    matrix, diagonal, b, y0 = (x if x is None else x.to(compute) for x in (matrix, diagonal, b, y0))
    W1, W2, *inner, V = weights
    ys = [torch.zeros_like(b) if y0 is None else y0]
    for _ in range(num_steps):
        g = apply_Q(matrix, diagonal, ys[-1]) + b
        h = torch.relu(ys[-1] @ W1.mT + g @ W2.mT)
        for W in inner:
            h = torch.relu(h @ W.mT)
        ys.append(h @ V.mT)
    y = torch.stack(ys) if trajectory else ys[-1]
    # without a step y_0 itself comes back, and an output never aliases an input
    return y.to(storage, copy=num_steps == 0)


def apply_Q(matrix, diagonal, y):
    """Q y for y ``[B, d]``."""
    return matvec(matrix, y) if diagonal is None else diagonal * y


def weight_shapes(hidden_dims, d):
    """Shapes of W₁, W₂, W² … Wᴸ, V for hidden layers of the widths h_1 … h_L."""
    return [(hidden_dims[0], d), *zip(hidden_dims, (d, *hidden_dims[:-1]), strict=True), (d, hidden_dims[-1])]
