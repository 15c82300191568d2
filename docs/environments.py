"""The tables of docs/environments.md: the package installed into new environments, what happened there, and the wheel.

    python docs/environments.py
    python docs/environments.py --resume          # what an interrupted run has left

It builds the wheel first, from nothing. An environment is made for each pair of Python and torch, below
build/environments; torch is downloaded where it is not on this disk. What this machine cannot have is left out.
Where ccache stands before the compilers on the PATH, a row takes the objects that the wheel or a row above it compiled.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from unrolled_kernels.experiments.report import fill

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "environments.md"
FOLDER = ROOT / "build" / "environments"
STEP = """
import torch, unrolled_kernels as uk
b = torch.ones(3, 4, requires_grad=True)
uk.UnrolledNAG(5)(torch.eye(4), b).sum().backward()
assert b.grad.isfinite().all()
extension = uk._backend.extension()
cuda = extension and extension.build_info()["cuda"]
levels = extension and "/".join(extension.build_info()["isa_levels"])
print(f"CPU kernels ({levels})" if extension else "no kernels", end="")
print(f", CUDA kernels for {cuda['architectures']}" if cuda else "", end="")
print(f"; a training step ran on {uk._backend.resolve(None, b.device)!r}")
"""


class Environment(NamedTuple):
    """A row: what there is, and what is installed into it."""

    python: str
    torch: str
    source: str  # "wheel" or "sources"
    compilers: str = "none"
    settings: str = ""  # environment variables


ROWS = [
    Environment("3.11", "2.13.0", "wheel"),
    Environment("3.11", "2.13.0", "sources", "g++"),
    Environment("3.11", "2.13.0", "sources", "g++", "UNROLLED_KERNELS_NATIVE=1"),
    Environment("3.11", "2.13.0", "sources", "clang++", "UNROLLED_KERNELS_NATIVE=1"),
    Environment("3.11", "2.13.0", "sources", "g++ nvcc", "UNROLLED_KERNELS_NATIVE=1"),
    Environment(
        "3.11",
        "2.13.0",
        "sources",
        "g++ nvcc",
        "UNROLLED_KERNELS_NATIVE=1 UNROLLED_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0",
    ),
    Environment("3.11", "2.13.0", "sources"),
    Environment("3.11", "2.13.0", "sources", "none", "UNROLLED_KERNELS_EXTENSION=1"),
    Environment("3.11", "none", "sources", "g++"),
    Environment("3.11", "2.14.1", "wheel"),
    Environment("3.11", "2.14.1", "sources", "g++", "UNROLLED_KERNELS_NATIVE=1 UNROLLED_KERNELS_CUDA=0"),
    Environment("3.12", "2.14.1", "wheel"),
    Environment("3.12", "2.14.1", "sources", "g++", "UNROLLED_KERNELS_NATIVE=1 UNROLLED_KERNELS_CUDA=0"),
    Environment("3.13", "2.14.1", "wheel"),
    Environment("3.13", "2.14.1", "sources", "g++", "UNROLLED_KERNELS_NATIVE=1 UNROLLED_KERNELS_CUDA=0"),
]


class Unavailable(Exception):
    """Why this machine cannot have an environment."""


def run(*command, **environment):
    """Run a command with nothing of this Python's surroundings."""
    foreign = ("PYTHON", "UNROLLED", "VIRTUAL", "CXX", "TORCH")
    own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | environment
    return subprocess.run(list(map(str, command)), cwd=FOLDER, env=own, capture_output=True, text=True)


