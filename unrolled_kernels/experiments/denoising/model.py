"""DnCNNs f and g that put out the energy of an image, and the algorithm layer that minimises it."""

from dataclasses import dataclass

import torch
from torch import nn

from unrolled_kernels import Tikhonov, UnrolledGD, UnrolledNAG
from unrolled_kernels import functional as F
from unrolled_kernels.experiments.denoising import dncnn
from unrolled_kernels.experiments.denoising.distributed import BatchNorm2d

ALGORITHMS = ("gd", "nag")
STEP_SIZES = ("guarded", "learned", "fixed")
MU = 1.0  # the smallest eigenvalue that diag(1 + f²) can have


@dataclass(frozen=True)
class Case:
    """Sizes of f and g: channels, 0 for g = 0; two hidden layers each."""

    f_channels: int
    g_channels: int


CASES = {"under": Case(3, 0), "about-right": Case(3, 3), "over": Case(20, 3)}
PLAIN = "dncnn"
_RESIDUAL_GAIN = 0.1  # a residual starts near zero: the network near the identity, half a dB ahead after 80 epochs
_INSIDE = 0.99  # of the largest stable step, at whose very end nothing converges


def energy_layer(f, g, X, *, algorithm, num_steps, step_size, backend="auto"):
    """k steps on E(X, Y) = 1/2 ‖Y + g - X‖² + 1/2 Σ (f Y)² from Y = 0, elementwise: Q = diag(1 + f²), b = g - X.

    Args:
        f, X: ``[B, 1, H, W]``.
        g: ``[B, 1, H, W]``, or None for g = 0.
        algorithm: ``"gd"`` or ``"nag"``, the latter with μ = 1.
        num_steps: k.
        step_size: φ, a float or a tensor, scalar or ``[B, 1, 1, 1]``.
        backend: see ``UnrolledGD``.
    Returns:
        Y_k ``[B, 1, H, W]``.
    """
    # what comes out of autocast is short of the dtype that the energy is computed in
    Q, b = Tikhonov(f.to(X.dtype), X), torch.zeros_like(X) if g is None else g.to(X.dtype)
    if algorithm == "gd":
        return F.gradient_descent(Q, b, step_size, num_steps, backend=backend)
    return F.nesterov(Q, b, step_size, MU, num_steps, backend=backend)


class DnCNN(nn.Sequential):
    """Conv + ReLU, hidden layers of Conv + BatchNorm + ReLU, Conv; 3×3 throughout (Zhang et al. 2017, Sec. III).

    Args:
        channels: of every layer between.
        hidden_layers: how many with batch normalisation.
        backend: "eager" for torch's modules; else one C++ op runs them all where ``dncnn.can_run`` says so.
        last_gain: scale of the last convolution's initial weights.
    """

    def __init__(self, channels, hidden_layers=2, backend="auto", last_gain=1.0):
        layers = [nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(hidden_layers):
            layers += [
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers, nn.Conv2d(channels, 1, 3, padding=1))
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.orthogonal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self[-1].weight *= last_gain
        self.backend = backend

    def forward(self, x):
        """x ``[B, 1, H, W]`` to the same shape."""
        return dncnn.run(self, x) if dncnn.can_run(self, x, self.backend) else super().forward(x)


class StepSize(nn.Module):
    """φ of a layer on diag(1 + f²), whose largest eigenvalue has no bound.

    Args:
        kind: ``"fixed"``: the start, for ever; ``"learned"``: a free parameter; ``"guarded"``: learned too, and cut for
            each image to the stable region of its own spectrum [1, 1 + max f²] (paper, Table 1), whatever f does.
        algorithm: ``"gd"`` or ``"nag"``.
        start: φ to begin with.
    """

    def __init__(self, kind, algorithm, start):
        super().__init__()
        self.kind = kind
        self.largest_stable = {"gd": UnrolledGD, "nag": UnrolledNAG}[algorithm].largest_stable_step
        value = torch.tensor(float(start))
        if kind == "fixed":
            self.register_buffer("value", value)
        else:
            self.value = nn.Parameter(value)

    def forward(self, f):
        """f ``[B, 1, H, W]`` to φ, scalar or ``[B, 1, 1, 1]``."""
        if self.kind != "guarded":
            return self.value
        L = 1 + f.float().square().amax((1, 2, 3), keepdim=True)
        return torch.minimum(self.value.abs(), _INSIDE * self.largest_stable(MU, L))


class HybridDenoiser(nn.Module):
    """Y_k = Alg^k(E(X, ·)) with f and g from the image (paper, Sec. 7.2).

    Args:
        case: sizes of f and g.
        algorithm, num_steps, backend: of the layer.
        step_size: a kind of ``StepSize``.
    """

    def __init__(self, case, algorithm, num_steps, step_size="guarded", start=0.5, backend="auto"):
        super().__init__()
        self.f = DnCNN(case.f_channels, backend=backend)
        self.g = DnCNN(case.g_channels, backend=backend, last_gain=_RESIDUAL_GAIN) if case.g_channels else None
        self.step_size = StepSize(step_size, algorithm, start)
        self.algorithm, self.num_steps, self.backend = algorithm, num_steps, backend

    def forward(self, X):
        """X ``[B, 1, H, W]`` to Y_k ``[B, 1, H, W]``."""
        f = self.f(X)
        g = None if self.g is None else self.g(X)
        options = {"algorithm": self.algorithm, "num_steps": self.num_steps, "backend": self.backend}
        return energy_layer(f, g, X, step_size=self.step_size(f), **options)


class PlainDenoiser(nn.Module):
    """Y = X - h(X): a DnCNN alone, as wide as brings it nearest to a number of parameters."""

    def __init__(self, parameters, backend="auto"):
        super().__init__()
        width = min(range(1, 65), key=lambda channels: abs(_dncnn_parameters(channels) - parameters))
        self.h = DnCNN(width, backend=backend, last_gain=_RESIDUAL_GAIN)

    def forward(self, X):
        """X ``[B, 1, H, W]`` to Y ``[B, 1, H, W]``."""
        return X - self.h(X)


def count_parameters(model):
    """The number of trained parameters."""
    return sum(p.numel() for p in model.parameters())


def make_model(trial, training, backend="auto"):
    """The untrained model of a trial; its initial f and g depend on case and seed alone, so comparisons are paired."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        if trial.case == PLAIN:
            about_right = CASES["about-right"]
            model = PlainDenoiser(
                sum(map(_dncnn_parameters, (about_right.f_channels, about_right.g_channels))), backend
            )
        else:
            options = {"step_size": training.step_size, "start": training.step_size_start, "backend": backend}
            model = HybridDenoiser(CASES[trial.case], trial.algorithm, trial.num_steps, **options)
    # a third faster on the CPU
    return model.to(memory_format=torch.channels_last)


def _dncnn_parameters(channels, hidden_layers=2):
    return 10 * channels + hidden_layers * (9 * channels**2 + 2 * channels) + 9 * channels + 1
