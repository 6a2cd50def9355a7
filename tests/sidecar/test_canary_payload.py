"""What the canary asks with."""

from sidecar.canary_payload import checkpoint_of, prompt_of
from unbroken.v1 import worker_pb2

TOKENIZER = worker_pb2.Tokenizer(vocab_size=100, bos_token_id=42)
WITHOUT_BOS = worker_pb2.Tokenizer(vocab_size=100)


def test_a_model_is_asked_with_its_own_beginning_unless_something_else_is_configured() -> None:
    assert prompt_of(TOKENIZER) == (42,)
    assert prompt_of(WITHOUT_BOS) == (1,)
    assert prompt_of(worker_pb2.Tokenizer(vocab_size=1)) == (0,)
    assert prompt_of(TOKENIZER, (7, 8)) == (7, 8)


def test_it_is_asked_for_one_token_greedily() -> None:
    checkpoint = checkpoint_of(TOKENIZER)
    assert list(checkpoint.prompt_token_ids) == [42]
    assert checkpoint.params.stopping.max_tokens == 1
    assert checkpoint.params.stopping.ignore_eos
    assert checkpoint.params.sampling.temperature == 0
