"""The long CSV that every table and figure is made from: its columns, and where and of what a row was measured."""

import csv
import datetime
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from benchmarks import roofs
from unrolled_kernels import _backend

# the profiler, which peak_memory uses, logs its stages otherwise
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
ROOT = Path(__file__).resolve().parent.parent
# fmt: off
COLUMNS = (
    "op", "structure", "method", "backend", "mode", "dtype", "B", "d", "k", "p50_us", "p20_us", "p80_us", "compile_s",
    "bytes", "flops", "gb_s", "gflop_s", "percent_of_roof", "peak_mb", "stream_gb_s", "fma_gflop_s",
    "threads", "device", "torch", "triton", "commit", "kernel_sources_sha256", "date",
)
# fmt: on


def peak_memory(call, device):
    """Most bytes that one call holds at a time beyond what it was given, as torch's allocator counts them."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


def environment(device):
    """The columns that say where and with what a row was measured."""
    triton = importlib.util.find_spec("triton")
    return {
        "threads": torch.get_num_threads() if device == "cpu" else "",
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if triton else "",
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("+" if _git("status", "--porcelain", "csrc", "unrolled_kernels") else ""),
        "kernel_sources_sha256": kernel_sources_sha256(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
    }


def results_directory(device):
    """``benchmarks/results/<device>``, with a ``machine.json`` that says what the machine is."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    name = gpu.removeprefix("NVIDIA ").split()[0] if gpu else f"cpu {cpu_name()}"
    directory = ROOT / "benchmarks/results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    directory.mkdir(parents=True, exist_ok=True)
    machine = {
        "processor": cpu_name(),
        "logical_cpus": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.platform(),
        "python": platform.python_version(),
        "gpu": gpu,
        "torch_cuda": torch.version.cuda,
        "extension": _backend.extension().build_info() if _backend.extension() else None,
        "roofs": roofs.machine(device),
    }
    (directory / "machine.json").write_text(json.dumps(machine, indent=2) + "\n")
    return directory


def cpu_name():
    """The processor's name as the system gives it, with the instruction sets the kernels tell apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    best = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "baseline"
    return f"{fields.get('model name', platform.machine())} (family {fields.get('cpu family', '?')}, {best})"


def kernel_sources_sha256():
    """One hash of every file a kernel is made of, so that a stale result can be told from a fresh one."""
    digest = hashlib.sha256()
    sources = [*(ROOT / "csrc").rglob("*"), *(ROOT / "unrolled_kernels/ops").rglob("*.py")]
    for path in sorted(p for p in sources if p.is_file() and "__pycache__" not in p.parts):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*arguments):
    result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return result.stdout.strip()


def usable(name, device):
    """Whether fused backend ``name`` runs on ``device``."""
    return _backend.unavailable_reason(name) is None and (name == "cpu") == (device == "cpu")


def row(case, backend, mode, timing, roof, where, *, compile_seconds=None, peak=None):
    """One line of the CSV; ``case`` says what was run and what it must cost at least, ``where`` is ``environment``."""
    num_bytes, flops = case.floor(mode)
    return {
        "op": case.op,
        "structure": case.structure,
        "method": case.method,
        "backend": backend,
        "mode": mode,
        "dtype": str(case.dtype)[6:],
        "B": case.B,
        "d": case.d,
        "k": case.k,
        "p50_us": f"{timing.p50 * 1e6:.1f}",
        "p20_us": f"{timing.p20 * 1e6:.1f}",
        "p80_us": f"{timing.p80 * 1e6:.1f}",
        "compile_s": "" if compile_seconds is None else f"{compile_seconds:.1f}",
        "bytes": num_bytes,
        "flops": flops,
        "gb_s": f"{num_bytes / timing.p50 / 1e9:.2f}",
        "gflop_s": f"{flops / timing.p50 / 1e9:.2f}",
        "percent_of_roof": f"{100 * roof.seconds(num_bytes, flops) / timing.p50:.1f}",
        "peak_mb": "" if peak is None else f"{peak / 1e6:.3f}",
        "stream_gb_s": f"{roof.bytes_per_s / 1e9:.1f}",
        "fma_gflop_s": f"{roof.flops_per_s / 1e9:.1f}",
        **where,
    }


def write_csv(path, rows, columns=COLUMNS):
    """Write the rows, replacing the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
