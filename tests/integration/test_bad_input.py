"""Whatever bad input comes, from whichever side, it is answered clearly and the process lives.

docs/BAD_INPUT.md lists it all; to write it: python -m tests.integration.test_bad_input --write
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import Generator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.integration import bad_engines, bad_relay_calls, bad_requests, bad_sidecars
from tests.integration.bad_input import BadInput
from tests.integration.worlds import World, real_mesh, start_time
from unbroken import discovery
from unbroken.client import Client
from unbroken.history import record
from unbroken.transport import open_channel

PAGE = Path(__file__).parents[2] / "docs" / "BAD_INPUT.md"

SECTIONS: tuple[tuple[str, str, tuple[BadInput[Any], ...]], ...] = (
    ("Client to frontend", "client", bad_requests.CASES),
    ("Frontend to sidecar", "frontend", bad_relay_calls.CASES),
    ("Sidecar to frontend", "sidecar", bad_sidecars.CASES),
    ("Engine to sidecar", "engine", bad_engines.CASES),
    ("Sidecar to engine", "engine socket", bad_engines.SOCKET_CASES),
)

HEAD = """\
# Bad input

Generated from the tests by `python -m tests.integration.test_bad_input --write`. Each line is said
to real processes; they answer as below, live on, and the next good request succeeds.

The answer is a gRPC code, with the reason of docs/ERRORS.md if a process of ours gives it and not
the gRPC library. Where no call can carry a code, it is what happens instead: an attempt is
*refused* or *ended* with a FailureKind, a link or connection *ends*, and what is late news, or from
a later version of the contract, is *ignored*.

What a sidecar or an engine says wrong costs its worker the streams, which go on elsewhere. The
streams of these tests may not, so their clients see `WORKER_LOST` and why.
"""


def page() -> str:
    """What the page has to say."""
    lines = [HEAD]
    for title, _, cases in SECTIONS:
        lines += [
            f"## {title}\n",
            "| said | answer | reason | about |",
            "| --- | --- | --- | --- |",
        ]
        for case in cases:
            answer = case.expected
            reason = answer.reason.removeprefix("FAILURE_KIND_")
            cells = (answer.code, reason, answer.about)
            lines.append(f"| {case.kind} | {' | '.join(f'`{c}`' if c else '—' for c in cells)} |")
        lines.append("")
    return "\n".join(lines)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.integration.test_bad_input --write"


def test_every_kind_is_listed_once() -> None:
    for _, _, cases in SECTIONS:
        kinds = [case.kind for case in cases]
        assert sorted(set(kinds)) == sorted(kinds)


def bad_input_mesh(directory: Path, edge: str) -> Any:
    """One worker, and a frontend that is quick to notice silence."""
    quick = ("--link-silence-max-s", "1", "--link-forgotten-grace-s", "0")
    return real_mesh(
        directory,
        num_workers=1,
        engine_options=f"--step-base-ms 1 --context-length {bad_requests.CONTEXT_LENGTH}",
        frontend_flags=[*quick, "--edge", edge],
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    with bad_input_mesh(tmp_path_factory.mktemp("mesh"), "grpcio") as world:
        yield world


def named(cases: Iterable[BadInput[Any]]) -> Any:
    """A parameter for each case."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.kind) for case in cases])


def pids(world: World) -> list[tuple[int, str]]:
    """Frontend, sidecar and engine, each with the time of its start."""
    worker = world.mesh.workers["w1"]
    found = [world.mesh.frontend_pid, worker.sidecar_pid, worker.engine_pgid]
    return [(pid, start_time(pid)) for pid in found]


async def good_request_succeeds(client: Client, model: str = "simulated") -> None:
    seen = await record(
        client.generate(model=model, prompt="hello", max_tokens=3, temperature=0, timeout_s=20)
    )
    assert seen.num_tokens == 3


@named(bad_requests.CASES)
def test_a_frontend_answers_bad_requests(world: World, case: BadInput[bad_requests.Edge]) -> None:
    answers_bad_requests(world, case)


def answers_bad_requests(world: World, case: BadInput[bad_requests.Edge]) -> None:
    """The answer is the one expected, and a good request is served after it."""
    before = pids(world)

    async def scenario() -> None:
        address = world.mesh.frontend_address
        channel = open_channel(address)
        try:
            assert await case.say(bad_requests.Edge(address, channel)) == case.expected
        finally:
            await channel.close()
        await good_request_succeeds(world.client)

    world.run(scenario())
    assert pids(world) == before


@named(bad_relay_calls.CASES)
def test_a_sidecar_answers_bad_calls(world: World, case: BadInput[bad_relay_calls.Sidecar]) -> None:
    before = pids(world)

    async def scenario() -> None:
        channel = open_channel(world.mesh.workers["w1"].address)
        try:
            assert await case.say(bad_relay_calls.Sidecar(channel)) == case.expected
        finally:
            await channel.close()
        await good_request_succeeds(world.client)

    world.run(scenario())
    assert pids(world) == before


