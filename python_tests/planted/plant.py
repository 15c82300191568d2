"""Plant the faults of faults.toml one at a time in a copy of the tree, and see which test finds each.

python python_tests/planted/plant.py [NAME …]       all of them, or these; exit status 1 where one is not found
python python_tests/planted/plant.py --list
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Fault(NamedTuple):
    """``search``, which stands once in ``file``, becomes ``replace``; ``tests`` are to find it."""

    name: str
    file: str
    search: str
    replace: str
    tests: str  # arguments of pytest in python_tests/

    def plant(self, root):
        """Write the fault into the tree ``root``; loud where it no longer applies."""
        path = root / self.file
        text = path.read_text() if path.exists() else ""
        count = text.count(self.search)
        if count != 1 or self.search == self.replace:
            raise ValueError(
                f"planted fault {self.name}: expected {self.search!r} once in {self.file}, got it {count} times; "
                "follow the change of the code in python_tests/planted/faults.toml"
            )
        path.write_text(text.replace(self.search, self.replace))

    @property
    def is_compiled(self):
        """Whether the extension is to be built anew; tests that execute CUDA sources compile them themselves."""
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cuda/")


def faults():
    """All of faults.toml, in its order."""
    tables = tomllib.loads((Path(__file__).parent / "faults.toml").read_text())
    tests = tables["tests"]
    return [Fault(x["name"], x["file"], x["search"], x["replace"], tests[x["tests"]]) for x in tables["faults"]]


def build(tree):
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = os.environ | {"UNROLLED_KERNELS_NATIVE": "1", "UNROLLED_KERNELS_CUDA": "0", "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"does not build\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def run(tree, tests):
    """``(first failure or None, whether any test ran)`` of ``tests`` in the tree."""
    arguments = shlex.split(tests)
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    if "triton" in tests:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=tree / "python_tests", env=environment, capture_output=True, text=True)
    failed = re.search(r"^FAILED (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    # a fault that does not compile is none
    if done.returncode not in (0, 1) or (done.returncode == 1 and not failed) or "native/build.py" in done.stdout:
        raise RuntimeError(f"pytest {tests}: exit status {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return failed and failed[1], bool(failed or re.search(r"\b\d+ passed", done.stdout))


def hunt(chosen, control=True):
    """Plant the faults ``chosen`` one at a time; returns the names of those that no test finds."""
    missed, skipped = [], []
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        tree, clean = Path(folder) / "tree", Path(folder) / "clean"
        left_out = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=left_out)
        if any(fault.is_compiled for fault in chosen):
            build(tree)
        for tests in dict.fromkeys(fault.tests for fault in chosen) if control else ():
            found, _ = run(tree, tests)
            if found:
                raise RuntimeError(f"{found} fails where nothing is planted")
        # always at the same path and with the times of its files, for what is built to be found again
        shutil.copytree(tree, clean, symlinks=True)
        for fault in chosen:
            shutil.rmtree(tree)
            shutil.copytree(clean, tree, symlinks=True)
            fault.plant(tree)
            start = time.monotonic()
            if fault.is_compiled:
                build(tree)
            found, ran = run(tree, fault.tests)
            if not found:
                (missed if ran else skipped).append(fault.name)
            result = found or ("NOT FOUND" if ran else "its tests do not run here")
            print(f"{fault.name}: {result} ({time.monotonic() - start:.0f} s)", flush=True)
    looked_for = len(chosen) - len(skipped)
    print(f"{looked_for - len(missed)} of {looked_for} found", flush=True)
    return missed


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to plant; default: all")
    parser.add_argument("--list", action="store_true", help="list them instead")
    parser.add_argument("--no-control", action="store_true", help="do not run the tests on the clean tree first")
    arguments = parser.parse_args()
    known = {fault.name: fault for fault in faults()}
    unknown = set(arguments.names) - known.keys()
    if unknown:
        parser.error(f"NAME: unknown {', '.join(sorted(unknown))}; --list lists what is there")
    chosen = [known[name] for name in arguments.names or known]
    if arguments.list:
        for fault in chosen:
            print(f"{fault.name}: {fault.file}: {fault.search!r} -> {fault.replace!r}")
        return 0
    return 1 if hunt(chosen, not arguments.no_control) else 0


if __name__ == "__main__":
    sys.exit(main())
