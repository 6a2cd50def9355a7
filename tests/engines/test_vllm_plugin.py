"""vLLM's plug-in for native continuation: what it accepts, and how a sidecar learns of it.

Whether vLLM really goes on so is for `make engines` to show.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from random import Random
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


class Generator:
    """As PyTorch's, of a CPU: it has no offset."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = SimpleNamespace(type=device)
        self._seed, self._random = 0, Random(0)

    def manual_seed(self, seed: int) -> None:
        self._seed, self._random = seed, Random(seed)

    def initial_seed(self) -> int:
        return self._seed

    def get_offset(self) -> int:
        raise RuntimeError("CPU Generator does not use offset")

    def set_offset(self, offset: int) -> None:
        raise RuntimeError(f"CPU Generator does not use offset {offset}")

    def draw(self, low: int = 0, high: int = 2**31) -> int:
        return self._random.randrange(low, high)


class State:
    """What a worker keeps of a request."""

    def __init__(self, params: object, generator: Generator) -> None:
        self.sampling_params, self.generator = params, generator
        self.prompt_token_ids, self.output_token_ids = [1, 2, 3, 4, 5], list[int]()
        self.__post_init__()

    def __post_init__(self) -> None:
        pass


class Params(SimpleNamespace):
    def clone(self) -> "Params":
        return Params(**vars(self))


