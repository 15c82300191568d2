"""``python -m benchmarks.machine_code``: what a step of each CUDA kernel issues, counted in its machine code for sm_90.

No GPU is needed, and nothing here is measured: the counts are facts about the code, every share of a roof is a
*prediction*. An H200 issues one instruction a clock on each of the four schedulers of a multiprocessor, an FMA
included, so that whatever is not an FMA of the product costs exactly one. The predictions assume

- float32, one read of each input and one write of each output from memory, at 4.3 TB/s over 132 multiprocessors at
  1.98 GHz, entirely behind the work of other warps; of a kernel that holds one Q a multiprocessor (d = 256), what is
  fetched ahead is behind the work on the last one, and the rest before it;
- as many warps on a multiprocessor as registers and shared memory allow, in-order issue with the stalls and the
  scoreboards that the compiler wrote into the code, latencies of LATENCY, throughputs of PIPES;
- some 100 instructions for each item of a warp besides, one for each 16 bytes of a matrix that a lane copies, reads or
  writes, and 5/4 of the FMAs of products that are not of steps; 60 for what ends a product of the RNN;
- enough problems that every multiprocessor is busy.

    python -m benchmarks.machine_code [--record]           the table; --record: into benchmarks/results/predicted-sm_90/
    python -m benchmarks.machine_code --triton [--record]  what the kernels of the imported Triton issue: counts, of
                                                           each loop with FMAs in the order of the code
"""

import argparse
import csv
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.harness import ROOT, kernel_sources_sha256

CSRC, CACHE = ROOT / "csrc", ROOT / "build" / "machine_code"
RESULTS = ROOT / "benchmarks/results/predicted-sm_90"
CLOCK, MULTIPROCESSORS, COPY = 1.98e9, 132, 4.3e12
REGISTERS, SHARED_MEMORY, SCHEDULERS = 65536, 227 * 1024, 4

# clocks until a result is there; 6 for what is not listed. LDG: from L1
LATENCY = {"LDG": 38, "LD": 38, "LDS": 30, "SHFL": 24, "LDC": 32, "STS": 14, "STG": 14, "ST": 14, "MUFU": 22, "S2R": 30,
           "LDGSTS": 14, "BAR": 24, "S2UR": 30, "I2F": 22, "F2I": 22, "DFMA": 20, "DADD": 20, "DMUL": 20}  # fmt: skip
# instructions of which a scheduler starts one in two clocks
HALF_RATE = {"FSEL", "SEL", "LOP3", "ISETP", "IADD3", "LEA", "SHF", "FSETP", "FMNMX", "VIADD", "VIMNMX", "PLOP3",
             "PRMT", "MOV", "CS2R", "BMSK", "SGXT", "IMAD", "R2UR"}  # fmt: skip
# memory and shuffles go through one queue of the multiprocessor: clocks of a scheduler's quarter of it, by width
MEMORY = {"LDS", "STS", "LDG", "STG", "LD", "ST", "LDGSTS"}


@dataclasses.dataclass
class Instruction:
    text: str
    opcode: str
    stall: int = 1
    wait: int = 0
    write_barrier: int = 7
    read_barrier: int = 7
    target: int | None = None  # index of the instruction that a branch goes to

    @property
    def name(self):
        return self.opcode.split(".")[0]

    @property
    def width(self):
        """Bits that a lane moves."""
        return next((w for w in (128, 64) if f".{w}" in self.opcode), 32)

    @property
    def conditional(self):
        return self.text.startswith("@") or "DIV" in self.opcode


def tool(name):
    """The path of a program of the CUDA toolkit, which the Triton wheel brings too; None where it is not."""
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    try:
        import triton

        folders.append(str(Path(triton.__file__).parent / "backends/nvidia/bin"))
    except ImportError:
        pass
    return shutil.which(name, path=os.pathsep.join(folders))


