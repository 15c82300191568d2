"""A network of your own with gradient descent inside: weighted smoothing of noisy signals, learned end to end.

The network looks at a noisy signal x and puts out weights w and a shift c of the energy

    E(y) = 1/2 ‖y - x + c‖² + 1/2 Σ w_i y_i²,    Q = diag(1 + w), b = c - x,

and twelve steps of gradient descent minimise it. Run: python examples/denoising_layer.py
"""

import torch
from torch import nn

from unrolled_kernels import Diagonal, UnrolledGD


class Denoiser(nn.Module):
    def __init__(self, width=16, num_steps=12):
        super().__init__()
        self.network = nn.Sequential(nn.Conv1d(1, width, 9, padding=4), nn.ReLU(), nn.Conv1d(width, 2, 9, padding=4))
        # w stays below 1, so Q lies in [1, 2], where every step size up to 2/(1 + 2) is stable
        self.solve = UnrolledGD(num_steps, step_size=0.5, learn_step_size=True, stable_region=(1.0, 2.0))

    def forward(self, x):  # [B, n]
        weight, shift = self.network(x.unsqueeze(1)).unbind(1)
        return self.solve(Diagonal(1 + weight.sigmoid()), shift - x)


def signals(count, length=128):
    """Smooth signals and noisy versions of them, ``[count, length]``."""
    t = torch.linspace(0, 2 * torch.pi, length)
    clean = torch.sin(torch.randint(1, 5, (count, 1)) * t + 2 * torch.pi * torch.rand(count, 1))
    return clean, clean + 0.5 * torch.randn_like(clean)


def main(steps=400):
    torch.manual_seed(0)
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        clean, noisy = signals(64)
        loss = (model(noisy) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clean, noisy = signals(1000)
    with torch.no_grad():
        before, after = ((x - clean).square().mean().item() for x in (noisy, model(noisy)))
    print(f"mean squared error of new signals: noisy {before:.4f}, denoised {after:.4f}; {model.solve}")
    return before, after


if __name__ == "__main__":
    main()
