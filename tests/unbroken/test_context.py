"""Claims of `unbroken.context`."""

import asyncio

import pytest

from unbroken.context import Context
from unbroken.errors import Reason, UnbrokenError

WHY = UnbrokenError(Reason.CANCELLED, "as asked")
LATER = UnbrokenError(Reason.CANCELLED, "asked again")


def test_it_lives_until_it_is_stopped_and_says_why() -> None:
    context = Context("r")
    assert not context.is_stopped
    assert not context.is_killed
    context.check()
    context.stop(WHY)
    assert context.is_stopped
    assert not context.is_killed
    with pytest.raises(UnbrokenError, match="as asked"):
        context.check()


def test_who_is_killed_is_stopped_too() -> None:
    context = Context("r")
    context.kill(WHY)
    assert context.is_stopped
    assert context.is_killed


def test_each_state_is_told_once_and_never_taken_back() -> None:
    context = Context("r")
    told: list[bool] = []
    context.on_change.append(lambda: told.append(context.is_killed))
    context.stop(WHY)
    context.stop(LATER)
    assert context.error is WHY
    context.kill(LATER)
    context.kill(WHY)
    context.stop(WHY)
    assert told == [False, True]
    assert context.error is LATER


def test_all_below_end_with_it_parents_first_in_the_order_of_linking() -> None:
    root = Context("root")
    first, second = root.child("first"), root.child("second")
    below = first.child("below")
    told: list[str] = []
    for context in (below, second, first, root):
        context.on_change.append(lambda context=context: told.append(context.id))
    root.stop(WHY)
    assert told == ["root", "first", "second", "below"]
    assert not below.is_killed
    first.kill(LATER)
    assert below.is_killed
    assert not second.is_killed
    assert not root.is_killed, "nothing goes upwards"


def test_who_is_linked_late_ends_at_once() -> None:
    root, late = Context("root"), Context("late")
    root.kill(WHY)
    root.link(late)
    assert late.is_killed
    stopped, soft = Context("stopped"), Context("soft")
    stopped.stop(WHY)
    stopped.link(soft)
    assert soft.is_stopped
    assert not soft.is_killed


def test_who_has_left_ends_no_more_with_the_others() -> None:
    root = Context("root")
    middle = root.child("middle")
    below = middle.child("below")
    middle.close()
    root.kill(WHY)
    assert not middle.is_stopped
    assert not below.is_stopped
    assert not root.children
    other = root.child("other")
    root.unlink(other)
    assert not root.children


def test_a_ring_and_a_deep_tree_end_too() -> None:
    one, other = Context("one"), Context("other")
    one.link(other)
    other.link(one)
    one.kill(WHY)
    assert other.is_killed
    root = deepest = Context("0")
    for depth in range(1, 5_000):  # Deeper than the stack.
        deepest = deepest.child(str(depth))
    root.kill(WHY)
    assert deepest.is_killed


def test_a_callback_that_fails_keeps_nobody_from_hearing_of_it() -> None:
    root = Context("root")
    below = root.child("below")

    def fail() -> None:
        raise RuntimeError("a bug")

    root.on_change.append(fail)
    root.kill(WHY)
    assert below.is_killed


def test_waiters_wake_when_it_is_stopped_and_when_it_is_killed() -> None:
    async def scenario() -> None:
        root = Context("root")
        below = root.child("below")
        stopped = asyncio.create_task(below.stopped())
        killed = asyncio.create_task(below.killed())
        await asyncio.sleep(0)
        root.stop(WHY)
        await stopped
        assert not killed.done()
        root.kill(WHY)
        await killed
        await below.stopped()  # Who comes late does not wait.
        await below.killed()

    asyncio.run(asyncio.wait_for(scenario(), 5))