def compile_source(stem, architecture="90"):
    """(cubin, report of ptxas) of the float32 kernels of csrc/cuda/<stem>.cu, kept by the hash of the sources."""
    flags = ["-cubin", f"-arch=sm_{architecture}", "-std=c++17", "-O3", f"-I{CSRC}", "-Xptxas=-v",
             "-Werror=all-warnings", "-DUNROLLED_KERNELS_CUDA_TYPES(_)=_(float)"]  # fmt: skip
    digest = hashlib.sha256(repr(flags).encode())
    family = stem.split("_")[0]
    headers = [p for folder in ("", "common", "cuda") for p in (CSRC / folder).glob("*.*h")]
    # those that the kernels of an op may include: neither torch's nor another op's
    headers = [p for p in headers if p.name.startswith(family) or not p.name.startswith(("momentum", "rnn", "tensors"))]
    for path in sorted([*headers, CSRC / "cuda" / f"{stem}.cu"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    name = f"{stem}-sm_{architecture}"
    cubin = CACHE / f"{name}-{digest.hexdigest()[:16]}.cubin"
    report = cubin.with_suffix(".txt")
    # tests run in several processes: one of them compiles, the others wait
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.exists():
            for old in CACHE.glob(f"{name}-????????????????.*"):
                old.unlink()
            command = [tool("nvcc"), *flags, str(CSRC / "cuda" / f"{stem}.cu"), "-o", str(cubin)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(run.stdout + run.stderr)
            report.write_text(run.stdout + run.stderr)
    return cubin, report.read_text()


def resources(report):
    """``{symbol: (registers, bytes of local memory)}`` from what ptxas reports."""
    usage = {}
    for entry in re.split(r"Compiling entry function", report)[1:]:
        stack, stores, loads = map(
            int,
            re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry).groups(),
        )
        symbol = re.search(r"'(\S+)'", entry)[1]
        usage[symbol] = int(re.search(r"Used (\d+) registers", entry)[1]), stack + stores + loads
    return usage


def disassemble(cubin):
    """``{symbol: [Instruction]}`` of a cubin."""
    text = subprocess.run([tool("nvdisasm"), "-hex", str(cubin)], capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text):
    """The same of what nvdisasm prints: an instruction, its lower and, in the line below, its upper 64 bits."""
    functions, labels, code = {}, {}, None
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\S+?),", line):
            code = functions[match[1]] = []
        elif match := re.match(r"(\.L_x_\d+):", line):
            labels[match[1]] = len(code) if code is not None else 0
        elif code is None:
            continue
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]+ \*/", line):
            body = re.sub(r"^\{?\s*", "", match[1]).rstrip("; ")
            code.append(Instruction(body, re.sub(r"^@!?U?P\w+\s+", "", body).split()[0]))
        elif (match := re.match(r"\s*/\* 0x([0-9a-f]+) \*/", line)) and code:
            control, i = int(match[1], 16) >> 41, code[-1]
            i.stall, i.write_barrier = max(1, control & 15), control >> 5 & 7
            i.read_barrier, i.wait = control >> 8 & 7, control >> 11 & 63
    for code in functions.values():
        for i in code:
            if i.name in ("BRA", "BSSY") and (match := re.search(r"`\((\.L_x_\d+)\)", i.text)):
                i.target = labels.get(match[1])
    return {symbol: code for symbol, code in functions.items() if code}


def loops(code, nested=False):
    """[(first, last)] of the loops that contain no other (or of all), in the order of their addresses."""
    found = {
        (i.target, last) for last, i in enumerate(code) if i.name == "BRA" and i.target is not None and i.target <= last
    }
    found = [(a, b) for a, b in found if b - a > 4]
    return sorted(found) if nested else innermost(found)


def innermost(found):
    """Those of ``found`` that contain no other."""
    return sorted(x for x in found if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in found))


def is_fma(i):
    return i.name in ("FFMA", "FMUL", "DFMA", "DMUL")


