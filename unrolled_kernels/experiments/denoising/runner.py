"""Trains the models of a grid, and keeps every result as soon as it is there."""

import functools
from dataclasses import dataclass

import torch
from tqdm import tqdm

from unrolled_kernels import use_backend
from unrolled_kernels.experiments.denoising import distributed
from unrolled_kernels.experiments.denoising.data import DenoisingTask
from unrolled_kernels.experiments.denoising.grid import Training, finished_trials
from unrolled_kernels.experiments.denoising.model import CASES, PLAIN
from unrolled_kernels.experiments.denoising.train import Files, train_one
from unrolled_kernels.experiments.pool import default_workers, run_jobs


@dataclass(frozen=True)
class Setup:
    """How models are trained, whichever they are: everything a worker process needs to know.

    Attributes:
        training: what all models share.
        clean: the images, ``[N, 1, H, W]`` float32.
        device, backend: as on the command line.
        checkpoint_seconds: how often the state of an unfinished model is written.
    """

    training: Training
    clean: torch.Tensor
    device: str = "cpu"
    backend: str = "auto"
    checkpoint_seconds: float = 30

    def task(self):
        """The data."""
        return DenoisingTask(self.clean)


def train_grid(setup, trials, run_directory, *, workers=None, logs=None, show_progress=True):
    """Train every trial that ``run_directory`` does not hold yet.

    One process trains the models side by side in workers; those that ``torchrun`` started train one model after
    the other, each on its share of every batch.

    Args:
        setup: data, device.
        trials: all models of the run.
        run_directory: a ``RunDirectory``, which gets results and weights as they come; None but in the first rank.
        workers: processes, each of one thread; default: the cores of this process on the CPU, 1 on a GPU.
        logs: folder of TensorBoard logs, or None.
        show_progress: draw a bar of epochs over all models, with the last loss and PSNR.
    """
    together = distributed.ranks() > 1
    todo = distributed.on_first_rank(lambda: _unfinished(trials, run_directory))
    # the most expensive first, so that the workers end together
    todo.sort(key=_cost, reverse=True)
    files = distributed.on_first_rank(lambda: [_files(run_directory, trial, logs) for trial in todo])
    workers = 1 if together else min(workers or default_workers(setup.device), len(todo))
    epochs, finished = setup.training.epochs, len(trials) - len(todo)
    train = functools.partial(_train, setup)
    jobs = list(zip(todo, files, strict=True))
    with tqdm(
        total=len(trials) * epochs, initial=finished * epochs, unit="epoch", mininterval=1, disable=not show_progress
    ) as bar:
        bar.set_description(f"models {finished}/{len(trials)}")
        for (_, kept), row in run_jobs(jobs, workers=workers, prepare=setup.task, work=train, bar=bar):
            if run_directory is not None:
                run_directory.append([row])
                # not before its results are safe
                kept.checkpoint.unlink(missing_ok=True)
            finished += 1
            bar.set_description(f"models {finished}/{len(trials)}")
    if run_directory is not None:
        run_directory.remove_checkpoints()


def model_file(run_directory, trial):
    """Where the weights of a finished model are."""
    return run_directory.path / "models" / f"{trial.name}.safetensors"


def _unfinished(trials, run_directory):
    done = finished_trials(run_directory.results())
    return [trial for trial in trials if trial not in done]


def _files(run_directory, trial, logs):
    weights = model_file(run_directory, trial)
    weights.parent.mkdir(exist_ok=True)
    return Files(run_directory.checkpoint_file(trial.name), weights, logs and logs / trial.name)


def _cost(trial):
    if trial.case == PLAIN:
        return 0, 0
    case = CASES[trial.case]
    return case.f_channels**2 + case.g_channels**2, trial.num_steps


def _train(setup, task, job, on_epoch):
    trial, files = job
    with use_backend(setup.backend):
        return train_one(
            task,
            trial,
            setup.training,
            device=setup.device,
            backend=setup.backend,
            files=files,
            checkpoint_seconds=setup.checkpoint_seconds,
            on_epoch=on_epoch,
        )
