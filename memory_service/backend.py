"""What the service needs of a kind of memory. The host's is `memory_service.memfd`.

A GPU's fits in here: a slab is one allocation (cuMemCreate) that is exported as a descriptor once,
when it is made. The service maps nothing and has no context: there is no kernel that could seal, so
the fence of the owner has to be the proof, and who wants to look at the bytes needs a process of
its own that has a context.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class Allocation:
    """One slab's memory."""

    fd: int
    """The original: a vault must have this one, since others cannot be exported again."""
    size_bytes: int
    """As it was asked for."""


class NeverSealed(Exception):  # noqa: N818 - It names what happened.
    """Who could write to it has seen to it that it can never be sealed."""


class Backend(Protocol):
    """Memory of one device."""

    @property
    def is_readable(self) -> bool:
        """Whether `view` works: whether the service can compare bytes with their checksums."""
        ...

    @property
    def is_slow(self) -> bool:
        """Whether `allocate` and `free` may take long: the keeper has a thread for those."""
        ...

    def allocate(self, size_bytes: int, name: str) -> Allocation:
        """Memory that reads as zeros, whoever had it before.

        Raises OSError if there is none.
        """
        ...

    def adopt(self, fd: int, size_bytes: int) -> Allocation:
        """Memory of an earlier life, by its original descriptor."""
        ...

    def read_only(self, allocation: Allocation) -> int:
        """A new descriptor for a reader, which the caller closes.

        Of the host's memory it is one that cannot be written through.
        """
        ...

    def seal(self, allocation: Allocation) -> bool:
        """Let nobody write to it any more. False if somebody still can: nothing changed.

        Where no kernel can do that, True: the caller has other proof, or takes the owner's word.
        Raises NeverSealed.
        """
        ...

    def view(self, allocation: Allocation) -> memoryview:
        """Its bytes, read-only, for as long as it is not freed. May be kept and asked for again.

        Only of a backend that `is_readable`.
        """
        ...

    def free(self, allocation: Allocation) -> None:
        """Give it back. Who has it mapped keeps what it maps."""
        ...
