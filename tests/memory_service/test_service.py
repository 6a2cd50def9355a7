"""Real processes share memory, and lose each other (docs/decisions/memory-contract.md)."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
import pytest
import uvloop

from tests.memory_service.processes import ServiceProcess, Victims, serving, until
from tests.memory_service.victim import BLOCK_BYTES, bytes_of, key_of
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory import channel, checksums
from unbroken.memory.client import BlockWriter, MemoryClient, SegmentClass
from unbroken.status import from_rpc_error
from unbroken.transport import open_channel
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_pb2_grpc
from unbroken.v1 import memory_session_pb2 as wire

ResultT = TypeVar("ResultT")
AS_NOBODY = """
import os, pathlib, sys
from unbroken.errors import UnbrokenError
from unbroken.memory.client import MemoryClient
os.setgid(65534)
os.setuid(65534)
try:
    MemoryClient(pathlib.Path(sys.argv[1]), tenant=sys.argv[2], rebind_timeout_s=0.1)
    print("bound")
except UnbrokenError as error:
    print(error.reason.value)
"""
STOPPED = """
import os, pathlib, signal, sys
from unbroken.memory.client import MemoryClient, SegmentClass
client = MemoryClient(pathlib.Path(sys.argv[1]))
client.freeze(client.create("stopped", SegmentClass.KV_POOL, [4096]))
os.kill(os.getpid(), signal.SIGSTOP)
"""
Stub = memory_pb2_grpc.MemoryServiceStub


def asked(
    service: ServiceProcess,
    ask: Callable[[Stub], Coroutine[Any, Any, ResultT]],
    address: str = "",
) -> ResultT:
    """What the control side answers, or who listens for other hosts."""

    async def scenario() -> ResultT:
        async with open_channel(address or service.control) as grpc_channel, asyncio.timeout(10):
            return await ask(memory_pb2_grpc.MemoryServiceStub(grpc_channel))

    return uvloop.run(scenario())


def usage(service: ServiceProcess) -> pb.GetUsageResponse:
    async def ask(stub: Stub) -> pb.GetUsageResponse:
        return await stub.GetUsage(pb.GetUsageRequest())

    return asked(service, ask)


def keys_of(seed: int, number: int) -> list[bytes]:
    return [key_of(seed, i) for i in range(number)]


def put(writer: BlockWriter, seed: int, number: int) -> None:
    for key in keys_of(seed, number):
        assert writer.put(key, bytes_of(key), 16)
    writer.flush()


def expect_blocks(client: MemoryClient, seed: int, number: int) -> None:
    keys = keys_of(seed, number)
    with client.get(keys) as blocks:
        assert len(blocks) == number
        for block, key in zip(blocks, keys, strict=True):
            assert block.data == bytes_of(key)
        assert blocks.is_valid


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Generator[ServiceProcess]:
    flags = ("--scrub-bytes-per-s", "0", "--listen", "127.0.0.1:0")
    with serving(tmp_path_factory.mktemp("memory"), *flags) as service:
        yield service


def test_blocks_of_one_process_are_read_by_another_where_they_lie(service: ServiceProcess) -> None:
    with service.client() as writing, service.client() as reading:
        put(writing.open_writer(BLOCK_BYTES, 4), 1, 3)
        assert reading.find(keys_of(1, 4)) == 3
        expect_blocks(reading, 1, 3)
        expect_blocks(writing, 1, 3)
    with service.client() as later:
        expect_blocks(later, 1, 3)


def test_tenants_do_not_reach_each_others_memory(service: ServiceProcess) -> None:
    with service.client(tenant="a") as mine, service.client(tenant="b") as other:
        put(mine.open_writer(BLOCK_BYTES, 1), 2, 1)
        assert other.find(keys_of(2, 1)) == 0
        assert len(other.get(keys_of(2, 1))) == 0
        segment = mine.create("w", SegmentClass.WEIGHTS, [4096])
        mine.seal(segment)
        with pytest.raises(UnbrokenError) as raised:
            other.attach("w")
        assert raised.value.reason is Reason.SEGMENT_NOT_FOUND


def test_blocks_of_a_writer_that_was_closed_are_read_by_its_own_process_too(
    service: ServiceProcess,
) -> None:
    with service.client() as client:
        writer = client.open_writer(BLOCK_BYTES, 2)
        put(writer, 13, 2)
        expect_blocks(client, 13, 2)
        writer.close()
        expect_blocks(client, 13, 2)


def test_a_full_slab_makes_room_but_never_of_what_is_read(service: ServiceProcess) -> None:
    with service.client() as writing, service.client() as reading:
        writer = writing.open_writer(BLOCK_BYTES, 2)
        put(writer, 3, 2)
        with reading.get(keys_of(3, 1)) as blocks:
            assert writer.put(key_of(3, 7), bytes_of(key_of(3, 7)), 16)
            assert writer.put(key_of(3, 8), bytes_of(key_of(3, 8)), 16)
            assert blocks[0].data == bytes_of(key_of(3, 0))
        writer.flush()
        assert reading.find([key_of(3, 1)]) == 0, "it made room"
        assert reading.find([key_of(3, 7)]) == 0, "and so did this"
        assert reading.find([key_of(3, 8)]) == 1


def test_weights_are_read_only_for_everybody_once_they_are_sealed(service: ServiceProcess) -> None:
    with service.client() as writing, service.client() as reading:
        segment = writing.create("weights", SegmentClass.WEIGHTS, [8192, 4096])
        segment.slabs[0][:4] = b"abcd"
        writing.seal(segment, b"layout")
        first = reading.attach("weights")
        assert (first.layout, first.slabs[0][:4]) == (b"layout", b"abcd")
        with pytest.raises(TypeError):
            first.slabs[0][:1] = b"x"
        newer = writing.create("weights", SegmentClass.WEIGHTS, [4096])
        newer.slabs[0][:4] = b"efgh"
        assert reading.attach("weights").version == first.version, "not sealed yet"
        writing.seal(newer)
        assert reading.attach("weights").slabs[0][:4] == b"efgh"
        assert first.slabs[0][:4] == b"abcd", "who has it keeps it"
        reading.release(first)


def test_weights_that_are_still_mapped_for_writing_are_not_sealed(service: ServiceProcess) -> None:
    with service.client() as writing:
        segment = writing.create("mapped", SegmentClass.WEIGHTS, [4096])
        seal = wire.SealSegment(
            name="mapped", epoch=segment.epoch, checksums=[checksums.compute(bytes(4096))]
        )
        with pytest.raises(UnbrokenError) as raised:
            writing.call(wire.SessionRequest(seal=seal))
        assert raised.value.reason is Reason.SEGMENT_BUSY
        segment.unmap()
        seal.checksums[0] ^= 1
        with pytest.raises(UnbrokenError) as raised:
            writing.call(wire.SessionRequest(seal=seal))
        assert raised.value.reason is Reason.CHECKSUM_MISMATCH
        seal.checksums[0] ^= 1
        writing.call(wire.SessionRequest(seal=seal))
        writing.call(wire.SessionRequest(seal=seal))  # Its answer might have been lost.


def test_a_pool_goes_to_a_successor_when_its_owner_is_dead(service: ServiceProcess) -> None:
    victims = Victims(service)
    try:
        said = victims.run("adopt", seed=0, after_s=0.0)["said"]
        with service.client() as heir:
            standby = heir.attach("pool")  # Whatever its state: nothing is done on the way.
            pool = heir.adopt("pool")
            assert pool.epoch > said[2][2]
            assert pool.slabs[0][4096 + 2048 : 4096 + 2056] == (3).to_bytes(8, "little")
            assert standby.slabs[0][4096:] == pool.slabs[0][4096:]
            heir.release(pool)
    finally:
        victims.close()


def test_a_stopped_owner_is_not_succeeded_until_it_is_dead(service: ServiceProcess) -> None:
    heir = service.client()
    with subprocess.Popen([sys.executable, "-c", STOPPED, str(service.socket)]) as owner:
        try:
            stat = Path(f"/proc/{owner.pid}/stat")
            until(lambda: "T" in stat.read_text().split(")")[1][:3], "it is stopped")
            with pytest.raises(UnbrokenError) as raised:
                heir.adopt("stopped", timeout_s=0.05)
            assert raised.value.reason is Reason.NOT_FENCED
        finally:
            owner.kill()
    pool = heir.adopt("stopped", timeout_s=5)
    heir.release(pool)
    heir.close()


def test_who_closes_in_order_leaves_blocks_and_takes_its_pools_along(
    service: ServiceProcess,
) -> None:
    with service.client(tenant="closes") as closing:
        pool = closing.create("pool", SegmentClass.KV_POOL, [4096])
        closing.freeze(pool)
        put(closing.open_writer(BLOCK_BYTES, 1), 11, 1)
    with service.client(tenant="closes") as later:
        assert later.find(keys_of(11, 1)) == 1
        with pytest.raises(UnbrokenError) as raised:
            later.adopt("pool", timeout_s=1)
        assert raised.value.reason is Reason.SEGMENT_NOT_FOUND


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_reaches_nothing_unless_it_is_granted() -> None:
    def as_nobody(service: ServiceProcess, tenant: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(service.socket), tenant],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        ).stdout.strip()

    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        private, shared = Path(directory) / "private", Path(directory) / "shared"
        for one in (private, shared):
            one.mkdir()
        with serving(private) as service:
            assert as_nobody(service, "a") == "UNREACHABLE"
        with serving(shared, "--grants", "65534=a") as service:
            assert as_nobody(service, "b") == "NOT_PERMITTED"
            assert as_nobody(service, "a") == "bound"


def test_a_reader_lets_go_of_slabs_that_are_evicted(service: ServiceProcess) -> None:
    def num_mapped() -> int:
        return Path("/proc/self/maps").read_text().count("/memfd:unbroken-")

    async def evict(stub: Stub) -> int:
        return (await stub.Evict(pb.EvictRequest(tenant="evicts"))).freed_bytes

    with service.client(tenant="evicts") as reading:
        with service.client(tenant="evicts") as leaving:
            put(leaving.open_writer(BLOCK_BYTES, 2), 12, 2)
        before = num_mapped()
        expect_blocks(reading, 12, 2)
        assert num_mapped() == before + 1
        assert asked(service, evict) > 0
        with reading.get(keys_of(12, 2)) as blocks:
            assert len(blocks) == 0
        assert num_mapped() == before


def test_bits_that_flip_are_misses_and_never_served(service: ServiceProcess) -> None:
    with service.client() as writing, service.client() as reading:
        writer = writing.open_writer(BLOCK_BYTES, 4)
        put(writer, 5, 3)
        before = usage(service).num_blocks
        view = writer.as_reader().mapping
        view[BLOCK_BYTES + 17] ^= 1  # Of the second block.
        with reading.get(keys_of(5, 3)) as blocks:
            assert len(blocks) == 1
        assert usage(service).num_blocks == before - 1
        assert reading.find(keys_of(5, 3)) == 1


def test_a_record_that_is_not_valid_is_no_block(service: ServiceProcess) -> None:
    with service.client() as writing, service.client() as reading:
        writer = writing.open_writer(BLOCK_BYTES, 2)
        key = key_of(6, 0)
        writer.put(key, bytes_of(key), 16)
        table = writer._table  # pyright: ignore[reportPrivateUsage]
        table[20] ^= 1
        writer.flush()
        assert reading.find([key]) == 0


def test_the_whole_store_is_verified_when_asked(service: ServiceProcess) -> None:
    async def verify(stub: Stub) -> pb.VerifyResponse:
        return await stub.Verify(pb.VerifyRequest(tenant="verify"))

    with service.client(tenant="verify") as writing:
        writer = writing.open_writer(BLOCK_BYTES, 4)
        put(writer, 8, 4)
        writer.as_reader().mapping[3] ^= 128
        result = asked(service, verify)
        assert (result.num_intact, result.num_corrupt) == (3, 1)
        result = asked(service, verify)
        assert (result.num_intact, result.num_corrupt) == (3, 0), "dropped"


def test_blocks_are_read_over_grpc_up_to_the_first_that_is_missing(
    service: ServiceProcess,
) -> None:
    async def read(stub: Stub) -> list[pb.ReadBlocksResponse]:
        request = pb.ReadBlocksRequest(tenant="remote", keys=b"".join(keys_of(9, 4)))
        return [part async for part in stub.ReadBlocks(request)]

    with service.client(tenant="remote") as writing:
        put(writing.open_writer(BLOCK_BYTES, 4), 9, 3)
        parts = asked(service, read)
    last = parts.pop()
    assert (last.index, last.end) == (3, pb.READ_END_MISSING)
    assert [part.index for part in parts] == [0, 1, 2]
    for part, key in zip(parts, keys_of(9, 3), strict=True):
        assert part.data == bytes_of(key)
        assert part.checksum == checksums.compute(part.data)
        assert part.checksum_algorithm == pb.CHECKSUM_ALGORITHM_XXH3
        assert (part.size_bytes, part.num_tokens) == (BLOCK_BYTES, 16)


def remote_address(service: ServiceProcess) -> str:
    for line in (service.directory / "service.log").read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] == "memory service serves":
            return entry["address"]
    raise AssertionError("it does not serve")


def refusal(service: ServiceProcess, call: Callable[[Stub], Any]) -> Reason | None:
    """Why another host is refused."""

    async def ask(stub: Stub) -> None:
        found = call(stub)
        if hasattr(found, "__aiter__"):
            _ = [part async for part in found]
        else:
            await found

    try:
        asked(service, ask, remote_address(service))
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason
    return None


def test_another_host_reads_blocks_with_a_ticket_of_their_tenant(service: ServiceProcess) -> None:
    with service.client(tenant="r") as writing, service.client(tenant="other") as other:
        put(writing.open_writer(BLOCK_BYTES, 1), 14, 1)
        keys = b"".join(keys_of(14, 1))
        for ticket, expected in (
            (writing.grant_reads(60.0), None),
            (other.grant_reads(60.0), Reason.NOT_PERMITTED),
            (b"", Reason.NOT_PERMITTED),
        ):
            read = pb.ReadBlocksRequest(tenant="r", keys=keys, ticket=ticket)
            look = pb.LookupBlocksRequest(tenant="r", keys=keys, ticket=ticket)
            assert refusal(service, lambda stub, read=read: stub.ReadBlocks(read)) is expected
            assert refusal(service, lambda stub, look=look: stub.LookupBlocks(look)) is expected


CALLS: dict[str, Callable[[Stub], Any]] = {
    "GetUsage": lambda stub: stub.GetUsage(pb.GetUsageRequest()),
    "ListSegments": lambda stub: stub.ListSegments(pb.ListSegmentsRequest()),
    "ListSessions": lambda stub: stub.ListSessions(pb.ListSessionsRequest()),
    "Verify": lambda stub: stub.Verify(pb.VerifyRequest()),
    "Evict": lambda stub: stub.Evict(pb.EvictRequest()),
    "Watch": lambda stub: stub.Watch(pb.WatchRequest()),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_another_host_does_nothing_else(
    service: ServiceProcess, call: Callable[[Stub], Any]
) -> None:
    assert refusal(service, call) is Reason.NOT_PERMITTED


def test_events_are_watched_from_where_one_was(service: ServiceProcess) -> None:
    async def watch(stub: Stub) -> list[pb.MemoryEvent]:
        call = stub.Watch(pb.WatchRequest())
        first = await anext(aiter(call))
        assert not first.events
        call.cancel()
        with service.client():
            pass
        call = stub.Watch(pb.WatchRequest(boot_token=first.boot_token, sequence=first.sequence))
        seen: list[pb.MemoryEvent] = []
        async for response in call:
            assert not response.has_gap
            seen += response.events
            if len(seen) >= 2:
                break
        call.cancel()
        other = stub.Watch(pb.WatchRequest(boot_token=7, sequence=1))
        assert (await anext(aiter(other))).has_gap
        other.cancel()
        return seen

    kinds = [event.kind for event in asked(service, watch)]
    assert kinds[:2] == [
        pb.MEMORY_EVENT_KIND_SESSION_BOUND,
        pb.MEMORY_EVENT_KIND_SESSION_FENCED,
    ]


def test_a_stale_boot_token_is_refused_on_both_transports(service: ServiceProcess) -> None:
    async def ask(stub: Stub) -> UnbrokenError:
        try:
            await stub.ListSegments(pb.ListSegmentsRequest(boot_token=7))
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)
        raise AssertionError("expected a refusal")

    assert asked(service, ask).reason is Reason.STALE_HANDLE
    sock = channel.connect(service.socket)
    with sock:
        bind = wire.Bind(protocol_version=1)
        channel.send(sock, wire.SessionRequest(bind=bind))
        response, fds = channel.receive(sock, wire.SessionResponse)
        channel.close_all(fds)
        find = wire.FindBlocks(keys=bytes(32))
        stale = wire.SessionRequest(boot_token=response.bound.boot_token + 1, find=find)
        channel.send(sock, stale)
        response, _ = channel.receive(sock, wire.SessionResponse)
        assert response.error.reason == "STALE_HANDLE"


@pytest.mark.parametrize(
    ("data", "with_fds"),
    [(b"\xff" * 10, False), (b"x" * 70_000, False), (b"\x08\x01", True)],
)
def test_a_process_that_sends_garbage_is_cut_off_and_nobody_else(
    service: ServiceProcess, data: bytes, with_fds: bool
) -> None:
    before = service.num_fds()
    with channel.connect(service.socket) as sock:
        sock.settimeout(5)
        rights = [(1, 1, (0).to_bytes(4, "little"))] if with_fds else []
        sock.sendmsg([data], rights)
        if not with_fds:
            with pytest.raises(channel.ChannelClosed):
                channel.receive(sock, wire.SessionResponse)
    until(lambda: service.num_fds() <= before, "descriptors that came are closed")
    with service.client() as client:
        assert client.find([bytes(32)]) == 0
