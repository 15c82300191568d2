"""What this package takes of torch beyond its documented interface, each with its reason.

``python_tests/test_torch_private.py`` asserts of every one that it is there and does what it is used for, so that a
torch that changes it breaks this file and no other.
"""

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.data._utils import collate

__all__ = [
    "below_autograd",
    "collate_functions",
    "constant_of_the_graph",
    "forward_mode_is_active",
    "ignore_tensor_subclasses",
    "launcher",
    "pytree",
    "transforms_are_active",
    "unwrap_if_dead",
]

# Inside a Function there is nothing for autograd to do: a registered op's autograd, which is Python, costs as much as
# a small kernel.
below_autograd = torch._C._AutoDispatchBelowAutograd

# whether a transform of torch.func is at work
transforms_are_active = torch._C._are_functorch_transforms_active


def forward_mode_is_active():
    """Whether tangents may be travelling along: within torch.func.jvp, jacfwd, linearize or a dual level."""
    return forward_ad._current_level >= 0


# What a transform of torch.func that has ended wrapped a tensor in, taken off. torch's own functions do so by
# themselves; an autograd Function would be recorded for the wrapper, whose graph nobody sees.
unwrap_if_dead = torch._C._functorch.unwrap_if_dead

# how a DataLoader makes a batch of samples, by their type
collate_functions = collate.default_collate_fn_map

# within it the __torch_function__ of tensor subclasses is not asked
ignore_tensor_subclasses = torch._C.DisableTorchFunctionSubclass


def launcher(function):
    """``function.apply`` of an autograd Function, for calls where no transform of torch.func is active.

    Function.apply binds default arguments through inspect, several times the cost of a small launch; ours have none.
    The apply of its base is what it ends up calling.
    """
    return super(torch.autograd.Function, function).apply


def constant_of_the_graph(function):
    """Have torch.compile take what ``function`` returns as a constant, guarded on its arguments.

    This is ``torch.compiler.assume_constant_result`` without its import of the compiler, and with that of triton.
    """
    function._dynamo_marked_constant = True
    return function
