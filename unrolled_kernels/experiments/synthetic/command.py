"""``unrolled-kernels synthetic``: the synthetic study from data to figures."""

import argparse
import dataclasses
from pathlib import Path

from unrolled_kernels import _backend
from unrolled_kernels.experiments import ranks, study
from unrolled_kernels.experiments.options import (
    add_run_options,
    device_name,
    environment,
    not_negative,
    positive,
    positive_float,
    resolve_device,
)
from unrolled_kernels.experiments.synthetic import figures, report, runner, speed
from unrolled_kernels.experiments.synthetic.data import FIRST_SEED, NUM_SAMPLES, NUM_TRAIN
from unrolled_kernels.experiments.synthetic.grid import OPTIMIZERS, PRESETS, Training, Trial, select_best
from unrolled_kernels.experiments.synthetic.model import ALGORITHMS, MINIMIZER, SCHEDULES


def add_arguments(parser):
    """Describe the subcommand."""
    parser.description = (
        "Train the models of the paper's synthetic task (Sec. 7.1) and draw Figures 3, 4 and 5. A run that was "
        "stopped continues when the same command is given again. Under `torchrun --nproc-per-node N -m "
        "unrolled_kernels.experiments.cli synthetic …` each process trains its share of the models, on a GPU of "
        "its own where there are GPUs."
    )
    grid = parser.add_argument_group("the grid (each option replaces that of the preset)")
    grid.add_argument(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="quick (default): a minute; medium: some minutes; paper: the whole study",
    )
    grid.add_argument(
        "--depths", type=positive, nargs="+", metavar="K", default=argparse.SUPPRESS, help="steps of the layers"
    )
    grid.add_argument(
        "--algorithms",
        choices=(*SCHEDULES, MINIMIZER),
        nargs="+",
        default=argparse.SUPPRESS,
        help="default: gd nag, the paper's; minimizer: the limit k = ∞",
    )
    grid.add_argument(
        "--hidden", type=not_negative, nargs="+", metavar="H", default=argparse.SUPPRESS, help="0: linear"
    )
    grid.add_argument("--optimizers", choices=OPTIMIZERS, nargs="+", default=argparse.SUPPRESS)
    grid.add_argument("--learning-rates", type=positive_float, nargs="+", metavar="LR", default=argparse.SUPPRESS)
    grid.add_argument("--seeds", type=positive, metavar="N", default=argparse.SUPPRESS, help="seeds 100 … 99+N")
    grid.add_argument("--epochs", type=positive, default=argparse.SUPPRESS)
    grid.add_argument("--learn-step-size", action="store_true", help="train the layers' step size too")
    runner.add_data_options(parser)
    parser.add_argument(
        "--num-train",
        type=positive,
        metavar="N",
        help="training samples of the generated data, at least 2; default 100",
    )
    parser.add_argument(
        "--same-start",
        action="store_true",
        help="the same initial weights and minibatch order for every seed, as in the authors' release (and with "
        "--reference); default: they vary with the seed, as the training samples do",
    )
    add_run_options(parser, "runs/synthetic-PRESET")
    parser.add_argument(
        "--trainer",
        choices=("ensemble", "single"),
        default="ensemble",
        help="many models at once (default), or one",
    )
    parser.add_argument("--no-speed", action="store_true", help="do not time the layer against the eager loop")
    parser.set_defaults(run=run)


def run(arguments):
    """Train, draw and report; see ``unrolled-kernels synthetic --help``."""
    with ranks.joined():
        return _run(arguments)


def _run(arguments):
    device = resolve_device(arguments.device, *ranks.local())
    _backend.resolve(arguments.backend, device)
    grid = study.replaced(PRESETS[arguments.preset], arguments)
    num_train = arguments.num_train or NUM_TRAIN
    if arguments.reference and (arguments.num_train not in (None, NUM_TRAIN)):
        raise ValueError(f"--num-train: the authors' data have {NUM_TRAIN} training samples a seed, got {num_train}")
    if not 2 <= num_train <= NUM_SAMPLES:
        raise ValueError(f"--num-train: expected 2 to {NUM_SAMPLES}, got {num_train}")
    if arguments.learn_step_size and not set(grid.algorithms) <= set(ALGORITHMS):
        others = ", ".join(sorted(set(grid.algorithms) - set(ALGORITHMS)))
        raise ValueError(f"--learn-step-size: expected --algorithms among {' '.join(ALGORITHMS)}, got {others}")
    # minibatches of half of the samples, as in the paper
    training = Training(grid.epochs, learn_step_size=arguments.learn_step_size, batch_size=num_train // 2)
    setup = runner.Setup(
        training=training,
        device=str(device),
        backend=arguments.backend,
        data_seed=arguments.seed,
        num_train=num_train,
        same_start=arguments.same_start,
        reference=arguments.reference,
        trainer=arguments.trainer,
    )
    trials, task = grid.trials(), setup.task()
    # fails here, not after hours, where the authors' data have no such seed or hidden size
    for seed in sorted({trial.seed for trial in trials}):
        task.train_index(seed)
    for hidden in grid.hidden:
        task.initial_weights(hidden, FIRST_SEED)

    settings = {"study": "synthetic"} | dataclasses.asdict(grid) | dataclasses.asdict(training)
    settings |= {
        "data": runner.data_name(arguments),
        "num_train": num_train,
        "same_start": arguments.same_start or arguments.reference is not None,
        "device": device.type,
        "backend": arguments.backend,
        "trainer": arguments.trainer,
    }
    out = arguments.out or Path("runs") / f"synthetic-{arguments.preset}"
    directory = runner.open_directory(out, settings, environment(), Trial)
    first = ranks.rank() == 0
    if first:
        print(f"{len(trials)} models of {grid.epochs} epochs; results go to {directory.path}", flush=True)
    runner.train_grid(setup, trials, directory, workers=arguments.workers, show_progress=first)
    if not first:
        return 0

    results = directory.results()
    best = select_best(results)
    if best.empty:
        raise ValueError(f"{directory.path}: every model diverged; take smaller --learning-rates")
    print(report.summary_table(best))
    drawn = figures.draw(best, directory.path)
    timings = None if arguments.no_speed else speed.measure(task, arguments.backend)
    name = f"{device_name(device)}, one thread" if device.type == "cpu" else device_name(device)
    report_file = directory.path / "report.md"
    report.write_report(
        report_file, settings=settings, best=best, results=results, figures=drawn, speed=timings, device=name
    )
    if timings:
        chosen = _backend.resolve(arguments.backend, device)
        print(f"\nspeed on {name}, backend {chosen}:\n\n{report.speed_table(timings)}")
        if chosen == "eager":
            print("(there is no compiled backend here; `python -m unrolled_kernels.info` says why)")
    print()
    for path in (*drawn, report_file, directory.results_file):
        print(path)
    return 0
