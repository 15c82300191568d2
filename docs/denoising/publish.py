"""Every figure, table and number of docs/denoising that a run measured, from the tables in docs/denoising/results.

``--collect NAME RUN…`` first adds the models of some runs to ``results/NAME.parquet``, a row each: ``models``, those
of short trainings, with other methods and the picture of the first run beside them, ``fixed``, those of 3000 epochs.
``--compare BSD400`` first restores test images of that folder, and photographs that no model was trained on, with the
models of the package and other methods, a row an image in ``results/compared.parquet``. BM3D is among them where the
package `bm3d` is installed.
"""

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from unrolled_kernels.experiments import report
from unrolled_kernels.experiments.denoising import apply, evaluation, figures, gaps, images
from unrolled_kernels.experiments.denoising.data import DenoisingTask
from unrolled_kernels.experiments.denoising.grid import PRESETS, Training, Trial
from unrolled_kernels.experiments.denoising.model import CASES, PLAIN
from unrolled_kernels.experiments.denoising.report import (
    folds_sentence,
    gaps_table,
    methods_table,
    results_table,
    shortfall_sentence,
    with_models,
)
from unrolled_kernels.experiments.figures import CASES as CASE_NAMES
from unrolled_kernels.experiments.run_directory import atomic_path

FOLDER = Path(__file__).resolve().parent
PAGES = (FOLDER / "README.md",)
IDENTITY = list(Trial.__dataclass_fields__)
# the models of the package were trained on this seed's fold
_PACKAGE_SEED, _TUNING_IMAGES, _EVERY = 1, 8, 6
_OURS = "over, GD, k = 12"
_BM3D_STRENGTHS = (0.11, 0.13, 0.15, 0.17)
_SETS = {"bsd": "BSD400, every sixth test image", "photographs": "photographs of scikit-image"}
_HOW = [name for name in Training.__dataclass_fields__ if name != "epochs"]


def collect(name, runs):
    """Merge the results of runs, with how each trained its models, into the table; returns the written files."""
    tables, file = [], FOLDER / "results" / f"{name}.parquet"
    for run in runs:
        settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]
        table = pd.read_parquet(run / "results.parquet")
        tables.append(table.assign(**{name: settings[name] for name in _HOW}))
    if file.exists():
        # of models that are there already the new rows count
        tables.append(read(name))
    models = pd.concat(tables, ignore_index=True).drop_duplicates(IDENTITY).sort_values(IDENTITY)
    written, files = [], {name: models}
    if name == "models":
        means = json.loads((runs[0] / "baselines.json").read_text(encoding="utf-8"))
        rows = [(method, *values) for method, values in means.items()]
        files["methods"] = pd.DataFrame(rows, columns=["method", "psnr", "ssim"])
        written.append(FOLDER / "figure7_images.png")
        shutil.copyfile(runs[0] / written[0].name, written[0])
    for name, table in files.items():
        file = FOLDER / "results" / f"{name}.parquet"
        file.parent.mkdir(exist_ok=True)
        with atomic_path(file) as temporary:
            table.to_parquet(temporary, index=False, compression="zstd")
        written.append(file)
    return written


def compare(folder):
    """Restore test images of a folder, and photographs, by every method; returns the file that was written."""
    task, photographs = DenoisingTask(images.load_folder(folder, images.SIZE)[0]), DenoisingTask(images.photographs())
    train, test = task.split(_PACKAGE_SEED)
    tuning = task.pairs(train[:_TUNING_IMAGES], _PACKAGE_SEED)
    classical = evaluation.ClassicalMethods(*tuning)
    strength = _bm3d_strength(*tuning) if importlib.util.find_spec("bm3d") else None
    rows = []
    sets = {
        "bsd": task.pairs(test[::_EVERY], _PACKAGE_SEED),
        "photographs": photographs.pairs(torch.arange(len(photographs.clean)), 0),
    }
    for name, (clean, noisy) in sets.items():
        restored = {"noisy": noisy} | classical.restore(noisy)
        if strength is not None:
            restored["BM3D"] = _bm3d(noisy, strength)
        restored |= {f"{model}, GD, k = 12": evaluation.restore(apply.load(model), noisy) for model in apply.TRAINED}
        for method, result in restored.items():
            psnr, ssim = (values.tolist() for values in evaluation.quality(clean, result))
            chosen = {**classical.strengths, "BM3D": strength}.get(method)
            columns = {"set": name, "method": method, "strength": chosen, "psnr": psnr, "ssim": ssim}
            rows.append(pd.DataFrame(columns).rename_axis("image").reset_index())
    file = FOLDER / "results" / "compared.parquet"
    with atomic_path(file) as temporary:
        pd.concat(rows).astype({"strength": "float64"}).to_parquet(temporary, index=False, compression="zstd")
    return file


