"""How one output stream survives its workers: its ledger and its migration, no I/O.

    PLACING ──placed──▶ RUNNING ──complete──▶ DONE
       ▲                │  │ ▲                  ▲
       │       unlinked │  │ │ relinked         │
       │                ▼  │ │                  │
       │             UNLINKED ── (resumed) ◀──  │
       │                │  │                    │
       └── lost, refused ──┴── limit, no way ───┘

    RUNNING ──pause──▶ (halting) ──its worker confirms──▶ PAUSED ──proceed──▶ PLACING

Each worker serves under an epoch of its own. Giving up on a worker ends its epoch at once, and
whatever it still sends is dropped, so two workers never speak for the same stream. The ledger is
the truth: a token is in it once, at its offset, whoever produced it; what a worker says again is
compared and not delivered.

A link that broke says nothing about the worker behind it. So the stream is UNLINKED for a short,
bounded time, and adopts its attempt, whose KV is warm, if the link comes back to the same life of
the worker. A stream that begins with a `Past`, because its client brought it here from another
frontend, is UNLINKED from the start: it adopts what runs, or goes on from what its client holds.
What the client claims is compared with what the worker knows (docs/decisions/resume.md).

A stream may be PAUSED for one of a higher priority: its worker is told to end the attempt, and is
listened to until it says that it has. What was delivered until then stays, and the stream goes on
after it, wherever it is placed next. A worker that is lost meanwhile is lost as any other.

The output completes here, not at the worker: the budget, a stop token and a stop string are seen in
the ledger, so a worker that dies after its last token but before its goodbye costs nothing.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from frontend.continuation import (
    Abilities,
    exact_way,
    next_checkpoint,
    way_to_resume,
)
from unbroken.checkpoint import Checkpoint
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation import TokenLogprobs
from unbroken.outcome import (
    ContinuationClass,
    ContinuationPolicy,
    Continued,
    FailureKind,
    FinishReason,
)
from unbroken.tokenizer import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from frontend.convoy import Ride


class Life(NamedTuple):
    """One life of one engine: a worker that restarts is somebody else."""

    worker_id: str
    incarnation: int
    engine_incarnation: int = 0


# Commands: what the shell is asked to do.


@dataclass(frozen=True, slots=True)
class Place:
    """Find a worker for this epoch, after a pause; other lives than `avoid`, if there are any."""

    epoch: int
    avoid: frozenset[Life]
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Start:
    """Begin the attempt."""

    life: Life
    epoch: int
    checkpoint: Checkpoint
    window_tokens: int


@dataclass(frozen=True, slots=True)
class Relink:
    """Wait until the link to this life is up and say `relinked`, or say `lost` if it is gone."""

    epoch: int
    life: Life


@dataclass(frozen=True, slots=True)
class Adopt:
    """Take over the attempt that runs at this life or ended there; be told again from `offset`."""

    life: Life
    epoch: int
    offset: int
    window_tokens: int


@dataclass(frozen=True, slots=True)
class Abort:
    """End the attempt of an epoch that is over, wherever it still runs."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Halt:
    """Have the worker end the current attempt, and go on listening until it says that it has."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Paused:
    """The stream holds nothing anywhere; keep it, and call `proceed` when there is room."""


@dataclass(frozen=True, slots=True)
class Ack:
    """Move the window of the current attempt."""

    epoch: int
    offset: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The stream is done; `Stream.outcome` says how."""


Command: TypeAlias = Place | Start | Relink | Adopt | Abort | Halt | Paused | Ack | Finish


class State(Enum):
    """Where a stream stands."""

    PLACING = auto()
    UNLINKED = auto()
    """Its attempt may live, but there is no link to it."""
    RUNNING = auto()
    PAUSED = auto()
    """It is to go on later, and has no attempt."""
    DONE = auto()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the stream ended, once and for all."""

    finish_reason: FinishReason
    stop: str | None = None
    stop_token_id: int | None = None
    error: UnbrokenError | None = None


@dataclass(slots=True)
class Attempt:
    """One worker's try, as the ledger saw it."""

    epoch: int
    life: Life
    way: ContinuationClass
    """How it went on from the one before; UNSPECIFIED for the first."""
    first_offset: int
    """Offset of the first token it may deliver."""
    end_offset: int
    """Offset after the last token it delivered."""
    failure: FailureKind = FailureKind.UNSPECIFIED
    detail: str = ""
    is_refused: bool = False
    """It did not begin."""
    is_adopted: bool = False
    """It is the attempt before, or that of another frontend, taken over where it ran."""
    gap_s: float | None = None
    """From the last token delivered before it to the first it delivered."""


