"""``make gpu``: a measuring run on a GPU in independent parts, the most valuable first, each within its limit of time.

    python -m benchmarks.gpu [--out FOLDER] [--parts NAME,...] [--device cpu --tiny]

A part is a process of its own: one that fails or takes too long is a row of parts.csv and stops no other; the exit
status is 1 if any did. Rows are written as they are measured, to <part>.csv in the folder that --out or OUT names,
otherwise in benchmarks/results/<device>. Inputs are made on the device. ``--device cpu --tiny`` rehearses everything
that needs no GPU.
"""

import argparse
import csv
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

# before torch and JAX share a device: JAX would take most of its memory
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import torch

import unrolled_kernels as uk
import unrolled_kernels.functional as F
from benchmarks import harness, roofs
from unrolled_kernels.testing import STRUCTURES

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("part", "case", "backend", "mode", "B", "d", "k", "p50_us", "bytes", "flops", "gb_s", "gflop_s",
           "percent_of_copy", "percent_of_fma", "error", "bit_equal", "note", "seconds_into_part")  # fmt: skip


class Part:
    """What runs in a process of its own: rows, the device, and whether to keep everything tiny."""

    def __init__(self, name, out, device, tiny):
        self.name, self.device, self.tiny, self.start, self.rows = name, device, tiny, time.perf_counter(), []
        self.path = out / f"{name}.csv"
        self.where = harness.environment(device)
        fused = ("cuda", "triton") if device == "cuda" else ("cpu",)
        self.backends = [backend for backend in fused if backend in uk.available_backends()]
        self.failed = not self.backends

    def row(self, case, backend, mode, **more):
        """Print a row and write all there are, so that what was measured stays whatever comes next."""
        seconds = round(time.perf_counter() - self.start, 1)
        row = {"part": self.name, "case": case, "backend": backend, "mode": mode, **more, "seconds_into_part": seconds}
        self.rows.append(row)
        harness.write_csv(self.path, [{**r, **self.where} for r in self.rows], (*COLUMNS, *self.where))
        print(" ".join(f"{name}={value}" for name, value in row.items() if value != ""), flush=True)

    def guarded(self, case, backend, mode, run):
        """run(), or a row that says what it raised."""
        try:
            run()
        except Exception as error:
            self.failed = True
            self.row(case, backend, mode, note=f"raises {type(error).__name__}: {str(error).strip()[:200]}")
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def quadratics(self, structure, B, d, shared=False):
        """(leaves, b) made on the device: symmetric matrices with eigenvalues in about [0.1, 1]."""
        generator = torch.Generator(self.device).manual_seed(B + d)
        normal = lambda *size: torch.randn(*size, device=self.device, generator=generator)
        values = 0.1 + 0.9 * torch.rand(B, d, device=self.device, generator=generator)
        b = normal(B, d)
        if structure == "diagonal":
            return [values], b
        if structure == "tikhonov":
            return [values.sqrt(), normal(B, d)], b
        count = 1 if shared else B
        G = normal(count, d, d)
        if structure == "spectral":
            return [values, G.div_(2 * math.sqrt(d))], b
        Q = torch.baddbmm(0.1 * torch.eye(d, device=self.device).expand(count, d, d), G, G.mT, alpha=0.225 / d)
        return [Q[0] if shared else Q], b

    def timed(self, call, min_seconds=0.015, turns=5):
        """Median seconds of a call: by the device's clock over calls back to back, which the queue holds ready."""
        call(), call()
        if self.device == "cpu":
            return statistics.median(_seconds(call) for _ in range(turns))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def run(n):
            begin.record()
            for _ in range(n):
                call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / n / 1e3

        n = max(1, min(200, int(min_seconds / max(run(1), 1e-6))))
        return statistics.median(run(n) for _ in range(turns))


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def layer(structure, method, k, backend):
    """The layer as a function of (the tensors of Q, b, step size)."""

    def run(*leaves):
        *operands, b, step_size = leaves
        Q = STRUCTURES[structure](*operands)
        if method == "gd":
            return F.gradient_descent(Q, b, step_size, k, backend=backend)
        return F.nesterov(Q, b, step_size, 0.1, k, backend=backend)

    return run


