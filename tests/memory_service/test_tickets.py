"""Claims of `memory_service.tickets`."""

import pytest

from memory_service.tickets import Tickets
from unbroken.errors import Reason, UnbrokenError

TICKETS = Tickets(b"k" * 32)


def is_good(ticket: bytes, tenant: str = "acme", wall_s: float = 100.0) -> bool:
    try:
        TICKETS.check(ticket, tenant, wall_s)
    except UnbrokenError as error:
        return error.reason is not Reason.NOT_PERMITTED
    return True


def test_a_ticket_is_good_for_its_tenant_and_its_time() -> None:
    ticket = TICKETS.grant("acme", 10.0, 100.0)
    assert is_good(ticket)
    assert is_good(ticket, wall_s=109.9)
    assert not is_good(ticket, wall_s=110.0)
    assert not is_good(ticket, tenant="other")
    Tickets(b"k" * 32).check(ticket, "acme", 100.0)  # Another life of the service.


def test_no_changed_bit_is_taken() -> None:
    ticket = TICKETS.grant("acme", 10.0, 100.0)
    for bit in range(len(ticket) * 8):
        changed = bytearray(ticket)
        changed[bit // 8] ^= 1 << bit % 8
        assert not is_good(bytes(changed)), bit


@pytest.mark.parametrize("ticket", [b"", b"short", bytes(40), bytes(41)])
def test_what_is_no_ticket_is_refused(ticket: bytes) -> None:
    assert not is_good(ticket)


def test_a_ticket_of_another_service_is_refused() -> None:
    assert not is_good(Tickets(b"o" * 32).grant("acme", 10.0, 100.0))


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, 86_401.0])
def test_a_time_that_is_too_long_is_refused(ttl_s: float) -> None:
    with pytest.raises(UnbrokenError):
        TICKETS.grant("acme", ttl_s, 100.0)
