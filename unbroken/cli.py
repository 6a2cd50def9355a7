"""The command line: `unbroken up` starts a mesh, the other commands talk to it.

Frontends are found through discovery (`--discovery`, UNBROKEN_DISCOVERY), unless `--frontend` names
one. Results go to stdout, everything else to stderr. Exit status: 0 done, 1 failed, 2 wrong usage,
130 interrupted.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, Protocol, TypeVar

import typer
import uvloop
from google.protobuf import json_format
from google.protobuf.message import Message

from unbroken import discovery
from unbroken.client import Client, GenerateOptions, GenerationStream, Piece
from unbroken.errors import Reason, UnbrokenError
from unbroken.mesh import LocalMesh, MeshError, kill_worker
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import worker_pb2

DISCOVERY_DEFAULT: Final = Path(".run") / "mesh"

app = typer.Typer(
    name="unbroken",
    help="Keeps LLM token streams going when anything under them dies.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Output(StrEnum):
    """How results are written."""

    TEXT = "text"
    JSON = "json"


class EngineKind(StrEnum):
    """Engines that come with Unbroken."""

    LLAMA = "llama"
    SIMULATED = "simulated"


class KillTarget(StrEnum):
    """What of a worker is killed."""

    ENGINE = "engine"
    SIDECAR = "sidecar"
    HOST = "host"


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


@app.command()
def up(
    workers: Annotated[int, typer.Option(min=1, max=64, help="Number of workers.")] = 2,
    engine: Annotated[EngineKind, typer.Option(help="Engine of every worker.")] = EngineKind.LLAMA,
    engine_options: Annotated[str, typer.Option(help="Passed on to every engine.")] = "",
    listen: Annotated[str, typer.Option(help="host:port of the frontend.")] = "127.0.0.1:0",
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Run a mesh on this machine until Ctrl-C: a frontend, and workers with their sidecars."""
    mesh = LocalMesh(
        directory.absolute(),
        num_workers=workers,
        engine=engine.value,
        engine_options=engine_options,
        frontend_listen=listen,
    )
    _run(_up(mesh, output), output)


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
    max_tokens: Annotated[int | None, typer.Option(help="Most output tokens.")] = None,
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
    timeout_s: Annotated[float | None, typer.Option(help="Seconds for the whole output.")] = None,
    frontend: FrontendOption = None,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Stream the answer to a prompt. With JSON, one event a line."""
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
        async with await _connect(frontend, directory) as client:
            stream = client.generate(timeout_s=timeout_s, **options)
            printer = _EventPrinter() if output is Output.JSON else _TextPrinter(num_choices or 1)
            async with stream:
                await _print_stream(stream, printer)

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
        columns = "WORKER MODEL LINK ENGINE ATTEMPTS KV-BLOCKS WAITING SIDECAR ENGINE-PGID ADDRESS"
        _print_messages(output, found, columns, _worker_row)

    _run(scenario(), output)


@app.command()
def streams(
    frontend: FrontendOption = None,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """List the requests of the frontend, oldest first."""

    async def scenario() -> None:
        async with await _connect(frontend, directory) as client:
            found = [stream async for stream in client.list_streams()]
        columns = "REQUEST MODEL CLASS STATE WORKERS TOKENS SENT MIGRATIONS ADMITTED"
        _print_messages(output, found, columns, _stream_row)

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
        _print_messages(output, found, "MODEL WORKERS CONTEXT CHAT", _model_row)

    _run(scenario(), output)


@app.command()
def kill(
    worker: Annotated[str, typer.Argument(help="Name of the worker.")],
    what: Annotated[KillTarget, typer.Option(help="Host: engine and sidecar.")] = KillTarget.HOST,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Kill a worker of this machine with SIGKILL, to see what happens."""

    async def scenario() -> None:
        found = await discovery.connect(directory).snapshot(discovery.WORKERS)
        if worker not in found:
            known = ", ".join(found) or "none"
            raise UnbrokenError(
                Reason.NO_WORKER, f"expected a worker of {directory} ({known}), got {worker!r}"
            )
        kill_worker(found[worker], what.value)
        _print_result(
            output, {"worker": worker, "killed": what.value}, f"killed {what.value} of {worker}"
        )

    _run(scenario(), output)


