"""What can be hurt, and how."""

from collections.abc import Mapping
from enum import Enum
from typing import Final


class Component(Enum):
    """What is hurt."""

    ENGINE = "engine"
    SIDECAR = "sidecar"
    HOST = "host"
    """Engine and sidecar of a worker, at one moment."""
    LINK_UP = "link up"
    """From frontends to a sidecar."""
    LINK_DOWN = "link down"
    """From a sidecar to frontends."""
    LINK_BOTH = "link both"
    FRONTEND = "frontend"
    """The process; or, with a harm of links, what clients have to it."""
    CLIENT = "client"
    """The process; or, with a harm of links, all that it has to frontends."""


class Harm(Enum):
    """What is done to it."""

    KILL = "kill"
    STOP = "stop"
    BLACKHOLE = "blackhole"
    RESET = "reset"
    SLOW = "slow"


LINKS: Final = (Component.LINK_UP, Component.LINK_DOWN, Component.LINK_BOTH)

NO_SENSE: Final[Mapping[tuple[Component, Harm], str]] = {
    **{
        (Component.ENGINE, harm): "between engine and sidecar is a Unix socket, which loses, delays"
        " and resets nothing: an engine that says nothing is a stopped one, an end of the socket a"
        " killed one"
        for harm in (Harm.BLACKHOLE, Harm.RESET)
    },
    **{
        (component, harm): "what a process has of the network is its links, which are hurt as such"
        for component in (Component.SIDECAR, Component.HOST)
        for harm in (Harm.BLACKHOLE, Harm.RESET)
    },
    **{
        (component, harm): "a link is no process"
        for component in LINKS
        for harm in (Harm.KILL, Harm.STOP)
    },
}
"""Combinations that mean nothing, and why."""
