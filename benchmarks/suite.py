"""How a list of cases is checked, timed against its peers and written down; each op's file holds the cases."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

import unrolled_kernels as uk
from benchmarks import harness, peers
from benchmarks.case import MODES
from benchmarks.roofs import Roof
from unrolled_kernels.experiments.timing import in_turns
from unrolled_kernels.testing import assert_as_close_as_eager

FUSED = ("cpu", "cuda", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [*(name for name in FUSED if harness.usable(name, DEVICE)), "eager"]


def check(case, device, names, made=()):
    """Refuse to time what is wrong: y and every gradient against float64, as close as the eager loop's.

    Args:
        case: of which two numbers of steps are compared, a few and its own.
        names: backends and peers; one that does not exist for this case is passed over.
        made: ``{name: Peer}`` of the case, what is made already.
    """
    leaves, cotangent = case.inputs(device)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    for k in sorted({min(case.k, 4), case.k}):
        at_k = case.with_steps(k)
        # after many steps y no longer depends on some leaves, and what is left of their gradient is the rounding of a
        # sum that cancels: those are compared after a few
        last = 1 + len(leaves) - (case.vanishing if k > 4 else 0)
        for name in names:
            peer = made[name] if k == case.k and name in made else peers.make(name, at_k, leaves)
            if peer is None:
                continue
            reference = peers.Peer(peers.reference(name, at_k))
            exact, eager = reference.results(wide, cotangent.double()), reference.results(leaves, cotangent)
            # a scalar's gradient is a sum over all samples whose terms, as large as those of other leaves, may cancel:
            # what is left of their rounding is of the size of their norm
            terms = max((x.detach() * g).norm().item() for x, g in zip(wide, exact[1:], strict=True) if x.dim())
            results = list(zip(peer.results(leaves, cotangent), exact, eager, strict=True))
            for i, (a, x, e) in enumerate(results[:last]):
                what = f"{case.id} {name} k={k}: {f'gradient of leaf {i - 1}' if i else 'y'}"
                if i and case.kinked:
                    # rounding puts a few entries on the other side of a kink, in eager's loop too, and moves the
                    # gradients of their samples as a whole: what is wrong everywhere is far more than a hundredth
                    error, size = (a.double() - x).norm().item(), x.norm().item() if x.dim() else terms
                    assert error <= 0.01 * size, f"{what}: error {error:.3e} in norm, of {size:.3e}"
                else:
                    assert_as_close_as_eager(a, x, e, what=what, scale=0.0 if x.dim() else terms)


def rotating(calls):
    """A call that takes the next of several calls each time, so that no input set stays in the caches by itself."""
    state = {"i": 0}

    def call():
        state["i"] = (state["i"] + 1) % len(calls)
        return calls[state["i"]]()

    return call


def input_sets(case, device, cache_bytes=64 * 2**20, most=8):
    """Enough input sets to exceed the last-level cache, at most ``most``."""
    one = sum(x.nbytes for x in case.inputs(device)[0])
    return [case.inputs(device, seed) for seed in range(max(1, min(most, cache_bytes // max(one, 1) + 1)))]


def run(case, device, where, *, modes, wanted_peers, rounds):
    """Rows of one case: the fused backends of this device and the peers, all checked, then timed in turns by mode."""
    # one function compiled for too many shapes is an error
    torch._dynamo.reset()
    names = [name for name in FUSED if harness.usable(name, device)]
    names += [name for name in wanted_peers if peers.missing(name, device) is None]
    sets = input_sets(case, device)
    made, first_calls = {}, {}
    for name in names:
        try:
            peer = peers.make(name, case, sets[0][0])
            first_calls[name] = {mode: peers.first_call(peer, mode, *sets[0]) for mode in modes} if peer else {}
            made[name] = peer
            check(case, device, [name], made)
        except torch.OutOfMemoryError:
            print(f"{case.id}: {name} needs more memory than there is", file=sys.stderr)
            made[name], first_calls[name] = None, {}
    for mode in modes:
        calls, compile_seconds, peaks = {}, {}, {}
        for name, first in first_calls.items():
            call, seconds = first.get(mode, (None, 0.0))
            if call is None:
                continue
            if name == "jax":
                compile_seconds[name] = seconds
            elif name.startswith("compile"):
                # one compilation serves both modes with a backward
                both = ("backward", "forward+backward")
                same = both if mode in both else (mode,)
                compile_seconds[name] = sum(first[other][1] for other in same if other in first)
            if name == "jax":
                # one set of inputs, which is to its advantage; what it allocates nobody counts
                calls[name] = call
            else:
                calls[name] = rotating([call, *(made[name].call(mode, *inputs) for inputs in sets[1:])])
                peaks[name] = harness.peak_memory(calls[name], device)
        roof = Roof(device, torch.get_num_threads(), sum(x.nbytes for x in sets[0][0]), len(sets))
        for name, timing in in_turns(calls, device, rounds=rounds, between=roof.sample).items():
            yield harness.row(
                case, name, mode, timing, roof, where,
                compile_seconds=compile_seconds.get(name), peak=peaks.get(name),
            )  # fmt: skip


def benchmark_case(benchmark, case, mode, backend):
    """One pytest-benchmark of a case, checked first, grouped with the other backends of the same shape and mode."""
    if backend != "eager":
        check(case, DEVICE, [backend])
    benchmark.group = f"{case.op} {case.id} {mode}"
    num_bytes, flops = case.floor(mode)
    benchmark.extra_info |= {"bytes": num_bytes, "flops": flops, "device": DEVICE}
    peer, sets = peers.Peer(case.function(backend)), input_sets(case, DEVICE)
    call = rotating([peer.call(mode, *inputs) for inputs in sets])

    def synchronized():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronized)


def main(cases, description, name_of_results, arguments=None):
    """The command line of a file of cases; ``--record`` writes ``<name_of_results>.csv``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default=DEVICE, choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="run the cases whose id contains this text")
    parser.add_argument("--modes", default="forward+backward", help=f"of {','.join(MODES)}")
    parser.add_argument("--peers", default=",".join(peers.PEERS), help=f"of {','.join(peers.PEERS)}; '' for none")
    parser.add_argument("--compile", default="", help="run torch.compile on the cases whose id contains one of these")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each function, of which the median is taken")
    parser.add_argument("--out", type=Path, help="CSV to write (default: print only)")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/<device>/, to be committed")
    options = parser.parse_args(arguments)
    device, modes = options.device, options.modes.split(",")
    wanted = [name for name in options.peers.split(",") if name]
    for name, known, kind in [(m, MODES, "modes") for m in modes] + [(p, peers.PEERS, "peers") for p in wanted]:
        if name not in known:
            parser.error(f"--{kind}: expected some of {','.join(known)}, got {name!r}")
    for peer in wanted:
        if peers.missing(peer, device):
            print(f"without {peer}: {peers.missing(peer, device)}")
    if not any(harness.usable(name, device) for name in FUSED):
        sys.exit(f"no fused backend runs on {device}: available are {uk.available_backends()}")
    if options.record and options.only:
        parser.error("--only: --record writes the whole table anew; give --out FILE instead")
    if options.record:
        options.out = harness.results_directory(device) / f"{name_of_results}.csv"
    where = harness.environment(device)
    print(f"{where['device']}, torch {where['torch']}, {where['threads'] or 'no'} threads")
    rows = []
    # a compilation takes what it takes where nothing was compiled before
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for case in cases(device):
            if options.only in case.id:
                # torch.compile takes up to a minute for a case
                compiled = any(text in case.id for text in options.compile.split(","))
                of_case = [name for name in wanted if compiled or not name.startswith("compile")]
                new = list(run(case, device, where, modes=modes, wanted_peers=of_case, rounds=options.rounds))
                rows += new
                _print(case, modes, new)
                # the results so far outlive whatever stops the next case
                if options.out:
                    harness.write_csv(options.out, rows)
    if not rows:
        sys.exit(f"--only {options.only!r}: no case has this text in its id")
    if options.out:
        print(f"wrote {options.out}")


def _print(case, modes, rows):
    for mode in modes:
        first, *others = (row for row in rows if row["mode"] == mode)
        ours = float(first["p50_us"])
        print(
            f"{case.id:44s} {mode:16s} {first['backend']} {ours:.0f} µs ({first['percent_of_roof']} % of roof)  "
            + "  ".join(
                f"{r['backend']} {float(r['p50_us']):.0f} µs ({float(r['p50_us']) / ours:.1f}x)" for r in others
            ),
            flush=True,
        )
