"""Every feature on real engines, killed under many streams at once: rows of a table.

One kill cuts many streams: copies of each request begin one after the other, so that at the moment
of the kill each stands at another offset. Kills go on, of whichever engine has more of them, until
each feature and prompt was cut at enough different offsets.
"""

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.continuation import FEATURES as OF_ALL_ENGINES
from tests.engines.real import deaths, vllm
from tests.engines.real.units import Units
from unbroken.errors import UnbrokenError
from unbroken.history import History
from unbroken.request import GenerateOptions
from unbroken.v1 import inference_service_pb2 as pb
from worker import simulated_tokenizer

MAX_TOKENS: Final = 48
NUM_WAVES: Final = 12
"""Copies of each request."""
APART: Final = 3
"""Tokens between two waves."""
CUT_POINTS: Final = 8
"""Different offsets at which each feature is cut with each prompt."""
KILLS_MAX: Final = 8
STREAM_S_MAX: Final = 240.0
PROMPTS: Final = ((5, 6, 7), (300, 301, 302, 303, 304), (77, 15, 130, 411))
BEGIN, END = "<!-- vllm matrix begins -->\n", "<!-- vllm matrix ends -->\n"

ENGINE_FLAGS: Final = ("--max-num-seqs", "512", "--max-num-batched-tokens", "32768")
"""Prompts of seeded requests in one step, whatever else is in it (docs/ENGINES.md)."""
STEP_S: Final = 0.12
"""By which the engine's steps are longer: a wave has to begin while the one before gets a few
tokens."""
SETTINGS: Final[Mapping[str, str]] = {"UNBROKEN_SIDECAR_ENGINE_STALL_MIN_S": "60"}
"""A core that compiles grammars on a busy machine is not to be taken for one that hangs: other
parts are about those."""
BLOCKS_AT_EASE: Final = 1536
BLOCKS_UNDER_PRESSURE: Final = 480
"""Fewer than the streams of one engine fill, before those of the other come."""

_END_ID: Final = min(simulated_tokenizer.asset().eos_token_ids)
_HELD: Final = (0.2, 0.9)
"""Of an output's text: what lies between is a stop string, so most cuts are inside of it."""
_STOP_AFTER: Final = 30

FEATURES: Final[Mapping[str, GenerateOptions]] = {
    **OF_ALL_ENGINES,
    "seeded, frequency penalty": {"temperature": 0.7, "seed": 21, "frequency_penalty": 1.1},
    "presence penalty, greedy": {"temperature": 0.0, "presence_penalty": 1.5},
    "regex, greedy": {"temperature": 0.0, "regex": "[0-9a-f ]{100,200}"},
    "JSON object": {"temperature": 0.0, "json_object": True},
    "the model's own end": {
        "temperature": 0.7,
        "seed": 13,
        "min_tokens": _STOP_AFTER,
        "logit_bias": {_END_ID: 6.0},
    },
}
STOPPED: Final = ("stop string, cut inside of it", "stop token")
"""What stops them is found in an undisturbed run."""

Key = tuple[str, tuple[int, ...]]
KEYS: Final[Sequence[Key]] = [(name, one) for name in (*FEATURES, *STOPPED) for one in PROMPTS]
Requests = Mapping[Key, GenerateOptions]


@dataclass(slots=True)
class Row:
    """One feature."""

    ways: set[str] = field(default_factory=set[str])
    cut: int = 0
    """After the first token."""
    equal: int = 0
    """Of those."""
    offsets: dict[tuple[int, ...], set[int]] = field(
        default_factory=dict[tuple[int, ...], set[int]]
    )
    """At which it was cut, by prompt."""

    @property
    def fewest_cut_points(self) -> int:
        return min(len(self.offsets.get(prompt, ())) for prompt in PROMPTS)

    def __str__(self) -> str:
        return f"{'+'.join(sorted(self.ways))} {self.equal}/{self.cut}"


@dataclass(slots=True)
class Column:
    """All features on one make of workers."""

    rows: dict[str, Row] = field(default_factory=lambda: {name: Row() for name, _ in KEYS})
    kills: int = 0
    whole: int = 0
    """Streams that nothing was done to."""
    whole_equal: int = 0
    wrong: list[str] = field(default_factory=list[str])

    @property
    def cut(self) -> int:
        return sum(row.cut for row in self.rows.values())

    @property
    def equal(self) -> int:
        return sum(row.equal for row in self.rows.values())

    @property
    def fewest_cut_points(self) -> int:
        return min(row.fewest_cut_points for row in self.rows.values())

    @property
    def is_ok(self) -> bool:
        is_equal = self.cut == self.equal and self.whole == self.whole_equal
        return is_equal and not self.wrong and self.fewest_cut_points >= CUT_POINTS

    def figures(self) -> dict[str, object]:
        return {
            "kills": self.kills,
            "cut": self.cut,
            "equal": self.equal,
            "others": self.whole,
            "others_equal": self.whole_equal,
            "fewest_cut_points": self.fewest_cut_points,
            "rows": {name: str(row) for name, row in self.rows.items()},
            **({"wrong": self.wrong[:5]} if self.wrong else {}),
        }