class Piece(NamedTuple):
    """Output that the client has not been sent."""

    offset: int
    token_ids: Sequence[int]
    text: str
    logprobs: Sequence[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a stream may cost."""

    migrations_max: int = 3
    window_tokens: int = 1024
    """Tokens that the worker may be ahead of the client."""
    placement_timeout_s: float = 30.0
    """How long to look for a worker before the stream fails."""
    regenerate_tokens_max: int = 4096
    relink_s: float = 0.25
    """How long to wait for a link that broke, before the stream goes elsewhere. 0: not at all."""


EPOCH_MAX = 2**64 - 1
GENERATION_BITS = 22
"""Epochs count attempts in so many low bits; above them is the time at which a frontend took the
stream, in milliseconds, so that epochs of a later owner are above all of an earlier one."""
ADOPTION_S_MAX = 3.0
"""How long a sidecar, whose link is up, may take to answer an adoption. Longer than any silent or
deaf link lives: who is merely busy, as this process may be, must not be left for another worker."""
HALT_S_MAX = 3.0
"""How long a worker may take to end an attempt that is to be paused; else it is left."""
BUSY_AT_ONCE = 3
"""So many more refusals by busy workers are bad luck: several frontends want the same room."""
BUSY_PAUSE_S_MAX = 0.02
"""Who was refused by a busy worker knows its load, and would know it soon without."""
_OUTBIDS_MAX = 3
"""How often a new owner asks again with a higher epoch. Bounded: two owners could race."""
_CLOCK_MS_MAX = (1 << 42) - (1 << 20)
"""The latest time that counts, in the year 2109; what is above it is left for owners after those
whose clock says so, or that is beyond."""


def first_epoch(now_ms: int, *, above: int = 0) -> int:
    """Where a new owner's epochs begin: later owners later, and above a known epoch anyway.

    `now_ms` is the time of day, which may be wrong by any amount.
    """
    generation = max(min(now_ms, _CLOCK_MS_MAX), (above >> GENERATION_BITS) + 1)
    return generation << GENERATION_BITS


@dataclass(frozen=True, slots=True)
class Past:
    """What was before this frontend had the stream: its client and its resume token tell."""

    token_ids: Sequence[int] = ()
    """What the client holds, from offset 0."""
    num_text_bytes: int = 0
    num_trusted: int = 0
    """So many of the tokens are surely the stream's; for the others there is the client's word."""
    life: Life | None = None
    """Where its attempt was; None if it had none."""
    started_epoch: int = 0
    """Under which that attempt was started."""
    way: ContinuationClass = ContinuationClass.UNSPECIFIED
    """How that attempt had gone on from the one before."""
    first_offset: int = 0
    """Where that attempt's tokens began, those generated again included."""
    base: int = 0
    """Tokens that the ledger had when that attempt began."""
    serving: Abilities | None = None
    """Of the engine of that attempt."""
    began_with: Abilities | None = None
    """Of the engine that delivered the first token."""
    num_begun: int = 0
    num_losses: int = 0
    is_inexact: bool = False
    """Whether something before `base` was continued inexactly."""
    logprob_sum: float | None = None
    """Of the tokens; None if the client does not say."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What an adopted attempt was started from, as its sidecar says."""

    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    first_offset: int
    seed: int | None
    epoch: int
    """Under which it was started."""


@dataclass(frozen=True, slots=True)
class Standing:
    """All that a resume token says about a stream: the later `Past` of somebody else."""

    epoch: int
    life: Life | None
    started_epoch: int
    way: ContinuationClass
    first_offset: int
    base: int
    serving: Abilities | None
    began_with: Abilities | None
    num_begun: int
    num_losses: int
    is_inexact: bool


class Mismatch(Exception):  # noqa: N818 - it names what happened.
    """What a client claims to hold is not what it was sent; the text says where."""


@dataclass(slots=True)
class Accounts:
    """Work that the client is not billed for, and what a cache saved."""

    recomputed_prefill_tokens: int = 0
    recomputed_decode_tokens: int = 0
    cached_prompt_tokens: int = 0


_NONE = -1
"""No epoch, no offset."""
_ACK_EARLY_SHARE = 1 / 32
"""Of the tokens between two acknowledgements: so many may be missing if one is made on the way."""
_ACK_EARLY_SHARE_OF_MANY = 1 / 2
"""The same where there are `_MANY`: one more acknowledgement is cheaper than one more look."""
_MANY = 256
_ATTEMPTING = frozenset({State.RUNNING, State.UNLINKED})
"""When there is an attempt that can be lost."""
_NOT_COUNTED = frozenset({FailureKind.OVERLOAD, FailureKind.DRAIN, FailureKind.PREEMPTED})
"""A worker that had no room, or that leaves in good order, has not failed the stream."""


class _Flow:
    """What each token touches. Slots of a base class lie first and together: with hundreds of
    streams none of this is in a cache when the next step comes, so every line of it is waited for.
    """

    __slots__ = (
        "_ack_due",
        "_flowing",
        "_last_token_at",
        "_ledger",
        "_max_tokens",
        "_num_decoded",
        "_sent",
        "_stop_token_ids",
        "_texts_apart",
        "_unsent_text",
        "num_moves",
        "outcome",
        "ride",
    )


class Stream(_Flow):
    """One choice of one request, from admission to its outcome.

    The owner calls `start`, then the event methods as things happen, obeys the commands they
    return in order, and calls `take` to send what is new. Times are monotonic seconds.
    """

    __slots__ = (
        "_ack_stride",
        "_attempts",
        "_avoid",
        "_base",
        "_began_with",
        "_bytes",
        "_claimed",
        "_contradicted_at",
        "_detokenizer",
        "_first_offset",
        "_halt_detail",
        "_halted_at",
        "_is_adopting",
        "_is_resumed",
        "_is_resuming",
        "_is_stop_hidden",
        "_life",
        "_limits",
        "_logprob_sum",
        "_logprobs",
        "_min_tokens",
        "_num_begun",
        "_num_losses",
        "_num_outbids",
        "_num_refusals",
        "_placing_since",
        "_policy",
        "_prefill_tokens",
        "_said",
        "_said_from",
        "_serving",
        "_started_epoch",
        "_taken_at",
        "_taken_ms",
        "_tokenizer",
        "_told_again",
        "_unlinked_since",
        "_was_inexact",
        "_way",
        "accounts",
        "epoch",
        "original",
        "state",
    )

    def __init__(
        self,
        original: Checkpoint,
        tokenizer: Tokenizer,
        *,
        policy: ContinuationPolicy = ContinuationPolicy.PREFER_EXACT,
        limits: Limits | None = None,
        epoch: int = 1,
        taken_ms: int | None = None,
        past: Past | None = None,
    ) -> None:
        """Begin with a resolved request: seed and max_tokens are set.

        `epoch` is that of the first attempt, and `taken_ms` the time of day by which it was chosen,
        that of `start`. Raises `Mismatch` if `past` claims what cannot be.
        """
        stopping = original.params.stopping
        assert stopping.max_tokens is not None, "admission resolves max_tokens"
        assert original.params.sampling.is_greedy or original.params.sampling.seed is not None, (
            "a stream without a seed could not be continued"
        )
        self.original = original
        self.state = State.PLACING
        self.epoch = epoch - 1
        """Number of the current attempt, or of the one being placed."""
        self.num_moves = 0
        """How often an attempt was placed: a resume token from before is out of date."""
        self._ledger = array("I")
        self.ride: Ride | None = None
        """By which its tokens go to its client, when there is one; see `frontend.convoy`. Until it
        settles it has the last of them, which all have been sent. Whatever but asking is done with
        the stream, it steps out before."""
        self._attempts: list[Attempt] = []
        self.accounts = Accounts()
        self.outcome: Outcome | None = None
        self._policy = policy
        self._limits = limits or Limits()
        self._max_tokens = stopping.max_tokens
        self._min_tokens = stopping.min_tokens
        eos = frozenset[int]() if stopping.ignore_eos else tokenizer.asset.eos_token_ids
        # The same set for all streams that name no ids of their own: it stays in the cache.
        self._stop_token_ids = stopping.stop_token_ids | eos if stopping.stop_token_ids else eos
        self._tokenizer = tokenizer
        self._detokenizer = self._new_detokenizer()
        self._texts_apart = self._detokenizer.texts_apart
        self._bytes = tokenizer.pieces
        self._sent = 0  # Tokens that the client was sent,
        self._unsent_text = ""  # and the text that it was not.
        self._num_decoded = 0  # Tokens of the ledger that the detokenizer has seen.
        self._flowing = _NONE  # Epoch of an attempt whose next token needs no more than `token`.
        window = self._limits.window_tokens
        self._ack_stride = max(1, window // 2) if window else self._max_tokens + 1
        self._ack_due = self._ack_stride  # Where the worker is to be told to go on.
        self._avoid: frozenset[Life] = frozenset()
        self._serving: Abilities | None = None  # Of the current attempt's engine.
        self._began_with: Abilities | None = None  # Of the engine that delivered the first token.
        self._num_begun = 0  # Attempts that were not refused.
        self._num_losses = 0
        self._num_refusals = 0
        self._prefill_tokens = 0  # What the current attempt added to the accounts.
        self._said = 0  # Offset after the last token that the current attempt said, and that of
        self._said_from = 0  # its first. As long as it flows, the first is settled by `_settle`.
        self._logprob_sum: float | None = 0.0
        self._logprobs: list[TokenLogprobs] = []  # Of the last tokens in the ledger; all of ours.
        self._placing_since = 0.0
        self._unlinked_since = 0.0
        self._last_token_at: float | None = None
        self._is_stop_hidden = False  # The last token is a stop token: no part of the text.
        self._life: Life | None = None  # Of the current or latest attempt.
        self._way = ContinuationClass.UNSPECIFIED  # In which that attempt went on.
        self._started_epoch = 0  # Under which it began; an adoption does not change it.
        self._first_offset = 0  # Of what that attempt produces, counting what comes again.
        self._base = 0  # Size of the ledger when that attempt began.
        self._is_adopting = False  # The sidecar has not answered yet.
        self._halted_at: float | None = None  # Since then its worker is to end the attempt.
        self._halt_detail = ""
        self._told_again = 0  # Before this offset an adopted attempt repeats; nothing is computed.
        self._is_resuming = past is not None  # Until an attempt is ours.
        self._claimed = range(0)  # Offsets for which there is only the client's word.
        self._contradicted_at = _NONE
        self._num_outbids = 0
        self._is_resumed = past is not None
        self._taken_ms = epoch >> GENERATION_BITS if taken_ms is None else taken_ms
        self._taken_at = 0.0  # The same moment, in monotonic seconds.
        self._was_inexact = False
        if past is not None:
            self._recall(past)

    # Questions.

    @property
    def ledger(self) -> "array[int]":
        """Every token so far, at its offset."""
        if self.ride is not None and self.ride.is_on:
            self.ride.settle()
        return self._ledger

    @property
    def attempts(self) -> list[Attempt]:
        """All so far, the current or latest last."""
        self._settle()
        return self._attempts

    @property
    def has_output(self) -> bool:
        """Whether `take` would return something worth sending."""
        num_tokens = len(self.ledger)
        return self._sent < num_tokens or bool(self._unsent_text)

    @property
    def num_sent(self) -> int:
        """Tokens that the client was sent."""
        if self.ride is not None and self.ride.is_on:
            self.ride.settle()
        return self._sent

    @property
    def has_begun(self) -> bool:
        """Whether an attempt has begun, here or at another frontend."""
        return self._num_begun > 0

    @property
    def was_attempted(self) -> bool:
        """Whether a worker was asked, here or at another frontend."""
        return self._num_begun > 0 or bool(self._attempts)

    @property
    def is_prefilled(self) -> bool:
        """Whether the current attempt has said a token: what it had to compute before is there."""
        is_flowing = self._flowing != _NONE
        return self.state is State.RUNNING and (is_flowing or self._said > self._said_from)

    @property
    def is_halting(self) -> bool:
        """Whether its worker is to end the attempt, and has not said that it did."""
        return self._halted_at is not None

    @property
    def was_paused(self) -> bool:
        """Whether its latest attempt ended because the stream was paused."""
        return bool(self._attempts) and self._attempts[-1].failure is FailureKind.PREEMPTED

    @property
    def num_left_max(self) -> int:
        """Tokens that the output may still have."""
        return self._max_tokens - len(self.ledger)

    @property
    def way_back(self) -> ContinuationClass:
        """How it would go on after a pause, at an engine like that of its attempt; NONE if it must
        not be paused now.
        """
        if (
            self.state is not State.RUNNING
            or self._is_adopting
            or self._is_resuming
            or self._halted_at is not None
            or self._policy is ContinuationPolicy.NEVER
            or self._serving is None
        ):
            return ContinuationClass.NONE
        return self.way_at(self._serving)

    @property
    def continued(self) -> Continued:
        """Whether the output went on elsewhere, and how exactly."""
        if self._is_inexact:
            return Continued.INEXACT
        return Continued.EXACT if self._num_begun > 1 else Continued.NEVER

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum over the output, if log probabilities were asked for."""
        return None if self.original.params.num_top_logprobs is None else self._logprob_sum

    @property
    def standing(self) -> Standing:
        """What a resume token has to say about it now."""
        return Standing(
            epoch=self.epoch,
            life=self._life,
            started_epoch=self._started_epoch,
            way=self._way,
            first_offset=self._first_offset,
            base=self._base,
            serving=self._serving,
            began_with=self._began_with,
            num_begun=self._num_begun,
            num_losses=self._num_losses,
            is_inexact=self._is_inexact,
        )

    def way_at(self, abilities: Abilities) -> ContinuationClass:
        """How the stream would go on now at an engine with these abilities; NONE if not at all."""
        if not self._num_begun:
            return ContinuationClass.UNSPECIFIED
        return way_to_resume(
            self.original,
            self.ledger,
            self._delivered_bytes(),
            abilities,
            began_with=self._began_with,
            is_exact=not self._is_inexact,
            is_inexact_allowed=self._policy is ContinuationPolicy.ALLOW_INEXACT,
            regenerate_tokens_max=self._limits.regenerate_tokens_max,
        ).way

    def deadline(self) -> float | None:
        """When `handle_timeout` is due if nothing happens before."""
        if self.state is State.PLACING:
            return self._placing_since + self._limits.placement_timeout_s
        if self.state is State.UNLINKED:
            return self._unlinked_since + self._limits.relink_s
        if self.state is State.RUNNING and self._is_adopting:
            return self._unlinked_since + ADOPTION_S_MAX
        if self.state is State.RUNNING and self._halted_at is not None:
            return self._halted_at + HALT_S_MAX
        return None

    # Events.

    def start(self, now: float) -> list[Command]:
        """The request was admitted."""
        if self.state is State.DONE:
            return []  # Cancelled before it began, or complete in what its client holds.
        self._placing_since = self._unlinked_since = self._taken_at = now
        if self._is_resuming and self._life is not None:
            self.state = State.UNLINKED
            self.epoch += 1
            return [Relink(self.epoch, self._life)]
        return [self._place()]

    def placed(
        self,
        epoch: int,
        life: Life,
        abilities: Abilities,
        *,
        way: ContinuationClass | None = None,
    ) -> list[Command]:
        """A worker was found for this epoch. `way_at(abilities)` MUST not be NONE; `way` is that,
        if it was asked since the epoch began.
        """
        if epoch != self.epoch or self.state is not State.PLACING:
            return []
        way = self.way_at(abilities) if way is None else way
        assert way is not ContinuationClass.NONE, "placement asks way_at first"
        resumed = len(self.ledger)
        if way is ContinuationClass.UNSPECIFIED:
            checkpoint = self.original
            self._prefill_tokens = 0
        else:
            checkpoint = next_checkpoint(
                self.original, self.ledger, self._delivered_bytes(), way, abilities
            )
            self._prefill_tokens = len(checkpoint.prompt_token_ids)
            self._prefill_tokens += len(checkpoint.output_token_ids)
            self.accounts.recomputed_prefill_tokens += self._prefill_tokens
        self.state = State.RUNNING
        self.num_moves += 1
        self._num_begun += 1
        self._is_resuming = False
        self._serving = abilities
        self._life, self._way, self._base = life, way, resumed
        self._started_epoch = epoch
        self._said = self._said_from = self._first_offset = checkpoint.first_offset
        self._ack_due = checkpoint.first_offset + self._ack_stride
        self._told_again = 0
        self.attempts.append(Attempt(epoch, life, way, resumed, resumed))
        window = self._limits.window_tokens
        return [Start(life, epoch, checkpoint, window), *self._ack()]

    def token(self, epoch: int, offset: int, token_id: int, now: float) -> Sequence[Command]:
        """As `tokens`, for one token without log probabilities. The hot path.

        Short for a token that neither begins an attempt nor can end the output; its text can wait
        until it is sent.
        """
        if self.ride is not None and self.ride.is_on:
            self.ride.step_out()
        if (
            epoch != self._flowing
            or offset != len(self._ledger)
            or offset + 1 == self._max_tokens
            or token_id in self._stop_token_ids
        ):
            return self.tokens(epoch, offset, (token_id,), now)
        self._ledger.append(token_id)
        self._last_token_at = now
        return ()

    def tokens(
        self,
        epoch: int,
        offset: int,
        token_ids: Sequence[int],
        now: float,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> Sequence[Command]:
        """The attempt produced tokens, the first of which stands at `offset`."""
        if self.ride is not None and self.ride.is_on:
            self.ride.step_out()
        if (
            epoch == self._flowing
            and offset == len(self._ledger)
            and offset + len(token_ids) < self._max_tokens
            and not logprobs
            and self._stop_token_ids.isdisjoint(token_ids)
        ):  # As in `token`.
            self._ledger.extend(token_ids)
            self._last_token_at = now
            return ()
        if epoch != self.epoch or self.state is not State.RUNNING:
            return ()  # Late news of an epoch that is over.
        self._settle()
        if self._is_adopting:
            return self.lost(epoch, FailureKind.PROTOCOL, "tokens before the adoption", now)
        if offset != self._said:
            return self.lost(
                epoch,
                FailureKind.PROTOCOL,
                f"expected a token at offset {self._said}, got offset {offset}",
                now,
            )
        known = len(self.ledger)
        if offset != known:
            num_again = min(known - offset, len(token_ids))
            wrong = _first_difference(token_ids[:num_again], self.ledger[offset:])
            if wrong is not None:
                return self._contradicted(offset + wrong, now)
            self._said += num_again
            num_told = min(max(0, self._told_again - offset), num_again)
            if num_told and offset <= self._claimed.start:
                # It is no mere claim any more.
                confirmed = max(self._claimed.start, offset + num_told)
                self._claimed = range(confirmed, max(confirmed, self._claimed.stop))
            self.accounts.recomputed_decode_tokens += num_again - num_told
            token_ids = token_ids[num_again:]
            logprobs = logprobs[num_again:]
            if not token_ids:
                return ()
        attempt = self.attempts[-1]
        if attempt.gap_s is None and self._last_token_at is not None and len(self.attempts) > 1:
            attempt.gap_s = now - self._last_token_at
        self._last_token_at = now
        return self._append(attempt, token_ids, logprobs)

    def ended(
        self,
        epoch: int,
        end_offset: int,
        finish_reason: FinishReason,
        *,
        now: float,
        stop_token_id: int | None = None,
        failure: FailureKind = FailureKind.UNSPECIFIED,
        detail: str = "",
        cached_tokens: int = 0,
        restored_tokens: int = 0,
        is_expired: bool = False,
    ) -> list[Command]:
        """The worker's last word about the attempt; `is_expired`: its deadline has passed."""
        attempts = self.attempts
        if epoch != self.epoch or not attempts or attempts[-1].epoch != epoch:
            return []
        if self._num_begun == 1:
            self.accounts.cached_prompt_tokens = cached_tokens
        last = attempts[-1]
        # What nobody had begun does not go on, though prompts of others may have been there.
        if restored_tokens and last.first_offset and last.way is ContinuationClass.NATIVE:
            last.way = ContinuationClass.RESTORE
        num_saved = min(cached_tokens + restored_tokens, self._prefill_tokens)
        self.accounts.recomputed_prefill_tokens -= num_saved
        self._prefill_tokens = 0  # A goodbye that comes twice counts once.
        if self.state is not State.RUNNING:
            return []  # The ledger knew already.
        if finish_reason in {FinishReason.STOP, FinishReason.LENGTH}:
            if end_offset != self._said:
                return self.lost(
                    epoch,
                    FailureKind.PROTOCOL,
                    f"ended at offset {end_offset} after tokens up to offset {self._said}",
                    now,
                )
            if end_offset != len(self.ledger):
                return self.lost(
                    epoch,
                    FailureKind.DIVERGED,
                    f"generated again, it ended at offset {end_offset} of {len(self.ledger)}",
                    now,
                )
            return self._done(Outcome(finish_reason, stop_token_id=stop_token_id))
        if is_expired and finish_reason is FinishReason.CANCELLED:
            return self._fail(UnbrokenError(Reason.DEADLINE_EXCEEDED, "the client's time is up"))
        if self._halted_at is not None and finish_reason is FinishReason.CANCELLED:
            return self._pause()
        if failure is FailureKind.FENCED:
            # Somebody with a higher epoch has the stream: to go on would be to steal it back.
            attempts[-1].failure, attempts[-1].detail = failure, detail
            return self._fail(UnbrokenError(Reason.FENCED, detail or "the stream has a new owner"))
        kind = failure or FailureKind.ENGINE_ERROR
        detail = detail or f"ended with {finish_reason.name}"
        # What nobody read any more was ended by its sidecar, or by who left it: no worker failed.
        is_counted = not attempts[-1].is_adopted or not (
            finish_reason is FinishReason.CANCELLED or failure is FailureKind.PARTITION
        )
        return self._lost(kind, detail, now, is_counted=is_counted)

    def unlinked(self, epoch: int, detail: str, now: float) -> list[Command]:
        """The link broke, and nothing is known of the worker behind it."""
        if self._is_adopting or self._limits.relink_s == 0:
            return self.lost(epoch, FailureKind.PARTITION, detail, now)
        if epoch != self.epoch or self.state is not State.RUNNING:
            return []
        attempt = self.attempts[-1]
        attempt.failure, attempt.detail = FailureKind.PARTITION, detail
        self.state = State.UNLINKED
        self._halted_at = None
        self._flow_no_more()
        self._unlinked_since = now
        return [Relink(epoch, attempt.life)]

    def relinked(self, epoch: int, now: float) -> list[Command]:
        """The link to the life of the last attempt is up."""
        if epoch != self.epoch or self.state is not State.UNLINKED:
            return []
        self.epoch += 1
        self._unlinked_since = self._placing_since = now
        return self._adopt()

    def adopted(self, epoch: int, end_offset: int, origin: Origin, now: float) -> Sequence[Command]:
        """The sidecar gave us the attempt, which has got to `end_offset`; its tokens follow."""
        if epoch != self.epoch or self.state is not State.RUNNING or not self._is_adopting:
            return []
        self._is_adopting = False
        self._told_again = end_offset
        if self._is_resuming:
            return self._verify(epoch, end_offset, origin, now)
        if end_offset < self._said:
            detail = f"it had got to offset {self._said}, says to be at {end_offset}"
            return self.lost(epoch, FailureKind.PROTOCOL, detail, now)
        return []

    def lost(self, epoch: int, failure: FailureKind, detail: str, now: float) -> list[Command]:
        """The attempt is over before the output: migrate, or give up."""
        if epoch != self.epoch or self.state not in _ATTEMPTING:
            return []
        return self._lost(failure, detail, now)

    def _lost(
        self, failure: FailureKind, detail: str, now: float, *, is_counted: bool = True
    ) -> list[Command]:
        if not is_counted and failure is FailureKind.ENGINE_ERROR:
            failure = FailureKind.PARTITION  # Whoever had it has let it go: no engine failed.
        attempts = self.attempts
        attempt = attempts[-1] if attempts else None  # None: of another frontend.
        if attempt is not None:
            attempt.failure, attempt.detail = failure, detail
        assert self._life is not None, "what is lost was somewhere"
        if is_counted:
            self._avoid |= {self._life}
        aborted = Abort(self.epoch)
        self._is_adopting = self._is_resuming = False
        if failure is FailureKind.REJECTED:
            error = UnbrokenError(Reason.REJECTED_BY_ENGINE, detail)
            return [aborted, *self._fail(error)]
        if self._policy is ContinuationPolicy.NEVER:
            return [aborted, *self._fail(self._worker_lost(failure, detail))]
        if (
            failure is FailureKind.OVERLOAD
            and attempt is not None
            and attempt.end_offset == attempt.first_offset
        ):
            # As good as refused: else a stream could be handed round for ever.
            return [aborted, self._place_after_refusal()]
        if is_counted and failure not in _NOT_COUNTED:
            self._num_losses += 1
        if self._num_losses > self._limits.migrations_max:
            error = UnbrokenError(
                Reason.MIGRATIONS_EXHAUSTED,
                f"lost {self._num_losses} workers, of which {self._limits.migrations_max} were "
                f"allowed; the last: {failure.name}: {detail}",
            )
            return [aborted, *self._fail(error)]
        self._placing_since = now
        return [aborted, self._place()]

    def refused(
        self,
        epoch: int,
        kind: FailureKind,
        detail: str,
        *,
        now: float,
        epoch_known: int = 0,
        is_busy: bool = False,
    ) -> list[Command]:
        """The worker did not begin the attempt, or did not let it be adopted.

        `is_busy`: it has more than thresholds allow, which says nothing about the stream: it looks
        for a worker as if it had not been there.
        """
        if epoch != self.epoch or self.state is not State.RUNNING:
            return []
        attempt = self.attempts[-1]
        attempt.failure, attempt.detail = kind, detail
        attempt.is_refused = True
        if self._is_adopting:
            return self._not_adopted(kind, detail, epoch_known, now)
        self._num_begun -= 1
        self.accounts.recomputed_prefill_tokens -= self._prefill_tokens
        if kind is FailureKind.FENCED and epoch_known >= epoch:
            if self._may_outbid(epoch_known, now):
                self.epoch = self._outbid(epoch_known) - 1
                return [self._place_after_refusal()]
            is_known = self._num_begun or self._is_resumed
            reason = Reason.FENCED if is_known else Reason.REQUEST_EXISTS
            detail = f"epoch {epoch} is not above epoch {epoch_known}: {detail}"
            return self._fail(UnbrokenError(reason, detail))
        if kind is FailureKind.REJECTED:
            return self._fail(UnbrokenError(Reason.REJECTED_BY_ENGINE, detail))
        if is_busy and not self.ledger:
            self._attempts.pop()
            self._life = self._attempts[-1].life if self._attempts else None
            self._num_refusals += 1
            return [self._place(min(_pause_s(self._num_refusals - BUSY_AT_ONCE), BUSY_PAUSE_S_MAX))]
        self._avoid |= {attempt.life}
        return [self._place_after_refusal()]

    def pause(self, detail: str, now: float) -> list[Command]:
        """It is to make room; `detail` says for whom. Nothing happens if `way_back` is NONE.

        What the attempt still delivers counts, and if that completes the output it is complete.
        """
        if self.way_back is ContinuationClass.NONE:
            return []
        self._halted_at, self._halt_detail = now, detail
        return [Halt(self.epoch)]

    def proceed(self, now: float) -> list[Command]:
        """There is room for it again, or it has been paused for long enough."""
        if self.state is not State.PAUSED:
            return []
        self._placing_since = now
        return [self._place()]

    def unplaceable(self, epoch: int, error: UnbrokenError) -> list[Command]:
        """No worker can ever take this epoch."""
        if epoch != self.epoch or self.state is not State.PLACING:
            return []
        return self._fail(error)

    def cancelled(self, error: UnbrokenError) -> list[Command]:
        """The client left, its deadline passed, or somebody entitled to cancelled the request."""
        if self.state is State.DONE:
            return []
        aborted: list[Command] = [Abort(self.epoch)] if self.state is State.RUNNING else []
        is_cancel = error.reason is Reason.CANCELLED
        reason = FinishReason.CANCELLED if is_cancel else FinishReason.ERROR
        return [*aborted, *self._done(Outcome(reason, error=error))]

    def handle_timeout(self, now: float) -> list[Command]:
        """Time passed; see `deadline`."""
        due = self.deadline()
        if due is None or now < due:
            return []
        if self.state is State.UNLINKED:
            detail = f"no link for {self._limits.relink_s:g} s"
            return self._lost(FailureKind.PARTITION, detail, now)
        if self.state is State.RUNNING and self._halted_at is not None:
            detail = f"it did not end the attempt for {HALT_S_MAX:g} s"
            self._avoid |= {self.attempts[-1].life}  # But what we asked for is no loss.
            return self._lost(FailureKind.HANG, detail, now, is_counted=False)
        if self.state is State.RUNNING:
            detail = f"no answer to an adoption for {ADOPTION_S_MAX:g} s"
            return self._lost(FailureKind.HANG, detail, now)
        waited = self._limits.placement_timeout_s
        last = self.attempts[-1] if self.attempts else None
        if last is None or not self._num_begun:
            detail = f"no worker for {waited:g} s"
            if last is not None:
                detail = f"{last.failure.name}: {last.detail}; {detail}"
            return self._fail(UnbrokenError(Reason.NO_WORKER, detail, retry_after_s=waited))
        return self._fail(
            self._worker_lost(last.failure, f"{last.detail}; no other worker for {waited:g} s")
        )

    def take(self) -> tuple[Piece, Sequence[Command]]:
        """All output that the client has not been sent; it counts as sent from now on."""
        if self.ride is not None and self.ride.is_on:
            self.ride.step_out()
        self._decode()
        sent = self._sent
        piece = Piece(
            offset=sent,
            token_ids=self.ledger[sent:],
            text=self._unsent_text,
            logprobs=self._logprobs[self._logprobs_from(sent) :] if self._logprobs else (),
        )
        self._sent = len(self.ledger)
        self._unsent_text = ""
        return piece, self._ack()

    def take_one(self) -> tuple[int, int] | None:
        """As `take` after most steps: the offset and the id of one token whose text is its own.

        None, and nothing is taken, if there is more to it: several tokens, text that was held back
        or is incomplete, log probabilities, or a window that has to move. Then `take` has it.
        """
        if self.ride is not None and self.ride.is_on:
            self.ride.step_out()
        offset, ledger, texts = self._sent, self._ledger, self._texts_apart
        end = offset + 1
        if (
            end != len(ledger)
            or offset != self._num_decoded  # It did not come by the short way.
            or end >= self._ack_due
            or self._unsent_text
            or not texts
        ):
            return None
        token_id = ledger[offset]
        if texts[token_id] is None:
            return None
        self._sent = self._num_decoded = end
        return offset, token_id

    # For its ride.

    def is_flowing(self, epoch: int) -> bool:
        """Whether the next token of that attempt needs no more than `token` does with most."""
        return epoch == self._flowing

    @property
    def num_settled(self) -> int:
        """Tokens of the ledger, without those that its ride has."""
        return len(self._ledger)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Those that may end the output."""
        return self._stop_token_ids

    @property
    def num_plain_max(self) -> int:
        """So many tokens that come next can neither end the output nor move the window, if each is
        `take_one`d as it comes; 0 if something is still to be told, or text waits for more.
        """
        num_tokens = len(self._ledger)
        if (
            self._sent != num_tokens
            or self._num_decoded != num_tokens
            or self._unsent_text
            or not self._texts_apart
        ):
            return 0
        return max(0, min(self._max_tokens, self._ack_due) - 1 - num_tokens)

    def rode(self, token_ids: Sequence[int], now: float) -> int:
        """These came, the last of them at `now`, and the client was sent them one by one.

        Returns the offset of the first.
        """
        offset = len(self._ledger)
        self._ledger.extend(token_ids)
        self._sent = self._num_decoded = len(self._ledger)
        self._last_token_at = now
        return offset

    @property
    def is_ack_near(self) -> bool:
        """Whether the worker, if one is at it, is soon to be told to go on."""
        return self._sent >= self._ack_due - self._num_acked_early

    def acknowledge_early(self) -> Sequence[Command]:
        """Let the worker go on earlier than it must, so that the ride need not end for it."""
        return self._ack(self._num_acked_early)

    @property
    def _num_acked_early(self) -> int:
        if not self._limits.window_tokens:
            return 0
        is_of_many = self._ack_stride >= _MANY
        share = _ACK_EARLY_SHARE_OF_MANY if is_of_many else _ACK_EARLY_SHARE
        return int(share * self._ack_stride)

    # What there is to tell again.

    def can_rewind(self, offset: int) -> bool:
        """Whether all from this offset on can be told again: some log probabilities cannot."""
        return self._logprob_base <= offset or self.original.params.num_top_logprobs is None

    def text_after(self, token_ids: Sequence[int], num_text_bytes: int) -> str:
        """The text that somebody lacks who holds these tokens and so much text.

        Raises `Mismatch` if that is not what was sent.
        """
        num_held = len(token_ids)
        if num_held > len(self.ledger):
            raise Mismatch(f"expected at most {len(self.ledger)} tokens, got {num_held}")
        if (wrong := _first_difference(token_ids, self.ledger)) is not None:
            raise Mismatch(f"the token at offset {wrong} is another one")
        detokenizer = self._new_detokenizer()
        is_complete = self.outcome is not None and self.outcome.error is None
        certain = detokenizer.push(self._shown(0, num_held))
        rest = detokenizer.push(self._shown(num_held, len(self.ledger)))
        rest += detokenizer.flush() if is_complete else ""
        if is_complete and num_held == len(self.ledger):
            certain, rest = certain + rest, ""
        return _after_bytes(certain, num_text_bytes) + rest

    def rewind(self, num_held: int, unsent_text: str) -> Sequence[Command]:
        """Somebody reads on who holds so many tokens, and lacks that text: the rest is told again.

        Who read before may have gone before all that he took had left, so that its acknowledgement
        was never sent. The window begins where the new reader is, at least.
        """
        if self.ride is not None and self.ride.is_on:
            self.ride.step_out()
        self._decode()  # What has been decoded then is all there is, and is replaced here.
        self._sent, self._unsent_text = num_held, unsent_text
        if self._limits.window_tokens:
            self._ack_due = num_held
        return self._ack()

    def check(self) -> None:
        """Assert what is always true."""
        assert self._sent <= len(self.ledger) <= self._max_tokens, "the budget holds"
        assert (self.outcome is not None) == (self.state is State.DONE), "one outcome, at the end"
        epochs = [attempt.epoch for attempt in self.attempts]
        assert epochs == sorted(set(epochs)), "each attempt has an epoch of its own"
        for before, after in zip(self.attempts, self.attempts[1:], strict=False):
            assert before.end_offset <= after.first_offset, "attempts do not overlap"
        assert self._num_losses <= self._limits.migrations_max + 1, "losses are bounded"
        assert self._halted_at is None or self.state is State.RUNNING, "what runs is halted"

    # What happens inside.

    @property
    def _is_inexact(self) -> bool:
        """Whether some of the output is not that of an undisturbed run."""
        return self._was_inexact or any(
            attempt.way is ContinuationClass.INEXACT and attempt.end_offset > attempt.first_offset
            for attempt in self.attempts
        )

    def _pause(self) -> list[Command]:
        """The worker has ended the attempt, as it was told."""
        attempt = self.attempts[-1]
        attempt.failure, attempt.detail = FailureKind.PREEMPTED, self._halt_detail
        self.state = State.PAUSED
        self._halted_at = None
        self._flow_no_more()
        return [Paused()]

    def _place_after_refusal(self) -> Place:
        """Nothing was lost, so it is no migration; the wait for a worker goes on where it was."""
        self._num_refusals += 1
        return self._place(_pause_s(self._num_refusals))

    def _recall(self, past: Past) -> None:
        """Bring the ledger, the text and the counts to where the client is."""
        num_held = len(past.token_ids)
        if num_held > self._max_tokens:
            raise Mismatch(f"expected at most {self._max_tokens} tokens, got {num_held}")
        if num_held and past.num_begun == 0:
            raise Mismatch(f"expected no tokens of a stream that had not begun, got {num_held}")
        outcome = self._enter(past.token_ids, ()) if num_held else None
        if len(self.ledger) < num_held:
            raise Mismatch(f"expected no token after the end at {len(self.ledger)}")
        if outcome is not None:
            self._done(outcome)
        self._unsent_text = _after_bytes(self._unsent_text, past.num_text_bytes)
        self._sent = num_held
        self._life, self._way, self._base = past.life, past.way, past.base
        self._started_epoch = past.started_epoch
        self._first_offset = self._said = past.first_offset
        self._serving = past.serving
        # If none had delivered when the token was made, whoever served then did it since.
        self._began_with = (past.began_with or past.serving) if num_held else None
        self._num_begun, self._num_losses = past.num_begun, past.num_losses
        self._claimed = range(min(past.num_trusted, num_held), num_held)
        self._logprob_sum = past.logprob_sum if num_held else 0.0
        is_of_attempt = num_held > past.base
        self._was_inexact = past.is_inexact or (
            is_of_attempt and past.way is ContinuationClass.INEXACT
        )

    def _adopt(self) -> list[Command]:
        life, size = self._life, len(self.ledger)
        assert life is not None, "what is adopted is somewhere"
        self.state = State.RUNNING
        self._is_adopting = True
        self._ack_due = self._said + self._ack_stride
        self.attempts.append(Attempt(self.epoch, life, self._way, size, size, is_adopted=True))
        adopt = Adopt(life, self.epoch, self._said, self._limits.window_tokens)
        return [adopt, *self._ack()]

    def _not_adopted(
        self, kind: FailureKind, detail: str, epoch_known: int, now: float
    ) -> list[Command]:
        """The worker lives, but the attempt is not to be had there."""
        if kind is FailureKind.FENCED and epoch_known >= self.epoch:
            if not self._is_resuming or first_epoch(0, above=epoch_known) > EPOCH_MAX:
                return self._fail(UnbrokenError(Reason.FENCED, detail))
            if self._num_outbids < _OUTBIDS_MAX:
                # Another reader was here before; the latest that its client sent counts.
                self.epoch = self._outbid(epoch_known)
                return self._adopt()
        return self._lost(kind, detail, now, is_counted=False)

    def _may_outbid(self, epoch_known: int, now: float) -> bool:
        """Whether to ask again above an epoch that a worker knows, rather than give way to it.

        By its epoch another owner took the stream at a time of his clock. If that is later than it
        is now, clocks disagree, and he may well have been here before; if not, he may have
        overtaken us. Who has begun an attempt of his own, and is refused, was overtaken; to have
        adopted one that was over proves nothing.
        """
        has_begun = any(not (attempt.is_refused or attempt.is_adopted) for attempt in self.attempts)
        now_ms = self._taken_ms + (now - self._taken_at) * 1000
        return (
            not has_begun
            and self._num_outbids < _OUTBIDS_MAX
            and epoch_known >> GENERATION_BITS > now_ms
            and first_epoch(0, above=epoch_known) <= EPOCH_MAX
        )

    def _outbid(self, epoch_known: int) -> int:
        self._num_outbids += 1
        return first_epoch(0, above=epoch_known)

    def _verify(self, epoch: int, end_offset: int, origin: Origin, now: float) -> list[Command]:
        """Compare what the client claims with what the worker was given and has produced.

        What the worker produced is told again from its first token on, and compared as it comes.
        """
        prompt, sampling = self.original.prompt_token_ids, self.original.params.sampling
        given = [*origin.prompt_token_ids[len(prompt) :], *origin.output_token_ids]
        if given and max(given) >= len(self._bytes):
            detail = f"expected token ids below {len(self._bytes)}, got {max(given)}"
            return self._lost(FailureKind.PROTOCOL, detail, now)
        seed = None if sampling.is_greedy else sampling.seed
        if (
            origin.epoch != self._started_epoch
            or tuple(origin.prompt_token_ids[: len(prompt)]) != prompt
            or (seed is not None and origin.seed != seed)
            or origin.first_offset != self._said
            or len(given) != origin.first_offset
        ):
            detail = "the worker has another attempt at the stream than the token names"
            return self._lost(FailureKind.PARTITION, detail, now, is_counted=False)
        num_held = len(self.ledger)
        if num_held > max(self._base, end_offset):
            return [Abort(epoch), *self._fail(_mismatch(max(self._base, end_offset)))]
        if (wrong := _first_difference(given, self.ledger)) is not None:
            return [Abort(epoch), *self._fail(_mismatch(wrong))]
        if num_held < len(given) and self.original.params.num_top_logprobs is not None:
            detail = "it was given tokens whose log probabilities nobody has any more"
            return self._lost(FailureKind.PARTITION, detail, now, is_counted=False)
        self._is_resuming = False
        if num_held < len(given):
            said = self._said
            commands = self._append(self.attempts[-1], given[num_held:], ())
            self._flowing = _NONE  # What it says next is not new.
            self._said = said
            return [*commands]
        return []

    def _contradicted(self, offset: int, now: float) -> list[Command]:
        """The attempt says another token than the ledger has.

        If the ledger has it from the attempt itself, by way of the client, the client is wrong. If
        a worker computed it anew, the worker may be: then another one that says so too decides.
        """
        epoch = self.epoch
        is_again = self._contradicted_at == offset
        self._contradicted_at = offset
        if offset in self._claimed and (offset < self._told_again or is_again):
            return [Abort(epoch), *self._fail(_mismatch(offset))]
        detail = f"the token at offset {offset}, generated again, is not the one delivered"
        return self.lost(epoch, FailureKind.DIVERGED, detail, now)

    def _new_detokenizer(self) -> Detokenizer:
        stopping = self.original.params.stopping
        return self._tokenizer.detokenizer(stopping.stop, include_stop=stopping.include_stop)

    def _shown(self, begin: int, end: int) -> Sequence[int]:
        """The tokens in this range of the ledger that have text."""
        return self.ledger[begin : min(end, len(self.ledger) - self._is_stop_hidden)]

    @property
    def _logprob_base(self) -> int:
        """Offset of the first token whose log probabilities are here."""
        return len(self.ledger) - len(self._logprobs)

    def _logprobs_from(self, offset: int) -> int:
        return max(0, offset - self._logprob_base)

    def _place(self, pause_s: float = 0.0) -> Place:
        self.state = State.PLACING
        self._halted_at = None
        self._flow_no_more()
        self.epoch += 1
        return Place(self.epoch, self._avoid, pause_s)

    def _settle(self) -> None:
        """Write down how far the attempt got, which the short way of `token` leaves out."""
        if self.ride is not None and self.ride.is_on:
            self.ride.settle()
        if self._flowing != _NONE:
            self._said = self._attempts[-1].end_offset = len(self.ledger)

    def _flow_no_more(self) -> None:
        if self.ride is not None and self.ride.is_on:
            self.ride.step_out()
        self._settle()
        self._flowing = _NONE

    def _append(
        self, attempt: Attempt, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> Sequence[Command]:
        outcome = self._enter(token_ids, logprobs)
        self._said = attempt.end_offset = len(self.ledger)
        self._num_refusals = 0
        if self._began_with is None:
            self._began_with = self._serving
        if outcome is not None and outcome.stop is not None:  # Which only we can see.
            return [Abort(self.epoch), *self._done(outcome)]
        if outcome is not None:
            return self._done(outcome)
        if not self.original.params.stopping.stop:
            self._flowing = self.epoch
        return ()

    def _enter(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Outcome | None:
        """Put tokens into the ledger, as far as the output goes; returns its end, if that came."""
        ledger = self.ledger
        self._decode()
        if len(token_ids) > 1:
            token_ids = self._until_stop_token(token_ids)
        room = self._max_tokens - len(ledger)
        if len(token_ids) > room:
            token_ids = token_ids[:room]
        last = token_ids[-1]
        is_stop_token = (
            last in self._stop_token_ids and len(ledger) + len(token_ids) > self._min_tokens
        )
        # The text of a stop token is not part of the output.
        text = self._detokenizer.push(token_ids[:-1] if is_stop_token else token_ids)
        self._texts_apart = self._detokenizer.texts_apart
        stopped = self._detokenizer.stopped
        if stopped is not None:
            token_ids = token_ids[: stopped.num_tokens]
        ledger.extend(token_ids)
        self._num_decoded = len(ledger)
        if logprobs:
            logprobs = logprobs[: len(token_ids)]
            if self._logprob_sum is not None:
                self._logprob_sum += sum(entry.logprob for entry in logprobs)
            self._logprobs.extend(logprobs)
        self._unsent_text += text
        if stopped is not None:
            return Outcome(FinishReason.STOP, stop=stopped.stop)
        if is_stop_token:
            self._is_stop_hidden = True
            return Outcome(FinishReason.STOP, stop_token_id=last)
        if len(ledger) == self._max_tokens:
            return Outcome(FinishReason.LENGTH)
        return None

    def _decode(self) -> None:
        """Make text of the tokens that came by the short way. None of them can end the output."""
        if self._num_decoded < len(self.ledger):
            waiting = self.ledger[self._num_decoded :]
            push_all, push_one = self._detokenizer.push, self._detokenizer.push_one
            self._unsent_text += push_one(waiting[0]) if len(waiting) == 1 else push_all(waiting)
            self._texts_apart = self._detokenizer.texts_apart
            self._num_decoded = len(self.ledger)

    def _until_stop_token(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The ids up to the first stop token that may end the output."""
        if self._stop_token_ids.isdisjoint(token_ids):
            return token_ids
        for index, token_id in enumerate(token_ids):
            if token_id in self._stop_token_ids and len(self.ledger) + index >= self._min_tokens:
                return token_ids[: index + 1]
        return token_ids

    def _ack(self, num_early: int = 0) -> Sequence[Command]:
        """Let the worker go on, in strides: an acknowledgement per token would cost a message."""
        if self.state is not State.RUNNING:
            return ()
        sent = self._sent
        if sent < self._ack_due - num_early:
            return ()
        self._ack_due = sent + self._ack_stride
        return (Ack(self.epoch, sent),)

    def _delivered_bytes(self) -> bytes:
        """What a constraint has seen; nobody else asks."""
        if self.original.params.constraint is None:
            return b""
        return b"".join([self._bytes[token_id] for token_id in self.ledger])

    def _done(self, outcome: Outcome) -> list[Command]:
        assert self.outcome is None, "a settled stream stays settled"
        if outcome.error is None:
            self._decode()
            self._unsent_text += self._detokenizer.flush()
            stopped = self._detokenizer.stopped
            if stopped is not None:
                # Perhaps only now: what is left of a character can complete a stop string.
                outcome = Outcome(FinishReason.STOP, stop=stopped.stop)
        self.state = State.DONE
        self._is_adopting = False
        self._halted_at = None
        self._flow_no_more()
        self.outcome = outcome
        return [Finish()]

    def _fail(self, error: UnbrokenError) -> list[Command]:
        return self._done(Outcome(FinishReason.ERROR, error=error))

    def _worker_lost(self, failure: FailureKind, detail: str) -> UnbrokenError:
        return UnbrokenError(
            Reason.WORKER_LOST,
            f"{failure.name}: {detail}",
            metadata={"failure": failure.name, "offset": str(len(self.ledger))},
        )


def _first_difference(some: Sequence[int], others: Sequence[int]) -> int | None:
    """Where two sequences first differ, as far as both go."""
    size = min(len(some), len(others))
    if array("I", some[:size]) == array("I", others[:size]):
        return None
    return next(i for i, (one, other) in enumerate(zip(some, others, strict=False)) if one != other)


def _after_bytes(text: str, num_bytes: int) -> str:
    """What follows after so many bytes of UTF-8; raises `Mismatch` if that is no place in it."""
    data = text.encode()
    if num_bytes > len(data):
        raise Mismatch(f"expected at most {len(data)} bytes of text, got {num_bytes}")
    try:
        return data[num_bytes:].decode()
    except UnicodeDecodeError:
        raise Mismatch(f"{num_bytes} bytes end within a character") from None


def _mismatch(offset: int) -> UnbrokenError:
    return UnbrokenError(
        Reason.RESUME_MISMATCH,
        f"the token at offset {offset} is not one that this stream delivered",
        metadata={"offset": str(offset)},
    )


def _pause_s(num_refusals: int) -> float:
    """The first refusal may be bad luck; then the pause doubles from 10 ms to 1 s."""
    return 0.0 if num_refusals < 2 else min(0.01 * 2.0 ** min(num_refusals - 2, 7), 1.0)


def announced_way(
    original: Checkpoint, abilities: Sequence[Abilities]
) -> tuple[ContinuationClass, str]:
    """The class announced at admission: the best that one of these engines gives."""
    verdicts = [exact_way(original.params, one) for one in abilities]
    best = min(verdicts, key=lambda verdict: _PREFERENCE.index(verdict.way))
    return best.way, best.detail


_PREFERENCE = (
    ContinuationClass.RESTORE,
    ContinuationClass.NATIVE,
    ContinuationClass.APPEND,
    ContinuationClass.REGENERATE,
    ContinuationClass.NONE,
)
