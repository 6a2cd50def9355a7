"""Continuous batching of Hugging Face's transformers behind OpenAI's HTTP, greedy, with token ids.

It stands for a real engine on a GPU: paged KV cache, steps that all streams share, CUDA graphs. The
model is a Llama with random weights, the same in every process; no text ends by itself.

    python -m tests.gpu.transformers_serve --port 8001 --tokenizer DIR [--dtype bfloat16]
"""

import argparse
import asyncio
import importlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from aiohttp import web

from worker import simulated_tokenizer

CONTEXT_LENGTH: Final = 1024
SIZES: Final[Mapping[str, Mapping[str, int]]] = {
    "tiny": {"hidden": 128, "layers": 2, "heads": 4, "kv_heads": 2, "inner": 256},
    "1b": {"hidden": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "inner": 8192},
}
_SEED: Final = 7
_PAGE: Final = 64
_PAGES: Final = 1024
_BATCH_TOKENS: Final = 1024


def make_model(size: str, dtype: str, device: str) -> Any:
    """The same weights wherever the device is of one make."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    of = SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=simulated_tokenizer.VOCAB_SIZE,
        hidden_size=of["hidden"],
        num_hidden_layers=of["layers"],
        num_attention_heads=of["heads"],
        num_key_value_heads=of["kv_heads"],
        intermediate_size=of["inner"],
        max_position_embeddings=2 * CONTEXT_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="paged|sdpa",
    )
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval()
        generator = torch.Generator(device=device).manual_seed(_SEED)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 2:
                    scale = 1.0 if "embed" in name else 1 / math.sqrt(weight.shape[1])
                    weight.normal_(0.0, scale, generator=generator)
    return model


def make_manager(
    model: Any,
    *,
    use_cuda_graph: bool,
    shape: tuple[int, int] = (_PAGES, _PAGE),
    allow_block_sharing: bool = False,
) -> Any:
    """Batches continuously, in a thread of its own, until stopped.

    `shape`: how many pages, and tokens of each.
    """
    transformers: Any = importlib.import_module("transformers")
    configuration: Any = importlib.import_module("transformers.generation.configuration_utils")
    config = configuration.ContinuousBatchingConfig
    page = "page_size" if "page_size" in config.__dataclass_fields__ else "block_size"
    manager = model.init_continuous_batching(
        generation_config=transformers.GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=config(
            **{page: shape[1]},  # Its name depends on the version.
            num_blocks=shape[0],
            max_batch_tokens=_BATCH_TOKENS,
            allow_block_sharing=allow_block_sharing,
            use_cuda_graph=use_cuda_graph,
        ),
    )
    manager.start()
    return manager


class Server:
    """One engine."""

    def __init__(self, manager: Any, tokenizer: str) -> None:
        self._manager = manager
        self._tokenizer = tokenizer
        self._num_asked = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        app.router.add_post("/v1/completions", self.completions)
        return app

    async def models(self, request: web.Request) -> web.Response:
        del request
        model = {"id": "random", "root": self._tokenizer, "max_model_len": CONTEXT_LENGTH}
        return web.json_response({"object": "list", "data": [model]})

    async def health(self, request: web.Request) -> web.Response:
        del request
        return web.Response(status=200 if self._manager.is_running() else 503)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body: dict[str, Any] = await request.json()
        if body.get("temperature") or body.get("logit_bias") or body.get("presence_penalty"):
            return web.json_response({"error": {"message": "greedy only"}}, status=400)
        told: asyncio.Queue[Any] = asyncio.Queue()
        self._num_asked += 1
        name = f"{self._num_asked}"
        self._manager.register_result_handler(name, told.put_nowait)
        self._manager.add_request(
            list(body["prompt"]), request_id=name, max_new_tokens=body["max_tokens"], streaming=True
        )
        response = web.StreamResponse()
        is_stream = body.get("stream", False)
        if is_stream:
            await response.prepare(request)
        num = 0
        try:
            while True:
                output = await told.get()
                if output.error:
                    return await _ended(request, response, is_stream, {"error": output.error})
                token_ids = list(output.generated_tokens)
                is_over = output.is_finished()
                if is_stream and len(token_ids) > num:
                    await _say(response, _choice(token_ids[num:], None))
                num = len(token_ids)
                if is_over:
                    tokens = [] if is_stream else token_ids
                    return await _ended(request, response, is_stream, _choice(tokens, "length"))
        finally:
            self._manager.cancel_request(name)


def _choice(token_ids: list[int], reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, "text": "", "token_ids": token_ids, "finish_reason": reason}
    return {"object": "text_completion", "choices": [choice]}


async def _say(response: web.StreamResponse, event: Mapping[str, Any]) -> None:
    await response.write(f"data: {json.dumps(event)}\n\n".encode())


async def _ended(
    request: web.Request, response: web.StreamResponse, is_stream: bool, event: Mapping[str, Any]
) -> web.StreamResponse:
    del request
    if not is_stream:
        return web.json_response(event)
    with suppress(ConnectionError):  # Who has heard the end may leave.
        await _say(response, event)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
    return response


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.gpu.transformers_serve")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    model = make_model(arguments.size, arguments.dtype, arguments.device)
    manager = make_manager(model, use_cuda_graph=arguments.device == "cuda")
    web.run_app(
        Server(manager, arguments.tokenizer).app(),
        host="127.0.0.1",
        port=arguments.port,
        print=None,
        handler_cancellation=True,
    )


if __name__ == "__main__":
    main()
