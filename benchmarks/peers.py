"""What a token costs through us and through others, in one run: `make bench-peers`.

    direct         a bare engine, read without a hop (benchmarks/bare_engine.py)
    envoy          Envoy 1.40 as one gRPC hop in front of it, on one thread
    smg            SMG 1.13 in front of it, over gRPC; clients ask its OpenAI API
    native         our frontend with --edge native, its sidecar, an engine of stamps
    grpcio         the same with --edge grpcio
    dynamo         Dynamo 1.6.1's frontend before a Python engine of stamps on its runtime, OpenAI
    dynamo-mocker  the same before its mocker, whose tokens do not say when they were made

One bare client for all of them (benchmarks/raw_reader.py), over HTTP/2. CPU is that of the hop with
all its threads: the engine's for the direct path, the frontend's for ours (its sidecar's in
brackets) and for Dynamo. Latency is from the engine's step to the client. What a peer adds is its
latency less that of the direct path under the same load; in ours is the way over the sidecar, in
Dynamo's that over its runtime. A load that a peer does not take is named in "not_served", a peer
that cannot be installed or started here in "missing".

    python -m benchmarks.peers [--seconds 3] [--rounds 3] [--short] [--paths native,envoy]

Paced rows of ours take longer, so that what is done every 480 tokens of a stream is in them; they
and Envoy's are medians of several rounds, since either varies by a third within minutes.
"""

import argparse
import asyncio
import json
import math
import os
import signal
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from asyncio.subprocess import DEVNULL, STDOUT
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import uvloop

from benchmarks.edge_paths import bare_engine, hop_of, stamping_mesh
from benchmarks.edge_rows import (
    STEP_MS,
    Hop,
    Load,
    NotServedError,
    Row,
    added_ms,
    direct_of,
    figures_of,
    markdown,
    medians,
    read,
)
from benchmarks.hops import envoy_before
from benchmarks.peer_environments import environment, make_model
from tests.support.environments import NotInstalledError

