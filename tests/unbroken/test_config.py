"""Claims of the configuration: what counts, what is refused, and what people are told."""

import os
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Literal, Self

import pytest
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator

from unbroken import config
from unbroken.config import Address, ConfigError, ProcessConfig, load, markdown, merge


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Example(ProcessConfig):
    """An example of a process."""

    worker_id: str = Field(pattern=r"^[a-z0-9]{1,8}$")
    """Stable name."""
    interval_s: float = Field(default=0.1, gt=0, le=60)
    """Seconds between two heartbeats; 100 % safe."""
    num_slots: int = Field(default=4, ge=1)
    """Slots."""
    listen: Address = "127.0.0.1:0"
    """Where to listen."""
    tags: tuple[str, ...] = ()
    """Any number of tags."""
    ports: tuple[int, ...] = (1, 2)
    """Numbers."""
    does_drain: bool = True
    """Whether to drain."""
    policy: Literal["finish", "migrate"] = "finish"
    """What to do."""
    colour: Colour = Colour.RED
    """Which."""
    limit_s: float | None = None
    """No limit if absent."""
    path: Path | None = None
    """A file."""
    token: SecretStr = SecretStr("default-token")
    """Who we are."""

    @field_validator("tags")
    @classmethod
    def _short(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(tag) > 8 for tag in tags):
            raise ValueError("tags of at most 8 characters")
        return tags

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.limit_s is not None and self.limit_s < self.interval_s:
            raise ValueError("limit_s: expected at least interval_s")
        return self


def merged(*argv: str, **environ: str) -> Example:
    return merge(Example, argv, environ, prog="example")


