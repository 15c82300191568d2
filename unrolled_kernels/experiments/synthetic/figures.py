"""Figures 3, 4 and 5 of the paper, drawn from the results table."""

from matplotlib.figure import Figure

from unrolled_kernels.experiments.run_directory import atomic_path

_NAMES = {"gd": "GD", "nag": "NAG"}
_STYLES = {"gd": {"color": "tab:blue", "marker": "o"}, "nag": {"color": "tab:orange", "marker": "s"}}
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
    paths = []
    for name, (column, label, scale) in _FIGURES.items():
        path = directory / f"{name}.png"
        with atomic_path(path) as temporary:
            _figure(best, column, label, scale).savefig(temporary, dpi=150)
        paths.append(path)
    return paths


def _figure(best, column, label, scale):
    """One panel for each hidden size; mean and standard deviation over the seeds at each k."""
    sizes = sorted(best["hidden"].unique())
    figure = Figure(figsize=(1.2 + 3.6 * len(sizes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for panel, hidden in zip(panels, sizes, strict=True):
        for algorithm, rows in best[best["hidden"] == hidden].groupby("algorithm"):
            # NAG a little to the right: bars that overlap stay legible
            offset = 0.12 if algorithm == "nag" else -0.12
            over_seeds = rows.groupby("num_steps")[column]
            mean, deviation = over_seeds.mean(), over_seeds.std(ddof=0)
            # on a logarithmic axis a bar may not reach zero
            lower = deviation.clip(upper=0.9 * mean) if scale == "log" else deviation
            panel.errorbar(
                mean.index + offset,
                mean,
                yerr=[lower, deviation],
                label=_NAMES[algorithm],
                markersize=4,
                linewidth=1.4,
                elinewidth=0.9,
                capsize=2,
                **_STYLES[algorithm],
            )
        case = f"\n({_CASES[hidden]})" if hidden in _CASES else ""
        panel.set_title(f"hidden size {hidden}{case}", fontsize=10)
        panel.set_xlabel("number of steps $k$")
        panel.set_yscale(scale)
        panel.grid(alpha=0.3, which="both" if scale == "log" else "major", linewidth=0.5)
        panel.legend(frameon=False)
    panels[0].set_ylabel(label)
    seeds = best["seed"].nunique()
    figure.suptitle(f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed", fontsize=9)
    return figure
