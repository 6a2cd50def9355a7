"""A Relay call on a clock that a test moves, and a wire that is none."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from random import Random
from typing import Any, cast

import pytest
from typing_extensions import override

from frontend.convoy import Convoy
from frontend.failure_detector import Rhythm
from frontend.mesh_view import MeshView
from frontend.metrics import FrontendMetrics
from frontend.outliers import Eject, OutlierLimits, Outliers
from frontend.relay_call import (
    PROTOCOL_VERSION,
    SAMPLE_INTERVAL_S,
    FrontendIdentity,
    LinkLimits,
    RelayCall,
    TokenizerStore,
)
from frontend.relay_wire import Wire
from frontend.stream import Abort, Command
from tests.frontend.worlds import run
from unbroken import metrics
from unbroken.recurring import EARLY
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2
from unbroken.v1 import relay_service_pb2 as pb

IDENTITY = worker_pb2.WorkerIdentity(worker_id="w1", incarnation=1)
LIMITS = LinkLimits()
INTERVAL_S = LIMITS.detector.heartbeat_interval_s


class NoWire(Wire):
    """Carries nothing."""

    @override
    async def converse(self) -> None:
        await asyncio.Event().wait()

    @override
    def wake(self) -> None:
        pass

    @override
    def hurry(self, num_waiting: int) -> None:
        pass

    @override
    def hurry_all(self) -> None:
        pass


class Peer:
    """A call that was welcomed, and what it says when it is asked."""

    def __init__(self) -> None:
        self.now = 100.0
        mesh = self.mesh = MeshView()
        self.outliers = Outliers(OutlierLimits(), Random(0))
        self.counted = FrontendMetrics(metrics.new_registry())
        worker = mesh.discovered(worker_pb2.WorkerRecord(identity=IDENTITY, address="there:1"))
        self.call = RelayCall(
            lambda _: NoWire(),
            worker,
            mesh,
            TokenizerStore(mesh, 1.0),
            FrontendIdentity("f", 1),
            LIMITS,
            call_number=1,
            rhythm=Rhythm(INTERVAL_S),
            observer=self.counted,
            outliers=self.outliers,
            on_moved=lambda: self.heard.append("moved"),
            clock=lambda: self.now,
        )
        self.heard: list[str] = []
        """What those outside of the call were told."""
        self._num_frames = 0

    def welcome(self) -> None:
        verdict = pb.EngineVerdict(state=worker_pb2.ENGINE_STATE_STARTING)
        welcome = pb.RelayWelcome(
            protocol_version=PROTOCOL_VERSION, identity=IDENTITY, verdict=verdict
        )
        self.call.receive(pb.RelayResponse(welcome=welcome))

    def frame(self, **columns: object) -> None:
        self._num_frames += 1
        frame = attempt_pb2.StepFrame(sequence=self._num_frames, **columns)  # pyright: ignore[reportArgumentType]
        self.call.receive(pb.RelayResponse(frame=frame))

    def next_tokens(self, *token_ids: int) -> None:
        self._num_frames += 1
        tokens = attempt_pb2.NextTokens(sequence=self._num_frames, token_ids=token_ids)
        self.call.receive(pb.RelayResponse(next_tokens=tokens))

    def said(self) -> list[str | None]:
        """Kinds of what it says now."""
        kinds: list[str | None] = []
        while (request := self.call.next_request()) is not None:
            kinds.append(request.WhichOneof("request"))
        return kinds


def detail_of(peer: Peer) -> str:
    """Why the call is over."""
    assert peer.call.outcome is not None, "it is over"
    return peer.call.outcome.detail


def played(scenario: Callable[[Peer], Coroutine[None, None, None]]) -> None:
    async def whole() -> None:
        peer = Peer()
        conversation = asyncio.create_task(peer.call.run())
        await asyncio.sleep(0)  # It begins, and
        await asyncio.sleep(0)  # so does its pulse.
        peer.welcome()
        assert peer.said() == ["hello"]
        await scenario(peer)
        conversation.cancel()
        await asyncio.gather(conversation, return_exceptions=True)

    run(whole())


def test_a_heartbeat_that_is_nearly_due_goes_out_with_a_frame() -> None:
    async def scenario(peer: Peer) -> None:
        peer.now += INTERVAL_S * (1 - EARLY) - 0.001
        peer.frame()
        assert peer.said() == []
        peer.now += 0.002
        peer.frame()
        assert peer.said() == ["heartbeat"]
        peer.frame()
        assert peer.said() == [], "once"

    played(scenario)


def test_a_call_that_ended_says_no_more_heartbeats() -> None:
    async def scenario(peer: Peer) -> None:
        peer.now += INTERVAL_S
        peer.call.receive(pb.RelayResponse(frame=attempt_pb2.StepFrame(sequence=99)))
        assert peer.call.is_over
        peer.frame()
        assert peer.said() == []

    played(scenario)


class Broken:
    """The ride of a stream that has a bug."""

    def __init__(self) -> None:
        self.is_on = True

    def step_out(self) -> None:
        if self.is_on:
            self.is_on = False
            raise ValueError("a bug")


class Streaming:
    """A stream, as far as the hot path needs one; `ride` is looked at after a bug in a convoy."""

    def __init__(self) -> None:
        self.ride: Broken | None = None
        self.token_ids: list[int] = []
        self.offsets: list[int] = []
        self.has_bug = False
        self.tokens: Callable[..., tuple[()]] = self._tokens
        """Told of several, or with log probabilities."""
        self.log: list[str] = []

    @property
    def ledger(self) -> list[int]:
        return self.token_ids

    @property
    def num_sent(self) -> int:
        return len(self.token_ids)

    def token(self, epoch: int, offset: int, token_id: int, now: float) -> tuple[()]:
        del epoch, now
        self.offsets.append(offset)
        self.token_ids.append(token_id)
        return ()

    def _tokens(self, _: int, offset: int, token_ids: Sequence[int], *__: object) -> tuple[()]:
        self.offsets += range(offset, offset + len(token_ids))
        self.token_ids += token_ids
        return ()

    def is_flowing(self, epoch: int) -> bool:
        del epoch
        return False

    def ended(self, epoch: int, *_: object, **__: object) -> tuple[Abort, ...]:
        if self.has_bug:
            raise ValueError("a bug")
        self.log.append(f"told {epoch}")
        return (Abort(epoch),)

    def lost(self, epoch: int, *_: object) -> tuple[Abort, ...]:
        return self.ended(epoch)


class Owning:
    """Who has a stream, and leaves the call when it has a bug."""

    def __init__(self, call: RelayCall, epoch: int = 1, *, wants_logprobs: bool = False) -> None:
        self.stream = Streaming()
        self._call = call
        request = pb.RelayRequest(start=attempt_pb2.StartAttempt(epoch=epoch))
        self._slot = call.start(
            cast("Any", self),
            request,
            vocab_size=10,
            wants_logprobs=wants_logprobs,
            num_prefill_tokens=1,
        )

    def obey(self, commands: Sequence[Command]) -> None:
        self.stream.log += [f"obeyed {command}" for command in commands]

    def crashed(self) -> None:
        self.stream.log.append("crashed")
        self._call.abort(self._slot)

    def wake(self) -> None:
        pass


def test_a_bug_of_one_stream_beside_one_of_the_convoy_is_not_the_others_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(peer: Peer) -> None:
        def fails(*_: object) -> None:
            raise ValueError("another bug")

        monkeypatch.setattr(Convoy, "go", fails)
        owners = [Owning(peer.call) for _ in range(4)]
        owners[1].stream.ride = Broken()
        frame = attempt_pb2.StepFrame(
            sequence=1, slots=[1, 2, 3, 4], offsets=[0] * 4, token_ids=[5, 6, 7, 8]
        )
        peer.call.receive(pb.RelayResponse(frame=frame))
        assert not peer.call.is_over
        others = [owner.stream.token_ids for owner in (owners[0], owners[2], owners[3])]
        assert others == [[5], [7], [8]]

    played(scenario)


def test_next_tokens_stand_after_those_of_the_frame_before() -> None:
    async def scenario(peer: Peer) -> None:
        owners = [Owning(peer.call) for _ in range(3)]
        peer.frame(slots=[1, 3], offsets=[0, 7], token_ids=[5, 6])
        peer.next_tokens(7, 8)
        peer.next_tokens(9, 1)
        peer.frame(slots=[2, 1], offsets=[4, 3], token_ids=[2, 3])
        peer.next_tokens(4, 5)
        seen = [(owner.stream.offsets, owner.stream.token_ids) for owner in owners]
        assert seen == [
            ([0, 1, 2, 3, 4], [5, 7, 9, 3, 5]),
            ([4, 5], [2, 4]),
            ([7, 8, 9], [6, 8, 1]),
        ]

    played(scenario)


def test_next_tokens_are_counted_and_tell_how_fast_the_worker_is() -> None:
    async def scenario(peer: Peer) -> None:
        Owning(peer.call)
        workers = ["w1", "w2", "w3", "w4"]
        peer.outliers.members(dict.fromkeys(workers, "m"), workers)
        peer.frame(slots=[1], offsets=[0], token_ids=[5])
        for _ in range(40):
            peer.now += SAMPLE_INTERVAL_S / 4
            peer.next_tokens(6)
            for other in workers[1:]:
                peer.outliers.inter_token(other, 0.01, peer.now)
        (ejected,) = peer.outliers.handle_timeout(peer.now)
        assert isinstance(ejected, Eject)
        assert ejected.worker_id == "w1"
        assert ejected.detail == "inter-token latency of 125.0 ms, 10.0 ms at its peers"
        assert peer.counted.tokens.value == 41

    played(scenario)


@pytest.mark.parametrize("is_before", [True, False])
def test_next_tokens_of_an_attempt_that_has_left_are_nobodys(*, is_before: bool) -> None:
    """Its sidecar does not know of that yet."""

    async def scenario(peer: Peer) -> None:
        owners = [Owning(peer.call) for _ in range(3)]
        if is_before:
            peer.call.abort(2)
        peer.frame(slots=[1, 2, 3], offsets=[0, 0, 0], token_ids=[5, 6, 7])
        peer.call.abort(2)
        peer.next_tokens(1, 2, 3)
        assert not peer.call.is_over
        seen = [owner.stream.token_ids for owner in owners]
        assert seen == [[5, 1], [] if is_before else [6], [7, 3]]

    played(scenario)


def test_a_frame_of_ends_alone_has_no_rows_to_come_again() -> None:
    async def scenario(peer: Peer) -> None:
        Owning(peer.call)
        peer.frame(slots=[1], offsets=[0], token_ids=[5])
        peer.frame()
        assert not peer.call.is_over
        peer.next_tokens(6)
        assert "expected an id for each of the 0 rows" in detail_of(peer)

    played(scenario)


@pytest.mark.parametrize(
    ("before", "token_ids", "detail"),
    [
        (None, [5, 6], "expected an id for each of the 0 rows before, got 2"),
        ([], [5], "expected an id for each of the 2 rows before, got 1"),
        ([], [5, 6, 7], "expected an id for each of the 2 rows before, got 3"),
        ([], [], "expected an id for each of the 2 rows before, got 0"),
        ([], [5, 10], "expected token ids below 10, got 10"),
        ([1, 1], [5, 6], "expected an id for each of the 0 rows before, got 2"),
        (None, [], "expected an id for each of the 0 rows before, got 0"),
    ],
    ids=["first", "fewer", "more", "none", "beyond", "counted", "nothing"],
)
def test_next_tokens_that_break_the_contract_cost_the_call(
    before: list[int] | None, token_ids: list[int], detail: str
) -> None:
    async def scenario(peer: Peer) -> None:
        for _ in range(2):
            Owning(peer.call)
        if before is not None:
            peer.frame(slots=[1, 2], offsets=[0, 0], token_ids=[5, 6], token_counts=before)
        assert not peer.call.is_over
        peer.next_tokens(*token_ids)
        assert detail in detail_of(peer)

    played(scenario)


def test_a_lost_frame_of_next_tokens_costs_the_call() -> None:
    async def scenario(peer: Peer) -> None:
        Owning(peer.call)
        peer.frame(slots=[1], offsets=[0], token_ids=[5])
        tokens = attempt_pb2.NextTokens(sequence=3, token_ids=[6])
        peer.call.receive(pb.RelayResponse(next_tokens=tokens))
        assert "expected frame 2, got 3" in detail_of(peer)

    played(scenario)


def test_next_tokens_may_come_beside_somebody_who_wants_log_probabilities() -> None:
    async def scenario(peer: Peer) -> None:
        plain = Owning(peer.call)
        Owning(peer.call, wants_logprobs=True)
        told: list[tuple[int, list[int]]] = []

        def tokens(_: int, offset: int, token_ids: list[int], *__: object) -> tuple[()]:
            told.append((offset, token_ids))
            return ()

        plain.stream.tokens = tokens
        peer.frame(slots=[1], offsets=[3], token_ids=[5])
        peer.next_tokens(7)
        peer.next_tokens(8)
        assert told == [(3, [5]), (4, [7]), (5, [8])]

    played(scenario)


@pytest.mark.parametrize("has_logprobs", [True, False])
def test_a_frame_with_log_probabilities_or_twice_a_slot_is_not_followed_by_next_tokens(
    *, has_logprobs: bool
) -> None:
    async def scenario(peer: Peer) -> None:
        Owning(peer.call, wants_logprobs=has_logprobs)
        for _ in range(2):
            Owning(peer.call)  # There are as many rows as attempts, or fewer.
        if has_logprobs:
            logprobs = attempt_pb2.SlotLogprobs(slot=1, tokens=[generation_pb2.TokenLogprobs()])
            peer.frame(slots=[1], offsets=[0], token_ids=[5], logprobs=[logprobs])
        else:
            peer.frame(slots=[1, 1], offsets=[0, 1], token_ids=[5, 6])
        assert not peer.call.is_over
        peer.next_tokens(7, 8)
        assert "expected an id for each of the 0 rows" in detail_of(peer)

    played(scenario)


def test_a_heartbeat_says_what_waits_now_and_not_what_waited_before() -> None:
    async def scenario(peer: Peer) -> None:
        queues = iter([pb.QueueReport(sequence=3), None])
        peer.mesh.queue_of = lambda _: next(queues)
        said: list[bool] = []
        for _ in range(2):
            peer.now += INTERVAL_S
            peer.frame()
            request = peer.call.next_request()
            assert request is not None
            said.append(request.heartbeat.HasField("queue"))
        assert said == [True, False]

    played(scenario)


CRASH = worker_pb2.FAILURE_KIND_CRASH


def ended(
    *slots: int, failure: worker_pb2.FailureKind.ValueType = CRASH, holder: str = ""
) -> pb.RelayResponse:
    frame = attempt_pb2.StepFrame(
        sequence=1,
        ended=[attempt_pb2.AttemptEnded(slot=slot, failure=failure) for slot in slots],
    )
    if holder:
        frame.load.kv_holder.address = holder
    return pb.RelayResponse(frame=frame)


def of_three(peer: Peer) -> list[Owning]:
    """Three streams of a call, by whose epochs they are told apart, and one log."""
    owners = [Owning(peer.call, epoch) for epoch in (1, 2, 3)]
    peer.heard.clear()
    for owner in owners:
        owner.stream.log = peer.heard
    return owners


def test_when_an_engine_dies_each_stream_goes_before_the_next_is_told_and_all_go_at_once() -> None:
    async def scenario(peer: Peer) -> None:
        of_three(peer)
        peer.call.receive(ended(1, 2, 3))
        moves = [[f"told {epoch}", f"obeyed {Abort(epoch)}"] for epoch in (1, 2, 3)]
        assert peer.heard == [*moves[0], *moves[1], *moves[2], "moved"]

    played(scenario)


def test_an_attempt_that_ends_while_the_engine_lives_hurries_nobody() -> None:
    async def scenario(peer: Peer) -> None:
        of_three(peer)
        peer.call.receive(ended(2, failure=worker_pb2.FAILURE_KIND_UNSPECIFIED))
        assert peer.heard == ["told 2", f"obeyed {Abort(2)}"]

    played(scenario)


def test_a_lost_call_hurries_others_if_it_had_streams() -> None:
    async def scenario(peer: Peer) -> None:
        of_three(peer)
        peer.call.closed(None)
        assert peer.heard[-2:] == [f"obeyed {Abort(3)}", "moved"]

    async def without(peer: Peer) -> None:
        peer.heard.clear()
        peer.call.closed(None)
        assert peer.heard == []

    played(scenario)
    played(without)


def test_a_bug_of_one_stream_at_the_death_of_its_engine_is_not_the_others_loss() -> None:
    async def scenario(peer: Peer) -> None:
        of_three(peer)[1].stream.has_bug = True
        peer.call.receive(ended(1, 2, 3))
        assert peer.heard[2:] == ["crashed", "told 3", f"obeyed {Abort(3)}", "moved"]
        assert not peer.call.is_over

    played(scenario)


def test_a_bug_of_one_ride_when_its_attempt_ends_is_not_the_others_loss() -> None:
    async def scenario(peer: Peer) -> None:
        of_three(peer)[1].stream.ride = Broken()
        peer.call.receive(ended(2, failure=worker_pb2.FAILURE_KIND_UNSPECIFIED))
        assert peer.heard[0] == "crashed"
        assert not peer.call.is_over

    played(scenario)


def test_a_frame_that_breaks_the_contract_ends_no_attempt_that_the_call_does_not_end() -> None:
    async def scenario(peer: Peer) -> None:
        of_three(peer)
        peer.call.receive(ended(1, 2, holder="x" * 10_000))
        assert peer.call.is_over
        assert [one for one in peer.heard if one.startswith("told")] == [
            "told 1",
            "told 2",
            "told 3",
        ]

    played(scenario)
