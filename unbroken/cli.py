"""The command line: `unbroken up` starts a mesh, the other commands talk to it.

Frontends are found through discovery (`--discovery`, UNBROKEN_DISCOVERY), unless `--frontend` names
one. Results go to stdout, everything else to stderr. Exit status: 0 done, 1 failed, 2 wrong usage,
130 interrupted.
"""

import asyncio
import json
import os
import re
import secrets
import shlex
import socket
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from contextvars import ContextVar
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import uvloop

from unbroken import discovery, terminal
from unbroken.chaos.arena import Arena
from unbroken.chaos.play import play as play_faults
from unbroken.chaos.schedule import ScheduleError, from_lines, plan, to_lines
from unbroken.client import Client
from unbroken.demo import play
from unbroken.drain import drain_frontend, drain_worker
from unbroken.engine_command import recognise
from unbroken.errors import Reason, UnbrokenError
from unbroken.holdings import LISTED_DEFAULT, LISTED_MAX, is_empty
from unbroken.memory.commands import app as memory_app
from unbroken.mesh import LocalMesh, MeshError, kill_frontend, kill_worker
from unbroken.mesh_ledger import mesh_ledger
from unbroken.request import GenerateOptions
from unbroken.rollout import READY_TIMEOUT_S, roll_out
from unbroken.signals import heed, heed_no_more
from unbroken.terminal import Output
from unbroken.tls import ClientTls
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import sidecar_service_pb2 as sidecar_pb
from unbroken.v1 import worker_pb2

DISCOVERY_DEFAULT: Final = Path(".run") / "mesh"

_tls: ContextVar[ClientTls | None] = ContextVar("tls", default=None)
"""How this command line speaks with frontends; None: in the clear."""
_admin_token: ContextVar[str | None] = ContextVar("admin_token", default=None)
"""What it brings to calls for operators."""

app = typer.Typer(
    name="unbroken",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.add_typer(memory_app, name="memory")


class EngineKind(StrEnum):
    """Engines that come with Unbroken."""

    LLAMA = "llama"
    SIMULATED = "simulated"


class Edge(StrEnum):
    """What serves the clients of a frontend."""

    GRPCIO = "grpcio"
    NATIVE = "native"


class KillTarget(StrEnum):
    """What of a worker is killed."""

    ENGINE = "engine"
    SIDECAR = "sidecar"
    HOST = "host"


class DrainPolicy(StrEnum):
    """What becomes of the streams of a worker that is drained."""

    FINISH = "finish"
    HAND_OVER = "hand-over"
    BUDGET = "budget"


class Continuation(StrEnum):
    """What happens when a worker is lost."""

    PREFER_EXACT = "prefer-exact"
    REQUIRE_EXACT = "require-exact"
    ALLOW_INEXACT = "allow-inexact"
    NEVER = "never"


DiscoveryOption = Annotated[
    Path, typer.Option("--discovery", envvar="UNBROKEN_DISCOVERY", help="Directory of the mesh.")
]
FrontendOption = Annotated[
    list[str] | None,
    typer.Option("--frontend", help="host:port of a frontend, instead of discovery; repeatable."),
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="Text for people, or JSON.")]


@app.callback()
def connection(
    tls: Annotated[bool, typer.Option("--tls", help="Speak TLS with frontends.")] = False,
    ca: Annotated[
        Path | None,
        typer.Option(envvar="UNBROKEN_CA", help="PEM file of the authorities to trust; TLS."),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(envvar="UNBROKEN_CERTIFICATE", help="PEM file to show to frontends; TLS."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(envvar="UNBROKEN_KEY", help="PEM file with its private key.")
    ] = None,
    server_name: Annotated[
        str | None,
        typer.Option(
            envvar="UNBROKEN_SERVER_NAME",
            help="Whom their certificates name, if not the host; TLS.",
        ),
    ] = None,
    admin_token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="UNBROKEN_ADMIN_TOKEN_FILE",
            help="File with the token of an operator, for frontends that ask for one.",
        ),
    ] = None,
) -> None:
    """Keeps LLM token streams going when anything under them dies."""
    if admin_token_file is not None:
        try:
            (token,) = admin_token_file.read_text(encoding="ascii").split()
        except OSError as error:
            raise typer.BadParameter(f"{error}") from None
        except ValueError:  # Not shown: it may be a secret.
            raise typer.BadParameter(
                f"expected one token and nothing else in {admin_token_file}"
            ) from None
        _admin_token.set(token)
    if tls or any(given is not None for given in (ca, certificate, key, server_name)):
        try:
            _tls.set(ClientTls(ca, certificate, key, server_name))
        except ValueError as error:
            raise typer.BadParameter(f"{error}") from None


