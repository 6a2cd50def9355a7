"""Watches one stream: whatever it does must equal an undisturbed run, or end in a typed error.

P1  ids, text and log probabilities equal the truth, or are a prefix of it when the stream fails
P2  every offset once, in order, without gaps; one outcome, which stays; every stream ends
P3  usage is that of an undisturbed run, and what was done again is metered
P5  nothing of an attempt that is over reaches the ledger
"""

from collections.abc import Sequence
from dataclasses import dataclass

from frontend.resume_token import ChoiceClaim, Minting
from frontend.stream import Command, Life, Limits, Outcome, Past, Piece, State, Stream
from tests.simulation.faults import Fault, Trouble
from tests.simulation.model import Personality, Truth, cut, undisturbed
from tests.support.vocabulary import EOS, PIECES
from unbroken.checkpoint import Checkpoint
from unbroken.errors import Reason
from unbroken.outcome import (
    ContinuationClass,
    ContinuationPolicy,
    Continued,
    FailureKind,
    FinishReason,
)

_BREACHES = frozenset({FailureKind.PROTOCOL, FailureKind.DIVERGED})
_EXCUSES = (
    Fault.GAP,
    Fault.DUPLICATE_TOKENS,
    Fault.DIVERGENCE,
    Fault.JUMP,
    Fault.SHORT,
)
_GRACEFUL = frozenset({FailureKind.OVERLOAD, FailureKind.DRAIN})


