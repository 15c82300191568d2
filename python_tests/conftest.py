"""Backends under test, and what every test shares."""

import os

import pytest
import torch

from unrolled_kernels import _backend

# most problems are too small to share, and two threads that wait for each other make a busy machine crawl; the tests
# of what threads do ask for more
torch.set_num_threads(1)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _patch_interpreter():
    """The interpreter patches ``triton.language`` at every call of a device function: a third of all its time.

    It also truncates float32 to bfloat16, where the instruction that the kernels compile to rounds to nearest even.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    convert = interpreter._convert_float

    def convert_float(data, source, target, rounding_mode):
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, rounding_mode)
        bits = data.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)

    interpreter._convert_float = convert_float


if INTERPRETED:
    _patch_interpreter()


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


def pytest_report_header():
    """Why a run collects fewer cases than another: an installed package beside the clone, for instance."""
    reasons = {name: _backend.unavailable_reason(name) for name in _backend.NAMES}
    return [
        f"backend {name}: {'tested' if reason is None else 'not tested: ' + reason}" for name, reason in reasons.items()
    ]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# what compiles for a minute begins first, so that no process is left with it at the end
FIRST = ("test_native.py", "test_momentum_cuda.py", "test_rnn_cuda.py", "test_triton.py", "test_package.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
