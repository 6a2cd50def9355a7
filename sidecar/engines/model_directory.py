"""Reads a model's directory, as far as its tokenizer goes."""

from collections.abc import Mapping
from pathlib import Path

from sidecar.engines.tokenizer_files import NAMES, BadTokenizer


def read_directory(directory: Path) -> Mapping[str, bytes]:
    """The tokenizer's files in a directory. Raises `BadTokenizer`."""
    try:
        present = [name for name in NAMES if (directory / name).is_file()]
        return {name: (directory / name).read_bytes() for name in present}
    except OSError as error:
        raise BadTokenizer(f"{directory}: {error}") from error
