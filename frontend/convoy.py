"""Streams of one link that go together: of each, every engine step says one token and no more.

    a Relay frame ──▶ Convoy.go ──▶ DATA frames of all that ride, one piece for each connection
                          └──▶ the rows of the others, which go the long way

With hundreds of streams nothing of a stream is in a near cache when its next token comes, so what
costs is to touch it. Here it is not touched: a step is a column of token ids behind the columns of
the steps before, and is checked and written as a whole. What a stream has to know of it, its ledger
and what is left of its window, is entered when somebody asks (`Ride.settle`), and every
`STEPS_MAX` steps.

A stream rides while nothing about it is unusual: its client has been sent all that came before, by
the short way; each token has a text of its own; no stop token, end, acknowledgement or window is so
near that the next token could meet it; but acknowledgements are made on the way, when it is looked
at. Whoever does anything else with it lets it step out first;
when all is as before it gets on again by itself, with the first frame that finds it so.
"""

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from operator import sub
from typing import Final, Protocol

from frontend.edge.encoding import (
    BODY_BYTES_MAX,
    OFFSETS,
    TokenBodies,
    TokenFields,
    have_offsets,
)
from frontend.stream import Stream
from unbroken.http2.connection import Connection, HttpStream
from unbroken.http2.frames import HEADER_BYTES

ROWS_MIN = 8
"""Of a frame, for anybody to ride: of fewer it saves nothing, and those who are told by their calls
are merged for earlier."""
STEPS_MAX: Final = 480
"""Tokens of a stream that are not in its ledger yet, at most: just below half of the usual window,
at which an acknowledgement is due, and that needs a look anyway."""
PAUSE_STEPS: Final = 8
_ROWS_TOGETHER: Final = 16
"""Neighbours are looked at in the same step: their ids lie side by side in each column, so that all
are entered with the cache misses of one."""
_TOGETHER_STEPS: Final = STEPS_MAX // 2
"""A group of neighbours is looked at in one step of so many, the next group `_LOOK_STEPS` later."""
_LOOK_STEPS: Final = 4
"""Looks are made in every fourth step, at several streams: who is due is found by going through
all. Who may ride for fewer is looked at each time."""
_ASK_SHARE: Final = 1 / 32
"""So many calls at least are asked at once whether they have something else to tell."""
_FEW: Final = 8
"""Rows that are taken out of each column one by one; where more go, columns are given up."""
ODD_FRAMES: Final = 32
"""Who said something that has no text of its own, half a character, soon says more of it: so many
frames go by before it rides again. For all others, each who steps out is dear."""
_NEVER: Final = 1 << 62
_STEPS_KEPT: Final = 2 * STEPS_MAX
"""Columns, so that many are thrown away at once."""
_IDS_KEPT_MAX: Final = 1 << 24
"""Of all columns together, 64 MiB: above, everybody is told, and columns begin anew. What 10,000
rows take is below."""
_ROWS_SPARE_MIN: Final = 16
_ROWS_SPARE_SHARE: Final = 0.25
"""So many more rows than there are have room in a column. For more, everybody is told, and columns
begin anew."""


class Edge(Protocol):
    """All connections of clients."""

    @property
    def is_scheduled(self) -> bool:
        """Something is to be written in the next turn of the loop, which nothing may overtake."""
        ...


class Client(Protocol):
    """A connection of a client, and its socket."""

    @property
    def connection(self) -> Connection: ...

    @property
    def edge(self) -> Edge:
        """Where it belongs."""
        ...

    @property
    def is_paused(self) -> bool:
        """The socket takes nothing more for now. If it comes to that, whoever rides there alone is
        stepped out, even amid `send_now`."""
        ...

    @property
    def send_now(self) -> Callable[[bytes], None]:
        """Sends to the socket at once, whatever waits to be sent. Raises nothing."""
        ...

    def send_later(self, data: bytes) -> None:
        """Send it in the next turn of the loop, after what waits. Raises nothing."""
        ...

    def send_frames(
        self, data: bytes, num_frames: int, num_body_bytes: int, *, is_all: bool
    ) -> bool:
        """Send those, which the window of each stream MUST take, and of which nothing is taken: at
        once, if that `is_all` of this turn of the loop. False if the client is behind, and nothing
        is done then. Raises nothing.
        """
        ...


