"""Speed of the momentum ops through the public interface against every peer.

    python -m benchmarks.momentum [--device cpu|cuda] [--only TEXT] [--modes …] [--peers …] [--record]

Floors (per sample, s bytes an element; forward, then backward, which replays the iterates):
dense      (d² + 2d)s     2kd²           (2d² + 3d)s    6kd²
diagonal   3ds            4kd            5ds            10kd
tikhonov   4ds            4kd            6ds            10kd            (from f, x and b; + ds for the gradient of x)
spectral   (d² + 3d)s     4d² + 4kd      (d² + 5d)s     4d² + 10kd      (+ d²s and 4d² for the gradient of R)
"""

import dataclasses

import torch

import unrolled_kernels.functional as F
from benchmarks import peers, suite
from unrolled_kernels.testing import random_quadratic


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of one structure under one method; NAG's μ = 0.1 as in the paper's synthetic task."""

    structure: str
    method: str
    B: int
    d: int
    k: int
    dtype: torch.dtype = torch.float32

    op = "momentum"
    # of the leaves, the step size is what y stops depending on
    vanishing = 1

    @property
    def id(self):
        return f"{self.structure}-{self.method}-B{self.B}-d{self.d}-k{self.k}-{str(self.dtype)[6:]}"

    @property
    def unreasonable(self):
        """Peers that would take minutes here: torch.compile's cost doubles with each step of an elementwise loop."""
        return ("compile", "compile-max") if self.structure != "dense" and self.k > 10 else ()

    def with_steps(self, k):
        return dataclasses.replace(self, k=k)

    def inputs(self, device, seed=0):
        """``(leaves, cotangent)``; the leaves are Q's tensors, b and the step size."""
        leaves, _, b = random_quadratic(self.structure, (self.B,), self.d, dtype=self.dtype, device=device, seed=seed)
        step_size = torch.tensor(0.9, device=device)
        cotangent = torch.randn(b.shape, generator=torch.Generator().manual_seed(seed)).to(b)
        return [x.requires_grad_() for x in (*leaves, b, step_size)], cotangent

    def function(self, backend):
        """The layer as a function of the leaves."""
        make_Q = random_quadratic(self.structure, (1,), 2)[1]

        def run(*leaves):
            *operands, b, step_size = leaves
            if self.method == "gd":
                return F.gradient_descent(make_Q(*operands), b, step_size, self.k, backend=backend)
            return F.nesterov(make_Q(*operands), b, step_size, 0.1, self.k, backend=backend)

        return run

    def floor(self, mode):
        """Fewest bytes and flops of a call."""
        s, B, d, k = self.dtype.itemsize, self.B, self.d, self.k
        square, steps = d * d, k * d
        forward, backward = {
            "dense": (((square + 2 * d) * s, 2 * k * square), ((2 * square + 3 * d) * s, 6 * k * square)),
            "diagonal": ((3 * d * s, 4 * steps), (5 * d * s, 10 * steps)),
            "tikhonov": ((4 * d * s, 4 * steps), (6 * d * s, 10 * steps)),
            "spectral": (
                ((square + 3 * d) * s, 4 * square + 4 * steps),
                ((2 * square + 5 * d) * s, 8 * square + 10 * steps),
            ),
        }[self.structure]
        both = tuple(f + b for f, b in zip(forward, backward, strict=True))
        return tuple(B * x for x in {"forward": forward, "backward": backward, "forward+backward": both}[mode])

    def library_functions(self):
        """The exact minimizer, which the iterates converge to, by ``torch.linalg.solve``; unrolled GD of deepinv."""
        if self.structure == "dense":
            return {"solve": lambda Q, b, step_size: F.minimize(Q, b)}
        if self.structure == "tikhonov" and self.method == "gd" and not peers.missing("deepinv", "any"):
            return {"deepinv": lambda f, x, b, step_size: _deepinv_gradient_descent(f, x - b, step_size, self.k)}
        return {}

    def jax_function(self):
        """A ``lax.scan`` over the steps."""
        import jax
        import jax.numpy as jnp

        def run(*leaves):
            *operands, b, step_size = leaves
            if self.structure == "spectral":
                eigenvalues, R = operands
                b = jnp.einsum("bij,bi->bj", R, b)
                apply_Q = lambda z: eigenvalues * z
            elif self.structure == "diagonal":
                apply_Q = lambda z: operands[0] * z
            elif self.structure == "tikhonov":
                b = b - operands[1]
                apply_Q = lambda z: (1 + operands[0] ** 2) * z
            else:
                apply_Q = lambda z: jnp.einsum("bij,bj->bi", operands[0], z)
            root = jnp.sqrt(0.1 * step_size)
            beta = (1 - root) / (1 + root)

            def body(state, _):
                y, previous = state
                z = y if self.method == "gd" else y + beta * (y - previous)
                return (z - step_size * (apply_Q(z) + b), y), None

            y = jax.lax.scan(body, (jnp.zeros_like(b), jnp.zeros_like(b)), None, length=self.k)[0][0]
            return jnp.einsum("bij,bj->bi", R, y) if self.structure == "spectral" else y

        return run


def _deepinv_gradient_descent(f, measured, step_size, num_steps):
    """Unrolled gradient descent on 1/2 ‖y - measured‖² + 1/2 ‖f y‖² as deepinv offers it, from zero."""
    from deepinv.optim import GD, L2, Prior
    from deepinv.physics import Denoising

    class Weighted(Prior):
        # not an "explicit" prior, which has a value too: the cost of every iterate is not part of the job
        def grad(self, y, *args, **kwargs):
            return f * f * y

    start = torch.zeros_like(measured)
    model = GD(
        data_fidelity=L2(),
        prior=Weighted(),
        stepsize=[step_size],
        max_iter=num_steps,
        unfold=True,
        trainable_params=[],
        custom_init=lambda y, physics: {"est": (start, start), "cost": None},
    )
    return model(measured, Denoising())


SMALL = [(50, 5, 30), (1000, 5, 30), (10000, 5, 30)]
CPU_SHAPES = {
    "dense": [*SMALL, (1024, 16, 20), (1024, 32, 20), (256, 64, 20), (64, 128, 20)],
    "diagonal": [(1, 518_400, 12)],
    # 16 images of 180 x 180, GD^12: the layer of the paper's denoiser
    "tikhonov": [(1, 518_400, 12)],
    "spectral": [(10000, 5, 30), (1024, 32, 20)],
}
# 1 GiB of Q (diagonal: 0.5 GiB, so that the eager loop, which keeps every iterate, still fits)
GPU_SHAPES = {
    "dense": [*SMALL, *((2**28 // d**2, d, k) for d in (16, 32, 64, 128) for k in (10, 20, 40)), (8, 512, 20)],
    "diagonal": [(1, 2**27, 12)],
    "tikhonov": [(1, 2**27, 12)],
    "spectral": [(10000, 5, 30), *((2**28 // d**2, d, 10) for d in (16, 32, 64, 128))],
}


def cases(device):
    """The shapes that the README speaks of."""
    shapes = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    return [Case(s, method, *shape) for s in shapes for method in ("gd", "nag") for shape in shapes[s]]


if __name__ == "__main__":
    suite.main(cases, __doc__.splitlines()[0], "momentum")
