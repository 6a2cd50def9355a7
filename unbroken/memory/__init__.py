"""Memory that outlives its engine, as processes of a host use it.

`keys` names KV blocks, `records` is how a block in shared memory says what it is, `channel` carries
messages and descriptors, `client` is the library on top.
"""
