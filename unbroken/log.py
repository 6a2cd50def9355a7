"""Structured logs on stderr: JSON lines for machines, text for people.

    log.configure("sidecar", config.log_level, config.log_format)
    _log = log.get_logger(__name__)
    _log.info("engine started", engine_pid=pid)

An event is a short constant phrase; what varies goes into its fields. What libraries log through
the standard library (grpc, asyncio) comes out in the same format. Nothing global happens before
`configure`: a program that uses our client as a library keeps its own logging.
"""

import logging
import sys
from typing import Final, Literal, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

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
    handler = logging.StreamHandler(sys.stderr)
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
