"""A memory service as a process: what it is made of, how it starts, how it stops."""

import asyncio
import contextlib
import fcntl
import os
import resource
import secrets
import select
import time
from collections.abc import Callable
from pathlib import Path

import grpc.aio

from memory_service import gpu_health
from memory_service.accounts import HOST, Limits
from memory_service.config import MemoryConfig
from memory_service.control import Control
from memory_service.fencing import FencePolicy
from memory_service.gpus import CUDA, Driver, Gpus
from memory_service.holdings import Holdings, Policy
from memory_service.keeper import Keeper
from memory_service.memfd import MemfdBackend
from memory_service.metrics import HoldingsCollector
from memory_service.scrubber import Scrubber
from memory_service.session_channel import SessionChannel
from memory_service.tickets import KEY_BYTES, Tickets
from memory_service.vault_link import VaultLink
from unbroken import log, metrics
from unbroken.config import split_address
from unbroken.health import HealthServicer, add_health
from unbroken.loop_watch import watched_loop
from unbroken.memory.channel import ChannelClosed
from unbroken.signals import heed, heed_no_more
from unbroken.transport import listen, listen_locally, make_server
from unbroken.v1 import memory_pb2_grpc

MEMORY_SERVICE = "unbroken.v1.MemoryService"
LOCK_WAIT_S = 10.0
"""How long another service of this directory may take to end."""
FDS_RESERVED = 4500
"""Descriptors that are not for slabs."""
SEAL_RETRY_S = 0.01
VAULT_RETRY_S = 1.0

_log = log.get_logger(__name__)


