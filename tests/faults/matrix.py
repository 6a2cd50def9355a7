"""The fault matrix: what is hurt, how, in which phase of a stream, on real processes.

    python -m tests.faults.matrix [--trials 5] [--cell engine/kill ...] [--write]

A trial runs streams so that all phases are there at one moment, hurts one component at that moment,
sees that it was hurt, and waits for the streams. Every stream must be complete and equal to an
undisturbed run, or end with the documented error; nothing may be held for it afterwards. In which
phase a stream was is judged by what its client had read at that moment and by the engine's own
report of its line; a cell has been tried when a stream of the victim really was in that phase.

The last line is JSON. docs/CHAOS.md has the table and says which cells make no sense.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

import uvloop

from unbroken.chaos.arena import Arena, Fault
from unbroken.chaos.checker import Came, Event, Verdict, check, longest_wait_s
from unbroken.chaos.processes import NoEffect
from unbroken.chaos.vocabulary import NO_SENSE, Component, Harm
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import inference_service_pb2 as pb

STEP_S: Final = 0.020
PREFILL_STEPS: Final = 20
PREFILL_TOKENS_MAX: Final = 64
BATCH_SIZE: Final = 10
EDGE_TOKENS: Final = 4
"""A stream with at most so many tokens is at its first; with so few to come, at its last."""

ENGINE_OPTIONS: Final = (
    f"--step-base-ms {STEP_S * 1e3:g} --batch-size-max {BATCH_SIZE}"
    f" --prefill-tokens-max {PREFILL_TOKENS_MAX} --prefill-tokens-per-s 1000000"
)
ARRIVAL_LOOKS_MAX: Final = 20
"""So often it is looked whether all streams have arrived; a look takes some milliseconds."""
RECOVER_WITHIN_S: Final = 8.0
"""Streams that are not over by then, with the fault still there, are hung."""
END_WITHIN_S: Final = 15.0
"""The same after the fault has ended, to see how they end."""
LASTS_S: Final = 3.0
"""How long a fault lasts that streams only have to bear: slowness, and what hits clients."""
FREE_WITHIN_S: Final = 3.0
"""A vanished client is noticed within 2.5 s; then its streams are over, and their blocks free."""
_VANISHED: Final = frozenset({Harm.KILL, Harm.STOP, Harm.BLACKHOLE})
PAGE: Final = Path(__file__).parents[2] / "docs" / "CHAOS.md"


class Phase(Enum):
    """Where a stream is."""

    QUEUED = "queued"
    """In the engine's line, without a place in its batch."""
    PREFILL = "prefill"
    FIRST = "first token"
    MIDDLE = "middle"
    LAST = "last token"
    AFTER = "after the end"


CELLS: Final = tuple(
    (component, harm)
    for component in Component
    for harm in Harm
    if (component, harm) not in NO_SENSE
)
FAST_CELLS: Final = (
    (Component.HOST, Harm.KILL),
    (Component.SIDECAR, Harm.STOP),
    (Component.LINK_BOTH, Harm.RESET),
)
"""What `make test` tries, in all phases."""

REASONS_ALLOWED: Final = {
    Component.CLIENT: frozenset({"UNREACHABLE"}),
}
"""Errors with which a stream may end, by what was hurt; docs/ERRORS.md."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One stream of a trial."""

    name: str
    request: pb.GenerateRequest
    num_tokens: int


def _request(seed: int, num_prompt: int, num_tokens: int) -> pb.GenerateRequest:
    """One that nobody else makes: prompts, sampling and what is asked for differ."""
    rng = random.Random(seed)
    request = pb.GenerateRequest()
    request.token_ids.ids.extend(rng.randrange(300, 1300) for _ in range(num_prompt))
    request.migrations_max = 10
    sampling, stopping = request.params.sampling, request.params.stopping
    stopping.max_tokens = num_tokens
    stopping.ignore_eos = True
    match seed % 4:
        case 0:
            sampling.temperature = 0.0
        case 1:
            sampling.temperature, sampling.seed = 0.9, seed
        case 2:
            sampling.temperature, sampling.seed = 1.0, seed
            request.params.logprobs.num_top = 2
        case _:
            sampling.temperature, sampling.seed = 0.8, seed
            sampling.presence_penalty, sampling.frequency_penalty = 0.7, 0.4
    return request


