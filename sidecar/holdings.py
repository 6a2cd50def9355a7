"""What a sidecar holds for streams, from its books: no I/O."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from sidecar import ledger
from sidecar.kv_account import num_blocks
from unbroken.holdings import Holding, Kind

Attempt: TypeAlias = "ledger.Attempt[Any]"


def held(
    running: Iterable[Attempt],
    *,
    replaying: Iterable[Attempt],
    prefilling: Mapping[int, int],
    given: Mapping[int, int],
    slots_by_frontend: Iterable[tuple[str, Iterable[Attempt]]],
    block_size: int,
) -> list[Holding]:
    """What is held for attempts that run, that are told again, and by mistake; not for probes.

    `prefilling` has the tokens that wait for their prefill, and `given` the KV blocks that no load
    report shows yet, by engine slot; `slots_by_frontend` are the attempts that each link knows by a
    handle. A `block_size` of 0 is not known.
    """
    found: list[Holding] = []
    known: set[int] = set()
    for attempt in running:
        known.add(attempt.slot)
        if attempt.is_probe:
            continue
        kind = Kind.ATTEMPT if attempt.orphaned_until is None else Kind.ORPHAN
        detail = "" if attempt.given_up is None else f"aborted: {attempt.given_up[1]}"
        found.append(_holding(attempt, kind, detail=detail))
        if block_size:
            amount = num_blocks([attempt.num_tokens], block_size)
            found.append(_holding(attempt, Kind.KV_BLOCKS, amount, "by the sidecar's account"))
        if num_tokens := prefilling.get(attempt.slot, 0):
            detail = "its prompt is not computed yet"
            found.append(_holding(attempt, Kind.RESERVATION, num_tokens, detail))
    # What follows has ended. Only what is told again may still be here.
    lost = {slot: amount for slot, amount in {**given, **prefilling}.items() if slot not in known}
    for attempt in replaying:
        if attempt.slot not in known:
            known.add(attempt.slot)
            found.append(_holding(attempt, Kind.REPLAY))
    for frontend_id, attempts in slots_by_frontend:
        found += [
            _holding(attempt, Kind.ATTEMPT, detail=f"a slot of {frontend_id}, after its end")
            for attempt in attempts
            if attempt.slot not in known
        ]
    found += [
        Holding(Kind.RESERVATION, None, amount=amount, detail=f"slot {slot}, after its end")
        for slot, amount in lost.items()
    ]
    return found


def _holding(attempt: Attempt, kind: Kind, amount: int = 1, detail: str = "") -> Holding:
    return Holding(kind, attempt.stream, attempt.began_at, amount, attempt.epoch, detail)
