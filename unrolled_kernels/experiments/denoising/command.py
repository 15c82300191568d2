"""``unrolled-kernels denoising``: the denoising study from images to figures."""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path

import torch

from unrolled_kernels import _backend
from unrolled_kernels.experiments import checkpoint, ranks, study
from unrolled_kernels.experiments.denoising import (
    apply,
    evaluation,
    figures,
    images,
    measurements,
    report,
    runner,
)
from unrolled_kernels.experiments.denoising.data import NOISE, DenoisingTask
from unrolled_kernels.experiments.denoising.grid import AUTOCAST, PRESETS, SCHEDULES, Trial
from unrolled_kernels.experiments.denoising.model import ALGORITHMS, CASES, PLAIN, STEP_SIZES, make_model
from unrolled_kernels.experiments.denoising.train import check_graphs
from unrolled_kernels.experiments.denoising.weights import load_model
from unrolled_kernels.experiments.options import (
    add_run_options,
    device_name,
    environment,
    not_negative,
    positive,
    positive_float,
    resolve_device,
)
from unrolled_kernels.experiments.run_directory import RunDirectory, atomic_path

_SHOWN_IMAGES, _TUNING_IMAGES = 3, 8


def add_arguments(parser):
    """Describe the subcommand."""
    parser.description = (
        "Train the denoising models of the paper (Sec. 7.2) and draw Figure 7. A run that was stopped continues "
        "when the same command is given again. Under `torchrun … -m unrolled_kernels.experiments.denoising` all "
        "processes train each model together, each on its share of every batch."
    )
    grid = parser.add_argument_group("what is trained (each option replaces that of the preset)")
    grid.add_argument(
        "--preset", choices=PRESETS, default="quick", help="quick (default): minutes on two cores; paper: 3000 epochs"
    )
    replacing = {"default": argparse.SUPPRESS}
    grid.add_argument("--cases", choices=CASES, nargs="+", **replacing)
    grid.add_argument("--algorithms", choices=ALGORITHMS, nargs="+", **replacing)
    grid.add_argument("--depths", type=positive, nargs="+", metavar="K", help="steps of the layers", **replacing)
    grid.add_argument("--seeds", type=positive, metavar="N", help="how many, from --seed on", **replacing)
    grid.add_argument("--epochs", type=positive, **replacing)
    grid.add_argument("--batch-size", type=positive, metavar="N", help="over all processes together", **replacing)
    grid.add_argument("--crop", type=positive, metavar="N", help="side of the training crops", **replacing)
    grid.add_argument("--noise", choices=NOISE, help="of a training image: one for ever, or one an epoch", **replacing)
    grid.add_argument("--learning-rate", type=positive_float, metavar="LR", **replacing)
    grid.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate", **replacing)
    grid.add_argument(
        "--step-size",
        choices=STEP_SIZES,
        help="guarded: learned, and cut to the stable region of each image's own f; learned: free; fixed",
        **replacing,
    )
    grid.add_argument("--step-size-start", type=positive_float, metavar="PHI", help="φ at the start", **replacing)
    grid.add_argument("--autocast", choices=AUTOCAST, help="dtype of the networks' arithmetic", **replacing)
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder of images; default: those of scikit-image")
    parser.add_argument("--size", type=positive, default=images.SIZE, metavar="N", help="of the images; default: 180")
    parser.add_argument("--seed", type=not_negative, default=0, help="the first seed, default 0")
    add_run_options(parser, "runs/denoising-PRESET")
    parser.add_argument(
        "--checkpoint-seconds", type=positive_float, default=30, metavar="S", help="between checkpoints; default: 30"
    )
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="on a GPU, record the launches of a model's forward and backward pass once and replay them",
    )
    parser.add_argument("--tensorboard", action="store_true", help="write logs to DIR/tensorboard")
    parser.add_argument("--no-baselines", action="store_true", help="leave out the classical methods")
    parser.add_argument("--no-speed", action="store_true", help="leave out timings and the guard's demonstration")
    parser.set_defaults(run=run)
    apply.add_parser(parser.add_subparsers(metavar="apply", help="restore an image with a trained model"))


def run(arguments):
    """Train, draw and report; see ``unrolled-kernels denoising --help``."""
    with ranks.joined():
        return _run(arguments)


def _run(arguments):
    device = resolve_device(arguments.device, *ranks.local())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _backend.resolve(arguments.backend, device)
    if arguments.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard: tensorboard is not installed; get it with `pip install tensorboard`")
    grid, training = (study.replaced(preset, arguments) for preset in PRESETS[arguments.preset])
    clean, source = ranks.on_first_rank(lambda: _images(arguments))
    settings = dataclasses.asdict(grid) | dataclasses.asdict(training)
    settings |= {"seed": arguments.seed, **source, "device": device.type, "backend": arguments.backend}
    out = arguments.out or Path("runs") / f"denoising-{arguments.preset}"
    first = ranks.rank() == 0
    columns = [field.name for field in dataclasses.fields(Trial)] + ["diverged", "image_losses"]
    opened = []
    # every rank raises what the first one does
    ranks.on_first_rank(lambda: opened.append(RunDirectory(out, settings, environment(), columns=columns)))
    directory = opened[0] if opened else None
    trials = grid.trials(arguments.seed)
    if arguments.graphs:
        check_graphs(device, len(DenoisingTask(clean).split(arguments.seed)[0]), training.batch_size)
    if first:
        print(f"{len(trials)} models of {training.epochs} epochs; results go to {out}", flush=True)
    setup = runner.Setup(
        training=training,
        device=str(device),
        backend=arguments.backend,
        clean=clean,
        checkpoint_seconds=arguments.checkpoint_seconds,
        graphs=arguments.graphs,
    )
    logs = out / "tensorboard" if arguments.tensorboard else None
    runner.train_grid(setup, trials, directory, workers=arguments.workers, logs=logs, show_progress=first)
    if first:
        _finish(arguments, setup, settings, directory, device)
    return 0


