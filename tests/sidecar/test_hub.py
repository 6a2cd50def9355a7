"""What the hub makes of an engine and of frontends: scripted, on a clock that a test moves."""

from collections.abc import Callable, Sequence

import pytest

from sidecar.ledger import Retention
from sidecar.watchdog import LOOK_INTERVAL_S
from tests.sidecar.fakes import VOCAB_SIZE, Desk, Frontend, engine_up, failed, start_of
from unbroken.errors import Reason, UnbrokenError
from unbroken.outcome import FailureKind
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2
from unbroken.v1 import relay_service_pb2 as pb

CANCELLED = generation_pb2.FINISH_REASON_CANCELLED
LENGTH = generation_pb2.FINISH_REASON_LENGTH


def finished(slot: int, end_offset: int, reason: int = LENGTH) -> attempt_pb2.AttemptEnded:
    message = attempt_pb2.AttemptEnded(slot=slot, end_offset=end_offset)
    message.finish_reason = reason  # pyright: ignore[reportAttributeAccessIssue]
    return message


# Two frontends and one engine.


def test_each_frontend_reads_its_own_streams_under_its_own_handles() -> None:
    desk = Desk()
    first, second = desk.frontend("a"), desk.frontend("b")
    slots = [(f, f.start(f"{f.link.frontend_id}{i}")) for i in range(3) for f in (first, second)]
    assert [start.slot for start in desk.engine.started] == [1, 2, 3, 4, 5, 6]
    assert [slot for _, slot in slots] == [1, 1, 2, 2, 3, 3]
    for step in range(3):
        desk.step({slot: 100 * step + slot for slot in (6, 1, 5, 2, 4, 3)})
    first.read()
    second.read()
    assert first.tokens == {1: [1, 101, 201], 2: [3, 103, 203], 3: [5, 105, 205]}
    assert second.tokens == {1: [2, 102, 202], 2: [4, 104, 204], 3: [6, 106, 206]}
    assert desk.hub.num_tokens == 18
    desk.check()


def test_a_step_is_one_frame_for_each_link() -> None:
    desk = Desk()
    first, second = desk.frontend("a"), desk.frontend("b")
    for index in range(10):
        first.start(f"a{index}")
        second.start(f"b{index}")
    kinds: list[str | None] = []
    for number in range(1, 5):
        desk.step(dict.fromkeys(range(1, 21), 7))
        kinds += [response.WhichOneof("response") for response in first.read()]
        assert len(kinds) == number
    assert kinds == ["frame", "frame", "frame", "next_tokens"], "once they are known"
    assert [r.WhichOneof("response") for r in second.read()] == ["frame"], "merged: it lagged"
    assert all(ids == [7] * 4 for ids in (*first.tokens.values(), *second.tokens.values()))


def test_rows_of_many_tokens_arrive_whole_however_the_writer_lags() -> None:
    desk = Desk()
    first, second = desk.frontend("a"), desk.frontend("b")
    first.start("a")
    second.start("b")
    desk.step({1: 1, 2: 50})
    desk.step({1: [2, 3, 4], 2: [51]})
    second.read()
    desk.step({2: [52, 53], 1: [5]})
    desk.step({1: 6, 2: 54})
    first.read()
    second.read()
    assert first.tokens == {1: [1, 2, 3, 4, 5, 6]}
    assert second.tokens == {1: [50, 51, 52, 53, 54]}


def test_a_slot_may_have_several_rows_in_a_frame() -> None:
    desk = Desk()
    frontend = desk.frontend()
    frontend.start()
    desk.hub.on_frame(
        attempt_pb2.StepFrame(slots=[1, 1, 1], offsets=[0, 1, 2], token_ids=[7, 8, 9])
    )
    frontend.read()
    assert frontend.tokens == {1: [7, 8, 9]}


def test_log_probabilities_go_with_their_tokens() -> None:
    desk = Desk()
    frontend = desk.frontend()
    slot = frontend.start()
    for offset in range(2):
        token = generation_pb2.TokenLogprobs(logprob=-1.5 - offset)
        desk.hub.on_frame(
            attempt_pb2.StepFrame(
                slots=[1],
                offsets=[offset],
                token_ids=[7],
                logprobs=[attempt_pb2.SlotLogprobs(slot=1, tokens=[token])],
            )
        )
    frontend.read()
    assert frontend.logprobs == {slot: [-1.5, -2.5]}


def test_an_end_comes_with_the_last_tokens_and_frees_the_handle() -> None:
    desk = Desk()
    frontend = desk.frontend()
    slot = frontend.start(first_offset=40)
    desk.hub.on_frame(
        attempt_pb2.StepFrame(slots=[1], offsets=[40], token_ids=[7], ended=[finished(1, 41)])
    )
    (response,) = frontend.read()
    assert response.frame.ended[0].slot == slot
    assert frontend.ended[slot].finish_reason == LENGTH
    assert not desk.hub.ledger.running
    frontend.hub.abort(frontend.link, slot)
    frontend.ack(slot, 41)
    assert (desk.engine.aborted, desk.engine.acked) == ([], [])
    desk.check()


