"""A Llama-shaped model whose weights and KV lie in memory that it is given. Needs PyTorch.

Its weights are drawn from a seed: what it says means nothing, but it takes the time and the memory
that a real one takes, and every bit of a logit depends on every bit of the KV before it.

    KV of a pool    [token][layer][key, value][head][dimension], bf16

So the KV of a token lies in one piece, and that of a block of tokens too: it is copied as it lies.
Greedy, one sequence. Along with each token goes a digest of all logits that it was chosen from.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

ROPE_BASE: Final = 500_000.0
PART_TOKENS: Final = 4096
"""Of a prompt, in one pass of what needs most memory."""
ELEMENT_BYTES: Final = 2
EPSILON: Final = 1e-5


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a model is."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int = 32_768

    @property
    def token_bytes(self) -> int:
        """KV of one token."""
        return self.layers * 2 * self.kv_heads * self.head_dim * ELEMENT_BYTES

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Rows and columns of all of them, in the order in which they lie."""
        of_heads = (self.heads + 2 * self.kv_heads) * self.head_dim
        layer = [
            (of_heads, self.hidden),
            (self.hidden, self.heads * self.head_dim),
            (2 * self.mlp, self.hidden),
            (self.hidden, self.mlp),
        ]
        ends = [(self.vocabulary, self.hidden), (self.vocabulary, self.hidden)]
        return [*ends, *(layer * self.layers)]

    @property
    def weight_bytes(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices) * ELEMENT_BYTES


TINY: Final = Shape("tiny", 64, 2, 4, 2, 16, 128, 256)
SMALL: Final = Shape("1b", 2048, 16, 32, 8, 64, 8192)
LARGE: Final = Shape("7b", 4096, 32, 32, 8, 128, 14_336)
SHAPES: Final = {shape.name: shape for shape in (TINY, SMALL, LARGE)}


class Model:
    """What it computes, from where its weights lie."""

    def __init__(self, shape: Shape, weights: Any, tokens_max: int) -> None:
        """`weights` is a tensor of bytes: of `shape.weight_bytes`, or more."""
        torch = self._torch = importlib.import_module("torch")
        self.shape = shape
        self.tokens_max = tokens_max
        self.device = weights.device
        flat = weights[: shape.weight_bytes].view(torch.bfloat16)
        self._all: list[Any] = []
        at = 0
        for rows, columns in shape.matrices:
            self._all.append(flat[at : at + rows * columns].view(rows, columns))
            at += rows * columns
        half = shape.head_dim // 2
        steps = torch.arange(half, device=self.device, dtype=torch.float32) / half
        angles = torch.outer(
            torch.arange(tokens_max, device=self.device, dtype=torch.float32), ROPE_BASE**-steps
        )
        self._cos, self._sin = angles.cos(), angles.sin()
        self._places = torch.arange(tokens_max, device=self.device)
        odd = torch.arange(shape.vocabulary, device=self.device, dtype=torch.int64) * 2 + 1
        self._factors = odd * 0x9E3779B97F4A7C1

    def draw(self, seed: int) -> None:
        """Weights from a seed, in place."""
        generator = self._torch.Generator(self.device).manual_seed(seed)
        for matrix in self._all:
            matrix.normal_(0.0, 0.02, generator=generator)

    def kv(self, pool: Any) -> Any:
        """A tensor of bytes as KV."""
        shape = self.shape
        size = self.tokens_max * shape.token_bytes
        return (
            pool[:size]
            .view(self._torch.bfloat16)
            .view(self.tokens_max, shape.layers, 2, shape.kv_heads, shape.head_dim)
        )

    def prefill(self, kv: Any, ids: Sequence[int]) -> tuple[Any, Any]:
        """Compute the KV of all these tokens; the next token, and the digest."""
        torch, shape = self._torch, self.shape
        count = len(ids)
        cos, sin = self._cos[:count, None], self._sin[:count, None]
        x = self._all[0][torch.tensor(ids, device=self.device)]
        group = shape.heads // shape.kv_heads
        for layer in range(shape.layers):
            of_heads, out, up, down = self._of(layer)
            q, k, v = self._split(_normed(x) @ of_heads.T, cos, sin)
            kv[:count, layer, 0] = k
            kv[:count, layer, 1] = v
            seen = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                k.repeat_interleave(group, 1).transpose(0, 1)[None],
                v.repeat_interleave(group, 1).transpose(0, 1)[None],
                is_causal=True,
            )
            x = x + seen[0].transpose(0, 1).reshape(count, -1) @ out.T
            del q, k, v, seen
            for start in range(0, count, PART_TOKENS):
                part = x[start : start + PART_TOKENS]
                part += self._mlp(part, up, down)
        return self._chosen(x[-1:])

    def step(self, kv: Any, token: Any, position: Any) -> tuple[Any, Any]:
        """Compute the KV of one token at its position; the next token, and the digest.

        Of static shapes, so that it can be captured: all of the pool is read, and what is beyond
        the position counts for nothing.
        """
        torch, shape = self._torch, self.shape
        cos, sin = self._cos[position][:, None], self._sin[position][:, None]
        beyond = self._places > position
        x = self._all[0][token]
        for layer in range(shape.layers):
            of_heads, out, up, down = self._of(layer)
            q, k, v = self._split(_normed(x) @ of_heads.T, cos, sin)
            kv[:, layer].index_copy_(0, position, torch.stack((k, v), 1))
            keys, values = kv[:, layer, 0].permute(1, 2, 0), kv[:, layer, 1].permute(1, 0, 2)
            scores = torch.bmm(q.reshape(shape.kv_heads, -1, shape.head_dim), keys).float()
            scores = (scores * shape.head_dim**-0.5).masked_fill(beyond, float("-inf"))
            seen = torch.bmm(scores.softmax(-1).to(torch.bfloat16), values)
            x = x + seen.reshape(1, -1) @ out.T
            x = x + self._mlp(x, up, down)
        return self._chosen(x)

    def _of(self, layer: int) -> list[Any]:
        return self._all[2 + 4 * layer : 6 + 4 * layer]

    def _split(self, of_heads: Any, cos: Any, sin: Any) -> tuple[Any, Any, Any]:
        shape = self.shape
        all_heads = of_heads.view(len(of_heads), -1, shape.head_dim)
        q, k, v = all_heads.split((shape.heads, shape.kv_heads, shape.kv_heads), 1)
        return self._turned(q, cos, sin), self._turned(k, cos, sin), v

    def _turned(self, heads: Any, cos: Any, sin: Any) -> Any:
        low, high = heads.float().chunk(2, -1)
        turned = self._torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
        return turned.to(heads.dtype)

    def _mlp(self, x: Any, up: Any, down: Any) -> Any:
        gate, value = (_normed(x) @ up.T).chunk(2, -1)
        return (self._torch.nn.functional.silu(gate) * value) @ down.T

    def _chosen(self, x: Any) -> tuple[Any, Any]:
        torch = self._torch
        logits = _normed(x) @ self._all[1].T
        digest = (logits.view(torch.int16).to(torch.int64) * self._factors).sum()
        return logits.argmax(-1), digest


def _normed(x: Any) -> Any:
    wide = x.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt()).to(x.dtype)
