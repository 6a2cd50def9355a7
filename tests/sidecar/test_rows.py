"""Frames whose rows stay the same: everybody reads what he would read if each went alone."""

import random
from collections.abc import Callable, Sequence

import pytest

from sidecar.rows import STEPS_MAX
from tests.sidecar.fakes import VOCAB_SIZE, Desk, Frontend, start_of
from unbroken.outcome import FailureKind
from unbroken.v1 import attempt_pb2, generation_pb2

ALONE = 1 << 30
"""Rows of no frame are so many."""


def test_a_step_of_the_same_rows_touches_no_attempt() -> None:
    desk = Desk()
    frontend = desk.frontend()
    for name in "abc":
        frontend.start(name)
    attempts = [desk.hub.ledger.running[slot] for slot in (1, 2, 3)]
    for step in range(10):
        desk.step({1: step, 2: 100 + step, 3: 200 + step})
    assert [len(attempt.entered) for attempt in attempts] == [2, 2, 2]
    assert [attempt.end_offset for attempt in attempts] == [10, 10, 10]
    assert [attempt.num_tokens for attempt in attempts] == [10, 10, 10]
    frontend.read()
    assert frontend.tokens == {n: [100 * (n - 1) + step for step in range(10)] for n in (1, 2, 3)}
    assert attempts[1].token_ids.tolist() == list(range(100, 110))


def test_a_death_is_told_before_anything_is_entered() -> None:
    desk = Desk()
    frontend = desk.frontend()
    for name in "ab":
        frontend.start(name)
    attempts = list(desk.hub.ledger)
    for step in range(10):
        desk.step({1: step, 2: step})
    desk.down()
    frontend.read()
    assert [frontend.ended[slot].end_offset for slot in (1, 2)] == [10, 10]
    assert [len(attempt.entered) for attempt in attempts] == [2, 2]
    assert [attempt.end_offset for attempt in attempts] == [10, 10]
    assert attempts[0].token_ids.tolist() == list(range(10))
    assert [len(attempt.entered) for attempt in attempts] == [10, 10]
    assert [attempt.place for attempt in attempts] == [None, None]


def test_what_is_not_entered_is_bounded() -> None:
    desk = Desk()
    frontend = desk.frontend()
    frontend.start("a")
    (attempt,) = desk.hub.ledger
    for step in range(10 * STEPS_MAX):
        desk.step({1: step})
        assert attempt.end_offset - len(attempt.entered) <= STEPS_MAX
    assert attempt.token_ids.tolist() == list(range(10 * STEPS_MAX))


@pytest.mark.parametrize(
    ("offsets", "token_ids", "detail"),
    [
        ([4, 9, 4], [4, 4, 4], "slot 2: expected offset 4, got 9"),
        ([4, 4, 4], [VOCAB_SIZE, 4, 4], f"token ids below {VOCAB_SIZE}"),
        ([4, 4, 4, 4], [4, 4, 4], "columns of one length"),
        ([4, 4, 4], [4, 4], "expected 3 tokens"),
    ],
)
def test_what_is_wrong_in_such_a_frame_is_seen(
    offsets: list[int], token_ids: list[int], detail: str
) -> None:
    desk = Desk()
    frontend = desk.frontend()
    for name in "abc":
        frontend.start(name)
    for step in range(4):
        desk.step({1: step, 2: step, 3: step})
    desk.hub.on_frame(attempt_pb2.StepFrame(slots=[1, 2, 3], offsets=offsets, token_ids=token_ids))
    assert len(desk.engine.failures) == 1
    assert detail in desk.engine.failures[0]
    frontend.read()
    assert frontend.tokens == {slot: [0, 1, 2, 3] for slot in (1, 2, 3)}, "nothing of it counted"


