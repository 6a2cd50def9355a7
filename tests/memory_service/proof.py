"""`make memory-proof`: memory survives its engines, its service and its vault, and is never wrong.

    python -m tests.memory_service.proof [--kills 20000] [--outages 20] [--corruptions 200]

Ends with one line of JSON. Exits with 1 if anything was wrong, lost, leaked or not noticed, or a
service died by itself; and with 3 if the machine was too slow to say.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.memory_service.corruptions import Corruptions
from tests.memory_service.processes import Died, TooSlow, serving, until
from tests.memory_service.restarts import Outage, Users
from tests.memory_service.test_kills import NEEDS
from tests.memory_service.trials import SIGNALS, Trials
from tests.memory_service.victim import SCENARIOS

BOUND_S_MAX = 0.050
"""A client is bound again so long after the new service began, at the median."""
BATCH = 500
"""Kills at one service, after which leaks are looked for."""
MOMENT_S_MAX = 0.006
"""After its fork; what a victim does takes about so long."""


def lines(stride: int) -> tuple[int, int, list[str]]:
    """Kill at every line of the library, with every signal."""
    trials_total, killed, violations = 0, 0, list[str]()
    for scenario in SCENARIOS:
        with tempfile.TemporaryDirectory(prefix="unbroken-memory-") as directory:  # noqa: SIM117
            with serving(Path(directory), "--scrub-bytes-per-s", "0") as service:
                trials = Trials(service)
                for before in NEEDS.get(scenario, ()):
                    trials.trial(before)
                for line in range(1, trials.num_lines(scenario) + 1, stride):
                    trials.trial(scenario, line=line, number=SIGNALS[line % len(SIGNALS)])
                trials.judge_leaks()
                trials_total += trials.figures.trials
                killed += trials.figures.killed
                violations += trials.figures.violations
                trials.close()
        say(f"{scenario}: {trials.figures}")
    return trials_total, killed, violations


def moments(number: int, seed: int) -> tuple[int, int, list[str]]:
    """Kill so many at random moments; some are done before that, and do not count."""
    chance = random.Random(seed)
    scenarios = [*SCENARIOS]
    done, killed, violations = 0, 0, list[str]()
    while killed < number:
        with tempfile.TemporaryDirectory(prefix="unbroken-memory-") as directory:  # noqa: SIM117
            with serving(Path(directory), "--scrub-bytes-per-s", "0") as service:
                trials = Trials(service)
                trials.trial("seal")
                goal = min(BATCH, number - killed)
                while trials.figures.killed < goal:
                    trials.trial(
                        chance.choice(scenarios),
                        after_s=chance.uniform(0.0001, MOMENT_S_MAX),
                        number=chance.choice(SIGNALS),
                    )
                trials.judge_leaks()
                done += trials.figures.trials
                killed += trials.figures.killed
                violations += trials.figures.violations
                trials.close()
        say(f"{killed} of {number} killed at random moments, {len(violations)} violations")
    return done, killed, violations


def outages(number: int) -> list[Outage]:
    """Kill the service, and every fourth time its vault before it, in mid-work."""
    seen: list[Outage] = []
    with tempfile.TemporaryDirectory(prefix="unbroken-memory-") as directory:  # noqa: SIM117
        with serving(Path(directory)) as service:
            users = Users(service)
            for turn in range(number):
                users.until_written(20)
                if turn % 4 == 3:
                    old, had = service.vault_pid, service.num_vault_fds()
                    service.kill_vault()
                    until(lambda old=old: service.vault_pid != old, "there is another vault")
                    until(lambda had=had: service.num_vault_fds() >= had, "it has everything")
                seen.append(users.lose_service())
                say(f"outage {turn + 1}: {seen[-1]}")
            users.close()
    return seen


def corruptions(number: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Spoil something so many times in each way; how often each was caught."""
    caught: dict[str, int] = {}
    violations: list[str] = []
    with tempfile.TemporaryDirectory(prefix="unbroken-memory-") as directory:  # noqa: SIM117
        with serving(Path(directory), "--scrub-bytes-per-s", "0") as service:
            spoiled = Corruptions(service, seed)
            for kind, spoil in spoiled.kinds():
                caught[kind] = sum(spoil() for _ in range(number))
                if caught[kind] != number:
                    violations.append(f"{kind}: {number - caught[kind]} of {number} not caught")
            spoiled.close()
    say(f"corruptions: {caught}")
    return caught, violations


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def main() -> int:
    """Prove it."""
    parser = argparse.ArgumentParser(prog="python -m tests.memory_service.proof")
    parser.add_argument("--kills", type=int, default=20_000)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--outages", type=int, default=20)
    parser.add_argument("--corruptions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    try:
        return prove(given)
    except Died as error:
        return unproved("died", error, 1)
    except TooSlow as error:
        return unproved("too_slow", error, 3)


def unproved(how: str, error: AssertionError, status: int) -> int:
    """It broke off."""
    say(json.dumps({"ok": False, how: str(error)}))
    return status


def prove(given: argparse.Namespace) -> int:
    """All of it."""
    begun = time.monotonic()
    caught, violations = corruptions(given.corruptions, given.seed)
    lost = outages(given.outages)
    at_lines, killed_at_lines, wrong = lines(given.stride)
    violations += wrong
    at_moments, killed_at_moments, wrong = moments(given.kills, given.seed)
    violations += wrong
    for outage in lost:
        violations += outage.violations
    bound = sorted(outage.bound_after_start_s for outage in lost)
    figures = {
        "ok": not violations and statistics.median(bound) <= BOUND_S_MAX,
        "kills_at_lines": killed_at_lines,
        "trials_at_lines": at_lines,
        "kills_at_moments": killed_at_moments,
        "trials_at_moments": at_moments,
        "corruptions": sum(caught.values()),
        "corruptions_missed": given.corruptions * len(caught) - sum(caught.values()),
        "outages": len(lost),
        "blocks_kept": sum(outage.num_blocks for outage in lost),
        "bound_after_start_ms_p50": round(statistics.median(bound) * 1000, 1),
        "bound_after_start_ms_max": round(bound[-1] * 1000, 1),
        "bound_after_kill_ms_p50": round(
            statistics.median(outage.bound_after_kill_s for outage in lost) * 1000, 1
        ),
        "violations": len(violations),
        "seconds": round(time.monotonic() - begun, 1),
    }
    for violation in violations[:20]:
        say(violation)
    say(json.dumps(figures))
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
