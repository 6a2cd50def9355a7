"""What a worker can be told."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from unbroken.config import Address, ProcessConfig


class WorkerConfig(ProcessConfig):
    """An engine and the socket at which its sidecar reaches it."""

    socket: Path
    """Unix socket to listen at."""
    engine: Literal["llama", "simulated"] = "llama"
    """What computes tokens: a real model with llama.cpp, or a simulation of one."""
    model: str = ""
    """llama: path of a GGUF file; simulated: name of the model. Empty: the engine's own default."""

    context_length: int = Field(0, ge=0, le=2**24)
    """Most tokens of prompt and output together; 0 lets the engine choose."""
    batch_size_max: int = Field(0, ge=0, le=65_536)
    """Sequences in one step, of each rank; 0 lets the engine choose."""
    prefill_tokens_max: int = Field(0, ge=0, le=2**20)
    """Prompt tokens that one step computes, for each rank; 0 lets the engine choose."""
    waiting_max: int = Field(16_384, ge=1)
    """Attempts that may wait for a place in the batch; more are refused."""
    memory: Path | None = None
    """Directory of this host's memory service: KV blocks are kept there, and taken from there."""
    memory_bytes: int = Field(512 * 1024**2, ge=1024**2, le=2**50)
    """Bytes of blocks and their records that this engine keeps there; then the oldest make room."""
    memory_address: Address | None = None
    """host:port at which other hosts read there (its --listen); they are let in if it is given."""
    memory_peers: tuple[Address, ...] = ()
    """Memory services of other hosts that are trusted to give KV blocks, as host:port."""
    threads: int = Field(0, ge=0, le=1024)
    """llama: threads that compute; 0 lets the engine choose."""

    step_base_ms: float = Field(10.0, ge=0)
    """simulated: milliseconds that every step takes."""
    step_per_sequence_us: float = Field(0.0, ge=0)
    """simulated: microseconds more for each sequence that decodes."""
    prefill_tokens_per_s: float = Field(20_000.0, gt=0)
    """simulated: prompt tokens a second."""
    kv_blocks: int = Field(65_536, ge=1)
    """simulated: KV blocks of each rank."""
    block_size: int = Field(16, ge=1, le=4096)
    """simulated: tokens of a KV block."""
    num_ranks: int = Field(1, ge=1, le=64)
    """simulated: data-parallel ranks."""
    eos_probability: float = Field(0.0, ge=0, lt=1)
    """simulated: how likely each token ends the generation."""
    crash_on_token: int | None = Field(None, ge=0)
    """simulated: a token that kills the engine which has to compute it; for tests of failures."""
    stall_on_token: int | None = Field(None, ge=0)
    """simulated: a token at which the engine stands still for ever."""
    native_resume: bool = True
    """simulated: whether it goes on after past output; without, it knows only prompts."""
    random_source: Literal["positional", "sequential"] = "positional"
    """simulated: random numbers by position, or by how many were drawn before."""
    repetition_penalty_counts_prompt: bool = True
    """simulated: whether the repetition penalty is for tokens of the prompt, too."""
