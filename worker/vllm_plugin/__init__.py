"""A plug-in that lets vLLM go on with a stream where another engine left it (class C).

vLLM finds it by the entry point `vllm.general_plugins` in whatever environment it runs in, and
loads it in each of its processes.
"""

from worker.vllm_plugin.continuation import register

__all__ = ["register"]
