"""Structured logs on stderr: JSON lines for machines, text for people.

    log.configure("sidecar", config.log_level, config.log_format)
    _log = log.get_logger(__name__)
    _log.info("engine started", engine_pid=pid)

An event is a short constant phrase; what varies goes into its fields. What libraries log through
the standard library (grpc, asyncio) comes out in the same format. Nobody waits for a log: lines
that nobody takes are lost, and counted in the next that is taken. Nothing global happens before
`configure`: a program that uses our client as a library keeps its own logging.
"""

import logging
import os
import select
import sys
from typing import Final, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger
from typing_extensions import override

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]

_TO_STANDARD_LOGGING: Final[list[Processor]] = [
    structlog.stdlib.filter_by_level,
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.PositionalArgumentsFormatter(),
    structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
]


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger for the module `name`."""
    return cast(
        "structlog.stdlib.BoundLogger",
        structlog.wrap_logger(
            logging.getLogger(name),
            processors=_TO_STANDARD_LOGGING,
            wrapper_class=structlog.stdlib.BoundLogger,
        ),
    )


class _NeverWaiting(logging.Handler):
    """Writes lines as long as somebody takes them; a full pipe or disk costs lines, never time."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._fd = stream.fileno()
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)
        self._num_lost = 0
        self._is_torn = False
        """The last line was taken in part."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        if self._num_lost:
            lost = f'{{"event": "log lines lost", "num": {self._num_lost}, "level": "warning"}}'
            self._num_lost = 0 if self._write(f"{lost}\n") else self._num_lost
        self._num_lost += not self._write(f"{line}\n")

    def _write(self, text: str) -> bool:
        """Whether all of it was taken."""
        data = ("\n" * self._is_torn + text).encode(errors="backslashreplace")
        size = len(data)
        try:
            # A pipe that is ready takes so many bytes at once.
            while data and self._poll.poll(0):
                data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]
        except OSError:
            pass  # The disk is full, or the reader has gone.
        if len(data) < size:
            self._is_torn = bool(data)
        return not data


def configure(process: str, level: Level = "info", format: Format = "auto") -> None:
    """Send all logs of this process to stderr; `process` is a field of every line.

    "auto" is "console" if stderr is a terminal, else "json".
    """

    def add_process(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("process", process)
        return event

    is_console = format == "console" or (format == "auto" and sys.stderr.isatty())
    render: list[Processor] = (
        [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                timestamp_key="time",
                exception_formatter=structlog.dev.plain_traceback,  # The others show locals.
            )
        ]
        if is_console
        else [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ]
    )
    handler = _NeverWaiting(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
                add_process,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *render,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
