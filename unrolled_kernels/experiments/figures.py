"""The style of every figure: names, colours and markers of the algorithms, and curves over k with bars."""

from unrolled_kernels.experiments.run_directory import atomic_path

NAMES = {
    "gd": "GD",
    "nag": "NAG",
    "rnn": "RNN",
    "nag_small_mu": "NAG with μ/4",
    "nag_large_mu": "NAG with 4μ",
    "fista": "FISTA",
    "heavy_ball": "heavy ball",
    "chebyshev": "Chebyshev",
    "minimizer": "minimizer, k = ∞",
}
STYLES = {
    "gd": {"color": "tab:blue", "marker": "o"},
    "nag": {"color": "tab:orange", "marker": "s"},
    "rnn": {"color": "tab:green", "marker": "^"},
    "nag_small_mu": {"color": "tab:brown", "marker": "<"},
    "nag_large_mu": {"color": "tab:olive", "marker": ">"},
    "fista": {"color": "tab:pink", "marker": "v"},
    "heavy_ball": {"color": "tab:red", "marker": "D"},
    "chebyshev": {"color": "tab:purple", "marker": "P"},
    "minimizer": {"color": "black", "marker": ""},
}
CASES = {"under": "under-parameterized", "about_right": "about right", "over": "over-parameterized"}
# side by side: bars that overlap stay legible
_OFFSETS = {"gd": -0.12, "nag": 0.12}


def curves(panel, rows, column, *, median=False):
    """``column`` over k with bars over the seeds, a curve for each algorithm; k = 0 is its limit, a level line.

    Args:
        panel: matplotlib axes.
        rows: one row for each (algorithm, num_steps, seed).
        column: what is drawn.
        median: draw median and quartiles instead of mean and standard deviation.
    """
    for algorithm, of_algorithm in rows.groupby("algorithm"):
        over_seeds = of_algorithm.groupby("num_steps")[column]
        if median:
            centre = over_seeds.median()
            bars = centre - over_seeds.quantile(0.25), over_seeds.quantile(0.75) - centre
        else:
            centre = over_seeds.mean()
            bars = (over_seeds.std(ddof=0),) * 2
        if set(centre.index) == {0}:
            panel.axhline(centre[0], label=NAMES[algorithm], linewidth=1, color=STYLES[algorithm]["color"])
            continue
        curve(panel, algorithm, centre.index, centre, bars)
    finish(panel)


def curve(panel, algorithm, k, centre, bars):
    """One algorithm's curve over k, with bars."""
    panel.errorbar(
        k + _OFFSETS.get(algorithm, 0),
        centre,
        yerr=bars,
        label=NAMES.get(algorithm, algorithm),
        markersize=4,
        linewidth=1.4,
        elinewidth=0.9,
        capsize=2,
        **STYLES.get(algorithm, {}),
    )


def finish(panel, title=None):
    """Axis of k, grid and legend."""
    if title:
        panel.set_title(title, fontsize=10)
    panel.set_xlabel("number of steps $k$")
    panel.grid(alpha=0.3, which="both" if panel.get_yscale() == "log" else "major", linewidth=0.5)
    panel.legend(frameon=False, fontsize=8)


def name_seeds(figure, rows, what="mean ± standard deviation"):
    """Say above the panels what bars are, and of how many seeds."""
    seeds = rows["seed"].nunique()
    of_each = rows.groupby("algorithm")["seed"].nunique()
    fewer = ", ".join(f"{NAMES[name]}: {count}" for name, count in of_each.items() if count < seeds)
    over = f"{what} over {seeds} seeds" + (f" ({fewer})" if fewer else "")
    figure.suptitle(over if seeds > 1 else "one seed", fontsize=9)


def save(figures, directory):
    """Write ``{name: figure}`` as PNG files into a folder, made where it is not there; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        path = directory / f"{name}.png"
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=130)
        paths.append(path)
    return paths
