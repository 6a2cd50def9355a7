"""Real vLLM under the conformance suite, and killed under streams: `make engines`.

    python -m tests.engines.real [--parts conformance,deaths,pressure] [--stops 3] [--logs DIR]

conformance  two servers of one model, one of gRPC and one of HTTP: each has to do what every engine
             has to, and what it gives is compared with what the other gives; with our plug-in
             over gRPC, so that continuations are compared as well
deaths       `unbroken run -- vllm serve MODEL --grpc` twice, a frontend before them, streams of all
             features; a server, its core, its worker is killed, a core stopped, a server told to
             stop; without our plug-in, so by classes A and B
native       the same with it: class C
stops        the same over HTTP, told to stop again and again: vLLM ends its streams in several ways
matrix       every feature without our plug-in and with it, cut at eight offsets at least with each
             of three prompts, hundreds of streams under each kill; with the plug-in under pressure
pressure     one engine with 64 KV blocks and more streams than fit: what is reported beside the
             truth, what is let in, and whether streams and continuations are what they were alone
other        llama.cpp's own server, compared with what it gives when asked in its own words

Ends with one line of JSON; its exit status is not 0 if a promise was broken or nothing was seen.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import uvloop

from benchmarks.before_others import allowed_priority
from sidecar.engines import continuation_key, load_tap
from tests.engines.real import (
    deaths,
    llama,
    matrix,
    model,
    pressure,
    servers,
    units,
    vllm,
    vllm_truth,
)
from tests.engines.real.llama_native import LLAMA_NATIVE
from tests.engines.real.subject import Real
from tests.support.environments import NotInstalledError
from unbroken.errors import UnbrokenError

PARTS: Final = ("conformance", "deaths", "native", "stops", "matrix", "pressure", "other")
HURTS: Final = ("server killed", "core killed", "worker killed", "core stopped", "told to stop")
TRUTH: Final = "truth.log"
LOGS: Final = Path(".engines/logs")
"""Of a run that was not "ok"; the next one writes over them."""
SUITE_S_MAX: Final = 900.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What all parts need."""

    binaries: Path
    model: Path
    logs: Path

    page: Path | None
    """Receives the matrix."""

    def command(
        self, *, is_grpc: bool, port: int, kv_blocks: int = vllm.KV_BLOCKS
    ) -> tuple[str, ...]:
        words = vllm.words(
            self.binaries, self.model, is_grpc=is_grpc, port=port, kv_blocks=kv_blocks
        )
        return tuple(words)

    def directory(self, name: str) -> Path:
        """A part's own, for its logs."""
        directory = self.logs / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="tests.engines.real",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--hurts", default=",".join(HURTS), help="of deaths and native")
    parser.add_argument("--stops", type=int, default=3, help="how often, in the part stops (3)")
    parser.add_argument("--logs", type=Path, help="where engines' logs are kept")
    parser.add_argument("--write", type=Path, help="page that receives the matrix")
    arguments = parser.parse_args()
    parts: list[str] = arguments.parts.split(",")
    if unknown := set(parts).difference(PARTS):
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    began = time.monotonic()
    figures: dict[str, object] = {}
    oks: list[bool] = []
    with tempfile.TemporaryDirectory(prefix="unbroken-engines-") as scratch:
        try:
            binaries = vllm.environment()
            logs = arguments.logs or Path(scratch)
            setup = Setup(binaries, Path(scratch) / "model", logs, arguments.write)
            model.make(setup.model)
            figures["engine"] = f"vllm {vllm.version_of(binaries)}, CPU"
            figures["has_realtime_priority"] = allowed_priority() > 0
            for part in parts:
                is_ok, told = _part(part, setup, arguments.hurts.split(","), arguments.stops)
                oks.append(is_ok)
                figures[part] = told
        except (NotInstalledError, RuntimeError, UnbrokenError) as error:
            oks.append(False)
            figures["error"] = str(error)
        finally:
            if len(oks) < len(parts) or not all(oks):
                figures["logs"] = str(_kept(Path(scratch)))
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"ok": all(oks), **figures, "seconds": seconds}))  # noqa: T201
    sys.exit(not all(oks))


def _kept(scratch: Path) -> Path:
    """Where what was logged is from now on, for whoever wants to know what went wrong."""
    for log in scratch.rglob("*.log"):
        kept = LOGS / log.relative_to(scratch)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, kept)
    return LOGS


