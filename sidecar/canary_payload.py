"""What a canary asks. No I/O.

One token for the shortest prompt that every model takes: its beginning-of-sequence token. It is a
checkpoint like any other, so every kind of engine is asked by the adapter that asks it all day.
"""

from typing import Final

from unbroken.v1 import attempt_pb2, worker_pb2

ID_WITHOUT_BOS: Final = 1
"""What is asked where the model has no beginning-of-sequence token."""
MARK: Final = "unbroken-canary"
"""Whose request it is, and how it is called, so that nobody bills or counts it."""


def prompt_of(tokenizer: worker_pb2.Tokenizer, override: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The ids to ask with: those that are configured, or the tokenizer's beginning."""
    if override:
        return override
    if tokenizer.HasField("bos_token_id"):
        return (tokenizer.bos_token_id,)
    return (min(ID_WITHOUT_BOS, max(0, tokenizer.vocab_size - 1)),)


def checkpoint_of(
    tokenizer: worker_pb2.Tokenizer, override: tuple[int, ...] = ()
) -> attempt_pb2.Checkpoint:
    """Greedy, one token, whatever that is."""
    checkpoint = attempt_pb2.Checkpoint(prompt_token_ids=prompt_of(tokenizer, override))
    params = checkpoint.params
    params.sampling.temperature = 0.0
    params.stopping.max_tokens = 1
    params.stopping.ignore_eos = True
    return checkpoint
