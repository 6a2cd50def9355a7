"""Claims of `worker.kv_cache`, for both kinds of memory."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbroken import blocks
from worker.engine import KvTrim
from worker.kv_cache import KvCache, Lease, PagedKvCache, SlotKvCache

SIZE = 4
ROOT = 9


def hashes(tokens: list[int]) -> list[int]:
    return blocks.chain(tokens, SIZE, root=ROOT)


def held(cache: KvCache, tokens: list[int]) -> Lease:
    lease = cache.acquire(hashes(tokens), len(tokens))
    assert lease is not None
    return lease


def served(cache: KvCache, tokens: list[int]) -> None:
    """A sequence of these tokens came, was computed and went."""
    lease = held(cache, tokens)
    cache.seal(lease, hashes(tokens))
    cache.release(lease)


CACHES = [
    pytest.param(lambda: PagedKvCache(10, SIZE), id="paged"),
    pytest.param(lambda: SlotKvCache(10, SIZE, 3), id="slots"),
]


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest) -> KvCache:
    made = request.param()
    assert isinstance(made, PagedKvCache | SlotKvCache)
    return made


def test_a_prefix_that_was_computed_is_found_again(cache: KvCache) -> None:
    served(cache, list(range(10)))
    lease = held(cache, [*range(8), 77, 78])
    assert lease.cached_tokens == 8


def test_the_last_token_is_always_computed(cache: KvCache) -> None:
    served(cache, list(range(8)))
    assert held(cache, list(range(8))).cached_tokens == 4


def test_a_prefix_with_other_beginning_is_not_found(cache: KvCache) -> None:
    served(cache, list(range(10)))
    assert held(cache, [99, *range(1, 10)]).cached_tokens == 0


def test_what_was_not_sealed_is_not_found(cache: KvCache) -> None:
    lease = held(cache, list(range(10)))
    cache.seal(lease, hashes(list(range(4))))
    cache.release(lease)
    assert held(cache, list(range(10))).cached_tokens == 4


def test_cached_blocks_make_room_for_new_ones(cache: KvCache) -> None:
    served(cache, list(range(16)))
    assert cache.num_cached == 4
    lease = held(cache, [50 + i for i in range(39)])
    assert cache.num_used == 10
    assert cache.num_cached == 0
    cache.check([lease])


def test_held_blocks_never_make_room(cache: KvCache) -> None:
    lease = held(cache, list(range(39)))
    assert cache.acquire([], 1) is None
    assert not cache.grow(lease)
    cache.check([lease])


def test_events_tell_what_can_be_found(cache: KvCache) -> None:
    served(cache, list(range(8)))
    assert cache.take_events() == (hashes(list(range(8))), [])
    held(cache, [50 + i for i in range(39)])
    stored, removed = cache.take_events()
    assert (stored, sorted(removed)) == ([], sorted(hashes(list(range(8)))))
    assert cache.reusable() == []


def test_running_sequences_share_the_blocks_of_a_paged_memory() -> None:
    cache = PagedKvCache(10, SIZE)
    first = held(cache, list(range(8)))
    cache.seal(first, hashes(list(range(8))))
    second = held(cache, [*range(8), 9])
    assert second.cached_tokens == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert cache.num_used == 4
    cache.check([first, second])


def test_the_least_recently_used_block_of_a_paged_memory_goes_first() -> None:
    cache = PagedKvCache(6, SIZE)
    served(cache, [1] * 8)
    served(cache, [2] * 8)
    assert held(cache, [1] * 9).cached_tokens == 8  # Uses it again, and leaves 1 block free.
    held(cache, [3] * 7)
    assert cache.match(hashes([2] * 8)) == 1  # Its last block went, its first one is left.


def test_the_slot_with_the_longest_common_prefix_is_taken() -> None:
    cache = SlotKvCache(20, SIZE, 3)
    prefixes = [[1] * 8, [*[1] * 8, *[2] * 4], [3] * 8]
    leases = [held(cache, tokens) for tokens in prefixes]
    for lease, tokens in zip(leases, prefixes, strict=True):
        cache.seal(lease, hashes(tokens))
        cache.release(lease)
    lease = held(cache, [*[1] * 8, *[2] * 4, 5])
    assert (lease.kv_slot, lease.cached_tokens) == (leases[1].kv_slot, 12)


def test_a_slot_is_trimmed_to_what_its_next_owner_shares() -> None:
    cache = SlotKvCache(20, SIZE, 2)
    served(cache, list(range(12)))
    cache.take_trims()
    lease = held(cache, [*range(8), 99, 99])
    assert lease.kv_slot == 0
    assert cache.take_trims() == [KvTrim(0, 8)]


def test_a_busy_slot_shares_nothing() -> None:
    cache = SlotKvCache(20, SIZE, 2)
    first = held(cache, list(range(8)))
    cache.seal(first, hashes(list(range(8))))
    second = held(cache, list(range(8)))
    assert (second.kv_slot, second.cached_tokens) == (1, 0)
    cache.check([first, second])


def test_an_empty_slot_is_taken_before_a_cached_prefix_is_lost() -> None:
    cache = SlotKvCache(20, SIZE, 2)
    served(cache, list(range(8)))
    assert held(cache, [9] * 8).kv_slot == 1
    assert cache.match(hashes(list(range(8)))) == 2


def test_an_evicted_slot_is_emptied_before_its_room_is_used() -> None:
    cache = SlotKvCache(4, SIZE, 2)
    served(cache, list(range(8)))
    cache.take_trims()
    lease = held(cache, [9] * 11)
    assert lease.kv_slot == 1
    assert cache.take_trims() == [KvTrim(0, 0)]


@dataclass
class Tracked:
    lease: Lease
    tokens: list[int]


@settings(max_examples=150, deadline=None)
@given(is_paged=st.booleans(), data=st.data())
def test_no_block_is_lost_whatever_happens(is_paged: bool, data: st.DataObject) -> None:
    cache = PagedKvCache(12, SIZE) if is_paged else SlotKvCache(12, SIZE, 4)
    running: list[Tracked] = []
    reusable: set[int] = set()
    for _ in range(data.draw(st.integers(1, 40))):
        move = data.draw(st.sampled_from(["acquire", "grow", "seal", "release"]))
        if move == "acquire":
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=20))
            lease = cache.acquire(hashes(tokens), len(tokens))
            if lease is not None:
                assert lease.cached_tokens < len(tokens) <= lease.capacity - 1
                running.append(Tracked(lease, tokens))
        elif running:
            index = data.draw(st.integers(0, len(running) - 1))
            tracked = running[index]
            if move == "grow":
                before = tracked.lease.capacity
                if cache.grow(tracked.lease):
                    assert tracked.lease.capacity == before + SIZE
                    tracked.tokens += [0] * SIZE
            elif move == "seal":
                num = data.draw(st.integers(tracked.lease.cached_tokens, len(tracked.tokens)))
                cache.seal(tracked.lease, hashes(tracked.tokens[:num]))
            else:
                cache.release(running.pop(index).lease)
        cache.check([t.lease for t in running])
        stored, removed = cache.take_events()
        assert not reusable & set(stored)
        assert set(removed) <= reusable
        reusable = (reusable | set(stored)) - set(removed)
        assert reusable == set(cache.reusable())
    for tracked in running:
        cache.release(tracked.lease)
    cache.check([])
    assert cache.num_used == 0
