"""Servers and channels with the arguments that a mesh of long streams needs.

Most of gRPC's defaults suit short calls. Three of them break ours (measured with grpcio 1.85,
docs/decisions/keepalive.md):

- A stopped peer whose kernel still acknowledges packets is noticed through
  `grpc.http2.ping_timeout_ms` only; `keepalive_timeout_ms` sees the network, not the process.
- A server closes connections that ping without data (a long prefill!) as "Too many pings".
  `grpc.http2.min_ping_interval_without_data_ms` and `max_ping_strikes` allow it; the similar name
  with `recv` in it does nothing.
- `SO_REUSEPORT` is on, so that a second server on the same port takes half of the connections of
  the first instead of failing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import grpc.aio

from unbroken.config import split_address
from unbroken.status import ErrorInterceptor, Trailers

RECEIVE_BYTES_MAX: Final = 16 * 1024 * 1024
"""Largest message accepted, unless told otherwise: a prompt of 128 k tokens has about 0.5 MiB."""

METADATA_BYTES_MAX: Final = 16 * 1024
"""Most header or trailer bytes of a call."""


@dataclass(frozen=True, slots=True)
class Keepalive:
    """When a silent connection is asked for a sign of life, and how long the answer may take.

    Between processes of the mesh a backstop: their heartbeats notice a hung peer earlier.
    """

    interval_s: float = 10.0
    timeout_s: float = 2.0


MESH_KEEPALIVE: Final = Keepalive()
"""Between the processes of the mesh."""

CLIENT_KEEPALIVE: Final = Keepalive(interval_s=1.0, timeout_s=1.5)
"""Between clients and frontends, where nothing else notices a peer that hangs: within 2.5 s."""

Options = Sequence[tuple[str, str | int]]


def make_server(
    *,
    receive_bytes_max: int = RECEIVE_BYTES_MAX,
    keepalive: Keepalive = MESH_KEEPALIVE,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    concurrent_calls_max: int | None = None,
    trailers: Callable[[], Trailers] = tuple,
) -> grpc.aio.Server:
    """A server that turns exceptions into statuses (`unbroken.status`), not yet listening.

    `interceptors` see a call before that translation. Calls beyond `concurrent_calls_max` are
    refused by gRPC with a bare RESOURCE_EXHAUSTED; prefer an admission of your own. Every other
    call ends with `trailers`.
    """
    return grpc.aio.server(
        options=server_options(receive_bytes_max, keepalive),
        interceptors=[*interceptors, ErrorInterceptor(trailers)],
        maximum_concurrent_rpcs=concurrent_calls_max,
    )


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a server that speaks TLS; with `client_ca`, its clients show certificates."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


def listen(server: grpc.aio.Server, address: str, *, tls: TlsFiles | None = None) -> str:
    """Bind `server` to "host:port" and return the address with the port that was bound.

    Port 0 lets the kernel choose. Raises OSError if the address or a file cannot be had.
    """
    host, _ = split_address(address)
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, _credentials(tls))
    except RuntimeError as error:
        raise OSError(f"expected an address to listen on, got {address}: {error}") from error
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen_locally(server: grpc.aio.Server, path: Path) -> str:
    """Bind `server` to a Unix socket and return its address for `open_channel`."""
    address = f"unix:{path}"
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"expected a socket to listen on, got {path}: {error}") from error
    return address


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(tls.key.read_bytes(), tls.certificate.read_bytes())],
        root_certificates=None if tls.client_ca is None else tls.client_ca.read_bytes(),
        require_client_auth=tls.client_ca is not None,
    )


def open_channel(
    address: str,
    *,
    receive_bytes_max: int = RECEIVE_BYTES_MAX,
    keepalive: Keepalive = MESH_KEEPALIVE,
    credentials: grpc.ChannelCredentials | None = None,
    server_name: str | None = None,
) -> grpc.aio.Channel:
    """A channel to "host:port" or "unix:path", with a connection of its own.

    With `credentials` it speaks TLS; the server's certificate has to name `server_name`, or else
    the host. The caller closes it.
    """
    options = [*channel_options(receive_bytes_max, keepalive)]
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    if server_name is not None:
        options.append(("grpc.ssl_target_name_override", server_name))
    return grpc.aio.secure_channel(address, credentials, options=options)


def admin_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What makes a call one of an operator; `frontend/operators.py` reads it."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def server_options(receive_bytes_max: int, keepalive: Keepalive) -> Options:
    """gRPC's arguments for a server."""
    return [
        *_both_sides(receive_bytes_max, keepalive),
        ("grpc.so_reuseport", 0),
        # Pings are welcome at any pace that a client of ours would choose.
        ("grpc.http2.min_ping_interval_without_data_ms", 10),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def channel_options(receive_bytes_max: int, keepalive: Keepalive) -> Options:
    """gRPC's arguments for a channel."""
    return [
        *_both_sides(receive_bytes_max, keepalive),
        # Channels to the same address share no connection: one that hangs is closed alone.
        ("grpc.use_local_subchannel_pool", 1),
        # Mesh links are direct; `http_proxy` in the environment is not meant for them.
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 1000),  # Also what a connection attempt may take.
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]


def _both_sides(receive_bytes_max: int, keepalive: Keepalive) -> Options:
    return [
        ("grpc.keepalive_time_ms", round(keepalive.interval_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(keepalive.timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", round(keepalive.timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", receive_bytes_max),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", METADATA_BYTES_MAX),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
    ]
