"""How the models of the synthetic study are trained: together in chunks, or one by one, shared out among ranks."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from unrolled_kernels.experiments import ranks, study
from unrolled_kernels.experiments.options import not_negative
from unrolled_kernels.experiments.run_directory import RunDirectory
from unrolled_kernels.experiments.synthetic import data
from unrolled_kernels.experiments.synthetic.ensemble import train_chunk
from unrolled_kernels.experiments.synthetic.grid import make_chunks
from unrolled_kernels.experiments.synthetic.train import train_one

# on the CPU, enough models to hide the cost of a torch call, few enough that depths within a chunk are alike and that
# every worker gets some; on a GPU, as many as fill it
_MODELS_PER_CHUNK = {"cpu": 128, "cuda": 4096}


@dataclass(frozen=True, kw_only=True)
class Setup(study.Setup):
    """Everything a worker process needs to know.

    Attributes:
        training, device, backend: as in ``study.Setup``.
        data_seed, num_train, same_start: of the generated data, as in ``data.generate``.
        reference: folder of the authors' data, or None.
        trainer: ``"ensemble"`` or ``"single"``.
    """

    data_seed: int = 2
    num_train: int = data.NUM_TRAIN
    same_start: bool = False
    reference: Path | None = None
    trainer: str = "ensemble"

    def task(self):
        """The data, on the device."""
        if self.reference:
            task = data.load_reference(self.reference)
        else:
            task = data.generate(self.data_seed, num_train=self.num_train, same_start=self.same_start)
        return task.to(self.device)

    def chunks(self, trials, shares):
        """Lists of trials that are trained together, for so many shares."""
        if self.trainer == "single":
            return [[trial] for trial in trials]
        limit = _MODELS_PER_CHUNK[torch.device(self.device).type]
        return make_chunks(trials, min(limit, math.ceil(len(trials) / shares)))

    def train(self, task, job, on_epochs):
        """The rows of the models of a job."""
        if self.trainer == "single":
            return [train_one(task, job.trials[0], self.training, on_epochs)]
        return train_chunk(
            task,
            job.trials,
            self.training,
            checkpoint_file=job.checkpoint,
            on_epochs=lambda count: on_epochs(count * len(job.trials)),
        )


def add_data_options(parser):
    """Which data: ``--seed`` or ``--reference``."""
    parser.add_argument("--seed", type=not_negative, default=2, help="seed of the generated data, default 2")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="use the authors' samples and weights in DIR")


def data_name(arguments):
    """Those that were chosen, for ``config.json``."""
    return str(arguments.reference.resolve()) if arguments.reference else f"generated from seed {arguments.seed}"


def open_directory(out, settings, environment, kind):
    """The ``RunDirectory`` of this rank, for trials of the dataclass ``kind``.

    Rank 0 keeps the table itself and is first: it takes over what an earlier run left there.
    """
    columns = [field.name for field in dataclasses.fields(kind)] + ["train", "test"]
    opened = []

    def open_it(part=None):
        opened.append(RunDirectory(out, settings, environment, part, columns))

    ranks.on_first_rank(open_it)
    if ranks.rank():
        open_it(f"rank{ranks.rank()}")
    return opened[0]


def train_grid(setup, trials, directory, *, workers=None, show_progress=True):
    """Train every trial that ``directory`` does not hold yet; each rank trains its share of the chunks.

    Args:
        setup: data, device, trainer.
        trials: all models of the run, sorted.
        directory: this rank's ``RunDirectory``; results are appended to it as they come, checkpoints kept in it. In
            the end that of rank 0 holds the models of all.
        workers, show_progress: as in ``study.train_grid``.
    """
    done = _collect(directory, type(trials[0]))
    jobs = []
    for chunk in setup.chunks(trials, ranks.ranks()):
        chunk = [trial for trial in chunk if trial not in done]
        if chunk:
            jobs.append(study.Job(chunk, directory.checkpoint_file(study.fingerprint(chunk))))
    # the most expensive first, so that the workers end together
    jobs.sort(key=lambda job: -len(job.trials) * max(trial.num_steps for trial in job.trials))
    study.train_grid(
        setup,
        jobs[ranks.rank() :: ranks.ranks()],
        directory,
        finished=len(done),
        workers=workers,
        processes=ranks.local()[1],
        what="models" if ranks.ranks() == 1 else f"rank {ranks.rank()} of {ranks.ranks()}, models",
        show_progress=show_progress,
    )
    _collect(directory, type(trials[0]))
    directory.remove_checkpoints()


def _collect(directory, kind):
    """Bring the finished models of every rank into the table of rank 0; returns their trials, in every rank."""
    tables = ranks.gathered(directory.results())
    if tables:
        for table in tables[1:]:
            directory.append(table.to_dict("records"))
    done = ranks.on_first_rank(lambda: study.finished_trials(directory.results(), kind))
    if ranks.rank():
        directory.clear()
    return done
