"""`python -m memory_service`."""

import sys

import uvloop

from memory_service.config import MemoryConfig
from memory_service.service import serve
from unbroken import log
from unbroken.config import load
from unbroken.errors import UnbrokenError
from unbroken.files_limit import raise_files_limit
from unbroken.memory.channel import ChannelClosed


def main() -> int:
    """Run the memory service."""
    config = load(MemoryConfig, sys.argv[1:], prog="memory_service")
    log.configure("memory_service", config.log_level, config.log_format)
    logger = log.get_logger(__name__)
    logger.info("configuration", **config.effective())
    raise_files_limit()
    try:
        return uvloop.run(serve(config))
    except (OSError, UnbrokenError, ChannelClosed) as error:
        logger.error("memory service cannot start", detail=str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
