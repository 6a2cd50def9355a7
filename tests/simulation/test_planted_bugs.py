"""The simulation finds bugs: each of these, planted into the core, within 2,000 seeds."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from typing_extensions import override

import frontend.continuation
import frontend.stream
from frontend import resume_queue
from frontend.continuation import Abilities, next_checkpoint
from frontend.resume_queue import ResumeQueue, Ticket, Turn
from frontend.resume_token import Minting
from frontend.stream import (
    GENERATION_BITS,
    Ack,
    Command,
    Life,
    Origin,
    Outcome,
    Past,
    Place,
    Start,
    State,
    Stream,
)
from sidecar.hub import Hub
from sidecar.link import Link
from sidecar.watchdog import Recovered, Watchdog, Work
from tests.simulation.frontend import Choice
from tests.simulation.scenario import quiet, run_seed
from tests.support.vocabulary import tokenizer
from unbroken import discovery
from unbroken.checkpoint import Checkpoint
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation import TokenLogprobs
from unbroken.outcome import ContinuationClass, FailureKind

SEEDS_MAX = 2000


class IgnoresEpochs(Stream):
    """Takes tokens of any attempt for those of the current one."""

    @override
    def tokens(
        self,
        epoch: int,
        offset: int,
        token_ids: Sequence[int],
        now: float,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> Sequence[Command]:
        return super().tokens(self.epoch, offset, token_ids, now, logprobs)


class HurriesPastEpochs(Stream):
    """The same, where single tokens come in."""

    @override
    def token(self, epoch: int, offset: int, token_id: int, now: float) -> Sequence[Command]:
        return super().token(self.epoch if self._flowing > 0 else epoch, offset, token_id, now)


class FlowsOn(Stream):
    """The short way for single tokens stays open when their attempt is lost."""

    @override
    def _place(self, pause_s: float = 0.0) -> Place:
        flowing = self._flowing
        command = super()._place(pause_s)
        self._flowing = flowing
        return command


class RidesOn(Stream):
    """An attempt that is over is not told to leave its convoy."""

    @override
    def _flow_no_more(self) -> None:
        ride, self.ride = self.ride, None
        super()._flow_no_more()
        self.ride = ride


class ForgetsWhatRode(Stream):
    """The last of the tokens that rode is not entered."""

    @override
    def rode(self, token_ids: Sequence[int], now: float) -> int:
        return super().rode(token_ids[:-1], now)


class StealsBack(Stream):
    """Who was revoked by a new owner goes on elsewhere."""

    @override
    def _fail(self, error: UnbrokenError) -> list[Command]:
        return [self._place()] if error.reason is Reason.FENCED else super()._fail(error)


class CountsLossesTwice(Stream):
    """A loss that two observers report is two losses."""

    @override
    def lost(self, epoch: int, failure: FailureKind, detail: str, now: float) -> list[Command]:
        if epoch == self.epoch - 1 and self.state is State.PLACING:
            self._num_losses += 1
        return super().lost(epoch, failure, detail, now)


class MigratesTwice(Stream):
    """A loss that is reported again ends the next attempt."""

    @override
    def lost(self, epoch: int, failure: FailureKind, detail: str, now: float) -> list[Command]:
        return super().lost(self.epoch, failure, detail, now)


class DeliversStopTokens(Stream):
    """The text of the stop token is part of the output."""

    @override
    def _done(self, outcome: Outcome) -> list[Command]:
        commands = super()._done(outcome)
        if outcome.stop_token_id is not None:
            self._unsent_text += tokenizer().pieces[outcome.stop_token_id].decode("latin-1")
        return commands


class WaitsForGoodbyes(Stream):
    """A stop token ends the output only if the worker lives to say so."""

    @override
    def placed(
        self,
        epoch: int,
        life: Life,
        abilities: Abilities,
        *,
        way: ContinuationClass | None = None,
    ) -> list[Command]:
        self._stop_token_ids = frozenset[int]()
        return super().placed(epoch, life, abilities, way=way)


class TrustsRegeneration(Stream):
    """A prefix that is generated again is not compared."""

    @override
    def tokens(
        self,
        epoch: int,
        offset: int,
        token_ids: Sequence[int],
        now: float,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> Sequence[Command]:
        known = self.ledger[offset : offset + len(token_ids)]
        token_ids = [*known, *token_ids[len(known) :]]
        return super().tokens(epoch, offset, token_ids, now, logprobs)


class AcknowledgesTooMuch(Stream):
    """The window moves although the client has read nothing."""

    @override
    def _ack(self, num_early: int = 0) -> Sequence[Command]:
        return (Ack(self.epoch, len(self.ledger)),) if self.state is State.RUNNING else ()


class NeverAcknowledges(Stream):
    """The window does not move."""

    @override
    def _ack(self, num_early: int = 0) -> Sequence[Command]:
        return ()


class ForgetsFailures(Stream):
    """The next worker may be the one that has just failed."""

    @override
    def _place(self, pause_s: float = 0.0) -> Place:
        return replace(super()._place(pause_s), avoid=frozenset())


class ForgetsHeldText(Stream):
    """Text that was held back at the cut, as it may begin a stop string, is lost."""

    @override
    def placed(
        self,
        epoch: int,
        life: Life,
        abilities: Abilities,
        *,
        way: ContinuationClass | None = None,
    ) -> list[Command]:
        if self.attempts:
            stopping = self.original.params.stopping
            self._detokenizer = tokenizer().detokenizer(
                stopping.stop, include_stop=stopping.include_stop
            )
        return super().placed(epoch, life, abilities, way=way)


class NumbersFromOne(Stream):
    """The next worker begins one offset too far."""

    @override
    def placed(
        self,
        epoch: int,
        life: Life,
        abilities: Abilities,
        *,
        way: ContinuationClass | None = None,
    ) -> list[Command]:
        commands = super().placed(epoch, life, abilities, way=way)
        match commands:
            case [Start(checkpoint=checkpoint) as start, *rest] if self.ledger:
                further = replace(checkpoint, first_offset=checkpoint.first_offset + 1)
                return [replace(start, checkpoint=further), *rest]
            case _:
                return commands


class AdoptsUnderTheOldEpoch(Stream):
    """An attempt is taken over under the epoch that it had."""

    @override
    def _adopt(self) -> list[Command]:
        self.epoch -= 1
        return super()._adopt()


class BelievesItsClient(Stream):
    """What a client claims is not compared with what the worker was given and has produced."""

    @override
    def tokens(
        self,
        epoch: int,
        offset: int,
        token_ids: Sequence[int],
        now: float,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> Sequence[Command]:
        if self.attempts and self.attempts[-1].is_adopted:
            known = self.ledger[offset : offset + len(token_ids)]
            token_ids = [*known, *token_ids[len(known) :]]
        return super().tokens(epoch, offset, token_ids, now, logprobs)


class SendsTextTwice(Stream):
    """The text that a client has already is sent again when it resumes."""

    @override
    def _recall(self, past: Past) -> None:
        super()._recall(replace(past, num_text_bytes=0))


class ForgetsWhatWasGiven(Stream):
    """Tokens that the adopted attempt was started with are not told to a client without them."""

    @override
    def _verify(self, epoch: int, end_offset: int, origin: Origin, now: float) -> list[Command]:
        self._base = self._said = max(self._said, len(self.ledger))
        return []


class AdoptsAnyAttempt(Stream):
    """Another owner's attempt at the stream is taken for the one that the token names."""

    @override
    def _verify(self, epoch: int, end_offset: int, origin: Origin, now: float) -> list[Command]:
        origin = replace(origin, epoch=self._started_epoch)
        return super()._verify(epoch, end_offset, origin, now)


