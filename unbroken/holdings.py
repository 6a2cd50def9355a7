"""What a process holds for requests, told in one way by all of them: no I/O.

Whatever is done for a request takes things: places in lines, slots, KV blocks, tasks. When the
request is over, all of it has to be let go, however it ended. Each process lists what it holds
(`Holding`), `told` makes the message of it, and `num_held` is what has to be zero when nothing
runs. What is remembered within bounds, to be told again or to fence, is not held.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final, TypeAlias, cast

from unbroken.errors import InvalidField
from unbroken.v1 import attempt_pb2, worker_pb2
from unbroken.v1 import holding_pb2 as pb

if TYPE_CHECKING:  # Enums are types in the stubs only.
    from unbroken.v1.holding_pb2 import HoldingKind, ProcessRole

LISTED_DEFAULT: Final = 1_000
LISTED_MAX: Final = 10_000
"""Of one process, in one answer."""

StreamName: TypeAlias = tuple[str, str, int]
"""Tenant, request id and choice index."""


class Kind(IntEnum):
    """What is held; holding.proto says what each means."""

    REQUEST = pb.HOLDING_KIND_REQUEST
    READER = pb.HOLDING_KIND_READER
    QUEUE_ENTRY = pb.HOLDING_KIND_QUEUE_ENTRY
    RESERVATION = pb.HOLDING_KIND_RESERVATION
    ATTEMPT = pb.HOLDING_KIND_ATTEMPT
    ORPHAN = pb.HOLDING_KIND_ORPHAN
    REPLAY = pb.HOLDING_KIND_REPLAY
    KV_BLOCKS = pb.HOLDING_KIND_KV_BLOCKS
    TASK = pb.HOLDING_KIND_TASK
    CLAIM = pb.HOLDING_KIND_CLAIM


@dataclass(frozen=True, slots=True)
class Holding:
    """One thing that is held for one stream."""

    kind: Kind
    stream: StreamName | None
    """None: for nobody that is known."""
    since: float | None = None
    """Monotonic seconds; None if that is not known."""
    amount: int = 1
    epoch: int = 0
    detail: str = ""


def told(
    role: "ProcessRole.ValueType",
    name: str,
    incarnation: int,
    holdings: Iterable[Holding],
    *,
    now: float,
    listed_max: int,
    detail: str = "",
) -> pb.ProcessHoldings:
    """What a process holds: totals of everything, and the oldest `listed_max` of it."""
    all_of_them = sorted(holdings, key=_oldest_first)
    message = pb.ProcessHoldings(role=role, name=name, incarnation=incarnation, detail=detail)
    for holding in all_of_them[:listed_max]:
        message.holdings.append(to_proto(holding, now))
    nums: Counter[Kind] = Counter()
    amounts: Counter[Kind] = Counter()
    for holding in all_of_them:
        nums[holding.kind] += 1
        amounts[holding.kind] += holding.amount
    for kind in sorted(nums):
        message.totals.add(kind=_kind_to_proto(kind), num=nums[kind], amount=amounts[kind])
    return message


def to_proto(holding: Holding, now: float) -> pb.Holding:
    """The message of one holding."""
    message = pb.Holding(
        kind=_kind_to_proto(holding.kind),
        epoch=holding.epoch,
        amount=holding.amount,
        detail=holding.detail,
    )
    if holding.stream is not None:
        tenant, request_id, choice_index = holding.stream
        message.stream.CopyFrom(
            attempt_pb2.StreamKey(tenant=tenant, request_id=request_id, choice_index=choice_index)
        )
    if holding.since is not None:
        message.age.FromNanoseconds(max(0, round((now - holding.since) * 1e9)))
    return message


def from_proto(message: pb.Holding, now: float) -> Holding | None:
    """What another process holds; None if it is of a kind that is not known here."""
    if message.kind not in _KINDS:
        return None
    key = message.stream
    return Holding(
        Kind(message.kind),
        (key.tenant, key.request_id, key.choice_index) if message.HasField("stream") else None,
        now - message.age.ToNanoseconds() / 1e9 if message.HasField("age") else None,
        message.amount,
        message.epoch,
        message.detail,
    )


def of_load(load: worker_pb2.LoadReport | None) -> list[Holding]:
    """What an engine holds as far as its load report tells: for whom is not known."""
    held: list[Holding] = []
    for rank in load.ranks if load is not None else ():
        amounts = (
            (Kind.KV_BLOCKS, rank.kv_blocks_used),
            (Kind.ATTEMPT, rank.requests_running),
            (Kind.QUEUE_ENTRY, rank.requests_waiting),
        )
        held += [
            Holding(kind, None, amount=amount, detail=f"rank {rank.rank}")
            for kind, amount in amounts
            if amount
        ]
    return held


def num_held(processes: Iterable[pb.ProcessHoldings]) -> int:
    """How many things all of them hold."""
    return sum(total.num for process in processes for total in process.totals)


def is_empty(processes: Sequence[pb.ProcessHoldings]) -> bool:
    """Whether all could be asked and hold nothing; an engine that does not tell is believed its
    load report.
    """
    is_whole = all(
        not process.detail or process.role == pb.PROCESS_ROLE_ENGINE for process in processes
    )
    return is_whole and not num_held(processes)


def listed_max(asked: int) -> int:
    """How many holdings of a process are listed; raises `InvalidField`."""
    if asked > LISTED_MAX:
        raise InvalidField("holdings_max", f"0 to {LISTED_MAX}", asked)
    return asked or LISTED_DEFAULT


_KINDS: Final = frozenset(map(int, Kind))


def _oldest_first(holding: Holding) -> tuple[bool, float, StreamName, Kind]:
    """Those without an owner, and of unknown age, come first: they are to be explained."""
    since = float("-inf") if holding.since is None else holding.since
    return holding.stream is not None, since, holding.stream or ("", "", 0), holding.kind


def _kind_to_proto(kind: Kind) -> "HoldingKind.ValueType":
    return cast("HoldingKind.ValueType", int(kind))
