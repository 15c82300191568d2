"""The CUDA sources without a GPU: what they compute when executed on the CPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from native.build import CSRC, NATIVE, compiled
from problems import assert_all_close

EMULATION = NATIVE / "cuda_on_cpu"

FAMILIES = ("momentum", "rnn")
ARCHITECTURES = ("80", "90", "100", "120")
# where only float32 is looked at, the others need not be compiled
FLOAT_ONLY = "-DUNROLLED_KERNELS_CUDA_TYPES(_)=_(float)"
DTYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
# of the threads of a block; asynchronous copies arrive at once or when they are waited for
ORDERS = (("up", "early"), ("down", "late"), ("7", "late"))


def _toolkit_include():
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    home = os.environ.get("CUDA_HOME")
    if nvcc is not None and home is None:
        dryrun = subprocess.run([nvcc, "-dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        top = re.search(r"_?TOP_?=(\S+)", dryrun)
        home = top[1] if top else Path(nvcc).resolve().parent.parent
    return nvcc, Path(home) / "include" if home else None


NVCC, INCLUDE = _toolkit_include()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
needs_emulation = pytest.mark.skipif(
    INCLUDE is None or not (INCLUDE / "cuda_fp16.h").exists() or shutil.which("g++") is None,
    reason="executing CUDA sources on the CPU takes g++ and the headers of a CUDA toolkit",
)


def headers(family):
    """What the kernels of an op family may include, and may not: the headers of the other families."""
    found = [p for folder in (CSRC, CSRC / "common", CSRC / "cuda") for p in folder.glob("*.*h")]
    return [p for p in found if p.name.startswith(family) or not p.name.startswith(FAMILIES)]


MODES = {
    "plain": ["-O1"],
    # compiling is what takes long
    "address": ["-O0", FLOAT_ONLY, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O0", FLOAT_ONLY, "-fsanitize=thread"],
}


def emulated(name, mode, sources, defines=()):
    """The executable made of CUDA sources and a main function, which runs them on the CPU."""
    flags = [
        "-std=c++17",
        "-g1",
        "-DUNROLLED_KERNELS_CUDA_ON_CPU",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-Wno-unused-parameter",
        "-Werror",
        f"-I{CSRC}",
        f"-I{EMULATION}",
        f"-isystem{INCLUDE}",
        *MODES[mode],
        *defines,
    ]
    return compiled(f"{name}-{mode}", flags, sources, [*headers(name), *EMULATION.glob("*.h")])


def environment(order, copies, **more):
    return (
        os.environ
        | {
            "CUDA_ON_CPU_ORDER": order,
            "CUDA_ON_CPU_COPIES": copies,
            "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
            "TSAN_OPTIONS": "halt_on_error=1",
        }
        | more
    )


class Emulation:
    """The contract of a family's ``reference``, forward and backward, fulfilled by the executed kernels."""

    family: str
    sources: tuple
    reference: object

    def __init__(self, mode="plain", order="up", copies="early", shift=0, **more):
        self.executable = emulated(self.family, mode, self.sources)
        self.environment, self.shift = environment(order, copies, **more), shift

    def check(self, run, dtype):
        """The kernels' results by name, ``run(implementation, dtype)``, when they are close to the float64 ones."""
        actual = run(self, dtype)
        exact = run(self.reference, torch.float64)
        eager = run(self.reference, torch.float32 if dtype == torch.float64 else dtype)
        assert_all_close(actual, exact, eager)
        return actual

    @classmethod
    def check_every_order(cls, run, dtype, **options):
        """Right, and bit-equal whatever the order of the threads."""
        first = cls(**options).check(run, dtype)
        for order, copies in ORDERS[1:]:
            again = run(cls(order=order, copies=copies, **options), dtype)
            for name in first:
                assert torch.equal(first[name], again[name]), f"{name}: the order of the threads shows ({order})"


def _memory(x):
    """The bytes from the first to the last element of x, whatever lies between."""
    if x.numel() == 0:
        return b""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((span,), (1,)).contiguous().view(torch.uint8).numpy().tobytes()


def poisoned(shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype)


def execute(executable, environment, numbers, arrays, outputs):
    """Run a driver of python_tests/native/cuda_on_cpu: ``outputs`` (some None) filled with what it wrote."""
    arrays = [None if x is None else _memory(x) for x in arrays]
    numbers = [*numbers, *(-1 if x is None else len(x) for x in arrays)]
    run = subprocess.run(
        [executable],
        input=b"".join([np.array(numbers, np.int64).tobytes(), *filter(None, arrays)]),
        capture_output=True,
        env=environment,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr.decode()
    filled, position = [], 0
    for x in outputs:
        size = 0 if x is None else x.numel() * x.element_size()
        part = bytearray(run.stdout[position : position + size])
        filled.append(x if size == 0 else torch.frombuffer(part, dtype=x.dtype).reshape(x.shape))
        position += size
    assert position == len(run.stdout)
    return filled


def spread(x):
    """x with other values between its samples."""
    if x is None or x.shape[0] == 1:
        return x
    rows = torch.nn.functional.pad(x.flatten(1), (0, 3), value=torch.nan)
    return rows.as_strided(x.shape, (rows.stride(0), *x.stride()[1:]))


def stride(x, dim):
    """Of a dimension as the contracts have it: 0 where it is shared."""
    return 0 if x is None or x.shape[dim] == 1 else x.stride(dim)