def best_path(code, first, last, gain):
    """Indices of the way from ``first`` to ``last`` that gains most, and among those the shortest; never back."""
    best = {first: ((0, 0), None)}  # (gain, -slots) before the instruction, and where from
    for k in range(first, last):
        if k not in best:
            continue
        (gained, slots), _ = best[k]
        i, after = code[k], set()
        score = (gained + gain(i), slots - 1)
        if i.name == "BRA" and i.target is not None and i.target > k and "DIV" not in i.opcode:
            after.add(i.target)
        if i.name not in ("BRA", "EXIT") or i.conditional:
            after.add(k + 1)
        for n in after:
            if n <= last and (n not in best or score > best[n][0]):
                best[n] = (score, k)
    if last not in best:
        return None
    path, k = [last], last
    while k != first:
        k = best[k][1]
        path.append(k)
    return path[::-1]


def simulate(code, path, warps, repeats=4):
    """Clocks of one scheduler for ``path``, a warp, while ``warps`` warps run it side by side.

    The warps of a team are on different schedulers, so that a barrier is a wait like any other.
    """
    steps = [code[k] for k in path]
    total = len(steps) * repeats
    at, ready, scoreboard = [0] * warps, [37 * w for w in range(warps)], [[0] * 8 for _ in range(warps)]
    free = {"half": 0, "memory": 0}
    clock = last = done = 0
    while done < warps:
        chosen = None
        for d in range(warps):
            w = (last + d) % warps
            if at[w] >= total or ready[w] > clock:
                continue
            i = steps[at[w] % len(steps)]
            if any(i.wait >> n & 1 and scoreboard[w][n] > clock for n in range(6)):
                continue
            pipe, cost = _pipe(i)
            if pipe and free[pipe] > clock + (24 if pipe == "memory" else 0):
                continue
            chosen = w
            break
        if chosen is None:
            clock += 1
            continue
        w = last = chosen
        extra = 0
        if pipe:
            begin = max(free[pipe], clock)
            free[pipe] = begin + cost
            extra = begin - clock if pipe == "memory" else 0
        latency = LATENCY.get(i.name, 6) + (4 if i.name == "LDS" and i.width == 128 else 0)
        scoreboard[w][i.write_barrier] = max(scoreboard[w][i.write_barrier], clock + latency + extra)
        scoreboard[w][i.read_barrier] = max(scoreboard[w][i.read_barrier], clock + min(latency, 12) + extra)
        ready[w] = clock + i.stall
        if i.name == "BAR":
            ready[w] = clock + LATENCY["BAR"]
        at[w] += 1
        done += at[w] == total
        clock += 1
    return clock / (repeats * warps)


def _pipe(i):
    if i.name in HALF_RATE:
        return "half", 2
    if i.name == "SHFL":
        return "memory", 4
    if i.name in MEMORY:
        return "memory", i.width // 8
    return None, 0


# What a warp does, from the equations and the tiles of csrc/cuda/tile.cuh.


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel at one size, and what its work is."""

    stem: str
    direction: str  # "forward" or "backward"
    method: str  # "gd" or "momentum", or the widths of an RNN; "scheduled": with other coefficients at each step
    d: int  # 0: elements that are problems of their own
    template: str  # its arguments behind float, as they are mangled
    problems: float  # of a warp
    # the loops of steps in their order: name, FMAs of a lane in a step, steps that a turn takes
    phases: tuple[tuple[str, float, float], ...]
    bytes: int  # of a problem, to and from memory
    flops: tuple[int, int]  # of a problem, and more for each step
    team_bytes: tuple[int, int]  # of shared memory of a team, and more for each step
    item_slots: int  # instructions of an item that are not of its steps
    warps: int = 1  # of a team
    step_slots: int = 0  # instructions of a step that are in none of its loops
    loops: tuple[int, ...] = ()  # which of the loops with as many FMAs the phases are, where there are more of them
    nested: int = 0  # turns of those loops within a step that have FMAs; others have one. 0: a step has no loops
    ahead: float = 1.0  # of the bytes, what comes while there is work on another problem

    @property
    def symbol(self):
        """Its name and template's arguments, the last of which may be whether samples stop by themselves."""
        stops = self.direction == "forward" and self.stem in ("momentum_dense", "momentum_spectral")
        return self.name, self.template + ("Lb0E" if stops else "")

    @property
    def name(self):
        return f"{self.stem}{'_backward' if self.direction == 'backward' else ''}_kernel"


