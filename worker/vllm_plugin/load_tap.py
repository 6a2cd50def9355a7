"""Tells the sidecar what vLLM's scheduler holds, at the moment when that changes.

What vLLM says of its load passes through its API server, which falls behind while it is busy, and
then has to be asked for. The scheduler itself knows it at once. In the core it listens at the
socket named by `UNBROKEN_LOAD_TAP`, which a sidecar chooses for the engine that it starts; whoever
connects is told, after each plan, each result and each request that is let go of:

    {"blocks": 12, "blocks_total": 63, "running": 3, "waiting": 1, "waiting_tokens": 70}

one message each, and only if something is different. What waits may have run before: a request that
was preempted holds no blocks, and takes all of them again when there is room. A listener that does
not read is left, since a message that it misses may be the last for long; it may connect again. Not
with several data-parallel ranks: each would need its own.
"""

import contextlib
import itertools
import json
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from worker.vllm_plugin.changes import Change, Method, change_all

VARIABLE: Final = "UNBROKEN_LOAD_TAP"
TAP: Final = "unbroken_tap"
"""The attribute of a scheduler that holds its own."""
LISTENERS_MAX: Final = 4
"""More are not accepted."""
COUNTED_MAX: Final = 1000
"""Requests whose tokens are counted: this is done in each step."""

_log = logging.getLogger("vllm.unbroken")


class Tap:
    """One core's end. Nothing waits, and nothing fails once it is there."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()  # Of the engine's life before.
            self._server.bind(str(path))
            self._server.listen(LISTENERS_MAX)
        except OSError:
            self._server.close()
            raise
        self._listeners: dict[socket.socket, bytes] = {}
        """Each with what it was told last."""

    def tell(self, load: Mapping[str, int]) -> None:
        """Tell all who do not know it."""
        self._accept()
        message = json.dumps(load).encode()
        for listener, last in list(self._listeners.items()):
            if message == last:
                continue
            try:
                listener.send(message)
            except OSError:  # It has left, or does not read: this may be the last for long.
                del self._listeners[listener]
                listener.close()
            else:
                self._listeners[listener] = message

    def close(self) -> None:
        """Nobody is told any more."""
        for one in (self._server, *self._listeners):
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # Nobody waits.
            while len(self._listeners) < LISTENERS_MAX:
                listener, _ = self._server.accept()
                listener.setblocking(False)
                self._listeners[listener] = b""


def register() -> None:
    """Change the scheduler of this process, if somebody wants to listen. Idempotent."""
    path = os.environ.get(VARIABLE, "")
    if path:
        change_all(lambda: changes(Path(path)))


def changes(path: Path) -> list[Change]:
    """What has to be different in a scheduler."""

    def tell(scheduler: Any) -> None:
        if not hasattr(scheduler, TAP):
            setattr(scheduler, TAP, _tap_of(scheduler, path))
        tap: Tap | None = getattr(scheduler, TAP)
        if tap is None:
            return
        try:
            tap.tell(_load_of(scheduler))
        except Exception:
            _log.exception("unbroken: the scheduler is not as it was: its load is not told")
            tap.close()
            setattr(scheduler, TAP, None)

    def telling(method: Method) -> Method:
        def told(self: Any, *more: Any, **named: Any) -> Any:
            result = method(self, *more, **named)
            tell(self)
            return result

        return told

    module = "vllm.v1.core.sched.scheduler"
    methods = ("add_request", "schedule", "update_from_output", "finish_requests")
    return [Change(module, "Scheduler", name, telling) for name in methods]


def _load_of(scheduler: Any) -> Mapping[str, int]:
    """What it holds now, in the words of a message."""
    pool = scheduler.kv_cache_manager.block_pool
    total = pool.num_gpu_blocks - 1  # One is nobody's.
    running, waiting = scheduler.get_request_counts()
    first = itertools.islice(scheduler.waiting, COUNTED_MAX)
    return {
        "blocks": total - pool.get_num_free_blocks(),
        "blocks_total": total,
        "running": running,
        "waiting": waiting,
        "waiting_tokens": sum(request.num_tokens for request in first),
    }


def _tap_of(scheduler: Any, path: Path) -> Tap | None:
    """Its own, if it may have one and can."""
    if scheduler.vllm_config.parallel_config.data_parallel_size > 1:
        return None
    try:
        return Tap(path)
    except OSError as error:
        _log.warning("unbroken: nobody can listen at %s: %s", path, error)
        return None