# An engine that goes, and comes again.


def test_the_death_of_the_engine_ends_every_attempt_exactly_before_the_verdict() -> None:
    desk = Desk()
    frontend = desk.frontend()
    slots = [frontend.start(f"r{index}", first_offset=10 * index) for index in range(3)]
    desk.step({1: 5, 2: 6})
    desk.step({1: 7})
    desk.hub.load = worker_pb2.LoadReport(engine_steps_total=1)
    desk.down()
    frontend.read()
    assert frontend.order == ["frame", "verdict", "verdict"]
    assert [frontend.ended[slot].end_offset for slot in slots] == [2, 11, 20]
    kinds = {frontend.ended[slot].failure for slot in slots}
    assert kinds == {worker_pb2.FAILURE_KIND_CRASH}
    dead, starting = frontend.verdicts
    assert dead.state == worker_pb2.ENGINE_STATE_DEAD
    assert (dead.engine_incarnation, dead.failure) == (1, worker_pb2.FAILURE_KIND_CRASH)
    assert dead.detail == "killed by SIGKILL"
    assert starting.state == worker_pb2.ENGINE_STATE_STARTING
    assert desk.hub.load is None
    assert desk.hub.num_engine_failures == 1
    desk.check()


def test_an_engine_that_begins_to_work_beside_a_probe_has_all_its_time() -> None:
    desk = Desk()
    desk.hub.probe(start_of(0, "probe"))
    desk.watch(100.0)
    frontend = desk.frontend()
    frontend.start("a")
    desk.watch(2 * LOOK_INTERVAL_S)  # At the second one it would be certain.
    frontend.read()
    assert frontend.verdicts == []


def test_an_engine_that_is_given_up_does_not_start_again() -> None:
    desk = Desk()
    frontend = desk.frontend()
    desk.down(FailureKind.DRAIN, is_final=True)
    frontend.read()
    assert [v.state for v in frontend.verdicts] == [worker_pb2.ENGINE_STATE_DEAD]
    assert desk.hub.num_engine_failures == 0, "it was stopped on purpose"


def test_a_new_life_serves_under_its_own_incarnation() -> None:
    desk = Desk()
    changes = list[bool]()
    desk.hub.on_change.append(lambda: changes.append(desk.hub.up is not None))
    desk.down()
    desk.hub.on_up(engine_up(incarnation=2))
    assert changes == [False, False, True]
    frontend = desk.frontend()
    assert frontend.welcome.state == worker_pb2.ENGINE_STATE_SERVING
    assert frontend.welcome.engine_incarnation == 2
    assert frontend.welcome.description.model == "m"
    slot = frontend.start(epoch=9)
    desk.step({1: 7})
    frontend.read()
    assert frontend.tokens == {slot: [7]}


# An engine that breaks the contract.

Breach = Callable[[attempt_pb2.StepFrame], None]


def change(**columns: Sequence[object]) -> Breach:
    def breach(frame: attempt_pb2.StepFrame) -> None:
        frame.MergeFrom(attempt_pb2.StepFrame(**columns))  # pyright: ignore[reportArgumentType]

    return breach


BREACHES: dict[str, Breach] = {
    "unknown slot": change(slots=[9], offsets=[0], token_ids=[1]),
    "gap": change(slots=[3], offsets=[1], token_ids=[1]),
    "duplicate": change(slots=[2], offsets=[3], token_ids=[1]),
    "same row twice": change(slots=[3, 3], offsets=[0, 0], token_ids=[1, 1]),
    "too few offsets": change(slots=[3], token_ids=[1]),
    "too few tokens": change(slots=[3], offsets=[0]),
    "too many tokens": change(token_ids=[1]),
    "id beyond the vocabulary": change(slots=[3], offsets=[0], token_ids=[VOCAB_SIZE]),
    "too few counts": change(token_counts=[1]),
    "counts of nothing": change(token_counts=[2, 0]),
    "counts of more": change(token_counts=[1, 2]),
    "gap in rows of many": change(token_counts=[1, 1, 2], slots=[3], offsets=[1], token_ids=[1, 1]),
    "end at a wrong offset": change(ended=[finished(1, 3)]),
    "end of an unknown slot": change(ended=[finished(9, 0)]),
    "end of one twice": change(ended=[finished(1, 4), finished(1, 4)]),
    "end without a reason": change(ended=[attempt_pb2.AttemptEnded(slot=1, end_offset=4)]),
    "refusal after tokens": change(refused=[attempt_pb2.AttemptRefused(slot=1)]),
    "refusal of an unknown slot": change(refused=[attempt_pb2.AttemptRefused(slot=9)]),
    "too few log probabilities": change(logprobs=[attempt_pb2.SlotLogprobs(slot=1)]),
    "too many log probabilities": change(
        logprobs=[
            attempt_pb2.SlotLogprobs(slot=1, tokens=[generation_pb2.TokenLogprobs(logprob=1)] * 2)
        ]
    ),
    "log probabilities of an unknown slot": change(
        logprobs=[
            attempt_pb2.SlotLogprobs(slot=9, tokens=[generation_pb2.TokenLogprobs(logprob=1)])
        ]
    ),
    "unknown rank": change(kv_events=[worker_pb2.KvEvents(rank=2, stored=[1])]),
}


