"""Fixtures of the frontend's tests."""

import pytest

from frontend import convoy
from tests.frontend import worlds


@pytest.fixture(params=["grpcio", "native"])
def each_edge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test is one of what clients see, so it holds for every edge."""
    monkeypatch.setattr(worlds, "edge", request.param)


@pytest.fixture(autouse=True)
def few_ride(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests have few streams, and those of the native edge ride too."""
    monkeypatch.setattr(convoy, "ROWS_MIN", 1)
