"""Speed of the RNN op through the public interface against every peer.

python -m benchmarks.rnn [--device cpu|cuda] [--only TEXT] [--modes …] [--peers …] [--record | --out FILE]
"""

import dataclasses

import torch

import unrolled_kernels.functional as F
from benchmarks import suite
from benchmarks.case import Case
from unrolled_kernels.ops.rnn.reference import weight_shapes
from unrolled_kernels.testing import STRUCTURES, random_quadratic


@dataclasses.dataclass(frozen=True)
class RNN(Case):
    """One structure of Q, with Glorot-uniform weights of the widths ``hidden_dims``."""

    hidden_dims: tuple = (20, 20, 20)

    op = "rnn"

    @property
    def method(self):
        return "rnn " + "-".join(map(str, self.hidden_dims))

    def inputs(self, device, seed=0):
        """The leaves are Q, b, W1, W2, W^2 … W^L, V."""
        leaves, _, b = random_quadratic(self.structure, (self.B,), self.d, dtype=self.dtype, device=device, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        uniform = lambda rows, columns: torch.nn.init.xavier_uniform_(torch.empty(rows, columns), generator=generator)
        weights = [uniform(*shape).to(b) for shape in weight_shapes(self.hidden_dims, self.d)]
        cotangent = torch.randn(b.shape, generator=generator).to(b)
        return [x.detach().requires_grad_() for x in (*leaves, b, *weights)], cotangent

    def function(self, backend):
        make_Q = STRUCTURES[self.structure]
        return lambda Q, b, W1, W2, *rest: F.rnn(make_Q(Q), b, (W1, W2, rest[:-1], rest[-1]), self.k, backend=backend)

    def floors(self):
        s, B, d, k = self.dtype.itemsize, self.B, self.d, self.k
        weights = sum(rows * columns for rows, columns in weight_shapes(self.hidden_dims, d))
        matrix = d * d if self.structure == "dense" else d
        # what is multiplied with y: of the first step, nothing, because y is zero
        with_y = matrix + d * self.hidden_dims[0]
        steps = max(k * (matrix + weights) - with_y, 0)
        # each product forms two adjoints, and is replayed but for the last step's V
        replayed = max(steps - self.hidden_dims[-1] * d, 0)
        return (
            ((B * (matrix + 2 * d) + weights) * s, 2 * B * steps),
            ((B * (2 * matrix + 3 * d) + 2 * weights) * s, 2 * B * (2 * steps + replayed)),
        )

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
    ("dense", 50, 5, 10, PAPER),
    ("dense", 1000, 5, 20, (10, 20, 20)),
    ("dense", 10000, 5, 10, PAPER),
    ("dense", 1024, 32, 10, (64, 64)),
    ("dense", 256, 64, 10, (128, 128)),
    ("diagonal", 10000, 16, 10, (32, 32)),
]


def cases(device):
    """The shapes of the tables; on a GPU with batches that fill it."""
    scale = 16 if device == "cuda" else 1
    return [RNN(structure, B * scale if B > 50 else B, *rest) for structure, B, *rest in SHAPES]


if __name__ == "__main__":
    suite.main(cases, __doc__.splitlines()[0], "rnn")
