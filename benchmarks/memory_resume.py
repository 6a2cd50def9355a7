"""Class R beside class C: streams of a real model with a long context, whose engines are killed.

    python -m benchmarks.memory_resume [--trials 50] [--prompts 3] [--context 3000]

Two workers with llama.cpp on one host. Streams of one mesh go on by computing prompt and output
again (C), those of another from the blocks that a memory service kept (R). Each engine is killed
(SIGKILL) in mid-stream at a random offset; token ids, log probabilities, text and billed usage are
compared with an undisturbed run without a memory service.

Then what storing costs: one engine decodes at that context, in turns of two blocks with and without
storing them. What counts is the processor's time of all its threads, so that other work of the
machine does not: on one core, that is what the token rate would lose.

Ends with one line of JSON.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from tests.memory_service.processes import serving
from unbroken.client import Client
from unbroken.history import History
from unbroken.mesh import LocalMesh
from unbroken.request import GenerateOptions
from unbroken.v1 import attempt_pb2
from unbroken.v1 import inference_service_pb2 as pb
from worker.config import WorkerConfig
from worker.constraints import ConstraintCompiler
from worker.engine import admit
from worker.llama import BLOCK_SIZE, LlamaRunner
from worker.scheduler import Scheduler

SPEEDUP_MIN = 5.0
COST_SHARE_MAX = 0.03
MAX_TOKENS = 48
CUTS = (8, 40)
SLOTS = 2
STREAM_S = 180.0
OPTIONS: GenerateOptions = {
    "temperature": 0.8,
    "seed": 20_251,
    "max_tokens": MAX_TOKENS,
    "ignore_eos": True,
    "num_top_logprobs": 2,
}


@dataclass(slots=True)
class Trials:
    """What became of the streams of one mesh whose engines were killed."""

    gaps_s: list[float] = field(default_factory=list[float])
    num_equal: int = 0
    num_restored: int = 0


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--context", type=int, default=3000, help="tokens of each prompt")
    given = parser.parse_args()
    rng = random.Random(7)
    prompts = [
        [rng.randrange(100, 49_000) for _ in range(given.context)] for _ in range(given.prompts)
    ]
    length = given.context + MAX_TOKENS + 16
    truths, computed = uvloop.run(_class_c(prompts, length, rng))
    restored = uvloop.run(_class_r(prompts, truths, given.trials, length, rng))
    cost_share = uvloop.run(_cost(prompts[0]))
    speedup = statistics.median(computed.gaps_s) / statistics.median(restored.gaps_s)
    is_ok = (
        restored.num_equal == restored.num_restored == given.trials
        and computed.num_equal == len(prompts)
        and speedup >= SPEEDUP_MIN
        and cost_share <= COST_SHARE_MAX
    )
    figures = {
        "ok": is_ok,
        "context": given.context,
        "restored_trials": given.trials,
        "restored": restored.num_restored,
        "restored_equal": restored.num_equal,
        "restored_gap_ms_p50": _ms(statistics.median(restored.gaps_s)),
        "restored_gap_ms_max": _ms(max(restored.gaps_s)),
        "computed_trials": len(prompts),
        "computed_equal": computed.num_equal,
        "computed_gap_ms_p50": _ms(statistics.median(computed.gaps_s)),
        "speedup": round(speedup, 1),
        "cost_share": round(cost_share, 4),
    }
    print(json.dumps(figures))  # noqa: T201 - The line that ends every measurement.
    return 0 if is_ok else 1


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)


def _mesh(directory: str, length: int, *, has_memory: bool) -> LocalMesh:
    return LocalMesh(
        Path(directory),
        num_workers=2,
        engine="llama",
        engine_options=f"--context-length {length} --batch-size-max {SLOTS}",
        has_memory=has_memory,
    )


async def _class_c(
    prompts: list[list[int]], length: int, rng: random.Random
) -> tuple[list[History], Trials]:
    """What is right, and how long a stream stands still that is computed again."""
    truths: list[History] = []
    trials = Trials()
    with tempfile.TemporaryDirectory(prefix="unbroken-") as directory:
        async with (
            _mesh(directory, length, has_memory=False) as mesh,
            Client(mesh.frontend_address) as client,
        ):
            for prompt in prompts:
                truths.append(await _streamed(mesh, client, prompt, None))
                seen = await _streamed(mesh, client, prompt, rng.randrange(*CUTS))
                _judge(trials, seen, truths[-1])
    return truths, trials


async def _class_r(
    prompts: list[list[int]],
    truths: list[History],
    num_trials: int,
    length: int,
    rng: random.Random,
) -> Trials:
    trials = Trials()
    with tempfile.TemporaryDirectory(prefix="unbroken-") as directory:
        async with (
            _mesh(directory, length, has_memory=True) as mesh,
            Client(mesh.frontend_address) as client,
        ):
            for prompt, truth in zip(prompts, truths, strict=True):
                seen = await _streamed(mesh, client, prompt, None)
                assert seen.difference(truth).is_none, "undisturbed, and with a memory service"
            for trial in range(num_trials):
                number = trial % len(prompts)
                seen = await _streamed(mesh, client, prompts[number], rng.randrange(*CUTS))
                _judge(trials, seen, truths[number])
    return trials


def _judge(trials: Trials, seen: History, truth: History) -> None:
    assert seen.finished is not None
    last = seen.finished.attempts[-1]
    gap_s = seen.choices[0].gap_s(last.first_offset)
    assert gap_s is not None, "it was cut in the middle"
    trials.gaps_s.append(gap_s)
    trials.num_equal += seen.difference(truth).is_none
    trials.num_restored += last.continuation_class == pb.CONTINUATION_CLASS_RESTORE
    _say(f"gap {gap_s * 1e3:.0f} ms, {seen.difference(truth)}")


async def _streamed(mesh: LocalMesh, client: Client, prompt: list[int], cut: int | None) -> History:
    """One stream. After so many tokens its engine is killed, and at the end it is there again."""
    history = History()
    loop = asyncio.get_running_loop()
    async with client.generate(token_ids=prompt, timeout_s=STREAM_S, **OPTIONS) as stream:
        killed = ""
        async for piece in stream:
            history.add(piece, loop.time())
            if cut is not None and not killed and history.num_tokens >= cut:
                info = await client.get_stream(stream.request_id)
                killed = info.choices[0].worker.worker_id
                mesh.kill(killed, "engine")
        history.started, history.finished = stream.started, stream.finished
    if killed:  # With its sidecar, which would give up an engine that dies so often.
        await mesh.restart(killed)
    return history


async def _cost(prompt: list[int], num_turns: int = 24) -> float:
    """How much more a token takes, as a share, while blocks are stored."""
    with (
        tempfile.TemporaryDirectory(prefix="unbroken-") as directory,
        serving(Path(directory)) as service,
    ):
        num_tokens = num_turns * 2 * BLOCK_SIZE
        runner = LlamaRunner.load(
            WorkerConfig.model_validate(
                {
                    "socket": "unused",
                    "context_length": len(prompt) + 2 * num_tokens,
                    "batch_size_max": SLOTS,
                    "memory": str(service.directory),
                }
            )
        )
        try:
            took_s = await _turns(runner, prompt, num_tokens)
        finally:
            await runner.close()
    with_s, without_s = (statistics.median(took_s[is_storing]) for is_storing in (True, False))
    _say(f"a token takes {with_s * 1e3:.2f} ms, without storing {without_s * 1e3:.2f} ms")
    return with_s / without_s - 1


async def _turns(
    runner: LlamaRunner, prompt: list[int], num_tokens: int
) -> dict[bool, list[float]]:
    """By whether blocks were stored: processor seconds that a token of each turn took."""
    scheduler = Scheduler(runner.spec)
    start = attempt_pb2.StartAttempt(slot=1)
    start.checkpoint.prompt_token_ids.extend(prompt)
    start.checkpoint.params.sampling.temperature = 0.0
    start.checkpoint.params.stopping.max_tokens = 2 * num_tokens
    start.checkpoint.params.stopping.ignore_eos = True
    sequence = admit(start, runner.spec, ConstraintCompiler(runner.spec.tokenizer), now=0.0)
    assert scheduler.submit(sequence)
    took_s: dict[bool, list[float]] = {True: [], False: []}
    turn, begun, num_begun = True, 0.0, 0
    while (plan := scheduler.plan(0.0)) is not None:
        if not turn:
            plan.saves.clear()
        scheduler.commit(plan, await runner.execute(plan))
        num_output = len(sequence.output)
        if num_output and num_output % (2 * BLOCK_SIZE) == 1 and num_output != num_begun:
            now = time.process_time()
            if num_begun:
                took_s[turn].append((now - begun) / (num_output - num_begun))
            turn, begun, num_begun = not turn, now, num_output
    return took_s


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - Progress, for whoever waits.


if __name__ == "__main__":
    sys.exit(main())
