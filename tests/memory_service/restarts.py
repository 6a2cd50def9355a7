"""Kills the service, its vault, or both, while processes use memory, and judges what is left."""

import json
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime

from tests.memory_service.processes import START_S_MAX, ServiceProcess, until
from tests.memory_service.victim import BLOCK_BYTES, bytes_of, key_of
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory.client import BlockWriter, MemoryClient, SegmentClass

MID_WORK = 200
"""Blocks that are written while the service is killed and comes back."""


@dataclass(slots=True)
class Outage:
    """What one loss of the service looked like to the processes that use it."""

    bound_after_start_s: float
    """From the start of the new service, its interpreter aside, until a client had an answer."""
    bound_after_kill_s: float
    """From the death of the old one."""
    num_blocks: int
    """Blocks that were there before; all of them after it."""
    violations: list[str] = field(default_factory=list[str])


class Users:
    """A writer that goes on all the time, a reader, weights and a pool."""

    def __init__(self, service: ServiceProcess) -> None:
        self.service = service
        self.writing = service.client(client="writer", rebind_timeout_s=START_S_MAX)
        self.reading = service.client(client="reader", rebind_timeout_s=START_S_MAX)
        self.writer = self.writing.open_writer(BLOCK_BYTES, 8192)
        self.weights = self.writing.create("weights", SegmentClass.WEIGHTS, [4096])
        self.weights.slabs[0][:] = bytes_of(key_of(0, 0))
        self.writing.seal(self.weights)
        self.pool = self.writing.create("pool", SegmentClass.KV_POOL, [4096])
        self.writing.freeze(self.pool)
        self.epoch = self.pool.epoch
        self.num_told = 0
        self._goal = 0
        self.errors: list[BaseException] = []
        self._is_over = threading.Event()
        self._has_goal = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        """Blocks, one after the other; each is told of before the next, and counted then."""
        try:
            while self._has_goal.wait() and not self._is_over.is_set():
                put_one(self.writer, self.num_told)
                self.num_told += 1
                if self.num_told >= self._goal:
                    self._has_goal.clear()
                    if self.num_told < self._goal:  # It came in between.
                        self._has_goal.set()
        except BaseException as error:  # Judged by the test.
            self.errors.append(error)

    def stop(self) -> None:
        self._is_over.set()
        self._has_goal.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.stop()
        self.writing.close()
        self.reading.close()

    def until_written(self, number: int) -> None:
        """So many more blocks."""
        goal = self._go_on(number)
        until(lambda: self.num_told >= goal or bool(self.errors), "blocks are written", START_S_MAX)

    def _go_on(self, number: int) -> int:
        self._goal = goal = self.num_told + number
        self._has_goal.set()
        return goal

    def lose_service(self, *, with_vault: bool = False) -> Outage:
        """Kill it in mid-work, start another, and see how long that takes and what is there."""
        self._go_on(MID_WORK)
        before = self.num_told
        killed_at = time.time()
        if with_vault:
            self.service.kill_vault()
        self.service.kill()
        self.service.spawn()
        self.reading.find([bytes(32)])  # Comes back with the new service's answer.
        answered_at = time.time()
        until(self.service.serves, "the service serves", START_S_MAX)
        started_at = started(self.service)
        outage = Outage(answered_at - started_at, answered_at - killed_at, before)
        if not with_vault:
            self.until_written(1)  # So it is bound, too.
            missing = sum(not self._is_intact(number) for number in range(before))
            if missing:
                outage.violations.append(f"{missing} of {before} committed blocks are lost")
            if self.reading.attach("weights").slabs[0][:] != bytes_of(key_of(0, 0)):
                outage.violations.append("weights have other bytes")
        outage.violations += [repr(error) for error in self.errors]
        return outage

    def _is_intact(self, number: int) -> bool:
        key = key_of(1, number)
        with self.reading.get([key]) as blocks:
            return len(blocks) == 1 and bytes(blocks[0].data) == bytes_of(key)


def put_one(writer: BlockWriter, number: int) -> None:
    key = key_of(1, number)
    if not writer.put(key, bytes_of(key), 16):
        raise UnbrokenError(Reason.STALE_HANDLE, "the slab is lost")
    writer.flush()


def started(service: ServiceProcess) -> float:
    """When the latest life of a service began, by its own word."""
    lines = (service.directory / "service.log").read_text().splitlines()
    for line in reversed(lines):
        entry = json.loads(line)
        if entry.get("event") == "configuration":
            return datetime.fromisoformat(entry["time"]).timestamp()
    raise AssertionError("it never began")


def owns(client: MemoryClient, name: str, epoch: int) -> bool:
    """Whether a client may still act as the owner of a segment."""
    try:
        return client.adopt(name, epoch).epoch == epoch
    except UnbrokenError:
        return False
