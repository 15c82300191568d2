"""Figures 3 to 5 of the paper, drawn from the results table."""

import numpy as np
from matplotlib.figure import Figure

from unrolled_kernels.experiments import figures
from unrolled_kernels.experiments.synthetic.claims import controlled_gap, law, prediction
from unrolled_kernels.experiments.synthetic.comparison import REGIME_OF_HIDDEN
from unrolled_kernels.experiments.synthetic.model import ALGORITHMS

TRAINING_ERROR = r"training error  $\|y_k - y^*\|_2$"
GAP = "generalization gap  (test − train)"
_MEDIAN, _MEAN = "median and quartiles over the seeds", "mean ± standard deviation over the seeds"


def draw(best, directory):
    """Write Figures 3 (training error), 4 (error of Q_θ) and 5 (generalization gap), each over k.

    Figure 5 comes twice: the gap itself, as in the paper, and without what of it is sampling alone, with the law that
    the theory predicts, one factor for both algorithms.

    Args:
        best: one row for each (hidden, algorithm, num_steps, seed), from ``grid.select_best``.
        directory: where the PNG files go.
    Returns:
        Their paths.
    """
    drawn = {
        "figure3_training_error": _over_hidden_sizes(best, "train", TRAINING_ERROR, "log"),
        "figure4_q_error": _over_hidden_sizes(best, "qfro2_test", r"$P\,\|Q_\theta - Q^*\|_F^2$", "log", median=True),
        "figure5_generalization_gap": _over_hidden_sizes(best, "gap", GAP, "linear"),
        "figure5_law": _law(best),
    }
    return figures.save(drawn, directory)


def _over_hidden_sizes(best, column, label, scale, median=False):
    """One panel for each hidden size."""
    figure, panels = _panels(best, sharey=True)
    for panel, (hidden, rows) in zip(panels, best.groupby("hidden"), strict=True):
        panel.set_yscale(scale)
        figures.curves(panel, rows, column, median=median)
        panel.set_title(_title(hidden, rows), fontsize=10)
    panels[0].set_ylabel(label)
    figure.suptitle(_MEDIAN if median else _MEAN, fontsize=9)
    return figure


def _law(best):
    """The gap less its control variate, and c · Stab·Cvg or c · Stab with one c for both algorithms of a panel."""
    figure, panels = _panels(best, sharey=False)
    best = best.assign(controlled=controlled_gap(best))
    for panel, (hidden, rows) in zip(panels, best.groupby("hidden"), strict=True):
        figures.curves(panel, rows, "controlled")
        regime, title = REGIME_OF_HIDDEN.get(hidden), _title(hidden, rows)
        rows = rows[rows["algorithm"].isin(ALGORITHMS)]
        if regime and rows["num_steps"].nunique() > 4:
            c = law(rows, regime)[0].value
            k = np.arange(1, rows["num_steps"].max() + 1)
            for algorithm in sorted(set(rows["algorithm"]) & set(ALGORITHMS)):
                line = {"color": figures.STYLES[algorithm]["color"], "linestyle": "--", "linewidth": 1.2}
                panel.plot(k, c * prediction(algorithm, k, regime), zorder=0, **line)
            title += f"\ndashed: {c:.3g} · " + ("Stab · Cvg" if regime == "about_right" else "Stab")
        panel.set_title(title, fontsize=10)
    panels[0].set_ylabel("gap − gap of the same layer on Q*")
    figure.suptitle(_MEAN, fontsize=9)
    return figure


def _panels(best, sharey):
    sizes = best["hidden"].nunique()
    figure = Figure(figsize=(1.2 + 3.6 * sizes, 3.8), layout="constrained")
    return figure, figure.subplots(1, sizes, squeeze=False, sharey=sharey)[0]


def _title(hidden, rows):
    case, seeds = REGIME_OF_HIDDEN.get(hidden), rows["seed"].nunique()
    title = f"hidden size {hidden}, {seeds} {'seeds' if seeds > 1 else 'seed'}"
    return title + (f"\n({figures.CASES[case]})" if case else "")
