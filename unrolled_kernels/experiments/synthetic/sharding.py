"""Sharding of a run over processes, GPUs or machines: ``torchrun`` starts them, each trains a slice of the chunks."""

import contextlib
import datetime
import os
from dataclasses import dataclass

import torch.distributed as dist

from unrolled_kernels.experiments.synthetic.grid import finished_trials

# a rank that is done waits for the slowest
_PATIENCE = datetime.timedelta(days=365)


@dataclass(frozen=True)
class Shard:
    """Which process this is, of how many.

    Attributes:
        rank, size: among all processes of the run.
        local_rank, local_size: among those of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def part(self):
        """The name of this rank's part of the results table; None for rank 0, which keeps the table itself."""
        return f"rank{self.rank}" if self.rank else None

    def in_order(self, open_directory):
        """``open_directory()``, in rank 0 first: it takes over what an earlier run left there."""
        if self.size == 1:
            return open_directory()
        directory = open_directory() if self.rank == 0 else None
        dist.barrier()
        return directory or open_directory()

    def collect(self, directory, kind):
        """Bring the finished models of every rank into the table of rank 0.

        Args:
            directory: this rank's ``RunDirectory``.
            kind: the class of the trials.
        Returns:
            The set of all finished trials, in every rank.
        """
        if self.size == 1:
            return finished_trials(directory.results(), kind)
        tables = [None] * self.size if self.rank == 0 else None
        dist.gather_object(directory.results(), tables)
        finished = [None]
        if self.rank == 0:
            directory.append(row for table in tables[1:] for row in table.to_dict("records"))
            finished = [finished_trials(directory.results(), kind)]
        dist.broadcast_object_list(finished)
        if self.rank:
            directory.clear()
        return finished[0]


@contextlib.contextmanager
def joined():
    """The shard of this process among those that ``torchrun`` started; without torchrun, the only one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Shard()
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    # rows of a table travel, no tensors of the GPU
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Shard(*(int(os.environ[name]) for name in names))
    finally:
        dist.destroy_process_group()
