"""What the probes of a process say over HTTP."""

import asyncio
import urllib.error
import urllib.request

import pytest

from unbroken import metrics
from unbroken.health import HealthServicer
from unbroken.probes import HUNG_S, Probes


def probes() -> tuple[HealthServicer, Probes, list[float]]:
    """Of a process that has begun to live, on a clock that is the only item of the list."""
    health, now = HealthServicer(["startup", "readiness"]), [100.0]
    health.set("liveness", is_serving=True)
    return health, Probes(health, clock=lambda: now[0]), now


def status(answer: tuple[int, str] | None) -> int | None:
    return None if answer is None else answer[0]


def test_each_says_what_its_service_says() -> None:
    health, found, _ = probes()
    paths = ["/startup", "/ready", "/live"]
    assert [status(found.answer(path)) for path in paths] == [503, 503, 200]
    health.set("startup", is_serving=True)
    health.set("readiness", is_serving=True)
    assert [status(found.answer(path)) for path in paths] == [200, 200, 200]
    health.set("readiness", is_serving=False)
    assert [status(found.answer(path)) for path in paths] == [200, 503, 200]


def test_readiness_is_told_for_each_model_by_its_name() -> None:
    health, found, _ = probes()
    assert status(found.answer("/ready/org/model%201")) == 404
    health.set("model/org/model 1", is_serving=True)
    assert status(found.answer("/ready/org/model%201")) == 200
    health.set("model/org/model 1", is_serving=False)
    assert status(found.answer("/ready/org/model%201")) == 503


def test_a_loop_that_does_not_turn_is_not_alive_and_nothing_else_is_said_of_it() -> None:
    health, found, now = probes()
    health.set("readiness", is_serving=True)
    now[0] += HUNG_S + 0.1
    assert status(found.answer("/live")) == 503
    assert status(found.answer("/ready")) == 200
    found.beat()
    assert status(found.answer("/live")) == 200


@pytest.mark.parametrize("path", ["/metrics", "/", "/livez", "/ready2"])
def test_other_paths_are_left_to_whoever_is_behind(path: str) -> None:
    _, found, _ = probes()
    assert found.answer(path) is None


def test_they_stand_beside_the_metrics_and_a_running_loop_lives() -> None:
    async def scenario() -> None:
        health = HealthServicer()
        health.set("liveness", is_serving=True)
        found = Probes(health)
        beating = asyncio.create_task(found.run())
        server = metrics.serve(metrics.new_registry(), probes=found)

        def get(path: str) -> tuple[int, bytes]:
            try:
                with urllib.request.urlopen(f"http://{server.address}{path}", timeout=5) as page:
                    return page.status, page.read()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read()

        try:
            assert await asyncio.to_thread(get, "/live") == (200, b"ok\n")
            assert await asyncio.to_thread(get, "/ready") == (404, b"unknown\n")
            code, page = await asyncio.to_thread(get, "/metrics")
            assert (code, b"process_open_fds" in page) == (200, True)
        finally:
            beating.cancel()
            await asyncio.to_thread(server.close)

    asyncio.run(scenario())
