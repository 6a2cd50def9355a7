"""The secret by which vLLM's plug-in knows its sidecar, in the environment of both.

Who may ask for a continuation decides what a request's own output is, so no other client of the
engine may.
"""

import os
import secrets
from typing import Final

VARIABLE: Final = "UNBROKEN_CONTINUATION_KEY"


def choose() -> None:
    """Choose one for an engine that this process is about to start, unless there is one."""
    os.environ.setdefault(VARIABLE, secrets.token_hex(16))


def get() -> str:
    """Empty if there is none: nothing is continued natively then."""
    return os.environ.get(VARIABLE, "")
