"""Errors to gRPC statuses and back; the only place of gRPC status codes.

A status of ours always carries a `google.rpc.Status` with an `ErrorInfo` (reason, domain
"unbroken", metadata). `RetryInfo` and the trailer `grpc-retry-pushback-ms` come with errors that
know when to come back, `BadRequest` with those about a field, `QuotaFailure` with those that name
thresholds. docs/ERRORS.md is the callers' page.
"""

import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from inspect import isasyncgenfunction, iscoroutinefunction
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, TypeAlias, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2  # pyright: ignore[reportMissingTypeStubs]
from google.rpc import status_pb2 as rpc_status_pb2  # pyright: ignore[reportMissingTypeStubs]

from unbroken import log
from unbroken.errors import Reason, UnbrokenError

DOMAIN: Final = "unbroken"
"""`ErrorInfo.domain` of all our errors."""

CODES: Final[Mapping[Reason, grpc.StatusCode]] = MappingProxyType(
    {
        Reason.INVALID_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.STREAM_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.REQUEST_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
        Reason.RESUME_TOKEN_INVALID: grpc.StatusCode.PERMISSION_DENIED,
        Reason.RESUME_TOKEN_EXPIRED: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.RESUME_MISMATCH: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.NOT_CONTINUABLE: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.NO_WORKER: grpc.StatusCode.UNAVAILABLE,
        Reason.WORKER_LOST: grpc.StatusCode.UNAVAILABLE,
        Reason.UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
        Reason.MIGRATIONS_EXHAUSTED: grpc.StatusCode.UNAVAILABLE,
        Reason.QUERY_OF_DEATH: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
        Reason.VERSION_MISMATCH: grpc.StatusCode.ABORTED,
        Reason.FENCED: grpc.StatusCode.ABORTED,
        Reason.CANCELLED: grpc.StatusCode.CANCELLED,
        Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
        Reason.REJECTED_BY_ENGINE: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.SEGMENT_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.SEGMENT_BUSY: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.STALE_HANDLE: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.NOT_FENCED: grpc.StatusCode.UNAVAILABLE,
        Reason.GPU_FAILED: grpc.StatusCode.UNAVAILABLE,
        Reason.QUARANTINED: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.CHECKSUM_MISMATCH: grpc.StatusCode.DATA_LOSS,
        Reason.MEMORY_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.NOT_PERMITTED: grpc.StatusCode.PERMISSION_DENIED,
        Reason.DIVERGED: grpc.StatusCode.DATA_LOSS,
        Reason.PROTOCOL_VIOLATION: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.NOT_IMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
        Reason.INTERNAL: grpc.StatusCode.INTERNAL,
    }
)

_CODES_BY_NUMBER: Final = {code.value[0]: code for code in grpc.StatusCode}

MIGRATABLE: Final = frozenset(
    {
        Reason.NO_WORKER,
        Reason.WORKER_LOST,
        Reason.UNREACHABLE,
        Reason.OVERLOADED,
        Reason.DRAINING,
        Reason.INTERNAL,  # A bug that one worker met; how often a stream moves is bounded anyway.
    }
)
"""An attempt that ends so is worth another one elsewhere."""

NOT_MIGRATABLE: Final = frozenset(
    {
        Reason.INVALID_FIELD,
        Reason.MODEL_NOT_FOUND,
        Reason.STREAM_NOT_FOUND,
        Reason.REQUEST_EXISTS,
        Reason.RESUME_TOKEN_INVALID,
        Reason.RESUME_TOKEN_EXPIRED,
        Reason.RESUME_MISMATCH,
        Reason.NOT_CONTINUABLE,
        Reason.MIGRATIONS_EXHAUSTED,
        Reason.QUERY_OF_DEATH,
        Reason.VERSION_MISMATCH,
        Reason.FENCED,
        Reason.CANCELLED,
        Reason.DEADLINE_EXCEEDED,
        Reason.REJECTED_BY_ENGINE,
        # Of the memory service: without what is kept there, a worker computes it again.
        Reason.SEGMENT_NOT_FOUND,
        Reason.SEGMENT_BUSY,
        Reason.STALE_HANDLE,
        Reason.NOT_FENCED,
        Reason.GPU_FAILED,
        Reason.QUARANTINED,
        Reason.CHECKSUM_MISMATCH,
        Reason.MEMORY_EXHAUSTED,
        Reason.NOT_PERMITTED,
        Reason.DIVERGED,
        Reason.PROTOCOL_VIOLATION,
        Reason.NOT_IMPLEMENTED,
    }
)
"""An attempt that ends so would end so everywhere, or must not go on."""

