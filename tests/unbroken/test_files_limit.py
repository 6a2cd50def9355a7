"""A process may open as many files as its user may, not as few as its shell said."""

import resource

from unbroken.files_limit import raise_files_limit


def test_the_limit_of_files_becomes_the_users() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        assert raise_files_limit() >= hard >= 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