class BelievesItsClock(Stream):
    """A higher epoch is that of a later owner, although it would have come in the future."""

    @override
    def _may_outbid(self, epoch_known: int, now: float) -> bool:
        return False


@pytest.mark.parametrize(
    "stream_type",
    [
        BelievesItsClock,
        AdoptsUnderTheOldEpoch,
        BelievesItsClient,
        SendsTextTwice,
        ForgetsWhatWasGiven,
        AdoptsAnyAttempt,
        IgnoresEpochs,
        HurriesPastEpochs,
        FlowsOn,
        RidesOn,
        ForgetsWhatRode,
        StealsBack,
        CountsLossesTwice,
        MigratesTwice,
        DeliversStopTokens,
        WaitsForGoodbyes,
        TrustsRegeneration,
        AcknowledgesTooMuch,
        NeverAcknowledges,
        ForgetsFailures,
        ForgetsHeldText,
        NumbersFromOne,
    ],
)
def test_a_bug_in_the_stream_is_found(
    stream_type: type[Stream], capsys: pytest.CaptureFixture[str]
) -> None:
    _find(stream_type.__name__, stream_type, capsys)


def _one_token_short(
    original: Checkpoint,
    delivered: Sequence[int],
    delivered_bytes: bytes,
    way: ContinuationClass,
    abilities: Abilities,
) -> Checkpoint:
    checkpoint = next_checkpoint(original, delivered, delivered_bytes, way, abilities)
    if len(checkpoint.prompt_token_ids) > len(original.prompt_token_ids):
        return replace(checkpoint, prompt_token_ids=checkpoint.prompt_token_ids[:-1])
    return replace(checkpoint, output_token_ids=checkpoint.output_token_ids[:-1])


