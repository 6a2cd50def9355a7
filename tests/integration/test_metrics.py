"""Real processes export what docs/METRICS.md names: all of it, and nothing else."""

import asyncio
import re
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.worlds import real_mesh

PAGE = Path(__file__).parents[2] / "docs" / "METRICS.md"
LISTEN = ("--metrics-listen", "127.0.0.1:0")

Documented = dict[str, tuple[str, frozenset[str]]]
"""By name, the type and the labels."""


def documented(*headings: str) -> Documented:
    """What stands in the tables below these headings."""
    found: Documented = {}
    for part in re.split(r"^(?=## )", PAGE.read_text(), flags=re.MULTILINE):
        if part.removeprefix("## ").split("\n", 1)[0] not in headings:
            continue
        for row in re.finditer(r"^\| `([a-z_:]+)` \| (\w+) \|([^|]*)\|", part, re.MULTILINE):
            found[row[1]] = (row[2], frozenset(re.findall(r"`(\w+)`", row[3])))
    assert found, headings
    return found


def exported(address: str) -> Documented:
    """What a process serves; of what has no series yet the labels are not to be seen."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        text = response.read().decode()
    found: Documented = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels}
        found[name] = (family.type, frozenset(labels - {"le"}))
    return found


def differences(said: Documented, seen: Documented) -> list[str]:
    """Names that only one has, and what has another type or other labels."""
    told = [f"only on the page: {name}" for name in sorted(said.keys() - seen.keys())]
    told += [f"not on the page: {name}" for name in sorted(seen.keys() - said.keys())]
    for name in sorted(said.keys() & seen.keys()):
        kind, labels = seen[name]
        if kind != said[name][0] or (labels and labels != said[name][1]):
            told.append(f"{name}: expected {said[name]}, got {seen[name]}")
    return told


ONLY_WHOLE = frozenset({"unbroken_frontend_process_restarts_total", "unbroken_frontend_processes"})


@pytest.mark.parametrize("flags", [(), ("--edge", "native", "--processes", "2")])
def test_processes_export_what_the_page_names(tmp_path: Path, flags: Sequence[str]) -> None:
    with real_mesh(
        tmp_path, num_workers=1, sidecar_flags=LISTEN, frontend_flags=(*LISTEN, *flags)
    ) as world:

        async def pages() -> tuple[Documented, Documented]:
            await world.client.generate(prompt="Sea", max_tokens=3).text()
            frontend = world.mesh.frontends["f1"].metrics_address
            sidecar = world.mesh.workers["w1"].metrics_address
            told: Documented = {}
            async with asyncio.timeout(10):  # Until the engine has reported its load.
                while "unbroken_sidecar_kv_blocks" not in told:
                    told = await asyncio.to_thread(exported, sidecar)
            return await asyncio.to_thread(exported, frontend), told

        frontend, sidecar = world.run(pages())
    said = documented("Frontend", "Every process")
    if not flags:
        said = {name: told for name, told in said.items() if name not in ONLY_WHOLE}
    assert differences(said, frontend) == []
    assert frontend["unbroken_frontend_requests_finished_total"][1] == {"reason"}, "it is compared"
    assert differences(documented("Sidecar", "Every process"), sidecar) == []