def _images(arguments):
    """The clean images, and what ``config.json`` notes of them."""
    if arguments.data is None:
        clean, skipped, source = images.photographs(arguments.size), 0, "photographs of scikit-image"
    else:
        (clean, skipped), source = images.load_folder(arguments.data, arguments.size), str(arguments.data.resolve())
    if skipped:
        print(f"{skipped} images skipped, {len(clean)} used")
    content = hashlib.sha256(clean.numpy().tobytes()).hexdigest()[:16]
    return clean, {"data": source, "images": len(clean), "skipped": skipped, "size": arguments.size, "sha256": content}


def _finish(arguments, setup, settings, directory, device):
    """Compare with other methods, measure, draw and report."""
    results, task = directory.results(), setup.task()
    finite = results[~results["diverged"]]
    if not (finite["case"] != PLAIN).any():
        raise ValueError(
            f"{directory.path}: every model with a layer diverged; take a smaller --learning-rate, or "
            "--step-size guarded"
        )
    sections = {}
    if not arguments.no_baselines:
        methods = _methods(finite, directory, task, arguments.seed)
        body = [report.methods_table(methods), report.shortfall_sentence(methods)]
        sections["Methods on the same images"] = "\n\n".join(filter(None, body))
    seeds = sorted(finite.loc[finite["case"] != PLAIN, "seed"].unique())
    if seeds:
        sections["Gaps"] = "\n\n".join([report.folds_sentence(seeds), report.gaps_table(finite)])
    if not arguments.no_speed:
        sections["Speed"] = "\n\n".join(
            [
                f"Medians on {device_name(device)}, {torch.get_num_threads()} threads, images of "
                f"{arguments.size}×{arguments.size}, float32, the eager loop and backend "
                f"{_backend.resolve(arguments.backend, device)} in turns.",
                report.speed_table(measurements.speed(task, device, arguments.backend)),
                report.memory_table(measurements.saved_for_backward(task, arguments.backend)),
            ]
        )
        sections["The guard of the step size"] = report.guard_sentence(measurements.guard(task, setup.training))
    drawn = figures.draw(finite, _pictures(finite, setup, directory, task), directory.path)
    report_file = directory.path / "report.md"
    report.write_report(report_file, settings=settings, results=results, sections=sections, figures=drawn)
    print(report.results_table(results))
    for title, body in sections.items():
        print(f"\n{title}\n\n{body}")
    print()
    for path in (*drawn, report_file, directory.results_file):
        print(path)


def _methods(results, directory, task, seed):
    """PSNR and SSIM on the test images of the first seed: noisy, classical (kept in a file), DnCNN, deepest layers."""
    file = directory.path / "baselines.json"
    if not file.exists():
        train, test = task.split(seed)
        classical = evaluation.ClassicalMethods(*task.pairs(train[:_TUNING_IMAGES], seed))
        clean, noisy = task.pairs(test, seed)
        restored = {"noisy": noisy} | classical.restore(noisy)
        means = {name: [x.mean().item() for x in evaluation.quality(clean, y)] for name, y in restored.items()}
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps(means, indent=2) + "\n", encoding="utf-8")
    return report.with_models(json.loads(file.read_text(encoding="utf-8")), results, seed)


def _pictures(results, setup, directory, task):
    """What ``figures.restored_images`` draws: a few test images through about-right GD¹², or what is nearest to it."""
    hybrid = results[results["case"] != PLAIN]
    if hybrid.empty:
        return None
    by_likeness = hybrid.assign(
        case_differs=hybrid["case"] != "about-right",
        algorithm_differs=hybrid["algorithm"] != "gd",
        steps_differ=(hybrid["num_steps"] - 12).abs(),
    ).sort_values(["case_differs", "algorithm_differs", "steps_differ", "seed"])
    row = by_likeness.iloc[0]
    trial = Trial(row["case"], row["algorithm"], int(row["num_steps"]), int(row["seed"]))
    model = make_model(trial, setup.training)
    file = runner.model_file(directory, trial)
    load_model(file, trial, model, checkpoint.read(file, trial.name)[0])
    clean, noisy = task.pairs(task.split(trial.seed)[1][:_SHOWN_IMAGES], trial.seed)
    restored = evaluation.restore(model, noisy)
    with torch.no_grad():
        f2 = model.f(noisy).square()
    psnr = torch.stack([evaluation.psnr(clean, y) for y in (noisy, restored)], 1)
    shown = (x[:, 0].numpy() for x in (clean, noisy, restored.clamp(0, 1), f2))
    names = "clean", "noisy", "restored", "f2"
    name = rf"{trial.algorithm.upper()}$^{{{trial.num_steps}}}$"
    return {"name": name, "psnr": psnr} | dict(zip(names, shown, strict=True))
