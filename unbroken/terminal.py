"""What the command line shows: streams as they come, lists, errors; text for people or JSON."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, Generic, Protocol, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from unbroken.engine_command import EngineCommand
from unbroken.errors import UnbrokenError
from unbroken.generation_stream import GenerationStream, Piece, Resume
from unbroken.holdings import num_held
from unbroken.mesh import LocalMesh, MeshError
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import holding_pb2, worker_pb2
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import sidecar_service_pb2 as sidecar_pb

_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")
_DRAIN_NOTE_INTERVAL_S: Final = 1.0
_DRAIN_NOTED_S_MIN: Final = 0.3


class Output(StrEnum):
    """How results are written."""

    TEXT = "text"
    JSON = "json"


class Printer(Protocol):
    """Shows a stream as it comes."""

    def started(self, started: pb.StreamStarted) -> None: ...
    def piece(self, piece: Piece) -> None: ...
    def resumed(self, resume: Resume) -> None: ...
    def ended(self) -> None: ...
    def finished(self, finished: pb.StreamFinished) -> None: ...


async def show_stream(stream: GenerationStream, output: Output, num_choices: int) -> None:
    """Show a stream of so many choices to its end, or to its error."""
    printer: Printer = EventPrinter() if output is Output.JSON else TextPrinter(num_choices)
    is_opened = False
    num_resumes = 0
    try:
        async for piece in stream:
            if stream.started is not None and not is_opened:
                is_opened = True
                printer.started(stream.started)
            for resume in stream.resumes[num_resumes:]:
                num_resumes += 1
                printer.resumed(resume)
            printer.piece(piece)
    finally:
        if stream.started is not None and not is_opened:
            printer.started(stream.started)
        for resume in stream.resumes[num_resumes:]:
            printer.resumed(resume)
        if stream.finished is not None:
            printer.finished(stream.finished)
        printer.ended()


class TextPrinter:
    """Text as it comes; several choices one after the other, at the end."""

    def __init__(self, num_choices: int) -> None:
        self._texts = [""] * num_choices
        self._resumes: list[Resume] = []
        self._escape = "␛" if sys.stdout.isatty() else "\x1b"  # A model must not steer a terminal.

    def started(self, started: pb.StreamStarted) -> None:
        """Nothing to show yet."""

    def piece(self, piece: Piece) -> None:
        text = piece.text.replace("\x1b", self._escape)
        self._texts[piece.choice_index] += text
        if len(self._texts) == 1:
            sys.stdout.write(text)
            sys.stdout.flush()

    def resumed(self, resume: Resume) -> None:
        self._resumes.append(resume)  # A note in the middle would tear the text.

    def ended(self) -> None:
        for resume in self._resumes:
            note(resume_note(resume))

    def finished(self, finished: pb.StreamFinished) -> None:
        if len(self._texts) > 1:
            for index, text in enumerate(self._texts):
                print(f"[{index}] {text}")  # noqa: T201
        elif not self._texts[0].endswith("\n"):
            print()  # noqa: T201
        for line in migration_notes(finished):
            note(line)


class EventPrinter:
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

    def resumed(self, resume: Resume) -> None:
        facts = {
            "from": resume.from_address,
            "to": resume.to_address,
            "reason": resume.reason.value,
            "offsets": resume.offsets,
            "gap_s": round(resume.gap_s, 6),
        }
        self._print({"event": "resumed", **facts})

    def ended(self) -> None:
        """All was said."""

    def finished(self, finished: pb.StreamFinished) -> None:
        self._print({"event": "finished", **_to_dict(finished)})

    def _print(self, event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)  # noqa: T201


def resume_note(resume: Resume) -> str:
    """How a stream went on at another frontend, or at the same."""
    lost = f"lost frontend {resume.from_address} ({resume.reason.value.lower()})"
    where = "there again" if resume.to_address == resume.from_address else f"at {resume.to_address}"
    tokens = ", ".join(map(str, resume.offsets))
    return f"{lost} at token {tokens}, went on {where}, gap {resume.gap_s * 1000:.1f} ms"


def migration_notes(finished: pb.StreamFinished) -> list[str]:
    """What happened underneath, one line for each time a choice went on elsewhere."""
    before: dict[int, pb.AttemptSummary] = {}
    notes: list[str] = []
    for attempt in finished.attempts:
        last = before.get(attempt.choice_index)
        before[attempt.choice_index] = attempt
        if last is None:
            continue
        kind = short(worker_pb2.FailureKind, last.failure)
        result = next(
            (c for c in finished.choices if c.choice_index == attempt.choice_index),
            pb.ChoiceResult(),
        )
        gap = (
            f", gap {attempt.gap.ToMicroseconds() / 1000:.1f} ms" if attempt.HasField("gap") else ""
        )
        notes.append(
            f"moved from {last.worker.worker_id} ({kind}) to {attempt.worker.worker_id} "
            f"at token {attempt.first_offset}{gap}, {short(pb.Continued, result.continued)}"
        )
    return notes


class DrainNotes:
    """Says every now and then how many streams a worker has left."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self._due_at = 0.0

    def __call__(self, progress: sidecar_pb.DrainResponse) -> None:
        now = time.monotonic()
        if progress.phase != sidecar_pb.DRAIN_PHASE_FINISHING or now < self._due_at:
            return
        left_s = progress.budget_left.ToMilliseconds() / 1000
        is_limited = progress.HasField("budget_left")
        if is_limited and left_s < _DRAIN_NOTED_S_MIN:
            return  # It is over before anybody has read it.
        self._due_at = now + _DRAIN_NOTE_INTERVAL_S
        until = f", {left_s:.1f} s left" if is_limited else ""
        note(f"{self._worker_id} drains: {progress.num_attempts} streams run{until}")


