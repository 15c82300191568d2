"""pytest-benchmark over the same cases, grouped by shape and mode: ``pytest benchmarks --benchmark-enable``."""

import pytest

from benchmarks import momentum, suite


@pytest.mark.parametrize("backend", suite.BACKENDS)
@pytest.mark.parametrize("mode", suite.peers.MODES)
@pytest.mark.parametrize("case", momentum.cases(suite.DEVICE), ids=lambda case: case.id)
def test_speed(benchmark, case, mode, backend):
    suite.benchmark_case(benchmark, case, mode, backend)