def floor(structure, B, d, k, shared=False):
    """{mode: (bytes, flops)} that float32 needs at least; see benchmarks/momentum.py."""
    if structure in ("diagonal", "tikhonov"):
        vectors = 3 if structure == "diagonal" else 4
        forward, backward = (4 * vectors * d, 4 * k * d), (4 * (vectors + 2) * d, 10 * k * d)
    elif structure == "spectral":
        forward = 4 * (d * d + 3 * d), 4 * d * d + 4 * k * d
        backward = 4 * (2 * d * d + 5 * d), 8 * d * d + 10 * k * d
    else:
        matrix = 0 if shared else d * d
        forward, backward = (4 * (matrix + 2 * d), 2 * k * d * d), (4 * (2 * matrix + 3 * d), 6 * k * d * d)
    return {"forward": tuple(B * x for x in forward), "backward": tuple(B * x for x in backward)}


def correctness(part):
    """Every structure against the float64 loop, and twice the same bits."""
    sizes = {"dense": (5, 8, 16, 20, 32, 64, 100, 128, 160), "spectral": (5, 16, 32, 64, 128, 160),
             "diagonal": (5, 1000), "tikhonov": (5, 1000)}  # fmt: skip
    order = (("dense", False), ("diagonal", False), ("spectral", False), ("dense", True), ("tikhonov", False))
    for structure, shared in order:
        for d, method in itertools.product(sizes[structure], ("gd", "nag")):
            B, k = (7 if part.tiny else 331), 6
            if part.tiny and d > 32:
                continue
            leaves, b = part.quadratics(structure, B, d, shared)
            leaves = [*leaves, b, torch.tensor(0.9, device=part.device)]
            cotangent = torch.randn(B, d, device=part.device)

            def gradients(backend, dtype, case=(leaves, cotangent, structure, method, k)):
                leaves, cotangent, structure, method, k = case
                x = [t.detach().to(dtype).requires_grad_() for t in leaves]
                y = layer(structure, method, k, backend)(*x)
                return [y.detach(), *torch.autograd.grad(y, x, cotangent.to(dtype))]

            exact = gradients("eager", torch.float64)
            name = f"{structure}{' shared' if shared else ''} {method}"
            for backend in part.backends:

                def check(backend=backend, exact=exact, gradients=gradients, name=name, B=B, d=d, k=k):
                    first, again = gradients(backend, torch.float32), gradients(backend, torch.float32)
                    pairs = list(zip(first, exact, strict=True))
                    # the step size's gradient is one number, a sum that may cancel: on the scale of its terms
                    terms = math.sqrt(B * d) * float(exact[-2].norm())
                    scale = [max(float(e.norm()), 1e-30) for _, e in pairs[:-1]] + [max(abs(float(exact[-1])), terms)]
                    error = max(float((a.double() - e).norm()) / s for (a, e), s in zip(pairs, scale, strict=True))
                    equal = all(torch.equal(a, c) for a, c in zip(first, again, strict=True))
                    wrong = not error < 2e-5 or not equal
                    part.failed |= wrong
                    part.row(name, backend, "check", B=B, d=d, k=k, error=f"{error:.1e}", bit_equal=equal,
                             note="WRONG" if wrong else "")  # fmt: skip

                part.guarded(name, backend, "check", check)


def measure(part, structure, method, B, d, k, modes, backends, roof, shared=False):
    """Rows of one case, in ``modes``, for each backend; "compile" and "cudagraph" are of the eager loop."""
    leaves, b = part.quadratics(structure, B, d, shared)
    leaves = [x.requires_grad_() for x in (*leaves, b, torch.tensor(0.9, device=part.device))]
    cotangent = torch.randn(B, d, device=part.device)
    name, least = f"{structure}{' shared' if shared else ''} {method}", floor(structure, B, d, k, shared)
    for backend, mode in itertools.product(backends, modes):

        def run(backend=backend, mode=mode):
            function = layer(structure, method, k, "eager" if backend in ("compile", "cudagraph") else backend)
            if backend == "compile":
                function = torch.compile(function, fullgraph=True, dynamic=False)
            if backend == "cudagraph":
                function = torch.cuda.make_graphed_callables(function, tuple(leaves))
            if mode == "forward":

                def call():
                    with torch.no_grad():
                        function(*leaves)
            elif mode == "backward":
                y = function(*leaves)
                call = lambda: torch.autograd.grad(y, leaves, cotangent, retain_graph=True)
            else:
                call = lambda: torch.autograd.grad(function(*leaves), leaves, cotangent)
            seconds = part.timed(call)
            parts = least.values() if mode == "both" else [least[mode]]
            num_bytes, flops = (sum(x) for x in zip(*parts, strict=True))
            part.row(name, backend, mode, B=B, d=d, k=k, p50_us=f"{seconds * 1e6:.1f}", bytes=num_bytes, flops=flops,
                     gb_s=f"{num_bytes / seconds / 1e9:.1f}", gflop_s=f"{flops / seconds / 1e9:.0f}",
                     percent_of_copy=f"{100 * num_bytes / seconds / roof.copy_bytes_per_s:.1f}",
                     percent_of_fma=f"{100 * flops / seconds / roof.flops_per_s:.1f}")  # fmt: skip

        part.guarded(name, backend, mode, run)


