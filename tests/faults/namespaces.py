"""Workers in network namespaces of their own, and links between them that lose every packet.

    with Namespaces(["w1", "w2"]) as net:
        net.enter("w1")            # Words before a command that is to run there.
        net.address("w1")          # Its address, from the hub.
        net.drop("w1", Direction.UPSTREAM)
        net.num_dropped("w1")
        net.heal("w1")

A hub, where frontends and clients live, has one pair of virtual interfaces with each worker; the
namespaces around it see nothing of that. Packets are lost on the link itself: the sender is told a
wrong hardware address of the other end, whose kernel then drops and counts them ("otherhost"). So
nobody acknowledges them, as with a cut cable, and it needs iproute2 and the right to make
namespaces, but no packet filter.
"""

import ctypes
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from unbroken.chaos.proxy import BOTH, Direction

HUB: Final = "hub"

_NOBODY: Final = "02:00:00:00:00:01"
_CLONE_NEWNET: Final = 0x40000000


def reason_not_permitted() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    try:
        with Namespaces(["probe"]) as net:
            net.num_dropped("probe")
    except (subprocess.CalledProcessError, KeyError) as error:
        return f"network namespaces do not work here: {getattr(error, 'stderr', '') or error!r}"
    return ""


class Namespaces:
    """A hub and a namespace for each worker, from `with` to its end."""

    def __init__(self, worker_ids: Sequence[str]) -> None:
        """At most 200 workers."""
        self._worker_ids = tuple(worker_ids)
        self._mark = f"unbroken-{secrets.token_hex(3)}"

    def __enter__(self) -> Self:
        try:
            self._make(HUB)
            for number, worker_id in enumerate(self._worker_ids, 1):
                self._make(worker_id)
                hub, worker = self._name(HUB), self._name(worker_id)
                pair = (
                    f"to{number}",
                    "netns",
                    hub,
                    "type",
                    "veth",
                    "peer",
                    "uplink",
                    "netns",
                    worker,
                )
                _ip("link", "add", *pair)
                for name, device, end in ((hub, f"to{number}", 1), (worker, "uplink", 2)):
                    _ip("-n", name, "addr", "add", f"10.77.{number}.{end}/30", "dev", device)
                    _ip("-n", name, "link", "set", device, "up")
                self.heal(worker_id)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def enter(self, name: str) -> list[str]:
        """Words before a command that is to run in the namespace of a worker, or in the hub."""
        return [shutil.which("ip") or "ip", "netns", "exec", self._name(name)]

    def become(self, name: str) -> None:
        """Move the calling thread there, and what it starts: a process of its own must do this."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/run/netns", self._name(name)).open() as file:
            if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")

    def address(self, worker_id: str) -> str:
        """Where the worker is, seen from the hub."""
        return f"10.77.{self._number(worker_id)}.2"

    def drop(self, worker_id: str, *directions: Direction) -> None:
        """Lose all packets to the worker (UPSTREAM), from it (DOWNSTREAM), or both."""
        for direction in directions or BOTH:
            self._teach(worker_id, direction, _NOBODY)

    def heal(self, worker_id: str) -> None:
        """Lose nothing."""
        for direction in BOTH:
            receiver, device = self._receiver(worker_id, direction)
            (link,) = self._links(receiver, device)
            self._teach(worker_id, direction, link["address"])

    def num_dropped(self, worker_id: str, *directions: Direction) -> int:
        """Packets lost so far."""
        num = 0
        for direction in directions or BOTH:
            receiver, device = self._receiver(worker_id, direction)
            (link,) = self._links(receiver, device)
            num += link["stats64"]["rx"].get("otherhost", 0)
        return num

    def _teach(self, worker_id: str, direction: Direction, hardware: str) -> None:
        """Where the sender is to send what is meant for the receiver."""
        number = self._number(worker_id)
        if direction is Direction.UPSTREAM:
            sender, device, receiver = HUB, f"to{number}", f"10.77.{number}.2"
        else:
            sender, device, receiver = worker_id, "uplink", f"10.77.{number}.1"
        target = (receiver, "lladdr", hardware, "nud", "permanent", "dev", device)
        _ip("-n", self._name(sender), "neigh", "replace", *target)

    def _receiver(self, worker_id: str, direction: Direction) -> tuple[str, str]:
        if direction is Direction.UPSTREAM:
            return worker_id, "uplink"
        return HUB, f"to{self._number(worker_id)}"

    def _links(self, name: str, device: str) -> Any:
        words = ("-n", self._name(name), "-j", "-s", "-s", "link", "show", "dev", device)
        return json.loads(_ip(*words))

    def _number(self, worker_id: str) -> int:
        return self._worker_ids.index(worker_id) + 1

    def _name(self, name: str) -> str:
        return f"{self._mark}-{name}"

    def _make(self, name: str) -> None:
        _ip("netns", "add", self._name(name))
        _ip("-n", self._name(name), "link", "set", "lo", "up")

    def _remove(self) -> None:
        for name in (*self._worker_ids, HUB):
            subprocess.run(
                ["ip", "netns", "del", self._name(name)], check=False, capture_output=True
            )


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
