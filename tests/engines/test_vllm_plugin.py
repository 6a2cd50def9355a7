"""vLLM's plug-in for native continuation: what it accepts, and how a sidecar learns of it.

Whether vLLM really goes on so is for `make engines` to show.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sidecar.engines import continuation_key
from sidecar.engines.calls import CallEngine
from sidecar.engines.kinds import adapter_of
from sidecar.engines.lives import Launch
from tests.engines.backend import Backend
from tests.engines.subjects import FAST, QUICK, SERVERS, Talk, Tending, play, tending
from tests.engines.test_conformance import FEATURES
from tests.engines.vllm_server import VllmServer
from unbroken.v1 import worker_pb2
from worker.vllm_plugin import continuation


def said(**field: object) -> Any:
    """Parameters as vLLM's servicer makes them."""
    return SimpleNamespace(extra_args={"kv_transfer_params": {continuation.FIELD: field}})


def test_what_the_sidecar_says_becomes_a_note_that_no_client_can_write() -> None:
    params = said(key="k", num_output=3)
    assert continuation.take_note(params, 5, "k") == 3
    assert continuation.num_output_of(params) == 3
    assert "k" not in str(params.extra_args.values()), "a key is not passed on"

    forged = SimpleNamespace(extra_args=dict(params.extra_args))
    assert continuation.take_note(forged, 5, "k") == 0
    assert continuation.num_output_of(forged) == 0


def test_what_others_say_to_a_connector_stays() -> None:
    params = SimpleNamespace(extra_args={"kv_transfer_params": {"remote": 1}, "more": 2})
    assert continuation.take_note(params, 5, "k") == 0
    assert params.extra_args == {"kv_transfer_params": {"remote": 1}, "more": 2}


@pytest.mark.parametrize(
    "field",
    [
        {"num_output": 3},
        {"key": "wrong", "num_output": 3},
        {"key": 5, "num_output": 3},
        {"key": "k", "num_output": 0},
        {"key": "k", "num_output": 5},
        {"key": "k", "num_output": True},
        {"key": "k", "num_output": "3"},
    ],
)
def test_whoever_may_not_or_says_nonsense_is_refused(field: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=continuation.FIELD):
        continuation.take_note(said(**field), 5, "k")


@pytest.mark.parametrize(("version", "key"), [("0.33.0", "k"), ("0.32.0", "")])
def test_an_unknown_version_is_left_as_it_is_and_so_is_one_without_a_key(
    monkeypatch: pytest.MonkeyPatch, version: str, key: str
) -> None:
    vllm = ModuleType("vllm")
    monkeypatch.setattr(vllm, "__version__", version, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setenv(continuation.KEY_VARIABLE, key)
    continuation.register()  # Changing anything would fail: there is nothing of vLLM here.


@asynccontextmanager
async def beside(
    monkeypatch: pytest.MonkeyPatch, key: str, *, plugin_key: str
) -> AsyncGenerator[Talk, None]:
    """A sidecar with one key, and an engine whose plug-in has one, if it is one."""
    monkeypatch.setenv(continuation_key.VARIABLE, key)
    backend = Backend(native_resume=True)
    cranking = asyncio.create_task(backend.run())
    try:
        async with SERVERS["vllm"](backend, 0) as served:
            assert isinstance(served.servicer, VllmServer)
            served.servicer.plugin_key = plugin_key
            launch = Launch(None, served.address, restart=FAST)
            engine = CallEngine(launch, adapter_of("vllm"), pace=QUICK)
            async with tending(Tending(engine, backend)) as it:
                yield it
    finally:
        cranking.cancel()
        await asyncio.gather(cranking, return_exceptions=True)


@pytest.mark.parametrize("feature", FEATURES)
def test_with_the_plug_in_a_stream_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, feature: str
) -> None:
    async def scenario() -> None:
        async with beside(monkeypatch, "k", plugin_key="k") as it:
            assert it.hub.up is not None
            assert it.hub.up.description.capabilities.native_resume
            params = FEATURES[feature]
            expected = it.expected(params).token_ids
            slot = it.start(params, output=expected[:5], first_offset=5)
            ended = await it.ended(slot)
            assert it.tokens[slot] == expected[5:]
            assert ended.end_offset == len(expected)
            assert ended.prefill_tokens + ended.cached_tokens == 3 + 5

    play(scenario())


@pytest.mark.parametrize(("key", "plugin_key"), [("k", ""), ("k", "other"), ("", "k")])
def test_an_engine_that_does_not_go_on_is_not_taken_for_one_that_does(
    monkeypatch: pytest.MonkeyPatch, key: str, plugin_key: str
) -> None:
    async def scenario() -> None:
        async with beside(monkeypatch, key, plugin_key=plugin_key) as it:
            assert it.hub.up is not None
            assert not it.hub.up.description.capabilities.native_resume
            slot = it.start(FEATURES["greedy"], output=(4, 5), first_offset=2)
            assert (await it.refused(slot)).kind == worker_pb2.FAILURE_KIND_REJECTED

    play(scenario())


def test_output_that_leaves_nothing_to_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with beside(monkeypatch, "k", plugin_key="k") as it:
            params = FEATURES["greedy"]
            slot = it.start(params, output=[5] * 12, first_offset=12)
            assert (await it.refused(slot)).kind == worker_pb2.FAILURE_KIND_REJECTED

    play(scenario())
