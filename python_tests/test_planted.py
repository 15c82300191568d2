"""The faults of planted/ still fit the code, and the tests find all of them."""

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


@pytest.mark.slow
def test_all_are_found():
    assert not plant.hunt(FAULTS)
