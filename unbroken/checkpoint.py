"""What a worker needs to go on with a stream: the immutable form of the contract's Checkpoint."""

from dataclasses import dataclass

from unbroken.generation import (
    GenerationParams,
    check_token_ids,
    params_from_proto,
    params_to_proto,
)
from unbroken.v1 import attempt_pb2 as pb
from unbroken.v1 import generation_pb2


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
    message = pb.Checkpoint()
    write_checkpoint(message, checkpoint, params_to_proto(checkpoint.params))
    return message


def write_checkpoint(
    message: pb.Checkpoint, checkpoint: Checkpoint, params: generation_pb2.GenerationParams
) -> None:
    """Make `message` the checkpoint; `params` are its own, converted."""
    message.prompt_token_ids[:] = checkpoint.prompt_token_ids
    message.output_token_ids[:] = checkpoint.output_token_ids
    message.params.CopyFrom(params)
    message.first_offset = checkpoint.first_offset
