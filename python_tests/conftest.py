"""Backends under test, and what every test shares."""

import os

import pytest
import torch

from unrolled_kernels import _backend

# most problems are too small to share, and two threads that wait for each other make a busy machine crawl; the tests
# of what threads do ask for more
torch.set_num_threads(1)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _patch_interpreter_once():
    """Triton's interpreter patches ``triton.language`` at every call of a device function: a third of all its time."""
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if INTERPRETED:
    _patch_interpreter_once()


def _backends():
    # "manual" is the hand-written backward in eager torch: the derivation that the kernels implement
    for name in ("manual", "cpu", "cuda", "triton"):
        reason = _backend.unavailable_reason(name) if name != "manual" else None
        marks = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
        yield pytest.param(name, id=name, marks=marks)


BACKENDS = list(_backends())


def device_of(backend):
    """Where the tensors of a test of ``backend`` live."""
    return "cuda" if backend == "cuda" or (backend == "triton" and not INTERPRETED) else "cpu"


def interpreted(backend):
    """Whether the kernels of ``backend`` run a thousand times slower than compiled: tests then take fewer sizes."""
    return backend == "triton" and INTERPRETED


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# what compiles for a minute begins first, so that no process is left with it at the end
FIRST = ("test_native.py", "test_momentum_cuda.py", "test_rnn_cuda.py", "test_triton.py", "test_package.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
