"""How long streams stand still when their frontend is killed, and whether they stay exact.

Two frontends, two simulated workers, streams of the client library at the first frontend, SIGKILL
of it in the middle, many trials: 40 streams at 10 ms a token, and 500 at 100 ms, which is what two
cores carry with all processes and the client on them. The gap is the time from the last message
before the kill to the first output after it, at the other frontend, less one step. No token may be
computed twice, since the sidecars live and keep the attempts that lost their frontend.

    python -m benchmarks.frontend_loss [--trials 5] [--case 40x10 ...]

A line of JSON for each case, and one for all at the end.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import uvloop

from unbroken.chaos import processes
from unbroken.client import Client
from unbroken.errors import UnbrokenError
from unbroken.generation_stream import GenerationStream, Resume
from unbroken.history import History, record
from unbroken.mesh import LocalMesh

RUN_S: Final = 4.0
"""How long a stream takes when nothing fails."""
NUM_PROMPTS: Final = 40
"""So many different requests there are; more streams repeat them."""
KILL_AFTER: Final = 0.3
"""Share of all tokens that have come when the frontend is killed."""
GAP_P99_MAX_S: Final = 0.150
"""With 40 streams."""
TAKE_OVER_S: Final = 0.0015
"""What each further stream may add: all are taken over by one process, one after the other."""


@dataclass(frozen=True, slots=True)
class Case:
    """So many streams, with steps of so many milliseconds."""

    num_streams: int
    step_ms: float

    @classmethod
    def parse(cls, text: str) -> "Case":
        """From "40x10"."""
        num_streams, _, step_ms = text.partition("x")
        return cls(int(num_streams), float(step_ms))

    @property
    def gap_p99_max_ms(self) -> float:
        return (GAP_P99_MAX_S + max(0, self.num_streams - 40) * TAKE_OVER_S) * 1e3

    @property
    def max_tokens(self) -> int:
        return round(RUN_S * 1e3 / self.step_ms)

    def __str__(self) -> str:
        return f"{self.num_streams}x{self.step_ms:g}"


@dataclass(slots=True)
class Totals:
    """Figures over all trials of one case."""

    trials: int = 0
    streams: int = 0
    hit: int = 0
    """Those that ran at the frontend that was killed."""
    resumed: int = 0
    failed: int = 0
    lost: int = 0
    duplicated: int = 0
    different: int = 0
    recomputed: int = 0
    resumes: list[Resume] = field(default_factory=list[Resume])
    usual_gaps_s: list[float] = field(default_factory=list[float])
    """Largest gap of each stream without a kill: the noise of the machine."""

    def to_json(self, case: Case) -> Mapping[str, object]:
        """Times in milliseconds."""
        gaps_ms = sorted(max(0.0, resume.gap_s * 1e3 - case.step_ms) for resume in self.resumes)
        usual_ms = sorted(max(0.0, gap_s * 1e3 - case.step_ms) for gap_s in self.usual_gaps_s)
        gaps_ms = gaps_ms or [float("inf")]
        p99_ms = _percentile(gaps_ms, 0.99)
        is_ok = (
            self.failed == self.lost == self.duplicated == self.different == self.recomputed == 0
            and self.resumed == self.hit > 0
            and p99_ms <= case.gap_p99_max_ms
        )
        return {
            "ok": is_ok,
            "case": str(case),
            "trials": self.trials,
            "streams": self.streams,
            "hit": self.hit,
            "resumed": self.resumed,
            "failed": self.failed,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "different": self.different,
            "recomputed_tokens": self.recomputed,
            "gap_ms_p50": round(statistics.median(gaps_ms), 1),
            "gap_ms_p90": round(_percentile(gaps_ms, 0.9), 1),
            "gap_ms_p99": round(p99_ms, 1),
            "gap_ms_max": round(gaps_ms[-1], 1),
            "gap_ms_p99_max": round(case.gap_p99_max_ms),
            "undisturbed_gap_ms_p50": round(statistics.median(usual_ms), 1),
            "undisturbed_gap_ms_p99": round(_percentile(usual_ms, 0.99), 1),
        }


async def measure(directory: Path, case: Case, num_trials: int) -> Totals:
    """All trials of a case."""
    options = (
        f"--step-base-ms {case.step_ms:g} --prefill-tokens-per-s 1000000 --prefill-tokens-max 8192"
    )
    totals = Totals()
    async with LocalMesh(
        directory, num_workers=2, num_frontends=2, engine="simulated", engine_options=options
    ) as mesh:
        async with Client(mesh.frontend_address) as client:
            expected = await asyncio.gather(
                *(record(_generate(client, case, number)) for number in range(NUM_PROMPTS))
            )
            for history in await asyncio.gather(
                *(record(_generate(client, case, number)) for number in range(case.num_streams))
            ):
                totals.usual_gaps_s.append(_largest_gap_s(history))
        for _ in range(num_trials):
            await _trial(mesh, case, expected, totals)
            await mesh.restart("f1")
    return totals


async def _trial(mesh: LocalMesh, case: Case, expected: Sequence[History], totals: Totals) -> None:
    async with Client(*mesh.frontend_addresses) as client:
        await client.list_models()  # It is connected when the streams begin.
        streams = [_generate(client, case, number) for number in range(case.num_streams)]
        histories = [History() for _ in streams]
        reading = [
            asyncio.create_task(record(stream, history))
            for stream, history in zip(streams, histories, strict=True)
        ]
        tokens_before = KILL_AFTER * case.max_tokens * case.num_streams
        while sum(history.num_tokens for history in histories) < tokens_before:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        hit = sum(
            stream.started is not None and stream.frontend_address == mesh.frontend_address
            for stream in streams
        )
        await processes.kill([mesh.frontend_pid])
        results = await asyncio.gather(*reading, return_exceptions=True)
    totals.trials += 1
    totals.hit += hit
    for number, (stream, history, result) in enumerate(
        zip(streams, histories, results, strict=True)
    ):
        totals.streams += 1
        totals.resumed += bool(stream.resumes)
        totals.resumes += stream.resumes
        if isinstance(result, UnbrokenError):
            totals.failed += 1
            print(f"stream {number}: {result.reason.value}: {result}", file=sys.stderr)  # noqa: T201
            continue
        if isinstance(result, BaseException):
            raise result
        difference = history.difference(expected[number % NUM_PROMPTS])
        totals.lost += difference.lost
        totals.duplicated += difference.duplicated
        totals.different += not difference.is_none
        assert history.finished is not None, "it was read to its end"
        usage = history.finished.usage
        totals.recomputed += usage.recomputed_prefill_tokens + usage.recomputed_decode_tokens


def _generate(client: Client, case: Case, number: int) -> GenerationStream:
    return client.generate(
        prompt=f"stream {number % NUM_PROMPTS}",
        max_tokens=case.max_tokens,
        ignore_eos=True,
        temperature=0.0,
        timeout_s=120,
    )


def _largest_gap_s(history: History) -> float:
    (choice,) = history.choices.values()
    return max(choice.gap_s(offset) or 0.0 for offset in range(1, len(choice.token_ids)))


def _percentile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument(
        "--case", type=Case.parse, nargs="+", default=[Case(40, 10), Case(500, 100)]
    )
    arguments = parser.parse_args()
    began_at = time.monotonic()
    lines: list[Mapping[str, object]] = []
    for case in arguments.case:
        with tempfile.TemporaryDirectory() as directory:
            totals = uvloop.run(measure(Path(directory), case, arguments.trials))
        lines.append(totals.to_json(case))
        print(json.dumps(lines[-1]))  # noqa: T201 - Figures.
    is_ok = all(line["ok"] for line in lines)
    summary = {
        "ok": is_ok,
        "gap_ms_p99": {str(line["case"]): line["gap_ms_p99"] for line in lines},
        "seconds": round(time.monotonic() - began_at, 1),
    }
    print(json.dumps(summary))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not is_ok)


if __name__ == "__main__":
    main()
