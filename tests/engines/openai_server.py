"""A server that speaks OpenAI's HTTP, with the simulated engine behind it: as vLLM, as llama.cpp's
server, or as one that knows text only."""

import asyncio
import io
import json
import tempfile
import zipfile
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from aiohttp import web

from tests.engines.backend import Backend, CoreDead, Output
from tests.engines.vllm_server import FINISH_REASONS, zipped
from unbroken.errors import InvalidField
from unbroken.generation import (
    Constraint,
    GenerationParams,
    SamplingParams,
    StopConditions,
    params_from_proto,
    params_to_proto,
)
from unbroken.tokenizer import Tokenizer

Flavour = Literal["vllm", "llama", "text"]


class OpenAiServer:
    """One server."""

    def __init__(self, backend: Backend, directory: Path, flavour: Flavour = "vllm") -> None:
        """The tokenizer's files are put into `directory`."""
        self.backend = backend
        self.flavour: Flavour = flavour
        self.is_stopping = False
        self.num_ranks = 1
        """Data-parallel ones, of which each has the same to do, if that is to be believed."""
        self.first_engine = 0
        """What its metrics call the first of its ranks: others may be another server's."""
        self.num_looks = 0
        """How often it was asked for its models."""
        self.num_nonsense = 0
        """So many times it says a length of the context that no model has."""
        self.leaves_lines_open = False
        """The last line of a stream is its last event, and no newline follows."""
        self.ranks_asked: list[str | None] = []
        self.bodies: list[Mapping[str, Any]] = []
        """Of the completions that were asked for."""
        self.directory = directory
        self._tokenizer = Tokenizer(backend.spec.tokenizer)
        with zipfile.ZipFile(io.BytesIO(zipped(backend.spec.tokenizer))) as archive:
            archive.extractall(directory)

    async def stop(self, grace_s: float) -> None:
        """Refuse whatever is asked from now on; what becomes of streams has no rule."""
        del grace_s
        self.is_stopping = True

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)
        if self.flavour != "text":
            app.router.add_get("/health", self.health)
        if self.flavour == "vllm":
            app.router.add_get("/version", self.version)
            app.router.add_get("/metrics", self.metrics)
        if self.flavour == "llama":
            app.router.add_get("/props", self.props)
        return app

    async def models(self, request: web.Request) -> web.Response:
        del request
        self.num_looks += 1
        if self.backend.is_dead:
            return web.json_response({"error": {"message": "dead", "code": 500}}, status=500)
        model: dict[str, Any] = {"id": self.backend.spec.model, "object": "model"}
        if self.flavour == "vllm":
            model |= {
                "root": str(self.directory),
                "max_model_len": self.backend.spec.context_length,
            }
            if self.num_looks <= self.num_nonsense:
                model["max_model_len"] = 1 << 40
        return web.json_response({"object": "list", "data": [model]})

    async def health(self, request: web.Request) -> web.Response:
        if self.is_stopping and request.transport is not None:
            request.transport.abort()
        return web.Response(status=503 if self.backend.is_dead else 200)

    async def version(self, request: web.Request) -> web.Response:
        del request
        return web.json_response({"version": "0.32.0"})

    async def props(self, request: web.Request) -> web.Response:
        del request
        context = {"n_ctx": self.backend.spec.context_length}
        return web.json_response(
            {"build_info": "b1", "default_generation_settings": context, "total_slots": 4}
        )

    async def metrics(self, request: web.Request) -> web.Response:
        del request
        (rank,) = self.backend.scheduler.load().ranks
        spec = self.backend.spec
        share = rank.kv_blocks_used / spec.kv_blocks
        values = {
            "num_requests_running": f"{rank.requests_running}.0",
            "num_requests_waiting": f"{rank.requests_waiting}.0",
            "kv_cache_usage_perc": f"{share}",
        }
        engines = range(self.first_engine, self.first_engine + self.num_ranks)
        lines = [
            f'vllm:{name}{{engine="{engine}",model_name="m"}} {value}'
            for name, value in values.items()
            for engine in engines
        ]
        lines += [
            f'vllm:cache_config_info{{block_size="{spec.block_size}",engine="{engine}",'
            f'num_gpu_blocks="{spec.kv_blocks + 1}"}} 1.0'
            for engine in engines
        ]
        lines.append('vllm:time_to_first_token_seconds_bucket{le="0.1"} 5.0')
        return web.Response(text="\n".join(lines) + "\n")

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body: dict[str, Any] = await request.json()
        self.bodies.append(body)
        self.ranks_asked.append(request.headers.get("X-data-parallel-rank"))
        try:
            prompt = self._prompt(body["prompt"])
            params = _params(body, self.backend.spec.vocab_size)
            name = request.headers.get("X-Request-Id", f"probe-{len(self.bodies)}")
            outputs = self.backend.generate(name, prompt, params)
            if not body.get("stream"):
                pieces = [self._choice(body, one) async for one in outputs]
                return web.json_response({"choices": pieces[-1:]})
            return await self._stream(request, body, outputs)
        except InvalidField as error:
            told = {"message": error.detail, "type": "BadRequestError", "code": 400}
            return web.json_response({"error": told}, status=400)
        except CoreDead:
            return web.json_response({"error": {"message": "dead", "code": 500}}, status=500)

    async def _stream(
        self, request: web.Request, body: Mapping[str, Any], outputs: AsyncGenerator[Output]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        is_prepared = False
        cached = 0
        try:
            async for output in outputs:
                if not is_prepared:
                    is_prepared = True
                    await response.prepare(request)
                cached = output.cached_tokens
                event = {"choices": [self._choice(body, output)]}
                if self.leaves_lines_open and output.reason is not None:
                    await response.write(b"data: " + json.dumps(event).encode())
                    return response
                await _tell(response, event)
        except CoreDead:  # The status was 200 already.
            if not is_prepared:
                raise
            await _tell(response, {"error": {"message": "EngineCore is dead", "code": 500}})
        else:
            usage = {"prompt_tokens_details": {"cached_tokens": cached}}
            await _tell(response, {"choices": [], "usage": usage})
        finally:
            await outputs.aclose()
        await response.write(b"data: [DONE]\n\n")
        return response

    def _prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt, add_special=False)
        if self.flavour == "text":
            raise InvalidField("prompt", "a text", prompt)
        return prompt

    def _choice(self, body: Mapping[str, Any], output: Output) -> dict[str, Any]:
        pieces = self._tokenizer.pieces
        text = b"".join(pieces[one] for one in output.token_ids).decode(errors="replace")
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": None}
        if output.reason is not None:
            choice["finish_reason"] = FINISH_REASONS[output.reason]
            if output.stop_token_id in body.get("stop_token_ids", ()):
                choice["stop_reason"] = output.stop_token_id
        if self.flavour == "vllm" and body.get("return_token_ids"):
            choice["token_ids"] = output.token_ids
        if self.flavour == "vllm" and body.get("return_tokens_as_token_ids"):
            tops = [
                {f"token_id:{token}": value} | {f"token_id:{top}": v for top, v in pairs}
                for token, value, pairs in (
                    (token, one.logprob, zip(one.top_token_ids, one.top_logprobs, strict=True))
                    for token, one in zip(output.token_ids, output.logprobs, strict=True)
                )
            ]
            values = [one.logprob for one in output.logprobs]
            choice["logprobs"] = {"token_logprobs": values, "top_logprobs": tops}
        if self.flavour == "llama" and body.get("logprobs"):
            choice["logprobs"] = {"content": [{"id": one} for one in output.token_ids]}
        return choice


