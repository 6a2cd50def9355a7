"""Compares stored bytes with their checksums: all the time and slowly, or all when asked."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from memory_service.holdings import Holdings
from memory_service.keeper import Keeper
from memory_service.segments import State, Version
from memory_service.store import Block
from unbroken import log
from unbroken.memory import checksums

IDLE_S = 1.0
"""Between two rounds, and when there is nothing to compare."""

_log = log.get_logger(__name__)


@dataclass(slots=True)
class Result:
    """What one round found."""

    num_intact: int = 0
    num_corrupt: int = 0
    num_bytes: int = 0


class Scrubber:
    """Reads in a thread, one block or slab at a time."""

    def __init__(
        self,
        holdings: Holdings,
        keeper: Keeper,
        *,
        bytes_per_s: int,
        count: Callable[[int], None],
    ) -> None:
        self._holdings = holdings
        self._keeper = keeper
        self._bytes_per_s = bytes_per_s
        self._count = count

    async def run(self) -> None:
        """Until cancelled."""
        while self._bytes_per_s:
            await self.verify("", bytes_per_s=self._bytes_per_s)
            await asyncio.sleep(IDLE_S)

    async def verify(self, tenant: str, *, bytes_per_s: int = 0) -> Result:
        """One round over everything that is committed or sealed; 0: as fast as can be."""
        result = Result()
        for block in self._holdings.store.blocks():
            is_readable = self._keeper.is_readable(block.slab.device)
            if tenant in ("", block.slab.tenant) and is_readable:
                await self._block(block, result)
                await self._pause(block.slab.block_bytes, bytes_per_s)
        for version in list(self._holdings.segments):
            is_readable = self._keeper.is_readable(version.device) and version.state is State.SEALED
            if tenant in ("", version.tenant) and is_readable:
                await self._version(version, result, bytes_per_s)
        return result

    async def _block(self, block: Block, result: Result) -> None:
        slab = block.slab
        if slab.blocks.get(block.slot) is not block:
            return  # Evicted meanwhile.
        view = self._keeper.block_view(block)
        seen = await asyncio.to_thread(checksums.compute, view, block.algorithm)
        if slab.blocks.get(block.slot) is not block:
            return
        self._add(result, slab.block_bytes, is_intact=seen == block.checksum)
        if seen != block.checksum:
            _log.error("block corrupt", slab=slab.slab_id, slot=block.slot, where="scrubber")
            self._holdings.block_corrupt(slab.slab_id, block.slot, block.generation)
            self._keeper.obey()

    async def _version(self, version: Version, result: Result, bytes_per_s: int) -> None:
        for slab_id, expected in zip(version.slab_ids, version.checksums, strict=True):
            if version not in list(self._holdings.segments):
                return  # Freed meanwhile.
            view = self._keeper.slab_view(slab_id)
            seen = await asyncio.to_thread(checksums.compute, view, version.algorithm)
            self._add(result, len(view), is_intact=seen == expected)
            if seen != expected and version in list(self._holdings.segments):
                _log.error("segment corrupt", segment=version.name, where="scrubber")
                self._holdings.segment_corrupt(version)
                self._keeper.obey()
                return
            await self._pause(len(view), bytes_per_s)

    def _add(self, result: Result, num_bytes: int, *, is_intact: bool) -> None:
        result.num_bytes += num_bytes
        result.num_intact += is_intact
        result.num_corrupt += not is_intact
        self._count(num_bytes)

    async def _pause(self, num_bytes: int, bytes_per_s: int) -> None:
        await asyncio.sleep(num_bytes / bytes_per_s if bytes_per_s else 0)
