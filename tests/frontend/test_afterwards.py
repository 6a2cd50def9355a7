"""What a move leaves to be done: when, in which order, and that nothing of it is lost."""

import asyncio
import gc
import logging
from array import array
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import pytest

from frontend.afterwards import AFTER_S, Afterwards
from frontend.dispatch import Choice
from frontend.metrics import FrontendMetrics
from frontend.outliers import OutlierLimits, Outliers
from frontend.quarantine import LOOK_INTERVAL_S, Quarantine
from frontend.query_of_death import Fingerprint, Queries, QueryLimits
from frontend.stream import Attempt, Life
from unbroken import metrics
from unbroken.garbage import collected_in_quiet
from unbroken.outcome import ContinuationClass, FailureKind

W1, W2, W3 = (Life(f"w{number}", 1) for number in (1, 2, 3))


def test_no_garbage_is_collected_before_all_is_done() -> None:
    async def scenario() -> None:
        async with collected_in_quiet(lambda: False):
            afterwards = Afterwards()
            afterwards.do(lambda: afterwards.do(lambda: None))
            assert not gc.isenabled()
            afterwards.finish()
            assert not gc.isenabled(), "more was left"
            afterwards.finish()
            assert gc.isenabled()

    asyncio.run(scenario())


def test_things_are_done_together_and_in_order_once_the_turn_is_over() -> None:
    async def scenario() -> None:
        done: list[str] = []
        afterwards = Afterwards()
        for index in range(3):
            afterwards.do(lambda index=index: done.append(f"{index}"))
        await asyncio.sleep(0)
        assert done == [], "what is more urgent may take a while"
        await asyncio.sleep(5 * AFTER_S)
        assert done == ["0", "1", "2"]
        afterwards.do(lambda: done.append("again"))
        afterwards.finish()
        assert done[3:] == ["again"], "or when nobody will come back"
        await asyncio.sleep(5 * AFTER_S)
        assert done[3:] == ["again"], "once"

    asyncio.run(scenario())


def test_a_bug_in_one_thing_leaves_the_others_done(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        done: list[str] = []

        def fail() -> None:
            raise ValueError

        afterwards = Afterwards()
        afterwards.do(lambda: done.append("before"))
        afterwards.do(fail)
        afterwards.do(lambda: done.append("after"))
        afterwards.finish()
        assert done == ["before", "after"]

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    assert "bug in what was left" in caplog.text


# The files of the quarantine.


@dataclass
class _Output:
    ledger: "array[int]" = field(default_factory=lambda: array("I"))
    outcome: None = None


@dataclass(eq=False)
class _Stream:
    """As much of a choice as the quarantine sees."""

    fingerprint: Fingerprint
    stream: _Output = field(default_factory=_Output)

    def names(self) -> dict[str, object]:
        return {}


class It:
    """A quarantine and those who run."""

    def __init__(self, deaths_max: int = 3) -> None:
        self.queries = Queries(QueryLimits(deaths_max=deaths_max))
        counted = FrontendMetrics(metrics.new_registry())
        outliers = Outliers(OutlierLimits(), Random(0))
        self.quarantine = Quarantine(self.queries, outliers, counted, key=b"k")
        self.room = 0
        self.quarantine.on_room.append(self._more_room)

    def _more_room(self) -> None:
        self.room += 1

    def stream(self, name: str, num_tokens: int = 0) -> Choice:
        one = _Stream(Fingerprint(name.encode()))
        one.stream.ledger.extend(range(num_tokens))
        return cast("Any", one)

    def dies(self, stream: Choice, life: Life) -> None:
        attempt = Attempt(1, life, ContinuationClass.UNSPECIFIED, 0, 0, FailureKind.CRASH)
        self.quarantine.attempt_ended(stream, life, attempt)


def test_the_first_death_of_all_is_entered_as_it_was_when_all_are_on_their_way() -> None:
    async def scenario() -> None:
        it = It()
        some, other = it.stream("some", 5), it.stream("other", 5)
        for one in (some, other):
            it.dies(one, W1)
            assert it.quarantine.verdict(one) is None
            assert it.quarantine.may_start(one, W2)
            it.quarantine.started(one, W2)
        assert it.queries.is_quiet
        other.stream.ledger.extend(range(3))  # It gets further, before anything is entered.
        await asyncio.sleep(5 * AFTER_S)
        assert it.queries.is_on_file(some.fingerprint)
        assert it.room, "who waited is asked again"
        async with asyncio.timeout(5):
            while it.queries.is_on_file(other.fingerprint):  # noqa: ASYNC110 - By a timer of its own.
                await asyncio.sleep(0.001)
        assert it.queries.is_on_file(some.fingerprint), "this one has got no further"
        it.quarantine.close()

    asyncio.run(scenario())


def test_another_engines_death_counts_after_the_first() -> None:
    async def scenario() -> None:
        it = It()
        one = it.stream("one", 5)
        it.dies(one, W1)
        it.quarantine.started(one, W2)
        it.dies(one, W2)
        assert it.queries.is_suspect(one.fingerprint), "at once: it may be tried only apart"
        it.quarantine.started(one, W3)
        assert it.queries.trials == [one.fingerprint]
        it.dies(one, W3)
        assert it.quarantine.verdict(one) is not None
        it.quarantine.close()

    asyncio.run(scenario())


def test_what_ended_well_closes_the_file_that_was_not_even_entered() -> None:
    async def scenario() -> None:
        it = It()
        one = it.stream("one", 5)
        it.dies(one, W1)
        it.quarantine.started(one, W2)
        one.stream.ledger.extend(range(3))
        well = Attempt(2, W2, ContinuationClass.NATIVE, 5, 8)
        it.quarantine.attempt_ended(one, W2, well)
        assert it.queries.is_quiet
        it.quarantine.close()

    asyncio.run(scenario())


def test_who_is_closed_looks_no_more_though_something_was_left() -> None:
    async def scenario() -> None:
        it = It()
        one = it.stream("one", 5)
        it.dies(one, W1)
        it.quarantine.started(one, W2)
        it.quarantine.close()
        it.quarantine.afterwards.finish()
        one.stream.ledger.extend(range(3))
        await asyncio.sleep(5 * LOOK_INTERVAL_S)
        assert it.queries.is_on_file(one.fingerprint), "nobody looks"

    asyncio.run(scenario())


def test_where_one_death_makes_a_suspect_it_is_entered_at_once() -> None:
    async def scenario() -> None:
        it = It(deaths_max=2)
        one = it.stream("one", 5)
        it.dies(one, W1)
        assert it.queries.is_suspect(one.fingerprint)
        it.quarantine.close()

    asyncio.run(scenario())
