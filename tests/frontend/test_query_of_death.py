"""A request that kills its workers is found, and nobody else is blamed."""

from dataclasses import replace
from random import Random

import pytest

from frontend.query_of_death import Fingerprint, Queries, QueryLimits, Stopped, fingerprint
from frontend.stream import Life
from unbroken.checkpoint import Checkpoint
from unbroken.generation import GenerationParams, SamplingParams, StopConditions
from unbroken.outcome import FailureKind

CRASH, STALL, ENGINE_ERROR = FailureKind.CRASH, FailureKind.STALL, FailureKind.ENGINE_ERROR
BAD, GOOD, OTHER = Fingerprint(b"bad"), Fingerprint(b"good"), Fingerprint(b"other")
LIMITS = QueryLimits()


def life(worker: int, engine_incarnation: int = 1) -> Life:
    return Life(f"w{worker}", 1, engine_incarnation)


def die(queries: Queries, query: Fingerprint, at: Life, offset: int = 0) -> Stopped | None:
    stopped = queries.died(query, at, CRASH, offset, 0.0)
    queries.check()
    return stopped


def test_a_request_under_which_engines_keep_dying_is_stopped_at_the_third() -> None:
    queries = Queries(LIMITS)
    for number in (1, 2):
        assert queries.may_start(BAD, life(number), 0.0)
        queries.started(BAD, life(number), 5.0)
        assert die(queries, BAD, life(number)) is None
        assert queries.is_suspect(BAD) == (number == 2)
    queries.started(BAD, life(3), 5.0)
    assert die(queries, BAD, life(3)) == Stopped(3, BAD.hex()[:16])
    assert queries.stopped(BAD, 1.0) is not None
    assert queries.stopped(GOOD, 1.0) is None


@pytest.mark.parametrize("deaths_max", [2, 3, 5])
def test_the_limit_is_the_number_of_engines_that_it_kills(deaths_max: int) -> None:
    queries = Queries(QueryLimits(deaths_max=deaths_max))
    for number in range(1, 100):
        queries.started(BAD, life(number), 5.0)
        if die(queries, BAD, life(number)) is not None:
            assert number == deaths_max
            return
    raise AssertionError("never stopped")


def test_it_is_stopped_wherever_in_its_output_it_kills() -> None:
    queries = Queries(LIMITS)
    # It dies at offset 40 each time; the last tokens before are lost now and then.
    stopped: Stopped | None = None
    for number, offset in enumerate((40, 39, 41), start=1):
        queries.started(BAD, life(number), 5.0)
        stopped = die(queries, BAD, life(number), offset)
    assert stopped is not None


def test_whoever_gets_further_between_two_deaths_is_not_to_blame() -> None:
    queries = Queries(LIMITS)
    for number in range(1, 20):
        queries.started(GOOD, life(number), 5.0)
        assert die(queries, GOOD, life(number), offset=10 * number) is None
        assert not queries.is_suspect(GOOD)


def test_one_death_is_counted_once_however_often_it_is_reported() -> None:
    queries = Queries(LIMITS)
    for _ in range(5):
        assert die(queries, BAD, life(1)) is None
    assert not queries.is_suspect(BAD)
    assert die(queries, BAD, life(1, engine_incarnation=2)) is None  # Another engine there.
    assert queries.is_suspect(BAD)


@pytest.mark.parametrize("kind", [FailureKind.HANG, FailureKind.PARTITION, FailureKind.DRAIN])
def test_what_happens_to_links_is_held_against_nobody(kind: FailureKind) -> None:
    queries = Queries(LIMITS)
    for number in range(10):
        assert queries.died(GOOD, life(number), kind, 0, 0.0) is None
    assert queries.is_quiet


def test_engine_errors_need_no_trial() -> None:
    queries = Queries(LIMITS)
    assert queries.died(BAD, life(1), ENGINE_ERROR, 0, 0.0) is None
    assert queries.died(BAD, life(2), ENGINE_ERROR, 0, 0.0) is None
    assert queries.died(BAD, life(3), ENGINE_ERROR, 0, 0.0) is not None


def test_one_engine_that_fails_at_everything_proves_nothing_against_a_request() -> None:
    queries = Queries(LIMITS)
    for _ in range(10):
        assert queries.died(GOOD, life(1), ENGINE_ERROR, 0, 0.0) is None


def test_engines_that_failed_and_engines_that_died_are_not_counted_together() -> None:
    queries = Queries(LIMITS)
    for number, kind in enumerate((ENGINE_ERROR, CRASH, ENGINE_ERROR, CRASH, ENGINE_ERROR)):
        queries.started(GOOD, life(number), 5.0)
        assert queries.died(GOOD, life(number), kind, 0, 0.0) is None
    assert queries.is_suspect(GOOD)


def test_of_several_attempts_under_one_death_the_furthest_counts() -> None:
    # The same query twice, one of them at the offset that kills.
    queries = Queries(LIMITS)
    assert die(queries, BAD, life(1), offset=6) is None
    assert die(queries, BAD, life(1), offset=20) is None
    assert not queries.got_to(BAD, 20)
    assert queries.is_on_file(BAD)


# Trials.


def suspects(*queries_: Fingerprint) -> Queries:
    queries = Queries(LIMITS)
    for number in (1, 2):
        for query in queries_:
            die(queries, query, life(number))
    return queries


