"""Speed of the momentum ops through the public interface against every peer.

python -m benchmarks.momentum [--device cpu|cuda] [--only TEXT] [--modes …] [--peers …] [--record | --out FILE]
"""

import dataclasses

import torch

import unrolled_kernels.functional as F
from benchmarks import peers, suite
from benchmarks.case import Case
from unrolled_kernels import prox, schedules
from unrolled_kernels.testing import STRUCTURES, random_quadratic

MU = 0.1  # NAG's, as in the paper's synthetic task


@dataclasses.dataclass(frozen=True)
class Momentum(Case):
    """One structure of Q under gradient descent or Nesterov's method with one step size."""

    method: str = "gd"

    op = "momentum"
    # of the leaves, the step size is what y stops depending on
    vanishing = 1

    @property
    def unreasonable(self):
        """torch.compile unrolls the loop: 30 products take half a minute, 12 elementwise steps three."""
        wanted = self.structure == "dense" and (self.B == 10000 or (self.method == "gd" and self.B != 1000))
        return () if wanted or self.k <= 10 else ("compile", "compile-max")

    def inputs(self, device, seed=0):
        """The leaves are Q's tensors, b and the step size."""
        leaves, _, b = random_quadratic(self.structure, (self.B,), self.d, dtype=self.dtype, device=device, seed=seed)
        step_size = torch.tensor(0.9, device=device)
        cotangent = torch.randn(b.shape, generator=torch.Generator().manual_seed(seed)).to(b)
        return [x.detach().requires_grad_() for x in (*leaves, b, step_size)], cotangent

    def function(self, backend):
        make_Q = STRUCTURES[self.structure]

        def run(*leaves):
            *operands, b, step_size = leaves
            if self.method == "gd":
                return F.gradient_descent(make_Q(*operands), b, step_size, self.k, backend=backend)
            return F.nesterov(make_Q(*operands), b, step_size, MU, self.k, backend=backend)

        return run

    def floors(self):
        s, d, k = self.dtype.itemsize, self.d, self.k
        square = d * d
        # products with Q: the first step's is with zero; the backward replays y_1 … y_{k-1}, then a product with Qᵀ and
        # an outer product for all steps but the first
        products, backward_products = max(k - 1, 0), max(3 * k - 4, 0)
        # an element of a diagonal Q: GD is y ← (1 - φq) y - φb; NAG y ← (1 - φq)((1 + β) y - β y₋) - φb
        element, backward_element = (2 * k - 2, 6 * k - 8) if self.method == "gd" else (4 * k - 6, 12 * k - 22)
        element, backward_element = max(element, 0) * d, max(backward_element, 0) * d
        forward, backward = {
            "dense": (
                ((square + 2 * d) * s, 2 * products * square),
                ((2 * square + 3 * d) * s, 2 * backward_products * square),
            ),
            "diagonal": ((3 * d * s, element), (5 * d * s, backward_element)),
            "tikhonov": ((4 * d * s, element), (7 * d * s, backward_element)),
            # Rᵀb and Rŷ; backward Rᵀb again, Rᵀȳ, R times the gradient of Rᵀb, and two outer products for R's
            "spectral": (
                ((square + 3 * d) * s, 4 * square + element),
                ((2 * square + 5 * d) * s, 10 * square + backward_element),
            ),
        }[self.structure]
        return tuple(self.B * x for x in forward), tuple(self.B * x for x in backward)

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
            root = jnp.sqrt(MU * step_size)
            beta = (1 - root) / (1 + root)

            def body(state, _):
                y, previous = state
                z = y if self.method == "gd" else y + beta * (y - previous)
                return (z - step_size * (apply_Q(z) + b), y), None

            y = jax.lax.scan(body, (jnp.zeros_like(b), jnp.zeros_like(b)), None, length=self.k)[0][0]
            return jnp.einsum("bij,bj->bi", R, y) if self.structure == "spectral" else y

        return run


