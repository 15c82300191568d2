"""Speed of the momentum ops through the public interface, forward + backward, against every peer.

    python -m benchmarks.momentum [--device cpu|cuda] [--only TEXT] [--peers eager,compile,jax] [--out FILE]

Bytes and flops of a row are the floors of a forward and a backward (per sample, s = bytes per element):
dense (d² + 2d)s + (2d² + 3d)s and 8kd²; diagonal (3 + 5)s and about 14k per element; spectral
(2d² + 8d)s and 8d² + 14kd.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

import unrolled_kernels as uk
from benchmarks import harness, peers
from unrolled_kernels import _backend
from unrolled_kernels.testing import assert_as_close_as_eager, random_quadratic


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of one structure under one method."""

    structure: str
    method: str
    B: int
    d: int
    k: int
    dtype: torch.dtype = torch.float32

    @property
    def id(self):
        return f"{self.structure}-{self.method}-B{self.B}-d{self.d}-k{self.k}-{str(self.dtype)[6:]}"

    def inputs(self, device, seed=0):
        """``(leaves of Q, make_Q, b, step size, cotangent)``, all that has a gradient requiring it."""
        leaves, make_Q, b = random_quadratic(
            self.structure, (self.B,), self.d, dtype=self.dtype, device=device, seed=seed
        )
        step_size = torch.tensor(0.9, device=device, requires_grad=True)
        cotangent = torch.randn(b.shape, generator=torch.Generator().manual_seed(seed)).to(b)
        return [x.requires_grad_() for x in leaves], make_Q, b.requires_grad_(), step_size, cotangent

    def floor(self):
        """Bytes and flops of a forward and a backward."""
        s, B, d, k = self.dtype.itemsize, self.B, self.d, self.k
        if self.structure == "dense":
            return B * (3 * d * d + 5 * d) * s, 8 * k * d * d * B
        if self.structure == "diagonal":
            return 8 * d * B * s, 14 * k * d * B
        return B * (2 * d * d + 8 * d) * s, B * (8 * d * d + 14 * k * d)


CASES = [
    *(
        Case("dense", m, B, d, k)
        for m in ("gd", "nag")
        for B, d, k in [
            (50, 5, 30),
            (1000, 5, 30),
            (10000, 5, 30),
            (1024, 16, 20),
            (1024, 32, 20),
            (256, 64, 20),
            (64, 128, 20),
        ]
    ),
    *(Case("diagonal", m, 1, 518_400, 12) for m in ("gd", "nag")),
    *(Case("spectral", m, B, d, k) for m in ("gd", "nag") for B, d, k in [(10000, 5, 30), (1024, 32, 20)]),
]
# torch.compile needs minutes for an unrolled elementwise loop of this length (its cost doubles with each step)
COMPILE_TAKES_MINUTES = {("diagonal", "gd"), ("diagonal", "nag")}


def rotating(step, sets):
    """A call that takes the next of several input sets each time, so that no set stays in the caches by itself."""
    state = {"i": 0}

    def next_step():
        state["i"] = (state["i"] + 1) % len(sets)
        return step(sets[state["i"]])

    return next_step


