"""A mesh in which everything can be hurt: proxies on all links, clients that record.

    client ──▶ proxy ──▶ frontend ══▶ proxy ══▶ sidecar ──▶ engine

Sidecars advertise their proxy's address, so all frontends reach a worker through the same proxy.
(Frontends that are to be cut off apart need a discovery directory each, with records that name
another proxy: a record has one address.) A fault is injected with its proof, and healed:

    async with Arena(directory) as arena:
        fault = await arena.inject(Component.LINK_DOWN, Harm.BLACKHOLE, "w1")
        print(fault.proof)
        await arena.heal(fault)
"""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

from unbroken.chaos import processes
from unbroken.chaos.checker import Event, Truth, truth_of
from unbroken.chaos.processes import EFFECT_TIMEOUT_S, NoEffect, Slowdown
from unbroken.chaos.proxy import BOTH, Bandwidth, Direction, Latency, Proxy, Timeout
from unbroken.chaos.recorder import Recorder
from unbroken.chaos.vocabulary import Component, Harm
from unbroken.client import Client
from unbroken.errors import UnbrokenError
from unbroken.mesh import LocalMesh
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import worker_pb2

SLOW_RUNNING_S: Final = 0.010
SLOW_STOPPED_S: Final = 0.040
"""A slow process runs for a fifth of the time."""

SLOW_LATENCY: Final = Latency(0.060, 0.030)
SLOW_BANDWIDTH: Final = Bandwidth(64_000)
"""A slow link: 60 ms more, give or take 30, and 64 kB/s."""

_POLL_S: Final = 0.005
_IDLE_TIMEOUT_S: Final = 10.0


_LINK_DIRECTIONS: Final[Mapping[Component, tuple[Direction, ...]]] = {
    Component.LINK_UP: (Direction.UPSTREAM,),
    Component.LINK_DOWN: (Direction.DOWNSTREAM,),
    Component.LINK_BOTH: BOTH,
}

_LISTENERS: Final = frozenset({Component.SIDECAR, Component.HOST, Component.FRONTEND})


@dataclass(frozen=True, slots=True)
class Fault:
    """One that was injected."""

    component: Component
    harm: Harm
    victim: str
    """Name of the worker, the frontend or the client."""
    at: float
    """The moment before it began, monotonic seconds."""
    proof: str
    """What was seen of its effect."""
    end: Callable[[], Awaitable[None]]
    """Ends what lasts."""


