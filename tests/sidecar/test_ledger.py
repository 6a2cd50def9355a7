"""What the ledger remembers, and what it refuses."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sidecar import ledger as ledgers
from sidecar.kv_account import num_blocks
from sidecar.ledger import Attempt, Fenced, Ledger, Replay, Retention
from tests.sidecar.fakes import failed, start_of
from unbroken.outcome import FailureKind
from unbroken.v1 import attempt_pb2
from unbroken.v1 import relay_service_pb2 as pb


def enter(
    ledger: Ledger[str], start: attempt_pb2.StartAttempt, *, orphan_grace_s: float
) -> tuple[Attempt[str], Attempt[str] | None]:
    return ledger.begin(
        start,
        "f",
        owner=("f", 1),
        orphan_grace_s=orphan_grace_s,
        engine_incarnation=1,
        now=0.0,
    )


def begin(
    ledger: Ledger[str], request_id: str = "r", epoch: int = 1, **more: object
) -> Attempt[str]:
    start = start_of(1, request_id, epoch, **more)  # pyright: ignore[reportArgumentType]
    return enter(ledger, start, orphan_grace_s=5.0)[0]


def end(ledger: Ledger[str], attempt: Attempt[str], now: float = 0.0) -> None:
    ended = failed(attempt.slot, attempt.end_offset, FailureKind.CRASH)
    ledger.end(attempt, ended, now)


def adoption(request_id: str = "r", epoch: int = 2, offset: int = 0) -> pb.AdoptAttempt:
    key = attempt_pb2.StreamKey(request_id=request_id)
    return pb.AdoptAttempt(slot=9, stream=key, epoch=epoch, offset=offset)


@pytest.mark.parametrize("epoch", [0, 1, 4, 5])
def test_an_epoch_that_is_not_above_those_known_is_fenced(epoch: int) -> None:
    ledger = Ledger[str]()
    begin(ledger, epoch=5)
    with pytest.raises(Fenced) as caught:
        begin(ledger, epoch=epoch)
    assert caught.value.epoch_known == 5
    ledger.check()


def test_streams_of_other_tenants_requests_and_choices_have_epochs_of_their_own() -> None:
    ledger = Ledger[str]()
    keys = [("a", "r", 0), ("b", "r", 0), ("a", "s", 0), ("a", "r", 1)]
    for tenant, request_id, choice_index in keys:
        start = start_of(1, request_id, 1, tenant=tenant)
        start.stream.choice_index = choice_index
        attempt, revoked = enter(ledger, start, orphan_grace_s=0)
        assert attempt.stream == (tenant, request_id, choice_index)
        assert revoked is None
    assert [attempt.slot for attempt in ledger] == [1, 2, 3, 4]


def test_what_runs_of_a_request_is_found_by_its_name_of_one_tenant_or_of_all() -> None:
    ledger = Ledger[str]()
    attempts: list[Attempt[str]] = []
    for tenant, request_id, choice_index in [("a", "r", 0), ("b", "r", 0), ("a", "s", 0)]:
        start = start_of(1, request_id, 1, tenant=tenant)
        start.stream.choice_index = choice_index
        attempts.append(enter(ledger, start, orphan_grace_s=0)[0])
    assert list(ledger.of_request("r")) == attempts[:2]
    assert list(ledger.of_request("r", "b")) == [attempts[1]]
    assert not ledger.of_request("unknown")
    end(ledger, attempts[0])
    assert list(ledger.of_request("r")) == [attempts[1]]
    end(ledger, attempts[1])
    assert not ledger.of_request("r")
    ledger.check()


def test_a_newer_epoch_revokes_the_attempt_that_runs_and_no_other() -> None:
    ledger = Ledger[str]()
    first = begin(ledger, epoch=1)
    begin(ledger, "other")
    _, revoked = enter(ledger, start_of(1, epoch=2), orphan_grace_s=0)
    assert revoked is first
    end(ledger, first)
    second = ledger.peek(attempt_pb2.StreamKey(request_id="r"))
    assert second is not None
    assert second.epoch == 2
    end(ledger, second)
    _, revoked = enter(ledger, start_of(1, epoch=3), orphan_grace_s=0)
    assert revoked is None
    ledger.check()


def test_an_ended_attempt_is_remembered_for_its_time() -> None:
    ledger = Ledger[str](Retention(ended_s=10))
    attempt = begin(ledger)
    end(ledger, attempt, now=100)
    ledger.expired(109.9)
    assert ledger.peek(attempt_pb2.StreamKey(request_id="r")) is attempt
    ledger.expired(110)
    assert ledger.peek(attempt_pb2.StreamKey(request_id="r")) is None
    with pytest.raises(Fenced):
        begin(ledger, epoch=1)
    with pytest.raises(KeyError):
        ledger.adopt(adoption(), "g", owner=("g", 1), now=0.0)


def test_no_more_attempts_and_tokens_are_remembered_than_the_retention_says() -> None:
    ledger = Ledger[str](Retention(attempts_max=2, tokens_max=10))

    def remembered() -> list[str]:
        keys = [attempt_pb2.StreamKey(request_id=name) for name in "abcd"]
        return [key.request_id for key in keys if ledger.peek(key) is not None]

    for name in "abc":
        end(ledger, begin(ledger, name))
    assert remembered() == ["b", "c"]
    end(ledger, begin(ledger, "d", prompt=range(11)))  # Prompts take memory, too.
    assert remembered() == []
    ledger.check()


def test_log_probabilities_count_as_the_memory_that_they_take() -> None:
    ledger = Ledger[str](Retention(tokens_max=100))
    attempt = begin(ledger)
    attempt.logprobs = [b"x" * 300]
    attempt.logprobs_bytes = 300
    end(ledger, attempt)
    end(ledger, begin(ledger, "small", prompt=range(25)))
    ledger.check()
    assert ledger.peek(attempt_pb2.StreamKey(request_id="r")) is attempt
    end(ledger, begin(ledger, "one more", prompt=[1]))
    ledger.check()
    assert ledger.peek(attempt_pb2.StreamKey(request_id="r")) is None


def test_epochs_of_any_generation_are_ordered() -> None:
    ledger = Ledger[str]()
    begin(ledger, epoch=1)
    begin(ledger, epoch=(1 << 32) + 1)
    with pytest.raises(Fenced):
        begin(ledger, epoch=2)
    begin(ledger, epoch=(7 << 32) + 3)
    begin(ledger, epoch=2**64 - 1)
    with pytest.raises(Fenced) as fenced:
        begin(ledger, epoch=2**64 - 1)
    assert fenced.value.epoch_known == 2**64 - 1


def test_epochs_are_bounded_while_those_of_running_attempts_stay() -> None:
    ledger = Ledger[str](Retention(ended_s=0, epochs_max=10))
    oldest = begin(ledger, "oldest", epoch=7)
    for index in range(100):
        end(ledger, begin(ledger, f"r{index}"))
        ledger.check()
    with pytest.raises(Fenced):
        begin(ledger, "oldest", epoch=7)
    with pytest.raises(Fenced):
        begin(ledger, "r99", epoch=1)
    begin(ledger, "r0", epoch=1)  # Forgotten.
    assert oldest.ended is None


def test_an_orphan_expires_once_after_its_grace() -> None:
    ledger = Ledger[str]()
    attempt = begin(ledger)
    ledger.orphan([attempt], now=100)
    assert attempt.link is None
    assert ledger.expired(104.9) == []
    assert ledger.expired(105) == [attempt]
    assert ledger.expired(200) == []
    ledger.check()


def test_an_adopted_orphan_does_not_expire() -> None:
    ledger = Ledger[str]()
    attempt = begin(ledger)
    ledger.orphan([attempt], now=100)
    assert ledger.adopt(adoption(), "g", owner=("g", 1), now=0.0) is attempt
    assert (attempt.link, attempt.link_slot, attempt.epoch) == ("g", 9, 2)
    assert ledger.expired(1000) == []
    ledger.check()


def test_an_attempt_that_has_ended_is_no_orphan() -> None:
    ledger = Ledger[str]()
    attempt = begin(ledger)
    end(ledger, attempt)
    ledger.orphan([attempt], now=100)
    assert ledger.expired(1000) == []
    ledger.check()


@pytest.mark.parametrize("offset", [2, 6])
def test_an_offset_that_is_not_in_the_ledger_changes_nothing(offset: int) -> None:
    ledger = Ledger[str]()
    attempt = begin(ledger, first_offset=3)
    attempt.token_ids.extend([7, 8])
    with pytest.raises(ValueError, match=f"expected an offset from 3 to 5, got {offset}"):
        ledger.adopt(adoption(epoch=2, offset=offset), "g", owner=("g", 1), now=0.0)
    assert (attempt.link, attempt.epoch) == ("f", 1)
    with pytest.raises(Fenced):  # It has no say, so its offset does not matter.
        ledger.adopt(adoption(epoch=1, offset=offset), "g", owner=("g", 1), now=0.0)
    begin(ledger, epoch=2)  # The refused epoch was not used up.


def test_a_replay_keeps_to_its_window() -> None:
    replay = Replay(sent=3, acknowledged=3, window_tokens=4)
    assert replay.due(5) == 5
    assert replay.due(100) == 7
    replay.window_tokens = 0
    assert replay.due(100) == 100


@pytest.mark.parametrize(
    ("own", "acknowledged", "wanted", "is_paced"),
    [(0, 0, 0, True), (0, 0, 4, False), (4, 0, 4, True), (4, 1, 4, False), (5, 0, 4, False)],
)
def test_an_engine_paces_a_reader_if_its_window_is_as_tight(
    own: int, acknowledged: int, wanted: int, is_paced: bool
) -> None:
    ledger = Ledger[str]()
    attempt = begin(ledger, window_tokens=own)
    attempt.acknowledge(acknowledged)
    ledger.adopt(adoption(), "g", owner=("g", 1), now=0.0)
    assert attempt.replay is not None
    attempt.replay.window_tokens = wanted
    assert attempt.is_paced_by_engine is is_paced


@pytest.mark.parametrize(
    ("lengths", "blocks"), [([], 0), ([0], 0), ([1], 1), ([16], 1), ([17, 1], 3)]
)
def test_every_sequence_has_blocks_of_its_own_in_the_account(
    lengths: list[int], blocks: int
) -> None:
    assert num_blocks(lengths, 16) == blocks


REQUESTS = st.sampled_from("abcdef")
EPOCHS = st.integers(0, 12)


def timed(ledger: Ledger[str], request_id: str, deadline_s: int) -> Attempt[str]:
    start = start_of(1, request_id, 1)
    start.deadline.FromSeconds(deadline_s)
    return enter(ledger, start, orphan_grace_s=0)[0]


def test_a_deadline_is_that_of_the_last_reader_and_met_once() -> None:
    ledger = Ledger[str]()
    first, second, ended = (timed(ledger, name, 10) for name in "abc")
    begin(ledger, "without")
    end(ledger, ended)
    longer, none = adoption("a"), adoption("b")
    longer.deadline.FromSeconds(30)
    ledger.adopt(longer, "g", owner=("g", 1), now=5.0)
    ledger.adopt(none, "g", owner=("g", 1), now=5.0)
    ledger.check()
    assert ledger.overdue(34.9) == []
    assert ledger.overdue(35.0) == [first]
    assert ledger.overdue(1e9) == []
    assert second.deadline_at is None


def test_of_two_equal_deadlines_of_an_attempt_one_is_met() -> None:
    ledger = Ledger[str]()
    attempt = timed(ledger, "a", 10)
    again = adoption("a")
    again.deadline.FromSeconds(10)
    ledger.adopt(again, "g", owner=("g", 1), now=0.0)
    assert ledger.overdue(10.0) == [attempt]


def test_whoever_was_given_up_is_not_overdue() -> None:
    ledger = Ledger[str]()
    timed(ledger, "a", 10).given_up = (FailureKind.PARTITION, "nobody read it")
    assert ledger.overdue(10.0) == []


def test_whatever_becomes_of_attempts_they_are_told_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledgers, "_ALARMS_SPARE", 3)
    for seed in range(100):
        play_with_time(random.Random(seed))


def play_with_time(chance: random.Random) -> None:
    """Attempts come, go, lose and find readers; who is due is compared with a look at all."""
    ledger, now = Ledger[str](), 0.0
    for epoch in range(1, 61):
        now += chance.choice([0.0, 0.5, 3.0, 20.0])
        running = list(ledger)
        doing = chance.choice(["begin", "begin", "orphan", "adopt", "adopt", "end"])
        deadline_s = chance.choice([None, 1, 5, 5, 20])
        if doing == "begin":
            start = start_of(1, chance.choice("abcdefgh"), epoch)
            if deadline_s is not None:
                start.deadline.FromSeconds(deadline_s)
            ledger.begin(
                start,
                "f",
                owner=("f", 1),
                orphan_grace_s=chance.choice([0.0, 1.0, 5.0]),
                engine_incarnation=1,
                now=now,
            )
        elif doing == "orphan":
            ledger.orphan(chance.sample(running, chance.randint(0, len(running))), now)
        elif doing == "adopt" and running:
            message = adoption(chance.choice(running).stream[1], epoch)
            if deadline_s is not None:
                message.deadline.FromSeconds(deadline_s)
            ledger.adopt(message, "g", owner=("g", 1), now=now)
        elif running:
            end(ledger, chance.choice(running), now)
        overdue = [one for one in ledger if is_past(one.deadline_at, now) and not one.given_up]
        expired = [one for one in ledger if is_past(one.orphaned_until, now)]
        for due, told in ((overdue, ledger.overdue(now)), (expired, ledger.expired(now))):
            assert sorted(one.slot for one in told) == [one.slot for one in due]
            for attempt in told:
                attempt.given_up = (FailureKind.DRAIN, "it is time")
        ledger.check()


def is_past(at: float | None, now: float) -> bool:
    return at is not None and at <= now


def test_times_that_mean_nothing_are_not_kept_for_ever() -> None:
    ledger = Ledger[str]()
    attempt = timed(ledger, "a", 1000)
    for epoch in range(2, 5000):
        ledger.orphan([attempt], 0.0)
        again = adoption("a", epoch)
        again.deadline.FromSeconds(1000 + epoch)
        ledger.adopt(again, "g", owner=("g", 1), now=0.0)
        assert not ledger.expired(1.0)
        assert not ledger.overdue(1.0)
    ledger.check()
    assert len(ledger._deadlines._heap) < 2000  # pyright: ignore[reportPrivateUsage]
    assert len(ledger._graces._heap) < 2000  # pyright: ignore[reportPrivateUsage]
    assert ledger.overdue(5999.0) == [attempt]


class LedgerMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order: epochs only grow, and what runs has an end."""

    def __init__(self) -> None:
        super().__init__()
        self.retention = Retention(ended_s=5, attempts_max=3, tokens_max=20, epochs_max=2)
        self.ledger = Ledger[str](self.retention)
        self.now = 0.0
        self.running: dict[str, int] = {}
        """Epoch of each stream that runs."""
        self.revoked = set[int]()

    @rule(request=REQUESTS, epoch=EPOCHS, prompt=st.integers(0, 8))
    def start(self, request: str, epoch: int, prompt: int) -> None:
        start = start_of(1, request, epoch, prompt=range(prompt))
        try:
            attempt, revoked = enter(self.ledger, start, orphan_grace_s=2)
        except Fenced as fenced:
            known = fenced.epoch_known
        else:
            known = epoch - 1
            assert epoch > self.running.get(request, 0)
            assert (revoked is not None) == (request in self.running)
            if revoked is not None:
                assert revoked.stream == attempt.stream
                revoked.detach()
                self.revoked.add(revoked.slot)
            self.running[request] = epoch
        assert epoch <= known or self.running[request] == epoch

    @rule(request=REQUESTS, epoch=EPOCHS, offset=st.integers(0, 3))
    def adopt(self, request: str, epoch: int, offset: int) -> None:
        try:
            attempt = self.ledger.adopt(
                adoption(request, epoch, offset), "g", owner=("g", 1), now=0.0
            )
        except (KeyError, ValueError, Fenced):
            return
        assert epoch > self.running.get(request, 0)
        assert attempt.first_offset <= offset <= attempt.end_offset
        if attempt.ended is None:
            self.running[request] = epoch
        else:
            attempt.detach()

    @rule(count=st.integers(1, 3))
    def produce(self, count: int) -> None:
        for attempt in self.ledger:
            attempt.token_ids.extend([7] * count)

    @rule(index=st.integers(0, 3))
    def finish(self, index: int) -> None:
        running = list(self.ledger)
        if index < len(running):
            attempt = running[index]
            end(self.ledger, attempt, self.now)
            attempt.detach()
            if attempt.slot not in self.revoked:
                del self.running[attempt.stream[1]]

    @rule(link=st.sampled_from("fg"))
    def lose(self, link: str) -> None:
        lost = [attempt for attempt in self.ledger if attempt.link == link]
        self.ledger.orphan(lost, self.now)

    @rule(seconds=st.floats(0, 4))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for attempt in self.ledger.expired(self.now):
            assert attempt.link is None
            assert attempt.ended is None

    @invariant()
    def nothing_disagrees(self) -> None:
        self.ledger.check()
        valid = {a.stream[1]: a.epoch for a in self.ledger if a.slot not in self.revoked}
        assert valid == self.running


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
