"""A fake frontend as a process of its own, which can be killed and stopped.

    python -m tests.unbroken.frontend_process <"silent" or "deaf">

Prints its address. Silent: starts streams, gives one token, and says nothing more. Deaf: takes
calls and does not even start streams.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

from tests.unbroken.fake_frontend import (
    FakeFrontend,
    Hang,
    Script,
    serving_frontend,
    started,
    tokens,
)

SCRIPTS: dict[str, Script] = {
    "silent": [started(resume_token=b"t1"), tokens(0, 1, text="a"), Hang()],
    "deaf": [Hang()],
}
REPOSITORY = Path(__file__).parents[2]


@asynccontextmanager
async def frontend_process(kind: str) -> AsyncGenerator[tuple[asyncio.subprocess.Process, str]]:
    """Runs one; yields its process and its address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__, kind), stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY
    )
    try:
        assert process.stdout is not None
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        if process.returncode is None:
            process.kill()  # Ends a stopped one too.
        await process.wait()


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP has taken effect."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def main(kind: str) -> None:
    async with serving_frontend(FakeFrontend(SCRIPTS[kind])) as address:
        print(address, flush=True)  # noqa: T201
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