@app.command()
def up(
    workers: Annotated[int, typer.Option(min=1, max=64, help="Number of workers.")] = 2,
    frontends: Annotated[int, typer.Option(min=1, max=16, help="Number of frontends.")] = 1,
    engine: Annotated[EngineKind, typer.Option(help="Engine of every worker.")] = EngineKind.LLAMA,
    engine_options: Annotated[str, typer.Option(help="Passed on to every engine.")] = "",
    listen: Annotated[
        str, typer.Option(help="host:port of the first frontend; others take the next ports.")
    ] = "127.0.0.1:0",
    edge: Annotated[Edge | None, typer.Option(help="What serves clients.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, max=64, help="Of each frontend; several: native edge.")
    ] = None,
    restart: Annotated[bool, typer.Option(help="Start processes again that end.")] = True,
    memory: Annotated[
        bool, typer.Option("--memory", help="With a memory service that keeps the engines' KV.")
    ] = False,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Run a mesh on this machine until Ctrl-C: frontends, and workers with their sidecars."""
    if processes is not None and processes > 1:
        if edge is Edge.GRPCIO:
            raise typer.BadParameter("--processes: expected --edge native with more than one")
        edge = Edge.NATIVE
    try:
        mesh = LocalMesh(
            directory.absolute(),
            num_workers=workers,
            num_frontends=frontends,
            engine=engine.value,
            engine_options=engine_options,
            frontend_listen=listen,
            admin_token=_admin_token.get(),
            has_memory=memory,
            frontend_flags=[
                *(("--edge", edge.value) if edge else ()),
                *(("--processes", str(processes)) if processes else ()),
            ],
        )
    except ValueError as error:
        raise typer.BadParameter(f"--listen: expected {error}, got {listen!r}") from None
    _run(_up(mesh, output, is_supervised=restart), output)


@app.command()
def run(
    command: Annotated[
        list[str], typer.Argument(help="After --: the command that starts the engine.")
    ],
    worker_id: Annotated[
        str, typer.Option(help="Name of the worker; of this machine, unless given.")
    ] = "",
    protocol: Annotated[
        str | None, typer.Option(help="What the engine speaks, if its command does not show it.")
    ] = None,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Start an engine of another make with a sidecar beside it: unbroken run -- vllm serve …

    Says which, then becomes the sidecar, with its signals and exit statuses; settings of a sidecar
    are read from the environment (UNBROKEN_SIDECAR_…).
    """
    try:
        engine = recognise(command, _free_port, protocol=protocol)
    except ValueError as error:
        raise typer.BadParameter(f"{error}") from None
    name = re.sub("[^A-Za-z0-9._-]", "-", f"{socket.gethostname()}-{engine.protocol}")
    worker_id = worker_id or name
    terminal.show_engine_command(output, worker_id, engine)
    flags = [
        *(f"--worker-id={worker_id}", f"--discovery={directory}"),
        f"--engine-protocol={engine.protocol}",
        f"--engine-address={engine.address}",
        f"--engine-command={shlex.join(engine.words)}",
    ]
    os.execv(sys.executable, [sys.executable, "-m", "sidecar", *flags])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from stdin.")],
    chat: Annotated[bool, typer.Option("--chat", help="A chat message (the default).")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt is text to go on with.")] = False,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="The prompt is token ids, separated by commas.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask, if there are several.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most output tokens.")] = 512,
    min_tokens: Annotated[int | None, typer.Option(help="No end before so many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Most probable tokens to keep.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least share of the best token.")] = None,
    seed: Annotated[int | None, typer.Option(help="Root of the random numbers.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="-2 to 2.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="-2 to 2.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is off.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end.")] = False,
    json_schema: Annotated[str | None, typer.Option(help="Output satisfies this schema.")] = None,
    regex: Annotated[str | None, typer.Option(help="Output matches this expression.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="Output is one of these.")] = None,
    logprobs: Annotated[int | None, typer.Option(help="Report so many alternatives.")] = None,
    num_choices: Annotated[int | None, typer.Option(help="Independent outputs.")] = None,
    continuation: Annotated[
        Continuation | None, typer.Option(help="What to do when a worker is lost.")
    ] = None,
    migrations_max: Annotated[int | None, typer.Option(help="Most moves elsewhere.")] = None,
    priority: Annotated[int | None, typer.Option(help="-100 to 100; higher goes first.")] = None,
    request_id: Annotated[str | None, typer.Option(help="Identity of the request.")] = None,
    parent_request_id: Annotated[
        str | None, typer.Option(help="Cancelled with that request.")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose request it is.")] = None,
    timeout_s: Annotated[float | None, typer.Option(help="Seconds for the whole output.")] = None,
    frontend: FrontendOption = None,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Stream the answer to a prompt, whatever dies meanwhile. With JSON, one event a line."""
    if chat + raw + token_ids > 1:
        raise typer.BadParameter("expected at most one of --chat, --raw, --token-ids")
    if system is not None and (raw or token_ids):
        raise typer.BadParameter("--system belongs to --chat")
    text = sys.stdin.read() if prompt == "-" else prompt
    given: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "repetition_penalty": repetition_penalty,
        "stop": stop or None,
        "ignore_eos": ignore_eos or None,
        "json_schema": json_schema,
        "regex": regex,
        "choice": choice or None,
        "num_top_logprobs": logprobs,
        "num_choices": num_choices,
        "continuation": continuation and _continuation_to_proto(continuation),
        "migrations_max": migrations_max,
        "priority": priority,
        "request_id": request_id,
        "parent_request_id": parent_request_id,
        "tenant": tenant,
    }
    if token_ids:
        given["token_ids"] = _parse_token_ids(text)
    elif raw:
        given["prompt"] = text
    else:
        turns = [("system", system)] if system is not None else []
        given["messages"] = [
            {"role": role, "content": content} for role, content in [*turns, ("user", text)]
        ]
    options: GenerateOptions = {k: v for k, v in given.items() if v is not None}  # type: ignore[assignment]

    async def scenario() -> None:
        async with (
            await _connect(frontend, directory) as client,
            client.generate(timeout_s=timeout_s, **options) as stream,
        ):
            await terminal.show_stream(stream, output, num_choices or 1)

    _run(scenario(), output)


@app.command()
def workers(
    frontend: FrontendOption = None,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """List the workers as the frontend sees them."""

    async def scenario() -> None:
        async with await _connect(frontend, directory) as client:
            found = await client.list_workers()
        terminal.show_list(output, found, terminal.WORKERS)

    _run(scenario(), output)


@app.command()
def streams(
    frontend: FrontendOption = None,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """List the requests of all frontends, oldest first at each."""

    async def scenario() -> None:
        async with await _connect(frontend, directory) as client:
            found = [stream async for stream in client.list_streams()]
        terminal.show_list(output, found, terminal.STREAMS)

    _run(scenario(), output)


@app.command()
def ledger(
    listed: Annotated[
        int, typer.Option(min=1, max=LISTED_MAX, help="Most holdings of each process to list.")
    ] = LISTED_DEFAULT,
    check: Annotated[
        bool, typer.Option("--check", help="Fail unless all could be asked and nothing is held.")
    ] = False,
    frontend: FrontendOption = None,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """List what all processes hold for requests, and for how long. Without requests: nothing."""

    async def scenario() -> None:
        async with await _connect(frontend, directory) as client:
            found = await mesh_ledger(client, discovery.connect(directory), holdings_max=listed)
        terminal.show_ledger(output, found)
        if check and not is_empty(found):
            raise typer.Exit(1)

    _run(scenario(), output)


@app.command()
def models(
    frontend: FrontendOption = None,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """List the models that workers serve."""

    async def scenario() -> None:
        async with await _connect(frontend, directory) as client:
            found = await client.list_models()
        terminal.show_list(output, found, terminal.MODELS)

    _run(scenario(), output)


@app.command()
def thresholds(
    model: Annotated[str, typer.Argument(help="Name of a model; all, unless given.")] = "",
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="kv_blocks_share, prefill_tokens or prefill_share; off to end it. Repeatable.",
        ),
    ] = None,
    default: Annotated[
        bool, typer.Option("--default", help="Let the model have none of its own.")
    ] = False,
    version: Annotated[
        int | None, typer.Option(min=0, help="Change only what has this version.")
    ] = None,
    frontend: FrontendOption = None,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Say, or change, when workers are busy. New requests are refused when all workers are."""
    if changes and default:
        raise typer.BadParameter("expected at most one of --set, --default")

    async def scenario() -> None:
        async with await _connect(frontend, directory) as client:
            found = await client.get_thresholds(model)
            if not (changes or default):
                terminal.show_thresholds(output, found.models, found.version)
                return
            if len(found.models) > 1:
                names = ", ".join(info.model for info in found.models)
                raise typer.BadParameter(f"MODEL: expected one of {names}")
            wanted: worker_pb2.BusyThresholds | None = None
            if changes:
                wanted = worker_pb2.BusyThresholds()
                for info in found.models:
                    wanted.CopyFrom(info.thresholds)
                for change in changes:
                    _apply(change, wanted)
            answer = await client.set_thresholds(
                wanted, model=model, version=found.version if version is None else version
            )
            terminal.show_thresholds(output, [answer.thresholds], answer.version)

    _run(scenario(), output)


@app.command()
def kill(
    name: Annotated[str, typer.Argument(help="Name of a worker or a frontend.")],
    what: Annotated[
        KillTarget | None, typer.Option(help="Of a worker. Host: engine and sidecar.")
    ] = None,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Kill a worker (its host) or a frontend of this machine with SIGKILL, to see what happens."""

    async def scenario() -> None:
        mesh = discovery.connect(directory)
        workers = await mesh.snapshot(discovery.WORKERS)
        frontends = await mesh.snapshot(discovery.FRONTENDS)
        if name in frontends and name not in workers:
            if what is not None:
                raise typer.BadParameter(f"--what is for workers, and {name} is a frontend")
            kill_frontend(frontends[name])
            facts = {"frontend": name, "killed": "frontend"}
            terminal.show_result(output, facts, f"killed frontend {name}")
            return
        if name not in workers:
            known = ", ".join([*workers, *frontends]) or "none"
            raise UnbrokenError(
                Reason.NO_WORKER,
                f"expected a worker or frontend of {directory} ({known}), got {name!r}",
            )
        target = what or KillTarget.HOST
        kill_worker(workers[name], target.value)
        terminal.show_result(
            output, {"worker": name, "killed": target.value}, f"killed {target.value} of {name}"
        )

    _run(scenario(), output)


@app.command()
def drain(
    name: Annotated[str, typer.Argument(help="Name of a worker or a frontend.")],
    policy: Annotated[
        DrainPolicy | None,
        typer.Option(help="What becomes of a worker's streams, if not as it is configured."),
    ] = None,
    budget_s: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=86_400,
            help="Seconds until they are handed over; of a frontend, until they are cut.",
        ),
    ] = None,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Take a worker or a frontend out of service, hurting no stream; ends when it has left."""

    async def scenario() -> None:
        where = discovery.connect(directory)
        if name in await where.snapshot(discovery.FRONTENDS):
            if policy is not None:
                raise typer.BadParameter(f"--policy is for workers, and {name} is a frontend")
            await _drain_frontend(where, name, budget_s, output)
            return
        if budget_s is not None and policy is not DrainPolicy.BUDGET:
            raise typer.BadParameter("--budget-s belongs to --policy budget")
        drained = await drain_worker(
            where,
            name,
            policy=_drain_policy_to_proto(policy),
            budget_s=budget_s,
            tell=terminal.DrainNotes(name),
        )
        facts = {
            "worker": name,
            "incarnation": drained.incarnation,
            "finished": drained.num_finished,
            "handed_over": drained.num_handed_over,
            "took_s": round(drained.took_s, 3),
        }
        text = (
            f"drained {name}: {drained.num_finished} streams finished there, "
            f"{drained.num_handed_over} were handed over"
        )
        terminal.show_result(output, facts, text)

    _run(scenario(), output)


@app.command()
def rollout(
    workers: Annotated[bool, typer.Option(help="Replace the workers.")] = True,
    frontends: Annotated[bool, typer.Option(help="Replace the frontends, after them.")] = True,
    policy: Annotated[
        DrainPolicy | None,
        typer.Option(help="What becomes of a worker's streams, if not as it is configured."),
    ] = None,
    ready_timeout_s: Annotated[
        float, typer.Option(min=1, max=86_400, help="How long a successor may take to serve.")
    ] = READY_TIMEOUT_S,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Restart all of a mesh, one after the other, while its streams go on.

    Whoever runs the mesh starts what has left anew, as `unbroken up` does.
    """

    async def scenario() -> None:
        replaced = await roll_out(
            discovery.connect(directory),
            workers=workers,
            frontends=frontends,
            policy=_drain_policy_to_proto(policy),
            ready_timeout_s=ready_timeout_s,
            tls=_tls.get(),
            admin_token=_admin_token.get(),
            tell=lambda one: terminal.note(f"replaced {one.name}: {one.num_moved} streams moved"),
        )
        facts = {
            "replaced": [asdict(one) for one in replaced],
            "moved": sum(one.num_moved for one in replaced),
            "cut": sum(one.num_cut for one in replaced),
        }
        text = f"replaced {', '.join(one.name for one in replaced) or 'nothing'}"
        terminal.show_result(output, facts, text)

    _run(scenario(), output)


@app.command()
def cancel(
    request_id: Annotated[str, typer.Argument(help="Identity of the request.")],
    soft: Annotated[bool, typer.Option("--soft", help="Deliver the current step.")] = False,
    tenant: Annotated[str, typer.Option(help="Whose request; of whichever, unless given.")] = "",
    frontend: FrontendOption = None,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Cancel a request and those below it. It is not an error if it has ended."""

    async def scenario() -> None:
        async with await _connect(frontend, directory) as client:
            was_running = await client.cancel(request_id, is_soft=soft, tenant=tenant)
        text = f"cancelled {request_id}" if was_running else f"{request_id} was not running"
        terminal.show_result(output, {"request_id": request_id, "was_running": was_running}, text)

    _run(scenario(), output)


@app.command()
def demo(
    engine: Annotated[EngineKind, typer.Option(help="Engine of both workers.")] = EngineKind.LLAMA,
    scenes: Annotated[int, typer.Option(min=1, max=1000, help="How often to play it.")] = 1,
    output: OutputOption = Output.TEXT,
) -> None:
    """See a stream survive the death of its worker; ends with the figures as one line of JSON.

    With JSON nothing but that line is the output.
    """
    tell = terminal.teller(output)

    async def scenario() -> None:
        with tempfile.TemporaryDirectory(prefix="unbroken-demo-") as directory:
            result = await play(Path(directory), tell, engine=engine.value, num_scenes=scenes)
        figures = result.to_json()
        tell("\n")
        terminal.write(f"{json.dumps(figures)}\n")
        if not figures["ok"]:
            raise typer.Exit(1)

    _run(scenario(), output)


@app.command()
def chaos(
    seconds: Annotated[float, typer.Option(min=1, max=86_400, help="How long.")] = 30.0,
    seed: Annotated[int | None, typer.Option(help="Of the faults; printed if not given.")] = None,
    schedule: Annotated[
        Path | None, typer.Option(help="File of faults to play, instead of a seed.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="File to keep the faults in.")] = None,
    workers: Annotated[int, typer.Option(min=2, max=16, help="Number of workers.")] = 3,
    frontends: Annotated[int, typer.Option(min=2, max=8, help="Number of frontends.")] = 2,
    streams: Annotated[int, typer.Option(min=1, max=1000, help="Streams at once.")] = 8,
    output: OutputOption = Output.TEXT,
) -> None:
    """Hurt a mesh of simulated engines under load, and hold what clients read against the truth.

    Ends with the verdict and the figures as one line of JSON; with JSON nothing else is the output.
    """
    tell = terminal.teller(output)
    worker_ids = [f"w{number}" for number in range(1, workers + 1)]
    frontend_ids = [f"f{number}" for number in range(1, frontends + 1)]
    seed = secrets.randbelow(2**32) if seed is None and schedule is None else seed
    if schedule is not None:
        try:
            faults = from_lines(schedule.read_text(), [*worker_ids, *frontend_ids])
        except (OSError, UnicodeDecodeError, ScheduleError) as error:
            raise typer.BadParameter(f"{schedule}: {error}") from None
    else:
        assert seed is not None, "it was drawn"
        faults = plan(seed, seconds, worker_ids, frontend_ids)
    if save is not None:
        save.write_text(to_lines(faults))

    async def scenario() -> None:
        source = f"seed {seed}" if schedule is None else str(schedule)
        tell(f"{source}: {len(faults)} faults in {seconds:g} s\n")
        with tempfile.TemporaryDirectory(prefix="unbroken-chaos-") as directory:
            async with Arena(
                Path(directory),
                num_workers=workers,
                num_frontends=frontends,
                engine_options="--step-base-ms 20",
                seed=seed or 0,
            ) as arena:
                result = await play_faults(
                    arena,
                    faults,
                    seconds,
                    num_streams=streams,
                    tell=lambda line: tell(f"{line}\n"),
                )
        verdict = result.verdict
        if (example := verdict.counter_example) is not None:
            tell(f"the shortest counter-example:\n{example}\n")
        for trouble in result.trouble:
            tell(f"{trouble}\n")
        figures = {
            "ok": result.is_ok,
            "seed": seed,
            "faults": result.injected,
            "without_effect": result.without_effect,
            "streams": verdict.streams,
            "complete": verdict.complete,
            "refused": verdict.refused,
            "migrated": verdict.migrated,
            "lost": verdict.lost,
            "duplicated": verdict.duplicated,
            "changed": verdict.changed,
            "violations": len(verdict.violations),
            "held": result.held,
        }
        terminal.write(f"{json.dumps(figures)}\n")
        if not figures["ok"]:
            raise typer.Exit(1)

    _run(scenario(), output)


def main() -> None:
    """The entry point `unbroken`."""
    app()


async def _up(mesh: LocalMesh, output: Output, *, is_supervised: bool) -> None:
    """Run `mesh` until SIGINT or SIGTERM; both end it in order."""
    task = asyncio.current_task()
    assert task is not None
    heed(lambda _: _cancel_once(task))
    try:
        terminal.note("starting; engines load their models")
        async with mesh:
            terminal.show_mesh(mesh, output)
            if is_supervised:
                await mesh.supervise(terminal.note)
            while True:
                name, status = await mesh.until_one_ends()
                terminal.note(
                    f"{name} ended with status {status}; log: {mesh.log_directory / name}.log"
                )
                if not mesh.is_serving:
                    raise MeshError("no frontend is left")
    except asyncio.CancelledError:
        terminal.note("stopped")
    finally:
        heed_no_more()


async def _drain_frontend(
    where: discovery.Discovery, name: str, budget_s: float | None, output: Output
) -> None:
    drained = await drain_frontend(
        where,
        name,
        budget_s=budget_s,
        tls=_tls.get(),
        admin_token=_admin_token.get(),
        tell=terminal.FrontendDrainNotes(name),
    )
    facts = {
        "frontend": name,
        "incarnation": drained.incarnation,
        "finished": drained.num_finished,
        "moved": drained.num_moved,
        "left": drained.num_left,
        "cut": drained.num_cut,
        "took_s": round(drained.took_s, 3),
    }
    text = (
        f"drained {name}: {drained.num_finished} requests finished there, "
        f"{drained.num_moved} went on elsewhere, {drained.num_left} were left by their clients, "
        f"{drained.num_cut} were cut"
    )
    terminal.show_result(output, facts, text)


def _cancel_once(task: asyncio.Task[Any]) -> None:
    """A second signal must not break off the stopping."""
    if not task.cancelling():
        task.cancel()


async def _connect(frontends: Sequence[str] | None, directory: Path) -> Client:
    """A client of the frontends that are named, or else of those that discovery knows."""
    if not frontends:
        found = await discovery.connect(directory).snapshot(discovery.FRONTENDS)
        # The processes of a frontend have one address.
        frontends = list(dict.fromkeys(record.address for record in found.values()))
    if not frontends:
        raise UnbrokenError(
            Reason.UNREACHABLE,
            f"expected a frontend in {directory}, found none; start one with: unbroken up",
        )
    try:
        return Client(*frontends, tls=_tls.get(), admin_token=_admin_token.get())
    except ValueError as error:
        raise typer.BadParameter(f"{error}") from None


def _run(scenario: Coroutine[Any, Any, None], output: Output) -> None:
    """Run a command and leave with its exit status."""
    try:
        uvloop.run(scenario)
    except (UnbrokenError, MeshError) as error:
        terminal.show_error(output, error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:  # The reader, such as `head`, has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


def _parse_token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise typer.BadParameter(f"expected ids separated by commas, got {text[:80]!r}") from None


def _apply(change: str, thresholds: worker_pb2.BusyThresholds) -> None:
    """Make a change given as NAME=VALUE."""
    name, equals, value = change.partition("=")
    name = name.strip().replace("-", "_")
    try:
        if not equals:
            raise ValueError
        if name == "kv_blocks_share":
            thresholds.kv_blocks_share = 0.0 if value == "off" else float(value)
        elif name == "prefill_tokens":
            thresholds.prefill_tokens = 0 if value == "off" else int(value)
        elif name == "prefill_share":
            thresholds.prefill_share = 0.0 if value == "off" else float(value)
        else:
            raise ValueError
    except ValueError:
        raise typer.BadParameter(
            "--set: expected kv_blocks_share, prefill_tokens or prefill_share, then = and a "
            f"number or off; got {change[:80]!r}"
        ) from None
    if value == "off":
        thresholds.ClearField(name)


def _drain_policy_to_proto(policy: DrainPolicy | None) -> sidecar_pb.DrainPolicy.ValueType:
    name = "UNSPECIFIED" if policy is None else policy.name
    return sidecar_pb.DrainPolicy.Value(f"DRAIN_POLICY_{name}")


def _continuation_to_proto(continuation: Continuation) -> pb.ContinuationPolicy.ValueType:
    name = f"CONTINUATION_POLICY_{continuation.value.upper().replace('-', '_')}"
    return pb.ContinuationPolicy.Value(name)


if __name__ == "__main__":
    main()