@pytest.mark.parametrize("name", BREACHES)
def test_nothing_of_a_frame_that_breaks_the_contract_is_believed(name: str) -> None:
    desk = Desk()
    frontend = desk.frontend()
    slots = [frontend.start(f"r{index}") for index in range(3)]
    desk.step({1: 5, 2: 6})
    desk.step({1: 5, 2: 6})
    frame = attempt_pb2.StepFrame(slots=[1, 2], offsets=[2, 2], token_ids=[7, 8])
    frame.load.engine_steps_total = 3
    desk.hub.on_frame(frame)  # So far it is well.
    assert desk.engine.failures == []
    frame.offsets[:] = [3, 3]
    BREACHES[name](frame)
    desk.hub.on_frame(frame)
    assert len(desk.engine.failures) == 1
    assert "expected" in desk.engine.failures[0]
    desk.check()
    desk.down(FailureKind.PROTOCOL)
    frontend.read()
    assert frontend.tokens == {1: [5, 5, 7], 2: [6, 6, 8]}
    assert [frontend.ended[slot].end_offset for slot in slots] == [3, 3, 0]
    kinds = {ended.failure for ended in frontend.ended.values()}
    assert kinds == {worker_pb2.FAILURE_KIND_PROTOCOL}


def test_an_engine_that_is_not_up_has_nothing_to_say() -> None:
    desk = Desk(is_up=False)
    desk.hub.on_frame(attempt_pb2.StepFrame())
    assert len(desk.engine.failures) == 1


# What is refused.


def test_a_refusal_of_the_engine_reaches_its_reader() -> None:
    desk = Desk()
    frontend = desk.frontend()
    frontend.start("other")
    slot = frontend.start()
    refused = attempt_pb2.AttemptRefused(
        slot=2, kind=worker_pb2.FAILURE_KIND_OVERLOAD, detail="full", epoch_known=4
    )
    refused.retry_after.FromMilliseconds(250)
    desk.hub.on_frame(attempt_pb2.StepFrame(refused=[refused]))
    frontend.read()
    expected = attempt_pb2.AttemptRefused()
    expected.CopyFrom(refused)
    expected.slot = slot
    assert frontend.refused == {slot: expected}
    assert frontend.ended == {}, "a refusal is the last word"
    assert list(desk.hub.ledger.running) == [1]
    desk.check()


def test_no_attempt_begins_without_an_engine() -> None:
    desk = Desk(is_up=False)
    frontend = desk.frontend()
    slot = frontend.start()
    frontend.read()
    assert frontend.refused[slot].kind == worker_pb2.FAILURE_KIND_CRASH
    assert "ENGINE_STATE_STARTING" in frontend.refused[slot].detail
    assert desk.engine.started == []


def test_an_attempt_meant_for_another_life_of_the_engine_is_fenced() -> None:
    desk = Desk()
    frontend = desk.frontend()
    for engine_incarnation in (1, 2):
        message = start_of(frontend.link.slot_used + 1, "r", engine_incarnation)
        message.engine_incarnation = engine_incarnation
        desk.hub.start(frontend.link, message)
    frontend.read()
    assert frontend.refused[2].kind == worker_pb2.FAILURE_KIND_FENCED
    assert list(frontend.refused) == [2]


def test_an_old_epoch_is_fenced_and_told_which_is_known() -> None:
    desk = Desk()
    old, new = desk.frontend("old"), desk.frontend("new")
    new.start(epoch=7)
    slot = old.start(epoch=6)
    old.read()
    assert old.refused[slot].kind == worker_pb2.FAILURE_KIND_FENCED
    assert old.refused[slot].epoch_known == 7
    assert len(desk.engine.started) == 1
    assert desk.engine.aborted == []


@pytest.mark.parametrize(("request_id", "tenant"), [("", ""), ("r" * 129, ""), ("r", "t" * 129)])
def test_ids_that_would_fill_the_memory_are_refused(request_id: str, tenant: str) -> None:
    desk = Desk()
    frontend = desk.frontend()
    slot = frontend.start(request_id, tenant=tenant)
    frontend.read()
    assert frontend.refused[slot].kind == worker_pb2.FAILURE_KIND_REJECTED


# Who may say what.


def test_a_newer_epoch_ends_the_attempt_of_the_old_one_for_its_reader_at_once() -> None:
    desk = Desk()
    old, new = desk.frontend("old"), desk.frontend("new")
    old_slot = old.start(epoch=1)
    desk.step({1: 5})
    new_slot = new.start(epoch=2, first_offset=1)
    old.read()
    assert old.ended[old_slot].failure == worker_pb2.FAILURE_KIND_FENCED
    assert desk.engine.aborted == [1]
    desk.step({1: 99, 2: 6})  # It had not heard yet.
    desk.end(finished(1, 2, CANCELLED))
    assert old.read() == []
    new.read()
    assert new.tokens == {new_slot: [6]}
    desk.check()


