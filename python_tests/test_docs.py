"""The documentation holds: its code runs, its commands parse, its links lead somewhere, and the site builds."""

import argparse
import importlib
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import unrolled_kernels as uk
from unrolled_kernels import theory

ROOT = Path(__file__).resolve().parent.parent
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
    text = page.read_text(encoding="utf-8")
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


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads, namespace = torch.get_num_threads(), {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python":
            # a traceback has the page's own line
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            exec(code, namespace)
    assert torch.get_num_threads() == threads


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
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml", "ziamath"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'unrolled-kernels[docs]'")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    for name, text in pages.items():
        assert "arithmatex" not in text, name
        assert "&lt;!-- include" not in text, name
        assert "<!-- include" not in text, name
        # Q* is no emphasis
        assert not re.search(r"\w<em>", text), name
        # the site needs no network
        assert not re.findall(
            r'<(?:script|img|iframe)[^>]*src="?(?:https?:)?//|<link[^>]*href="?(?:https?:)?//', text
        ), name
    assert pages["mathematics.html"].count("<math") > 50
    reference = "".join(text for name, text in pages.items() if name.startswith("api/"))
    documented = {anchor.rpartition(".")[2] for anchor in re.findall(r'id="?(unrolled_kernels\.[\w.]+)', reference)}
    public = {*uk.__all__, *uk.functional.__all__, *theory.__all__} - {"functional", "schedules"}
    assert public <= documented, public - documented
