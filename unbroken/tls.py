"""TLS of a client: whom it trusts, what it shows of itself, and why a server is not taken.

gRPC says of a failed handshake little that people can act on, so after a failure the handshake is
tried once more by Python's own TLS, which says what is wrong as a code.
"""

import asyncio
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import grpc

from unbroken.config import split_address

EXPLAIN_TIMEOUT_S: Final = 1.0
"""How long each step may take that looks into a failure."""

_WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the server wants a certificate of its clients",
        "WRONG_VERSION_NUMBER": "the server does not speak TLS",
        "RECORD_LAYER_FAILURE": "the server does not speak TLS",
    }
)
"""For OpenSSL's names of what goes wrong."""


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM files of a client that speaks TLS. Raises ValueError if they do not belong together."""

    ca: Path | None = None
    """Certificates of the authorities that are trusted; None: those that this machine trusts."""
    certificate: Path | None = None
    """What the client shows, its chain after it; None: nothing."""
    key: Path | None = None
    """Its private key."""
    server_name: str | None = None
    """Whom the server's certificate has to name; None: the host of the address."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("expected certificate and key together, got one of them")

    def context(self) -> ssl.SSLContext:
        """For Python's own TLS. Raises ValueError that names the file that is wrong."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"ca: expected PEM certificates in {self.ca}: {error}") from error
        if self.certificate is not None:
            try:
                context.load_cert_chain(self.certificate, self.key)
            except (OSError, ssl.SSLError) as error:
                raise ValueError(
                    f"certificate, key: expected a PEM certificate in {self.certificate} and its "
                    f"key in {self.key}: {error}"
                ) from error
        context.set_alpn_protocols(["h2"])
        return context

    def credentials(self) -> grpc.ChannelCredentials:
        """For gRPC. Raises ValueError as `context`."""
        # gRPC notices wrong files at the first call, and does not say which.
        context = self.context()
        return grpc.ssl_channel_credentials(
            root_certificates=_content(self.ca) or _of_this_machine(context),
            private_key=_content(self.key),
            certificate_chain=_content(self.certificate),
        )

    async def explain(self, address: str) -> str:
        """Why TLS with the server at "host:port" fails, for people; empty if it is not TLS."""
        # In a thread, since asyncio tells no failure that comes after the handshake.
        return await asyncio.to_thread(self._shake_hands, *split_address(address))

    def _shake_hands(self, host: str, port: int) -> str:
        try:
            context = self.context()
            with (
                socket.create_connection((host, port), EXPLAIN_TIMEOUT_S) as connection,
                context.wrap_socket(connection, server_hostname=self.server_name or host) as tls,
            ):
                # With TLS 1.3 a client has finished before the server has looked at what it showed.
                # Servers close then, most without a word; those that are content begin HTTP/2.
                if not tls.recv(1):
                    return self._why_closed()
        except ssl.SSLCertVerificationError as error:
            return f"the server's certificate is not taken: {error.verify_message}"
        except ssl.SSLError as error:
            reason = error.reason or "unknown"
            return _WORDS.get(reason, reason.lower().replace("_", " "))
        except (OSError, ValueError):
            pass  # It cannot be reached at all, or in time; or a file is not there any more.
        return ""

    def _why_closed(self) -> str:
        if self.certificate is None:
            return "the server closes at once; it seems to want a certificate of its clients"
        return "the server closes at once; it seems not to take the certificate that it is shown"


def _of_this_machine(context: ssl.SSLContext) -> bytes | None:
    """Certificates of the authorities that it trusts; gRPC alone trusts a list that it brings."""
    found = context.get_ca_certs(binary_form=True)
    return "".join(map(ssl.DER_cert_to_PEM_cert, found)).encode() or None


def _content(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