@dataclasses.dataclass(frozen=True)
class Proximal(Momentum):
    """Steps that end with a proximal map: ISTA, FISTA, LISTA with one Q for the batch, and programs with bounds."""

    kinked = True

    @property
    def unreasonable(self):
        """torch.compile unrolls the loop."""
        return () if self.k <= 20 else ("compile", "compile-max")

    @property
    def shared(self):
        """Whether one Q serves the batch."""
        return self.method != "box"

    def inputs(self, device, seed=0):
        """The leaves are Q, b, what the map has and the step size."""
        (Q,), _, b = random_quadratic(
            "dense", (self.B,), self.d, shared=self.shared, dtype=self.dtype, device=device, seed=seed
        )
        size, value = {"lista": (self.k, 0.1), "box": (self.d, 0.5)}.get(self.method, (self.d, 0.2))
        map_tensor = torch.full((size,), value, dtype=self.dtype, device=device)
        step_size = torch.tensor(0.9, dtype=self.dtype, device=device)
        cotangent = torch.randn(b.shape, generator=torch.Generator().manual_seed(seed)).to(b)
        return [x.detach().requires_grad_() for x in (Q, b, map_tensor, step_size)], cotangent

    def function(self, backend):
        beta = schedules.fista(self.k, 1.0)[1].to(self.dtype)

        def run(Q, b, map_tensor, step_size):
            if self.method == "box":
                g = prox.Box(-0.5, map_tensor)
                return F.nesterov(Q, b, step_size, MU, self.k, prox=g, backend=backend)
            if self.method == "fista":
                g, momentum = prox.L1(map_tensor), beta.to(b.device)
                return F.momentum(Q, b, step_size, momentum, momentum, self.k, prox=g, backend=backend)
            g = prox.SoftThreshold(map_tensor[: self.k]) if self.method == "lista" else prox.L1(map_tensor)
            return F.gradient_descent(Q, b, step_size, self.k, prox=g, backend=backend)

        return run

    def floors(self):
        s, square = self.dtype.itemsize, self.d * self.d
        # as without a map, but that backward replays v_{k-1} too; where iterates are kept, nothing
        products = max(self.k - 1, 0)
        backward_products = (2 if self.shared and self.d > 128 else 3) * products
        matrices, rows = (1 if self.shared else self.B) * square * s, self.B * self.d * s
        flops, backward_flops = (2 * self.B * n * square for n in (products, backward_products))
        return (matrices + 2 * rows, flops), (2 * matrices + 3 * rows, backward_flops)

    def library_functions(self):
        """None solves the same problem in as many steps."""
        return {}

    def jax_function(self):
        """A ``lax.scan`` over the steps."""
        import jax
        import jax.numpy as jnp

        fista = jnp.asarray(schedules.fista(self.k, 1.0)[1].to(self.dtype).numpy())

        def run(Q, b, map_tensor, step_size):
            root = jnp.sqrt(MU * step_size)
            nesterov = jnp.full(self.k, (1 - root) / (1 + root))
            beta = {"fista": fista, "box": nesterov}.get(self.method, jnp.zeros(self.k))
            tau = map_tensor[: self.k] if self.method == "lista" else jnp.broadcast_to(step_size, self.k)
            apply_Q = lambda z: z @ Q.T if self.shared else jnp.einsum("bij,bj->bi", Q, z)

            def body(state, coefficients):
                (y, previous), (beta_t, tau_t) = state, coefficients
                z = y + beta_t * (y - previous)
                v = z - step_size * (apply_Q(z) + b)
                if self.method == "box":
                    return (jnp.clip(v, -0.5, map_tensor), y), None
                threshold = tau_t if self.method == "lista" else tau_t * map_tensor
                return (jnp.sign(v) * jax.nn.relu(jnp.abs(v) - threshold), y), None

            return jax.lax.scan(body, (jnp.zeros_like(b), jnp.zeros_like(b)), (beta, tau))[0][0]

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
    """The shapes of the tables."""
    shapes = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    unconstrained = [Momentum(s, *shape, method) for s in shapes for method in ("gd", "nag") for shape in shapes[s]]
    sparse = [Proximal("dense", 1000, d, 16, method) for method in ("ista", "fista", "lista") for d in (64, 256, 512)]
    box = [Proximal("dense", B, d, 50, "box") for B in (256, 1024) for d in (16, 32, 64)]
    # no kernel of a GPU knows a map
    return unconstrained + (sparse + box if device == "cpu" else [])


if __name__ == "__main__":
    suite.main(cases, __doc__.splitlines()[0], "momentum")
