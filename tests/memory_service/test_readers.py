"""Claims of `memory_service.readers`."""

import pytest

from memory_service.readers import READERS_MAX, SHARED_MAX, TENANT_MAX, Readers
from unbroken.errors import Reason, UnbrokenError


def refused(readers: Readers, tenant: str) -> bool:
    try:
        readers.begin(tenant)
    except UnbrokenError as error:
        return error.reason is Reason.OVERLOADED and bool(error.retry_after_s)
    return False


def test_no_tenant_reads_more_than_its_share() -> None:
    readers = Readers()
    assert sum(not refused(readers, "greedy") for _ in range(SHARED_MAX)) == TENANT_MAX
    readers.end("greedy")
    assert not refused(readers, "greedy")


def test_a_first_reader_finds_room_whatever_others_read() -> None:
    readers = Readers()
    for tenant in ("a", "b"):
        for _ in range(TENANT_MAX):
            readers.begin(tenant)
    assert not refused(readers, "c")
    assert refused(readers, "c"), "a second one has to wait"
    readers.end("a")
    assert refused(readers, "a"), "as long as there are more than all share"
    readers.end("c")
    assert not refused(readers, "c")


def test_there_is_an_end_to_readers() -> None:
    readers = Readers()
    assert sum(not refused(readers, str(number)) for number in range(100)) == READERS_MAX


def test_one_that_did_not_begin_does_not_end() -> None:
    with pytest.raises(KeyError):
        Readers().end("a")
