"""What a frontend can say wrong to a sidecar."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from tests.integration.bad_input import Answer, BadInput, answer_of
from tests.integration.bad_requests import CONTEXT_LENGTH, VOCAB_SIZE
from unbroken.transport import RECEIVE_BYTES_MAX
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2
from unbroken.v1 import relay_service_pb2 as pb

_GOOD_SLOT = 1000
_numbers = itertools.count()
"""So that every case is a frontend and a stream of its own."""


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A connection to the sidecar."""

    channel: grpc.aio.Channel

    def relay(self) -> Any:
        """A Relay call that takes bytes."""
        channel: Any = self.channel
        return channel.stream_stream(
            "/unbroken.v1.RelayService/Relay", response_deserializer=pb.RelayResponse.FromString
        )(timeout=10)


Say = Callable[[Sidecar], Awaitable[Answer]]


def _hello(**changes: Any) -> pb.RelayRequest:
    fields: dict[str, Any] = {"protocol_version": 1, "incarnation": 1, "call_number": 1}
    return pb.RelayRequest(hello=pb.RelayHello(**(fields | changes)))


def _start(
    slot: int = 1,
    *,
    ids: Sequence[int] = (1, 2, 3),
    output: Sequence[int] = (),
    temperature: float = 0.0,
    first_offset: int = 0,
    max_tokens: int = 2,
    request_id: str = "",
    **changes: Any,
) -> pb.RelayRequest:
    start = attempt_pb2.StartAttempt(
        slot=slot,
        stream=attempt_pb2.StreamKey(request_id=request_id or f"relayed-{next(_numbers)}"),
        epoch=1,
        checkpoint=attempt_pb2.Checkpoint(
            prompt_token_ids=ids,
            output_token_ids=output,
            first_offset=first_offset,
            params=generation_pb2.GenerationParams(
                sampling=generation_pb2.SamplingParams(temperature=temperature),
                stopping=generation_pb2.StopConditions(max_tokens=max_tokens),
            ),
        ),
    )
    start.MergeFrom(attempt_pb2.StartAttempt(**changes))
    return pb.RelayRequest(start=start)


def _call(*said: pb.RelayRequest | bytes, hello: pb.RelayRequest | None = None) -> Say:
    """Say all this after a hello; what is refused, ends, or breaks first is the answer."""

    async def say(sidecar: Sidecar) -> Answer:
        number = next(_numbers)
        call = sidecar.relay()
        try:
            for message in (hello or _hello(frontend_id=f"test-{number}"), *said):
                await call.write(
                    message if isinstance(message, bytes) else message.SerializeToString()
                )
            while (response := await call.read()) is not grpc.aio.EOF:
                for refused in response.frame.refused:
                    return Answer("refused", worker_pb2.FailureKind.Name(refused.kind))
                for ended in response.frame.ended:
                    return _end(ended)
        except grpc.aio.AioRpcError as error:
            return answer_of(error)
        finally:
            call.cancel()
        return Answer("the call ended")

    return say


def _harmless(*said: pb.RelayRequest | bytes, hello: pb.RelayRequest | None = None) -> Say:
    """Say all this, then begin an attempt as it should be, which ends well."""
    return _call(*said, _start(_GOOD_SLOT), hello=hello)


def _without(field: str) -> pb.RelayRequest:
    request = _start()
    request.start.ClearField(field)  # pyright: ignore[reportArgumentType]
    return request


def _end(ended: attempt_pb2.AttemptEnded) -> Answer:
    if ended.slot == _GOOD_SLOT:
        assert ended.finish_reason == generation_pb2.FINISH_REASON_LENGTH
        return Answer("ignored")
    return Answer("ended", worker_pb2.FailureKind.Name(ended.failure))


async def _no_word(sidecar: Sidecar) -> Answer:
    call = sidecar.relay()
    await call.done_writing()
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        return answer_of(error)
    return Answer("the call ended")


async def _too_large(sidecar: Sidecar) -> Answer:
    """Read at the same time: a write that fails makes gRPC forget what the sidecar said."""
    call = sidecar.relay()
    hello = _hello(frontend_id=f"test-{next(_numbers)}")
    await call.write(hello.SerializeToString())
    await call.read()
    writing = asyncio.create_task(call.write(bytes(RECEIVE_BYTES_MAX + 1)))
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return answer_of(error)
    finally:
        await asyncio.gather(writing, return_exceptions=True)
    return Answer("the call ended")


async def _older_call(sidecar: Sidecar) -> Answer:
    frontend_id = f"test-{next(_numbers)}"
    newer = _harmless(hello=_hello(frontend_id=frontend_id, call_number=2))
    assert await newer(sidecar) == Answer("ignored")
    return await _call(hello=_hello(frontend_id=frontend_id, call_number=1))(sidecar)


