"""pytest-benchmark over the same cases, grouped by shape: ``pytest benchmarks --benchmark-enable``."""

import pytest
import torch

from benchmarks import peers
from benchmarks.momentum import CASES, _usable, check, input_sets, rotating

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in ("cpu", "cuda", "triton") if _usable(name, DEVICE)] + ["eager"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_backward(benchmark, case, backend):
    if backend != "eager":
        check(case, DEVICE, [backend])
    benchmark.group = case.id
    num_bytes, flops = case.floor()
    benchmark.extra_info |= {"bytes": num_bytes, "flops": flops, "device": DEVICE}
    step = rotating(
        lambda inputs: peers.forward_backward(case.method, case.k, inputs, backend), input_sets(case, DEVICE)
    )

    def synchronized():
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronized)
