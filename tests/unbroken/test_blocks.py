"""Claims of `unbroken.blocks`."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from unbroken import blocks

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=70)


def test_the_definition_of_the_hashes_does_not_change() -> None:
    # The vectors of docs/decisions/block-hash.md; other programs compute them, too.
    root = blocks.root("simulated-0", "acme")
    assert root == 0x708DD73D5A460D63
    assert blocks.chain(range(1, 10), 4, root=root) == [0xD9409D70479375FC, 0x4143E041E0B376BB]


def test_only_full_blocks_have_a_hash() -> None:
    assert blocks.chain([1] * 11, 4, root=1) == blocks.chain([1] * 8, 4, root=1)
    assert len(blocks.chain([1] * 11, 4, root=1)) == 2


@given(TOKENS, st.integers(0, 69))
def test_a_hash_depends_on_every_token_up_to_its_block_and_on_none_after(
    tokens: list[int], index: int
) -> None:
    if index >= len(tokens):
        return
    changed = list(tokens)
    changed[index] ^= 1
    before, after = (blocks.chain(t, 4, root=7) for t in (tokens, changed))
    same = [x == y for x, y in zip(before, after, strict=True)]
    assert same == [block < index // 4 for block in range(len(before))]


@given(TOKENS, st.lists(st.integers(0, 70), max_size=6))
def test_growing_gives_the_same_hashes_as_at_once(tokens: list[int], cuts: list[int]) -> None:
    grown = blocks.BlockChain(4, root=7)
    for start, end in pairwise([0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]):
        grown.extend(tokens[start:end])
    assert grown.hashes == blocks.chain(tokens, 4, root=7)
    assert grown.num_tokens == len(tokens)


def test_tenants_and_numerics_share_nothing() -> None:
    roots = {blocks.root(n, t) for n, t in [("a", "b"), ("ab", ""), ("", "ab"), ("a", "c")]}
    assert len(roots) == 4
