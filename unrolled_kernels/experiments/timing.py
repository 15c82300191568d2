"""The one timer: functions in turns, so that a noisy moment falls on all of them alike."""

import dataclasses
import gc
import time

import torch


@dataclasses.dataclass(frozen=True)
class Timing:
    """Quantiles of the time of one call, in seconds."""

    p20: float
    p50: float
    p80: float


def in_turns(functions, device="cpu", *, rounds=30, min_seconds=0.02, max_seconds=20.0, between=None):
    """Time ``{name: call}``, one after the other, round after round.

    A turn begins with a call that is not timed: the first one after another function's finds the caches cold, and
    that function's threads still spinning, so it would tell who comes after whom.

    Args:
        functions: each is called without arguments, several times a round if it is short.
        device: where they run: "cpu" or "cuda", or a ``torch.device``.
        rounds: turns for each function, fewer for one that would take more than ``max_seconds`` in all.
        min_seconds: length of a turn.
        between: called once a round, after the turns; it measures the machine.
    Returns:
        ``{name: Timing}``.
    """
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    repeats, allowed, samples = {}, {}, {name: [] for name in functions}

    def run(call, n):
        synchronize()
        start = time.perf_counter()
        for _ in range(n):
            call()
        synchronize()
        return (time.perf_counter() - start) / n

    for name, call in functions.items():
        run(call, 2)
        once = run(call, 1)
        repeats[name] = max(1, int(min_seconds / max(once, 1e-7)))
        allowed[name] = max(3, min(rounds, int(max_seconds / max(once * (repeats[name] + 1), 1e-9))))
    # the garbage collector would search all that compilers and earlier cases left on the heap
    gc.collect()
    gc.freeze()
    for i in range(rounds):
        for name, call in functions.items():
            if i < allowed[name]:
                run(call, 1)
                samples[name].append(run(call, repeats[name]))
        if between is not None:
            between()
    gc.unfreeze()
    return {name: _timing(values) for name, values in samples.items()}


def _timing(samples):
    quantiles = torch.quantile(torch.tensor(samples, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double())
    return Timing(*quantiles.tolist())
