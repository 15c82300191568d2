"""What this package does otherwise in processes of its own commands; imported before torch is, which takes a second."""

import importlib
import os
import sys
from pathlib import Path


def is_running():
    """Whether this process is one of this package's commands, and torch is not there yet."""
    script = Path(sys.argv[0]).stem if getattr(sys, "argv", None) else ""
    # of the interpreter, not of a program: options, -m and the module's name
    words = sys.orig_argv[1 : len(sys.orig_argv) - len(getattr(sys, "argv", [])) + 1]
    own = script == "unrolled-kernels" or any(word.startswith("unrolled_kernels.") for word in words)
    return own and "torch" not in sys.modules


if is_running():
    # threads that wait by spinning hold the cores on which other processes, or each other's workers, have work
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


_HOMES = {
    "_backend": ("SlowBackendWarning", "available_backends", "use_backend"),
    "layers": ("UnrolledGD", "UnrolledMomentum", "UnrolledNAG"),
    "layers_rnn": ("UnrolledRNN",),
    "quadratics": ("Diagonal", "Spectral", "Tikhonov"),
}


def import_late(name):
    """The ``__getattr__`` of the package in a command, which says its help without torch.

    Elsewhere ``import unrolled_kernels`` imports all of it, so that the ops are there for ``torch.export.load``.
    """
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"unrolled_kernels.{home}"), name)
    if name in ("functional", "prox", "schedules"):
        return importlib.import_module(f"unrolled_kernels.{name}")
    raise AttributeError(f"module 'unrolled_kernels' has no attribute {name!r}")
