"""One of four workers dies with 200 streams of 4,000 tokens: what its resumes do to everybody else.

Four simulated workers with about 70 % of their KV blocks in use. The victim serves 200 streams of
about 4,096 tokens, each survivor 32 of 24,000: about as much KV, and few enough messages that
Python is not what is measured. New requests of 4,096 tokens keep coming, three a second. SIGKILL of
the victim's host moves 200 streams at once, each of which has to be computed again.

The engine's cost model: a step takes 45 ms, 50 µs for each stream that decodes and 20 µs for each
prompt token in it (50,000 tokens/s), of which there are at most 16,384. So a new request makes a
step of 47 ms one of 129 ms, as on a real engine that prefills in chunks, and a full step takes
375 ms.

Shown with the resume queue and without it, in the same run:

- the time between two tokens of the streams that were not hit: its p99 stays below twice its
  normal value;
- every stream that was hit goes on, exactly, and its prompt is computed once more and no more: by
  the usage that the clients are told, and by the engines' own count;
- the tokens a second of all streams are back within 10 % of normal in the time that the survivors'
  prefill rate allows: the tokens to compute, over three workers' 50,000 tokens/s, of which the
  default configuration gives half; or one stream after the other, each with two steps of its own,
  if that takes longer; and a fifth of the time is new requests'.

    python -m benchmarks.storm [--only on|off]
"""

import argparse
import asyncio
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import uvloop

from unbroken.client import Client
from unbroken.errors import Reason, UnbrokenError
from unbroken.history import ChoiceHistory, History, record
from unbroken.mesh import LocalMesh
from unbroken.v1.worker_pb2 import FailureKind
from worker.simulated import SimulatedModel

NUM_WORKERS = 4
VICTIM = "w4"
NUM_VICTIMS = 200
VICTIM_CONTEXT = 4096
"""Prompt and output when the victim dies, about."""
VICTIM_PROMPT = 3300
VICTIM_TOKENS = 4000
NUM_OTHERS = 32
"""On each survivor."""
OTHER_PROMPT = 24_000
OTHER_TOKENS = 4_000
NEW_PER_S = 3.0
NEW_PROMPT = 4096
NEW_TOKENS = 16

STEP_BASE_MS = 45.0
STEP_PER_SEQUENCE_US = 50.0
PREFILL_TOKENS_PER_S = 50_000
PREFILL_TOKENS_MAX = 16_384
KV_BLOCKS = 72_000
BLOCK_SIZE = 16
CONTEXT_LENGTH = 65_536

_KV_TOKENS = NUM_VICTIMS * VICTIM_CONTEXT + (NUM_WORKERS - 1) * NUM_OTHERS * OTHER_PROMPT
LOAD = _KV_TOKENS / BLOCK_SIZE / NUM_WORKERS / KV_BLOCKS
"""Of the KV blocks, when the last stream has begun."""

SHARE = 0.5
NEW_WORK_SHARE = 0.2
"""As in the default configuration."""

NORMAL_S = 8.0
GOODPUT_WINDOW_S = 2.0
IN_FLIGHT_S = 0.1
SETTLED_S = 5.0
"""How long is looked at after the last stream went on."""
ALLOWED_SLACK_S = 1.5
"""Detection, the first step, and half a window of the measurement."""

_VOCABULARY = 250


@dataclass(slots=True)
class Fresh:
    """What became of one new request."""

    began_at: float
    ttft_s: float | None = None
    error: Reason | None = None
    history: History | None = None


