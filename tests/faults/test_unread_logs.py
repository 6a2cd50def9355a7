"""A process whose log nobody reads any more goes on: the log is lost, no stream is."""

import fcntl
import os
import termios
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from tests.integration.readers import Reader
from tests.integration.worlds import World, real_mesh

OPTIONS: Final[dict[str, Any]] = {
    "token_ids": list(range(300, 308)),
    "temperature": 0.9,
    "seed": 7,
    "max_tokens": 30,
}
PIPE_BYTES: Final = 4096
_INTO: Final = ("/bin/sh", "-c", 'target=$0; exec "$@" >"$target" 2>&1')
"""Then a file for the output, and a command."""


def reader(world: World) -> Reader:
    return Reader(world, world.client.generate(timeout_s=25, **OPTIONS))


def test_a_log_that_nobody_reads_stops_no_stream(tmp_path: Path) -> None:
    pipes = {name: tmp_path / name for name in ("f1", "w1")}
    fds: list[int] = []
    for path in pipes.values():
        os.mkfifo(path)
        fds.append(os.open(path, os.O_RDWR))
        fcntl.fcntl(fds[-1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    try:
        with real_mesh(
            tmp_path / "mesh",
            num_workers=1,
            engine_options="--step-base-ms 10",
            frontend_flags=("--log-level", "debug"),
            sidecar_flags=("--log-level", "debug"),
            wrap_of={name: [*_INTO, str(path)] for name, path in pipes.items()},
        ) as world:

            async def scenario() -> None:
                expected = await reader(world).to_the_end()
                for fd in fds:  # Full, as far as whole lines go.
                    os.set_blocking(fd, False)
                    with suppress(BlockingIOError):
                        while True:
                            os.write(fd, b"x")
                    assert _num_waiting(fd) == PIPE_BYTES
                world.mesh.kill("w1", "engine")
                await world.mesh.until_serving(["w1"])
                seen = await reader(world).to_the_end()
                assert seen.difference(expected).is_none  # Wherever the death found it.

            world.run(scenario())
    finally:
        for fd in fds:
            os.close(fd)


def _num_waiting(fd: int) -> int:
    count = array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]
