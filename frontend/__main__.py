"""`python -m frontend`: exits with a status of `drain.ExitStatus`, as docs/OPERATIONS.md says.

With several processes also with 3 if each crashes in a loop.
"""

import sys

import uvloop

from frontend.config import FrontendConfig
from frontend.drain import ExitStatus
from frontend.processes import parent
from frontend.service import serve
from unbroken import log
from unbroken.config import load
from unbroken.errors import UnbrokenError
from unbroken.files_limit import raise_files_limit
from unbroken.realtime import run_before_others


def main() -> None:
    """Run the frontend."""
    config = load(FrontendConfig, sys.argv[1:], prog="frontend")
    log.configure("frontend", config.log_level, config.log_format)
    logger = log.get_logger(__name__)
    logger.info("configuration", **config.effective())
    files = raise_files_limit()
    if config.edge == "native" and files < config.edge_connections_max:
        logger.warning(
            "fewer files than connections allowed", files=files, limit=config.edge_connections_max
        )
    try:
        run_before_others(config.realtime_priority)
        if config.processes > 1:
            sys.exit(uvloop.run(parent.serve(config, sys.argv[1:])))
        sys.exit(uvloop.run(serve(config)))
    except (OSError, UnbrokenError) as error:
        logger.error("frontend cannot start", detail=str(error))
        sys.exit(ExitStatus.FAILED)


if __name__ == "__main__":
    main()
