"""A simulated engine that a test makes sick: python lying_engine.py <socket> <file> [<step ms>]

What the file says holds from the next step on: nothing (it is well), "hung" (it computes nothing,
and says that it has to), "lying" (it computes nothing, and says that there is nothing to compute),
"garbage" (its tokens are others than the right ones).
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

import uvloop
from typing_extensions import override

from worker.engine import StepPlan, StepResult
from worker.service import EngineService
from worker.simulated import CostModel, SimulatedRunner, simulated_runner

POLL_S = 0.01


class SickRunner(SimulatedRunner):
    """Computes as it should, or not at all, or wrongly."""

    sickness = Path()

    @property
    def is_still(self) -> bool:
        return self.sickness.read_text() in ("hung", "lying")

    @override
    async def execute(self, plan: StepPlan) -> StepResult:
        while self.is_still:  # noqa: ASYNC110 - Nothing announces it.
            await asyncio.sleep(POLL_S)
        result = await super().execute(plan)
        if self.sickness.read_text() == "garbage":
            result.token_ids = [(token_id + 1) % 256 for token_id in result.token_ids]
        return result


class SickService(EngineService):
    """Says what it should of its load, or not."""

    sickness = Path()

    @override
    def _frame(self, session: Any, *, with_load: bool) -> Any:
        frame = super()._frame(session, with_load=with_load)
        if frame is not None and frame.HasField("load") and self.sickness.read_text() == "lying":
            frame.load.is_computing = False
            for rank in frame.load.ranks:
                rank.requests_running = rank.requests_waiting = rank.prefill_tokens_queued = 0
        return frame


def main(socket: str, sickness: str, step_ms: str = "10") -> None:
    SickRunner.sickness = SickService.sickness = Path(sickness)
    model = simulated_runner(cost=CostModel(step_base_s=float(step_ms) / 1e3))
    runner = SickRunner(model._spec, model._model, model._cost)  # pyright: ignore[reportPrivateUsage]
    uvloop.run(SickService(runner).serve(Path(socket)))


if __name__ == "__main__":
    main(*sys.argv[1:])
