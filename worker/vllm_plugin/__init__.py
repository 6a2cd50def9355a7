"""A plug-in that lets vLLM go on with another engine's streams (class C) and tell what it holds.

vLLM finds it by the entry point `vllm.general_plugins` in whatever environment it runs in, and
loads it in each of its processes.
"""

from worker.vllm_plugin import continuation, load_tap


def register() -> None:
    """Change vLLM in this process, as far as it is one that is known and somebody wants it."""
    continuation.register()
    load_tap.register()


__all__ = ["register"]
