"""Pages with console blocks, whose outputs are what the commands really show.

A block begins with "```console" and has lines that begin with "$ ", each followed by what that
command shows. The commands of a block run one after the other in one shell.
"""

import asyncio
import json
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"(?<=```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)

# What differs from run to run, and what stands for it. Numbers as strings are 64 bits wide.
_VOLATILE = (
    (re.compile(r'("resume_token": )"[^"]+"'), r'\1"…"'),
    (re.compile(r'("(?:incarnation|epoch)": )"?\d+"?'), r'\1"…"'),
    (re.compile(r'("(?:load_age|admitted_at)": )"[^"]+"'), r'\1"…"'),
    (re.compile(r'("(?:sidecar_pid|engine_pgid)": )\d+'), r"\1…"),
    (re.compile(r',\n *"suspicion": [0-9.e-]+'), ""),  # Absent while it is nothing.
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:…"),
    (re.compile(r'("took_s": )[0-9.]+'), r"\1…"),
)


@dataclass(frozen=True, slots=True)
class Step:
    """A command and what it showed, on both of its outputs."""

    command: str
    output: str


def steps_of(block: str) -> list[Step]:
    """The steps of a console block: lines that begin with "$ ", each with what follows it."""
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    assert parts[0] == "", "a block begins with a command"
    return [Step(*pair) for pair in zip(parts[1::2], parts[2::2], strict=True)]


def blocks_of(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


def normal(output: str) -> str:
    """The output without what differs from run to run."""
    output = "".join(line.rstrip() + "\n" for line in output.splitlines())
    for pattern, stand_in in _VOLATILE:
        output = pattern.sub(stand_in, output)
    return output


def merged(output: str) -> object:
    """What a stream said, however its tokens were spread over messages; other output as it is.

    A client that reads slowly gets fewer and larger messages, and the machine may be busy.
    """
    decoder, position = json.JSONDecoder(), 0
    messages: list[dict[str, Any]] = []
    text = normal(output).replace("…,", "0,").replace("…\n", "0\n").strip()
    while position < len(text):
        try:
            message, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return normal(output)
        last = messages[-1] if messages else {}
        if "token_ids" in message and "token_ids" in last:
            last["token_ids"] += message["token_ids"]
            last["text"] = last.get("text", "") + message.get("text", "")
        else:
            messages.append(message)
        while position < len(text) and text[position].isspace():
            position += 1
    return messages


async def played(block: str, environment: dict[str, str], directory: Path) -> list[Step]:
    """The steps of the block, run anew one after the other in one shell."""
    steps = steps_of(block)
    mark = secrets.token_hex(8)
    script = "".join(f"{step.command}\necho; echo {mark}\n" for step in steps)
    shell = await asyncio.create_subprocess_exec(
        *("bash", "-c", script),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **environment},
        cwd=directory,
    )
    try:
        stdout, _ = await shell.communicate()
    finally:
        if shell.returncode is None:
            shell.kill()
            await shell.wait()
    outputs = stdout.decode().split(f"\n{mark}\n")
    return [Step(step.command, text) for step, text in zip(steps, outputs, strict=False)]
