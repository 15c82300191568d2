"""What goes wrong from outside: kills, interrupts, full disks, files in the way, damaged and malicious files.

Commands run in processes of their own, forked from one that has imported everything: they are real, and start at once.
"""

import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from unrolled_kernels import info
from unrolled_kernels.experiments import cli
from unrolled_kernels.experiments.denoising.images import photographs
from unrolled_kernels.experiments.pool import run_jobs

COMMANDS = {
    "synthetic": "synthetic --depths 1 2 4 --hidden 0 8 --seeds 1 --epochs 400 --no-speed",
    "learn-to-optimize": "learn-to-optimize --depths 1 3 --seeds 1 --epochs 12 --learning-rates 1e-2",
    "denoising": (
        "denoising --size 32 --crop 16 --batch-size 4 --depths 2 --algorithms gd --cases about-right --seeds 1 "
        "--epochs 8 --checkpoint-seconds 0.01 --no-speed --no-baselines --data IMAGES"
    ),
}
every_command = pytest.mark.parametrize("kind", COMMANDS)
_context = multiprocessing.get_context("forkserver")
# and what the commands import on their way
_LATE = ["torch._dynamo", "matplotlib.backends.backend_agg", "pyarrow.parquet", "skimage.metrics", "PIL.PngImagePlugin"]
_context.set_forkserver_preload(["unrolled_kernels.experiments.cli", *_LATE])


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A folder of 24 small images, IMAGES in the commands."""
    path = tmp_path_factory.mktemp("images")
    for i, tile in enumerate(photographs(32)[::97][:24, 0]):
        Image.fromarray((tile * 255).byte().numpy()).save(path / f"{i:02}.png")
    COMMANDS["denoising"] = COMMANDS["denoising"].replace("IMAGES", str(path))


def arguments(kind, out, workers=1):
    return [*COMMANDS[kind].split(), "--device", "cpu", "--workers", str(workers), "--out", str(out)]


def _run(argv, log, largest_file):
    os.setsid()
    # as in a terminal; what starts the tests in the background may have interrupts ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    # file descriptors and not sys.stderr: what libraries and other processes say counts too
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    if largest_file is not None:
        # a module first imported here would leave half of its bytecode, which nobody can import after that
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(cli.main(argv))


def start(argv, log, largest_file=None):
    """The command in a process that leads a group of its own."""
    process = _context.Process(target=_run, args=(argv, str(log), largest_file))
    process.start()
    return process


def finish(process, timeout=300):
    process.join(timeout)
    assert process.exitcode is not None, "the command hangs"
    return process.exitcode


def table(out):
    """Everything about a run but its wall time, in one order."""
    results = pd.read_parquet(out / "results.parquet").drop(columns="seconds")
    keys = [name for name in ("case", "hidden", "algorithm", "num_steps", "seed") if name in results]
    return results.sort_values(keys).reset_index(drop=True)


def files(out):
    return sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())


def assert_whole(out):
    """Every file but those that a killed process was writing can be read to its end."""
    if (out / "config.json").exists():
        assert json.loads((out / "config.json").read_text())["settings"]
    for file in out.glob("results*.parquet"):
        assert len(pd.read_parquet(file)) > 0
    for file in out.glob("[a-z]*/[!.]*.safetensors"):
        with safe_open(file, "pt") as saved:
            assert all(saved.get_tensor(name).shape is not None for name in saved.keys())  # noqa: SIM118


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """For each command a finished run: its directory, and how long it took."""
    runs = {}

    def get(kind):
        if kind not in runs:
            out = tmp_path_factory.mktemp(kind) / "run"
            began = time.monotonic()
            process = start(arguments(kind, out), out.parent / "log")
            assert finish(process) == 0, (out.parent / "log").read_text()
            runs[kind] = out, time.monotonic() - began
        return runs[kind]

    return get


# kills


@every_command
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)], ids="{}kills".format)
def test_killed_runs_end_with_the_same_table(undisturbed, tmp_path, kind, kills):
    """kill -9 at random times, the next run continuing each time; a run that ends before its kill begins anew."""
    whole, seconds = undisturbed(kind)
    out, rng, killed = tmp_path / "run", random.Random(kills), 0
    while killed < kills:
        process = start(arguments(kind, out), tmp_path / "log")
        process.join(rng.uniform(0, seconds))
        if process.exitcode is None:
            process.kill()
            killed += 1
            process.join()
            assert_whole(out)
        else:
            assert process.exitcode == 0, (tmp_path / "log").read_text()
            pd.testing.assert_frame_equal(table(out), table(whole), check_exact=True)
            shutil.rmtree(out)
    assert finish(start(arguments(kind, out), tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    pd.testing.assert_frame_equal(table(out), table(whole), check_exact=True)
    assert files(out) == files(whole)


def _wait_or_die(shared, job, on_progress):
    if job == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    return job


def _nothing():
    pass


def test_killed_worker_is_said_in_words():
    """As when memory runs out: not a traceback of the pool."""
    with pytest.raises(ChildProcessError, match=r"worker process was killed.* the same command .* fewer --workers"):
        list(run_jobs([0, 1, 2, 3], workers=2, prepare=_nothing, work=_wait_or_die, bar=None))


# interrupts


class _Object:
    pass


def _interrupt_in_a_callback(shared, job, on_progress):
    thing = _Object()
    callback = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    time.sleep(200)
    return callback


def test_an_interrupt_that_a_callback_swallows_comes_again(capfd):
    """Python prints what a callback raises and goes on: an import that is interrupted at the wrong moment."""
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(run_jobs([0, 1], workers=2, prepare=_nothing, work=_interrupt_in_a_callback, bar=None))
    assert time.monotonic() - began < 100
    assert "Traceback" not in capfd.readouterr().err


def _interrupted_command(log):
    info.main = lambda: _interrupt_in_a_callback(None, None, None)
    _run(["info"], log, None)


def test_an_interrupt_of_a_command_that_a_callback_swallows_comes_again(tmp_path):
    process = _context.Process(target=_interrupted_command, args=(str(tmp_path / "log"),))
    process.start()
    assert finish(process, 100) == 130
    assert (tmp_path / "log").read_text() == "interrupted; the same command continues from here\n"


class _InterruptedJobs:
    def __iter__(self):
        yield 0
        signal.raise_signal(signal.SIGINT)
        yield 1


def _sleep(shared, job, on_progress):
    time.sleep(200)


def test_an_interrupt_while_workers_start_is_kept(capfd):
    began = time.monotonic()
    # what starts the tests in the background may have interrupts ignored
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run_jobs(_InterruptedJobs(), workers=2, prepare=_nothing, work=_sleep, bar=None))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - began < 100
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 1) for kind in COMMANDS), ("denoising", 2)], ids=str)
def test_interrupted_run_says_how_to_go_on(undisturbed, tmp_path, kind, workers):
    """SIGINT to all processes of the group, as a terminal sends it."""
    whole, _ = undisturbed(kind)
    out, log = tmp_path / "run", tmp_path / "log"
    process = start(arguments(kind, out, workers), log)
    awaited = "checkpoints/*.safetensors" if kind == "denoising" else "config.json"
    deadline = time.monotonic() + 120
    while not list(out.glob(awaited)):
        assert process.exitcode is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process) == 130, log.read_text()
    text = log.read_text()
    assert text.endswith("interrupted; the same command continues from here\n")
    assert "Traceback" not in text
    assert_whole(out)
    assert not list(out.rglob(".*"))
    if kind == "denoising":
        assert list(out.glob("checkpoints/*.safetensors"))
    assert finish(start(arguments(kind, out), log)) == 0
    pd.testing.assert_frame_equal(table(out), table(whole), check_exact=True)


# disks and directories


def last_line(log):
    """The one message on a failed command's standard error, which is below its progress."""
    text = Path(log).read_text()
    assert "Traceback" not in text, text
    message = text.rstrip("\n").splitlines()[-1]
    assert text.count("unrolled-kernels ") == 1, text
    return message


