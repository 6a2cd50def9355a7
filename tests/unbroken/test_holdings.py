"""Claims of `unbroken.holdings`."""

import pytest

from unbroken import holdings
from unbroken.errors import InvalidField
from unbroken.holdings import Holding, Kind
from unbroken.v1 import holding_pb2 as pb
from unbroken.v1 import worker_pb2

STREAM = ("t", "r", 1)


def told(*held: Holding, listed_max: int = 10) -> pb.ProcessHoldings:
    return holdings.told(pb.PROCESS_ROLE_SIDECAR, "w1", 7, held, now=100.0, listed_max=listed_max)


def test_who_holds_nothing_has_no_totals() -> None:
    assert told() == pb.ProcessHoldings(role=pb.PROCESS_ROLE_SIDECAR, name="w1", incarnation=7)
    assert holdings.num_held([told(), told()]) == 0


def test_totals_count_all_though_only_the_oldest_are_listed() -> None:
    held = [Holding(Kind.KV_BLOCKS, STREAM, 90.0 + index, amount=2) for index in range(5)]
    held.append(Holding(Kind.ATTEMPT, STREAM, 1.0, epoch=3))
    message = told(*reversed(held), listed_max=2)
    assert [(total.kind, total.num, total.amount) for total in message.totals] == [
        (pb.HOLDING_KIND_ATTEMPT, 1, 1),
        (pb.HOLDING_KIND_KV_BLOCKS, 5, 10),
    ]
    assert [holding.age.seconds for holding in message.holdings] == [99, 10]
    assert holdings.num_held([message, message]) == 12


def test_what_belongs_to_nobody_is_listed_first() -> None:
    message = told(Holding(Kind.ATTEMPT, STREAM, 1.0), Holding(Kind.KV_BLOCKS, None, 99.0))
    assert not message.holdings[0].HasField("stream")


@pytest.mark.parametrize(
    "holding",
    [
        Holding(Kind.ATTEMPT, STREAM, 90.0, 1, 4, "at w1"),
        Holding(Kind.KV_BLOCKS, None, None, 17),
        Holding(Kind.QUEUE_ENTRY, ("", "r", 0), 100.0, 0),
    ],
)
def test_a_holding_survives_the_wire(holding: Holding) -> None:
    assert holdings.from_proto(holdings.to_proto(holding, 100.0), 100.0) == holding


def test_a_kind_of_a_later_contract_is_left_out() -> None:
    message = pb.Holding()
    message.ParseFromString(b"\x08\x63")  # kind = 99
    assert holdings.from_proto(message, 0.0) is None


def test_a_load_report_tells_how_much_is_held_and_not_for_whom() -> None:
    ranks = [
        worker_pb2.RankLoad(rank=0, kv_blocks_total=9, kv_blocks_cached=5),
        worker_pb2.RankLoad(rank=1, kv_blocks_used=3, requests_running=2),
    ]
    held = holdings.of_load(worker_pb2.LoadReport(ranks=ranks))
    assert [(one.kind, one.amount, one.stream) for one in held] == [
        (Kind.KV_BLOCKS, 3, None),
        (Kind.ATTEMPT, 2, None),
    ]
    assert holdings.of_load(None) == []


def test_a_mesh_is_empty_when_all_could_be_asked_and_hold_nothing() -> None:
    silent = pb.ProcessHoldings(role=pb.PROCESS_ROLE_SIDECAR, name="w2", detail="UNREACHABLE")
    by_its_load = pb.ProcessHoldings(role=pb.PROCESS_ROLE_ENGINE, name="w1", detail="no word")
    assert holdings.is_empty([told(), by_its_load])
    assert not holdings.is_empty([told(), silent])
    assert not holdings.is_empty([told(), told(Holding(Kind.TASK, STREAM))])


def test_how_many_are_listed_is_bounded() -> None:
    assert holdings.listed_max(0) == holdings.LISTED_DEFAULT
    assert holdings.listed_max(3) == 3
    with pytest.raises(InvalidField, match="holdings_max"):
        holdings.listed_max(holdings.LISTED_MAX + 1)
