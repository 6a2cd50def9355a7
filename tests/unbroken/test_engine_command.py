"""Claims of `unbroken.engine_command`."""

import pytest

from unbroken.engine_command import EngineCommand, recognise


def known(command: str, protocol: str | None = None) -> EngineCommand:
    return recognise(command.split(), lambda: 7777, protocol=protocol)


@pytest.mark.parametrize(
    ("command", "protocol", "address"),
    [
        ("vllm serve M --grpc --port 50051", "vllm", "127.0.0.1:50051"),
        ("/venv/bin/vllm serve M --grpc --host=0.0.0.0 --port=9", "vllm", "127.0.0.1:9"),
        (
            "python -m vllm.entrypoints.launchers.grpc_server --model M --port 1 --host ::1",
            "vllm",
            "[::1]:1",
        ),
        ("python -m sglang.launch_server --smg-grpc-mode --port 8", "sglang", "127.0.0.1:8"),
        ("trtllm-serve M --grpc --port 8", "trtllm", "127.0.0.1:8"),
        ("vllm serve M --port 8", "openai", "127.0.0.1:8"),
        ("./llama-server -m M.gguf --port 8", "openai", "127.0.0.1:8"),
    ],
)
def test_an_engine_is_known_by_its_command(command: str, protocol: str, address: str) -> None:
    found = known(command)
    assert (found.protocol, found.address) == (protocol, address)
    assert " ".join(found.words) == command


def test_a_port_is_found_for_who_names_none() -> None:
    found = known("vllm serve M --grpc")
    assert found.address == "127.0.0.1:7777"
    assert found.words[-2:] == ("--port", "7777")


def test_what_it_speaks_can_be_said() -> None:
    assert known("my-engine --port 3", "vllm").address == "127.0.0.1:3"


@pytest.mark.parametrize(
    "command", ["", "sleep 5", "vllm serve sglang", "vllm serve M --grpc --port x"]
)
def test_what_is_no_engine_that_can_be_spoken_to_is_refused(command: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        known(command)
