"""Fixtures of the tests with real processes."""

from collections.abc import Generator

import pytest


@pytest.fixture(scope="module", params=["grpcio", "native"])
def each_edge(request: pytest.FixtureRequest) -> Generator[str]:
    """Frontends that are started in this module have this edge, unless their flags say another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNBROKEN_FRONTEND_EDGE", request.param)
        yield request.param