@asynccontextmanager
async def serving(
    backend: Backend, port: int = 0, flavour: Flavour = "vllm"
) -> AsyncGenerator[tuple[str, OpenAiServer], None]:
    """A server on loopback."""
    with tempfile.TemporaryDirectory(prefix="unbroken-") as directory:
        server = OpenAiServer(backend, Path(directory), flavour)
        runner = web.AppRunner(server.app(), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        host, bound, *_ = runner.addresses[0]
        try:
            yield f"{host}:{bound}", server
        finally:
            assert runner.server is not None, "it was set up"
            for connection in runner.server.connections:  # As if killed.
                if connection.transport is not None:
                    connection.transport.abort()
            await site.stop()
            await runner.cleanup()
            await asyncio.sleep(0)


async def _tell(response: web.StreamResponse, event: Mapping[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


def _params(body: Mapping[str, Any], vocab_size: int) -> GenerationParams:
    asked = GenerationParams(
        SamplingParams(
            temperature=body.get("temperature", 1.0),
            top_p=body.get("top_p", 1.0),
            top_k=body.get("top_k", 0),
            min_p=body.get("min_p", 0.0),
            seed=body.get("seed"),
            presence_penalty=body.get("presence_penalty", 0.0),
            frequency_penalty=body.get("frequency_penalty", 0.0),
            repetition_penalty=body.get("repetition_penalty", 1.0),
            logit_bias={int(token): bias for token, bias in body.get("logit_bias", {}).items()},
        ),
        StopConditions(
            max_tokens=body.get("max_tokens", 16),
            min_tokens=body.get("min_tokens", 0),
            stop_token_ids=frozenset(body.get("stop_token_ids", ())),
            ignore_eos=body.get("ignore_eos", False),
        ),
        _constraint(body.get("structured_outputs", {})),
        body["logprobs"] if body.get("return_tokens_as_token_ids") else None,
    )
    return params_from_proto(params_to_proto(asked), vocab_size=vocab_size)


def _constraint(outputs: Mapping[str, Any]) -> Constraint | None:
    match list(outputs.items()):
        case []:
            return None
        case [("json", schema)]:
            return Constraint("json_schema", json.dumps(schema))
        case [("json_object", True)]:
            return Constraint("json_object")
        case [("regex", regex)]:
            return Constraint("regex", regex)
        case [("choice", options)]:
            return Constraint("choice", options=tuple(options))
        case other:
            raise InvalidField("structured_outputs", "one kind", other)