def _part(part: str, setup: Setup, hurts: list[str], num_stops: int) -> tuple[bool, object]:
    match part:
        case "conformance":
            return uvloop.run(_conformance(setup))
        case "deaths":
            without = {"VLLM_PLUGINS": vllm.TRUTH_PLUGIN}
            return uvloop.run(_deaths(setup, "deaths", hurts, without))
        case "native":
            return uvloop.run(_deaths(setup, "native", hurts, {}))
        case "stops":
            return uvloop.run(_stops(setup, num_stops))
        case "matrix":
            return uvloop.run(_matrix(setup))
        case "pressure":
            return uvloop.run(_pressure(setup))
        case _:
            return uvloop.run(_other(setup))


async def _conformance(setup: Setup) -> tuple[bool, object]:
    """The suite on each of two servers, the other one as its reference."""
    directory = setup.directory("conformance")
    continuation_key.choose()  # For the servers and for the suite, which inherit it.
    at = {"vllm": servers.free_port(), "openai": servers.free_port()}
    starting = {
        protocol: servers.serving(
            setup.command(is_grpc=protocol == "vllm", port=port),
            protocol,
            port,
            directory / f"{protocol}.log",
            environment=vllm.ENVIRONMENT,
            start_s_max=vllm.START_S_MAX,
        )
        for protocol, port in at.items()
    }
    told: dict[str, object] = {}
    is_ok = True
    async with starting["vllm"] as grpc_address, starting["openai"] as http_address:
        addresses = {"vllm": grpc_address, "openai": http_address}
        for protocol, other in (("vllm", "openai"), ("openai", "vllm")):
            reference = (other, addresses[other])
            real = Real(protocol, addresses[protocol], reference, vllm.KV_BLOCKS - 1)
            verdict = await asyncio.to_thread(_suite, real)
            is_ok &= verdict.get("ok") is True
            told[protocol] = verdict
    return is_ok, told


def _suite(real: Real) -> Mapping[str, object]:
    """What the suite says; its own words go to stderr."""
    command = (
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("--no-header", "--timeout=600", "tests/engines/test_conformance.py"),
    )
    try:
        run = subprocess.run(
            command,
            env={**os.environ, **real.to_environment()},
            stdout=subprocess.PIPE,
            check=False,
            timeout=SUITE_S_MAX,
            cwd=vllm.ROOT,
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"it took more than {SUITE_S_MAX:g} s"}
    said = run.stdout.decode(errors="replace")
    print(said, file=sys.stderr, flush=True)  # noqa: T201
    try:
        return json.loads(said.splitlines()[-1])
    except (IndexError, ValueError):
        return {"ok": False, "error": f"pytest ended with {run.returncode}"}


def _paced(directory: Path, step_s: float) -> Mapping[str, str]:
    """An engine that writes down what it holds, and whose steps are so much longer."""
    return {
        **vllm.ENVIRONMENT,
        vllm_truth.VARIABLE: str(directory / TRUTH),
        vllm_truth.STEP_VARIABLE: str(step_s),
    }


async def _deaths(
    setup: Setup, part: str, hurts: list[str], plugins: Mapping[str, str]
) -> tuple[bool, object]:
    directory = setup.directory(part)
    environment = {**_paced(directory, deaths.STEP_S), **plugins}
    ports = {name: servers.free_port() for name in ("w1", "w2")}
    commands = {name: setup.command(is_grpc=True, port=port) for name, port in ports.items()}
    bystanders = {
        name: partial(deaths.grpc_bystander, f"127.0.0.1:{port}") for name, port in ports.items()
    }
    rows = {how: deaths.Row() for how in hurts}
    async with units.running(directory, commands, environment) as both:
        await both.until_serving(vllm.START_S_MAX)
        lengths = {deaths.num_tokens_of(how) for how in hurts}
        expected = {num: await deaths.undisturbed(both, num) for num in sorted(lengths)}
        for how, row in rows.items():
            beside = bystanders if how == "told to stop" else None
            await deaths.hurt(both, how, expected[deaths.num_tokens_of(how)], row, beside=beside)
    return all(row.is_ok for row in rows.values()), {
        how: row.figures() for how, row in rows.items()
    }