def input_sets(case, device, cache_bytes=64 * 2**20, most=8):
    """Enough input sets to exceed the last-level cache, at most ``most``."""
    one = sum(x.nbytes for x in (*case.inputs(device)[0], case.inputs(device)[2]))
    return [case.inputs(device, seed) for seed in range(max(1, min(most, cache_bytes // max(one, 1) + 1)))]


def check(case, device, backends):
    """Refuse to time what is wrong: the gradients of each backend against float64."""
    inputs = case.inputs(device)
    leaves, make_Q, b, step_size, cotangent = inputs
    wide = [x.detach().double().requires_grad_() for x in (*leaves, b, step_size)]
    wide_inputs = (wide[:-2], make_Q, wide[-2], wide[-1], cotangent.double())
    for k in sorted({min(case.k, 4), case.k}):
        exact = peers.forward_backward(case.method, k, wide_inputs, "eager")
        eager = peers.forward_backward(case.method, k, inputs, "eager")
        for backend in backends:
            actual = peers.forward_backward(case.method, k, inputs, backend)
            # the last is the step size's: after many steps y no longer depends on it, and what is left of its
            # gradient is the rounding of a sum that cancels; it is compared after a few
            for a, x, e in list(zip(actual, exact, eager, strict=True))[: None if k <= 4 else -1]:
                assert_as_close_as_eager(a, x, e, what=f"{case.id} {backend} k={k}")


def run(case, device, roof, environment, wanted_peers, rounds):
    """Rows of one case: our backends on this device and the peers, timed in turns."""
    ours = [name for name in ("cpu", "cuda", "triton") if _usable(name, device)]
    check(case, device, ours)
    sets = input_sets(case, device)
    functions, compile_seconds = {}, {}
    for backend in [*ours, *(["eager"] if "eager" in wanted_peers else [])]:
        functions[backend] = rotating(
            lambda inputs, backend=backend: peers.forward_backward(case.method, case.k, inputs, backend), sets
        )
    if "compile" in wanted_peers and (case.structure, case.method) not in COMPILE_TAKES_MINUTES:
        step, compile_seconds["compile"] = peers.compiled(case.method, case.k, sets[0])
        functions["compile"] = rotating(step, sets)
    if "jax" in wanted_peers and not peers.jax_missing():
        functions["jax"], compile_seconds["jax"], _ = peers.jax_step(case.structure, case.method, case.k, sets[0])
    timings = harness.interleave(functions, device, rounds=rounds)
    num_bytes, flops = case.floor()
    for backend, timing in timings.items():
        yield {
            "op": "momentum",
            "structure": case.structure,
            "method": case.method,
            "backend": backend,
            "mode": "forward+backward",
            "dtype": str(case.dtype)[6:],
            "B": case.B,
            "d": case.d,
            "k": case.k,
            "p50_us": f"{timing.p50 * 1e6:.1f}",
            "p20_us": f"{timing.p20 * 1e6:.1f}",
            "p80_us": f"{timing.p80 * 1e6:.1f}",
            "compile_s": f"{compile_seconds[backend]:.1f}" if backend in compile_seconds else "",
            "bytes": num_bytes,
            "flops": flops,
            "percent_of_roof": f"{100 * roof.seconds(num_bytes, flops) / timing.p50:.1f}",
            "copy_gb_s": f"{roof.copy_bytes_per_s / 1e9:.1f}",
            "fma_gflop_s": f"{roof.flops_per_s / 1e9:.0f}",
            **environment,
        }


def _usable(name, device):
    return _backend.unavailable_reason(name) is None and (name == "cpu") == (device == "cpu")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="run the cases whose id contains this text")
    parser.add_argument("--peers", default=",".join(peers.PEERS), help="of eager,compile,jax")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="CSV to write (default: print only)")
    options = parser.parse_args(arguments)
    wanted = options.peers.split(",")
    if "jax" in wanted and peers.jax_missing():
        print(f"without jax: {peers.jax_missing()}")
    if not any(_usable(name, options.device) for name in ("cpu", "cuda", "triton")):
        sys.exit(f"no fused backend runs on {options.device}: available are {uk.available_backends()}")
    roof, environment = harness.measure_roof(options.device), harness.environment(options.device)
    print(
        f"{environment['device']}, torch {environment['torch']}, {environment['threads']} threads: "
        f"copy {roof.copy_bytes_per_s / 1e9:.1f} GB/s, FMA {roof.flops_per_s / 1e9:.0f} GFLOP/s"
    )
    rows = []
    for case in CASES:
        if options.only not in case.id:
            continue
        new = list(run(case, options.device, roof, environment, wanted, options.rounds))
        rows += new
        ours = float(new[0]["p50_us"])
        print(
            f"{case.id:44s} "
            + "  ".join(
                f"{row['backend']} {float(row['p50_us']):.0f} µs"
                + (f" ({row['percent_of_roof']} % of roof)" if i == 0 else f" ({float(row['p50_us']) / ours:.1f}x)")
                for i, row in enumerate(new)
            ),
            flush=True,
        )
    if options.out:
        print(f"wrote {harness.write_csv(options.out, rows)}")


if __name__ == "__main__":
    main()
