"""Launcher of the Triton kernels, as ops that torch.compile and torch.export see. Imports Triton at the first call."""

import functools
import importlib

import torch

from unrolled_kernels.ops.momentum import native

_OPERANDS = {"dense": ("matrix",), "diagonal": ("eigenvalues",), "spectral": ("eigenvalues", "matrix")}


def forward(eigenvalues, matrix, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory):
    """Run the recurrence on canonical arguments (see the package's docstring)."""
    ops = torch.ops.unrolled_kernels
    rest = (b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory)
    if eigenvalues is None:
        return ops.momentum_dense_triton(matrix, *rest)
    if matrix is None:
        return ops.momentum_diagonal_triton(eigenvalues, *rest)
    return ops.momentum_spectral_triton(eigenvalues, matrix, *rest)


def backward(
    grad_y,
    eigenvalues,
    matrix,
    b,
    y0,
    step_sizes,
    momentum,
    extrapolation,
    num_steps,
    trajectory,
    needs_eigenvalues,
    needs_matrix,
    needs_schedule,
):
    """Gradients of the canonical arguments; the contract of ``manual.backward``."""
    ops = torch.ops.unrolled_kernels
    rest = (b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory)
    if eigenvalues is None:
        d_matrix, *d_rest = ops.momentum_dense_triton_backward(grad_y, matrix, *rest, needs_matrix, needs_schedule)
        return (b.new_empty(0), d_matrix, *d_rest)
    if matrix is None:
        d_eigenvalues, *d_rest = ops.momentum_diagonal_triton_backward(
            grad_y, eigenvalues, *rest, needs_eigenvalues, needs_schedule
        )
        return (d_eigenvalues, b.new_empty(0), *d_rest)
    return ops.momentum_spectral_triton_backward(
        grad_y, eigenvalues, matrix, *rest, needs_eigenvalues, needs_matrix, needs_schedule
    )


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
