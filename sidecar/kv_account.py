"""The sidecar's own account of KV blocks, from what it relays. No I/O.

An engine's report is better where there is one: it knows shared prefixes and what its cache keeps.
The account is an upper bound that needs nothing from the engine, so it also serves for engines that
say nothing, and a report far above it means that the engine leaks.
"""

from collections.abc import Iterable


def num_blocks(nums_tokens: Iterable[int], block_size: int) -> int:
    """Blocks that sequences of these lengths fill, if none shares any."""
    return sum(-(-num_tokens // block_size) for num_tokens in nums_tokens)
