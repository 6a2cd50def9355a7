"""The client edge: gRPC over an HTTP/2 of our own, so that a token costs about a microsecond.

    bytes ──▶ connection ──▶ events ──▶ server ──▶ calls, or the gRPC server behind
    steps ──▶ calls ──▶ encoding ──▶ connection ──▶ one write per connection and step

`frames`, `flow_control`, `allowance`, `headers`, `limits` and `connection` are HTTP/2; `messages`
is gRPC on top of it; `encoding` is the one message that is sent a million times. None of them does
I/O. docs/decisions/edge.md says why this exists.
"""