def _no_obstacle(*_: object) -> None:
    return None


def _parameters_as_they_were(params: object, *_: object) -> object:
    return params


def _always(*_: object) -> bool:
    return True


def _by_the_clock_alone(now_ms: int, *, above: int = 0) -> int:  # noqa: ARG001
    return max(now_ms, 1) << GENERATION_BITS


def _below_the_old_epochs(_: int, *, above: int = 0) -> int:
    return max(1, above - 1)


_MUTANTS: list[tuple[ModuleType, str, object]] = [
    (frontend.stream, "first_epoch", _below_the_old_epochs),
    (frontend.stream, "first_epoch", _by_the_clock_alone),
    (frontend.stream, "next_checkpoint", _one_token_short),
    (frontend.continuation, "_obstacle_to_appending", _no_obstacle),
    (frontend.continuation, "_appended_params", _parameters_as_they_were),
    (frontend.continuation, "_append_fits", _always),
    (frontend.continuation, "_samples_alike", _always),
    (frontend.stream, "_NOT_COUNTED", frozenset[FailureKind]()),
]


@pytest.mark.parametrize(("module", "name", "mutant"), _MUTANTS)
def test_a_bug_in_the_continuation_is_found(
    module: ModuleType,
    name: str,
    mutant: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, name, mutant)
    _find(name, Stream, capsys)


def _as_in_decode(self: Watchdog, now: float, work: Work) -> float:
    return _bound_s(self, now, replace(work, prefill_tokens=0))


def _never(*_: object) -> bool:
    return False


def _at_any_frame(self: Watchdog, now: float, **_: object) -> Recovered | None:
    return _heard(self, now, is_step=True, has_work=True, prefill_tokens=0)


def _at_half_time(self: Minting, now: float, _: float, lifetime_s: float) -> bool:
    return now - self.now >= lifetime_s / 2


def _the_time(now_us: int, *, known: int) -> int:  # noqa: ARG001
    return now_us


