"""What a worker refuses by thresholds, whoever sends it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.admission import KEPT_S, REPORTS_BELIEVED, Admission, Told
from unbroken.errors import InvalidField
from unbroken.thresholds import Thresholds
from unbroken.v1 import worker_pb2

LIMIT = 1000
BATCH = 512


class Door:
    """An admission, and an engine that computes when it is told to."""

    def __init__(self, *links: str, num_ranks: int = 1) -> None:
        self.admission = Admission[str]()
        self.admission.up(
            worker_pb2.EngineDescription(
                block_size=16, num_ranks=num_ranks, prefill_tokens_max=BATCH * num_ranks
            )
        )
        self.num_ranks = num_ranks
        for link in links or ("a",):
            self.tell(link)
        self.now = 100.0
        self.slot = 0
        self.queued: dict[int, int] = {}
        """What the engine has not computed, by slot, of what it has read."""
        self.unread: dict[int, int] = {}
        self.steps = 0

    def tell(self, link: str, limit: int | None = LIMIT, version: int = 0) -> None:
        self.admission.told(link, Told(Thresholds(prefill_tokens=limit), version))

    def offer(self, num_tokens: int, link: str = "a", tenant: str = "t") -> bool:
        """New work; whether it gets in."""
        if self.admission.reason_to_refuse(link, tenant, num_tokens, self.now) is not None:
            return False
        self.give(num_tokens, tenant)
        return True

    def give(self, num_tokens: int, tenant: str = "t") -> int:
        """What gets in anyway."""
        self.slot += 1
        self.unread[self.slot] = num_tokens
        self.admission.began(self.slot, num_tokens, tenant, self.now)
        return self.slot

    def read(self, number: int) -> None:
        """The engine reads so many of those that wait to be read."""
        for slot in list(self.unread)[:number]:
            self.queued[slot] = self.unread.pop(slot)

    def compute(self, num_tokens: int) -> None:
        """The engine computes, first come first served."""
        self.steps += bool(self.queued)
        for slot in list(self.queued):
            done = min(num_tokens, self.queued[slot])
            num_tokens -= done
            self.queued[slot] -= done
            if not self.queued[slot]:
                del self.queued[slot]
                self.admission.computed(slot)

    def report(self, *, says_slot: bool = True) -> None:
        seen = min(self.unread, default=self.slot + 1) - 1
        load = worker_pb2.LoadReport(engine_steps_total=self.steps)
        load.ranks.add(prefill_tokens_queued=sum(self.queued.values()), kv_blocks_total=1000)
        self.admission.reported(load, seen if says_slot else 0, self.now)

    @property
    def num_tokens(self) -> int:
        """All that the engine has to compute, read or not."""
        return sum(self.queued.values()) + sum(self.unread.values())


def test_a_burst_before_any_report_stops_with_the_request_that_crosses_the_threshold() -> None:
    door = Door()
    assert [door.offer(300) for _ in range(6)] == [True] * 4 + [False] * 2
    assert door.num_tokens == 1200


def test_all_frontends_fill_one_account() -> None:
    door = Door("a", "b", "c")
    got_in = [door.offer(100, link) for _ in range(10) for link in "abc"]
    assert sum(got_in) == 11


def test_a_report_counts_what_the_engine_has_read_and_the_rest_comes_on_top() -> None:
    door = Door()
    for _ in range(4):
        assert door.offer(300)
    door.read(2)
    door.report()
    assert door.admission.given.prefill_tokens == 600
    assert not door.offer(1)
    door.compute(600)
    door.report()
    assert door.offer(500)
    assert not door.offer(1)
    door.admission.check()


def test_what_is_computed_makes_room_before_the_next_report_unless_it_was_reported() -> None:
    door = Door()
    door.offer(1001)
    door.read(1)
    assert not door.offer(1)
    door.compute(1001)
    assert door.offer(1), "it has a token, so its prompt is computed"
    door.offer(1001)
    door.read(2)
    door.report()
    door.compute(2000)
    assert not door.offer(BATCH), "how much of it was left at the report is not known"
    door.report()
    assert door.offer(1)


def test_what_ends_before_the_engine_tells_of_it_counts_no_more() -> None:
    door = Door()
    slot = door.give(2000)
    assert not door.offer(1)
    door.admission.over(slot)
    door.admission.over(slot)
    assert door.offer(1)
    door.admission.check()


def test_what_was_admitted_before_gets_in_and_counts() -> None:
    door = Door()
    door.give(5000)
    assert not door.offer(1)
    assert door.admission.load(None).ranks[0].prefill_tokens_queued == 5000


def test_an_engine_that_does_not_say_what_it_has_read_is_believed_after_two_steps() -> None:
    door = Door()
    door.offer(1001)
    door.read(1)
    for _ in range(REPORTS_BELIEVED):
        door.report(says_slot=False)
        assert door.admission.given.prefill_tokens == 1001, "no step began since"
        door.steps += 1
    door.report(says_slot=False)
    door.steps += 1
    door.report(says_slot=False)
    assert door.admission.given.prefill_tokens == 0


def test_the_newest_thresholds_count_for_all_and_of_one_version_each_ones_own() -> None:
    door = Door("a", "b")
    door.give(500)
    door.tell("a", 400, version=3)
    assert (door.offer(1, "a"), door.offer(1, "b")) == (False, False)
    door.tell("b", 600, version=3)
    assert (door.offer(1, "a"), door.offer(1, "b")) == (False, True)
    door.tell("b", None, version=4)
    assert (door.offer(1, "a"), door.offer(1, "b")) == (True, True)
    door.admission.left("b")
    assert not door.offer(1, "a"), "whoever knew better has gone, and may have been wrong"


def test_frontends_that_tell_nothing_are_refused_nothing() -> None:
    door = Door("a")
    door.admission.left("a")
    door.give(10_000)
    assert door.offer(1)


def test_the_last_batch_is_for_tenants_that_have_no_prompt_before_the_engine() -> None:
    door = Door()
    while door.offer(100, tenant="many"):
        pass
    assert door.num_tokens == 1100
    assert not door.offer(BATCH, tenant="one"), "together they would be beyond a batch more"
    assert door.offer(300, tenant="one")
    assert door.offer(10, tenant="one"), "it had less lately than another"
    assert not door.offer(10, tenant="many")
    assert door.offer(100, tenant="another")
    assert not door.offer(100, tenant="yet another")
    assert door.num_tokens <= LIMIT + BATCH
    door.read(20)
    door.report()
    door.compute(1512)
    assert door.num_tokens == 0
    assert door.offer(1, tenant="many"), "it has none before the engine any more"
    door.admission.check()


def test_who_had_as_much_lately_as_others_is_one_of_the_many() -> None:
    door = Door()
    while door.offer(100, tenant="many"):
        pass
    assert door.offer(300, tenant="one")
    door.now += 0.1
    door.read(20)
    door.compute(1100)
    door.report()
    assert door.num_tokens == 300, "of one"
    door.give(900, tenant="one")
    assert door.num_tokens == 1200
    assert not door.offer(1, tenant="one"), "it had more lately than many"
    door.give(200, tenant="another")
    door.now += 60.0
    door.give(100, tenant="another")
    assert door.offer(1, tenant="one"), "that was long ago"
    door.admission.check()


def test_a_burst_of_who_asks_for_little_in_all_does_not_wait_for_its_own_prompts() -> None:
    door = Door()
    for _ in range(10):  # The greedy one has what is left, all the time.
        while door.offer(256, tenant="greedy"):
            pass
        door.read(99)
        door.now += 0.1
        door.compute(BATCH)
        door.report()
    while door.offer(256, tenant="greedy"):
        pass
    assert door.num_tokens > LIMIT
    assert door.offer(200, tenant="modest")
    assert door.offer(200, tenant="modest"), "though it has one before the engine"
    door.admission.check()


def test_room_is_kept_for_a_moment_for_a_tenant_that_was_refused_and_had_less() -> None:
    door = Door()
    while door.offer(300, tenant="many"):
        pass
    assert door.offer(300, tenant="one")
    assert not door.offer(300, tenant="one")
    door.read(9)
    door.compute(600)
    door.report()
    assert door.num_tokens == 900
    refusal = door.admission.reason_to_refuse("a", "many", 300, door.now)
    assert refusal is not None
    assert "room is kept" in str(refusal)
    told = door.admission.load(None, refusal)
    assert told.ranks[0].prefill_tokens_queued == LIMIT + 1, "busy, for this one"
    assert door.offer(50, tenant="one"), "it is back"
    assert door.offer(50, tenant="many"), "and nothing is kept any more"
    assert not door.offer(300, tenant="many"), "nobody crosses a threshold beside others"
    door.admission.check()


def test_room_in_the_last_batch_is_kept_as_other_room_is() -> None:
    door = Door()
    while door.offer(300, tenant="many"):
        pass
    door.give(100, tenant="some")
    while door.offer(100, tenant="one"):
        pass
    door.give(300, tenant="some")
    had = door.num_tokens
    door.read(99)
    door.compute(600)
    door.report()
    assert LIMIT < door.num_tokens < had
    assert not door.offer(50, tenant="some"), "it has had more than one, who was refused"
    assert door.offer(50, tenant="one")
    assert door.offer(50, tenant="some"), "though less than many"
    door.admission.check()


def test_a_tenant_without_a_prompt_is_nobody_for_whom_others_wait() -> None:
    door = Door()
    for n in range(10):
        assert door.offer(0, tenant=f"t{n}")
    assert door.offer(100)
    assert door.offer(2 * LIMIT), "as if it were alone"
    assert not door.admission._prefilling.keys() - {"t"}  # pyright: ignore[reportPrivateUsage]


def test_room_is_not_kept_for_who_does_not_come() -> None:
    door = Door()
    while door.offer(300, tenant="many"):
        pass
    door.offer(300, tenant="one")
    door.offer(300, tenant="one")
    door.read(9)
    door.now += 10.0
    door.compute(600)
    door.report()
    assert not door.offer(300, tenant="many"), "however long it took until there was room"
    door.now += KEPT_S
    assert door.offer(100, tenant="many")


def test_kv_blocks_are_kept_for_nobody() -> None:
    door = Door()
    door.admission.told("a", Told(Thresholds(kv_blocks_share=0.5)))
    door.report()
    assert door.offer(16 * 501, tenant="many")
    assert not door.offer(16, tenant="one")


def test_thresholds_that_make_no_sense_are_not_taken() -> None:
    door = Door()
    with pytest.raises(InvalidField):
        door.admission.told("a", Told(Thresholds(kv_blocks_share=2.0)))
    assert door.admission.thresholds_for("a").thresholds.prefill_tokens == LIMIT


def test_kv_blocks_that_were_given_count() -> None:
    door = Door()
    door.admission.told("a", Told(Thresholds(kv_blocks_share=0.5)))
    door.report()
    assert door.offer(16 * 500)
    assert door.offer(16), "half of them is not more than half"
    assert not door.offer(16)
    assert door.admission.load(None).ranks[0].kv_blocks_used == 501


def test_a_worker_takes_work_while_one_of_its_ranks_does() -> None:
    door = Door(num_ranks=2)
    load = worker_pb2.LoadReport(engine_steps_total=1)
    for queued in (5000, 900):
        load.ranks.add(rank=len(load.ranks), prefill_tokens_queued=queued)
    door.admission.reported(load, 0, door.now)
    assert door.offer(200), "the second rank has room"
    assert not door.offer(1)
    told = door.admission.load(load)
    assert [rank.prefill_tokens_queued for rank in told.ranks] == [5000, 1100]


def test_a_new_life_of_the_engine_has_nothing() -> None:
    door = Door()
    door.give(5000)
    door.admission.up(worker_pb2.EngineDescription(block_size=16))
    assert door.admission.given.prefill_tokens == 0
    door.admission.check()


@given(
    events=st.lists(
        st.one_of(
            st.tuples(st.just("offer"), st.integers(1, BATCH)),
            st.tuples(st.just("read"), st.integers(1, 5)),
            st.tuples(st.just("compute"), st.integers(1, BATCH)),
            st.tuples(st.just("report"), st.just(0)),
        ),
        max_size=80,
    )
)
def test_whatever_happens_no_more_than_one_batch_is_beyond_the_threshold(
    events: list[tuple[str, int]],
) -> None:
    door = Door("a", "b")
    for index, (kind, amount) in enumerate(events):
        match kind:
            case "offer":
                door.offer(amount, "ab"[index % 2], "xyz"[index % 3])
            case "read":
                door.read(amount)
            case "compute":
                door.compute(amount)
            case _:
                door.report()
        assert door.num_tokens <= LIMIT + BATCH
        door.admission.check()
