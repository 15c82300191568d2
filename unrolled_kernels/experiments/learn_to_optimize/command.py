"""``unrolled-kernels learn-to-optimize``: Figure 6 from data to figure."""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from unrolled_kernels import _backend
from unrolled_kernels.experiments import figures, native, ranks, report, study
from unrolled_kernels.experiments.learn_to_optimize import claims
from unrolled_kernels.experiments.learn_to_optimize.grid import ALGORITHMS, PRESETS, Trial
from unrolled_kernels.experiments.learn_to_optimize.layers import train_natively, train_one
from unrolled_kernels.experiments.options import (
    add_run_options,
    environment,
    positive,
    positive_float,
    resolve_device,
)
from unrolled_kernels.experiments.synthetic import runner
from unrolled_kernels.experiments.synthetic.claims import table
from unrolled_kernels.experiments.synthetic.figures import GAP, TRAINING_ERROR
from unrolled_kernels.experiments.synthetic.grid import Training, select_best
from unrolled_kernels.experiments.synthetic.report import summary_table


@dataclass(frozen=True, kw_only=True)
class Setup(runner.Setup):
    """As of the synthetic study."""

    @property
    def runs_natively(self):
        """Whether a C++ op runs the epochs."""
        return native.runs_on(torch.device(self.device), self.backend)

    def chunks(self, trials, shares):
        """Lists of one; step sizes train so fast that those of a seed share its minibatches' orders."""
        chunks = {}
        for trial in trials:
            together = self.runs_natively and trial.algorithm != "rnn"
            chunks.setdefault(trial.seed if together else trial, []).append(trial)
        return list(chunks.values())

    def train(self, task, job, on_epochs):
        """The rows of the layers of a job."""
        if self.runs_natively:
            return train_natively(task, job.trials, self.training, on_epochs)
        return [train_one(task, job.trials[0], self.training, on_epochs)]


def add_arguments(parser):
    """Describe the subcommand."""
    parser.description = (
        "Q and b of the synthetic task are given, and only the algorithm is learned (paper, Sec. 7.1): the step "
        "size of GD and NAG, or the cell of an RNN. Draws Figure 6. A run that was stopped continues when the "
        "same command is given again; torchrun shares the layers out as for `synthetic`."
    )
    grid = parser.add_argument_group("the grid (each option replaces that of the preset)")
    grid.add_argument(
        "--preset", choices=PRESETS, default="quick", help="quick (default), medium: a minute; paper: hours"
    )
    replacing = {"default": argparse.SUPPRESS}
    grid.add_argument("--depths", type=positive, nargs="+", metavar="K", help="steps of the layers", **replacing)
    grid.add_argument("--algorithms", choices=ALGORITHMS, nargs="+", **replacing)
    grid.add_argument("--learning-rates", type=positive_float, nargs="+", metavar="LR", **replacing)
    grid.add_argument("--seeds", type=positive, metavar="N", help="seeds 100 … 99+N", **replacing)
    grid.add_argument("--epochs", type=positive, **replacing)
    runner.add_data_options(parser)
    add_run_options(parser, "runs/learn-to-optimize-PRESET")
    parser.set_defaults(run=run)


def run(arguments):
    """Train, draw and report; see ``unrolled-kernels learn-to-optimize --help``."""
    with ranks.joined():
        return _run(arguments)


def _run(arguments):
    device = resolve_device(arguments.device, *ranks.local())
    _backend.resolve(arguments.backend, device)
    grid = study.replaced(PRESETS[arguments.preset], arguments)
    training = Training(epochs=grid.epochs, learn_step_size=True)
    setup = Setup(
        training=training,
        device=str(device),
        backend=arguments.backend,
        data_seed=arguments.seed,
        reference=arguments.reference,
    )
    trials, task = grid.trials(), setup.task()
    # fails here, not after hours, where the authors' data have no such seed
    for seed in sorted({trial.seed for trial in trials}):
        task.train_index(seed)
    settings = {"study": "learn-to-optimize"} | dataclasses.asdict(grid) | dataclasses.asdict(training)
    settings |= {"data": runner.data_name(arguments), "device": device.type, "backend": arguments.backend}
    out = arguments.out or Path("runs") / f"learn-to-optimize-{arguments.preset}"
    directory = runner.open_directory(out, settings, environment(), Trial)
    first = ranks.rank() == 0
    if first:
        print(f"{len(trials)} layers of {grid.epochs} epochs; results go to {directory.path}", flush=True)
    runner.train_grid(setup, trials, directory, workers=arguments.workers, show_progress=first)
    if not first:
        return 0
    results = directory.results()
    best = select_best(results)
    if best.empty:
        raise ValueError(f"{directory.path}: every layer diverged; take smaller --learning-rates")
    drawn = figures.save({"figure6": figure6(best)}, directory.path)
    report_file = directory.path / "report.md"
    report.write(
        report_file,
        title="Learning to optimize (paper, Sec. 7.1, Figure 6)",
        introduction=(
            f"{len(results)} trained layers, of which {len(best)} are shown: the best over the learning rate by "
            "training loss for each algorithm, k and seed. The energies' true Q* and b are given; GD and NAG learn "
            "their step size, the RNN its cell, from a start near GD with φ = 1. Numbers are mean ± standard deviation "
            f"over the seeds.{report.diverged(results)}"
        ),
        settings=settings,
        figures=drawn,
        sections={
            "The paper's claims in this run": table(claims.check(best)),
            "Results": summary_table(best),
        },
    )
    print(summary_table(best), end="\n\n")
    for path in (*drawn, report_file, directory.results_file):
        print(path)
    return 0


def figure6(best):
    """Figure 6: training error and generalization gap of GD, NAG and the RNN over k, a panel each.

    Args:
        best: one row for each (algorithm, num_steps, seed), from ``select_best``.
    Returns:
        A matplotlib ``Figure``.
    """
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    # a gap can be below zero, and an RNN's can be a hundred times GD's
    for panel, (column, label, scale) in zip(
        figure.subplots(1, 2), (("train", TRAINING_ERROR, "log"), ("gap", GAP, "symlog")), strict=True
    ):
        panel.set_yscale(scale)
        figures.curves(panel, best, column, median=True)
        panel.set_ylabel(label)
    figures.name_seeds(figure, best, "median and quartiles")
    return figure
