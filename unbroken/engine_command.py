"""Which engine a command starts, what it speaks then, and where. No I/O.

`unbroken run -- vllm serve MODEL --grpc` says all that a sidecar needs to know in the engine's own
words; what is missing is the port, if none is named, and that is added. An engine that is not told
to speak gRPC speaks OpenAI's HTTP.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final

GRPC_FLAGS: Final = ("--grpc", "--smg-grpc-mode", "--grpc-mode")


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """An engine to be started."""

    protocol: str
    """As `--engine-protocol` of a sidecar."""
    address: str
    words: tuple[str, ...]


def recognise(
    words: Sequence[str], free_port: Callable[[], int], *, protocol: str | None = None
) -> EngineCommand:
    """What the command starts, unless `protocol` says what it speaks. Raises ValueError."""
    if not words:
        raise ValueError("expected a command that starts an engine")
    protocol = protocol or _protocol(words)
    port, added = _value(words, "--port"), ()
    if port is None:
        port = str(free_port())
        added = ("--port", port)
    if not port.isdecimal():
        raise ValueError(f"--port: expected a number, got {port}")
    host = _value(words, "--host") or "127.0.0.1"
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"  # From here, everywhere is here.
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return EngineCommand(protocol, address, (*words, *added))


def _protocol(words: Sequence[str]) -> str:
    names = [PurePath(word).name for word in words]
    is_grpc = any(flag in words for flag in GRPC_FLAGS)
    made_by: Mapping[str, bool] = {
        "vllm": "vllm" in names or any(word.startswith("vllm.") for word in words),
        "sglang": "sglang" in names or any(word.startswith("sglang.") for word in words),
        "trtllm": "trtllm-serve" in names,
        "openai": "llama-server" in names,
    }
    found = [protocol for protocol, is_it in made_by.items() if is_it]
    if len(found) != 1:
        raise ValueError(
            f"expected a command of {', '.join(made_by)}, or --protocol, got {' '.join(words)}"
        )
    # The launcher of vLLM that speaks gRPC only needs no flag for it.
    is_grpc = is_grpc or any(word.endswith(".grpc_server") for word in words)
    return found[0] if is_grpc else "openai"


def _value(words: Sequence[str], flag: str) -> str | None:
    """The last value of a flag, written in either way."""
    value = None
    for index, word in enumerate(words):
        if word == flag and index + 1 < len(words):
            value = words[index + 1]
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value
