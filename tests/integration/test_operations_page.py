"""docs/OPERATIONS.md is what the command line and grpcurl really show of a mesh that is operated.

To write its outputs anew: python -m tests.integration.test_operations_page --write
"""

import os
import re
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from tests.integration.transcripts import BLOCK, Step, blocks_of, normal, played, steps_of
from tests.integration.worlds import World, real_mesh
from tests.support.commands import all_commands
from unbroken.v1 import admin_service_pb2, sidecar_service_pb2

PAGE = Path(__file__).parents[2] / "docs" / "OPERATIONS.md"


OTHER_VERBS = frozenset({"run", "kill", "demo", "chaos", "memory"})
"""What starts an engine, does harm, or has a page of its own."""


def mesh_for_the_page(directory: Path) -> Any:
    return real_mesh(directory, num_workers=4, num_frontends=2, engine_options="--step-base-ms 10")


async def block_played(world: World, block: str, directory: Path) -> list[Step]:
    """The block, when the workers that live can be told."""
    last = max(world.mesh.workers.items())[1]
    environment = {
        "FRONTEND": world.mesh.frontend_address,
        "SIDECAR": last.address,
        "UNBROKEN_DISCOVERY": str(world.mesh.directory),
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
    }
    return await played(block, environment, directory)


def test_the_page_shows_what_the_commands_show(tmp_path: Path) -> None:
    with mesh_for_the_page(tmp_path / "mesh") as world:
        for block in blocks_of(PAGE):  # In order: a worker that has left is missing from the next.
            seen = world.run(block_played(world, block, tmp_path), limit_s=60)
            for step, expected in zip(seen, steps_of(block), strict=True):
                assert normal(step.output) == normal(expected.output), step.command


def test_the_page_has_every_action_of_an_operator_by_both_ways() -> None:
    steps = [step.command for block in blocks_of(PAGE) for step in steps_of(block)]
    calls = [
        f"{service.full_name}/{method.name}"
        for service in (
            admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"],
            sidecar_service_pb2.DESCRIPTOR.services_by_name["SidecarService"],
        )
        for method in service.methods
    ]
    assert [call for call in calls if not any("grpcurl" in s and call in s for s in steps)] == []
    verbs = {name.split()[0] for name in all_commands()} - OTHER_VERBS
    assert [verb for verb in sorted(verbs) if not any(f"unbroken {verb}" in s for s in steps)] == []


def write() -> None:
    """Run everything, and put its output on the page."""
    with tempfile.TemporaryDirectory() as name, mesh_for_the_page(Path(name) / "mesh") as world:

        def anew(match: re.Match[str]) -> str:
            steps = world.run(block_played(world, match[0], Path(name)), limit_s=600)
            return "".join(f"$ {step.command}\n{normal(step.output)}" for step in steps)

        PAGE.write_text(BLOCK.sub(anew, PAGE.read_text()))


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], "usage: … test_operations_page --write"
    write()
