"""Which backends ``backend="auto"`` tries: ``python -m benchmarks.auto`` writes it from the rows of benchmarks/results.

None that a row shows to be slower than the eager loop, by their medians.
"""

import csv
import math
from collections import defaultdict

from benchmarks import harness, suite

FILE = harness.ROOT / "unrolled_kernels/_auto.py"
# Where nothing is measured. On a GPU by what the kernels issue, benchmarks/results/predicted-sm_90: for 32 FMAs of a
# dense forward step, d from 16 to 128, 41 to 55 instructions in CUDA C++, which fetches the next Q meanwhile, and 43 to
# 60 (Triton 3.6) or 55 to 67 (3.9) in Triton. Products of one large matrix are the eager loop's until a GPU has run
# what takes their place.
UNMEASURED = {
    ("cpu", False): ("cpu",),
    ("cpu", True): ("cpu",),
    ("cuda", False): ("cuda", "triton"),
    ("cuda", True): (),
}
_CASE = ("structure", "method", "mode", "dtype", "B", "d", "k", "threads")


def multiplies_matrices(file, row):
    """Whether a row's steps are products of one large matrix with many vectors, as ``functional`` asks."""
    return file.stem.startswith("shared_dense") and min(int(row["B"]), int(row["d"])) > 128


def measured():
    """``{(device, products): {case: {backend: median}}}`` of the committed rows, in µs."""
    tables = defaultdict(lambda: defaultdict(dict))
    for file in sorted((harness.ROOT / "benchmarks/results").glob("c*/*.csv")):
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                if "backend" in row:
                    key = "cpu" if file.parent.name.startswith("cpu") else "cuda", multiplies_matrices(file, row)
                    case = (file.name, *(row[name] for name in _CASE))
                    tables[key][case][row["backend"]] = float(row["p50_us"])
    return tables


def choose(cases):
    """Fused backends that no case shows to be slower, the fastest on average first; None: nothing is measured."""
    ratios, lost = defaultdict(list), set()
    for times in cases.values():
        for name in suite.FUSED:
            if name in times and "eager" in times:
                ratios[name].append(math.log(times[name] / times["eager"]))
                lost |= {name} if times[name] > times["eager"] else set()
    if not ratios:
        return None
    return tuple(sorted(ratios.keys() - lost, key=lambda name: sum(ratios[name]) / len(ratios[name])))


def text():
    """The module."""
    tables = measured()
    lines = ['"""What ``backend="auto"`` takes; written by ``python -m benchmarks.auto``, not by hand."""', ""]
    lines += [
        "# By device and by whether the steps are products of one large matrix with many vectors: the first that is",
        "# available, else eager.",
        "AUTO: dict[tuple[str, bool], tuple[str, ...]] = {",
    ]
    for key, unmeasured in UNMEASURED.items():
        found = choose(tables.get(key, {}))
        cases = sum(any(name in times for name in suite.FUSED) for times in tables.get(key, {}).values())
        names = unmeasured if found is None else found
        unmeasured_told = "predicted, not measured" if key[0] == "cuda" else "not measured"
        told = unmeasured_told if found is None else f"of {cases} cases none has the eager loop before it"
        shown = ", ".join(f'"{name}"' for name in names) + ("," if len(names) == 1 else "")
        lines.append(f'    ("{key[0]}", {key[1]}): ({shown}),  # {told}')
    return "\n".join([*lines, "}"]) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
    print(f"wrote {FILE}")
