"""``python -m benchmarks.compare A B``: two commits in turns on this machine, unless the tests of one fail.

Each commit is checked out and built in a directory of its own. Ratios are B's time over A's, the median over the
turns; the spread says how far the turns disagree, and a ratio within it means nothing.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from benchmarks.harness import ROOT

_KEY = ["structure", "method", "B", "d", "k", "mode", "backend"]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("A")
    parser.add_argument("B")
    parser.add_argument("--suite", default="momentum", help="file of cases: benchmarks/<suite>.py")
    parser.add_argument("--only", default="", help="the cases whose id contains this text")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--tests", default="python_tests/test_momentum.py -k cpu", help="what must pass, '' for nothing"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="compare-") as directory:
        trees = []
        try:
            for name, commit in zip("AB", (options.A, options.B), strict=True):
                trees.append(_prepare(commit, Path(directory) / name, options.tests))
            turns = []
            for turn in range(options.turns):
                for name, tree in zip("AB", trees, strict=True):
                    out = Path(directory) / f"{name}{turn}.csv"
                    flags = ["--only", options.only, "--peers", "", "--rounds", "3", "--out", out]
                    _run(tree, "-m", f"benchmarks.{options.suite}", *flags)
                    turns.append(pd.read_csv(out).assign(commit=name, turn=turn))
        finally:
            for tree in trees:
                subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=False)
    print(ratios(pd.concat(turns)).to_string(float_format="%.3f"))


def ratios(turns):
    """Median ratio B / A for each case, with the smallest and the largest of the turns."""
    times = turns.pivot_table(index=[*_KEY, "turn"], columns="commit", values="p50_us")
    ratio = (times["B"] / times["A"]).groupby(level=_KEY, sort=False)
    medians = times.groupby(level=_KEY, sort=False).median()
    return pd.DataFrame(
        {"A_us": medians["A"], "B_us": medians["B"], "ratio": ratio.median(), "min": ratio.min(), "max": ratio.max()}
    )


def _prepare(commit, tree, tests):
    """Check out and build ``commit`` in ``tree``, and run its tests."""
    subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", tree, commit], check=True, capture_output=True)
    _run(tree, "setup.py", "--quiet", "build_ext", "--inplace")
    if tests and not _run(tree, "-m", "pytest", "-q", "-x", *shlex.split(tests), check=False):
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=False)
        sys.exit(f"{commit}: its tests fail (above), so its speed says nothing")
    return tree


def _run(tree, *command, check=True):
    environment = os.environ | {"UNROLLED_KERNELS_EXTENSION": "1", "PYTHONPATH": str(tree)}
    result = subprocess.run([sys.executable, *map(str, command)], cwd=tree, env=environment)
    if check and result.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed in {tree}")
    return result.returncode == 0


if __name__ == "__main__":
    main()
