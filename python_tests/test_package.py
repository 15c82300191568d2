"""Import, build and install under what machines lack: a compiler, nvcc, triton, the extension, a GPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import unrolled_kernels as uk
from unrolled_kernels import _backend

ROOT = Path(__file__).resolve().parent.parent
STEP = """
import torch
import unrolled_kernels as uk
b = torch.ones(3, 4, requires_grad=True)
uk.UnrolledNAG(5)(torch.eye(4), b).sum().backward()
print(b.grad.isfinite().all().item(), ",".join(uk.available_backends()), flush=True)
"""
# an entry of None makes an import fail as if the module were not installed
HIDE = "import sys; sys.modules[{name!r}] = None\n"


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("hidden", ["unrolled_kernels._C", "triton", "pandas"])
def test_runs_with_a_module_hidden(hidden):
    result = run_python(HIDE.format(name=hidden) + STEP)
    assert result.returncode == 0, result.stderr
    works, backends = result.stdout.split()
    assert works == "True"
    assert "eager" in backends
    assert ("cpu" in backends.split(",")) == (hidden != "unrolled_kernels._C" and "cpu" in uk.available_backends())


def test_import_loads_neither_triton_nor_the_experiments():
    code = "import sys, unrolled_kernels; print([m for m in ('triton', 'pandas', 'matplotlib') if m in sys.modules])"
    result = run_python(code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_runs_without_a_gpu():
    result = run_python(STEP, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert "cuda" not in result.stdout


def test_info_names_every_backend_and_the_way_to_it():
    for prefix in ("", HIDE.format(name="unrolled_kernels._C")):
        result = run_python(prefix + "import unrolled_kernels.info as i; i.main()")
        assert result.returncode == 0, result.stderr
        for name in _backend.NAMES:
            assert re.search(rf"^  {name} +(available$|not available: .{{20,}})", result.stdout, re.MULTILINE)
    assert "not built" in result.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What a source distribution holds, in a folder of its own."""
    folder = tmp_path_factory.mktemp("sources")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for name in files:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def install(sources, target, **environment):
    """``pip install --no-build-isolation`` into the folder ``target``."""
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index",
         "--disable-pip-version-check", "--target", str(target), str(sources)],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def installed(target, code=STEP):
    """Run ``code`` with the package of ``target`` and no trace of an editable install of this one."""
    prelude = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
    )
    return subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, cwd=target)


def test_installs_without_a_compiler(sources, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    target = tmp_path / "site"
    result = install(sources, target, PATH=str(tools), CXX="")
    assert result.returncode == 0, result.stderr
    record = json.loads((target / "unrolled_kernels/_build.json").read_text())
    assert not record["extension"]
    assert "no C++ compiler was found" in record["extension_reason"]
    step = installed(target)
    assert step.stdout.split() == ["True", "eager"], step.stdout + step.stderr
    info = installed(target, "import unrolled_kernels.info as i; i.main()")
    assert "not built: no C++ compiler was found: install one" in info.stdout


def test_a_required_extension_that_cannot_be_built_is_an_error(sources, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    environment = {"PATH": str(tools), "CXX": "", "UNROLLED_KERNELS_EXTENSION": "1"}
    result = install(sources, tmp_path / "site", **environment)
    assert result.returncode != 0
    assert "no C++ compiler was found" in result.stdout + result.stderr


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="there is no C++ compiler")
def test_installs_without_nvcc_and_imports(sources, tmp_path):
    """A wheel built by pip on a machine with a compiler alone: CPU kernels inside, no libtorch of a given version."""
    target = tmp_path / "site"
    result = install(sources, target, UNROLLED_KERNELS_CUDA="0", UNROLLED_KERNELS_EXTENSION="1")
    assert result.returncode == 0, result.stderr
    step = installed(target)
    assert step.stdout.split()[0] == "True", step.stderr
    assert "cpu" in step.stdout
    assert "cuda" not in step.stdout
    (library,) = (target / "unrolled_kernels").glob("_C*.so")
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.+?)\]", needed)
    assert not [name for name in libraries if re.search(r"torch.*\d+\.\d+", name)], libraries
    # every torch symbol is of the stable C interface: no C++ symbol of libtorch or c10
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", str(library)], capture_output=True, text=True
    ).stdout
    assert not re.findall(r"(?:at|c10|torch)::", symbols)
    assert re.search(r"aoti_torch_|torch_", symbols)


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension is not built")
def test_build_info_and_kernel_plan():
    from unrolled_kernels import _C

    info = _C.build_info()
    assert info["isa"] in info["isa_levels"]
    for structure in ("dense", "diagonal", "spectral"):
        for backward in (False, True):
            plan = _C.kernel_plan(structure, 1000, 5, 30, "float32", backward=backward)
            assert plan["variant"]
            assert plan["bytes"] > 0
            assert plan["flops"] > 0
    # the floors of the dense op: Q, b and y once; forward 2kd²
    plan = _C.kernel_plan("dense", 1000, 5, 30, "float32")
    assert plan["bytes"] == 1000 * (25 + 10) * 4
    assert plan["flops"] == 1000 * 2 * 30 * 25
    with pytest.raises((ValueError, RuntimeError), match="structure"):
        _C.kernel_plan("banded", 1000, 5, 30, "float32")