@named(bad_sidecars.CASES)
def test_a_frontend_survives_bad_sidecars(world: World, case: BadInput[bad_sidecars.Mesh]) -> None:
    before = pids(world)

    async def scenario() -> None:
        mesh = bad_sidecars.Mesh(discovery.connect(world.mesh.directory), world.client)
        assert await case.say(mesh) == case.expected
        await good_request_succeeds(world.client)

    world.run(scenario())
    assert pids(world) == before


_FAILURES_OF_ONE_ENGINE = 4
"""One less than its sidecar bears within a minute."""


class Tampered:
    """A worker of the model `tampered` in the world's mesh, whose engine lives behind a meddler."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world = world
        self.socket = directory / "engine.sock"
        self.log = directory / "engine.log"
        self.meddler = bad_engines.Meddler(directory / "meddler.sock", self.socket)
        self._sidecar_log = directory / "sidecar.log"
        self._processes: list[asyncio.subprocess.Process] = []
        self._num_sidecars = 0
        self._num_uses = 0

    async def start(self) -> None:
        await self._run(
            self.log,
            *("worker", "--engine", "simulated", "--socket", str(self.socket)),
            *("--model", bad_engines.MODEL, "--step-base-ms", "1"),
            *("--context-length", str(bad_requests.CONTEXT_LENGTH)),
        )
        socket = bad_engines.EngineSocket(self.socket, self.log)
        while not await bad_engines.is_greeted(socket):  # noqa: ASYNC110 - It starts.
            await asyncio.sleep(0.02)
        await self.meddler.start()

    async def sidecar(self) -> asyncio.subprocess.Process:
        """A sidecar that serves; a new one now and then, for it gives up an engine in the end."""
        if self._num_uses % _FAILURES_OF_ONE_ENGINE == 0:
            if self._num_sidecars:
                await end(self._processes[-1])
            self._num_sidecars += 1
            await self._run(
                self._sidecar_log,
                *("sidecar", "--worker-id", f"tampered-{self._num_sidecars}"),
                *("--discovery", str(self.world.mesh.directory)),
                *("--engine-socket", str(self.meddler.path)),
            )
        self._num_uses += 1
        await self.until_served()
        return self._processes[-1]

    def failures(self) -> list[str]:
        """What the sidecars called the ends of their engines."""
        lines = map(json.loads, self._sidecar_log.read_text().splitlines())
        return [line["failure"] for line in lines if line["event"] == "engine down"]

    async def until_failed(self, num_failures: int) -> None:
        """Wait for a line in the log: it is written after frontends were told; fails after 5 s."""
        async with asyncio.timeout(5):
            while len(self.failures()) < num_failures:  # noqa: ASYNC110 - Nothing announces it.
                await asyncio.sleep(0.01)

    async def until_served(self) -> None:
        """Wait until the frontend can send work there."""
        while not any(  # noqa: ASYNC110 - Nothing announces it.
            model.model == bad_engines.MODEL and model.num_workers_ready
            for model in await self.world.client.list_models()
        ):
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        await self.meddler.stop()
        for process in self._processes:
            await end(process)

    async def _run(self, log: Path, *command: str) -> asyncio.subprocess.Process:
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", *command, stdout=output, stderr=output
            )
        self._processes.append(process)
        return process


async def end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()


@pytest.fixture(scope="module")
def tampered(world: World) -> Generator[Tampered]:
    # Not pytest's folder: the path of a Unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="unbroken-test-") as directory:
        tampered = Tampered(world, Path(directory))
        try:
            world.run(tampered.start())
            yield tampered
        finally:
            world.run(tampered.stop())


@named(bad_engines.CASES)
def test_a_sidecar_survives_bad_engines(
    tampered: Tampered, case: BadInput[bad_engines.TamperedWorker]
) -> None:
    world = tampered.world

    async def scenario() -> None:
        sidecar = await tampered.sidecar()
        before = tampered.failures()
        worker = bad_engines.TamperedWorker(tampered.meddler, world.client)
        assert await case.say(worker) == case.expected
        await tampered.until_failed(len(before) + 1)
        assert tampered.failures() == [*before, case.expected.about]  # The sidecar itself saw it.
        await good_request_succeeds(world.client, bad_engines.MODEL)
        assert sidecar.returncode is None

    world.run(scenario())


@named(bad_engines.SOCKET_CASES)
def test_an_engine_survives_bad_sidecars(
    tampered: Tampered, case: BadInput[bad_engines.EngineSocket]
) -> None:
    async def scenario() -> None:
        socket = bad_engines.EngineSocket(tampered.socket, tampered.log)
        assert await case.say(socket) == case.expected
        assert await bad_engines.is_greeted(socket)

    tampered.world.run(scenario())


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    else:
        print(page())  # noqa: T201
