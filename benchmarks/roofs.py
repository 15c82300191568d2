"""``python -m benchmarks.roofs``: what this machine can do at most, with which the ops are compared.

Arithmetic: a loop of float32 multiply-adds that touches no memory. Memory: reading, copying, and what a forward and a
backward do at the least (read the operands; read them and write as much), over as many bytes as fit each cache, and
over more than all of them. On the CPU both are a C++ file, compiled for the processor at hand when they are first
needed; on a GPU a Triton kernel and torch's own copy and sum.
"""

import argparse
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("roofs.cpp")
_BUILD = Path(__file__).resolve().parent.parent / "build/roofs"
# (reads, copies) of the operands in one pass
STREAMS = {"read": (1, 0), "copy": (0, 1), "read, then copy": (1, 1)}


class Roof:
    """The most that was seen of this machine beside one case: ``sample()`` between its turns, ``seconds()`` after.

    Args:
        device: "cpu" or "cuda".
        threads: of the CPU.
        num_bytes: of one set of operands; the stream reads each set, then copies it to one target, as a forward and a
            backward that writes a gradient of each operand would.
        sets: how many sets of operands the case takes in turn.
    """

    def __init__(self, device, threads, num_bytes, sets=1):
        self.device, self.threads = device, threads
        self.flops_per_s, self.bytes_per_s = 0.0, 0.0
        n = max(64, num_bytes // 4)
        self._source, self._target = torch.ones(sets, n, device=device), torch.zeros(n, device=device)

    def sample(self):
        """Measure both once more, some milliseconds long, and keep the better of each."""
        self.flops_per_s = max(self.flops_per_s, fma_rate(self.device, self.threads))
        rate = stream_rate(self.device, self.threads, self._source, self._target)
        self.bytes_per_s = max(self.bytes_per_s, rate)

    def seconds(self, num_bytes, flops):
        """The least time the work can take: the slower of its memory traffic and its arithmetic."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


def fma_rate(device, threads=1, seconds=0.005):
    """Float32 operations a second, in registers; two for a multiply-add."""
    if device == "cuda":
        from benchmarks import roofs_triton

        return roofs_triton.fma_rate()
    return _library().fma_rate(threads, seconds)


def stream_rate(device, threads, source, target, kind="read, then copy", seconds=0.003):
    """Bytes a second, read and written, over the rows of ``source`` in turn; the better of two ways to write.

    Args:
        source: float32 ``[sets, n]``.
        target: float32 ``[n]``.
        kind: one of ``STREAMS``.
    """
    reads, copies = STREAMS[kind]
    if device == "cuda":
        return _cuda_stream_rate(source, target, reads, copies)
    pointers = ctypes.c_void_p(source.data_ptr()), len(source), ctypes.c_void_p(target.data_ptr()), len(target)
    ways = (0, 1) if copies else (0,)
    return max(_library().stream_rate(threads, seconds, *pointers, reads, copies, way) for way in ways)


def machine(device, rounds=5):
    """Everything at once: ``{"fma_gflop_s": {threads: …}, "stream_gb_s": {level: {kind: …}}}``, the best of rounds."""
    most = torch.get_num_threads() if device == "cpu" else 1
    counts = sorted({1, most})
    fma = {count: max(fma_rate(device, count, 0.02) for _ in range(rounds)) / 1e9 for count in counts}
    streams = {}
    for level, num_bytes in levels(device).items():
        # half of the level for the operands and half for what is written
        n = num_bytes // 8
        source, target = torch.ones(1, n, device=device), torch.zeros(n, device=device)
        streams[level] = {
            kind: max(stream_rate(device, most, source, target, kind, 0.02) for _ in range(rounds)) / 1e9
            for kind in STREAMS
        }
    rounded = lambda table: {key: round(value, 1) for key, value in table.items()}
    return {"fma_gflop_s": rounded(fma), "stream_gb_s": {level: rounded(rates) for level, rates in streams.items()}}


def levels(device):
    """``{level: bytes}`` that fit three quarters of each level of all cores in use, and more than the last one."""
    if device == "cuda":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return {"L2": cache // 2, "memory": 2**31}
    threads, found = torch.get_num_threads(), {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            size = int((index / "size").read_text().strip().removesuffix("K")) * 1024
            shared = "," in (cores := (index / "shared_cpu_list").read_text()) or "-" in cores
            found["L" + (index / "level").read_text().strip()] = size * 3 // 4 * (1 if shared else threads)
    return {**found, "memory": max(2**28, 4 * max(found.values(), default=0))}


def _cuda_stream_rate(source, target, reads, copies, repeats=4):
    def one_pass():
        for row in source:
            for _ in range(reads):
                row.sum()
            for _ in range(copies):
                target.copy_(row)

    one_pass()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        one_pass()
    torch.cuda.synchronize()
    return repeats * (reads + 2 * copies) * source.nbytes / (time.perf_counter() - start)


@functools.cache
def _library():
    """roofs.cpp as a library, compiled unless this processor's is there."""
    compiler = next(
        filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))), None
    )
    if compiler is None:
        raise RuntimeError("the roof of the CPU needs a C++ compiler: install one (g++, for instance) or set CXX")
    flags = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread"]
    target = subprocess.run([compiler, *flags, "-Q", "--help=target"], capture_output=True, text=True).stdout
    key = hashlib.sha256(_SOURCE.read_bytes() + target.encode()).hexdigest()[:16]
    library = _BUILD / f"roofs-{key}.so"
    if not library.exists():
        _BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_BUILD) as directory:
            fresh = Path(directory) / library.name
            subprocess.run([compiler, *flags, _SOURCE, "-o", fresh], check=True)
            os.replace(fresh, library)
    loaded = ctypes.CDLL(str(library))
    loaded.fma_rate.argtypes = [ctypes.c_int, ctypes.c_double]
    loaded.stream_rate.argtypes = [
        ctypes.c_int, ctypes.c_double, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
        ctypes.c_int, ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    loaded.fma_rate.restype = loaded.stream_rate.restype = ctypes.c_double
    return loaded


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    found = machine(parser.parse_args(arguments).device)
    for threads, rate in found["fma_gflop_s"].items():
        print(f"multiply-adds in registers, {threads} threads: {rate:.1f} GFLOP/s, {rate / threads:.1f} a thread")
    for level, rates in found["stream_gb_s"].items():
        print(f"{level}: " + ", ".join(f"{kind} {rate:.1f} GB/s" for kind, rate in rates.items()))


if __name__ == "__main__":
    main()
