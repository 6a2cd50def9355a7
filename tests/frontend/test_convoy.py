"""Who rides in a convoy is told the same as who goes the long way, byte for byte."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend import convoy as convoy_module
from frontend import summaries
from frontend.convoy import (
    ODD_FRAMES,
    PAUSE_STEPS,
    STEPS_MAX,
    Convoy,
    Ride,
)
from frontend.edge import encoding
from frontend.edge.encoding import TokenBodies, TokenFields
from frontend.stream import Ack, Command, Limits, Stream
from tests.frontend import worlds
from tests.frontend.edge.peer import Peer, setting
from tests.frontend.fakes import FakeSidecar
from tests.support.streams import W2, A, B, C, place, streaming
from tests.support.vocabulary import EOS, PIECES, tokenizer
from unbroken.errors import Reason, UnbrokenError
from unbroken.http2 import frames
from unbroken.http2.connection import Connection, StreamLost, Writable
from unbroken.http2.frames import ErrorCode, FrameType, Setting
from unbroken.outcome import FailureKind

FIELDS: Final = TokenFields(tokenizer().texts)
CANCELLED: Final = UnbrokenError(Reason.CANCELLED, "by request")
CUT: Final = PIECES.index(b"\xc3")
"""Half a character: its text depends on what comes next."""
LOOK_INTERVAL_S: Final = 0.5
ACKS_EARLY_MIN: Final = 64
"""Tokens of a window from which on acknowledgements may be made on the way, before they are due."""


def is_ack(command: Command) -> bool:
    return isinstance(command, Ack)


@dataclass(eq=False)
class Edge:
    """All connections."""

    is_scheduled: bool = False


@dataclass(eq=False)
class Client:
    """A connection, whose socket is the test."""

    edge: Edge = field(default_factory=Edge)
    peer: Peer = field(default_factory=Peer)
    is_paused: bool = False
    is_behind: bool = False
    """It takes no frames of several streams."""
    is_filled: bool = False
    """By the next that is sent at once it will be paused."""
    were_all: list[bool] = field(default_factory=list[bool])
    """Of frames that it was sent, whether they were written at once."""

    @property
    def connection(self) -> Connection:
        return self.peer.connection

    def send_frames(
        self, data: bytes, num_frames: int, num_body_bytes: int, *, is_all: bool
    ) -> bool:
        is_behind = self.is_paused or self.is_behind
        if is_behind or num_body_bytes > self.connection.send_window.left:
            return False
        self.were_all.append(is_all)
        self.connection.count_frames(num_frames, num_body_bytes)
        self.connection.outbound += data
        return True

    def send_now(self, data: bytes) -> None:
        self.were_all.append(True)
        self.connection.outbound += data
        if self.is_filled:
            self.is_paused = True
            self.stop_ride()

    def send_later(self, data: bytes) -> None:
        self.were_all.append(False)
        self.connection.outbound += data

    def stop_ride(self) -> None:
        """As whoever is paused does."""
        if self.connection.ride is not None:
            self.connection.ride.step_out()


@dataclass(eq=False)
class Reader:
    """One call: the long way of what a stream says, and the ride, if there is one."""

    stream: Stream
    client: Client
    stream_id: int
    answers_resume: bool = False
    is_telling_tokens: bool = True
    commands: list[Command] = field(default_factory=list[Command])
    look_interval_s: float = LOOK_INTERVAL_S
    asked_at: list[float] = field(default_factory=list[float])
    """When it was, whether it has anything but tokens to tell."""
    errors: list[Exception] = field(default_factory=list[Exception])

    def __post_init__(self) -> None:
        http_stream = self.client.connection.stream(self.stream_id)
        assert http_stream is not None
        self.http_stream = http_stream
        self.bodies = TokenBodies(FIELDS, answers_resume=self.answers_resume)
        self.leaving: Sequence[Command] | None = None
        self.ride: Ride | None = None

    def get_ready(self) -> None:
        self.ride = Ride(
            self.stream,
            self.client,
            self.http_stream,
            self.bodies,
            self,
        )

    def is_plain(self, now: float) -> bool:
        self.asked_at.append(now)
        return self.is_telling_tokens and self.leaving is None

    def crashed(self, error: Exception) -> None:
        self.errors.append(error)

    def acknowledge_early(self) -> None:
        self.commands += self.stream.acknowledge_early()

    def pump(self) -> None:
        """As a call does when there is news."""
        if self.ride is not None:
            self.ride.step_out()
        connection, stream_id = self.client.connection, self.stream_id
        if self.leaving is not None or self.client.is_paused or self.http_stream.is_closed:
            return
        if self.is_telling_tokens and (one := self.stream.take_one()) is not None:
            if not connection.send_on(self.http_stream, self.bodies.body(*one), 0.0):
                self.leaving = ()
            return
        if not connection.has_room(stream_id):
            connection.want_room(stream_id, 0.0)
            return
        if not self.stream.has_output:
            return
        piece, commands = self.stream.take()
        body = b"".join(
            encoding.body(one.SerializeToString(), answers_resume=self.answers_resume)
            for one in summaries.messages(0, piece)
        )
        self.leaving = commands
        if connection.send_data(stream_id, body, 0.0):
            self.left()

    def left(self) -> None:
        self.commands += self.leaving or ()
        self.leaving = None


class World:
    """Some streams of one link to two clients, by one way or the other."""

    def __init__(self, *, rides: bool, num_streams: int, window: int, max_tokens: int) -> None:
        self.rides = rides
        self.convoy = Convoy()
        self.edge = Edge()
        self.clients = [Client(self.edge), Client(self.edge)]
        self.readers: list[Reader] = []
        self.offsets: list[int] = []
        self.absent: set[int] = set()
        self.seen: dict[tuple[int, int], bytearray] = {}
        self.num_ridden = 0
        self.is_last = True
        """No frame comes with the next one."""
        self.is_turned = False
        """The last row comes first."""
        self.now = 1.0
        self._limits = Limits(window_tokens=window)
        self.acks_early = window >= ACKS_EARLY_MIN
        self._max_tokens = max_tokens
        self._aligned: list[int] = []
        self._told_at: list[int] = []
        """Offsets of the last frame that had some,"""
        self._num_after = 0
        """and how many frames came after it."""
        self._num_steps = 0
        for _ in range(num_streams):
            self.join()

    def join(self) -> None:
        """One more stream, which has said its first token."""
        number = len(self.readers)
        client = self.clients[number % 2]
        stream_id = 2 * number + 1
        client.peer.open(stream_id)
        stream = streaming(
            [A],
            max_tokens=self._max_tokens,
            limits=self._limits,
            stop_token_ids=frozenset({C} if number % 3 == 2 else ()),
        )
        reader = Reader(stream, client, stream_id, answers_resume=number % 3 == 0)
        if self.rides:
            reader.get_ready()
        self.readers.append(reader)
        self.offsets.append(1)
        reader.pump()

    def step(self, token_ids: Sequence[int], skew: int | None = None, skewed_by: int = 1) -> None:
        """One step of all streams that are there; of one the offset may be wrong."""
        rows = [n for n in range(len(self.readers)) if n not in self.absent]
        if self.is_turned:
            rows.reverse()
        if not rows:
            return
        offsets = [self.offsets[n] + (skewed_by if n == skew else 0) for n in rows]
        ids = [token_ids[n % len(token_ids)] for n in rows]
        self.now += 0.02
        self._num_steps += 1
        after = [offset + self._num_after + 1 for offset in self._told_at]
        if rows == self._aligned and offsets == after and self._num_steps % 5:
            self._num_after += 1
        else:  # What cannot be said as next tokens, and now and then what can.
            self._told_at, self._num_after = offsets, 0
        if rows != self._aligned:
            self._aligned = rows
            streams = [self.readers[n].stream for n in rows]
            self.convoy.align(rows, streams, [1] * len(rows))
        others = self.convoy.go(
            self._told_at, ids, self.now, is_last=self.is_last, num_after=self._num_after
        )
        self.num_ridden += len(rows) - len(others)
        if not self.rides:
            assert len(others) == len(rows)
        for row in others:
            reader = self.readers[rows[row]]
            reader.commands += reader.stream.token(1, offsets[row], ids[row], self.now)
        for row in others:
            self.readers[rows[row]].pump()
        for n in rows:
            self.offsets[n] += 1

    def hear(self, client: Client, data: bytes) -> None:
        """The client says something."""
        for event in client.peer.say(data):
            if isinstance(event, Writable | StreamLost):
                reader = self.readers[event.stream_id // 2]
                if isinstance(event, Writable):
                    reader.left()
                    reader.pump()
                elif reader.ride is not None:
                    reader.ride.close()

    def write(self) -> None:
        """What is outbound has left."""
        for number, client in enumerate(self.clients):
            for frame in client.peer.heard():
                if frame.kind == FrameType.DATA:
                    self.seen.setdefault((number, frame.stream_id), bytearray()).extend(
                        frame.payload
                    )

    @property
    def has_lost(self) -> bool:
        """Whether a client broke the protocol: a window can overflow."""
        return any(client.connection.is_over for client in self.clients)

    def sent_to(self, client: Client) -> list[bytes]:
        """The bodies of all that it was sent."""
        self.write()
        number = self.clients.index(client)
        return [bytes(body) for (whose, _), body in self.seen.items() if whose == number]

    def standing(self) -> list[object]:
        """All that has to be the same either way."""
        self.write()
        return [
            [
                (
                    reader.stream.ledger.tolist(),
                    reader.stream.num_sent,
                    reader.stream.has_output,
                    reader.stream.outcome,
                    [(one.first_offset, one.end_offset) for one in reader.stream.attempts],
                    [one for one in reader.commands if not (self.acks_early and is_ack(one))],
                    reader.http_stream.send.left,
                    bytes(reader.http_stream.pending),
                )
                for reader in self.readers
            ],
            [client.connection.send_window.left for client in self.clients],
            {key: bytes(body) for key, body in self.seen.items()},
        ]


ids = st.lists(st.sampled_from([A, A, A, B, B, *range(len(PIECES)), EOS]), min_size=1, max_size=5)
plain_ids = st.lists(st.sampled_from([A, A, B, B, C]), min_size=1, max_size=3)
which = st.integers(0, 4)
doings = st.one_of(
    st.tuples(st.just("step"), ids),
    st.tuples(st.just("steps"), plain_ids),
    st.tuples(st.just("steps"), plain_ids),
    st.tuples(st.just("skew"), which),
    st.tuples(st.just("repeat"), which),
    st.tuples(st.just("turn"), st.none()),
    st.tuples(st.just("join"), st.none()),
    st.tuples(st.just("absent"), which),
    st.tuples(st.just("back"), which),
    st.tuples(st.just("window"), which),
    st.tuples(st.just("windows"), st.sampled_from([0, 100, 65_535, 2**31 - 1])),
    st.tuples(st.just("connection"), st.integers(1, 60_000)),
    st.tuples(st.just("pause"), st.integers(0, 1)),
    st.tuples(st.just("reset"), which),
    st.tuples(st.just("cancel"), which),
    st.tuples(st.just("ask"), which),
    st.tuples(st.just("telling"), which),
    st.tuples(st.just("write"), st.none()),
)


def do(world: World, doing: str, what: object) -> None:
    """One thing happens."""
    match doing, what:
        case "step", list():
            world.step(cast("list[int]", what))
        case "steps", list():
            for _ in range(STEPS_MAX // 3):
                world.step(cast("list[int]", what))
        case "windows", int():
            world.hear(world.clients[0], setting(Setting.INITIAL_WINDOW_SIZE, what))
        case "connection", int():
            world.hear(world.clients[0], frames.window_update(0, what))
        case "pause", int():
            client = world.clients[what]
            client.is_paused = not client.is_paused
            if client.is_paused:
                client.stop_ride()
            else:
                for reader in world.readers:
                    reader.pump()
        case "turn", _:
            world.is_turned = not world.is_turned
        case "join", _ if len(world.readers) < 8 and not world.has_lost:
            world.join()
        case "write", _:
            world.write()
        case _, int() if what < len(world.readers):
            _do_with_one(world, doing, what)
        case _:
            pass


def _do_with_one(world: World, doing: str, number: int) -> None:
    reader = world.readers[number]
    match doing:
        case "skew":
            world.step([A], number)
        case "repeat":
            world.step([A], number, -1)
        case "absent":
            world.absent.add(number)
        case "back":
            world.absent.discard(number)
        case "window":
            world.hear(reader.client, frames.window_update(reader.stream_id, 500))
        case "reset":
            world.hear(reader.client, frames.reset(reader.stream_id, ErrorCode.CANCEL))
        case "cancel":
            reader.commands += reader.stream.cancelled(CANCELLED)
        case "ask":
            assert reader.stream.num_sent <= len(reader.stream.ledger)
            reader.stream.check()
        case "telling":
            reader.is_telling_tokens = not reader.is_telling_tokens
            if reader.ride is not None and not reader.is_telling_tokens:
                reader.ride.step_out()
        case _:
            raise AssertionError(doing)


@settings(max_examples=60, deadline=None)
@given(
    num_streams=st.integers(0, 5),
    window=st.sampled_from([0, 6, 1024]),
    max_tokens=st.sampled_from([9, 100_000]),
    doings=st.lists(doings, max_size=25),
)
def test_whatever_happens_the_client_gets_the_same_bytes_as_by_the_long_way(
    num_streams: int, window: int, max_tokens: int, doings: list[tuple[str, object]]
) -> None:
    worlds = [
        World(rides=rides, num_streams=num_streams, window=window, max_tokens=max_tokens)
        for rides in (True, False)
    ]
    for doing, what in doings:
        for world in worlds:
            do(world, doing, what)
    assert worlds[0].standing() == worlds[1].standing()


def riding(num_streams: int = 3, window: int = 1024) -> World:
    """Streams of which all ride."""
    world = World(rides=True, num_streams=num_streams, window=window, max_tokens=100_000)
    world.step([B])
    assert world.num_ridden == num_streams
    return world


def test_ordinary_tokens_ride_and_each_connection_is_written_to_once_a_step() -> None:
    world = riding(4)
    for _ in range(10):
        world.step([A, B])
    assert world.num_ridden == 4 * 11
    assert [client.were_all for client in world.clients] == [[True] * 11] * 2


def test_what_rides_is_written_together_with_what_the_others_say() -> None:
    world = riding(4)
    world.step([A, A, CUT, A])
    assert world.num_ridden == 4 + 3
    assert [client.were_all for client in world.clients] == [[True, False]] * 2
    world = riding(4)
    world.is_last = False
    world.step([A])
    assert [client.were_all for client in world.clients] == [[True, False]] * 2


def test_a_stream_is_told_what_rode_at_the_latest_after_so_many_steps() -> None:
    world = riding()
    untold = 0
    for step in range(3 * STEPS_MAX):
        world.step([B])
        untold = max(untold, step + 3 - min(r.stream.num_settled for r in world.readers))
    assert 10 < untold <= STEPS_MAX
    assert world.readers[0].stream.ledger.tolist() == [A] + [B] * (3 * STEPS_MAX + 1)


def test_a_window_moves_in_time_without_ending_the_ride() -> None:
    world = riding(window=1024)
    for _ in range(1100):
        world.step([B])
        for reader in world.readers:
            acks = [one.offset for one in reader.commands if isinstance(one, Ack)]
            num_told = world.offsets[0]
            assert num_told <= (acks[-1] if acks else 0) + 512, "no later than without a ride"
            assert acks == sorted(set(acks))
            assert not acks or acks[-1] <= num_told, "only what the client was sent"
    assert all(len(reader.commands) == 2 for reader in world.readers), "and hardly more often"
    assert world.num_ridden == 3 * 1101


@pytest.mark.parametrize("window", [1, 2, 3, 8, 62])
def test_a_narrow_window_moves_as_it_would_without_a_ride(window: int) -> None:
    worlds = [
        World(rides=rides, num_streams=3, window=window, max_tokens=100_000)
        for rides in (True, False)
    ]
    for _ in range(3 * window):
        for world in worlds:
            world.step([B])
    acks = [[reader.commands for reader in world.readers] for world in worlds]
    assert acks[0] == acks[1]
    assert acks[0][0], "there were some"


DISTURBANCES: Final[Mapping[str, Callable[[World], object]]] = {
    "half a character": lambda world: world.step([B, CUT, B]),
    "end": lambda world: world.step([B, EOS, B]),
    "gap": lambda world: world.step([B], 1),
    "cancel": lambda world: _do_with_one(world, "cancel", 1),
    "reset": lambda world: _do_with_one(world, "reset", 1),
    "telling": lambda world: _do_with_one(world, "telling", 1),
    "take": lambda world: world.readers[1].stream.take(),
    "rewind": lambda world: world.readers[1].stream.rewind(2, ""),
    "pump": lambda world: world.readers[1].pump(),
}


@pytest.mark.parametrize("disturb", DISTURBANCES.values(), ids=DISTURBANCES)
def test_who_is_not_ordinary_steps_out_and_nobody_else(disturb: Callable[[World], None]) -> None:
    world = riding()
    disturb(world)
    world.write()
    rides = [reader.ride for reader in world.readers]
    assert [ride is not None and ride.is_on for ride in rides] == [True, False, True]
    assert world.convoy.num_riding == 2


def test_a_stream_gets_on_again_when_all_is_as_before() -> None:
    world = riding()
    ride = world.readers[1].ride
    assert ride is not None
    world.step([B, CUT, B])
    for _ in range(ODD_FRAMES - 1):
        world.step([B])
        assert not ride.is_on, "more of such a text is to be expected"
        assert world.convoy.num_riding == 2
    world.step([B])
    assert ride.is_on


def test_nobody_rides_with_fewer_than_it_takes_to_save_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convoy_module, "ROWS_MIN", 4)
    world = World(rides=True, num_streams=3, window=1024, max_tokens=1000)
    world.step([B])
    assert world.num_ridden == 0
    world.join()
    world.step([B])
    assert world.num_ridden == 4


def test_a_client_whose_bytes_have_not_left_is_merged_for_instead() -> None:
    world = riding(5)
    world.clients[1].is_behind = True
    num_ridden = world.num_ridden
    world.step([B])
    assert world.num_ridden == num_ridden + 3, "those of the other client"
    world.clients[1].is_behind = False
    for _ in range(PAUSE_STEPS):
        assert world.convoy.num_riding == 3, "it is not tried again at once"
        world.step([B])
    world.step([B])
    assert world.convoy.num_riding == 5


def open_windows(world: World) -> None:
    """Clients take whatever comes from now on."""
    for reader in world.readers:
        for stream_id in (0, reader.stream_id):
            world.hear(reader.client, frames.window_update(stream_id, 1 << 22))


def test_who_may_ride_for_long_is_looked_at_before_its_tokens_are_given_up() -> None:
    world = riding(window=1 << 20)
    open_windows(world)
    num_steps = 5 * STEPS_MAX
    for number in range(num_steps):
        world.step([A, B] if number % 2 else [B, A])
        assert max(world.convoy._dues) <= world.convoy._num_steps + STEPS_MAX  # pyright: ignore
    assert world.num_ridden == 3 * (num_steps + 1)
    for number, reader in enumerate(world.readers):
        assert reader.ride is not None
        reader.ride.settle()
        first = [B, A] if number % 2 == 0 else [A, B]
        assert reader.stream.ledger.tolist()[2:] == first * (num_steps // 2)


def test_neighbours_are_looked_at_together_and_others_in_other_steps() -> None:
    world = riding(128)
    open_windows(world)
    dues = world.convoy._dues  # pyright: ignore[reportPrivateUsage]
    for num_more in (0, 1, STEPS_MAX):
        for _ in range(num_more):
            world.step([B])
        groups = [set(dues[row : row + 16]) for row in range(0, 128, 16)]
        assert all(len(group) == 1 for group in groups)
        assert len(set(dues)) == len(groups)


def test_a_few_calls_are_asked_at_once_whether_they_have_something_else_to_tell() -> None:
    world = World(rides=True, num_streams=64, window=1024, max_tokens=100_000)
    for reader in world.readers:
        reader.look_interval_s = 10 * LOOK_INTERVAL_S
    world.step([B])
    for reader in world.readers:
        reader.asked_at.clear()
    for _ in range(40):
        world.step([B])
    times = [at for reader in world.readers for at in reader.asked_at]
    assert times
    assert min(times.count(at) for at in set(times)) == 2


def have_a_bug(monkeypatch: pytest.MonkeyPatch, bad: Stream) -> None:
    """That stream raises when it is to know what it rode."""
    rode = Stream.rode

    def broken(stream: Stream, token_ids: Sequence[int], now: float) -> int:
        if stream is bad:
            raise ValueError("a bug")
        return rode(stream, token_ids, now)

    monkeypatch.setattr(Stream, "rode", broken)


def test_a_bug_of_one_stream_after_a_step_leaves_no_gap_at_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All are told what they rode when columns begin anew, after the step: it was sent by then."""
    world = riding(4)
    have_a_bug(monkeypatch, world.readers[0].stream)
    monkeypatch.setattr(convoy_module, "_IDS_KEPT_MAX", 1)
    with pytest.raises(ValueError, match="a bug"):
        world.step([A])
    for reader in world.readers[1:]:
        assert reader.ride is not None
        reader.ride.step_out()
        assert reader.stream.num_sent == len(reader.stream.ledger)
    world.write()
    sent = {number: bytes(world.seen[number % 2, 2 * number + 1]) for number in range(1, 4)}
    for number, body in sent.items():
        bodies = world.readers[number].bodies
        ledger = world.readers[number].stream.ledger.tolist()
        assert body.endswith(b"".join(bodies.body(at, ledger[at]) for at in range(1, len(ledger))))


