"""Claims of `memory_service.readers`, and of what the service does about them."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from memory_service.accounts import HOST, Limits
from memory_service.control import Control
from memory_service.holdings import Holdings, Policy
from memory_service.keeper import Keeper
from memory_service.memfd import MemfdBackend
from memory_service.readers import READERS_MAX, SHARED_MAX, TENANT_MAX, Readers
from memory_service.scrubber import Scrubber
from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import memory_pb2 as pb


def refused(readers: Readers, tenant: str) -> bool:
    try:
        readers.begin(tenant)
    except UnbrokenError as error:
        return error.reason is Reason.OVERLOADED and bool(error.retry_after_s)
    return False


def test_no_tenant_reads_more_than_its_share() -> None:
    readers = Readers()
    assert sum(not refused(readers, "greedy") for _ in range(SHARED_MAX)) == TENANT_MAX
    readers.end("greedy")
    assert not refused(readers, "greedy")


def test_a_first_reader_finds_room_whatever_others_read() -> None:
    readers = Readers()
    for tenant in ("a", "b"):
        for _ in range(TENANT_MAX):
            readers.begin(tenant)
    assert not refused(readers, "c")
    assert refused(readers, "c"), "a second one has to wait"
    readers.end("a")
    assert refused(readers, "a"), "as long as there are more than all share"
    readers.end("c")
    assert not refused(readers, "c")


def test_there_is_an_end_to_readers() -> None:
    readers = Readers()
    assert sum(not refused(readers, str(number)) for number in range(100)) == READERS_MAX


def test_one_that_did_not_begin_does_not_end() -> None:
    with pytest.raises(KeyError):
        Readers().end("a")


def test_the_service_counts_the_readers_of_each_tenant() -> None:
    async def scenario() -> None:
        holdings = Holdings(Policy(Limits(1 << 20, 1 << 20)), 1)
        keeper = Keeper(holdings, {HOST: MemfdBackend()}, on_forget=lambda _: None)
        scrubber = Scrubber(holdings, keeper, bytes_per_s=0, count=lambda _: None)
        control = Control(holdings, keeper, scrubber, on_change=lambda: None)

        async def begun(tenant: str) -> AsyncGenerator[pb.ReadBlocksResponse]:
            """A call that has had its first answer, and waits for its reader."""
            request = pb.ReadBlocksRequest(tenant=tenant, keys=bytes(32))
            call = cast(
                "AsyncGenerator[pb.ReadBlocksResponse]",
                control.ReadBlocks(request, cast("Any", None)),
            )
            assert (await anext(call)).end == pb.READ_END_MISSING
            return call

        calls = [await begun("greedy") for _ in range(TENANT_MAX)]
        with pytest.raises(UnbrokenError) as raised:
            await begun("greedy")
        assert raised.value.reason is Reason.OVERLOADED
        calls.append(await begun("other"))
        await calls.pop(0).aclose()
        calls.append(await begun("greedy"))
        for call in calls:
            await call.aclose()
        keeper.close()

    asyncio.run(scenario())
