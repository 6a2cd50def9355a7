"""Fixtures of the frontend's tests."""

import pytest

from tests.frontend import worlds


@pytest.fixture(params=["grpcio", "native"])
def each_edge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test is one of what clients see, so it holds for every edge."""
    monkeypatch.setattr(worlds, "edge", request.param)