class _Cast:
    """The streams of a trial, by when they begin; the same in every trial but for their names."""

    def __init__(self, trial: str) -> None:
        self._trial = trial
        self._num = 0
        self.after = [self._wanted(8, 6) for _ in range(4)]
        self.middle = [self._wanted(8, 90) for _ in range(4)]
        self.last = [self._wanted(8, 44 + number) for number in range(8)]
        self.first = [self._wanted(8, 30) for _ in range(4)]
        self.prefill = [self._wanted(PREFILL_STEPS * PREFILL_TOKENS_MAX, 10) for _ in range(4)]
        self.queued = [self._wanted(8, 10) for _ in range(6)]

    def _wanted(self, num_prompt: int, num_tokens: int) -> Wanted:
        self._num += 1
        request = _request(self._num, num_prompt, num_tokens)
        request.request_id = f"{self._trial}-{self._num}"
        return Wanted(request.request_id, request, num_tokens)

    def everybody(self) -> list[Wanted]:
        return [
            *(*self.after, *self.middle, *self.last),
            *(*self.first, *self.prefill, *self.queued),
        ]


@dataclass(frozen=True, slots=True)
class Hit:
    """A stream that was hit, and how long its client waited."""

    phase: Phase
    wait_s: float | None
    """Its longest wait for a token from the fault on; None if all had come."""


@dataclass(slots=True)
class Trial:
    """What one trial showed."""

    component: Component
    harm: Harm
    proof: str
    verdict: Verdict
    hits: list[Hit]
    num_hung: int
    freed_s: float | None
    """How long engines held something for a client that had vanished."""
    held: str
    """What engines still held when nothing should be held; empty if nothing."""
    seconds: float


@dataclass(slots=True)
class Cell:
    """All trials of one thing hurt in one way."""

    trials: list[Trial] = field(default_factory=list[Trial])

    def num_tried(self, phase: Phase) -> int:
        return sum(any(hit.phase is phase for hit in trial.hits) for trial in self.trials)

    def waits_ms(self, phases: Collection[Phase] = tuple(Phase)) -> list[float]:
        return sorted(
            hit.wait_s * 1e3
            for trial in self.trials
            for hit in trial.hits
            if hit.phase in phases and hit.wait_s is not None
        )


async def run_trial(
    arena: Arena,
    component: Component,
    harm: Harm,
    name: str,
    *,
    num_tried: Mapping[Phase, int] | None = None,
) -> Trial:
    """One trial. Raises `NoEffect` if the fault had none.

    Of two workers the one is hurt whose streams are in phases that have been tried least.
    """
    began = time.monotonic()
    cast = _Cast(name)
    wanted = {one.name: one for one in cast.everybody()}
    truths = await arena.truths({one.name: one.request for one in wanted.values()})
    await _bring_to_the_moment(arena, cast)
    workers, infos = await arena.workers(), await arena.streams()
    for _ in range(ARRIVAL_LOOKS_MAX):
        if infos.keys() >= wanted.keys():
            break
        infos = await arena.streams()
    phases = _phases(infos, wanted, {one: arena.client.num_tokens(one) for one in wanted})
    victim = _victim(component, workers, phases, num_tried or {})
    fault = await arena.inject(component, harm, victim)
    healed = False
    try:
        num_hung = 0
        freed_s: float | None = None
        if component is Component.CLIENT and harm in _VANISHED:
            freed_s = await _until_freed(arena)
            if freed_s is None:
                num_hung = len(arena.client.open_streams & wanted.keys())
        elif harm is Harm.SLOW or component is Component.CLIENT:
            await asyncio.sleep(LASTS_S)
        elif not await _ended(arena, wanted, RECOVER_WITHIN_S):
            num_hung = len(arena.client.open_streams & wanted.keys())
        await arena.heal(fault)
        healed = True
    finally:
        if not healed:
            await fault.end()
    is_dead_client = component is Component.CLIENT and harm is Harm.KILL
    if not is_dead_client and not await _ended(arena, wanted, END_WITHIN_S):
        num_hung = max(num_hung, len(arena.client.open_streams & wanted.keys()))
    held = await arena.until_idle()
    history = arena.history_of(wanted.keys())
    verdict = check(
        history,
        truths,
        reasons_allowed=dict.fromkeys(wanted, REASONS_ALLOWED.get(component, frozenset())),
        may_be_open=wanted.keys() if is_dead_client else (),
    )
    hits = _hits(history, wanted, fault, infos)
    seconds = time.monotonic() - began
    return Trial(component, harm, fault.proof, verdict, hits, num_hung, freed_s, held, seconds)