def test_an_abort_reaches_the_engine_and_an_unknown_slot_is_no_error() -> None:
    desk = Desk()
    frontend = desk.frontend()
    slot = frontend.start()
    desk.hub.abort(frontend.link, 77)
    desk.hub.abort(frontend.link, slot)
    assert desk.engine.aborted == [1]
    desk.end(finished(1, 0, CANCELLED))
    frontend.read()
    assert frontend.ended[slot].finish_reason == CANCELLED
    assert frontend.link.error is None


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_a_handle_that_is_not_above_the_last_closes_that_link_alone(slot: int) -> None:
    desk = Desk()
    first, second = desk.frontend("a"), desk.frontend("b")
    first.start("a0")
    first.start("a1")
    second.start("b")
    desk.hub.start(first.link, start_of(slot, "a2"))
    assert first.link.error is not None
    assert first.link.error.reason is Reason.PROTOCOL_VIOLATION
    assert second.link.error is None
    assert len(desk.engine.started) == 3
    desk.tick()
    assert list(desk.hub.links) == [second.link]
    desk.check()


def test_acks_move_windows_under_the_handles_of_the_engine() -> None:
    desk = Desk()
    frontend = desk.frontend()
    frontend.start("a")
    frontend.start("b")
    message = attempt_pb2.AckAttempts(slots=[2, 77, 1], offsets=[5, 6, 7])
    desk.hub.ack(frontend.link, message)
    assert desk.engine.acked == [(2, 5), (1, 7)]


def test_acks_of_unequal_columns_close_the_link() -> None:
    desk = Desk()
    frontend = desk.frontend()
    frontend.start()
    desk.hub.ack(frontend.link, attempt_pb2.AckAttempts(slots=[1], offsets=[1, 2]))
    assert frontend.link.error is not None
    assert frontend.link.error.reason is Reason.PROTOCOL_VIOLATION
    assert desk.engine.acked == []


def test_a_newer_call_of_a_frontend_replaces_the_old_one() -> None:
    desk = Desk()
    old = desk.frontend(life=(5, 1))
    old.start()
    desk.frontend(life=(5, 2))
    assert old.link.error is not None
    assert old.link.error.reason is Reason.FENCED
    late = start_of(2, "late")
    desk.hub.start(old.link, late)  # It was on its way.
    desk.hub.adopt(old.link, _adoption(3))
    assert len(desk.engine.started) == 1
    attempt = desk.hub.ledger.running[1]
    assert attempt.orphaned_until == desk.now + 5.0
    desk.check()


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("life", [(5, 1), (5, 2), (4, 9)])
def test_an_older_call_of_a_frontend_is_refused(life: tuple[int, int], is_open: bool) -> None:
    desk = Desk()
    newest = desk.frontend(life=(5, 2))
    if not is_open:
        desk.hub.leave(newest.link)
    with pytest.raises(UnbrokenError) as caught:
        desk.frontend(life=life)
    assert caught.value.reason is Reason.FENCED
    assert newest.link.error is None
    desk.frontend("another", life=life)


# Attempts whose frontend is gone.


def test_an_orphan_goes_on_and_is_aborted_after_its_grace() -> None:
    desk = Desk()
    frontend = desk.frontend()
    frontend.start("a")
    short = start_of(2, "b")
    short.orphan_grace.FromSeconds(1)
    desk.hub.start(frontend.link, short)
    desk.hub.leave(frontend.link)
    desk.step({1: 7, 2: 7})
    desk.tick(0.9)
    assert desk.engine.aborted == []
    desk.tick(0.2)
    assert desk.engine.aborted == [2]
    desk.tick(5)
    desk.tick(5)
    assert desk.engine.aborted == [2, 1]
    desk.end(finished(1, 1, CANCELLED), finished(2, 1, CANCELLED))
    desk.check()


def test_an_orphan_that_was_given_up_is_not_told_as_cancelled() -> None:
    desk = Desk()
    desk.hub.leave(_with_stream(desk).link)
    desk.step({1: 7})
    desk.tick(6)
    desk.end(finished(1, 1, CANCELLED))
    adopter = desk.frontend("g")
    slot = adopter.adopt()
    adopter.read()
    assert adopter.tokens == {slot: [7]}
    assert adopter.ended[slot].failure == worker_pb2.FAILURE_KIND_PARTITION


def _with_stream(desk: Desk, **more: object) -> Frontend:
    frontend = desk.frontend()
    frontend.start(**more)  # pyright: ignore[reportArgumentType]
    return frontend


def _adoption(slot: int) -> pb.AdoptAttempt:
    return pb.AdoptAttempt(slot=slot, stream=attempt_pb2.StreamKey(request_id="r"), epoch=50)


# Adoption.


