"""Figures 3 to 6 of the paper, drawn from the results table."""

from matplotlib.figure import Figure

from unrolled_kernels.experiments.run_directory import atomic_path

_NAMES = {"gd": "GD", "nag": "NAG", "rnn": "RNN"}
_STYLES = {
    "gd": {"color": "tab:blue", "marker": "o"},
    "nag": {"color": "tab:orange", "marker": "s"},
    "rnn": {"color": "tab:green", "marker": "^"},
}
# side by side: bars that overlap stay legible
_OFFSETS = {"gd": -0.12, "nag": 0.12, "rnn": 0}
_CASES = {0: "under-parameterized", 16: "about right", 32: "over-parameterized"}
_FIGURES = {
    "figure3_training_error": ("train", r"training error  $\|y_k - y^*\|_2$", "log"),
    "figure4_q_error": ("qfro2_test", r"$P\,\|Q_\theta - Q^*\|_F^2$", "log"),
    "figure5_generalization_gap": ("gap", "generalization gap  (test − train)", "linear"),
}


def draw(best, directory):
    """Write Figures 3 (training error), 4 (error of Q_θ) and 5 (generalization gap), each over k.

    Args:
        best: one row for each (hidden, algorithm, num_steps, seed), from ``grid.select_best``.
        directory: where the PNG files go.
    Returns:
        Their paths.
    """
    figures = {name: _over_hidden_sizes(best, *what) for name, what in _FIGURES.items()}
    return [_save(figure, directory / f"{name}.png") for name, figure in figures.items()]


def draw_learn_to_optimize(best, directory):
    """Write Figure 6: training error and generalization gap of GD, NAG and the RNN over k, a panel each.

    Args:
        best: one row for each (algorithm, num_steps, seed), from ``grid.select_best``.
        directory: where the PNG file goes.
    Returns:
        Its path, in a list.
    """
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    # a gap can be below zero, and an RNN's can be a hundred times GD's
    quantities = _FIGURES["figure3_training_error"], ("gap", _FIGURES["figure5_generalization_gap"][1], "symlog")
    for panel, (column, label, scale) in zip(figure.subplots(1, 2), quantities, strict=True):
        _curves(panel, best, column, scale)
        panel.set_ylabel(label)
    _name_seeds(figure, best)
    return [_save(figure, directory / "figure6.png")]


def _over_hidden_sizes(best, column, label, scale):
    """One panel for each hidden size."""
    sizes = sorted(best["hidden"].unique())
    figure = Figure(figsize=(1.2 + 3.6 * len(sizes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for panel, hidden in zip(panels, sizes, strict=True):
        _curves(panel, best[best["hidden"] == hidden], column, scale)
        case = f"\n({_CASES[hidden]})" if hidden in _CASES else ""
        panel.set_title(f"hidden size {hidden}{case}", fontsize=10)
    panels[0].set_ylabel(label)
    _name_seeds(figure, best)
    return figure


def _curves(panel, best, column, scale):
    """Mean and standard deviation over the seeds at each k, a curve for each algorithm."""
    for algorithm, rows in best.groupby("algorithm"):
        over_seeds = rows.groupby("num_steps")[column]
        mean, deviation = over_seeds.mean(), over_seeds.std(ddof=0)
        # on a logarithmic axis a bar may not reach zero
        lower = deviation.clip(upper=0.9 * mean) if scale == "log" else deviation
        panel.errorbar(
            mean.index + _OFFSETS[algorithm],
            mean,
            yerr=[lower, deviation],
            label=_NAMES[algorithm],
            markersize=4,
            linewidth=1.4,
            elinewidth=0.9,
            capsize=2,
            **_STYLES[algorithm],
        )
    panel.set_xlabel("number of steps $k$")
    panel.set_yscale(scale)
    panel.grid(alpha=0.3, which="both" if scale == "log" else "major", linewidth=0.5)
    panel.legend(frameon=False)


def _name_seeds(figure, best):
    seeds = best["seed"].nunique()
    figure.suptitle(f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed", fontsize=9)


def _save(figure, path):
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