class FrontendDrainNotes:
    """Says every now and then how many requests a frontend has left."""

    def __init__(self, frontend_id: str) -> None:
        self._frontend_id = frontend_id
        self._due_at = time.monotonic() + _DRAIN_NOTE_INTERVAL_S  # Most are over by then.

    def __call__(self, progress: admin_pb.DrainFrontendResponse) -> None:
        now = time.monotonic()
        if progress.phase != admin_pb.FRONTEND_DRAIN_PHASE_LEAVING or now < self._due_at:
            return
        self._due_at = now + _DRAIN_NOTE_INTERVAL_S
        left_s = progress.budget_left.ToMilliseconds() / 1000
        note(f"{self._frontend_id} drains: {progress.num_requests} requests, {left_s:.1f} s left")


def show_mesh(mesh: LocalMesh, output: Output) -> None:
    """Show where a mesh that has started can be reached."""
    if output is Output.JSON:
        facts = {
            "frontend": mesh.frontend_address,
            "frontends": [_to_dict(record) for record in mesh.frontends.values()],
            "discovery": str(mesh.directory),
            "logs": str(mesh.log_directory),
            "workers": [_to_dict(record) for record in mesh.workers.values()],
        }
        print(json.dumps(facts), flush=True)  # noqa: T201
        return
    lines = [
        *(f"frontend  {name} at {record.address}" for name, record in mesh.frontends.items()),
        *(f"worker    {name} at {record.address}" for name, record in mesh.workers.items()),
        f"logs      {mesh.log_directory}",
        "",
        'Try: unbroken generate "Tell me about the sea"     Stop: Ctrl-C',
    ]
    print("\n".join(lines), flush=True)  # noqa: T201


MessageT = TypeVar("MessageT", bound=Message)


@dataclass(frozen=True, slots=True)
class Table(Generic[MessageT]):
    """How messages become lines for people."""

    columns: str
    row: Callable[[MessageT], Sequence[object]]


def show_list(output: Output, messages: Sequence[MessageT], table: Table[MessageT]) -> None:
    """Show messages as a JSON list or a table."""
    if output is Output.JSON:
        print(json.dumps([_to_dict(message) for message in messages]))  # noqa: T201
        return
    _print_table(messages, table)


