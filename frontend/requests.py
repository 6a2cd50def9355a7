"""The requests of this frontend: those that run, and for a while those that have ended."""

import asyncio
import base64
import binascii
import heapq
import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from frontend import resume_token, summaries
from frontend import stream as machine
from frontend.admission import Admitted, Envelope
from frontend.dispatch import Choice, Dispatcher, News
from frontend.lineage import Key, Lineage, Member
from frontend.processes.claims import Claims
from unbroken.context import Context
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.v1 import generation_pb2
from unbroken.v1 import inference_service_pb2 as pb

ENDED_MAX: Final = 1000
"""Requests that are remembered after their end,"""
ENDED_S_MAX: Final = 60.0
"""for so long."""
PAGE_SIZE_DEFAULT: Final = 100
PAGE_SIZE_MAX: Final = 1000
SOFT_CANCEL_S_MAX: Final = 1.0
"""How long a soft cancel waits for the engine's step."""
TOLD_AGAIN_MAX: Final = 256
"""Complete requests that can be told again,"""
TOLD_AGAIN_TOKENS_MAX: Final = 500_000
"""with at most so many tokens of prompts and outputs together,"""
TOLD_AGAIN_S_MAX: Final = 30.0
"""for so long."""


class Request:
    """One request that runs: its choices, and what ends them together.

    It has one reader at a time: the call that came last.
    """

    def __init__(
        self,
        admitted: Admitted,
        dispatcher: Dispatcher,
        limits: machine.Limits,
        *,
        digest: bytes,
        epoch: int,
        taken_ms: int,
        deadline_at: float | None,
        member: Member,
        pasts: Sequence[machine.Past] | None = None,
    ) -> None:
        """`taken_ms` is the time of day; `deadline_at` is the client's, monotonic seconds; `digest`
        is what makes it equal to another request; `member` is what stands for its name, and is not
        cancelled; `pasts`, one per choice, are of a request that another frontend had.

        Raises `machine.Mismatch`.
        """
        envelope = admitted.envelope
        self.admitted = admitted
        self.digest = digest
        self.reader = 0
        """Number of the call that reads it; each that comes has a higher one."""
        self.is_settled = False
        """It has ended, and is counted."""
        self.is_handed_over = False
        """It has ended here only."""
        self.cut_at: float | None = None
        """When it will be, monotonic seconds: its reader is asked to read on elsewhere."""
        self.resolved = resume_token.Resolved(
            tenant=envelope.tenant,
            request_id=envelope.request_id,
            request_digest=digest,
            model=admitted.model.name,
            tokenizer_fingerprint=admitted.model.tokenizer_fingerprint,
            prompt_digest=resume_token.ids_digest(admitted.checkpoints[0].prompt_token_ids),
            seed=admitted.seed,
            max_tokens=admitted.max_tokens,
            policy=envelope.policy,
            migrations_max=envelope.migrations_max,
        )
        self.began_at = dispatcher.clock()
        """Monotonic seconds."""
        self._has_begun = False
        self.news = News()
        """Set when a choice has output or is done."""
        self.sequence = 0
        """Place in the order of admission; set by `Requests.add`."""
        self.admitted_at_ns = time.time_ns()
        """Nanoseconds since 1970; of no other request of this process."""
        self.member = member
        self.context = member.context
        """What ends it early, with those below it."""
        self._own_error: UnbrokenError | None = None
        """Why it is ended early, if it was not ended with another or by name."""
        self._soft_from: dict[Choice, int] = {}
        """When it is cancelled softly: where each choice stood."""
        self._soft_timer: asyncio.TimerHandle | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._dispatcher = dispatcher
        self.choices = tuple(
            Choice(
                machine.Stream(
                    checkpoint,
                    admitted.model.tokenizer,
                    policy=envelope.policy,
                    limits=limits,
                    epoch=epoch,
                    taken_ms=taken_ms,
                    past=None if pasts is None else pasts[index],
                ),
                index,
                dispatcher=dispatcher,
                envelope=envelope,
                model=admitted.model,
                news=self.news,
                deadline_at=deadline_at,
                is_new=not any(past.num_begun or past.token_ids for past in pasts or ()),
            )
            for index, checkpoint in enumerate(admitted.checkpoints)
        )
        self._set_deadline(deadline_at)
        self.context.on_change.append(self._context_changed)  # Last: what was not made hears none.

    @property
    def request_id(self) -> str:
        return self.admitted.envelope.request_id

    @property
    def key(self) -> tuple[str, str]:
        """Tenant and request id: what makes it this request."""
        return self.admitted.envelope.tenant, self.admitted.envelope.request_id

    @property
    def is_done(self) -> bool:
        """Whether every choice is."""
        for choice in self.choices:  # noqa: SIM110 - asked for every token; `all` is dearer.
            if choice.stream.outcome is None:
                return False
        return True

    @property
    def has_done_choice(self) -> bool:
        """Whether one choice is, at least."""
        for choice in self.choices:  # noqa: SIM110 - as above.
            if choice.stream.outcome is not None:
                return True
        return False

    @property
    def error(self) -> UnbrokenError | None:
        """Why the request failed: the error of the choice that failed by itself, if one did."""
        errors = [
            outcome.error
            for choice in self.choices
            if (outcome := choice.stream.outcome) is not None and outcome.error is not None
        ]
        own = [error for error in errors if not isinstance(error, _OtherChoiceFailed)]
        return next(iter(own), None)

    @property
    def num_tokens(self) -> int:
        """Of the prompt and of all outputs so far."""
        return self.admitted.num_prompt_tokens + sum(len(c.stream.ledger) for c in self.choices)

    @property
    def num_moves(self) -> int:
        """Grows when a choice is placed: resume tokens from before are out of date."""
        num_moves = 0
        for choice in self.choices:  # Asked for every token; `sum` is dearer.
            num_moves += choice.stream.num_moves
        return num_moves

    def begin(self) -> None:
        """Let the choices look for workers. Idempotent."""
        if not self._has_begun:
            self._has_begun = True
            first = self.choices[0]
            first.begin()
            if first.has_to_wait:
                first.on_turn = self._begin_others
            else:
                self._begin_others()
            self.fail_together()

    def _begin_others(self) -> None:
        """The first choice got in, and what it speaks for."""
        first, *others = self.choices
        if others:
            first.others_begin()
        for choice in others:
            if self.error is not None:
                break  # Refused at once, so that the others never begin.
            choice.begin()

    def take_over(self, on_news: Callable[[], None]) -> int:
        """Another call reads it from now on; returns the number of that reader."""
        self.reader += 1
        for choice in self.choices:
            if choice.stream.ride is not None:
                choice.stream.ride.close()
        before, self.news.tell = self.news.tell, on_news
        before()  # It finds out that it has been replaced.
        return self.reader

    def can_rewind(self, positions: Sequence[pb.ResumePosition]) -> bool:
        """Whether everything after these positions, one per choice, can be told again."""
        return all(
            choice.stream.can_rewind(len(position.token_ids))
            for choice, position in zip(self.choices, positions, strict=True)
        )

    def rewind(self, positions: Sequence[pb.ResumePosition], *, deadline_at: float | None) -> None:
        """The next reader holds this much of each choice.

        Raises `machine.Mismatch`, and then changes nothing: somebody else may be reading.
        """
        streams = [choice.stream for choice in self.choices]
        texts = [
            stream.text_after(position.token_ids, position.num_text_bytes)
            for stream, position in zip(streams, positions, strict=True)
        ]
        for choice, position, text in zip(self.choices, positions, texts, strict=True):
            commands = choice.stream.rewind(len(position.token_ids), text)
            if commands:
                choice.obey(commands)
        if not self.is_settled:
            self._set_deadline(deadline_at)

    def resume_token(
        self, keyring: resume_token.Keyring, *, now: float, lifetime_s: float
    ) -> bytes:
        """What lets another frontend go on from here. `now` is the time of day."""
        streams = [choice.stream for choice in self.choices]
        claims = [
            resume_token.ChoiceClaim(
                standing := stream.standing, resume_token.ids_digest(stream.ledger[: standing.base])
            )
            for stream in streams
        ]
        return resume_token.seal(self.resolved, claims, keyring, now=now, lifetime_s=lifetime_s)

    def cancel(self, error: UnbrokenError) -> None:
        """End all choices now, and all that is below it. What is in the ledgers is still delivered.

        Idempotent, and nothing if it is complete.
        """
        if not self.is_done:
            self._own_error = error
            self.context.kill(_below(error))

    def _context_changed(self) -> None:
        """It is to end, by itself or with something above it."""
        error = self._own_error or self.context.error
        assert error is not None, "a context changes for a reason"
        if self.context.is_killed:
            self._end(error)
        else:
            self._end_softly(error)

    def _end(self, error: UnbrokenError) -> None:
        for choice in self.choices:
            choice.obey(choice.stream.cancelled(error))

    def hand_over(self, error: UnbrokenError) -> None:
        """As `cancel`, but the attempts go on for their grace time: who resumes adopts them."""
        if self.is_done:
            return
        self.is_handed_over = True
        for choice in self.choices:
            choice.let_go()
        self._end(error)

    def _end_softly(self, error: UnbrokenError) -> None:
        """End each choice after its next output, and all soon."""
        self.news.is_to_be_polled = True
        loop = asyncio.get_running_loop()
        self._soft_timer = loop.call_later(SOFT_CANCEL_S_MAX, self._end, error)
        for choice in self.choices:
            if choice.stream.ride is not None:
                choice.stream.ride.step_out()  # Else its next output would not be polled.
            self._soft_from[choice] = len(choice.stream.ledger)
            if choice.stream.state is not machine.State.RUNNING:
                choice.obey(choice.stream.cancelled(error))

    def ask_to_move(self, cut_at: float) -> None:
        """Tell its reader that this frontend stops, at `cut_at` at the latest."""
        self.cut_at = cut_at
        self.news.is_to_be_polled = True
        self.news.set()

    def has_sent(self, choice: Choice) -> None:
        """Output of the choice went to the client."""
        soft_from = self._soft_from.get(choice)
        if soft_from is not None and choice.stream.num_sent > soft_from:
            error = self.context.error
            assert error is not None, "it was stopped for a reason"
            choice.obey(choice.stream.cancelled(error))

    def fail_together(self) -> None:
        """If one choice failed, the others end too."""
        error = self.error
        if error is not None and not self.is_done:
            failed = _OtherChoiceFailed(Reason.CANCELLED, f"another choice failed: {error.detail}")
            self._end(failed)

    def close(self) -> None:
        """Whatever still runs ends, here and below; nobody will read it."""
        self.cancel(UnbrokenError(Reason.CANCELLED, "the client left"))
        error = self.error
        if error is not None and error.reason is Reason.DEADLINE_EXCEEDED:
            # An engine may have seen to that; now what is below is told too.
            self.context.kill(_below(error))
        self._forget()

    def discard(self) -> None:
        """It did not come to be: as `close`, and what is below goes on."""
        self._end(UnbrokenError(Reason.CANCELLED, "it was not admitted"))
        self._forget()

    def _forget(self) -> None:
        """Nothing can happen to it any more."""
        for timer in (*self._timers, self._soft_timer):
            if timer is not None:
                timer.cancel()
        self._timers.clear()
        self._soft_timer = None
        with suppress(ValueError):
            self.context.on_change.remove(self._context_changed)

    def info(self) -> pb.StreamInfo:
        """Where it stands."""
        info = pb.StreamInfo(
            request_id=self.request_id,
            model=self.admitted.model.name,
            continuation_class=summaries.way(self.admitted.continuation_class),
            num_prompt_tokens=self.admitted.num_prompt_tokens,
            choices=[
                summaries.choice(one.index, one.stream, one.waiting_detail) for one in self.choices
            ],
            attempts=self._attempts(),
        )
        info.admitted_at.FromNanoseconds(self.admitted_at_ns)
        return info

    def finished(self) -> pb.StreamFinished:
        """The last word to the client."""
        accounts = [choice.stream.accounts for choice in self.choices]
        return pb.StreamFinished(
            choices=[summaries.result(one.index, one.stream) for one in self.choices],
            usage=generation_pb2.Usage(
                prompt_tokens=self.admitted.num_prompt_tokens,
                completion_tokens=sum(len(choice.stream.ledger) for choice in self.choices),
                recomputed_prefill_tokens=sum(one.recomputed_prefill_tokens for one in accounts),
                recomputed_decode_tokens=sum(one.recomputed_decode_tokens for one in accounts),
                cached_prompt_tokens=accounts[0].cached_prompt_tokens,
            ),
            attempts=self._attempts(),
        )

    def _attempts(self) -> Sequence[pb.AttemptSummary]:
        return [
            summaries.attempt(choice.index, attempt)
            for choice in self.choices
            for attempt in choice.stream.attempts
        ]

    def _set_deadline(self, deadline_at: float | None) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        for choice in self.choices:
            choice.deadline_at = deadline_at
        if deadline_at is not None:
            error = UnbrokenError(Reason.DEADLINE_EXCEEDED, "the client's time is up")
            self._end_at(deadline_at - self._dispatcher.clock(), error)

    def _end_at(self, delay_s: float, error: UnbrokenError) -> None:
        loop = asyncio.get_running_loop()
        self._timers.append(loop.call_later(max(0.0, delay_s), self.cancel, error))


