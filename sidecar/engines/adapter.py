"""What it takes to speak to an engine of another make: one connection, one call per attempt.

An adapter translates and decides nothing. `calls.CallEngine` has everything that is the same for
all of them: lives, slots, windows, deadlines, frames, health, load. So a new engine is one file
with an `Adapter`, a line in `kinds`, and a run of the conformance suite (tests/engines).

What an engine can do is said once, in `Discovered`; nobody asks later which kind it is.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import Final, Protocol, TypeAlias

from unbroken.generation import GenerationParams, TokenLogprobs
from unbroken.outcome import FailureKind, FinishReason
from unbroken.tokenizer import TokenizerAsset
from unbroken.v1 import worker_pb2

# What an adapter says of its engine.


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovered:
    """What an engine told about itself; 0 where it did not."""

    kind: str
    version: str
    model: str
    context_length: int
    tokenizer: TokenizerAsset
    capabilities: worker_pb2.EngineCapabilities
    block_size: int = 0
    kv_blocks: int = 0
    """Of one rank."""
    batch_size_max: int = 0
    prefill_tokens_max: int = 0
    num_ranks: int = 1
    has_own_ids: bool = True
    """The ids that it gives are those that it computed, not made from its text."""
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    """What its logits depend on, as far as it tells: weights, dtype, kernels, parallelism."""


@dataclass(frozen=True, slots=True)
class LoadOfRank:
    """What an engine says of one data-parallel rank; None where it does not."""

    rank: int
    running: int
    waiting: int
    kv_share: float
    """Of its KV blocks, held by what runs: 0 to 1."""
    waiting_tokens: int | None = None
    """Prompt tokens of those that wait, less what its prefix cache saves."""


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """KV blocks became reusable; hashes are the engine's own."""

    rank: int
    parent: int | None
    """The block before the first of these; None: there is none."""
    blocks: Sequence[tuple[int, Sequence[int]]]
    """Each with its tokens; each one follows the one before."""


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """KV blocks were evicted."""

    rank: int
    hashes: Sequence[int]


@dataclass(frozen=True, slots=True)
class BlocksCleared:
    """No KV block is reusable any more."""

    rank: int


Tapped: TypeAlias = LoadOfRank | BlocksStored | BlocksRemoved | BlocksCleared

# What an engine is asked, and what comes of it.


class Part(StrEnum):
    """What an engine does of requests."""

    WHOLE = auto()
    PREFILL = auto()
    """It computes prompts, and others go on from its KV blocks."""
    DECODE = auto()
    """It goes on from KV blocks of others."""


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt as the engine is asked for it. Its engine can do all that the parameters ask."""

    request_id: str
    """Never used twice, whoever asks: engines take two of one name and mix them up."""
    prompt: tuple[int, ...]
    params: GenerationParams
    max_tokens: int
    priority: int = 0
    rank: int | None = None
    """Which data-parallel rank has to compute it; None: whichever."""
    output: tuple[int, ...] = ()
    """What came of it before, elsewhere; of `max_tokens` so many are spent. Asked only of engines
    with `native_resume`."""
    alone: Part = Part.WHOLE
    """Of an engine that does only this, it is asked without the others: a probe, which the engine
    has to compute by itself."""


@dataclass(frozen=True, slots=True)
class End:
    """The engine's last word about a call that it did not fail."""

    reason: FinishReason
    """STOP or LENGTH; CANCELLED if the engine gave it up, asked or not."""
    stop_token_id: int | None = None
    """The token that stopped it, if the engine says so; it may have left it out of the tokens."""
    detail: str = ""


END_REASONS: Final = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
"""What engines call an end that is none of theirs."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What came since the last one: tokens never heard before, in order."""

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()
    """One for each token, if they were asked for."""
    cached_tokens: int = 0
    """Of the prompt, as far as is known by now."""
    end: End | None = None


class CallFailed(Exception):  # noqa: N818 - It names what happened.
    """A call came to nothing. REJECTED and OVERLOAD are about the request; others may be more."""

    def __init__(
        self, failure: FailureKind, detail: str, *, retry_after_s: float | None = None
    ) -> None:
        super().__init__(detail)
        self.failure = failure
        self.detail = detail
        self.retry_after_s = retry_after_s


class NotReady(Exception):  # noqa: N818 - It names what happened.
    """The engine cannot be reached or takes no work yet: ask again."""


class Unusable(Exception):  # noqa: N818 - It names what happened.
    """The engine is there, and cannot be worked with: another protocol, no tokenizer."""


class Unhealthy(Exception):  # noqa: N818 - It names what happened.
    """The engine says that it is dead, or does not answer any more."""


class Adapter(Protocol):
    """One connection to one engine, from `discover` to `close`. Every call has a bound in time."""

    health_timeout_s: float
    """How long an answer about its health may take while it is well."""

    async def discover(self) -> Discovered:
        """Connect and learn what the engine is. Raises `NotReady`, `Unusable`."""
        ...

    def generate(self, call: Call) -> AsyncGenerator[Delta]:
        """Ask for tokens; the last `Delta` has an `end`. Closing it early frees the request.

        Raises `CallFailed`.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """Free what a call holds, besides closing it, if the engine has to be told. No error."""
        ...

    async def check_health(self) -> None:
        """Ask whether the engine lives. Raises `Unhealthy`."""
        ...

    async def load(self) -> Sequence[LoadOfRank]:
        """Poll its load; nothing if it tells none. Raises `CallFailed`."""
        ...

    async def live_load(self) -> AsyncGenerator[LoadOfRank]:
        """Its load at each moment at which it changes, from who knows it first.

        What was said last is so until the end; at once if nobody says it. It is called again.
        """
        for nothing in ():
            yield nothing

    def taps(self) -> AsyncIterator[Tapped]:
        """What it pushes: load and KV events, until it ends; at once if it pushes nothing.

        After its end, or any gap, it is called again. It begins with `BlocksCleared`, unless no
        blocks were told since the last one.
        Raises `CallFailed`.
        """
        ...

    async def close(self) -> None:
        """Nothing of the connection is left. Idempotent."""
        ...
