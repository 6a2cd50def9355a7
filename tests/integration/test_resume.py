"""A frontend dies under its streams, and they go on at another one: real processes, raw gRPC.

What a plain client recorded (`tests.integration.plain`) is all that it resumes from.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import grpc.aio
import pytest

from tests.integration.plain import Caller, Recording, generate
from tests.integration.worlds import World, real_mesh
from unbroken.chaos.processes import is_alive
from unbroken.v1 import generation_pb2, worker_pb2
from unbroken.v1 import inference_service_pb2 as pb

NUM_TOKENS = 40
NUM_READ = 12
SCHEMA = '{"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 40, "maxItems": 40}'
CLASSES = {
    "native": "",
    "append": "--no-native-resume",
    "regenerate": "--no-native-resume --random-source sequential",
}


def request(**sampling: float) -> pb.GenerateRequest:
    message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(300, 330)))
    message.params.sampling.CopyFrom(generation_pb2.SamplingParams(temperature=0.9, seed=7))
    for name, value in sampling.items():
        setattr(message.params.sampling, name, value)
    message.params.stopping.max_tokens = NUM_TOKENS
    return message


def features(stop: str) -> Mapping[str, pb.GenerateRequest]:
    """A request for everything that has state."""
    found = {
        "greedy": request(temperature=0),
        "sampled": request(),
        "penalties": request(presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.2),
        "logprobs": request(),
        "stop string": request(temperature=0),
        "min_tokens": request(),
        "schema": request(),
        "choices": request(),
    }
    found["logprobs"].params.logprobs.num_top = 2
    found["stop string"].params.stopping.stop.append(stop)
    found["min_tokens"].params.stopping.min_tokens = NUM_TOKENS - 5
    found["schema"].params.constraint.json_schema = SCHEMA
    found["choices"].num_choices = 3
    return found


async def until_begun(seen: Recording) -> None:
    wanted = NUM_READ * (seen.request.num_choices or 1)
    while seen.num_tokens < wanted:  # noqa: ASYNC110 - Nothing announces it.
        await asyncio.sleep(0.002)


async def cut(world: World, requests: Mapping[str, pb.GenerateRequest], *names: str) -> None:
    """Run all requests, kill these processes in mid-stream, resume, compare."""
    first, second = world.mesh.frontend_addresses
    expected = {name: await generate(second, message) for name, message in requests.items()}
    seen: dict[str, Recording] = {}
    for name, message in requests.items():
        copy = pb.GenerateRequest()
        copy.CopyFrom(message)
        copy.request_id = f"{name} without {' '.join(names)}"
        seen[name] = Recording(copy)
    async with Caller(first) as caller:
        reading = [asyncio.create_task(caller.generate(one)) for one in seen.values()]
        await asyncio.gather(*map(until_begun, seen.values()))
        pids = [world.mesh.frontend_pid]
        for name in names:
            if name in world.mesh.workers:
                pids.append(world.mesh.workers[name].engine_pgid)
            world.mesh.kill(name)
        ends = await asyncio.gather(*reading, return_exceptions=True)
        while any(map(is_alive, pids)):  # noqa: ASYNC110 - A signal takes its time.
            await asyncio.sleep(0.002)
    # On a machine that is busy some have all that they wanted before the last one has begun.
    left = {
        name: one for (name, one), end in zip(seen.items(), ends, strict=True) if end is not True
    }
    assert left, "nobody was cut off"
    assert all(isinstance(end, grpc.aio.AioRpcError) or end is True for end in ends)
    async with Caller(second) as caller:
        assert all(await asyncio.gather(*map(caller.resume, left.values())))
    for name, one in seen.items():
        truth = expected[name]
        assert one.choices == truth.choices, name
        assert one.finished is not None
        assert truth.finished is not None
        usage, billed = one.finished.usage, truth.finished.usage
        assert usage.completion_tokens == billed.completion_tokens, name
        assert usage.prompt_tokens == billed.prompt_tokens, name
        for mine, theirs in zip(one.finished.choices, truth.finished.choices, strict=True):
            assert mine.finish_reason == theirs.finish_reason, name
            assert mine.stop == theirs.stop, name
            assert mine.cumulative_logprob == pytest.approx(theirs.cumulative_logprob), name
            assert mine.continued in (pb.CONTINUED_NEVER, pb.CONTINUED_EXACT), name
        if names == ("f1",) and name in left:
            assert usage.recomputed_prefill_tokens == 0, f"{name} was computed twice"
            assert usage.recomputed_decode_tokens == 0, f"{name} was computed twice"
            assert all(attempt.adopted for attempt in one.finished.attempts), name
    if names != ("f1",):
        moved = [
            attempt
            for one in seen.values()
            if one.finished is not None
            for attempt in one.finished.attempts
            if not attempt.adopted
        ]
        assert moved, "a worker was lost, too"
        assert {a.failure for a in moved} == {worker_pb2.FAILURE_KIND_UNSPECIFIED}


@pytest.mark.parametrize(
    ("kind", "edge"), [*((kind, "grpcio") for kind in CLASSES), ("native", "native")]
)
def test_whatever_a_request_uses_it_goes_on_exactly_at_another_frontend(
    kind: str, edge: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        whole = await generate(world.mesh.frontend_addresses[1], request(temperature=0))
        text = whole.choices[0].text
        middle = len(text) * 3 // 4
        requests = features(stop=text[middle : middle + 6])
        await cut(world, requests, "f1")
        await world.mesh.restart("f1")
        await world.mesh.until_serving(["w1", "w2"])
        await cut(world, requests, "f1", "w1")

    options = f"--step-base-ms 10 {CLASSES[kind]}"
    with real_mesh(
        tmp_path,
        num_workers=2,
        num_frontends=2,
        is_emptied=True,
        engine_options=options,
        frontend_flags=["--edge", edge],
    ) as world:
        world.run(scenario(), limit_s=60)
