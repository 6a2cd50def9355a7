"""Who may call AdminService."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from frontend.operators import OPERATORS_MAX, Operators
from frontend.secret_file import LOOK_INTERVAL_S
from tests.frontend.fakes import FakeSidecar, reference
from tests.frontend.worlds import World, read, run, world
from unbroken.client import Client
from unbroken.errors import Reason, UnbrokenError
from unbroken.status import from_rpc_error
from unbroken.transport import admin_metadata
from unbroken.v1 import admin_service_pb2 as pb
from unbroken.v1 import worker_pb2
from unbroken.v1.admin_service_pb2_grpc import AdminServiceStub

TOKEN = "v0Wm3yqk5XQmV2v1W1cJtA"
OTHER = "Zs1kXn0qT4Wc7m9b2VfLrg"
PROMPT = list(b"once upon a time")
CALLS = ("ListWorkers", "GetThresholds", "SetThresholds", "GetLedger", "DrainFrontend")


def tokens(directory: Path, text: str = f"# who\n\nalice {TOKEN}\n") -> Path:
    path = directory / "tokens"
    path.write_text(text)
    path.chmod(0o600)
    return path


async def ask(it: World, method: str, metadata: Any) -> object:
    """Call it, as somebody who brings this."""
    channel = await it.client.channel()
    call = getattr(AdminServiceStub(channel), method)
    answer: Any = call(getattr(pb, f"{method}Request")(), metadata=metadata, timeout=5)
    if method == "DrainFrontend":
        return await anext(cast("AsyncIterator[object]", aiter(answer)))
    return await cast("Awaitable[object]", answer)


@pytest.mark.usefixtures("each_edge")
def test_every_call_of_every_method_needs_the_token_of_an_operator(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), admin_tokens=tokens(tmp_path)) as it:
            methods = pb.DESCRIPTOR.services_by_name["AdminService"].methods_by_name
            assert set(CALLS) == set(methods), "those that are tried here are all"
            for method in CALLS:
                for metadata in ((), admin_metadata(OTHER), (("authorization", TOKEN),)):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await ask(it, method, metadata)
                    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
                    error = from_rpc_error(caught.value)
                    assert error.reason is Reason.NOT_PERMITTED
                    assert TOKEN not in error.detail
            assert not it.frontend.is_draining
            stream = it.client.generate(token_ids=PROMPT, max_tokens=3, temperature=0)
            assert (await read(stream))[0] == reference(PROMPT, 3), "clients need none"
            for method in CALLS:
                assert await ask(it, method, admin_metadata(TOKEN)) is not None

    run(scenario())


@pytest.mark.usefixtures("each_edge")
def test_the_client_library_brings_the_token_that_it_was_given(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with (
            world(FakeSidecar("w1"), admin_tokens=tokens(tmp_path)) as it,
            Client(it.frontend.address, admin_token=TOKEN) as client,
        ):
            asked: list[Callable[[Client], Awaitable[object]]] = [
                lambda one: one.list_workers(),
                lambda one: one.get_thresholds(),
                lambda one: one.set_thresholds(worker_pb2.BusyThresholds(prefill_tokens=100)),
                lambda one: one.ledger(),
            ]
            for ask_it in asked:
                await ask_it(client)
                with pytest.raises(UnbrokenError) as caught:
                    await ask_it(it.client)
                assert caught.value.reason is Reason.NOT_PERMITTED

    run(scenario())


def test_tokens_are_withdrawn_without_a_restart(tmp_path: Path) -> None:
    now = [0.0]
    path = tokens(tmp_path)
    operators = Operators(path, clock=lambda: now[0])
    assert operators.check(f"Bearer {TOKEN}") == "alice"
    tokens(tmp_path, f"bob {OTHER}\n")
    now[0] += LOOK_INTERVAL_S
    with pytest.raises(UnbrokenError):
        operators.check(f"Bearer {TOKEN}")
    assert operators.check(f"Bearer {OTHER}") == "bob"
    path.write_text("")
    now[0] += LOOK_INTERVAL_S
    assert operators.check(f"Bearer {OTHER}") == "bob", "a file that is broken changes nothing"


@pytest.mark.parametrize("given", [None, "", "Bearer ", f"bearer {TOKEN}", TOKEN, b"Bearer x"])
def test_what_is_no_token_is_none(tmp_path: Path, given: str | bytes | None) -> None:
    with pytest.raises(UnbrokenError) as caught:
        Operators(tokens(tmp_path)).check(given)
    assert caught.value.reason is Reason.NOT_PERMITTED


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nobody\n",
        "alice short\n",
        f"{TOKEN}\n",
        f"alice {TOKEN} more\n",
        "".join(f"n{n} {TOKEN}{n}\n" for n in range(OPERATORS_MAX + 1)),
    ],
)
def test_a_file_without_proper_tokens_is_refused_without_showing_them(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        Operators(tokens(tmp_path, text))
    assert TOKEN not in str(caught.value)
