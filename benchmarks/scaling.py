"""How the cost of the momentum ops grows with k, d, B and threads, forward + backward.

python -m benchmarks.scaling [--device cpu|cuda] [--only k|d|B|threads] [--record]
"""

import argparse
import math

import torch

from benchmarks import harness, peers, suite
from benchmarks.momentum import Momentum
from benchmarks.roofs import Roof
from unrolled_kernels.experiments.timing import in_turns

SWEEPS = {
    "k": [Momentum(s, 1000, 16, k) for s in ("dense", "spectral", "diagonal") for k in (1, 2, 5, 10, 20, 50, 100)],
    "d": [Momentum(s, 256, d, 20) for s in ("dense", "spectral") for d in (2, 4, 8, 16, 32, 64, 128, 256)],
    "B": [Momentum(s, 10**n, 5, 30) for s in ("dense", "spectral", "diagonal") for n in range(7)],
    "threads": [Momentum("dense", *shape) for shape in ((10000, 5, 30), (1024, 32, 20), (64, 128, 20))],
}
# of the time, where the floor's arithmetic bounds it
EXPECTED = {
    ("k", "dense"): 1, ("k", "spectral"): 0, ("k", "diagonal"): 1,
    ("d", "dense"): 2, ("d", "spectral"): 2,
    ("B", "dense"): 1, ("B", "spectral"): 1, ("B", "diagonal"): 1,
    ("threads", "dense"): -1,
}  # fmt: skip
# beyond this a check against float64 takes longer than the timing, and the eager loop seconds a call
_CHECKED_AT_MOST, _EAGER_AT_MOST = 5e8, 2e9  # flops


def exponent(sizes, seconds, whole=False):
    """Slope of log(seconds) over log(size) by least squares over the half of the sweep that costs most, or all of it.

    The smaller sizes measure what a call costs at all.
    """
    half = 0 if whole else len(sizes) // 2
    x = torch.tensor([math.log(s) for s in sizes[half:]], dtype=torch.float64)
    y = torch.tensor([math.log(s) for s in seconds[half:]], dtype=torch.float64)
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


def measure(case, device, rounds):
    """``({backend: Timing}, Roof)`` of the fused backends, checked, and of eager, both where that is reasonable."""
    names = [name for name in suite.FUSED if harness.usable(name, device)]
    flops = case.floor("forward+backward")[1]
    if flops <= _CHECKED_AT_MOST:
        suite.check(case, device, names)
    if flops <= _EAGER_AT_MOST:
        names.append("eager")
    sets = suite.input_sets(case, device)
    calls = {}
    for name in names:
        peer = peers.Peer(case.function(name))
        calls[name] = suite.rotating([peer.call("forward+backward", *inputs) for inputs in sets])
    roof = Roof(device, torch.get_num_threads(), sum(x.nbytes for x in sets[0][0]), len(sets))
    return in_turns(calls, device, rounds=rounds, max_seconds=2.0, between=roof.sample), roof


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=suite.DEVICE, choices=("cpu", "cuda"))
    parser.add_argument("--only", choices=tuple(SWEEPS), help="one of the sweeps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/<device>/, to be committed")
    options = parser.parse_args(arguments)
    device = options.device
    rows, threads = [], torch.get_num_threads()
    for axis, cases in SWEEPS.items():
        if (options.only or axis) != axis or (axis == "threads" and device == "cuda"):
            continue
        for case in cases:
            for count in range(1, threads + 1) if axis == "threads" else [threads]:
                torch.set_num_threads(count)
                timings, roof = measure(case, device, options.rounds)
                where = harness.environment(device)
                rows += [
                    {"sweep": axis, **harness.row(case, name, "forward+backward", timing, roof, where)}
                    for name, timing in timings.items()
                ]
                shown = "  ".join(f"{name} {timing.p50 * 1e6:.0f} µs" for name, timing in timings.items())
                print(f"{axis:8s} {case.id:36s} {count} threads  {shown}", flush=True)
        torch.set_num_threads(threads)
    if options.record:
        file = harness.results_directory(device) / "scaling.csv"
        print(f"wrote {harness.write_csv(file, rows, ('sweep', *harness.COLUMNS))}")


if __name__ == "__main__":
    main()