@dataclasses.dataclass(frozen=True)
class Roof:
    """What the device reaches on memory and on arithmetic alone."""

    copy_bytes_per_s: float
    flops_per_s: float


def roof_of(part):
    """Copy bandwidth of 8 GiB, rates of a large float32 product and of FMAs in registers; rows too."""
    source = torch.ones(2**20 if part.tiny else 2**30, device=part.device)
    target, n = torch.empty_like(source), 256 if part.tiny else 8192
    copy = 2 * source.nbytes / part.timed(functools.partial(target.copy_, source))
    part.row("copy", "torch", "", gb_s=f"{copy / 1e9:.0f}")
    del source, target
    square, one = torch.rand(n, n, device=part.device), torch.ones(1, device=part.device)
    rates = {"sgemm": 2 * n**3 / part.timed(lambda: square @ square)}
    if part.device == "cuda":
        part.guarded("fma", "triton", "", lambda: rates.update(fma=roofs.fma_rate("cuda")))
    for name, rate in rates.items():
        part.row(name, "torch" if name == "sgemm" else "triton", "", gflop_s=f"{rate / 1e9:.0f}")
    part.row("smallest launch", "torch", "", p50_us=f"{part.timed(lambda: one.add_(1)) * 1e6:.2f}")
    return Roof(copy, max(rates.values()))