def _below(error: UnbrokenError) -> UnbrokenError:
    """What a request ends of, to those below it."""
    return UnbrokenError(Reason.CANCELLED, f"its parent ended early: {error.detail}")


class _OtherChoiceFailed(UnbrokenError):  # noqa: N818 - it names what happened.
    """The request failed by another choice than this."""


@dataclass(eq=False, slots=True)
class Entrant:
    """A call whose request is not admitted yet: it waits for a model, or is being tokenised."""

    member: Member
    arrived_at: float
    """Monotonic seconds."""
    is_admitted: bool = False

    @property
    def context(self) -> Context:
        """What ends it early."""
        return self.member.context

    def check(self) -> None:
        """Raises CANCELLED if it was cancelled, or something above it was."""
        error = self.context.error
        if error is not None:  # Each call raises its own.
            raise UnbrokenError(error.reason, error.detail)


class Requests:
    """All requests, by id."""

    def __init__(
        self,
        *,
        running_max: int,
        claims: Claims | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`claims` are those of this process, if the frontend has several."""
        self._running_max = running_max
        self._claims = claims
        self._clock = clock
        self._running: dict[tuple[str, str], Request] = {}
        """By tenant and request id."""
        self._ended: OrderedDict[int, tuple[float, str, pb.StreamInfo]] = OrderedDict()
        """When, whose and what, by place in the order of admission, in the order of their ends."""
        self._complete: OrderedDict[tuple[str, str], tuple[float, Request]] = OrderedDict()
        """When and what can be told again, by tenant and request id, in the order of their ends."""
        self._complete_tokens = 0
        self._lineage = Lineage()
        self._entrants: dict[Entrant, None] = {}
        self._last_sequence = 0
        self._untold: deque[Request] = deque()
        """Those that are to be asked to move, some of which may have ended."""
        self.on_end: list[Callable[[Request], None]] = []
        """Called with each that has ended."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def running(self) -> Collection[Request]:
        """In the order of admission."""
        return self._running.values()

    @property
    def claimed_for_nothing(self) -> Set[tuple[str, str]]:
        """Tenants and ids of requests that this process claims, and neither runs nor tells."""
        claimed: Set[tuple[str, str]] = set() if self._claims is None else self._claims.held
        return claimed - self._running.keys() - self._complete.keys()

    def find(self, envelope: Envelope, digest: bytes) -> Request | None:
        """The equal request, if it runs or is complete since not long ago.

        Raises REQUEST_EXISTS if another one runs under its id, and `Elsewhere` if another process
        of this frontend has it.
        """
        self._prune()
        key = envelope.tenant, envelope.request_id
        running = self._running.get(key)
        if running is not None:
            if running.digest != digest:
                raise UnbrokenError(
                    Reason.REQUEST_EXISTS,
                    f"another request runs under the id {envelope.request_id}",
                    metadata={"request_id": envelope.request_id},
                )
            return running
        _, complete = self._complete.get(key, (0.0, None))
        if complete is not None and complete.digest == digest:
            return complete
        if self._claims is not None:
            self._claims.check(key)
        return None

    def check_room(self) -> None:
        """Raises OVERLOADED if no request can be added now."""
        if len(self._running) >= self._running_max:
            raise UnbrokenError(
                Reason.OVERLOADED,
                f"{len(self._running)} requests run, which is the limit of this frontend",
                retry_after_s=1.0,
            )

    def add(self, request: Request) -> None:
        """A request was admitted, which `find` did not know; raises as `check_room`.

        Raises `Elsewhere` if another process has admitted it meanwhile.
        """
        assert request.key not in self._running, "who is found is joined"
        assert request.member.num_here, "whoever it arrived with has entered it"
        self.check_room()
        if self._claims is not None:
            self._claims.take(request.key)
        self._last_sequence = max(self._last_sequence + 1, request.admitted_at_ns)
        request.sequence = request.admitted_at_ns = self._last_sequence
        self._running[request.key] = request
        self._forget_complete(request.key)

    def remove(self, request: Request) -> None:
        """A request ended; it stays known for a while."""
        del self._running[request.key]
        now = self._clock()
        self._ended[request.sequence] = (now, request.key[0], request.info())
        outcomes = [choice.stream.outcome for choice in request.choices]
        if all(outcome is not None and outcome.error is None for outcome in outcomes):
            self._complete[request.key] = (now, request)
            self._complete_tokens += request.num_tokens
        self._release(request.key)
        self._lineage.leave(request.member, now)
        self._prune()
        for callback in self.on_end:
            callback(request)

    @contextmanager
    def entering(
        self, envelope: Envelope, arrived_at: float, *, is_resumed: bool = False
    ) -> Generator[Entrant]:
        """A call asks for a request that is not here; it can be cancelled from here on.

        Raises CANCELLED if it is to be resumed and was cancelled by name meanwhile.
        """
        key = envelope.tenant, envelope.request_id
        member = self._lineage.enter(
            key, envelope.parent_request_id, self._clock(), is_resumed=is_resumed
        )
        entrant = Entrant(member, arrived_at)
        self._entrants[entrant] = None
        try:
            yield entrant
        finally:
            del self._entrants[entrant]
            if not entrant.is_admitted:
                self._lineage.leave(member, self._clock())

    @property
    def entrants(self) -> Collection[Entrant]:
        """Calls whose requests are not admitted yet."""
        return self._entrants.keys()

    def cancel(self, request_id: str, *, tenant: str, soft: bool) -> Sequence[Key]:
        """Cancel the requests of that name and those below them.

        Those of every tenant, unless one is named. Returns those that were running, parents first.
        """
        self._lineage.remember((tenant or None, request_id), self._clock(), is_by_name=True)
        return self._cancel_all(self._lineage.named(request_id, tenant), soft=soft)

    def cancel_below(self, parents: Set[Key], *, soft: bool) -> Sequence[Key]:
        """Cancel the requests below others, which are elsewhere; returns those that ran."""
        for key in parents:
            self._lineage.remember(key, self._clock(), is_by_name=True)
        return self._cancel_all(parents, soft=soft)

    def _cancel_all(self, keys: Iterable[Key], *, soft: bool) -> Sequence[Key]:
        error = UnbrokenError(Reason.CANCELLED, "cancelled by request")
        return self._lineage.cancel(keys, error, is_soft=soft)

    def hand_over_all(self, error: UnbrokenError) -> None:
        """End everything that runs here; whoever resumes it elsewhere finds it at its workers."""
        for request in list(self._running.values()):
            request.hand_over(error)

    def begin_to_move(self) -> None:
        """All that runs is to be asked to move, by `ask_to_move`. No request may be added later."""
        self._untold.extend(self._running.values())

    @property
    def num_untold(self) -> int:
        """How many have not been asked, at most."""
        return len(self._untold)

    def ask_to_move(self, num_requests: int, cut_at: float) -> None:
        """Ask so many more."""
        while num_requests > 0 and self._untold:
            request = self._untold.popleft()
            if not request.is_settled:
                num_requests -= 1
                request.ask_to_move(cut_at)

    def get(self, request_id: str, *, tenant: str) -> pb.StreamInfo:
        """The newest request of that name, of any tenant unless one is named.

        Raises STREAM_NOT_FOUND.
        """
        self._prune()
        for running in reversed(self._running.values()):
            if running.request_id == request_id and tenant in ("", running.key[0]):
                return running.info()
        for _, owner, info in reversed(self._ended.values()):
            if info.request_id == request_id and tenant in ("", owner):
                return info
        raise UnbrokenError(
            Reason.STREAM_NOT_FOUND,
            f"no request {request_id!r} here, or it ended over {ENDED_S_MAX:g} s ago",
            metadata={"request_id": request_id[:128]},
        )

    def page(self, page_size: int, page_token: str) -> tuple[Sequence[pb.StreamInfo], str]:
        """Requests, oldest first, and the token of the next page; raises `InvalidField`."""
        if page_size > PAGE_SIZE_MAX:
            raise InvalidField("page_size", f"0 to {PAGE_SIZE_MAX}", page_size)
        page_size = page_size or PAGE_SIZE_DEFAULT
        after = _read_token(page_token) if page_token else 0
        self._prune()
        entries: Iterator[tuple[int, Request | pb.StreamInfo]] = itertools.chain(
            ((sequence, info) for sequence, (_, _, info) in self._ended.items()),
            ((request.sequence, request) for request in self._running.values()),
        )
        rest = (entry for entry in entries if entry[0] > after)
        found = heapq.nsmallest(page_size + 1, rest, key=lambda entry: entry[0])
        page = found[:page_size]
        streams = [one.info() if isinstance(one, Request) else one for _, one in page]
        return streams, page_token_after(page[-1][0]) if len(found) > page_size else ""

    def _prune(self) -> None:
        now = self._clock()
        while self._complete:
            key, (ended_at, _) = next(iter(self._complete.items()))
            if (
                now - ended_at <= TOLD_AGAIN_S_MAX
                and len(self._complete) <= TOLD_AGAIN_MAX
                and self._complete_tokens <= TOLD_AGAIN_TOKENS_MAX
            ):
                break
            self._forget_complete(key)
        while self._ended:
            sequence, (ended_at, _, _) = next(iter(self._ended.items()))
            if now - ended_at <= ENDED_S_MAX and len(self._ended) <= ENDED_MAX:
                return
            del self._ended[sequence]

    def forget_complete(self) -> None:
        """Tell nothing again from here on that is complete by now."""
        for key in list(self._complete):
            self._forget_complete(key)

    def _forget_complete(self, key: tuple[str, str]) -> None:
        _, request = self._complete.pop(key, (0.0, None))
        if request is not None:
            self._complete_tokens -= request.num_tokens
            self._release(key)

    def _release(self, key: tuple[str, str]) -> None:
        """Let other processes have the request, unless it is here still."""
        if self._claims is not None and key not in self._running and key not in self._complete:
            self._claims.release(key)


def page_token_after(sequence: int) -> str:
    """Opaque to callers: the place in the order of admission after which the next page begins.

    It is a time, so it means the same in all processes of a frontend.
    """
    return base64.urlsafe_b64encode(f"v1:{sequence}".encode()).decode()


def _read_token(token: str) -> int:
    try:
        version, _, sequence = base64.b64decode(token, altchars=b"-_", validate=True).partition(
            b":"
        )
        if version != b"v1":
            raise ValueError(version)
        return int(sequence)
    except (binascii.Error, ValueError) as error:
        raise InvalidField("page_token", "a next_page_token of ListStreams", token) from error
