"""Scripts of the fuzzer that every test run plays, as text that people can read and write.

    # A title
    request flags=1
    3x frame WINDOW_UPDATE stream=1 payload=00000001
    frame DATA flags=8 stream=3 payload=05+78*1000

A script is a title and a step a line, as many times as it says; `tests.frontend.edge.fuzz` tells
what steps do. What is not said of a step is 0; payloads are hexadecimal, and their parts repeated.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from unbroken.http2.frames import FrameType

Step = tuple[str, int, int, int, bytes]
"""What is done, the kind (of a frame) or size, flags, stream, payload."""

FOUND: Final = "found.txt"
"""Where scripts go that the fuzzer found."""
_HERE: Final = Path(__file__).parent
_KINDS: Final = frozenset(map(int, FrameType))
_STEP: Final = re.compile(
    r"(?:(?P<times>\d+)x )?(?P<what>[a-z]+)(?: (?P<kind>\w+))?(?: flags=(?P<flags>\w+))?"
    r"(?: stream=(?P<stream>\d+))?(?: payload=(?P<payload>[0-9a-f*+]+))?"
)


def read(name: str) -> dict[str, list[Step]]:
    """The scripts of a file by their titles."""
    scripts: dict[str, list[Step]] = {}
    script: list[Step] = []
    for line in (_HERE / name).read_text().splitlines():
        if line.startswith("# "):
            assert line[2:] not in scripts, f"{line[2:]!r} is there twice"
            script = scripts[line[2:]] = []
        elif line:
            script += parsed(line)
    return scripts


def add(title: str, script: list[Step]) -> None:
    """Keep a script that the fuzzer found."""
    lines = [f"\n# {title}", *map(written, script)]
    with (_HERE / FOUND).open("a") as file:
        file.write("\n".join(lines) + "\n")


def each_frame_in_each_state() -> Iterator[tuple[str, list[Step]]]:
    """Titles and scripts: the states that a stream can be in, and what then comes for it."""
    opened: Step = ("request", 0, 0, 0, b"")
    states: dict[str, list[Step]] = {
        "idle": [],
        "open": [opened],
        "half-closed (remote)": [("request", 0, 1, 0, b"")],
        "passed over": [("frame", FrameType.HEADERS, 5, 3, bytes.fromhex("838644012f410161"))],
        "within its header block": [("request", 0, 0x80, 0, b"")],
        "answered in part": [opened, ("answer", 0, 0, 1, b"x" * 70_000)],
        "waiting with its trailers": [opened, ("answer", 0, 8, 1, b"x" * 70_000)],
        "ended by both": [("request", 0, 1, 0, b""), ("answer", 0, 8, 1, b"x")],
        "ended by the server alone": [opened, ("answer", 0, 8, 1, b"x")],
        "reset by the server": [opened, ("answer", 0, 2, 1, b"")],
        "reset by the client": [opened, ("frame", FrameType.RST_STREAM, 0, 1, bytes(4))],
        "refused": [("request", 0, 0x40, 0, b"")],
        "draining": [opened, ("answer", 0, 0x81, 1, b"")],
        "beyond the drain": [("answer", 0, 0x80, 0, b""), ("wait", 1, 0, 0, b"")],
    }
    payloads: dict[str, tuple[int, int, bytes]] = {
        "DATA": (FrameType.DATA, 0, b"x" * 100),
        "the last DATA": (FrameType.DATA, 1, b"x" * 100),
        "padded DATA": (FrameType.DATA, 8, b"\x05" + b"x" * 99),
        "DATA beyond the window": (FrameType.DATA, 0x40, b"x" * 16_384),
        "HEADERS": (FrameType.HEADERS, 4, bytes.fromhex("838644012f410161")),
        "the last HEADERS": (FrameType.HEADERS, 5, bytes.fromhex("4003612d62017a")),
        "PRIORITY": (FrameType.PRIORITY, 0, bytes(5)),
        "RST_STREAM": (FrameType.RST_STREAM, 0, bytes(4)),
        "SETTINGS": (FrameType.SETTINGS, 0, b""),
        "PUSH_PROMISE": (FrameType.PUSH_PROMISE, 4, bytes(4)),
        "PING": (FrameType.PING, 0, bytes(8)),
        "GOAWAY": (FrameType.GOAWAY, 0, bytes(8)),
        "WINDOW_UPDATE": (FrameType.WINDOW_UPDATE, 0, b"\0\0\0\1"),
        "WINDOW_UPDATE of 0": (FrameType.WINDOW_UPDATE, 0, bytes(4)),
        "WINDOW_UPDATE beyond all bounds": (FrameType.WINDOW_UPDATE, 0, b"\x7f\xff\xff\xff"),
        "CONTINUATION": (FrameType.CONTINUATION, 4, b""),
        "an unknown frame": (11, 0, b"unknown"),
    }
    for state, before in states.items():
        for name, (kind, flags, payload) in payloads.items():
            times = 3 if name == "DATA beyond the window" else 1
            for stream_id in (0, 1):
                frame: Step = ("frame", int(kind), flags, stream_id, payload)
                where = f"{name} of stream {stream_id}, {state}"
                yield where, [*before, *[frame] * times, ("answer", 0, 8, 0, b"x" * 100)]


def parsed(line: str) -> list[Step]:
    """The steps that a line says."""
    match = _STEP.fullmatch(line)
    assert match is not None, f"expected a step, got {line!r}"
    kind = match["kind"] or "0"
    number = int(kind, 0) if kind[0].isdigit() else FrameType[kind]
    payload = b""
    for part in (match["payload"] or "").split("+"):
        data, _, times = part.partition("*")
        payload += bytes.fromhex(data) * int(times or 1)
    flags, stream_id = int(match["flags"] or "0", 0), int(match["stream"] or 0)
    step = match["what"], int(number), flags, stream_id, payload
    return [step] * int(match["times"] or 1)


def written(step: Step) -> str:
    """The inverse for one step."""
    what, kind, flags, stream_id, payload = step
    line = what
    if what == "frame" and kind in _KINDS:
        line += f" {FrameType(kind).name}"
    elif kind or what == "frame":
        line += f" {kind}"
    line += f" flags={flags:#x}" if flags else ""
    line += f" stream={stream_id}" if stream_id else ""
    if len(payload) > 1 and len(set(payload)) == 1:
        line += f" payload={payload[:1].hex()}*{len(payload)}"
    elif payload:
        line += f" payload={payload.hex()}"
    return line
