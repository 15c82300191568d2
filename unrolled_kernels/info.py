"""``python -m unrolled_kernels.info``: versions, and each backend: available, or why not and how to get it."""

import hashlib
import os
import platform
import warnings
from pathlib import Path

import torch

import unrolled_kernels
from unrolled_kernels import _backend

_CSRC = Path(__file__).resolve().parents[1] / "csrc"  # of a checkout


def report():
    """The text that ``python -m unrolled_kernels.info`` prints."""
    lines = [
        f"unrolled-kernels {unrolled_kernels.__version__}",
        f"python           {platform.python_version()} on {platform.platform()}",
        f"torch            {torch.__version__}, {torch.get_num_threads()} threads, "
        + (f"GPU {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no CUDA device"),
        f"triton           {_triton_version()}",
        "",
        "backends",
    ]
    for name in _backend.NAMES:
        reason = _backend.unavailable_reason(name)
        lines.append(f"  {name:7s} {'available' if reason is None else 'not available: ' + reason}")
    extension = _backend.extension()
    lines += ["", "extension"]
    if extension is None:
        lines.append(f"  not built: {_backend.why_no_extension()}")
    else:
        lines += [f"  {name:22s} {value}" for name, value in extension.build_info().items()]
        lines.append(f"  {'autograd node':22s} {_autograd_node()}")
        lines += _other_sources(extension.build_info()["csrc_sha256"])
        if not extension.build_info()["cuda"]:
            lines.append(f"  without CUDA kernels: {_backend.build_record('cuda_reason')}")
        lines.append(f"  {'clusters':22s} {_clusters()}")
    with warnings.catch_warnings():
        # the lines above say it
        warnings.simplefilter("ignore", _backend.SlowBackendWarning)
        chosen = {kind: _backend.resolve(None, torch.device(kind)) for kind in ("cpu", "cuda")}
    lines += ["", f'backend="auto" takes {chosen["cpu"]!r} on cpu tensors, {chosen["cuda"]!r} on cuda tensors']
    return "\n".join(lines)


def _clusters():
    """Whether a dense Q that no block holds may go to a cluster of them, as csrc/cuda/momentum_resident.cu asks."""
    if os.environ.get("UNROLLED_KERNELS_CLUSTERS") == "1":
        return "on, from compute capability 9.0: UNROLLED_KERNELS_CLUSTERS=1"
    return "off, no GPU has run their tests yet: UNROLLED_KERNELS_CLUSTERS=1 turns them on"


def _autograd_node():
    """Which node calls on a CPU have, and why where it is the slower one."""
    if _backend.autograd_extension():
        return "C++"
    if os.environ.get("UNROLLED_KERNELS_AUTOGRAD") == "0":
        return "Python: UNROLLED_KERNELS_AUTOGRAD=0"
    built_for = _backend.build_record("autograd_torch")
    if built_for is None:
        return "Python: a build from source, for one torch alone, has it in C++, which small calls notice"
    if built_for != str(torch.__version__):
        return f"Python: the one in C++ was built for torch {built_for}, this is {torch.__version__}; build it again"
    return "Python: the one in C++ cannot be loaded; build it again"


def _other_sources(built_from, csrc=_CSRC):
    """A line where the extension was built in a checkout whose sources are no longer those."""
    if not (csrc / "module.cpp").exists():
        return []
    digest = hashlib.sha256()
    # as setup.py has it
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    if digest.hexdigest() == built_from:
        return []
    return [f"  built from other sources than those in {csrc}: build it again (`make build`, or `pip install .`)"]


def _triton_version():
    try:
        import triton
    except ImportError:
        return "not installed (`pip install triton`, Linux)"
    return triton.__version__


def add_arguments(parser):
    """Describe the subcommand of ``unrolled-kernels``."""
    parser.set_defaults(run=lambda _: main())


def main():
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