def test_an_adopter_reads_on_where_it_says_and_the_old_reader_is_fenced() -> None:
    desk = Desk()
    old = _with_stream(desk, first_offset=10, prompt=[1, 2])
    for token_id in (5, 6, 7):
        desk.step({1: token_id})
    new = desk.frontend("new")
    slot = new.adopt(offset=11)
    desk.step({1: 8})
    old.read()
    new.read()
    assert old.tokens == {1: [5, 6, 7]}
    assert old.ended[1].failure == worker_pb2.FAILURE_KIND_FENCED
    assert new.order == ["adopted", "frame"]
    assert new.adopted[slot].end_offset == 13
    assert list(new.adopted[slot].checkpoint.prompt_token_ids) == [1, 2]
    assert new.tokens == {slot: [6, 7, 8]}
    desk.end(finished(1, 14))
    new.read()
    assert new.ended[slot].finish_reason == LENGTH
    desk.check()


def test_an_orphan_that_is_adopted_is_not_aborted() -> None:
    desk = Desk()
    desk.hub.leave(_with_stream(desk).link)
    new = desk.frontend("new")
    slot = new.adopt()
    desk.tick(100)
    assert desk.engine.aborted == []
    desk.step({1: 7})
    new.read()
    assert new.tokens == {slot: [7]}
    assert list(new.link.by_slot) == [slot]
    desk.check()


def test_what_has_ended_is_told_again() -> None:
    desk = Desk()
    frontend = _with_stream(desk)
    desk.step({1: 7})
    desk.end(finished(1, 1))
    desk.hub.leave(frontend.link)
    for epoch in (2, 3):
        new = desk.frontend(f"new{epoch}")
        slot = new.adopt(epoch=epoch)
        new.read()
        assert new.tokens == {slot: [7]}
        assert new.ended[slot].finish_reason == LENGTH
        assert new.link.by_slot == {}
        desk.check()
    assert desk.engine.acked == []


def test_what_was_lost_with_the_engine_is_told_up_to_where_it_got() -> None:
    desk = Desk()
    frontend = _with_stream(desk)
    desk.step({1: 7})
    desk.hub.leave(frontend.link)
    desk.down()
    new = desk.frontend("new")
    slot = new.adopt()
    new.read()
    assert new.tokens == {slot: [7]}
    assert new.ended[slot].failure == worker_pb2.FAILURE_KIND_CRASH


@pytest.mark.parametrize(
    ("request_id", "epoch", "offset", "kind", "epoch_known"),
    [
        ("unknown", 2, 0, worker_pb2.FAILURE_KIND_UNSPECIFIED, 0),
        ("r", 2, 2, worker_pb2.FAILURE_KIND_PROTOCOL, 0),
        ("r", 1, 0, worker_pb2.FAILURE_KIND_FENCED, 1),
    ],
)
def test_an_adoption_that_cannot_be_is_refused_and_changes_nothing(
    request_id: str, epoch: int, offset: int, kind: int, epoch_known: int
) -> None:
    desk = Desk()
    old = _with_stream(desk)
    desk.step({1: 7})
    new = desk.frontend("new")
    slot = new.adopt(request_id, epoch, offset)
    new.read()
    assert new.refused[slot].kind == kind
    assert new.refused[slot].epoch_known == epoch_known
    desk.step({1: 8})
    old.read()
    assert old.tokens == {1: [7, 8]}
    desk.check()


def test_log_probabilities_are_told_again_with_their_tokens() -> None:
    desk = Desk()
    frontend = desk.frontend()
    start = start_of(1)
    start.checkpoint.params.logprobs.num_top = 2
    desk.hub.start(frontend.link, start)
    for offset in range(3):
        step_with_logprobs(desk, offset)
    slot = (new := desk.frontend("new")).adopt(offset=1, window_tokens=2)
    step_with_logprobs(desk, 3)
    new.read()
    assert (new.tokens, new.logprobs) == ({slot: [7, 7]}, {slot: [-1.0, -2.0]})
    new.ack(slot, 3)
    step_with_logprobs(desk, 4)
    new.read()
    assert new.logprobs == {slot: [-1.0, -2.0, -3.0, -4.0]}
    desk.end(finished(1, 5))
    desk.check()
    again = (newest := desk.frontend("newest")).adopt(epoch=3)
    newest.read()
    assert newest.logprobs == {again: [0.0, -1.0, -2.0, -3.0, -4.0]}
    assert newest.ended[again].finish_reason == LENGTH


def test_a_long_output_with_log_probabilities_is_told_again_in_frames_that_can_be_read() -> None:
    desk = Desk()
    frontend = desk.frontend()
    start = start_of(1)
    start.checkpoint.params.logprobs.num_top = 20
    desk.hub.start(frontend.link, start)
    token = generation_pb2.TokenLogprobs(
        logprob=-1.5, top_token_ids=range(300, 320), top_logprobs=[-1.5] * 20
    )
    num_tokens = 70_000
    desk.hub.on_frame(
        attempt_pb2.StepFrame(
            slots=[1],
            offsets=[0],
            token_counts=[num_tokens],
            token_ids=[7] * num_tokens,
            logprobs=[attempt_pb2.SlotLogprobs(slot=1, tokens=[token] * num_tokens)],
        )
    )
    slot = (new := desk.frontend("new")).adopt()
    responses = new.read()
    assert len(new.logprobs[slot]) == len(new.tokens[slot]) == num_tokens
    assert max(response.ByteSize() for response in responses) < 8 * 1024 * 1024
    assert sum(response.ByteSize() for response in responses) > 8 * 1024 * 1024


