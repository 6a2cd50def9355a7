"""Hosts that lose every packet, one way or both, under running streams; in network namespaces.

    python -m tests.faults.partition [--trials 1]

Each worker has a namespace of its own, the frontend and the client share another. Nothing is
acknowledged any more, unlike behind a proxy: TCP itself has to give up, or the heartbeats do first.
Ends with one line of JSON; where namespaces are not permitted, "skipped" says why.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Final

import uvloop

from tests.faults.namespaces import HUB, Namespaces, reason_not_permitted
from unbroken.chaos.checker import Came, Event, Verdict, check, longest_wait_s, truth_of
from unbroken.chaos.proxy import BOTH, Direction
from unbroken.chaos.recorder import Recorder
from unbroken.client import Client
from unbroken.mesh import LocalMesh
from unbroken.request import request_to_proto
from unbroken.v1 import inference_service_pb2 as pb

WORKER_IDS: Final = ("w1", "w2")
NUM_STREAMS: Final = 12
MAX_TOKENS: Final = 100
AT_TOKENS: Final = 30
RECOVER_WITHIN_S: Final = 15.0
WAYS: Final = {"up": (Direction.UPSTREAM,), "down": (Direction.DOWNSTREAM,), "both": BOTH}


async def measure(net: Namespaces, directory: Path, num_trials: int) -> dict[str, Any]:
    """Lose packets in each way, so many times."""
    total = Verdict()
    waits: defaultdict[str, list[float]] = defaultdict(list)
    dropped: Counter[str] = Counter()
    mesh = LocalMesh(
        directory,
        num_workers=len(WORKER_IDS),
        engine_options="--step-base-ms 20",
        flags_of={name: ("--listen", f"{net.address(name)}:0") for name in WORKER_IDS},
        wrap_of={name: net.enter(name) for name in WORKER_IDS},
    )
    async with (
        mesh,
        Client(mesh.frontend_address) as watcher,
        Recorder([mesh.frontend_address]) as recorder,
    ):
        undisturbed = await _run(recorder, "truth")
        truths = {_index(stream): truth_of(events) for stream, events in undisturbed.items()}
        for number in range(num_trials):
            for way, directions in WAYS.items():
                name = f"{way}{number}"
                running = asyncio.create_task(_run(recorder, name))
                first = f"{name}-0"
                await recorder.until(lambda first=first: recorder.num_tokens(first) > AT_TOKENS)
                places = {
                    info.request_id: info.choices[0].worker.worker_id
                    async for info in watcher.list_streams()
                    if info.request_id.startswith(name)
                }
                ((victim, _),) = Counter(places.values()).most_common(1)
                before, began = net.num_dropped(victim, *directions), time.monotonic()
                net.drop(victim, *directions)
                history = await running
                dropped[way] += net.num_dropped(victim, *directions) - before
                net.heal(victim)
                events = [event for own in history.values() for event in own]
                total.add(check(events, {stream: truths[_index(stream)] for stream in history}))
                for stream, own in history.items():
                    times = [e.at for e in own if isinstance(e, Came) and e.token_ids]
                    wait_s = longest_wait_s(times, began)
                    if places[stream] == victim and wait_s is not None:
                        waits[way].append(wait_s)
                await mesh.until_serving(WORKER_IDS)
    is_ok = total.is_ok and all(dropped[way] and waits[way] for way in WAYS)
    return {
        "ok": is_ok,
        "streams": total.streams,
        "complete": total.complete,
        "migrated": total.migrated,
        "lost": total.lost,
        "duplicated": total.duplicated,
        "changed": total.changed,
        "violations": [str(violation) for violation in total.violations[:1]],
        "packets_lost": dict(dropped),
        "wait_ms_max": {way: round(max(waits[way], default=0.0) * 1e3) for way in WAYS},
    }


async def _run(recorder: Recorder, name: str) -> dict[str, list[Event]]:
    """Run all streams to their ends; what was recorded of each."""
    streams = {f"{name}-{index}": _request(index) for index in range(NUM_STREAMS)}
    for stream, request in streams.items():
        request.request_id = stream
        recorder.ask(stream, request)
    async with asyncio.timeout(MAX_TOKENS * 0.020 + RECOVER_WITHIN_S):
        await recorder.until(lambda: not recorder.open_streams & streams.keys())
    history: dict[str, list[Event]] = {stream: [] for stream in streams}
    for event in recorder.history:
        if event.stream in history:
            history[event.stream].append(event)
    return history


def _index(stream: str) -> int:
    return int(stream.rpartition("-")[2])


def _request(index: int) -> pb.GenerateRequest:
    request = request_to_proto(
        f"partition {index}",
        None,
        None,
        {"max_tokens": MAX_TOKENS, "temperature": 0.8, "seed": index, "ignore_eos": True},
    )
    request.migrations_max = 100
    return request


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=1)
    arguments = parser.parse_args()
    figures: dict[str, Any]
    if reason := reason_not_permitted():
        figures = {"ok": True, "skipped": reason}
    else:
        with (
            Namespaces(WORKER_IDS) as net,
            tempfile.TemporaryDirectory(prefix="unbroken-partition-") as directory,
        ):
            net.become(HUB)
            figures = uvloop.run(measure(net, Path(directory), arguments.trials))
    print(json.dumps(figures))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not figures["ok"])


if __name__ == "__main__":
    main()