class Arena:
    """A mesh, its proxies and a recording client ("c1"), from `start` to `stop`."""

    def __init__(
        self,
        directory: Path,
        *,
        num_workers: int = 2,
        num_frontends: int = 1,
        engine_options: str = "",
        sidecar_flags: Sequence[str] = (),
        frontend_flags: Sequence[str] = (),
        flags_of: Mapping[str, Sequence[str]] = MappingProxyType({}),
        seed: int = 0,
    ) -> None:
        """The flags are those of `LocalMesh`."""
        self.worker_ids = [f"w{number}" for number in range(1, num_workers + 1)]
        self.links = {
            worker_id: Proxy(f"127.0.0.1:{_free_port()}", seed=seed)
            for worker_id in self.worker_ids
        }
        """The proxy before each sidecar."""
        self.doors: dict[str, Proxy] = {}
        """The proxy before each frontend."""
        self.watchers: dict[str, Client] = {}
        """A client for each frontend, past the proxies, to see how things stand."""
        self._flags_of = {name: list(flags) for name, flags in flags_of.items()}
        self.mesh = LocalMesh(
            directory,
            num_workers=num_workers,
            num_frontends=num_frontends,
            engine_options=engine_options,
            sidecar_flags=sidecar_flags,
            frontend_flags=frontend_flags,
            flags_of=self._flags_of,
        )
        self._seed = seed
        self._stack = AsyncExitStack()
        self._truths: dict[str, Truth] = {}
        self._num_truths = 0

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        for worker_id, proxy in self.links.items():
            await self._stack.enter_async_context(proxy)
            self._flags_of.setdefault(worker_id, []).extend(
                ["--listen", proxy.upstream, "--advertise", proxy.address]
            )
        await self._stack.enter_async_context(self.mesh)
        for number, address in enumerate(self.mesh.frontend_addresses, 1):
            door = Proxy(address, seed=self._seed)
            self.doors[f"f{number}"] = await self._stack.enter_async_context(door)
        for number, address in enumerate(self.mesh.frontend_addresses, 1):
            client = await self._stack.enter_async_context(Client(address))
            self.watchers[f"f{number}"] = client
        self.client = Recorder([door.address for door in self.doors.values()])
        await self.client.start()
        self._stack.push_async_callback(self._close_client)

    async def _close_client(self) -> None:
        await self.client.close()

    # Faults.

    async def inject(self, component: Component, harm: Harm, victim: str) -> Fault:
        """Hurt `victim`, and return when that has taken effect. Raises `NoEffect`."""
        proxies, directions = self._proxies(component, victim)
        is_link = component in _LINK_DIRECTIONS
        # A client from which all answers are kept may well have nothing more to say.
        shown = directions if is_link else (Direction.DOWNSTREAM,)
        at = time.monotonic()
        if harm is Harm.RESET:
            proof, end = await self._reset(proxies, directions), _nothing
        elif harm is Harm.BLACKHOLE:
            proof, end = await self._swallow(proxies, directions, shown)
        elif harm is Harm.SLOW and (is_link or component is Component.CLIENT):
            proof, end = await self._delay(proxies, directions, shown)
        elif is_link:
            raise NoEffect(f"a link cannot suffer {harm.value}")
        else:
            proof, end = await self._hurt(component, harm, victim)
        return Fault(component, harm, victim, at, proof, end)

    async def heal(self, fault: Fault) -> None:
        """End a fault and start again whatever died of it, until everything serves."""
        await fault.end()
        if fault.harm is Harm.KILL:
            await self.revive(fault.component, fault.victim)
        await self.until_serving()

    async def revive(self, component: Component, victim: str) -> None:
        """Start again what was killed. Sidecars start their engines themselves."""
        if component is Component.CLIENT:
            await self.client.close()
            history = self.client.history
            self.client = Recorder([door.address for door in self.doors.values()])
            self.client.history = history
            await self.client.start()
        elif component is not Component.ENGINE:
            (proxy,), _ = self._proxies(component, victim)
            await proxy.start()
            await self.mesh.restart(victim)

    def pids(self, component: Component, victim: str) -> tuple[int, ...]:
        """The living processes of a component."""
        if component is Component.CLIENT:
            return (self.client.pid,)
        if component is Component.FRONTEND:
            return (self.mesh.frontends[victim].pid,)
        record = self.mesh.workers[victim]
        sidecar = (record.sidecar_pid,) if component is not Component.ENGINE else ()
        engine = processes.group(record.engine_pgid) if component is not Component.SIDECAR else ()
        return (*sidecar, *engine)

    async def _hurt(
        self, component: Component, harm: Harm, victim: str
    ) -> tuple[str, Callable[[], Awaitable[None]]]:
        pids = self.pids(component, victim)
        match harm:
            case Harm.KILL:
                proof = await processes.kill(pids)
                if component in _LISTENERS:  # Nobody listens there any more, so nobody accepts.
                    for proxy in self._proxies(component, victim)[0]:
                        proxy.refuse()
                return proof, _nothing
            case Harm.STOP:

                async def resume() -> None:
                    await processes.resume(pids)

                return await processes.stop(pids), resume
            case _:
                slow = Slowdown(
                    lambda: [pid for pid in pids if processes.is_alive(pid)],
                    running_s=SLOW_RUNNING_S,
                    stopped_s=SLOW_STOPPED_S,
                )
                slow.start()
                await _until(lambda: slow.num_stops >= 2, "processes to be stopped now and then")
                return f"{len(pids)} processes stopped again and again", slow.end

    def _proxies(
        self, component: Component, victim: str
    ) -> tuple[Sequence[Proxy], tuple[Direction, ...]]:
        if component is Component.CLIENT:
            return list(self.doors.values()), BOTH
        if component is Component.FRONTEND:
            return [self.doors[victim]], BOTH
        return [self.links[victim]], _LINK_DIRECTIONS.get(component, BOTH)

    async def _reset(self, proxies: Sequence[Proxy], directions: tuple[Direction, ...]) -> str:
        # What a direction carries ends at its receiver: that one sees the reset.
        num = sum(proxy.reset(*(() if directions == BOTH else directions)) for proxy in proxies)
        if not num:
            raise NoEffect("expected connections to reset, found none")
        return f"{num} connections ended with RST"

    async def _swallow(
        self,
        proxies: Sequence[Proxy],
        directions: tuple[Direction, ...],
        shown: tuple[Direction, ...],
    ) -> tuple[str, Callable[[], Awaitable[None]]]:
        held = _Held(proxies, shown)
        for proxy in proxies:
            proxy.add(Timeout(), *directions)

        async def end() -> None:
            for proxy in proxies:
                proxy.clear()

        await _until(lambda: held.grew, "bytes to be swallowed")
        return f"{held.num_bytes} bytes swallowed at first", end

    async def _delay(
        self,
        proxies: Sequence[Proxy],
        directions: tuple[Direction, ...],
        shown: tuple[Direction, ...],
    ) -> tuple[str, Callable[[], Awaitable[None]]]:
        held = _Held(proxies, shown)
        for proxy in proxies:
            proxy.add(SLOW_LATENCY, *directions)
            proxy.add(SLOW_BANDWIDTH, *directions)

        async def end() -> None:
            for proxy in proxies:
                proxy.clear()

        await _until(lambda: held.grew, "bytes to be late")
        return f"{held.num_bytes} bytes late at first", end

    # How things stand.

    async def workers(self, frontend_id: str = "f1") -> Mapping[str, admin_pb.WorkerInfo]:
        """As a frontend sees them."""
        infos = await self.watchers[frontend_id].list_workers()
        return {info.record.identity.worker_id: info for info in infos}

    async def streams(self) -> Mapping[str, pb.StreamInfo]:
        """The requests of all frontends."""
        return {
            info.request_id: info
            for watcher in self.watchers.values()
            async for info in watcher.list_streams()
        }

    async def until_serving(self, limit_s: float = 60.0) -> None:
        """Wait until all frontends send work to all workers again. Raises TimeoutError.

        A sidecar that has given its engine up, since it died too often, is started again.
        """
        async with asyncio.timeout(limit_s):
            for worker_id in self.worker_ids:
                record = self.mesh.workers.get(worker_id)
                if record is None or not processes.is_alive(record.sidecar_pid):
                    await self.mesh.restart(worker_id)
            for frontend_id in self.watchers:
                while not await self._is_serving(frontend_id):  # noqa: ASYNC110 - Unannounced.
                    await asyncio.sleep(_POLL_S)

    async def _is_serving(self, frontend_id: str) -> bool:
        try:
            infos = await self.workers(frontend_id)
        except UnbrokenError:
            return False
        records = self.mesh.workers
        return set(infos) == set(self.worker_ids) and all(
            _takes_work(info)
            and name in records
            and processes.is_alive(records[name].engine_pgid)
            and records[name].engine_pgid == info.record.engine_pgid
            for name, info in infos.items()
        )

    async def is_ready(self, worker_id: str, frontend_id: str = "f1") -> bool:
        """Whether a frontend sends work to the worker, and nothing runs there."""
        info = (await self.workers(frontend_id)).get(worker_id)
        return (
            info is not None
            and _takes_work(info)
            and not info.num_attempts
            and not any(
                rank.kv_blocks_used or rank.requests_running or rank.requests_waiting
                for rank in info.load.ranks
            )
        )

    async def until_idle(self, limit_s: float = _IDLE_TIMEOUT_S) -> str:
        """Wait until nobody holds anything for anybody; else, what is still held."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + limit_s
        while held := [words for name in self.watchers for words in await self._held(name)]:
            if loop.time() > give_up_at:
                return "; ".join(held)
            await asyncio.sleep(_POLL_S)
        return ""

    async def _held(self, frontend_id: str) -> list[str]:
        held: list[str] = []
        for name, info in (await self.workers(frontend_id)).items():
            blocks = sum(rank.kv_blocks_used for rank in info.load.ranks)
            streams = sum(rank.requests_running + rank.requests_waiting for rank in info.load.ranks)
            if blocks or streams:
                held.append(f"{name}: {blocks} KV blocks, {streams} streams")
            if info.num_attempts:
                held.append(f"{name}: {info.num_attempts} attempts of {frontend_id}")
        return held

    # What has to come.

    async def truth(self, request: pb.GenerateRequest) -> Truth:
        """What an undisturbed run of a request delivers; run at most once."""
        return (await self.truths({"one": request}))["one"]

    async def truths(
        self, requests: Mapping[str, pb.GenerateRequest], *, limit_s: float = 60.0
    ) -> Mapping[str, Truth]:
        """As `truth`, of many, all at once."""
        keys: dict[str, str] = {}
        missing: dict[str, pb.GenerateRequest] = {}
        for name, request in requests.items():
            bare = pb.GenerateRequest()
            bare.CopyFrom(request)
            bare.request_id = ""
            key = bare.SerializeToString(deterministic=True).hex()
            keys[name] = key
            if key not in self._truths:
                missing[key] = bare
        streams: dict[str, str] = {}
        for key, request in missing.items():
            self._num_truths += 1
            streams[key] = f"truth-{self._num_truths}"
            self.client.ask(streams[key], request, timeout_s=limit_s)
        async with asyncio.timeout(limit_s):
            await self.client.until(lambda: not self.client.open_streams & set(streams.values()))
        for key, stream in streams.items():
            own = [event for event in self.client.history if event.stream == stream]
            self._truths[key] = truth_of(own)
        return {name: self._truths[key] for name, key in keys.items()}

    def history_of(self, streams: Collection[str]) -> list[Event]:
        """What the client recorded of these streams."""
        return [event for event in self.client.history if event.stream in streams]


def _takes_work(info: admin_pb.WorkerInfo) -> bool:
    return (
        info.link == admin_pb.LINK_STATE_UP
        and info.engine == worker_pb2.ENGINE_STATE_SERVING
        and not info.is_draining
        and info.liveness != admin_pb.LIVENESS_SUSPECT
        and not info.HasField("ejection")
    )


class _Held:
    """What proxies have taken in and not delivered, since this was made."""

    def __init__(self, proxies: Sequence[Proxy], directions: Sequence[Direction]) -> None:
        self._proxies = proxies
        self._directions = directions
        self._before = {direction: self._now(direction) for direction in self._directions}

    @property
    def grew(self) -> bool:
        """In each direction."""
        return all(self._now(direction) > self._before[direction] for direction in self._directions)

    @property
    def num_bytes(self) -> int:
        return sum(self._now(direction) - self._before[direction] for direction in self._directions)

    def _now(self, direction: Direction) -> int:
        return sum(proxy.traffic[direction].bytes_held for proxy in self._proxies)


async def _until(claim: Callable[[], bool], expected: str) -> None:
    try:
        async with asyncio.timeout(EFFECT_TIMEOUT_S):
            while not claim():  # noqa: ASYNC110 - Nothing announces it.
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise NoEffect(f"expected {expected}, not so after {EFFECT_TIMEOUT_S:g} s") from None


async def _nothing() -> None:
    pass


def _free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
