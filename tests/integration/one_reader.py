"""A client of its own process that reads one stream, as told.

    python -m tests.integration.one_reader <frontend> <request id> <max tokens> <what>

`read`: to the end. `stall`: one piece of a wordy request, then nothing,
though the process runs. `block`: one piece,
then its event loop stands still for `BLOCKED_S`, then the rest. Says "first" after the first piece
and the number of tokens at the end.
"""

import asyncio
import sys
import time
from typing import Final

import uvloop

from unbroken.client import Client
from unbroken.request import GenerateOptions

BLOCKED_S: Final = 4.0
"""Longer than a client may be silent."""


async def main(address: str, request_id: str, max_tokens: int, what: str) -> None:
    async with Client(address) as client:
        options: GenerateOptions = {
            "request_id": request_id,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        if what == "stall":
            options |= {"num_top_logprobs": 20, "num_choices": 16}
        stream = client.generate(token_ids=range(300, 364), **options)
        num_tokens = len((await anext(stream)).token_ids)
        print("first", flush=True)  # noqa: T201
        match what:
            case "stall":
                await asyncio.Event().wait()
            case "block":
                time.sleep(BLOCKED_S)  # noqa: ASYNC251 - This is the point.
            case _:
                assert what == "read"
        async for piece in stream:
            num_tokens += len(piece.token_ids)
        print(num_tokens, flush=True)  # noqa: T201


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
