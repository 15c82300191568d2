"""``report.md`` and the tables on the screen: what was trained and what came out."""

import math

from unrolled_kernels.experiments import report
from unrolled_kernels.experiments.denoising import gaps
from unrolled_kernels.experiments.denoising.data import FOLDS
from unrolled_kernels.experiments.denoising.model import CASES, PLAIN

CLASSICAL = "non-local means", "total variation"


def results_table(results):
    """Mean ± standard deviation over the seeds whose model did not diverge, a Markdown table."""
    lines = []
    order = {case: i for i, case in enumerate((*CASES, PLAIN))}
    keys = ["case", "algorithm", "num_steps"]
    for (case, algorithm, num_steps), rows in sorted(
        results.groupby(keys), key=lambda item: (order[item[0][0]], item[0][1:])
    ):
        kept = rows[~rows["diverged"]]
        cells = [f"{kept[c].mean():.3e}" for c in ("train_loss", "test_loss")]
        cells += [f"{kept['gap'].mean():.1e} ± {kept['gap'].std(ddof=0):.1e}"]
        cells += [f"{kept[c].mean():.{digits}f}" for c, digits in (("test_psnr", 2), ("test_ssim", 3))]
        cells = cells if len(kept) else ["–"] * len(cells)
        cells += [f"{rows['diverged'].sum()} of {len(rows)}"]
        lines.append([case, algorithm.upper(), num_steps or "", rows["parameters"].iloc[0], *cells])
    head = "case", "algorithm", "k", "parameters", "train MSE", "test MSE", "gap", "PSNR, dB", "SSIM", "diverged"
    return report.table(head, lines, left=2)


def gaps_table(results):
    """The gaps of GD and NAG, and their difference on the same images, with 95 % intervals: a Markdown table."""
    lines = []
    for row in gaps.of_results(results).itertuples():
        cells = [(row.gd, row.gd_half), (row.nag, row.nag_half), (row.difference, row.difference_half)]
        mean, half = cells[-1]
        verdict = "undecided" if not abs(mean) > half else f"{'NAG' if mean > 0 else 'GD'} smaller"
        texts = ["–" if math.isnan(mean) else f"{mean:.1e} ± {half:.1e}" for mean, half in cells]
        lines.append([row.case, row.num_steps, *texts, verdict])
    return report.table(("case", "k", "gap of GD", "gap of NAG", "GD − NAG, by image", "verdict"), lines, left=1)


def folds_sentence(seeds):
    """What these seeds are as folds."""
    rounds = {seed // FOLDS for seed in seeds}
    if len(seeds) < 2:
        return f"One fold: gaps need the models of others. Give --seeds {FOLDS}."
    return (
        f"{len(seeds)} folds of {FOLDS * len(rounds)}: an image's loss under the models of other folds less that under "
        "its own fold's, with intervals over the images; a denoiser that is not trained has a gap of zero."
    )


def shortfall_sentence(methods):
    """Which layers did not train long enough to pass every classical method; empty if none.

    Args:
        methods: as in ``methods_table``.
    """
    classical = {name: methods[name][0] for name in CLASSICAL if name in methods}
    layers = {name: value[0] for name, value in methods.items() if name not in (*CLASSICAL, "noisy", "plain DnCNN")}
    best = max(classical, key=classical.get, default=None)
    behind = [name for name, psnr in layers.items() if best is not None and psnr <= classical[best]]
    if not behind:
        return ""
    return (
        f"Not trained long enough to pass {best} ({classical[best]:.2f} dB): {'; '.join(behind)}. Give more --epochs."
    )


def with_models(methods, results, seed):
    """Other methods and, behind them, the deepest models of each case and algorithm that ``seed`` trained.

    Args:
        methods: a dict from the method's name to ``(psnr, ssim)`` on the test images of ``seed``.
        results: one row for each trained model.
        seed: whose models are compared.
    """
    methods = dict(methods)
    of_seed = results[results["seed"] == seed].sort_values(["case", "algorithm", "num_steps"])
    for row in of_seed.groupby(["case", "algorithm"]).tail(1).itertuples():
        name = "plain DnCNN" if row.case == PLAIN else f"{row.case}, {row.algorithm.upper()}, k = {row.num_steps}"
        methods[name] = row.test_psnr, row.test_ssim
    return methods


def methods_table(methods):
    """Each method on the same test images, a Markdown table.

    Args:
        methods: a dict from the method's name to ``(psnr, ssim)``, the noisy image first.
    """
    noisy = next(iter(methods.values()))[0]
    lines = [(name, f"{psnr:.2f}", f"{psnr - noisy:+.2f}", f"{ssim:.3f}") for name, (psnr, ssim) in methods.items()]
    return report.table(("test images of one seed", "PSNR, dB", "gain, dB", "SSIM"), lines, left=1)


def speed_table(rows):
    """The timings of ``measurements.speed``, a Markdown table."""
    lines = [
        (row["what"], f"{row['eager_ms']:.1f}", f"{row['fused_ms']:.1f}", f"{row['eager_ms'] / row['fused_ms']:.1f}×")
        for row in rows
    ]
    return report.table(("about right, k = 12, batch 10", "eager, ms", "fused, ms", "ratio"), lines, left=1)


def memory_table(saved):
    """The bytes of ``measurements.saved_for_backward``, a Markdown table."""
    depths = list(next(iter(saved.values())))
    lines = [[name, *(f"{by_depth[k] / 1e6:.1f}" for k in depths)] for name, by_depth in saved.items()]
    return report.table(("kept for backward, MB, k =", *map(str, depths)), lines, left=1)


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
    report.write(
        path,
        title="Local adaptive denoising (paper, Sec. 7.2)",
        introduction=(
            f"{len(results)} trained models. The split, the noise, the initial weights and the order of the images are "
            "those of the seed. σ of the noise falls from 50/255 in flat areas to 10/255 on edges, a law of ours: the "
            "paper gives none. Losses are mean squared errors of a pixel, PSNR and SSIM means over the test images."
        ),
        settings=settings,
        figures=figures,
        sections=sections | {"Models": results_table(results)},
    )
