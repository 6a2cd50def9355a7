"""Attempts that lose their reader: who lets go of them, who takes them over, and until when."""

import pytest
from google.protobuf.duration_pb2 import Duration

from sidecar.watchdog import LOOK_INTERVAL_S
from tests.sidecar.fakes import Desk
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2

CANCELLED = generation_pb2.FINISH_REASON_CANCELLED
FENCED = worker_pb2.FAILURE_KIND_FENCED
DRAIN = worker_pb2.FAILURE_KIND_DRAIN
PARTITION = worker_pb2.FAILURE_KIND_PARTITION
UNSPECIFIED = worker_pb2.FAILURE_KIND_UNSPECIFIED


def cancelled(slot: int, end_offset: int) -> attempt_pb2.AttemptEnded:
    return attempt_pb2.AttemptEnded(slot=slot, end_offset=end_offset, finish_reason=CANCELLED)


# Release.


def test_a_release_frees_what_was_left_behind_and_was_not_adopted() -> None:
    desk = Desk()
    old = desk.frontend()
    for name in ("left", "wanted"):
        old.start(name)
    other = desk.frontend("other")
    other.start("others")
    desk.step({1: 5, 2: 5, 3: 5})
    new = desk.frontend(life=(1, 2))
    wanted = new.adopt("wanted")
    started = new.start("started")
    new.release()
    assert desk.engine.aborted == [1]
    desk.step({1: 6, 2: 6, 3: 6, 4: 6})
    desk.end(cancelled(1, 2))
    new.read()
    other.read()
    assert new.tokens == {wanted: [5, 6], started: [6]}
    assert other.tokens == {1: [5, 6]}
    assert list(desk.hub.ledger.running) == [2, 3, 4]
    new.release()
    assert desk.engine.aborted == [1], "once"
    desk.check()


def test_what_was_released_is_told_as_lost_to_whoever_adopts_it_all_the_same() -> None:
    desk = Desk()
    desk.frontend().start()
    desk.step({1: 5})
    (new := desk.frontend(life=(1, 2))).release()
    desk.end(cancelled(1, 1))
    slot = new.adopt()
    new.read()
    assert new.tokens == {slot: [5]}
    assert new.ended[slot].failure == PARTITION


def test_a_new_life_of_a_frontend_does_not_free_what_an_earlier_one_left() -> None:
    desk = Desk()
    desk.hub.leave(desk.frontend().link)
    old = desk.frontend(life=(1, 2))
    old.start()
    desk.step({1: 5})
    desk.hub.leave(old.link)
    reborn = desk.frontend(life=(2, 1))
    reborn.release()
    assert desk.engine.aborted == []
    desk.tick(4.9)
    assert desk.engine.aborted == []
    slot = desk.frontend("third").adopt()
    assert slot == 1
    desk.check()


def test_what_another_frontend_adopted_is_not_released_by_its_first_owner() -> None:
    desk = Desk()
    desk.hub.leave((first := desk.frontend()).link)
    first = desk.frontend(life=(1, 2))
    first.start()
    desk.hub.leave(first.link)
    second = desk.frontend("second")
    second.adopt()
    desk.hub.leave(second.link)
    desk.frontend(life=(1, 3)).release()
    assert desk.engine.aborted == [], "it belongs to the second one now"
    desk.frontend("second", life=(1, 2)).release()
    assert desk.engine.aborted == [1]


def test_a_release_by_a_call_that_was_replaced_counts_for_nothing() -> None:
    desk = Desk()
    old = desk.frontend()
    old.start()
    new = desk.frontend(life=(1, 2))
    old.release()
    assert desk.engine.aborted == []
    new.release()
    assert desk.engine.aborted == [1]


# Cancels by name.


def test_a_cancel_by_name_frees_what_a_dead_frontend_left_behind_and_nothing_else() -> None:
    desk = Desk()
    dead = desk.frontend("dead")
    for name in ("cancelled", "kept"):
        dead.start(name)
    desk.step({1: 5, 2: 5})
    desk.hub.leave(dead.link)
    other = desk.frontend("other")
    other.cancel("cancelled", tenant="another")
    assert desk.engine.aborted == [], "it is not that tenant's"
    other.cancel("cancelled")
    assert desk.engine.aborted == [1]
    other.cancel("cancelled")
    assert desk.engine.aborted == [1], "once"
    slot = other.adopt("cancelled")
    desk.end(cancelled(1, 1))
    other.read()
    assert other.ended[slot].failure == FENCED, "it is final: nobody goes on with it elsewhere"
    assert list(desk.hub.ledger.running) == [2]
    desk.check()


