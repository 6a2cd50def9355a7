"""A request whose last prompt ids are its own output already, taken up as after a preemption.

    server  InputProcessor           the sidecar's word is checked, and put where no client writes
    core    Request                  the last ids of the prompt become output: budgets, stops
            StructuredOutputManager  the grammar has accepted them
            NewRequestData           a worker gets all ids again
    worker  CachedRequestState       the last ids become output: penalties, min_tokens; and the
                                     generator has drawn for each of them

What vLLM keeps of a request that was preempted is just this, so it goes on as with one. All of it
is private to vLLM, so it is changed as `changes` says; and a continuation is refused for the model
runner V2, beside speculative decoding, a KV connector or a reasoning parser. Nothing is done
without a key in the environment (`UNBROKEN_CONTINUATION_KEY`), which only the sidecar of this
engine knows. What is not done here is seen there: a sidecar believes that an engine continues once
it has done so.

Of a seeded request the sampler for CPUs draws once a token. That of GPUs draws otherwise, and was
not tested: there a seeded request is refused.

A prefill in several steps draws at the end of each, and vLLM takes back what it discards by moving
the generator's offset. Those of CPUs have none, and its core dies of that; a continuation makes it
likelier, with a prefill of prompt and output. So here every seeded request on a CPU gets one whose
last draw can be taken back.
"""

import hmac
import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

from worker.vllm_plugin.changes import Change, Method, change_all

KEY_VARIABLE: Final = "UNBROKEN_CONTINUATION_KEY"
FIELD: Final = "unbroken_continuation"
"""In `kv_transfer_params`: {"key": …, "num_output": …}."""

_NOTE: Final = "unbroken_num_output"
"""In `extra_args`: what the server found; it passes on nobody else's."""
_DRAW: Final = 4
"""By how much vLLM moves an offset for a draw."""

_log = logging.getLogger("vllm.unbroken")


def register() -> None:
    """Change vLLM in this process, if it is one that is known and wanted. Idempotent."""
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        _log.info("unbroken: no %s, so no stream is continued natively", KEY_VARIABLE)
    else:
        change_all(lambda: (_of_server(key), *_of_core(), _of_worker()))


def num_output_of(params: Any) -> int:
    """How many of a request's last ids are output, as the server noted; 0 for most."""
    args: Mapping[str, Any] | None = getattr(params, "extra_args", None)
    return args.get(_NOTE, 0) if args else 0


def take_note(params: Any, num_prompt: int, key: str) -> int:
    """Replace what a client says of a continuation by a note, if it may. Raises ValueError."""
    args: dict[str, Any] = dict(getattr(params, "extra_args", None) or {})
    args.pop(_NOTE, None)
    transfer: dict[str, Any] = dict(args.pop("kv_transfer_params", None) or {})
    said = transfer.pop(FIELD, None)
    if transfer:
        args["kv_transfer_params"] = transfer
    num_output = 0 if said is None else _checked(said, num_prompt, key)
    if num_output:
        args[_NOTE] = num_output
    params.extra_args = args or None
    return num_output


def _checked(said: Any, num_prompt: int, key: str) -> int:
    """How many ids are output. Raises ValueError."""
    told = _mapping(said)
    known = told.get("key")
    if not isinstance(known, str) or not hmac.compare_digest(known.encode(), key.encode()):
        raise ValueError(f"{FIELD}: only this engine's sidecar may ask for it")
    num_output: Any = told.get("num_output")
    is_in_range = isinstance(num_output, int) and 0 < num_output < num_prompt
    if not is_in_range or num_output is True:
        raise ValueError(f"{FIELD}: expected 0 < num_output < {num_prompt}, got {num_output!r}")
    return num_output


def split(prompt: list[int], num_output: int) -> tuple[list[int], list[int]]:
    """Prompt and output."""
    return prompt[:-num_output], prompt[-num_output:]


def _of_server(key: str) -> Change:
    def checking(process: Method) -> Method:
        def process_inputs(
            self: Any, request_id: str, prompt: Any, params: Any, *more: Any, **named: Any
        ) -> Any:
            num_output = 0
            if getattr(params, "extra_args", None):
                params = params.clone()
                num_output = take_note(params, _num_ids(prompt), key)
            if num_output and (why := _unfit(self.vllm_config, params)):
                raise ValueError(f"{FIELD}: {why}")
            return process(self, request_id, prompt, params, *more, **named)

        return process_inputs

    return Change("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs", checking)


