"""What the fused layers are compared with: the same function by the means a user would otherwise have."""

import functools
import importlib.util
import os
import time

import numpy as np
import torch

# or JAX takes most of a GPU's memory when it is first asked for anything
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# the eager loop as it is, by torch.func, captured, compiled twice; JAX; the exact minimizer; the library of the field
PEERS = ("eager", "func", "cudagraph", "compile", "compile-max", "jax", "solve", "deepinv")


class Peer:
    """A function of a case's leaves, differentiated by torch's autograd."""

    def __init__(self, function):
        self.function = function

    def call(self, mode, leaves, cotangent):
        """A call without arguments in one of ``MODES``, ready to be timed; None where there is no such thing."""

        def forward():
            with torch.no_grad():
                return self.function(*leaves)

        if mode == "forward":
            return forward
        # allow_unused: the exact minimizer does not depend on the step size
        if mode == "backward":
            y = self.function(*leaves)
            return lambda: torch.autograd.grad(y, leaves, cotangent, retain_graph=True, allow_unused=True)
        return lambda: torch.autograd.grad(self.function(*leaves), leaves, cotangent, allow_unused=True)

    def results(self, leaves, cotangent):
        """``[y, gradient of each leaf …]``, to be compared with other peers'."""
        y = self.function(*leaves)
        gradients = torch.autograd.grad(y, leaves, cotangent, materialize_grads=True, allow_unused=True)
        return [y.detach(), *gradients]


class Functional(Peer):
    """Forward and backward as a user of ``torch.func`` would write them."""

    def call(self, mode, leaves, cotangent):
        if mode != "forward+backward":
            return None
        leaves = [x.detach() for x in leaves]
        return lambda: torch.func.vjp(self.function, *leaves)[1](cotangent)

    def results(self, leaves, cotangent):
        y, vjp = torch.func.vjp(self.function, *(x.detach() for x in leaves))
        return [y, *vjp(cotangent)]


class Jax(Peer):
    """``jax.jit`` of a JAX function and of its gradient, in float32 and not in TF32."""

    def call(self, mode, leaves, cotangent):
        import jax

        if mode == "backward":
            return None
        *leaves, cotangent = _to_jax(leaves, cotangent)
        with jax.default_matmul_precision("highest"):
            compiled = jax.jit(self.function if mode == "forward" else self._gradient)
            arguments = leaves if mode == "forward" else (leaves, cotangent)
            jax.block_until_ready(compiled(*arguments))
        return lambda: jax.block_until_ready(compiled(*arguments))

    def results(self, leaves, cotangent):
        y = self.call("forward", leaves, cotangent)()
        gradients = self.call("forward+backward", leaves, cotangent)()
        return [torch.from_numpy(np.array(x)).to(cotangent.device) for x in (y, *gradients)]

    def _gradient(self, leaves, cotangent):
        import jax
        import jax.numpy as jnp

        return jax.grad(lambda leaves: jnp.vdot(self.function(*leaves), cotangent))(leaves)


def make(name, case, leaves):
    """The peer ``name`` of a case, or its fused function if ``name`` is a backend; None where there is no such thing.

    Args:
        name: one of ``PEERS`` or a backend.
        case: what is compared.
        leaves: inputs of the case; CUDA graphs are captured with copies of them.
    """
    if name in case.unreasonable:
        return None
    if name in ("solve", "deepinv"):
        function = case.library_functions().get(name)
        return None if function is None else Peer(function)
    if name == "jax":
        return Jax(case.jax_function())
    if name not in PEERS:
        return Peer(case.function(name))
    eager = case.function("eager")
    if name == "func":
        return Functional(eager)
    if name == "cudagraph":
        # graphs read and write fixed buffers: copies of the leaves go in, as for any user of them
        samples = tuple(x.detach().clone().requires_grad_() for x in leaves)
        return Peer(torch.cuda.make_graphed_callables(eager, samples))
    if name.startswith("compile"):
        mode = "max-autotune" if name == "compile-max" else "default"
        return Peer(torch.compile(eager, fullgraph=True, dynamic=False, mode=mode))
    return Peer(eager)


def reference(name, case):
    """The function of the leaves, in torch operations, that a peer is to agree with."""
    if name == "solve":
        return lambda Q, b, step_size: -torch.linalg.solve(Q, b)
    return case.function("eager")


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


def first_call(peer, mode, leaves, cotangent):
    """``(call, seconds)``: what the first call took, which is compilation for a peer that compiles; (None, 0): none."""
    start = time.perf_counter()
    call = peer.call(mode, leaves, cotangent)
    if call is None:
        return None, 0.0
    call()
    return call, time.perf_counter() - start


@functools.cache
def _jax_has_gpu():
    import jax

    return jax.default_backend() == "gpu"


def _to_jax(leaves, cotangent):
    import jax.numpy as jnp

    return [jnp.asarray(x.detach().cpu().numpy()) for x in (*leaves, cotangent)]