@pytest.mark.parametrize(
    ("kind", "largest_file", "named"),
    [
        ("synthetic", 600, "config.json"),
        ("synthetic", 3000, "results.parquet"),
        ("learn-to-optimize", 20000, "png"),
        ("denoising", 3000, "checkpoints/about-right-gd-2-0.safetensors"),
        ("denoising", 20000, "png"),
    ],
)
def test_full_disk_names_the_file(undisturbed, tmp_path, kind, largest_file, named):
    """Writes that fail as on a full disk, from a limit on the size of files; with room the same command goes on.

    The limit holds for the log as well, which must fit.
    """
    out, log = tmp_path / "run", tmp_path / "log"
    assert finish(start(arguments(kind, out), log, largest_file)) == 1
    message = last_line(log)
    assert f"{out}/" in message
    assert f"{named}: cannot be written (" in message
    assert "make room" in message
    assert "the same command again" in message
    assert_whole(out)
    assert not list(out.rglob(".*"))
    if named == "png":
        # everything was trained
        assert len(pd.read_parquet(out / "results.parquet")) == len(table(undisturbed(kind)[0]))
    assert finish(start(arguments(kind, out), log)) == 0
    pd.testing.assert_frame_equal(table(out), table(undisturbed(kind)[0]), check_exact=True)


