"""Generates the stubs of protos/, in unbroken/, whenever the project is built or installed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsBuildHook(BuildHookInterface[BuilderConfig]):
    """Runs protoc with the repository as output, so that proto path == Python path."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        # The environment's own plugins, whether or not it is activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        subprocess.run(
            [
                *(sys.executable, "-m", "grpc_tools.protoc"),
                f"--proto_path={root / 'protos'}",
                f"--python_out={root}",
                f"--mypy_out=quiet:{root}",
                f"--grpc_python_out={root}",
                f"--mypy_grpc_out=quiet,only_async:{root}",
                *map(str, sorted((root / "protos").rglob("*.proto"))),
            ],
            check=True,
            env={**os.environ, "PATH": path},
        )
        build_data["artifacts"].append("*_pb2*.py*")  # Ignored by git, shipped in the wheel.
