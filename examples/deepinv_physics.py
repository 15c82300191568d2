"""A physics of DeepInverse (https://deepinv.github.io), its data fidelity solved by the fused layer.

Half-quadratic splitting alternates a denoiser with argmin_x γ/2 ‖A x - y‖² + 1/2 ‖x - z‖²: Q = 1 + γ AᵀA and
b = -(γ Aᵀy + z), here by a few steps of Chebyshev's method. Denoiser, γ and the layer's schedules are trained together.
Run: pip install deepinv; python examples/deepinv_physics.py
"""

import torch
from deepinv.models import DnCNN
from deepinv.optim import HQS, L2, PnP
from deepinv.physics import Inpainting

from unrolled_kernels import Diagonal, UnrolledMomentum


class UnrolledL2(L2):
    """``1/2 ‖A x - y‖²`` with an algorithm layer as its proximal step; diagonal Q for inpainting, else ‖A‖ ≤ 1."""

    def __init__(self, num_steps=8, largest_gamma=4.0):
        super().__init__()
        self.layer = UnrolledMomentum.chebyshev(num_steps, 1.0, 1.0 + largest_gamma)

    def prox(self, x, y, physics, *args, gamma=1.0, **kwargs):
        b = -(gamma * physics.A_adjoint(y) + x)
        if isinstance(physics, Inpainting):
            return self.layer(Diagonal(1 + gamma * physics.mask.square()), b, y0=x)
        eye = torch.eye(x[0].numel(), device=x.device, dtype=x.dtype)
        normal = physics.A_adjoint_A(eye.reshape(-1, *x.shape[1:])).flatten(1)  # [n, n], shared by the batch
        return self.layer(eye + gamma * normal, b.flatten(1), y0=x.flatten(1)).reshape(x.shape)


def images(count, size=24):
    """Smooth images, ``[count, 1, size, size]``."""
    t = torch.linspace(0, torch.pi, size)
    waves = [torch.sin(torch.randint(1, 4, (count, 1)) * t + 6 * torch.rand(count, 1)) for _ in range(2)]
    return 0.5 + 0.5 * (waves[0].unsqueeze(2) * waves[1].unsqueeze(1)).unsqueeze(1)


def main(steps=100):
    torch.manual_seed(0)
    physics = Inpainting((1, 24, 24), mask=0.5)
    denoiser = PnP(DnCNN(1, 1, depth=4, nf=16, pretrained=None))
    model = HQS(UnrolledL2(), denoiser, stepsize=[1.0] * 4, max_iter=4, unfold=True, trainable_params=["stepsize"])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        clean = images(16)
        loss = (model(physics(clean), physics) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clean = images(200)
    with torch.no_grad():
        before, after = ((x - clean).square().mean().item() for x in (physics(clean), model(physics(clean), physics)))
    print(f"mean squared error of new images: half of the pixels missing {before:.4f}, restored {after:.4f}")
    return before, after


if __name__ == "__main__":
    main()
