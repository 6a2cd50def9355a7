"""What waits for a frontend: merged, bounded, in order."""

from collections.abc import Callable

import pytest

from sidecar import link as link_module
from sidecar.link import Link
from tests.sidecar.fakes import Reader, failed
from unbroken.errors import Reason
from unbroken.outcome import FailureKind
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2
from unbroken.v1 import relay_service_pb2 as pb


def opened(*, takes_next_tokens: bool = False) -> Link:
    hello = pb.RelayHello(
        frontend_id="f", incarnation=1, call_number=1, takes_next_tokens=takes_next_tokens
    )
    return Link(hello, now=0.0, on_news=lambda: None)


def read(link: Link, reader: Reader | None = None) -> Reader:
    reader = reader or Reader()
    for response in link.take(0.25, worker_pb2.LoadReport(engine_steps_total=3)):
        reader.hear(response)
    return reader


def test_steps_that_the_writer_missed_are_one_frame() -> None:
    link = opened()
    for offset in range(3):
        link.rows([1, 2], [offset, offset], [10 + offset, 20 + offset])
        link.flush()
    reader = read(link)
    assert reader.num_frames == 1
    assert reader.tokens == {1: [10, 11, 12], 2: [20, 21, 22]}
    assert link.take(0.25, None) == []


def test_rows_of_one_and_of_many_tokens_merge() -> None:
    link = opened()
    link.rows([1, 2], [0, 0], [10, 20])
    link.row(1, 1, [11, 12])
    link.row(2, 1, [21])
    link.rows([1, 2], [3, 2], [13, 22])
    link.flush()
    reader = read(link)
    assert reader.tokens == {1: [10, 11, 12, 13], 2: [20, 21, 22]}
    link.row(1, 4, [14])
    link.flush()
    (response,) = link.take(0.25, None)
    assert not response.frame.token_counts, "counts are for frames that need them"
    reader.hear(response)
    assert reader.tokens[1] == [10, 11, 12, 13, 14]


def test_log_probabilities_of_a_slot_are_one_entry_a_frame() -> None:
    link = opened()
    for offset in range(2):
        link.rows([1], [offset], [7])
        token = generation_pb2.TokenLogprobs(logprob=-float(offset))
        link.logprobs(1, attempt_pb2.SlotLogprobs(slot=99, tokens=[token]))
        link.flush()
    assert read(link).logprobs == {1: [-0.0, -1.0]}


def test_what_is_told_keeps_its_place_among_the_frames() -> None:
    link = opened()
    link.rows([1], [0], [7])
    link.flush()
    link.tell(pb.RelayResponse(verdict=pb.EngineVerdict(detail="dead")))
    link.rows([2], [0], [8])
    link.flush()
    link.heartbeat()
    assert read(link).order == ["frame", "verdict", "frame", "heartbeat"]


def test_adoptions_that_wait_are_one_message_and_come_before_their_tokens() -> None:
    link = opened()
    link.rows([1], [0], [7])
    link.flush()
    for slot in (2, 3, 4):
        link.adopted(pb.AttemptAdopted(slot=slot, end_offset=2))
        link.row(slot, 0, [20 + slot, 30 + slot])
        link.flush()
    reader = read(link)
    assert reader.order == ["adoptions", "frame"]
    assert set(reader.adopted) == {2, 3, 4}
    assert reader.tokens == {1: [7], 2: [22, 32], 3: [23, 33], 4: [24, 34]}
    link.adopted(pb.AttemptAdopted(slot=5))
    assert read(link, reader).order == ["adoptions", "frame", "adopted"]
    assert link.take(0.25, None) == []


def test_adoptions_of_long_prompts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "FRAME_BYTES_MAX", 10_000)
    monkeypatch.setattr(link_module, "WAITING_BYTES_MAX", 30_000)
    link = opened()
    checkpoint = attempt_pb2.Checkpoint(prompt_token_ids=[1000] * 2000)
    for slot in range(1, 6):
        link.adopted(pb.AttemptAdopted(slot=slot, checkpoint=checkpoint))
    assert link.error is None
    responses = link.take(0.25, None)
    assert max(response.ByteSize() for response in responses) < 15_000
    for slot in range(6, 16):
        link.adopted(pb.AttemptAdopted(slot=slot, checkpoint=checkpoint))
    assert link.error is not None
    assert link.error.reason is Reason.OVERLOADED


