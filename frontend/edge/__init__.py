"""The client edge: gRPC over an HTTP/2 of our own, so that a token costs about a microsecond.

    bytes ──▶ connection ──▶ events ──▶ server ──▶ calls, or the gRPC server behind
    steps ──▶ calls ──▶ encoding ──▶ connection ──▶ one write per connection and step

What is HTTP/2 and gRPC in it is in `unbroken/http2/`; `encoding` is the one message that is sent a
million times. None of those does I/O. docs/decisions/edge.md says why this exists.
"""