def _num_ids(prompt: Any) -> int:
    ids = _mapping(prompt).get("prompt_token_ids")
    return len(ids) if ids is not None else 0


def _mapping(value: Any) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], value) if isinstance(value, dict) else {}


def _unfit(config: Any, params: Any) -> str:
    """Why this engine cannot do it for this request; empty if it can.

    What is about the engine is refused for every request: a sidecar asks once, with one of them.
    """
    platform = importlib.import_module("vllm.platforms").current_platform
    if config.use_v2_model_runner:
        return "not with the model runner V2"
    if config.speculative_config is not None:
        return "not beside speculative decoding"
    if config.kv_transfer_config is not None:
        return "not beside a KV connector"
    if config.structured_outputs_config.reasoning_parser:  # Grammars begin after the reasoning.
        return "not beside a reasoning parser"
    if params.seed is not None and params.temperature > 0 and not platform.is_cpu():
        return "no seeds but on CPUs"
    return ""


def _of_core() -> Sequence[Change]:
    def dividing(make: Method) -> Method:
        def from_engine_core_request(cls: Any, *more: Any, **named: Any) -> Any:
            request = make(cls, *more, **named)
            num_output = num_output_of(request.sampling_params)
            if num_output:
                prompt, output = split(list(request.prompt_token_ids), num_output)
                request.prompt_token_ids = prompt
                request.num_prompt_tokens = len(prompt)
                request._output_token_ids.extend(output)
                # So it is one that comes back: its cached prefix may reach into its output.
                request.num_preemptions = 1
            return request

        return from_engine_core_request

    def whole(make: Method) -> Method:
        def from_request(cls: Any, request: Any, *more: Any, **named: Any) -> Any:
            data = make(cls, request, *more, **named)
            num_output = num_output_of(request.sampling_params)
            if num_output:
                output = list(request.output_token_ids[:num_output])
                data.prompt_token_ids = [*request.prompt_token_ids, *output]
            return data

        return from_request

    def advanced(make: Method) -> Method:
        def create_grammar(self: Any, request: Any) -> Any:
            grammar = make(self, request)
            num_output = num_output_of(request.sampling_params)
            output = list(request.output_token_ids[:num_output])
            if num_output and not grammar.accept_tokens(request.request_id, output):
                raise ValueError(f"{FIELD}: the output so far does not follow the grammar")
            return grammar

        return create_grammar

    return (
        Change("vllm.v1.request", "Request", "from_engine_core_request", dividing),
        Change("vllm.v1.core.sched.output", "NewRequestData", "from_request", whole),
        Change("vllm.v1.structured_output", "StructuredOutputManager", "_create_grammar", advanced),
    )


def _of_worker() -> Change:
    generator_of = _generators()

    def dividing(begin: Method) -> Method:
        def post_init(self: Any) -> None:
            num_output = num_output_of(self.sampling_params)
            if num_output:
                prompt, output = split(list(self.prompt_token_ids), num_output)
                self.prompt_token_ids = prompt
                self.output_token_ids = output
            if self.generator is not None and self.generator.device.type == "cpu":
                self.generator = generator_of(self)
            begin(self)

        return post_init

    return Change("vllm.v1.worker.gpu_input_batch", "CachedRequestState", "__post_init__", dividing)


def _generators() -> Callable[[Any], Any]:
    """What makes the generator of a seeded request, as it is after the output so far."""
    torch: Any = importlib.import_module("torch")

    class Rewindable(torch.Generator):
        """One for a CPU. vLLM says `set_offset(get_offset() - 4)` to take back its last draw."""

        request: Any

        def get_offset(self) -> int:
            return _DRAW

        def set_offset(self, offset: int) -> None:
            """Draw anew for the tokens that the request has, as `TopKTopPSampler.forward_cpu`."""
            del offset
            self.manual_seed(self.initial_seed())
            for _ in self.request.output_token_ids:
                torch.randint(0, 2**31, (1,), generator=self, dtype=torch.long)

    def generator_of(request: Any) -> Any:
        generator: Any = Rewindable()
        generator.request = request
        generator.manual_seed(request.generator.initial_seed())
        generator.set_offset(0)
        return generator

    return generator_of
