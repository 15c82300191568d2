"""``python -m unrolled_kernels.info``: versions, and each backend: available, or why not and how to get it."""

import platform
import warnings

import torch

import unrolled_kernels
from unrolled_kernels import _backend


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
        lines.append(f"  {'autograd node':22s} {'C++' if _backend.autograd_extension() else 'Python'}")
        if not extension.build_info()["cuda"]:
            lines.append(f"  without CUDA kernels: {_backend.build_record('cuda_reason')}")
    with warnings.catch_warnings():
        # the lines above say it
        warnings.simplefilter("ignore", _backend.SlowBackendWarning)
        chosen = {kind: _backend.resolve(None, torch.device(kind)) for kind in ("cpu", "cuda")}
    lines += ["", f'backend="auto" takes {chosen["cpu"]!r} on cpu tensors, {chosen["cuda"]!r} on cuda tensors']
    return "\n".join(lines)


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
