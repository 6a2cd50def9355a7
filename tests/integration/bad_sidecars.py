"""What a sidecar can say wrong to a frontend: fakes in the mesh's discovery, each of one model."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from typing_extensions import override

from tests.frontend.fakes import VOCAB_SIZE, FakeSidecar
from tests.integration.bad_input import Answer, BadInput
from unbroken.client import Client
from unbroken.discovery import WORKERS, Discovery, incarnation_now
from unbroken.errors import UnbrokenError
from unbroken.status import CODES
from unbroken.transport import RECEIVE_BYTES_MAX, listen, make_server
from unbroken.v1 import attempt_pb2, worker_pb2
from unbroken.v1 import inference_service_pb2 as inference_pb
from unbroken.v1 import relay_service_pb2 as pb

MAX_TOKENS = 8
_BREACH_AT = 3
"""Offset of the token with which the sidecar goes wrong."""

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Mesh:
    """Where fakes are announced, and who meets them."""

    discovery: Discovery
    client: Client


@dataclass
class LyingSidecar(FakeSidecar):
    """A fake that can also say bytes, and open a call in its own way."""

    welcome: Callable[[pb.RelayResponse], pb.RelayResponse] | None = None
    """What is said instead of the welcome."""
    tokenizer_json: bytes | None = None

    @override
    async def begin(self) -> None:
        self._server = make_server()
        service = grpc.method_handlers_generic_handler(
            "unbroken.v1.RelayService",
            {
                "Relay": grpc.stream_stream_rpc_method_handler(
                    self.Relay,
                    request_deserializer=pb.RelayRequest.FromString,
                    response_serializer=_serialized,
                ),
                "GetTokenizer": grpc.unary_unary_rpc_method_handler(
                    self.GetTokenizer,
                    request_deserializer=pb.GetTokenizerRequest.FromString,
                    response_serializer=_serialized,
                ),
            },
        )
        self._server.add_generic_rpc_handlers((service,))
        self.address = listen(self._server, "127.0.0.1:0")
        await self._server.start()
        self._tasks = [asyncio.create_task(self._beat()), asyncio.create_task(self._run())]

    def say_bytes(self, data: bytes) -> None:
        """Bytes of our own where a message should be."""
        self.say(data)  # pyright: ignore[reportArgumentType]

    @override
    def _welcome(self) -> pb.RelayResponse:
        response = super()._welcome()
        return response if self.welcome is None else self.welcome(response)

    @override
    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: Any
    ) -> pb.GetTokenizerResponse:
        response = await super().GetTokenizer(request, context)
        if self.tokenizer_json is not None:
            response.fingerprint = f"lie-{self.worker_id}"
            response.tokenizer.tokenizer_json = self.tokenizer_json
        return response

    @property
    @override
    def description(self) -> worker_pb2.EngineDescription:
        description = super().description
        if self.tokenizer_json is not None:
            description.tokenizer_fingerprint = f"lie-{self.worker_id}"
        return description


def _serialized(response: Any) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


Say = Callable[[Mesh], Awaitable[Answer]]


@asynccontextmanager
async def _announced(mesh: Mesh, **settings: Any) -> AsyncGenerator[LyingSidecar]:
    """A lying sidecar that the frontend has heard of."""
    name = f"liar-{next(_numbers)}"
    sidecar = LyingSidecar(name, incarnation=incarnation_now(), model=name, **settings)
    await sidecar.begin()
    registration = await mesh.discovery.register(WORKERS, sidecar.record)
    try:
        yield sidecar
    finally:
        await registration.close()
        await sidecar.die()


def _in_stream(
    change: Callable[[LyingSidecar, attempt_pb2.StepFrame], object], *, logprobs: bool = False
) -> Say:
    """A stream that may not go on elsewhere, one frame of which is changed."""

    async def say(mesh: Mesh) -> Answer:
        async with _announced(mesh) as sidecar:

            def on_step(frame: attempt_pb2.StepFrame) -> None:
                if _BREACH_AT in frame.offsets:
                    change(sidecar, frame)

            sidecar.on_step = on_step
            await _until_ready(mesh, sidecar.model)
            request = inference_pb.GenerateRequest(
                model=sidecar.model,
                text="hello",
                continuation=inference_pb.CONTINUATION_POLICY_NEVER,
            )
            request.params.sampling.temperature = 0
            request.params.stopping.max_tokens = MAX_TOKENS
            if logprobs:
                request.params.logprobs.SetInParent()
            stream = mesh.client.start(request, timeout_s=10)
            try:
                num_tokens = sum([len(piece.token_ids) async for piece in stream])
            except UnbrokenError as error:
                return Answer(
                    CODES[error.reason].name, error.reason.name, error.metadata.get("failure", "")
                )
            assert num_tokens == MAX_TOKENS
            return Answer("ignored")

    return say


async def _until_ready(mesh: Mesh, model: str) -> None:
    async with asyncio.timeout(5):
        while not any(  # noqa: ASYNC110 - Nothing announces it.
            info.model == model and info.num_workers_ready
            for info in await mesh.client.list_models()
        ):
            await asyncio.sleep(0.01)


def _at_once(*, in_detail: str, **settings: Any) -> Say:
    """A sidecar that goes wrong before it takes work; the frontend says why it is not used."""

    async def say(mesh: Mesh) -> Answer:
        async with _announced(mesh, **settings) as sidecar, asyncio.timeout(5):
            while True:
                for worker in await mesh.client.list_workers():
                    if worker.record.identity.worker_id != sidecar.worker_id:
                        continue
                    if worker.detail.startswith("link lost: ") and in_detail in worker.detail:
                        return Answer("link ended", "", worker.detail.split(": ")[1])
                    if worker.detail.startswith("no tokenizer: ") and in_detail in worker.detail:
                        return Answer("not used")
                await asyncio.sleep(0.02)

    return say


# What is changed in a frame.


def _set(
    column: str, index: int, value: int
) -> Callable[[LyingSidecar, attempt_pb2.StepFrame], None]:
    def change(_: LyingSidecar, frame: attempt_pb2.StepFrame) -> None:
        getattr(frame, column)[index] = value

    return change


def _gap_in_frames(_: LyingSidecar, frame: attempt_pb2.StepFrame) -> None:
    frame.sequence = 1000


def _frame_again(_: LyingSidecar, frame: attempt_pb2.StepFrame) -> None:
    frame.sequence = 1


def _short_column(_: LyingSidecar, frame: attempt_pb2.StepFrame) -> None:
    del frame.offsets[:]


def _unequal_counts(_: LyingSidecar, frame: attempt_pb2.StepFrame) -> None:
    frame.token_counts.extend([1, 1])


def _false_sum(_: LyingSidecar, frame: attempt_pb2.StepFrame) -> None:
    frame.token_counts.append(2)


def _count_of_0(_: LyingSidecar, frame: attempt_pb2.StepFrame) -> None:
    frame.token_counts.append(0)
    del frame.token_ids[:]


def _more_next_tokens(sidecar: LyingSidecar, _: attempt_pb2.StepFrame) -> None:
    sidecar.say_next_tokens(1, 2)


def _unknown_slot(_: LyingSidecar, frame: attempt_pb2.StepFrame) -> None:
    frame.slots.append(999)
    frame.offsets.append(0)
    frame.token_ids.append(1)


def _end(**fields: Any) -> Callable[[LyingSidecar, attempt_pb2.StepFrame], None]:
    def change(_: LyingSidecar, frame: attempt_pb2.StepFrame) -> None:
        frame.ended.add(slot=frame.slots[0], **fields)

    return change


def _unknown_end(_: LyingSidecar, frame: attempt_pb2.StepFrame) -> None:
    frame.ended.add(slot=999, end_offset=1, finish_reason=1)


def _no_logprobs(_: LyingSidecar, frame: attempt_pb2.StepFrame) -> None:
    del frame.logprobs[:]


def _before_it(response: pb.RelayResponse) -> Callable[[LyingSidecar, attempt_pb2.StepFrame], None]:
    """Say this before the frame."""

    def change(sidecar: LyingSidecar, _: attempt_pb2.StepFrame) -> None:
        sidecar.say(response)

    return change


def _second_welcome(sidecar: LyingSidecar, _: attempt_pb2.StepFrame) -> None:
    identity = sidecar.record.identity
    sidecar.say(pb.RelayResponse(welcome=pb.RelayWelcome(protocol_version=1, identity=identity)))


def _garbage(sidecar: LyingSidecar, _: attempt_pb2.StepFrame) -> None:
    sidecar.say_bytes(b"\xff" * 32)


def _too_large(sidecar: LyingSidecar, _: attempt_pb2.StepFrame) -> None:
    sidecar.say_bytes(bytes(RECEIVE_BYTES_MAX + 1))


def _silence(sidecar: LyingSidecar, _: attempt_pb2.StepFrame) -> None:
    sidecar.is_hung = True


def _verdict(**fields: Any) -> pb.RelayResponse:
    return pb.RelayResponse(verdict=pb.EngineVerdict(**fields))


def _welcome_with(**changes: Any) -> Callable[[pb.RelayResponse], pb.RelayResponse]:
    def welcome(response: pb.RelayResponse) -> pb.RelayResponse:
        response.welcome.MergeFrom(pb.RelayWelcome(**changes))
        return response

    return welcome


def _frame_for_welcome(_: pb.RelayResponse) -> pb.RelayResponse:
    return pb.RelayResponse(frame=attempt_pb2.StepFrame(sequence=1))


def _lost(failure: str) -> Answer:
    return Answer("UNAVAILABLE", "WORKER_LOST", failure)


_PROTOCOL = _lost("PROTOCOL")
_LINK_ENDED = Answer("link ended", "", "PROTOCOL")
_IGNORED = Answer("ignored")
_SERVING = worker_pb2.ENGINE_STATE_SERVING

CASES: tuple[BadInput[Mesh], ...] = (
    BadInput("a gap in the frames", _PROTOCOL, _in_stream(_gap_in_frames)),
    BadInput("a frame that was there before", _PROTOCOL, _in_stream(_frame_again)),
    BadInput("a column too short", _PROTOCOL, _in_stream(_short_column)),
    BadInput("a column too long", _PROTOCOL, _in_stream(_unequal_counts)),
    BadInput("fewer ids than the rows say", _PROTOCOL, _in_stream(_false_sum)),
    BadInput("a row without tokens", _PROTOCOL, _in_stream(_count_of_0)),
    BadInput(
        "a token id beyond the vocabulary",
        _PROTOCOL,
        _in_stream(_set("token_ids", 0, VOCAB_SIZE)),
    ),
    BadInput("a token left out", _PROTOCOL, _in_stream(_set("offsets", 0, _BREACH_AT + 1))),
    BadInput("a token that was there before", _PROTOCOL, _in_stream(_set("offsets", 0, 0))),
    BadInput("next tokens of more rows than there are", _PROTOCOL, _in_stream(_more_next_tokens)),
    BadInput("tokens of an unknown slot", _IGNORED, _in_stream(_unknown_slot)),
    BadInput("the end of an unknown slot", _IGNORED, _in_stream(_unknown_end)),
    BadInput(
        "an end at another offset",
        _PROTOCOL,
        _in_stream(_end(end_offset=MAX_TOKENS + 1, finish_reason=2)),
    ),
    BadInput("an end without a reason", _lost("ENGINE_ERROR"), _in_stream(_end(end_offset=4))),
    BadInput(
        "an end of a kind unknown here",
        _lost("ENGINE_ERROR"),
        _in_stream(_end(end_offset=4, failure=77)),
    ),
    BadInput("no log probabilities", _PROTOCOL, _in_stream(_no_logprobs, logprobs=True)),
    BadInput("a second welcome", _PROTOCOL, _in_stream(_second_welcome)),
    BadInput(
        "an adoption that nobody asked for",
        _PROTOCOL,
        _in_stream(_before_it(pb.RelayResponse(adopted=pb.AttemptAdopted(slot=1)))),
    ),
    BadInput(
        "SERVING of something unknown", _PROTOCOL, _in_stream(_before_it(_verdict(state=_SERVING)))
    ),
    BadInput(
        "an engine without a context",
        _PROTOCOL,
        _in_stream(
            _before_it(
                _verdict(
                    state=_SERVING,
                    description=worker_pb2.EngineDescription(model="m", tokenizer_fingerprint="t"),
                )
            )
        ),
    ),
    BadInput(
        "a message of a kind unknown here", _IGNORED, _in_stream(_before_it(pb.RelayResponse()))
    ),
    BadInput("bytes that are no message", _PROTOCOL, _in_stream(_garbage)),
    BadInput("a message of more than 16 MiB", _PROTOCOL, _in_stream(_too_large)),
    BadInput("endless silence", _lost("HANG"), _in_stream(_silence)),
    BadInput(
        "a welcome of somebody else",
        _LINK_ENDED,
        _at_once(
            in_detail="expected worker",
            welcome=_welcome_with(identity=worker_pb2.WorkerIdentity(worker_id="somebody")),
        ),
    ),
    BadInput(
        "a welcome of another life",
        _LINK_ENDED,
        _at_once(
            in_detail="expected worker",
            welcome=_welcome_with(identity=worker_pb2.WorkerIdentity(incarnation=5)),
        ),
    ),
    BadInput(
        "protocol version 2",
        _LINK_ENDED,
        _at_once(in_detail="protocol version", protocol_version=2),
    ),
    BadInput(
        "a frame for a welcome",
        _LINK_ENDED,
        _at_once(
            in_detail="expected a welcome first",
            welcome=_frame_for_welcome,
        ),
    ),
    BadInput(
        "a tokenizer that is none",
        Answer("not used"),
        _at_once(in_detail="", tokenizer_json=b"{}"),
    ),
)
