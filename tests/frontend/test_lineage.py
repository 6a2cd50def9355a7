"""Claims of `frontend.lineage`."""

from random import Random

import pytest

from frontend.lineage import DEPTH_MAX, REMEMBERED_MAX, REMEMBERED_S, Key, Lineage, Member
from unbroken.errors import Reason, UnbrokenError

WHY = UnbrokenError(Reason.CANCELLED, "as asked")


class Requests:
    """Requests of one tenant, and the lineage that they are in."""

    def __init__(self) -> None:
        self.lineage = Lineage()
        self.members: dict[str, Member] = {}
        self.now = 100.0

    def enter(self, name: str, parent: str = "", tenant: str = "t") -> Member:
        member = self.members[name] = self.lineage.enter((tenant, name), parent, self.now)
        self.lineage.check()
        return member

    def leave(self, *names: str) -> None:
        for name in names:
            self.lineage.leave(self.members.pop(name), self.now)
            self.lineage.check()

    def cancel(self, name: str, tenant: str = "", *, is_soft: bool = False) -> list[Key]:
        self.lineage.remember((tenant or None, name), self.now, is_by_name=True)
        keys = self.lineage.named(name, tenant)
        return self.lineage.cancel(keys, WHY, is_soft=is_soft)

    def is_cancelled(self, name: str) -> bool:
        return self.members[name].context.is_killed


def test_cancelling_a_request_cancels_those_below_it_and_no_other() -> None:
    it = Requests()
    for name, parent in (("a", ""), ("b", "a"), ("c", "b"), ("d", "a"), ("e", "")):
        it.enter(name, parent)
    assert it.cancel("b") == [("t", "b"), ("t", "c")]
    assert it.cancel("a") == [("t", "a"), ("t", "d")], "b and c were cancelled before"
    assert not it.is_cancelled("e")
    it.leave("a", "b", "c", "d", "e")
    assert it.lineage.num_known == 0


def test_the_parent_may_be_elsewhere_or_come_later() -> None:
    it = Requests()
    it.enter("child", "parent")
    assert it.cancel("parent") == [("t", "child")]
    it.leave("child")
    it.enter("early", "late")
    it.enter("late")
    assert it.cancel("late") == [("t", "late"), ("t", "early")]
    it.leave("early", "late")
    assert it.lineage.num_known == 0


def test_a_request_that_has_ended_is_still_the_parent_of_those_below_it() -> None:
    it = Requests()
    it.enter("a")
    it.enter("b", "a")
    it.enter("c", "b")
    it.leave("b")
    assert not it.is_cancelled("c"), "its parent is complete"
    assert it.cancel("a") == [("t", "a"), ("t", "c")]
    it.leave("a", "c")
    assert it.lineage.num_known == 0
    it.enter("d", "e")
    it.enter("e")
    it.leave("e")
    assert it.cancel("e") == [("t", "d")]
    it.leave("d")
    assert it.lineage.num_known == 0


def test_the_child_of_what_was_cancelled_just_now_is_born_killed() -> None:
    it = Requests()
    it.enter("here")
    it.cancel("here")
    it.leave("here")
    it.cancel("elsewhere")
    assert it.enter("b", "here").context.is_killed
    assert it.enter("c", "elsewhere").context.is_killed
    assert not it.enter("d", "another").context.is_stopped
    it.leave("b", "c", "d")
    it.now += REMEMBERED_S + 1
    assert not it.enter("e", "here").context.is_stopped


def test_another_request_of_the_same_name_has_nothing_to_do_with_the_cancelled_one() -> None:
    it = Requests()
    it.enter("a")
    it.enter("b", "a")
    it.cancel("a")
    it.leave("a")
    assert not it.enter("a").context.is_stopped, "b, which is below the old one, is still here"
    assert not it.enter("c", "a").context.is_stopped
    it.leave("b")
    assert it.cancel("a") == [("t", "a"), ("t", "c")]


def test_a_child_of_what_is_stopped_softly_is_stopped_softly() -> None:
    it = Requests()
    it.enter("a")
    assert it.cancel("a", is_soft=True) == [("t", "a")]
    assert it.cancel("a", is_soft=True) == []
    child = it.enter("b", "a")
    assert child.context.is_stopped
    assert not child.context.is_killed
    assert not it.is_cancelled("a"), "a child that comes makes nothing worse"
    assert it.cancel("a") == [("t", "a"), ("t", "b")], "a hard cancel overtakes a soft one"


def test_tenants_are_apart_unless_none_is_named() -> None:
    it = Requests()
    mine = it.lineage.enter(("mine", "r"), "", it.now)
    below = it.lineage.enter(("mine", "below"), "r", it.now)
    theirs = it.lineage.enter(("theirs", "other"), "r", it.now)
    assert it.cancel("r", "mine") == [("mine", "r"), ("mine", "below")]
    assert below.context.is_killed
    assert not theirs.context.is_stopped
    assert it.cancel("r") == [("theirs", "other")]
    it.lineage.leave(mine, it.now)
    late = it.lineage.enter(("others", "late"), "r", it.now)
    assert late.context.is_killed, "it was cancelled for all tenants"