# A status without our details was made by the gRPC library or by a proxy, not by a process of ours.
_REASONS_OF_BARE_CODES: Final[Mapping[grpc.StatusCode, Reason]] = MappingProxyType(
    {
        grpc.StatusCode.UNAVAILABLE: Reason.UNREACHABLE,
        grpc.StatusCode.CANCELLED: Reason.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED: Reason.NOT_IMPLEMENTED,
        grpc.StatusCode.INVALID_ARGUMENT: Reason.INVALID_FIELD,
        grpc.StatusCode.OUT_OF_RANGE: Reason.INVALID_FIELD,
        grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.INVALID_FIELD,  # gRPC: the message is too large.
        grpc.StatusCode.NOT_FOUND: Reason.STREAM_NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS: Reason.REQUEST_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION: Reason.NOT_CONTINUABLE,
        grpc.StatusCode.ABORTED: Reason.FENCED,
        grpc.StatusCode.DATA_LOSS: Reason.DIVERGED,
    }
)

_DETAILS_KEY: Final = "grpc-status-details-bin"
_PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"
# The status travels in HTTP/2 trailers, for which peers accept 8 KiB by default, and the detail is
# in there twice.
_DETAIL_CHARS_MAX: Final = 1000
_METADATA_CHARS_MAX: Final = 200

Trailers: TypeAlias = tuple[tuple[str, str | bytes], ...]

if TYPE_CHECKING:  # A generic class in the stubs only.
    _Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]

_log = log.get_logger(__name__)


def to_status(error: UnbrokenError) -> rpc_status_pb2.Status:
    """The `google.rpc.Status` that stands for `error`."""
    detail = _shortened(error.detail, _DETAIL_CHARS_MAX)
    metadata = {
        key: _shortened(value, _METADATA_CHARS_MAX) for key, value in error.metadata.items()
    }
    status = rpc_status_pb2.Status(code=CODES[error.reason].value[0], message=detail)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=metadata)
    )
    if error.retry_after_s is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromMilliseconds(_pushback_ms(error.retry_after_s))
        status.details.add().Pack(info)
    if error.reason is Reason.INVALID_FIELD and "field" in metadata:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=metadata["field"], description=detail, reason=error.reason.value
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.reason is Reason.OVERLOADED and "thresholds" in metadata:
        quota = error_details_pb2.QuotaFailure()
        for name in metadata["thresholds"].split(","):
            quota.violations.add(
                subject=f"model:{metadata.get('model', '')}",
                description=metadata.get(name, name),
                quota_id=name,
            )
        status.details.add().Pack(quota)
    return status


async def abort(
    context: grpc.aio.ServicerContext[Any, Any], error: UnbrokenError, more: Trailers = ()
) -> NoReturn:
    """End the call with the status of `error`, and with `more` trailers; does not return."""
    _, detail, trailers = trailing(error)
    await context.abort(CODES[error.reason], detail, (*trailers, *more))
    raise AssertionError("abort returned")  # It never does.


def trailing(error: UnbrokenError) -> tuple[int, str, Trailers]:
    """The code, the message and the trailers with which a call that failed of `error` ends."""
    status = to_status(error)
    trailers: list[tuple[str, str | bytes]] = [(_DETAILS_KEY, status.SerializeToString())]
    if error.retry_after_s is not None:
        trailers.append((_PUSHBACK_KEY, str(_pushback_ms(error.retry_after_s))))
    return status.code, status.message, tuple(trailers)


def undecodable(data: bytes, error: DecodeError) -> UnbrokenError:
    """A caller sent bytes that are no message."""
    detail = f"expected a message, got {len(data)} bytes that are none: {error}"
    return UnbrokenError(Reason.PROTOCOL_VIOLATION, detail)


def rpc_error(
    code: int, detail: str, trailers: Iterable[tuple[str, str | bytes]]
) -> grpc.aio.AioRpcError:
    """The failure of a call that was not grpc.aio's own, as grpc.aio would have raised it.

    `code` is gRPC's number of the status; one that it does not know is UNKNOWN.
    """
    return grpc.aio.AioRpcError(
        _CODES_BY_NUMBER.get(code, grpc.StatusCode.UNKNOWN),
        grpc.aio.Metadata(),
        grpc.aio.Metadata(*trailers),
        detail,
    )


