"""Whatever speaks OpenAI's HTTP: vLLM, llama.cpp's server, and everything else as far as it goes.

Prompts go out as ids. What comes back is ids where the server has them (vLLM: `return_token_ids`;
llama.cpp: with log probabilities), and otherwise text that is tokenised anew, piece by piece. Text
has many tokenisations and only one is the stream's, so such an engine is never taken for exact.

Which server it is shows in what it answers besides OpenAI's own calls. What a server would leave
out in silence is refused before it is asked.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import aiohttp
from typing_extensions import override

from sidecar.engines.adapter import (
    Adapter,
    Call,
    CallFailed,
    Delta,
    Discovered,
    LoadOfRank,
    NotReady,
    Tapped,
    Unhealthy,
    Unusable,
)
from sidecar.engines.model_directory import read_directory
from sidecar.engines.openai_words import (
    LLAMA,
    OTHER,
    VLLM,
    Ids,
    Reading,
    body_of,
    kind_of,
    lacking,
    listed,
    mapping,
    number,
    parsed,
)
from sidecar.engines.tokenizer_files import BadTokenizer
from sidecar.engines.tokenizer_process import read_asset
from sidecar.engines.vllm_metrics import ranks_of
from unbroken.outcome import FailureKind
from unbroken.tokenizer import Tokenizer

EVENT_BYTES_MAX: Final = 4 * 1024 * 1024
"""Of one event of a stream."""
ANSWER_BYTES_MAX: Final = 16 * 1024 * 1024
"""Of an answer that is no stream."""

_DONE: Final = b"[DONE]"
_ASK_TIMEOUT_S: Final = 10.0
_CONNECT_TIMEOUT_S: Final = 5.0
_LOAD_INTERVAL_S: Final = 1.0
"""Between two looks at the metrics: they are a long page."""


class OpenAiAdapter(Adapter):
    """One server."""

    health_timeout_s = 10.0

    def __init__(self, address: str, tokenizer: Path | None = None) -> None:
        """`address` is host:port or a URL; `tokenizer` a directory with its files."""
        self._url = address.rstrip("/") if "://" in address else f"http://{address}"
        self._tokenizer_path = tokenizer
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        )
        self._product = OTHER
        self._model = ""
        self._ids = Ids.NOWHERE
        self._takes_ids = True
        self._num_ranks = 1
        self._tokenizer: Tokenizer | None = None
        self._load: Sequence[LoadOfRank] = ()
        self._load_at: float | None = None

    @override
    async def discover(self) -> Discovered:
        try:
            async with asyncio.timeout(6 * _ASK_TIMEOUT_S):
                return await self._describe()
        except TimeoutError:
            raise NotReady("it does not say what it is") from None
        except (aiohttp.ClientError, CallFailed) as error:
            raise NotReady(f"{error}") from error
        except BadTokenizer as error:
            raise Unusable(f"its tokenizer cannot be used: {error}") from error

    async def _describe(self) -> Discovered:
        models = await self._get("/v1/models")
        if models is None:
            raise Unusable(f"{self._url}: expected OpenAI's API, it has no /v1/models")
        found = listed(models.get("data"))
        if not found:
            raise NotReady("it lists no model")
        model = mapping(found[0])
        self._model = str(model.get("id", ""))
        version, context_length = "", number(model.get("max_model_len"))
        batch_size_max = block_size = kv_blocks = 0
        if (told := await self._get("/version")) is not None and "version" in told:
            self._product, version = VLLM, str(told["version"])
            ranks = ranks_of(await self._metrics())
            self._num_ranks = max(1, len(ranks))
            block_size = max((one.block_size for one in ranks), default=0)
            kv_blocks = max((one.kv_blocks for one in ranks), default=0)
        elif (props := await self._get("/props")) is not None and "build_info" in props:
            self._product, version = LLAMA, str(props["build_info"])
            settings = mapping(props.get("default_generation_settings"))
            context_length = number(settings.get("n_ctx")) or context_length
            batch_size_max = number(props.get("total_slots"))
        asset = await read_asset(await self._files(str(model.get("root", ""))))
        await self._try(asset.bos_token_id if asset.bos_token_id is not None else 1)
        if self._ids is Ids.NOWHERE or not self._takes_ids:
            # It parses once more, and this process stands still meanwhile: before it serves.
            self._tokenizer = await asyncio.to_thread(Tokenizer, asset)
        return Discovered(
            kind=self._product.kind,
            version=version,
            model=self._model,
            context_length=context_length,
            tokenizer=asset,
            capabilities=self._product.capabilities,
            block_size=block_size,
            kv_blocks=kv_blocks,
            batch_size_max=batch_size_max,
            num_ranks=self._num_ranks,
            has_own_ids=self._ids is not Ids.NOWHERE,
            facts={"protocol": "openai", "root": str(model.get("root", ""))},
        )

    async def _files(self, root: str) -> Mapping[str, bytes]:
        """The tokenizer's files, from the operator or from where the engine has its model."""
        path = self._tokenizer_path or Path(root)
        if self._tokenizer_path is None and (not root or not await asyncio.to_thread(path.is_dir)):
            raise BadTokenizer("say where its files are with --engine-tokenizer")
        return await asyncio.to_thread(read_directory, path)

    async def _try(self, token_id: int) -> None:
        """Learn from one token how the server takes prompts and gives tokens."""
        plain = {"model": self._model, "prompt": [token_id], "max_tokens": 1, "temperature": 0}
        more = {"return_token_ids": True, "logprobs": 1, "ignore_eos": True}
        texts = plain | {"prompt": "a"}
        for body in (plain | more, plain, texts):
            self._takes_ids = body is not texts
            try:
                answer = await self._post(body)
            except CallFailed as failed:
                if failed.failure is not FailureKind.REJECTED or body is texts:
                    raise
                continue
            choice = mapping((listed(answer.get("choices")) or [None])[0])
            content = listed(mapping(choice.get("logprobs")).get("content"))
            if listed(choice.get("token_ids")):
                self._ids = Ids.OWN_FIELD
            elif content and "id" in mapping(content[0]):
                self._ids = Ids.IN_LOGPROBS
            return

    @override
    async def generate(self, call: Call) -> AsyncGenerator[Delta]:
        if (what := lacking(call, self._product)) is not None:
            raise CallFailed(FailureKind.REJECTED, f"{self._product.kind} has no {what}")
        reading = Reading(call, self._ids, self._product, self._tokenizer)
        prompt = list(call.prompt) if self._takes_ids else self._spelled(call.prompt)
        body = body_of(call, self._product, self._ids, model=self._model, prompt=prompt)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"X-Request-Id": call.request_id}
        if call.rank is not None and self._num_ranks > 1:
            # Among those of this server, whatever numbers its metrics give them.
            headers["X-data-parallel-rank"] = str(call.rank)
        try:
            async with self._session.post(
                f"{self._url}/v1/completions", json=body, headers=headers
            ) as response:
                if response.status != 200:
                    raise _refused(response, await _text(response))
                async for event in _events(response.content.iter_any()):
                    delta = reading.heard(event)
                    if delta is not None:
                        yield delta
                        if delta.end is not None:
                            return
        except aiohttp.ClientError as error:
            raise CallFailed(FailureKind.CRASH, f"{type(error).__name__}: {error}") from error
        if (end := reading.ended()) is not None:
            yield end

    def _spelled(self, token_ids: Sequence[int]) -> str:
        assert self._tokenizer is not None, "discovered before"
        return b"".join(self._tokenizer.pieces[one] for one in token_ids).decode(errors="replace")

    @override
    async def abort(self, request_id: str) -> None:
        """Closing the connection is what these servers understand."""

    @override
    async def check_health(self) -> None:
        try:
            for path in ("/health", "/v1/models"):
                async with self._session.get(f"{self._url}{path}") as response:
                    if response.status == 200:
                        return
                    if response.status != 404:
                        raise Unhealthy(f"{path} says {response.status}")
        except aiohttp.ClientError as error:
            raise Unhealthy(f"the engine refuses calls: {error}") from error

    @override
    async def load(self) -> Sequence[LoadOfRank]:
        if self._product is not VLLM:
            return ()
        now = asyncio.get_running_loop().time()
        if self._load_at is None or now - self._load_at >= _LOAD_INTERVAL_S:
            self._load_at = now
            self._load = [one.load for one in ranks_of(await self._metrics())]
        return self._load

    @override
    async def taps(self) -> AsyncIterator[Tapped]:
        return
        yield  # Never; it makes this a generator.

    @override
    async def close(self) -> None:
        await self._session.close()

    async def _metrics(self) -> str:
        """vLLM's page."""
        try:
            async with self._session.get(f"{self._url}/metrics") as response:
                return await _text(response) if response.status == 200 else ""
        except aiohttp.ClientError as error:
            raise CallFailed(FailureKind.CRASH, f"{error}") from error

    async def _get(self, path: str) -> Mapping[str, object] | None:
        """A JSON object; None if there is none at this path."""
        async with self._session.get(f"{self._url}{path}") as response:
            if response.status in (404, 405, 501):
                return None
            if response.status != 200:
                raise NotReady(f"{path} says {response.status}")
            return parsed(await _text(response))

    async def _post(self, body: Mapping[str, object]) -> Mapping[str, object]:
        async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
            text = await _text(response)
            if response.status != 200:
                raise _refused(response, text)
            return parsed(text)


