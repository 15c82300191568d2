"""What the fused layers are compared with: the same function by the means a user would otherwise have.

A case (benchmarks/momentum.py and its neighbours) offers

    case.function(backend)   a function of its leaves (tensors that require grad) that returns y
    case.inputs(device)      (leaves, cotangent of y)
    case.jax_function()      the same function in JAX
    case.library_functions() {peer: function} of what libraries offer for it: "solve", "deepinv"
"""

import functools
import importlib.util
import time

import torch

MODES = ("forward", "backward", "forward+backward")
# the eager loop as it is, by torch.func, captured, compiled twice; JAX; the exact minimizer; the library of the field
PEERS = ("eager", "func", "cudagraph", "compile", "compile-max", "jax", "solve", "deepinv")


def step(function, mode):
    """``prepare(leaves, cotangent) -> call``: a call of ``function`` in one of ``MODES``, ready to be timed."""

    def forward(leaves, cotangent):
        def call():
            with torch.no_grad():
                return function(*leaves)

        return call

    def backward(leaves, cotangent):
        y = function(*leaves)
        return lambda: torch.autograd.grad(y, leaves, cotangent, retain_graph=True, allow_unused=True)

    def both(leaves, cotangent):
        # the exact minimizer does not depend on the step size
        return lambda: torch.autograd.grad(function(*leaves), leaves, cotangent, allow_unused=True)

    return {"forward": forward, "backward": backward, "forward+backward": both}[mode]


def functional_step(function):
    """``prepare`` as of ``step`` for the forward and backward that a user of ``torch.func`` would write."""

    def prepare(leaves, cotangent):
        leaves = [x.detach() for x in leaves]
        return lambda: torch.func.vjp(function, *leaves)[1](cotangent)

    return prepare


def missing(peer, device):
    """Why a peer cannot be compared with on this device; None where it can."""
    if peer == "jax" and importlib.util.find_spec("jax") is None:
        return "JAX is not installed (`pip install jax`)"
    if peer == "jax" and device == "cuda" and not _jax_has_gpu():
        return "this JAX has no GPU (`pip install jax[cuda13]`)"
    if peer == "deepinv" and importlib.util.find_spec("deepinv") is None:
        return "deepinv is not installed (`pip install deepinv`)"
    if peer == "cudagraph" and device != "cuda":
        return "there are no CUDA graphs on the CPU"
    if peer == "compile-max" and device != "cuda":
        return "max-autotune tunes GPU kernels only"
    return None


@functools.cache
def _jax_has_gpu():
    import jax

    return jax.default_backend() == "gpu"


def torch_peer(peer, case, sets):
    """The eager loop as it is, captured in CUDA graphs, or compiled, or a library's: a function of the leaves, or None.

    Args:
        peer: one of ``PEERS`` but ``"jax"``.
        case: what is compared.
        sets: input sets; the first serves to capture.
    """
    if peer in ("solve", "deepinv"):
        return case.library_functions().get(peer)
    function = case.function("eager")
    if peer == "cudagraph":
        # graphs read and write fixed buffers: copies of the leaves go in, as for any user of them
        samples = tuple(x.detach().clone().requires_grad_() for x in sets[0][0])
        return torch.cuda.make_graphed_callables(function, samples)
    if peer.startswith("compile"):
        torch._dynamo.reset()
        mode = "max-autotune" if peer == "compile-max" else "default"
        return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
    return function


def seconds_to_first_result(prepare, leaves, cotangent):
    """``(call, seconds)``: what the first forward and backward took, which is compilation for a peer that compiles."""
    start = time.perf_counter()
    call = prepare(leaves, cotangent)
    call()
    return call, time.perf_counter() - start


def jax_peer(case, mode, inputs):
    """``jax.jit`` of the function or of its gradient: ``(call, seconds until the first result)``; None for backward."""
    import jax
    import jax.numpy as jnp

    if mode == "backward":
        return None
    function = case.jax_function()
    leaves, cotangent = inputs
    *leaves, cotangent = (jnp.asarray(x.detach().cpu().numpy()) for x in (*leaves, cotangent))
    if mode == "forward":
        compiled, arguments = jax.jit(function), leaves
    else:
        gradient = jax.grad(lambda leaves, cotangent: jnp.vdot(function(*leaves), cotangent))
        compiled, arguments = jax.jit(gradient), (leaves, cotangent)
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return lambda: jax.block_until_ready(compiled(*arguments)), time.perf_counter() - start
