"""Sparse coding with a learned algorithm: LISTA against ISTA and FISTA on the synthetic task of its literature.

A sparse code y* (10 % non-zeros, normal) is seen through a dictionary A with m = 250 rows, x = A y* + noise. ISTA and
FISTA minimise 1/2 ‖A y - x‖² + w ‖y‖₁ by k proximal steps, UnrolledGD and UnrolledMomentum.fista with prox=L1(w).
LISTA (Gregor and LeCun, 2010) is the same iteration

    y_{t+1} = soft threshold of (y_t - φ (Q y_t - W x)) at θ_t

with Q, W, every θ_t and every φ_t learned: one Q for the batch, UnrolledGD with prox=SoftThreshold(θ).

Run: python examples/lista.py            (n = 500, SNR 40 dB; --help has the other settings of the literature)
"""

import argparse
import math
import time

import torch
from torch import nn

import unrolled_kernels.functional as F
from unrolled_kernels import UnrolledGD, UnrolledMomentum
from unrolled_kernels.prox import L1, SoftThreshold

LASSO_STEPS = 2000  # of FISTA


class Task:
    """Sparse codes ``[B, n]`` and what is seen of them ``[B, m]``."""

    def __init__(self, n=500, m=250, density=0.1, snr_db=40.0, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.n, self.m, self.density, self.snr_db = n, m, density, snr_db
        A = torch.randn(m, n, generator=self.generator)
        self.A = A / A.norm(dim=0)

    def samples(self, count):
        draw = lambda *shape: torch.randn(*shape, generator=self.generator)
        support = torch.rand(count, self.n, generator=self.generator) < self.density
        y = draw(count, self.n) * support
        x = y @ self.A.mT
        if math.isfinite(self.snr_db):
            noise = draw(count, self.m)
            x = x + noise * (x.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True) * 10 ** (-self.snr_db / 20))
        return y, x


class LISTA(nn.Module):
    """k steps of ISTA with what ISTA derives from A learned."""

    def __init__(self, A, num_steps, weight):
        super().__init__()
        step_size = 1 / torch.linalg.matrix_norm(A, 2).item() ** 2
        self.Q = nn.Parameter(A.mT @ A)  # [n, n], one for the batch
        self.W = nn.Parameter(A.mT.clone())  # [n, m]
        threshold = torch.full((num_steps,), weight * step_size)
        self.solve = UnrolledGD(
            num_steps, step_size, learn_step_size=True, per_step=True, prox=SoftThreshold(threshold), learn_prox=True
        )

    def forward(self, x, return_trajectory=False):  # [B, m] -> [B, n], or [k + 1, B, n]
        return self.solve(self.Q, -x @ self.W.mT, return_trajectory=return_trajectory)

    def loop(self, x):
        """The same in plain torch, for comparison."""
        b, y = -x @ self.W.mT, 0.0
        for step_size, threshold in zip(self.solve.step_size, self.solve.prox_threshold, strict=True):
            v = y - step_size * ((y @ self.Q.mT if torch.is_tensor(y) else 0) + b)
            y = v.sign() * (v.abs() - threshold).relu()
        return y

    def by_hand(self, x):
        """The same by one-step calls of an unconstrained layer, as it had to be written without prox."""
        b, y = -x @ self.W.mT, None
        for step_size, threshold in zip(self.solve.step_size, self.solve.prox_threshold, strict=True):
            v = F.gradient_descent(self.Q, b, step_size, 1, y0=y)
            y = v.sign() * (v.abs() - threshold).relu()
        return y


def nmse_db(y, target):
    """10 log₁₀ (‖y - y*‖² / ‖y*‖²) over the whole set, per iterate if y has them."""
    return 10 * torch.log10((y - target).square().sum((-2, -1)) / target.square().sum())


