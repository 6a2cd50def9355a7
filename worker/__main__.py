"""`python -m worker`: runs one engine for one sidecar, until it is asked to stop (SIGTERM)."""

import asyncio
import sys

import uvloop

from unbroken import log
from unbroken.config import load
from unbroken.garbage import collected_in_quiet
from unbroken.loop_watch import watched_loop
from unbroken.signals import heed, heed_no_more
from worker.config import WorkerConfig
from worker.engine import ModelRunner
from worker.kv_store import store_settings
from worker.service import EngineService
from worker.simulated import CostModel, Faults, simulated_runner

_log = log.get_logger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 if asked to stop, 1 if the engine can't be loaded, else an exception's."""
    config = load(WorkerConfig, sys.argv[1:] if argv is None else argv, prog="worker")
    log.configure("worker", config.log_level, config.log_format)
    _log.info("starting", **config.effective())
    return uvloop.run(_run(config))


async def _run(config: WorkerConfig) -> int:
    stop = asyncio.Event()
    heed(lambda _: stop.set())
    try:
        runner = _runner(config)
    except (ImportError, OSError, ValueError) as error:
        _log.error("engine can't be loaded", engine=config.engine, error=str(error))
        return 1
    service = EngineService(runner, waiting_max=config.waiting_max)

    def on_listening() -> None:
        spec = runner.spec
        _log.info("ready", engine=spec.kind, model=spec.model, socket=str(config.socket))

    serving = asyncio.create_task(service.serve(config.socket, on_listening=on_listening))
    stopping = asyncio.create_task(stop.wait())
    async with watched_loop(), collected_in_quiet(lambda: service.is_idle):
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not serving.done():
        _log.info("stopping")
        serving.cancel()
        await asyncio.wait((serving,))
        heed_no_more()
        return 0
    await serving  # It ends by itself only with an error.
    return 1


def _runner(config: WorkerConfig) -> ModelRunner:
    """Load the engine.

    Raises:
        ImportError: The engine's library is not installed.
        OSError: The model can't be read.
        ValueError: The configuration contradicts itself or the model.
    """
    match config.engine:
        case "llama":
            from worker.llama import LlamaRunner

            return LlamaRunner.load(config)
        case "simulated":
            given = {
                "context_length": config.context_length,
                "batch_size_max": config.batch_size_max,
                "prefill_tokens_max": config.prefill_tokens_max,
            }
            return simulated_runner(
                model=config.model or "simulated",
                **{name: value for name, value in given.items() if value},
                block_size=config.block_size,
                kv_blocks=config.kv_blocks,
                num_ranks=config.num_ranks,
                eos_probability=config.eos_probability,
                cost=CostModel(
                    step_base_s=config.step_base_ms / 1e3,
                    step_per_sequence_s=config.step_per_sequence_us / 1e6,
                    prefill_tokens_per_s=config.prefill_tokens_per_s,
                ),
                faults=Faults(
                    crash_on_token=config.crash_on_token, stall_on_token=config.stall_on_token
                ),
                native_resume=config.native_resume,
                random_source=config.random_source,
                repetition_penalty_counts_prompt=config.repetition_penalty_counts_prompt,
                memory=store_settings(config),
            )


if __name__ == "__main__":
    sys.exit(main())
