"""The Triton kernels that calls of the public functions launch, compiled for GPUs that are not there.

For the tests, and for counts of machine code. A process that compiles cannot interpret (``TRITON_INTERPRET``).
"""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver

from unrolled_kernels import _backend
from unrolled_kernels.ops.triton import launch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# the options that a launch sets; the target decides the others
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


class _Driver:
    """Enough of a driver for Triton to look at arguments as if a GPU were the current device."""

    def get_current_target(self):
        return _target(90)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda

    @staticmethod
    def is_active():
        return True


def _target(capability):
    return GPUTarget("cuda", capability, 32)


@dataclasses.dataclass
class Launch:
    """A kernel with the types and the constants that a call gave it: what Triton compiles once."""

    name: str
    source: ASTSource
    options: dict

    def translate(self):
        """Triton's front end alone: it refuses most of what is refused, in a fifth of the time of compiling."""
        backend = make_backend(_target(90))
        options = backend.parse_options(dict(self.options))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(options)
        return self.source.make_ir(_target(90), options, functions, backend.get_module_map(), context)

    def compile(self, capability):
        """The kernel for compute capability ``capability``, 90 for 9.0."""
        return triton.compile(self.source, target=_target(capability), options=dict(self.options))


@contextlib.contextmanager
def launches(capability=90):
    """Calls in the block run on backend "triton", on tensors of the CPU; no kernel starts, so results are not written.

    The launches are those for a GPU of compute ``capability``.

    Yields a list, to which calls add the ``Launch`` of each kernel, once for all that Triton would compile once.
    """
    found, keys = [], set()

    def record(*, fn, compile, **_):
        key = (fn.name, compile["key"])
        if key not in keys:
            keys.add(key)
            (attributes,) = compile["configs"]
            source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], attributes)
            options = json.loads(compile["specialization_data"])["options"]
            found.append(Launch(fn.name, source, {name: options[name] for name in _OPTIONS}))
        # taken care of: Triton neither compiles nor starts it
        return True

    with (
        mock.patch.object(driver, "_active", _Driver()),
        mock.patch.object(knobs.runtime, "jit_cache_hook", record),
        mock.patch.object(_backend, "resolve", return_value="triton"),
        mock.patch.object(_backend, "decide", return_value="triton"),
        mock.patch.object(launch, "capability", return_value=capability),
    ):
        yield found


def resources(cubin):
    """Registers and bytes of stack a lane, from the binary itself."""
    out = _cuobjdump("-res-usage", cubin)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", out).groups()
    return int(registers), int(stack) + int(local)


def shuffles(cubin):
    """Exchanges between lanes in the machine code, as often as they are written there."""
    return len(re.findall(r"\bSHFL\b", _cuobjdump("-sass", cubin)))


def _cuobjdump(option, cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # it calls nvdisasm
        environment = os.environ | {"PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}
        command = [TOOLS / "cuobjdump", option, file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return out.stdout + out.stderr
