"""Reads KV blocks from the memory service of another host, for a limited time."""

import asyncio
from collections.abc import Sequence

import grpc.aio

from unbroken import log
from unbroken.memory import checksums
from unbroken.memory.client import KEYS_A_CALL
from unbroken.transport import open_channel
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_pb2_grpc
from worker.engine import KvHolder

_log = log.get_logger(__name__)


def read_blocks(
    holder: KvHolder,
    keys: Sequence[bytes],
    block_bytes: int,
    *,
    num_tokens: int,
    timeout_s: float,
) -> list[bytes]:
    """The first of these blocks that are stored there, are of this size, and come in time.

    Each is compared with its checksum, which is the word of that service.
    """
    found: list[bytes] = []
    try:
        asyncio.run(_read(holder, keys, block_bytes, num_tokens, timeout_s, found))
    except (grpc.aio.AioRpcError, TimeoutError, _NotOursError) as error:
        detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
        _log.warning("blocks of another host ended early", address=holder.address, detail=detail)
    return found


class _NotOursError(Exception):
    """What came is not what was asked for."""


async def _read(
    holder: KvHolder,
    keys: Sequence[bytes],
    block_bytes: int,
    num_tokens: int,
    timeout_s: float,
    found: list[bytes],
) -> None:
    async with asyncio.timeout(timeout_s), open_channel(holder.address) as channel:
        stub = memory_pb2_grpc.MemoryServiceStub(channel)
        for at in range(0, len(keys), KEYS_A_CALL):
            part_keys = keys[at : at + KEYS_A_CALL]
            request = pb.ReadBlocksRequest(keys=b"".join(part_keys), ticket=holder.ticket)
            data = bytearray()
            async for part in stub.ReadBlocks(request):
                if part.end:
                    break
                if part.index != len(found) - at or part.offset != len(data):
                    raise _NotOursError(f"expected block {len(found) - at} at {len(data)}")
                data += part.data
                if len(data) > block_bytes or len(found) - at >= len(part_keys):
                    raise _NotOursError(f"expected {len(part_keys)} blocks of {block_bytes} bytes")
                if not part.size_bytes:
                    continue
                found.append(_checked(bytes(data), part, block_bytes, num_tokens))
                data.clear()
            if len(found) < at + len(part_keys):
                return


def _checked(data: bytes, last: pb.ReadBlocksResponse, block_bytes: int, num_tokens: int) -> bytes:
    """A block, with the last of its parts. Raises _NotOursError."""
    try:
        algorithm = checksums.of_contract(last.checksum_algorithm)
    except ValueError as error:
        raise _NotOursError(str(error)) from error
    if (len(data), last.size_bytes, last.num_tokens) != (block_bytes, block_bytes, num_tokens):
        raise _NotOursError(f"expected {num_tokens} tokens in {block_bytes} bytes")
    if checksums.compute(data, algorithm) != last.checksum:
        raise _NotOursError("expected bytes that match their checksum")
    return data