def test_a_frame_that_is_too_large_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "FRAME_BYTES_MAX", 1000)
    monkeypatch.setattr(link_module, "WAITING_BYTES_MAX", 100 * 16)
    link = opened()
    for slot in range(100):
        link.row(slot, 0, [1])
    link.flush()
    assert link.error is None
    link.row(100, 0, [1])
    link.flush()
    assert link.error is not None


def test_heartbeats_that_were_not_written_are_one() -> None:
    link = opened()
    link.heartbeat_seen = 42
    link.heartbeat()
    link.heartbeat()
    reader = read(link)
    link.heartbeat()
    read(link, reader)
    assert [heartbeat.sequence for heartbeat in reader.heartbeats] == [1, 2]
    first = reader.heartbeats[0]
    assert (first.sequence_seen, first.interval.ToMilliseconds()) == (42, 250)
    assert first.load.engine_steps_total == 3


def test_the_load_waits_for_a_frame_and_the_newest_counts() -> None:
    link = opened()
    for steps in (1, 2):
        link.load(worker_pb2.LoadReport(engine_steps_total=steps))
    assert link.is_idle
    assert link.take(0.25, None) == []
    link.rows([1], [0], [7])
    link.flush()
    (response,) = link.take(0.25, None)
    assert response.frame.load.engine_steps_total == 2


def test_frames_stay_smaller_than_what_a_frontend_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "FRAME_BYTES_MAX", 4096)
    link = opened()
    for offset in range(1000):
        link.rows([1], [offset], [2**32 - 1])
        link.flush()
    for _ in range(3):
        link.kv_events(worker_pb2.KvEvents(stored=[7] * 300))
    responses = link.take(0.25, None)
    assert len(responses) >= 4
    assert all(response.ByteSize() <= 4096 + 64 for response in responses)
    reader = Reader()
    for response in responses:
        reader.hear(response)
    assert reader.tokens == {1: [2**32 - 1] * 1000}
    assert len(reader.kv_events) == 3


@pytest.mark.parametrize("what", ["tokens", "ends", "refusals", "logprobs", "blocks", "news"])
def test_whoever_does_not_read_is_given_up(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "FRAME_BYTES_MAX", 4096)
    monkeypatch.setattr(link_module, "WAITING_BYTES_MAX", 65536)
    link = opened()
    token = generation_pb2.TokenLogprobs(top_token_ids=range(20), top_logprobs=[0.5] * 20)
    for index in range(66_000):
        match what:
            case "tokens":
                link.rows([1], [index], [7])
            case "ends":
                link.end(index, failed(1, 0, FailureKind.CRASH), 0)
            case "refusals":
                link.refuse(attempt_pb2.AttemptRefused(slot=index))
            case "logprobs":
                link.logprobs(1, attempt_pb2.SlotLogprobs(tokens=[token]))
            case "blocks":
                link.kv_events(worker_pb2.KvEvents(stored=[1] * 10))
            case _:
                link.tell(pb.RelayResponse(verdict=pb.EngineVerdict()))
        link.flush()
        if link.error is not None:
            break
    else:
        raise AssertionError("nothing is bounded")
    assert link.error.reason is Reason.OVERLOADED


def test_a_link_is_idle_once_all_is_written() -> None:
    news: list[int] = []
    hello = pb.RelayHello(frontend_id="f", incarnation=1, call_number=1)
    link = Link(hello, now=0.0, on_news=lambda: news.append(1))
    assert link.is_idle
    link.rows([1], [0], [7])
    assert not news, "a frame may be closed only when it is whole"
    link.flush()
    assert (len(news), link.is_idle) == (1, False)
    link.take(0.25, None)
    assert not link.is_idle, "taken is not written"
    link.written()
    assert link.is_idle


def test_the_writer_learns_why_a_call_ends_and_the_first_reason_counts() -> None:
    news: list[int] = []
    hello = pb.RelayHello(frontend_id="f", incarnation=1, call_number=1)
    link = Link(hello, now=0.0, on_news=lambda: news.append(1))
    link.close(Reason.FENCED, "the first reason")
    link.close(Reason.OVERLOADED, "the second")
    assert (bool(news), link.is_idle) == (True, False)
    assert link.error is not None
    assert link.error.reason is Reason.FENCED


class Stepping:
    """A link that is told steps of the same rows."""

    def __init__(self, *, takes_next_tokens: bool = True) -> None:
        self.link = opened(takes_next_tokens=takes_next_tokens)
        self.reader = Reader()
        self.slots = [1, 2]
        """The same object for the same rows."""
        self.offset = 0

    def step(self) -> None:
        at = self.offset
        self.link.rows(self.slots, [at, at], [10 + at, 20 + at])
        self.link.flush()
        self.offset += 1

    def read(self) -> list[str]:
        """What comes of it: kinds of frames."""
        self.reader.order.clear()
        read(self.link, self.reader)
        assert self.reader.tokens.get(1, []) == list(range(10, 10 + self.offset))
        return self.reader.order


