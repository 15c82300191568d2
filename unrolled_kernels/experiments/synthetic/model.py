"""The model of the synthetic task: a network that puts out the spectrum of Q_θ(x), and the algorithm layer above it."""

import torch
from torch import nn

from unrolled_kernels import Spectral, UnrolledGD, UnrolledMomentum, UnrolledNAG, schedules
from unrolled_kernels import functional as F
from unrolled_kernels.experiments.synthetic.data import MU, L

# the paper's
ALGORITHMS = ("gd", "nag")
# (φ_t, β_t, γ_t) of k steps with step size φ: the paper's two, NAG that takes μ four times too small or too large, and
# further methods. Chebyshev's schedule follows from μ and L alone, FISTA's does without μ
SCHEDULES = {
    "gd": schedules.gd,
    "nag": lambda k, phi: schedules.nag(k, phi, MU),
    "nag_small_mu": lambda k, phi: schedules.nag(k, phi, MU / 4),
    "nag_large_mu": lambda k, phi: schedules.nag(k, phi, MU * 4),
    "fista": schedules.fista,
    "heavy_ball": lambda k, phi: schedules.heavy_ball(k, phi, (1 - (MU * phi) ** 0.5) ** 2),
    "chebyshev": lambda k, phi: schedules.chebyshev(k, MU, L),
}
# the limit of them all, k = ∞: its trials have ``num_steps`` 0
MINIMIZER = "minimizer"


class SpectrumNetwork(nn.Module):
    """Eigenvalues of Q_θ(x): [L, μ + (L-μ) softmax(MLP(x)), μ].

    Args:
        layers: (weight ``[out, in]``, bias ``[out]``) of each linear layer, one or two; a ReLU stands between.
    """

    def __init__(self, layers):
        super().__init__()
        modules = []
        for weight, bias in layers:
            linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
            with torch.no_grad():
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
            modules += [linear, nn.ReLU()]
        self.mlp = nn.Sequential(*modules[:-1])

    def forward(self, x):
        """x ``[*batch, 10]`` to eigenvalues ``[*batch, 5]``."""
        inner = inner_eigenvalues(self.mlp(x), dim=-1)
        edge = inner.new_ones(*inner.shape[:-1], 1)
        return torch.cat([L * edge, inner, MU * edge], -1)


class SyntheticModel(nn.Module):
    """y_k = Alg^k(Q_θ(x), b), with Q_θ = R diag(λ_θ(x)) Rᵀ in spectral form.

    Args:
        network: maps x to eigenvalues.
        layer: an algorithm layer.
    """

    def __init__(self, network, layer):
        super().__init__()
        self.network = network
        self.layer = layer

    def forward(self, x, R, b):
        """x ``[B, 10]``, R ``[B, 5, 5]``, b ``[B, 5]`` to y_k ``[B, 5]``."""
        return self.layer(Spectral(self.network(x), R), b)


def inner_eigenvalues(logits, dim):
    """μ + (L-μ) softmax(logits) along ``dim``: d-2 numbers inside [μ, L]."""
    return MU + (L - MU) * torch.softmax(logits, dim)


class Minimizer(nn.Module):
    """y* = -Q⁻¹b as a layer."""

    def forward(self, Q, b):
        """``functional.minimize``."""
        return F.minimize(Q, b)


def make_layer(algorithm, num_steps, step_size=1.0, learn_step_size=False, backend="auto"):
    """The algorithm layer of one model; a learned step size stays inside the paper's stable region (Table 1)."""
    region = (MU, L) if learn_step_size else None
    options = {"learn_step_size": learn_step_size, "stable_region": region, "backend": backend}
    if algorithm == "gd":
        return UnrolledGD(num_steps, step_size, **options)
    if algorithm == "nag":
        return UnrolledNAG(num_steps, step_size, MU, **options)
    if learn_step_size:
        raise ValueError(f"algorithm: a step size is learned of {' and '.join(ALGORITHMS)}, got {algorithm!r}")
    if algorithm == MINIMIZER:
        return Minimizer()
    return UnrolledMomentum(num_steps, *SCHEDULES[algorithm](num_steps, step_size), learnable=False, backend=backend)