def problems(*argv: str, **environ: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        merged(*argv, **environ)
    return raised.value.lines


def test_flags_count_more_than_environment_than_file_than_defaults(tmp_path: Path) -> None:
    file = tmp_path / "example.toml"
    file.write_text('worker_id = "file"\ninterval_s = 3\nnum_slots = 3\ntags = ["a"]\n')
    got = merged(
        *("--config", str(file), "--worker-id", "flag"),
        UNBROKEN_EXAMPLE_WORKER_ID="env",
        UNBROKEN_EXAMPLE_INTERVAL_S="2",
    )
    assert (got.worker_id, got.interval_s, got.num_slots, got.tags) == ("flag", 2.0, 3, ("a",))
    assert got.policy == "finish"


def test_the_file_can_be_named_in_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "example.toml"
    file.write_text('worker_id = "file"\n')
    assert merged(UNBROKEN_EXAMPLE_CONFIG=str(file)).worker_id == "file"


def test_every_type_can_be_given_as_a_flag() -> None:
    flags = "--worker-id w --interval-s 0.5 --num-slots 9 --listen [::1]:80 --tags a --tags b,c"
    flags += " --ports 5 --no-does-drain --policy migrate --colour blue --limit-s 2 --path x/y"
    got = merged(*flags.split())
    assert got == Example(
        worker_id="w",
        interval_s=0.5,
        num_slots=9,
        listen="[::1]:80",
        tags=("a", "b,c"),
        ports=(5,),
        does_drain=False,
        policy="migrate",
        colour=Colour.BLUE,
        limit_s=2.0,
        path=Path("x/y"),
    )


def test_every_type_can_be_given_in_the_environment() -> None:
    got = merged(
        UNBROKEN_EXAMPLE_WORKER_ID="w",
        UNBROKEN_EXAMPLE_TAGS="a, b,",
        UNBROKEN_EXAMPLE_PORTS="5,6",
        UNBROKEN_EXAMPLE_DOES_DRAIN="false",
        UNBROKEN_EXAMPLE_COLOUR="blue",
        UNBROKEN_SIDECAR_NOT="for us",
    )
    assert got == Example(
        worker_id="w", tags=("a", "b"), ports=(5, 6), does_drain=False, colour=Colour.BLUE
    )


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(ValidationError):
        merged("--worker-id", "w").worker_id = "other"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--interval-s x", "interval_s: expected a number above 0 and at most 60, got 'x'"),
        ("--interval-s 0", "interval_s: expected a number above 0 and at most 60, got '0'"),
        ("--interval-s nan", "interval_s: expected a number above 0 and at most 60, got 'nan'"),
        ("--num-slots 1.5", "num_slots: expected a whole number at least 1, got '1.5'"),
        ("--listen 80", "listen: expected host:port or [ipv6]:port, got '80'"),
        ("--listen ::1:80", "listen: expected host:port or [ipv6]:port, got '::1:80'"),
        ("--listen h:65536", "listen: expected host:port or [ipv6]:port, got 'h:65536'"),
        ("--listen h:-1", "listen: expected host:port or [ipv6]:port, got 'h:-1'"),
        ("--policy stop", "policy: expected one of finish, migrate, got 'stop'"),
        ("--colour green", "colour: expected one of red, blue, got 'green'"),
        ("--ports 1 --ports x", "ports: expected a list, each a whole number, got 'x'"),
        ("--worker-id W", "worker_id: expected a text matching ^[a-z0-9]{1,8}$, got 'W'"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(flags: str, line: str) -> None:
    name = flags.split()[0]
    got = problems("--worker-id", "w", *flags.split())
    assert got == (f"{line} (from flag {name})",)


def test_a_validator_says_what_it_expects() -> None:
    (line,) = problems("--worker-id", "w", "--tags", "x" * 9)
    assert (
        line == "tags: expected tags of at most 8 characters, got ['xxxxxxxxx'] (from flag --tags)"
    )
    assert problems("--worker-id", "w", "--limit-s", "0.01") == (
        "limit_s: expected at least interval_s",
    )


def test_every_problem_is_told_at_once_with_its_source(tmp_path: Path) -> None:
    file = tmp_path / "example.toml"
    file.write_text("num_slots = -1\ninterval = 3\n")
    assert problems(
        *("--config", str(file), "--policy", "stop"),
        UNBROKEN_EXAMPLE_INTERVAL_S="x",
        UNBROKEN_EXAMPLE_WORKERID="w",
    ) == (
        f"interval: unknown key, did you mean interval_s? (from file {file})",
        "UNBROKEN_EXAMPLE_WORKERID: unknown variable, did you mean UNBROKEN_EXAMPLE_WORKER_ID?",
        "worker_id: required; give --worker-id, UNBROKEN_EXAMPLE_WORKER_ID "
        "or worker_id in the file",
        "interval_s: expected a number above 0 and at most 60, got 'x' "
        "(from environment UNBROKEN_EXAMPLE_INTERVAL_S)",
        f"num_slots: expected a whole number at least 1, got -1 (from file {file})",
        "policy: expected one of finish, migrate, got 'stop' (from flag --policy)",
    )


@pytest.mark.parametrize("content", [None, b"not toml", b"\xff", b"x=1\n" * 300_000])
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "example.toml"
    if content is not None:
        file.write_bytes(content)
    (line,) = problems("--config", str(file))
    assert line.startswith(f"config: expected a TOML file, got {file}: ")


@pytest.mark.parametrize("argv", [["--nonsense"], ["--work", "w"], ["stray"], ["--worker-id"]])
def test_unknown_flags_end_the_program_with_status_two(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        load(Example, argv, prog="example")
    assert raised.value.code == 2
    assert "usage: python -m example" in capsys.readouterr().err


def test_wrong_values_end_the_program_with_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        load(Example, ["--worker-id", "w", "--num-slots", "none"], prog="example")
    assert raised.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "num_slots: expected a whole number at least 1, got 'none' (from flag --num-slots)",
        "See python -m example --help.",
    ]


def test_secrets_are_shown_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    got = merged("--worker-id", "w", UNBROKEN_EXAMPLE_TOKEN="hush")
    assert got.token.get_secret_value() == "hush"
    assert got.effective()["token"] == "*" * 10
    assert "hush" not in repr(got)
    (line,) = problems("--worker-id", "W", UNBROKEN_EXAMPLE_TOKEN="hush")
    assert "hush" not in line
    with pytest.raises(SystemExit):
        load(Example, ["--help"], prog="example")
    assert "default-token" not in capsys.readouterr().out
    assert "default-token" not in markdown(Example, prog="example")


def test_the_effective_configuration_can_be_logged() -> None:
    assert merged("--worker-id", "w", "--path", "x", "--tags", "a").effective() == {
        "log_level": "info",
        "log_format": "auto",
        "worker_id": "w",
        "interval_s": 0.1,
        "num_slots": 4,
        "listen": "127.0.0.1:0",
        "tags": ["a"],
        "ports": [1, 2],
        "does_drain": True,
        "policy": "finish",
        "colour": "red",
        "limit_s": None,
        "path": "x",
        "token": "*" * 10,
    }


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        load(Example, ["--help"], prog="example")
    assert raised.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "An example of a process." in out
    assert "--interval-s N Seconds between two heartbeats; 100 % safe. (default: 0.1)" in out
    assert "--worker-id TEXT Stable name. (required)" in out
    assert "--does-drain, --no-does-drain Whether to drain. (default: True)" in out
    assert "--tags X Any number of tags. (default: none)" in out
    assert "--ports X Numbers. (default: 1, 2)" in out
    assert "UNBROKEN_EXAMPLE_<NAME>" in out


def test_the_page_has_a_row_for_every_setting() -> None:
    rows = markdown(Example, prog="example").splitlines()
    assert len([row for row in rows if row.startswith("| `--")]) == len(Example.model_fields)
    assert "| `--worker-id` | a text matching ^[a-z0-9]{1,8}$ | required | Stable name. |" in rows
    assert "| `--limit-s` | a number | `none` | No limit if absent. |" in rows


@pytest.mark.parametrize(
    ("address", "parts"),
    [("h:1", ("h", 1)), ("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:65535", ("::1", 65535))],
)
def test_addresses_are_split(address: str, parts: tuple[str, int]) -> None:
    assert config.split_address(address) == parts


def test_reading_a_configuration_is_quick() -> None:
    code = "import sys, time; t = time.process_time(); import unbroken.config as c; "
    code += "c.load(c.ProcessConfig, [], prog='p'); print(time.process_time() - t)"
    command = [sys.executable, "-c", code]
    seconds = min(float(subprocess.check_output(command, env=os.environ)) for _ in range(3))
    assert seconds < 0.4