def test_a_bug_of_one_stream_whose_client_is_behind_sends_nobody_a_token_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is met after the others were sent the step."""
    world = riding(8)
    world.step([A])
    world.clients[1].is_behind = True
    have_a_bug(monkeypatch, world.readers[1].stream)
    before = world.num_ridden
    world.step([A])
    assert world.num_ridden == before + 4, "those whose client is not behind"
    world.step([A])
    monkeypatch.undo()
    assert [str(error) for error in world.readers[1].errors] == ["a bug"]
    world.write()
    for number in (0, 2, 4, 6):
        reader = world.readers[number]
        assert reader.ride is not None
        reader.ride.step_out()
        assert not reader.errors
        ledger = reader.stream.ledger.tolist()
        body = bytes(world.seen[0, reader.stream_id])
        assert body == b"".join(reader.bodies.body(*one) for one in enumerate(ledger))


def test_an_attempt_that_is_over_rides_no_more() -> None:
    world = riding()
    reader = world.readers[1]
    stream = reader.stream
    stream.lost(1, FailureKind.CRASH, "gone", world.now)
    world.step([B])
    assert stream.ledger.tolist() == [A, B]
    place(stream, W2)
    stream.tokens(2, 2, [A], world.now)
    reader.pump()
    for _ in range(2):
        world.step([B])
    assert stream.ledger.tolist() == [A, B, A]
    assert [len(one.stream.ledger) for one in world.readers] == [5, 3, 5]


def test_who_has_something_else_to_tell_is_seen_to_in_time() -> None:
    world = riding(40)
    while world.now < 1.0 + 6 * LOOK_INTERVAL_S:
        world.step([B])
    for reader in world.readers:
        assert max(b - a for a, b in pairwise(reader.asked_at)) <= 1.1 * LOOK_INTERVAL_S
    times = [at for reader in world.readers for at in reader.asked_at[1:]]
    assert max(map(times.count, times)) <= 20, "neighbours, and those whose turn it is to be asked"
    world.readers[7].is_telling_tokens = False
    since = world.now
    while world.now < since + 1.1 * LOOK_INTERVAL_S:
        world.step([B])
    rides = [reader.ride for reader in world.readers]
    assert [n for n, ride in enumerate(rides) if ride is None or not ride.is_on] == [7]


def test_whoever_comes_and_goes_keeps_nobody_from_being_asked() -> None:
    world = riding(60)
    for step in range(100):
        if step < 50:
            world.absent.add(step)
            world.join()
        world.step([B])
    for reader in world.readers[50:60]:
        assert max(b - a for a, b in pairwise(reader.asked_at)) <= 1.25 * LOOK_INTERVAL_S


def test_columns_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    world = riding(3)
    for _ in range(3 * STEPS_MAX):
        world.step([B])
        assert world.convoy.num_ids <= 2 * STEPS_MAX * (3 + 16)
    monkeypatch.setattr(convoy_module, "_IDS_KEPT_MAX", 100)
    for _ in range(50):
        world.step([B])
        assert world.convoy.num_ids <= 100
    assert world.num_ridden == 3 * (3 * STEPS_MAX + 51)
    assert world.readers[0].stream.ledger.tolist() == [A] + [B] * (3 * STEPS_MAX + 51)


def test_a_connection_is_not_sent_more_than_its_window() -> None:
    world = riding(4)
    client = world.clients[0]
    left = client.connection.send_window.left
    client.peer.open(99)
    client.connection.send_data(99, bytes(left - 100), 0.0)
    world.write()
    for _ in range(20):
        world.step([B])
    assert sum(len(body) for body in world.sent_to(client)) == frames.WINDOW_DEFAULT
    world.hear(client, frames.window_update(0, 10_000))
    assert all(reader.stream.num_sent == 22 for reader in world.readers)


def alone() -> World:
    """Two streams, each of which is the only one of its connection; both ride."""
    world = riding(2)
    assert [client.connection.ride for client in world.clients] == [
        reader.ride for reader in world.readers
    ]
    return world


def test_who_rides_alone_is_sent_no_more_than_the_window_of_its_connection() -> None:
    world = alone()
    client = world.clients[0]
    world.hear(client, frames.window_update(1, 1 << 22))
    num_steps = frames.WINDOW_DEFAULT // len(world.readers[0].bodies.body(300, B)) + 20
    for _ in range(num_steps):
        world.step([B])
    assert sum(len(body) for body in world.sent_to(client)) == frames.WINDOW_DEFAULT
    assert world.num_ridden > 1.9 * num_steps
    world.hear(client, frames.window_update(0, 10_000))
    assert world.readers[0].stream.num_sent == num_steps + 2
    body = b"".join(world.sent_to(client))
    first = b"".join(world.readers[0].bodies.body(*one) for one in enumerate([A] + [B] * 2000))
    assert body.startswith(first)


def test_who_is_joined_on_its_connection_rides_there_alone_no_more() -> None:
    world = alone()
    client = world.clients[0]
    for _ in range(5):
        world.step([B])
    left = client.connection.send_window.left
    assert frames.WINDOW_DEFAULT - left < 20, "of the last five nothing is taken yet"
    world.join()
    assert client.connection.ride is None
    assert world.clients[1].connection.ride is world.readers[1].ride
    for _ in range(5):
        world.step([B])
    assert world.convoy.num_riding == 3
    sent = sum(len(body) for body in world.sent_to(client))
    assert client.connection.send_window.left == frames.WINDOW_DEFAULT - sent


def test_who_rides_alone_overtakes_nothing_that_waits() -> None:
    world = alone()
    world.edge.is_scheduled = True
    world.step([B])
    world.edge.is_scheduled = False
    world.is_last = False
    world.step([B])
    assert [client.were_all for client in world.clients] == [[True, False, False]] * 2
    assert world.num_ridden == 2 * 3


@pytest.mark.parametrize("number", [0, 1])
def test_who_steps_out_amid_a_step_has_been_sent_it(number: int) -> None:
    world = alone()
    client, reader = world.clients[number], world.readers[number]
    client.is_filled = True
    world.step([A, B])
    assert world.num_ridden == 2 * 2
    assert world.convoy.num_riding == 1
    assert reader.stream.ledger.tolist() == [A, B, [A, B][number]]
    assert reader.stream.num_sent == 3
    world.step([B])
    client.is_filled = client.is_paused = False
    reader.pump()
    for _ in range(2 * PAUSE_STEPS):
        world.step([A])
    assert world.convoy.num_riding == 2
    for client, reader in zip(world.clients, world.readers, strict=True):
        (body,) = world.sent_to(client)
        told = reader.stream.ledger.tolist()
        assert body == b"".join(reader.bodies.body(*one) for one in enumerate(told))


def test_nobody_gets_on_whose_client_is_paused() -> None:
    world = alone()
    client = world.clients[0]
    client.is_paused = True
    client.stop_ride()
    for _ in range(2 * PAUSE_STEPS):
        world.step([B])
        assert world.convoy.num_riding == 1
    client.is_paused = False
    world.readers[0].pump()
    for _ in range(2 * PAUSE_STEPS):
        world.step([B])
    assert world.convoy.num_riding == 2


def test_what_was_sent_alone_is_taken_from_the_connection_before_that_is_judged() -> None:
    world = alone()
    client = world.clients[0]
    ride = client.connection.ride
    assert ride is not None
    ride.settle()
    most = frames.WINDOW_MAX - client.connection.send_window.left
    world.hear(client, frames.window_update(0, most))
    world.step([B])
    world.hear(client, frames.window_update(0, 5))
    assert not world.has_lost, "as much again as it took is no overflow"
    world.hear(client, frames.window_update(0, 500))
    assert world.has_lost


def test_what_was_sent_by_ride_is_taken_from_the_window_before_that_is_judged() -> None:
    world = World(rides=True, num_streams=1, window=1024, max_tokens=100_000)
    reader = world.readers[0]
    most = frames.WINDOW_MAX - reader.http_stream.send.left
    world.hear(reader.client, frames.window_update(1, most))
    world.step([B])
    assert world.num_ridden == 1
    world.hear(reader.client, frames.window_update(1, 5))
    assert not reader.http_stream.is_closed, "as much again as it took is no overflow"
    world.hear(reader.client, frames.window_update(1, 50))
    assert reader.http_stream.is_closed


def test_an_id_that_ends_the_output_of_others_is_an_ordinary_one_elsewhere() -> None:
    world = riding(6)
    world.step([C, C, B, C, C, B])
    assert world.num_ridden == 2 * 6
    world.step([C, C, C, C, C, B])
    assert world.num_ridden == 3 * 6 - 1
    assert world.readers[2].stream.outcome is not None


def test_who_comes_and_goes_disturbs_nobody() -> None:
    world = riding(4)
    world.step([A, B, B, A])
    world.absent.add(1)
    world.step([B, A, A, B])
    world.join()
    world.step([A, A, B, B, A])
    assert world.num_ridden == 4 + 4 + 3 + 4
    ledgers = [reader.stream.ledger.tolist() for reader in world.readers]
    assert ledgers == [[A, B, A, B, A], [A, B, B], [A, B, B, A, B], [A, B, A, B, B], [A, A]]


def test_many_go_at_once_and_those_who_stay_ride_on() -> None:
    world = riding(12)
    world.step([A, B])
    world.absent.update(range(10))
    world.step([B, A])
    world.step([B, B])
    assert world.num_ridden == 12 + 12 + 2 + 2
    ledgers = [reader.stream.ledger.tolist() for reader in world.readers]
    assert ledgers[:10] == 5 * [[A, B, A], [A, B, B]]
    assert ledgers[10:] == [[A, B, A, B, B], [A, B, B, A, B]]


def test_rows_in_another_order_are_those_of_the_same_streams() -> None:
    world = riding(4)
    world.step([A, B, B, A])
    world.absent.add(1)
    world.is_turned = True
    world.step([B, A, A, B])
    world.step([A, A, B, B])
    assert world.num_ridden == 4 + 4 + 3 + 3
    ledgers = [reader.stream.ledger.tolist() for reader in world.readers]
    assert ledgers == [[A, B, A, B, A], [A, B, B], [A, B, B, A, B], [A, B, A, B, B]]


@pytest.mark.parametrize("are_there_more", [True, False])
def test_rides_go_as_far_as_fields_of_offsets_are_kept(
    monkeypatch: pytest.MonkeyPatch, *, are_there_more: bool
) -> None:
    num_kept = len(encoding.OFFSETS)
    if not are_there_more:
        monkeypatch.setattr(encoding, "OFFSETS_MAX", num_kept)
    world = riding(window=1 << 20)
    open_windows(world)
    for _ in range(num_kept):
        world.step([B])
    assert world.convoy.num_riding == (3 if are_there_more else 0)
    assert world.num_ridden == 3 * (num_kept + 1 if are_there_more else num_kept - 1)
    assert (len(encoding.OFFSETS) > num_kept) == are_there_more
    bodies = world.sent_to(world.clients[1])[0]
    one = world.readers[1].bodies
    assert bodies.endswith(b"".join(one.body(at, B) for at in range(num_kept - 3, num_kept + 2)))


def test_fields_of_offsets_are_made_some_at_once() -> None:
    num_kept = len(encoding.OFFSETS)
    assert encoding.have_offsets(num_kept) == num_kept
    num_more = encoding.have_offsets(num_kept + 1_000_000)
    assert num_kept < num_more <= num_kept + 5000
    assert encoding.OFFSETS[-1] == encoding.offset_field(num_more - 1)


def test_columns_of_ten_thousand_rows_are_kept_as_long_as_others() -> None:
    num_kept = convoy_module._STEPS_KEPT * 12_500  # pyright: ignore[reportPrivateUsage]
    assert num_kept <= convoy_module._IDS_KEPT_MAX  # pyright: ignore[reportPrivateUsage]


def test_in_a_frontend_windows_move_and_nobody_steps_out_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: list[Ride] = []
    acknowledged: list[Ack] = []
    step_out, acknowledge_early = Ride.step_out, Stream.acknowledge_early

    def leave(ride: Ride) -> None:
        left.extend([ride] * ride.is_on)
        step_out(ride)

    def acknowledge(stream: Stream) -> Sequence[Command]:
        commands = acknowledge_early(stream)
        acknowledged.extend(one for one in commands if isinstance(one, Ack))
        return commands

    monkeypatch.setattr(Ride, "step_out", leave)
    monkeypatch.setattr(Stream, "acknowledge_early", acknowledge)

    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=0.001)
        async with worlds.world(sidecar, edge="native", window_tokens=512) as it:
            call = it.client.generate(token_ids=[5, 6], temperature=0, max_tokens=1500)
            ids, _ = await worlds.read(call)
            assert len(ids) == 1500
            assert sidecar.num_next_tokens > 0, "most frames say no more than tokens"

    worlds.run(scenario())
    assert len(acknowledged) >= 4, "most were made on the way"
    assert len(left) <= 3, "for its end, and to look after its resume token"
