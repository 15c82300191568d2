"""Validation of user input: every message names the argument, what was got and what was expected."""

import numbers
import operator

import torch

from unrolled_kernels.quadratics import Structure

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_num_steps(num_steps):
    """A non-negative int (NumPy's and symbolic integers too)."""
    if type(num_steps) is int and num_steps >= 0:
        return num_steps
    if isinstance(num_steps, (bool, torch.Tensor)) or not hasattr(num_steps, "__index__"):
        raise TypeError(f"num_steps: expected a non-negative int, got {num_steps!r} ({type(num_steps).__name__})")
    num_steps = num_steps if isinstance(num_steps, int) else operator.index(num_steps)
    if num_steps < 0:
        raise ValueError(f"num_steps: expected a non-negative int, got {num_steps}")
    return num_steps


def check_Q(Q):
    """A dense ``[*batch, d, d]`` tensor, a Diagonal, a Spectral or a Tikhonov; returns its tensors by name."""
    if isinstance(Q, Structure):
        tensors = Q.tensors
        return {"Q" if len(tensors) == 1 else f"Q ({name})": x for name, x in tensors.items()}
    if isinstance(Q, torch.Tensor):
        if Q.dim() < 2 or Q.shape[-1] != Q.shape[-2]:
            raise ValueError(
                f"Q: expected square matrices [*batch, d, d], got shape {list(Q.shape)}; "
                "wrap a diagonal in unrolled_kernels.Diagonal"
            )
        return {"Q": Q}
    raise TypeError(f"Q: expected a tensor, Diagonal, Spectral or Tikhonov, got {type(Q).__name__}")


def check_tensors(tensors):
    """``{name: tensor}`` share one supported dtype and one device."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.layout is not torch.strided:
            _refuse_sparse(name, x)
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: expected dtype float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != first.dtype:
            raise ValueError(f"dtype: {first_name} has {first.dtype} but {name} has {x.dtype}; convert one of them")
        if x.device != first.device:
            raise ValueError(f"device: {first_name} is on {first.device} but {name} is on {x.device}; move one of them")


def _refuse_sparse(name, x):
    raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}; take {name}.to_dense()")


def check_weights(weights):
    """``(W1, W2, [W^2 … W^L], V)`` whose shapes chain; returns the matrices in this order."""
    try:
        W1, W2, inner, V = weights
        matrices = (W1, W2, *inner, V)
    except (TypeError, ValueError):
        raise TypeError(f"weights: expected (W1, W2, [W^2 … W^L], V), got {type(weights).__name__}") from None
    for i, W in enumerate(matrices):
        if not isinstance(W, torch.Tensor) or W.dim() != 2:
            got = f"shape {list(W.shape)}" if isinstance(W, torch.Tensor) else type(W).__name__
            raise ValueError(f"weights: expected a matrix for {_weight_name(i, matrices)}, got {got}")
    width, d = W1.shape
    for i, W in enumerate(matrices):
        rows = width if i < 2 else d if i == len(matrices) - 1 else W.shape[0]
        columns = d if i < 2 else width
        if W.shape != (rows, columns):
            raise ValueError(
                f"weights: expected shape {[rows, columns]} for {_weight_name(i, matrices)}, which follows W1 of shape "
                f"{list(W1.shape)} in the chain W1, W2 [h_1, d], W^l [h_l, h_(l-1)], V [d, h_L]; got {list(W.shape)}"
            )
        width = rows
    return matrices


def check_weight_tensors(matrices, d, b):
    """The matrices of ``check_weights`` fit a state of size d, and b in dtype (or its compute dtype) and device."""
    if matrices[-1].shape[0] != d:
        raise ValueError(
            f"weights: expected W1, W2 [h_1, d] and V [d, h_L] with d = {d} to fit b of shape {list(b.shape)}, got "
            f"d = {matrices[-1].shape[0]}"
        )
    dtypes, device = (b.dtype, torch.promote_types(b.dtype, torch.float32)), b.device
    for i, W in enumerate(matrices):
        if W.layout is not torch.strided:
            _refuse_sparse(f"{_weight_name(i, matrices)} of weights", W)
        if W.dtype not in dtypes:
            name = _weight_name(i, matrices)
            raise ValueError(f"dtype: b has {b.dtype} but {name} of weights has {W.dtype}; convert one of them")
        if W.device != device:
            name = _weight_name(i, matrices)
            raise ValueError(f"device: b is on {device} but {name} of weights is on {W.device}; move one of them")


def _weight_name(i, matrices):
    return ("W1", "W2", *(f"W^{i}" for i in range(2, len(matrices) - 1)), "V")[i]


def check_tolerance(tolerance, backward_steps):
    """None, or a float >= 0."""
    if tolerance is None:
        return
    if isinstance(tolerance, bool) or not isinstance(tolerance, numbers.Real):
        raise TypeError(f"tolerance: expected a float >= 0 or None, got {tolerance!r} ({type(tolerance).__name__})")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected a float >= 0 or None, got {tolerance}")
    if backward_steps is not None:
        raise ValueError(
            f"backward_steps: expected None beside tolerance={tolerance}, where samples end at different steps, got "
            f"{backward_steps!r}"
        )


def check_backward(backward, backward_steps):
    """Which gradients are asked for: all steps', the last ``backward_steps``', or those of the minimizer."""
    if backward == "unrolled":
        if backward_steps is None:
            return
        if isinstance(backward_steps, (bool, torch.Tensor)) or not hasattr(backward_steps, "__index__"):
            raise TypeError(
                f"backward_steps: expected an int >= 1 or None, got {backward_steps!r} "
                f"({type(backward_steps).__name__})"
            )
        if operator.index(backward_steps) < 1:
            raise ValueError(f"backward_steps: expected an int >= 1 or None, got {backward_steps}")
    elif backward != "implicit":
        raise ValueError(f"backward: expected 'unrolled' or 'implicit', got {backward!r}")
    elif backward_steps is not None:
        raise ValueError(
            f"backward_steps: backward='implicit' differentiates no steps, got {backward_steps!r}; drop one of them"
        )


def check_flag(name, value):
    """A bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def check_broadcast(name, shape, target, target_name):
    """``shape`` broadcasts to ``target``."""
    padded = (1,) * (len(target) - len(shape)) + tuple(shape)
    if len(padded) > len(target) or any(p not in (1, t) for p, t in zip(padded, target, strict=False)):
        raise ValueError(f"{name}: shape {list(shape)} does not broadcast to {target_name} = {list(target)}")


def check_positive(name, value):
    """A number above zero; the values of tensors are not read (that would wait for the device)."""
    if not isinstance(value, torch.Tensor) and value <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")


def check_not_negative(name, value):
    """A number of zero or more; the values of tensors are not read (that would wait for the device)."""
    if isinstance(value, (int, float)) and not value >= 0:
        raise ValueError(f"{name}: expected a number >= 0, got {value}")


def check_not_nan(name, value):
    """A number that is one; the values of tensors are not read."""
    if isinstance(value, float) and value != value:
        raise ValueError(f"{name}: expected a number, got nan")


def check_number(name, value):
    """A float, a real number of NumPy or another library, or a floating-point tensor."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a float or a floating-point tensor, got a tensor of dtype {value.dtype}")
        if value.layout is not torch.strided:
            _refuse_sparse(name, value)
    elif isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: expected a float or a floating-point tensor, got {value!r} ({type(value).__name__})")
