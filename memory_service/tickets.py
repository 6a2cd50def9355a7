"""Decides who may read blocks from another host: whoever has a ticket of their tenant.

A ticket is the time until which it is good, and a code over that and the tenant's name. Nothing is
kept of it: who has the key can tell.
"""

import hmac
import struct

from unbroken.errors import InvalidField, Reason, UnbrokenError

KEY_BYTES = 32
TTL_S_MAX = 86_400.0
_UNTIL = struct.Struct("<Q")
_CODE_BYTES = 32


class Tickets:
    """Of one memory service, through all its lives: they share the key."""

    def __init__(self, key: bytes) -> None:
        assert len(key) == KEY_BYTES, "made by the service"
        self._key = key

    def grant(self, tenant: str, ttl_s: float, wall_s: float) -> bytes:
        """A ticket that is good for so long from now on."""
        if not 0 < ttl_s <= TTL_S_MAX:
            raise InvalidField("ttl", f"a time up to {TTL_S_MAX:g} s", ttl_s)
        until = _UNTIL.pack(int((wall_s + ttl_s) * 1000))
        return until + self._code(until, tenant)

    def check(self, ticket: bytes, tenant: str, wall_s: float) -> None:
        """Raise NOT_PERMITTED unless it is one of this tenant, and still good."""
        until = ticket[: _UNTIL.size]
        is_ours = hmac.compare_digest(ticket[_UNTIL.size :], self._code(until, tenant))
        if len(ticket) != _UNTIL.size + _CODE_BYTES or not is_ours:
            raise UnbrokenError(Reason.NOT_PERMITTED, f"expected a ticket of tenant {tenant!r}")
        (until_ms,) = _UNTIL.unpack(until)
        if wall_s * 1000 >= until_ms:
            raise UnbrokenError(Reason.NOT_PERMITTED, "expected a ticket that is still good")

    def _code(self, until: bytes, tenant: str) -> bytes:
        return hmac.digest(self._key, until + tenant.encode(), "sha256")