@dataclass(slots=True)
class Storm:
    """One run, as its clients saw it."""

    prompts: list[list[int]]
    streams: list[History]
    """Of each prompt; those meant for the victim first."""
    hit: list[History] = field(default_factory=list[History])
    spared: list[History] = field(default_factory=list[History])
    """Those that lost their worker, and all others, in the end."""
    fresh: list[Fresh] = field(default_factory=list[Fresh])
    killed_at: float = 0.0
    engine_prefill_tokens: int = 0
    expected_prefill_tokens: int = 0
    num_preemptions: int = 0
    frontend_cores: float = 0.0
    client_cores: float = 0.0

    def flows(self, history: History) -> bool:
        """Whether tokens came that cannot have been under way when the victim was killed."""
        times = _one(history).arrived_at
        return bool(times) and times[-1] > self.killed_at + IN_FLIGHT_S

    def resumed_at(self, history: History) -> float | None:
        """When the first token of its last attempt came; None if none did."""
        if history.finished is None or len(history.finished.attempts) < 2:
            return None
        offset, times = history.finished.attempts[-1].first_offset, _one(history).arrived_at
        return times[offset] if offset < len(times) else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=["on", "off"])
    arguments = parser.parse_args()
    modes = [arguments.only] if arguments.only else ["on", "off"]
    figures: dict[str, dict[str, object]] = {}
    for mode in modes:
        figures[mode] = figures_of(uvloop.run(storm(is_on=mode == "on")))
        print(mode, json.dumps(figures[mode]), file=sys.stderr)  # noqa: T201
    is_ok = all(bool(figures[mode]["ok"]) for mode in modes if mode == "on")
    is_ok = is_ok and all(figures[mode]["different"] == 0 for mode in modes)
    summary: dict[str, object] = {
        "ok": is_ok,
        "streams": NUM_VICTIMS,
        "other_streams": NUM_OTHERS * (NUM_WORKERS - 1),
        "kv_load": round(LOAD, 2),
        **figures,
    }
    print(json.dumps(summary))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not is_ok)


# The storm.


