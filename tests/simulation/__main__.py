"""Lives through many seeds, or replays one.

    python -m tests.simulation --seeds 100000 --jobs 2
    python -m tests.simulation --seed 17 --trace
    python -m tests.simulation --world fleet --seeds 20000
    python -m tests.simulation --world rush --seeds 20000
    python -m tests.simulation --world all --seeds 100000 --jobs 2

The world of streams is a few whole streams under all that can befall them, clocks that are set
included; that of a rush is more of them than workers can do, who get in, wait, are sent away or
paused, while clients leave and processes drain; that of a fleet is many simple jobs, and who is
believed to be dead, slow or deadly. "all" is all of them, with one seed of a fleet for every twelve
of the others.

The last line of output is one JSON object; the exit status is 1 if any seed violates a promise.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

from tests.simulation.scenario import Report, quiet
from tests.simulation.worlds import WORLDS, run_chunk

_CHUNK = 250
_ALL = "all"
_STREAMS_PER_FLEET = 12
"""Seeds; as in the tests."""
_VIOLATIONS_SHOWN_MAX = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument(
        "--world", choices=[*WORLDS, _ALL], default="streams", help="what is simulated"
    )
    parser.add_argument("--seed", type=int, help="live through this seed only")
    parser.add_argument("--trace", action="store_true", help="tell what happens in it")
    parser.add_argument("--first", type=int, default=0, help="first of many seeds")
    parser.add_argument("--seeds", type=int, default=2000, help="how many seeds")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes")
    options = parser.parse_args(argv)
    started = time.monotonic()
    if options.world == _ALL:
        if options.seed is not None:
            parser.error("--seed is of one world")
        seeds = range(options.first, options.first + options.seeds)
        fleet_seeds = seeds[: -(-options.seeds // _STREAMS_PER_FLEET)]
        worlds = {
            "streams": summarise(_run_all("streams", seeds, options.jobs)),
            "fleet": summarise(_run_all("fleet", fleet_seeds, options.jobs)),
            "rush": summarise(_run_all("rush", seeds, options.jobs)),
        }
        summary: dict[str, object] = {"ok": all(one["ok"] for one in worlds.values()), **worlds}
    elif options.seed is not None:
        with quiet():
            run = WORLDS[options.world]
            reports = [run(options.seed, trace=_say if options.trace else None)]
        summary = summarise(reports)
    else:
        seeds = range(options.first, options.first + options.seeds)
        summary = summarise(_run_all(options.world, seeds, options.jobs))
    seconds = time.monotonic() - started
    summary["seconds"] = round(seconds, 2)
    _say(json.dumps(summary))
    return 0 if summary["ok"] else 1


def summarise(reports: Iterator[Report] | Sequence[Report]) -> dict[str, object]:
    """Everything worth knowing about many seeds; `faults` counts the seeds that had each kind."""
    num_seeds = num_events = num_streams = num_tokens = 0
    violations: list[dict[str, object]] = []
    faults = Counter[str]()
    for report in reports:
        num_seeds += 1
        num_events += report.num_events
        num_streams += report.num_streams
        num_tokens += report.num_tokens
        faults.update(report.faults.keys())
        if report.violation is not None:
            violations.append({"seed": report.seed, "violation": report.violation})
    return {
        "ok": not violations,
        "seeds": num_seeds,
        "violations": violations[:_VIOLATIONS_SHOWN_MAX],
        "num_violations": len(violations),
        "events": num_events,
        "streams": num_streams,
        "tokens": num_tokens,
        "faults": {str(fault): num for fault, num in sorted(faults.items())},
    }


def _run_all(world: str, seeds: range, num_jobs: int) -> Iterator[Report]:
    chunks = [seeds[begin : begin + _CHUNK] for begin in range(0, len(seeds), _CHUNK)]
    if num_jobs == 1:
        for chunk in chunks:
            yield from run_chunk(world, chunk)
        return
    with multiprocessing.get_context("spawn").Pool(num_jobs) as pool:
        for reports in pool.imap(partial(run_chunk, world), chunks):
            yield from reports


_say = partial(print, file=sys.stdout, flush=True)

if __name__ == "__main__":
    sys.exit(main())
