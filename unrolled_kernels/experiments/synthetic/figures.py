"""Figures 3 to 5 of the paper, drawn from the results table."""

from matplotlib.figure import Figure

from unrolled_kernels.experiments import figures
from unrolled_kernels.experiments.synthetic.comparison import REGIME_OF_HIDDEN

TRAINING_ERROR = r"training error  $\|y_k - y^*\|_2$"
GAP = "generalization gap  (test − train)"
_BARS = {True: "median and quartiles", False: "mean ± standard deviation"}


def draw(best, directory):
    """Write Figures 3 (training error), 4 (error of Q_θ) and 5 (generalization gap), each over k.

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
    }
    return figures.save(drawn, directory)


def _over_hidden_sizes(best, column, label, scale, median=False):
    """One panel for each hidden size."""
    sizes = sorted(best["hidden"].unique())
    figure = Figure(figsize=(1.2 + 3.6 * len(sizes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for panel, hidden in zip(panels, sizes, strict=True):
        panel.set_yscale(scale)
        figures.curves(panel, best[best["hidden"] == hidden], column, median=median)
        panel.set_title(hidden_title(hidden), fontsize=10)
    panels[0].set_ylabel(label)
    figures.name_seeds(figure, best, _BARS[median])
    return figure


def hidden_title(hidden):
    """A hidden size, and the case of the paper that it stands for."""
    case = REGIME_OF_HIDDEN.get(hidden)
    return f"hidden size {hidden}" + (f"\n({figures.CASES[case]})" if case else "")
