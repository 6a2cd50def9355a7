"""What vLLM's plug-in tells of its scheduler's load, and what a sidecar makes of it."""

import asyncio
import json
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from sidecar.engines import load_tap as hearing
from sidecar.engines.adapter import LoadOfRank
from sidecar.engines.occupancy import is_news
from tests.engines.subjects import QUICK, play
from tests.engines.test_taps import tapped
from tests.engines.test_translations import FOUND
from worker.vllm_plugin import changes, load_tap

MODULE = "vllm.v1.core.sched.scheduler"
METHODS = ("add_request", "schedule", "update_from_output", "finish_requests")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an engine of this test listens; its sidecar knows of it."""
    path = tmp_path / "load.sock"
    monkeypatch.setenv(hearing.VARIABLE, str(path))
    return path


@pytest.fixture
def listener(path: Path) -> Iterator[tuple[load_tap.Tap, socket.socket]]:
    """A tap, and somebody who has connected to it."""
    tap = load_tap.Tap(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        yield tap, connection
    tap.close()


def load(blocks: int, total: int = 63) -> dict[str, int]:
    """With two requests that run, and one that waits."""
    held = {"blocks": blocks, "blocks_total": total}
    return {**held, "running": 2, "waiting": 1, "waiting_tokens": 70}


def test_both_ends_mean_the_same_variable() -> None:
    assert hearing.VARIABLE == load_tap.VARIABLE


def test_a_load_is_told_when_it_is_another_one(
    listener: tuple[load_tap.Tap, socket.socket],
) -> None:
    tap, connection = listener
    for blocks in (3, 3, 4):
        tap.tell(load(blocks))
    heard = [hearing.read(connection.recv(4096)) for _ in range(2)]
    assert heard == [LoadOfRank(0, 2, 1, blocks / 63, 70) for blocks in (3, 4)]
    connection.setblocking(False)
    with pytest.raises(BlockingIOError):
        connection.recv(4096)


def test_who_reads_nothing_does_not_stop_the_engine_and_knows_that_it_missed_something(
    path: Path, listener: tuple[load_tap.Tap, socket.socket]
) -> None:
    tap, connection = listener
    for blocks in range(10_000):
        tap.tell(load(blocks, 20_000))
    heard: list[int] = []
    while message := connection.recv(4096):
        heard.append(json.loads(message)["blocks"])
    assert heard == [*range(len(heard))]
    assert len(heard) < 10_000, "it was held up"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as again:
        again.settimeout(5)
        again.connect(str(path))
        tap.tell(load(9_999, 20_000))
        assert json.loads(again.recv(4096))["blocks"] == 9_999


def test_who_has_left_is_forgotten_and_one_too_many_is_let_wait(path: Path) -> None:
    tap = load_tap.Tap(path)
    several = [
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for _ in range(load_tap.LISTENERS_MAX + 1)
    ]
    for one in several:
        one.setblocking(False)
        one.connect(str(path))
    tap.tell(load(1))
    *accepted, last = several
    assert all(one.recv(4096) for one in accepted)
    with pytest.raises(BlockingIOError):
        last.recv(4096)
    accepted[0].close()
    tap.tell(load(2))  # It is found out.
    tap.tell(load(3))
    assert json.loads(last.recv(4096))["blocks"] == 3
    for one in several:
        one.close()
    tap.close()


class Scheduler:
    """As vLLM's, as far as it is looked at."""

    def __init__(self, num_ranks: int = 1) -> None:
        parallel = SimpleNamespace(data_parallel_size=num_ranks)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)
        self.free = 63
        pool = SimpleNamespace(num_gpu_blocks=64, get_num_free_blocks=lambda: self.free)
        self.kv_cache_manager = SimpleNamespace(block_pool=pool)
        self.waiting = [SimpleNamespace(num_tokens=70)]

    def get_request_counts(self) -> tuple[int, int]:
        return 2, 1

    def add_request(self) -> None:
        pass

    def schedule(self) -> str:
        self.free -= 5
        return "a plan"

    def update_from_output(self) -> None:
        self.free += 2

    def finish_requests(self) -> None:
        self.free += 3


