"""The native edge with real processes: bad requests are answered as by grpcio, or better."""

from collections.abc import Generator
from dataclasses import replace

import pytest

from tests.integration import bad_requests
from tests.integration.bad_input import Answer, BadInput
from tests.integration.test_bad_input import answers_bad_requests, bad_input_mesh, named
from tests.integration.worlds import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    with bad_input_mesh(tmp_path_factory.mktemp("mesh"), "native") as world:
        yield world


BETTER = {"a call without its message": Answer("INTERNAL")}
"""Where grpcio lets a client wait, as docs/decisions/edge.md says."""


@named(bad_requests.CASES)
def test_bad_requests_are_answered_alike(world: World, case: BadInput[bad_requests.Edge]) -> None:
    answers_bad_requests(world, replace(case, expected=BETTER.get(case.kind, case.expected)))
