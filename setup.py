"""Builds the extensions: CPU kernels with any C++17 compiler, CUDA kernels where torch has CUDA and nvcc is there.

    unrolled_kernels/_C               the ops of the library: csrc, but for
    unrolled_kernels/_C_experiments   kernels of the paper's tasks, csrc/experiments
    unrolled_kernels/_C_autograd      gradients in C++, csrc/autograd: for the very torch that it is built against

Sources in a folder ``cpu`` are compiled once for each instruction set, all others once.

The metadata is in pyproject.toml. Environment:

    UNROLLED_KERNELS_EXTENSION   0: install pure Python; 1: a build that fails is an error. Unset: it is reported.
    UNROLLED_KERNELS_AUTOGRAD    0: leave _C_autograd out, as a wheel for any torch must; Python does what it does.
    UNROLLED_KERNELS_CUDA        0: leave the CUDA kernels out. 1: fail where they cannot be built. Unset: build them
                                 where torch is a CUDA build and nvcc is there.
    CXX, CUDA_HOME, MAX_JOBS     the compiler, the CUDA toolkit and the number of compilations at once.
    TORCH_CUDA_ARCH_LIST         architectures instead of those of this machine's GPUs (without any: of a list of six).
    UNROLLED_KERNELS_NATIVE      1: the CPU kernels for this processor's instruction set alone, a third of the work.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.partition(".")[0]) < 77:
    # older ones stop at the licence in pyproject.toml, in the words of a validator
    raise SystemExit(
        f"unrolled_kernels: setuptools 77 or later is needed, this is {setuptools.__version__}: "
        "pip install 'setuptools>=77'"
    )

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
OLDEST_TORCH = (2, 11)  # that pyproject.toml takes
TORCH_TARGET = (2, 10)  # of the stable interface, which later ones keep
LEVELS = ("baseline", "avx2", "avx512")  # UNROLLED_KERNELS_ISA = 0, 1, 2


def isa_levels():
    """Which of ``LEVELS`` to compile the CPU kernels for, and the flag that says so where it is only one."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return [0], []
    if os.environ.get("UNROLLED_KERNELS_NATIVE") != "1":
        return list(range(len(LEVELS))), []
    # what csrc/cpu/simd/isa.cpp asks the processor for
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]))
    avx2 = {"avx2", "fma"} <= flags
    level = avx2 + (avx2 and {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= flags)
    return [level], [f"-DUNROLLED_KERNELS_ONLY_ISA={level}"]


class BuildError(Exception):
    """Why there is no extension, or why it has no CUDA kernels, in words for the person who builds."""


def find_torch():
    """The folder of torch: that of this process or, in pip's isolated build, of the environment it installs into."""
    spec = importlib.util.find_spec("torch")
    places = (
        [Path(spec.origin).parent]
        if spec
        else [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    )
    for place in places:
        if (place / "version.py").exists():
            return place
    raise BuildError(
        "torch was not found in the build: install torch, ninja and pybind11, then build with --no-build-isolation"
    )


def torch_version(root):
    """``("2.13.0+cu130", "13.0")``: torch's version and its CUDA's, or None, where it cannot be imported."""
    text = (root / "version.py").read_text()
    cuda = re.search(r"^cuda\b.*= '([\d.]+)'", text, re.MULTILINE)
    return re.search(r"__version__ = '(.+)'", text)[1], cuda and cuda[1]


def cuda_toolkit(torch_cuda):
    """The nvcc in use and its release, (13, 0) for instance."""
    asked = os.environ.get("UNROLLED_KERNELS_CUDA")
    if asked == "0":
        raise BuildError("UNROLLED_KERNELS_CUDA=0")
    if torch_cuda is None and asked != "1":
        raise BuildError("this torch was built without CUDA; UNROLLED_KERNELS_CUDA=1 builds the kernels all the same")
    if not list((CSRC / "cuda").glob("*.cu")):
        raise BuildError("there are no CUDA sources")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin"] if home else []
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*candidates, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if nvcc is None:
        raise BuildError("nvcc was not found: put it on the PATH or set CUDA_HOME")
    release = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    if release is None:
        raise BuildError(f"{nvcc} --version names no release")
    return nvcc, (int(release[1]), int(release[2]))


def visible_cards():
    """Architectures of the GPUs of this machine, ``"9.0"`` for instance; empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return ""
    found = subprocess.run(query, capture_output=True, text=True)
    return ";".join(sorted(set(re.findall(r"^\d+\.\d+$", found.stdout, re.MULTILINE)))) if found.returncode == 0 else ""


def cuda_architectures(nvcc):
    """``-gencode`` flags and the names of the architectures, without those that this nvcc does not know."""
    known = set(
        re.findall(r"compute_(\w+)", subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout)
    )
    flags, names = [], []
    for name in re.split(r"[; ]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or visible_cards() or ARCHITECTURES):
        number = name.removesuffix("+PTX").replace(".", "")
        if number.rstrip("af") not in known and number not in known:
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        names.append(name)
    if not flags:
        raise BuildError("nvcc knows none of the architectures in TORCH_CUDA_ARCH_LIST")
    return flags, names


def cuda_libraries(nvcc):
    """Include and library folder of the toolkit that nvcc belongs to."""
    output = subprocess.run([nvcc, "-dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"_?TOP_?=(\S+)", output)
    home = Path(top[1] if top else Path(nvcc).resolve().parent.parent).resolve()
    for lib in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
        if (home / lib / "libcudart_static.a").exists():
            return home / "include", home / lib
    raise BuildError(f"libcudart_static.a was not found below {home}")


def pybind11_include(torch_include):
    """Where pybind11's headers are: with torch, whose path is the same in every isolated build, else in the package."""
    if not (torch_include / "pybind11").is_dir() and importlib.util.find_spec("pybind11"):
        import pybind11

        return Path(pybind11.get_include())
    return torch_include


def quote(path):
    """``path`` as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def rule(name, command, description, depfile=None):
    """Lines of a ninja rule."""
    dependencies = [f"  depfile = {depfile}", "  deps = gcc"] if depfile else []
    return [f"rule {name}", f"  command = {command}", f"  description = {description}", *dependencies]


def sources_sha256():
    """Hash of everything under csrc, to tell which kernels a measurement is of."""
    digest = hashlib.sha256()
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")):
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def ninja_file(compiler, libraries, build):
    """The text of build.ninja for the libraries, by name, and why there is no CUDA in it (None if there is)."""
    torch_root = find_torch()
    version, torch_cuda = torch_version(torch_root)
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        raise BuildError(f"torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or later is needed, this is {version}")
    torch_include = torch_root / "include"
    includes = [CSRC, torch_include, pybind11_include(torch_include), Path(sysconfig.get_paths()["include"])]
    target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000ULL"
    # no -std: the headers of torch ask for C++17 or C++20 by version, and compilers default to one that serves
    cxx_flags = [
        "-O2",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-Wno-unused-parameter",
        target,
    ]
    levels, only = isa_levels()
    cxx_flags += [*only, f"-I{includes[0]}", *(f"-isystem {quote(p)}" for p in includes[1:])]
    link_flags = [f"-L{quote(torch_root / 'lib')}", "-ltorch_cpu"]
    module_flags = [
        "-O1",  # describes the build: nothing in it is waited for
        f'-DUNROLLED_KERNELS_SOURCES_SHA256=\\"{sources_sha256()}\\"',
        f'-DUNROLLED_KERNELS_TORCH_TARGET=\\"{TORCH_TARGET[0]}.{TORCH_TARGET[1]}\\"',
    ]
    nvcc_flags, cuda_reason, nvcc = [], None, None
    try:
        nvcc, release = cuda_toolkit(torch_cuda)
        gencode, names = cuda_architectures(nvcc)
        include, lib = cuda_libraries(nvcc)
    except BuildError as error:
        if os.environ.get("UNROLLED_KERNELS_CUDA") == "1":
            raise
        cuda_reason, nvcc = str(error), None
    else:
        cxx_flags += ["-DUNROLLED_KERNELS_WITH_CUDA", f"-isystem {quote(include)}"]
        link_flags += [f"-L{quote(lib)}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        nvcc_flags = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{CSRC}", *gencode]
        module_flags += [
            f'-DUNROLLED_KERNELS_CUDA_ARCHITECTURES=\\"{",".join(names)}\\"',
            f'-DUNROLLED_KERNELS_CUDA_VERSION=\\"{release[0]}.{release[1]}\\"',
        ]

    lines = [
        f"cxx = {quote(compiler)}",
        f"nvcc = {quote(nvcc or 'nvcc')}",
        f"flags = {' '.join(cxx_flags)}",
        f"nvcc_flags = {' '.join(nvcc_flags)}",
        *rule("cxx", "$cxx $flags $extra -MMD -MF $out.d -c $in -o $out", "compile $in $level", depfile="$out.d"),
        *rule("nvcc", "$nvcc $nvcc_flags $extra -MD -MF $out.d -c $in -o $out", "compile $in $level", depfile="$out.d"),
        *rule("link", f"$cxx -shared -Wl,--as-needed $in {' '.join(link_flags)} $extra -o $out", "link $out"),
    ]

    def compile_source(rule_name, path, extra=(), level=None):
        suffix = "" if level is None else f".{level}"
        output = build / f"{path.relative_to(CSRC).as_posix().replace('/', '.')}{suffix}.o"
        lines.append(f"build {quote(output)}: {rule_name} {quote(path)}")
        lines.extend([f"  extra = {' '.join(extra)}"] if extra else [])
        lines.extend(
            [f"  level = for {LEVELS[level] if isinstance(level, int) else level}"] if level is not None else []
        )
        return output

    def compile_folder(folder):
        objects = []
        # what takes longest first, so that no processor waits for another at the end
        for path in sorted(folder.glob("cpu/*.cpp"), key=lambda path: -path.stat().st_size):
            for level in reversed(levels):
                # the level of processors without AVX2 is to be there soon rather than to be fast
                cheaper = ["-O1"] if level == 0 and len(levels) > 1 else []
                objects.append(compile_source("cxx", path, [f"-DUNROLLED_KERNELS_ISA={level}", *cheaper], level))
        for path in sorted(folder.glob("*.cpp")):
            objects.append(compile_source("cxx", path, module_flags if path.name == "module.cpp" else ()))
        return objects

    def link(library, objects, extra=""):
        lines.append(f"build {quote(library)}: link {' '.join(map(quote, objects))}")
        lines.append(f"  extra = {extra}")
        lines.append(f"default {quote(library)}")

    # each storage type by itself, so that many processors share the work
    cuda_objects = [
        compile_source("nvcc", path, [f"'-DUNROLLED_KERNELS_CUDA_TYPES(_)=_({storage})'"], storage)
        for path in (sorted(CSRC.glob("cuda/*.cu")) if nvcc else [])
        for storage in ("float", "double", "half", "bfloat16")
    ]
    if "_C_autograd" in libraries:
        # all of torch's interface, not the stable one alone; most of the time goes into its headers
        node = compile_source("cxx", CSRC / "autograd/momentum.cpp", ["-UTORCH_TARGET_VERSION", "-O1"])
        link(libraries["_C_autograd"], [node], "-ltorch_python -lc10")
    shared = [compile_source("cxx", path) for path in sorted(CSRC.glob("cpu/simd/*.cpp"))]
    objects = compile_folder(CSRC)
    link(libraries["_C"], [*cuda_objects, *objects, *shared])
    # the experiments train RNNs by the kernels themselves
    shared += [path for path in objects if path.name.startswith("cpu.rnn_cells.")]
    link(libraries["_C_experiments"], [*compile_folder(CSRC / "experiments"), *shared])
    return "\n".join(lines) + "\n", cuda_reason


def build_libraries(libraries):
    """Compile to these files, by name; return what is to be recorded of it."""
    if os.environ.get("UNROLLED_KERNELS_EXTENSION") == "0":
        raise BuildError("UNROLLED_KERNELS_EXTENSION=0")
    compiler = next(
        filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))), None
    )
    if compiler is None:
        raise BuildError("no C++ compiler was found: install one (g++, for instance) or set CXX")
    ninja = shutil.which("ninja") or shutil.which("ninja", path=os.path.dirname(sys.executable))
    if ninja is None:
        raise BuildError("ninja was not found: pip install ninja")
    build = ROOT / "build" / f"extension-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    build.mkdir(parents=True, exist_ok=True)
    built = {name: build / library.name for name, library in libraries.items()}
    text, cuda_reason = ninja_file(compiler, built, build)
    (build / "build.ninja").write_text(text)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []

    def make(*targets):
        return subprocess.run([ninja, "-C", str(build), *jobs, *targets]).returncode == 0

    record = {"cuda_reason": cuda_reason, "autograd_torch": None}
    if "_C_autograd" in built:
        record["autograd_torch"] = torch_version(find_torch())[0]
    if not make("-k", "0"):
        # a torch whose interface has changed is no reason to go without the kernels
        required = [str(path) for name, path in built.items() if name != "_C_autograd"]
        if os.environ.get("UNROLLED_KERNELS_EXTENSION") == "1" or not make(*required):
            raise BuildError("the compilation failed; its messages are above")
        record["autograd_torch"] = None
    for name, library in libraries.items():
        if name == "_C_autograd" and record["autograd_torch"] is None:
            library.unlink(missing_ok=True)
            continue
        library.parent.mkdir(parents=True, exist_ok=True)
        # a process that has the old library loaded keeps it: a new file takes its name
        fresh = library.with_name(library.name + ".new")
        shutil.copyfile(built[name], fresh)
        os.replace(fresh, library)
    return record


class BuildExtension(build_ext):
    """Builds with ninja, and leaves a record of what was built and why the rest was not."""

    def run(self):
        libraries = {name.rpartition(".")[2]: Path(self.get_ext_fullpath(name)) for name in NAMES}
        record = {"extension": True, "extension_reason": None}
        try:
            record |= build_libraries(libraries)
        except BuildError as error:
            if "1" in (os.environ.get("UNROLLED_KERNELS_EXTENSION"), os.environ.get("UNROLLED_KERNELS_CUDA")):
                raise SystemExit(f"unrolled_kernels: {error}") from None
            print(f"unrolled_kernels: installing without the extension: {error}", file=sys.stderr)
            record = {"extension": False, "extension_reason": str(error), "cuda_reason": str(error)}
            # libraries of an earlier build would belong to other sources
            for library in libraries.values():
                library.unlink(missing_ok=True)
        self.extensions = [x for x in self.extensions if Path(self.get_ext_fullpath(x.name)).exists()]
        record["cuda"] = record["cuda_reason"] is None
        package = libraries["_C"].parent
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def get_outputs(self):
        return [self.get_ext_fullpath(extension.name) for extension in self.extensions]


NAMES = ("unrolled_kernels._C", "unrolled_kernels._C_experiments", "unrolled_kernels._C_autograd")
if os.environ.get("UNROLLED_KERNELS_AUTOGRAD") == "0":
    NAMES = NAMES[:2]
setup(ext_modules=[Extension(name, sources=[]) for name in NAMES], cmdclass={"build_ext": BuildExtension})