@pytest.fixture
def scheduler_of(monkeypatch: pytest.MonkeyPatch, path: Path) -> type[Scheduler]:
    """That of a vLLM in which the plug-in was registered twice."""
    del path
    own = {name: Scheduler.__dict__[name] for name in METHODS}
    changed = type("Scheduler", (Scheduler,), own)
    vllm, module = ModuleType("vllm"), ModuleType(MODULE)
    monkeypatch.setattr(vllm, "__version__", f"{changes.VERSIONS[0]}0", raising=False)
    monkeypatch.setattr(module, "Scheduler", changed, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, MODULE, module)
    load_tap.register()
    load_tap.register()
    return changed


def test_a_scheduler_tells_after_whatever_it_does(
    scheduler_of: type[Scheduler], path: Path
) -> None:
    scheduler = scheduler_of()
    scheduler.add_request()
    tap: load_tap.Tap = getattr(scheduler, load_tap.TAP)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        assert scheduler.schedule() == "a plan"
        scheduler.update_from_output()
        scheduler.finish_requests()
        heard = [json.loads(connection.recv(4096)) for _ in range(3)]
    tap.close()
    assert heard == [load(blocks) for blocks in (5, 3, 0)]


def test_a_scheduler_that_is_not_as_it_was_goes_on_and_tells_nothing(
    scheduler_of: type[Scheduler], path: Path
) -> None:
    scheduler = scheduler_of()
    scheduler.add_request()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        scheduler.schedule()
        assert connection.recv(4096)
        del scheduler.kv_cache_manager
        assert scheduler.schedule() == "a plan"
        assert not connection.recv(4096)
        assert scheduler.schedule() == "a plan"


def test_of_several_ranks_nobody_is_told(scheduler_of: type[Scheduler], path: Path) -> None:
    scheduler_of(num_ranks=2).schedule()
    assert not path.exists()


def test_where_no_socket_can_be_the_engine_goes_on(
    scheduler_of: type[Scheduler], path: Path
) -> None:
    path.parent.rmdir()
    assert scheduler_of().schedule() == "a plan"


def test_what_a_scheduler_tells_counts_and_what_the_server_is_asked_does_not(path: Path) -> None:
    async def scenario() -> None:
        tap = load_tap.Tap(path)

        def says(blocks: int, total: int) -> bool:
            """Told again and again, as nobody knows when the sidecar has come."""
            tap.tell(load(3 * blocks, 3 * total))
            told = it.hub.load
            return told is not None and told.ranks[0].kv_blocks_used == round(64 * blocks / total)

        async with tapped() as (it, _):
            await it.until(lambda: says(31, 63), "it was not heard")
            assert it.hub.load is not None
            assert it.hub.load.ranks[0].requests_running == 2
            assert it.hub.load.ranks[0].prefill_tokens_queued == 70
            await asyncio.sleep(10 * QUICK.load_s)
            assert says(31, 63), "what is asked for came instead"
            await it.until(lambda: says(40, 63), "it was not heard")
            tap.close()
            await it.until(
                lambda: it.hub.load is not None and not it.hub.load.ranks[0].kv_blocks_used
            )

    play(scenario())


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"x",
        b"[]",
        b"{}",
        b'{"blocks": 1, "blocks_total": "x"}',
        b"\xff",
        pytest.param(b"[" * 4096, id="deep"),
        pytest.param(json.dumps(load(10**400)).encode(), id="huge"),
    ],
)
def test_nonsense_is_an_error_that_is_expected(message: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - Of whatever kind.
        hearing.read(message)


def test_who_speaks_nonsense_is_left(path: Path) -> None:
    async def scenario() -> None:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server.bind(str(path))
        server.listen(1)
        heard = asyncio.ensure_future(_all(path))
        connection, _ = await asyncio.to_thread(server.accept)
        with server, connection:
            connection.send(json.dumps(load(1, 2)).encode())
            connection.send(b"nonsense")
            assert await heard == [LoadOfRank(0, 2, 1, 0.5, 70)]

    play(scenario())


async def _all(path: Path) -> list[LoadOfRank]:
    async with asyncio.timeout(5):
        return [load async for load in hearing.listen(str(path))]


def test_a_change_is_news_unless_streams_only_grow() -> None:
    """Of 50 blocks of 4 tokens."""
    told = LoadOfRank(0, running=2, waiting=1, kv_share=0.2, waiting_tokens=70)
    assert is_news(None, told, FOUND)
    assert not is_news(told, replace(told, kv_share=0.22, waiting_tokens=71), FOUND)
    assert is_news(told, replace(told, kv_share=0.24), FOUND)
    assert is_news(told, replace(told, kv_share=0.1), FOUND)
    assert is_news(told, replace(told, waiting=0, waiting_tokens=0), FOUND)
