"""Servers in this process, for the length of a test."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import grpc.aio

from unbroken import transport


@asynccontextmanager
async def serving(
    *add_servicers: Callable[[grpc.aio.Server], object],
    keepalive: transport.Keepalive = transport.MESH_KEEPALIVE,
    receive_bytes_max: int = transport.RECEIVE_BYTES_MAX,
) -> AsyncGenerator[str, None]:
    """A server with our presets on a port that the kernel chose; yields its address."""
    server = transport.make_server(keepalive=keepalive, receive_bytes_max=receive_bytes_max)
    for add_servicer in add_servicers:
        add_servicer(server)
    address = transport.listen(server, "127.0.0.1:0")
    await server.start()
    try:
        yield address
    finally:
        await server.stop(0)
