"""`unbroken run`: an engine and its sidecar as one unit."""

import asyncio
import json
import sys
from pathlib import Path

from tests.sidecar.processes import no_process_left
from unbroken.discovery import WORKERS, connect
from unbroken.v1 import worker_pb2


async def serving(directory: Path) -> worker_pb2.WorkerRecord:
    """The record of the worker, once its engine is up."""
    async for members in connect(directory).watch(WORKERS):
        if (record := members.get("w1")) is not None and record.model == "tiny":
            return record
    raise AssertionError("a watch does not end")


def test_a_command_line_that_starts_an_engine_becomes_its_sidecar(tmp_path: Path) -> None:
    async def scenario() -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "unbroken.cli", "run", "--protocol=vllm", "--worker-id=w1"),
            *(f"--discovery={tmp_path}", "--output=json", "--"),
            *(sys.executable, "-m", "tests.engines", "--protocol=vllm"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(20):
                assert process.stdout is not None
                told = json.loads(await process.stdout.readline())
                record = await serving(tmp_path)
                assert (told["worker_id"], told["protocol"]) == ("w1", "vllm")
                assert told["command"][-2:] == ["--port", told["address"].rpartition(":")[2]]
                assert record.sidecar_pid == process.pid
                assert record.engine_pgid
                process.terminate()
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    with no_process_left():
        asyncio.run(scenario())
