"""How often greedy streams of a real GPU engine go on bit-equal, by class: `make continuation-gpu`

Two processes of transformers' continuous batching (tests/gpu/transformers_serve.py) on one GPU,
each with a sidecar, a frontend before them. For each dtype:

    killed    streams through the frontend, while one engine is killed: those that it had go on at
              the other, as an append (A), and are marked as inexact, as nobody vouches for it
    A         the prompt with its first tokens appended, straight from an engine
    B         the same request again
              both alone and beside others

What is equal is counted, and promised of none: the promise is that every stream is complete, and is
marked where it went on inexactly.

    python -m tests.gpu.continuation [--dtypes bfloat16,float32] [--size 1b] [--device cuda]
"""

import argparse
import asyncio
import json
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import uvloop

from sidecar.engines.adapter import Call
from sidecar.engines.openai import OpenAiAdapter
from tests.engines.real.servers import free_port
from tests.gpu.transformers_serve import SIZES
from unbroken.client import Client
from unbroken.generation import GenerationParams, SamplingParams, StopConditions
from unbroken.history import History
from unbroken.mesh import LocalMesh
from unbroken.v1 import inference_service_pb2 as pb
from worker import simulated_tokenizer

NUM_STREAMS: Final = 16
PROMPT_TOKENS: Final = 64
OUTPUT_TOKENS: Final = 160
CUTS: Final = (1, 40, 80, 120)
ROUNDS: Final = 2
READY_S_MAX: Final = 200.0

Ids = Sequence[int]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    began = time.monotonic()
    figures: dict[str, object] = {}
    oks: list[bool] = []
    for dtype in arguments.dtypes.split(","):
        is_ok, told = uvloop.run(_measure(arguments.size, dtype, arguments.device))
        print(dtype, json.dumps(told), file=sys.stderr, flush=True)  # noqa: T201 - Progress.
        oks.append(is_ok)
        figures[dtype] = told
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"ok": all(oks), **figures, "seconds": seconds}))  # noqa: T201
    sys.exit(not all(oks))


def prompts() -> Sequence[tuple[int, ...]]:
    rng = random.Random(11)
    top = simulated_tokenizer.VOCAB_SIZE - 1
    return [tuple(rng.randrange(5, top) for _ in range(PROMPT_TOKENS)) for _ in range(NUM_STREAMS)]


async def _measure(size: str, dtype: str, device: str) -> tuple[bool, Mapping[str, object]]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "tokenizer").mkdir()
        tokenizer = simulated_tokenizer.asset().tokenizer_json
        (directory / "tokenizer" / "tokenizer.json").write_bytes(tokenizer)
        ports = {"w1": free_port(), "w2": free_port()}
        mesh = LocalMesh(
            directory / "mesh",
            num_workers=len(ports),
            engine=None,
            frontend_flags=("--query-deaths-max", "1000"),
            flags_of={
                worker: _flags(port, directory / "tokenizer", size, dtype, device)
                for worker, port in ports.items()
            },
            ready_timeout_s=READY_S_MAX,
        )
        async with mesh, Client(mesh.frontend_address) as client:
            killed = await _killed(mesh, client)
            adapter = OpenAiAdapter(f"127.0.0.1:{ports['w2']}")
            try:
                await adapter.discover()
                classes = await _classes(adapter)
            finally:
                await adapter.close()
    is_ok = killed["complete"] == killed["streams"] and killed["cut"] == killed["marked"] != 0
    return is_ok, {"killed": killed, **classes}


def _flags(port: int, tokenizer: Path, size: str, dtype: str, device: str) -> Sequence[str]:
    command = (
        *(sys.executable, "-m", "tests.gpu.transformers_serve", "--port", str(port)),
        *("--tokenizer", str(tokenizer), "--size", size, "--dtype", dtype, "--device", device),
    )
    return (
        *("--engine-protocol", "openai", "--engine-address", f"127.0.0.1:{port}"),
        *("--engine-command", shlex.join(command)),
        *("--engine-start-timeout-s", str(READY_S_MAX)),
    )


