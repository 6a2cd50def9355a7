"""docs/CONFIGURATION.md says what the processes can be told.

Write it anew with: python -m tests.unbroken.test_configuration_page
"""

import importlib
from pathlib import Path

import pytest

from unbroken.config import ProcessConfig, markdown

PAGE = Path(__file__).parents[2] / "docs" / "CONFIGURATION.md"

CONFIGURATIONS = {
    "frontend": "FrontendConfig",
    "sidecar": "SidecarConfig",
    "worker": "WorkerConfig",
    "memory_service": "MemoryConfig",
}

HEAD = """\
# Configuration

Generated from the code by `python -m tests.unbroken.test_configuration_page`.

Each process takes a setting from the first of these places that has it:

1. the flag, as in the tables (`--x` and `--no-x` for truth values; repeat it for lists);
2. the environment: `UNBROKEN_`, the process, the name, as in `UNBROKEN_SIDECAR_WORKER_ID` (lists:
   separated by commas);
3. the TOML file named by `--config` or `UNBROKEN_<PROCESS>_CONFIG`: `worker_id = "w1"`;
4. the default.

A flag, a variable with the process's prefix, or a key that nobody knows is an error. `--help`
prints the same; the effective configuration is the first line of each log, with secrets masked.
"""


def page() -> str:
    """What the page has to say."""
    parts = [HEAD]
    for process, name in CONFIGURATIONS.items():
        model = getattr(importlib.import_module(f"{process}.config"), name)
        assert issubclass(model, ProcessConfig)
        parts.append(markdown(model, prog=process))
    return "\n".join(parts)


@pytest.mark.parametrize("process", CONFIGURATIONS)
def test_every_setting_has_a_meaning(process: str) -> None:
    model = getattr(importlib.import_module(f"{process}.config"), CONFIGURATIONS[process])
    assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.unbroken.test_configuration_page"


if __name__ == "__main__":
    PAGE.write_text(page())
