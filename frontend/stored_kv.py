"""Decides how much of a stream's KV a memory service is taken to have.

    a stream ran beside it ──▶ all but its last tokens are expected there
    an attempt went on there ──▶ the worker says how many it found ──▶ the share expected of others

The share is that of what was expected, so it heals as it was lost: who is expected to find nothing
looks all the same, and says what it found.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

SERVICES_MAX: Final = 1024
"""Memory services that are remembered; the one heard of longest ago is forgotten."""
WEIGHT: Final = 0.5
"""Of the newest attempt: a dead service is noticed over two streams, not over twenty."""
UNSTORED_TOKENS: Final = 32
"""Of a stream, at its end: full blocks are stored, a moment after they are."""
NAME_CHARS_MAX: Final = 64
ADDRESS_CHARS_MAX: Final = 256
TICKET_BYTES_MAX: Final = 1024
"""As the contract says. Whatever is longer would be copied into each attempt that moves."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What an attempt might find in its worker's memory service, if nothing of it were lost."""

    service: str
    num_tokens: int


class StoredKv:
    """What each memory service was found to have, as a share of what it might have."""

    def __init__(self) -> None:
        self._shares: OrderedDict[str, float] = OrderedDict()

    def expected(self, service: str, num_tokens: int) -> int:
        """Of a stream of so many tokens whose worker stores there: those to be found."""
        return int(at_most(num_tokens) * self._shares.get(service, 1.0))

    def seen(self, expected: Expected, *, cached_tokens: int, restored_tokens: int) -> None:
        """An attempt found so many in its worker's own cache, and then so many there."""
        num_sought = expected.num_tokens - cached_tokens
        if num_sought <= 0:
            return  # Nobody looked.
        share = min(1.0, restored_tokens / num_sought)
        before = self._shares.pop(expected.service, 1.0)
        self._shares[expected.service] = before + WEIGHT * (share - before)
        while len(self._shares) > SERVICES_MAX:
            self._shares.popitem(last=False)


def at_most(num_tokens: int) -> int:
    """Of a stream of so many tokens, those that can have been stored."""
    return max(0, num_tokens - UNSTORED_TOKENS)


def problem_of_service(name: str) -> str | None:
    """Why a memory service's name is none, if it is none."""
    if len(name) > NAME_CHARS_MAX:
        return f"expected a memory_service of at most {NAME_CHARS_MAX} characters, got {len(name)}"
    return None


def problem_of_holder(address: str, ticket: bytes) -> str | None:
    """Why it says nothing about where KV is, if it does not."""
    if len(address) > ADDRESS_CHARS_MAX or len(ticket) > TICKET_BYTES_MAX:
        return (
            f"expected a kv_holder of at most {ADDRESS_CHARS_MAX} characters and "
            f"{TICKET_BYTES_MAX} bytes, got {len(address)} and {len(ticket)}"
        )
    return None
