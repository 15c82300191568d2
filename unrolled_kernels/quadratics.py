"""The structures of Q in the energy 1/2 yᵀQy + bᵀy: a plain tensor is dense; the classes here are not."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from unrolled_kernels._torch_private import (
    collate_functions,
    forward_mode_is_active,
    pytree,
    transforms_are_active,
)


def same_shape(shape, other):
    """Whether two shapes are equal; where their lengths differ no size is read, which would guard a symbolic one."""
    return len(shape) == len(other) and shape == other


class Structure:
    """What the structures share: they are handled as tensors are.

    ``map``, ``to`` and its relatives, ``detach``, ``clone``, ``pin_memory`` and indexing return a new structure. Shapes
    are those of the matrices, ``[*batch, d, d]``; ``len``, iteration and indexing go over the batch.
    """

    # the dimensions of each tensor that are not batch dimensions, by its name
    _own_dims: ClassVar[dict[str, int]]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by the names of the arguments."""
        return {name: getattr(self, name) for name in self._own_dims}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The structure of ``function`` of each tensor; shapes are not checked anew."""
        return _unflatten(type(self), [function(x) for x in self.tensors.values()])

    @property
    def state_shape(self) -> torch.Size:
        """``[*batch, d]``, that of the b and y that go with it.

        Raises:
            ValueError: the tensors do not broadcast against each other.
        """
        shapes = [
            x.shape[: x.dim() + 1 - own] for x, own in zip(self.tensors.values(), self._own_dims.values(), strict=True)
        ]
        if all(same_shape(shape, shapes[0]) for shape in shapes):
            return shapes[0]
        try:
            return torch.broadcast_shapes(*shapes)
        except RuntimeError:
            raise ValueError(f"Q: the tensors do not broadcast against each other: {self.describe()}") from None

    @property
    def operands(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Matrix, diagonal and what was observed, as the ops take them (``unrolled_kernels.ops.momentum``)."""
        raise NotImplementedError

    def describe(self) -> str:
        """The class and the shapes, for messages."""
        shapes = [str(list(x.shape)) for x in self.tensors.values()]
        return f"{type(self).__name__} of shape{'s' * (len(shapes) > 1)} {' and '.join(shapes)}"

    @property
    def shape(self) -> torch.Size:
        """``[*batch, d, d]``, that of ``to_dense()``."""
        shape = self.state_shape
        return torch.Size((*shape, shape[-1]))

    def size(self, dim: int | None = None) -> torch.Size | int:
        """``shape``, or its entry ``dim``."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """The number of dimensions of ``to_dense()``."""
        return len(self.shape)

    @property
    def ndim(self) -> int:
        """``dim()``."""
        return self.dim()

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor; a call refuses others beside it."""
        return next(iter(self.tensors.values())).dtype

    @property
    def device(self) -> torch.device:
        """Of the first tensor; a call refuses others beside it."""
        return next(iter(self.tensors.values())).device

    @property
    def requires_grad(self) -> bool:
        """Whether any of the tensors does."""
        return any(x.requires_grad for x in self.tensors.values())

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set ``requires_grad`` of every tensor, in place."""
        for x in self.tensors.values():
            x.requires_grad_(requires_grad)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """``Tensor.to`` of every tensor."""
        return self.map(lambda x: x.to(*args, **kwargs))

    def cpu(self) -> Self:
        """On the CPU."""
        return self.to("cpu")

    def cuda(self) -> Self:
        """On the current CUDA device."""
        return self.to("cuda")

    def float(self) -> Self:
        """In float32."""
        return self.to(torch.float32)

    def double(self) -> Self:
        """In float64."""
        return self.to(torch.float64)

    def half(self) -> Self:
        """In float16."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """In bfloat16."""
        return self.to(torch.bfloat16)

    def detach(self) -> Self:
        """Without the graph behind it, in the same memory."""
        return self.map(torch.Tensor.detach)

    def clone(self) -> Self:
        """In memory of its own."""
        return self.map(torch.clone)

    def pin_memory(self) -> Self:
        """In pinned memory, as a ``DataLoader`` asks for."""
        return self.map(torch.Tensor.pin_memory)

    def is_pinned(self) -> bool:
        """Whether every tensor is in pinned memory."""
        return all(x.is_pinned() for x in self.tensors.values())

    def __len__(self) -> int:
        batch = self.state_shape[:-1]
        if not batch:
            raise TypeError(f"Q: a structure without a batch has no len and no samples: {self.describe()}")
        return batch[0]

    def __bool__(self) -> bool:
        # a len of 0 is an empty batch, not the absence of a Q
        return True

    def __iter__(self) -> Iterator[Self]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: Any) -> Self:
        """The samples that ``index`` picks, as it would from a tensor ``[*batch]``; what all of them share stays so."""
        batch = self.state_shape[:-1]
        index = index if isinstance(index, tuple) else (index,)
        _ = torch.empty((), device=self.device).expand(batch)[index]  # IndexError where it does not fit the batch
        around = any(i is Ellipsis for i in index)

        def pick(x, own_dims):
            leading, own = x.shape[: x.dim() - own_dims], x.shape[x.dim() - own_dims :]
            if not same_shape(leading, batch) and math.prod(leading) == 1:
                return x.reshape(own)
            return x.expand(*batch, *own)[(*index, *([slice(None)] * own_dims if around else [Ellipsis]))]

        return _unflatten(type(self), list(map(pick, self.tensors.values(), self._own_dims.values())))


@dataclass(frozen=True, eq=False)
class Diagonal(Structure):
    """Q = diag(q).

    Args:
        q: ``[*batch, d]``, any number of dimensions (an image too), floating point.
    Raises:
        TypeError: q is not a floating-point tensor.
        ValueError: q is a scalar.
    """

    q: torch.Tensor

    _own_dims: ClassVar[dict[str, int]] = {"q": 1}

    def __post_init__(self) -> None:
        if _check_floating("q", self.q) and self.q.dim() < 1:
            raise ValueError("q: expected at least one dimension [*batch, d], got a scalar tensor")

    @property
    def operands(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Matrix, diagonal and what was observed, as the ops take them."""
        return None, self.q, None

    def matvec(self, y: torch.Tensor) -> torch.Tensor:
        """Q y for y broadcastable with ``[*batch, d]``."""
        return self.q * y

    def solve(self, y: torch.Tensor) -> torch.Tensor:
        """Q⁻¹ y for y broadcastable with ``[*batch, d]``."""
        return y / self.q

    def to_dense(self) -> torch.Tensor:
        """Q as a ``[*batch, d, d]`` tensor."""
        return torch.diag_embed(self.q)

    def spectrum_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and the largest eigenvalue of each sample's Q, two tensors ``[*batch]``."""
        return self.q.amin(-1), self.q.amax(-1)


