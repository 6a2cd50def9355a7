"""A sidecar that behaves, or misbehaves on cue, and a discovery that says what it is told.

The engine behind it makes token i from everything before it (prompt, output, seed), so whatever way
a stream goes on, one wrong token changes all that follow. Its ids are letters, so text is simple.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import grpc.aio
from typing_extensions import override

from tests.support.frames import tokens_of
from unbroken.discovery import Discovery, Kind, Registration, Setting
from unbroken.errors import Reason, UnbrokenError
from unbroken.tokenizer import Tokenizer, TokenizerAsset
from unbroken.transport import listen, make_server
from unbroken.v1 import attempt_pb2, generation_pb2, relay_service_pb2, worker_pb2
from unbroken.v1.relay_service_pb2_grpc import (
    RelayServiceServicer,
    add_RelayServiceServicer_to_server,
)

MODEL = "letters"
CONTEXT_LENGTH = 4096
BOS, IM_START, IM_END = 256, 257, 258
VOCAB_SIZE = 260
FINGERPRINT = "letters-tokenizer"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer_json() -> bytes:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    char_of = {byte: chr(byte) for byte in printable}
    char_of |= {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    special = {"<|bos|>": BOS, "<|im_start|>": IM_START, "<|im_end|>": IM_END}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [
                {"id": token_id, "content": text, "special": True, **flags}
                for text, token_id in special.items()
            ],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": {char: byte for byte, char in char_of.items()},
                "merges": [],
            },
        }
    ).encode()


ASSET = TokenizerAsset(
    tokenizer_json=_tokenizer_json(),
    chat_template=CHAT_TEMPLATE,
    bos_token_id=BOS,
    eos_token_ids=frozenset({IM_END}),
    vocab_size=VOCAB_SIZE,
)


def tokenizer() -> Tokenizer:
    """The tokenizer of the model; id b is byte b."""
    return Tokenizer(ASSET)


class Engine:
    """The model: its next token depends on all tokens so far and the seed."""

    def __init__(self, sequence: Sequence[int], seed: int) -> None:
        self._state = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=2)
        for token_id in sequence:
            self._take(token_id)

    def next_token(self) -> int:
        """The next letter; the sequence goes on with it."""
        token_id = ord("a") + self._state.digest()[0] % 26
        self._take(token_id)
        return token_id

    def _take(self, token_id: int) -> None:
        self._state.update(token_id.to_bytes(4, "little"))


def reference(prompt: Sequence[int], num_tokens: int, seed: int = 0) -> list[int]:
    """What an undisturbed run gives."""
    engine = Engine(prompt, seed)
    return [engine.next_token() for _ in range(num_tokens)]


def busy(queued: int, *, limit: int = 100, slot: int = 0) -> attempt_pb2.AttemptRefused:
    """What a sidecar says whose ranks have been given so much, by whichever frontends."""
    ranks = [worker_pb2.RankLoad(rank=rank, prefill_tokens_queued=queued) for rank in range(2)]
    return attempt_pb2.AttemptRefused(
        slot=slot,
        kind=worker_pb2.FAILURE_KIND_OVERLOAD,
        detail="prefill_tokens of rank 0",
        busy=attempt_pb2.BusyVerdict(
            thresholds=worker_pb2.BusyThresholds(prefill_tokens=limit),
            load=worker_pb2.LoadReport(ranks=ranks),
        ),
    )


@dataclass
class Running:
    """One attempt at the fake engine."""

    start: attempt_pb2.StartAttempt
    engine: Engine
    offset: int
    acked: int
    end: int
    """Offset at which the budget is spent."""
    tokens: list[int] = field(default_factory=list[int])
    """What it has produced, from its first offset on."""


@dataclass
class FakeSidecar(RelayServiceServicer):
    """A RelayService with an engine of its own."""

    worker_id: str
    incarnation: int = 1
    model: str = MODEL
    step_s: float | None = 0.001
    """None: `step` is called by the test."""
    capabilities: worker_pb2.EngineCapabilities = field(
        default_factory=lambda: worker_pb2.EngineCapabilities(
            native_resume=True,
            random_source=worker_pb2.RANDOM_SOURCE_POSITIONAL,
            repetition_penalty_counts_prompt=True,
            logit_bias=True,
            constraints=worker_pb2.ConstraintCapabilities(
                json_schema=True, json_object=True, regex=True, lark=True, choice=True
            ),
            logprobs=True,
            seed_bits=64,
        )
    )
    numerics_id: str = "letters-1"
    is_invariant: bool = True
    is_draining: bool = False
    engine_incarnation: int = 1
    context_length: int = CONTEXT_LENGTH
    state: worker_pb2.EngineState.ValueType = worker_pb2.ENGINE_STATE_SERVING
    welcome_identity: worker_pb2.WorkerIdentity | None = None
    protocol_version: int = 1
    cached_tokens: int = 0
    memory_service: str = ""
    """Where it keeps KV blocks, if it does."""
    refuse: list[attempt_pb2.AttemptRefused] = field(
        default_factory=list[attempt_pb2.AttemptRefused]
    )
    """Refusals for the next starts; slots are filled in."""
    full_with: int | None = None
    """It refuses new work, because each of its ranks has so many prompt tokens queued."""
    is_full: bool = False
    """It refuses new work, because each of its ranks holds 51 of 100 KV blocks."""
    on_step: Callable[[attempt_pb2.StepFrame], None] | None = None
    """May change a frame before it is sent."""
    tokens_per_step: int = 1
    advertise: str = ""
    """Where others reach it, if that is not where it listens."""

    def __post_init__(self) -> None:
        self.capabilities.kv_restore = bool(self.memory_service)
        self.address = ""
        self.hellos: list[relay_service_pb2.RelayHello] = []
        self.starts: list[attempt_pb2.StartAttempt] = []
        self.batches: list[int] = []
        """How many of them came in each message of several commands."""
        self.num_turned_away = 0
        """New work that it refused because it was full."""
        self.adopts: list[relay_service_pb2.AdoptAttempt] = []
        self.num_releases = 0
        self.cancels: list[tuple[str, str]] = []
        """Tenants and names of requests that were cancelled somewhere else."""
        self.thresholds: list[relay_service_pb2.PushThresholds] = []
        self.aborts: list[int] = []
        self.acks: list[tuple[int, int]] = []
        self.heartbeats: list[relay_service_pb2.Heartbeat] = []
        self.num_tokenizers_sent = 0
        self.running: dict[int, Running] = {}
        self.is_hung = False
        self.is_mute = False
        """It says nothing for a while; what it has to say waits."""
        self.is_reluctant = False
        """It does not say when it has ended an attempt that was aborted."""
        self.is_deaf = False
        """Nothing that a frontend says reaches it, and it goes on speaking."""
        self._news = asyncio.Event()
        self._calls: list[asyncio.Queue[relay_service_pb2.RelayResponse]] = []
        self._frame_sequence = 0
        self._frame_before = attempt_pb2.StepFrame()
        self.num_next_tokens = 0
        """Frames that said no more than tokens."""
        self._heartbeat_seen = 0
        self._num_idle_steps = 0
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # Its life.

    async def begin(self) -> None:
        """Listen, at the same address as before if it had one."""
        self._server = make_server()
        add_RelayServiceServicer_to_server(self, self._server)
        self.address = listen(self._server, self.address or "127.0.0.1:0")
        await self._server.start()
        self._tasks = [asyncio.create_task(self._beat())]
        if self.step_s is not None:
            self._tasks.append(asyncio.create_task(self._run()))

    async def die(self) -> None:
        """The process is gone: all calls break, nothing more is said."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
        self.running.clear()
        self._calls.clear()

    @property
    def record(self) -> worker_pb2.WorkerRecord:
        """What it publishes."""
        return worker_pb2.WorkerRecord(
            identity=worker_pb2.WorkerIdentity(
                worker_id=self.worker_id, incarnation=self.incarnation
            ),
            address=self.advertise or self.address,
            model=self.model,
        )

    @property
    def description(self) -> worker_pb2.EngineDescription:
        return worker_pb2.EngineDescription(
            kind="fake",
            version="1",
            model=self.model,
            context_length=self.context_length,
            block_size=16,
            batch_size_max=64,
            prefill_tokens_max=512,
            numerics=worker_pb2.NumericsClass(
                id=self.numerics_id,
                batch_invariant=self.is_invariant,
                split_invariant=self.is_invariant,
            ),
            capabilities=self.capabilities,
            tokenizer_fingerprint=FINGERPRINT,
            num_ranks=2,
            memory_service=self.memory_service,
        )

    # Cues.

    def say(self, response: relay_service_pb2.RelayResponse) -> None:
        """To every frontend."""
        for queue in self._calls:
            queue.put_nowait(response)

    def say_frame(self, frame: attempt_pb2.StepFrame) -> None:
        """With the right sequence number, unless it has one."""
        self._frame_sequence += 1
        frame.sequence = frame.sequence or self._frame_sequence
        next_tokens = tokens_of(frame, self._frame_before)
        self._frame_before = attempt_pb2.StepFrame()
        self._frame_before.CopyFrom(frame)
        if next_tokens is not None and all(hello.takes_next_tokens for hello in self.hellos):
            self.num_next_tokens += 1
            self.say(relay_service_pb2.RelayResponse(next_tokens=next_tokens))
        else:
            self.say(relay_service_pb2.RelayResponse(frame=frame))

    def say_next_tokens(self, *token_ids: int) -> None:
        """Whatever was said before."""
        self._frame_sequence += 1
        tokens = attempt_pb2.NextTokens(sequence=self._frame_sequence, token_ids=token_ids)
        self.say(relay_service_pb2.RelayResponse(next_tokens=tokens))

    def say_state(
        self,
        state: worker_pb2.EngineState.ValueType,
        failure: worker_pb2.FailureKind.ValueType = worker_pb2.FAILURE_KIND_UNSPECIFIED,
    ) -> None:
        """A verdict."""
        self.state = state
        self.say(relay_service_pb2.RelayResponse(verdict=self._verdict(failure)))

    def step(self) -> attempt_pb2.StepFrame | None:
        """One engine step: what it produced was sent."""
        frame = attempt_pb2.StepFrame()
        for slot, one in list(self.running.items()):
            stopping = one.start.checkpoint.params.stopping
            ids: list[int] = []
            while (
                len(ids) < self.tokens_per_step
                and one.offset + len(ids) < one.end
                and one.offset + len(ids) < one.acked + one.start.window_tokens
            ):
                token = one.engine.next_token()
                ids.append(token)
                one.tokens.append(token)
                if token in stopping.stop_token_ids:
                    one.end = one.offset + len(ids)
            if not ids:
                continue
            frame.slots.append(slot)
            frame.offsets.append(one.offset)
            frame.token_ids.extend(ids)
            if self.tokens_per_step > 1:
                frame.token_counts.append(len(ids))
            if one.start.checkpoint.params.HasField("logprobs"):
                frame.logprobs.add(
                    slot=slot, tokens=[generation_pb2.TokenLogprobs(logprob=-1.0) for _ in ids]
                )
            one.offset += len(ids)
            if one.offset == one.end:
                del self.running[slot]
                is_stop = ids[-1] in stopping.stop_token_ids
                frame.ended.add(
                    slot=slot,
                    end_offset=one.offset,
                    finish_reason=(
                        generation_pb2.FINISH_REASON_STOP
                        if is_stop
                        else generation_pb2.FINISH_REASON_LENGTH
                    ),
                    stop_token_id=ids[-1] if is_stop else None,
                    cached_tokens=self.cached_tokens,
                )
        if not frame.slots:
            self._num_idle_steps = self._num_idle_steps + 1 if self.running else 0
            return None
        self._num_idle_steps = 0
        if self.on_step is not None:
            self.on_step(frame)
        self.say_frame(frame)
        return frame

    def is_blocked(self) -> bool:
        """Whether all attempts have waited for their windows, for as many steps as it takes."""
        return self._num_idle_steps > 100

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something that the frontend says makes the condition true."""
        async with asyncio.timeout(5):
            while not condition():
                self._news.clear()
                await self._news.wait()

    # The service.

    @override
    async def Relay(
        self, request_iterator: AsyncIterator[relay_service_pb2.RelayRequest], context: Any
    ) -> AsyncIterator[relay_service_pb2.RelayResponse]:
        queue: asyncio.Queue[relay_service_pb2.RelayResponse] = asyncio.Queue()
        reader = asyncio.create_task(self._listen(request_iterator, queue))
        try:
            while True:
                response = await queue.get()
                if self.is_hung:
                    await asyncio.Event().wait()
                while self.is_mute:  # noqa: ASYNC110 - a test's whim.
                    await asyncio.sleep(0.005)
                yield response
        finally:
            reader.cancel()
            if queue in self._calls:
                self._calls.remove(queue)

    @override
    async def GetTokenizer(
        self, request: relay_service_pb2.GetTokenizerRequest, context: Any
    ) -> relay_service_pb2.GetTokenizerResponse:
        self.num_tokenizers_sent += 1
        return relay_service_pb2.GetTokenizerResponse(
            tokenizer=worker_pb2.Tokenizer(
                tokenizer_json=ASSET.tokenizer_json,
                chat_template=ASSET.chat_template,
                bos_token_id=ASSET.bos_token_id,
                eos_token_ids=sorted(ASSET.eos_token_ids),
                vocab_size=ASSET.vocab_size,
            ),
            fingerprint=FINGERPRINT,
        )

    async def _listen(
        self,
        requests: AsyncIterator[relay_service_pb2.RelayRequest],
        queue: asyncio.Queue[relay_service_pb2.RelayResponse],
    ) -> None:
        async for request in requests:
            if self.is_deaf:
                continue
            match request.WhichOneof("request"):
                case "hello":
                    self.hellos.append(request.hello)
                    self._frame_sequence = 0
                    self._frame_before = attempt_pb2.StepFrame()
                    # What earlier calls left behind runs under handles that nobody else has.
                    orphans = enumerate(self.running.values(), start=1_000_000)
                    self.running = dict(orphans)
                    self._heartbeat_seen = 0
                    queue.put_nowait(self._welcome())
                    self._calls.append(queue)
                case "start":
                    self._start(request.start)
                case "abort":
                    self._abort(request.abort.slot)
                case "commands":
                    for abort in request.commands.aborts:
                        self._abort(abort.slot)
                    self.batches.append(len(request.commands.starts))
                    for start in request.commands.starts:
                        self._start(start)
                    for adopt in request.commands.adopts:
                        self._adopt(adopt)
                case "adopt":
                    self._adopt(request.adopt)
                case "release":
                    self.num_releases += 1
                case "cancel":
                    self.cancels.append((request.cancel.tenant, request.cancel.request_id))
                case "thresholds":
                    self.thresholds.append(request.thresholds)
                case "ack":
                    pairs = zip(request.ack.slots, request.ack.offsets, strict=True)
                    for slot, offset in pairs:
                        self.acks.append((slot, offset))
                        if slot in self.running:
                            running = self.running[slot]
                            running.acked = max(running.acked, offset)
                case "heartbeat":
                    self.heartbeats.append(request.heartbeat)
                    self._heartbeat_seen = request.heartbeat.sequence
                case _:
                    raise AssertionError(f"unexpected {request}")
            self._news.set()

    def _abort(self, slot: int) -> None:
        self.aborts.append(slot)
        one = self.running.pop(slot, None)
        if one is not None and not self.is_reluctant:
            ended = attempt_pb2.AttemptEnded(
                slot=slot,
                end_offset=one.offset,
                finish_reason=generation_pb2.FINISH_REASON_CANCELLED,
            )
            self.say_frame(attempt_pb2.StepFrame(ended=[ended]))

    def _adopt(self, adopt: relay_service_pb2.AdoptAttempt) -> None:
        """Give what runs to its new reader, and tell it what that one lacks."""
        self.adopts.append(adopt)
        slots = [s for s, one in self.running.items() if one.start.stream == adopt.stream]
        if not slots:
            refused = attempt_pb2.AttemptRefused(slot=adopt.slot, detail="unknown")
            self.say_frame(attempt_pb2.StepFrame(refused=[refused]))
            return
        one = self.running[adopt.slot] = self.running.pop(slots[0])
        one.acked = adopt.offset
        adopted = relay_service_pb2.AttemptAdopted(
            slot=adopt.slot,
            end_offset=one.offset,
            checkpoint=one.start.checkpoint,
            started_epoch=one.start.epoch,
        )
        self.say(relay_service_pb2.RelayResponse(adopted=adopted))
        missing = one.tokens[adopt.offset - one.start.checkpoint.first_offset :]
        if missing:
            self.say_frame(
                attempt_pb2.StepFrame(
                    slots=[adopt.slot],
                    offsets=[adopt.offset],
                    token_counts=[len(missing)],
                    token_ids=missing,
                )
            )

    def _start(self, start: attempt_pb2.StartAttempt) -> None:
        if start.is_new_work and (self.is_full or self.full_with is not None):
            self.num_turned_away += 1
            refused = busy(self.full_with or 0, slot=start.slot)
            if self.is_full:
                for rank in refused.busy.load.ranks:
                    rank.kv_blocks_total, rank.kv_blocks_used = 100, 51
            self.say_frame(attempt_pb2.StepFrame(refused=[refused]))
            return
        self.starts.append(start)
        if self.refuse:
            refused = self.refuse.pop(0)
            refused.slot = start.slot
            self.say_frame(attempt_pb2.StepFrame(refused=[refused]))
            return
        checkpoint = start.checkpoint
        first = checkpoint.first_offset
        is_native = bool(checkpoint.output_token_ids)
        max_tokens = checkpoint.params.stopping.max_tokens
        self.running[start.slot] = Running(
            start=start,
            engine=Engine(
                [*checkpoint.prompt_token_ids, *checkpoint.output_token_ids],
                checkpoint.params.sampling.seed,
            ),
            offset=first,
            acked=first,
            end=max_tokens if is_native else first + max_tokens,
        )

    def _welcome(self) -> relay_service_pb2.RelayResponse:
        identity = self.welcome_identity or self.record.identity
        return relay_service_pb2.RelayResponse(
            welcome=relay_service_pb2.RelayWelcome(
                protocol_version=self.protocol_version,
                identity=identity,
                verdict=self._verdict(),
            )
        )

    def _verdict(
        self,
        failure: worker_pb2.FailureKind.ValueType = worker_pb2.FAILURE_KIND_UNSPECIFIED,
    ) -> relay_service_pb2.EngineVerdict:
        is_known = self.state == worker_pb2.ENGINE_STATE_SERVING
        return relay_service_pb2.EngineVerdict(
            state=self.state,
            engine_incarnation=self.engine_incarnation,
            failure=failure,
            description=self.description if is_known else None,
            is_draining=self.is_draining,
        )

    async def _beat(self) -> None:
        sequence = 0
        while True:
            sequence += 1
            heartbeat = relay_service_pb2.Heartbeat(
                sequence=sequence,
                sequence_seen=self._heartbeat_seen,
            )
            self.say(relay_service_pb2.RelayResponse(heartbeat=heartbeat))
            await asyncio.sleep(0.05)

    async def _run(self) -> None:
        assert self.step_s is not None
        while True:
            self.step()
            await asyncio.sleep(self.step_s)


class _Registration:
    """A registration that nobody looks at."""

    async def update(self, record: Any) -> None:
        """Nothing."""

    async def close(self) -> None:
        """Nothing."""


class FakeDiscovery(Discovery):
    """Says what it is told."""

    def __init__(self) -> None:
        self._members: Mapping[str, Any] = MappingProxyType({})
        self._changed = asyncio.Event()
        self.registered: list[Any] = []
        self.settings: dict[str, Any] = {}
        """What is set, by name; shared by those that were given the same."""
        self._set = asyncio.Event()

    def announce(self, *records: worker_pb2.WorkerRecord) -> None:
        """These are the workers from now on."""
        self._members = {record.identity.worker_id: record for record in records}
        self._changed.set()

    @override
    async def new_incarnation(self, kind: Kind[Any], instance_id: str) -> int:
        """Always the first."""
        return 1

    @override
    async def register(self, kind: Kind[Any], record: Any) -> Registration[Any]:
        """Remember it."""
        self.registered.append(record)
        return _Registration()

    @override
    async def snapshot(self, kind: Kind[Any]) -> Mapping[str, Any]:
        """The workers."""
        return self._members

    @override
    async def watch(self, kind: Kind[Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        """The workers, whenever they change."""
        while True:
            self._changed.clear()
            yield self._members
            await self._changed.wait()

    @override
    async def setting(self, setting: Setting[Any]) -> Any:
        """What is set."""
        return self.settings.get(setting.name) or setting.record_type()

    @override
    async def change(self, setting: Setting[Any], record: Any) -> None:
        """Set it, unless it is old."""
        seen = (await self.setting(setting)).version
        if record.version <= seen:
            raise UnbrokenError(Reason.VERSION_MISMATCH, "changed", metadata={"version": str(seen)})
        self.settings[setting.name] = record
        self._set.set()

    @override
    async def watch_setting(self, setting: Setting[Any]) -> AsyncGenerator[Any, None]:
        """What is set, whenever it changes."""
        while True:
            self._set.clear()
            yield await self.setting(setting)
            await self._set.wait()
