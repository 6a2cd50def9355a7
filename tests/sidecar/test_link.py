"""What waits for a frontend: merged, bounded, in order."""

import pytest

from sidecar import link as link_module
from sidecar.link import Link
from tests.sidecar.fakes import Reader, failed
from unbroken.errors import Reason
from unbroken.outcome import FailureKind
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2
from unbroken.v1 import relay_service_pb2 as pb


def opened() -> Link:
    hello = pb.RelayHello(frontend_id="f", incarnation=1, call_number=1)
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