def _bm3d(noisy, strength):
    import bm3d

    restored = [bm3d.bm3d(image.astype(np.float64), strength) for image in noisy[:, 0].numpy()]
    return torch.from_numpy(np.stack(restored)).float().unsqueeze(1)


def _bm3d_strength(clean, noisy):
    return max(_BM3D_STRENGTHS, key=lambda strength: evaluation.psnr(clean, _bm3d(noisy, strength)).mean())


def compared(rows):
    """Every method on both sets of images, and how far ahead the over-parameterized model is, image by image."""
    lines = []
    for name, title in _SETS.items():
        methods = {method: part.set_index("image") for method, part in rows[rows["set"] == name].groupby("method")}
        ours = methods[_OURS]["psnr"]
        for method, part in sorted(methods.items(), key=lambda item: item[1]["psnr"].mean()):
            psnr, ssim = part["psnr"].mean(), part["ssim"].mean()
            gain = psnr - methods["noisy"]["psnr"].mean()
            ahead = "" if method == _OURS else "{:+.2f} ± {:.2f}".format(*gaps.interval(ours - part["psnr"]))
            where = f"{title} ({len(part)})"
            lines.append([where, method, f"{psnr:.2f}", f"{gain:+.2f}", f"{ssim:.3f}", ahead])
    head = "images", "", "PSNR, dB", "gain, dB", "SSIM", "over-parameterized ahead by, dB"
    return report.table(head, lines, left=2)


def read(name):
    """The rows of ``results/NAME.parquet``."""
    return pd.read_parquet(FOLDER / "results" / f"{name}.parquet")


def sections():
    """The text of every generated section by its name."""
    text = {}
    if (FOLDER / "results" / "compared.parquet").exists():
        text["compared"] = compared(read("compared"))
    for name, prefix in (("models", ""), ("fixed", "fixed-")):
        if not (FOLDER / "results" / f"{name}.parquet").exists():
            continue
        models = read(name)
        finite = models[~models["diverged"]]
        folds = folds_sentence(sorted(models["seed"].unique()))
        text |= {
            f"{prefix}protocol": protocol(models),
            f"{prefix}gaps": f"{folds}\n\n{gaps_table(finite)}",
            f"{prefix}models": results_table(models),
        }
        if name == "models":
            others = {row.method: (row.psnr, row.ssim) for row in read("methods").itertuples()}
            methods = with_models(others, finite, models["seed"].min())
            text["methods"] = "\n\n".join(filter(None, [methods_table(methods), shortfall_sentence(methods)]))
    return text


def protocol(models):
    """What was trained, and how much of the paper's protocol that is."""
    grid, training = PRESETS["paper"]
    whole = pd.Series([trial.case for trial in grid.trials()]).value_counts()
    names = {case: CASE_NAMES[case.replace("-", "_")] for case in CASES} | {PLAIN: "plain DnCNN"}
    lines = []
    for case in (case for case in names if case in set(models["case"])):
        rows = models[models["case"] == case]
        listed = lambda column, rows=rows: ", ".join(f"{value:g}" for value in sorted(rows[column].unique()))
        k = "" if case == PLAIN else listed("num_steps")
        lines.append(
            [names[case], f"{len(rows)} of {whole[case]}", k, rows["seed"].nunique(), listed("epochs"), listed("crop"),
             ", ".join(sorted(rows["noise"].unique()))]
        )  # fmt: skip
    head = "case", "models of the protocol's", "k", "folds", "epochs", "crop", "noise"
    images = f"{training.crop}×{training.crop} images"
    said = f"The protocol trains {training.epochs} epochs of {images}, noise {training.noise}."
    return f"{said} Here:\n\n{report.table(head, lines, left=1)}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", nargs="+", metavar=("NAME", "RUN"), default=[])
    parser.add_argument("--compare", type=Path, metavar="BSD400")
    arguments = parser.parse_args(argv)
    if arguments.compare:
        print(compare(arguments.compare))
    if arguments.collect:
        name, *runs = arguments.collect
        print(*collect(name, [Path(run) for run in runs]), sep="\n")
    report.fill(PAGES, sections())
    for name, folder in (("models", FOLDER), ("fixed", FOLDER / "fixed")):
        if (FOLDER / "results" / f"{name}.parquet").exists():
            models = read(name)
            folder.mkdir(exist_ok=True)
            print(*figures.draw(models[~models["diverged"]], None, folder), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
