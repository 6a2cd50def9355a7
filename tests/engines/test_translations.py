"""What engines say, in our words: tokenizers, KV blocks, load, log probabilities, descriptions."""

import hashlib
import io
import json
import zipfile
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from smg_grpc_proto.generated import common_pb2  # pyright: ignore[reportMissingTypeStubs]
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm_pb  # pyright: ignore[reportMissingTypeStubs]

from sidecar.engines import openai_words, smg, tokenizer_files, vllm, vllm_metrics
from sidecar.engines.adapter import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    Call,
    CallFailed,
    Discovered,
    LoadOfRank,
)
from sidecar.engines.asking import Vouched, call_of, describe
from sidecar.engines.kv_blocks import KvBlocks
from sidecar.engines.occupancy import Asked, accounted, load_report
from sidecar.engines.tokenizer_files import BadTokenizer, asset_of, unpack
from tests.engines.vllm_server import zipped
from unbroken import blocks
from unbroken.errors import InvalidField
from unbroken.generation import GenerationParams, SamplingParams, StopConditions
from unbroken.outcome import FailureKind
from unbroken.tokenizer import Tokenizer
from unbroken.v1 import attempt_pb2, worker_pb2
from worker import simulated_tokenizer

FOUND = Discovered(
    kind="vllm",
    version="0.32.0",
    model="tiny",
    context_length=100,
    tokenizer=simulated_tokenizer.asset(),
    capabilities=worker_pb2.EngineCapabilities(),
    block_size=4,
    kv_blocks=50,
    batch_size_max=2,
    facts={"dtype": "float32"},
)


# Tokenizers.


def test_a_packed_tokenizer_encodes_as_the_engine_does() -> None:
    asset = simulated_tokenizer.asset()
    packed = zipped(asset)
    found = asset_of(unpack(packed, hashlib.sha256(packed).hexdigest()))
    assert found.eos_token_ids == asset.eos_token_ids
    assert found.eos_token_id == asset.eos_token_id
    assert found.chat_template == asset.chat_template
    assert found.vocab_size == asset.vocab_size
    assert found.bos_token_id is None, "it is not put before a text"
    text = "batoki remu, sodali."
    assert Tokenizer(found).encode(text, add_special=False) == Tokenizer(asset).encode(
        text, add_special=False
    )


