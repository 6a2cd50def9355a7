"""A list of faults from a seed: what is hurt, when, in which way, for how long.

The same seed gives the same list, and a list can be kept in a file, a fault a line, and played
again. What the processes do meanwhile is theirs; only the faults are repeated.

A schedule never hurts all workers at once, nor all frontends, and leaves each victim time to
recover: what survives is what the mesh promises to survive.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from unbroken.chaos.vocabulary import NO_SENSE, Component, Harm

PAUSE_S: Final = (0.3, 1.5)
"""Between the beginnings of two faults."""
LASTS_S: Final = (0.2, 3.0)
"""How long a fault lasts that can be ended."""
RECOVERS_S: Final = 4.0
"""How long a victim is spared afterwards; a process needs some seconds to start."""

_OF_FRONTENDS: Final = frozenset({Component.FRONTEND, Component.CLIENT})


class ScheduleError(Exception):
    """A line is no fault of this mesh."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault to come."""

    at_s: float
    """From the beginning."""
    component: Component
    harm: Harm
    victim: str
    lasts_s: float
    """Until it is healed; what was killed is started again then."""


def plan(
    seed: int, seconds: float, worker_ids: Sequence[str], frontend_ids: Sequence[str]
) -> tuple[Planned, ...]:
    """Faults for so long, in order; at least two workers and two frontends are needed for all."""
    return tuple(_faults(random.Random(seed), seconds, worker_ids, frontend_ids))


def _faults(
    rng: random.Random, seconds: float, worker_ids: Sequence[str], frontend_ids: Sequence[str]
) -> Iterator[Planned]:
    cells = [(c, h) for c in Component for h in Harm if (c, h) not in NO_SENSE]
    spared_until: dict[str, float] = {}
    at_s = 0.0
    while True:
        at_s = round(at_s + rng.uniform(*PAUSE_S), 3)
        if at_s >= seconds:
            return
        component, harm = rng.choice(cells)
        lasts_s = round(rng.uniform(*LASTS_S), 3)
        group = frontend_ids if component in _OF_FRONTENDS else worker_ids
        hurt = [name for name in group if spared_until.get(name, 0.0) > at_s]
        well = sorted(set(group) - set(hurt))
        if len(well) < 2:
            continue  # The last one has to carry on.
        victim = "c1" if component is Component.CLIENT else rng.choice(well)
        # What hits the client hits all frontends, as far as it can see.
        for name in group if victim == "c1" else [victim]:
            spared_until[name] = at_s + lasts_s + RECOVERS_S
        yield Planned(at_s, component, harm, victim, lasts_s)


def to_lines(faults: Iterable[Planned]) -> str:
    """A fault a line."""
    return "".join(json.dumps(to_json(fault)) + "\n" for fault in faults)


def to_json(fault: Planned) -> Mapping[str, object]:
    """As in a file."""
    return {
        "at_s": fault.at_s,
        "component": fault.component.value,
        "harm": fault.harm.value,
        "victim": fault.victim,
        "lasts_s": fault.lasts_s,
    }


def from_lines(text: str, names: Iterable[str]) -> tuple[Planned, ...]:
    """The opposite of `to_lines`; raises `ScheduleError`. `names` are those of the mesh."""
    known = {*names, "c1"}
    faults: list[Planned] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            fault = Planned(
                float(given["at_s"]),
                Component(given["component"]),
                Harm(given["harm"]),
                str(given["victim"]),
                float(given["lasts_s"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ScheduleError(f"line {number}: expected a fault: {error!r}") from error
        if (reason := NO_SENSE.get((fault.component, fault.harm))) is not None:
            raise ScheduleError(f"line {number}: {reason}")
        if fault.victim not in known:
            expected = ", ".join(sorted(known))
            raise ScheduleError(f"line {number}: expected one of {expected}, got {fault.victim!r}")
        if not 0 <= fault.at_s < float("inf") or not 0 <= fault.lasts_s < float("inf"):
            raise ScheduleError(f"line {number}: expected times from 0 on")
        faults.append(fault)
    return tuple(sorted(faults, key=lambda fault: fault.at_s))
