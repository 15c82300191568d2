"""The structures of Q in the energy 1/2 yᵀQy + bᵀy: a plain tensor is dense; the classes here are not."""

from dataclasses import dataclass

import torch

from unrolled_kernels._torch_private import pytree


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Q = diag(q).

    Args:
        q: ``[*batch, d]``, any number of dimensions (an image too), floating point.
    Raises:
        TypeError: q is not a floating-point tensor.
        ValueError: q is a scalar.
    """

    q: torch.Tensor

    def __post_init__(self) -> None:
        _check_floating("q", self.q)
        if self.q.dim() < 1:
            raise ValueError("q: expected at least one dimension [*batch, d], got a scalar tensor")

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
class Spectral:
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

    def __post_init__(self) -> None:
        _check_floating("eigenvalues", self.eigenvalues)
        _check_floating("eigenvectors", self.eigenvectors)
        values, vectors = self.eigenvalues.shape, self.eigenvectors.shape
        if len(values) < 1 or len(vectors) < 2 or not vectors[-1] == vectors[-2] == values[-1]:
            raise ValueError(
                f"eigenvectors: expected [*batch, d, d] beside eigenvalues [*batch, d] of shape {list(values)}, "
                f"got shape {list(vectors)}"
            )

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
class Tikhonov:
    """The energy 1/2 ‖y - x‖² + 1/2 ‖f y‖² of a denoiser (paper, Sec. 7.2): Q = diag(1 + f²), and b - x for b.

    With b = g it is 1/2 ‖y + g - x‖² + 1/2 ‖f y‖² up to a constant. The kernels take f, x and b as they are: neither
    1 + f² nor b - x is ever written to memory.

    Args:
        f: weights of the regulariser, ``[*batch, d]``, any number of dimensions (an image too), floating point.
        x: what was observed, broadcastable to the shape of f.
    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: f is a scalar.
    """

    f: torch.Tensor
    x: torch.Tensor

    def __post_init__(self) -> None:
        _check_floating("f", self.f)
        _check_floating("x", self.x)
        if self.f.dim() < 1:
            raise ValueError("f: expected at least one dimension [*batch, d], got a scalar tensor")

    def as_diagonal(self, b: torch.Tensor) -> tuple[Diagonal, torch.Tensor]:
        """The same energy as a ``Diagonal`` and its linear term."""
        return Diagonal(1 + self.f * self.f), b - self.x

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


def smallest_eigenvalue(Q):
    """μ of each sample's Q, ``[*batch]``, detached."""
    if isinstance(Q, torch.Tensor):
        work = Q.detach().to(torch.promote_types(Q.dtype, torch.float32))
        return torch.linalg.eigvalsh(work)[..., 0]
    return Q.spectrum_bounds()[0].detach()


def _rotate(matrix, y):
    return (matrix @ y.unsqueeze(-1)).squeeze(-1)


def _check_floating(name, x):
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = f"a tensor of dtype {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {got}")


def _unflatten(cls, children):
    # torch.export and torch.func fill structures with things that are not tensors: no checks here
    instance = object.__new__(cls)
    for field, child in zip(cls.__dataclass_fields__, children, strict=True):
        object.__setattr__(instance, field, child)
    return instance


for _cls in (Diagonal, Spectral, Tikhonov):
    pytree.register_pytree_node(
        _cls,
        lambda x: ([getattr(x, field) for field in x.__dataclass_fields__], None),
        lambda children, _, cls=_cls: _unflatten(cls, children),  # type: ignore[misc]
        serialized_type_name=f"unrolled_kernels.{_cls.__name__}",
        # torch.export names the inputs by these
        flatten_with_keys_fn=lambda x: (
            [(pytree.GetAttrKey(field), getattr(x, field)) for field in x.__dataclass_fields__],
            None,
        ),
    )