async def _bring_to_the_moment(arena: Arena, cast: _Cast) -> None:
    """Start streams so that now some are in every phase."""
    client = arena.client

    def ask(group: Iterable[Wanted]) -> None:
        for one in group:
            client.ask(one.name, one.request, timeout_s=60)

    def is_near_its_end(margin: int) -> bool:
        return any(client.num_tokens(o.name) >= o.num_tokens - margin for o in cast.last)

    async with asyncio.timeout(20):
        ask(cast.after)
        await client.until(lambda: not client.open_streams & {o.name for o in cast.after})
        ask(cast.middle)
        ask(cast.last)
        await client.until(lambda: is_near_its_end(EDGE_TOKENS + 1))
        ask(cast.first)
        await client.until(lambda: sum(client.num_tokens(o.name) > 0 for o in cast.first) >= 3)
        ask(cast.prefill)
        ask(cast.queued)


def _phases(
    infos: Mapping[str, pb.StreamInfo], wanted: Mapping[str, Wanted], num_read: Mapping[str, int]
) -> Mapping[str, tuple[str, Phase]]:
    """Of each stream that has arrived: its worker, and its phase when so much had been read."""
    phases: dict[str, tuple[str, Phase]] = {}
    line: defaultdict[str, list[str]] = defaultdict(list)  # Without a token, in order of arrival.
    running: Counter[str] = Counter()
    for name, one in wanted.items():
        info = infos.get(name)
        if info is None:
            continue
        worker_id = info.choices[0].worker.worker_id
        if info.choices[0].state == pb.STREAM_STATE_RUNNING:
            running[worker_id] += 1
        num = num_read[name]
        if num >= one.num_tokens:
            ran_at = info.attempts[-1].worker.worker_id if info.attempts else worker_id
            phases[name] = (ran_at, Phase.AFTER)
        elif num >= one.num_tokens - EDGE_TOKENS:
            phases[name] = (worker_id, Phase.LAST)
        elif num > EDGE_TOKENS:
            phases[name] = (worker_id, Phase.MIDDLE)
        elif num > 0:
            phases[name] = (worker_id, Phase.FIRST)
        else:
            line[worker_id].append(name)
    for worker_id, names in line.items():
        num_queued = min(len(names), max(0, running[worker_id] - BATCH_SIZE))
        for position, name in enumerate(names):
            is_queued = position >= len(names) - num_queued
            phases[name] = (worker_id, Phase.QUEUED if is_queued else Phase.PREFILL)
    return phases


def _victim(
    component: Component,
    workers: Mapping[str, admin_pb.WorkerInfo],
    phases: Mapping[str, tuple[str, Phase]],
    num_tried: Mapping[Phase, int],
) -> str:
    if component is Component.CLIENT:
        return "c1"
    if component is Component.FRONTEND:
        return "f1"

    def worth(worker_id: str) -> float:
        there = {phase for at, phase in phases.values() if at == worker_id}
        return sum(0.5 ** num_tried.get(phase, 0) for phase in there)

    return max(sorted(workers), key=worth)


async def _until_freed(arena: Arena) -> float | None:
    """How long engines hold something for a client that has vanished; None: too long."""
    began = time.monotonic()
    held = await arena.until_idle(FREE_WITHIN_S)
    return None if held else time.monotonic() - began


async def _ended(arena: Arena, wanted: Collection[str], limit_s: float) -> bool:
    try:
        async with asyncio.timeout(limit_s):
            await arena.client.until(lambda: not arena.client.open_streams & set(wanted))
    except TimeoutError:
        return False
    return True


def _hits(
    history: Sequence[Event],
    wanted: Mapping[str, Wanted],
    fault: Fault,
    infos: Mapping[str, pb.StreamInfo],
) -> list[Hit]:
    """The streams that the fault could hit, and their phases at its moment."""
    read_at: dict[str, list[float]] = {name: [] for name in wanted}
    for event in history:
        if isinstance(event, Came) and event.choice == 0:
            read_at[event.stream] += [event.at] * len(event.token_ids)
    num_read = {name: sum(at <= fault.at for at in times) for name, times in read_at.items()}
    hits: list[Hit] = []
    for name, (worker_id, phase) in _phases(infos, wanted, num_read).items():
        if fault.component not in _OF_CLIENTS and worker_id != fault.victim:
            continue
        wait_s = longest_wait_s(read_at[name], fault.at)
        hits.append(Hit(phase, wait_s))
    return hits


