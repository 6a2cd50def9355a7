"""Which protocols there are, and the engine behind a configuration.

A protocol's module is imported when it is asked for: each needs packages of its own (extra
`engines`), which a sidecar with an engine of ours does without.
"""

import importlib
import shlex
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from sidecar.config import SidecarConfig
from sidecar.engines import continuation_key, load_tap
from sidecar.engines.adapter import Adapter
from sidecar.engines.asking import Vouched
from sidecar.engines.base import Engine
from sidecar.engines.calls import CallEngine
from sidecar.engines.lives import Launch
from sidecar.engines.native import NativeEngine
from unbroken.errors import Reason, UnbrokenError

ADAPTERS: Final[Mapping[str, tuple[str, str]]] = {
    "vllm": ("sidecar.engines.vllm", "VllmAdapter"),
    "sglang": ("sidecar.engines.sglang", "SglangAdapter"),
    "trtllm": ("sidecar.engines.trtllm", "TrtllmAdapter"),
    "openai": ("sidecar.engines.openai", "OpenAiAdapter"),
}
"""Module and class of each protocol that is not ours. Called with an address and a tokenizer."""


def engine_of(config: SidecarConfig, directory: Path) -> Engine:
    """The engine, not running yet; a socket of our choosing lies in `directory`.

    Raises `UnbrokenError` if packages for its protocol are missing.
    """
    launch = launch_of(config, directory)
    if config.engine_protocol == "native":
        return NativeEngine(launch)
    if config.engine_protocol == "vllm" and launch.command is not None:
        # Inherited by the engine; nobody else can ask it to take a prompt for its own output.
        continuation_key.choose()
        load_tap.choose(directory)
    vouched = Vouched(
        config.engine_is_invariant,
        config.engine_numerics,
        config.engine_model,
        config.engine_context_length,
    )
    return CallEngine(
        launch,
        adapter_of(config.engine_protocol, config.engine_tokenizer),
        vouched=vouched,
        part=config.engine_part,
    )


def adapter_of(protocol: str, tokenizer: Path | None = None) -> Callable[[str], Adapter]:
    """What opens a connection that speaks `protocol`. Raises `UnbrokenError`."""
    module, name = ADAPTERS[protocol]
    try:
        adapter = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise UnbrokenError(
            Reason.NOT_IMPLEMENTED,
            f"the protocol {protocol} needs the package {error.name}: pip install '.[engines]' "
            "in a checkout",
        ) from error
    return partial(adapter, tokenizer=tokenizer)


def launch_of(config: SidecarConfig, directory: Path) -> Launch:
    """How the engine is started and reached."""
    address = config.engine_address or str(config.engine_socket or directory / "engine.sock")
    command: tuple[str, ...] | None = None
    if config.engine is not None:
        command = (
            *(sys.executable, "-m", "worker", "--engine", config.engine),
            *("--socket", address),
            *shlex.split(config.engine_options),
        )
    elif config.engine_command is not None:
        command = tuple(shlex.split(config.engine_command))
    return Launch(
        command=command,
        address=address,
        start_timeout_s=config.engine_start_timeout_s,
        stop_grace_s=config.engine_stop_grace_s,
    )
