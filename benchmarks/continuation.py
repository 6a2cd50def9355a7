"""The continuation matrix: every feature, killed for real at many offsets, compared token by token.

For each engine two workers run all features of one prompt at once. SIGKILL takes one worker, engine
and sidecar, and when that has come back the other, so that every stream is cut at least once, each
at another offset. A cell counts the streams that were cut after their first token; all of them must
equal the undisturbed run in ids, text, log probabilities, finish reason and usage.

    python -m benchmarks.continuation [--engine llama] [--cuts 8] [--write docs/CONTINUATION.md]
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from unbroken.client import Client
from unbroken.history import History, record
from unbroken.mesh import LocalMesh
from unbroken.request import GenerateOptions
from unbroken.v1 import inference_service_pb2 as pb

_BEGIN, _END = "<!-- matrix begins -->", "<!-- matrix ends -->"

_SCHEMA = json.dumps({
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 4,
                 "maxItems": 6},
        "size": {"type": "integer"},
    },
    "required": ["name", "tags", "size"],
    "additionalProperties": False,
})  # fmt: skip
_SAMPLED: GenerateOptions = {"temperature": 0.8, "top_p": 0.95, "seed": 1234}

FEATURES: Mapping[str, GenerateOptions] = {
    "greedy": {"temperature": 0.0},
    "seeded sampling": _SAMPLED,
    "top-k, min-p": {"temperature": 1.1, "top_k": 40, "min_p": 0.02, "seed": 5},
    "presence penalty": {**_SAMPLED, "presence_penalty": 1.2},
    "frequency penalty": {"temperature": 0.0, "frequency_penalty": 0.9},
    "repetition penalty": {"temperature": 0.0, "repetition_penalty": 1.3},
    "all penalties, sampled": {
        **_SAMPLED,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
    },
    "logit bias": {"temperature": 0.0, "logit_bias": {260: 4.0, 265: -50.0, 281: 3.0}},
    "min_tokens": {**_SAMPLED, "min_tokens": 40},
    "stop strings": {"temperature": 0.0, "stop": ["\n\n\n", "zebra crossing", "###"]},
    "JSON schema": {**_SAMPLED, "json_schema": _SCHEMA},
    "regex": {**_SAMPLED, "regex": "([A-Z][a-z]{2,9} [a-z]{2,12}[,.] ){12}"},
    "choice": {
        "temperature": 0.0,
        "choice": [
            f"The {number} of a number of rather long answers, of which some are alike for most of "
            f"their length and differ only towards their very end, so that a cut anywhere in the "
            f"middle leaves more than one of them to choose from: {colour}"
            for number in ("first", "last")
            for colour in ("red", "green")
        ],
    },
    "log probabilities": {**_SAMPLED, "num_top_logprobs": 3},
    "three choices (n)": {**_SAMPLED, "num_choices": 3},
}

PROMPTS = (
    "Write about the sea and the people who live from it.",
    "What should somebody know who visits a big city for the first time?",
    "Describe how bread is made, step by step.",
)
MAX_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Setup:
    """One column of the table."""

    name: str
    engine: str
    engine_options: str = ""


SETUPS = (
    Setup("llama", "llama"),
    Setup("simulated", "simulated", "--step-base-ms 60"),
    Setup(
        "simulated, no native resume",
        "simulated",
        "--step-base-ms 60 --no-native-resume --random-source positional",
    ),
    Setup(
        "simulated, no native resume, generator with a history",
        "simulated",
        "--step-base-ms 60 --no-native-resume --random-source sequential",
    ),
)


@dataclass(slots=True)
class Cell:
    """One feature on one engine."""

    ways: set[str] = field(default_factory=set[str])
    cuts: int = 0
    equal: int = 0
    offsets: dict[str, set[int]] = field(default_factory=dict[str, set[int]])
    """Offsets at which a prompt's streams were cut."""
    failures: list[str] = field(default_factory=list[str])

    def fewest_cut_points(self) -> int:
        return min((len(self.offsets.get(prompt, ())) for prompt in PROMPTS), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--engine", choices=["llama", "simulated", "all"], default="all")
    parser.add_argument("--cuts", type=int, default=8, help="different offsets a prompt (8)")
    parser.add_argument("--write", type=Path, help="page that receives the table")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    setups = [s for s in SETUPS if arguments.engine in {"all", s.engine}]
    table: dict[str, dict[str, Cell]] = {}
    for setup in setups:
        table[setup.name] = uvloop.run(
            _column(setup, arguments.cuts, random.Random(arguments.seed))
        )
    page = _markdown(table)
    print(page)  # noqa: T201
    if arguments.write:
        _write(arguments.write, page)
    cells = [cell for column in table.values() for cell in column.values()]
    is_ok = all(
        cell.cuts == cell.equal and cell.fewest_cut_points() >= arguments.cuts for cell in cells
    )
    print(  # noqa: T201 - The line that ends every measurement.
        json.dumps(
            {
                "ok": is_ok,
                "engines": len(table),
                "features": len(FEATURES),
                "prompts": len(PROMPTS),
                "cuts": sum(cell.cuts for cell in cells),
                "equal": sum(cell.equal for cell in cells),
                "fewest_cut_points": min(cell.fewest_cut_points() for cell in cells),
                "failures": [failure for cell in cells for failure in cell.failures][:10],
            }
        )
    )
    sys.exit(not is_ok)


async def _column(setup: Setup, cuts: int, rng: random.Random) -> dict[str, Cell]:
    cells = {feature: Cell() for feature in FEATURES}
    with tempfile.TemporaryDirectory() as directory:
        mesh = LocalMesh(
            Path(directory),
            num_workers=2,
            engine=setup.engine,
            engine_options=setup.engine_options,
        )
        async with mesh, Client(mesh.frontend_address) as client:
            for prompt in PROMPTS:
                undisturbed = await _run_all(client, prompt)
                first_targets = rng.sample(range(1, 20), 19)  # Each cut at another offset.
                for target in first_targets:
                    if min(len(c.offsets.get(prompt, ())) for c in cells.values()) >= cuts:
                        break
                    targets = (target, target + 20)
                    await _trial(mesh, client, prompt, undisturbed, cells, targets, rng)
                    print(  # noqa: T201
                        f"{setup.name}, {prompt[:20]!r}: "
                        f"{[len(cell.offsets.get(prompt, ())) for cell in cells.values()]} "
                        f"{sum(cell.equal for cell in cells.values())} of "
                        f"{sum(cell.cuts for cell in cells.values())} equal",
                        file=sys.stderr,
                    )
    return cells


async def _trial(
    mesh: LocalMesh,
    client: Client,
    prompt: str,
    undisturbed: Mapping[str, History],
    cells: Mapping[str, Cell],
    targets: tuple[int, int],
    rng: random.Random,
) -> None:
    """Run all features, and kill both workers, one after the other, at these offsets or later."""
    histories = {feature: History() for feature in FEATURES}
    running = asyncio.create_task(_run_all(client, prompt, histories))
    for victim, target in zip(rng.sample(["w1", "w2"], 2), targets, strict=True):
        while not running.done() and not any(  # noqa: ASYNC110 - Histories have no event.
            target <= history.num_tokens < MAX_TOKENS for history in histories.values()
        ):
            await asyncio.sleep(0.002)
        if running.done():
            break
        mesh.kill(victim, "host")
        await mesh.restart(victim)
    seen = await running
    for feature, history in seen.items():
        cell = cells[feature]
        migrations = history.migrations()
        if not migrations:
            continue
        cell.cuts += 1
        cell.offsets.setdefault(prompt, set()).update(m.first_offset for m in migrations)
        cell.ways.update(pb.ContinuationClass.Name(m.continuation_class) for m in migrations)
        difference = history.difference(undisturbed[feature])
        cell.equal += difference.is_none
        if not difference.is_none:
            cell.failures.append(
                f"{feature}, {prompt[:20]!r}, cut at {[m.first_offset for m in migrations]}: "
                f"{difference}"
            )


async def _run_all(
    client: Client, prompt: str, histories: Mapping[str, History] | None = None
) -> dict[str, History]:
    async def one(feature: str, options: GenerateOptions) -> History:
        stream = client.generate(
            messages=[{"role": "user", "content": prompt}],
            timeout_s=120,
            **{"max_tokens": MAX_TOKENS, **options},
        )
        return await record(stream, histories[feature] if histories else None)

    async with asyncio.TaskGroup() as group:
        tasks = {
            feature: group.create_task(one(feature, options))
            for feature, options in FEATURES.items()
        }
    return {feature: task.result() for feature, task in tasks.items()}


_LETTERS = {
    "CONTINUATION_CLASS_APPEND": "A",
    "CONTINUATION_CLASS_REGENERATE": "B",
    "CONTINUATION_CLASS_NATIVE": "C",
}


def _markdown(table: Mapping[str, Mapping[str, Cell]]) -> str:
    lines = [
        "| feature | " + " | ".join(table) + " |",
        "|---|" + "---|" * len(table),
    ]
    for feature in FEATURES:
        cells = [_cell(column[feature]) for column in table.values()]
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(cell: Cell) -> str:
    ways = "+".join(sorted(_LETTERS.get(way, way) for way in cell.ways))
    return f"{ways} {cell.equal}/{cell.cuts}"


def _write(path: Path, table: str) -> None:
    text = path.read_text()
    head, rest = text.split(_BEGIN)
    tail = rest.split(_END)[1]
    path.write_text(f"{head}{_BEGIN}\n{table}\n{_END}{tail}")


if __name__ == "__main__":
    main()
