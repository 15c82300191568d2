"""What the benchmarks rest on: peers that compute the same, a roof that nothing exceeds, and a report of their rows."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("pandas")

import pandas as pd

from benchmarks import auto, figures, momentum, peers, report, rnn, roofs, suite
from unrolled_kernels import _backend
from unrolled_kernels.experiments.timing import in_turns
from unrolled_kernels.testing import STRUCTURES

ROOT = Path(__file__).resolve().parent.parent
CASES = [
    *(momentum.Momentum(structure, 3, 5, 4, method) for structure in STRUCTURES for method in ("gd", "nag")),
    *(rnn.RNN(structure, 3, 5, 4, (6, 4)) for structure in ("dense", "diagonal")),
]
NAMES = [*(name for name in suite.BACKENDS if name != "eager"), *(set(peers.PEERS) - {"compile"})]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.id}")
def test_peers_compute_the_same(case, name):
    """What is timed is right: y and every gradient, of JAX and the libraries too."""
    reason = peers.missing(name, suite.DEVICE) if name in peers.PEERS else None
    if reason:
        pytest.skip(f"{name}: {reason}")
    suite.check(case, suite.DEVICE, [name])


def test_a_compiled_peer_computes_the_same():
    suite.check(momentum.Momentum("dense", 3, 5, 4), suite.DEVICE, ["compile"])


@dataclasses.dataclass(frozen=True)
class Wrong(momentum.Momentum):
    """The right function but under the names of two faults."""

    def function(self, backend):
        right = super().function("eager")
        if backend == "wrong value":
            return lambda *leaves: 1.001 * right(*leaves)
        if backend == "wrong gradient":
            return lambda Q, b, step_size: right(Q.detach(), b, step_size)
        return right


@pytest.mark.parametrize(("name", "what"), [("wrong value", "y"), ("wrong gradient", "gradient of leaf 0")])
def test_a_wrong_peer_is_not_timed(name, what):
    case = Wrong("dense", 3, 5, 7)
    suite.check(case, "cpu", ["right"])
    with pytest.raises(AssertionError, match=f"{name} k=4: {what}"):
        suite.check(case, "cpu", [name])


RECORDED = sorted((ROOT / "benchmarks" / "results").glob("c*/*.csv"))


@pytest.mark.parametrize("file", RECORDED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_auto_takes_no_path_that_was_slower(file):
    """No recorded row shows the backend that "auto" takes for it to be slower than the eager loop."""
    rows = pd.read_csv(file)
    if "backend" not in rows:
        pytest.skip("rows of another kind")
    device = "cpu" if file.parent.name.startswith("cpu") else "cuda"
    keys = ["structure", "method", "mode", "dtype", "B", "d", "k"]
    for key, group in rows.groupby([*keys, "threads"], dropna=False):
        case = dict(zip(keys, key, strict=False))
        # two sweeps may share a case
        times = group.groupby("backend").p50_us.median()
        candidates = _backend.AUTO[device, auto.kind_of(file, case)]
        taken = next((name for name in candidates if name in times), "eager")
        assert "eager" not in times or times[taken] <= times["eager"], f"{case}: {taken}, {times.to_dict()}"


def test_what_auto_takes_is_written_from_the_rows():
    assert auto.FILE.read_text() == auto.text(), "run python -m benchmarks.auto"


def test_what_auto_takes_is_never_slower_than_the_eager_loop():
    fast, slow = ({"eager": 2.0, "cuda": 1.0, "triton": triton} for triton in (0.5, 2.1))
    assert auto.choose({0: fast, 1: fast}) == ("triton", "cuda")
    assert auto.choose({0: fast, 1: slow}) == ("cuda",)
    assert auto.choose({0: slow | {"cuda": 2.01}}) == ()
    assert auto.choose({0: {"eager": 1.0, "jax": 0.5}}) is None


def test_rows_of_a_case(one_thread):
    case, where = momentum.Momentum("dense", 1000, 16, 5), {"threads": torch.get_num_threads()}
    rows = list(suite.run(case, "cpu", where, modes=["forward"], wanted_peers=["eager", "func", "solve"], rounds=1))
    assert {"eager", "solve"} <= {row["backend"] for row in rows}
    # torch.func has no forward of its own
    assert "func" not in {row["backend"] for row in rows}
    for row in rows:
        assert row["threads"] == 1
        assert 0 <= float(row["percent_of_roof"]) <= 100, row
        assert row["bytes"] == 1000 * (256 + 32) * 4
        assert row["flops"] == 1000 * 2 * 4 * 256
        assert min(float(row[name]) for name in ("stream_gb_s", "fma_gflop_s", "p50_us")) > 0


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_nothing_exceeds_the_roof(one_thread):
    """A matrix product and a copy, the best torch has, in turns with the loops that are to bound them."""
    square, best = torch.rand(384, 384), {"product": 0.0, "copy": 0.0}
    source = torch.ones(2**16)
    target, roof = torch.empty_like(source), roofs.Roof("cpu", 1, source.nbytes)
    for _ in range(10):
        calls = {"product": lambda: square @ square, "copy": lambda: target.copy_(source)}
        timings = in_turns(calls, rounds=3, min_seconds=0.003, between=roof.sample)
        best["product"] = max(best["product"], 2 * 384**3 / timings["product"].p20)
        best["copy"] = max(best["copy"], 2 * source.nbytes / timings["copy"].p20)
    copied = max(roofs.stream_rate("cpu", 1, source[None], target, "copy") for _ in range(10))
    # a loop that waits for its own results, or is not vectorised, is four times slower and more
    assert roof.flops_per_s > 0.8 * best["product"]
    assert max(copied, roof.bytes_per_s) > 0.8 * best["copy"]


def test_roofs_of_a_machine(capsys, one_thread):
    roofs.main([])
    text = capsys.readouterr().out
    assert "multiply-adds in registers, 1 threads" in text
    assert "memory: read" in text
    assert list(roofs.levels("cpu"))[-1] == "memory"


def _value(formula, **sizes):
    """A formula of the documentation, (d² + 2d)s, at some sizes."""
    formula = formula.replace("²", "**2").replace("−", "-")
    return eval(re.sub(r"(?<=[\w)])(?=[dks(])", "*", formula), {"__builtins__": {}}, sizes)


@pytest.mark.parametrize("method", ["gd", "nag"])
def test_floors_of_the_documentation_are_those_of_the_cases(method):
    text = (ROOT / "docs/speed.md").read_text()
    sizes = {"d": 6, "k": 11, "s": 4}
    table = {}
    for structure, mode, num_bytes, flops in re.findall(
        r"^\| (\w+), (\w+) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE
    ):
        if structure == "RNN":
            continue
        of_element = {name: body for name, body in re.findall(r"(GD|NAG) (\(.+?\)d)", flops)} or None
        table[structure.lower(), mode] = (num_bytes, flops if of_element is None else of_element[method.upper()])
    for (structure, mode), (num_bytes, flops) in table.items():
        case = momentum.Momentum(structure, 1, sizes["d"], sizes["k"], method)
        product, _, like = flops.partition(", and as ")
        expected = 0 if product == "as diagonal" else _value(product, **sizes)
        if like or product == "as diagonal":
            expected += _value(table["diagonal", mode][1], **sizes)
        assert case.floor(mode) == (_value(num_bytes, **sizes), expected), (structure, mode)
    assert len(table) == 8


@pytest.mark.parametrize(
    "file",
    sorted(f for f in (ROOT / "benchmarks/results").glob("*/*.csv") if not f.parent.name.startswith("predicted")),
    ids=lambda f: f"{f.parent.name}-{f.stem}",
)
def test_committed_rows_keep_below_the_roof(file):
    rows = report.read(file)
    assert (rows.percent_of_roof.dropna() <= 100).all()
    assert rows.threads.isna().all() or (rows.threads >= 1).all()


def test_the_readme_and_the_pages_show_the_committed_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PAGES", tmp_path)
    monkeypatch.setattr(
        figures, "_save", lambda figure, directory, rows, name: directory / f"{rows.results.iloc[0]}-{name}.png"
    )
    devices = report.measured()
    for device in devices:
        assert (ROOT / f"docs/speed/{device.name}.md").read_text() == device.page(), "run python -m benchmarks.report"
    latest = report.measured_last(devices)
    for page, parts in (
        ("README.md", [latest.headline(), latest.summary()]),
        ("docs/mathematics.md", latest.gradients().values()),
    ):
        for part in parts:
            assert part in (ROOT / page).read_text(), "run python -m benchmarks.report"
