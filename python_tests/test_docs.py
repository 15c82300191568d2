"""The documentation holds: its code runs, its commands parse, its links lead somewhere, and the site builds."""

import argparse
import importlib
import importlib.util
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch._C import _functorch as functorch

import unrolled_kernels as uk
from unrolled_kernels import theory

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
FILE = re.compile(r"(?:[\w.-]+/)+[\w.-]+\.(?:py|md|h|cpp|cu|png)")


class Block(NamedTuple):
    line: int  # of the first line of code
    language: str  # "" for indented code
    code: str


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(text):
    """Fenced and indented code."""
    found, start, language = [], None, None
    lines = text.split("\n")
    for i, line in enumerate(lines):
        fence = re.match(r"```(\w*)", line)
        if fence and start is None:
            start, language = i + 1, fence[1]
        elif fence:
            found.append(Block(start + 1, language, "\n".join(lines[start:i])))
            start = None
        elif start is None and line.startswith("    "):
            found.append(Block(i + 1, "", line.strip()))
    assert start is None, "a fence is not closed"
    return found


def prose(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(page):
    """``(place, words)`` of each command of ours: in shell blocks, in indented code and between backticks."""
    # a command that goes on in the next line is one
    text = re.sub(r" *\\\n +", " ", page.read_text(encoding="utf-8"))
    places = [
        (f"{name_of(page)}:{block.line + i}", line)
        for block in blocks(text)
        if block.language in ("", "sh", "bash", "shell")
        for i, line in enumerate(block.code.split("\n"))
    ]
    places += [(name_of(page), " ".join(code.split())) for code in INLINE.findall(prose(text))]
    for place, line in places:
        if re.match(r"(unrolled-kernels|python -m (unrolled_kernels|benchmarks)|torchrun|make) ?", line):
            words = shlex.split(line.rstrip("… "), comments=True)
            if words[0] != "make" or len(words) > 1:
                yield place, words


WITH_PYTHON = [
    page for page in PAGES if any(block.language == "python" for block in blocks(page.read_text(encoding="utf-8")))
]


@pytest.fixture
def calls(monkeypatch):
    """``(layer, Q, b, y0, y)`` of each call of a first-order method, those apart that ``theory`` makes to judge one."""
    layers = {"gradient_descent": uk.UnrolledGD, "nesterov": uk.UnrolledNAG, "momentum": uk.UnrolledMomentum}
    seen = []

    def watched(function, layer):
        def call(Q, b, *coefficients, **options):
            result = function(Q, b, *coefficients, **options)
            y = result[0] if options.get("return_info") else result
            # a trace, or a transform's tensor, has no values to judge
            traced = torch.compiler.is_compiling() or functorch.is_functorch_wrapped_tensor(y)
            if not traced and type(y) is torch.Tensor:
                # not inspect.stack, which takes 10 ms
                frames = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
                if not any(Path(file).parent == Path(theory.__file__).parent for file in frames):
                    *coefficients, num_steps = (x.detach() if hasattr(x, "detach") else x for x in coefficients)
                    last = y[-1] if options.get("return_trajectory") else y
                    seen.append((layer(num_steps, *coefficients), Q, b.detach(), options.get("y0"), last.detach()))
            return result

        return call

    for name, layer in layers.items():
        monkeypatch.setattr(uk.functional, name, watched(getattr(uk.functional, name), layer))
    return seen


def assert_converging(layer, Q, b, y0, y):
    """The layer is stable on Q, and y is nearer the minimizer than y0 was."""
    found = theory.check(layer, Q)
    assert found.stable.all(), str(found)
    with torch.no_grad():
        exact = uk.functional.minimize(Q, b)
        before, after = ((x - exact).norm() for x in (torch.zeros_like(y) if y0 is None else y0, y))
    assert after <= before, f"{layer}: {after} from the minimizer, {before} before"


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_code_runs_and_converges(page, tmp_path, monkeypatch, calls):
    monkeypatch.chdir(tmp_path)
    threads, namespace = torch.get_num_threads(), {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python":
            # a traceback has the page's own line
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            exec(code, namespace)
            # of the hundreds of a training, some
            for call in calls[:: len(calls) // 20 + 1]:
                assert_converging(*call)
            calls.clear()
    assert torch.get_num_threads() == threads


def test_an_example_that_diverges_is_found(calls):
    A, b = torch.randn(1000, 5, 5), torch.randn(1000, 5)
    uk.UnrolledNAG(num_steps=30, step_size=1.0, mu=0.1)(0.1 * torch.eye(5) + 0.1 * A @ A.mT, b)
    with pytest.raises(AssertionError, match="UNSTABLE"):
        assert_converging(*calls.pop())
    assert not calls


class Parsed(Exception):
    pass


def parse(module, arguments):
    """Give a module's own parser these arguments, and go no further."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [module, *arguments])
        patch.delitem(sys.modules, module, raising=False)
        with pytest.raises(Parsed):
            runpy.run_module(module, run_name="__main__", alter_sys=True)


def literally(command, folder, **environment):
    """Run a command as it stands in the documentation, with this Python's programs first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # pytest-benchmark measures nothing in a process that pytest-xdist started
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = inherited | {"PATH": path, "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, env=environment)


def test_benchmarks_run_as_the_readme_says(tmp_path):
    """Stored, then compared; of all the benchmarks, the two of one small case."""
    pytest.importorskip("pytest_benchmark")
    lines = [line for block in blocks(README.read_text()) for line in block.code.split("\n")]
    commands = [line.split("#")[0].strip() for line in lines if line.startswith("pytest benchmarks")]
    assert len(commands) == 2
    few = "-k 'dense-gd-B50-d5 and forward and eager' --benchmark-min-rounds=1 --benchmark-max-time=0.01"
    for i, command in enumerate(commands):
        options = f"{few} -p no:cacheprovider --benchmark-storage=file://{tmp_path}"
        result = literally(command, ROOT, PYTEST_ADDOPTS=options)
        assert result.returncode == 0, result.stdout + result.stderr
        assert re.search(r"^2 passed|\b2 passed", result.stdout), result.stdout
        assert "skipped" not in result.stdout
        assert len(list(tmp_path.rglob("*.json"))) == 1
        assert ("(NOW)" in result.stdout) == (i == 1), result.stdout


def test_transcript_of_the_first_ten_minutes(tmp_path):
    """Each command prints what the page shows; ``…`` is anything, several lines where it stands alone."""
    pytest.importorskip("pandas")
    if "cpu" not in uk.available_backends():
        pytest.skip("the extension is not built")
    page = (ROOT / "docs/quick_start.md").read_text(encoding="utf-8")
    (transcript,) = (block.code for block in blocks(page) if block.language == "console")
    for turn in re.split(r"^\$ ", transcript, flags=re.MULTILINE)[1:]:
        command, _, shown = turn.partition("\n")
        result = literally(
            command.replace("unrolled-kernels", "python -m unrolled_kernels.experiments.cli", 1), tmp_path
        )
        errors = [line for line in result.stderr.split("\n") if line.startswith("unrolled-kernels")]
        printed = result.stdout + "".join(f"{line}\n" for line in errors)
        pattern = re.escape(shown.strip("\n")).replace("\\\n…\\\n", r"\n(?:.*\n)*").replace("…", ".*")
        assert re.fullmatch(pattern, printed.strip("\n")), f"$ {command}\n{printed}\n{result.stderr}"


SHORT = ["python -m unrolled_kernels.info", "python -m benchmarks.momentum --help", "python -m benchmarks.freshness"]
MODULES = ["compare", "roofs", "scaling", "training"]  # those of the ops share a parser, which SHORT calls


@pytest.mark.parametrize("command", SHORT)
def test_short_commands_of_the_readme_run(command):
    pytest.importorskip("pandas")
    assert command in README.read_text()
    result = literally(command, ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout or "freshness" in command


@pytest.mark.parametrize("module", MODULES)
def test_every_benchmark_helps(module, capsys):
    pytest.importorskip("pandas")
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"benchmarks.{module}").main(["--help"])
    assert left.value.code == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("command", ["synthetic", "learn-to-optimize", "denoising", "theory"])
def test_studies_start_as_the_readme_says(command, tmp_path):
    """Each is left to itself until it has written down what it does, then interrupted, which it survives."""
    assert f"`unrolled-kernels {command}`" in README.read_text()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "unrolled_kernels.experiments.cli", *command.split()]
    with subprocess.Popen(words, cwd=tmp_path, env=environment, start_new_session=True, stderr=subprocess.PIPE) as run:
        while run.poll() is None and not list(tmp_path.rglob("config.json")):
            time.sleep(0.1)
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGINT)
        error = run.communicate(timeout=120)[1].decode()
    assert run.returncode in (0, 130), error
    assert "Traceback" not in error, error
    assert list(tmp_path.rglob("config.json")) or command == "theory"


def test_targets_of_make_call_what_exists(capsys):
    """What `make` would do for each target the documentation names: its commands of ours parse."""
    pytest.importorskip("pandas")
    targets = {words[1] for page in PAGES for _, words in commands(page) if words[0] == "make" and "=" not in words[1]}
    assert {"demo", "test", "bench", "docs"} <= targets
    targets |= {"gpu-test", "gpu-sanitize", "test-oldest-triton", "test-slow"}
    seen = 0
    for target in sorted(targets):
        result = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, f"make {target}: {result.stderr}"
        for name in re.findall(r"python_tests/test_\w+\.py", result.stdout):
            assert (ROOT / name).exists(), f"make {target}: {name}"
        for line in result.stdout.split("\n"):
            found = re.search(r"(?:python3? -m (benchmarks\.\w+)|bin/(unrolled-kernels)) ?(.*)", line.replace("\\", ""))
            if found and found[3]:
                module = found[1] or "unrolled_kernels.experiments.cli"
                try:
                    parse(module, shlex.split(found[3]))
                except SystemExit:
                    pytest.fail(f"make {target}: {line}: {capsys.readouterr().err}")
                seen += 1
    assert seen >= 5


def test_commands_exist(capsys):
    pytest.importorskip("pandas")
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {name for names in targets for name in names.split()}
    seen = {}
    for page in PAGES:
        for place, words in commands(page):
            seen.setdefault(tuple(words), place)
    for words, place in seen.items():
        if words[0] == "make":
            assert words[1] in targets or "=" in words[1], f"{place}: {words}"
            continue
        arguments = list(words)
        if "-m" in words:
            module, *arguments = words[words.index("-m") + 1 :]
        else:
            module, arguments = "unrolled_kernels.experiments.cli", list(words[1:])
        try:
            assert importlib.util.find_spec(module), module
            if arguments:
                parse(module, arguments)
        except SystemExit as refused:
            if refused.code:
                pytest.fail(f"{place}: {shlex.join(words)}: {capsys.readouterr().err}")
    assert len(seen) > 20


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_files_exist(page):
    text = prose(page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        path = target.partition("#")[0]
        if path and "://" not in path:
            assert (page.parent / path).exists(), f"{name_of(page)}: {target}"
    for code in INLINE.findall(text):
        if FILE.fullmatch(code):
            assert any((folder / code).exists() for folder in (ROOT, page.parent)), f"{name_of(page)}: {code}"


def test_messages_to_be_looked_up_are_those_of_the_code():
    """Each message of the troubleshooting page: its longest part without a value stands in the sources."""
    sources = "".join(path.read_text() for path in [ROOT / "setup.py", *(ROOT / "unrolled_kernels").rglob("*.py")])
    # a string that goes on in the next line
    sources = re.sub(r'"\n\s*f?"', "", sources)
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        parts = re.split(r"'[^']*'|\bon cpu\b|\[[^\]]*\]|torch\.\w+|pandas|…|\(\*|: |^\w+:", message)
        part = max(parts, key=len).strip()
        assert len(part) > 8, message
        assert part in sources, f"{message!r}: {part!r}"


def test_site_builds(tmp_path):
    for package in ("mkdocs", "material", "mkdocs_include_markdown_plugin", "mkdocstrings", "latex2mathml", "ziamath"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'unrolled-kernels[docs]'")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    for name, text in pages.items():
        assert "arithmatex" not in text, name
        assert "include-markdown" not in text, name
        # Q* is no emphasis
        assert not re.search(r"\w<em>", text), name
        # the site needs no network
        assert not re.findall(
            r'<(?:script|img|iframe)[^>]*src="?(?:https?:)?//|<link[^>]*href="?(?:https?:)?//', text
        ), name
    assert pages["mathematics.html"].count("<math") > 50
    reference = "".join(text for name, text in pages.items() if name.startswith("api/"))
    documented = {anchor.rpartition(".")[2] for anchor in re.findall(r'id="?(unrolled_kernels\.[\w.]+)', reference)}
    public = {*uk.__all__, *uk.functional.__all__, *theory.__all__} - {"functional", "prox", "schedules"}
    assert public <= documented, public - documented


def test_formatters_before_a_commit_are_those_of_make_lint():
    config, package = ((ROOT / name).read_text() for name in (".pre-commit-config.yaml", "pyproject.toml"))
    hooks = dict(re.findall(r"(ruff|clang-format)\S*\n +rev: v(\S+)", config))
    assert hooks == dict(re.findall(r'"(ruff|clang-format)==([^"]+)"', package))


def test_sparse_coding_is_as_it_was_measured():
    """The table of docs/choosing.md is that of docs/lista.csv after the last step."""
    rows = [line.split(",") for line in (ROOT / "docs/lista.csv").read_text().splitlines()[1:]]
    last = {(n, snr, name): float(db) for n, snr, name, k, db in rows if k == "16"}
    page = (ROOT / "docs/choosing.md").read_text()
    lasso = {n: f"{float(db):.1f}".replace("-", "−") for n, _, name, _, db in rows if name == "lasso"}
    assert f"is at {lasso['1000']} dB there, and at {lasso['500']} for n = 500" in page
    for n, snr in {key[:2] for key in last}:
        noise = "no noise" if snr == "inf" else f"{float(snr):g} dB"
        cells = [f"{last[n, snr, name]:.1f}".replace("-", "−") for name in ("ISTA", "FISTA", "LISTA")]
        assert f"| {n} | {noise} | {' | '.join(cells)} |" in page
