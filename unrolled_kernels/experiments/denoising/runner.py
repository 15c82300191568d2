"""How the models of the denoising study are trained: side by side in workers, or each by all ranks together."""

from dataclasses import dataclass

import torch

from unrolled_kernels.experiments import ranks, study
from unrolled_kernels.experiments.denoising.data import DenoisingTask
from unrolled_kernels.experiments.denoising.grid import Trial
from unrolled_kernels.experiments.denoising.model import CASES, PLAIN
from unrolled_kernels.experiments.denoising.train import Files, train_one


@dataclass(frozen=True, kw_only=True)
class Setup(study.Setup):
    """Everything a worker process needs to know.

    Attributes:
        training, device, backend: as in ``study.Setup``.
        clean: the images, ``[N, 1, H, W]`` float32.
        checkpoint_seconds: how often the state of an unfinished model is written.
        graphs: as in ``train_one``.
    """

    clean: torch.Tensor
    checkpoint_seconds: float = 30
    graphs: bool = False

    def task(self):
        """The data."""
        return DenoisingTask(self.clean)

    def train(self, task, job, on_epochs):
        """The row of the model of a job in a list, which is empty in every rank but the first."""
        row = train_one(
            task,
            job.trials[0],
            self.training,
            device=self.device,
            backend=self.backend,
            files=Files(job.checkpoint, job.model, job.logs),
            checkpoint_seconds=self.checkpoint_seconds,
            on_epoch=on_epochs,
            graphs=self.graphs,
        )
        return [] if row is None else [row]


def train_grid(setup, trials, directory, *, workers=None, logs=None, show_progress=True):
    """Train every trial that ``directory`` does not hold yet.

    One process trains the models side by side in workers; those that ``torchrun`` started train one model after
    the other, each on its share of every batch.

    Args:
        setup: data, device.
        trials: all models of the run.
        directory: a ``RunDirectory``, which gets results and weights as they come; None but in the first rank.
        workers, show_progress: as in ``study.train_grid``.
        logs: folder of TensorBoard logs, or None.
    """
    jobs = ranks.on_first_rank(lambda: _jobs(trials, directory, logs))
    # the most expensive first, so that the workers end together
    jobs.sort(key=lambda job: _cost(job.trials[0]), reverse=True)
    study.train_grid(
        setup,
        jobs,
        directory,
        finished=len(trials) - len(jobs),
        workers=1 if ranks.ranks() > 1 else workers,
        show_progress=show_progress,
    )
    if directory is not None:
        directory.remove_checkpoints()


def model_file(run_directory, trial):
    """Where the weights of a finished model are."""
    return run_directory.path / "models" / f"{trial.name}.safetensors"


def _jobs(trials, directory, logs):
    done = study.finished_trials(directory.results(), Trial)
    jobs = []
    for trial in (trial for trial in trials if trial not in done):
        weights = model_file(directory, trial)
        weights.parent.mkdir(exist_ok=True)
        jobs.append(study.Job([trial], directory.checkpoint_file(trial.name), weights, logs and logs / trial.name))
    return jobs


def _cost(trial):
    if trial.case == PLAIN:
        return 0, 0
    case = CASES[trial.case]
    return case.f_channels**2 + case.g_channels**2, trial.num_steps