def shares(part):
    """Forward and backward beside the copy bandwidth and the FMA rate, 1 GiB of matrices."""
    roof, total, both = roof_of(part), 2**14 if part.tiny else 2**28, ("forward", "backward")
    for k, d in itertools.product((10, 40), (32, 16, 64, 128)):
        for method in ("gd", "nag"):
            measure(part, "dense", method, max(1, total // d**2), d, k, both, part.backends, roof)
        if d == 32:
            measure(part, "diagonal", "gd", 1, total // 4, 12 if k == 10 else 40, both, part.backends, roof)
            measure(part, "spectral", "gd", total // d**2, d, k, both, part.backends, roof)
    for B, d in ((2**20, 64), (2**18, 128), (2**17, 256)):
        B = 64 if part.tiny else B
        measure(part, "dense", "gd", B, d, 10, both, [*part.backends, "eager"], roof, shared=True)
    for B, d in ((8, 512), (256, 256)):
        measure(part, "dense", "gd", 2 if part.tiny else B, d, 20, both, [*part.backends, "eager"], roof)


def latency(part):
    """The paper's size: calls as they are, and replayed as a CUDA graph; the eager loop, compiled and graphed."""
    roof = roof_of(part)
    peers = ["eager", *(["compile", "cudagraph"] if part.device == "cuda" else [])]
    for method in ("gd", "nag"):
        measure(part, "dense", method, 50, 5, 30, ("forward", "both"), [*part.backends, *peers], roof)
        for backend in part.backends if part.device == "cuda" else ():
            part.guarded(f"dense {method}", backend, "graph replay", lambda b=backend, m=method: _replay(part, m, b))
    for B in (1000, 10_000):
        measure(part, "dense", "gd", B, 5, 30, ("both",), [*part.backends, *peers], roof)


def _replay(part, method, backend):
    leaves, b = part.quadratics("dense", 50, 5)
    leaves = [x.requires_grad_() for x in (*leaves, b, torch.tensor(0.9, device="cuda"))]
    cotangent, function = torch.randn(50, 5, device="cuda"), layer("dense", method, 30, backend)
    call = lambda: torch.autograd.grad(function(*leaves), leaves, cotangent)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    part.row(f"dense {method}", backend, "graph replay", B=50, d=5, k=30,
             p50_us=f"{part.timed(graph.replay) * 1e6:.2f}")  # fmt: skip


MEASURED = {"correctness": correctness, "shares": shares, "latency": latency}


def commands(options):
    """{part: (command, seconds that it may take)}, the most valuable first; 8 minutes for all up to the tests."""
    python = sys.executable
    own = lambda name: [python, "-m", "benchmarks.gpu", "--part", name, "--out", str(options.out), "--device",
                        options.device, *(["--tiny"] if options.tiny else [])]  # fmt: skip
    wanted = "cuda and (forward_and_gradients or edges or schedule_forms or reruns)"
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "python_tests/test_momentum.py",
             "python_tests/test_rnn.py", "-k", wanted]  # fmt: skip
    if importlib.util.find_spec("xdist") is not None:
        tests += ["-n", "12"]
    profile = ["ncu", "--clock-control", "none", "--kernel-name", "regex:momentum_dense", "--launch-skip", "1",
               "--launch-count", "1", "--section", "SpeedOfLight", "--section", "WarpStateStats", "--section",
               "InstructionStats", python, "-c", PROFILED]  # fmt: skip
    on_gpu = options.device == "cuda"
    build = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
    parts = {
        **({"build": (build, 150)} if on_gpu else {}),
        "info": ([python, "-m", "unrolled_kernels.info"], 30),
        "correctness": (own("correctness"), 70),
        "shares": (own("shares"), 110),
        "latency": (own("latency"), 80),
        **({"tests": (tests, 150), "profile": (profile, 60)} if on_gpu else {}),
    }
    # a rehearsal is not about time
    return {name: (command, limit * (10 if options.tiny else 1)) for name, (command, limit) in parts.items()}


# 1 GiB of Q once more, in one launch to look at: d = 32, k = 40
PROFILED = """
import torch, unrolled_kernels.functional as F
Q = torch.eye(32, device="cuda").mul(0.5).repeat(65536, 1, 1)
b = torch.randn(65536, 32, device="cuda")
for _ in range(2):
    F.gradient_descent(Q, b, 0.9, 40, backend="cuda")
"""


def run_parts(options):
    """Each part in its turn; returns whether all of them succeeded."""
    options.out.mkdir(parents=True, exist_ok=True)
    results, wanted = [], options.parts.split(",") if options.parts else None
    for name, (command, limit) in commands(options).items():
        if wanted and name not in wanted:
            continue
        print(f"\n== {name}, {limit} s at most", flush=True)
        start = time.perf_counter()
        with (options.out / f"{name}.log").open("w") as log:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            except OSError as error:
                status = f"not started: {error}"
            else:
                status = _follow(process, log, limit)
        results.append({"part": name, "status": status, "seconds": f"{time.perf_counter() - start:.1f}"})
        with (options.out / "parts.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["part", "status", "seconds"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(results)
        print(f"== {name}: {status} after {results[-1]['seconds']} s", flush=True)
    return bool(results) and all(result["status"] == "ok" for result in results)


def _follow(process, log, limit):
    """The process's output to the terminal and the log, until it ends or its time is over."""

    def copy():
        for line in process.stdout:
            log.write(line)
            log.flush()
            print(line, end="", flush=True)

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        # its children too: a compiler, the workers of the tests
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        code = None
    reader.join(5)
    return "ok" if code == 0 else f"over its limit of {limit} s" if code is None else f"exit status {code}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes at which everything takes seconds, to rehearse it")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") and Path(os.environ["OUT"]))
    parser.add_argument("--parts", help="run only these, comma-separated")
    parser.add_argument("--part", choices=MEASURED, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = (options.out or harness.results_directory(options.device)).resolve()
    if options.part is None:
        sys.exit(0 if run_parts(options) else 1)
    part = Part(options.part, options.out, options.device, options.tiny)
    if not part.backends:
        sys.exit(f"no fused backend runs on {options.device}: available are {uk.available_backends()}")
    MEASURED[options.part](part)
    sys.exit(1 if part.failed else 0)


if __name__ == "__main__":
    main()