def test_an_archive_that_is_not_what_it_says_is_refused() -> None:
    packed = zipped(simulated_tokenizer.asset())
    with pytest.raises(BadTokenizer, match="SHA-256"):
        unpack(packed, "0" * 64)
    with pytest.raises(BadTokenizer, match="zip"):
        unpack(packed[: len(packed) // 2], "")
    with pytest.raises(BadTokenizer, match=r"tokenizer\.json"):
        asset_of({"tokenizer.model": b""})
    with pytest.raises(BadTokenizer, match=r"tokenizer\.json"):
        asset_of({"tokenizer.json": b"{}"})
    with pytest.raises(BadTokenizer, match=r"config\.json"):
        asset_of({**unpack(packed, ""), "config.json": b"["})


def test_an_archive_does_not_grow_without_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "FILE_BYTES_MAX", 1000)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokenizer.json", b"0" * 1_000_000)
    with pytest.raises(BadTokenizer, match="at most 1000 bytes"):
        unpack(file.getvalue(), "")


def test_of_several_chat_templates_the_default_one_is_meant() -> None:
    files = dict(unpack(zipped(simulated_tokenizer.asset()), ""))
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    files["tokenizer_config.json"] = json.dumps({"chat_template": named}).encode()
    assert asset_of(files).chat_template == "D"
    files["chat_template.jinja"] = b"J"
    assert asset_of(files).chat_template == "J"


# KV blocks.


def test_blocks_of_an_engine_have_our_names() -> None:
    known = KvBlocks("n", 2)
    ours = blocks.chain([1, 2, 3, 4, 5, 6], 2, root=blocks.root("n", ""))
    stored = known.apply(BlocksStored(0, None, [(-7, (1, 2)), (8, (3, 4))]))
    assert stored.stored[:] == ours[:2]
    assert known.apply(BlocksStored(0, 8, [(9, (5, 6))])).stored[:] == ours[2:]
    assert known.apply(BlocksRemoved(0, [9, 1234])).removed[:] == ours[2:]
    assert known.apply(BlocksCleared(0)).reset


def test_blocks_behind_a_gap_are_left_out() -> None:
    known = KvBlocks("n", 2)
    assert not known.apply(BlocksStored(0, 99, [(8, (3, 4))])).stored
    assert not known.apply(BlocksStored(0, None, [(8, (3, 4, 5))])).stored, "another size"
    assert not known.apply(BlocksStored(1, 8, [(9, (5, 6))])).stored, "of another rank"


def test_blocks_that_a_plain_prompt_cannot_use_are_left_out() -> None:
    block = common_pb2.KvBlock(block_hash=1, token_ids=[1, 2])
    for special in (
        common_pb2.KvBlocksStored(blocks=[block], lora_name="adapter"),
        common_pb2.KvBlocksStored(blocks=[block], cache_salt="salt"),
        common_pb2.KvBlocksStored(blocks=[block], tier=common_pb2.KV_CACHE_TIER_DISK),
        common_pb2.KvBlocksStored(blocks=[block], kv_cache_spec_sliding_window=128),
    ):
        assert not smg.block_events(0, common_pb2.KvCacheEvent(stored=special))
    plain = common_pb2.KvCacheEvent(stored=common_pb2.KvBlocksStored(blocks=[block]))
    assert smg.block_events(0, plain) == [BlocksStored(0, None, [(1, (1, 2))])]


# Load.


def test_what_an_engine_tells_of_its_load_counts() -> None:
    told = {0: LoadOfRank(0, running=3, waiting=4, kv_share=0.5, waiting_tokens=70)}
    report = load_report([Asked(10, True)], told, FOUND, num_steps=9, prefill_tokens_total=0)
    (rank,) = report.ranks
    assert (rank.requests_running, rank.requests_waiting) == (3, 4)
    assert (rank.kv_blocks_used, rank.kv_blocks_total) == (25, 50)
    assert rank.prefill_tokens_queued == 70
    assert report.is_computing
    assert report.engine_steps_total == 9


def test_what_an_engine_says_of_its_load_may_be_nonsense() -> None:
    told = {0: LoadOfRank(0, running=-1, waiting=1 << 40, kv_share=-3.0, waiting_tokens=-9)}
    (rank,) = load_report([], told, FOUND, num_steps=0, prefill_tokens_total=0).ranks
    assert (rank.requests_running, rank.requests_waiting) == (0, 2**32 - 1)
    assert (rank.kv_blocks_used, rank.prefill_tokens_queued) == (0, 0)
    vast = replace(FOUND, kv_blocks=1 << 40)
    full = {0: LoadOfRank(0, running=0, waiting=0, kv_share=1.0)}
    (rank,) = load_report([], full, vast, num_steps=0, prefill_tokens_total=0).ranks
    assert rank.kv_blocks_used == rank.kv_blocks_total == 2**32 - 1


PAGE = """
vllm:num_requests_running{engine="2",model_name="m"} 5.0
vllm:num_requests_running{engine="3",model_name="m"} 7.0
vllm:num_requests_waiting{engine="2",model_name="m"} 1.0
vllm:num_requests_waiting{engine="3",model_name="m"} NaN
vllm:kv_cache_usage_perc{engine="2",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="3",model_name="m"} 0.75
vllm:cache_config_info{block_size="32",engine="2",num_gpu_blocks="64"} 1.0
vllm:cache_config_info{block_size="32",engine="3",num_gpu_blocks="60"} 1.0
vllm:num_requests_waiting_by_reason{engine="3",reason="capacity"} 4.0
"""


def test_of_several_ranks_each_is_told_of() -> None:
    first, second = vllm_metrics.ranks_of(PAGE)
    assert first == vllm_metrics.RankMetrics(LoadOfRank(0, 5, 1, 0.25), 32, 63)
    assert second == vllm_metrics.RankMetrics(LoadOfRank(1, 7, 0, 0.75), 32, 59)
    assert not vllm_metrics.ranks_of("python_info 1.0\n")
    with pytest.raises(CallFailed, match="metrics"):
        vllm_metrics.ranks_of("vllm:num_requests_running{ 1\n")


def test_a_number_without_bounds_is_none() -> None:
    assert openai_words.number(float("inf")) == openai_words.number(float("nan")) == 0


def test_an_engine_that_tells_nothing_is_accounted_for() -> None:
    asked = [Asked(9, True), Asked(4, True), Asked(7, False)]
    (rank,) = load_report(asked, {}, FOUND, num_steps=0, prefill_tokens_total=0).ranks
    assert (rank.requests_running, rank.requests_waiting) == (2, 1)
    assert rank.kv_blocks_used == 3 + 1
    assert rank.prefill_tokens_queued == 7


def test_what_streams_took_and_gave_back_since_an_engine_told_its_load_counts() -> None:
    told = {0: LoadOfRank(0, running=2, waiting=0, kv_share=0.2)}  # 10 of 50 blocks.
    before = [Asked(9, True), Asked(16, True)]
    when_told = accounted(before, FOUND)

    def used(*asked: Asked) -> int:
        (rank,) = load_report(
            asked,
            told,
            FOUND,
            num_steps=0,
            prefill_tokens_total=0,
            blocks_when_told=when_told,
        ).ranks
        return rank.kv_blocks_used

    assert used(*before) == 10
    assert used(Asked(13, True), Asked(17, True)) == 12
    assert used(*before, Asked(8, False)) == 12, "it is given to the engine just now"
    assert used(Asked(9, True)) == 6
    assert used() == 3, "the rest is of others"
    assert used(*before, Asked(1000, False)) == 50, "it has no more"


def test_an_engine_that_says_it_has_no_work_is_not_believed() -> None:
    told = {0: LoadOfRank(0, running=0, waiting=0, kv_share=0.0)}
    report = load_report([Asked(7, False)], told, FOUND, num_steps=0, prefill_tokens_total=0)
    assert report.is_computing
    paced = [Asked(7, True, is_paced=True)]
    assert not load_report(paced, told, FOUND, num_steps=0, prefill_tokens_total=0).is_computing


def test_blocks_that_can_be_evicted_are_no_load() -> None:
    record = common_pb2.EngineLoad(token_usage=0.9, active_token_usage=0.2, running_requests=1)
    assert smg.load_of_record(2, record) == LoadOfRank(2, 1, 0, record.active_token_usage)
    record.ClearField("active_token_usage")
    assert smg.load_of_record(2, record).kv_share == 0.9


# Descriptions.


def test_engines_of_other_facts_are_of_other_numerics() -> None:
    vouched = Vouched(is_invariant=True, numerics="H200")
    known = {
        describe(found, word).numerics.id
        for found, word in (
            (FOUND, vouched),
            (replace(FOUND, version="0.33.0"), vouched),
            (replace(FOUND, facts={"dtype": "bfloat16"}), vouched),
            (FOUND, Vouched(is_invariant=True, numerics="H100")),
        )
    }
    assert len(known) == 4
    assert describe(FOUND, vouched) == describe(FOUND, vouched)


def test_no_engine_is_taken_for_invariant_unless_somebody_vouches() -> None:
    assert not describe(FOUND, Vouched()).numerics.batch_invariant
    assert describe(FOUND, Vouched(is_invariant=True)).numerics.split_invariant


# What vLLM is asked, and says.


def call(num_top: int | None = None) -> Call:
    params = GenerationParams(SamplingParams(temperature=0.0), StopConditions(), None, num_top)
    return Call("r", (1,), params, 5)


def test_of_the_most_probable_tokens_the_chosen_one_is_told_first_and_put_in_order() -> None:
    top = vllm_pb.TopLogProbs(token_ids=[9, 4, 5], values=[-3.0, -0.5, -1.0])
    told = vllm_pb.OutputLogProbs(token_logprobs=[-3.0], token_ids=[9], top_logprobs=[top])
    (one,) = smg.logprobs_of(told, 2)
    assert (one.logprob, one.top_token_ids, one.top_logprobs) == (-3.0, (4, 5), (-0.5, -1.0))


@pytest.mark.parametrize(("num_top", "asked"), [(0, 0), (1, 2), (19, 20), (20, 20)])
def test_one_alternative_more_is_asked_for_than_wanted(num_top: int, asked: int) -> None:
    request = vllm.request_of(call(num_top))
    assert request.sampling_params.logprobs == asked
    assert not vllm.request_of(call(None)).sampling_params.HasField("logprobs")


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, FailureKind.REJECTED),
        (grpc.StatusCode.FAILED_PRECONDITION, FailureKind.REJECTED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, FailureKind.OVERLOAD),
        (grpc.StatusCode.UNAVAILABLE, FailureKind.CRASH),
        (grpc.StatusCode.CANCELLED, FailureKind.PARTITION),
        (grpc.StatusCode.INTERNAL, FailureKind.ENGINE_ERROR),
        (grpc.StatusCode.UNKNOWN, FailureKind.ENGINE_ERROR),
    ],
)
def test_every_status_of_an_engine_has_a_meaning(
    code: grpc.StatusCode, failure: FailureKind
) -> None:
    nothing = grpc.aio.Metadata()
    assert smg.failed(grpc.aio.AioRpcError(code, nothing, nothing, "why")).failure is failure


def test_a_request_for_one_rank_says_so() -> None:
    pinned = replace(call(), rank=0)
    assert vllm.request_of(pinned).HasField("data_parallel_rank")
    assert not vllm.request_of(call()).HasField("data_parallel_rank")


def test_a_rank_that_there_is_not_is_refused() -> None:
    start = attempt_pb2.StartAttempt(
        rank=1, checkpoint=attempt_pb2.Checkpoint(prompt_token_ids=[1])
    )
    with pytest.raises(InvalidField, match="rank"):
        call_of(start, FOUND, "r")
    assert call_of(start, replace(FOUND, num_ranks=2), "r").rank == 1
