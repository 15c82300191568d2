"""``report.md`` and the tables on the screen: what was trained and what came out."""

from unrolled_kernels.experiments.denoising.model import CASES, PLAIN
from unrolled_kernels.experiments.run_directory import atomic_path


def results_table(results):
    """Mean ± standard deviation over the seeds, a Markdown table."""
    lines = [
        "| case | algorithm | k | parameters | train MSE | test MSE | gap | PSNR, dB | SSIM | diverged |",
        "|---|---|" + "---:|" * 8,
    ]
    order = {case: i for i, case in enumerate((*CASES, PLAIN))}
    keys = ["case", "algorithm", "num_steps"]
    for (case, algorithm, num_steps), rows in sorted(
        results.groupby(keys), key=lambda item: (order[item[0][0]], item[0][1:])
    ):
        cells = [f"{rows[c].mean():.3e}" for c in ("train_loss", "test_loss")]
        cells += [f"{rows['gap'].mean():.1e} ± {rows['gap'].std(ddof=0):.1e}"]
        cells += [f"{rows[c].mean():.{digits}f}" for c, digits in (("test_psnr", 2), ("test_ssim", 3))]
        cells += [f"{rows['diverged'].sum()} of {len(rows)}"]
        steps = num_steps or ""
        lines.append(f"| {case} | {algorithm.upper()} | {steps} | {rows['parameters'].iloc[0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def methods_table(methods):
    """Each method on the same test images, a Markdown table.

    Args:
        methods: a dict from the method's name to ``(psnr, ssim)``, the noisy image first.
    """
    noisy = next(iter(methods.values()))[0]
    lines = ["| test images of one seed | PSNR, dB | gain, dB | SSIM |", "|---|---:|---:|---:|"]
    for name, (psnr, ssim) in methods.items():
        lines.append(f"| {name} | {psnr:.2f} | {psnr - noisy:+.2f} | {ssim:.3f} |")
    return "\n".join(lines)


def speed_table(rows):
    """The timings of ``measurements.speed``, a Markdown table."""
    lines = ["| about right, k = 12, batch 10 | eager, ms | fused, ms | ratio |", "|---|---:|---:|---:|"]
    for row in rows:
        ratio = row["eager_ms"] / row["fused_ms"]
        lines.append(f"| {row['what']} | {row['eager_ms']:.1f} | {row['fused_ms']:.1f} | {ratio:.1f}× |")
    return "\n".join(lines)


def memory_table(saved):
    """The bytes of ``measurements.saved_for_backward``, a Markdown table."""
    depths = list(next(iter(saved.values())))
    lines = ["| kept for backward, MB, k = | " + " | ".join(map(str, depths)) + " |", "|---|" + "---:|" * len(depths)]
    for name, by_depth in saved.items():
        lines.append(f"| {name} | " + " | ".join(f"{by_depth[k] / 1e6:.1f}" for k in depths) + " |")
    return "\n".join(lines)


def guard_sentence(losses):
    """What the guard of the step size did, from ``measurements.guard``."""
    free, guarded = losses["learned"], losses["guarded"]
    shown = ", ".join(f"{loss:.2g}" for loss in free)
    return (
        f"Over-parameterized GD³⁰ from φ = 1: without a guard the loss of its epochs is {shown}"
        f"{' (diverged)' if free[-1] == float('inf') else ''}; kept inside the stable region of each image's own "
        f"1 + max f² it is {', '.join(f'{loss:.2g}' for loss in guarded)}."
    )


def write_report(path, *, settings, results, sections, figures):
    """Write ``report.md``.

    Args:
        path: the file.
        settings: the run's settings, a dict.
        results: one row for each trained model.
        sections: a dict from title to Markdown text.
        figures: paths of the figures, in the same directory.
    """
    text = ["# Local adaptive denoising (paper, Sec. 7.2)", ""]
    text += [
        f"{len(results)} trained models. The split, the noise, the initial weights and the order of the images are "
        "those of the seed. σ of the noise falls from 50/255 in flat areas to 10/255 on edges, a law of ours: the "
        "paper gives none. Losses are mean squared errors of a pixel, PSNR and SSIM means over the test images.",
        "",
    ]
    text += ["| setting | value |", "|---|---|"]
    text += [f"| {name} | {value} |" for name, value in settings.items()]
    text += ["", "## Figures", ""] + [f"![{figure.stem}]({figure.name})\n" for figure in figures]
    for title, body in sections.items():
        text += [f"## {title}", "", body, ""]
    text += ["## Models", "", results_table(results), ""]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(text), encoding="utf-8")
