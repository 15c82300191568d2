"""Launcher of the Triton kernels, as ops that torch.compile and torch.export see. Imports Triton at the first call."""

import functools
import importlib

import torch

from unrolled_kernels.ops.momentum import native

# by structure, the tensors that come before b, and how many of them, the first ones, have a gradient
_OPERANDS = {
    "dense": (("matrix",), 1),
    "diagonal": (("eigenvalues",), 1),
    "spectral": (("eigenvalues", "matrix"), 2),
    "tikhonov": (("eigenvalues", "observed"), 1),
}


@functools.cache
def _kernels(structure):
    """The module of ``structure``'s kernels, which imports Triton."""
    return importlib.import_module(f"unrolled_kernels.ops.momentum.triton_{structure}")


def _forward(structure, *args):
    if structure == "tikhonov":
        f, observed, *rest = args
        return _kernels("diagonal").forward(f, *rest, observed=observed)
    return _kernels(structure).forward(*args)


def _backward(structure, *args):
    if structure == "tikhonov":
        grad_y, f, observed, *rest = args
        return _kernels("diagonal").backward(grad_y, f, *rest, observed=observed)
    return _kernels(structure).backward(*args)


# the schemas of csrc/momentum.cpp
_library = torch.library.Library("unrolled_kernels", "FRAGMENT")
for _structure, (_names, _gradients) in _OPERANDS.items():
    _tensors = "".join(f"Tensor {name}, " for name in _names)
    _rest = (
        "Tensor b, Tensor? y0, Tensor step_sizes, Tensor? momentum, Tensor? extrapolation, SymInt num_steps, "
        "bool trajectory"
    )
    _needs = "".join(f", bool needs_{name}" for name in _names[:_gradients]) + ", bool needs_schedule"
    _op = f"momentum_{_structure}_triton"
    _results = ", ".join(["Tensor"] * (_gradients + 5))
    _library.define(f"{_op}({_tensors}{_rest}) -> Tensor")
    _library.define(f"{_op}_backward(Tensor grad_y, {_tensors}{_rest}{_needs}) -> ({_results})")
    # CUDA, and the CPU for Triton's interpreter
    _library.impl(_op, functools.partial(_forward, _structure), "CompositeExplicitAutograd")
    _library.impl(f"{_op}_backward", functools.partial(_backward, _structure), "CompositeExplicitAutograd")
    native.register(len(_names), _op, _gradients)

LAUNCHER = native.Launcher("_triton")
