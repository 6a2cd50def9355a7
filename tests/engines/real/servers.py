"""Servers of real engines, as processes that end with this one."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from sidecar.engines.adapter import NotReady
from sidecar.engines.kinds import adapter_of
from unbroken import tether

_POLL_S = 0.5
_TAIL_LINES = 15


def free_port() -> int:
    """One that nobody has now. Servers that share theirs bind to the same one, and answer both."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@asynccontextmanager
async def serving(
    command: Sequence[str],
    protocol: str,
    port: int,
    log: Path,
    *,
    environment: Mapping[str, str],
    start_s_max: float,
    tokenizer: Path | None = None,
) -> AsyncGenerator[str, None]:
    """A server that takes work; its address. Raises RuntimeError if it does not come up."""
    address = f"127.0.0.1:{port}"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", tether.__file__, str(os.getpid())),
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    try:
        try:
            async with asyncio.timeout(start_s_max):
                await _until_ready(process, protocol, address, tokenizer)
        except TimeoutError:
            raise RuntimeError(f"no engine within {start_s_max:g} s: {tail(log)}") from None
        if process.returncode is not None:
            raise RuntimeError(f"the engine ended with {process.returncode}: {tail(log)}")
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _until_ready(
    process: asyncio.subprocess.Process, protocol: str, address: str, tokenizer: Path | None
) -> None:
    """Until it says what it is, or has ended."""
    while process.returncode is None:
        adapter = adapter_of(protocol, tokenizer)(address)
        try:
            await adapter.discover()
        except NotReady:
            await asyncio.sleep(_POLL_S)
        else:
            return
        finally:
            await adapter.close()


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