def step_with_logprobs(desk: Desk, offset: int) -> None:
    token = generation_pb2.TokenLogprobs(logprob=-offset)
    desk.hub.on_frame(
        attempt_pb2.StepFrame(
            slots=[1],
            offsets=[offset],
            token_ids=[7],
            logprobs=[attempt_pb2.SlotLogprobs(slot=1, tokens=[token])],
        )
    )


def test_an_adopter_is_sent_no_more_than_its_window() -> None:
    desk = Desk()
    _with_stream(desk)  # Without a window: the engine never waits.
    for token_id in range(5):
        desk.step({1: token_id})
    new = desk.frontend("new")
    slot = new.adopt(offset=1, window_tokens=2)
    new.read()
    assert new.tokens == {slot: [1, 2]}
    new.ack(slot, 2)
    desk.step({1: 5})
    new.read()
    assert new.tokens == {slot: [1, 2, 3]}
    desk.end(finished(1, 6))
    new.read()
    assert new.ended == {}, "it lacks tokens"
    new.ack(slot, 1)  # Acks never move back.
    new.ack(slot, 5)
    new.read()
    assert new.tokens == {slot: [1, 2, 3, 4, 5]}
    assert new.ended[slot].finish_reason == LENGTH
    desk.check()


def test_an_adopter_with_the_window_of_the_old_reader_is_sent_tokens_as_they_come() -> None:
    desk = Desk()
    old = _with_stream(desk, window_tokens=4)
    for token_id in range(6):
        desk.step({1: token_id})
        old.ack(1, token_id)  # The engine may produce up to offset 9 now.
    new = desk.frontend("new")
    slot = new.adopt(offset=2, window_tokens=4)
    new.read()
    assert new.tokens == {slot: [2, 3, 4, 5]}
    attempt = desk.hub.ledger.running[1]
    desk.step({1: 6})
    assert new.read() == [], "the engine still has the window of the old reader"
    new.ack(slot, 6)
    assert attempt.replay is None
    desk.step({1: 7})
    new.read()
    assert new.tokens == {slot: [2, 3, 4, 5, 6, 7]}
    desk.check()


@pytest.mark.parametrize("how", ["death", "drain", "abort", "adoption", "loss"])
@pytest.mark.parametrize("has_ended", [True, False])
def test_an_adopter_that_lacks_tokens_ends_at_what_it_was_sent(how: str, has_ended: bool) -> None:
    desk = Desk()
    _with_stream(desk)
    for token_id in range(5):
        desk.step({1: token_id})
    new = desk.frontend("new")
    slot = new.adopt(window_tokens=2)
    if has_ended:
        desk.end(finished(1, 5))
    match how:
        case "death":
            desk.down()
        case "drain":
            desk.hub.drain()
        case "abort":
            desk.hub.abort(new.link, slot)
            if not has_ended:
                desk.end(finished(1, 5, CANCELLED))
        case "adoption":
            newest = desk.frontend("newest")
            again = newest.adopt(epoch=3, offset=4)
            newest.read()
            assert newest.tokens == {again: [4]}
        case _:
            desk.hub.leave(new.link)
            desk.hub.on_frame(attempt_pb2.StepFrame())  # Nobody is replayed to any more.
            assert new.read(), "what was told before"
            assert new.ended == {}
            desk.check()
            return
    new.read()
    assert new.tokens == {slot: [0, 1]}
    assert new.ended[slot].end_offset == 2
    desk.check()


# Time, drain, prefixes.


def test_a_drain_hands_every_stream_over_exactly_and_takes_nothing_new() -> None:
    desk = Desk()
    frontend = desk.frontend()
    slots = [frontend.start(f"r{index}") for index in range(2)]
    desk.step({1: 7})
    desk.hub.drain()
    late = frontend.start("late")
    adopted = frontend.adopt("r0", epoch=5)
    frontend.read()
    assert frontend.verdicts[-1].is_draining
    assert frontend.verdicts[-1].HasField("drain_budget")
    assert frontend.verdicts[-1].state == worker_pb2.ENGINE_STATE_SERVING
    assert [frontend.ended[slot].end_offset for slot in slots] == [1, 0]
    drain = worker_pb2.FAILURE_KIND_DRAIN
    assert {frontend.ended[slot].failure for slot in slots} == {drain}
    assert frontend.refused[late].kind == frontend.refused[adopted].kind == drain
    assert desk.engine.aborted == [1, 2]
    desk.end(finished(1, 1, CANCELLED), finished(2, 0, CANCELLED))
    desk.down(FailureKind.DRAIN, is_final=True)
    frontend.read()
    assert frontend.verdicts[-1].is_draining
    desk.check()


