"""Plays a schedule of faults against an arena under load, and says what became of the streams."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from unbroken.chaos.arena import Arena
from unbroken.chaos.checker import Verdict
from unbroken.chaos.load import Load
from unbroken.chaos.processes import NoEffect
from unbroken.chaos.schedule import Planned
from unbroken.chaos.vocabulary import Component, Harm
from unbroken.request import GenerateOptions, request_to_proto
from unbroken.v1 import inference_service_pb2 as pb

NUM_REQUESTS: Final = 12

_SETTLE_S: Final = 60.0
_CLIENT_REASONS: Final = frozenset({"UNREACHABLE"})
"""With which a stream may end whose client was hurt."""


@dataclass(slots=True)
class Result:
    """What happened."""

    injected: int = 0
    without_effect: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    held: str = ""
    """What is still held for somebody at the end."""
    trouble: list[str] = field(default_factory=list[str])
    """What did not come back."""

    @property
    def is_ok(self) -> bool:
        return (
            self.verdict.is_ok and self.verdict.complete > 0 and not self.held and not self.trouble
        )


async def play(
    arena: Arena,
    faults: Sequence[Planned],
    seconds: float,
    *,
    num_streams: int,
    tell: Callable[[str], None],
) -> Result:
    """Inject and heal what is planned; streams run from before the first to after the last fault.

    `tell` receives a line about each.
    """
    result = Result()
    loop = asyncio.get_running_loop()
    async with Load(arena, requests(), num_streams=num_streams) as load:
        began = loop.time()
        healing: set[asyncio.Task[None]] = set()
        for fault in faults:
            await asyncio.sleep(max(0.0, began + fault.at_s - loop.time()))
            task = asyncio.create_task(_one(arena, load, fault, result, tell))
            healing.add(task)
            if fault.component is Component.CLIENT:
                await task  # The client is one; its load goes on when it is there again.
        await asyncio.sleep(max(0.0, began + seconds - loop.time()))
        await asyncio.gather(*healing)
        try:
            await arena.until_serving(_SETTLE_S)
        except TimeoutError:
            result.trouble.append(f"not all workers serve {_SETTLE_S:g} s after the last fault")
        await load.end()
        result.held = await arena.until_idle()
        result.verdict = load.verdict
    return result


async def _one(
    arena: Arena, load: Load, planned: Planned, result: Result, tell: Callable[[str], None]
) -> None:
    name = f"{planned.at_s:8.3f} s  {planned.harm.value} {planned.component.value}"
    name += f" {planned.victim}"
    is_client = planned.component is Component.CLIENT
    if is_client:
        load.tolerate(_CLIENT_REASONS)
    if is_client and planned.harm is Harm.KILL:
        load.client_died()
    try:
        fault = await arena.inject(planned.component, planned.harm, planned.victim)
    except (NoEffect, KeyError) as error:
        result.without_effect += 1
        tell(f"{name}: no effect: {error}")
        return
    result.injected += 1
    tell(f"{name}: {fault.proof}")
    began = asyncio.get_running_loop().time()
    await asyncio.sleep(planned.lasts_s)
    await fault.end()
    if planned.harm is Harm.KILL:
        await arena.revive(planned.component, planned.victim)
    if is_client:
        load.tolerate(_CLIENT_REASONS)
    tell(f"{name}: healed after {asyncio.get_running_loop().time() - began:.3f} s")


def requests() -> list[pb.GenerateRequest]:
    """Greedy, sampled, with log probabilities, with penalties; short and long."""
    made: list[pb.GenerateRequest] = []
    for index in range(NUM_REQUESTS):
        options: GenerateOptions = {"max_tokens": 30 + 25 * (index % 5), "migrations_max": 1000}
        match index % 4:
            case 0:
                options["temperature"] = 0.0
            case 1:
                options |= {"temperature": 0.9, "seed": index}
            case 2:
                options |= {"temperature": 1.0, "seed": index, "num_top_logprobs": 2}
            case _:
                options |= {"temperature": 0.8, "seed": index, "presence_penalty": 0.7}
        prompt = f"request {index} " * (1 + 20 * (index % 3))
        request = request_to_proto(prompt, None, None, options)
        request.params.stopping.ignore_eos = True
        made.append(request)
    return made
