"""A client that knows only the contract: it records what it is told, and resumes from that."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc.aio

from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub


@dataclass
class Heard:
    """What it was told of one choice."""

    token_ids: list[int] = field(default_factory=list[int])
    text: str = ""
    logprobs: list[float] = field(default_factory=list[float])


@dataclass
class Recording:
    """One request, and all that its client heard, over however many calls."""

    request: pb.GenerateRequest
    choices: dict[int, Heard] = field(default_factory=dict[int, Heard])
    token: bytes = b""
    num_tokens_received: int = 0
    """Resume tokens."""
    started: pb.StreamStarted | None = None
    finished: pb.StreamFinished | None = None
    _call: AsyncIterator[pb.GenerateResponse] | None = None

    def take(self, message: pb.GenerateResponse) -> None:
        """Record one message; its offset must be the next."""
        choice = self.choices.setdefault(message.choice_index, Heard())
        if message.token_ids:
            assert message.offset == len(choice.token_ids), "no token lost, none twice"
        choice.token_ids += message.token_ids
        choice.text += message.text
        choice.logprobs += [one.logprob for one in message.logprobs]
        if message.HasField("started"):
            self.started = message.started
            self.token = message.started.resume_token
            self.num_tokens_received += 1
            assert self.request.request_id in ("", message.started.request_id)
            self.request.request_id = message.started.request_id
        if message.resume_token:
            self.token = message.resume_token
            self.num_tokens_received += 1
        if message.HasField("finished"):
            self.finished = message.finished

    @property
    def num_tokens(self) -> int:
        """Of all choices."""
        return sum(len(choice.token_ids) for choice in self.choices.values())

    def resume_request(self) -> pb.ResumeRequest:
        """What to send to any frontend."""
        return pb.ResumeRequest(
            request=self.request,
            resume_token=self.token,
            positions=[
                pb.ResumePosition(
                    choice_index=index,
                    token_ids=choice.token_ids,
                    num_text_bytes=len(choice.text.encode()),
                    cumulative_logprob=sum(choice.logprobs) if choice.logprobs else None,
                )
                for index, choice in self.choices.items()
            ],
        )


class Caller:
    """A connection of its own to one frontend."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.stub = InferenceServiceStub(self._channel)

    async def __aenter__(self) -> "Caller":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def generate(self, seen: Recording, *, until: int | None = None) -> bool:
        """Read until there are so many tokens, or to the end; whether that came."""
        async for message in self.stub.Generate(seen.request, timeout=20):
            seen.take(message)
            if until is not None and seen.num_tokens >= until:
                return False
        return True

    async def resume(self, seen: Recording, *, until: int | None = None) -> bool:
        """The same with `Resume`."""
        async for message in self.stub.Resume(seen.resume_request(), timeout=20):
            seen.take(message.response)
            if until is not None and seen.num_tokens >= until:
                return False
        return True


async def generate(address: str, request: pb.GenerateRequest) -> Recording:
    """A whole undisturbed run."""
    seen = Recording(request)
    async with Caller(address) as caller:
        assert await caller.generate(seen)
    return seen
