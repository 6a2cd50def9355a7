"""docs/GRPCURL.md is what grpcurl really shows, by reflection, of a frontend and a sidecar.

To write its outputs anew: python -m tests.integration.test_grpcurl --write
"""

import asyncio
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.transcripts import BLOCK, blocks_of, merged, normal, played, steps_of
from tests.integration.worlds import World, real_mesh

PAGE = Path(__file__).parents[2] / "docs" / "GRPCURL.md"


async def until_load_is_known(world: World) -> None:
    """A sidecar that has just started has yet to hear of it."""
    while not all(  # noqa: ASYNC110 - Nothing announces it.
        worker.HasField("load") for worker in await world.client.list_workers()
    ):
        await asyncio.sleep(0.02)


def environment(world: World) -> dict[str, str]:
    doomed = world.mesh.frontends.get("f2")  # Until a page's block has killed it.
    return {
        "FRONTEND": world.mesh.frontend_address,
        "DOOMED": doomed.address if doomed else "",
        "DOOMED_PID": str(doomed.pid) if doomed else "",
        "SIDECAR": world.mesh.workers["w1"].address,
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
    }


def mesh_for_the_page(directory: Path, edge: str = "grpcio") -> Any:
    return real_mesh(
        directory,
        num_workers=1,
        num_frontends=2,
        engine_options="--step-base-ms 10",
        frontend_flags=["--edge", edge],
    )


@pytest.fixture(scope="module", params=["grpcio", "native"])
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[World]:
    with mesh_for_the_page(tmp_path_factory.mktemp("mesh"), request.param) as world:
        world.run(until_load_is_known(world))
        yield world


@pytest.mark.parametrize("index", range(len(blocks_of(PAGE))))
def test_the_page_shows_what_grpcurl_shows(world: World, index: int, tmp_path: Path) -> None:
    block = blocks_of(PAGE)[index]
    seen = world.run(played(block, environment(world), tmp_path))
    for step, expected in zip(seen, steps_of(block), strict=True):
        assert merged(step.output) == merged(expected.output), step.command


def test_a_stream_may_come_in_larger_pieces() -> None:
    one = '{"token_ids": [1], "text": "a"}\n{"offset": 1, "token_ids": [2], "text": "b"}\n{}\n'
    assert merged(one) == merged('{"token_ids": [1, 2], "text": "ab"}\n{}\n')
    assert merged(one) != merged('{"token_ids": [1, 3], "text": "ab"}\n{}\n')


def write() -> None:
    """Run everything, and put its output on the page."""
    with tempfile.TemporaryDirectory() as directory, mesh_for_the_page(Path(directory)) as world:
        world.run(until_load_is_known(world))

        def anew(match: re.Match[str]) -> str:
            steps = world.run(played(match[0], environment(world), Path(directory)))
            return "".join(f"$ {step.command}\n{normal(step.output)}" for step in steps)

        PAGE.write_text(BLOCK.sub(anew, PAGE.read_text()))


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], "usage: python -m tests.integration.test_grpcurl --write"
    write()