def _tile(d):
    """(elements of the matrix that a lane holds, problems of a warp, warps of a problem)."""
    elements = d * d if d <= 8 else 64 if d <= 32 else 128
    return elements, 32 * elements / d**2, max(1, d * d // elements // 32)


def dense(d, momentum):
    elements, problems, warps = _tile(d)
    matrix, team = 4 * d * d, max(1, round(problems))
    common = {"stem": "momentum_dense", "d": d, "template": f"Li{d}ELb{momentum:d}ELb0E", "problems": problems,
              "warps": warps, "method": "momentum" if momentum else "gd"}  # fmt: skip
    memory, vector = team * matrix + 2 * 4 * d * team, 4 * d * team
    return [
        Kernel(direction="forward", phases=(("step", elements, 2),), bytes=matrix + 8 * d, flops=(0, 2 * d * d),
               item_slots=100 + elements // 2,
               team_bytes=(memory, 16), **common),
        Kernel(direction="backward", phases=(("replay", elements, 2), ("adjoint", elements, 2), ("outer", elements, 1)),
               bytes=2 * matrix + 12 * d, flops=(0, 6 * d * d), item_slots=150 + elements * 3 // 4,
               team_bytes=(memory + vector, 2 * vector + 16), **common),
    ]  # fmt: skip


def spectral(d, momentum):
    elements, problems, warps = _tile(d)
    matrix, team = 4 * d * d, max(1, round(problems))
    columns = max(1, round(d * problems / 32))
    common = {"stem": "momentum_spectral", "d": d, "template": f"Li{d}ELb{momentum:d}E", "problems": problems,
              "warps": warps, "method": "momentum" if momentum else "gd"}  # fmt: skip
    memory, vector = team * matrix + 2 * 4 * d * team, 4 * d * team
    step, turn = 4 if momentum else 2, 1 if elements > 64 else 2
    return [
        Kernel(direction="forward", phases=(("step", step * columns, 4),), bytes=matrix + 12 * d,
               flops=(4 * d * d, 4 * d), item_slots=100 + elements // 2 + 2 * elements * 5 // 4,
               team_bytes=(memory, 16), **common),
        Kernel(direction="backward", bytes=2 * matrix + 20 * d, flops=(8 * d * d, 10 * d),
               phases=(("replay", step * columns, turn), ("adjoint", 5 * columns, turn)),
               item_slots=150 + elements * 3 // 4 + 7 * elements * 5 // 4,
               team_bytes=(memory + 4 * vector, vector + 16), **common),
    ]  # fmt: skip


def diagonal(momentum):
    step, method = (4, "momentum") if momentum else (2, "gd")
    common = {"stem": "momentum_diagonal", "d": 0, "problems": 128}
    template = f"Li4ELi32ELb{momentum:d}ELb0E"
    before = (("checkpoint", 4 * step, 4), ("replay", 4 * step, 4))
    back = {"direction": "backward", "bytes": 20, "flops": (0, 10), "team_bytes": (512, 512), **common}
    return [
        Kernel(direction="forward", phases=(("step", 4 * step, 4),), bytes=12, flops=(0, 4), item_slots=40,
               team_bytes=(0, 4), template=template, method=method, **common),
        # what the coefficients weigh is left to the end
        Kernel(phases=(*before, ("adjoint", 4 * (7 if momentum else 4), 2)), item_slots=100,
               template=f"{template}Lb0ELb1E", method=method, **back),
        Kernel(phases=(*before, ("adjoint", 4 * 5, 2)), item_slots=60,
               template=f"{template}Lb0ELb0E", method=f"{method}, scheduled", **back),
    ]  # fmt: skip


def resident(d=256):
    """A block a problem: 128 rows in registers, as many in shared memory, 80 of the next problem's on their way."""
    elements, matrix = 2 * 128, 4 * d * d
    common = {"stem": "momentum_resident", "d": d, "template": f"Li{d}E", "problems": 1 / 8, "warps": 8,
              "method": "gd", "team_bytes": (220 * 1024, 0)}  # fmt: skip
    # loops of 8 instructions for each 16 bytes that a lane copies, and one for each that it reads
    loads = 100 + 8 * 52 + 64
    return [
        Kernel(direction="forward", phases=(("step", elements, 1),), bytes=matrix + 8 * d, flops=(0, 2 * d * d),
               item_slots=loads, ahead=80 / 256, nested=1, **common),
        Kernel(direction="backward", bytes=2 * matrix + 12 * d, flops=(0, 6 * d * d), item_slots=loads + 200,
               phases=(("replay", elements, 1), ("adjoint", elements, 1), ("outer", elements, 1 / 2)),
               ahead=40 / 256, nested=4, **common),
    ]  # fmt: skip


def rnn(d=5, widths=(20, 20, 20)):
    """A block of 128 samples, own Q: a warp does five entries of a product for all of them, four columns a turn."""
    samples, outputs, stride, columns = 128, 5, 132, 4
    groups = lambda n: -(-n // outputs)
    warps = groups(max(widths))
    products = [(d, widths[0]), *zip(widths, (*widths[1:], d), strict=True), (d, widths[0])]  # of W2, W^2 ... V, W1
    # turns of a warp in a step, of the products with a vector of the weights, or of their transposes, and of gradients
    forward = sum(groups(m) * n for n, m in products) / columns / warps
    hidden = forward - groups(d) * widths[-1] / columns / warps
    transposed = sum(groups(n) * m for n, m in products) / columns / warps
    own = groups(d) * d / columns / warps
    # a turn of the gradients takes 8 samples of a strand, which has 32
    outer = sum(-(-groups(m) * -(-n // columns) * 4 // 32) for n, m in products) * 4 / warps
    weights = sum(n * m for n, m in products)
    step = 2 * (weights + d * d)
    common = {"stem": "rnn", "method": "-".join(map(str, widths)), "d": d, "template": "Li128ELi5ELb1E",
              "problems": samples / warps, "warps": warps, "item_slots": 1500}  # fmt: skip
    product, matrix = outputs * columns * 4, outputs * 4 * columns
    memory, vector = samples * d * d * 4 + 4 * 2 * weights, 4 * stride
    ends = 60 * len(products)
    return [
        Kernel(direction="forward", bytes=4 * (d * d + 2 * d), flops=(0, step), loops=(3, 1), step_slots=ends,
               phases=(("product", product * forward, 1 / forward), ("own Q", matrix * own, 1 / own)),
               team_bytes=(memory + vector * (3 * d + 2 * max(widths)), 0), **common),
        # the gradients of a strand, and the weights once more, transposed
        Kernel(direction="backward", bytes=4 * (2 * d * d + 3 * d), flops=(0, 3 * step), loops=(3, 1, 9),
               step_slots=4 * ends,
               phases=(("product", product * (forward + hidden + transposed), 1 / (forward + hidden + transposed)),
                       ("own Q", matrix * 3 * own, 1 / (3 * own)), ("outer", 2 * product * outer, 1 / outer)),
               team_bytes=(memory + 4 * 6 * weights + vector * (5 * d + sum(widths) + 2 * max(widths)), 0), **common),
    ]  # fmt: skip


KERNELS = [
    kernel
    for momentum in (False, True)
    for kernel in [
        *(k for d in (4, 5, 8, 16, 32, 64, 128) for k in dense(d, momentum)),
        *(k for d in (16, 32, 64, 128) for k in spectral(d, momentum)),
        *diagonal(momentum),
    ]
] + [*resident(), *rnn()]


@functools.cache
def compiled(stem):
    """``{(kernel, template): (instructions, registers, local bytes)}`` of one source."""
    cubin, report = compile_source(stem)
    usage = resources(report)
    found = {}
    for symbol, code in disassemble(cubin).items():
        match = re.search(r"\d+((?:momentum|rnn|sum)[a-z_]*?_kernel)I(?:NS\d_7RnnTileI)?f((?:L[a-z]\d+E)*)E", symbol)
        if match:
            found[match[1], match[2]] = (code, *usage[symbol])
    return found


COUNTS = ("FMA", "SHFL", "BAR", "LDS.32", "LDS.64", "LDS.128", "STS.32", "STS.64", "STS.128", "LDG.32", "LDG.64",
          "LDG.128", "STG.32", "STG.64", "STG.128", "LD.32", "LD.64", "LD.128", "ST.32", "ST.64", "ST.128", "LDL",
          "STL")  # fmt: skip


def count(instructions):
    """How many of each kind; LD and ST are generic, which reach shared memory too."""
    counts = dict.fromkeys(COUNTS, 0)
    for i in instructions:
        key = "FMA" if is_fma(i) else f"{i.name}.{i.width}" if i.name in MEMORY - {"LDGSTS"} else i.name
        if key in counts:
            counts[key] += 1
    return counts


def step_loops(kernel, code):
    """``{phase: (path, steps)}``: what a turn of each loop of steps issues, and the steps it takes."""
    least = min(fma * min(1, steps) for _, fma, steps in kernel.phases)
    found = {}
    # where there is another way no trajectories, coefficients in global memory, clusters, nor what stops
    rare = lambda i: (
        1000 * is_fma(i)
        - 10**6 * (i.name.startswith("UCGABAR") or (i.name == "LDG" and i.width == 32))
        - 10**5 * (i.name == "BAR")
    )
    for first, last in loops(code, kernel.nested > 0):
        path = best_path(code, first, last, rare)
        for inner in loops(code) if kernel.nested > 1 and path else ():
            turn = [k for k in path if inner[0] <= k <= inner[1]]
            if first < inner[0] and inner[1] < last and sum(is_fma(code[k]) for k in turn) >= 16:
                at = path.index(turn[-1]) + 1
                path[at:at] = turn * (kernel.nested - 1)
        if path and sum(is_fma(code[k]) for k in path) >= round(least):
            found[first, last] = path
    found = [found[x] for x in innermost(found)]
    if kernel.loops and max(kernel.loops) < len(found):
        found = [found[i] for i in kernel.loops]
    if len(found) < len(kernel.phases):
        raise ValueError(f"{kernel.name} d={kernel.d}: expected {len(kernel.phases)} loops of steps, got {len(found)}")
    # further loops are those of trajectories and of schedules in global memory
    wanted = {name: (path, steps) for (name, _, steps), path in zip(kernel.phases, found, strict=False)}
    for name, fma, steps in kernel.phases:
        if sum(is_fma(code[k]) for k in wanted[name][0]) < round(fma * steps):
            raise ValueError(f"{kernel.name} d={kernel.d}, {name}: expected {steps} steps of {fma} FMAs in a turn")
    return wanted


def resident_warps(kernel, registers, k):
    """Warps on a multiprocessor, as registers and shared memory allow: in blocks of one team, or of 64 threads."""
    allocated = -(-registers // 8) * 8
    by_registers = SCHEDULERS * (REGISTERS // SCHEDULERS // (32 * allocated))
    best = 0
    for teams in {1, max(1, (4 if kernel.d == 0 else 2) // kernel.warps)}:
        warps = teams * kernel.warps
        needed = (kernel.team_bytes[0] + kernel.team_bytes[1] * k) * teams + 1024
        best = max(best, warps * min(by_registers // warps, SHARED_MEMORY // needed, 32, 64 // warps))
    return best


def rows(kernels=None, steps=(10, 40)):
    """The table: a row for each loop of steps; the predictions are for ``steps`` steps, the kernel's as a whole."""
    for kernel in kernels or KERNELS:
        code, registers, local = compiled(kernel.stem)[kernel.symbol]
        found = step_loops(kernel, code)
        predicted = {}
        for k in steps:
            predicted |= predict(kernel, code, found, resident_warps(kernel, registers, k), k)
        for phase, (path, unrolled) in found.items():
            fma = next(fma for name, fma, _ in kernel.phases if name == phase)
            yield {
                "kernel": kernel.name, "method": kernel.method, "d": kernel.d, "loop": phase,
                "slots_per_step": round(len(path) / unrolled, 1), "product_fma_per_step": round(fma),
                "slots_per_32_fma": round(32 * len(path) / unrolled / fma, 1),
                **{name: round(n / unrolled, 1) for name, n in count(code[n] for n in path).items()},
                "registers": registers, "local_bytes": local, **predicted,
            }  # fmt: skip


def predict(kernel, code, found, warps, k):
    """Shares of the roofs at k steps; see the head of this file for what they assume."""
    # clocks of a scheduler for the item of one warp; the four of a multiprocessor work side by side
    clocks = kernel.item_slots + k * kernel.step_slots
    for phase, (path, unrolled) in found.items():
        turns = (0 if phase == "checkpoint" and k <= 16 else k) / unrolled
        if turns:
            clocks += turns * simulate(code, path, max(1, warps // SCHEDULERS))
    issue = clocks / SCHEDULERS / kernel.problems
    memory = kernel.bytes / (COPY / MULTIPROCESSORS / CLOCK)
    total = max(issue, kernel.ahead * memory) + (1 - kernel.ahead) * memory
    flops = kernel.flops[0] + k * kernel.flops[1]
    return {
        f"resident_warps_k{k}": warps,
        f"predicted_percent_of_copy_k{k}": round(100 * memory / total),
        f"predicted_memory_to_issue_k{k}": round(memory / issue, 2),
        f"predicted_percent_of_fma_k{k}": round(100 * flops / 2 / 128 / total),
    }


TRITON_PROBLEMS = (*(("dense", d) for d in (16, 32, 64, 128)), ("diagonal", 512))


def triton_rows(problems=TRITON_PROBLEMS):
    """A row for each loop of the Triton kernels of (structure, d), gradient descent and with momentum, 10 steps."""
    import triton

    import unrolled_kernels.functional as F
    from benchmarks import ahead_of_time
    from unrolled_kernels.testing import STRUCTURES, random_quadratic

    methods = {
        "gd": lambda Q, b: F.gradient_descent(Q, b, 0.5, 10),
        "momentum": lambda Q, b: F.nesterov(Q, b, 0.5, 0.1, 10),
    }
    for method, (structure, d) in itertools.product(methods, problems):
        leaves, _, b = random_quadratic(structure, (64,), d)
        leaves = [x.requires_grad_() for x in (*leaves, b)]
        with ahead_of_time.launches() as found:
            methods[method](STRUCTURES[structure](*leaves[:-1]), b).square().sum().backward()
        for launch in found:
            cubin = launch.compile(90).asm["cubin"]
            registers, local = ahead_of_time.resources(cubin)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(cubin)
                file.flush()
                (code,) = disassemble(file.name).values()
            for n, (first, last) in enumerate(loops(code)):
                path = best_path(code, first, last, lambda i: 1000 * is_fma(i))
                counts = count(code[k] for k in path or ())
                if counts["FMA"] >= 8:
                    yield {
                        "triton": triton.__version__, "kernel": launch.name, "method": method, "d": d, "loop": n,
                        "warps": launch.options["num_warps"], "slots_per_turn": len(path),
                        "slots_per_32_fma": round(32 * len(path) / counts["FMA"], 1), **counts,
                        "registers": registers, "local_bytes": local,
                    }  # fmt: skip


def record(name, table):
    """The rows as a file of RESULTS."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in table for name in row))
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, ["kind", *names, "kernel_sources_sha256"], lineterminator="\n")
        writer.writeheader()
        for row in table:
            writer.writerow({"kind": "predicted", **row, "kernel_sources_sha256": kernel_sources_sha256()})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help=f"write the rows to {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--triton", action="store_true", help="the kernels of Triton instead")
    options = parser.parse_args()
    for name in ("nvdisasm",) if options.triton else ("nvcc", "nvdisasm"):
        if tool(name) is None:
            parser.error(f"{name} was not found: install a CUDA toolkit (nvdisasm also comes with Triton)")
    table = list(triton_rows() if options.triton else rows())
    for row in table:
        print("  ".join(f"{name}={value}" for name, value in row.items() if value not in (0, "0")))
    if options.record:
        record(f"triton_{table[0]['triton']}.csv" if options.triton else "machine_code.csv", table)


if __name__ == "__main__":
    main()
