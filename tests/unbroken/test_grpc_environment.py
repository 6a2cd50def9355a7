"""What gRPC's core reads when it is imported has been set by then, wherever one begins."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORTED = """
import importlib, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print(os.environ.get("GRPC_ENABLE_FORK_SUPPORT"))

sys.meta_path.insert(0, Watch())
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize(
    "module",
    [
        "frontend.__main__",
        "sidecar.__main__",
        "memory_service.__main__",
        "unbroken.cli",
        "unbroken.client",
        "benchmarks.recovery",
        "tests.unbroken.test_transport",
    ],
)
def test_no_handlers_of_grpc_run_in_children(module: str) -> None:
    command = [sys.executable, "-c", IMPORTED, module]
    environment = {"PATH": "/usr/bin:/bin"}  # Nothing from whoever runs the tests.
    seen = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert seen.stdout == "0\n"
