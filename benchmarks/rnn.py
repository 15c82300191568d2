"""Speed of the RNN op through the public interface against every peer.

    python -m benchmarks.rnn [--device cpu|cuda] [--only TEXT] [--modes …] [--peers …] [--record | --out FILE]

Floors (B samples, s bytes an element, P = 2 d h_1 + Σ h_l h_(l-1) + h_L d weights; forward, then backward, which
replays the cells and forms each product's two adjoints):
dense      B (d² + 2d)s + Ps    2Bk(d² + P)        B (2d² + 3d)s + 2Ps    6Bk(d² + P)
diagonal   3Bds + Ps            2Bk(d + P)         5Bds + 2Ps             6Bk(d + P)
"""

import dataclasses

import torch

import unrolled_kernels.functional as F
from benchmarks import suite
from unrolled_kernels.ops.rnn.reference import weight_shapes
from unrolled_kernels.testing import random_quadratic


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of one structure, with Glorot-uniform weights of the widths ``hidden_dims``."""

    structure: str
    hidden_dims: tuple
    B: int
    d: int
    k: int
    dtype: torch.dtype = torch.float32

    op = "rnn"
    # every leaf keeps its influence on y
    vanishing = 0
    unreasonable = ()

    @property
    def method(self):
        return "rnn " + "-".join(map(str, self.hidden_dims))

    @property
    def id(self):
        widths = "-".join(map(str, self.hidden_dims))
        return f"{self.structure}-B{self.B}-d{self.d}-k{self.k}-h{widths}-{str(self.dtype)[6:]}"

    def with_steps(self, k):
        return dataclasses.replace(self, k=k)

    def inputs(self, device, seed=0):
        """``(leaves, cotangent)``; the leaves are Q, b, W1, W2, W^2 … W^L, V."""
        leaves, _, b = random_quadratic(self.structure, (self.B,), self.d, dtype=self.dtype, device=device, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        uniform = lambda rows, columns: torch.nn.init.xavier_uniform_(torch.empty(rows, columns), generator=generator)
        weights = [uniform(*shape).to(b) for shape in weight_shapes(self.hidden_dims, self.d)]
        cotangent = torch.randn(b.shape, generator=generator).to(b)
        return [x.requires_grad_() for x in (*leaves, b, *weights)], cotangent

    def function(self, backend):
        """The cells as a function of the leaves."""
        make_Q = random_quadratic(self.structure, (1,), 2)[1]
        return lambda Q, b, W1, W2, *rest: F.rnn(make_Q(Q), b, (W1, W2, rest[:-1], rest[-1]), self.k, backend=backend)

    def floor(self, mode):
        """Fewest bytes and flops of a call."""
        s, B, d = self.dtype.itemsize, self.B, self.d
        weights = sum(rows * columns for rows, columns in weight_shapes(self.hidden_dims, d))
        matrix = d * d if self.structure == "dense" else d
        flops = 2 * B * self.k * (matrix + weights)
        forward = (B * (matrix + 2 * d) + weights) * s, flops
        backward = (B * (2 * matrix + 3 * d) + 2 * weights) * s, 3 * flops
        both = tuple(f + b for f, b in zip(forward, backward, strict=True))
        return {"forward": forward, "backward": backward, "forward+backward": both}[mode]

    def library_functions(self):
        """No library has this cell."""
        return {}

    def jax_function(self):
        """A ``lax.scan`` over the cells."""
        import jax
        import jax.numpy as jnp

        def run(Q, b, W1, W2, *rest):
            *inner, V = rest
            apply_Q = (lambda y: jnp.einsum("bij,bj->bi", Q, y)) if self.structure == "dense" else lambda y: Q * y

            def cell(y, _):
                h = jax.nn.relu(y @ W1.T + (apply_Q(y) + b) @ W2.T)
                for W in inner:
                    h = jax.nn.relu(h @ W.T)
                return h @ V.T, None

            return jax.lax.scan(cell, jnp.zeros_like(b), None, length=self.k)[0]

        return run


PAPER = (20, 20, 20)
SHAPES = [
    ("dense", PAPER, 50, 5, 10),
    ("dense", (10, 20, 20), 1000, 5, 20),
    ("dense", PAPER, 10000, 5, 10),
    ("dense", (64, 64), 1024, 32, 10),
    ("dense", (128, 128), 256, 64, 10),
    ("diagonal", (32, 32), 10000, 16, 10),
]


def cases(device):
    """The shapes that the README speaks of; on a GPU with batches that fill it."""
    scale = 16 if device == "cuda" else 1
    return [
        Case(structure, hidden_dims, B * scale if B > 50 else B, d, k) for structure, hidden_dims, B, d, k in SHAPES
    ]


if __name__ == "__main__":
    suite.main(cases, __doc__.splitlines()[0], "rnn")
