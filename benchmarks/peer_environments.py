"""What the peers of `make bench-peers` are installed into, and the model that they are told of.

Each has its own environment in .peers/, from requirements/peer-NAME.txt, made once. It is several
hundred megabytes, which is why nothing else installs it.
"""

import json
from pathlib import Path
from typing import Final

from benchmarks.stamps import NUM_IDS
from tests.support.environments import installed

ROOT: Final = Path(__file__).parents[1]


def environment(name: str) -> Path:
    """The directory with the programs of a peer. Raises `NotInstalledError`."""
    return installed(ROOT / "requirements" / f"peer-{name}.txt", ROOT / ".peers" / name)


def make_model(directory: Path) -> None:
    """A model's files without a model: token id N is the word "tN"."""
    special = {"<s>": NUM_IDS, "</s>": NUM_IDS + 1, "<unk>": NUM_IDS + 2}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": word, "special": True, **plain}
            for word, token_id in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {f"t{token_id}": token_id for token_id in range(NUM_IDS)} | special,
            "unk_token": "<unk>",
        },
    }
    ends = {"bos_token_id": special["<s>"], "eos_token_id": special["</s>"]}
    files: dict[str, object] = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": 1_000_000,
            "clean_up_tokenization_spaces": False,
            "chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
        },
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": NUM_IDS + len(special),
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "max_position_embeddings": 1_000_000,
            "torch_dtype": "float16",
            **ends,
        },
        "generation_config.json": ends,
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
