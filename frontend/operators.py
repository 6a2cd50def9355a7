"""Who may operate this frontend: callers of AdminService that bring a token, if a file has some.

    # name    token: 22 or more of [A-Za-z0-9._~+/-]
    deploy    v0Wm3yqk5XQmV2v1W1cJtA
    alice     …

A caller says `authorization: Bearer TOKEN` in its metadata. All tokens are as good as one another;
the names are for the log. docs/decisions/operators.md says why it is so.
"""

import hashlib
import hmac
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import grpc.aio
from typing_extensions import override

from frontend.secret_file import SecretFile, lines_of
from unbroken import log
from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import admin_service_pb2 as pb
from unbroken.v1 import admin_service_pb2_grpc as pb_grpc

HEADER: Final = "authorization"
SCHEME: Final = "Bearer "
OPERATORS_MAX: Final = 64

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64})[ \t]+([A-Za-z0-9._~+/-]{22,512})")
_CHANGES: Final = frozenset({"SetThresholds", "DrainFrontend"})
_Context = grpc.aio.ServicerContext[Any, Any]
_log = log.get_logger(__name__)


class Operators:
    """Those whose tokens are in a file, as it is now."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises OSError or ValueError if there are none to begin with."""
        self._file = SecretFile(path, read, name="operators' tokens", clock=clock)

    def check(self, given: str | bytes | None) -> str:
        """The name of whoever sent this header. Raises NOT_PERMITTED."""
        text = given if isinstance(given, str) else ""
        token = text.removeprefix(SCHEME) if text.startswith(SCHEME) else ""
        digest = _digest(token)
        found = ""
        for known, name in self._file.content.items():  # All of them, whichever it is.
            if hmac.compare_digest(known, digest):
                found = name
        if not found:
            seen = "another" if token else "none"
            raise UnbrokenError(
                Reason.NOT_PERMITTED, f"expected the token of an operator in {HEADER}, got {seen}"
            )
        return found


def read(path: Path) -> Mapping[bytes, str]:
    """Names by digest of the token. Raises OSError, and ValueError that never says the token."""
    names: dict[bytes, str] = {}
    for number, text in lines_of(path, name="operators' tokens"):
        match = _LINE.fullmatch(text)
        if match is None:
            raise ValueError(
                f"line {number}: expected a name and a token of 22 to 512 of [A-Za-z0-9._~+/-]"
            )
        names[_digest(match[2])] = match[1]
    if not 1 <= len(names) <= OPERATORS_MAX:
        raise ValueError(f"expected 1 to {OPERATORS_MAX} tokens, got {len(names)}")
    return names


class ForOperators(pb_grpc.AdminServiceServicer):
    """AdminService, of which others see nothing. A call that is not here is served to nobody."""

    def __init__(self, admin: pb_grpc.AdminServiceServicer, operators: Operators) -> None:
        self._admin: Any = admin  # Its stubs do not say which of its methods are generators.
        self._operators = operators

    @override
    async def ListWorkers(
        self, request: pb.ListWorkersRequest, context: _Context
    ) -> pb.ListWorkersResponse:
        self._check("ListWorkers", context)
        return await self._admin.ListWorkers(request, context)

    @override
    async def GetThresholds(
        self, request: pb.GetThresholdsRequest, context: _Context
    ) -> pb.GetThresholdsResponse:
        self._check("GetThresholds", context)
        return await self._admin.GetThresholds(request, context)

    @override
    async def SetThresholds(
        self, request: pb.SetThresholdsRequest, context: _Context
    ) -> pb.SetThresholdsResponse:
        self._check("SetThresholds", context)
        return await self._admin.SetThresholds(request, context)

    @override
    async def GetLedger(
        self, request: pb.GetLedgerRequest, context: _Context
    ) -> pb.GetLedgerResponse:
        self._check("GetLedger", context)
        return await self._admin.GetLedger(request, context)

    @override
    async def DrainFrontend(
        self, request: pb.DrainFrontendRequest, context: _Context
    ) -> AsyncIterator[pb.DrainFrontendResponse]:
        self._check("DrainFrontend", context)
        async for response in self._admin.DrainFrontend(request, context):
            yield response

    def _check(self, method: str, context: _Context) -> None:
        """Raises NOT_PERMITTED."""
        metadata = dict(context.invocation_metadata() or ())
        name = self._operators.check(metadata.get(HEADER))
        if method in _CHANGES:
            _log.info("asked by an operator", method=method, operator=name)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
