"""How OpenMP's threads wait in this package's own commands; imported before torch is, which loads OpenMP."""

import os
import sys
from pathlib import Path


def _is_own_command():
    script = Path(sys.argv[0]).stem if getattr(sys, "argv", None) else ""
    return script == "unrolled-kernels" or any(word.startswith("unrolled_kernels.") for word in sys.orig_argv[1:4])


if _is_own_command() and "torch" not in sys.modules:
    # threads that wait by spinning hold the cores on which other processes, or each other's workers, have work
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
