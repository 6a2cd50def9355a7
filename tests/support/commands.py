"""The commands of the command line, however deep."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import typer

from unbroken import cli


def all_commands() -> Mapping[str, Any]:
    """By their whole names, those that do something."""
    return dict(_below(typer.main.get_command(cli.app)))


def _below(command: Any, *names: str) -> Iterator[tuple[str, Any]]:
    groups = cast("Mapping[str, Any] | None", getattr(command, "commands", None))
    if groups is None:
        yield " ".join(names), command
        return
    for name, below in groups.items():
        yield from _below(below, *names, name)
