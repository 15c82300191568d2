"""``report.md`` and the table on the screen: what was trained, what came out, and the paper's claims beside it."""

from unrolled_kernels.experiments.run_directory import atomic_path
from unrolled_kernels.experiments.synthetic import claims

_KEYS = {"hidden": "hidden", "algorithm": "algorithm", "num_steps": "k"}
_COLUMNS = {"train": "train error", "test": "test error", "gap": "gap", "qfro2_test": "‖Q_θ − Q*‖²_F"}


def summary_table(best):
    """Mean ± standard deviation over the seeds, a Markdown table of the quantities that ``best`` has.

    Args:
        best: one row for each (hidden, algorithm, num_steps, seed), or without ``hidden``, from ``grid.select_best``.
    """
    keys, columns = ({name: shown for name, shown in names.items() if name in best} for names in (_KEYS, _COLUMNS))
    lines = [
        "| " + " | ".join([*keys.values(), *columns.values()]) + " |",
        "|" + "---:|" * (len(keys) + len(columns)),
    ]
    for point, rows in best.groupby(list(keys)):
        cells = [str(value).upper() for value in point]
        cells += [f"{rows[c].mean():.4g} ± {rows[c].std(ddof=0):.2g}" for c in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed_table(speed):
    """The timings of ``speed.measure`` as a Markdown table."""
    lines = ["| NAG, k = 30, batch 50 | eager loop, µs | fused, µs | ratio |", "|---|---:|---:|---:|"]
    for row in speed:
        ratio = row["eager_us"] / row["fused_us"]
        lines.append(f"| {row['what']} | {row['eager_us']:.0f} | {row['fused_us']:.1f} | {ratio:.1f}× |")
    return "\n".join(lines)


def write_report(path, *, settings, best, models, figures, speed, device):
    """Write ``report.md`` of the study.

    Args:
        path: the file.
        settings: the run's settings, a dict.
        best: the selected rows.
        models: how many models were trained.
        figures: paths of the figures, in the same directory.
        speed: rows of ``speed.measure``, or None.
        device: the machine, in words.
    """
    introduction = (
        f"{models} trained models, of which {len(best)} are shown: the best over optimizer and learning rate by "
        "training loss for each hidden size, algorithm, k and seed. Numbers are mean ± standard deviation over the "
        "seeds."
    )
    measured = []
    if speed:
        measured = ["## Speed", "", f"Medians on {device}, eager loop and fused layer in the same run.", ""]
        measured += [speed_table(speed), ""]
    title = "Synthetic task (paper, Sec. 7.1)"
    _write(path, title, introduction, settings, figures, claims.check(best), best, measured)


def write_learn_to_optimize(path, *, settings, best, models, figures):
    """Write ``report.md`` of Figure 6; the arguments are those of ``write_report``."""
    introduction = (
        f"{models} trained layers, of which {len(best)} are shown: the best over the learning rate by training loss "
        "for each algorithm, k and seed. The energies' true Q* and b are given; GD and NAG learn their step size, the "
        "RNN its cell, from a start near GD with φ = 1. Numbers are mean ± standard deviation over the seeds."
    )
    title = "Learning to optimize (paper, Sec. 7.1, Figure 6)"
    _write(path, title, introduction, settings, figures, claims.check_learn_to_optimize(best), best)


def _write(path, title, introduction, settings, figures, sentences, best, appendix=()):
    text = [f"# {title}", "", introduction, "", "| setting | value |", "|---|---|"]
    text += [f"| {name} | {value} |" for name, value in settings.items()]
    text += ["", "## Figures", ""] + [f"![{figure.stem}]({figure.name})\n" for figure in figures]
    text += ["## The paper's claims in this run", ""] + [f"- {sentence}" for sentence in sentences]
    text += ["", "## Results", "", summary_table(best), "", *appendix]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(text), encoding="utf-8")
