"""docs/MEMORY.md is what `unbroken memory` and grpcurl really show.

To write its outputs anew: python -m tests.memory_service.test_page --write
"""

import asyncio
import contextlib
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.integration.transcripts import BLOCK, Step, blocks_of, played, steps_of
from tests.memory_service.processes import ServiceProcess, Victims, serving
from unbroken.memory.client import SegmentClass

PAGE = Path(__file__).parents[2] / "docs" / "MEMORY.md"

_VOLATILE = (
    (re.compile(r'"?\b\d{15,20}\b"?'), "…"),
    (re.compile(r'("boot_token": )"[^"]+"'), r"\1…"),
    (re.compile(r"(token) [0-9a-f]{16}, got"), r"\1 …, got"),
    (re.compile(r'("uptime": )"[^"]+"'), r"\1…"),
    (re.compile(r'("sequence": )"\d+"'), r"\1…"),
    (re.compile(r"(engine-0 +acme +)\d+ +\d+"), r"\1…  …"),
    (re.compile(r"(?<=\S)  +"), "  "),
)


def normal(output: str) -> str:
    """The output without what differs from run to run."""
    output = "".join(line.rstrip() + "\n" for line in output.splitlines())
    for pattern, stand_in in _VOLATILE:
        output = pattern.sub(stand_in, output)
    return output


@contextlib.contextmanager
def service_of_the_page(directory: Path) -> Generator[ServiceProcess]:
    """Weights, a pool and blocks of an engine that lives, and blocks of one that does not."""
    flags = ("--capacity-bytes", str(2**30), "--scrub-bytes-per-s", "0")
    with serving(directory, *flags) as service:
        victims = Victims(service)
        victims.run("close", seed=1)
        victims.close()
        with service.client(tenant="acme", client="engine-0") as engine:
            engine.seal(engine.create("llama/weights", SegmentClass.WEIGHTS, [2**20, 2**20]))
            engine.freeze(engine.create("llama/kv", SegmentClass.KV_POOL, [2**20]))
            writer = engine.open_writer(65_536, 8)
            writer.put(bytes(32), bytes(65_536), 16)
            writer.flush()
            yield service


def environment(service: ServiceProcess) -> dict[str, str]:
    control = str(service.directory / "control.sock")
    return {
        "CONTROL": control,
        "UNBROKEN_MEMORY_CONTROL": control,
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
    }


def seen(block: str, directory: Path) -> list[Step]:
    """What the commands of a block show."""
    with service_of_the_page(directory) as service:
        return asyncio.run(
            asyncio.wait_for(played(block, environment(service), directory), timeout=60)
        )


@pytest.mark.parametrize("index", range(len(blocks_of(PAGE))))
def test_the_page_shows_what_the_commands_show(index: int, tmp_path: Path) -> None:
    block = blocks_of(PAGE)[index]
    for step, expected in zip(seen(block, tmp_path), steps_of(block), strict=True):
        assert normal(step.output) == normal(expected.output), step.command


def write() -> None:
    """Run everything, and put its output on the page."""

    def anew(match: re.Match[str]) -> str:
        with tempfile.TemporaryDirectory() as directory:
            steps = seen(match[0], Path(directory))
        return "".join(f"$ {step.command}\n{normal(step.output)}" for step in steps)

    PAGE.write_text(BLOCK.sub(anew, PAGE.read_text()))


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], "usage: python -m tests.memory_service.test_page --write"
    write()