@app.command()
def cancel(
    request_id: Annotated[str, typer.Argument(help="Identity of the request.")],
    soft: Annotated[bool, typer.Option("--soft", help="Deliver the current step.")] = False,
    frontend: FrontendOption = None,
    directory: DiscoveryOption = DISCOVERY_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Cancel a request. It is not an error if it has ended."""

    async def scenario() -> None:
        async with await _connect(frontend, directory) as client:
            was_running = await client.cancel(request_id, is_soft=soft)
        text = f"cancelled {request_id}" if was_running else f"{request_id} was not running"
        _print_result(output, {"request_id": request_id, "was_running": was_running}, text)

    _run(scenario(), output)


def main() -> None:
    """The entry point `unbroken`."""
    app()


async def _up(mesh: LocalMesh, output: Output) -> None:
    """Run `mesh` until SIGINT or SIGTERM; both end it in order."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _cancel_once, task)
    try:
        _note("starting; engines load their models")
        async with mesh:
            _print_mesh(mesh, output)
            while True:
                name, status = await mesh.until_one_ends()
                _note(f"{name} ended with status {status}; log: {mesh.log_directory / name}.log")
                if not mesh.is_serving:
                    raise MeshError("the frontend ended")
    except asyncio.CancelledError:
        _note("stopped")


def _cancel_once(task: asyncio.Task[Any]) -> None:
    """A second signal must not break off the stopping."""
    if not task.cancelling():
        task.cancel()


def _print_mesh(mesh: LocalMesh, output: Output) -> None:
    if output is Output.JSON:
        facts = {
            "frontend": mesh.frontend_address,
            "discovery": str(mesh.directory),
            "logs": str(mesh.log_directory),
            "workers": [_to_dict(record) for record in mesh.workers.values()],
        }
        print(json.dumps(facts), flush=True)  # noqa: T201
        return
    lines = [
        f"frontend  {mesh.frontend_address}",
        *(f"worker    {name} at {record.address}" for name, record in mesh.workers.items()),
        f"logs      {mesh.log_directory}",
        "",
        'Try: unbroken generate "Tell me about the sea"     Stop: Ctrl-C',
    ]
    print("\n".join(lines), flush=True)  # noqa: T201


class _Printer(Protocol):
    """Shows a stream as it comes."""

    def started(self, started: pb.StreamStarted) -> None: ...
    def piece(self, piece: Piece) -> None: ...
    def finished(self, finished: pb.StreamFinished) -> None: ...


async def _print_stream(stream: GenerationStream, printer: _Printer) -> None:
    is_started = False
    try:
        async for piece in stream:
            if stream.started is not None and not is_started:
                is_started = True
                printer.started(stream.started)
            printer.piece(piece)
    finally:
        if stream.finished is not None:
            printer.finished(stream.finished)


class _TextPrinter:
    """Text as it comes; several choices one after the other, at the end."""

    def __init__(self, num_choices: int) -> None:
        self._texts = [""] * num_choices
        self._is_at_line_start = True

    def started(self, started: pb.StreamStarted) -> None:
        pass

    def piece(self, piece: Piece) -> None:
        self._texts[piece.choice_index] += piece.text
        if len(self._texts) == 1:
            sys.stdout.write(piece.text)
            sys.stdout.flush()

    def finished(self, finished: pb.StreamFinished) -> None:
        if len(self._texts) > 1:
            for index, text in enumerate(self._texts):
                print(f"[{index}] {text}")  # noqa: T201
        elif not self._texts[0].endswith("\n"):
            print()  # noqa: T201
        for line in migration_notes(finished):
            _note(line)


class _EventPrinter:
    """One JSON object a line."""

    def started(self, started: pb.StreamStarted) -> None:
        facts = _to_dict(started)
        del facts["resume_token"]  # A secret; terminals and logs are no place for it.
        self._print({"event": "started", **facts})

    def piece(self, piece: Piece) -> None:
        event: dict[str, Any] = {
            "event": "piece",
            "choice_index": piece.choice_index,
            "offset": piece.offset,
            "token_ids": piece.token_ids,
            "text": piece.text,
        }
        if piece.logprobs:
            event["logprobs"] = [
                {
                    "logprob": position.logprob,
                    "top_token_ids": position.top_token_ids,
                    "top_logprobs": position.top_logprobs,
                }
                for position in piece.logprobs
            ]
        self._print(event)

    def finished(self, finished: pb.StreamFinished) -> None:
        self._print({"event": "finished", **_to_dict(finished)})

    def _print(self, event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)  # noqa: T201


def migration_notes(finished: pb.StreamFinished) -> list[str]:
    """What happened underneath, one line for each time a choice went on elsewhere."""
    before: dict[int, pb.AttemptSummary] = {}
    notes: list[str] = []
    for attempt in finished.attempts:
        last = before.get(attempt.choice_index)
        before[attempt.choice_index] = attempt
        if last is None:
            continue
        kind = _short(worker_pb2.FailureKind, last.failure)
        result = next(
            (c for c in finished.choices if c.choice_index == attempt.choice_index),
            pb.ChoiceResult(),
        )
        gap = (
            f", gap {attempt.gap.ToMicroseconds() / 1000:.1f} ms" if attempt.HasField("gap") else ""
        )
        notes.append(
            f"moved from {last.worker.worker_id} ({kind}) to {attempt.worker.worker_id} "
            f"at token {attempt.first_offset}{gap}, {_short(pb.Continued, result.continued)}"
        )
    return notes


def _worker_row(worker: admin_pb.WorkerInfo) -> Sequence[object]:
    ranks = worker.load.ranks
    return (
        worker.record.identity.worker_id,
        worker.description.model or worker.record.model,
        _short(admin_pb.LinkState, worker.link),
        _short(worker_pb2.EngineState, worker.engine),
        worker.num_attempts,
        f"{sum(r.kv_blocks_used for r in ranks)}/{sum(r.kv_blocks_total for r in ranks)}",
        sum(rank.requests_waiting for rank in ranks),
        worker.record.sidecar_pid,
        worker.record.engine_pgid,
        worker.record.address,
    )


def _stream_row(stream: pb.StreamInfo) -> Sequence[object]:
    states = sorted({choice.state for choice in stream.choices})
    names = sorted({c.worker.worker_id for c in stream.choices if c.worker.worker_id})
    admitted = stream.admitted_at.ToDatetime(tzinfo=UTC).astimezone()
    return (
        stream.request_id,
        stream.model,
        _short(pb.ContinuationClass, stream.continuation_class),
        ",".join(_short(pb.StreamState, state) for state in states),
        ",".join(names) or "-",
        sum(choice.num_tokens for choice in stream.choices),
        sum(choice.num_tokens_sent for choice in stream.choices),
        sum(1 for attempt in stream.attempts if attempt.failure),
        datetime.strftime(admitted, "%H:%M:%S"),
    )


def _model_row(model: pb.ModelInfo) -> Sequence[object]:
    return (
        model.model,
        f"{model.num_workers_ready}/{model.num_workers}",
        model.context_length,
        "yes" if model.has_chat_template else "no",
    )


MessageT = TypeVar("MessageT", bound=Message)


def _print_messages(
    output: Output,
    messages: Sequence[MessageT],
    columns: str,
    row: Callable[[MessageT], Sequence[object]],
) -> None:
    """A JSON list, or a table."""
    if output is Output.JSON:
        print(json.dumps([_to_dict(message) for message in messages]))  # noqa: T201
        return
    rows = [columns.split(), *([str(cell) for cell in row(message)] for message in messages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(line.rstrip())  # noqa: T201


def _print_result(output: Output, facts: dict[str, Any], text: str) -> None:
    print(json.dumps(facts) if output is Output.JSON else text)  # noqa: T201


def _note(text: str) -> None:
    """Something beside the result, dim if a terminal shows it."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr)  # noqa: T201


async def _connect(frontends: Sequence[str] | None, directory: Path) -> Client:
    """A client of the frontends that are named, or else of those that discovery knows."""
    if not frontends:
        found = await discovery.connect(directory).snapshot(discovery.FRONTENDS)
        frontends = [record.address for record in found.values()]
    if not frontends:
        raise UnbrokenError(
            Reason.UNREACHABLE,
            f"expected a frontend in {directory}, found none; start one with: unbroken up",
        )
    return Client(*frontends)


def _run(scenario: Coroutine[Any, Any, None], output: Output) -> None:
    """Run a command and leave with its exit status."""
    try:
        uvloop.run(scenario)
    except (UnbrokenError, MeshError) as error:
        _fail(error, output)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:  # The reader, such as `head`, has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


def _fail(error: UnbrokenError | MeshError, output: Output) -> NoReturn:
    reason = error.reason.value if isinstance(error, UnbrokenError) else "MESH"
    retry_after_s = error.retry_after_s if isinstance(error, UnbrokenError) else None
    if output is Output.JSON:
        facts: dict[str, Any] = {"event": "error", "reason": reason, "detail": str(error)}
        if isinstance(error, UnbrokenError) and error.metadata:
            facts["metadata"] = error.metadata
        if retry_after_s is not None:
            facts["retry_after_s"] = retry_after_s
        print(json.dumps(facts), flush=True)  # noqa: T201
    else:
        hint = f" (try again in {retry_after_s:.1f} s)" if retry_after_s is not None else ""
        print(f"error: {reason}: {error}{hint}", file=sys.stderr)  # noqa: T201
    raise typer.Exit(1)


def _parse_token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise typer.BadParameter(f"expected ids separated by commas, got {text[:80]!r}") from None


def _continuation_to_proto(continuation: Continuation) -> pb.ContinuationPolicy.ValueType:
    name = f"CONTINUATION_POLICY_{continuation.value.upper().replace('-', '_')}"
    return pb.ContinuationPolicy.Value(name)


def _to_dict(message: Message) -> dict[str, Any]:
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


class _EnumType(Protocol):
    def Name(self, number: Any) -> str: ...  # noqa: N802


def _short(enum: _EnumType, value: int) -> str:
    """The name of an enum's value without what all its names begin with; "-" for none."""
    if value == 0:
        return "-"
    try:
        name = enum.Name(value)
    except ValueError:
        return str(value)
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    return name.removeprefix(prefix).lower().replace("_", "-")


if __name__ == "__main__":
    main()
