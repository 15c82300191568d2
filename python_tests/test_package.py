"""Import, build and install under what machines lack: a compiler, nvcc, triton, the extension, a GPU."""

import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import types
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import unrolled_kernels as uk
from unrolled_kernels import _backend, info
from unrolled_kernels.ops import common
from unrolled_kernels.ops.momentum import function as momentum_function

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


def command_script(folder, end="sys.exit(main())\n"):
    """What pip makes of the entry point ``unrolled-kernels``."""
    script = folder / "unrolled-kernels"
    script.write_text(f"import sys\nfrom unrolled_kernels.experiments.cli import main\n{end}")
    return script


@pytest.mark.parametrize(
    ("command", "spins"),
    [
        (["unrolled-kernels", "info"], False),
        (["-m", "unrolled_kernels.info"], False),
        (["-m", "unrolled_kernels.experiments.denoising", "--help"], False),
        (["-B", "-u", "-X", "utf8", "-m", "unrolled_kernels.info"], False),
        (["-c", "import unrolled_kernels"], True),
        (["-c", "import unrolled_kernels", "unrolled_kernels.info"], True),
    ],
    ids=["script", "module", "torchrun's module", "options", "import", "argument"],
)
def test_threads_of_the_commands_sleep_while_they_wait(tmp_path, command, spins):
    """As OpenMP read it when it was loaded; a program that imports the package decides for itself."""
    if command[0] == "unrolled-kernels":
        command = [command_script(tmp_path), *command[1:]]
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stderr
    counts = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", ran.stderr)
    if not counts:
        pytest.skip("torch's OpenMP is not GNU's")
    assert all((count != "0") == spins for count in counts)