class Violation(AssertionError):  # noqa: N818 - It names what happened.
    """A promise was broken."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a client holds after a message: it can resume from there."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    claim: ChoiceClaim
    minting: Minting
    """When the newest resume token was made, by the clocks of its frontend,"""
    clock_offset_s: float
    """and how wrong that clock was when the message was sent."""
    is_forged: bool = False


class Witness:
    """What one client and its checker remember of one stream."""

    def __init__(
        self,
        name: str,
        stream: Stream,
        trouble: Trouble,
        *,
        policy: ContinuationPolicy,
        limits: Limits,
        past: Past | None = None,
        before: "Witness | None" = None,
    ) -> None:
        """`before` watched the stream at the frontend before."""
        self._past = past
        self._before = before
        self._uncounted: set[int] = set()  # Losses that are no worker's failure.
        self._adopted: set[int] = set()
        self._is_forged = False
        self._name = name
        self._stream = stream
        self._trouble = trouble
        self._policy = policy
        self._limits = limits
        self.token_ids: list[int] = []
        """What the client was sent."""
        self._text = ""
        self._logprobs: list[float] = []
        self._personalities: dict[int, Personality] = {}  # By epoch.
        self._truth: Truth | None = None
        self._num_checked = 0
        self._exact_end: int | None = None  # Where exactness ended, as the caller allowed.
        self._losses: dict[int, FailureKind] = {}
        self._refused: set[int] = set()
        self._failed: set[Life] = set()
        self._looking_since = 0.0
        self._prefills: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._num_again = 0
        self._num_undone_before = 0
        self.orders: set[Reason] = set()
        """Why the stream may end: somebody asked for it, or took it over."""
        self._outcome: Outcome | None = None
        self._lives: dict[str, int] = {}

    # What the shell tells it.

    def held(self, claim: ChoiceClaim, minting: Minting, clock_offset_s: float) -> Held:
        """What the client has now."""
        return Held(
            tuple(self.token_ids),
            self._text,
            tuple(self._logprobs),
            claim,
            minting,
            clock_offset_s,
            self._is_forged,
        )

    def begin_from(self, held: Held) -> None:
        """The client brings this to another frontend."""
        before = self._before
        assert before is not None
        self.token_ids = list(held.token_ids)
        self._text = held.text
        self._logprobs = list(held.logprobs)
        self._num_checked = len(held.token_ids)
        self._is_forged = held.is_forged
        self.orders = before.orders - {Reason.FENCED, Reason.REQUEST_EXISTS}
        if held.token_ids and not held.is_forged:
            self._truth = before._truth
            end = before._exact_end
            self._exact_end = end if end is not None and end < len(held.token_ids) else None
        self._note_outcome(0.0)

    def adopts(self, epoch: int, personality: Personality) -> None:
        """The stream asks for an attempt that ran before."""
        self._personalities[epoch] = personality

    def adopted(self, epoch: int) -> None:
        """It has it."""
        self._adopted.add(epoch)

    def began_looking(self, now: float) -> None:
        """The stream waits for a worker from now on."""
        self._looking_since = now

    def chosen(self, life: Life, ready: Sequence[Life]) -> None:
        """A worker was chosen among those that could do it."""
        failed = self._failed
        self._expect(
            life not in failed or all(other in failed for other in ready),
            f"chose {life} although it had failed, from {ready}",
        )
        if life in failed:
            self._trouble.took_effect(Fault.SAME_WORKER)
        before = self._lives.get(life.worker_id)
        if before is not None and before < life.incarnation:
            self._trouble.took_effect(Fault.NEW_INCARNATION)
        self._lives[life.worker_id] = life.incarnation

    def started(self, checkpoint: Checkpoint, personality: Personality) -> None:
        """An attempt begins."""
        stream = self._stream
        attempt = stream.attempts[-1]
        self._personalities[attempt.epoch] = personality
        self._prefills[attempt.epoch] = len(checkpoint.prompt_token_ids) + len(
            checkpoint.output_token_ids
        )
        way = attempt.way
        if stream.ledger:
            self._trouble.took_effect(_FAULT_OF_WAY[way])
            self._expect(self._policy is not ContinuationPolicy.NEVER, "went on against its policy")
        if way is ContinuationClass.INEXACT:
            self._expect(
                self._policy is ContinuationPolicy.ALLOW_INEXACT, "inexact without permission"
            )

    def heard(
        self,
        epoch: int,
        *,
        was_current: bool,
        size_before: int,
        outcome_before: Outcome | None,
        commands: Sequence[Command],
        now: float,
        is_refusal: bool = False,
        is_counted: bool = True,
        is_shed: bool = False,
    ) -> None:
        """The stream handled news of an attempt; `is_shed`: a busy worker took no new work."""
        stream = self._stream
        if not was_current:
            self._expect(len(stream.ledger) == size_before, f"epoch {epoch} spoke after its end")
            self._expect(not commands, f"news of epoch {epoch}, which is over, had consequences")
            self._expect(stream.outcome is outcome_before, "a settled stream did not stay settled")
            self._trouble.took_effect(
                Fault.LATE_NEWS if outcome_before is None else Fault.AFTER_THE_END
            )
            return
        self._check_ledger()
        if stream.state in (State.RUNNING, State.UNLINKED):
            return
        if is_shed:
            self._refused.add(epoch)
            self._expect(not stream.ledger, "what had begun was refused as new work")
            self._note_outcome(now)
            return
        outcome = stream.outcome
        if not stream.attempts:  # The attempt of the frontend before could not be adopted.
            past = self._past
            assert past is not None
            assert past.life is not None
            self._failed.add(past.life)
            self._losses[epoch] = FailureKind.CRASH
            self._looking_since = now
            self._trouble.took_effect(Fault.RESUME_BY_REPLAY)
        elif outcome is None or outcome.error is not None:
            attempt = stream.attempts[-1]
            failure = attempt.failure
            is_adoption = attempt.is_adopted and epoch not in self._adopted
            if is_adoption and is_refusal:
                self._trouble.took_effect(Fault.NOT_ADOPTED)
                self._looking_since = now
            elif is_counted:
                self._failed.add(attempt.life)
            self._expect(  # An attempt that began later cannot tell earlier tokens again.
                failure not in _BREACHES
                or is_adoption
                or self._is_forged
                or any(self._trouble.seen[f] for f in _EXCUSES),
                f"{failure.name} of an honest worker: {attempt.detail}",
            )
            if is_refusal:
                self._refused.add(epoch)
                if epoch in self._adopted:
                    self._undo(stream.standing.started_epoch)
            else:
                self._expect(epoch not in self._losses, f"epoch {epoch} was lost twice")
                self._losses[epoch] = failure
                if not is_counted:
                    self._uncounted.add(epoch)
                if failure not in _GRACEFUL or attempt.end_offset > attempt.first_offset:
                    self._looking_since = now
                self.note_cut()
        self._note_outcome(now)

    def acknowledged(self, offset: int) -> None:
        """The worker is told that tokens before this offset have left."""
        self._expect(
            offset <= len(self.token_ids),
            f"acknowledged {offset} tokens, of which {len(self.token_ids)} have left",
        )

    def repeated(self, num_tokens: int) -> None:
        """A current attempt said so many tokens again."""
        self._num_again += num_tokens

    def cached(self, epoch: int, num_tokens: int) -> None:
        """An attempt told how much of its prompt it found in a cache."""
        self._cached.setdefault(epoch, num_tokens)

    def asked_to_end(self, now: float) -> None:
        """Somebody cancelled, or time passed."""
        self._note_outcome(now)

    def received(self, piece: Piece) -> None:
        """The client was sent something."""
        self._expect(
            piece.offset == len(self.token_ids),
            f"expected offset {len(self.token_ids)}, got {piece.offset}",
        )
        self.token_ids.extend(piece.token_ids)
        self._text += piece.text
        self._logprobs.extend(entry.logprob for entry in piece.logprobs)
        if self._exact_end is None and (truth := self._truth) is not None:
            self._expect(truth.text.startswith(self._text), f"text {self._text!r} is wrong")

    def finish(self) -> None:
        """Everything has happened: compare the whole."""
        stream = self._stream
        stream.check()
        outcome = stream.outcome
        self._expect(stream.state is State.DONE and outcome is not None, "it never ended")
        assert outcome is not None
        self._expect(outcome is self._outcome, "its outcome changed")
        self._expect(not stream.has_output, "output was left behind")
        self._expect(self.token_ids == stream.ledger.tolist(), "client and ledger differ")
        self._check_ledger()
        self._check_accounts()
        begun = [a for a in stream.attempts if a.epoch not in self._refused and not a.is_adopted]
        num_begun = len(begun) + self._num_begun_before
        is_interrupted = num_begun > 1
        if self._is_forged:
            self._check_forgery(outcome)
            return
        if not is_interrupted:
            self._expect(stream.continued is Continued.NEVER, "it was never interrupted")
        elif outcome.error is None:
            continued = Continued.EXACT if self._exact_end is None else Continued.INEXACT
            self._expect(stream.continued is continued, f"expected {continued.name}")
        truth = self._truth
        if outcome.error is not None:
            self._expect(
                outcome.finish_reason
                is (
                    FinishReason.CANCELLED
                    if outcome.error.reason is Reason.CANCELLED
                    else FinishReason.ERROR
                ),
                "the finish reason is not that of the error",
            )
            return
        if self._exact_end is not None or truth is None:
            self._check_text_of_own_ids(outcome)
            return
        self._expect(
            tuple(self.token_ids) == truth.token_ids,
            f"{len(self.token_ids)} tokens instead of {len(truth.token_ids)}",
        )
        self._expect(self._text == truth.text, f"text {self._text!r} instead of {truth.text!r}")
        seen = (outcome.finish_reason, outcome.stop, outcome.stop_token_id)
        expected = (truth.finish_reason, truth.stop, truth.stop_token_id)
        self._expect(seen == expected, f"ended with {seen} instead of {expected}")
        self._expect(tuple(self._logprobs) == truth.logprobs, "log probabilities differ")
        if truth.logprobs:
            self._expect(stream.cumulative_logprob == sum(truth.logprobs), "their sum differs")

    # Inside.

    @property
    def _num_begun_before(self) -> int:
        """Attempts at the frontend before, but for one that was adopted and refused only then."""
        num_begun = self._past.num_begun if self._past is not None else 0
        return num_begun - self._num_undone_before

    def _undo(self, began: int) -> None:
        """The attempt of that epoch was refused after it was adopted: it did nothing."""
        if began in self._prefills:
            self._refused.add(began)
        else:
            self._num_undone_before += 1

    def _check_forgery(self, outcome: Outcome) -> None:
        """What a worker knows is compared with what a client claims."""
        stream = self._stream
        if self._before is not None and self._before._is_forged:
            return  # What the worker knows may be the same lie, told at the frontend before.
        is_told = bool(stream.attempts) and all(
            attempt.epoch in self._adopted for attempt in stream.attempts
        )
        if is_told:
            personality = self._personalities[stream.attempts[-1].epoch]
            if not personality.is_reproducible(stream.original):
                return
            truth = undisturbed(stream.original, personality)
            if tuple(self.token_ids) == truth.token_ids:
                return  # It was guessed right.
        self._expect(outcome.error is not None or not is_told, "a forgery was not noticed")

    def _expect(self, is_so: bool, otherwise: str) -> None:
        if not is_so:
            raise Violation(f"{self._name}: {otherwise}")

    def _check_ledger(self) -> None:
        """Whatever is in the ledger is what an undisturbed run gives."""
        stream = self._stream
        stream.check()
        ledger = stream.ledger
        size = len(ledger)
        unsent = size - len(self.token_ids)
        window = self._limits.window_tokens
        # Each attempt that goes on after another has a window of its own.
        not_adopted = sum(a.is_adopted and a.epoch in self._refused for a in stream.attempts)
        num_windows = 1 + len(self._losses) + len(self._adopted) + not_adopted
        self._expect(
            not window or unsent <= window * num_windows,
            f"{unsent} tokens wait for the client, with a window of {window}",
        )
        if size == self._num_checked:
            return
        if self._num_checked == 0 and not self._is_forged:
            personality = self._personalities[stream.attempts[-1].epoch]
            if personality.is_reproducible(stream.original):
                self._truth = undisturbed(stream.original, personality)
        truth = self._truth
        if self._exact_end is None and stream.attempts[-1].way is ContinuationClass.INEXACT:
            self._exact_end = self._num_checked
        if truth is not None:
            end = size if self._exact_end is None else min(size, self._exact_end)
            for offset in range(self._num_checked, end):
                self._expect(
                    offset < len(truth.token_ids) and ledger[offset] == truth.token_ids[offset],
                    f"the token at offset {offset} is wrong",
                )
        elif self._num_checked > 0 and self._exact_end is None and self._past is None:
            first = next(a for a in stream.attempts if a.end_offset > a.first_offset)
            self._expect(
                all(a.is_adopted for a in stream.attempts if a.epoch > first.epoch),
                "what cannot be reproduced went on elsewhere",
            )
        self._num_checked = size

    def note_cut(self) -> None:
        """The output is cut here."""
        stream = self._stream
        if not stream.ledger:
            return
        if stream.ledger[-1] == PIECES.index(b"\xc3"):
            self._trouble.took_effect(Fault.CUT_CHARACTER)
        truth = self._truth
        if truth is not None and truth.stop is not None:
            said = b"".join(PIECES[i] for i in stream.ledger if i != EOS).decode(errors="replace")
            if any(said.endswith(truth.stop[:n]) for n in range(1, len(truth.stop))):
                self._trouble.took_effect(Fault.CUT_STOP_STRING)

    def _note_outcome(self, now: float) -> None:
        """The stream may have ended: was it allowed to, in this way?"""
        outcome = self._stream.outcome
        if outcome is None or self._outcome is not None:
            self._expect(outcome is self._outcome, "a settled stream did not stay settled")
            return
        self._outcome = outcome
        if outcome.error is None:
            return
        counted = 0 if self._past is None else self._past.num_losses
        counted += sum(
            failure not in _GRACEFUL and epoch not in self._uncounted
            for epoch, failure in self._losses.items()
        )
        has_timed_out = now >= self._looking_since + self._limits.placement_timeout_s - 1e-6
        match outcome.error.reason:
            case (
                Reason.CANCELLED
                | Reason.DEADLINE_EXCEEDED
                | Reason.FENCED
                | Reason.OVERLOADED
                | Reason.REQUEST_EXISTS as reason
            ):
                is_right = reason in self.orders
            case Reason.MIGRATIONS_EXHAUSTED:
                is_right = counted == self._limits.migrations_max + 1
                self._trouble.took_effect(Fault.EXHAUSTED)
            case Reason.WORKER_LOST:
                is_never = self._policy is ContinuationPolicy.NEVER
                is_right = bool(self._losses or self._refused) and (is_never or has_timed_out)
                if not is_never:
                    self._trouble.took_effect(Fault.PLACEMENT_TIMEOUT)
            case Reason.NO_WORKER:
                is_right = (not self._losses or self._past is not None) and has_timed_out
                self._trouble.took_effect(Fault.PLACEMENT_TIMEOUT)
            case Reason.RESUME_MISMATCH:
                num_lies = self._trouble.seen[Fault.DIVERGENCE] + self._trouble.seen[Fault.JUMP]
                is_right = self._is_forged or num_lies > 1
                self._trouble.took_effect(Fault.FORGERY_FOUND)
            case Reason.REJECTED_BY_ENGINE:
                is_right = self._trouble.seen[Fault.REJECTION] > 0
            case _:
                is_right = False
        detail = f"{outcome.error.reason.name}: {outcome.error.detail}"
        self._expect(is_right, f"ended with {detail}, after {list(self._losses.values())}")

    def _check_accounts(self) -> None:
        """Work done again is metered, each attempt that began once."""
        stream = self._stream
        begun = [epoch for epoch in self._prefills if epoch not in self._refused]
        if self._num_begun_before:
            begun.insert(0, 0)  # At the frontend before.
        cached = self._cached.get(begun[0], 0) if begun else 0
        self._expect(stream.accounts.cached_prompt_tokens == cached, "cached prompt tokens")
        expected = sum(self._prefills[e] - self._cached.get(e, 0) for e in begun[1:])
        seen = stream.accounts.recomputed_prefill_tokens
        self._expect(seen == expected, f"recomputed {seen} prefill tokens instead of {expected}")
        seen = stream.accounts.recomputed_decode_tokens
        self._expect(
            seen == self._num_again, f"recomputed {seen} tokens instead of {self._num_again}"
        )

    def _check_text_of_own_ids(self, outcome: Outcome) -> None:
        shown = self.token_ids if outcome.stop_token_id is None else self.token_ids[:-1]
        stop_token_ids = self._stream.original.params.stopping.stop_token_ids
        if outcome.stop == "\ufffd" and shown[-1] in stop_token_ids:
            shown = shown[:-1]  # It ends before the token that would complete the character.
        said = b"".join(PIECES[i] for i in shown if i != EOS).decode(errors="replace")
        text, _ = cut(said, self._stream.original)
        self._expect(self._text == text, f"text {self._text!r} is not that of its ids")


_FAULT_OF_WAY = {
    ContinuationClass.APPEND: Fault.APPEND,
    ContinuationClass.REGENERATE: Fault.REGENERATE,
    ContinuationClass.NATIVE: Fault.NATIVE,
    ContinuationClass.INEXACT: Fault.INEXACT,
}