def test_what_was_cancelled_by_name_is_not_resumed_and_what_its_client_left_is() -> None:
    it = Requests()
    it.cancel("r", "t")
    with pytest.raises(UnbrokenError) as caught:
        it.lineage.enter(("t", "r"), "", it.now, is_resumed=True)
    assert caught.value.reason is Reason.CANCELLED
    it.lineage.leave(it.lineage.enter(("u", "r"), "", it.now, is_resumed=True), it.now)
    it.enter("r")
    it.members["r"].context.kill(WHY)
    it.leave("r")
    it.lineage.leave(it.lineage.enter(("t", "r"), "", it.now, is_resumed=True), it.now)
    it.enter("s")
    it.cancel("s")
    it.leave("s")
    with pytest.raises(UnbrokenError):
        it.lineage.enter(("t", "s"), "", it.now, is_resumed=True)
    it.now += REMEMBERED_S + 1
    it.lineage.leave(it.lineage.enter(("t", "s"), "", it.now, is_resumed=True), it.now)
    assert it.lineage.num_known == 0


def test_a_new_request_of_one_tenant_takes_back_no_cancel_of_the_others() -> None:
    it = Requests()
    it.cancel("r")
    it.enter("r", tenant="u")
    assert not it.enter("below", "r", tenant="u").context.is_stopped
    assert it.enter("late", "r", tenant="t").context.is_killed, "it was cancelled for all tenants"
    with pytest.raises(UnbrokenError):
        it.lineage.enter(("t", "r"), "", it.now, is_resumed=True)
    it.leave("below", "r")
    resumed = it.lineage.enter(("u", "r"), "", it.now, is_resumed=True)
    it.lineage.leave(resumed, it.now)
    it.cancel("r")
    with pytest.raises(UnbrokenError):
        it.lineage.enter(("u", "r"), "", it.now, is_resumed=True)


def test_a_new_request_whose_client_only_left_is_resumed_whatever_was_cancelled_before() -> None:
    it = Requests()
    it.cancel("r")
    it.enter("r")
    it.members["r"].context.kill(WHY)  # Its connection broke.
    it.leave("r")
    it.lineage.leave(it.lineage.enter(("t", "r"), "", it.now, is_resumed=True), it.now)
    with pytest.raises(UnbrokenError):
        it.lineage.enter(("u", "r"), "", it.now, is_resumed=True)


def test_equal_calls_that_wait_are_cancelled_together() -> None:
    it = Requests()
    key = ("t", "r")
    first = it.lineage.enter(key, "", it.now)
    second = it.lineage.enter(key, "", it.now)
    it.lineage.leave(first, it.now)
    assert it.cancel("r") == [key]
    assert second.context.is_killed
    it.lineage.leave(second, it.now)
    assert it.lineage.num_known == 0


def test_requests_that_name_each_other_as_parents_leave_nothing_behind() -> None:
    it = Requests()
    it.enter("a", "b")
    it.enter("b", "a")
    assert it.cancel("a") == [("t", "a"), ("t", "b")]
    it.leave("a", "b")
    assert it.lineage.num_known == 0
    it.enter("c", "d")
    it.enter("below", "c")
    it.leave("c")
    it.enter("d", "c")  # The ring is closed by who comes after the other has ended.
    it.leave("d", "below")
    assert it.lineage.num_known == 0


def test_a_chain_that_is_ever_so_long_leaves_nothing_behind() -> None:
    it = Requests()
    names = [f"r{number}" for number in range(3 * DEPTH_MAX)]
    for name, parent in zip(names, ["", *names], strict=False):
        it.enter(name, parent)
    it.leave(*names)
    assert it.lineage.num_known == 0


def test_what_is_remembered_is_bounded() -> None:
    it = Requests()
    for number in range(REMEMBERED_MAX + 10):
        it.cancel(f"r{number}")
    it.lineage.check()
    assert it.enter("x", f"r{REMEMBERED_MAX + 9}").context.is_killed
    assert not it.enter("y", "r0").context.is_stopped


def test_whatever_happens_in_whatever_order_nothing_is_left_behind() -> None:
    names = [f"r{number}" for number in range(8)]
    for seed in range(300):
        random, it = Random(seed), Requests()
        for _ in range(60):
            name = random.choice(names)
            parent = random.choice([*names, "", ""])
            what = random.random()
            if name in it.members and what < 0.5:
                it.leave(name)
            elif name not in it.members and what < 0.8:
                it.enter(name, "" if parent == name else parent)
            else:
                expected = {one for one in it.members if not it.is_cancelled(one)}
                found = {key[1] for key in it.cancel(name)}
                assert found == {one for one in expected if it.is_cancelled(one)}, seed
            it.now += random.expovariate(1)
        it.leave(*it.members)
        assert it.lineage.num_known == 0, seed
