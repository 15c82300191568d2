"""What the fused layers are compared with: the same function by the means a user would otherwise have."""

import importlib.util
import time

import torch

import unrolled_kernels.functional as F

PEERS = ("eager", "compile", "jax")


def call(method, Q, b, step_size, k, backend):
    """One forward through the public interface; NAG's μ = 0.1 as in the paper's synthetic task."""
    if method == "gd":
        return F.gradient_descent(Q, b, step_size, k, backend=backend)
    return F.nesterov(Q, b, step_size, 0.1, k, backend=backend)


def forward_backward(method, k, inputs, backend):
    """A step on one set of inputs: forward, then the gradients of Q's tensors, b and the step size."""
    leaves, make_Q, b, step_size, cotangent = inputs
    y = call(method, make_Q(*leaves), b, step_size, k, backend)
    return torch.autograd.grad(y, [*leaves, b, step_size], cotangent)


def compiled(method, k, inputs):
    """``torch.compile`` of the eager loop, default mode; returns the step and the seconds its compilation took."""
    torch._dynamo.reset()
    compiled_call = torch.compile(lambda Q, b, s: call(method, Q, b, s, k, "eager"), fullgraph=True, dynamic=False)

    def step(inputs):
        leaves, make_Q, b, step_size, cotangent = inputs
        y = compiled_call(make_Q(*leaves), b, step_size)
        return torch.autograd.grad(y, [*leaves, b, step_size], cotangent)

    start = time.perf_counter()
    step(inputs)
    return step, time.perf_counter() - start


def jax_missing():
    """Why JAX cannot be compared with; None where it can."""
    return None if importlib.util.find_spec("jax") else "JAX is not installed (`pip install jax`)"


def jax_step(structure, method, k, inputs):
    """``jax.jit`` of the gradient of a ``lax.scan`` over the steps; returns the step and its compilation time."""
    import jax
    import jax.numpy as jnp

    def run(leaves, b, step_size, cotangent):
        if structure == "spectral":
            eigenvalues, R = leaves
            b = jnp.einsum("bij,bi->bj", R, b)
            apply_Q = lambda z: eigenvalues * z
        elif structure == "diagonal":
            apply_Q = lambda z: leaves[0] * z
        else:
            apply_Q = lambda z: jnp.einsum("bij,bj->bi", leaves[0], z)
        root = jnp.sqrt(0.1 * step_size)
        beta = 0.0 if method == "gd" else (1 - root) / (1 + root)

        def body(state, _):
            y, previous = state
            z = y + beta * (y - previous) if method != "gd" else y
            return (z - step_size * (apply_Q(z) + b), y), None

        y = jax.lax.scan(body, (jnp.zeros_like(b), jnp.zeros_like(b)), None, length=k)[0][0]
        y = jnp.einsum("bij,bj->bi", R, y) if structure == "spectral" else y
        return jnp.vdot(y, cotangent)

    gradient = jax.jit(jax.grad(run, argnums=(0, 1, 2)))
    convert = lambda x: jnp.asarray(x.detach().cpu().numpy())
    leaves, _, b, step_size, cotangent = inputs
    arguments = (tuple(map(convert, leaves)), convert(b), convert(step_size), convert(cotangent))
    start = time.perf_counter()
    grads = jax.block_until_ready(gradient(*arguments))
    seconds = time.perf_counter() - start
    return lambda: jax.block_until_ready(gradient(*arguments)), seconds, [*grads[0], *grads[1:]]