def test_a_command_says_its_help_without_torch(tmp_path):
    """Which takes a second to import; what is asked for afterwards is what the package has elsewhere."""
    end = (
        "try: main()\nexcept SystemExit: assert 'torch' not in sys.modules\n"
        "import unrolled_kernels as uk\n"
        "for name in uk.__all__: print(name, getattr(getattr(uk, name), '__module__', None))\n"
        "try: uk.UnrolledSGD\nexcept AttributeError as error: print(error)\n"
    )
    command = [sys.executable, command_script(tmp_path, end), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "learn-to-optimize" in said.stdout, said.stderr
    names = [f"{name} {getattr(getattr(uk, name), '__module__', None)}" for name in uk.__all__]
    assert said.stdout.splitlines()[-len(names) - 1 :] == [
        *names,
        "module 'unrolled_kernels' has no attribute 'UnrolledSGD'",
    ]


def test_runs_without_what_is_optional():
    result = run_python(HIDE.format(name="triton") + HIDE.format(name="pandas") + STEP)
    assert result.returncode == 0, result.stderr
    works, backends = result.stdout.split()
    assert works == "True"
    assert backends.split(",") == [name for name in uk.available_backends() if name != "triton"]


def test_import_loads_neither_triton_nor_the_experiments():
    code = "import sys, unrolled_kernels; print([m for m in ('triton', 'pandas', 'matplotlib') if m in sys.modules])"
    result = run_python(code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_runs_without_a_gpu():
    result = run_python(STEP, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert "cuda" not in result.stdout
    # where kernels run, auto says nothing
    assert result.stderr == "" or "cpu" not in uk.available_backends()


def test_info_names_every_backend_and_the_way_to_it():
    for prefix in ("", HIDE.format(name="unrolled_kernels._C")):
        result = run_python(prefix + "import unrolled_kernels.info as i; i.main()")
        assert result.returncode == 0, result.stderr
        for name in _backend.NAMES:
            assert re.search(rf"^  {name} +(available$|not available: .{{20,}})", result.stdout, re.MULTILINE)
    assert "not built" in result.stdout


def test_sources_without_a_build_are_named(tmp_path, monkeypatch):
    """A clone beside an installed package is what Python finds first; an installed one has no setup.py above it."""
    monkeypatch.setattr(_backend, "__file__", str(tmp_path / "unrolled_kernels" / "_backend.py"))
    assert _backend.build_record("extension_reason") == "no build was recorded"
    (tmp_path / "setup.py").touch()
    assert str(tmp_path) in _backend.build_record("extension_reason")


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension is not built")
def test_info_says_what_is_off(monkeypatch):
    monkeypatch.delenv("UNROLLED_KERNELS_CLUSTERS", raising=False)
    assert re.search(r"^  clusters +off, .*UNROLLED_KERNELS_CLUSTERS=1", info.report(), re.MULTILINE)
    monkeypatch.setenv("UNROLLED_KERNELS_CLUSTERS", "1")
    assert re.search(r"^  clusters +on, ", info.report(), re.MULTILINE)


def test_auto_says_once_that_it_is_slow():
    if _backend.platform.system() != "Linux":
        pytest.skip("there is no extension on this system")
    hidden = HIDE.format(name="unrolled_kernels._C")
    ran = run_python(hidden + STEP + STEP)
    assert ran.stdout.split()[0] == "True", ran.stderr
    assert not {"cpu", "cuda"} & {*ran.stdout.split()[1].split(",")}
    said = ran.stderr
    assert said.count("SlowBackendWarning: backend='auto' takes the eager loop on cpu tensors") == 1, said
    assert "build it with `pip install .`" in said
    silent = "import warnings, unrolled_kernels as uk\nwarnings.simplefilter('ignore', uk.SlowBackendWarning)\n"
    for prefix, environment in ((silent, {}), ("", {"UNROLLED_KERNELS_BACKEND": "eager"})):
        assert run_python(hidden + prefix + STEP, **environment).stderr == ""


# as in pip's isolated builds: the packages of the environment cannot be imported
ISOLATED = """
import sys, sysconfig
sys.path[:] = [p for p in sys.path if p not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
"""


def test_an_isolated_build_finds_the_torch_it_installs_beside(tmp_path):
    provide(["setuptools"], tmp_path)
    (tmp_path / "sitecustomize.py").write_text(ISOLATED)
    code = (
        "import importlib.util, runpy, setuptools; setuptools.setup = lambda **options: None\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "build = runpy.run_path('setup.py'); root = build['find_torch']()\n"
        "print(root, *build['torch_version'](root)[0].split('.')[:2])"
    )
    found = run_python(code, PYTHONPATH=str(tmp_path))
    torch = importlib.import_module("torch")
    assert found.stdout.split() == [str(Path(torch.__file__).parent), *torch.__version__.split(".")[:2]], found.stderr


def test_an_old_setuptools_is_refused_in_words():
    code = "import setuptools; setuptools.__version__ = '65.5.0'; import runpy; runpy.run_path('setup.py')"
    assert "setuptools 77 or later is needed, this is 65.5.0" in run_python(code).stderr


def test_all_say_the_same_of_the_oldest_torch(tmp_path):
    """Metadata, README and the build, which refuses an older one."""
    (tmp_path / "version.py").write_text("__version__ = '2.10.1'\ncuda: str | None = None\n")
    code = (
        "import pathlib, runpy, setuptools; setuptools.setup = lambda **options: None\n"
        "build = runpy.run_path('setup.py')['ninja_file']\n"
        f"build.__globals__['find_torch'] = lambda: pathlib.Path({str(tmp_path)!r})\n"
        "try: build('c++', {}, None)\nexcept Exception as refused: print(refused)"
    )
    assert run_python(code).stdout.startswith("torch 2.11 or later is needed, this is 2.10.1")
    assert "torch>=2.11" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "where torch ≥ 2.11 is installed" in (ROOT / "README.md").read_text(encoding="utf-8")


JUNK = (
    "build/x.o", "runs/demo/x.png", ".venv/x.py", "unrolled_kernels/_C.so", "unrolled_kernels/_build.json",
    "unrolled_kernels/__pycache__/x.pyc", "python_tests/__pycache__/x.pyc",
)  # fmt: skip


def repository():
    """The files of the repository that belong to its users."""
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    files = {name for name in files if (ROOT / name).is_file() and not name.startswith(".")}
    if not files:
        pytest.skip("this is not a git checkout")
    return files


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution of a checkout in which things lie about."""
    folder, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("sdist")
    for name in repository():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for name in JUNK:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    (archive,) = out.iterdir()
    return archive


HAS_COMPILER = shutil.which("c++") is not None or shutil.which("g++") is not None
COMPILED = [pytest.mark.slow, pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")]


@pytest.fixture(scope="module", params=["python", pytest.param("compiled", marks=COMPILED)])
def kind(request):
    """A wheel of Python alone, or with CPU kernels for this processor only, which takes minutes to compile."""
    return request.param


@pytest.fixture(scope="module")
def wheel(kind, sdist, tmp_path_factory):
    """The wheel that pip builds of it."""
    out = tmp_path_factory.mktemp("wheel")
    environment = {"UNROLLED_KERNELS_CUDA": "0", "UNROLLED_KERNELS_NATIVE": "1"}
    environment["UNROLLED_KERNELS_EXTENSION"] = "1" if kind == "compiled" else "0"
    result = pip("wheel", "--no-build-isolation", "--no-deps", "-w", out, sdist, **environment)
    assert result.returncode == 0, result.stderr
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def empty_environment(wheel, tmp_path_factory):
    """A new environment with the wheel and what it says that it requires, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    result = pip("--python", folder / "bin/python", "install", "--no-deps", wheel)
    assert result.returncode == 0, result.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    provide(requirements_of(site), site)
    return types.SimpleNamespace(folder=folder, site=site)


def pip(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments), "-q", "--no-index"],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def requirements_of(site, extra=""):
    (distribution,) = importlib.metadata.distributions(name="unrolled-kernels", path=[str(site)])
    requirements = map(Requirement, distribution.requires)
    return [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]


def provide(requirements, site):
    """Link the packages that ``requirements`` name, and what they require in turn, into the folder ``site``."""
    pending, seen = list(requirements), set()
    while pending:
        requirement = Requirement(pending.pop())
        if requirement.name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(requirement.name)
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{requirement.name} is not installed here")
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
        pending += distribution.requires or ()


def run_in(environment, *command):
    """Run a command of an environment, with nothing of this one."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [environment.folder / "bin" / command[0], *command[1:]],
        capture_output=True, text=True, cwd=environment.folder, env=own,
    )  # fmt: skip


def install(source, target, **environment):
    """``pip install --no-build-isolation`` into the folder ``target``."""
    return pip("install", "--no-build-isolation", "--no-deps", "--target", target, source, **environment)


def installed(target, code=STEP):
    """Run ``code`` with the package of ``target`` and no trace of an editable install of this one."""
    prelude = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
    )
    return subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, cwd=target)


def test_the_sdist_is_the_repository_without_junk(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    generated = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert names - generated == repository()


def test_installs_without_a_compiler(sdist, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    target = tmp_path / "site"
    result = install(sdist, target, PATH=str(tools), CXX="")
    assert result.returncode == 0, result.stderr
    record = json.loads((target / "unrolled_kernels/_build.json").read_text())
    assert not record["extension"]
    assert "no C++ compiler was found" in record["extension_reason"]
    step = installed(target)
    assert step.stdout.split() == ["True", "eager"], step.stdout + step.stderr
    info = installed(target, "import unrolled_kernels.info as i; i.main()")
    assert "not built: no C++ compiler was found: install one" in info.stdout


def test_a_required_extension_that_cannot_be_built_is_an_error(sdist, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    environment = {"PATH": str(tools), "CXX": "", "UNROLLED_KERNELS_EXTENSION": "1"}
    result = install(sdist, tmp_path / "site", **environment)
    assert result.returncode != 0
    assert "no C++ compiler was found" in result.stdout + result.stderr


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")
def test_required_cuda_kernels_that_cannot_be_built_are_an_error(sdist, tmp_path):
    """Before anything is compiled: a run on a GPU would otherwise test nothing and look well."""
    environment = {"UNROLLED_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "1.0", "CUDA_HOME": str(tmp_path)}
    result = install(sdist, tmp_path / "site", **environment)
    assert result.returncode != 0
    said = result.stdout + result.stderr
    assert "nvcc was not found" in said or "nvcc knows none of the architectures" in said


def check_contents(kind, wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    own = {name for name in files if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in own} == {"unrolled_kernels"}
    libraries = sorted(name for name in own if ".so" in name)
    package = {name for name in repository() if name.startswith("unrolled_kernels/")}
    assert own == package | {"unrolled_kernels/_build.json", *libraries}
    assert "unrolled_kernels/py.typed" in own
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in files)
    names = [re.fullmatch(r"unrolled_kernels/(\w+)\..*\.so", library)[1] for library in libraries]
    assert names == (["_C", "_C_autograd", "_C_experiments"] if kind == "compiled" else [])
    for library in libraries:
        if "_C_autograd" not in library:
            check_library(tmp_path / library)


def check_library(library):
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    assert needed
    assert not [name for name in needed if re.search(r"torch.*\d+\.\d+", name)], needed
    # where torch lies is nobody's business but the importing process's
    assert not re.findall(r"R(?:UN)?PATH.*", dynamic)
    # every torch symbol is of the stable C interface: no C++ symbol of libtorch or c10
    symbols = subprocess.run(["nm", "-D", "--undefined-only", "-C", library], capture_output=True, text=True).stdout
    assert not re.findall(r"(?:at|c10|torch)::", symbols)
    assert re.search(r"aoti_torch_|torch_", symbols)


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension is not built")
def test_a_node_for_another_torch_is_not_loaded(monkeypatch):
    load, built_for = _backend.autograd_extension.__wrapped__, {"autograd_torch": "2.0.0"}
    monkeypatch.setattr(_backend, "build_record", built_for.get)
    assert load() is None
    monkeypatch.setattr(_backend, "autograd_extension", load)
    said = lambda: re.search("autograd node +(.*)", info.report())[1]
    assert said() == f"Python: the one in C++ was built for torch 2.0.0, this is {torch.__version__}; build it again"
    built_for["autograd_torch"] = str(torch.__version__)
    monkeypatch.setitem(sys.modules, "unrolled_kernels._C_autograd", None)
    assert load() is None
    assert said() == "Python: the one in C++ cannot be loaded; build it again"
    # as in a wheel
    built_for["autograd_torch"] = None
    assert said().startswith("Python: a build from source")


def test_a_node_of_other_sources_is_refused_in_words(monkeypatch):
    def refuse(*functions):
        raise RuntimeError(f"set_python_backward: expected 3 arguments, got {len(functions)}")

    monkeypatch.setattr(momentum_function, "_node", types.SimpleNamespace(set_python_backward=refuse))
    with pytest.raises(RuntimeError, match=r"the compiled autograd node .* other sources than these; build it again"):
        momentum_function.set_python_backward(None, None)


def test_an_extension_of_other_sources_is_refused_in_words():
    with pytest.raises(RuntimeError, match=r"has no op of_tomorrow: it was built from other sources .* build it again"):
        common.register("of_tomorrow", None)


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension is not built")
def test_an_op_of_other_arguments_is_refused_in_words():
    said = r"the compiled op rnn takes \(matrix .*\), expected \(matrix tomorrow\): it was built from other sources"
    with pytest.raises(RuntimeError, match=said):
        common.register("rnn", None, arguments="matrix tomorrow")


def test_info_tells_an_extension_of_other_sources(tmp_path):
    assert info._other_sources("any", tmp_path) == []  # an installation has no sources beside it
    (tmp_path / "module.cpp").write_text("int x;")
    built_from = hashlib.sha256(b"module.cpp\0int x;").hexdigest()
    assert info._other_sources(built_from, tmp_path) == []
    (tmp_path / "module.cpp").write_text("int y;")
    (line,) = info._other_sources(built_from, tmp_path)
    assert "built from other sources" in line
    assert "build it again" in line


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension is not built")
def test_info_knows_what_the_extension_was_built_from():
    # that of the tests is of these sources, else every test is of others
    assert info._other_sources(_backend.extension().build_info()["csrc_sha256"]) == []


@pytest.mark.skipif("cpu" not in uk.available_backends(), reason="the extension is not built")
def test_the_extensions_need_the_stable_interface_alone():
    # _C_autograd is a torch's own, and left alone by another (test_a_node_for_another_torch_is_not_loaded)
    libraries = sorted({*(ROOT / "unrolled_kernels").glob("_C*.so")} - {*(ROOT / "unrolled_kernels").glob("_C_a*.so")})
    assert len(libraries) >= 2
    for library in libraries:
        check_library(library)


def check_metadata(wheel, empty_environment):
    (distribution,) = importlib.metadata.distributions(name="unrolled-kernels", path=[str(empty_environment.site)])
    metadata = distribution.metadata
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (metadata["Version"], metadata["Requires-Python"]) == (uk.__version__, project["requires-python"])
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# unrolled-kernels")
    versions = re.findall(r"Python :: 3\.(\d+)", " ".join(metadata.get_all("Classifier")))
    assert f">=3.{min(map(int, versions))}" == metadata["Requires-Python"]
    extras = project["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra")) == set(extras)
    names = lambda requirements: {Requirement(r).name for r in requirements}
    base = set(requirements_of(empty_environment.site))
    assert base == {"numpy", "torch"}
    for extra, requirements in extras.items():
        assert set(requirements_of(empty_environment.site, extra)) - base == names(requirements)
    # pip resolves the extra from what this environment has
    result = pip("install", "--dry-run", f"unrolled-kernels[experiments] @ {wheel.as_uri()}")
    assert result.returncode == 0, result.stderr
    assert "does not provide the extra" not in result.stdout + result.stderr


def check_it_runs_alone(kind, empty_environment):
    step = run_in(empty_environment, "python", "-c", STEP)
    assert step.stdout.split()[0] == "True", step.stderr
    assert ("cpu" in step.stdout) == (kind == "compiled")
    assert "cuda" not in step.stdout
    command = run_in(empty_environment, "unrolled-kernels", "--help")
    assert command.returncode == 0, command.stderr
    version = run_in(empty_environment, "unrolled-kernels", "--version")
    assert version.stdout == f"unrolled-kernels {uk.__version__}\n"
    # the experiments want more, and name all of it at once
    synthetic = run_in(empty_environment, "unrolled-kernels", "synthetic", "--help")
    assert synthetic.returncode == 1
    assert re.search(
        r"needs matplotlib, pandas, .*tqdm; get .*`pip install 'unrolled-kernels\[experiments\]'`", synthetic.stderr
    )
    provide(requirements_of(empty_environment.site, "experiments"), empty_environment.site)
    subcommands = re.findall(r"^    ([\w-]+)", command.stdout, re.MULTILINE)
    assert subcommands == ["synthetic", "learn-to-optimize", "denoising", "theory", "info"]
    code = (
        "import sys\nfrom unrolled_kernels.experiments.cli import main\n"
        "for name in sys.argv[1:]:\n    try: main([name, '--help'])\n    except SystemExit as end: assert not end.code"
    )
    helps = run_in(empty_environment, "python", "-c", code, *subcommands)
    assert helps.returncode == 0, helps.stderr
    assert re.findall(r"usage: unrolled-kernels ([\w-]+)", helps.stdout) == subcommands
    for option in ("--device", "--seeds", "--out"):
        assert option in helps.stdout
    info = run_in(empty_environment, "unrolled-kernels", "info")
    assert re.search(rf"cpu +{'available' if kind == 'compiled' else 'not available'}", info.stdout), info.stderr


def test_the_wheel_holds_says_and_requires_what_it_should(kind, wheel, empty_environment, tmp_path):
    """One test, for one build: several could be given to several processes."""
    check_contents(kind, wheel, tmp_path)
    check_it_runs_alone(kind, empty_environment)
    check_metadata(wheel, empty_environment)


ENVIRONMENTS = runpy.run_path(str(ROOT / "docs" / "environments.py"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compiled"], indirect=True)
@pytest.mark.parametrize("row", [row for row in ENVIRONMENTS["ROWS"] if row.source == "wheel"], ids=" ".join)
def test_a_wheel_runs_under_every_torch_of_its_python(kind, wheel, row):
    try:
        said = ENVIRONMENTS["try_out"](row, wheel)
    except ENVIRONMENTS["Unavailable"] as reason:
        pytest.skip(str(reason))
    if sys.version.startswith(f"{row.python}."):
        assert re.fullmatch(r"CPU kernels \([\w/]+\); a training step ran on 'cpu'; pip check: clean", said)
    else:
        assert said == f"refused: {wheel.name} is not a supported wheel on this platform."


USER = """
from typing import assert_type

import torch

import unrolled_kernels as uk
import unrolled_kernels.functional as F
from unrolled_kernels import Diagonal, Spectral, UnrolledGD, UnrolledMomentum, UnrolledNAG, UnrolledRNN
from unrolled_kernels import schedules, theory
from unrolled_kernels.annotations import Quadratic, Schedule

q, b = torch.ones(3, 4), torch.ones(3, 4)


def energy(dense: bool) -> Quadratic:
    return torch.eye(4) if dense else Diagonal(q)


assert_type(UnrolledNAG(5, mu=None, stable_region=(0.1, 1))(energy(True), b, y0=b), torch.Tensor)
assert_type(UnrolledGD(num_steps=3, step_size=torch.ones(3))(Spectral(q, torch.eye(4)), b), torch.Tensor)
assert_type(UnrolledMomentum.fista(3, 1.0), UnrolledMomentum)
assert_type(UnrolledRNN(3, 4).contraction_factor(Diagonal(q)), torch.Tensor)
assert_type(F.nesterov(q, b, 1.0, 0.1, 5, return_trajectory=True, backend="eager"), torch.Tensor)
assert_type(F.rnn(Diagonal(q), b, UnrolledRNN(3, 4).weights, 3), torch.Tensor)
assert_type(Diagonal(q).spectrum_bounds(), tuple[torch.Tensor, torch.Tensor])
assert_type(schedules.chebyshev(3, 0.1, 1), Schedule)
assert_type(uk.available_backends(), tuple[str, ...])
assert_type(theory.recommend(0.1, 1.0, 10, "over").error_factor, float)
assert_type(theory.stability("gd", 3, 1.0, 0.1).wrt_b, torch.Tensor)
with uk.use_backend("eager"):
    UnrolledGD("three")  # wrong: arg-type
    UnrolledNAG(3)([[1.0]], b)  # wrong: call-overload
    F.gradient_descent(q, b, 1.0)  # wrong: call-overload
    Diagonal(q).inverse()  # wrong: attr-defined
"""


@pytest.mark.slow
def test_types(tmp_path):
    """mypy passes on the package, and knows its types in a program that imports it: what is right and what is not."""
    pytest.importorskip("mypy")
    program = tmp_path / "user.py"
    program.write_text(USER)
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", "unrolled_kernels", program]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    errors = re.findall(r"^(\S+?):(\d+): error: .*\[([\w-]+)\]$", result.stdout, re.MULTILINE)
    lines = enumerate(USER.splitlines(), start=1)
    wrong = [(str(i), line.partition("# wrong: ")[2]) for i, line in lines if "# wrong: " in line]
    assert [(line, code) for _, line, code in errors] == wrong, result.stdout + result.stderr
    # the cache remembers the folder of the run before
    assert {Path(name).name for name, *_ in errors} == {program.name}


def public_functions():
    from unrolled_kernels import functional, schedules, testing, theory

    for module in (uk, functional, schedules, testing, theory):
        names = getattr(module, "__all__", None) or [n for n, x in vars(module).items() if inspect.isfunction(x)]
        for name in names:
            value = getattr(module, name)
            if inspect.isfunction(value) and not name.startswith("_"):
                yield f"{module.__name__}.{name}", value
            elif inspect.isclass(value):
                for method, function in vars(value).items():
                    function = getattr(function, "__func__", function)
                    if inspect.isfunction(function) and (method == "__init__" or not method.startswith("_")):
                        yield f"{module.__name__}.{name}.{method}", function


def test_every_public_function_is_annotated_and_documented():
    seen = 0
    for name, function in public_functions():
        signature = inspect.signature(function)
        bare = [
            p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        assert not bare, f"{name}: {bare}"
        assert signature.return_annotation is not signature.empty, name
        assert function.__doc__ or name.rpartition(".")[2] in ("__init__", "extra_repr"), name
        seen += 1
    assert seen > 60


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