class MemoryService:
    """One life of it, from `start` to `stop`."""

    def __init__(
        self,
        config: MemoryConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        driver: Driver = CUDA,
    ) -> None:
        """`driver` speaks to the GPUs that are configured, if there are any."""
        self._config = config
        self._gpus = gpus = Gpus(config, driver)
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        policy = Policy(
            Limits(
                config.capacity_bytes,
                config.quota_bytes,
                config.tenant_quotas(),
                config.high_share,
                config.low_share,
            ),
            FencePolicy(
                rebind_grace_s=config.rebind_grace_s,
                kills=config.kills_unbound,
                seal_is_proof=config.seal_is_proof and gpus.seal_is_proof,
            ),
            config.orphan_grace_s,
            gpus.limits,
            min(config.slabs_max, _slabs_max()),
        )
        self._grants = config.user_grants()
        self.holdings = Holdings(policy, secrets.randbits(63) | 1)
        self.keeper = Keeper(
            self.holdings,
            {HOST: MemfdBackend(), **gpus.backends},
            on_forget=self._forget,
            absent=gpus.absent,
        )
        config.directory.mkdir(parents=True, exist_ok=True)
        self._tickets = Tickets(_secret(config.directory / "ticket.key"))
        self.channel = SessionChannel(
            self.holdings,
            self.keeper,
            may_use=self._may_use,
            tickets=self._tickets,
            clock=clock,
        )
        self.channel.on_change = self._schedule
        self.channel.on_due = self._schedule_at
        registry = metrics.new_registry()
        self._registry = registry
        self._collector = HoldingsCollector(
            self.holdings, registry, num_fds=lambda: self.keeper.num_fds
        )
        self.scrubber = Scrubber(
            self.holdings,
            self.keeper,
            bytes_per_s=config.scrub_bytes_per_s,
            count=self._count_scrubbed,
        )
        self.address = ""
        """host:port of gRPC, if it listens on one."""
        self._lock = -1
        self._due: asyncio.TimerHandle | None = None
        self._due_at = 0.0
        self._servers: list[grpc.aio.Server] = []
        self._metrics_server: metrics.MetricsServer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Serve. Sessions come first: engines wait for them. Raises OSError."""
        begun = self._clock()
        config, directory = self._config, self._config.directory
        directory.chmod(0o711 if self._grants else 0o700)
        self._lock = await _locked(directory / "service.lock")
        if config.has_vault:
            self.keeper.vault = self._open_vault()
            found = self.keeper.vault.list()
            num_kept = self.keeper.take_back(found, self._clock())
            _log.info("vault read", entries=num_kept)
        self.channel.watch_restored()
        self.channel.listen(directory / "session.sock", mode=0o666 if self._grants else 0o600)
        _log.info(
            "sessions served",
            boot_token=f"{self.holdings.boot_token:016x}",
            took_s=round(self._clock() - begun, 4),
        )
        server, health = self._server(None)
        path = directory / "control.sock"
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        listen_locally(server, path)
        if config.listen is not None:
            remote, remote_health = self._server(self._tickets)
            self.address = listen(remote, config.listen, tls=config.tls)
            await remote.start()
            remote_health.set_all(is_serving=True)
        if config.metrics_listen is not None:
            host, port = split_address(config.metrics_listen)
            self._metrics_server = metrics.serve(self._registry, host, port)
        self._gpus.watch(self._gpu_told)
        await server.start()
        path.chmod(0o600)
        health.set_all(is_serving=True)
        self._tasks = [
            asyncio.create_task(self.scrubber.run(), name="scrubber"),
            asyncio.create_task(self._look_after(), name="look after"),
        ]
        self._schedule()
        _log.info(
            "memory service serves",
            address=self.address,
            metrics_address=self._metrics_server.address if self._metrics_server else "",
        )

    def _server(self, tickets: Tickets | None) -> tuple[grpc.aio.Server, HealthServicer]:
        """One that is not started; with tickets, for whoever has one."""
        server = make_server()
        control = Control(
            self.holdings,
            self.keeper,
            self.scrubber,
            on_change=self._schedule,
            tickets=tickets,
            clock=self._clock,
        )
        memory_pb2_grpc.add_MemoryServiceServicer_to_server(control, server)
        self._servers.append(server)
        return server, add_health(server, [MEMORY_SERVICE])

    async def wait(self) -> None:
        """Until one of its tasks fails, which it then raises."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        await asyncio.Event().wait()  # The scrubber may be off.

    async def stop(self) -> None:
        """Stop serving. What is held stays with the vault, for the next service."""
        await asyncio.to_thread(self._gpus.close)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._due is not None:
            self._due.cancel()
        self.channel.close()
        await asyncio.to_thread(self.keeper.close)
        for server in self._servers:
            await server.stop(None)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        if self.keeper.vault is not None:
            self.keeper.vault.close()
        if self._lock != -1:
            os.close(self._lock)
        _log.info("memory service stopped")

    def _open_vault(self) -> VaultLink:
        config = self._config
        return VaultLink(config.directory / "vault.sock", config.vault_idle_exit_s)

    def _may_use(self, uid: int, tenant: str) -> bool:
        return uid == os.getuid() or (uid, tenant) in self._grants

    def _forget(self, session_id: int) -> None:
        self.channel.unwatch(session_id)

    def _count_scrubbed(self, num_bytes: int) -> None:
        self._collector.num_scrubbed_bytes += num_bytes

    def _schedule(self) -> None:
        """Have `handle_timeout` called when it is due."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if (due_at := self.holdings.deadline()) is not None:
            self._schedule_at(due_at)

    def _schedule_at(self, due_at: float) -> None:
        """At this time at the latest."""
        if self._due is not None:
            if self._due_at <= due_at:
                return
            self._due.cancel()
        self._due_at = due_at
        wait_s = max(0.0, due_at - self._clock())
        self._due = self._loop.call_later(wait_s, self._timeout)

    def _timeout(self) -> None:
        self._due = None
        self.holdings.handle_timeout(self._clock())
        self.keeper.obey()
        self._schedule()

    def _gpu_told(self, uuid: str, event: gpu_health.Event) -> None:
        """In a thread."""
        self._loop.call_soon_threadsafe(self._gpu_seen, uuid, event)

    def _gpu_seen(self, uuid: str, event: gpu_health.Event) -> None:
        before = self.holdings.news.sequence
        self.holdings.gpu_seen(uuid, event, self._clock())
        for item in self.holdings.news.since(before)[0]:
            if item.device:
                _log.warning("news of a GPU", gpu=uuid, what=item.kind.name, value=item.value)
        self.keeper.obey()
        self._schedule()

    async def _look_after(self) -> None:
        """Seal what could not be sealed, and find a new vault when the old one is gone."""
        while True:
            await asyncio.sleep(SEAL_RETRY_S if self.keeper.unsealed else 10 * SEAL_RETRY_S)
            if self.keeper.unsealed:
                self.keeper.seal_left()
                self.keeper.obey()
            vault = self.keeper.vault
            if vault is not None and _is_gone(vault):
                await self._renew_vault(vault)

    async def _renew_vault(self, lost: VaultLink) -> None:
        _log.error("vault lost; everything goes to a new one")
        lost.close()
        try:
            vault = await asyncio.to_thread(self._open_vault)
            # It is new and has nothing; or it only stalled, and has all, and more than all.
            found = await asyncio.to_thread(vault.list)
        except (OSError, ChannelClosed) as error:
            _log.error("no vault", detail=str(error))
            await asyncio.sleep(VAULT_RETRY_S)
            return
        self.keeper.use_vault(vault, found)


def _is_gone(vault: VaultLink) -> bool:
    if vault.is_lost:
        return True
    poller = select.poll()
    poller.register(vault, select.POLLIN)
    return bool(poller.poll(0))  # It never says anything unasked.


def _slabs_max() -> int:
    """So many that descriptors are left for processes: two for each session, and connections."""
    files_max, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (files_max - min(FDS_RESERVED, files_max // 2)) // 2


def _secret(path: Path) -> bytes:
    """The key in a file, which is made once. Raises OSError."""
    new = path.with_suffix(f".{os.getpid()}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(secrets.token_bytes(KEY_BYTES))
    with contextlib.suppress(FileExistsError):
        path.hardlink_to(new)
    new.unlink()
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise OSError(f"expected {KEY_BYTES} bytes in {path}, got {len(key)}")
    return key


async def _locked(path: Path) -> int:
    """A lock that ends with this process. Raises OSError if another one keeps it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if loop.time() > give_up_at:
                os.close(fd)
                raise OSError(f"expected to be the only memory service of {path.parent}") from None
            await asyncio.sleep(0.002)
        else:
            return fd


async def serve(config: MemoryConfig, driver: Driver = CUDA) -> int:
    """Run a memory service until SIGTERM or SIGINT. Raises OSError if it cannot start."""
    stop_wanted = asyncio.Event()
    heed(lambda _: stop_wanted.set())
    service = MemoryService(config, driver=driver)
    try:
        await service.start()
        tasks: list[asyncio.Task[object]] = [
            asyncio.create_task(service.wait(), name="service"),
            asyncio.create_task(stop_wanted.wait(), name="signal"),
        ]
        async with watched_loop():
            done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for task in done:
            task.result()
    finally:
        await service.stop()
    heed_no_more()
    return 0