def test_a_cancel_is_final_whatever_else_becomes_of_the_orphan() -> None:
    desk = Desk()
    dead = desk.frontend("dead")
    dead.start("late")
    desk.step({1: 5})
    desk.hub.leave(dead.link)
    other = desk.frontend("other")
    other.cancel("late")
    desk.tick(6.0)  # Its engine has not ended it when its grace is over.
    slot = other.adopt("late")
    desk.end(cancelled(1, 1))
    other.read()
    assert other.ended[slot].failure == FENCED


def test_what_is_read_is_left_to_its_reader_and_has_no_grace_without_it() -> None:
    desk = Desk()
    reader = desk.frontend("reader")
    reader.start()
    desk.step({1: 5})
    desk.frontend("other").cancel()
    desk.step({1: 6})
    reader.read()
    assert reader.tokens == {1: [5, 6]}
    assert desk.engine.aborted == []
    desk.hub.leave(reader.link)
    desk.tick(LOOK_INTERVAL_S)
    assert desk.engine.aborted == [1]
    desk.check()


def test_a_cancel_by_a_call_that_was_replaced_counts_for_nothing() -> None:
    desk = Desk()
    desk.hub.leave((dead := desk.frontend("dead")).link)
    dead = desk.frontend("dead", life=(1, 2))
    dead.start()
    desk.hub.leave(dead.link)
    old = desk.frontend("other")
    new = desk.frontend("other", life=(1, 2))
    old.cancel()
    assert desk.engine.aborted == []
    new.cancel()
    assert desk.engine.aborted == [1]


# Orphans.


def test_an_orphan_whose_window_is_full_waits_for_its_adopter_and_its_grace() -> None:
    desk = Desk()
    old = desk.frontend()
    old.start(window_tokens=2)
    desk.step({1: 5})
    desk.step({1: 6})
    desk.hub.leave(old.link)
    desk.tick(4.0)
    slot = (new := desk.frontend("new")).adopt(offset=1, window_tokens=2)
    assert desk.engine.acked == [(1, 1)], "it goes on where the adopter's window allows"
    desk.step({1: 7})
    new.read()
    assert new.tokens == {slot: [6, 7]}
    desk.hub.leave(new.link)
    desk.tick(4.9)
    assert desk.engine.aborted == []
    desk.tick(0.2)
    assert desk.engine.aborted == [1]
    desk.check()


def test_an_adopter_may_give_another_grace() -> None:
    desk = Desk()
    desk.frontend().start()
    second = desk.frontend("second")
    second.adopt(orphan_grace=Duration(seconds=20))
    desk.hub.leave(second.link)
    desk.tick(19)
    assert desk.engine.aborted == []
    third = desk.frontend("third")
    third.adopt(epoch=3)
    desk.hub.leave(third.link)
    desk.tick(19)
    assert desk.engine.aborted == [], "as before, if it does not say"
    desk.tick(1)
    assert desk.engine.aborted == [1]


def test_an_attempt_of_another_life_of_the_engine_is_not_what_was_meant() -> None:
    desk = Desk()
    desk.frontend().start()
    desk.step({1: 5})
    new = desk.frontend("new")
    refused = new.adopt(engine_incarnation=2)
    taken = new.adopt(epoch=3, engine_incarnation=1)
    new.read()
    assert new.refused[refused].kind == UNSPECIFIED
    assert "engine incarnation 2, got one of 1" in new.refused[refused].detail
    assert new.tokens == {taken: [5]}


# Deadlines.


def test_the_deadline_of_an_adopter_replaces_that_of_the_old_reader() -> None:
    desk = Desk()
    desk.frontend().start(deadline=Duration(seconds=60))
    desk.step({1: 5})
    slot = (new := desk.frontend("new")).adopt(deadline=Duration(seconds=2))
    desk.tick(1.9)
    assert desk.engine.aborted == []
    desk.tick(0.2)
    new.read()
    assert desk.engine.aborted == [1]
    assert new.ended[slot].finish_reason == CANCELLED
    assert new.ended[slot].end_offset == 1
    desk.tick(1)
    assert desk.engine.aborted == [1], "once"
    desk.end(cancelled(1, 1))
    third = (newest := desk.frontend("third")).adopt(epoch=3)
    newest.read()
    assert newest.ended[third].failure == DRAIN, "its own deadline has not passed"
    desk.check()