async def _stops(setup: Setup, num_stops: int) -> tuple[bool, object]:
    directory = setup.directory("stops")
    ports = {name: servers.free_port() for name in ("w1", "w2")}
    commands = {name: setup.command(is_grpc=False, port=port) for name, port in ports.items()}
    row = deaths.Row()
    environment = _paced(directory, deaths.STEP_S)
    async with units.running(directory, commands, environment) as both:
        await both.until_serving(vllm.START_S_MAX)
        expected = await deaths.undisturbed(both, deaths.NUM_TOKENS_STOPPED)
        bystanders = {
            name: partial(deaths.http_bystander, f"http://127.0.0.1:{port}")
            for name, port in ports.items()
        }
        for _ in range(num_stops):
            await deaths.hurt(both, "told to stop", expected, row, beside=bystanders)
    return row.is_ok, row.figures()


async def _matrix(setup: Setup) -> tuple[bool, object]:
    columns: dict[str, matrix.Column] = {}
    told: dict[str, object] = {}
    is_ok = True
    for name, plugins, kv_blocks in (
        ("from outside", {"VLLM_PLUGINS": vllm.TRUTH_PLUGIN}, matrix.BLOCKS_AT_EASE),
        ("with the plug-in", {}, matrix.BLOCKS_UNDER_PRESSURE),
    ):
        directory = setup.directory(f"matrix-{name.replace(' ', '-')}")
        commands = {
            unit: (
                *setup.command(is_grpc=True, port=servers.free_port(), kv_blocks=kv_blocks),
                *matrix.ENGINE_FLAGS,
            )
            for unit in ("w1", "w2")
        }
        environment = {**_paced(directory, matrix.STEP_S), **matrix.SETTINGS, **plugins}
        async with units.running(directory, commands, environment) as both:
            columns[name] = await matrix.measure(both)
        moments = vllm_truth.read(directory / TRUTH)
        preemptions = max(one.preemptions for one in moments)
        share = max(one.blocks_used / one.blocks_total for one in moments)
        told[name] = {
            **columns[name].figures(),
            "kv_share_max": round(share, 3),
            "preemptions_max": preemptions,  # Each engine counts its own, in each of its lives.
        }
        is_ok &= columns[name].is_ok
        if kv_blocks == matrix.BLOCKS_UNDER_PRESSURE:
            is_ok &= preemptions > 0 and share >= pressure.FULL
    if setup.page is not None and is_ok:
        matrix.write(setup.page, columns)
    return is_ok, told


async def _pressure(setup: Setup) -> tuple[bool, object]:
    directory = setup.directory("pressure")
    port = servers.free_port()
    # Chosen here, so that this process may ask the engine to continue, too, and hears its load.
    continuation_key.choose()
    environment = {
        **_paced(directory, pressure.STEP_S),
        load_tap.VARIABLE: str(setup.logs / "load.sock"),
    }
    flags = ("--busy-kv-blocks-share", str(pressure.BUSY_SHARE), "--queue-wait-s-max", "120")
    commands = {"w1": setup.command(is_grpc=True, port=port)}
    async with units.running(directory, commands, environment, frontend_flags=flags) as one:
        os.environ[load_tap.VARIABLE] = environment[load_tap.VARIABLE]
        try:
            seen = await pressure.measure(one, directory / TRUTH, f"127.0.0.1:{port}")
        finally:
            del os.environ[load_tap.VARIABLE]
    return seen.is_ok, seen.figures()


async def _other(setup: Setup) -> tuple[bool, object]:
    binaries = llama.environment()
    tokenizer = setup.directory("other") / "tokenizer"
    llama.write_tokenizer(tokenizer)
    port = servers.free_port()
    log = setup.directory("other") / "llama.log"
    async with servers.serving(
        llama.words(binaries, port),
        "openai",
        port,
        log,
        environment={},
        start_s_max=llama.START_S_MAX,
        tokenizer=tokenizer,
    ) as address:
        reference = (LLAMA_NATIVE, address)
        real = Real("openai", address, reference, 0, tokenizer, llama.LACKS)
        verdict = await asyncio.to_thread(_suite, real)
    told = {"engine": f"llama.cpp's server, xllamacpp {llama.version_of(binaries)}", **verdict}
    return verdict.get("ok") is True, told


if __name__ == "__main__":
    main()
