"""How far truncated and implicit gradients are from those of all k steps, on the paper's synthetic task.

    python examples/gradient_bias.py [figure.png]

The energy is the paper's (Sec. 7.1): d = 5, b uniform in [-5, 5], eigenvalues in [0.1, 1], step size 1. Predicted
eigenvalues meet the minimizers of others, by the loss mean ‖y_k - y*‖, and the gradient is that by the eigenvalues.
"""

import sys

import torch

import unrolled_kernels.functional as F
from unrolled_kernels import Diagonal

MU, L, STEP_SIZE, SAMPLES = 0.1, 1.0, 1.0, 10_000
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 25, 30, 40, 60, 100)
MODES = {
    "one step": {"backward_steps": 1},
    "5 steps": {"backward_steps": 5},
    "10 steps": {"backward_steps": 10},
    "implicit": {"backward": "implicit"},
}
METHODS = {
    "gradient descent": lambda Q, b, k, **options: F.gradient_descent(Q, b, STEP_SIZE, k, **options),
    "Nesterov": lambda Q, b, k, **options: F.nesterov(Q, b, STEP_SIZE, MU, k, **options),
}


def eigenvalues(generator):
    """[L, three of a softmax between, μ], as the paper's networks put them out; Q is diagonal in its eigenbasis."""
    inner = MU + (L - MU) * torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64).softmax(-1)
    ends = torch.tensor([L, MU], dtype=torch.float64).expand(SAMPLES, 2)
    return torch.cat([ends, inner], -1)


def bias():
    """``{method: {mode: [‖g - g_unrolled‖ / ‖g_unrolled‖ over DEPTHS]}}``."""
    generator = torch.Generator().manual_seed(0)
    predicted, true = eigenvalues(generator).requires_grad_(), eigenvalues(generator)
    b = 10 * torch.rand(SAMPLES, 5, generator=generator, dtype=torch.float64) - 5
    minimizer = F.minimize(Diagonal(true), b)

    def gradient(method, k, **options):
        loss = (METHODS[method](Diagonal(predicted), b, k, **options) - minimizer).norm(dim=-1).mean()
        return torch.autograd.grad(loss, predicted)[0]

    results = {method: {mode: [] for mode in MODES} for method in METHODS}
    for method, k in ((method, k) for method in METHODS for k in DEPTHS):
        exact = gradient(method, k)
        for mode, options in MODES.items():
            # the gradient of one step from zero is zero in Q
            error = (gradient(method, k, **options) - exact).norm() / exact.norm() if k > 1 else torch.tensor(torch.nan)
            results[method][mode].append(error.item())
    return results


def draw(results, path):
    """One panel a method."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, (method, modes) in zip(axes, results.items(), strict=True):
        for mode, errors in modes.items():
            axis.plot(DEPTHS, [e if e > 1e-12 else float("nan") for e in errors], marker=".", label=mode)
        axis.set(xscale="log", yscale="log", title=method, xlabel="number of steps k", ylim=(1e-4, 30))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of the gradient")
    axes[-1].legend()
    figure.savefig(path, dpi=130)


def main(path=None):
    """Print the errors, and draw them where a path is given."""
    results = bias()
    for method, modes in results.items():
        print(method)
        print(" " * 10, *(f"{k:>8}" for k in DEPTHS))
        for mode, errors in modes.items():
            print(f"{mode:>10}", *(f"{e:8.1e}" for e in errors))
    if path is not None:
        draw(results, path)
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])