async def storm(*, is_on: bool) -> Storm:
    """Let it happen."""
    options = (
        f"--step-base-ms {STEP_BASE_MS:g} --step-per-sequence-us {STEP_PER_SEQUENCE_US:g} "
        f"--prefill-tokens-per-s {PREFILL_TOKENS_PER_S} --prefill-tokens-max {PREFILL_TOKENS_MAX} "
        f"--kv-blocks {KV_BLOCKS} --block-size {BLOCK_SIZE} --context-length {CONTEXT_LENGTH}"
    )
    random = Random(5)
    victims = [
        _prompt(random, VICTIM_PROMPT + random.randrange(-128, 129)) for _ in range(NUM_VICTIMS)
    ]
    others = [_prompt(random, OTHER_PROMPT) for _ in range(NUM_OTHERS * (NUM_WORKERS - 1))]
    prompts = [*victims, *others]
    run = Storm(prompts, [History() for _ in prompts])
    with tempfile.TemporaryDirectory() as directory:
        mesh = LocalMesh(
            Path(directory),
            num_workers=NUM_WORKERS,
            engine="simulated",
            engine_options=options,
            frontend_flags=["--resume-queue" if is_on else "--no-resume-queue"],
            # It asks engines that are idle before it begins, and they count its tokens.
            sidecar_flags=["--canary-period-s", "0"],
        )
        async with mesh, Client(mesh.frontend_address) as client:
            tasks: list[asyncio.Task[None]] = []
            try:
                await _happen(mesh, client, run, random, tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            await _count_prefill(client, run)
    return run


async def _happen(
    mesh: LocalMesh, client: Client, run: Storm, random: Random, tasks: list[asyncio.Task[None]]
) -> None:
    """All of it; `tasks` are what has to be ended."""
    # The victim's streams are placed while it is alone; then the survivors are emptier than it is.
    # In waves, so that what waits for its prefill does not make a worker look full.
    survivors = [f"w{index + 1}" for index in range(NUM_WORKERS) if f"w{index + 1}" != VICTIM]
    for worker_id in survivors:
        mesh.kill(worker_id, "host")
    await _until_gone(client, survivors)
    streams = list(zip(run.prompts, run.streams, strict=True))
    await _begin(client, streams[:NUM_VICTIMS], VICTIM_TOKENS, NUM_VICTIMS, tasks)
    for worker_id in survivors:
        await mesh.restart(worker_id)
    await _begin(client, streams[NUM_VICTIMS:], OTHER_TOKENS, len(survivors), tasks)
    await _check_placement(client)
    reading = list(tasks)
    enough = asyncio.Event()
    arriving = asyncio.create_task(_arrive(client, random, run, enough))
    tasks.append(arriving)
    await _live_through(mesh, run)
    enough.set()
    await arriving
    for index in range(len(reading)):
        await client.cancel(f"stream-{index}")
    await asyncio.gather(*reading)
    for history in run.streams:
        is_hit = history.finished is not None and len(history.finished.attempts) > 1
        (run.hit if is_hit else run.spared).append(history)


async def _live_through(mesh: LocalMesh, run: Storm) -> None:
    """The normal time, the kill, and until all go on."""
    await asyncio.sleep(1.0)  # The first new requests.
    cpu = _cpu_s(mesh.frontend_pid), _cpu_s(os.getpid())
    await asyncio.sleep(NORMAL_S)
    run.frontend_cores = (_cpu_s(mesh.frontend_pid) - cpu[0]) / NORMAL_S
    run.client_cores = (_cpu_s(os.getpid()) - cpu[1]) / NORMAL_S
    run.killed_at = time.monotonic()
    mesh.kill(VICTIM, "host")
    await asyncio.sleep(0.5)
    with suppress(TimeoutError):
        await _until(lambda: all(run.flows(one) for one in run.streams), timeout_s=60)
    await asyncio.sleep(SETTLED_S)


async def _read(
    client: Client, prompt: list[int], max_tokens: int, history: History, request_id: str = ""
) -> None:
    """Read a stream to its end, which may be that it is cancelled."""
    stream = client.generate(
        token_ids=prompt,
        max_tokens=max_tokens,
        temperature=0.0,
        timeout_s=300,
        request_id=request_id,
    )
    async with stream:
        try:
            await record(stream, history)
        except UnbrokenError as error:
            history.finished = stream.finished
            if error.reason is not Reason.CANCELLED:
                raise


async def _begin(
    client: Client,
    streams: list[tuple[list[int], History]],
    max_tokens: int,
    wave_size: int,
    tasks: list[asyncio.Task[None]],
) -> None:
    """Have all of these running."""
    for begin in range(0, len(streams), wave_size):
        wave = streams[begin : begin + wave_size]
        for prompt, history in wave:
            reading = _read(client, prompt, max_tokens, history, f"stream-{len(tasks)}")
            tasks.append(asyncio.create_task(reading))
        await _until(lambda wave=wave: all(history.num_tokens for _, history in wave))


async def _arrive(client: Client, random: Random, run: Storm, enough: asyncio.Event) -> None:
    """New requests, at random moments."""
    async with asyncio.TaskGroup() as group:
        while not enough.is_set():
            await asyncio.sleep(random.expovariate(NEW_PER_S))
            fresh = Fresh(time.monotonic())
            run.fresh.append(fresh)
            group.create_task(_fresh(client, _prompt(random, NEW_PROMPT), fresh))


async def _fresh(client: Client, prompt: list[int], fresh: Fresh) -> None:
    history = fresh.history = History()
    try:
        await _read(client, prompt, NEW_TOKENS, history)
    except UnbrokenError as error:
        fresh.error = error.reason
    if history.choices:
        fresh.ttft_s = _one(history).arrived_at[0] - fresh.began_at


async def _count_prefill(client: Client, run: Storm) -> None:
    """What the survivors computed, by their own count, and what was asked of them."""
    await asyncio.sleep(1.0)  # The last load reports.
    for worker in await client.list_workers():
        if worker.record.identity.worker_id != VICTIM:
            run.engine_prefill_tokens += worker.load.prefill_tokens_total
            run.num_preemptions += sum(rank.preemptions_total for rank in worker.load.ranks)
    finished = [history.finished for history in run.streams]
    finished += [fresh.history.finished for fresh in run.fresh if fresh.history is not None]
    for end in finished:
        if end is not None:
            run.expected_prefill_tokens += sum(
                end.usage.prompt_tokens + attempt.first_offset
                for attempt in end.attempts
                if attempt.worker.worker_id != VICTIM
            )


# The figures.


def figures_of(run: Storm) -> dict[str, object]:
    """What is promised, and what was seen."""
    resumed_at = [run.resumed_at(history) for history in run.hit]
    resumed = [at for at in resumed_at if at is not None]
    back_at = max(resumed, default=math.inf)
    normal = _gaps(run.spared, run.killed_at - NORMAL_S, run.killed_at)
    during = _gaps(run.spared, run.killed_at, back_at)
    ratio = _quantile(during, 0.99) / _quantile(normal, 0.99)

    to_compute = sum(_resumed_tokens(history) for history in run.hit)
    survivors = NUM_WORKERS - 1
    allowed_s = _allowed_s(to_compute / survivors, len(run.hit) / survivors)
    recovered_s = _recovered_s(run)
    recomputed = sum(
        history.finished.usage.recomputed_prefill_tokens if history.finished else 0
        for history in run.hit
    )
    different = _num_different(run)
    before = [f for f in run.fresh if f.began_at < run.killed_at - 1.0]
    in_storm = [f for f in run.fresh if run.killed_at <= f.began_at < back_at]
    is_ok = (
        len(resumed) == len(run.hit) >= NUM_VICTIMS
        and different == 0
        and ratio < 2.0
        and recovered_s <= allowed_s + ALLOWED_SLACK_S
        and recomputed == to_compute
        and run.engine_prefill_tokens == run.expected_prefill_tokens
    )
    return {
        "ok": is_ok,
        "hit": len(run.hit),
        "failures": _failures(run),
        "resumed": len(resumed),
        "different": different,
        "itl_ms_p50": [_ms(_quantile(one, 0.5)) for one in (normal, during)],
        "itl_ms_p99": [_ms(_quantile(one, 0.99)) for one in (normal, during)],
        "itl_p99_ratio": round(ratio, 2),
        "itl_ms_max": [_ms(max(one, default=0.0)) for one in (normal, during)],
        "last_resumed_s": round(back_at - run.killed_at, 2),
        "goodput_back_s": round(recovered_s, 2),
        "goodput_allowed_s": round(allowed_s, 2),
        "goodput_others_share": round(_goodput_of_others(run, back_at), 2),
        "prefill_tokens_needed": to_compute,
        "prefill_tokens_recomputed": recomputed,
        "engine_prefill_tokens": [run.expected_prefill_tokens, run.engine_prefill_tokens],
        "preemptions": run.num_preemptions,
        "new_requests": [len(before), len(in_storm)],
        "new_refused": sum(f.error is Reason.OVERLOADED for f in in_storm),
        "new_failed": sum(f.error not in (None, Reason.OVERLOADED) for f in run.fresh),
        "new_ttft_ms_p50": [_ms(_quantile(_ttfts(f), 0.5)) for f in (before, in_storm)],
        "new_ttft_ms_max": [_ms(max(_ttfts(f), default=0.0)) for f in (before, in_storm)],
        "cores": [round(run.frontend_cores, 2), round(run.client_cores, 2)],
    }


def _failures(run: Storm) -> dict[str, int]:
    """Why attempts ended before their streams: of the victim's, and nobody else's."""
    finished = [history.finished for history in run.streams if history.finished is not None]
    kinds = [attempt.failure for end in finished for attempt in end.attempts if attempt.failure]
    return dict(Counter(FailureKind.Name(kind) for kind in kinds))


def _allowed_s(tokens: float, streams: float) -> float:
    """How long one survivor takes for so many, at its pace, or one after the other.

    One after the other, each waits for the step that runs, and shares the next one with those who
    decode.
    """
    paced_s = tokens / (PREFILL_TOKENS_PER_S * SHARE)
    serial_s = tokens / PREFILL_TOKENS_PER_S + streams * 2 * STEP_BASE_MS / 1e3
    return max(paced_s, serial_s) / (1 - NEW_WORK_SHARE)


def _gaps(histories: list[History], begin: float, end: float) -> list[float]:
    """Seconds between tokens that arrived in an interval and those before them."""
    gaps: list[float] = []
    for history in histories:
        times = _one(history).arrived_at
        gaps += [b - a for a, b in itertools.pairwise(times) if begin <= b < end]
    return gaps


def _recovered_s(run: Storm) -> float:
    """When the tokens of all streams were back within 10 % of normal, after the kill."""
    times = sorted(at for history in run.streams for at in _one(history).arrived_at)
    normal = _rate(times, run.killed_at - NORMAL_S, NORMAL_S)
    begin = run.killed_at
    while begin < run.killed_at + 60:
        if _rate(times, begin, GOODPUT_WINDOW_S) >= 0.9 * normal:
            return begin - run.killed_at
        begin += 0.1
    return math.inf


def _goodput_of_others(run: Storm, back_at: float) -> float:
    """Tokens a second of those that were not hit, while the others recovered, to normal."""
    times = sorted(at for history in run.spared for at in _one(history).arrived_at)
    normal = _rate(times, run.killed_at - NORMAL_S, NORMAL_S)
    return _rate(times, run.killed_at, back_at - run.killed_at) / normal


def _rate(times: list[float], begin: float, seconds: float) -> float:
    return sum(begin <= at < begin + seconds for at in times) / seconds


def _resumed_tokens(history: History) -> int:
    """What has to be computed again for a stream: its prompt and what was delivered."""
    if history.finished is None:
        return 0
    prompt = history.finished.usage.prompt_tokens
    return sum(prompt + attempt.first_offset for attempt in history.finished.attempts[1:])


def _num_different(run: Storm) -> int:
    """Streams of which a token is missing, comes twice or is not what the model says."""
    model = SimulatedModel("simulated")
    different = 0
    for prompt, history in zip(run.prompts, run.streams, strict=True):
        choice = _one(history)
        state, last = model.state(prompt), prompt[-1]
        expected: list[int] = []
        for _ in choice.token_ids:
            last = model.best(state, last)
            state = model.grown(state, last)
            expected.append(last)
        is_whole = choice.offsets == list(range(len(choice.token_ids)))
        different += not (is_whole and choice.token_ids == expected)
    return different


def _ttfts(fresh: list[Fresh]) -> list[float]:
    return [one.ttft_s for one in fresh if one.ttft_s is not None]


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else math.inf


def _ms(seconds: float) -> float | None:
    return round(seconds * 1e3, 1) if math.isfinite(seconds) else None


# Parts.


def _prompt(random: Random, num_tokens: int) -> list[int]:
    """No two alike, so that no cache helps."""
    return random.choices(range(_VOCABULARY), k=num_tokens)


def _one(history: History) -> ChoiceHistory:
    return history.choices.get(0) or ChoiceHistory()


async def _until(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - nothing announces it.
            await asyncio.sleep(0.05)


async def _until_gone(client: Client, worker_ids: list[str]) -> None:
    """Until the frontend has noticed that these workers are away."""
    async with asyncio.timeout(10):
        while True:
            workers = {w.record.identity.worker_id: w for w in await client.list_workers()}
            if all(one not in workers or workers[one].detail for one in worker_ids):
                return
            await asyncio.sleep(0.05)


async def _check_placement(client: Client) -> None:
    """The victim has its streams, and hardly anybody else's."""
    attempts = {
        worker.record.identity.worker_id: worker.num_attempts
        for worker in await client.list_workers()
    }
    is_right = NUM_VICTIMS <= attempts[VICTIM] <= NUM_VICTIMS + NUM_OTHERS // 8
    assert is_right, f"streams are not where they should be: {attempts}"


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