def test_an_attempt_that_is_over_says_no_more_though_the_rows_seem_the_same() -> None:
    desk = Desk()
    frontend = desk.frontend()
    for name in "ab":
        frontend.start(name)
    for step in range(4):
        desk.step({1: step, 2: step})
    desk.end(_finished(1, 4))
    desk.hub.on_frame(attempt_pb2.StepFrame(slots=[1, 2], offsets=[4, 4], token_ids=[4, 4]))
    assert desk.engine.failures == ["expected a slot that runs, got 1"]


def test_a_probe_that_is_over_says_no_more_either() -> None:
    desk = Desk()
    frontend = desk.frontend()
    frontend.start("a")
    desk.hub.probe(start_of(0, "probe"))
    for step in range(4):
        desk.step({1: step, 2: step})
    desk.end(_finished(2, 4))
    desk.hub.on_frame(attempt_pb2.StepFrame(slots=[1, 2], offsets=[4, 4], token_ids=[4, 4]))
    assert desk.engine.failures == ["expected a slot that runs, got 2"]


def test_several_rows_of_one_slot_are_not_taken_for_rows_that_stay() -> None:
    desk = Desk()
    frontend = desk.frontend()
    frontend.start("a")
    for begin in range(0, 12, 3):
        offsets = [begin, begin + 1, begin + 2]
        desk.hub.on_frame(
            attempt_pb2.StepFrame(slots=[1, 1, 1], offsets=offsets, token_ids=offsets)
        )
    frontend.read()
    assert frontend.tokens == {1: list(range(12))}
    assert desk.engine.failures == []


