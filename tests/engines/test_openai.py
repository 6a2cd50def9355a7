"""OpenAI's HTTP where servers differ: ids beside log probabilities, and none at all."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import tokenizers
from aiohttp import web

from sidecar.engines.adapter import Call, CallFailed, Unhealthy, Unusable
from sidecar.engines.asking import Vouched
from sidecar.engines.calls import CallEngine
from sidecar.engines.kinds import adapter_of
from sidecar.engines.lives import Launch
from sidecar.engines.openai import OpenAiAdapter
from tests.engines import openai_server
from tests.engines.backend import Backend
from tests.engines.openai_server import Flavour, OpenAiServer
from tests.engines.subjects import FAST, QUICK, Talk, Tending, play, tending
from tests.engines.test_conformance import LENGTH, STOP, greedy
from unbroken.generation import Constraint, GenerationParams, SamplingParams, StopConditions
from unbroken.outcome import FailureKind
from unbroken.tokenizer import Tokenizer
from unbroken.v1 import worker_pb2


@asynccontextmanager
async def beside(
    flavour: Flavour,
    *,
    num_ranks: int = 1,
    first_engine: int = 0,
    num_nonsense: int = 0,
    step_s: float = 0.001,
) -> AsyncGenerator[tuple[Talk, OpenAiServer], None]:
    backend = Backend(step_s=step_s)
    cranking = asyncio.create_task(backend.run())
    try:
        async with openai_server.serving(backend, 0, flavour) as (address, server):
            server.num_ranks, server.first_engine = num_ranks, first_engine
            server.num_nonsense = num_nonsense
            launch = Launch(None, address, restart=FAST)
            engine = CallEngine(
                launch,
                adapter_of("openai", server.directory),
                vouched=Vouched(is_invariant=True, context_length=512),
                pace=QUICK,
            )
            async with tending(Tending(engine, backend)) as it:
                yield it, server
    finally:
        cranking.cancel()
        await asyncio.gather(cranking, return_exceptions=True)


def plain(max_tokens: int = 12, **stopping: object) -> GenerationParams:
    """What any server understands."""
    return replace(greedy(max_tokens, **stopping), stopping=StopConditions(max_tokens=max_tokens))


def test_ids_beside_log_probabilities_are_as_true() -> None:
    async def scenario() -> None:
        async with beside("llama") as (it, server):
            slot = it.start(greedy())
            assert (await it.ended(slot)).finish_reason == LENGTH
            assert it.tokens[slot] == it.expected(greedy()).token_ids
            assert it.hub.up is not None
            assert it.hub.up.description.kind == "llama-server"
            assert it.hub.up.description.numerics.batch_invariant
            assert server.bodies[-1]["prompt"] == [1, 2, 3]

    play(scenario())


def test_a_stream_whose_last_line_has_no_end_is_read_to_its_end() -> None:
    async def scenario() -> None:
        async with beside("llama") as (it, server):
            server.leaves_lines_open = True
            slot = it.start(greedy())
            assert (await it.ended(slot)).finish_reason == LENGTH
            assert it.tokens[slot] == it.expected(greedy()).token_ids

    play(scenario())


@pytest.mark.parametrize("first_engine", [0, 4])
def test_every_rank_of_a_server_counts_and_can_be_asked(first_engine: int) -> None:
    """By its place among the server's own, whatever its metrics call it."""

    async def scenario() -> None:
        async with beside("vllm", num_ranks=2, first_engine=first_engine, step_s=0.005) as (
            it,
            server,
        ):
            assert it.hub.up is not None
            assert it.hub.up.description.num_ranks == 2
            slot = it.start(greedy(480), rank=1)
            await it.until(
                lambda: (
                    it.hub.load is not None
                    and [one.requests_running for one in it.hub.load.ranks] == [1, 1]
                    and all(one.kv_blocks_total == 64 for one in it.hub.load.ranks)
                ),
                "a rank was left out",
            )
            assert server.ranks_asked[-1] == "1"
            it.abort(slot)
            await it.ended(slot)

    play(scenario())