@dataclass(frozen=True, eq=False)
class Spectral(Structure):
    """Q = R diag(λ) Rᵀ with orthogonal R.

    The recurrence runs in the eigenbasis: two products with R in all, whatever the number of steps. R is taken to be
    orthogonal and not checked; gradients are those of y_t = R ŷ_t(λ, Rᵀb, Rᵀy_0).

    Args:
        eigenvalues: λ, ``[*batch, d]``.
        eigenvectors: R, ``[*batch, d, d]``, one eigenvector a column.
    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes do not fit together; the message names both.
    """

    eigenvalues: torch.Tensor
    eigenvectors: torch.Tensor

    _own_dims: ClassVar[dict[str, int]] = {"eigenvalues": 1, "eigenvectors": 2}

    def __post_init__(self) -> None:
        if not all(_check_floating(name, x) for name, x in self.tensors.items()):
            return
        values, vectors = self.eigenvalues.shape, self.eigenvectors.shape
        if len(values) < 1 or len(vectors) < 2 or not vectors[-1] == vectors[-2] == values[-1]:
            raise ValueError(
                f"eigenvectors: expected [*batch, d, d] beside eigenvalues [*batch, d] of shape {list(values)}, "
                f"got shape {list(vectors)}"
            )

    @property
    def operands(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Matrix, diagonal and what was observed, as the ops take them."""
        return self.eigenvectors, self.eigenvalues, None

    def matvec(self, y: torch.Tensor) -> torch.Tensor:
        """Q y for y ``[*batch, d]``."""
        return _rotate(self.eigenvectors, self.eigenvalues * _rotate(self.eigenvectors.mT, y))

    def solve(self, y: torch.Tensor) -> torch.Tensor:
        """Q⁻¹ y for y ``[*batch, d]``."""
        return _rotate(self.eigenvectors, _rotate(self.eigenvectors.mT, y) / self.eigenvalues)

    def to_dense(self) -> torch.Tensor:
        """Q as a ``[*batch, d, d]`` tensor."""
        return (self.eigenvectors * self.eigenvalues.unsqueeze(-2)) @ self.eigenvectors.mT

    def spectrum_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and the largest eigenvalue of each sample's Q, two tensors ``[*batch]``."""
        return self.eigenvalues.amin(-1), self.eigenvalues.amax(-1)


@dataclass(frozen=True, eq=False)
class Tikhonov(Structure):
    """The energy 1/2 ‖y - x‖² + 1/2 ‖f y‖² of a denoiser (paper, Sec. 7.2): Q = diag(1 + f²), and b - x for b.

    With b = g it is 1/2 ‖y + g - x‖² + 1/2 ‖f y‖² up to a constant. The kernels take f, x and b as they are: neither
    1 + f² nor b - x is ever written to memory. 1 + f² must be finite in the dtype that is computed in, float32 or
    float64, as that of any matrix must.

    Args:
        f: weights of the regulariser, ``[*batch, d]``, any number of dimensions (an image too), floating point.
        x: what was observed, broadcastable with f: one f may serve many x.
    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: f is a scalar.
    """

    f: torch.Tensor
    x: torch.Tensor

    _own_dims: ClassVar[dict[str, int]] = {"f": 1, "x": 1}

    def __post_init__(self) -> None:
        if all(_check_floating(name, x) for name, x in self.tensors.items()) and self.f.dim() < 1:
            raise ValueError("f: expected at least one dimension [*batch, d], got a scalar tensor")

    def as_diagonal(self, b: torch.Tensor) -> tuple[Diagonal, torch.Tensor]:
        """The same energy as a ``Diagonal`` and its linear term."""
        return Diagonal(1 + self.f * self.f), b - self.x

    @property
    def operands(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Matrix, diagonal and what was observed, as the ops take them."""
        return None, self.f, self.x

    def matvec(self, y: torch.Tensor) -> torch.Tensor:
        """Q y for y broadcastable with ``[*batch, d]``."""
        return (1 + self.f * self.f) * y

    def solve(self, y: torch.Tensor) -> torch.Tensor:
        """Q⁻¹ y for y broadcastable with ``[*batch, d]``."""
        return y / (1 + self.f * self.f)

    def to_dense(self) -> torch.Tensor:
        """Q as a ``[*batch, d, d]`` tensor."""
        return torch.diag_embed(1 + self.f * self.f)

    def spectrum_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and the largest eigenvalue of each sample's Q, two tensors ``[*batch]``."""
        q = 1 + self.f * self.f
        return q.amin(-1), q.amax(-1)


def once(Q):
    """What broadcasts to a Q of stride 0 in the batch without the samples that repeat others.

    Q as it is where each of them may have a derivative of its own, and where a program is traced, which takes a Q that
    repeats nothing too.
    """
    if isinstance(Q, Structure):
        return _unflatten(
            type(Q), [_once(x, own) for x, own in zip(Q.tensors.values(), Q._own_dims.values(), strict=True)]
        )
    return _once(Q, 2)


def _once(x, own_dims):
    traced = type(x) is not torch.Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()
    if x.requires_grad or traced or transforms_are_active() or forward_mode_is_active():
        return x
    for dim in range(x.dim() - own_dims):
        if x.stride(dim) == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


# what μ is held above where it is taken from a Q that is not positive definite
SMALLEST_MU = 1e-6


def smallest_eigenvalue(Q):
    """μ of each sample's Q or its symmetric part, detached and not below ``SMALLEST_MU``; broadcasts to the batch."""
    *batch, _, d = Q.shape
    if d == 0:
        return torch.full(batch, SMALLEST_MU, dtype=Q.dtype, device=Q.device)
    if isinstance(Q, torch.Tensor):
        work = once(Q.detach()).to(torch.promote_types(Q.dtype, torch.float32))
        mu = torch.linalg.eigvalsh((work + work.mT) / 2)[..., 0]
    else:
        mu = Q.spectrum_bounds()[0].detach()
    return mu.clamp(min=SMALLEST_MU)


def _rotate(matrix, y):
    return (matrix @ y.unsqueeze(-1)).squeeze(-1)


def _check_floating(name, x):
    """Whether x is a tensor whose shape can be checked: while torch.fx traces it is a stand-in."""
    if isinstance(x, torch.fx.Proxy):
        return False
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = f"a tensor of dtype {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
    return True


def _unflatten(cls, children):
    # torch.export and torch.func fill structures with things that are not tensors: no checks here
    instance = object.__new__(cls)
    for field, child in zip(cls._own_dims, children, strict=True):
        object.__setattr__(instance, field, child)
    return instance


for _cls in (Diagonal, Spectral, Tikhonov):
    pytree.register_pytree_node(
        _cls,
        lambda x: (list(x.tensors.values()), None),
        lambda children, _, cls=_cls: _unflatten(cls, children),  # type: ignore[misc]
        serialized_type_name=f"unrolled_kernels.{_cls.__name__}",
        # torch.export names the inputs by these
        flatten_with_keys_fn=lambda x: (
            [(pytree.GetAttrKey(field), tensor) for field, tensor in x.tensors.items()],
            None,
        ),
    )
    # tensors and their names: torch.load(weights_only=True) may make one
    torch.serialization.add_safe_globals([_cls])


def _collate(samples, *, collate_fn_map):
    """Samples as a batch, each of their tensors stacked as torch stacks tensors."""
    stack = collate_fn_map[torch.Tensor]
    columns = zip(*(x.tensors.values() for x in samples), strict=True)
    return _unflatten(type(samples[0]), [stack(column, collate_fn_map=collate_fn_map) for column in columns])


collate_functions[Structure] = _collate
