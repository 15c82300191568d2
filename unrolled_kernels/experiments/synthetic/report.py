"""``report.md`` and the table on the screen: what was trained, what came out, and the paper's claims beside it."""

from unrolled_kernels.experiments.run_directory import atomic_path
from unrolled_kernels.experiments.synthetic import claims

_COLUMNS = {"train": "train error", "test": "test error", "gap": "gap", "qfro2_test": "‖Q_θ − Q*‖²_F"}


def summary_table(best):
    """Mean ± standard deviation over the seeds, a Markdown table.

    Args:
        best: one row for each (hidden, algorithm, num_steps, seed), from ``grid.select_best``.
    """
    lines = [
        "| hidden | algorithm | k | " + " | ".join(_COLUMNS.values()) + " |",
        "|" + "---:|" * (3 + len(_COLUMNS)),
    ]
    for (hidden, algorithm, num_steps), rows in best.groupby(["hidden", "algorithm", "num_steps"]):
        cells = [f"{rows[c].mean():.4g} ± {rows[c].std(ddof=0):.2g}" for c in _COLUMNS]
        lines.append(f"| {hidden} | {algorithm.upper()} | {num_steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed_table(speed):
    """The timings of ``speed.measure`` as a Markdown table."""
    lines = ["| NAG, k = 30, batch 50 | eager loop, µs | fused, µs | ratio |", "|---|---:|---:|---:|"]
    for row in speed:
        ratio = row["eager_us"] / row["fused_us"]
        lines.append(f"| {row['what']} | {row['eager_us']:.0f} | {row['fused_us']:.1f} | {ratio:.1f}× |")
    return "\n".join(lines)


def write_report(path, *, settings, best, models, figures, speed, device):
    """Write ``report.md``.

    Args:
        path: the file.
        settings: the run's settings, a dict.
        best: the selected rows.
        models: how many models were trained.
        figures: paths of the figures, in the same directory.
        speed: rows of ``speed.measure``, or None.
        device: the machine, in words.
    """
    text = ["# Synthetic task (paper, Sec. 7.1)", ""]
    text += [
        f"{models} trained models, of which {len(best)} are shown: the best over optimizer and learning rate by "
        "training loss for each hidden size, algorithm, k and seed. Numbers are mean ± standard deviation over "
        "the seeds.",
        "",
    ]
    text += ["| setting | value |", "|---|---|"]
    text += [f"| {name} | {value} |" for name, value in settings.items()]
    text += ["", "## Figures", ""] + [f"![{figure.stem}]({figure.name})\n" for figure in figures]
    text += ["## The paper's claims in this run", ""] + [f"- {sentence}" for sentence in claims.check(best)]
    text += ["", "## Results", "", summary_table(best), ""]
    if speed:
        text += ["## Speed", "", f"Medians on {device}, eager loop and fused layer in the same run.", ""]
        text += [speed_table(speed), ""]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(text), encoding="utf-8")