def pretend(monkeypatch: pytest.MonkeyPatch, *, without: str = "") -> dict[str, Any]:
    """A vLLM in which there is nothing but what is changed, and that without something."""

    def same(self: Any, *given: Any) -> Any:
        del self
        return given

    def randint(low: int, high: int, size: Any, *, generator: Generator, dtype: Any) -> int:
        del size, dtype
        return generator.draw(low, high)

    platform = SimpleNamespace(is_cpu=lambda: True)
    owners = {
        "InputProcessor": type("InputProcessor", (), {"process_inputs": same}),
        "Request": type("Request", (), {"from_engine_core_request": classmethod(same)}),
        "NewRequestData": type("NewRequestData", (), {"from_request": classmethod(same)}),
        "StructuredOutputManager": type("StructuredOutputManager", (), {"_create_grammar": same}),
        "CachedRequestState": type(
            "CachedRequestState", (State,), {"__post_init__": State.__post_init__}
        ),
    }
    contents: dict[str, dict[str, object]] = {
        "vllm": {"__version__": "0.32.0"},
        "vllm.platforms": {"current_platform": platform},
        "vllm.v1.engine.input_processor": {"InputProcessor": owners["InputProcessor"]},
        "vllm.v1.request": {"Request": owners["Request"]},
        "vllm.v1.core.sched.output": {"NewRequestData": owners["NewRequestData"]},
        "vllm.v1.structured_output": {"StructuredOutputManager": owners["StructuredOutputManager"]},
        "vllm.v1.worker.gpu_input_batch": {"CachedRequestState": owners["CachedRequestState"]},
        "torch": {"Generator": Generator, "randint": randint, "long": int},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        for attribute, value in content.items():
            if attribute != without:
                setattr(module, attribute, value)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(continuation.KEY_VARIABLE, "k")
    return owners


@pytest.mark.parametrize("missing", ["Generator", "CachedRequestState", "StructuredOutputManager"])
def test_where_something_is_not_found_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    owners = pretend(monkeypatch, without=missing)
    before = owners["InputProcessor"].process_inputs
    continuation.register()
    assert owners["InputProcessor"].process_inputs is before


def test_registering_twice_changes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = pretend(monkeypatch)
    before = owners["InputProcessor"].process_inputs
    continuation.register()
    changed = owners["InputProcessor"].process_inputs
    assert changed is not before
    continuation.register()
    assert owners["InputProcessor"].process_inputs is changed


@pytest.mark.parametrize("num_output", [0, 2])
def test_what_was_drawn_for_a_part_of_a_prompt_is_drawn_again(
    monkeypatch: pytest.MonkeyPatch, num_output: int
) -> None:
    state_of = pretend(monkeypatch)["CachedRequestState"]
    continuation.register()
    reference = Generator()
    reference.manual_seed(7)
    draws = [reference.draw() for _ in range(6)]
    params = said(key="k", num_output=num_output) if num_output else Params(extra_args=None)
    continuation.take_note(params, 5, "k")
    given = Generator()
    given.manual_seed(7)
    state = state_of(params, given)
    assert len(state.output_token_ids) == num_output
    for expected in draws[num_output:]:
        for _ in range(2):  # As vLLM does for each part of a prompt but the last.
            assert state.generator.draw() == expected
            state.generator.set_offset(state.generator.get_offset() - 4)
        assert state.generator.draw() == expected
        state.output_token_ids.append(9)


def test_a_generator_that_has_an_offset_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    state_of = pretend(monkeypatch)["CachedRequestState"]
    continuation.register()
    given = Generator("cuda")
    assert state_of(Params(extra_args=None), given).generator is given


def config(**different: object) -> SimpleNamespace:
    """Of an engine that can continue, but for what is different."""
    return SimpleNamespace(**{
        "use_v2_model_runner": False,
        "speculative_config": None,
        "kv_transfer_config": None,
        "structured_outputs_config": SimpleNamespace(reasoning_parser=""),
        **different,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("different", "why"),
    [
        ({}, ""),
        ({"use_v2_model_runner": True}, "V2"),
        ({"speculative_config": object()}, "speculative"),
        ({"kv_transfer_config": object()}, "connector"),
        ({"structured_outputs_config": SimpleNamespace(reasoning_parser="r1")}, "reasoning"),
    ],
)
def test_an_engine_that_cannot_continue_refuses_to(
    monkeypatch: pytest.MonkeyPatch, different: dict[str, object], why: str
) -> None:
    processor = pretend(monkeypatch)["InputProcessor"]()
    continuation.register()
    processor.vllm_config = config(**different)
    transfer = {"kv_transfer_params": {continuation.FIELD: {"key": "k", "num_output": 2}}}
    params = Params(extra_args=transfer, seed=1, temperature=1.0)
    prompt = {"prompt_token_ids": [1, 2, 3]}
    if why:
        with pytest.raises(ValueError, match=why):
            processor.process_inputs("r", prompt, params)
    else:
        _, _, passed = processor.process_inputs("r", prompt, params)
        assert continuation.num_output_of(passed) == 2


@asynccontextmanager
async def beside(
    monkeypatch: pytest.MonkeyPatch, key: str, *, plugin_key: str, fails: bool = False
) -> AsyncGenerator[Talk, None]:
    """A sidecar with one key, and an engine whose plug-in has one, if it is one."""
    monkeypatch.setenv(continuation_key.VARIABLE, key)
    backend = Backend(native_resume=True)
    cranking = asyncio.create_task(backend.run())
    try:
        async with SERVERS["vllm"](backend, 0) as served:
            assert isinstance(served.servicer, VllmServer)
            served.servicer.plugin_key = plugin_key
            served.servicer.fails_to_continue = fails
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


def test_an_engine_that_fails_to_continue_serves_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        async with beside(monkeypatch, "k", plugin_key="k", fails=True) as it:
            assert it.hub.up is not None
            assert not it.hub.up.description.capabilities.native_resume
            params = FEATURES["greedy"]
            slot = it.start(params)
            await it.ended(slot)
            assert it.tokens[slot] == it.expected(params).token_ids

    play(scenario())


def test_output_that_leaves_nothing_to_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with beside(monkeypatch, "k", plugin_key="k") as it:
            params = FEATURES["greedy"]
            slot = it.start(params, output=[5] * 12, first_offset=12)
            assert (await it.refused(slot)).kind == worker_pb2.FAILURE_KIND_REJECTED

    play(scenario())