def _abort(slot: int) -> pb.RelayRequest:
    return pb.RelayRequest(abort=attempt_pb2.AbortAttempt(slot=slot))


def _ack(slots: Sequence[int], offsets: Sequence[int]) -> pb.RelayRequest:
    return pb.RelayRequest(ack=attempt_pb2.AckAttempts(slots=slots, offsets=offsets))


def _adopt(request_id: str, epoch: int = 2, offset: int = 0) -> pb.RelayRequest:
    return pb.RelayRequest(
        adopt=pb.AdoptAttempt(
            slot=2,
            stream=attempt_pb2.StreamKey(request_id=request_id),
            epoch=epoch,
            offset=offset,
        )
    )


_VIOLATION = Answer("INVALID_ARGUMENT", "PROTOCOL_VIOLATION")
_FENCED = Answer("ABORTED", "FENCED")
_IGNORED = Answer("ignored")


def _refused(kind: str) -> Answer:
    return Answer("refused", f"FAILURE_KIND_{kind}")


CASES: tuple[BadInput[Sidecar], ...] = (
    BadInput("an attempt before hello", _VIOLATION, _call(hello=_start())),
    BadInput("no hello at all", _VIOLATION, _no_word),
    BadInput("an empty message for hello", _VIOLATION, _call(hello=pb.RelayRequest())),
    BadInput("protocol version 0", _VIOLATION, _call(hello=_hello(protocol_version=0))),
    BadInput("a frontend without a name", _VIOLATION, _call(hello=_hello(frontend_id=""))),
    BadInput("a frontend_id of a path", _VIOLATION, _call(hello=_hello(frontend_id="../f1"))),
    BadInput(
        "another incarnation expected",
        _FENCED,
        _call(hello=_hello(frontend_id="late", expected_worker_incarnation=7)),
    ),
    BadInput("a call older than the last", _FENCED, _older_call),
    BadInput("a second hello", _VIOLATION, _call(_hello())),
    BadInput("bytes that are no message", _VIOLATION, _call(b"\xff" * 32)),
    BadInput("a message of more than 16 MiB", Answer("RESOURCE_EXHAUSTED"), _too_large),
    BadInput(
        "a slot used twice",
        _VIOLATION,
        _call(_start(1, request_id="a", max_tokens=200), _start(1, request_id="b")),
    ),
    BadInput("slot 0", _VIOLATION, _call(_start(0))),
    BadInput("an end for an unknown slot", _IGNORED, _harmless(_abort(77))),
    BadInput("an acknowledgement for an unknown slot", _IGNORED, _harmless(_ack([77], [5]))),
    BadInput(
        "an acknowledgement beyond the output",
        _IGNORED,
        _harmless(_ack([_GOOD_SLOT], [2**32 - 1])),
    ),
    BadInput("unequal columns in an acknowledgement", _VIOLATION, _call(_ack([1, 2], [5]))),
    BadInput("a message of a kind unknown here", _IGNORED, _harmless(b"\xfa\x07\x00")),
    BadInput(
        "a token id beyond the vocabulary", _refused("REJECTED"), _call(_start(ids=[VOCAB_SIZE]))
    ),
    BadInput("no prompt", _refused("REJECTED"), _call(_start(ids=[]))),
    BadInput(
        "a prompt as long as the context",
        _refused("REJECTED"),
        _call(_start(ids=[1] * CONTEXT_LENGTH)),
    ),
    BadInput("sampling without a seed", _refused("REJECTED"), _call(_start(temperature=1.0))),
    BadInput("max_tokens of 0", _refused("REJECTED"), _call(_start(max_tokens=0))),
    BadInput(
        "more past output than budget",
        _refused("REJECTED"),
        _call(_start(output=[1, 2, 3], first_offset=3)),
    ),
    BadInput(
        "past output beyond its offset",
        _refused("REJECTED"),
        _call(_start(output=[1, 2, 3], max_tokens=9, first_offset=1)),
    ),
    BadInput("an attempt without a stream", _refused("REJECTED"), _call(_without("stream"))),
    BadInput("an attempt without an epoch", _refused("FENCED"), _call(_without("epoch"))),
    BadInput(
        "an attempt without a checkpoint", _refused("REJECTED"), _call(_without("checkpoint"))
    ),
    BadInput(
        "an epoch that was used",
        _refused("FENCED"),
        _call(
            _start(1, request_id="twice", max_tokens=200),
            _start(2, request_id="twice", max_tokens=200),
        ),
    ),
    BadInput(
        "another life of the engine expected",
        _refused("FENCED"),
        _call(_start(engine_incarnation=77)),
    ),
    BadInput("adoption of nobody", _refused("UNSPECIFIED"), _call(_adopt("nobody"))),
    BadInput(
        "adoption from beyond the ledger",
        _refused("PROTOCOL"),
        _call(_start(1, request_id="ledger", max_tokens=200), _adopt("ledger", offset=400)),
    ),
)