def show_message(message: Message) -> None:
    """Show a message as one line of JSON."""
    print(json.dumps(_to_dict(message)), flush=True)  # noqa: T201


def show_engine_command(output: Output, worker_id: str, engine: EngineCommand) -> None:
    """Show which engine is started as which worker."""
    if output is Output.JSON:
        facts = {
            "worker_id": worker_id,
            "protocol": engine.protocol,
            "address": engine.address,
            "command": engine.words,
        }
        print(json.dumps(facts), flush=True)  # noqa: T201
        return
    print(f"{worker_id}: {engine.protocol} at {engine.address}", flush=True)  # noqa: T201


def show_thresholds(
    output: Output, models: Sequence[admin_pb.ThresholdsInfo], version: int
) -> None:
    """Show thresholds, and the version that they have."""
    if output is Output.JSON:
        facts = {"version": version, "models": [_to_dict(model) for model in models]}
        print(json.dumps(facts))  # noqa: T201
        return
    _print_table(models, THRESHOLDS)


def show_ledger(output: Output, processes: Sequence[holding_pb2.ProcessHoldings]) -> None:
    """Show what processes hold, and which of them told less than all."""
    held = num_held(processes)
    if output is Output.JSON:
        facts = {"held": held, "processes": [_to_dict(process) for process in processes]}
        print(json.dumps(facts))  # noqa: T201
        return
    rows = [(process, holding) for process in processes for holding in process.holdings]
    if held:
        _print_rows("PROCESS KIND REQUEST CHOICE EPOCH AMOUNT AGE DETAIL", map(_holding_row, rows))
    else:
        print(f"nothing is held by {len(processes)} processes")  # noqa: T201
    if held > len(rows):
        note(f"{held - len(rows)} more are not listed")
    for process in processes:
        if process.detail:
            note(f"{_process_name(process)}: {process.detail}")


def _holding_row(
    row: tuple[holding_pb2.ProcessHoldings, holding_pb2.Holding],
) -> Sequence[object]:
    process, holding = row
    stream = holding.stream
    tenant = f"{stream.tenant}/" if stream.tenant else ""
    return (
        _process_name(process),
        short(holding_pb2.HoldingKind, holding.kind),
        f"{tenant}{stream.request_id}" if holding.HasField("stream") else "-",
        stream.choice_index,
        holding.epoch or "-",
        holding.amount,
        f"{holding.age.ToMilliseconds() / 1000:.1f}s" if holding.HasField("age") else "-",
        holding.detail,
    )


def _process_name(process: holding_pb2.ProcessHoldings) -> str:
    return f"{short(holding_pb2.ProcessRole, process.role)}/{process.name}"


def _print_table(messages: Sequence[MessageT], table: Table[MessageT]) -> None:
    _print_rows(table.columns, map(table.row, messages))


