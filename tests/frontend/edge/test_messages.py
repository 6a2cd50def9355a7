"""gRPC over HTTP/2: fields, timeouts, bodies."""

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.frontend.edge.peer import REQUEST
from unbroken.http2.headers import Fields, Request, check_request
from unbroken.http2.messages import (
    PREFIX,
    TIMEOUT_S_MAX,
    Code,
    MessageReader,
    Refused,
    fields_of,
    http_status,
    metadata,
    timeout_s,
    trailers,
)


def request(*more: tuple[bytes, bytes], without: bytes = b"") -> Request:
    """A request with more fields."""
    return check_request([*(field for field in REQUEST if field[0] != without), *more])


def message(payload: bytes, *, flag: int = 0) -> bytes:
    """As it lies in a body."""
    return PREFIX.pack(flag, len(payload)) + payload


def refusal(*parts: bytes, fields: Fields = (), size_max: int = 1000) -> Refused:
    """Why the body is not taken."""
    reader = MessageReader(request(*fields).get(b"grpc-encoding"), size_max)
    try:
        for part in parts:
            reader.feed(part)
        reader.finish()
    except Refused as refused:
        return refused
    raise AssertionError("expected a refusal")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (b"1H", 3600),
        (b"2M", 120),
        (b"3S", 3),
        (b"40m", 0.04),
        (b"50u", 5e-5),
        (b"99999999n", 0.1),
        (b"99999999H", TIMEOUT_S_MAX),
    ],
)
def test_timeouts_have_units(text: bytes, seconds: float) -> None:
    assert timeout_s(request((b"grpc-timeout", text))) == pytest.approx(seconds, rel=1e-6)  # pyright: ignore[reportUnknownMemberType]


def test_no_timeout_is_none() -> None:
    assert timeout_s(request()) is None


@pytest.mark.parametrize("text", [b"", b"1", b"S", b"123456789S", b"-1S", b"1.5S", b"1s", b"1 S"])
def test_what_is_no_timeout_is_refused(text: bytes) -> None:
    with pytest.raises(Refused):
        timeout_s(request((b"grpc-timeout", text)))


def test_what_is_no_grpc_has_the_status_of_http() -> None:
    assert http_status(request()) == 200
    plain = (b"content-type", b"application/json")
    assert http_status(request(plain, without=b"content-type")) == 415
    assert http_status(request(without=b"content-type")) == 415
    proto = (b"content-type", b"application/grpc+proto")
    assert http_status(request(proto, without=b"content-type")) == 200
    other = (b"content-type", b"application/grpcweb")
    assert http_status(request(other, without=b"content-type")) == 415
    fields = [(b":method", b"GET"), *REQUEST[1:]]
    assert http_status(check_request(fields)) == 405


@given(st.lists(st.binary(max_size=50), max_size=5), st.booleans(), st.data())
def test_messages_come_out_however_the_body_was_cut(
    payloads: list[bytes], compressed: bool, draw: st.DataObject
) -> None:
    body = b"".join(
        message(gzip.compress(payload), flag=1) if compressed else message(payload)
        for payload in payloads
    )
    reader = MessageReader(b"gzip", 1000)
    found: list[bytes] = []
    while body:
        size = draw.draw(st.integers(1, len(body)))
        found += reader.feed(body[:size])
        body = body[size:]
    reader.finish()
    assert found == payloads


def test_a_message_above_the_limit_is_refused_at_its_prefix() -> None:
    assert refusal(PREFIX.pack(0, 1001)).code is Code.RESOURCE_EXHAUSTED
    assert MessageReader(None, 1000).feed(message(b"x" * 1000)) == [b"x" * 1000]


def test_a_bomb_is_not_unpacked() -> None:
    bomb = message(gzip.compress(b"\0" * 10_000_000), flag=1)
    fields = ((b"grpc-encoding", b"gzip"),)
    assert refusal(bomb, fields=fields, size_max=20_000).code is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("body", "fields", "code"),
    [
        (message(b"x", flag=2), (), Code.INTERNAL),
        (message(b"x", flag=1), (), Code.INTERNAL),
        (message(b"x", flag=1), ((b"grpc-encoding", b"gzip"),), Code.INTERNAL),
        (
            message(gzip.compress(b"x", mtime=0)[:-1], flag=1),
            ((b"grpc-encoding", b"gzip"),),
            Code.INTERNAL,
        ),
        (message(b"x", flag=1), ((b"grpc-encoding", b"snappy"),), Code.UNIMPLEMENTED),
        (message(b"xyz")[:-1], (), Code.INTERNAL),
        (b"\0\0", (), Code.INTERNAL),
    ],
)
def test_a_body_that_is_none_is_refused(body: bytes, fields: Fields, code: Code) -> None:
    assert refusal(body, fields=fields).code is code


def test_who_compresses_otherwise_is_told_what_is_taken() -> None:
    refused = refusal(message(b"x", flag=1), fields=((b"grpc-encoding", b"snappy"),))
    assert refused.fields == ((b"grpc-accept-encoding", b"identity,gzip"),)


def test_an_uncompressed_message_is_taken_whatever_the_encoding() -> None:
    reader = MessageReader(b"snappy", 1000)
    assert reader.feed(message(b"x")) == [b"x"]


def test_metadata_is_what_is_neither_https_nor_grpcs() -> None:
    fields = request(
        (b"grpc-timeout", b"1S"), (b"user-agent", b"x"), (b"a", b"b"), (b"c-bin", b"AAE,Ag")
    ).fields
    assert metadata(fields) == [("a", "b"), ("c-bin", b"\0\1"), ("c-bin", b"\2")]


def test_binary_metadata_may_be_padded() -> None:
    assert metadata([(b"a-bin", b"AAE="), (b"a-bin", b"AA==, AAE")]) == [
        ("a-bin", b"\0\1"),
        ("a-bin", b"\0"),
        ("a-bin", b"\0\1"),
    ]


KEYS = st.sampled_from(["a", "b", "b-bin", "c-bin"])


@given(st.lists(st.tuples(KEYS, st.binary(max_size=3)), max_size=8))
def test_metadata_keeps_its_order_also_that_of_equal_keys(given: list[tuple[str, bytes]]) -> None:
    pairs = [(key, value if key.endswith("-bin") else value.hex()) for key, value in given]
    assert metadata(fields_of(pairs)) == pairs


def test_what_begins_with_grpc_is_reserved_and_no_metadata() -> None:
    reserved = [(b"grpc-foo", b"x"), (b"grpc-foo-bin", b"!"), (b"grpc-", b"\xff")]
    assert metadata([*reserved, (b"grpcx", b"y")]) == [("grpcx", "y")]


@pytest.mark.parametrize("field", [(b"a-bin", b"!"), (b"a", b"\xff"), (b"a+b", b"c")])
def test_metadata_that_is_none_is_refused(field: tuple[bytes, bytes]) -> None:
    with pytest.raises(Refused):
        metadata([field])


@given(st.binary(max_size=30))
def test_binary_metadata_comes_back(value: bytes) -> None:
    assert metadata(fields_of([("a-bin", value)])) == [("a-bin", value)]


def test_a_status_message_is_percent_encoded_in_utf8() -> None:
    assert dict(trailers(13, " 100 % ü\n "))[b"grpc-message"] == b"%20100 %25 %C3%BC%0A%20"
    assert trailers(0, "") == [(b"grpc-status", b"0")]
