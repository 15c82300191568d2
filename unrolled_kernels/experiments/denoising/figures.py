"""Figure 7 of the paper: the generalization gap over k, and images restored by one model."""

import numpy as np
from matplotlib.figure import Figure

from unrolled_kernels.experiments import figures
from unrolled_kernels.experiments.denoising import gaps
from unrolled_kernels.experiments.denoising.model import CASES, PLAIN

_TITLES = {case: figures.CASES[case.replace("-", "_")] for case in CASES}


def draw(results, pictures, directory):
    """Write the figures.

    Args:
        results: one row for each trained model.
        pictures: a dict, see ``restored_images``, or None.
        directory: where the PNG files go.
    Returns:
        Their paths.
    """
    one_fold = results["seed"].nunique() == 1
    drawn = {
        "figure7_generalization_gap": over_depth(results, "gap", "generalization gap  (test − train MSE)")
        if one_fold
        else gap_over_depth(results),
        "quality": over_depth(results, "test_psnr", "PSNR of test images, dB"),
    }
    if pictures:
        drawn["figure7_images"] = restored_images(**pictures)
    return figures.save(drawn, directory)


def over_depth(results, column, label):
    """One panel for each case; mean and standard deviation over the seeds at each k, the plain DnCNN as a line."""
    cases = [case for case in CASES if case in set(results["case"])]
    figure = Figure(figsize=(1.2 + 3.4 * len(cases), 3.4), layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    plain = results.loc[results["case"] == PLAIN, column].mean()
    for panel, case in zip(panels, cases, strict=True):
        figures.curves(panel, results[results["case"] == case], column)
        panel.axhline(plain, color="0.4", linestyle=":", linewidth=1.2, label="plain DnCNN")
        figures.finish(panel, _TITLES[case])
        panel.set_xticks(sorted(results.loc[results["case"] == case, "num_steps"].unique()))
    panels[0].set_ylabel(label)
    figures.name_seeds(figure, results)
    return figure


def gap_over_depth(results):
    """One panel for each case: the gaps of GD and NAG at each k with their intervals over the images."""
    table = gaps.of_results(results)
    cases = list(table["case"].unique())
    figure = Figure(figsize=(1.2 + 3.4 * len(cases), 3.4), layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for panel, case in zip(panels, cases, strict=True):
        of_case = table[table["case"] == case]
        for algorithm in ("gd", "nag"):
            known = of_case[of_case[algorithm].notna()]
            if len(known):
                figures.curve(panel, algorithm, known["num_steps"], known[algorithm], known[f"{algorithm}_half"])
        panel.axhline(0, color="0.4", linewidth=0.8)
        figures.finish(panel, _TITLES[case])
        steps = sorted(of_case["num_steps"].unique())
        panel.set_xticks(steps)
        panel.set_xlim(steps[0] - 1, steps[-1] + 1)
        sizes = of_case[["gd", "nag"]].abs().stack()
        if sizes.max() > 10 * sizes.median() > 0:
            # one depth is far from the others, which would lie on the axis
            panel.set_yscale("symlog", linthresh=10.0 ** np.ceil(np.log10(sizes.median())))
        else:
            panel.ticklabel_format(axis="y", scilimits=(0, 0))
    panels[0].set_ylabel("generalization gap  (MSE)")
    figure.suptitle("image by image, with 95 % intervals", fontsize=9)
    return figure


def restored_images(name, clean, noisy, restored, f2, psnr):
    """Original, noisy and restored images side by side, with the learned regularisation f² of each.

    Args:
        name: of the model.
        clean, noisy, restored, f2: ``[n, H, W]``, a row of the figure for each image.
        psnr: ``[n, 2]``, of the noisy and the restored image.
    """
    figure = Figure(figsize=(9.6, 0.4 + 2.3 * len(clean)), layout="constrained")
    panels = figure.subplots(len(clean), 4, squeeze=False)
    largest = f2.max().item()
    for row, (before, after), *images in zip(panels, psnr.tolist(), clean, noisy, restored, f2, strict=True):
        titles = "original", f"noisy, {before:.1f} dB", f"denoised by {name}, {after:.1f} dB", "learned $f^2$"
        for panel, title, image in zip(row, titles, images, strict=True):
            is_map = image is images[-1]
            drawn = panel.imshow(
                image, cmap="magma" if is_map else "gray", vmin=0, vmax=largest if is_map else 1, interpolation="none"
            )
            panel.set_title(title, fontsize=8)
            panel.set_axis_off()
            if is_map:
                figure.colorbar(drawn, ax=panel, shrink=0.85).ax.tick_params(labelsize=6)
    return figure
