"""A call that is to take over a stream while the one before still delivers (`DrainNotice`).

The stream is asked for at another frontend, from what its client has then. Until that one brings
output the client reads on where it is, and so it has more by then: `Received` sees to the overlap.
"""

import asyncio
from typing import TYPE_CHECKING, Final, TypeAlias

import grpc
import grpc.aio

from unbroken import status
from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import inference_service_pb2 as pb

if TYPE_CHECKING:  # Generic classes in the stubs only.
    _ResumeCall: TypeAlias = grpc.aio.UnaryStreamCall[pb.ResumeRequest, pb.ResumeResponse]

AHEAD_MAX: Final = 16
"""Messages without output before the first that has some."""


class Successor:
    """One such call, from its beginning to its first output."""

    def __init__(self, call: "_ResumeCall", frontend: int, asked: pb.ResumeRequest) -> None:
        """`frontend` is the index of who is `asked`."""
        self.call = call
        self.frontend = frontend
        self.asked = asked
        self.began = asyncio.create_task(self._begin(), name="successor")
        """Done when it has output, or never will."""
        self.began.add_done_callback(_seen)

    def messages(self) -> list[pb.GenerateResponse]:
        """What it has told, to the first output; raises `UnbrokenError` if there is none."""
        try:
            return self.began.result()
        except grpc.RpcError as error:
            raise status.from_rpc_error(error) from error
        except asyncio.CancelledError:
            raise UnbrokenError(Reason.UNREACHABLE, "the call was cancelled") from None

    def close(self) -> None:
        """It is not needed. Idempotent."""
        self.began.cancel()
        self.call.cancel()

    async def _begin(self) -> list[pb.GenerateResponse]:
        told: list[pb.GenerateResponse] = []
        while len(told) < AHEAD_MAX:
            message = await self.call.read()
            if not isinstance(message, pb.ResumeResponse):
                break
            response = message.response
            told.append(response)
            if response.token_ids or response.text or response.HasField("finished"):
                return told
        raise UnbrokenError(Reason.PROTOCOL_VIOLATION, "expected output of Resume, got none")


def _seen(began: "asyncio.Task[list[pb.GenerateResponse]]") -> None:
    """Whoever does not need it does not want to know why it failed either."""
    if not began.cancelled():
        began.exception()
