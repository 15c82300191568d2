"""The experiments' own extension: kernels of the paper's tasks, which the library itself knows nothing of."""

import functools
import importlib

import torch

from unrolled_kernels import _backend


@functools.cache
def _extension():
    """The compiled module ``unrolled_kernels._C_experiments``, which registers its ops; None where it was not built."""
    try:
        return importlib.import_module("unrolled_kernels._C_experiments")
    except ImportError:
        return None


def runs_on(device, backend="auto"):
    """Whether kernels of the experiments serve tensors on ``device``: it is a CPU, and ``backend`` is "cpu" there."""
    return _backend.resolve(backend, device) == "cpu" and _extension() is not None


def op(name):
    """The op ``unrolled_kernels::name`` of the extension."""
    _extension()
    return getattr(torch.ops.unrolled_kernels, name)
