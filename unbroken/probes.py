"""The three probes of a process over HTTP, beside its metrics: /startup, /ready and /live.

    /startup        200 once it has begun to serve, for ever after
    /ready          200 while it takes new work; /ready/MODEL while it takes some for that model
    /live           200 while its event loop turns, whatever its engine or the control plane do

Otherwise 503, and 404 for a model that was never served here. They say what grpc.health.v1 says
under the names startup, readiness, model/MODEL and liveness.
"""

import time
from collections.abc import Callable, Iterable
from typing import Final
from urllib.parse import unquote
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from unbroken.health import HealthServicer
from unbroken.recurring import nap

BEAT_S: Final = 0.5
"""Between two signs of life of the event loop."""
HUNG_S: Final = 10.0
"""A loop without one for so long hangs, and only a restart helps."""

_SERVICES: Final = {"/startup": "startup", "/ready": "readiness", "/live": "liveness"}
_PER_MODEL: Final = "/ready/"


class Probes:
    """What the probes of one process say. Asked from any thread."""

    def __init__(
        self, health: HealthServicer, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._health = health
        self._clock = clock
        self._beat_at = clock()

    async def run(self) -> None:
        """Show that the event loop turns, for ever."""
        while True:
            self.beat()
            await nap(BEAT_S)

    def beat(self) -> None:
        """The event loop turns."""
        self._beat_at = self._clock()

    def answer(self, path: str) -> tuple[int, str] | None:
        """The status and a word for people; None: it is no path of ours."""
        if (service := _SERVICES.get(path)) is None:
            if not path.startswith(_PER_MODEL):
                return None
            service = f"model/{unquote(path.removeprefix(_PER_MODEL))}"
        is_serving = self._health.is_serving(service)
        if is_serving is None:
            return 404, "unknown"
        if service == "liveness" and self._clock() - self._beat_at > HUNG_S:
            return 503, "the event loop hangs"
        return (200, "ok") if is_serving else (503, "not now")

    def before(self, application: WSGIApplication) -> WSGIApplication:
        """An application that answers the probes, and leaves all else to the one behind."""

        def answering(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            found = self.answer(str(environ.get("PATH_INFO", "")))
            if found is None:
                return application(environ, start_response)
            status, word = found
            reason = {200: "OK", 404: "Not Found"}.get(status, "Service Unavailable")
            start_response(f"{status} {reason}", [("Content-Type", "text/plain; charset=utf-8")])
            return [f"{word}\n".encode()]

        return answering
