"""Admission, pauses, cancels and drains while everything fails, in thousands of worlds."""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from typing_extensions import override

import frontend.admission_queue
from frontend import drain as frontend_drain
from frontend.admission_queue import AdmissionQueue
from frontend.preemption import Preemption
from frontend.stream import Abort, Command, Paused, State, Stream
from frontend.waiting_room import WaitingRoom
from sidecar import drain as worker_drain
from sidecar.admission import Admission
from sidecar.hub import Hub
from tests.simulation.door import Event
from tests.simulation.faults import Fault
from tests.simulation.rush import STRIKES, Rush
from tests.simulation.scenario import quiet
from unbroken.outcome import FailureKind

NUM_SEEDS = 5000
NUM_PARTS = 5
SEEDS_PER_PART = NUM_SEEDS // NUM_PARTS
SEEDS_MAX = 2000
"""Within which each planted bug is found."""
FIRST_SEEDS = {"never_hands_over": 1000, "breaks_promises": 300}
"""From where on the rarest are looked for, so that it does not take half a minute."""


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_seed_keeps_every_promise_and_everything_happens(part: int) -> None:
    events, faults = Counter[Event](), Counter[Fault]()
    with quiet():
        for seed in range(part * SEEDS_PER_PART, (part + 1) * SEEDS_PER_PART):
            rush = Rush(seed)
            try:
                rush.live()
            except AssertionError as violation:
                pytest.fail(
                    f"{violation!r}\n"
                    f"replay: python -m tests.simulation --world rush --seed {seed} --trace"
                )
            events.update((+rush.seen).keys())
            faults.update((+rush.trouble.seen).keys())
    if part == 0:  # The rarest happen once in some hundreds of seeds.
        assert not [event for event in Event if not events[event]]
        assert not [fault for fault in STRIKES if not faults[fault]]


def nothing(*_: Any, **__: Any) -> None:
    """Instead of what has to be done."""


class StopsListening(Stream):
    """Takes it for granted that its worker has stopped."""

    @override
    def pause(self, detail: str, now: float) -> list[Command]:
        if not super().pause(detail, now):
            return []
        self._halted_at = None
        self._flow_no_more()
        self.attempts[-1].failure = FailureKind.PREEMPTED
        self.state = State.PAUSED
        return [Abort(self.epoch), Paused()]


class LosesTheLastToken(Stream):
    """Goes on one token before where it stood."""

    @override
    def proceed(self, now: float) -> list[Command]:
        if self.state is State.PAUSED and self.ledger:
            self.ledger.pop()
        return super().proceed(now)


@pytest.mark.parametrize("stream_type", [StopsListening, LosesTheLastToken])
def test_a_bug_of_a_stream_is_found(
    stream_type: type[Stream], capsys: pytest.CaptureFixture[str]
) -> None:
    _find(stream_type.__name__, stream_type, capsys)


def forgets_what_it_gave(patch: pytest.MonkeyPatch) -> None:
    """A sidecar knows only what its engine reports."""
    patch.setattr(Admission, "began", nothing)


def forgets_who_came_back(patch: pytest.MonkeyPatch) -> None:
    """Whom a worker refused is nowhere."""
    patch.setattr(AdmissionQueue, "come_back", nothing)


def keeps_who_left(patch: pytest.MonkeyPatch) -> None:
    """The line does not let go of who was cancelled."""
    patch.setattr(AdmissionQueue, "remove", nothing)


def breaks_promises(patch: pytest.MonkeyPatch) -> None:
    """The line knows nobody again."""
    patch.setattr(frontend.admission_queue, "_name", nothing)


def believes_old_reports(patch: pytest.MonkeyPatch) -> None:
    """Pauses more while those that it told to stop have not."""
    patch.setattr(Preemption, "_is_unsettled", nothing)


def forgets_pauses(patch: pytest.MonkeyPatch) -> None:
    """Pauses anybody at any time."""

    def may_be_paused(self: Any, key: Any, *_: Any) -> bool:
        return key not in self._halting

    patch.setattr(Preemption, "may_be_paused", may_be_paused)
    patch.setattr(Preemption, "check", nothing)


def pauses_peers(patch: pytest.MonkeyPatch) -> None:
    """Whoever waits counts for one of a higher priority."""
    first_priority = WaitingRoom.first_priority

    def priority_above(self: WaitingRoom, model: str) -> int | None:
        priority = first_priority(self, model)
        return None if priority is None else priority + 1

    patch.setattr(WaitingRoom, "first_priority", priority_above)


def waits_for_room(patch: pytest.MonkeyPatch) -> None:
    """Whoever is paused goes on when there is room, if that takes for ever."""
    next_of_all: Any = Preemption[Any].next

    def next_with_room(self: Any, first_of: Any, has_room: Any, now: float) -> Any:
        key = next_of_all(self, first_of, has_room, now)
        return key if key is not None and has_room(key) else None

    patch.setattr(Preemption, "next", next_with_room)


def lets_new_work_pass(patch: pytest.MonkeyPatch) -> None:
    """New work does not wait for who is paused."""
    patch.setattr(Preemption, "highest_paused", nothing)


def ignores_cancels(patch: pytest.MonkeyPatch) -> None:
    """A sidecar does not tell its engine that nobody wants an attempt any more."""
    patch.setattr(Hub, "abort", nothing)


def refuses_what_had_begun(patch: pytest.MonkeyPatch) -> None:
    """Thresholds hold for everything."""
    start = Hub.start

    def start_as_new(self: Hub, link: Any, message: Any) -> None:
        message.is_new_work = True
        start(self, link, message)

    patch.setattr(Hub, "start", start_as_new)


def never_hands_over(patch: pytest.MonkeyPatch) -> None:
    """A worker that drains waits for every stream."""
    patch.setattr(worker_drain.Drain, "deadline", nothing)


def never_leaves(patch: pytest.MonkeyPatch) -> None:
    """A frontend that drains does not see that nobody is left."""
    handle = frontend_drain.Drain.handle

    def handle_but_the_last(self: Any, event: Any, now: float) -> Any:
        commands = handle(self, event, now)
        return [one for one in commands if not isinstance(one, frontend_drain.Stop)]

    patch.setattr(frontend_drain.Drain, "handle", handle_but_the_last)


@pytest.mark.parametrize(
    "plant",
    [
        forgets_what_it_gave,
        forgets_who_came_back,
        keeps_who_left,
        breaks_promises,
        believes_old_reports,
        forgets_pauses,
        pauses_peers,
        waits_for_room,
        lets_new_work_pass,
        ignores_cancels,
        refuses_what_had_begun,
        never_hands_over,
        never_leaves,
    ],
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(monkeypatch)
    _find(plant.__name__, Stream, capsys)


def _find(name: str, stream_type: type[Stream], capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        first = FIRST_SEEDS.get(name, 0)
        for seed in range(first, first + SEEDS_MAX):
            try:
                Rush(seed, stream_type).live()
            except AssertionError as violation:
                with capsys.disabled():
                    sys.stdout.write(f"\n{name}: seed {seed}: {violation!s:.150}")
                return
    pytest.fail(f"{name} survived {SEEDS_MAX} seeds from {first} on")
