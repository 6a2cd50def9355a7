"""`python -m sidecar`: exits with 0 after SIGTERM, with 1 if it or its engine cannot go on."""

import sys

import uvloop

from sidecar.config import SidecarConfig
from sidecar.service import serve
from unbroken import log
from unbroken.config import load
from unbroken.errors import UnbrokenError


def main() -> int:
    """Run the sidecar."""
    config = load(SidecarConfig, sys.argv[1:], prog="sidecar")
    log.configure("sidecar", config.log_level, config.log_format)
    logger = log.get_logger(__name__)
    logger.info("configuration", **config.effective())
    try:
        return uvloop.run(serve(config))
    except (OSError, UnbrokenError) as error:
        logger.error("sidecar cannot start", detail=str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