_OF_CLIENTS: Final = frozenset({Component.FRONTEND, Component.CLIENT})
"""They hit streams whichever worker these are at."""


class Matrix:
    """Tries cells until each has been tried often enough."""

    def __init__(
        self,
        cells: Sequence[tuple[Component, Harm]],
        num_trials: int,
        seed: int,
        *,
        tries_max: int | None = None,
    ) -> None:
        """`num_trials` of each cell; for phases that are hard to meet at most `tries_max`."""
        self.cells = {cell: Cell() for cell in cells}
        self._num_trials = num_trials
        self._tries_max = 3 * num_trials if tries_max is None else tries_max
        self._random = random.Random(seed)
        self.num_without_effect = 0
        self.broken: list[str] = []
        """Trials that could not be finished, and why."""

    async def run(self, directory: Path) -> None:
        """All of them, on one arena; a new one when it is wrecked."""
        todo = [cell for cell in self.cells for _ in range(self._num_trials)]
        self._random.shuffle(todo)
        number = 0
        while todo:
            number += 1
            async with Arena(
                directory / str(number),
                num_workers=2,
                num_frontends=2,
                engine_options=ENGINE_OPTIONS,
                seed=number,
            ) as arena:
                await self._run_some(arena, todo, number)

    async def _run_some(
        self, arena: Arena, todo: list[tuple[Component, Harm]], number: int
    ) -> None:
        """Until nothing is left to do, or the arena is wrecked."""
        while todo:
            component, harm = todo.pop()
            name = f"t{number}.{len(todo)}.{self._random.randrange(10**6)}"
            try:
                cell = self.cells[component, harm]
                num_tried = {phase: cell.num_tried(phase) for phase in Phase}
                trial = await run_trial(arena, component, harm, name, num_tried=num_tried)
            except NoEffect as error:
                self.num_without_effect += 1
                _say(f"{component.value}/{harm.value}: no effect: {error}")
                if self.num_without_effect > 10 * self._num_trials:
                    self.broken.append(str(error))
                    return
                todo.append((component, harm))
                return
            except TimeoutError as error:
                self.broken.append(f"{component.value}/{harm.value}: not healed in time: {error}")
                _say(self.broken[-1])
                return
            cell.trials.append(trial)
            _say(_line(trial))
            is_last = (component, harm) not in todo
            missing = [p.value for p in Phase if cell.num_tried(p) < self._num_trials]
            if is_last and missing and len(cell.trials) < self._tries_max:
                todo.append((component, harm))
            arena.client.forget()

    def report(self) -> str:
        """A line for each trial, with the shortest counter-example of each that failed."""
        return "\n".join(_line(trial) for cell in self.cells.values() for trial in cell.trials)

    def figures(self) -> dict[str, Any]:
        """The line of JSON."""
        trials = [trial for cell in self.cells.values() for trial in cell.trials]
        total = Verdict()
        for trial in trials:
            total.add(trial.verdict)
        tried = {
            f"{component.value}/{harm.value}/{phase.value}": cell.num_tried(phase)
            for (component, harm), cell in self.cells.items()
            for phase in Phase
        }
        too_seldom = sorted(name for name, num in tried.items() if num < self._num_trials)
        num_hung = sum(trial.num_hung for trial in trials)
        num_held = sum(bool(trial.held) for trial in trials)
        is_ok = total.is_ok and not (num_hung or num_held or self.broken or too_seldom)
        return {
            "ok": is_ok,
            "cells": len(tried),
            "trials": len(trials),
            "streams": total.streams,
            "complete": total.complete,
            "refused": total.refused,
            "migrated": total.migrated,
            "lost": total.lost,
            "duplicated": total.duplicated,
            "changed": total.changed,
            "violations": len(total.violations),
            "hung": num_hung,
            "leaks": num_held,
            "broken": self.broken,
            "without_effect": self.num_without_effect,
            "tried_too_seldom": too_seldom,
            "wait_ms": {
                f"{component.value}/{harm.value}": percentiles(cell.waits_ms())
                for (component, harm), cell in self.cells.items()
            },
        }


def percentiles(values: Sequence[float]) -> Mapping[str, float] | None:
    """p50, p90, p99 and max of sorted values; None if there are none."""
    if not values:
        return None
    last = len(values) - 1
    ranks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(values[round(rank * last)], 1) for name, rank in ranks.items()}


def table(matrix: Matrix) -> str:
    """Of all cells: streams hit, and what their clients waited for, p50 / max in ms."""
    header = [
        "| what is hurt | how | " + " | ".join(phase.value for phase in Phase) + " |",
        "|---|---|" + "---|" * len(Phase),
    ]
    rows: list[str] = []
    for component in Component:
        for harm in Harm:
            if (component, harm) in NO_SENSE:
                continue
            cell = matrix.cells.get((component, harm), Cell())
            fields = [_field(cell, phase) for phase in Phase]
            rows.append(f"| {component.value} | {harm.value} | " + " | ".join(fields) + " |")
    return "\n".join([*header, *rows])


def summary(figures: Mapping[str, Any]) -> str:
    """What the run was, in a sentence."""
    wrong = ("lost", "duplicated", "changed", "hung", "refused", "leaks")
    counts = ", ".join(f"{figures[name]} {name}" for name in wrong)
    return (
        f"One run of `make chaos`: {figures['cells']} cells, {figures['trials']} trials, "
        f"{figures['streams']:,} streams,\n{figures['complete']:,} complete; {counts}. "
        "What is not complete is of clients that were killed."
    )


def _field(cell: Cell, phase: Phase) -> str:
    num = sum(hit.phase is phase for trial in cell.trials for hit in trial.hits)
    if not num:
        return "-"
    waits = cell.waits_ms([phase])
    if not waits:
        return f"{num}"
    return f"{num}: {statistics.median(waits):.0f} / {waits[-1]:.0f}"


def _line(trial: Trial) -> str:
    seen = Counter(hit.phase.value for hit in trial.hits)
    waits = percentiles(sorted(h.wait_s * 1e3 for h in trial.hits if h.wait_s is not None))
    verdict = trial.verdict
    words = [
        f"{trial.component.value}/{trial.harm.value}: {trial.proof}",
        ", ".join(f"{num} {name}" for name, num in seen.items()),
        f"{verdict.complete} of {verdict.streams} complete, {verdict.refused} refused",
        f"waits ms {waits['p50']:.0f} / {waits['max']:.0f}" if waits else "no waits",
        f"{trial.seconds:.1f} s",
    ]
    if trial.freed_s is not None:
        words.append(f"freed after {trial.freed_s:.1f} s")
    if trial.num_hung:
        words.append(f"{trial.num_hung} HUNG")
    if trial.held:
        words.append(f"HELD {trial.held}")
    text = "; ".join(words)
    if (example := verdict.counter_example) is not None:
        text += f"\n{len(verdict.violations)} VIOLATIONS, the shortest:\n{example}"
    return text


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - Progress of a long measurement.


def _cell(text: str) -> tuple[Component, Harm]:
    component, _, harm = text.replace("_", " ").partition("/")
    cell = Component(component), Harm(harm)
    if cell in NO_SENSE:
        raise argparse.ArgumentTypeError(NO_SENSE[cell])
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=5, help="of each cell, at least")
    parser.add_argument("--cell", type=_cell, action="append", help="component/harm; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of the order of trials")
    parser.add_argument(
        "--write", action="store_true", help="put table and counts into docs/CHAOS.md"
    )
    arguments = parser.parse_args()
    matrix = Matrix(arguments.cell or CELLS, arguments.trials, arguments.seed)
    with tempfile.TemporaryDirectory(prefix="unbroken-chaos-") as directory:
        uvloop.run(matrix.run(Path(directory)))
    figures = matrix.figures()
    if arguments.write:
        write_table(PAGE, f"{summary(figures)}\n\n{table(matrix)}")
    print(json.dumps(figures))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not figures["ok"])


def write_table(page: Path, text: str) -> None:
    """Replace what stands between the two marks of a page."""
    begin, end = "<!-- matrix -->\n", "<!-- /matrix -->\n"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}{text}\n{end}{after}")


if __name__ == "__main__":
    main()
