"""Reads tokenizers in a process of its own, so that a sidecar goes on meanwhile.

What parses them is native code that keeps the interpreter's lock, most of a second for a large
vocabulary. Not even another thread would let the loop run, while frontends expect heartbeats.

    python -m sidecar.engines.tokenizer_process <directory>

writes what `tokenizer_files` finds there to stdout, as one JSON object.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final

from sidecar import reaper
from sidecar.engines.adapter import NotReady
from sidecar.engines.model_directory import read_directory
from sidecar.engines.tokenizer_files import BadTokenizer, asset_of
from unbroken.tokenizer import TokenizerAsset

READ_TIMEOUT_S: Final = 60.0


async def read_asset(
    files: Mapping[str, bytes], *, vocab_size: int = 0, eos_token_ids: Iterable[int] = ()
) -> TokenizerAsset:
    """The same as `tokenizer_files.asset_of`, with the loop free.

    Raises `BadTokenizer`; and `NotReady` if this machine is what failed: no time, disk or process.
    """
    items, ends = frozenset(files.items()), frozenset(eos_token_ids)
    return await asyncio.to_thread(_read, items, vocab_size, ends)


@lru_cache(maxsize=2)  # An engine's next life has the same tokenizer, most often.
def _read(
    items: frozenset[tuple[str, bytes]], vocab_size: int, eos_token_ids: frozenset[int]
) -> TokenizerAsset:
    files = dict(items)
    if "tokenizer.json" not in files:
        return asset_of(files)  # Raises.
    try:
        with tempfile.TemporaryDirectory(prefix="unbroken-tokenizer-") as directory:
            for name, data in items:
                (Path(directory) / name).write_bytes(data)
            child = subprocess.run(
                (sys.executable, "-m", "sidecar.engines.tokenizer_process", directory),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
                timeout=READ_TIMEOUT_S,
            )
    except subprocess.CalledProcessError as error:
        raise BadTokenizer(f"it cannot be read: {error}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotReady(f"its tokenizer cannot be read now: {error}") from error
    found = json.loads(child.stdout)
    if "error" in found:
        raise BadTokenizer(found["error"])
    return TokenizerAsset(
        tokenizer_json=files["tokenizer.json"],
        chat_template=found["chat_template"],
        bos_token_id=found["bos_token_id"],
        eos_token_ids=eos_token_ids.union(found["eos_token_ids"]),
        vocab_size=max(vocab_size, found["vocab_size"]),
        eos_token_id=found["eos_token_id"],
    )


def _found(directory: Path) -> Mapping[str, object]:
    try:
        asset = asset_of(read_directory(directory))
    except BadTokenizer as error:
        return {"error": str(error)}
    return {
        "chat_template": asset.chat_template,
        "bos_token_id": asset.bos_token_id,
        "eos_token_ids": sorted(asset.eos_token_ids),
        "vocab_size": asset.vocab_size,
        "eos_token_id": asset.eos_token_id,
    }


if __name__ == "__main__":
    reaper.run_as_others()  # The sidecar's priority is not for work that takes seconds.
    json.dump(_found(Path(sys.argv[1])), sys.stdout)
