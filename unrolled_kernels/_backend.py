"""Which backends this machine has, and which of them runs a call."""

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import json
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from unrolled_kernels import _torch_private
from unrolled_kernels._auto import AUTO

NAMES = ("eager", "cpu", "cuda", "triton")


class SlowBackendWarning(UserWarning):
    """``backend="auto"`` takes the eager loop, although this machine could have a faster backend."""


# one for each thread and asynchronous task: blocks of use_backend that overlap in time do not see each other
_default = contextvars.ContextVar("backend", default=os.environ.get("UNROLLED_KERNELS_BACKEND") or "auto")


@functools.cache
def extension():
    """The compiled module ``unrolled_kernels._C``, which registers the native ops; None where it was not built."""
    try:
        return importlib.import_module("unrolled_kernels._C")
    except ImportError:
        return None


@functools.cache
def autograd_extension():
    """The compiled module ``unrolled_kernels._C_autograd``; None where it was not built, or not for this very torch."""
    if os.environ.get("UNROLLED_KERNELS_AUTOGRAD") == "0" or extension() is None:
        return None
    if build_record("autograd_torch") != str(torch.__version__):
        return None
    try:
        return importlib.import_module("unrolled_kernels._C_autograd")
    except ImportError:
        return None


def build_record(key):
    """What the build wrote down for ``key``, see setup.py; None where there is nothing to say."""
    record = Path(__file__).with_name("_build.json")
    if record.exists():
        return json.loads(record.read_text()).get(key)
    tree = record.parents[1]
    if not (tree / "setup.py").exists():
        return "no build was recorded"
    return f"nothing is built in {tree}, whose sources were imported; leave it for the package that pip installed"


def why_no_extension():
    """Why ``extension()`` is None: the build's reason, else the loader's."""
    try:
        importlib.import_module("unrolled_kernels._C")
    except ImportError as error:
        return build_record("extension_reason") or str(error)


@functools.cache
def unavailable_reason(name):
    """Why backend ``name`` cannot run here and how to get it; None where it can."""
    if name == "eager":
        return None
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; get it with `pip install triton` (Linux)"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "there is no CUDA device; set TRITON_INTERPRET=1 before the import to interpret the kernels on the CPU"
            )
        return None
    if extension() is None:
        return (
            f"the C++ extension is not there: {why_no_extension()}; build it with "
            "`pip install .` where torch and a C++17 compiler are"
        )
    if name == "cuda":
        if not extension().build_info()["cuda"]:
            return "the extension was built without CUDA; rebuild it where nvcc is on the PATH or CUDA_HOME is set"
        if not torch.cuda.is_available():
            return "there is no CUDA device, or this torch was built without CUDA"
    return None


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run here, among "eager", "cpu", "cuda" and "triton"."""
    return tuple(name for name in NAMES if unavailable_reason(name) is None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every call in the block on backend ``name``, unless the call or the layer names its own.

    It holds for the thread (or the asynchronous task) that enters the block; a thread that is started inside begins
    with the environment's. A compiled graph keeps the backend that it was compiled with.

    Args:
        name: ``"auto"``, ``"eager"``, ``"cpu"``, ``"cuda"`` or ``"triton"``.
    Raises:
        ValueError: the name is unknown, or that backend is not available here; the message says how to get it.
    """
    check_name(name)
    token = _default.set(name)
    try:
        yield
    finally:
        _default.reset(token)


def check_name(name):
    """Refuse a backend that is unknown or unavailable."""
    # "manual", the derivation that the kernels implement in eager torch, is there for tests and offered nowhere
    if name in ("auto", "manual"):
        return
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {('auto', *NAMES)}, got {name!r}")
    reason = unavailable_reason(name)
    if reason is not None:
        raise ValueError(f"backend: {name!r} is not available here: {reason}")


def resolve(backend, device, kind="dense"):
    """Who runs a call on ``device``: the call's own backend, else ``use_backend``'s, the environment's, or "auto"'s.

    Args:
        kind: what it is, by structure and size, as the table AUTO has it.
    """
    return decide(backend, device.type, kind)


# torch.compile would look through functools.cache, hence two functions
@_torch_private.constant_of_the_graph
def decide(backend, device_type, kind="dense"):
    """``resolve`` by the name of the device."""
    name = _default.get() if backend is None or backend == "auto" else backend
    try:
        return _choose(name, device_type, kind)
    except TypeError:
        check_name(name)  # what cannot be hashed is no name
        raise


@functools.cache
def _choose(backend, device_type, kind):
    check_name(backend)
    if backend == "auto":
        candidates = AUTO.get((device_type, kind), ())
        chosen = next((name for name in candidates if unavailable_reason(name) is None), "eager")
        if chosen == "eager" and candidates:
            _warn_of_eager(device_type, candidates[0])
        return chosen
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    runs_on = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if interpreted else "cuda"}.get(backend, device_type)
    if device_type != runs_on:
        raise ValueError(f"backend: {backend!r} runs on {runs_on} tensors, got tensors on device {device_type!r}")
    return backend


def _warn_of_eager(device_type, name):
    # elsewhere than on Linux there is no extension, and who asked for an installation without it knows
    wanted = platform.system() == "Linux" and "UNROLLED_KERNELS_EXTENSION=0" not in str(
        build_record("extension_reason")
    )
    if wanted and (device_type == "cpu" or torch.cuda.is_available()):
        # once for each kind of device: what calls this caches its result
        warnings.warn(
            f"backend='auto' takes the eager loop on {device_type} tensors, tens of times slower than the kernels: "
            f"{unavailable_reason(name)}",
            SlowBackendWarning,
            stacklevel=2,
        )