def test_a_drain_with_time_lets_what_runs_go_on_and_be_adopted() -> None:
    desk = Desk()
    frontend, other = desk.frontend("f"), desk.frontend("other")
    slot = frontend.start("r")
    desk.hub.drain(None)
    late = frontend.start("late")
    adopted = other.adopt("r", epoch=5)
    desk.step({1: 7})
    frontend.read()
    other.read()
    assert frontend.verdicts[-1].is_draining
    assert not frontend.verdicts[-1].HasField("drain_budget"), "it may finish"
    assert frontend.refused[late].kind == worker_pb2.FAILURE_KIND_DRAIN
    assert frontend.ended[slot].failure == worker_pb2.FAILURE_KIND_FENCED
    assert other.tokens == {adopted: [7]}
    assert desk.hub.num_left == 1
    desk.end(finished(1, 1))
    assert (desk.hub.num_left, desk.hub.num_drained, desk.hub.num_handed_over) == (0, 1, 0)
    desk.check()


def test_frontends_are_told_how_much_of_the_budget_is_left() -> None:
    desk = Desk()
    early = desk.frontend("early")
    slot = early.start()
    desk.hub.drain(5.0)
    desk.now += 2
    late = desk.frontend("late")
    early.read()
    assert early.verdicts[-1].drain_budget.ToMilliseconds() == 5000
    assert late.welcome.is_draining
    assert late.welcome.drain_budget.ToMilliseconds() == 3000
    assert desk.hub.num_left == 1
    desk.hub.drain()
    early.read()
    assert early.verdicts[-1].drain_budget.ToMilliseconds() == 0
    assert early.ended[slot].failure == worker_pb2.FAILURE_KIND_DRAIN
    assert (desk.hub.num_left, desk.hub.num_drained, desk.hub.num_handed_over) == (0, 0, 1)
    desk.hub.drain(None)
    early.read()
    assert early.verdicts[-1].HasField("drain_budget"), "what was handed over stays so"
    desk.check()


def test_whoever_drains_hears_of_each_attempt_that_is_over() -> None:
    desk = Desk()
    frontend, other = desk.frontend("f"), desk.frontend("other")
    left: list[int] = []
    desk.hub.on_over.append(lambda: left.append(desk.hub.num_left))
    for index in range(3):
        frontend.start(f"r{index}")
    desk.end(finished(1, 0))
    assert left == [], "nobody drains"
    desk.hub.drain(None)
    other.adopt("r1", epoch=5, window_tokens=1)
    desk.step({2: [7, 8], 3: 7})
    desk.end(finished(2, 2))
    assert desk.hub.num_left == 2, "its reader lacks tokens"
    desk.hub.leave(other.link)
    assert left[-1] == 1
    desk.down()
    assert left[-1] == 0
    desk.check()


def test_a_heartbeat_is_sent_every_tick_whatever_else_is() -> None:
    desk = Desk()
    frontend = desk.frontend()
    frontend.start()
    desk.hub.on_frame(attempt_pb2.StepFrame(load=worker_pb2.LoadReport(engine_steps_total=9)))
    for _ in range(3):
        desk.step({1: 7})
        desk.tick()
        frontend.read()
    assert frontend.order == ["frame", "heartbeat"] * 3
    assert frontend.heartbeats[-1].load.engine_steps_total == 9


def test_a_frontend_that_falls_silent_is_lost() -> None:
    desk = Desk()
    silent, lively = desk.frontend("silent"), desk.frontend("lively")
    silent.start()
    for _ in range(11):
        lively.link.heard_at = desk.now
        desk.tick(0.1, silence_max_s=1.0)
    assert silent.link.error is not None
    assert silent.link.error.reason is Reason.UNREACHABLE
    assert list(desk.hub.links) == [lively.link]
    assert desk.hub.ledger.running[1].orphaned_until == pytest.approx(desk.now + 5)
    desk.check()


def test_nobody_is_lost_because_this_process_stood_still() -> None:
    desk = Desk()
    frontend = desk.frontend()
    desk.tick(0.1, silence_max_s=1.0)
    desk.tick(60, silence_max_s=1.0)
    assert frontend.link.error is None
    desk.tick(0.1, silence_max_s=1.0)
    assert frontend.link.error is not None, "it had its chance"


def test_a_late_joiner_is_told_the_prefixes_of_every_rank() -> None:
    desk = Desk()
    early = desk.frontend("early")
    events = [
        worker_pb2.KvEvents(rank=0, reset=True, stored=[1, 2, 3]),
        worker_pb2.KvEvents(rank=1, reset=True, stored=[9]),
        worker_pb2.KvEvents(rank=0, stored=[4], removed=[1]),
        worker_pb2.KvEvents(rank=1, reset=True),
    ]
    desk.hub.on_frame(attempt_pb2.StepFrame(kv_events=events[:2]))
    desk.hub.on_frame(attempt_pb2.StepFrame(kv_events=events[2:]))
    early.read()
    assert early.kv_events == events
    late = desk.frontend("late")
    late.read()
    assert [(e.rank, e.reset, sorted(e.stored)) for e in late.kv_events] == [
        (0, True, [2, 3, 4]),
        (1, True, []),
    ]
    desk.down()
    last = desk.frontend("last")
    assert last.read() == [], "they went with the engine"


