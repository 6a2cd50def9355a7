"""The fake GPU refuses what a driver refuses, and leaks nothing."""

import pytest

from tests.memory_service import refusals
from tests.support.fake_gpu import FakeGpu, num_descriptors


@pytest.mark.parametrize("name", refusals.DEEDS)
def test_it_answers_as_a_driver_does(name: str) -> None:
    gpu = FakeGpu()
    before = num_descriptors()
    expected = refusals.STRICTER.get(name, refusals.EXPECTED[name])
    if expected is refusals.Bug.CRASH:
        with pytest.raises(AssertionError, match="not released"):
            refusals.answer(gpu, name)
    else:
        assert refusals.answer(gpu, name) == expected
    gpu.check_empty()
    assert num_descriptors() == before
