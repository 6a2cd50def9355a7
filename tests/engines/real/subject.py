"""A real engine as the subject of the conformance suite, named in the environment:

    UNBROKEN_REAL_ENGINE=vllm@127.0.0.1:50051      its protocol and where it serves
    UNBROKEN_REAL_REFERENCE=openai@127.0.0.1:8000  the same model behind another protocol
    UNBROKEN_REAL_KV_BLOCKS=63                     how many can be used; 0: it has none
    UNBROKEN_REAL_TOKENIZER=/models/m              its tokenizer's files, if it does not tell
    UNBROKEN_REAL_LACKS=min_tokens,stop tokens     what it does not know, and has to refuse

What a request has to give is asked of the reference, alone and by its adapter: had an adapter
left something out, the two would not say the same.
"""

import os
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from sidecar.engines.adapter import Adapter, Call
from sidecar.engines.kinds import adapter_of
from tests.engines.real.llama_native import LLAMA_NATIVE, completion
from tests.worker.engines import Attempt
from unbroken.generation import GenerationParams
from unbroken.outcome import FinishReason
from unbroken.v1 import attempt_pb2, generation_pb2

_ENGINE: Final = "UNBROKEN_REAL_ENGINE"
_REFERENCE: Final = "UNBROKEN_REAL_REFERENCE"
_KV_BLOCKS: Final = "UNBROKEN_REAL_KV_BLOCKS"
_TOKENIZER: Final = "UNBROKEN_REAL_TOKENIZER"
_LACKS: Final = "UNBROKEN_REAL_LACKS"
_REASONS: Final = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True)
class Real:
    """One engine, and one to compare it with."""

    protocol: str
    address: str
    reference: tuple[str, str]
    """Protocol and address."""
    kv_blocks: int
    tokenizer: Path | None = None
    lacks: frozenset[str] = frozenset()
    """Features by the suite's names."""

    @classmethod
    def of_environment(cls) -> Self | None:
        """The one that is named; None: none is."""
        named = os.environ.get(_ENGINE)
        if named is None:
            return None
        protocol, _, address = named.partition("@")
        other, _, elsewhere = os.environ[_REFERENCE].partition("@")
        tokenizer = os.environ.get(_TOKENIZER)
        return cls(
            protocol,
            address,
            (other, elsewhere),
            int(os.environ[_KV_BLOCKS]),
            None if tokenizer is None else Path(tokenizer),
            frozenset(filter(None, os.environ.get(_LACKS, "").split(","))),
        )

    def to_environment(self) -> dict[str, str]:
        """What names it."""
        return {
            _ENGINE: f"{self.protocol}@{self.address}",
            _REFERENCE: "@".join(self.reference),
            _KV_BLOCKS: str(self.kv_blocks),
            _LACKS: ",".join(sorted(self.lacks)),
            **({} if self.tokenizer is None else {_TOKENIZER: str(self.tokenizer)}),
        }

    async def alone(self, params: GenerationParams, prompt: Sequence[int]) -> Attempt:
        """What the reference gives."""
        protocol, address = self.reference
        if protocol == LLAMA_NATIVE:
            return await completion(address, params, prompt)
        adapter: Adapter = adapter_of(protocol)(address)
        try:
            found = await adapter.discover()
            room = found.context_length - len(prompt)
            max_tokens = min(params.stopping.max_tokens or room, room)
            call = Call(f"alone-{os.urandom(4).hex()}", tuple(prompt), params, max_tokens)
            attempt = Attempt()
            async with aclosing(adapter.generate(call)) as deltas:
                async for delta in deltas:
                    attempt.token_ids += delta.token_ids
                    attempt.logprobs += delta.logprobs
                    if (end := delta.end) is not None:
                        stop = end.stop_token_id
                        if stop is not None and attempt.token_ids[-1:] != [stop]:
                            attempt.token_ids.append(stop)  # It is left out by some.
                        reason = _REASONS[end.reason]
                        attempt.ended = attempt_pb2.AttemptEnded(finish_reason=reason)
            return attempt
        finally:
            await adapter.close()
