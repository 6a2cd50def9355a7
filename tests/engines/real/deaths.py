"""What becomes of streams when a real engine is hurt under them: rows of a table."""

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import grpc.aio
from smg_grpc_proto.generated import vllm_engine_pb2_grpc  # pyright: ignore[reportMissingTypeStubs]

from sidecar.engines.adapter import Call
from sidecar.engines.vllm import request_of
from tests.engines.real import vllm
from tests.engines.real.units import Units
from unbroken.client import GenerationStream
from unbroken.generation import GenerationParams, SamplingParams, StopConditions
from unbroken.history import History
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import worker_pb2

NUM_TOKENS: Final = 200
NUM_TOKENS_STOPPED: Final = 320
"""Of streams whose server is told to stop: it gives tokens for seconds after that, so shorter ones
end before they have to be handed over. Six fit into the KV cache."""
STEP_S: Final = 0.025
"""By which the engine's steps are longer: its streams have to last until all have begun."""
STREAM_S_MAX: Final = 400.0
BYSTANDER_TOKENS: Final = 900
BYSTANDER_S_MAX: Final = 15.0
"""A client without us that hears nothing for so long is left hanging."""
SILENT_S: Final = 1.5
"""One that hears nothing for so long, and then that its connection is gone, was so too."""

FEATURES: Final[Mapping[str, Mapping[str, Any]]] = {
    "greedy": {"temperature": 0.0},
    "repetition penalty": {"temperature": 0.0, "repetition_penalty": 1.2},
    "frequency penalty": {"temperature": 0.0, "frequency_penalty": 1.2},
    "seeded": {"temperature": 0.8, "seed": 7},
    "seeded, top-p, all penalties": {
        "temperature": 0.9,
        "seed": 11,
        "top_p": 0.95,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
    },
    "presence penalty": {"temperature": 0.0, "presence_penalty": 1.5},
}
MORE_FEATURES: Final[Mapping[str, Mapping[str, Any]]] = {
    "logit bias": {"temperature": 0.0, "logit_bias": {300: 2.0, 301: -5.0}},
    "min_tokens, seeded": {"temperature": 0.7, "seed": 3, "min_tokens": 190},
    "top-k, min-p": {"temperature": 0.9, "seed": 5, "top_k": 40, "min_p": 0.02},
    "regex": {"temperature": 0.0, "regex": "[0-9a-f ]{400,800}"},
}
"""With one prompt each: all together fit into the KV caches of two engines."""
PROMPTS: Final = ((5, 6, 7), (300, 301, 302, 303, 304))


