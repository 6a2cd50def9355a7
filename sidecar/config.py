"""What a sidecar can be told."""

import shlex
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from sidecar.drain import Policy
from sidecar.engines.adapter import Part
from unbroken.config import Address, ProcessConfig
from unbroken.realtime import RealtimePriority


class SidecarConfig(ProcessConfig):
    """Stands beside an engine: starts it, relays its tokens, knows when it dies."""

    worker_id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")
    """Stable name, unique in the mesh."""
    discovery: Path
    """Directory in which the processes of this machine find each other."""
    listen: Address = "127.0.0.1:0"
    """host:port for frontends; port 0 lets the kernel choose."""
    advertise: Address | None = None
    """host:port under which others reach it, if that is not where it listens."""
    metrics_listen: Address | None = None
    """host:port of the metrics endpoint; none if not given."""
    realtime_priority: RealtimePriority = 0
    """SCHED_RR priority: news of a failure waits for no other process; 0: none."""
    engine: Literal["llama", "simulated"] | None = None
    """Engine of our own to start."""
    engine_options: str = ""
    """Its options, as on a command line."""
    engine_command: str | None = None
    """Command that starts another engine, which is reached at --engine-socket or -address."""
    engine_socket: Path | None = None
    """Unix socket of an engine of our contract; without a command, of one that runs already."""
    engine_protocol: Literal["native", "vllm", "sglang", "trtllm", "openai"] = "native"
    """What the engine speaks: our contract, or, with the extra engines, gRPC of its own or HTTP."""
    engine_address: str | None = Field(default=None, min_length=1)
    """Where an engine of another protocol serves; without a command, one that runs already."""
    engine_tokenizer: Path | None = None
    """Directory with the model's tokenizer.json, for engines that hand out none."""
    engine_part: Part = Part.WHOLE
    """What it does, if other engines do the rest: probes then ask it so that it needs none."""
    engine_model: str = ""
    """Name under which requests ask for the model; empty: the engine's own."""
    engine_context_length: int = Field(0, ge=0, le=16_777_216)
    """Most tokens of prompt and output together, for engines that do not tell; 0: they have to."""
    engine_is_invariant: bool = False
    """You vouch that its logits do not depend on batches, so that streams can go on exactly."""
    engine_numerics: str = ""
    """What else its logits depend on, such as the accelerator; streams move between equal ones."""
    engine_start_timeout_s: float = Field(300.0, gt=0, le=3600)
    """How long the engine may take to load its model."""
    engine_stop_grace_s: float = Field(5.0, ge=0, le=600)
    """How long the engine may take to end after SIGTERM."""
    engine_stall_min_s: float = Field(0.65, ge=0.1, le=60)
    """No engine is called hung for less silence; for a step it gets half as much again."""
    engine_prefill_unmeasured_s: float = Field(60.0, ge=1, le=3600)
    """How long a step may take while prompts are computed, before the rate of that was measured."""
    engine_stall_restart_s: float = Field(5.0, ge=0.1, le=3600)
    """An engine that makes no progress for so long, after it was called stalled, is restarted."""
    canary_period_s: float = Field(10.0, ge=0, le=3600)
    """An engine that computes nothing for so long is asked for a token; 0: never."""
    canary_timeout_s: float = Field(5.0, ge=0.5, le=3600)
    """How long that token may take; then the engine gets no work until it gives one."""
    canary_failures_max: int = Field(3, ge=0, le=1000)
    """An engine that fails so many times in a row is given up: what can be saved is handed over,
    and the sidecar exits with 1. 0: never."""
    canary_prompt: str = Field("", pattern=r"^(\d+(,\d+)*)?$", max_length=1000)
    """Token ids to ask it with, separated by commas; without, how the tokenizer begins a text."""
    canary_text: str = Field("", max_length=1000)
    """A text to ask it with instead, as its tokenizer encodes it."""
    heartbeat_interval_s: float = Field(0.1, ge=0.01, le=10)
    """Between two heartbeats to a frontend."""
    link_silence_max_s: float = Field(5.0, ge=0.1, le=600)
    """A frontend from which nothing comes for so long is lost; its attempts are orphans."""
    link_write_max_s: float = Field(10.0, ge=0.1, le=600)
    """A frontend that reads nothing for so long is lost."""
    orphan_grace_s: float = Field(5.0, ge=0, le=600)
    """How long an attempt goes on without its frontend, unless its request says."""
    deadline_margin_s: float = Field(0.005, ge=0, le=1)
    """So long before an attempt has to be over its engine ends it, so that its frontend hears why;
    at most half of the time that is left."""
    retention_s: float = Field(300.0, ge=0, le=86400)
    """How long the tokens of an attempt that ended are kept."""
    drain_policy: Policy = Policy.HAND_OVER
    """What becomes of streams after SIGTERM: they end here, move after a step, or at budget."""
    drain_budget_s: float = Field(30.0, ge=0, le=86400)
    """With drain policy budget: how long streams run on before they move to other workers."""

    @model_validator(mode="after")
    def _silence_is_noticed(self) -> "SidecarConfig":
        # Silence is judged once a heartbeat, unless we stood still for half of it ourselves.
        if 2 * self.heartbeat_interval_s >= self.link_silence_max_s:
            raise ValueError(
                "expected heartbeat_interval_s below half of link_silence_max_s "
                f"({self.link_silence_max_s:g}), got {self.heartbeat_interval_s:g}"
            )
        return self

    @model_validator(mode="after")
    def _canary_is_quick(self) -> "SidecarConfig":
        # What fails is noticed within two periods.
        if self.canary_period_s and self.canary_timeout_s > self.canary_period_s:
            raise ValueError(
                f"expected canary_timeout_s up to canary_period_s ({self.canary_period_s:g}), got "
                f"{self.canary_timeout_s:g}"
            )
        return self

    @model_validator(mode="after")
    def _canary_asks_one_thing(self) -> "SidecarConfig":
        if self.canary_prompt and self.canary_text:
            raise ValueError("expected canary_prompt or canary_text, got both")
        return self

    @property
    def canary_ids(self) -> tuple[int, ...]:
        """What the canary asks with; empty if it is not configured."""
        return tuple(map(int, filter(None, self.canary_prompt.split(","))))

    @model_validator(mode="after")
    def _one_engine(self) -> "SidecarConfig":
        if self.engine_protocol != "native":
            if self.engine is not None or self.engine_socket is not None:
                raise ValueError(
                    f"expected --engine-address with the protocol {self.engine_protocol}, and "
                    "neither --engine nor --engine-socket"
                )
            if self.engine_address is None:
                raise ValueError(
                    f"expected --engine-address with the protocol {self.engine_protocol}"
                )
        elif self.engine_address is not None:
            raise ValueError("expected --engine-protocol with --engine-address")
        elif self.engine is not None:
            if self.engine_command is not None or self.engine_socket is not None:
                raise ValueError("expected --engine alone, or --engine-socket")
        elif self.engine_socket is None:
            raise ValueError("expected --engine, or --engine-socket with or without a command")
        for name in ("engine_options", "engine_command"):
            try:
                shlex.split(getattr(self, name) or "")
            except ValueError as error:
                raise ValueError(f"{name}: expected words as in a shell: {error}") from None
        return self
