"""`make gpu` rehearsed where there is no GPU."""

import csv
import subprocess
import sys

import pytest
from native.build import ROOT

from benchmarks import gpu


def test_measuring_run_is_rehearsed(tmp_path):
    """Every part that needs no GPU, at tiny sizes; each leaves its rows, and all of them succeed."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    with (tmp_path / "parts.csv").open() as file:
        parts = list(csv.DictReader(file))
    assert [row["part"] for row in parts] == ["info", "correctness", "shares", "latency"]
    for name in ("correctness", "shares", "latency"):
        with (tmp_path / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows
        assert not [row for row in rows if row["note"].startswith(("raises", "WRONG"))]
    assert {row["case"] for row in rows} >= {"copy", "sgemm", "dense gd", "dense nag"}


def test_failing_part_stops_no_other(tmp_path, monkeypatch):
    python = lambda text: [sys.executable, "-c", text]
    monkeypatch.setattr(
        gpu,
        "commands",
        lambda options: {
            "slow": (python("import time; time.sleep(60)"), 1),
            "wrong": (python("raise SystemExit(3)"), 30),
            "missing": (["no-such-program"], 30),
            "right": (python("print('right')"), 30),
        },
    )
    with pytest.raises(SystemExit) as exit_status:
        gpu.main(["--device", "cpu", "--out", str(tmp_path)])
    assert exit_status.value.code == 1
    with (tmp_path / "parts.csv").open() as file:
        status = {row["part"]: row["status"] for row in csv.DictReader(file)}
    assert status["slow"] == "over its limit of 1 s"
    assert status["wrong"] == "exit status 3"
    assert status["missing"].startswith("not started")
    assert status["right"] == "ok"
    assert (tmp_path / "right.log").read_text() == "right\n"