async def _killed(mesh: LocalMesh, client: Client) -> Mapping[str, object]:
    """Streams through the frontend, and one engine killed under them, again and again."""
    whole = await _all(client)
    streams = complete = cut = marked = equal = others_equal = 0
    gaps: list[float] = []
    agreed: list[int] = []
    for _ in range(ROUNDS):
        await mesh.until_serving(["w1", "w2"])
        histories = [History() for _ in range(NUM_STREAMS)]
        reading = asyncio.create_task(_all(client, histories))
        while min(history.num_tokens for history in histories) < OUTPUT_TOKENS // 4:
            await asyncio.sleep(0.005)
            if reading.done():
                break
        mesh.kill("w1", "engine")
        await reading
        for history, expected in zip(histories, whole, strict=True):
            streams += 1
            complete += history.num_tokens == OUTPUT_TOKENS
            migrations = history.migrations()
            said, should = (one.choices[0].token_ids for one in (history, expected))
            is_equal = said == should
            if not migrations:
                others_equal += is_equal
                continue
            cut += 1
            equal += is_equal
            assert history.finished is not None, "it was read to its end"
            marked += history.finished.choices[0].continued == pb.CONTINUED_INEXACT
            gaps += [one.gap.ToNanoseconds() / 1e9 for one in migrations]
            at = migrations[0].first_offset
            agreed.append(_agreed(said[at:], should[at:]))
    gaps.sort()
    return {
        "streams": streams,
        "complete": complete,
        "cut": cut,
        "marked": marked,
        "equal": equal,
        "others_equal": f"{others_equal}/{streams - cut}",
        "tokens_equal_after_cut_median": sorted(agreed)[len(agreed) // 2] if agreed else None,
        "gap_s_median": round(gaps[len(gaps) // 2], 3) if gaps else None,
        "gap_s_max": round(gaps[-1], 3) if gaps else None,
    }


async def _all(client: Client, histories: Sequence[History] | None = None) -> Sequence[History]:
    histories = histories or [History() for _ in range(NUM_STREAMS)]
    await asyncio.gather(
        *(
            _read(client, prompt, history)
            for prompt, history in zip(prompts(), histories, strict=True)
        )
    )
    return histories


async def _read(client: Client, prompt: tuple[int, ...], history: History) -> None:
    stream = client.generate(
        token_ids=prompt,
        max_tokens=OUTPUT_TOKENS,
        temperature=0.0,
        continuation=pb.CONTINUATION_POLICY_ALLOW_INEXACT,
        timeout_s=READY_S_MAX,
    )
    async for piece in stream:
        history.add(piece, time.monotonic())
    history.started, history.finished = stream.started, stream.finished


def _agreed(one: Ids, other: Ids) -> int:
    """Tokens up to the first that differs."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


async def _classes(adapter: OpenAiAdapter) -> Mapping[str, object]:
    """Straight from one engine, what each class would give."""
    alone = [await _tokens(adapter, prompt, OUTPUT_TOKENS) for prompt in prompts()]
    beside = await _together(adapter, [(prompt, OUTPUT_TOKENS) for prompt in prompts()])
    alone_again = [await _tokens(adapter, prompt, OUTPUT_TOKENS) for prompt in prompts()]
    beside_again = await _together(adapter, [(prompt, OUTPUT_TOKENS) for prompt in prompts()])
    appended_alone = appended_beside = num = 0
    for cut in CUTS:
        rest = OUTPUT_TOKENS - cut
        for prompt, whole in zip(prompts(), alone, strict=True):
            said = await _tokens(adapter, (*prompt, *whole[:cut]), rest)
            appended_alone += list(said) == list(whole[cut:])
            num += 1
        rows = await _together(
            adapter,
            [
                ((*prompt, *whole[:cut]), rest)
                for prompt, whole in zip(prompts(), beside, strict=True)
            ],
        )
        appended_beside += sum(
            list(said) == list(whole[cut:]) for said, whole in zip(rows, beside, strict=True)
        )
    return {
        "A": {"alone": f"{appended_alone}/{num}", "beside": f"{appended_beside}/{num}"},
        "B": {
            "alone": f"{_num_equal(alone, alone_again)}/{NUM_STREAMS}",
            "beside": f"{_num_equal(beside, beside_again)}/{NUM_STREAMS}",
            "alone, then beside": f"{_num_equal(alone, beside)}/{NUM_STREAMS}",
        },
    }


def _num_equal(some: Sequence[Ids], others: Sequence[Ids]) -> int:
    return sum(list(a) == list(b) for a, b in zip(some, others, strict=True))


async def _together(
    adapter: OpenAiAdapter, asked: Sequence[tuple[tuple[int, ...], int]]
) -> Sequence[Ids]:
    return await asyncio.gather(*(_tokens(adapter, prompt, num) for prompt, num in asked))


async def _tokens(adapter: OpenAiAdapter, prompt: tuple[int, ...], num: int) -> Ids:
    params = GenerationParams(SamplingParams(temperature=0.0), StopConditions(num))
    call = Call("continuation", prompt, params, num)
    return [token async for delta in adapter.generate(call) for token in delta.token_ids]


if __name__ == "__main__":
    main()