@pytest.mark.parametrize(
    ("owner", "name", "mutant"),
    [(Minting, "is_due", _at_half_time), (discovery, "next_incarnation", _the_time)],
)
def test_a_bug_with_clocks_is_found(
    owner: object,
    name: str,
    mutant: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(owner, name, mutant)
    _find(name, Stream, capsys)


def _whatever_is_not_read_here(self: Hub, link: Link) -> None:
    for attempt in list(self.ledger):
        if attempt.live_link is not link and attempt.given_up is None:
            self._give_up(attempt, FailureKind.PARTITION, "released")  # pyright: ignore[reportPrivateUsage]


def _nothing(*_: object) -> None:
    return None


_bound_s = Watchdog.bound_s
_heard = Watchdog.heard

_SIDECAR_MUTANTS: list[tuple[type, str, object]] = [
    (Watchdog, "bound_s", _as_in_decode),
    (Watchdog, "look", _never),
    (Watchdog, "heard", _at_any_frame),
    (Hub, "release", _whatever_is_not_read_here),
    (Hub, "release", _nothing),
]


@pytest.mark.parametrize(("owner", "name", "mutant"), _SIDECAR_MUTANTS)
def test_a_bug_in_the_sidecar_is_found(
    owner: type,
    name: str,
    mutant: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(owner, name, mutant)
    _find(f"{owner.__name__}.{name} as {getattr(mutant, '__name__', '')}", Stream, capsys)


class ForgetsWhatIsComputed(ResumeQueue[Choice]):
    """Windows are for nothing."""

    @override
    def next(self, now: float) -> Turn[Choice] | None:
        kept = [(worker, worker.outstanding) for worker in self._workers.values()]
        for worker, _ in kept:
            worker.outstanding = 0
        turn = super().next(now)
        for worker, outstanding in kept:
            worker.outstanding = outstanding
        return turn


class TakesTheLargestFirst(ResumeQueue[Choice]):
    """Most work first."""

    @override
    def offer(self, key: Choice, ticket: Ticket, now: float) -> UnbrokenError | None:
        error = super().offer(key, ticket, now)
        if error is None:
            self.cancel(key)
            smallest = replace(ticket, num_tokens=10_000 - ticket.num_tokens)
            return super().offer(key, smallest, now)
        return error


class ForgetsPriority(ResumeQueue[Choice]):
    """The least work first, whoever asks."""

    @override
    def offer(self, key: Choice, ticket: Ticket, now: float) -> UnbrokenError | None:
        return super().offer(key, replace(ticket, priority=0), now)


class KeepsTheCredit(ResumeQueue[Choice]):
    """What is computed stays on account."""

    @override
    def computed(self, key: Choice) -> None:
        self._computing.pop(key, None)


class SleepsOn(ResumeQueue[Choice]):
    """Nobody is told when there will be room."""

    @override
    def deadline(self) -> float | None:
        return None


class HoldsNewWorkBack(ResumeQueue[Choice]):
    """New work waits as if it resumed."""

    @override
    def offer(self, key: Choice, ticket: Ticket, now: float) -> UnbrokenError | None:
        return super().offer(key, replace(ticket, work=resume_queue.Work.RESUME), now)


class RefusesNewWork(ResumeQueue[Choice]):
    """A lost worker is a lost fleet, whoever waits."""

    @override
    def _judge_loss(self, fleet: Any, now: float) -> None:
        super()._judge_loss(fleet, now)
        sizes = [size for _, size in fleet.sizes]
        if len(fleet.ready) < max(sizes, default=0):
            fleet.peak_of_loss = max(sizes)


@pytest.mark.parametrize(
    "queue_type",
    [
        ForgetsWhatIsComputed,
        TakesTheLargestFirst,
        ForgetsPriority,
        KeepsTheCredit,
        SleepsOn,
        HoldsNewWorkBack,
        RefusesNewWork,
    ],
)
def test_a_bug_in_the_resume_queue_is_found(
    queue_type: type[ResumeQueue[Choice]], capsys: pytest.CaptureFixture[str]
) -> None:
    _find(queue_type.__name__, Stream, capsys, queue_type)


def _find(
    name: str,
    stream_type: type[Stream],
    capsys: pytest.CaptureFixture[str],
    queue_type: type[ResumeQueue[Choice]] = ResumeQueue,
) -> None:
    with quiet():
        for seed in range(SEEDS_MAX):
            report = run_seed(seed, stream_type=stream_type, queue_type=queue_type)
            if report.violation is not None:
                with capsys.disabled():
                    sys.stdout.write(f"\n{name}: seed {seed}: {report.violation[:150]}")
                return
    pytest.fail(f"{name} survived {SEEDS_MAX} seeds")
