"""What ``_torch_private`` takes of torch is there, and does what it is used for."""

import pickle
import subprocess
import sys

import torch

from unrolled_kernels import _torch_private as private


class Double(torch.autograd.Function):
    """With a forward and a context of their own, as this package's Functions are."""

    @staticmethod
    def forward(x, factor):
        return factor * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


def test_launcher():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = private.launcher(Double)(x, 3)
    assert torch.equal(y, Double.apply(x, 3))
    y.sum().backward()
    assert x.grad.tolist() == [3, 3]


def test_transforms_are_active():
    seen = []

    def function(x):
        seen.append(private.transforms_are_active())
        return x.sum()

    function(torch.ones(2))
    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacrev):
        transform(function)(torch.ones(2, 2) if transform is torch.func.vmap else torch.ones(2))
    function(torch.ones(2))
    assert seen == [False, True, True, True, False]


def test_unwrap_if_dead():
    kept = []
    x = torch.ones(2)
    torch.func.vjp(lambda x: kept.append(x) or x.sin(), x)
    assert type(kept[0]) is torch.Tensor
    assert torch._C._functorch.is_functorch_wrapped_tensor(kept[0])
    unwrapped = private.unwrap_if_dead(kept[0])
    assert unwrapped.data_ptr() == x.data_ptr()
    assert not torch._C._functorch.is_functorch_wrapped_tensor(unwrapped)
    assert private.unwrap_if_dead(x) is x


def test_forward_mode_is_active():
    seen = []

    def function(x):
        seen.append(private.forward_mode_is_active())
        return x.square().sum()

    x = torch.ones(2)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        transform(function)(x)
    torch.func.jvp(function, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        function(x)
    function(x)
    assert seen == [False, False, True, True, True, True, False]


def test_below_autograd():
    """An op's autograd is not asked, and is again behind the block."""
    called = []
    with torch.library._scoped_library("unrolled_kernels_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
        library.impl("twice", lambda x: (called.append(x), x.detach() * 2)[1], "Autograd")
        op = torch.ops.unrolled_kernels_test.twice.default
        x = torch.ones(2, requires_grad=True)
        with private.below_autograd():
            assert op(x).tolist() == [2, 2]
        assert not called
        op(x)
        assert called


def test_ignore_tensor_subclasses():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            raise AssertionError(function)

    x = torch.ones(2).as_subclass(Loud)
    with private.ignore_tensor_subclasses():
        assert torch.Tensor.sum(x) == 2


@private.constant_of_the_graph
def _twice(n):
    return len(pickle.dumps(n)) * 0 + 2 * n  # what torch.compile cannot look into


def test_constant_of_the_graph():
    """The function is not looked into, and is asked anew when its argument changes."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, n: x * _twice(n), fullgraph=True, backend="eager", dynamic=False)
    assert compiled(torch.ones(1), 3) == 6
    assert compiled(torch.ones(1), 4) == 8
    assert _twice(5) == 10


def test_marking_a_constant_imports_no_compiler():
    code = """
import sys
import unrolled_kernels._backend
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_pytree():
    class Box:
        def __init__(self, content):
            self.content = content

    private.pytree.register_pytree_node(
        Box,
        lambda box: ([box.content], None),
        lambda content, _: Box(*content),
        serialized_type_name="unrolled_kernels.tests.Box",
        flatten_with_keys_fn=lambda box: ([(private.pytree.GetAttrKey("content"), box.content)], None),
    )
    ((path, leaf),), _ = private.pytree.tree_flatten_with_path(Box(3))
    assert (private.pytree.keystr(path), leaf) == (".content", 3)
    assert private.pytree.tree_map(lambda x: x + 1, Box(3)).content == 4


def test_collate_functions():
    class Box:
        pass

    assert torch.Tensor in private.collate_functions
    private.collate_functions[Box] = lambda boxes, *, collate_fn_map: len(boxes)
    try:
        assert torch.utils.data.default_collate([(Box(), 1), (Box(), 2)])[0] == 2
    finally:
        del private.collate_functions[Box]


def test_nothing_private_elsewhere():
    """Every use of ``torch._…`` in the package is in that module."""
    import ast
    from pathlib import Path

    root = Path(private.__file__).parent
    for path in root.rglob("*.py"):
        if path.name == "_torch_private.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = ""
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                name = node.attr
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                name = next(
                    (part for part in [*node.module.split("."), *(a.name for a in node.names)] if part[0] == "_"), ""
                )
            assert not name.startswith("_") or name == "__version__", f"{path}:{node.lineno}: torch.{name}"
