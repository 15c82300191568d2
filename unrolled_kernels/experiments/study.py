"""What every study is: presets with options, trials as rows of a table, and a grid trained in worker processes."""

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from unrolled_kernels import use_backend
from unrolled_kernels.experiments.pool import default_workers, run_jobs


@dataclass(frozen=True)
class Job:
    """What one worker trains at a time.

    Attributes:
        trials: the models, a list.
        checkpoint: keeps the state of their unfinished training.
        model, logs: where the weights of a finished one and its logs go, each may be None.
    """

    trials: list
    checkpoint: Path
    model: Path | None = None
    logs: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How the models of a study are trained, whichever they are: everything a worker process needs to know.

    Attributes:
        training: what all models share.
        device, backend: as on the command line.
    """

    training: object
    device: str = "cpu"
    backend: str = "auto"

    def task(self):
        """The data, made once in each process."""
        raise NotImplementedError

    def train(self, task, job, on_epochs):
        """Train the models of a ``Job``: their rows of the results table. Calls ``on_epochs(count, **shown)``."""
        raise NotImplementedError


def diverged(loss, largest):
    """Whether a model came to nothing: its loss is NaN, or above the largest between any two targets.

    What explodes need not overflow: a loss of 1e10 is no more of a result than an infinite one.
    """
    return not loss <= largest


def train_grid(setup, jobs, directory, *, finished=0, workers=None, processes=1, what="models", show_progress=True):
    """Train every job, and keep its rows as soon as they are there.

    Args:
        setup: a ``Setup``.
        jobs: a list of ``Job``, in the order in which they start.
        directory: a ``RunDirectory``; None in a process that keeps nothing.
        finished: models that were trained before.
        workers: processes, each of one thread; default: the cores of this process on the CPU, 1 on a GPU. With 1
            everything runs in this process, with torch's threads as they are.
        processes: those on this machine that share its cores.
        what: is counted by the bar.
        show_progress: draw a bar of epochs over the models.
    """
    workers = min(workers or default_workers(setup.device, processes), len(jobs))
    epochs, total = setup.training.epochs, finished + sum(len(job.trials) for job in jobs)
    bar_options = {"unit": "epoch", "unit_scale": True, "mininterval": 1, "disable": not show_progress}
    work = functools.partial(_train, setup)
    with tqdm(total=total * epochs, initial=finished * epochs, **bar_options) as bar:
        bar.set_description(f"{what} {finished}/{total}")
        for job, rows in run_jobs(jobs, workers=workers, prepare=setup.task, work=work, bar=bar):
            if directory is not None:
                directory.append(rows)
                # not before its results are safe
                job.checkpoint.unlink(missing_ok=True)
            finished += len(job.trials)
            bar.set_description(f"{what} {finished}/{total}")


def _train(setup, task, job, on_epochs):
    with use_backend(setup.backend):
        return setup.train(task, job, on_epochs)


def trial_columns(trial):
    """A trial as the leading columns of its row."""
    return dataclasses.asdict(trial)


def fingerprint(trials):
    """A name for a list of trials, the same in every process."""
    text = json.dumps([list(trial_columns(trial).values()) for trial in trials])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished_trials(results, kind):
    """The trials, of the dataclass ``kind``, that the results table already holds."""
    names = [field.name for field in dataclasses.fields(kind)]
    if results.empty:
        return set()
    return {kind(*point) for point in results[names].itertuples(index=False, name=None)}


def replaced(preset, arguments):
    """The preset with those of its fields that the command line gave."""
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(preset) if hasattr(arguments, f.name)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return dataclasses.replace(preset, **given)
