"""Spoils memory in every way that a bad writer, bit or caller can, and looks who notices."""

import random
from collections.abc import Callable, Iterable

from tests.memory_service.processes import ServiceProcess
from tests.memory_service.victim import BLOCK_BYTES, bytes_of
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory import channel, checksums, records
from unbroken.memory.client import BlockWriter, MemoryClient, SegmentClass
from unbroken.memory.records import RECORD_BYTES, Record, RecordState
from unbroken.v1 import memory_session_pb2 as wire


class Corruptions:
    """One writer, one reader; each method spoils something anew and says whether it was caught.

    Caught means: what was spoiled is not served to the reader, as these or as other bytes.
    """

    def __init__(self, service: ServiceProcess, seed: int) -> None:
        self._service = service
        self._random = random.Random(seed)
        self._writing: MemoryClient = service.client(client="bad writer")
        self._reading: MemoryClient = service.client(client="reader")
        self._writer: BlockWriter = self._writing.open_writer(BLOCK_BYTES, 8)

    def close(self) -> None:
        self._writing.close()
        self._reading.close()

    def kinds(self) -> Iterable[tuple[str, Callable[[], bool]]]:
        """By name."""
        yield "bit in a block", self.bit_in_block
        yield "bit in a record", self.bit_in_record
        yield "torn block", self.torn_block
        yield "torn record", self.torn_record
        yield "record of another slot", self.strayed_record
        yield "stale generation", self.stale_generation
        yield "bytes that change before they are sealed", self.weights
        yield "replayed boot token", self.replayed_boot_token
        yield "write after the seal", self.write_after_seal

    def bit_in_block(self) -> bool:
        key, slot = self._put()
        bit = self._random.randrange(BLOCK_BYTES * 8)
        self._data[slot * BLOCK_BYTES + bit // 8] ^= 1 << bit % 8
        return self._is_miss(key)

    def bit_in_record(self) -> bool:
        key, slot = self._put(is_told=False)
        bit = self._random.randrange(RECORD_BYTES * 8)
        self._table[slot * RECORD_BYTES + bit // 8] ^= 1 << bit % 8
        self._writer.flush()
        return self._is_miss(key)

    def torn_block(self) -> bool:
        """As if its writer had died in the middle, had the record been written first."""
        key, slot = self._put(is_told=False)
        size = self._random.randrange(BLOCK_BYTES // 2)
        start = slot * BLOCK_BYTES
        self._data[start + size : start + BLOCK_BYTES] = bytes(BLOCK_BYTES - size)
        self._writer.flush()
        return self._is_miss(key)

    def torn_record(self) -> bool:
        key, slot = self._put(is_told=False)
        size = self._random.randrange(1, RECORD_BYTES - 8)
        start = slot * RECORD_BYTES
        self._table[start + size : start + RECORD_BYTES] = bytes(RECORD_BYTES - size)
        self._writer.flush()
        return self._is_miss(key)

    def strayed_record(self) -> bool:
        key, slot = self._put(is_told=False)
        start, other = slot * RECORD_BYTES, ((slot + 1) % 8) * RECORD_BYTES
        record = self._table[start : start + RECORD_BYTES]
        kept = self._table[other : other + RECORD_BYTES]
        self._table[start : start + RECORD_BYTES] = bytes(RECORD_BYTES)
        self._table[other : other + RECORD_BYTES] = record
        commit = wire.CommitBlocks(slab_id=self._writer.slab_id, slots=[(slot + 1) % 8])
        self._writing.call(wire.SessionRequest(commit=commit))
        self._writer.flush()
        self._table[other : other + RECORD_BYTES] = kept
        return self._is_miss(key)

    def stale_generation(self) -> bool:
        """A slot is overwritten in place after a reader was told where the block is."""
        key, slot = self._put()
        generation = self._generation(slot)
        self._data[slot * BLOCK_BYTES : (slot + 1) * BLOCK_BYTES] = bytes(BLOCK_BYTES)
        record = Record(
            RecordState.COMMITTED,
            16,
            generation + 1,
            slot,
            self._random.randbytes(32),
            checksums.compute(bytes(BLOCK_BYTES)),
        )
        start = slot * RECORD_BYTES
        self._table[start : start + RECORD_BYTES] = record.to_bytes(self._writer.slab_id)
        return self._is_miss(key)

    def weights(self) -> bool:
        segment = self._writing.create("spoiled", SegmentClass.WEIGHTS, [4096])
        segment.slabs[0][:] = self._random.randbytes(4096)
        checksum = checksums.compute(memoryview(segment.slabs[0]))
        bit = self._random.randrange(4096 * 8)
        segment.slabs[0][bit // 8] ^= 1 << bit % 8
        segment.unmap()
        seal = wire.SealSegment(name="spoiled", epoch=segment.epoch, checksums=[checksum])
        refused = self._refusal(self._writing, wire.SessionRequest(seal=seal))
        try:
            self._reading.attach("spoiled")
        except UnbrokenError as error:
            return (refused, error.reason) == (Reason.CHECKSUM_MISMATCH, Reason.SEGMENT_NOT_FOUND)
        return False

    def replayed_boot_token(self) -> bool:
        with channel.connect(self._service.socket) as sock:
            sock.settimeout(10)
            bind = wire.Bind(protocol_version=1)
            channel.send(sock, wire.SessionRequest(bind=bind))
            response, fds = channel.receive(sock, wire.SessionResponse)
            channel.close_all(fds)
            old = response.bound.boot_token ^ (1 << self._random.randrange(64))
            find = wire.FindBlocks(keys=bytes(32))
            channel.send(sock, wire.SessionRequest(boot_token=old, find=find))
            response, _ = channel.receive(sock, wire.SessionResponse)
            return response.error.reason == Reason.STALE_HANDLE.value

    def write_after_seal(self) -> bool:
        """Through a mapping for reading, of a slab that was left."""
        with self._service.client() as leaving:
            writer = leaving.open_writer(BLOCK_BYTES, 1)
            key = self._random.randbytes(32)
            writer.put(key, bytes_of(key), 16)
            writer.close()
        with self._reading.get([key]) as blocks:
            try:
                blocks[0].data[0] = 1  # pyright: ignore[reportIndexIssue]
            except TypeError:
                return bytes(blocks[0].data) == bytes_of(key)
        return False

    @property
    def _data(self) -> memoryview:
        return memoryview(self._writer.as_reader().mapping)

    @property
    def _table(self) -> memoryview:
        return memoryview(self._writer._table)  # pyright: ignore[reportPrivateUsage]

    def _put(self, *, is_told: bool = True) -> tuple[bytes, int]:
        """A block that is fine, and where it is."""
        key = self._random.randbytes(32)
        assert self._writer.put(key, bytes_of(key), 16)
        if is_told:
            self._writer.flush()
            with self._reading.get([key]) as blocks:
                assert blocks[0].data == bytes_of(key), "it was fine before"
        for slot in range(self._writer.num_slots):
            start = slot * RECORD_BYTES
            record = records.parse(
                bytes(self._table[start : start + RECORD_BYTES]),
                slab_id=self._writer.slab_id,
                slot=slot,
            )
            if record is not None and record.key == key:
                return key, slot
        raise AssertionError("it has a record")

    def _generation(self, slot: int) -> int:
        start = slot * RECORD_BYTES
        data = bytes(self._table[start : start + RECORD_BYTES])
        record = records.parse(data, slab_id=self._writer.slab_id, slot=slot)
        assert record is not None
        return record.generation

    def _is_miss(self, key: bytes) -> bool:
        with self._reading.get([key]) as blocks:
            return len(blocks) == 0

    def _refusal(self, client: MemoryClient, request: wire.SessionRequest) -> Reason | None:
        try:
            client.call(request)
        except UnbrokenError as error:
            return error.reason
        return None
