"""What engines of other makes are asked by whoever only wants to know whether they live."""

import asyncio

import pytest
from smg_grpc_proto.generated import sglang_scheduler_pb2 as sglang_pb  # pyright: ignore[reportMissingTypeStubs]
from smg_grpc_proto.generated import trtllm_service_pb2 as trtllm_pb  # pyright: ignore[reportMissingTypeStubs]
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm_pb  # pyright: ignore[reportMissingTypeStubs]

from sidecar.canary_payload import MARK, checkpoint_of
from sidecar.canary_watch import ids_of
from sidecar.engines.adapter import Part
from sidecar.engines.calls import CallEngine
from sidecar.engines.kinds import adapter_of
from sidecar.engines.lives import Launch
from tests.engines.backend import Backend
from tests.engines.sglang_server import SglangServer
from tests.engines.subjects import FAST, QUICK, SERVERS, Tending, play, tending
from tests.engines.test_conformance import greedy
from tests.engines.trtllm_server import TrtllmServer
from tests.engines.vllm_server import VllmServer
from unbroken.tokenizer import Tokenizer, asset_to_proto
from unbroken.v1 import attempt_pb2
from worker import simulated_tokenizer

HALVES = [Part.PREFILL, Part.DECODE]


async def asked(protocol: str, part: Part) -> list[object]:
    """What an engine that does this part is asked: to begin, by a canary, and for a client."""
    backend = Backend()
    cranking = asyncio.create_task(backend.run())
    try:
        async with SERVERS[protocol](backend, 0) as served:
            launch = Launch(None, served.address, restart=FAST)
            engine = CallEngine(launch, adapter_of(protocol), pace=QUICK, part=part)
            async with tending(Tending(engine, backend)) as it:
                up = it.hub.up
                assert up is not None
                servicer = served.servicer
                assert isinstance(servicer, SglangServer | TrtllmServer | VllmServer)
                first = servicer.requests[-1]
                canary = attempt_pb2.StartAttempt(
                    stream=attempt_pb2.StreamKey(request_id=MARK, tenant=MARK),
                    epoch=1,
                    checkpoint=checkpoint_of(up.tokenizer),
                    is_probe=True,
                )
                attempt = it.hub.probe(canary)
                await it.until(lambda: attempt.ended is not None, "the canary has no answer")
                assert len(attempt.token_ids) == 1
                second = servicer.requests[-1]
                slot = it.start(greedy(3))
                await it.until(lambda: len(it.tokens.get(slot, ())) == 3, "no tokens")
                return [first, second, servicer.requests[-1]]
    finally:
        cranking.cancel()
        await asyncio.gather(cranking, return_exceptions=True)


@pytest.mark.parametrize("part", HALVES)
def test_half_an_sglang_is_asked_with_the_host_that_stands_for_no_other_half(part: Part) -> None:
    async def scenario() -> None:
        *probes, request = await asked("sglang", part)
        for probe in probes:
            assert isinstance(probe, sglang_pb.GenerateRequest)
            assert probe.disaggregated_params.bootstrap_host == "2.2.2.2"
            assert probe.disaggregated_params.bootstrap_room == 0
        assert isinstance(request, sglang_pb.GenerateRequest)
        assert not request.HasField("disaggregated_params")

    play(scenario())


@pytest.mark.parametrize("part", HALVES)
def test_half_a_trtllm_is_asked_to_compute_the_other_half_too(part: Part) -> None:
    async def scenario() -> None:
        *probes, request = await asked("trtllm", part)
        for probe in probes:
            assert isinstance(probe, trtllm_pb.GenerateRequest)
            assert probe.HasField("disaggregated_params")
            both = trtllm_pb.DisaggregatedParams.REQUEST_TYPE_CONTEXT_AND_GENERATION
            assert probe.disaggregated_params.request_type == both
        assert isinstance(request, trtllm_pb.GenerateRequest)
        assert not request.HasField("disaggregated_params")

    play(scenario())


@pytest.mark.parametrize("part", HALVES)
def test_half_a_vllm_is_asked_without_a_transfer_of_blocks(part: Part) -> None:
    async def scenario() -> None:
        for probe in (await asked("vllm", part))[:2]:
            assert isinstance(probe, vllm_pb.GenerateRequest)
            assert not probe.kv_transfer_params_json
            assert not probe.HasField("kv_transfer_params")

    play(scenario())


@pytest.mark.parametrize("protocol", ["sglang", "trtllm"])
def test_a_whole_engine_is_asked_as_it_is_for_clients(protocol: str) -> None:
    async def scenario() -> None:
        for one in await asked(protocol, Part.WHOLE):
            assert isinstance(one, sglang_pb.GenerateRequest | trtllm_pb.GenerateRequest)
            assert not one.HasField("disaggregated_params")

    play(scenario())


def test_a_text_is_asked_as_its_tokenizer_encodes_it() -> None:
    asset = simulated_tokenizer.asset()
    ids = ids_of("batoki remu", asset_to_proto(asset))
    assert list(ids) == Tokenizer(asset).encode("batoki remu", add_special=True)
    with pytest.raises(ValueError, match="expected a text with tokens"):
        ids_of("", asset_to_proto(asset))
