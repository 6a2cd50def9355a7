"""A gRPC server of our own, before grpcio's: what is answered for every token costs a microsecond.

    bytes ──▶ http2/connection ──▶ events ──▶ server ──▶ calls of its own, or the server behind
    news  ──▶ calls of its own ──▶ http2/connection ──▶ one write per connection and step

A frontend answers Generate and Resume so (`frontend/edge/`), a sidecar Relay (`sidecar/relay.py`).
docs/decisions/edge.md and docs/decisions/relay-hop.md say why this exists.
"""
