"""pytest-benchmark over the cases of every op, grouped by shape and mode: ``pytest benchmarks``."""

import pytest

from benchmarks import momentum, rnn, suite
from benchmarks.case import MODES

CASES = [case for op in (momentum, rnn) for case in op.cases(suite.DEVICE)]


@pytest.mark.parametrize("backend", suite.BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.id}")
def test_speed(benchmark, case, mode, backend):
    suite.benchmark_case(benchmark, case, mode, backend)
