"""What a client may do before it is stopped. docs/decisions/edge.md tells what each is against."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """Of one connection, unless it says otherwise. Times in seconds, sizes in bytes."""

    connections_max: int = 20_000
    """Of the whole process, each from when it is accepted until it is closed."""
    streams_max: int = 4096
    """At once; announced. Those beyond are refused, and safe to try again."""
    header_list_bytes_max: int = 16 * 1024
    """Of one request, uncompressed and with 32 bytes for each field (RFC 9113, section 6.5.2)."""
    header_frames_max: int = 8
    """HEADERS and CONTINUATION frames of one request."""
    request_bytes_max: int = 16 * 1024 * 1024
    """One message."""
    held_bytes_max: int = 256 * 1024 * 1024
    """Requests that have come in part, of the whole process."""
    stream_window: int = 1024 * 1024
    """What a client may send ahead on a stream; announced. If small, it holds once acknowledged."""
    connection_window: int = 8 * 1024 * 1024
    """What a client may send ahead on all streams together."""
    settings_burst: int = 100
    settings_per_s: float = 1.0
    """SETTINGS frames: each can move the windows of all streams."""
    resets_burst: int = 4096
    resets_per_s: float = 100.0
    """Streams that a client may open and take back: all it has at once, and then some.

    So do those count that it has the server reset, or refuse, for a breach of the protocol.
    """
    control_burst: int = 10_000
    control_per_s: float = 1000.0
    """Frames that bring nothing (PING, WINDOW_UPDATE, PRIORITY, unknown, empty DATA, late ones).

    Each DATA frame that is sent allows four more, for its acknowledgement and probes of the line.
    """
    handshake_timeout_s: float = 10.0
    """For TLS, the preface and the first SETTINGS together."""
    header_timeout_s: float = 10.0
    """From the beginning of a frame or header block to its end."""
    request_timeout_s: float = 60.0
    """From the beginning of a request of one message to its end, or of one message of many."""
    stall_timeout_s: float = 60.0
    """A client that takes nothing for so long, while something waits for it, is cut off: the stream
    if its window is shut, the connection if its socket is full."""
    unsent_bytes_max: int = 4 * 1024 * 1024
    """What may wait in the socket of one connection before it is closed."""
    ping_interval_s: float = 1.0
    """A connection with streams that was silent for so long is asked for a sign of life."""
    ping_idle_interval_s: float = 10.0
    """So is one without."""
    pings_per_s_max: float = 1000.0
    """Of the whole process: with more connections, each is asked less often."""
    ping_timeout_s: float = 1.5
    """How long the answer may take."""
