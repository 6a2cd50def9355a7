"""gRPC calls over our own HTTP/2: the clients' counterpart of `unbroken/edge`.

`transport` is a socket with a caller (`unbroken/http2/caller.py`) on it; a frontend's Relay calls
are on one. `channel` is for many calls of the usual kinds to one server, as a sidecar makes them
to its engine. docs/decisions/relay-hop.md and docs/decisions/engine-adapters.md say what it saves.
"""
