"""A frontend without its client edge: links, ledgers, detokenisation, and nobody to write to.

    python -m benchmarks.ingest --discovery DIR --streams 256 --tokens 300 --sidecar-pid PID

What has come is taken from the streams every 250 ms, because that is the client edge's work. Prints
one line of JSON when all streams are complete. CPU is that of the steady state, for this process
and the sidecar alike: from a second after the streams began until most tokens have come.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random
from uuid import uuid4

import uvloop

from benchmarks.stamps import CpuClock
from frontend.admission import Envelope
from frontend.dispatch import Choice, Dispatcher, News
from frontend.links import Links
from frontend.mesh_view import MeshView
from frontend.metrics import FrontendMetrics
from frontend.outliers import OutlierLimits, Outliers
from frontend.quarantine import Quarantine
from frontend.query_of_death import Queries, QueryLimits
from frontend.relay_call import FrontendIdentity, LinkLimits
from frontend.stream import Stream
from unbroken import discovery, metrics
from unbroken.checkpoint import Checkpoint
from unbroken.generation import GenerationParams, SamplingParams, StopConditions
from unbroken.outcome import ContinuationPolicy

TAKE_INTERVAL_S = 0.250
_WARM_UP_S = 1.0


async def ingest(
    directory: Path, streams: int, tokens: int, sidecar_pid: int
) -> Mapping[str, float]:
    """Run so many streams of so many tokens to their end."""
    mesh = MeshView()
    outliers = Outliers(OutlierLimits(), Random(0))
    counted = FrontendMetrics(metrics.new_registry())
    identity = FrontendIdentity("ingest", discovery.incarnation_now())
    links = Links(mesh, identity, LinkLimits(), observer=counted, outliers=outliers)
    quarantine = Quarantine(Queries(QueryLimits()), outliers, counted, key=b"ingest")
    dispatcher = Dispatcher(mesh, links, counted, quarantine)
    following = asyncio.create_task(links.follow(discovery.connect(directory)))
    while not any(mesh.num_ready(name) for name in mesh.model_names()):  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    (name,) = mesh.model_names()
    model = mesh.model(name)
    assert model is not None
    params = GenerationParams(
        SamplingParams(temperature=0.0), StopConditions(max_tokens=tokens, ignore_eos=True)
    )
    choices: list[Choice] = []
    for index in range(streams):
        stream = Stream(Checkpoint((index % 250, 1, 2), params), model.tokenizer)
        envelope = Envelope(
            request_id=uuid4().hex,
            model=name,
            num_choices=1,
            policy=ContinuationPolicy.PREFER_EXACT,
            migrations_max=3,
            priority=0,
            tenant="",
            parent_request_id="",
            orphan_grace_s=1.0,
        )
        choices.append(
            Choice(
                stream,
                0,
                dispatcher=dispatcher,
                envelope=envelope,
                model=model,
                news=News(),
                deadline_at=None,
            )
        )
    for choice in choices:
        choice.begin()
    taken = counted_from = 0
    cpu, sidecar_cpu, began = CpuClock(), CpuClock(sidecar_pid), time.monotonic()
    is_warm = False
    result: Mapping[str, float] | None = None
    while running := [choice for choice in choices if choice.stream.outcome is None]:
        await asyncio.sleep(TAKE_INTERVAL_S)
        for choice in running:
            piece, commands = choice.stream.take()
            taken += len(piece.token_ids)
            choice.obey(commands)
        if not is_warm and time.monotonic() - began > _WARM_UP_S:
            is_warm, counted_from, began = True, taken, time.monotonic()
            cpu, sidecar_cpu = CpuClock(), CpuClock(sidecar_pid)
        if result is None and taken > 0.9 * streams * tokens:  # The end is not the steady state.
            counted = taken - counted_from
            result = {
                "streams": streams,
                "tokens": counted,
                "tokens_per_s": counted / (time.monotonic() - began),
                "cpu_us_per_token": round(cpu.elapsed_s() / counted * 1e6, 2),
                "sidecar_cpu_us_per_token": round(sidecar_cpu.elapsed_s() / counted * 1e6, 2),
            }
    failed = [
        c.stream.outcome.error for c in choices if c.stream.outcome and c.stream.outcome.error
    ]
    if failed or result is None:
        raise RuntimeError(f"{len(failed)} streams failed, the first: {failed[:1]}")
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await links.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--discovery", type=Path, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--sidecar-pid", type=int, required=True)
    arguments = parser.parse_args()
    result = uvloop.run(
        ingest(arguments.discovery, arguments.streams, arguments.tokens, arguments.sidecar_pid)
    )
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main()
