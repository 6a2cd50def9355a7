"""Typed configuration: flags, environment, a file and defaults become one frozen model.

    class SidecarConfig(ProcessConfig):
        heartbeat_interval_s: float = Field(default=0.1, gt=0)
        \"\"\"Seconds between two heartbeats.\"\"\"

    config = load(SidecarConfig, sys.argv[1:], prog="sidecar")

A value is looked for in this order, and the first found counts:

1. the flag `--heartbeat-interval-s 0.2` (`--x` and `--no-x` for truth values; repeat it for lists),
2. the variable `UNBROKEN_SIDECAR_HEARTBEAT_INTERVAL_S` (lists: separated by commas),
3. the key `heartbeat_interval_s` of the TOML file named by `--config` or `UNBROKEN_SIDECAR_CONFIG`,
4. the default.

What nobody declared (a flag, a variable with the prefix, a key) is an error, because it is most
often a misspelt setting that would silently not count.
"""

import argparse
import difflib
import os
import sys
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin

import annotated_types as limits
from pydantic import AfterValidator, BaseModel, ConfigDict, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

_FILE_BYTES_MAX = 1024 * 1024


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[ipv6]:port"; raises ValueError."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # An IPv6 address without brackets: where its port begins is a guess.
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise ValueError("host:port or [ipv6]:port")
    return host, int(port)


def _valid_address(address: str) -> str:
    split_address(address)
    return address


_ADDRESS = AfterValidator(_valid_address)

Address = Annotated[str, _ADDRESS]
"""A "host:port"; port 0 lets the kernel choose one."""


class ProcessConfig(BaseModel):
    """What every process can be told; each process adds its own fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages that are logged."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """JSON lines, text for people, or (auto) JSON unless stderr is a terminal."""

    def effective(self) -> dict[str, object]:
        """Every setting as it counts, for the log; secrets are masked."""
        return {name: _shown(getattr(self, name)) for name in type(self).model_fields}


ConfigT = TypeVar("ConfigT", bound=BaseModel)


class ConfigError(Exception):
    """The configuration is wrong; `lines` has one sentence per wrong setting."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


def load(model_class: type[ConfigT], argv: Sequence[str], *, prog: str) -> ConfigT:
    """The configuration of process `prog` from `argv` (without the program's name).

    Prints every problem on a line of its own and exits with status 2, or prints `--help` and exits
    with 0.
    """
    try:
        return merge(model_class, argv, os.environ, prog=prog)
    except ConfigError as error:
        _fail(prog, error.lines)


def merge(
    model_class: type[ConfigT], argv: Sequence[str], environ: Mapping[str, str], *, prog: str
) -> ConfigT:
    """As `load`, from the given environment; raises `ConfigError`. `--help` and bad flags exit."""
    prefix = f"UNBROKEN_{prog.upper().replace('-', '_')}_"
    flags = vars(_parser(model_class, prog, prefix).parse_args(argv))
    problems: list[str] = []
    values: dict[str, _Value] = {}

    path = flags.pop("config", None) or environ.get(f"{prefix}CONFIG")
    if path:
        values |= _from_file(model_class, Path(path), problems)
    values |= _from_environment(model_class, environ, prefix, problems)
    values |= {
        name: _Value(value, f"from flag {_flag(name)}")
        for name, value in flags.items()
        if value is not None
    }
    try:
        config = model_class.model_validate({name: v.value for name, v in values.items()})
    except ValidationError as error:
        problems += [_line(model_class, e, values, prefix) for e in error.errors()]
        raise ConfigError(problems) from None  # Its text repeats ours and shows secrets.
    if problems:
        raise ConfigError(problems)
    return config