def output_of(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def seconds_used():
    """Of the processors, by the commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def last_line(text):
    return text.strip().rpartition("\n")[2]


def make_environment(python, torch, download):
    """The interpreter of a new environment with that torch, or of the one that was made before."""
    folder = FOLDER / f"python{python}-torch{torch}"
    interpreter = folder / "bin" / "python"
    if (folder / "complete").exists():
        return interpreter
    shutil.rmtree(folder, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    candidates = [shutil.which(f"python{python}"), *Path.home().glob(f".pyenv/versions/{python}.*/bin/python")]
    base = next((path for path in candidates if path and run(path, "-c", "import ensurepip").returncode == 0), None)
    if base is None:
        raise Unavailable(f"there is no Python {python}")
    run(base, "-m", "venv", folder)
    if torch != "none":
        pip = (interpreter, "-m", "pip", "install", "-q", "--only-binary=:all:", f"torch=={torch}")
        if not download and run(*pip, "--dry-run", "--no-deps", "--no-index").returncode:
            raise Unavailable(f"torch {torch} for Python {python} is not on this disk: docs/environments.py loads it")
        if run(*pip, "numpy", "--no-compile").returncode:
            raise Unavailable(f"pip finds no torch {torch} for Python {python}")
    (folder / "complete").touch()
    return interpreter


def copy_sources():
    """The files of the repository, without anything that was built."""
    checkout = FOLDER / "checkout"
    shutil.rmtree(checkout, ignore_errors=True)
    for name in filter(None, output_of("git", "ls-files", "-z").split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, checkout / name)
    return checkout


def folder_of_tools(compilers):
    """A PATH that has these compilers and no others."""
    folder = FOLDER / "bin"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # what compilers call, nvcc a host compiler among it
    helpers = ["sh", "as", "ld", "uname", "cat", "rm", *["gcc"] * ("nvcc" in compilers)]
    for name in [*helpers, *compilers.replace("none", "").split()]:
        places = os.environ["PATH"].split(os.pathsep)
        found = [str(path) for path in (Path(place) / name for place in places) if os.access(path, os.X_OK)]
        cached = [path for path in found if Path(path).resolve().name == "ccache"]
        real = [path for path in found if path not in cached]
        if not real:
            raise Unavailable(f"{name} is not installed")
        script = folder / name
        # ccache itself would look for the compiler on the PATH, and find this
        command = " ".join([str(Path(path).resolve()) for path in cached[:1]] + real[:1])
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o755)
    return folder


def try_out(row, wheel, download=False):
    """What happened in an installation and a training step after it."""
    interpreter = make_environment(row.python, row.torch, download)
    tools = folder_of_tools(row.compilers)
    pip = (interpreter, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "uninstall", "-q", "-y", "unrolled-kernels")
    source = wheel if row.source == "wheel" else copy_sources()
    settings = dict(setting.split("=") for setting in row.settings.split())
    done = run(*pip, "install", "-q", "--no-deps", source, PATH=str(tools), **settings)
    if done.returncode:
        errors = re.findall(r"^\s*(unrolled_kernels: .*)|ERROR: (.*)", done.stdout + done.stderr, re.MULTILINE)
        return "refused: " + " ".join(filter(None, errors[0] if errors else [last_line(done.stderr)]))
    (record,) = interpreter.parents[1].glob("lib/*/site-packages/unrolled_kernels/_build.json")
    said = [json.loads(record.read_text())["extension_reason"]]
    if row.torch != "none":
        step = run(interpreter, "-c", STEP)
        said.append(f"failed: {last_line(step.stderr)}" if step.returncode else step.stdout.strip())
        said += ["SlowBackendWarning"] if "SlowBackendWarning" in step.stderr else []
        check = run(*pip, "check")
        said.append(f"pip check: {'clean' if check.returncode == 0 else last_line(check.stdout)}")
    return "; ".join(filter(None, said))


def table(header, rows):
    """Lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def build_wheel():
    """``make wheel`` with objects that no build before left: the wheel, and the seconds of the processors it took."""
    shutil.rmtree(ROOT / "build" / f"extension-{sysconfig.get_platform()}-{sys.implementation.cache_tag}", True)
    before = seconds_used()
    subprocess.run(["make", "wheel"], cwd=ROOT, check=True, env=os.environ | {"CCACHE_RECACHE": "1"})
    (wheel,) = (ROOT / "dist").glob("*.whl")
    return wheel, seconds_used() - before


def describe(wheel, seconds):
    """What the libraries of a wheel need: libraries, versions of symbols, functions of torch."""
    rows = []
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        for name in sorted(name for name in archive.namelist() if ".so" in name):
            path = archive.extract(name, folder)
            symbols = output_of("nm", "-D", "--undefined-only", path)
            newest = []
            for kind in ("GLIBC", "GLIBCXX", "CXXABI"):
                versions = re.findall(rf"@{kind}_([\d.]+)", symbols)
                newest.append(f"{kind} {max(versions, key=lambda version: [int(n) for n in version.split('.')])}")
            needed = re.findall(r"NEEDED.*\[(.+?)\]", output_of("readelf", "-d", path))
            of_torch = sorted(set(re.findall(r" U (\w*torch\w*)", symbols)))
            rows.append(
                [
                    f"`{Path(name).name}`, {os.path.getsize(path) / 1e6:.1f} MB",
                    ", ".join(f"`{library}`" for library in needed),
                    ", ".join(newest),
                    f"{len(of_torch)}: {', '.join(f'`{function}`' for function in of_torch[:3])}, …",
                ]
            )
    return [
        f"`{wheel.name}`, {wheel.stat().st_size / 1e6:.1f} MB, built in {seconds:.0f} seconds of one processor.",
        "",
        *table(["library", "needs", "newest symbols of", "functions of torch"], rows),
    ]


def try_rows(rows, wheel, done, keep):
    """Lines of the table; what is in ``done`` already is not run again, the rest is kept there."""
    for row in rows:
        key = " | ".join(row)
        if key not in done:
            seconds = ""
            try:
                if wheel is None and row.source == "wheel":
                    raise Unavailable("there is no wheel in dist: make wheel")
                make_environment(row.python, row.torch, download=True)
                before = seconds_used()
                said = try_out(row, wheel)
                seconds = f"{seconds_used() - before:.0f}"
            except Unavailable as reason:
                said = f"left out: {reason}"
            done[key] = said, seconds
            keep()
        yield [*row[:4], row.settings and f"`{row.settings}`", *done[key]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", help="numbers, separated by commas, of the rows to print; the page stays as it is")
    parser.add_argument("--resume", action="store_true", help="go on where a run of these sources was interrupted")
    arguments = parser.parse_args()
    kept = FOLDER / "rows.json"
    done = json.loads(kept.read_text()) if arguments.resume and kept.exists() else {}
    keep = lambda: kept.write_text(json.dumps(done, indent=2))
    wheel = next((ROOT / "dist").glob("*.whl"), None)
    if arguments.rows:
        for cells in try_rows([ROWS[int(i)] for i in arguments.rows.split(",")], wheel, {}, lambda: None):
            print(*cells, sep=" | ", flush=True)
        return
    if "wheel" not in done:
        wheel, done["wheel"] = build_wheel()
        FOLDER.mkdir(parents=True, exist_ok=True)
        keep()
    rows = []
    for cells in try_rows(ROWS, wheel, done, keep):
        rows.append(cells)
        print(*cells, sep=" | ", flush=True)
    versions = [
        output_of(name, "--version").strip().split("\n")[line]
        for name, line in (("g++", 0), ("clang++", 0), ("nvcc", -2))
        if shutil.which(name)
    ]
    environments = [
        f"On {platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}; {'; '.join(versions)}.",
        "",
        *table(["Python", "torch", "installed", "compilers", "settings", "what happened", "seconds"], rows),
    ]
    parts = {"environments": environments, "wheel": describe(wheel, done["wheel"])}
    fill([PAGE], {name: "\n".join(lines) for name, lines in parts.items()})


if __name__ == "__main__":
    main()
