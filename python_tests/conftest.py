"""Backends under test, and what every test shares."""

import os

import pytest
import torch

from unrolled_kernels import _backend

torch.set_num_threads(2)


def _backends():
    # "manual" is the hand-written backward in eager torch: the derivation that the kernels implement
    for name in ("manual", "cpu", "cuda", "triton"):
        reason = _backend.unavailable_reason(name) if name != "manual" else None
        marks = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
        yield pytest.param(name, id=name, marks=marks)


BACKENDS = list(_backends())


def device_of(backend):
    """Where the tensors of a test of ``backend`` live."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "cuda" if backend == "cuda" or (backend == "triton" and not interpreted) else "cpu"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
