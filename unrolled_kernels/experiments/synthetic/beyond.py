"""Algorithms that the paper does not look at, beside its two: does the theory's prediction of the gap carry over?"""

import numpy as np
from matplotlib.figure import Figure

from unrolled_kernels.experiments import figures, report
from unrolled_kernels.experiments.figures import NAMES
from unrolled_kernels.experiments.synthetic.claims import controlled_gap
from unrolled_kernels.experiments.synthetic.data import MU, L
from unrolled_kernels.experiments.synthetic.figures import TRAINING_ERROR
from unrolled_kernels.experiments.synthetic.model import ALGORITHMS, MINIMIZER, SCHEDULES
from unrolled_kernels.experiments.synthetic.statistics import factor, rank_correlation, resampled, seed_table
from unrolled_kernels.theory.properties import schedule_convergence, schedule_stability


def prediction(algorithm, depths):
    """Stab·Cvg after ``depths`` steps ``[k]`` with φ = 1, from the scalar recurrences of the schedule."""
    schedule = SCHEDULES[algorithm](int(max(depths)), 1.0)
    product = schedule_stability(schedule, MU, L).wrt_Q * schedule_convergence(schedule, MU, L)
    return product[list(depths)].numpy()


def law(best):
    """gap = c · Stab·Cvg: c of the paper's two algorithms, and how well it fits each of all.

    Args:
        best: one row for each (algorithm, num_steps, seed) of one hidden size, from ``grid.select_best``.
    Returns:
        c, and for each algorithm but the minimizer the rank correlation over k of the gap with Stab·Cvg (an
        ``Interval``) and the part of the gap's spread over k that c · Stab·Cvg explains, R².
    """
    steps = best[(best["algorithm"] != MINIMIZER) & (best["num_steps"] > 1)]
    values, algorithms, k = seed_table(steps.assign(gap=controlled_gap), "gap")
    predicted = np.stack([prediction(name, k) for name in algorithms])
    two = [algorithms.index(name) for name in ALGORITHMS]
    mean = values.mean(0)
    c = float(factor(mean[two].ravel(), predicted[two].ravel())[0])
    found = {}
    for i, name in enumerate(algorithms):
        rank = resampled(values[:, i], lambda x, i=i: rank_correlation(x.mean(1), predicted[i]))
        left, spread = mean[i] - c * predicted[i], mean[i] - mean[i].mean()
        found[name] = rank, float(1 - (left @ left) / (spread @ spread))
    return c, found


def table(best):
    """Every algorithm: its theory, how its gap follows it, and the test error it ends with, in Markdown."""
    c, fits = law(best)
    test = best.groupby(["algorithm", "num_steps"])["test"].median()
    shown = [k for k in (2, 5, 10, 20, 30) if k in test["gd"].index]
    lines = []
    for name, (rank, explained) in fits.items():
        schedule = SCHEDULES[name](10, 1.0)
        cvg = schedule_convergence(schedule, MU, L)[-1].item()
        stab = schedule_stability(schedule, MU, L).wrt_Q[-1].item()
        cells = [f"{test[name, k]:.3f}" for k in shown]
        lines.append([NAMES[name], f"{cvg:.3g}", f"{stab:.1f}", rank, f"{explained:.2f}", *cells])
    if MINIMIZER in test.index:
        stab = f"{1 / MU**2:.1f}"
        lines.append([NAMES[MINIMIZER], "0", stab, *[""] * (len(shown) + 1), f"{test[MINIMIZER, 0]:.3f}"])
    head = (
        "algorithm",
        "Cvg(10)",
        "Stab(10)",
        "rank correlation with Stab·Cvg",
        "R²",
        *(f"test, k = {k}" for k in shown),
    )
    return f"c = {c:.3f}, of GD and NAG alone.\n\n" + report.table(head, lines, left=1)


def figure(best):
    """Training error, test error and gap over k of every algorithm, and the law beside the gap."""
    drawn = Figure(figsize=(12.6, 4.2), layout="constrained")
    panels = drawn.subplots(1, 3)
    best = best.assign(controlled=controlled_gap(best))
    columns = ("train", TRAINING_ERROR, "log"), ("test", "test error", "log"), ("controlled", "gap", "linear")
    for panel, (column, label, scale) in zip(panels, columns, strict=True):
        panel.set_yscale(scale)
        figures.curves(panel, best, column, median=True)
        panel.set_ylabel(label)
        panel.get_legend().remove()
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=9, frameon=False, fontsize=8)
    c, fits = law(best)
    k = np.arange(2, best["num_steps"].max() + 1)
    for name in fits:
        panels[2].plot(k, c * prediction(name, k), color=figures.STYLES[name]["color"], linestyle="--", linewidth=1)
    panels[2].set_ylabel("gap − gap of the same layer on Q*")
    panels[2].set_title(f"dashed: {c:.3g} · Stab · Cvg", fontsize=10)
    figures.name_seeds(drawn, best, "median and quartiles")
    return drawn