@dataclass(slots=True)
class Row:
    """What came of one way of hurting an engine."""

    streams: int = 0
    cut: int = 0
    """Of them, those that went on elsewhere after their first token."""
    equal: int = 0
    """Of those that were cut."""
    others_equal: int = 0
    ways: set[str] = field(default_factory=set[str])
    features: dict[str, list[int]] = field(default_factory=dict[str, "list[int]"])
    """By feature: how many were cut, and how many of them were equal."""
    failures: Counter[str] = field(default_factory=Counter[str])
    gaps_s: list[float] = field(default_factory=list[float])
    """How long the client waited at each seam."""
    waited_s: list[float] = field(default_factory=list[float])
    """Until the engine that was hurt before served again."""
    bystanders: Counter[str] = field(default_factory=Counter[str])
    """What clients of the same server saw without us."""
    differences: list[str] = field(default_factory=list[str])

    @property
    def is_ok(self) -> bool:
        is_equal = self.cut == self.equal and self.others_equal == self.streams - self.cut
        return self.cut > 0 and is_equal

    def figures(self) -> dict[str, object]:
        gaps = sorted(self.gaps_s)
        return {
            "streams": self.streams,
            "cut": self.cut,
            "equal": self.equal,
            "ways": sorted(self.ways),
            "equal_of_cut": {name: f"{b}/{a}" for name, (a, b) in self.features.items()},
            "failures": dict(self.failures),
            "gap_s_median": round(gaps[len(gaps) // 2], 3) if gaps else None,
            "gap_s_max": round(gaps[-1], 3) if gaps else None,
            "waited_s": [round(one, 1) for one in self.waited_s],
            **({"without_us": dict(self.bystanders)} if self.bystanders else {}),
            **({"differences": self.differences[:5]} if self.differences else {}),
        }


Bystander = Callable[[], Awaitable[str]]
Key = tuple[str, tuple[int, ...]]
KEYS: Final[Sequence[Key]] = (
    *((name, prompt) for name in FEATURES for prompt in PROMPTS),
    *((name, PROMPTS[0]) for name in MORE_FEATURES),
)


async def undisturbed(units: Units, num_tokens: int) -> Mapping[Key, History]:
    """The same requests while nothing happens."""
    histories = {key: History() for key in KEYS}
    await asyncio.gather(*(_read(units, key, histories[key], num_tokens) for key in KEYS))
    return histories


def num_tokens_of(how: str) -> int:
    """Of the streams under this way of hurting an engine."""
    return NUM_TOKENS_STOPPED if how == "told to stop" else NUM_TOKENS


async def hurt(
    units: Units,
    how: str,
    expected: Mapping[Key, History],
    row: Row,
    *,
    beside: Mapping[str, Bystander] | None = None,
) -> None:
    """Hurt the engine of the first stream in mid-stream, and compare what all of them gave.

    `beside`: a client of each engine that has nothing of ours, by the engine's name.
    """
    began = time.monotonic()
    await units.until_serving(vllm.START_S_MAX)
    row.waited_s.append(time.monotonic() - began)
    histories = {key: History() for key in KEYS}
    num_tokens = num_tokens_of(how)
    tasks = [asyncio.create_task(_read(units, key, histories[key], num_tokens)) for key in KEYS]
    begun = NUM_TOKENS // 5 if num_tokens == NUM_TOKENS else 1
    async with asyncio.timeout(STREAM_S_MAX):
        while min(history.num_tokens for history in histories.values()) < begun:
            await asyncio.sleep(0.002)
            for task in tasks:
                if task.done():
                    task.result()
    victim = await busiest(units)
    group = units.group(victim)
    watching = asyncio.create_task(_saw(beside[victim])) if beside else None
    if watching is not None:
        await asyncio.sleep(0.2)  # A client of which nobody knows when it has begun.
    units.hurt[victim] = group
    vllm.hurt(group, how)
    await asyncio.gather(*tasks)
    if watching is not None:
        row.bystanders[await watching] += 1
    if how == "core stopped":  # If nobody has killed it, it is to go on.
        with suppress(LookupError, ProcessLookupError):
            os.kill(vllm.member(group, vllm.CORE), signal.SIGCONT)
    for key, history in histories.items():
        _compare(key, history, expected[key], row)
    print(how, json.dumps(row.figures()), file=sys.stderr, flush=True)  # noqa: T201 - Progress.


def _compare(key: Key, history: History, expected: History, row: Row) -> None:
    row.streams += 1
    difference = history.difference(expected)
    migrations = history.migrations()
    if not migrations:
        row.others_equal += difference.is_none
    else:
        row.cut += 1
        row.equal += difference.is_none
        cut = row.features.setdefault(key[0], [0, 0])
        cut[0] += 1
        cut[1] += difference.is_none
        names = (pb.ContinuationClass.Name(one.continuation_class) for one in migrations)
        row.ways.update(name.removeprefix("CONTINUATION_CLASS_") for name in names)
        row.gaps_s += [one.gap.ToNanoseconds() / 1e9 for one in migrations]
    if not difference.is_none:
        cuts = [one.first_offset for one in migrations]
        row.differences.append(f"{key[0]}, cut at {cuts}: {difference}")
    assert history.finished is not None, "it was read to its end"
    for attempt in history.finished.attempts:
        if attempt.failure:
            name = worker_pb2.FailureKind.Name(attempt.failure)
            row.failures[name.removeprefix("FAILURE_KIND_")] += 1


async def _read(units: Units, key: Key, history: History, num_tokens: int) -> None:
    feature, prompt = key
    stream: GenerationStream = units.client.generate(
        token_ids=prompt,
        max_tokens=num_tokens,
        ignore_eos=True,
        timeout_s=STREAM_S_MAX,
        **(FEATURES.get(feature) or MORE_FEATURES[feature]),
    )
    async for piece in stream:
        history.add(piece, time.monotonic())
    history.started, history.finished = stream.started, stream.finished


async def busiest(units: Units) -> str:
    """The worker with the most streams."""
    workers = await units.client.list_workers()
    busiest = max(workers, key=lambda worker: worker.num_attempts)
    return busiest.record.identity.worker_id


async def _saw(bystander: Bystander) -> str:
    return await bystander()


async def http_bystander(url: str) -> str:
    """What a client of vLLM's HTTP sees of the end of its stream."""
    body = {
        "model": "tiny",
        "prompt": [9, 10, 11],
        "max_tokens": BYSTANDER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    last, heard_at = "", time.monotonic()
    timeout = aiohttp.ClientTimeout(total=None, sock_read=BYSTANDER_S_MAX)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(f"{url}/v1/completions", json=body) as response,
        ):
            async for line in response.content:
                text, heard_at = line.decode(errors="replace").strip(), time.monotonic()
                if text.startswith("data:") and text != "data: [DONE]":
                    last = text
    except TimeoutError:
        return "silence"
    except aiohttp.ClientError:
        # A server that says nothing and keeps the connection is killed by its sidecar in the end.
        is_silent = time.monotonic() - heard_at > SILENT_S
        return "silence, until it was killed" if is_silent else "broken off"
    if '"error"' in last:
        return "an error"
    for reason in ("abort", "length", "stop"):
        if f'"finish_reason":"{reason}"' in last.replace(" ", ""):
            return f"an end by {reason!r}"
    return "the end of the stream without an end"


async def grpc_bystander(address: str) -> str:
    """The same of vLLM's gRPC."""
    params = GenerationParams(
        SamplingParams(temperature=0.0),
        StopConditions(max_tokens=BYSTANDER_TOKENS, ignore_eos=True),
    )
    call = Call("bystander", (9, 10, 11), params, BYSTANDER_TOKENS)
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)  # pyright: ignore[reportUnknownVariableType]
        responses = stub.Generate(request_of(call))
        reason = ""
        try:
            while True:
                async with asyncio.timeout(BYSTANDER_S_MAX):
                    response = await responses.read()
                if response is grpc.aio.EOF:
                    break
                reason = response.complete.finish_reason
        except TimeoutError:
            return "silence"
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
    return f"an end by {reason!r}" if reason else "the end of the stream without an end"
