"""How the cost of the momentum ops grows with k, d, B and threads, forward + backward.

    python -m benchmarks.scaling [--device cpu|cuda] [--only k|d|B|threads] [--record]

Expected exponents of the time, where arithmetic bounds it: 1 in k, 2 in d (dense), 1 in B; -1 in threads. On a GPU,
below the k where arithmetic takes over, 0 in k.
"""

import argparse
import math

import torch

from benchmarks import harness, peers, suite
from benchmarks.momentum import Case
from unrolled_kernels.experiments.timing import in_turns

SWEEPS = {
    "k": [Case(s, "gd", 1000, 16, k) for s in ("dense", "spectral", "diagonal") for k in (1, 2, 5, 10, 20, 50, 100)],
    "d": [Case(s, "gd", 256, d, 20) for s in ("dense", "spectral") for d in (2, 4, 8, 16, 32, 64, 128, 256)],
    "B": [Case(s, "gd", 10**n, 5, 30) for s in ("dense", "spectral", "diagonal") for n in range(7)],
    "threads": [Case("dense", "gd", *shape) for shape in ((10000, 5, 30), (1024, 32, 20), (64, 128, 20))],
}
EXPECTED = {
    ("k", "dense"): 1, ("k", "spectral"): 0, ("k", "diagonal"): 1,
    ("d", "dense"): 2, ("d", "spectral"): 2,
    ("B", "dense"): 1, ("B", "spectral"): 1, ("B", "diagonal"): 1,
    ("threads", "dense"): -1,
}  # fmt: skip
# beyond this the eager loop takes seconds a call, or more memory than there is
_EAGER_AT_MOST = 2e10  # flops


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
    """``{backend: Timing}`` of the fused backends and of eager where that is reasonable."""
    names = [name for name in suite.FUSED if harness.usable(name, device)]
    if case.floor("forward+backward")[1] <= _EAGER_AT_MOST:
        names.append("eager")
    sets = suite.input_sets(case, device)
    calls = {}
    for name in names:
        prepare = peers.step(case.function(name), "forward+backward")
        calls[name] = suite.rotating([prepare(*inputs) for inputs in sets])
    return in_turns(calls, device, rounds=rounds, max_seconds=4.0)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=suite.DEVICE, choices=("cpu", "cuda"))
    parser.add_argument("--only", choices=tuple(SWEEPS), help="one of the sweeps")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/<device>/, to be committed")
    options = parser.parse_args(arguments)
    device = options.device
    roof, rows, threads = harness.measure_roof(device), [], torch.get_num_threads()
    for axis, cases in SWEEPS.items():
        if (options.only or axis) != axis or (axis == "threads" and device == "cuda"):
            continue
        # correct first: each structure once, at a size where float64 is cheap
        for case in {case.structure: case for case in cases if case.B <= 1000}.values():
            suite.check(case, device, [name for name in suite.FUSED if harness.usable(name, device)])
        for case in cases:
            for count in range(1, threads + 1) if axis == "threads" else [threads]:
                torch.set_num_threads(count)
                timings = measure(case, device, options.rounds)
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
