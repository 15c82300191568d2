"""``unrolled-kernels synthetic``: the synthetic study from data to figures."""

import argparse
import dataclasses
from pathlib import Path

from unrolled_kernels import _backend
from unrolled_kernels.experiments.options import (
    device_name,
    environment,
    not_negative,
    positive,
    positive_float,
    resolve_device,
)
from unrolled_kernels.experiments.run_directory import RunDirectory
from unrolled_kernels.experiments.synthetic import figures, learn_to_optimize, report, runner, sharding, speed
from unrolled_kernels.experiments.synthetic.data import FIRST_SEED
from unrolled_kernels.experiments.synthetic.grid import OPTIMIZERS, PRESETS, Training, select_best
from unrolled_kernels.experiments.synthetic.model import ALGORITHMS


def add_parser(subparsers):
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "synthetic",
        help="train GD and NAG layers on the paper's synthetic task; Figures 3 to 6",
        description=(
            "Train the models of the paper's synthetic task (Sec. 7.1) and draw Figures 3, 4 and 5, or, with "
            "--learn-to-optimize, Figure 6. A run that was stopped continues when the same command is given again. "
            "Under `torchrun --nproc-per-node N -m unrolled_kernels.experiments.cli synthetic …` each process trains "
            "its share of the models, on a GPU of its own where there are GPUs."
        ),
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
    grid.add_argument("--algorithms", choices=ALGORITHMS, nargs="+", default=argparse.SUPPRESS)
    grid.add_argument(
        "--hidden", type=not_negative, nargs="+", metavar="H", default=argparse.SUPPRESS, help="0: linear"
    )
    grid.add_argument("--optimizers", choices=OPTIMIZERS, nargs="+", default=argparse.SUPPRESS)
    grid.add_argument("--learning-rates", type=positive_float, nargs="+", metavar="LR", default=argparse.SUPPRESS)
    grid.add_argument("--seeds", type=positive, metavar="N", default=argparse.SUPPRESS, help="seeds 100 … 99+N")
    grid.add_argument("--epochs", type=positive, default=argparse.SUPPRESS)
    grid.add_argument("--learn-step-size", action="store_true", help="train the layers' step size too")
    parser.add_argument(
        "--learn-to-optimize",
        action="store_true",
        help="Figure 6: Q and b are given; GD and NAG with a learned step size against an RNN",
    )
    parser.add_argument("--seed", type=not_negative, default=2, help="seed of the generated data, default 2")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="use the authors' samples and weights in DIR")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: runs/synthetic-PRESET or runs/learn-to-optimize-PRESET"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 …; default: cuda where it is")
    parser.add_argument("--backend", default="auto", choices=("auto", *_backend.NAMES), help="default: auto")
    parser.add_argument(
        "--trainer",
        choices=("ensemble", "single"),
        default=argparse.SUPPRESS,
        help="many models at once (default), or one",
    )
    parser.add_argument("--workers", type=positive, metavar="N", help="processes; default: one a core on the CPU")
    parser.add_argument("--no-speed", action="store_true", help="do not time the layer against the eager loop")
    parser.set_defaults(run=run)


def run(arguments):
    """Train, draw and report; see ``unrolled-kernels synthetic --help``."""
    with sharding.joined() as shard:
        return _run(arguments, shard)


def _run(arguments, shard):
    device = resolve_device(arguments.device, shard.local_rank, shard.local_size)
    _backend.resolve(arguments.backend, device)
    kind = "learn-to-optimize" if arguments.learn_to_optimize else "synthetic"
    if arguments.learn_to_optimize:
        _refuse_unused(arguments)
        preset, trainer = learn_to_optimize.PRESETS[arguments.preset], kind
    else:
        preset, trainer = PRESETS[arguments.preset], getattr(arguments, "trainer", "ensemble")
    fields = {f.name for f in dataclasses.fields(preset)}
    replaced = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in fields
    }
    grid = dataclasses.replace(preset, **replaced)
    learn_step_size = arguments.learn_step_size or arguments.learn_to_optimize
    training = Training(epochs=grid.epochs, learn_step_size=learn_step_size)
    setup = runner.Setup(training, arguments.seed, arguments.reference, str(device), arguments.backend, trainer)
    task = setup.task()
    trials = grid.trials()
    # fails here, not after hours, where the authors' data have no such seed or hidden size
    for seed in sorted({trial.seed for trial in trials}):
        task.train_index(seed)
    for hidden in getattr(grid, "hidden", ()):
        task.initial_weights(hidden, FIRST_SEED)

    settings = dataclasses.asdict(grid) | dataclasses.asdict(training)
    settings |= {
        "data": str(arguments.reference.resolve()) if arguments.reference else f"generated from seed {arguments.seed}",
        "device": device.type,
        "backend": arguments.backend,
        "trainer": trainer,
    }
    out = arguments.out or Path("runs") / f"{kind}-{arguments.preset}"
    columns = [field.name for field in dataclasses.fields(trials[0])] + ["train", "test"]
    directory = shard.in_order(lambda: RunDirectory(out, settings, environment(), shard.part, columns))
    first = shard.rank == 0
    if first:
        print(f"{len(trials)} models of {grid.epochs} epochs; results go to {directory.path}")
    runner.train_grid(setup, trials, directory, workers=arguments.workers, shard=shard, show_progress=first)
    if not first:
        return 0

    results = directory.results()
    best = select_best(results)
    if best.empty:
        raise ValueError(f"{directory.path}: every model diverged; take smaller --learning-rates")
    shared = {"settings": settings, "best": best, "models": len(results)}
    report_file = directory.path / "report.md"
    print(report.summary_table(best))
    if arguments.learn_to_optimize:
        drawn = figures.draw_learn_to_optimize(best, directory.path)
        report.write_learn_to_optimize(report_file, figures=drawn, **shared)
    else:
        drawn = figures.draw(best, directory.path)
        timings = None if arguments.no_speed else speed.measure(task, arguments.backend)
        name = device_name(device)
        report.write_report(report_file, figures=drawn, speed=timings, device=name, **shared)
        if timings:
            chosen = _backend.resolve(arguments.backend, device)
            print(f"\nspeed on {name}, backend {chosen}:\n\n{report.speed_table(timings)}")
            if chosen == "eager":
                print("(there is no compiled backend here; `python -m unrolled_kernels.info` says why)")
    print()
    for path in (*drawn, report_file, directory.results_file):
        print(path)
    return 0


def _refuse_unused(arguments):
    given = [name for name in ("hidden", "optimizers", "algorithms", "trainer") if name in arguments]
    given += ["learn_step_size"] if arguments.learn_step_size else []
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"--learn-to-optimize always trains GD and NAG with a learned step size and an RNN, with Adam, one at a "
            f"time, without a network below; leave out {options}"
        )
