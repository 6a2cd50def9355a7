"""A process that forks others, which use memory and are killed at a line, or a moment, of choice.

    python -m tests.memory_service.victim <socket>

It reads what is wanted as lines of JSON, and answers with what the victim said and how it ended. A
victim counts the lines of the client library that it runs (`sys.settrace`), so that every single
step of put, commit, seal, attach, adopt and get is a point at which it can die.
"""

import hashlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from unbroken.errors import Reason, UnbrokenError
from unbroken.memory import client as memory_client
from unbroken.memory import records
from unbroken.memory.client import MemoryClient, SegmentClass
from unbroken.memory.records import RECORD_BYTES, Record, RecordState

BLOCK_BYTES = 4096
LIBRARY = str(Path(records.__file__).parent)
Say = Callable[..., None]


def key_of(seed: int, number: int) -> bytes:
    return hashlib.blake2b(f"{seed} {number}".encode(), digest_size=32).digest()


def bytes_of(key: bytes) -> bytes:
    return hashlib.shake_128(key).digest(BLOCK_BYTES)


def put(client: MemoryClient, seed: int, say: Say) -> None:
    """Blocks, told of at once; then more of them than there is room for."""
    writer = client.open_writer(BLOCK_BYTES, 3)
    for number in range(2):
        key = key_of(seed, number)
        writer.put(key, bytes_of(key), 16)
        writer.flush()
        say("committed", number)
    for number in range(2, 5):
        say("overwrites")
        key = key_of(seed, number)
        writer.put(key, bytes_of(key), 16)
    writer.flush()


def close(client: MemoryClient, seed: int, say: Say) -> None:
    """A slab that is left to others in order."""
    writer = client.open_writer(BLOCK_BYTES, 2)
    key = key_of(seed, 0)
    writer.put(key, bytes_of(key), 16)
    writer.close()
    say("committed", 0)
    client.close()


def seal(client: MemoryClient, seed: int, say: Say) -> None:
    """A new version of weights that exist."""
    segment = client.create("weights", SegmentClass.WEIGHTS, [4096, 8192])
    say("epoch", "weights", segment.epoch)
    for index, slab in enumerate(segment.slabs):
        slab[:] = bytes_of(key_of(seed, index)) * (len(slab) // BLOCK_BYTES)
    client.seal(segment, layout=str(seed).encode())
    say("sealed", seed)


def attach(client: MemoryClient, _seed: int, say: Say) -> None:
    """Weights that another sealed."""
    segment = client.attach("weights")
    of = int(segment.layout)
    for index, slab in enumerate(segment.slabs):
        assert slab[:BLOCK_BYTES] == bytes_of(key_of(of, index)), "these are the bytes"
    say("read")
    client.release(segment)


def adopt(client: MemoryClient, _seed: int, say: Say) -> None:
    """The pool of whoever had it before, or a new one, in which a counter and its record grow."""
    try:
        segment = client.adopt("pool", timeout_s=0.5)
    except UnbrokenError as error:
        if error.reason not in (Reason.SEGMENT_NOT_FOUND, Reason.QUARANTINED):
            raise
        segment = client.create("pool", SegmentClass.KV_POOL, [2 * 4096])
        client.freeze(segment)
        say("fresh")
    say("epoch", "pool", segment.epoch)
    slab = segment.slabs[0]
    last = 0
    for slot in range(2):
        found = records.parse(
            slab[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES], slab_id=1, slot=slot
        )
        if found is not None and found.state is RecordState.COMMITTED:
            last = max(last, found.generation)
    say("found", last)
    for generation in range(last + 1, last + 4):
        slot = generation % 2  # The other one keeps what was committed before.
        start = 4096 + slot * 2048
        slab[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES] = records.writing(
            slot, generation
        ).to_bytes(1)
        slab[start : start + 2048] = generation.to_bytes(8, "little") * 256
        record = Record(RecordState.COMMITTED, 1, generation, slot, bytes(32), 0)
        slab[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES] = record.to_bytes(1)
        say("wrote", generation)


def get(client: MemoryClient, seed: int, say: Say) -> None:
    """Blocks of an earlier one."""
    keys = [key_of(seed, number) for number in range(5)]
    client.find(keys)
    with client.get(keys, ttl_s=1.0) as blocks:
        for block, key in zip(blocks, keys, strict=False):
            assert block.data == bytes_of(key), "these are the bytes"
        say("read", len(blocks))


SCENARIOS = {one.__name__: one for one in (put, close, seal, attach, adopt, get)}


def victim(socket: Path, wanted: dict[str, Any], output: int) -> None:
    """Live, and perhaps die."""

    def say(*words: object) -> None:
        os.write(output, json.dumps(words).encode() + b"\n")

    lines = 0

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        if event == "line":
            lines += 1
            if lines == wanted["line"]:
                say("dies", frame.f_code.co_name, frame.f_lineno)
                os.kill(os.getpid(), wanted["signal"])
        return trace

    if wanted["line"]:
        memory_client.AWAKE_S = 0.0  # A scenario runs the same lines each time.
        sys.settrace(trace)
    client = MemoryClient(socket, client="victim", rebind_timeout_s=2.0)
    say("session", client.session_id)
    SCENARIOS[wanted["scenario"]](client, wanted["seed"], say)
    sys.settrace(None)
    say("done", lines)


def serve(socket: Path) -> None:
    """One victim after the other."""
    for line in sys.stdin:
        wanted = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            signal.alarm(15)
            try:
                victim(socket, wanted, write)
            except BaseException as error:
                os.write(write, json.dumps(["failed", repr(error)]).encode() + b"\n")
                os._exit(1)
            os._exit(0)
        os.close(write)
        said = b""
        begun = time.monotonic()
        while True:
            wait_s = 20.0
            if wanted["after_s"]:
                wait_s = max(0.0, begun + wanted["after_s"] - time.monotonic())
            ready, _, _ = select.select([read], [], [], wait_s)
            if not ready:
                os.kill(pid, wanted["signal"])
                wanted["after_s"] = 0.0
                continue
            if not (part := os.read(read, 65536)):
                break
            said += part
        os.close(read)
        _, status = os.waitpid(pid, 0)
        words = [json.loads(one) for one in said.splitlines()]
        print(json.dumps({"said": words, "status": status}), flush=True)  # noqa: T201


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
