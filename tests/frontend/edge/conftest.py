"""Fixtures of the edge's tests."""

import shutil
from pathlib import Path

import pytest

from tests.frontend.edge.certificates import make_certificates
from tests.frontend.edge.clients import missing


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with those of an authority, a server and a client."""
    if shutil.which("openssl") is None:
        missing("openssl")
    directory = tmp_path_factory.mktemp("certificates")
    make_certificates(directory)
    return directory