def _print_rows(columns: str, cells_of_rows: Iterable[Sequence[object]]) -> None:
    rows = [columns.split(), *(list(map(str, cells)) for cells in cells_of_rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(line.rstrip())  # noqa: T201


def show_result(output: Output, facts: dict[str, Any], text: str) -> None:
    """Show what a command did: `facts` as JSON, or `text`."""
    print(json.dumps(facts) if output is Output.JSON else text)  # noqa: T201


def write(text: str) -> None:
    """Text as it comes; its colours are for terminals only."""
    sys.stdout.write(text if sys.stdout.isatty() else _COLOUR.sub("", text))
    sys.stdout.flush()


def teller(output: Output) -> Callable[[str], None]:
    """Where to say what goes on before the result: beside it, if the result is JSON."""

    def aside(text: str) -> None:
        sys.stderr.write(text if sys.stderr.isatty() else _COLOUR.sub("", text))
        sys.stderr.flush()

    return aside if output is Output.JSON else write


def note(text: str) -> None:
    """Something beside the result, dim if a terminal shows it."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr)  # noqa: T201


def _worker_row(worker: admin_pb.WorkerInfo) -> Sequence[object]:
    ranks = worker.load.ranks
    is_up = worker.link == admin_pb.LINK_STATE_UP  # Else what is known of the engine is old.
    engine = short(worker_pb2.EngineState, worker.engine) if is_up else "-"
    return (
        worker.record.identity.worker_id,
        worker.description.model or worker.record.model,
        short(admin_pb.LinkState, worker.link),
        _liveness(worker),
        _engine_row(worker, engine),
        worker.num_attempts,
        f"{sum(r.kv_blocks_used for r in ranks)}/{sum(r.kv_blocks_total for r in ranks)}",
        sum(rank.requests_waiting for rank in ranks),
        worker.record.sidecar_pid,
        worker.record.engine_pgid,
        worker.record.address,
    )


def _engine_row(worker: admin_pb.WorkerInfo, engine: str) -> str:
    marks = [
        name
        for name, is_so in (
            ("draining", worker.is_draining),
            ("ejected", worker.HasField("ejection")),
            ("busy", bool(worker.busy)),
        )
        if is_so
    ]
    return f"{engine} ({', '.join(marks)})" if marks else engine


def _liveness(worker: admin_pb.WorkerInfo) -> str:
    """The failure detector's opinion; how strong a suspicion is."""
    if worker.liveness == admin_pb.LIVENESS_UNSPECIFIED:
        return "-"
    name = short(admin_pb.Liveness, worker.liveness)
    is_suspect = worker.liveness == admin_pb.LIVENESS_SUSPECT
    return f"{name} ({worker.suspicion:.1f})" if is_suspect else name


def _stream_row(stream: pb.StreamInfo) -> Sequence[object]:
    states = sorted({choice.state for choice in stream.choices})
    names = sorted({c.worker.worker_id for c in stream.choices if c.worker.worker_id})
    admitted = stream.admitted_at.ToDatetime(tzinfo=UTC).astimezone()
    return (
        stream.request_id,
        stream.model,
        short(pb.ContinuationClass, stream.continuation_class),
        ",".join(short(pb.StreamState, state) for state in states),
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


def _thresholds_row(info: admin_pb.ThresholdsInfo) -> Sequence[object]:
    own = info.thresholds
    return (
        info.model,
        f"{own.kv_blocks_share:g}" if own.HasField("kv_blocks_share") else "off",
        own.prefill_tokens if own.HasField("prefill_tokens") else "off",
        f"{own.prefill_share:g}" if own.HasField("prefill_share") else "off",
        "default" if info.is_default else "own",
    )


WORKERS: Final = Table(
    "WORKER MODEL LINK LIVENESS ENGINE ATTEMPTS KV-BLOCKS WAITING SIDECAR ENGINE-PGID ADDRESS",
    _worker_row,
)
STREAMS: Final = Table(
    "REQUEST MODEL CLASS STATE WORKERS TOKENS SENT MIGRATIONS ADMITTED", _stream_row
)
MODELS: Final = Table("MODEL WORKERS CONTEXT CHAT", _model_row)
THRESHOLDS: Final = Table("MODEL KV-BLOCKS-SHARE PREFILL-TOKENS PREFILL-SHARE SET", _thresholds_row)


def show_error(output: Output, error: UnbrokenError | MeshError) -> None:
    """Show why a command failed: on stderr, or as the last JSON line on stdout."""
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


def _to_dict(message: Message) -> dict[str, Any]:
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


class EnumType(Protocol):
    """An enum of the contract."""

    def Name(self, number: Any) -> str: ...  # noqa: N802


def short(enum: EnumType, value: int) -> str:
    """The name of an enum's value without what all its names begin with; "-" for none."""
    if value == 0:
        return "-"
    try:
        name = enum.Name(value)
    except ValueError:
        return str(value)
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    return name.removeprefix(prefix).lower().replace("_", "-")
