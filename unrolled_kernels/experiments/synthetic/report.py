"""``report.md`` and the table on the screen: what was trained, what came out, and the paper's claims beside it."""

from unrolled_kernels.experiments import report
from unrolled_kernels.experiments.synthetic import claims

_KEYS = {"hidden": "hidden", "algorithm": "algorithm", "num_steps": "k"}
_COLUMNS = {"train": "train error", "test": "test error", "gap": "gap", "qfro2_test": "‖Q_θ − Q*‖²_F"}


def summary_table(best):
    """Mean ± standard deviation over the seeds, a Markdown table of the quantities that ``best`` has.

    Args:
        best: one row for each (hidden, algorithm, num_steps, seed), or without ``hidden``, from ``grid.select_best``.
    """
    keys, columns = ({name: shown for name, shown in names.items() if name in best} for names in (_KEYS, _COLUMNS))
    lines = []
    for point, rows in best.groupby(list(keys)):
        cells = [f"{rows[c].mean():.4g} ± {rows[c].std(ddof=0):.2g}" for c in columns]
        lines.append([*(str(value).upper() for value in point), *cells])
    return report.table([*keys.values(), *columns.values()], lines)


def speed_table(speed):
    """The timings of ``speed.measure`` as a Markdown table."""
    lines = [
        (row["what"], f"{row['eager_us']:.0f}", f"{row['fused_us']:.1f}", f"{row['eager_us'] / row['fused_us']:.1f}×")
        for row in speed
    ]
    return report.table(("NAG, k = 30, batch 50", "eager loop, µs", "fused, µs", "ratio"), lines, left=1)


def write_report(path, *, settings, best, results, figures, speed, device):
    """Write ``report.md`` of the study.

    Args:
        path: the file.
        settings: the run's settings, a dict.
        best: the selected rows.
        results: the rows of all models.
        figures: paths of the figures, in the same directory.
        speed: rows of ``speed.measure``, or None.
        device: the machine, in words.
    """
    introduction = (
        f"{len(results)} trained models, of which {len(best)} are shown: the best over optimizer and learning rate by "
        "training loss for each hidden size, algorithm, k and seed. Numbers are mean ± standard deviation over the "
        f"seeds.{report.diverged(results)}"
    )
    timed = f"Medians on {device}, eager loop and fused layer in the same run.\n\n{speed_table(speed)}" if speed else ""
    report.write(
        path,
        title="Synthetic task (paper, Sec. 7.1)",
        introduction=introduction,
        settings=settings,
        figures=figures,
        sections={
            "The paper's claims in this run": claims.table(claims.check(best)),
            "Results": summary_table(best),
            "Speed": timed,
        },
    )