def test_suspects_run_apart_from_each_other() -> None:
    queries = suspects(BAD, GOOD)
    queries.started(BAD, life(3), 5.0)
    assert not queries.may_start(GOOD, life(3), 0.0)
    assert queries.may_start(GOOD, life(4), 0.0)
    assert not queries.may_start(OTHER, life(3), 0.0)  # Nor does anybody else begin there.
    assert queries.may_start(OTHER, life(4), 0.0)
    assert queries.may_start(BAD, life(3), 0.0)  # Once more, for another choice.
    assert not queries.may_start(BAD, life(4), 0.0)


def test_no_suspect_runs_where_an_engine_has_just_died() -> None:
    # Its other attempts are told one by one, and the placement may not know of its death yet.
    queries = suspects(BAD, GOOD)
    queries.started(BAD, life(3), 5.0)
    assert die(queries, BAD, life(3)) is not None
    assert not queries.may_start(GOOD, life(3), 0.5)
    assert queries.may_start(GOOD, life(3, engine_incarnation=2), 0.5)
    assert queries.may_start(GOOD, life(3), 1.5)  # It stalled, and has recovered.


@pytest.mark.parametrize("how", ["got further", "ended well", "left"])
def test_the_next_is_tried_when_one_has_passed(how: str) -> None:
    queries = suspects(BAD, GOOD)
    queries.started(GOOD, life(3), 5.0)
    assert not queries.may_start(BAD, life(3), 5.0)
    match how:
        case "got further":
            assert not queries.got_to(GOOD, LIMITS.progress_tokens)
            assert queries.got_to(GOOD, LIMITS.progress_tokens + 1)
        case "ended well":
            assert queries.went_well(GOOD)
        case _:
            assert queries.left(GOOD, life(3))
    assert queries.may_start(BAD, life(3), 5.0)
    assert queries.is_suspect(GOOD) == (how == "left")
    queries.check()


def test_of_forty_streams_only_the_one_is_stopped_and_it_kills_three_engines() -> None:
    # Two workers: all streams move together, so all are under the first two deaths.
    random = Random(1)
    streams = [Fingerprint(bytes([number])) for number in range(40)]
    bad = streams[17]
    queries = Queries(LIMITS)
    num_deaths = 0
    for number in (1, 2):
        for query in streams:
            queries.started(query, life(number), 5.0)
        num_deaths += 1
        stopped = [die(queries, query, life(number)) for query in streams]
        assert stopped == [None] * 40
    waiting = list(streams)
    random.shuffle(waiting)
    finished: list[Fingerprint] = []
    engine = 3
    while waiting:
        query = waiting.pop(0)
        at = Life("w1", 1, engine)
        assert queries.may_start(query, at, 5.0)
        queries.started(query, at, 5.0)
        assert not any(queries.may_start(other, at, 5.0) for other in waiting)
        if query == bad:
            num_deaths += 1
            engine += 1
            assert die(queries, query, at) is not None
            # Those that had passed were there as well; one death is nothing.
            assert all(die(queries, other, at) is None for other in finished)
        else:
            assert queries.got_to(query, 3)
            finished.append(query)
    assert num_deaths == 3
    assert [query for query in streams if queries.stopped(query, 1.0)] == [bad]


def test_queries_that_kill_together_are_both_found() -> None:
    queries = suspects(BAD, OTHER, GOOD)
    queries.started(BAD, life(3), 5.0)
    queries.started(OTHER, life(4), 5.0)
    assert die(queries, BAD, life(3)) is not None
    assert die(queries, OTHER, life(4)) is not None
    queries.started(GOOD, life(5), 5.0)
    assert queries.got_to(GOOD, 3)
    assert queries.stopped(GOOD, 1.0) is None


# Memory.


def test_what_was_held_against_a_request_is_forgotten_in_time() -> None:
    queries = suspects(BAD)
    queries.started(BAD, life(3), 5.0)
    die(queries, BAD, life(3))
    assert queries.stopped(BAD, LIMITS.memory_s - 1) is not None
    assert queries.stopped(BAD, LIMITS.memory_s) is None
    assert queries.is_quiet


def test_no_more_files_are_kept_than_the_limit() -> None:
    queries = Queries(QueryLimits(files_max=10))
    for number in range(100):
        die(queries, Fingerprint(bytes([number])), life(1))
    assert not queries.is_on_file(Fingerprint(bytes([0])))
    assert queries.is_on_file(Fingerprint(bytes([99])))


def test_a_fingerprint_is_of_tenant_prompt_and_parameters_and_not_of_the_seed() -> None:
    sampling = SamplingParams(temperature=1.0, seed=1)
    original = Checkpoint((1, 2, 3), GenerationParams(sampling, StopConditions(max_tokens=5)))
    mine = fingerprint(b"key", "t", original)

    def with_params(**changes: object) -> Checkpoint:
        return replace(original, params=replace(original.params, **changes))  # pyright: ignore[reportArgumentType]

    assert mine == fingerprint(b"key", "t", with_params(sampling=replace(sampling, seed=2)))
    for other in (
        fingerprint(b"key", "u", original),
        fingerprint(b"key2", "t", original),
        fingerprint(b"key", "t", replace(original, prompt_token_ids=(1, 2, 4))),
        fingerprint(b"key", "t", with_params(stopping=StopConditions(max_tokens=6))),
        fingerprint(b"key", "t", with_params(sampling=replace(sampling, temperature=0.5))),
    ):
        assert other != mine
