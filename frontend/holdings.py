"""What a frontend holds for requests, gathered from all who hold something."""

from collections.abc import Iterator

from frontend.dispatch import Dispatcher
from frontend.links import Links
from frontend.reading import Readers
from frontend.requests import Request, Requests
from unbroken.holdings import Holding, Kind, StreamName


class FrontendHoldings:
    """Of one process of a frontend."""

    def __init__(
        self, requests: Requests, readers: Readers, dispatcher: Dispatcher, links: Links
    ) -> None:
        self._requests = requests
        self._readers = readers
        self._dispatcher = dispatcher
        self._links = links

    def __iter__(self) -> Iterator[Holding]:
        """Everything that is held now."""
        yield from self._of_requests()
        yield from self._of_lines()
        for worker_id, seat in self._links.seats():
            if not seat.is_probe:
                detail = f"at {worker_id}"
                yield Holding(Kind.ATTEMPT, seat.name, seat.started_at, 1, seat.epoch, detail)

    def _of_requests(self) -> Iterator[Holding]:
        for request in self._requests.running:
            yield Holding(Kind.REQUEST, _name(request), request.began_at)
        for reader in self._readers.open_now:
            yield Holding(Kind.READER, _name(reader.request), reader.arrived_at)
        for request, since in self._readers.keepers:
            detail = "waits for its reader to come back"
            yield Holding(Kind.TASK, _name(request), since, detail=detail)
        for tenant, request_id in self._requests.claimed_for_nothing:
            detail = "neither runs here nor can it be told again"
            yield Holding(Kind.CLAIM, (tenant, request_id, 0), detail=detail)

    def _of_lines(self) -> Iterator[Holding]:
        for entrant in self._requests.entrants:
            name, since = (*entrant.member.key, 0), entrant.arrived_at
            yield Holding(Kind.QUEUE_ENTRY, name, since, detail="waits to be admitted")
        queue = self._dispatcher.queue
        for choice, ticket, since in queue.waiting():
            detail = queue.detail(choice)
            yield Holding(Kind.QUEUE_ENTRY, choice.name, since, ticket.price, detail=detail)
        line = self._dispatcher.room.queue
        for choice, arrival, since in line.waiting():
            detail = line.detail(choice)
            yield Holding(Kind.QUEUE_ENTRY, choice.name, since, arrival.num_tokens, detail=detail)
        for choice, since in self._dispatcher.pausing.paused():
            detail = choice.waiting_detail
            yield Holding(Kind.QUEUE_ENTRY, choice.name, since, choice.num_tokens, detail=detail)
        for worker_id, choice in self._dispatcher.unlinked():
            detail = f"waits for the link to {worker_id}"
            yield Holding(Kind.QUEUE_ENTRY, choice.name, detail=detail)
        for choice, life, num_tokens, since in queue.computing():
            detail = f"at {life.worker_id}, until its prompt is computed"
            yield Holding(Kind.RESERVATION, choice.name, since, num_tokens, detail=detail)


def _name(request: Request) -> StreamName:
    return (*request.key, 0)