PACED: Final = ((256, 1), (256, 16), (256, 256), (1024, 1), (1024, 16), (1024, 256))
FLOOD: Final = (
    *((1, 1), (16, 1), (16, 16), (64, 1), (64, 16)),
    *((256, 1), (256, 16), (256, 256)),
)
SHORT: Final = ((256, 16),)
COMPARED: Final = "256x16"
"""The load at which shares are computed: the largest that everybody takes."""
PATHS: Final = ("direct", "envoy", "smg", "native", "grpcio", "dynamo", "dynamo-mocker")
READY_S_MAX: Final = 60.0
MOCKER_RATIO: Final = 0.29
"""Of its own speed, 5.8 ms a step: makes 20."""
MOCKER_RATIO_FLOOD: Final = 1_000_000.0
PROMISES: Final = {
    ("paced", "envoy"): 0.5,
    ("paced", "smg"): 1.0,
    ("paced", "dynamo-mocker"): 0.1,
    ("flood", "envoy"): 2.0,
    ("flood", "dynamo-mocker"): 0.3,
}
"""What the native edge costs at most, as a share of what a peer costs. And it adds no more latency
than Envoy, at p99."""
FLOOD_TOKENS_PER_S_MIN: Final = 300_000.0
"""Through one core."""
LOOKS_S: Final = 9.6
"""In which each stream of ours is looked at once (`benchmarks/edge.py`)."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for each load")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of paced rows of native and envoy, for medians"
    )
    parser.add_argument("--short", action="store_true", help="one paced load and one flood")
    parser.add_argument("--paths", default=",".join(PATHS))
    arguments = parser.parse_args()
    run = Run(
        arguments.paths.split(","),
        seconds=arguments.seconds,
        num_rounds=arguments.rounds,
        paced=SHORT if arguments.short else PACED,
        flood=SHORT if arguments.short else FLOOD,
    )
    uvloop.run(run.measure())
    print(markdown(run.rows))  # noqa: T201
    figures = run.figures()
    print(json.dumps(figures))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not figures["ok"])


class Run:
    """All paths under all loads, and why some could not be tried."""

    def __init__(
        self,
        paths: Collection[str],
        *,
        seconds: float,
        num_rounds: int,
        paced: Sequence[Load],
        flood: Sequence[Load],
    ) -> None:
        self.rows: list[Row] = []
        self.missing: dict[str, str] = {}
        self.not_served: dict[str, str] = {}
        self._paths = paths
        self._seconds = seconds
        self._num_rounds = num_rounds
        self._loads = {False: paced, True: flood}

    async def measure(self) -> None:
        """Measure everything."""
        with tempfile.TemporaryDirectory(prefix="peers-") as name:
            directory = Path(name)
            make_model(directory / "model")
            for is_flood in (False, True):
                below = directory / ("flood" if is_flood else "paced")
                below.mkdir()
                await self._behind_bare_engine(below, directory / "model", is_flood)
                for edge in ("native", "grpcio"):
                    if edge in self._paths:
                        await self._mesh(below, edge, is_flood)
                for path in ("dynamo", "dynamo-mocker"):
                    if path in self._paths:
                        await self._dynamo(path, below / path, directory / "model", is_flood)
            for number in range(1, self._num_rounds):
                below = directory / f"round-{number}"
                below.mkdir()
                await self._behind_bare_engine(below, None, is_flood=False)
                if "native" in self._paths:
                    await self._mesh(below, "native", is_flood=False)
        self.rows = list(medians(self.rows))

    async def _behind_bare_engine(
        self, directory: Path, model: Path | None, is_flood: bool
    ) -> None:
        """All that stands before one; without a model Envoy alone."""
        step_ms = 0.0 if is_flood else STEP_MS
        async with bare_engine(step_ms, model) as (engine, pid):
            if "direct" in self._paths and model is not None:
                await self._read(Hop("direct", engine, pid), is_flood)
            if "envoy" in self._paths:
                try:
                    async with envoy_before(engine, directory) as (proxy, proxy_pid):
                        await self._read(Hop("envoy", proxy, proxy_pid), is_flood)
                except RuntimeError as error:
                    self.missing["envoy"] = str(error)
            if "smg" in self._paths and model is not None:
                try:
                    async with _smg(engine, model, directory) as (router, router_pid):
                        hop = Hop("smg", router, router_pid, asks="openai")
                        await self._read(hop, is_flood)
                except (NotInstalledError, TimeoutError) as error:
                    self.missing["smg"] = str(error)

    async def _mesh(self, directory: Path, edge: str, is_flood: bool) -> None:
        below = directory / edge
        below.mkdir()
        async with stamping_mesh(below, edge, 0.0 if is_flood else STEP_MS) as mesh:
            await self._read(hop_of(mesh, edge), is_flood)

    async def _dynamo(self, path: str, directory: Path, model: Path, is_flood: bool) -> None:
        directory.mkdir()  # noqa: ASYNC240 - Nothing else runs yet.
        is_mocker = path == "dynamo-mocker"
        try:
            async with _dynamo(directory, model, is_mocker, is_flood) as (address, pid):
                hop = Hop(path, address, pid, asks="openai", has_stamps=not is_mocker)
                await self._read(hop, is_flood)
        except (NotInstalledError, TimeoutError) as error:
            self.missing[path] = str(error)

    async def _read(self, hop: Hop, is_flood: bool) -> None:
        has_looks = hop.name == "native" and not is_flood
        seconds = max(self._seconds, LOOKS_S) if has_looks else self._seconds
        for load in self._loads[is_flood]:
            try:
                self.rows.append(await read(hop, load, seconds, is_flood=is_flood))
            except NotServedError as error:
                pace = "flood" if is_flood else "paced"
                self.not_served[f"{hop.name} {pace} {load[0]}x{load[1]}"] = str(error)

    def figures(self) -> dict[str, object]:
        """What the run showed; "ok" if every promise that could be judged was kept."""
        by_name = {row.name: row for row in self.rows}
        direct = direct_of(self.rows)
        shares: dict[tuple[str, str], float] = {}
        for pace, peer in PROMISES:
            ours = by_name.get(f"native {pace} {COMPARED}")
            theirs = by_name.get(f"{peer} {pace} {COMPARED}")
            if ours is not None and theirs is not None:
                shares[pace, peer] = ours.cpu_us / theirs.cpu_us
        broken = [
            f"{peer} {pace}: {most:g}"
            for (pace, peer), most in PROMISES.items()
            if shares.get((pace, peer), 0.0) > most
        ]
        flood = by_name.get(f"native flood {COMPARED}")
        per_core = None if flood is None else 1e6 / flood.cpu_us
        is_fast = per_core is not None and per_core >= FLOOD_TOKENS_PER_S_MIN
        added_p99 = {
            path: round(ms[1], 2)
            for path in ("native", "envoy")
            if (row := by_name.get(f"{path} paced {COMPARED}")) and (ms := added_ms(row, direct))
        }
        if added_p99.get("native", -math.inf) > added_p99.get("envoy", math.inf):
            broken.append("envoy: added ms at p99")
        return {
            "ok": not broken and (is_fast or "native" not in self._paths),
            "compared_at": COMPARED,
            "cpu_share_of": {f"{peer} {pace}": round(of, 3) for (pace, peer), of in shares.items()},
            "broken": broken,
            "tokens_per_s_and_core_flood": None if per_core is None else round(per_core),
            "added_ms_p99_compared": added_p99,
            "missing": self.missing,
            "not_served": self.not_served,
            **figures_of(self.rows),
        }


@asynccontextmanager
async def _smg(engine: str, model: Path, directory: Path) -> AsyncGenerator[tuple[str, int]]:
    binaries = environment("smg")
    port, metrics_port = _free_ports(2)
    command = (
        *(str(binaries / "smg"), "launch", "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", f"grpc://{engine}", "--backend", "vllm"),
        *("--tokenizer-path", str(model), "--policy", "round_robin", "--log-level", "warn"),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
    )
    async with _process(command, directory / "smg.log") as pid:
        address = f"127.0.0.1:{port}"
        await _until_completing(address)
        yield address, pid


@asynccontextmanager
async def _dynamo(
    directory: Path, model: Path, is_mocker: bool, is_flood: bool
) -> AsyncGenerator[tuple[str, int]]:
    python = str(environment("dynamo") / "python")
    (port,) = _free_ports(1)
    environ = {
        **os.environ,
        "HOME": str(directory),  # Where it keeps copies of models' files.
        "HF_HUB_OFFLINE": "1",
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(directory / "kv"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_LOG": "error",
    }
    frontend = (python, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port")
    if is_mocker:
        ratio = MOCKER_RATIO_FLOOD if is_flood else MOCKER_RATIO
        worker = (
            *(python, "-m", "dynamo.mocker", "--model-path", str(model), "--model-name", "m"),
            *("--speedup-ratio", str(ratio), "--max-num-seqs", "2048"),
            *("--num-gpu-blocks-override", "1000000"),
        )
    else:
        engine = Path(__file__).with_name("dynamo_engine.py")
        worker = (python, str(engine), str(model), "0" if is_flood else str(STEP_MS))
    async with AsyncExitStack() as stack:
        log = directory / "frontend.log"
        pid = await stack.enter_async_context(_process((*frontend, str(port)), log, environ))
        await stack.enter_async_context(_process(worker, directory / "worker.log", environ))
        address = f"127.0.0.1:{port}"
        await _until_completing(address)
        yield address, pid


@asynccontextmanager
async def _process(
    command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None
) -> AsyncGenerator[int]:
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=DEVNULL,
            stdout=file,
            stderr=STDOUT,
            env=environ,
            start_new_session=True,
        )
    try:
        yield process.pid
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill it and what it started; peers take seconds to end by themselves."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _free_ports(number: int) -> Sequence[int]:
    """Ports that were free a moment ago: peers do not tell which one the kernel chose."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


async def _until_completing(address: str) -> None:
    """Wait until a completion begins. Raises TimeoutError, which says what was answered last."""
    asked = {"model": "m", "prompt": "t1 t2 t3", "max_tokens": 2, "stream": True}
    request = urllib.request.Request(
        f"http://{address}/v1/completions",
        json.dumps(asked).encode(),
        {"content-type": "application/json"},
    )
    said = "nothing"
    try:
        async with asyncio.timeout(READY_S_MAX):
            while True:
                said = await asyncio.to_thread(_answer, request)
                if not said:
                    return
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise TimeoutError(f"no completion within {READY_S_MAX:g} s: {said}") from None


def _answer(request: urllib.request.Request) -> str:
    """What is wrong with the answer; "" if it is a stream that has begun."""
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            line = response.readline().decode(errors="replace").strip()
            return "" if '"text"' in line else line or "an empty answer"
    except urllib.error.HTTPError as error:
        return error.read(500).decode(errors="replace")
    except OSError as error:
        return str(error)


if __name__ == "__main__":
    main()
