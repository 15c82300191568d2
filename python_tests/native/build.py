"""Native sources compiled for a test, anew only when they have changed."""

import fcntl
import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
NATIVE = ROOT / "python_tests" / "native"
CACHE = ROOT / "build" / "test_native"


def cached(name, command, sources):
    """The file that ``command(output)`` writes from ``sources``, and what it printed; kept by the hash of both."""
    digest = hashlib.sha256(repr(command(Path("output"))).encode())
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{digest.hexdigest()[:16]}"
    output, log = CACHE / f"{stem}.out", CACHE / f"{stem}.log"
    # tests run in several processes: one of them compiles, the others wait
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (output.exists() and log.exists()):
            for old in CACHE.glob(f"{name}-????????????????.*"):
                old.unlink()
            partial = CACHE / f"{stem}.partial"
            run = subprocess.run(command(partial), capture_output=True, text=True)
            assert run.returncode == 0, f"{' '.join(map(str, command(partial)))}\n{run.stdout}{run.stderr}"
            log.write_text(run.stdout + run.stderr)
            partial.rename(output)
    return output, log.read_text()


def compiled(name, flags, sources, headers, compiler="g++"):
    """The program that a compiler makes of ``sources``, which include ``headers``."""

    def compile_source(source):
        command = lambda output: [compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(output)]
        return cached(f"{name}-{source.stem}", command, [*headers, source])[0]

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, sources))
    command = lambda output: [compiler, *flags, *map(str, objects), "-o", str(output)]
    return cached(name, command, objects)[0]
