"""The client edge: Generate and Resume over an HTTP/2 of our own (`unbroken/edge/`).

    steps ──▶ calls ──▶ encoding ──▶ one write per connection and step

`encoding` is the one message that is sent a million times.
"""
