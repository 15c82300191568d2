"""The processes that ``torchrun`` started: which this is, and what one of them does for all."""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

# a rank that is done waits for the slowest, and for the first, which evaluates and reports
_PATIENCE = datetime.timedelta(days=365)


@contextlib.contextmanager
def joined():
    """Join the processes that ``torchrun`` started; without it, do nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo"
    store, number, size = next(rendezvous("env://"))
    # the store outlives a restart, and with it the addresses of the processes that are gone
    store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank():
    """This process's number, 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local():
    """This process's number among those on this machine, and how many these are."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def on_first_rank(function):
    """Run ``function`` in rank 0 alone; every rank returns what it returned, or raises what it raised."""
    result, error = None, None
    if rank() == 0:
        try:
            result = function()
        except (OSError, ValueError) as raised:
            error = raised
    if ranks() > 1:
        both = [(result, error)]
        dist.broadcast_object_list(both, device=torch.device("cpu"))
        result, error = both[0]
    if error is not None:
        raise error
    return result


def gathered(thing):
    """What every rank has, a list, in rank 0; None in the others."""
    if ranks() == 1:
        return [thing]
    things = [None] * ranks() if rank() == 0 else None
    dist.gather_object(thing, things)
    return things
