"""What a worker needs to go on with a stream: the immutable form of the contract's Checkpoint."""

from dataclasses import dataclass

from unbroken.generation import (
    GenerationParams,
    check_token_ids,
    params_from_proto,
    params_to_proto,
)
from unbroken.v1 import attempt_pb2 as pb


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A stream at one offset; a new stream is a checkpoint without output.

    `output_token_ids` are given to an engine with native resume as its own past output. Otherwise
    they may stand at the end of the prompt, and then `first_offset` tells where numbering goes on.
    """

    prompt_token_ids: tuple[int, ...]
    params: GenerationParams
    output_token_ids: tuple[int, ...] = ()
    first_offset: int = 0


def checkpoint_from_proto(message: pb.Checkpoint, *, vocab_size: int) -> Checkpoint:
    """Validate and convert; raises `InvalidField`."""
    prompt = tuple(message.prompt_token_ids)
    output = tuple(message.output_token_ids)
    check_token_ids("checkpoint.prompt_token_ids", prompt, vocab_size)
    check_token_ids("checkpoint.output_token_ids", output, vocab_size)
    return Checkpoint(
        prompt_token_ids=prompt,
        params=params_from_proto(message.params, vocab_size=vocab_size),
        output_token_ids=output,
        first_offset=message.first_offset,
    )


def checkpoint_to_proto(checkpoint: Checkpoint) -> pb.Checkpoint:
    """The inverse of `checkpoint_from_proto`."""
    message = pb.Checkpoint(params=params_to_proto(checkpoint.params))
    write_progress(message, checkpoint)
    return message


def write_progress(message: pb.Checkpoint, checkpoint: Checkpoint) -> None:
    """Make `message`, which has parameters and nothing else, the checkpoint of them."""
    message.prompt_token_ids.extend(checkpoint.prompt_token_ids)
    message.output_token_ids.extend(checkpoint.output_token_ids)
    message.first_offset = checkpoint.first_offset
