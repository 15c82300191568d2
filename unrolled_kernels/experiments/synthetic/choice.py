"""Is the advice any good? Gap factors fitted to one study, algorithms and depths chosen for another, and the regret."""

import numpy as np
import torch

from unrolled_kernels import schedules
from unrolled_kernels.experiments.synthetic.claims import law
from unrolled_kernels.experiments.synthetic.comparison import REGIME_OF_HIDDEN
from unrolled_kernels.experiments.synthetic.data import MU, NUM_TRAIN, L
from unrolled_kernels.experiments.synthetic.model import ALGORITHMS
from unrolled_kernels.experiments.synthetic.statistics import factor, seed_table
from unrolled_kernels.theory.bounds import predicted_error, schedule_error
from unrolled_kernels.theory.design import CANDIDATES, deepest_within
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


def choose(regime, g, depths, algorithms, *, tolerance=1.0):
    """The algorithm and depth that ``theory.recommend`` would take at φ = 1, the study's, among its depths.

    Returns:
        (algorithm, k).
    """
    k = torch.arange(1, max(depths) + 1)
    errors = {}
    for name in algorithms:
        if name == "chebyshev":
            values = schedule_error(schedules.chebyshev(len(k), MU, L), regime, MU, L, gap_factor=g)[1:]
        else:
            values = predicted_error(name, k, regime, 1.0, MU, gap_factor=g)
        trained = torch.tensor([depth in depths for depth in k.tolist()])
        errors[name] = values.where(trained, torch.inf)
    return deepest_within(errors, tolerance)


def validate(fitted_on, chosen_for, num_train=NUM_TRAIN, budgets=(30,)):
    """How much more test error choices of algorithm and depth have than the best of all within a budget of steps.

    Chosen are what the advice says of GD and NAG, and of Chebyshev too where it was trained, and all steps of each.

    Args:
        fitted_on: selected rows of the study that the gap factors come from, n = 100.
        chosen_for: selected rows of another: one for each (hidden, algorithm, num_steps, seed).
        num_train: n of the other; g falls like 1/√n.
        budgets: of steps.
    Returns:
        A list of dicts, a row for each hidden size of both and each budget: g, the ``choices`` (algorithm, k) by name,
        their ``regrets``, the ``best`` (algorithm, k) and its ``smallest`` test error.
    """
    rows = []
    for hidden in sorted(set(fitted_on["hidden"]) & set(chosen_for["hidden"])):
        regime = REGIME_OF_HIDDEN[hidden]
        here = chosen_for[chosen_for["hidden"] == hidden]
        g = gap_factor(fitted_on[fitted_on["hidden"] == hidden], regime) * (NUM_TRAIN / num_train) ** 0.5
        for budget in budgets:
            within = here[here["num_steps"] <= budget]
            if not set(ALGORITHMS) <= set(within["algorithm"]):
                continue
            # at the depths that every algorithm was trained for
            test = within.pivot_table(index="num_steps", columns="algorithm", values="test").dropna().unstack()
            depths = sorted(set(test.index.get_level_values("num_steps")))
            algorithms = [name for name in CANDIDATES if name in test.index]
            choices = {
                "advice": choose(regime, g, depths, algorithms),
                "advice, GD and NAG": choose(regime, g, depths, ALGORITHMS),
            } | {name: (name, depths[-1]) for name in algorithms}
            smallest = test.min()
            rows.append(
                {"hidden": hidden, "num_train": num_train, "budget": budget, "g": g, "choices": choices}
                | {"best": test.idxmin(), "smallest": smallest}
                | {"regrets": {name: test[point] - smallest for name, point in choices.items()}}
            )
    return rows
