"""What a call ends with on the wire: the Python client of gRPC hides the load from its callers."""

import asyncio
import base64

from tests.frontend.edge.peer import REQUEST, data
from tests.frontend.edge.raw import connect
from unbroken.http2.messages import PREFIX
from unbroken.orca import TRAILER
from unbroken.third_party.orca_load_report_pb2 import OrcaLoadReport


async def answer(address: str, path: str, message: bytes) -> dict[bytes, bytes]:
    """All header fields of the answer to a call."""
    fields = [(name, path.encode() if name == b":path" else value) for name, value in REQUEST]
    async with asyncio.timeout(10), connect(address) as client:
        client.request(1, fields)
        client.say(data(1, PREFIX.pack(0, len(message)) + message, ends=True))
        return await client.answer(1)


def load_in(fields: dict[bytes, bytes]) -> OrcaLoadReport:
    """The report in an answer, which has to have one."""
    value = fields[TRAILER.encode()]
    return OrcaLoadReport.FromString(base64.b64decode(value + b"=" * (-len(value) % 4)))
