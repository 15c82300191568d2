"""The import graph has no arrow upwards, wherever in a file the import stands."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "unrolled_kernels"
# from the ground up: what stands on one line does not import its neighbours, and nothing imports what is above it
FLOORS = [
    ["quadratics"],
    ["annotations"],
    ["_check", "testing"],
    ["_backend", "prox", "regions"],
    ["ops", "info"],
    ["schedules", "flops"],
    ["functional"],
    ["layers"],
    ["layers_rnn"],
    ["theory"],
    ["experiments"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# studies, each on what it may use of others
STUDIES = {
    "synthetic": set(),
    "denoising": set(),
    "learn_to_optimize": {"synthetic"},
    "theory": {"synthetic"},
}


def modules():
    return {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in PACKAGE.rglob("*.py")
    }


def imports(file, known):
    """The modules of this package that a file imports, at its top or within functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name in known} - {"unrolled_kernels"}


def arrows(depth, under=""):
    """(from, to) of the rooms at one depth of the package, for the modules below ``under``."""
    known = modules()
    for name, file in known.items():
        if not name.startswith(f"unrolled_kernels.{under}") or name == "unrolled_kernels":
            continue
        for target in imports(file, known):
            parts = [module.split(".")[depth] if module.count(".") >= depth else "" for module in (name, target)]
            # a package is on the way to its modules and no room of its own
            if target.startswith(f"unrolled_kernels.{under}") and all(parts) and parts[0] != parts[1]:
                yield tuple(parts)


def test_no_room_imports_one_above_it():
    # a room without a floor is a leaf: it imports nothing of the package
    upward = {(room, target) for room, target in arrows(1) if FLOOR_OF.get(room, -1) <= FLOOR_OF.get(target, -1)}
    assert not upward


def test_regions_is_a_leaf():
    assert {target for room, target in arrows(1) if room == "regions"} <= {"_check", "annotations"}


def test_studies_stand_beside_each_other():
    shared = {file.stem for file in (PACKAGE / "experiments").glob("*.py")}
    for study, target in set(arrows(2, "experiments")):
        if study in STUDIES:
            assert target in shared | STUDIES[study], f"{study} imports {target}"
        else:
            assert target not in STUDIES, f"experiments/{study}.py imports the study {target}"


@pytest.mark.parametrize("text", ["unrolled_kernels.experiments", "unrolled_kernels.theory"])
def test_nothing_below_names_what_is_above(text):
    # importlib takes a string, which is no import statement
    above = {"unrolled_kernels.experiments": {"experiments"}, "unrolled_kernels.theory": {"experiments", "theory"}}
    for name, file in modules().items():
        if name.count(".") and name.split(".")[1] not in above[text]:
            assert text not in file.read_text(encoding="utf-8"), name
