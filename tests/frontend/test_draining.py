"""A frontend that drains: what it counts, and that it ends whatever becomes of its clock."""

import asyncio
from collections.abc import Sequence

from typing_extensions import override

from frontend import drain
from frontend.drain import Asked, Drain
from frontend.draining import Draining
from frontend.requests import Requests
from tests.frontend.fakes import FakeSidecar
from tests.frontend.worlds import read_some, run, world

PROMPT = list(b"once upon a time")


class Stayer:
    """A frontend that somebody never leaves."""

    def leave(self) -> None:
        """Nothing."""

    def go_away(self, within_s: float) -> None:
        """Nothing."""

    def cut_short(self) -> None:
        """Nothing."""

    def num_elsewhere(self) -> int:
        return 1


class Broken(Drain):
    """Has a bug."""

    @override
    def handle_timeout(self, now: float) -> Sequence[drain.Command]:
        raise RuntimeError("a bug")


def test_who_sees_no_deadlines_any_more_waits_for_nobody() -> None:
    async def scenario() -> None:
        draining = Draining(Broken(60.0), "f", Requests(running_max=1), Stayer())
        following = asyncio.create_task(draining.follow())
        draining.tell(Asked())
        await draining.over.wait()
        assert not draining.stop_wanted.is_set()
        (failed,) = await asyncio.gather(following, return_exceptions=True)
        assert isinstance(failed, RuntimeError)

    run(scenario())


def test_a_client_that_leaves_when_it_was_told_has_not_moved() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=0.005)) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=4000)
            await read_some(stream, 2)
            (request,) = it.frontend.requests.running
            it.frontend.draining.tell(Asked(60.0))
            await it.until(lambda: request.cut_at is not None)
            await stream.cancel()
            await it.until(lambda: it.num_running() == 0)
            told = it.frontend.draining.response()
            assert (told.num_left, told.num_moved) == (1, 0)

    run(scenario())
