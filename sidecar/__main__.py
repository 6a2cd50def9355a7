"""`python -m sidecar`: exits with a status of `drain.ExitStatus`, as docs/OPERATIONS.md says."""

import sys

import uvloop

from sidecar.config import SidecarConfig
from sidecar.drain import ExitStatus
from sidecar.service import serve
from unbroken import log
from unbroken.config import load
from unbroken.errors import UnbrokenError
from unbroken.realtime import run_before_others


def main() -> int:
    """Run the sidecar."""
    config = load(SidecarConfig, sys.argv[1:], prog="sidecar")
    log.configure("sidecar", config.log_level, config.log_format)
    logger = log.get_logger(__name__)
    logger.info("configuration", **config.effective())
    try:
        run_before_others(config.realtime_priority)
        return uvloop.run(serve(config))
    except (OSError, UnbrokenError) as error:
        logger.error("sidecar cannot start", detail=str(error))
        return ExitStatus.FAILED


if __name__ == "__main__":
    sys.exit(main())
