"""Launcher of the Triton kernels, as ops that torch.compile and torch.export see. Imports Triton at the first call."""

import functools
import importlib

import torch

from unrolled_kernels.ops.momentum import native

_OPERANDS = {"dense": ("matrix",), "diagonal": ("eigenvalues",), "spectral": ("eigenvalues", "matrix")}


@functools.cache
def _kernels(structure):
    """The module of ``structure``'s kernels, which imports Triton."""
    return importlib.import_module(f"unrolled_kernels.ops.momentum.triton_{structure}")


# the schemas of csrc/momentum.cpp
_library = torch.library.Library("unrolled_kernels", "FRAGMENT")
for _structure, _names in _OPERANDS.items():
    _tensors = "".join(f"Tensor {name}, " for name in _names)
    _rest = (
        "Tensor b, Tensor? y0, Tensor step_sizes, Tensor? momentum, Tensor? extrapolation, SymInt num_steps, "
        "bool trajectory"
    )
    _needs = "".join(f", bool needs_{name}" for name in _names) + ", bool needs_schedule"
    _op = f"momentum_{_structure}_triton"
    _results = ", ".join(["Tensor"] * (len(_names) + 5))
    _library.define(f"{_op}({_tensors}{_rest}) -> Tensor")
    _library.define(f"{_op}_backward(Tensor grad_y, {_tensors}{_rest}{_needs}) -> ({_results})")
    # CUDA, and the CPU for Triton's interpreter
    for _name, _function in ((_op, "forward"), (f"{_op}_backward", "backward")):
        _library.impl(
            _name,
            lambda *args, structure=_structure, function=_function: getattr(_kernels(structure), function)(*args),
            "CompositeExplicitAutograd",
        )
    native.register(len(_names), _op)

LAUNCHER = native.Launcher("_triton")