def train(model, task, steps, batch, lr):
    # the numbers of a step move faster than the entries of the matrices
    groups = [{"params": [model.Q, model.W]}, {"params": model.solve.parameters(), "lr": 10 * lr}]
    optimizer = torch.optim.Adam(groups, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        y, x = task.samples(batch)
        # in dB every iterate counts, later ones more: the last alone leaves the first steps without a gradient to speak
        # of, and errors that are summed as they are leave it to the first
        errors = nmse_db(model(x, return_trajectory=True)[1:], y)
        loss = (errors * torch.linspace(0.2, 1, len(errors))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def milliseconds(function, model, x, target):
    """Forward and backward with the gradient of every parameter, the best of five."""
    times = []
    for _ in range(6):
        model.zero_grad()
        begin = time.perf_counter()
        (function(x) - target).square().sum().backward()
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times[1:])


def minimizers_error(task, x, target, weights=(0.1, 0.03, 0.01, 0.003)):
    """The least NMSE, over a few weights, of the lasso's own solution: what ISTA and FISTA tend to."""
    step_size = 1 / torch.linalg.matrix_norm(task.A, 2).item() ** 2
    with torch.no_grad():
        solutions = [
            UnrolledMomentum.fista(LASSO_STEPS, step_size, learnable=False, prox=L1(weight))(
                task.A.mT @ task.A, -x @ task.A
            )
            for weight in weights
        ]
    return min(nmse_db(y, target).item() for y in solutions)


def main(
    n=500,
    m=250,
    num_steps=16,
    snr_db=40.0,
    steps=1000,
    batch=128,
    lr=1e-3,
    weight=0.1,
    figure=None,
    out=None,
    lasso=False,
    seed=0,
):
    task = Task(n, m, snr_db=snr_db, seed=seed)
    # samples that no choice of the settings above has seen
    task.generator.manual_seed(seed + 1)
    test_y, test_x = task.samples(1000)
    Q, b = task.A.mT @ task.A, -test_x @ task.A
    step_size = 1 / torch.linalg.matrix_norm(task.A, 2).item() ** 2
    model = LISTA(task.A, num_steps, weight)
    train(model, task, steps, batch, lr)
    curves = {}
    with torch.no_grad():
        for name, solve in (
            ("ISTA", UnrolledGD(num_steps, step_size, prox=L1(weight))),
            ("FISTA", UnrolledMomentum.fista(num_steps, step_size, learnable=False, prox=L1(weight))),
        ):
            curves[name] = nmse_db(solve(Q, b, return_trajectory=True)[1:], test_y)
        curves["LISTA"] = nmse_db(model(test_x, return_trajectory=True)[1:], test_y)
    for name, curve in curves.items():
        print(f"{name:6} NMSE after {num_steps} steps: {curve[-1]:6.1f} dB")
    rows = [(name, t, x) for name, curve in curves.items() for t, x in enumerate(curve.tolist(), 1)]
    if lasso:
        rows.append(("lasso", LASSO_STEPS, minimizers_error(task, test_x[:100], test_y[:100])))
        print(f"lasso  NMSE of its solution: {rows[-1][-1]:6.1f} dB")
    if out:
        with open(out, "a") as file:
            file.writelines(f"{n},{snr_db},{name},{t},{x:.3f}\n" for name, t, x in rows)
    fused, loop, by_hand = (milliseconds(f, model, test_x, test_y) for f in (model, model.loop, model.by_hand))
    print(
        f"forward + backward of {len(test_x)} samples, d = {n}, k = {num_steps}: {fused:.0f} ms fused; a plain loop "
        f"{loop / fused:.2f}x, one-step calls {by_hand / fused:.2f}x as long"
    )
    if figure:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        fig, ax = plt.subplots(figsize=(5, 3.5), layout="constrained")
        for name, curve in curves.items():
            ax.plot(range(1, num_steps + 1), curve, marker="o", markersize=3, label=name)
        ax.set(xlabel="steps k", ylabel="NMSE on new samples, dB", title=f"n = {n}, SNR {snr_db:g} dB")
        ax.grid(alpha=0.3)
        ax.legend()
        fig.savefig(figure, dpi=150)
        print(f"wrote {figure}")
    return {name: curve[-1].item() for name, curve in curves.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=500, help="size of the code; the literature has 500 and 1000")
    parser.add_argument("--snr-db", type=float, default=40.0, help="inf: no noise")
    parser.add_argument("--num-steps", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1000, help="of the optimizer")
    parser.add_argument("--out", help="append n, SNR, algorithm, k and NMSE in dB of each iterate to this CSV")
    parser.add_argument(
        "--lasso", action="store_true", help="also solve the lasso by many steps, for 100 of the samples"
    )
    parser.add_argument("--figure", help="write NMSE over k to this PNG")
    main(**vars(parser.parse_args()))