def test_the_engine_is_given_a_margin_less_and_at_least_half() -> None:
    desk = Desk()
    frontend = desk.frontend()
    deadlines = (Duration(seconds=2), Duration(nanos=4_000_000), Duration(), None)
    for number, deadline in enumerate(deadlines):
        frontend.start(f"r{number}", deadline=deadline)
    given = [start.deadline.ToMicroseconds() for start in desk.engine.started]
    assert given[:3] == pytest.approx([1_995_000, 2_000, 0], abs=1)
    assert not desk.engine.started[3].HasField("deadline")


def test_a_reader_hears_that_its_time_is_up_from_the_engine() -> None:
    desk = Desk()
    slot = (frontend := desk.frontend()).start(deadline=Duration(seconds=2))
    other = frontend.start("no deadline")
    desk.step({1: 5, 2: 5})
    desk.now += 1.995
    desk.end(cancelled(1, 1), cancelled(2, 1))  # The engine does not say why.
    frontend.read()
    assert frontend.ended[slot].finish_reason == CANCELLED
    assert frontend.ended[slot].is_expired
    assert not frontend.ended[other].is_expired
    assert desk.engine.aborted == []


def test_an_engine_that_lets_its_deadline_pass_is_told_and_so_is_the_reader() -> None:
    desk = Desk()
    slot = (frontend := desk.frontend()).start(deadline=Duration(seconds=2))
    desk.tick(1.999)
    assert desk.engine.aborted == []
    desk.tick(0.1)
    assert desk.engine.aborted == [1]
    frontend.read()
    assert frontend.ended[slot].is_expired
    desk.step({1: 5})
    desk.end(cancelled(1, 1))
    frontend.read()
    assert frontend.tokens == {}
    desk.check()


def test_an_engine_that_keeps_to_an_earlier_deadline_hands_the_stream_over() -> None:
    desk = Desk()
    desk.frontend().start(deadline=Duration(seconds=2))
    slot = (new := desk.frontend("new")).adopt(deadline=Duration(seconds=60))
    other = new.start("aborted", deadline=Duration(seconds=60))
    desk.hub.abort(new.link, other)
    desk.end(cancelled(2, 0))
    desk.tick(2)
    desk.end(cancelled(1, 0))
    new.read()
    assert new.ended[slot].failure == DRAIN
    assert new.ended[other].finish_reason == CANCELLED


def test_an_orphan_that_reaches_its_deadline_is_no_cancelled_stream_for_its_adopter() -> None:
    desk = Desk()
    old = desk.frontend()
    old.start(deadline=Duration(seconds=2))
    desk.hub.leave(old.link)
    desk.tick(2)
    desk.end(cancelled(1, 0))
    slot = (new := desk.frontend("new")).adopt()
    new.read()
    assert new.ended[slot].failure == DRAIN


# A sidecar that was stopped while its streams moved.


def test_a_zombie_says_nothing_on_its_new_call_and_frees_what_moved_away() -> None:
    desk = Desk()
    old = desk.frontend()
    slots = [old.start(f"r{index}") for index in range(3)]
    desk.step({1: 5, 2: 5, 3: 5})
    old.read()
    desk.now += 30  # It was stopped; its frontend has given it up, and calls again.
    desk.step({1: 6, 2: 6, 3: 6})
    new = desk.frontend(life=(1, 2))
    assert old.link.error is not None, "what it says there reaches nobody"
    new.release()
    assert desk.engine.aborted == [1, 2, 3]
    desk.step({1: 7, 2: 7, 3: 7})
    desk.end(*(cancelled(slot, 3) for slot in (1, 2, 3)))
    new.read()
    assert new.tokens == {}
    assert not desk.hub.ledger.running
    assert new.start("fresh") not in slots[1:]
    desk.check()


def test_a_stalled_engine_frees_what_was_released_when_it_goes_on() -> None:
    desk = Desk()
    desk.frontend().start(window_tokens=100)
    desk.step({1: 5})
    desk.watch(20 + LOOK_INTERVAL_S)
    assert not desk.hub.takes_work
    new = desk.frontend(life=(1, 2))
    new.release()
    desk.step({1: 6})
    desk.end(cancelled(1, 2))
    new.read()
    assert desk.hub.takes_work
    assert not desk.hub.ledger.running
    assert new.tokens == {}
