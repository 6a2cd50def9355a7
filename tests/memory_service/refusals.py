"""What a GPU's driver refuses, and what it does not: played on the fake, and on a GPU.

Each deed is played on a GPU with nothing of it there. `EXPECTED` says how the driver answered (an
H200, driver 580.159, CUDA 13.0); `STRICTER` says where the fake refuses what the driver lets pass,
since no program of ours may rely on it. `make memory-gpu` plays them on the GPU that is there.
"""

import contextlib
import os
from collections.abc import Callable, Generator
from contextlib import ExitStack
from enum import Enum
from typing import Final

from unbroken.memory.gpu import Access, Gpu, GpuCode, GpuError

SIZE: Final = 4 << 20
"""Two of the smallest units."""


class Table:
    """A GPU, and what has to be cleared away again."""

    def __init__(self, gpu: Gpu, cleanup: ExitStack) -> None:
        self.gpu = gpu
        self.unit = gpu.granularity_bytes
        self._cleanup = cleanup

    def later(self, what: Callable[..., object], *arguments: int) -> None:
        """At the end, whether it is still there or not."""

        def done() -> None:
            with contextlib.suppress(GpuError, OSError):
                what(*arguments)

        self._cleanup.callback(done)

    def created(self, size: int = SIZE) -> int:
        handle = self.gpu.create(size)
        self.later(self.gpu.release, handle)
        return handle

    def exported(self, handle: int) -> int:
        fd = self.gpu.export(handle)
        self.later(os.close, fd)
        return fd

    def imported(self, fd: int) -> int:
        handle = self.gpu.import_fd(fd)
        self.later(self.gpu.release, handle)
        return handle

    def reserved(self, size: int = SIZE, address: int = 0) -> int:
        got = self.gpu.reserve(size, address)
        self.later(self.gpu.unreserve, got, size)
        return got

    def mapped_at(self, address: int, handle: int, size: int = SIZE) -> None:
        self.gpu.map(address, size, handle)
        self.later(self.gpu.unmap, address, size)

    def mapped(self, handle: int, access: Access = Access.READ_WRITE) -> int:
        address = self.reserved()
        self.mapped_at(address, handle)
        if access is not Access.NONE:
            self.gpu.set_access(address, SIZE, access)
        return address

    def two_mapped(self) -> int:
        """Beside each other, in one range."""
        address = self.reserved(2 * SIZE)
        self.mapped_at(address, self.created())
        self.mapped_at(address + SIZE, self.created())
        return address


class Bug(Enum):
    """What no program may do: the driver ends the process, and the fake fails an assertion."""

    CRASH = "the process ends"


Deed = Callable[[Table], object]
DEEDS: Final[dict[str, Deed]] = {}
EXPECTED: Final[dict[str, GpuCode | Bug | None]] = {}
STRICTER: Final[dict[str, GpuCode]] = {}
INVALID: Final = GpuCode.INVALID_VALUE


def deed(
    expected: GpuCode | Bug | None = None, *, stricter: GpuCode | None = None
) -> Callable[[Deed], Deed]:
    """Of which the last call is answered so; None: it is done."""

    def noted(play: Deed) -> Deed:
        name = play.__name__
        DEEDS[name], EXPECTED[name] = play, expected
        if stricter is not None:
            STRICTER[name] = stricter
        return play

    return noted


@contextlib.contextmanager
def table(gpu: Gpu) -> Generator[Table]:
    with ExitStack() as cleanup:
        yield Table(gpu, cleanup)


def answer(gpu: Gpu, name: str) -> int | None:
    """How the GPU answers this deed. An AssertionError: it does it, but wrongly."""
    with table(gpu) as one:
        try:
            DEEDS[name](one)
        except GpuError as error:
            return error.code
        return None


# Allocations.


@deed(INVALID)
def allocate_nothing(on: Table) -> None:
    on.created(0)