def from_rpc_error(error: grpc.RpcError) -> UnbrokenError:
    """What a failed call means. Without our details, the best reason for its code."""
    call = cast("grpc.aio.AioRpcError", error)  # Errors of sync calls have the same methods.
    code, detail = call.code(), call.details() or ""
    trailers = list(call.trailing_metadata() or ())
    for key, value in trailers:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                status = rpc_status_pb2.Status.FromString(value)
            except DecodeError:
                break
            if (known := _from_status(status, code)) is not None:
                return known
    reason = _REASONS_OF_BARE_CODES.get(code, Reason.INTERNAL)
    return UnbrokenError(reason, detail or code.name, metadata={"grpc_code": code.name})


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what handlers raise into statuses.

    An `UnbrokenError` becomes its own status. Anything else is a bug: the log gets the traceback
    under an id, the caller gets INTERNAL and that id and nothing else. Handlers are async; a method
    left to the generated servicer is NOT_IMPLEMENTED. A request that is no message is a
    PROTOCOL_VIOLATION; in a stream of requests, reading it raises that.
    """

    def __init__(self, trailers: Callable[[], Trailers] = tuple) -> None:
        """`trailers` are added to the end of every call, good or bad."""
        self._trailers = trailers

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if handler.request_streaming and handler.response_streaming:
            behavior, rebuild = handler.stream_stream, grpc.stream_stream_rpc_method_handler
        elif handler.request_streaming:
            behavior, rebuild = handler.stream_unary, grpc.stream_unary_rpc_method_handler
        elif handler.response_streaming:
            behavior, rebuild = handler.unary_stream, grpc.unary_stream_rpc_method_handler
        else:
            behavior, rebuild = handler.unary_unary, grpc.unary_unary_rpc_method_handler
        return cast("Any", rebuild)(
            _guarded(cast("Callable[..., Any]", behavior), method, self._trailers),
            request_deserializer=_checked(
                handler.request_deserializer, is_raised=handler.request_streaming
            ),
            response_serializer=handler.response_serializer,
        )


class _Undecodable(NamedTuple):
    """Stands for a request that could not be decoded."""

    error: UnbrokenError


def _checked(
    deserializer: "Callable[[bytes], Any] | None", *, is_raised: bool
) -> "Callable[[bytes], Any] | None":
    """`deserializer`, but what it cannot decode raises `UnbrokenError`, or is an `_Undecodable`.

    Raising is for handlers that read by themselves. Left alone, gRPC would take a caller's garbage
    for our bug and answer UNKNOWN.
    """
    if deserializer is None:
        return None

    def deserialize(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError as error:
            violation = undecodable(data, error)
            if is_raised:
                raise violation from error
            return _Undecodable(violation)

    return deserialize


def _guarded(
    behavior: Callable[..., Any], method: str, trailers: Callable[[], Trailers]
) -> Callable[..., Any]:
    """`behavior` of the same kind (async generator or coroutine), its exceptions translated."""
    if isasyncgenfunction(behavior):

        async def generate(
            request: object, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[object]:
            if isinstance(request, _Undecodable):
                await abort(context, request.error, trailers())
            try:
                async with aclosing(behavior(request, context)) as responses:
                    async for response in responses:
                        yield response
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await abort(context, translated(error, method), trailers())
            context.set_trailing_metadata(trailers())

        return generate

    if not iscoroutinefunction(behavior):  # What generated servicers have until overridden.

        async def refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
            error = UnbrokenError(Reason.NOT_IMPLEMENTED, f"{method} is not served here")
            await abort(context, error, trailers())

        return refuse

    async def respond(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> object:
        if isinstance(request, _Undecodable):
            await abort(context, request.error, trailers())
        try:
            response = await behavior(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, translated(error, method), trailers())
        context.set_trailing_metadata(trailers())
        return response

    return respond


def translated(error: Exception, method: str) -> UnbrokenError:
    """What a handler raised, as callers are told; what is a bug, the log is told."""
    cause: BaseException = error
    while isinstance(cause, BaseExceptionGroup):  # A task group wraps even a single failure.
        inner = list(cast("BaseExceptionGroup[BaseException]", cause).exceptions)
        if len(inner) > 1:
            break
        cause = inner[0]
    if isinstance(cause, UnbrokenError):
        # gRPC keeps the exception of an abort in a cycle; a traceback keeps the handler's frame.
        return cause.with_traceback(None)
    error_id = secrets.token_hex(8)
    _log.error("call failed by a bug", method=method, error_id=error_id, exc_info=error)
    return UnbrokenError(
        Reason.INTERNAL,
        f"internal error {error_id}; the server's log has it under this id",
        metadata={"error_id": error_id},
    )


def _from_status(status: rpc_status_pb2.Status, code: grpc.StatusCode) -> UnbrokenError | None:
    """None unless the status is one of ours."""
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    retry_after_s: float | None = None
    is_ours = False
    for packed in status.details:
        try:
            if packed.Unpack(retry):
                retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
            elif packed.Unpack(info):
                is_ours = info.domain == DOMAIN
        except DecodeError:
            continue
    if not is_ours:
        return None
    metadata = dict(info.metadata)
    try:
        reason = Reason(info.reason)
    except ValueError:  # A newer peer.
        reason = _REASONS_OF_BARE_CODES.get(code, Reason.INTERNAL)
        metadata["reason"] = info.reason
    return UnbrokenError(reason, status.message, metadata=metadata, retry_after_s=retry_after_s)


def _pushback_ms(retry_after_s: float) -> int:
    return max(0, math.ceil(retry_after_s * 1000))


def _shortened(text: str, chars_max: int) -> str:
    return text if len(text) <= chars_max else f"{text[: chars_max - 1]}…"
