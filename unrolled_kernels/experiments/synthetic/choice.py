"""Is the advice any good? Gap factors fitted to one study, algorithms and depths chosen for another, and the regret."""

import numpy as np
import torch

from unrolled_kernels.experiments.synthetic.claims import law
from unrolled_kernels.experiments.synthetic.comparison import REGIME_OF_HIDDEN
from unrolled_kernels.experiments.synthetic.data import MU, NUM_TRAIN
from unrolled_kernels.experiments.synthetic.statistics import factor, seed_table
from unrolled_kernels.theory.bounds import predicted_error
from unrolled_kernels.theory.properties import convergence_rate


def gap_factor(best, regime):
    """g of ``theory.predicted_error`` for one hidden size: of gap = c · Stab·Cvg or c · Stab, and bias = a · Cvg.

    The bias is the error that the layer itself leaves, on the true Q*.

    Args:
        best: one row for each (algorithm, num_steps, seed) of one hidden size.
        regime: that of the prediction.
    Returns:
        g = c/(a μ²).
    """
    values, algorithms, k = seed_table(best, "true_test")
    cvg = np.concatenate([convergence_rate(name, torch.tensor(k), 1.0, MU).numpy() for name in algorithms])
    a, _ = factor(values.mean(0).ravel(), cvg)
    c, _ = law(best, regime)
    return c.value / (float(a) * MU**2)


def choose(regime, g, depths, *, tolerance=0.05):
    """The algorithm and depth that ``theory.recommend`` would take at φ = 1, the study's, among its depths.

    Returns:
        (algorithm, k).
    """
    k = torch.tensor(sorted(depths))
    errors = {name: predicted_error(name, k, regime, 1.0, MU, gap_factor=g) for name in ("gd", "nag")}
    limit = (1 + tolerance) * min(values.min() for values in errors.values())
    depth, _, name = max(
        (int(depth), -value.item(), name)
        for name, values in errors.items()
        for depth, value in zip(k, values, strict=True)
        if value <= limit
    )
    return name, depth


def regret(best, chosen):
    """How much larger the mean test error of a choice is than that of the best (algorithm, k).

    Args:
        best: one row for each (algorithm, num_steps, seed) of one hidden size.
        chosen: a dict from a name to (algorithm, k).
    Returns:
        The best (algorithm, k), its test error, and a dict from each name to its regret.
    """
    test = best.groupby(["algorithm", "num_steps"])["test"].mean()
    smallest = test.min()
    return test.idxmin(), smallest, {name: test[point] - smallest for name, point in chosen.items()}


def validate(fitted_on, chosen_for, num_train=NUM_TRAIN):
    """The regret of the advice, of all steps of NAG and of all steps of GD, a row for each hidden size of both.

    Args:
        fitted_on: selected rows of the study that the gap factors come from, n = 100.
        chosen_for: selected rows of another.
        num_train: n of the other; g falls like 1/√n.
    Returns:
        A list of dicts.
    """
    rows = []
    for hidden in sorted(set(fitted_on["hidden"]) & set(chosen_for["hidden"])):
        regime = REGIME_OF_HIDDEN[hidden]
        here = chosen_for[chosen_for["hidden"] == hidden]
        g = gap_factor(fitted_on[fitted_on["hidden"] == hidden], regime) * (NUM_TRAIN / num_train) ** 0.5
        deepest = int(here["num_steps"].max())
        choices = {
            "advice": choose(regime, g, here["num_steps"].unique()),
            "NAG": ("nag", deepest),
            "GD": ("gd", deepest),
        }
        point, smallest, regrets = regret(here, choices)
        rows.append(
            {"hidden": hidden, "num_train": num_train, "g": g, "choices": choices, "best": point, "smallest": smallest}
            | {"regrets": regrets}
        )
    return rows
