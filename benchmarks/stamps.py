"""Tokens that say when they were made, so that latency can be read off them at the other end.

Token id = time in units of 10 µs, modulo 4,000: unambiguous up to 40 ms.
"""

import time

UNIT_S = 1e-5
NUM_IDS = 4_000


def stamp() -> int:
    """The token id of this moment."""
    return int(time.monotonic() / UNIT_S) % NUM_IDS


def age_s(token_id: int) -> float:
    """How long ago this token was made; wrong if that is more than 40 ms."""
    return (stamp() - token_id) % NUM_IDS * UNIT_S
