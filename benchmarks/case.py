"""What a benchmark case is: one op at one shape, its inputs, the fewest bytes and flops it can take, and its peers."""

import dataclasses
from typing import ClassVar

import torch

MODES = ("forward", "backward", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of one op. What a case of an op adds is below the fields."""

    structure: str
    B: int
    d: int
    k: int
    dtype: torch.dtype = dataclasses.field(default=torch.float32, kw_only=True)

    op: ClassVar[str]
    # how many of the leaves, the last ones, y stops depending on after many steps
    vanishing: ClassVar[int] = 0
    # whether y has kinks in its leaves, see ``suite.check``
    kinked: ClassVar[bool] = False
    # peers that would take minutes
    unreasonable: ClassVar[tuple] = ()

    @property
    def method(self):
        """The column ``method`` of the results."""
        raise NotImplementedError

    @property
    def id(self):
        return f"{self.structure}-{self.method}-B{self.B}-d{self.d}-k{self.k}-{str(self.dtype)[6:]}".replace(" ", "-")

    def inputs(self, device, seed=0):
        """``(leaves, cotangent)``: tensors that require a gradient, and y's cotangent."""
        raise NotImplementedError

    def function(self, backend):
        """The public function as a function of the leaves."""
        raise NotImplementedError

    def jax_function(self):
        """The same function in JAX."""
        raise NotImplementedError

    def library_functions(self):
        """``{peer: function of the leaves}`` of what libraries offer for it."""
        return {}

    def floors(self):
        """``((bytes, flops), (bytes, flops))`` of a forward and of a backward that keeps nothing but the inputs.

        Bytes: every operand is read and every result written once. Flops: those of the recurrence in the fewest
        multiply-adds it can be written with, from y0 = 0, with the gradient of every leaf.
        """
        raise NotImplementedError

    def floor(self, mode):
        """Fewest bytes and flops of a call in one of ``MODES``."""
        forward, backward = self.floors()
        both = tuple(f + b for f, b in zip(forward, backward, strict=True))
        return {"forward": forward, "backward": backward, "forward+backward": both}[mode]

    def with_steps(self, k):
        """The same case with another number of steps."""
        return dataclasses.replace(self, k=k)
