"""pytest-benchmark over the same cases, grouped by shape and mode: ``pytest benchmarks --benchmark-enable``."""

import pytest

from benchmarks import rnn, suite


@pytest.mark.parametrize("backend", suite.BACKENDS)
@pytest.mark.parametrize("mode", suite.peers.MODES)
@pytest.mark.parametrize("case", rnn.cases(suite.DEVICE), ids=lambda case: case.id)
def test_speed(benchmark, case, mode, backend):
    suite.benchmark_case(benchmark, case, mode, backend)
