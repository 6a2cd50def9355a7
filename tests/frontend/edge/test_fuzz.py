"""Anything may come: no crash, no hang, nothing without bound, and nothing that a client must not
hear. `make fuzz` says more of it.
"""

import base64
import random
import tracemalloc
import zlib
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.frontend.edge import corpus, fuzz_socket
from tests.frontend.edge.fuzz import (
    SCRIPT_STEPS_MAX,
    draw_long,
    play,
    steps,
)
from unbroken.http2.headers import Request
from unbroken.http2.messages import (
    PREFIX,
    MessageReader,
    Refused,
    fields_of,
    metadata,
    timeout_s,
)

MESSAGE_BYTES_MAX = 1000


@settings(max_examples=150, deadline=None)
@given(steps())
def test_no_client_can_break_a_connection(script: list[corpus.Step]) -> None:
    play(script)


@pytest.mark.parametrize("name", ["drain", "found", "header_blocks", "limits", "windows"])
def test_every_script_of_the_corpus_is_borne(name: str) -> None:
    for title, script in corpus.read(f"{name}.txt").items():
        _play(title, script)


def test_every_frame_is_borne_in_every_state_of_a_stream() -> None:
    for title, script in corpus.each_frame_in_each_state():
        _play(title, script)


@pytest.mark.parametrize("seed", range(8))
def test_a_long_life_leaves_nothing_behind(seed: int) -> None:
    assert play(draw_long(random.Random(seed))) > SCRIPT_STEPS_MAX


def test_scripts_are_read_as_they_are_written() -> None:
    written = [("frame", 0, 8, 3, b"x" * 20), ("frame", 11, 0, 0, b"ab"), ("request", 2, 1, 0, b"")]
    lines = [corpus.written(step) for step in written]
    assert [step for line in lines for step in corpus.parsed(line)] == written


@pytest.mark.parametrize("first_seed", range(0, 1200, 300))
def test_nothing_is_left_of_a_connection_whatever_happens_to_its_socket(first_seed: int) -> None:
    assert fuzz_socket.play(range(first_seed, first_seed + 300)) > 300


_MESSAGES = st.lists(
    st.tuples(st.booleans(), st.binary(max_size=40) | st.just(b"x" * MESSAGE_BYTES_MAX)), max_size=5
)
_CUTS = st.lists(st.integers(0, 3000), max_size=8)


@settings(max_examples=200, deadline=None)
@given(_MESSAGES, _CUTS)
def test_messages_are_read_in_whatever_pieces(
    messages: list[tuple[bool, bytes]], cuts: list[int]
) -> None:
    body = b"".join(_message(message, is_gzip=is_gzip) for is_gzip, message in messages)
    reader = MessageReader(b"gzip", MESSAGE_BYTES_MAX)
    assert _fed(reader, body, cuts) == [message for _, message in messages]
    assert not reader.num_held
    reader.finish()


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60)
    | st.tuples(st.booleans(), st.integers(0, 1100), st.binary(max_size=1100)).map(
        lambda given: PREFIX.pack(*given[:2]) + given[2]
    )
    | st.tuples(st.booleans(), st.sampled_from([999, 1000, 1001])).map(
        lambda given: _message(bytes(given[1]), is_gzip=given[0])
    ),
    _CUTS,
    st.sampled_from([None, b"", b"identity", b"gzip", b"zstd"]),
)
def test_any_body_is_read_or_refused(body: bytes, cuts: list[int], encoding: bytes | None) -> None:
    outcomes: list[object] = []
    for where in (cuts, []):
        reader = MessageReader(encoding, MESSAGE_BYTES_MAX)
        try:
            messages = _fed(reader, body, where)
            reader.finish()
        except Refused as refused:
            outcomes.append(refused.code)
        else:
            outcomes.append(messages)
            assert all(len(message) <= MESSAGE_BYTES_MAX for message in messages)
        assert reader.num_held <= len(body)
    assert outcomes[0] == outcomes[1], "whatever the pieces"


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60), st.binary(max_size=20))
def test_what_is_not_one_gzip_member_is_refused(data: bytes, more: bytes) -> None:
    member = _message(data, is_gzip=True)[PREFIX.size :]
    for wrong in (member + more + b"x", member[: -1 - len(more)]):
        with pytest.raises(Refused):
            MessageReader(b"gzip", MESSAGE_BYTES_MAX).feed(PREFIX.pack(1, len(wrong)) + wrong)


def test_no_little_body_takes_much_room() -> None:
    body = _message(bytes(10_000_000), is_gzip=True)
    reader = MessageReader(b"gzip", 20_000)
    assert len(body) < 20_000
    tracemalloc.start()
    try:
        with pytest.raises(Refused):
            reader.feed(body)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


_NAMES = st.sampled_from([b"a", b"a-bin", b"grpc-x", b"te", b"A", b":path", b""]) | st.binary(
    max_size=8
)
_VALUES = st.sampled_from([b"AAE", b"AAE=", b"A", b"AA, AAE", b",", b"=", b"\xff"]) | st.binary(
    max_size=12
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(_NAMES, _VALUES), max_size=4))
def test_any_metadata_is_read_or_refused_and_passed_on_as_it_was(
    fields: list[tuple[bytes, bytes]],
) -> None:
    try:
        found = metadata(fields)
    except Refused:
        return
    for key, value in found:
        assert isinstance(value, bytes) == key.endswith("-bin")
    assert metadata(fields_of(found)) == found


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=12), st.booleans()), min_size=1, max_size=4))
def test_binary_values_are_read_padded_or_not_and_many_in_one(
    values: list[tuple[bytes, bool]],
) -> None:
    encoded = [
        base64.b64encode(value) if is_padded else base64.b64encode(value).rstrip(b"=")
        for value, is_padded in values
    ]
    assert metadata([(b"a-bin", b" , ".join(encoded))]) == [("a-bin", value) for value, _ in values]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=10) | st.from_regex(rb"[0-9]{1,9}[HMSmunX]?", fullmatch=True))
def test_any_timeout_is_read_or_refused(value: bytes) -> None:
    request = Request(b"POST", b"/", b"", [(b"grpc-timeout", value)], None)
    try:
        wait_s = timeout_s(request)
    except Refused:
        return
    assert wait_s is not None
    assert 0 <= wait_s < 1e8 * 3600


def _play(title: str, script: list[corpus.Step]) -> None:
    try:
        play(script)
    except Exception as error:
        error.add_note(title)
        raise


def _message(data: bytes, *, is_gzip: bool) -> bytes:
    if is_gzip:
        deflater = zlib.compressobj(wbits=31)
        data = deflater.compress(data) + deflater.flush()
    return PREFIX.pack(is_gzip, len(data)) + data


def _fed(reader: MessageReader, body: bytes, cuts: list[int]) -> list[bytes]:
    messages: list[bytes] = []
    edges = [0, *sorted(cuts), len(body)]
    for begin, end in pairwise(edges):
        messages += reader.feed(body[begin:end])
    return messages
