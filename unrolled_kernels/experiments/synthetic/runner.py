"""Trains the models of a grid, in worker processes on the CPU, and keeps every result as soon as it is there."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from unrolled_kernels import use_backend
from unrolled_kernels.experiments.pool import default_workers, run_jobs
from unrolled_kernels.experiments.synthetic import data, learn_to_optimize, train
from unrolled_kernels.experiments.synthetic.chunks import make_chunks, train_chunk
from unrolled_kernels.experiments.synthetic.grid import Training, fingerprint
from unrolled_kernels.experiments.synthetic.sharding import Shard

# on the CPU, enough models to hide the cost of a torch call, few enough that depths within a chunk are alike and that
# every worker gets some; on a GPU, as many as fill it
_MODELS_PER_CHUNK = {"cpu": 128, "cuda": 4096}
_ONE_BY_ONE = {"single": train.train_one, "learn-to-optimize": learn_to_optimize.train_one}


@dataclass(frozen=True)
class Setup:
    """How models are trained, whichever they are: everything a worker process needs to know.

    Attributes:
        training: what all models share.
        data_seed: seed of the generated data.
        reference: folder of the authors' data, or None.
        device, backend: as on the command line.
        trainer: ``"ensemble"``, ``"single"`` or, for trials of ``learn_to_optimize``, its name with hyphens.
    """

    training: Training
    data_seed: int = 2
    reference: Path | None = None
    device: str = "cpu"
    backend: str = "auto"
    trainer: str = "ensemble"

    def task(self):
        """The data, on the device."""
        task = data.load_reference(self.reference) if self.reference else data.generate(self.data_seed)
        return task.to(self.device)


def train_grid(setup, trials, run_directory, *, workers=None, shard=None, show_progress=True):
    """Train every trial that ``run_directory`` does not hold yet.

    Args:
        setup: data, device, trainer.
        trials: all models of the run, sorted.
        run_directory: a ``RunDirectory``; results are appended to it as they come, checkpoints kept in it.
        workers: processes, each of one thread; default: the cores of this process on the CPU, 1 on a GPU. With 1
            everything runs in this process, with torch's threads as they are.
        shard: this process's share of the run, at the end of which rank 0's directory holds the models of all; default:
            everything.
        show_progress: draw a bar of epochs over the models of this process.
    """
    shard = shard or Shard()
    done = shard.collect(run_directory, type(trials[0]))
    jobs = []
    for chunk in _chunks(setup, trials, shard.size):
        chunk = [trial for trial in chunk if trial not in done]
        if chunk:
            jobs.append((chunk, run_directory.checkpoint_file(fingerprint(chunk))))
    # the most expensive first, so that the workers end together
    jobs.sort(key=lambda job: -len(job[0]) * max(trial.num_steps for trial in job[0]))
    jobs = jobs[shard.rank :: shard.size]
    workers = min(workers or default_workers(setup.device, shard.local_size), len(jobs))
    epochs, finished = setup.training.epochs, len(done)
    total = finished + sum(len(chunk) for chunk, _ in jobs)
    what = "models" if shard.size == 1 else f"rank {shard.rank} of {shard.size}, models"
    bar_options = {"unit": "epoch", "unit_scale": True, "mininterval": 1, "disable": not show_progress}
    work = functools.partial(_train, setup)
    with tqdm(total=total * epochs, initial=finished * epochs, **bar_options) as bar:
        bar.set_description(f"{what} {finished}/{total}")
        for (_, file), rows in run_jobs(jobs, workers=workers, prepare=setup.task, work=work, bar=bar):
            run_directory.append(rows)
            # not before its results are safe
            file.unlink(missing_ok=True)
            finished += len(rows)
            bar.set_description(f"{what} {finished}/{total}")
    shard.collect(run_directory, type(trials[0]))
    run_directory.remove_checkpoints()


def _chunks(setup, trials, shards):
    if setup.trainer in _ONE_BY_ONE:
        return [[trial] for trial in trials]
    limit = _MODELS_PER_CHUNK[torch.device(setup.device).type]
    return make_chunks(trials, min(limit, math.ceil(len(trials) / shards)))


def _train(setup, task, job, on_epochs):
    trials, file = job
    with use_backend(setup.backend):
        if setup.trainer in _ONE_BY_ONE:
            return [_ONE_BY_ONE[setup.trainer](task, trials[0], setup.training, on_epochs)]
        return train_chunk(
            task,
            trials,
            setup.training,
            checkpoint_file=file,
            on_epochs=lambda count: on_epochs(count * len(trials)),
        )
