"""How a call reads a request: one reader at a time, and what happens when it leaves.

A reader waits on one event, whatever number of choices there are. Each time it wakes it sends all
that is new in one message per choice, so a client that reads slowly gets fewer and larger messages;
what it has not been sent yet is bounded by the window of its worker.

A later call for the same request takes it over, and the one before ends with FENCED. Without a
reader a request ends, unless its client asked to be waited for (`reader_grace`).
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from frontend import summaries
from frontend.metrics import FrontendMetrics
from frontend.requests import Request, Requests
from frontend.resume_token import Keyring
from unbroken import log
from unbroken.errors import Reason, UnbrokenError
from unbroken.outcome import FailureKind
from unbroken.v1 import inference_service_pb2 as pb

_log = log.get_logger(__name__)


class Readers:
    """All calls that read requests of this frontend, and what keeps requests without one."""

    def __init__(
        self,
        frontend_id: str,
        requests: Requests,
        metrics: FrontendMetrics,
        keys: Callable[[], Keyring],
        *,
        token_lifetime_s: float,
        clock: Callable[[], float],
        time_of_day: Callable[[], float] = time.time,
    ) -> None:
        self._frontend_id = frontend_id
        self._requests = requests
        self._metrics = metrics
        self._keys = keys
        self._token_lifetime_s = token_lifetime_s
        self._clock = clock
        self._time_of_day = time_of_day
        self._keepers: set[asyncio.Task[None]] = set()

    async def read(
        self, request: Request, *, arrived_at: float, open_call: Callable[[], Awaitable[None]]
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """What this call is told, from `started` to `finished`; raises what the request failed of.

        `open_call` is done first. The caller closes the generator.
        """
        number = request.take_over()
        is_first = number == 1
        tokens = _Tokens(self, request)
        try:
            # Where a worker is ready, the first token already says which one it is.
            request.begin()
            await open_call()
            yield self._started(request, tokens.newest())
            while True:
                request.wake.clear()
                _check_reader(request, number)
                request.fail_together()
                is_done = request.is_done  # Whether what follows is all there is.
                for choice in request.choices:
                    if not choice.stream.has_output:
                        continue
                    if is_first:
                        is_first = False
                        self._metrics.ttft_s.observe(self._clock() - arrived_at)
                    # Nobody holds tokens of a worker that no resume token of his names.
                    token = tokens.newer()
                    piece, commands = choice.stream.take()
                    for message in summaries.messages(choice.index, piece):
                        message.resume_token, token = token, b""
                        yield message
                        _check_reader(request, number)
                    self._metrics.tokens_delivered.inc(len(piece.token_ids))
                    choice.obey(commands)  # Windows move when tokens have left.
                    request.has_sent(choice)
                if is_done:
                    break
                if token := tokens.newer():
                    yield pb.GenerateResponse(resume_token=token)
                    continue
                await request.wake.wait()
            yield pb.GenerateResponse(finished=request.finished())
        finally:
            if request.reader == number:
                self._left(request)
        if request.error is not None:
            raise _raisable(request.error)

    def drop(self, request: Request) -> None:
        """End a request, whoever reads it."""
        request.take_over()
        self._settle(request)

    async def close(self) -> None:
        """Keep nothing any more."""
        keepers = list(self._keepers)
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    def mint(self, request: Request) -> tuple[bytes, float]:
        """A resume token, and when it should be replaced, monotonic seconds."""
        lifetime_s = self._token_lifetime_s
        token = request.resume_token(self._keys(), now=self._time_of_day(), lifetime_s=lifetime_s)
        return token, self._clock() + lifetime_s / 2

    def is_due(self, due: float) -> bool:
        """Whether that time has come."""
        return self._clock() >= due

    # Inside.

    def _left(self, request: Request) -> None:
        """Its reader has gone."""
        grace_s = request.admitted.envelope.reader_grace_s
        if request.is_settled:
            return
        if request.is_done or not grace_s:
            self._settle(request)
            return
        keeper = asyncio.create_task(
            self._keep(request, grace_s), name=f"keep {request.request_id}"
        )
        self._keepers.add(keeper)
        keeper.add_done_callback(self._keepers.discard)

    async def _keep(self, request: Request, grace_s: float) -> None:
        """Stand in for a reader that may come back. The window bounds what is generated."""
        number = request.reader
        try:
            async with asyncio.timeout(grace_s):
                while request.reader == number and not request.is_done:
                    request.wake.clear()
                    request.fail_together()
                    await request.wake.wait()
        except TimeoutError:
            pass
        finally:
            if request.reader == number:
                self._settle(request)

    def _settle(self, request: Request) -> None:
        if request.is_settled:
            return
        request.close()
        request.is_settled = True
        self._requests.remove(request)
        self._account(request)

    def _started(self, request: Request, token: bytes) -> pb.GenerateResponse:
        admitted = request.admitted
        return pb.GenerateResponse(
            started=pb.StreamStarted(
                request_id=request.request_id,
                model=admitted.model.name,
                continuation_class=summaries.way(admitted.continuation_class),
                continuation_detail=admitted.continuation_detail,
                resume_token=token,
                num_prompt_tokens=admitted.num_prompt_tokens,
                seed=admitted.seed,
                migrations_max=admitted.envelope.migrations_max,
                frontend_id=self._frontend_id,
            )
        )

    def _account(self, request: Request) -> None:
        error = request.error
        reason = "OK" if error is None else error.reason.value
        self._metrics.requests_finished.labels(reason).inc()
        for choice in request.choices:
            stream = choice.stream
            self._metrics.recomputed("prefill", stream.accounts.recomputed_prefill_tokens)
            self._metrics.recomputed("decode", stream.accounts.recomputed_decode_tokens)
            for attempt in stream.attempts:
                if attempt.is_adopted:
                    self._metrics.adopted(is_refused=attempt.is_refused)
                if attempt.gap_s is not None:
                    self._metrics.gap_s.observe(attempt.gap_s)
        losses = [
            attempt.failure
            for choice in request.choices
            for attempt in choice.stream.attempts
            if attempt.failure is not FailureKind.UNSPECIFIED
        ]
        if losses or error is not None:
            _log.info(
                "request ended after failures",
                request_id=request.request_id,
                reason=reason,
                failures=[failure.name for failure in losses],
            )


class _Tokens:
    """The resume tokens of one call."""

    def __init__(self, readers: Readers, request: Request) -> None:
        self._readers = readers
        self._request = request
        self._num_moves = 0
        self._due = 0.0

    def newest(self) -> bytes:
        """One that says where the request is now."""
        self._num_moves = self._request.num_moves
        token, self._due = self._readers.mint(self._request)
        return token

    def newer(self) -> bytes:
        """One if the request has moved since the last one, or that one grows old; else nothing."""
        if self._request.num_moves == self._num_moves and not self._readers.is_due(self._due):
            return b""
        return self.newest()


def _check_reader(request: Request, number: int) -> None:
    if request.reader != number:
        raise UnbrokenError(Reason.FENCED, "a later call reads this request")


def _raisable(error: UnbrokenError) -> UnbrokenError:
    """A copy: one error can end several choices and requests, and each call raises its own."""
    return UnbrokenError(
        error.reason, error.detail, metadata=error.metadata, retry_after_s=error.retry_after_s
    )
