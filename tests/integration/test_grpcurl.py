"""docs/GRPCURL.md is what grpcurl really shows, by reflection, of a frontend and a sidecar.

To write its outputs anew: python -m tests.integration.test_grpcurl --write
"""

import asyncio
import json
import os
import re
import secrets
import sys
import sysconfig
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.worlds import World, real_mesh

PAGE = Path(__file__).parents[2] / "docs" / "GRPCURL.md"

_BLOCK = re.compile(r"(?<=```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)

# What differs from run to run, and what stands for it. Numbers as strings are 64 bits wide.
_VOLATILE = (
    (re.compile(r'("resume_token": )"[^"]+"'), r'\1"…"'),
    (re.compile(r'("(?:incarnation|epoch)": )"\d+"'), r'\1"…"'),
    (re.compile(r'("(?:load_age|admitted_at)": )"[^"]+"'), r'\1"…"'),
    (re.compile(r'("(?:sidecar_pid|engine_pgid)": )\d+'), r"\1…"),
    (re.compile(r',\n *"suspicion": [0-9.e-]+'), ""),  # Absent while it is nothing.
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:…"),
)


@dataclass(frozen=True, slots=True)
class Step:
    """A command and what it showed, on both of its outputs."""

    command: str
    output: str


def steps_of(block: str) -> list[Step]:
    """The steps of a console block: lines that begin with "$ ", each with what follows it."""
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    assert parts[0] == "", "a block begins with a command"
    return [Step(*pair) for pair in zip(parts[1::2], parts[2::2], strict=True)]


def blocks() -> list[str]:
    return _BLOCK.findall(PAGE.read_text())


def normal(output: str) -> str:
    """The output without what differs from run to run."""
    output = "".join(line.rstrip() + "\n" for line in output.splitlines())
    for pattern, stand_in in _VOLATILE:
        output = pattern.sub(stand_in, output)
    return output


def merged(output: str) -> object:
    """What a stream said, however its tokens were spread over messages; other output as it is.

    A client that reads slowly gets fewer and larger messages, and the machine may be busy.
    """
    decoder, position = json.JSONDecoder(), 0
    messages: list[dict[str, Any]] = []
    text = normal(output).replace("…,", "0,").replace("…\n", "0\n").strip()
    while position < len(text):
        try:
            message, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return normal(output)
        last = messages[-1] if messages else {}
        if "token_ids" in message and "token_ids" in last:
            last["token_ids"] += message["token_ids"]
            last["text"] = last.get("text", "") + message.get("text", "")
        else:
            messages.append(message)
        while position < len(text) and text[position].isspace():
            position += 1
    return messages


async def played(block: str, environment: dict[str, str], directory: Path) -> list[Step]:
    """The steps of the block, run anew one after the other in one shell."""
    steps = steps_of(block)
    mark = secrets.token_hex(8)
    script = "".join(f"{step.command}\necho; echo {mark}\n" for step in steps)
    shell = await asyncio.create_subprocess_exec(
        *("bash", "-c", script),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **environment},
        cwd=directory,
    )
    try:
        stdout, _ = await shell.communicate()
    finally:
        if shell.returncode is None:
            shell.kill()
            await shell.wait()
    outputs = stdout.decode().split(f"\n{mark}\n")
    return [Step(step.command, text) for step, text in zip(steps, outputs, strict=False)]


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


@pytest.mark.parametrize("index", range(len(blocks())))
def test_the_page_shows_what_grpcurl_shows(world: World, index: int, tmp_path: Path) -> None:
    block = blocks()[index]
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

        PAGE.write_text(_BLOCK.sub(anew, PAGE.read_text()))


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], "usage: python -m tests.integration.test_grpcurl --write"
    write()
