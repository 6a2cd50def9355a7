"""The gateway over real gRPC, with sidecars that behave or misbehave on cue."""

from tests.frontend.fakes import FakeSidecar, reference
from tests.frontend.worlds import read, read_some, run, world

PROMPT = list(b"once upon a time")


def test_a_stream_is_what_its_worker_said() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=50, temperature=0)
            ids, text = await read(stream)
            assert ids == reference(PROMPT, 50)
            assert text == bytes(ids).decode()
            assert stream.finished is not None
            assert stream.finished.usage.prompt_tokens == len(PROMPT)
            assert stream.finished.usage.completion_tokens == 50

    run(scenario())


def test_a_stream_survives_several_deaths_exactly() -> None:
    async def scenario() -> None:
        async with world(*(FakeSidecar(f"w{n}") for n in range(4))) as it:
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=400, seed=7, request_id="r", migrations_max=5
            )
            ids: list[int] = []
            for _ in range(3):
                ids += [i for piece in await read_some(stream, 20) for i in piece.token_ids]
                await it.sidecar_of("r").die()
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 400, seed=7)
            assert stream.finished is not None
            assert len(stream.finished.attempts) == 4

    run(scenario())