def test_an_engine_that_says_nonsense_of_itself_is_asked_again_and_its_life_goes_on() -> None:
    async def scenario() -> None:
        async with beside("vllm", num_nonsense=2) as (it, server):
            assert server.num_looks > 2
            assert it.hub.up is not None
            assert it.hub.up.incarnation == 1
            assert it.hub.up.description.context_length == server.backend.spec.context_length

    play(scenario())


def large_tokenizer() -> bytes:
    """One whose parsing takes much longer than anything else that is done with it."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(three) for three in product(letters, repeat=3)]
    two = ["".join(both) for both in product(letters, repeat=2)]
    vocab = {word: index for index, word in enumerate([*letters, *two, *words])}
    merges = [[word[:-1], word[-1]] for word in [*two, *words]]
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model}).encode()


def test_the_sidecar_goes_on_while_a_large_tokenizer_is_read(tmp_path: Path) -> None:
    data = large_tokenizer()
    (tmp_path / "tokenizer.json").write_bytes(data)
    began = time.process_time()
    tokenizers.Tokenizer.from_buffer(data)
    takes_s = time.process_time() - began

    async def scenario() -> None:
        backend = Backend()
        cranking = asyncio.create_task(backend.run())
        async with openai_server.serving(backend, 0, "vllm") as (address, _):
            adapter = OpenAiAdapter(address, tmp_path)
            discovering = asyncio.create_task(adapter.discover())
            longest_s, last = 0.0, time.process_time()
            while not discovering.done():  # CPU of this process counts, no matter who else runs.
                await asyncio.sleep(0)
                now = time.process_time()
                longest_s, last = max(longest_s, now - last), now
            found = await discovering
            await adapter.close()
            cranking.cancel()
            await asyncio.gather(cranking, return_exceptions=True)
            assert found.tokenizer.vocab_size > 18_000
            assert longest_s < takes_s / 2, f"nothing else ran for {longest_s:.3f} s"

    play(scenario())


def test_a_stop_token_is_seen_here_where_the_server_knows_none() -> None:
    async def scenario() -> None:
        async with beside("llama") as (it, server):
            tokens = it.expected(greedy()).token_ids
            slot = it.start(greedy(200, stop_token_ids=frozenset({tokens[5]})))
            ended = await it.ended(slot)
            assert (ended.finish_reason, ended.stop_token_id) == (STOP, tokens[5])
            assert it.tokens[slot] == tokens[: tokens.index(tokens[5]) + 1]
            assert "stop_token_ids" not in server.bodies[-1]
            await it.until(lambda: not server.backend.requests, "it goes on for nobody")

    play(scenario())


def test_a_server_of_text_is_read_as_text_and_never_taken_for_exact() -> None:
    async def scenario() -> None:
        async with beside("text") as (it, server):
            assert it.hub.up is not None
            assert not it.hub.up.description.numerics.batch_invariant, "whatever is vouched for"
            tokenizer = Tokenizer(server.backend.spec.tokenizer)
            prompt = tokenizer.encode("batoki remu", add_special=False)
            slot = it.start(plain(), prompt)
            assert (await it.ended(slot)).finish_reason == LENGTH
            said = it.expected(plain(), prompt).token_ids
            pieces = tokenizer.pieces
            spelled = b"".join(pieces[one] for one in it.tokens[slot])
            assert spelled == b"".join(pieces[one] for one in said)
            assert server.bodies[-1]["prompt"] == "batoki remu"

    play(scenario())


@pytest.mark.parametrize(
    ("flavour", "params"),
    [
        ("text", greedy()),
        ("text", replace(plain(), sampling=SamplingParams(0.5, seed=1, top_k=5))),
        ("llama", replace(greedy(), sampling=SamplingParams(0.0, presence_penalty=1.0))),
        ("llama", greedy(min_tokens=3)),
        ("llama", replace(greedy(), constraint=Constraint("json_schema", '{"enum": ["a"]}'))),
    ],
)
def test_what_a_server_would_leave_out_is_refused(
    flavour: Flavour, params: GenerationParams
) -> None:
    async def scenario() -> None:
        async with beside(flavour) as (it, _):
            refused = await it.refused(it.start(params))
            assert refused.kind == worker_pb2.FAILURE_KIND_REJECTED
            assert "has no" in refused.detail

    play(scenario())


CRASH, DRAIN = worker_pb2.FAILURE_KIND_CRASH, worker_pb2.FAILURE_KIND_DRAIN


def hangs(backend: Backend) -> None:
    backend.hang()


def aborts(backend: Backend) -> None:
    for name in backend.asked:
        backend.abort(name)


def fails(backend: Backend) -> None:
    backend.die()


@pytest.mark.parametrize("outcome", [hangs, aborts, fails])
def test_whatever_becomes_of_a_stream_when_vllm_is_told_to_stop_it_moves(
    outcome: Callable[[Backend], None],
) -> None:
    """No byte more, a last chunk with "abort" as of any stream, or an error: all were seen."""

    async def scenario() -> None:
        async with beside("vllm") as (it, server):
            slots = [it.start(greedy(480)) for _ in range(3)]
            await it.until(lambda: all(len(it.tokens.get(slot, ())) > 3 for slot in slots))
            await server.stop(0.0)
            outcome(server.backend)
            for slot in slots:
                ended = await it.ended(slot)
                # A token that was on its way may make it look like one that stops in peace.
                assert ended.failure in (CRASH, DRAIN), ended
                assert ended.end_offset == len(it.tokens[slot])
            await it.state(worker_pb2.ENGINE_STATE_DEAD, 1)

    play(scenario())


@asynccontextmanager
async def answering(answer: web.Response) -> AsyncGenerator[OpenAiAdapter, None]:
    """A server that says the same to everything, and an adapter that asks it."""

    async def handle(request: web.Request) -> web.Response:
        del request
        return web.Response(status=answer.status, body=answer.body, headers=answer.headers)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port, *_ = runner.addresses[0]
    adapter = OpenAiAdapter(f"{host}:{port}", Path("nowhere"))
    try:
        yield adapter
    finally:
        await adapter.close()
        await runner.cleanup()


async def failing(adapter: OpenAiAdapter) -> CallFailed:
    with pytest.raises(CallFailed) as failed:
        async for _ in adapter.generate(Call("r", (1,), plain(), 5)):
            pass
    return failed.value


@pytest.mark.parametrize(
    ("status", "failure"),
    [
        (400, FailureKind.REJECTED),
        (422, FailureKind.REJECTED),
        (429, FailureKind.OVERLOAD),
        (500, FailureKind.ENGINE_ERROR),
        (503, FailureKind.CRASH),
    ],
)
def test_every_status_has_a_meaning(status: int, failure: FailureKind) -> None:
    async def scenario() -> None:
        answer = web.Response(status=status, text="why", headers={"Retry-After": "7"})
        async with answering(answer) as adapter:
            failed = await failing(adapter)
            assert failed.failure is failure
            assert failed.retry_after_s == 7.0
            with pytest.raises(Unhealthy):
                await adapter.check_health()

    play(scenario())


@pytest.mark.parametrize(
    ("body", "failure"),
    [
        ('data: {"error": {"message": "dead", "code": 500}}\n\ndata: [DONE]\n', "ENGINE_ERROR"),
        ("data: {nonsense\n\n", "PROTOCOL"),
        ("data: " + "x" * 5_000_000, "PROTOCOL"),
    ],
)
def test_a_stream_that_goes_wrong_is_a_failure_of_its_kind(body: str, failure: str) -> None:
    async def scenario() -> None:
        async with answering(web.Response(text=body)) as adapter:
            assert (await failing(adapter)).failure is FailureKind[failure]

    play(scenario())


def test_what_is_no_such_server_cannot_be_used() -> None:
    async def scenario() -> None:
        async with answering(web.Response(status=404)) as adapter:
            with pytest.raises(Unusable, match="no /v1/models"):
                await adapter.discover()

    play(scenario())