@deed(INVALID)
def allocate_half_a_unit(on: Table) -> None:
    on.created(on.unit // 2)


@deed(INVALID)
def allocate_a_unit_and_a_half(on: Table) -> None:
    on.created(on.unit + on.unit // 2)


@deed(GpuCode.OUT_OF_MEMORY)
def allocate_more_than_there_is(on: Table) -> None:
    on.created(1 << 42)


@deed()
def export_twice(on: Table) -> None:
    handle = on.created()
    assert on.exported(handle) != on.exported(handle)


@deed(INVALID)
def export_what_was_imported(on: Table) -> None:
    on.exported(on.imported(on.exported(on.created())))


@deed(Bug.CRASH)
def export_what_was_released(on: Table) -> None:
    handle = on.created()
    on.gpu.release(handle)
    on.exported(handle)


@deed(INVALID)
def release_twice(on: Table) -> None:
    handle = on.created()
    on.gpu.release(handle)
    on.gpu.release(handle)


@deed()
def import_twice(on: Table) -> None:
    fd = on.exported(on.created())
    on.imported(fd)
    on.imported(fd)


@deed()
def import_a_duplicate(on: Table) -> None:
    fd = os.dup(on.exported(on.created()))
    on.later(os.close, fd)
    on.imported(fd)


@deed()
def import_after_the_handle_is_released(on: Table) -> None:
    handle = on.created()
    fd = on.exported(handle)
    on.gpu.release(handle)
    address = on.mapped(on.imported(fd))
    assert on.gpu.read(address, 8) == bytes(8)


@deed(GpuCode.UNKNOWN)
def import_what_is_opened_anew(on: Table) -> None:
    fd = on.exported(on.created())
    anew = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    on.later(os.close, anew)
    on.imported(anew)


@deed(GpuCode.UNKNOWN)
def import_what_is_closed(on: Table) -> None:
    fd = on.exported(on.created())
    os.close(fd)
    on.imported(fd)


@deed(GpuCode.UNKNOWN)
def import_a_pipe(on: Table) -> None:
    read_end, write_end = os.pipe()
    on.later(os.close, read_end)
    on.later(os.close, write_end)
    on.imported(read_end)


@deed(GpuCode.UNKNOWN)
def import_a_memfd(on: Table) -> None:
    fd = os.memfd_create("no-gpu")
    on.later(os.close, fd)
    os.ftruncate(fd, SIZE)
    on.imported(fd)


# Addresses.


@deed(INVALID)
def reserve_nothing(on: Table) -> None:
    on.reserved(0)


@deed(INVALID)
def reserve_half_a_unit(on: Table) -> None:
    on.reserved(on.unit // 2)


@deed()
def reserve_what_is_free(on: Table) -> None:
    address = on.reserved()
    on.gpu.unreserve(address, SIZE)
    assert on.reserved(SIZE, address) == address


@deed()
def reserve_what_is_taken(on: Table) -> None:
    address = on.reserved()
    assert on.reserved(SIZE, address) != address


@deed(INVALID)
def unreserve_a_part(on: Table) -> None:
    on.gpu.unreserve(on.reserved(), on.unit)


@deed(INVALID)
def unreserve_twice(on: Table) -> None:
    address = on.reserved()
    on.gpu.unreserve(address, SIZE)
    on.gpu.unreserve(address, SIZE)


@deed(INVALID)
def unreserve_what_is_mapped(on: Table) -> None:
    on.gpu.unreserve(on.mapped(on.created()), SIZE)


@deed(INVALID)
def reserve_between_units(on: Table) -> None:
    address = on.reserved(2 * SIZE)
    on.gpu.unreserve(address, 2 * SIZE)
    on.reserved(SIZE, address + on.unit // 2)


# Mappings.


@deed(GpuCode.NOT_SUPPORTED)
def map_a_part(on: Table) -> None:
    on.gpu.map(on.reserved(), on.unit, on.created())


@deed(GpuCode.NOT_SUPPORTED)
def map_the_second_half(on: Table) -> None:
    on.gpu.map(on.reserved(), on.unit, on.created(), on.unit)


@deed(GpuCode.NOT_SUPPORTED)
def map_half_a_unit(on: Table) -> None:
    on.gpu.map(on.reserved(), on.unit // 2, on.created())


@deed(GpuCode.NOT_SUPPORTED)
def map_more_than_there_is(on: Table) -> None:
    on.gpu.map(on.reserved(2 * SIZE), 2 * SIZE, on.created())


@deed(INVALID)
def map_outside_of_any_range(on: Table) -> None:
    address = on.reserved()
    on.gpu.unreserve(address, SIZE)
    on.gpu.map(address, SIZE, on.created())


@deed(stricter=INVALID)
def map_across_the_end_of_a_range(on: Table) -> None:
    on.gpu.map(on.reserved() + on.unit, SIZE, on.created())


@deed(INVALID)
def map_between_units(on: Table) -> None:
    on.gpu.map(on.reserved(2 * SIZE) + on.unit // 2, SIZE, on.created())


@deed(INVALID)
def map_over_another(on: Table) -> None:
    address = on.mapped(on.created())
    on.gpu.map(address, SIZE, on.created())


@deed(Bug.CRASH)
def map_what_was_released(on: Table) -> None:
    handle = on.created()
    on.gpu.release(handle)
    on.gpu.map(on.reserved(), SIZE, handle)


@deed()
def map_one_twice(on: Table) -> None:
    handle = on.created()
    first, second = on.mapped(handle), on.mapped(handle)
    on.gpu.write(first, b"the same")
    assert on.gpu.read(second, 8) == b"the same"


@deed()
def release_what_is_mapped(on: Table) -> None:
    handle = on.created()
    address = on.mapped(handle)
    on.gpu.release(handle)
    on.gpu.write(address, b"goes on.")
    assert on.gpu.read(address, 8) == b"goes on."


@deed()
def map_again_after_unmapping(on: Table) -> None:
    handle = on.created()
    address = on.mapped(handle)
    on.gpu.write(address, b"is kept.")
    on.gpu.unmap(address, SIZE)
    on.mapped_at(address, handle)
    on.gpu.set_access(address, SIZE, Access.READ)
    assert on.gpu.read(address, 8) == b"is kept."


@deed(INVALID)
def unmap_a_part(on: Table) -> None:
    on.gpu.unmap(on.mapped(on.created()), on.unit)


@deed()
def unmap_twice(on: Table) -> None:
    address = on.mapped(on.created())
    on.gpu.unmap(address, SIZE)
    on.gpu.unmap(address, SIZE)


@deed()
def unmap_what_was_never_mapped(on: Table) -> None:
    on.gpu.unmap(on.reserved(), SIZE)


@deed(INVALID)
def unmap_outside_of_any_range(on: Table) -> None:
    address = on.reserved()
    on.gpu.unreserve(address, SIZE)
    on.gpu.unmap(address, SIZE)


@deed()
def unmap_beyond_what_is_mapped(on: Table) -> None:
    address = on.reserved(2 * SIZE)
    on.mapped_at(address, on.created())
    on.gpu.unmap(address, 2 * SIZE)


@deed()
def unmap_two_at_once(on: Table) -> None:
    on.gpu.unmap(on.two_mapped(), 2 * SIZE)


@deed(INVALID)
def unmap_one_and_a_half(on: Table) -> None:
    on.gpu.unmap(on.two_mapped(), SIZE + on.unit)


# Access.


@deed(INVALID)
def allow_a_part(on: Table) -> None:
    on.gpu.set_access(on.mapped(on.created()), on.unit, Access.READ)


@deed(INVALID)
def allow_what_is_not_mapped(on: Table) -> None:
    on.gpu.set_access(on.reserved(), SIZE, Access.READ)


@deed()
def allow_two_at_once(on: Table) -> None:
    on.gpu.set_access(on.two_mapped(), 2 * SIZE, Access.READ_WRITE)


@deed(INVALID)
def allow_beyond_what_is_mapped(on: Table) -> None:
    address = on.reserved(2 * SIZE)
    on.mapped_at(address, on.created())
    on.gpu.set_access(address, 2 * SIZE, Access.READ)


@deed(INVALID)
def allow_nothing_any_more(on: Table) -> None:
    address = on.mapped(on.created())
    on.gpu.set_access(address, SIZE, Access.NONE)
    on.gpu.read(address, 8)


@deed()
def allow_writing_after_reading(on: Table) -> None:
    address = on.mapped(on.created(), Access.READ)
    on.gpu.set_access(address, SIZE, Access.READ_WRITE)
    on.gpu.write(address, b"no fence")


@deed()
def map_for_writing_what_was_given_for_reading(on: Table) -> None:
    fd = on.exported(on.created())
    reader, writer = on.mapped(on.imported(fd), Access.READ), on.mapped(on.imported(fd))
    on.gpu.write(writer, b"no fence")
    assert on.gpu.read(reader, 8) == b"no fence"


# Bytes.


@deed(INVALID)
def write_where_only_reading_is_allowed(on: Table) -> None:
    on.gpu.write(on.mapped(on.created(), Access.READ), b"01234567")


@deed(INVALID)
def copy_to_where_only_reading_is_allowed(on: Table) -> None:
    source = on.mapped(on.created())
    on.gpu.copy(on.mapped(on.created(), Access.READ), source, on.unit)


@deed(INVALID)
def read_where_nothing_is_allowed(on: Table) -> None:
    on.gpu.read(on.mapped(on.created(), Access.NONE), 8)


@deed(INVALID)
def read_where_nothing_is_mapped(on: Table) -> None:
    on.gpu.read(on.reserved(), 8)


@deed(INVALID)
def read_across_the_end_of_a_mapping(on: Table) -> None:
    address = on.reserved(2 * SIZE)
    on.mapped_at(address, on.created())
    on.gpu.set_access(address, SIZE, Access.READ)
    on.gpu.read(address + SIZE - 8, 16)


@deed()
def read_across_two_mappings(on: Table) -> None:
    address = on.two_mapped()
    on.gpu.set_access(address, 2 * SIZE, Access.READ_WRITE)
    on.gpu.write(address + SIZE - 4, b"borders.")
    assert on.gpu.read(address + SIZE - 4, 8) == b"borders."


@deed()
def find_zeros_in_what_another_had(on: Table) -> None:
    handle = on.created()
    address = on.mapped(handle)
    on.gpu.write(address, b"\xff" * SIZE)
    on.gpu.unmap(address, SIZE)
    on.gpu.release(handle)
    assert on.gpu.read(on.mapped(on.created()), SIZE) == bytes(SIZE)