async def measure(units: Units) -> Column:
    """`units` has two engines."""
    await units.until_serving(vllm.START_S_MAX)
    requests = await _requests(units)
    expected = {key: History() for key in KEYS}
    await asyncio.gather(*(_read(units, key, requests, expected[key]) for key in KEYS))
    column = Column()
    while column.fewest_cut_points < CUT_POINTS and column.kills < KILLS_MAX:
        await units.until_serving(vllm.START_S_MAX)
        await _kill_once(units, requests, expected, column)
        told = {**column.figures(), "rows": None}
        print("matrix", json.dumps(told), file=sys.stderr, flush=True)  # noqa: T201 - Progress.
    return column


async def _requests(units: Units) -> Requests:
    """All of them; those that are stopped by something of their own output as well."""
    greedy: Requests = {(STOPPED[0], prompt): {"temperature": 0.0} for prompt in PROMPTS}
    seen = {key: History() for key in greedy}
    await asyncio.gather(*(_read(units, key, greedy, seen[key]) for key in greedy))
    requests: dict[Key, GenerateOptions] = {key: FEATURES.get(key[0], {}) for key in KEYS}
    for (_, prompt), history in seen.items():
        ids, text = history.choices[0].token_ids, history.choices[0].text
        begin, end = (round(share * len(text)) for share in _HELD)
        held = text[begin:end]
        last = next(one for one in ids[_STOP_AFTER:] if ids.index(one) >= _STOP_AFTER)
        requests[STOPPED[0], prompt] = {"temperature": 0.0, "stop": [held]}
        requests[STOPPED[1], prompt] = {"temperature": 0.0, "stop_token_ids": [last]}
    return requests


async def _kill_once(
    units: Units, requests: Requests, expected: Mapping[Key, History], column: Column
) -> None:
    """Waves of all requests, and SIGKILL for an engine once the last wave has begun."""
    waves: list[dict[Key, History]] = []
    tasks: list[asyncio.Task[None]] = []
    # Each time a little later, so that the offsets are others.
    begun = 1 + column.kills % APART
    async with asyncio.timeout(STREAM_S_MAX):
        while len(waves) < NUM_WAVES or not _has_begun(waves[-1], begun):
            if not waves or (
                len(waves) < NUM_WAVES
                and _offset(waves[0]) >= len(waves) * APART
                and _has_begun(waves[-1], 1)
            ):
                waves.append({key: History() for key in KEYS})
                tasks += [
                    asyncio.create_task(_read(units, key, requests, history))
                    for key, history in waves[-1].items()
                ]
            await asyncio.sleep(0.005)
            for task in tasks:
                if task.done():
                    task.result()
        victim = await deaths.busiest(units)
        column.kills += 1
        group = units.group(victim)
        units.hurt[victim] = group
        vllm.hurt(group, "server killed")
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    keys = [(key, history) for wave in waves for key, history in wave.items()]
    for (key, history), end in zip(keys, ends, strict=True):
        if isinstance(end, UnbrokenError):
            column.wrong.append(f"{key[0]}: {end}")
        elif end is not None:
            raise end
        else:
            _compare(key, history, expected[key], column)


def _has_begun(wave: Mapping[Key, History], num: int) -> bool:
    """Whether each of its streams has so many tokens."""
    return min(history.num_tokens for history in wave.values()) >= num


def _offset(wave: Mapping[Key, History]) -> int:
    """How far the stream is that got furthest."""
    return max(
        (len(choice.token_ids) for one in wave.values() for choice in one.choices.values()),
        default=0,
    )


def _compare(key: Key, history: History, expected: History, column: Column) -> None:
    name, prompt = key
    difference = history.difference(expected)
    migrations = history.migrations()
    row = column.rows[name]
    if not migrations:
        column.whole += 1
        column.whole_equal += difference.is_none
    else:
        row.cut += 1
        row.equal += difference.is_none
        row.ways.update(_letter(one.continuation_class) for one in migrations)
        row.offsets.setdefault(prompt, set()).update(one.first_offset for one in migrations)
    if not difference.is_none:
        cuts = [one.first_offset for one in migrations]
        column.wrong.append(f"{name}, cut at {cuts}: {difference}")


def _letter(way: int) -> str:
    name = pb.ContinuationClass.Name(way)  # pyright: ignore[reportArgumentType]
    return {"APPEND": "A", "REGENERATE": "B", "NATIVE": "C"}.get(name.rpartition("_")[2], name)


async def _read(units: Units, key: Key, requests: Requests, history: History) -> None:
    stream = units.client.generate(
        token_ids=key[1],
        timeout_s=STREAM_S_MAX,
        **{"max_tokens": MAX_TOKENS, **requests[key]},
    )
    async for piece in stream:
        history.add(piece, time.monotonic())
    history.started, history.finished = stream.started, stream.finished


def table(columns: Mapping[str, Column]) -> str:
    """Of one row for each feature."""
    head = (f"| feature | {' | '.join(columns)} |", "|---|" + "---|" * len(columns))
    cells = {name: [str(one.rows[name]) for one in columns.values()] for name, _ in KEYS}
    return "\n".join((*head, *(f"| {name} | {' | '.join(row)} |" for name, row in cells.items())))


def write(page: Path, columns: Mapping[str, Column]) -> None:
    """Put the table between its marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}{table(columns)}\n{END}{after}")
