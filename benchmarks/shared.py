"""One Q for the whole batch: the fused op and the eager loop of matrix products, forward + backward, for every d and B.

python -m benchmarks.shared [--structure dense,spectral] [--method gd,nag] [--only d,d,…] [--record]
"""

import argparse
import csv
import dataclasses

import torch

from benchmarks import harness, peers, suite
from benchmarks.momentum import Momentum
from benchmarks.roofs import Roof
from unrolled_kernels.experiments.timing import in_turns
from unrolled_kernels.testing import random_quadratic

MODE = "forward+backward"
SIZES = (8, 16, 17, 24, 32, 64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 10, 100, 1000, 10000)


@dataclasses.dataclass(frozen=True)
class SharedMomentum(Momentum):
    """A case of ``Momentum`` with one matrix for the batch."""

    def inputs(self, device, seed=0):
        leaves, _, b = random_quadratic(
            self.structure, (self.B,), self.d, shared=True, dtype=self.dtype, device=device, seed=seed
        )
        cotangent = torch.randn(b.shape, generator=torch.Generator().manual_seed(seed)).to(b)
        return [x.detach().requires_grad_() for x in (*leaves, b, torch.tensor(0.9, device=device))], cotangent

    def floors(self):
        once, s = self.d * self.d * self.dtype.itemsize, self.dtype.itemsize
        (_, forward), (_, backward) = super().floors()
        if self.d > 128 and self.structure == "dense":
            # iterates are kept: nothing is run again
            backward -= forward
        return (once + 2 * self.B * self.d * s, forward), (2 * once + 3 * self.B * self.d * s, backward)


def steps(B, d):
    """20 steps, fewer where a call would take half a second and more."""
    return max(2, min(20, int(3e10 / (8 * B * d * d))))


def sweep(structure, method, sizes, device, rounds):
    """Rows of every d and B; each case is checked first."""
    names = [*(name for name in suite.FUSED if harness.usable(name, device)), "eager"]
    where, rows = harness.environment(device), []
    for d in sizes:
        for B in BATCHES:
            case = SharedMomentum(structure, B, d, steps(B, d), method)
            suite.check(case, device, [name for name in names if name != "eager"])
            leaves, cotangent = case.inputs(device)
            calls = {name: peers.Peer(case.function(name)).call(MODE, leaves, cotangent) for name in names}
            peaks = {name: harness.peak_memory(call, device) for name, call in calls.items()}
            roof = Roof(device, torch.get_num_threads(), sum(x.nbytes for x in leaves))
            timings = in_turns(calls, device, rounds=rounds, max_seconds=2.0, between=roof.sample)
            rows += [harness.row(case, n, MODE, t, roof, where, peak=peaks[n]) for n, t in timings.items()]
            ratios = (f"{n} {timings['eager'].p50 / t.p50:.2f}x" for n, t in timings.items() if n != "eager")
            shown = (f"{n} {t.p50 * 1e6:.0f} µs, {peaks[n] / 1e6:.1f} MB" for n, t in timings.items())
            print(f"{case.id:36s} {'  '.join(shown)}  {'  '.join(ratios)}", flush=True)
    return rows


def record(structure, method, sizes, device, rows):
    """Write the rows to ``benchmarks/results``; what is there of other sizes stays."""
    file = harness.results_directory(device) / f"shared_{structure}_{method}.csv"
    if file.exists():
        with file.open(newline="") as old:
            rows = rows + [row for row in csv.DictReader(old) if int(row["d"]) not in sizes]
    rows.sort(key=lambda row: (int(row["d"]), int(row["B"])))
    print(f"wrote {harness.write_csv(file, rows)}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=suite.DEVICE, choices=("cpu", "cuda"))
    parser.add_argument("--structure", default="dense", help="dense, spectral or both, with a comma between")
    parser.add_argument("--method", default="gd", help="gd, nag or both, with a comma between")
    parser.add_argument("--only", default="", help="sizes d, with commas between")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--record",
        action="store_true",
        help="write to benchmarks/results/<device>/, to be committed; what is there of other sizes stays",
    )
    options = parser.parse_args(arguments)
    sizes = [int(d) for d in options.only.split(",") if d] or SIZES
    for structure in options.structure.split(","):
        for method in options.method.split(","):
            rows = sweep(structure, method, sizes, options.device, options.rounds)
            if options.record:
                record(structure, method, sizes, options.device, rows)


if __name__ == "__main__":
    main()
