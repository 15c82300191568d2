"""What the experiments' command lines share: kinds of numbers, the device, and what a run notes of its surroundings."""

import argparse
import platform
from pathlib import Path

import torch

import unrolled_kernels
from unrolled_kernels import _backend


def _number(kind, allowed, expected):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


positive = _number(int, lambda value: value > 0, "an integer > 0")
not_negative = _number(int, lambda value: value >= 0, "an integer ≥ 0")
positive_float = _number(float, lambda value: 0 < value < float("inf"), "a number > 0")


def add_run_options(parser, out):
    """Where a study runs and writes: ``--out``, ``--device``, ``--backend``, ``--workers``; ``out`` is its default."""
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: {out}")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 …; default: cuda where it is")
    parser.add_argument("--backend", default="auto", choices=("auto", *_backend.NAMES), help="default: auto")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes; default: one a core on the CPU")


def resolve_device(name, local_rank=0, local_size=1):
    """The device that ``--device`` names; ``auto`` is CUDA where it is.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        local_rank, local_size: of this process among those on this machine; they take its GPUs in turn.
    Raises:
        ValueError: no such kind of device, or it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_size > 1:
        name = f"cuda:{local_rank % max(1, torch.cuda.device_count())}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: {name!r} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def device_name(device):
    """The machine in words, for a report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"


def environment():
    """Versions, for ``config.json``."""
    return {
        "unrolled_kernels": unrolled_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
