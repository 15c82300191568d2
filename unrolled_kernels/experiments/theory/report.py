"""The tables of ``unrolled-kernels theory``: theory and measurement side by side, as DataFrames and Markdown."""

import math

import pandas as pd
import torch

from unrolled_kernels.regions import rnn_contraction
from unrolled_kernels.theory import empirical
from unrolled_kernels.theory.bounds import log_covering_parametric, model_bound
from unrolled_kernels.theory.properties import (
    ALGORITHMS,
    convergence_rate,
    rnn_sensitivity,
    rnn_stability,
    sensitivity,
    stability,
)

# log N of classes of Q_θ at radius 1/√n for n = 100: the smallest that is one, and the study's linear network and its
# largest (33 and 451 parameters, taken in a ball of radius 5 and 5-Lipschitz in them)
LOG_COVERING = {
    "two functions": math.log(2),
    "hidden size 0": log_covering_parametric(0.1, 33, 5.0, 5.0),
    "hidden size 32": log_covering_parametric(0.1, 451, 5.0, 5.0),
}
_SHOWN = (1, 5, 10, 20, 30)


def property_table(algorithm, num_steps, step_size, mu, L, *, num_samples=1000, seed=0, device=None):
    """Table 1 in numbers, ‖b‖ = 1: each property after 0 … k steps and the largest value that the layers reached.

    Args:
        algorithm, step_size, mu, L, num_samples, seed, device: as in ``empirical.measure_convergence``.
        num_steps: the deepest k. Sensitivity is taken for c₀ = step_size.
    Returns:
        A DataFrame with a row for each k.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    k = torch.arange(num_steps + 1)
    options = {"seed": seed, "device": device}
    stab = stability(algorithm, k, step_size, mu)
    stab_measured = empirical.measure_stability(
        algorithm, num_steps, step_size, mu, L, num_pairs=num_samples, **options
    )
    columns = {
        "convergence": convergence_rate(algorithm, k, step_size, mu),
        "convergence_measured": empirical.measure_convergence(
            algorithm, num_steps, step_size, mu, L, num_samples=num_samples, **options
        ),
        "stability_b": stab.wrt_b,
        "stability_b_measured": stab_measured.wrt_b,
        "stability_Q": stab.wrt_Q,
        "stability_Q_measured": stab_measured.wrt_Q,
        "sensitivity": sensitivity(algorithm, k, step_size, mu),
        "sensitivity_measured": empirical.measure_sensitivity(
            algorithm, num_steps, step_size, mu, L, num_samples=num_samples, **options
        ),
    }
    table = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
    table.insert(0, "num_steps", k.numpy())
    table.insert(0, "algorithm", algorithm)
    return table


def theorem_curves(num_steps, step_size, *, mu, **problem):
    """Theorem 5.1 at k = 1 … num_steps, for the covering numbers ``LOG_COVERING`` and a fixed step size.

    Args:
        num_steps, step_size: of the layers.
        mu, problem: the other arguments of ``bounds.model_bound`` but log_covering.
    Returns:
        A dict from the name of the class to ``(log_covering, {algorithm: [bound at each k]})``, each a
        ``LocalRademacherBound``.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    return {
        name: (
            log_covering,
            {
                algorithm: [
                    model_bound(algorithm, k, step_size, log_covering=log_covering, mu=mu, **problem)
                    for k in range(1, num_steps + 1)
                ]
                for algorithm in ALGORITHMS
            },
        )
        for name, log_covering in LOG_COVERING.items()
    }


def anchors_markdown(table):
    """Theory and layer at the depths of the printed table: Cvg, Stab in b and in Q, Sens."""
    head = "| algorithm | k | Cvg | layer | Stab_b | layer | Stab_Q | layer | Sens | layer |"
    lines = [head, "|---|" + "---:|" * 9]
    names = ("convergence", "stability_b", "stability_Q", "sensitivity")
    for row in table[table["num_steps"].isin(_SHOWN)].to_dict("records"):
        digits = {"convergence": ".6f", "sensitivity": ".5f"}
        cells = [format(row[n + s], digits.get(n, ".3f")) for n in names for s in ("", "_measured")]
        lines.append(f"| {row['algorithm'].upper()} | {row['num_steps']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios_markdown(table):
    """The largest measured value over its bound, over all k ≥ 1: at most 1, and 1 where the bound is attained."""
    lines = ["| algorithm | Cvg | Stab_b | Stab_Q | Sens |", "|---|" + "---:|" * 4]
    for algorithm, rows in table[table["num_steps"] > 0].groupby("algorithm"):
        cells = []
        for name in ("convergence", "stability_b", "stability_Q", "sensitivity"):
            # nothing depends on Q after one step from zero
            part = rows[rows[name] > 0]
            cells.append(f"{(part[f'{name}_measured'] / part[name]).max():.9f}")
        lines.append(f"| {algorithm.upper()} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def orders_markdown(orders):
    """Fits C k^p ρ^k of the measured properties beside the rate that Table 1 prints.

    Args:
        orders: a dict from algorithm to the result of ``empirical.measured_orders``.
    """
    lines = ["| algorithm | property | fitted p | fitted ρ | ρ of Table 1 |", "|---|---|---:|---:|---:|"]
    for algorithm, fits in orders.items():
        for name, (order, rate) in fits.items():
            what = "1 − μ Stab_b" if name == "stability" else name
            lines.append(f"| {algorithm.upper()} | {what} | {order.power:.3f} | {order.rate:.5f} | {rate:.5f} |")
    return "\n".join(lines)


def rnn_markdown(mu, L, *, dim=5, hidden=20, contraction=0.9, seed=0):
    """Table 2 in numbers, for a random cell of one hidden layer scaled to a given c_φ, ‖b‖ = 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (hidden, dim), (hidden, dim), (dim, hidden)
    W1, W2, V = (torch.randn(s, generator=generator, dtype=torch.float64) / s[1] ** 0.5 for s in shapes)
    V = V * (contraction / rnn_contraction((W1, W2, [], V), mu=mu, L=L))
    weights = W1, W2, [], V
    k = torch.tensor(_SHOWN)
    stab, sens = rnn_stability(weights, k, mu=mu, L=L), rnn_sensitivity(weights, k, mu=mu, L=L)
    lines = [f"| RNN, c_φ = {contraction:g}, k | Stab_b | Stab_Q | Sens |", "|---:|---:|---:|---:|"]
    for row in zip(_SHOWN, stab.wrt_b.tolist(), stab.wrt_Q.tolist(), sens.tolist(), strict=True):
        lines.append("| {} | {:.3f} | {:.3f} | {:.3f} |".format(*row))
    return "\n".join(lines)
