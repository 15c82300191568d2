"""Launcher of the Triton kernels, as ops that torch.compile and torch.export see. Imports Triton at the first call."""

import functools
import importlib

import torch

from unrolled_kernels.ops.rnn import native


@functools.cache
def _kernels():
    """The module of the kernels, which imports Triton."""
    return importlib.import_module("unrolled_kernels.ops.rnn.triton_cell")


# the schemas of csrc/rnn.cpp
_library = torch.library.Library("unrolled_kernels", "FRAGMENT")
for _structure, _operand in (("dense", "Q"), ("diagonal", "q")):
    _op = f"rnn_{_structure}_triton"
    _arguments = f"Tensor {_operand}, Tensor b, Tensor? y0, Tensor[] weights, SymInt num_steps, bool trajectory"
    _needs = f"bool needs_{_operand}, bool needs_weights"
    _library.define(f"{_op}({_arguments}) -> Tensor")
    _library.define(f"{_op}_backward(Tensor grad_y, {_arguments}, {_needs}) -> (Tensor, Tensor, Tensor, Tensor[])")
    # CUDA, and the CPU for Triton's interpreter
    for _name, _function in ((_op, "forward"), (f"{_op}_backward", "backward")):
        _library.impl(
            _name, lambda *args, function=_function: getattr(_kernels(), function)(*args), "CompositeExplicitAutograd"
        )
    native.register(_op)

# wider layers take minutes to compile, and the operands of their products spill
LAUNCHER = native.Launcher("_triton", max_width=64)
