"""Resume tokens are made when there is time, and once for each place where a request has been."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

from frontend.afterwards import AFTER_S, Afterwards
from frontend.dispatch import MOVE_TOLD_S, News
from frontend.reading import ResumeTokens
from frontend.resume_token import Minting


@dataclass
class Mint:
    """Counts what it made."""

    num_made: int = 0
    is_old: bool = False

    def mint(self, request: "Moving") -> tuple[bytes, Minting]:
        self.num_made += 1
        self.is_old = False
        return b"%d at %d" % (self.num_made, request.num_moves), Minting(0.0, 0.0)

    def is_due(self, _: Minting) -> bool:
        return self.is_old


@dataclass
class Moving:
    """A request that goes from worker to worker."""

    num_moves: int = 0


@dataclass
class It:
    mint: Mint = field(default_factory=Mint)
    request: Moving = field(default_factory=Moving)

    def __post_init__(self) -> None:
        self.tokens = ResumeTokens(cast("Any", self.mint), cast("Any", self.request))


def test_a_token_that_was_prepared_is_the_one_that_is_told() -> None:
    it = It(request=Moving(1))
    it.tokens.prepare()
    it.tokens.prepare()
    assert it.tokens.newest() == b"1 at 1"
    assert it.tokens.newer() == b""
    it.request.num_moves = 2
    it.tokens.prepare()
    assert it.mint.num_made == 2, "before anybody asks"
    assert it.tokens.newer() == b"2 at 2"
    assert it.tokens.newer() == b""
    assert it.mint.num_made == 2


def test_a_prepared_token_of_a_place_that_was_left_is_not_told() -> None:
    it = It()
    assert it.tokens.newest() == b"1 at 0"
    it.request.num_moves = 1
    it.tokens.prepare()
    it.request.num_moves = 2
    assert it.tokens.newer() == b"3 at 2"


def test_without_preparation_a_token_is_made_when_it_is_told() -> None:
    it = It()
    assert it.tokens.newest() == b"1 at 0"
    it.request.num_moves = 1
    assert it.tokens.newer() == b"2 at 1"
    it.mint.is_old = True
    assert it.tokens.newer() == b"3 at 1"
    assert it.tokens.newest() == b"4 at 1"


def test_what_can_wait_is_prepared_once_when_commands_have_long_been_written() -> None:
    async def scenario() -> None:
        happened: list[str] = []
        news, afterwards = News(), Afterwards()
        news.prepare = lambda: happened.append("prepared")
        asyncio.get_running_loop().call_soon(happened.append, "commands are written")
        news.set_soon(afterwards)
        news.set_soon(afterwards)
        await asyncio.sleep(5 * AFTER_S)
        assert happened == ["commands are written", "prepared"]
        news.set_soon(afterwards)
        await asyncio.sleep(5 * AFTER_S)
        assert happened[2:] == ["prepared"], "and again when there is more"
        assert not news.is_set
        await asyncio.sleep(2 * MOVE_TOLD_S)
        assert news.is_set, "whoever reads is told though no token came"

    asyncio.run(scenario())