@every_command
def test_file_in_the_way_of_the_directory(tmp_path, kind, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert cli.main(arguments(kind, out)) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"unrolled-kernels {COMMANDS[kind].split()[0]}: {out}: no directory can be made")
        assert "give another --out" in message
    assert (tmp_path / "file").read_text() == "mine"


# damaged files


def copied(undisturbed, kind, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed(kind)[0], out)
    return out


def refused(kind, out, capsys):
    """The message of the command, which must fail."""
    capsys.readouterr()
    assert cli.main(arguments(kind, out)) == 1
    return capsys.readouterr().err.rstrip("\n").splitlines()[-1]


DAMAGE = {
    "config.json of another kind": ("config.json", lambda file: file.write_text('{"settings": 3}'), "another --out"),
    "config.json in bits": ("config.json", lambda file: file.write_bytes(b"\xff\xfe\x00"), "another --out"),
    "a directory for config.json": ("config.json", lambda file: (file.unlink(), file.mkdir()), "another --out"),
    "an empty table": ("results.parquet", lambda file: file.write_bytes(b""), "delete it"),
    "another table": (
        "results.parquet",
        lambda file: pd.DataFrame({"x": [1]}).to_parquet(file),
        "no columns .*num_steps.* delete it",
    ),
    "a table half as long": (
        "results.parquet",
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "delete it",
    ),
}


@every_command
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named_with_its_remedy(undisturbed, tmp_path, capsys, kind, damage):
    out = copied(undisturbed, kind, tmp_path)
    name, do, remedy = DAMAGE[damage]
    others = {file: (out / file).read_bytes() for file in files(out) if file != name}
    do(out / name)
    message = refused(kind, out, capsys)
    assert str(out / name) in message
    assert re.search(remedy, message)
    assert all((out / file).read_bytes() == content for file, content in others.items())


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_nothing_that_is_loaded_is_executed(undisturbed, tmp_path, capsys):
    """Pickles in place of weights, checkpoints, tables and data are refused by name, and stay asleep."""
    marker = tmp_path / "executed"
    torch.save(Malicious(marker), tmp_path / "pickle")
    torch.load(tmp_path / "pickle", weights_only=False)
    assert marker.exists(), "the pickle does what it should not be given the chance to do"
    marker.unlink()

    out = copied(undisturbed, "denoising", tmp_path)
    targets = [("denoising", file) for file in ("models/about-right-gd-2-0.safetensors", "results.parquet")]
    targets += [("denoising", "config.json"), ("denoising", "checkpoints/dncnn-none-0-0.safetensors")]
    for content in ((tmp_path / "pickle").read_bytes(), pickle.dumps(Malicious(marker))):
        for kind, name in targets:
            shutil.rmtree(out)
            copied(undisturbed, kind, tmp_path)
            if name.startswith("checkpoints"):
                # one that is to be continued
                (out / "results.parquet").unlink()
                (out / "checkpoints").mkdir()
            (out / name).write_bytes(content)
            assert str(out / name) in refused(kind, out, capsys)
            assert not marker.exists()
    np.savez(tmp_path / "reference.npz", x=np.array([Malicious(marker)], dtype=object))
    assert cli.main([*arguments("synthetic", tmp_path / "other"), "--reference", str(tmp_path)]) == 1
    assert "reference.npz" in capsys.readouterr().err
    assert not marker.exists()


def test_weights_without_a_state_are_no_checkpoint(undisturbed, tmp_path, capsys):
    out = copied(undisturbed, "denoising", tmp_path)
    (out / "results.parquet").unlink()
    name = "checkpoints/dncnn-none-0-0.safetensors"
    (out / "checkpoints").mkdir()
    shutil.copy(out / "models" / "dncnn-none-0-0.safetensors", out / name)
    assert f"{out / name}: not the state of a training" in refused("denoising", out, capsys)