def test_a_large_snapshot_of_prefixes_spans_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.hub._KV_HASHES_MAX", 10)
    desk = Desk()
    stored = worker_pb2.KvEvents(stored=range(25))
    desk.hub.on_frame(attempt_pb2.StepFrame(kv_events=[stored]))
    late = desk.frontend()
    late.read()
    assert [event.reset for event in late.kv_events] == [True, False, False]
    assert sorted(h for event in late.kv_events for h in event.stored) == list(range(25))


def test_whoever_does_not_read_is_lost_and_its_attempts_are_orphans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sidecar.link.WAITING_BYTES_MAX", 1000)
    desk = Desk()
    stuck, other = desk.frontend("stuck"), desk.frontend("other")
    stuck.start("a")
    slot = other.start("b")
    for _ in range(100):
        desk.step({1: 7, 2: 7})
        other.read()
    desk.tick()
    assert list(desk.hub.links) == [other.link]
    assert other.tokens[slot] == [7] * 100
    assert desk.hub.ledger.running[1].orphaned_until is not None
    desk.check()


def test_the_account_counts_blocks_of_prompt_and_output() -> None:
    desk = Desk(retention=Retention())
    frontend = desk.frontend()
    frontend.start("a", prompt=range(3))
    frontend.start("b", prompt=range(4))
    assert desk.hub.accounted_blocks() == 2
    desk.step({1: 7, 2: 7})
    assert desk.hub.accounted_blocks() == 3
    desk.end(finished(1, 1), failed(2, 1, FailureKind.ENGINE_ERROR))
    assert desk.hub.accounted_blocks() == 0


# Thresholds.


def push(frontend: Frontend, limit: int, version: int = 0) -> None:
    thresholds = worker_pb2.BusyThresholds(prefill_tokens=limit)
    message = pb.PushThresholds(thresholds=thresholds, version=version)
    frontend.hub.learn_thresholds(frontend.link, message)


def begin(frontend: Frontend, request_id: str, num_tokens: int, *, is_new: bool = True) -> int:
    slot = frontend.new_slot()
    message = start_of(slot, request_id, prompt=range(num_tokens))
    message.is_new_work = is_new
    frontend.hub.start(frontend.link, message)
    return slot


def test_new_work_beyond_a_threshold_is_refused_and_told_what_there_is() -> None:
    desk = Desk()
    first, second = desk.frontend("a"), desk.frontend("b")
    push(first, 10, version=2)
    begin(first, "a", 30)  # Two ranks, 15 each.
    refused = begin(second, "b", 1)
    second.read()
    verdict = second.refused[refused]
    assert verdict.kind == worker_pb2.FAILURE_KIND_OVERLOAD
    assert "prefill_tokens of rank 0 is 15, above 10" in verdict.detail
    assert verdict.busy.version == 2
    assert verdict.busy.thresholds.prefill_tokens == 10
    assert [rank.prefill_tokens_queued for rank in verdict.busy.load.ranks] == [15, 15]
    assert len(desk.engine.started) == 1
    assert (desk.hub.num_shed, desk.hub.faults.per_second(desk.now)) == (1, 0.0)
    desk.check()


def test_what_was_admitted_before_is_not_refused_by_thresholds() -> None:
    desk = Desk()
    frontend = desk.frontend()
    push(frontend, 10)
    begin(frontend, "a", 30)
    begin(frontend, "b", 30, is_new=False)
    assert len(desk.engine.started) == 2
    assert begin(frontend, "c", 1)
    assert len(desk.engine.started) == 2


def test_a_refusal_by_thresholds_takes_no_epoch() -> None:
    desk = Desk()
    frontend = desk.frontend()
    push(frontend, 10)
    begin(frontend, "a", 30)
    begin(frontend, "b", 1)
    desk.step({1: 5})
    begin(frontend, "b", 1)
    frontend.read()
    assert [start.stream.request_id for start in desk.engine.started] == ["a", "b"]


def test_thresholds_of_a_link_that_has_gone_count_no_more() -> None:
    desk = Desk()
    first, second = desk.frontend("a"), desk.frontend("b")
    push(first, 10)
    push(second, 1000)
    begin(second, "x", 100)
    begin(first, "a", 1)
    desk.hub.leave(first.link)
    begin(second, "b", 1)
    assert len(desk.engine.started) == 2


def test_a_frontend_that_pushes_nonsense_loses_its_call() -> None:
    desk = Desk()
    frontend = desk.frontend()
    thresholds = worker_pb2.BusyThresholds(kv_blocks_share=float("nan"))
    desk.hub.learn_thresholds(frontend.link, pb.PushThresholds(thresholds=thresholds))
    assert frontend.link.error is not None
    assert frontend.link.error.reason is Reason.PROTOCOL_VIOLATION