async def _events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[Mapping[str, object]]:
    """The events of a stream, up to its end. Raises `CallFailed`."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > EVENT_BYTES_MAX:
            raise CallFailed(FailureKind.PROTOCOL, f"an event of more than {EVENT_BYTES_MAX} bytes")
        for line in lines:
            data = _data(line)
            if data == _DONE:
                return
            if data:
                yield parsed(data)
    data = _data(rest)  # A last line needs no end.
    if data and data != _DONE:
        try:
            event = parsed(data)
        except CallFailed:
            return  # It was cut: that is none.
        yield event


def _data(line: bytes) -> bytes:
    """What a line of a stream says; nothing if it is for others."""
    return line[5:].strip() if line.startswith(b"data:") else b""


def _refused(response: aiohttp.ClientResponse, text: str) -> CallFailed:
    kind = kind_of(response.status)
    after = response.headers.get("Retry-After", "")
    retry_after_s = float(after) if after.isdecimal() else None
    return CallFailed(kind, f"HTTP {response.status}: {text[:500]}", retry_after_s=retry_after_s)


async def _text(response: aiohttp.ClientResponse) -> str:
    """An answer of bounded size. Raises `CallFailed`."""
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > ANSWER_BYTES_MAX:
            raise CallFailed(FailureKind.PROTOCOL, f"an answer of over {ANSWER_BYTES_MAX} bytes")
    return data.decode(errors="replace")
