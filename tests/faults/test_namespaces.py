"""Packets are lost in the directions that are named, and that is counted."""

import json
import subprocess
import sys
from collections.abc import Generator

import pytest

from tests.faults.namespaces import HUB, Namespaces, reason_not_permitted
from unbroken.chaos.proxy import BOTH, Direction

UP, DOWN = Direction.UPSTREAM, Direction.DOWNSTREAM

SERVER = """
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind((sys.argv[1], 999))
print("ready", flush=True)
while True:
    data, sender = server.recvfrom(100)
    print(data.decode(), flush=True)
    server.sendto(data, sender)
"""
CLIENT = """
import socket, sys
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(0.3)
client.sendto(sys.argv[2].encode(), (sys.argv[1], 999))
try:
    print(client.recv(100).decode())
except TimeoutError:
    print("silence")
"""


@pytest.fixture(scope="module")
def net() -> Generator[Namespaces]:
    if reason := reason_not_permitted():
        pytest.skip(reason)
    with Namespaces(["w1", "w2"]) as net:
        yield net


@pytest.fixture(scope="module")
def server(net: Namespaces) -> Generator[subprocess.Popen[str]]:
    command = [*net.enter("w1"), sys.executable, "-c", SERVER, net.address("w1")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def answer(net: Namespaces, word: str) -> str:
    command = [*net.enter(HUB), sys.executable, "-c", CLIENT, net.address("w1"), word]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def heard(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    return server.stdout.readline().strip()


def test_packets_pass_and_nothing_is_counted(
    net: Namespaces, server: subprocess.Popen[str]
) -> None:
    before = net.num_dropped("w1")
    assert answer(net, "hello") == "hello"
    assert heard(server) == "hello"
    assert net.num_dropped("w1") == before


def test_packets_are_lost_one_way(net: Namespaces, server: subprocess.Popen[str]) -> None:
    for direction in BOTH:
        before = {way: net.num_dropped("w1", way) for way in BOTH}
        net.drop("w1", direction)
        assert answer(net, direction.value) == "silence"
        lost = {way: net.num_dropped("w1", way) - before[way] for way in BOTH}
        assert lost[direction] == 1
        assert sum(lost.values()) == 1
        if direction is DOWN:
            assert heard(server) == direction.value  # It came; only the answer was lost.
        net.heal("w1")
        assert answer(net, "healed") == "healed"
        assert heard(server) == "healed"


def test_other_workers_are_not_hit(net: Namespaces, server: subprocess.Popen[str]) -> None:
    net.drop("w2")
    assert answer(net, "hello") == "hello"
    assert heard(server) == "hello"


def test_streams_survive_a_host_that_loses_every_packet() -> None:
    command = [sys.executable, "-m", "tests.faults.partition"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    figures = json.loads(done.stdout.splitlines()[-1])
    if reason := figures.get("skipped"):
        pytest.skip(reason)
    assert figures["ok"], figures
    assert figures["complete"] == figures["streams"] > 0
    assert figures["migrated"] > 0
    assert all(figures["packets_lost"].values())
