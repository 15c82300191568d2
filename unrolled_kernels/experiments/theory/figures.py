"""Figures of the theory: Figure 2, Theorem 5.1 in its three regimes, and predicted gaps above measured ones."""

import torch
from matplotlib.figure import Figure

from unrolled_kernels.experiments.figures import CASES, NAMES, STYLES
from unrolled_kernels.experiments.synthetic.comparison import REGIME_OF_HIDDEN
from unrolled_kernels.theory.bounds import REGIMES, predicted_gap
from unrolled_kernels.theory.properties import ALGORITHMS

_PANELS = {
    "convergence  Cvg": ("convergence",),
    "stability in Q  Stab$_Q$": ("stability_Q",),
    "product  Stab$_Q$ · Cvg, that of the theorem": ("stability_Q", "convergence"),
    "sensitivity  Sens": ("sensitivity",),
    "stability in b  Stab$_b$": ("stability_b",),
    "product  Stab$_b$ · Cvg": ("stability_b", "convergence"),
}


def figure2(table):
    """Figure 2: Cvg, Stab and Stab·Cvg over k; lines are the theory, markers the largest value the layers reached.

    Args:
        table: one row for each (algorithm, num_steps), from ``report.property_table``.
    Returns:
        A matplotlib ``Figure``.
    """
    figure = Figure(figsize=(11.4, 6.4), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    for panel, (title, factors) in zip(panels.flat, _PANELS.items(), strict=True):
        for algorithm, rows in table.groupby("algorithm"):
            name, style, k = NAMES[algorithm], STYLES[algorithm], rows["num_steps"]
            theory, measured = (
                rows[[f"{factor}{suffix}" for factor in factors]].prod(axis=1) for suffix in ("", "_measured")
            )
            panel.plot(k, theory, color=style["color"], linewidth=1.6, label=f"{name}, theory")
            panel.plot(k, measured, linestyle="none", markersize=4, label=f"{name}, layer", **style)
        _finish(panel, title)
    for row in panels:
        row[0].set_ylabel(r"worst case over the class, $\|b\| = 1$")
    panels[0, 0].legend(frameon=False)
    return figure


def theorem(bounds):
    """Theorem 5.1 over k for three covering numbers, one panel each.

    Args:
        bounds: from ``report.theorem_curves``.
    Returns:
        A matplotlib ``Figure``.
    """
    figure = Figure(figsize=(11.4, 3.8), layout="constrained")
    for panel, (name, (log_covering, curves)) in zip(figure.subplots(1, 3), bounds.items(), strict=True):
        for algorithm, values in curves.items():
            steps = range(1, len(values) + 1)
            panel.plot(steps, [v.total for v in values], markersize=3, linewidth=1.4, label=NAMES[algorithm],
                       **STYLES[algorithm])  # fmt: skip
        deciding = " → ".join(dict.fromkeys(CASES[v.regime] for v in curves["gd"]))
        _finish(panel, f"{name}, log N = {log_covering:.3g}\nGD: {deciding}")
        panel.legend(frameon=False)
    figure.axes[0].set_ylabel("bound of Theorem 5.1")
    return figure


def gaps(results, *, step_size, mu):
    """Predicted and measured generalization gaps over k in the three regimes, above each other.

    Args:
        results: one row for each trained model, see ``comparison``.
        step_size, mu: of the prediction.
    Returns:
        A matplotlib ``Figure``.
    """
    figure = Figure(figsize=(11.4, 6.4), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    hidden_of = {regime: hidden for hidden, regime in REGIME_OF_HIDDEN.items()}
    k = torch.arange(1, int(results["num_steps"].max()) + 1)
    for (above, below), regime in zip(panels.T, REGIMES, strict=True):
        measured = results[results["hidden"] == hidden_of[regime]]
        for algorithm in ALGORITHMS:
            name, style = NAMES[algorithm], STYLES[algorithm]
            above.plot(k, predicted_gap(algorithm, k, regime, step_size, mu), color=style["color"], label=name)
            over_seeds = measured[measured["algorithm"] == algorithm].groupby("num_steps")["gap"]
            mean = over_seeds.mean()
            if len(mean):
                deviation = over_seeds.std(ddof=0)
                below.errorbar(mean.index, mean, deviation, markersize=4, capsize=2, label=name, **style)
        _finish(above, f"predicted, {CASES[regime]}")
        _finish(below, f"measured, hidden size {hidden_of[regime]}")
        above.set_xlabel("")
        above.legend(frameon=False)
    panels[0, 0].set_ylabel("Stab, or Stab·Cvg (any unit)")
    panels[1, 0].set_ylabel("generalization gap")
    return figure


def _finish(panel, title):
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("number of steps $k$")
    # all of these quantities start at zero
    low, high = panel.dataLim.intervaly
    low = min(0, low)
    panel.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    panel.grid(alpha=0.3, linewidth=0.5)
