"""Beside each engine: relay, ledger, supervision, KV accounting, health."""
