"""A model's tokenizer from the files that come with it, as Hugging Face lays them out. No I/O.

tokenizer.json          the tokenizer itself
tokenizer_config.json   which tokens begin and end a text; the chat template, in most models
chat_template.jinja     or there
config.json, generation_config.json   further tokens that end a generation
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final, cast

import tokenizers

from unbroken.tokenizer import TokenizerAsset

NAMES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)
ARCHIVE_BYTES_MAX: Final = 64 * 1024 * 1024
"""Of a packed tokenizer; the largest known ones have about 12."""
FILE_BYTES_MAX: Final = 128 * 1024 * 1024
"""Of one file in it, unpacked."""


class BadTokenizer(ValueError):  # noqa: N818 - it names what is wrong.
    """These files are no tokenizer that we can read."""


def unpack(archive: bytes, sha256: str) -> Mapping[str, bytes]:
    """The files of a zip archive that matter here, by name. Raises `BadTokenizer`."""
    if len(archive) > ARCHIVE_BYTES_MAX:
        raise BadTokenizer(f"expected at most {ARCHIVE_BYTES_MAX} bytes, got {len(archive)}")
    seen = hashlib.sha256(archive).hexdigest()
    if sha256 and seen != sha256:
        raise BadTokenizer(f"expected an archive with SHA-256 {sha256}, got {seen}")
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as packed:
            for name in set(NAMES).intersection(packed.namelist()):
                with packed.open(name) as file:
                    data = file.read(FILE_BYTES_MAX + 1)  # What it says of its size may be a lie.
                if len(data) > FILE_BYTES_MAX:
                    raise BadTokenizer(f"{name}: expected at most {FILE_BYTES_MAX} bytes")
                files[name] = data
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise BadTokenizer(f"expected a zip archive: {error}") from error
    return files


def asset_of(
    files: Mapping[str, bytes], *, vocab_size: int = 0, eos_token_ids: Iterable[int] = ()
) -> TokenizerAsset:
    """The tokenizer; `vocab_size` and `eos_token_ids` are what the engine says besides.

    Raises `BadTokenizer`.
    """
    return _asset_of(frozenset(files.items()), vocab_size, frozenset(eos_token_ids))


# A large one takes most of a second, in which nothing else happens: too long for every life of an
# engine, while the links of its sidecar are watched.
@lru_cache(maxsize=2)
def _asset_of(
    items: frozenset[tuple[str, bytes]], vocab_size: int, eos_token_ids: frozenset[int]
) -> TokenizerAsset:
    files = dict(items)
    data = files.get("tokenizer.json")
    if data is None:
        raise BadTokenizer(f"expected tokenizer.json, got {', '.join(sorted(files)) or 'nothing'}")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # The binding raises bare exceptions.
        raise BadTokenizer(f"tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _json(files, "tokenizer_config.json")
    eos_token_id = _id_of(tokenizer, config.get("eos_token"))
    ends = {
        *eos_token_ids,
        *_ids(_json(files, "config.json").get("eos_token_id")),
        *_ids(_json(files, "generation_config.json").get("eos_token_id")),
        *([] if eos_token_id is None else [eos_token_id]),
    }
    bos_token_id = _id_of(tokenizer, config.get("bos_token"))
    # Not every model that has such a token puts it before a text.
    if bos_token_id is not None and tokenizer.encode("a").ids[:1] != [bos_token_id]:
        bos_token_id = None
    return TokenizerAsset(
        tokenizer_json=data,
        chat_template=_chat_template(files, config),
        bos_token_id=bos_token_id,
        eos_token_ids=frozenset(ends),
        vocab_size=max(vocab_size, 1 + max(tokenizer.get_vocab().values(), default=0)),
        eos_token_id=eos_token_id,
    )


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, object]) -> str:
    template = files.get("chat_template.jinja")
    if template is not None:
        return template.decode(errors="replace")
    written = config.get("chat_template")
    if isinstance(written, list):  # Several, by name.
        for one in cast(list[object], written):
            entry = _mapping(one)
            if entry.get("name") == "default":
                written = entry.get("template")
    return written if isinstance(written, str) else ""


def _id_of(tokenizer: tokenizers.Tokenizer, token: object) -> int | None:
    """The id of a special token, which may be written as an object."""
    content = _mapping(token).get("content", token)
    return tokenizer.token_to_id(content) if isinstance(content, str) else None


def _ids(value: object) -> Iterable[int]:
    listed = cast(list[object], value) if isinstance(value, list) else [value]
    return [one for one in listed if isinstance(one, int) and one >= 0]


def _json(files: Mapping[str, bytes], name: str) -> Mapping[str, object]:
    try:
        return _mapping(json.loads(files.get(name, b"{}")))
    except ValueError as error:
        raise BadTokenizer(f"{name}: {error}") from error


def _mapping(value: object) -> Mapping[str, object]:
    return cast(Mapping[str, object], value) if isinstance(value, dict) else {}
