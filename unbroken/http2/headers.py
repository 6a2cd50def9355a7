"""What a header section may be (RFC 9113, section 8): the rest is malformed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

Fields = Sequence[tuple[bytes, bytes]]

_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_FORBIDDEN_IN_VALUE: Final = re.compile(rb"[\0\r\n]")
_CONNECTION_SPECIFIC: Final = frozenset(
    {b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"}
)
_PSEUDO: Final = frozenset({b":method", b":scheme", b":authority", b":path"})


class Malformed(Exception):  # noqa: N818 - it names what is wrong.
    """A header section that must not be acted upon; the text says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """The header section of a request."""

    method: bytes
    path: bytes
    """Empty for CONNECT."""
    authority: bytes
    fields: Fields
    """All but the pseudo-header fields, in their order."""
    content_length: int | None

    def get(self, name: bytes) -> bytes | None:
        """The first value of a field."""
        return next((value for key, value in self.fields if key == name), None)


def check_request(given: Fields) -> Request:
    """The request. Raises `Malformed`."""
    pseudo: dict[bytes, bytes] = {}
    fields: list[tuple[bytes, bytes]] = []
    content_length: int | None = None
    for name, value in given:
        if name[:1] == b":":
            if fields:
                raise Malformed("a pseudo-header field after another field")
            if name not in _PSEUDO or name in pseudo:
                raise Malformed(f"unexpected or repeated {name[:40]!r}")
            _check_value(name, value)
            _check_edges(name, value)
            pseudo[name] = value
            continue
        _check_field(name, value)
        _check_edges(name, value)
        if name == b"content-length":
            if not value.isdigit() or len(value) > 19 or content_length not in (None, int(value)):
                raise Malformed("a bad or contradicting content-length")
            content_length = int(value)
        fields.append((name, value))
    method = pseudo.get(b":method", b"")
    path = pseudo.get(b":path", b"")
    authority = pseudo.get(b":authority", b"")
    if method == b"CONNECT":
        if not authority or b":scheme" in pseudo or b":path" in pseudo:
            raise Malformed("expected of CONNECT no more than :authority")
    elif not (method and path and pseudo.get(b":scheme")):
        raise Malformed("expected :method, :scheme and :path")
    if authority and any(name == b"host" and value != authority for name, value in fields):
        raise Malformed("host contradicts :authority")
    return Request(method, path, authority, fields, content_length)


def check_answer(given: Fields) -> tuple[int, Fields]:
    """The status of an answer, and its other fields in their order. Raises `Malformed`.

    Spaces around values pass, also in trailers: gRPC's own servers send messages as they are.
    """
    if not given or given[0][0] != b":status":
        raise Malformed("expected :status first")
    status, fields = given[0][1], given[1:]
    if len(status) != 3 or not status.isdigit():
        raise Malformed(f"expected a status of three digits, got {status[:20]!r}")
    check_trailers(fields)
    return int(status), fields


def check_trailers(given: Fields) -> None:
    """Raises `Malformed`."""
    for name, value in given:
        if name[:1] == b":":
            raise Malformed("a pseudo-header field where there is none")
        _check_field(name, value)


def list_bytes(given: Fields) -> int:
    """What a header section comes to, as its limit counts it (RFC 9113, section 6.5.2)."""
    return sum(len(name) + len(value) + 32 for name, value in given)


def _check_field(name: bytes, value: bytes) -> None:
    if not _NAME.fullmatch(name):
        raise Malformed(f"a bad field name: {name[:40]!r}")
    _check_value(name, value)
    if name in _CONNECTION_SPECIFIC or (name == b"te" and value.lower() != b"trailers"):
        raise Malformed(f"connection-specific: {name.decode()}")


def _check_value(name: bytes, value: bytes) -> None:
    if _FORBIDDEN_IN_VALUE.search(value):
        raise Malformed(f"a bad value of {name[:40]!r}")


def _check_edges(name: bytes, value: bytes) -> None:
    if value != value.strip(b" \t"):
        raise Malformed(f"spaces around the value of {name[:40]!r}")