def test_a_bug_at_one_reader_leaves_no_gap_between_what_others_were_told_and_the_ledger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk()
    first, second = desk.frontend("f"), desk.frontend("g")
    first.start("a")
    second.start("b")
    for step in range(4):
        desk.step({1: step, 2: step})

    def fails(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(second.link, "rows", fails)
    with pytest.raises(ValueError, match="a bug"):
        desk.step({1: 4, 2: 4})
    desk.down()
    first.read()  # It checks that the end is where the tokens end.
    assert first.tokens == {1: [0, 1, 2, 3, 4]}
    assert first.ended[1].end_offset == 5


class Play:
    """The same happens to two hubs; in one, frames with the same rows are taken as a whole."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.desks = (Desk(), Desk(rows_min=ALONE))
        self.frontends: list[tuple[Frontend, ...]] = []
        self.num_started = 0
        self.num_lives = 0
        self.epochs: dict[str, int] = {}
        self.join()

    def both(self, do: Callable[[Desk], object]) -> None:
        for desk in self.desks:
            do(desk)

    def join(self) -> None:
        self.num_lives += 1
        life = (1, self.num_lives)
        name = self.rng.choice("fg")
        self.frontends.append(tuple(desk.frontend(name, life) for desk in self.desks))

    def pick(self) -> tuple[Frontend, ...]:
        return self.rng.choice(self.frontends)

    def start(self) -> None:
        self.num_started += 1
        name, window = f"r{self.num_started}", self.rng.choice([0, 0, 3, 50])
        self.epochs[name] = 1
        for frontend in self.pick():
            frontend.start(name, window_tokens=window)

    def adopt(self) -> None:
        if self.epochs:
            name = self.rng.choice(sorted(self.epochs))
            self.epochs[name] += 1
            offset, window = self.rng.randrange(12), self.rng.choice([0, 3, 50])
            for frontend in self.pick():
                frontend.adopt(name, self.epochs[name], offset, window)

    def step(self) -> None:
        slots = list(self.desks[0].hub.ledger.running)
        if self.rng.random() < 0.15:
            self.rng.shuffle(slots)
        if self.rng.random() < 0.15:
            slots = slots[: self.rng.randrange(len(slots) + 1)]
        is_long = self.rng.random() < 0.1
        for _ in range(self.rng.choice([1, 2, 5, STEPS_MAX + 3])):
            tokens = {
                slot: [self.rng.randrange(VOCAB_SIZE)] * self.rng.randrange(1, 4)
                if is_long
                else self.rng.randrange(VOCAB_SIZE)
                for slot in slots
            }
            self.both(lambda desk, tokens=tokens: desk.step(tokens))

    def end(self) -> None:
        running = self.desks[0].hub.ledger.running
        if running:
            slot = self.rng.choice(list(running))
            ended = _finished(slot, running[slot].end_offset)
            self.both(lambda desk: desk.end(ended))

    def end_with_a_step(self) -> None:
        running = self.desks[0].hub.ledger.running
        if running:
            slot = self.rng.choice(list(running))
            frame = attempt_pb2.StepFrame(
                slots=running,
                offsets=[attempt.end_offset for attempt in running.values()],
                token_ids=[7] * len(running),
                ended=[_finished(slot, running[slot].end_offset + 1)],
            )
            self.both(lambda desk: desk.hub.on_frame(frame))

    def ack(self) -> None:
        pair = self.pick()
        slots = list(pair[0].link.by_slot)
        if slots:
            slot, offset = self.rng.choice(slots), self.rng.randrange(40)
            for frontend in pair:
                frontend.ack(slot, offset)

    def abort(self) -> None:
        pair = self.pick()
        slots = list(pair[0].link.by_slot)
        if slots:
            slot = self.rng.choice(slots)
            for frontend in pair:
                frontend.hub.abort(frontend.link, slot)

    def leave(self) -> None:
        for frontend in self.pick():
            frontend.hub.leave(frontend.link)
        self.join()

    def tick(self) -> None:
        after_s = self.rng.choice([0.1, 3.0])
        self.both(lambda desk: desk.tick(after_s))

    def die(self) -> None:
        self.both(lambda desk: desk.down(FailureKind.CRASH))

    def read(self) -> None:
        for pair in self.frontends:
            if self.rng.random() < 0.5:
                whole, alone = (frontend.read() for frontend in pair)
                assert whole == alone

    def check(self) -> None:
        whole, alone = (desk.hub for desk in self.desks)
        for desk in self.desks:
            desk.check()
        assert self.desks[0].engine.failures == self.desks[1].engine.failures == []
        assert self.desks[0].engine.acked == self.desks[1].engine.acked
        assert self.desks[0].engine.aborted == self.desks[1].engine.aborted
        assert whole.accounted_blocks() == alone.accounted_blocks()
        for one, other in zip(whole.ledger, alone.ledger, strict=True):
            assert one.end_offset == other.end_offset
            if self.rng.random() < 0.2:
                assert one.token_ids == other.token_ids


@pytest.mark.parametrize("seed", range(150))
def test_whatever_happens_everybody_reads_what_he_would_if_each_row_went_alone(seed: int) -> None:
    play = Play(random.Random(seed))
    acts: Sequence[tuple[Callable[[], None], int]] = [
        (play.start, 4),
        (play.step, 10),
        (play.end, 1),
        (play.end_with_a_step, 1),
        (play.adopt, 2),
        (play.ack, 3),
        (play.abort, 1),
        (play.leave, 1),
        (play.tick, 1),
        (play.read, 4),
    ]
    for _ in range(3):
        play.start()
    for step in range(5):
        play.both(lambda desk, step=step: desk.step(dict.fromkeys(desk.hub.ledger.running, step)))
    assert all(one.place for one in play.desks[0].hub.ledger), "or nothing is tried"
    for _ in range(80):
        (act,) = play.rng.choices(*zip(*acts, strict=True))
        act()
        play.check()
    play.die()
    for pair in play.frontends:
        whole, alone = (frontend.read() for frontend in pair)
        assert whole == alone
        assert pair[0].tokens == pair[1].tokens


def _finished(slot: int, end_offset: int) -> attempt_pb2.AttemptEnded:
    return attempt_pb2.AttemptEnded(
        slot=slot, end_offset=end_offset, finish_reason=generation_pb2.FINISH_REASON_LENGTH
    )
