"""The conformance suite of engine adapters, and servers that speak the engines' protocols.

The servers behave as the engines do where it matters (docs/decisions/engine-adapters.md), quirks
and refusals included; behind them computes the simulated engine. What they speak comes from the
same package as the adapters' stubs.
"""
