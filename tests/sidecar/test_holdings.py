"""What a sidecar says to hold is what its attempts hold, and nothing after them."""

from collections import Counter

from tests.sidecar.fakes import Desk, failed
from unbroken.holdings import Holding, Kind
from unbroken.outcome import FailureKind
from unbroken.v1 import attempt_pb2, generation_pb2

BLOCK_SIZE = 4  # Of the scripted engine.


def finished(slot: int, end_offset: int) -> attempt_pb2.AttemptEnded:
    return attempt_pb2.AttemptEnded(
        slot=slot, end_offset=end_offset, finish_reason=generation_pb2.FINISH_REASON_LENGTH
    )


def kinds(desk: Desk) -> Counter[Kind]:
    return Counter(one.kind for one in desk.hub.holdings())


def of_kind(desk: Desk, kind: Kind) -> Holding:
    (one,) = [one for one in desk.hub.holdings() if one.kind is kind]
    return one


def test_an_attempt_holds_its_slot_its_blocks_and_room_until_its_prompt_is_computed() -> None:
    desk = Desk()
    frontend = desk.frontend()
    assert desk.hub.holdings() == []
    frontend.start("r", prompt=[1] * 10)
    assert kinds(desk) == Counter({Kind.ATTEMPT: 1, Kind.KV_BLOCKS: 1, Kind.RESERVATION: 1})
    assert of_kind(desk, Kind.RESERVATION).amount == 10
    assert of_kind(desk, Kind.ATTEMPT) == Holding(Kind.ATTEMPT, ("", "r", 0), 100.0, 1, 1)
    desk.now += 1
    desk.step({1: [5, 6, 7]})
    assert kinds(desk) == Counter({Kind.ATTEMPT: 1, Kind.KV_BLOCKS: 1})
    assert of_kind(desk, Kind.KV_BLOCKS).amount == -(-13 // BLOCK_SIZE)
    desk.end(finished(1, 3))
    assert desk.hub.holdings() == [], "what can be told again is remembered, not held"


def test_what_was_cancelled_is_held_until_the_engine_lets_it_go() -> None:
    desk = Desk()
    frontend = desk.frontend()
    slot = frontend.start("r", prompt=[1])
    desk.hub.abort(frontend.link, slot)
    assert kinds(desk)[Kind.ATTEMPT] == 1
    desk.end(attempt_pb2.AttemptEnded(slot=1, finish_reason=generation_pb2.FINISH_REASON_CANCELLED))
    assert desk.hub.holdings() == []


def test_without_its_frontend_it_is_an_orphan_and_then_aborted() -> None:
    desk = Desk()
    frontend = desk.frontend()
    frontend.start("r", prompt=[1])
    desk.hub.leave(frontend.link)
    assert of_kind(desk, Kind.ORPHAN).stream == ("", "r", 0)
    desk.tick(6.0)
    assert of_kind(desk, Kind.ATTEMPT).detail.startswith("aborted: nobody read it")
    desk.end(attempt_pb2.AttemptEnded(slot=1, finish_reason=generation_pb2.FINISH_REASON_CANCELLED))
    assert desk.hub.holdings() == []


def test_who_adopts_what_has_ended_holds_it_until_it_was_told_all() -> None:
    desk = Desk()
    frontend = desk.frontend()
    frontend.start("r", prompt=[1])
    desk.step({1: [5, 6, 7, 8]})
    desk.end(finished(1, 4))
    other = desk.frontend("g")
    slot = other.adopt("r", epoch=2, window_tokens=2)
    assert of_kind(desk, Kind.REPLAY).stream == ("", "r", 0)
    assert kinds(desk) == Counter({Kind.REPLAY: 1})
    other.ack(slot, 2)
    assert desk.hub.holdings() == []


def test_an_engine_that_dies_leaves_nothing_behind() -> None:
    desk = Desk()
    frontend = desk.frontend()
    for number in range(5):
        frontend.start(f"r{number}", prompt=[1] * number)
    desk.step({1: 5, 2: 6})
    desk.down()
    assert desk.hub.holdings() == []


def test_an_attempt_that_the_engine_fails_is_let_go() -> None:
    desk = Desk()
    desk.frontend().start("r", prompt=[1])
    desk.end(failed(1, 0, FailureKind.ENGINE_ERROR))
    assert desk.hub.holdings() == []