def test_steps_of_the_same_rows_say_no_more_than_tokens() -> None:
    stepping = Stepping()
    kinds: list[str] = []
    for _ in range(4):
        stepping.step()
        kinds += stepping.read()
    assert kinds == ["frame", "next_tokens", "next_tokens", "next_tokens"]
    assert stepping.reader.tokens[2] == [20, 21, 22, 23]


def test_a_frontend_that_does_not_take_them_is_sent_frames() -> None:
    stepping = Stepping(takes_next_tokens=False)
    for _ in range(3):
        stepping.step()
        assert stepping.read() == ["frame"]


def ends_another(link: Link) -> None:
    link.end(3, failed(3, 0, FailureKind.CRASH), 0)


def refuses_another(link: Link) -> None:
    link.refuse(attempt_pb2.AttemptRefused(slot=3))


def has_a_load(link: Link) -> None:
    link.load(worker_pb2.LoadReport(engine_steps_total=2))


def has_kv_events(link: Link) -> None:
    link.kv_events(worker_pb2.KvEvents(stored=[1]))


def has_logprobs(link: Link) -> None:
    token = generation_pb2.TokenLogprobs(logprob=-1.0)
    link.logprobs(1, attempt_pb2.SlotLogprobs(slot=1, tokens=[token]))


def has_another_row(link: Link) -> None:
    link.row(3, 0, [7])
    link.flush()


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize(
    ("says", "are_like_those_before"),
    [
        (ends_another, False),
        (refuses_another, False),
        (has_a_load, True),
        (has_kv_events, True),
        (has_logprobs, False),
        (has_another_row, False),
    ],
)
def test_a_step_with_something_beside_it_is_a_frame(
    says: Callable[[Link], None], *, are_like_those_before: bool, is_before: bool
) -> None:
    stepping = Stepping()
    for _ in range(2):
        stepping.step()
        stepping.read()
    if is_before:
        says(stepping.link)
    stepping.step()
    if not is_before:
        says(stepping.link)
    assert stepping.read() == ["frame"]
    stepping.step()
    assert stepping.read() == ["next_tokens" if are_like_those_before else "frame"]
    stepping.step()
    assert stepping.read() == ["next_tokens"]


def test_several_steps_that_the_writer_missed_are_a_frame_and_so_is_the_next() -> None:
    stepping = Stepping()
    stepping.step()
    stepping.read()
    for _ in range(3):
        stepping.step()
    assert stepping.read() == ["frame"]
    stepping.step()
    assert stepping.read() == ["frame"]
    stepping.step()
    assert stepping.read() == ["next_tokens"]


def test_what_is_told_between_two_steps_parts_no_rows() -> None:
    stepping = Stepping()
    stepping.step()
    stepping.link.tell(pb.RelayResponse(verdict=pb.EngineVerdict(detail="so so")))
    stepping.link.heartbeat()
    assert stepping.read() == ["frame", "verdict", "heartbeat"]
    stepping.step()
    assert stepping.read() == ["next_tokens"]


def test_other_rows_are_a_frame_even_if_they_look_the_same() -> None:
    stepping = Stepping()
    stepping.step()
    stepping.read()
    stepping.slots = list(stepping.slots)
    stepping.step()
    assert stepping.read() == ["frame"]


@pytest.mark.parametrize("num_sealed", [0, 1, 2])
def test_a_step_that_waits_counts_as_what_it_has(
    num_sealed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the last one, after some that are frames of their own already."""
    verdict = pb.RelayResponse(verdict=pb.EngineVerdict())
    step_bytes, verdict_bytes = 2 * 16, 128 + verdict.ByteSize()
    num_bytes = num_sealed * (step_bytes + verdict_bytes) + step_bytes
    for num_bytes_max in (num_bytes, num_bytes - 1):
        monkeypatch.setattr(link_module, "WAITING_BYTES_MAX", num_bytes_max)
        stepping = Stepping()
        for _ in range(num_sealed):
            stepping.step()
            stepping.link.tell(verdict)
        assert stepping.link.error is None
        stepping.step()
        assert (stepping.link.error is None) == (num_bytes_max == num_bytes)