def markdown(model_class: type[BaseModel], *, prog: str) -> str:
    """The settings of a process as a Markdown table, for docs/CONFIGURATION.md."""
    rows = [
        "| flag | expected | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for name, field in sorted(model_class.model_fields.items()):
        default = "required" if field.is_required() else f"`{_default(field)}`"
        meaning = " ".join((field.description or "").split())
        cells = (f"`{_flag(name)}`", expectation(field), default, meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return f"## {prog}\n\n" + "\n".join(rows) + "\n"


def expectation(field: FieldInfo) -> str:
    """What a value of the field has to be, in words: "a number above 0"."""
    if _ADDRESS in field.metadata or _is(Address, field.annotation):
        return "host:port"
    return f"{_type_in_words(field.annotation)}{_limits_in_words(field.metadata)}"


@dataclass(frozen=True, slots=True)
class _Value:
    value: Any
    source: str


def _parser(model_class: type[BaseModel], prog: str, prefix: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {prog}",
        allow_abbrev=False,
        argument_default=None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_paragraph(model_class.__doc__ or ""),
        epilog=(
            f"Each setting can also be given as {prefix}<NAME> in the environment or as <name> in\n"
            "the file. Flags count more than the environment, the environment more than the file."
        ),
    )
    parser.add_argument("--config", metavar="FILE.toml", help="read settings from this file")
    for name, field in model_class.model_fields.items():
        is_required = field.is_required()
        note = "required" if is_required else f"default: {_default(field)}"
        help_text = f"{' '.join((field.description or '').split())} ({note})".replace("%", "%%")
        if _is(bool, field.annotation):
            action = argparse.BooleanOptionalAction
            parser.add_argument(_flag(name), dest=name, action=action, help=help_text)
        elif _is_list(field.annotation):
            parser.add_argument(
                _flag(name), dest=name, action="append", metavar="X", help=help_text
            )
        else:
            metavar = _metavar(field)
            parser.add_argument(_flag(name), dest=name, metavar=metavar, help=help_text)
    return parser


def _from_file(model_class: type[BaseModel], path: Path, problems: list[str]) -> dict[str, _Value]:
    try:
        with path.open("rb") as file:
            text = file.read(_FILE_BYTES_MAX + 1)
        if len(text) > _FILE_BYTES_MAX:
            raise ValueError(f"it has more than {_FILE_BYTES_MAX} bytes")
        content = tomllib.loads(text.decode())
    except (OSError, ValueError) as error:
        raise ConfigError([f"config: expected a TOML file, got {path}: {error}"]) from None
    names = set(model_class.model_fields)
    problems += [
        f"{key}: unknown key{_did_you_mean(key, names)} (from file {path})"
        for key in sorted(set(content) - names)
    ]
    return {
        name: _Value(value, f"from file {path}") for name, value in content.items() if name in names
    }


def _from_environment(
    model_class: type[BaseModel], environ: Mapping[str, str], prefix: str, problems: list[str]
) -> dict[str, _Value]:
    fields = {f"{prefix}{name.upper()}": (name, f) for name, f in model_class.model_fields.items()}
    known = {*fields, f"{prefix}CONFIG"}
    values: dict[str, _Value] = {}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(prefix):
            continue
        if variable not in known:
            problems.append(f"{variable}: unknown variable{_did_you_mean(variable, known)}")
        elif variable in fields:
            name, field = fields[variable]
            is_list = _is_list(field.annotation)
            value = [part.strip() for part in text.split(",") if part.strip()] if is_list else text
            values[name] = _Value(value, f"from environment {variable}")
    return values


def _line(
    model_class: type[BaseModel], error: ErrorDetails, values: Mapping[str, _Value], prefix: str
) -> str:
    """One error of pydantic as one line of ours."""
    name = str(error["loc"][0]) if error["loc"] else ""
    if name not in model_class.model_fields:
        return error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{name}: required; give {_flag(name)}, {prefix}{name.upper()} or {name} in the file"
    field = model_class.model_fields[name]
    expected = expectation(field)
    if error["type"] == "value_error":  # Ours, from a validator: its text says what is expected.
        expected = error["msg"].removeprefix("Value error, ")
    given = values.get(name)
    seen = "a secret" if _is(SecretStr, field.annotation) else repr(error["input"])
    source = given.source if given else "the default"
    return f"{name}: expected {expected}, got {seen} ({source})"


def _fail(prog: str, lines: Sequence[str]) -> NoReturn:
    for line in lines:
        print(line, file=sys.stderr)  # noqa: T201 - there is no log before the configuration.
    print(f"See python -m {prog} --help.", file=sys.stderr)  # noqa: T201
    raise SystemExit(2)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _paragraph(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def _did_you_mean(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _default(field: FieldInfo) -> str:
    value = cast("object", field.get_default(call_default_factory=True))
    if value in (PydanticUndefined, None, (), frozenset()):
        return "none"
    shown = _shown(value)
    return (
        ", ".join(map(str, cast("list[object]", shown))) if isinstance(shown, list) else f"{shown}"
    )


def _shown(value: object) -> object:
    """A value as JSON can show it; secrets are masked by their own `str`."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, tuple | list | frozenset | set):
        return [_shown(part) for part in cast("Sequence[object]", value)]
    return str(value)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: both of `int | None`, one of `int`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(m for part in get_args(annotation) for m in _members(part))
    return (annotation,)


def _is(kind: Any, annotation: Any) -> bool:
    return kind in (annotation, *get_args(annotation), *_members(annotation))


def _is_list(annotation: Any) -> bool:
    return any(
        get_origin(member) in (tuple, list, frozenset, set) for member in _members(annotation)
    )


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    SecretStr: "a secret",
    type(None): "nothing",
}


def _type_in_words(annotation: Any) -> str:
    words: list[str] = []
    for member in _members(annotation):
        if get_origin(member) is Literal:
            words.append("one of " + ", ".join(map(str, get_args(member))))
        elif isinstance(member, type) and issubclass(member, Enum):
            words.append("one of " + ", ".join(str(m.value) for m in member))
        elif get_origin(member) in (tuple, list, frozenset, set):
            words.append(f"a list, each {_type_in_words(get_args(member)[0])}")
        elif member is not type(None):
            words.append(_WORDS.get(cast("type", member), f"{member}"))
    return " or ".join(words) or "nothing"


def _limits_in_words(metadata: Sequence[Any]) -> str:
    words: list[str] = []
    for limit in metadata:
        match limit:
            case limits.Gt():
                words.append(f"above {limit.gt}")
            case limits.Ge():
                words.append(f"at least {limit.ge}")
            case limits.Lt():
                words.append(f"below {limit.lt}")
            case limits.Le():
                words.append(f"at most {limit.le}")
            case limits.MinLen():
                words.append(f"of at least {limit.min_length} in length")
            case limits.MaxLen():
                words.append(f"of at most {limit.max_length} in length")
            case _:
                if pattern := getattr(limit, "pattern", None):
                    words.append(f"matching {pattern}")
    return f" {' and '.join(words)}" if words else ""


def _metavar(field: FieldInfo) -> str:
    for member in _members(field.annotation):
        if get_origin(member) is Literal:
            return "|".join(map(str, get_args(member)))
        if member in (int, float):
            return "N"
        if member is Path:
            return "PATH"
    return "TEXT"