class Call(Protocol):
    """Whoever reads a stream for a client."""

    @property
    def look_interval_s(self) -> float:
        """Seconds after which `is_plain` is to be asked again: time alone can change it."""
        ...

    def is_plain(self, now: float) -> bool:
        """Whether now, in monotonic seconds, nothing but tokens is to be told."""
        ...

    def crashed(self, error: Exception) -> None:
        """A bug of this call or its stream was met: end it."""
        ...

    def acknowledge_early(self) -> None:
        """Tell the worker what the client was sent, if that is due soon (`Stream.is_ack_near`)."""
        ...


class Ride:
    """One stream, from where its frames come to where its client reads, while one call reads it."""

    __slots__ = (
        "_convoy",
        "bodies",
        "call",
        "client",
        "http_stream",
        "is_alone",
        "is_on",
        "row",
        "since",
        "stream",
        "tail",
    )

    def __init__(
        self,
        stream: Stream,
        client: Client,
        http_stream: HttpStream,
        bodies: TokenBodies,
        call: Call,
    ) -> None:
        self.stream = stream
        self.client = client
        self.http_stream = http_stream
        self.bodies = bodies
        self.call = call
        self.tail = http_stream.data_header_tail
        self.row = 0
        self.since = 0
        """The first step that its stream does not know."""
        self._convoy: Convoy | None = None
        self.is_on = False
        """It goes with a convoy now; for those who ask with every token."""
        self.is_alone = False
        """Its connection has no other stream, and is not touched by a step either."""
        stream.ride = self
        http_stream.ride = self

    def num_steps_max(self, now: float) -> int:
        """How many tokens may be told as they come, without anybody looking.

        Sees to it that the fields of their offsets are there, which are taken unasked then.
        """
        http_stream = self.http_stream
        if http_stream.is_closed or http_stream.pending or not self.call.is_plain(now):
            return 0
        num_in_window = http_stream.send.left // BODY_BYTES_MAX
        if (connection := self.client.connection).num_streams == 1:
            if self.client.is_paused:
                return 0
            num_in_window = min(num_in_window, connection.send_window.left // BODY_BYTES_MAX)
        num_steps_max = min(self.stream.num_plain_max, num_in_window)
        if num_steps_max <= 0:
            return 0
        num_settled = self.stream.num_settled
        num_offsets = have_offsets(num_settled + min(num_steps_max, STEPS_MAX))
        return max(0, min(num_steps_max, num_offsets - num_settled))

    def get_on(self, convoy: "Convoy") -> None:
        """The convoy takes it along, for as many steps as `num_steps_max` has just said."""
        self._convoy = convoy
        self.is_on = True
        connection = self.client.connection
        if connection.num_streams == 1:
            self.is_alone = True
            connection.ride = self

    def settle(self) -> None:
        """Let the stream and its window know all that was told."""
        convoy = self._convoy
        if convoy is None:
            return
        try:
            token_ids = convoy.told(self)
            if token_ids:
                offset = self.stream.rode(token_ids, convoy.stepped_at)
                num_bytes = self.bodies.size(offset, token_ids)
                self.http_stream.send.left -= num_bytes
                if self.is_alone:
                    self.client.connection.count_frames(len(token_ids), num_bytes)
        except Exception:  # A bug. It must not ride on with a gap behind it.
            self._get_off(convoy)
            raise

    def step_out(self) -> None:
        """Settle, and go the long way from here on, until all is as usual. Idempotent."""
        self.settle()
        if self._convoy is not None:
            self._get_off(self._convoy)

    def close(self) -> None:
        """The call reads no more. Idempotent."""
        self.step_out()
        if self.stream.ride is self:
            self.stream.ride = None
        if self.http_stream.ride is self:
            self.http_stream.ride = None

    def _get_off(self, convoy: "Convoy") -> None:
        self._convoy = None
        self.is_on = False
        if self.is_alone:
            self.is_alone = False
            self.client.connection.ride = None
        convoy.lost(self)


class _Group:
    """Those that ride to one connection, which has several streams."""

    __slots__ = ("client", "frames", "num_body_bytes", "num_rows", "parts", "put", "rides")

    def __init__(self, client: Client) -> None:
        self.client = client
        self.num_rows = 0
        self.parts: list[bytes] = []
        self.put = self.parts.extend
        """One for all: those of each row would lie in cache lines of their own."""
        self.frames = b""
        """What those parts make, a frame for each row."""
        self.num_body_bytes = 0
        """Of them what windows are about."""
        self.rides: list[Ride] = []


class Convoy:
    """The rows of a link's frames, and which of them ride.

    The owner calls `align` before the first frame of other slots, or after somebody came or went,
    and `go` with each frame of one token a row.
    """

    def __init__(self, *, rows_min: int | None = None) -> None:
        """`rows_min` instead of `ROWS_MIN`."""
        self._rows_min = ROWS_MIN if rows_min is None else rows_min
        self.stepped_at = 0.0
        """When the last step came."""
        self._slots: list[int] = []
        self._streams: list[Stream | None] = []
        self._epochs: list[int] = []
        self._rides: list[Ride | None] = []
        """Of each row that rides."""
        self._dues: list[int] = []
        """The step in which each of them may not ride without being looked at."""
        self._boards_at: list[int] = []
        """Of each row, the frame in which it may ride at the earliest."""
        self._num_frames = 0
        self._others: list[int] = []
        """The rows that do not."""
        self._ids = array("I")
        """Columns, one after the other: the ids of all rows, ridden or not. The last column is that
        of step `_num_steps - 1`."""
        self._num_in_column = 0
        """Rows that have room in one."""
        self._spare = b""
        """What stands in a column for those that there are not."""
        self._num_steps = 0
        self._num_until_boarding = 0
        self._is_stale = False
        """What follows is not that of those who ride now."""
        self._due = 0
        self._look_interval_s = math.inf
        self._asked_at = 0.0
        self._ask_due = 0.0
        """Before that `_ask` finds nothing to do."""
        self._next_to_ask = 0
        """The row whose call is asked next whether it has something else to tell."""
        self._mask: list[bool] = []
        self._offsets: array[int] = array("I")
        """Of each, that of its next token when they were lined up,"""
        self._num_told = 0
        """and how many have been told since."""
        self._went_with: tuple[list[int] | None, int] = None, 0
        """What `go` was told of the frame before."""
        # Columns again, in which what is needed lies side by side: the ends of headers of DATA
        # frames, what stands before messages, and where the frames are put.
        self._tails: list[bytes] = []
        self._heads: list[tuple[Sequence[bytes], Sequence[bytes]]] = []
        self._puts: list[Callable[[Iterable[bytes]], None]] = []
        self._groups: list[_Group] = []
        # And those that ride alone: as many columns of their own.
        self._alone: list[Ride] = []
        self._sends: list[Callable[[bytes], None]] = []
        self._parts: list[Iterable[bytes]] = []
        """What their frames of this step are made of."""
        self._edges: set[Edge] = set()
        self._stop_ids: frozenset[int] = frozenset()
        """All ids that end the output of somebody who rides,"""
        self._stop_columns: list[frozenset[int]] = []
        """and those of each."""
        self._fields: TokenFields | None = None

    # Who is there.

    def align(
        self, slots: list[int], streams: Sequence[Stream | None], epochs: Sequence[int]
    ) -> None:
        """Frames have these rows from now on. A row of nobody's has no stream."""
        here = set(slots)
        gone = [row for row, slot in enumerate(self._slots) if slot not in here]
        if len(gone) > _FEW:
            self._settle_all(len(self._slots))
        for row in reversed(gone):
            self._drop(row)
        if self._slots != slots[: len(self._slots)]:
            self.stop()  # They come in another order.
            self._slots, self._rides, self._dues, self._boards_at = [], [], [], []
        num_new = len(slots) - len(self._slots)
        if len(slots) > self._num_in_column:
            num_spare = max(_ROWS_SPARE_MIN, int(_ROWS_SPARE_SHARE * len(slots)))
            self._settle_all(len(slots) + num_spare)
        self._slots = list(slots)
        self._rides += [None] * num_new
        self._dues += [_NEVER] * num_new
        self._boards_at += [0] * num_new
        for row, (ride, stream) in enumerate(zip(self._rides, streams, strict=True)):
            if ride is not None:
                ride.row = row
                if ride.stream is not stream:
                    ride.step_out()
        self._streams, self._epochs = list(streams), list(epochs)
        self._spare = bytes(self._ids.itemsize * (self._num_in_column - len(slots)))
        self._is_stale = True

    def forget(self) -> None:
        """Somebody came or went, and `align` says who, before the next step."""
        self._streams = []

    def pause(self) -> None:
        """More came at once than is told one by one: for a while nobody gets on."""
        self._num_until_boarding = PAUSE_STEPS

    def stop(self) -> None:
        """Nobody rides."""
        for ride in list(self._rides):
            if ride is not None:
                ride.step_out()

    def lost(self, ride: Ride) -> None:
        """It rides no more."""
        self._rides[ride.row] = None
        self._dues[ride.row] = _NEVER
        self._is_stale = True
        # Nobody is kept alive here who has gone.
        self._puts, self._groups, self._alone, self._sends = [], [], [], []

    def told(self, ride: Ride) -> Sequence[int]:
        """What was told of it that it has not entered; that is done from here on."""
        num_new = self._num_steps - ride.since
        if not num_new:
            return ()
        ride.since = self._num_steps
        ids, step = self._ids, self._num_in_column
        return ids[len(ids) - num_new * step + ride.row :: step]

    def _settle_all(self, num_in_column: int) -> None:
        """Begin with columns of so many anew: there is nothing in the others that is not known."""
        for ride in self._rides:
            if ride is not None:
                ride.settle()
        self._ids = array("I")
        self._num_in_column = num_in_column

    def _drop(self, row: int) -> None:
        """That row is not in frames any more."""
        ride = self._rides[row]
        if ride is not None:
            ride.step_out()
        for rows in (self._slots, self._rides, self._dues, self._boards_at):
            del rows[row]
        del self._ids[row :: self._num_in_column]
        self._num_in_column -= 1
        if row < self._next_to_ask:
            self._next_to_ask -= 1
        for later in self._rides[row:]:
            if later is not None:
                later.row -= 1

    # A step.

    def go(
        self,
        offsets: list[int],
        token_ids: list[int],
        now: float,
        *,
        is_last: bool = False,
        num_after: int = 0,
    ) -> Sequence[int]:
        """Tell what a frame says of those that ride; returns the rows that go the long way.

        Each token stands `num_after` after its offset. If the frame `is_last`, no other is to be
        told now.
        """
        self._num_frames += 1
        before, num_after_before = self._went_with
        is_next = offsets is before and num_after == num_after_before + 1
        self._went_with = offsets, num_after
        self._board(now)
        while True:
            if self._is_stale:
                self._line_up()
                is_next = False  # They were lined up anew, so each is compared.
            if not self._offsets:
                return self._others
            ids = token_ids if not self._others else list(compress(token_ids, self._mask))
            if (
                (is_next or self._are_next(offsets, num_after))
                and (self._stop_ids.isdisjoint(ids) or self._ends_nobody(ids))
                and self._write(ids)
            ):
                break
            self._put_out_odd(offsets, num_after, token_ids)
        # It is sent before anything else: what fails below must not leave a gap at those who are
        # all right. What others say may be for the same connections, which are written to once.
        others = self._others
        is_all = is_last and not others
        behind: list[_Group] = []
        for group in self._groups:
            frames, group.frames = group.frames, b""
            if not group.client.send_frames(
                frames, group.num_rows, group.num_body_bytes, is_all=is_all
            ):
                behind.append(group)
        alone, sends = self._alone, self._sends  # Those lists are left as they are.
        if behind:
            others = self._put_out_behind(behind)
        self._num_told += 1
        ids, num_in_column = self._ids, self._num_in_column
        ids.fromlist(token_ids)
        ids.frombytes(self._spare)
        self._num_steps += 1
        self.stepped_at = now
        if alone:  # Who of them steps out meanwhile, has been told this step, or is about to be.
            self._send_alone(alone, sends, is_all=is_all)
        if len(ids) > _IDS_KEPT_MAX:
            self._settle_all(num_in_column)
        elif len(ids) > _STEPS_KEPT * num_in_column:
            del ids[: STEPS_MAX * num_in_column]
        return others

    def _are_next(self, offsets: Iterable[int], num_after: int) -> bool:
        """Whether each that rides has its next token in that frame."""
        if self._others:
            offsets = compress(offsets, self._mask)
        # offset + num_after == offset when lined up + num_told, for each.
        return {self._num_told - num_after}.issuperset(map(sub, offsets, self._offsets))

    @property
    def num_ids(self) -> int:
        """Token ids that are kept for those who ride."""
        return len(self._ids)

    @property
    def num_riding(self) -> int:
        """How many go with the next step, if nothing happens before."""
        return sum(ride is not None for ride in self._rides)

    def _board(self, now: float) -> None:
        """Look at those that are due, and take along those that have become ordinary."""
        num_steps = self._num_steps
        if now >= self._ask_due:
            self._ask(now)
        if num_steps >= self._due:
            for row in [row for row, due in enumerate(self._dues) if due <= num_steps]:
                self._look_at(row, now)
            self._due = min(self._dues, default=_NEVER)
        if self._num_until_boarding:
            self._num_until_boarding -= 1
            return
        if len(self._rides) < self._rows_min:
            return
        for row in range(len(self._rides)) if self._is_stale else self._others:
            stream = self._streams[row]
            if stream is None or (ride := stream.ride) is None or ride.is_on:
                continue
            if self._boards_at[row] > self._num_frames:
                continue
            if not stream.is_flowing(self._epochs[row]):
                continue
            if self._fields is not None and self._fields is not ride.bodies.fields:
                continue  # The engine has another vocabulary than it had.
            num_steps_max = ride.num_steps_max(now)
            if num_steps_max:
                self._fields = ride.bodies.fields
                ride.row, ride.since = row, num_steps
                ride.get_on(self)
                self._rides[row] = ride
                self._dues[row] = self._due_after(row, num_steps_max)
                self._is_stale = True

    def _ask(self, now: float) -> None:
        """Time alone can give a call something to tell: ask each in time, a few at once."""
        rides, interval_s = self._rides, self._look_interval_s
        if not rides or math.isinf(interval_s):  # Nobody rides.
            self._asked_at = now
            return
        num_due = len(rides)
        if now < self._asked_at + interval_s:
            num_due = int(num_due * (now - self._asked_at) / interval_s)
            if num_due >= _ASK_SHARE * len(rides):
                self._asked_at += interval_s * num_due / len(rides)
            else:
                num_due = 0
        else:
            self._asked_at = now
        self._ask_due = self._asked_at + interval_s * _ASK_SHARE
        for row in range(self._next_to_ask, self._next_to_ask + num_due):
            ride = rides[row % len(rides)]
            if ride is not None and not ride.call.is_plain(now):
                ride.step_out()
        self._next_to_ask = (self._next_to_ask + num_due) % len(rides)

    def _look_at(self, row: int, now: float) -> None:
        """It has ridden for as long as it may without that."""
        ride = self._rides[row]
        assert ride is not None, "who rides is due"
        ride.settle()
        if ride.stream.is_ack_near:
            ride.call.acknowledge_early()
        num_steps_max = ride.num_steps_max(now)
        if num_steps_max:
            self._dues[row] = self._due_after(row, num_steps_max)
        else:
            ride.step_out()

    def _due_after(self, row: int, num_steps_max: int) -> int:
        """The step in which who may ride for so many is to be looked at."""
        due = self._num_steps + min(num_steps_max, STEPS_MAX)
        together = due - (due - row // _ROWS_TOGETHER * _LOOK_STEPS) % _TOGETHER_STEPS
        return together if together > self._num_steps else due - due % _LOOK_STEPS

    def _line_up(self) -> None:
        """Lay out what a step needs of all that ride."""
        rides = [ride for ride in self._rides if ride is not None]
        self._is_stale = False
        self._mask = [ride is not None for ride in self._rides]
        self._others = [row for row, ride in enumerate(self._rides) if ride is None]
        self._due = min(self._dues, default=_NEVER)
        self._offsets = array("I", [self._end_of(ride) for ride in rides])
        self._num_told = 0
        self._ask_due = 0.0
        self._look_interval_s = min((ride.call.look_interval_s for ride in rides), default=math.inf)
        self._stop_columns = [ride.stream.stop_token_ids for ride in rides]
        self._stop_ids = frozenset[int]().union(
            *{id(one): one for one in self._stop_columns}.values()
        )
        groups: dict[Client, _Group] = {}
        self._tails, self._heads, self._puts = [], [], []
        self._alone, put_alone = [], self._parts.append
        for ride in rides:
            self._tails.append(ride.tail)
            self._heads.append(ride.bodies.heads)
            if ride.is_alone:
                self._alone.append(ride)
                self._puts.append(put_alone)
                continue
            group = groups.get(ride.client)
            if group is None:
                group = groups[ride.client] = _Group(ride.client)
            group.num_rows += 1
            group.rides.append(ride)
            self._puts.append(group.put)
        self._groups = list(groups.values())
        self._sends = [ride.client.send_now for ride in self._alone]
        self._edges = {ride.client.edge for ride in self._alone}
        if not rides:
            self._fields = None

    def _end_of(self, ride: Ride) -> int:
        """The offset of its next token."""
        return ride.stream.num_settled + self._num_steps - ride.since

    def _ends_nobody(self, token_ids: list[int]) -> bool:
        """Whether ids that end the output of some are only in those of others."""
        return not any(
            token_id in stop_ids
            for token_id, stop_ids in zip(token_ids, self._stop_columns, strict=True)
        )

    def _write(self, token_ids: list[int]) -> bool:
        """Make a DATA frame for each; False if one is not to be made this way."""
        fields = self._fields
        assert fields is not None, "somebody rides"
        made, num_told = fields.made, self._num_told
        self._parts.clear()
        try:
            for token_id, offset, tail, (lengths, prefixes), put in zip(
                token_ids, self._offsets, self._tails, self._heads, self._puts, strict=True
            ):
                place = OFFSETS[offset + num_told]
                token = made[token_id] or fields.make(token_id)
                size = len(place) + len(token)
                put((lengths[size], tail, prefixes[size], place, token))
        except LookupError:  # It has no text of its own, or a very long one.
            return False
        else:
            for group in self._groups:
                frames = group.frames = b"".join(group.parts)
                group.num_body_bytes = len(frames) - HEADER_BYTES * group.num_rows
            return True
        finally:
            for group in self._groups:
                group.parts.clear()

    def _send_alone(
        self, alone: list[Ride], sends: list[Callable[[bytes], None]], *, is_all: bool
    ) -> None:
        """What was written for those. Nothing else that waits for their connections has to go
        before, but what came earlier of the same stream: if anything waits at all, so do they."""
        if is_all and not any(edge.is_scheduled for edge in self._edges):
            for send, parts in zip(sends, self._parts, strict=True):
                send(b"".join(parts))
        else:
            for ride, parts in zip(alone, self._parts, strict=True):
                ride.client.send_later(b"".join(parts))

    def _put_out_behind(self, groups: list[_Group]) -> list[int]:
        """Let those of these connections step out, before the step; returns all rows that do not
        ride then."""
        for group in groups:
            for ride in group.rides:
                try:
                    ride.step_out()
                except Exception as error:
                    # All others have been sent this step, and must not be sent it again.
                    ride.call.crashed(error)
        self.pause()
        return [row for row, ride in enumerate(self._rides) if ride is None]

    def _put_out_odd(self, offsets: list[int], num_after: int, token_ids: list[int]) -> None:
        """Let those step out whose token is not one of theirs to ride."""
        fields = self._fields
        assert fields is not None, "somebody rides"
        for row, ride in enumerate(self._rides):
            if ride is None:
                continue
            token_id = token_ids[row]
            if not fields.has_short(token_id):
                self._boards_at[row] = self._num_frames + ODD_FRAMES
                ride.step_out()
            elif (
                offsets[row] + num_after != self._end_of(ride)
                or token_id in ride.stream.stop_token_ids
            ):
                ride.step_out()
        if not self._is_stale:
            self.stop()  # Whatever it was, the long way says it.
