"""MemoryService over gRPC: what operators, routers and other hosts ask."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc.aio
from typing_extensions import override

from memory_service import accounts, labels
from memory_service.accounts import HOST
from memory_service.holdings import PIN_S_MAX, Holdings
from memory_service.keeper import Keeper
from memory_service.metrics import quarantined
from memory_service.readers import Readers
from memory_service.scrubber import Scrubber
from memory_service.session_channel import KEYS_MAX
from memory_service.tickets import Tickets
from unbroken import log
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.memory import checksums, keys
from unbroken.memory.keys import KEY_BYTES
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_pb2_grpc

PART_BYTES: Final = 2 * 1024 * 1024
"""Of a block in one message."""
WATCH_INTERVAL_S: Final = 0.02
"""Between two looks for events."""
WATCHERS_MAX: Final = 64
VERIFIERS_MAX: Final = 2
"""Each reads all that there is, in a thread."""

_Context = grpc.aio.ServicerContext[Any, Any]

_log = log.get_logger(__name__)


class Control(memory_pb2_grpc.MemoryServiceServicer):
    """Answers on the event loop; bytes are compared in threads.

    Where other hosts reach it, it has `tickets`: it reads blocks for who has one, and that is all.
    """

    def __init__(
        self,
        holdings: Holdings,
        keeper: Keeper,
        scrubber: Scrubber,
        *,
        on_change: Callable[[], None],
        tickets: Tickets | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._holdings = holdings
        self._keeper = keeper
        self._scrubber = scrubber
        self._on_change = on_change
        self._clock = clock
        self._tickets = tickets
        self._started_at = clock()
        self._num_watchers = 0
        self._readers = Readers()
        self._num_verifying = 0

    @override
    async def GetUsage(self, request: pb.GetUsageRequest, context: _Context) -> pb.GetUsageResponse:
        self._check(request.boot_token)
        holdings = self._holdings
        host = holdings.ledger.accounts[HOST]
        return pb.GetUsageResponse(
            boot_token=holdings.boot_token,
            capacity_bytes=host.limits.capacity_bytes,
            used_bytes=host.total,
            quarantined_bytes=quarantined(holdings),
            tenants=[
                pb.TenantUsage(
                    tenant=tenant,
                    used_bytes=used,
                    quota_bytes=accounts.limits.quota_of(tenant),
                    memory_kind=labels.kind_to_proto(device),
                    device=device.uuid,
                    unreclaimed_bytes=accounts.unreclaimed.get(tenant, 0),
                )
                for device, accounts in holdings.ledger.accounts.items()
                for tenant, used in sorted(accounts.used.items())
            ],
            memories=[
                pb.MemoryUsage(
                    memory_kind=labels.kind_to_proto(device),
                    device=device.uuid,
                    capacity_bytes=accounts.limits.capacity_bytes,
                    used_bytes=accounts.total,
                    unreclaimed_bytes=accounts.total_unreclaimed,
                    page_bytes=device.page_bytes,
                    health=labels.health_to_proto(holdings.health_of(device)),
                )
                for device, accounts in holdings.ledger.accounts.items()
            ],
            num_blocks=holdings.store.num_blocks,
            num_pinned=holdings.store.num_pinned,
            has_vault=self._keeper.vault is not None and not self._keeper.vault.is_lost,
            event_sequence=holdings.news.sequence,
            num_slabs=holdings.ledger.num_slabs,
            slabs_max=holdings.ledger.slabs_max,
        )

    @override
    async def ListSegments(
        self, request: pb.ListSegmentsRequest, context: _Context
    ) -> pb.ListSegmentsResponse:
        self._check(request.boot_token)
        holdings = self._holdings
        found = [labels.version_to_proto(holdings, version) for version in holdings.segments]
        found += [labels.store_to_proto(slab) for slab in holdings.store]
        return pb.ListSegmentsResponse(
            segments=[segment for segment in found if request.tenant in ("", segment.tenant)]
        )

    @override
    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: _Context
    ) -> pb.ListSessionsResponse:
        self._check(request.boot_token)
        return pb.ListSessionsResponse(
            sessions=[labels.session_to_proto(session) for session in self._holdings.sessions]
        )

    @override
    async def LookupBlocks(
        self, request: pb.LookupBlocksRequest, context: _Context
    ) -> pb.LookupBlocksResponse:
        self._check_reader(request)
        device = accounts.asked_for(request.memory_kind, request.device)
        found = self._holdings.store.find(request.tenant, _keys(request.keys), device)
        return pb.LookupBlocksResponse(num_blocks=len(found))

    @override
    async def ReadBlocks(
        self, request: pb.ReadBlocksRequest, context: _Context
    ) -> AsyncIterator[pb.ReadBlocksResponse]:
        self._check_reader(request)
        self._readers.begin(request.tenant)
        try:
            for index, key in enumerate(_keys(request.keys)):
                # A pin for each: a slow reader holds up the slot of one block at most.
                store = self._holdings.store
                pin = store.pin(0, store.find(request.tenant, [key]), self._clock() + PIN_S_MAX)
                if pin is None:
                    yield _end(index, pb.READ_END_MISSING)
                    return
                try:
                    (block,) = pin.blocks
                    if not self._keeper.is_readable(block.slab.device):
                        yield _end(index, pb.READ_END_OUT_OF_REACH)
                        return
                    view = self._keeper.block_view(block)
                    # A copy: what was checked is what is sent, even if the pin's time is over.
                    data = await asyncio.to_thread(bytes, view)
                    seen = await asyncio.to_thread(checksums.compute, data, block.algorithm)
                    if seen != block.checksum:
                        self._corrupt(block.slab.slab_id, block.slot, block.generation)
                        yield _end(index, pb.READ_END_CORRUPT)
                        return
                finally:
                    self._holdings.store.unpin(0, pin.pin_id)
                for offset in range(0, len(data), PART_BYTES):
                    part = pb.ReadBlocksResponse(
                        index=index, offset=offset, data=data[offset : offset + PART_BYTES]
                    )
                    if offset + PART_BYTES >= len(data):
                        part.size_bytes = len(data)
                        part.checksum = block.checksum
                        part.num_tokens = block.num_tokens
                        part.checksum_algorithm = labels.algorithm_to_proto(block.algorithm)
                    yield part
            yield _end(len(request.keys) // KEY_BYTES, pb.READ_END_COMPLETE)
        finally:
            self._readers.end(request.tenant)

    @override
    async def Verify(self, request: pb.VerifyRequest, context: _Context) -> pb.VerifyResponse:
        self._check(request.boot_token)
        if self._num_verifying >= VERIFIERS_MAX:
            raise UnbrokenError(
                Reason.OVERLOADED,
                f"expected at most {VERIFIERS_MAX} verifications at once",
                retry_after_s=5.0,
            )
        self._num_verifying += 1
        try:
            result = await self._scrubber.verify(request.tenant)
        finally:
            self._num_verifying -= 1
        return pb.VerifyResponse(
            num_intact=result.num_intact,
            num_corrupt=result.num_corrupt,
            num_bytes=result.num_bytes,
        )

    @override
    async def Evict(self, request: pb.EvictRequest, context: _Context) -> pb.EvictResponse:
        self._check(request.boot_token)
        freed = self._holdings.evict(request.tenant, request.segment)
        self._keeper.obey()
        self._on_change()
        return pb.EvictResponse(freed_bytes=freed)

    @override
    async def Watch(
        self, request: pb.WatchRequest, context: _Context
    ) -> AsyncIterator[pb.WatchResponse]:
        self._check(0)  # It says itself if the life is another.
        holdings, news = self._holdings, self._holdings.news
        if self._num_watchers >= WATCHERS_MAX:
            raise UnbrokenError(
                Reason.OVERLOADED, f"expected at most {WATCHERS_MAX} watchers", retry_after_s=1.0
            )
        self._num_watchers += 1
        try:
            is_known = request.boot_token == holdings.boot_token
            sequence = request.sequence if is_known else news.sequence
            has_gap = bool(request.boot_token) and not is_known
            first = pb.WatchResponse(
                boot_token=holdings.boot_token, has_gap=has_gap, sequence=news.sequence
            )
            first.uptime.FromMilliseconds(round((self._clock() - self._started_at) * 1000))
            is_first = True
            while True:
                items, is_missing = news.since(sequence)
                if items or is_first:
                    response = (
                        first
                        if is_first
                        else pb.WatchResponse(
                            boot_token=holdings.boot_token, sequence=news.sequence
                        )
                    )
                    response.has_gap |= is_missing
                    response.events.extend(
                        pb.MemoryEvent(
                            sequence=item.sequence,
                            kind=pb.MemoryEventKind.ValueType(int(item.kind)),
                            tenant=item.tenant,
                            session_id=item.session,
                            segment=item.segment,
                            epoch=item.epoch,
                            slab_id=item.slab_id,
                            value=item.value,
                            device=item.device,
                        )
                        for item in items
                    )
                    sequence = items[-1].sequence if items else sequence
                    is_first = False
                    yield response
                else:
                    await asyncio.sleep(WATCH_INTERVAL_S)
        finally:
            self._num_watchers -= 1

    def _check(self, boot_token: int) -> None:
        """Raise unless this is for the owner of the service, in this life of it."""
        if self._tickets is not None:
            raise UnbrokenError(
                Reason.NOT_PERMITTED, "expected this call on the service's own socket"
            )
        self._check_boot(boot_token)

    def _check_reader(self, request: pb.LookupBlocksRequest | pb.ReadBlocksRequest) -> None:
        """Raise unless the caller may read this tenant's blocks."""
        if self._tickets is not None:
            self._tickets.check(request.ticket, request.tenant, time.time())
        self._check_boot(request.boot_token)

    def _check_boot(self, boot_token: int) -> None:
        if boot_token:
            self._holdings.check_boot(boot_token)

    def _corrupt(self, slab_id: int, slot: int, generation: int) -> None:
        _log.error("block corrupt", slab=slab_id, slot=slot, where="read")
        self._holdings.block_corrupt(slab_id, slot, generation)
        self._keeper.obey()


def _end(num_blocks: int, end: pb.ReadEnd.ValueType) -> pb.ReadBlocksResponse:
    return pb.ReadBlocksResponse(index=num_blocks, end=end)


def _keys(data: bytes) -> list[bytes]:
    try:
        split = keys.split(data)
    except ValueError as error:
        raise InvalidField("keys", f"{error}", len(data)) from error
    if len(split) > KEYS_MAX:
        raise InvalidField("keys", f"at most {KEYS_MAX}", len(split))
    return split
