"""Claims of `unbroken.memory.checksums`."""

import pytest

from unbroken.memory.checksums import Algorithm, compute, of_contract


def test_the_vectors_of_the_documentation() -> None:
    assert compute(bytes(range(64)), Algorithm.XXH3) == 0x6187_EB90_89B0_ED55
    assert compute(bytes(range(64)), Algorithm.MLH64) == 0x65FB_E475_1515_4257


def test_the_contracts_zero_is_what_there_was_before_it_named_any() -> None:
    assert of_contract(0) is Algorithm.XXH3
    assert of_contract(2) is Algorithm.MLH64
    with pytest.raises(ValueError, match="3"):
        of_contract(3)
