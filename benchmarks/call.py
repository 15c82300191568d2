"""What a call costs at the paper's size, on one thread: in turns with a Function that computes nothing, JAX and solve.

python -m benchmarks.call [--rounds N] [--record]
"""

import argparse

import torch

from benchmarks import harness, peers, suite
from benchmarks.momentum import Momentum
from benchmarks.roofs import Roof
from unrolled_kernels.experiments.timing import in_turns

MODE = "forward+backward"
TRIVIAL = "trivial Function"


class Trivial(torch.autograd.Function):
    """Three inputs, saved, and their three gradients: what torch asks of any Function in Python."""

    @staticmethod
    def forward(ctx, Q, b, step_size):
        ctx.save_for_backward(Q, b, step_size)
        return torch.empty_like(b)

    @staticmethod
    def backward(ctx, grad_y):
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def measure(case, rounds):
    """``({name: Timing}, Roof)`` of the fused op and the peers, each checked first, and of the Function above."""
    leaves, cotangent = case.inputs("cpu")
    names = ["cpu", *(name for name in ("jax", "solve") if not peers.missing(name, "cpu"))]
    made = {name: peers.make(name, case, leaves) for name in names}
    suite.check(case, "cpu", names, made)
    made[TRIVIAL] = peers.Peer(Trivial.apply)
    calls = {name: peer.call(MODE, leaves, cotangent) for name, peer in made.items()}
    roof = Roof("cpu", 1, sum(x.nbytes for x in leaves))
    return in_turns(calls, "cpu", rounds=rounds, between=roof.sample), roof


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/<device>/, to be committed")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    where, rows = harness.environment("cpu"), []
    for case in (Momentum("dense", 50, 5, 30, method) for method in ("gd", "nag")):
        timings, roof = measure(case, options.rounds)
        rows += [harness.row(case, name, MODE, t, roof, where) for name, t in timings.items()]
        trivial = timings[TRIVIAL].p50
        print(case.id, *(f"{n} {t.p50 * 1e6:.1f} µs {t.p50 / trivial:.2f}" for n, t in timings.items()), sep="  ")
    torch.set_num_threads(threads)
    if options.record:
        print(f"wrote {harness.write_csv(harness.results_directory('cpu') / 'call.csv', rows)}")


if __name__ == "__main__":
    main()
