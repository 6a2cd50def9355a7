"""Claims of `unbroken.memory.keys`: equal keys are equal content, and nothing else is."""

from dataclasses import replace

import pytest

from unbroken.memory.keys import KEY_BYTES, KeyChain, KeySpace, split

SPACE = KeySpace("m@1", "simulated-0", "bf16 lhd", "tp 0/1", 4, "acme")


def chained(space: KeySpace, *parts: list[int]) -> list[bytes]:
    chain = KeyChain(space)
    for part in parts:
        chain.extend(part)
    return chain.keys


def test_the_vector_of_the_page_holds() -> None:
    assert SPACE.root().hex() == "19feca2938a218ac4d92074fbb1e445b7210a098fdcb963e860383d1b5ba20c2"
    keys = chained(SPACE, list(range(1, 10)))
    assert [key.hex()[:12] for key in keys] == ["85660344949c", "2ed43a889e48"]
    assert [key.hex()[-4:] for key in keys] == ["78b3", "0371"]


def test_how_a_sequence_grew_does_not_matter() -> None:
    assert chained(SPACE, [1], [2, 3, 4, 5, 6, 7], [8]) == chained(SPACE, list(range(1, 9)))


def test_a_key_stands_for_all_tokens_up_to_its_block() -> None:
    one, other = chained(SPACE, list(range(8))), chained(SPACE, [9, *range(1, 8)])
    assert one[0] != other[0]
    assert one[1] != other[1]


@pytest.mark.parametrize("field", ["model", "numerics_id", "layout", "parallelism", "tenant"])
def test_whatever_makes_bytes_differ_makes_keys_differ(field: str) -> None:
    assert replace(SPACE, **{field: "other"}).root() != SPACE.root()


def test_texts_cannot_trade_characters() -> None:
    assert replace(SPACE, model="m@1s", numerics_id="imulated-0").root() != SPACE.root()


def test_keys_are_split_if_they_are_whole() -> None:
    keys = chained(SPACE, list(range(8)))
    assert split(b"".join(keys)) == keys
    with pytest.raises(ValueError, match="32"):
        split(bytes(KEY_BYTES + 1))
