"""Which backends ``backend="auto"`` tries: ``python -m benchmarks.auto`` writes it from the rows of benchmarks/results.

None that a row shows to be slower than the eager loop, by their medians.
"""

import csv
import math
from collections import defaultdict

from benchmarks import harness, suite

FILE = harness.ROOT / "unrolled_kernels/_auto.py"
# Kinds of calls, as ``functional`` tells them apart by structure and size.
KINDS = ("dense", "products", "diagonal", "spectral", "rnn")
# Where nothing is measured: what is taken, and why. Slots are instructions that a step issues, predicted-sm_90.
_CPU = {("cpu", kind): (("cpu",), "not measured") for kind in KINDS}
_PREDICTED = "predicted, not measured"
UNMEASURED = _CPU | {
    ("cuda", kind): (backends, f"{_PREDICTED}: {why}")
    for kind, backends, why in (
        (
            "dense",
            ("cuda", "triton"),
            "41 to 55 slots for 32 FMAs and the next Q on its way, Triton's 43 to 67 without",
        ),
        ("products", (), "as many products as the eager loop has, until a GPU has run what lies between them"),
        # gradient descent / with momentum; 55 / 104 with other coefficients at each step
        ("diagonal", ("cuda", "triton"), "backward 33 / 61 slots a step of 4 elements, Triton's 30 / 72"),
        ("spectral", ("cuda", "triton"), "predicted to be bound by memory at k = 10; Triton's are not counted"),
        ("rnn", ("cuda", "triton"), "38 slots for 32 FMAs; Triton's are not counted"),
    )
}
_CASE = ("structure", "method", "mode", "dtype", "B", "d", "k", "threads")


def kind_of(file, row):
    """What a row is in the table."""
    if file.stem == "rnn":
        return "rnn"
    if file.stem.startswith("shared_dense") and min(int(row["B"]), int(row["d"])) > 128:
        return "products"
    if row["structure"] in ("diagonal", "tikhonov"):
        return "diagonal"
    return row["structure"]


def measured():
    """``{(device, kind): {case: {backend: median}}}`` of the committed rows, in µs."""
    tables = defaultdict(lambda: defaultdict(dict))
    for file in sorted((harness.ROOT / "benchmarks/results").glob("c*/*.csv")):
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                if "backend" in row:
                    key = "cpu" if file.parent.name.startswith("cpu") else "cuda", kind_of(file, row)
                    case = (file.parent.name, file.name, *(row[name] for name in _CASE))
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
        "# By device and by what a call is, its structure and size: the first that is available, else eager.",
        "AUTO: dict[tuple[str, str], tuple[str, ...]] = {",
    ]
    for key, (unmeasured, why) in UNMEASURED.items():
        found = choose(tables.get(key, {}))
        compared = [times for times in tables.get(key, {}).values() if "eager" in times]
        compared = [times for times in compared if any(name in times for name in suite.FUSED)]
        behind = sum(min(times[name] for name in suite.FUSED if name in times) > times["eager"] for times in compared)
        names = unmeasured if found is None else found
        told = why if found is None else f"of {len(compared)} cases the eager loop is ahead in {behind or 'none'}"
        shown = ", ".join(f'"{name}"' for name in names) + ("," if len(names) == 1 else "")
        lines += [f"    # {told}", f'    ("{key[0]}", "{key[1]}"): ({shown}),']
    return "\n".join([*lines, "}"]) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
    print(f"wrote {FILE}")
