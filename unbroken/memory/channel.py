"""Messages with descriptors over a Unix socket of type SEQPACKET: one packet, one message."""

import array
import select
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from unbroken.errors import Reason, UnbrokenError

PACKET_BYTES_MAX = 64 * 1024
FDS_MAX = 250
"""Descriptors in one packet; the kernel takes 253."""

_TIMEVAL = struct.Struct("ll")
_ANCILLARY_BYTES = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)

MessageT = TypeVar("MessageT", bound=Message)


class ChannelClosed(Exception):  # noqa: N818 - It names what happened.
    """The other side is gone, or broke the contract, or nothing came in time."""


def connect(path: Path) -> socket.socket:
    """A connection to whoever listens there. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def set_timeout(sock: socket.socket, timeout_s: float) -> None:
    """Let the kernel end a wait; 0: never. Python's own timeouts cost a system call each time."""
    seconds, rest = divmod(timeout_s, 1)
    sock.setblocking(True)
    value = _TIMEVAL.pack(int(seconds), int(rest * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def is_open(sock: socket.socket) -> bool:
    """Whether neither side has ended the connection, by what the kernel knows now."""
    if (fd := sock.fileno()) == -1:
        return False
    poller = select.poll()
    poller.register(fd, select.POLLRDHUP)
    return not poller.poll(0)


def send(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send one message. Raises ChannelClosed, also if the socket would have to wait."""
    data = message.SerializeToString()
    if len(data) > PACKET_BYTES_MAX or len(fds) > FDS_MAX:
        raise UnbrokenError(
            Reason.PROTOCOL_VIOLATION,
            f"expected a packet of at most {PACKET_BYTES_MAX} bytes and {FDS_MAX} descriptors, "
            f"got {len(data)} and {len(fds)}",
        )
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    assert data, "a packet without bytes would look like the end of the connection"
    try:
        sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
    except OSError as error:
        raise ChannelClosed(str(error)) from error


def look_out(sock: socket.socket, seconds: float) -> None:
    """Return when something has come, or after so long: a process that sleeps is woken late."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        try:
            sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
        except OSError:
            pass  # Whoever receives is told.
        return


def receive(sock: socket.socket, kind: type[MessageT]) -> tuple[MessageT, list[int]]:
    """The next message, and its descriptors, which are the caller's from now on.

    Raises ChannelClosed at the end of the connection, and on whatever is no message. Raises
    BlockingIOError if the socket does not wait and nothing is there.
    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(
            PACKET_BYTES_MAX, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
    except BlockingIOError:
        raise
    except OSError as error:
        raise ChannelClosed(str(error)) from error
    fds = array.array("i")
    for level, kind_of, payload in ancillary:
        if (level, kind_of) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    try:
        if not data:
            raise ChannelClosed("the connection ended")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ChannelClosed("a packet was too large, or its descriptors were too many")
        try:
            return kind.FromString(data), list(fds)
        except DecodeError as error:
            raise ChannelClosed(f"expected a message, got {len(data)} other bytes") from error
    except ChannelClosed:
        close_all(fds)
        raise


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        socket.close(fd)
