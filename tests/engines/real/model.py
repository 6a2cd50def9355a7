"""A small Llama with random weights, in the files that engines read (Hugging Face's layout).

Random weights are hard on exactness: their probabilities are flat, so that the least difference in
a logit becomes another token. The tokenizer is the simulated engine's.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from worker import simulated_tokenizer

CONTEXT_LENGTH: Final = 1024

_HIDDEN: Final = 128
_LAYERS: Final = 2
_HEADS: Final = 4
_KV_HEADS: Final = 2
_HEAD_SIZE: Final = 32
"""The least that vLLM's kernels have."""
_INNER: Final = 256
_SEED: Final = 7

Weights = Mapping[str, NDArray[np.float32]]


def make(directory: Path) -> None:
    """Write the model; the same bytes everywhere."""
    directory.mkdir(parents=True, exist_ok=True)
    asset = simulated_tokenizer.asset()
    ends = {
        "bos_token_id": simulated_tokenizer.BOS_ID,
        "eos_token_id": sorted(asset.eos_token_ids),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": simulated_tokenizer.VOCAB_SIZE,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_SIZE,
        "max_position_embeddings": 2 * CONTEXT_LENGTH,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **ends,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": simulated_tokenizer.BOS,
        "eos_token": simulated_tokenizer.END,
        "chat_template": asset.chat_template,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer.json").write_bytes(asset.tokenizer_json)
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(ends))
    (directory / "model.safetensors").write_bytes(_safetensors(_weights()))


def _weights() -> Weights:
    rng = np.random.default_rng(_SEED)

    def random(rows: int, columns: int, scale: float | None = None) -> NDArray[np.float32]:
        drawn = rng.standard_normal((rows, columns)) * (scale or 1 / math.sqrt(columns))
        return drawn.astype(np.float32)

    ones = np.ones(_HIDDEN, np.float32)
    vocab, queries, keys = (
        simulated_tokenizer.VOCAB_SIZE,
        _HEADS * _HEAD_SIZE,
        _KV_HEADS * _HEAD_SIZE,
    )
    weights = {
        "model.embed_tokens.weight": random(vocab, _HIDDEN, 1.0),
        "lm_head.weight": random(vocab, _HIDDEN, 0.3),
        "model.norm.weight": ones,
    }
    for layer in range(_LAYERS):
        weights |= {
            f"model.layers.{layer}.{name}.weight": value
            for name, value in {
                "self_attn.q_proj": random(queries, _HIDDEN),
                "self_attn.k_proj": random(keys, _HIDDEN),
                "self_attn.v_proj": random(keys, _HIDDEN),
                "self_attn.o_proj": random(_HIDDEN, queries),
                "mlp.gate_proj": random(_INNER, _HIDDEN),
                "mlp.up_proj": random(_INNER, _HIDDEN),
                "mlp.down_proj": random(_HIDDEN, _INNER),
                "input_layernorm": ones,
                "post_attention_layernorm": ones,
            }.items()
        }
    return weights


def _safetensors(weights: Weights) -> bytes:
    """Length of the header, the header (what begins where), the numbers."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in weights.items():
        begin, end = end, end + value.nbytes
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return (
        len(text).to_bytes(8, "little") + text + b"".join(one.tobytes() for one in weights.values())
    )
