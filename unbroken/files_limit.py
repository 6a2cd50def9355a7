"""How many files, and so connections, this process may have open."""

import resource
import sys


def raise_files_limit() -> int:
    """Raise the limit as far as this user may; returns it.

    It is passed on to processes that are started later.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard
