"""HTTP/2 of our own, and gRPC on top of it, so that a message costs tens of microseconds less.

    server   bytes ──▶ connection ──▶ events        (`unbroken/edge`: frontends, sidecars)
    client   bytes ──▶ caller ──▶ events            (`unbroken/calls/`: links, calls to engines)

`frames`, `flow_control`, `allowance`, `headers`, `header_blocks` and `rules` are what both share;
`limits` is what a server allows its clients; `messages` is gRPC. None of them does I/O.
docs/decisions/edge.md and docs/decisions/relay-hop.md say why this exists.
"""
