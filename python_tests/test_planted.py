"""The faults of planted/ still fit the code, and the tests find all of them."""

import re
import shlex

import pytest
from planted import plant

FAULTS = plant.faults()


def test_there_are_as_many_as_there_were():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 50


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_still_applies(fault, tmp_path):
    copy = tmp_path / fault.file
    copy.parent.mkdir(parents=True)
    copy.write_bytes((plant.ROOT / fault.file).read_bytes())
    fault.plant(tmp_path)
    with pytest.raises(ValueError, match=f"{fault.name}: expected .* once in {fault.file}, got it"):
        fault.plant(tmp_path)


def test_their_tests_are_those_of_make_test():
    """Those of Triton run in its interpreter, in the second pass, of some files."""
    files = re.search(r"^KERNEL_TESTS := (.*)", (plant.ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    interpreted = {f"test_{name}.py" for name in (*files, "triton")}
    for fault in FAULTS:
        named = {word for word in shlex.split(fault.tests) if word.endswith(".py")}
        assert named
        assert all((plant.ROOT / "python_tests" / name).exists() for name in named), fault.name
        assert "triton" not in fault.tests or named <= interpreted, fault.name


@pytest.mark.slow
def test_all_are_found():
    assert not plant.hunt(FAULTS)
