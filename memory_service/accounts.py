"""Decides who may have how much memory, of the host and of each of its GPUs."""

from dataclasses import dataclass, field
from enum import IntEnum

from unbroken.errors import InvalidField, Reason, UnbrokenError

HOST_PAGE_BYTES = 4096


class MemoryKind(IntEnum):
    """As in the contract."""

    HOST = 1
    CUDA = 2


@dataclass(frozen=True, slots=True)
class Device:
    """What has memory: the host, or one of its GPUs."""

    kind: MemoryKind
    uuid: str = ""
    """Of a GPU, as its driver tells it."""
    page_bytes: int = field(default=HOST_PAGE_BYTES, compare=False)
    """Unit of allocation."""

    def __str__(self) -> str:
        return self.uuid or self.kind.name.lower()

    def rounded(self, num_bytes: int) -> int:
        """What an allocation of so many bytes takes."""
        return -(-num_bytes // self.page_bytes) * self.page_bytes


HOST = Device(MemoryKind.HOST)


def asked_for(kind: int, uuid: str) -> Device | None:
    """The memory in which a caller looks; None: in any. Nothing is found in one that is not here.

    Raises InvalidField.
    """
    if not kind and not uuid:
        return None
    try:
        return Device(MemoryKind(kind), uuid)
    except ValueError as error:
        raise InvalidField("memory_kind", "a kind of memory", kind) from error


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be had of one memory."""

    capacity_bytes: int
    """By all tenants together."""
    quota_bytes: int
    """By each tenant that has no quota of its own."""
    quotas: dict[str, int] = field(default_factory=dict[str, int])
    """By tenant."""
    high_share: float = 0.95
    """Above this share of the capacity, blocks are evicted before anybody asks."""
    low_share: float = 0.85
    """Down to this share."""

    def quota_of(self, tenant: str) -> int:
        return self.quotas.get(tenant, self.quota_bytes)


class Accounts:
    """The bytes of all slabs in one memory, by tenant."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.used: dict[str, int] = {}
        self.unreclaimed: dict[str, int] = {}
        """Of that, the bytes of slabs that are freed and that somebody may have mapped."""

    @property
    def total(self) -> int:
        return sum(self.used.values())

    @property
    def total_unreclaimed(self) -> int:
        return sum(self.unreclaimed.values())

    @property
    def total_in_use(self) -> int:
        """Bytes of the slabs that somebody can find."""
        return self.total - self.total_unreclaimed

    def missing(self, tenant: str, num_bytes: int) -> tuple[int, int]:
        """Bytes that have to be freed first: by the tenant, and by anybody."""
        of_tenant = self.used.get(tenant, 0) + num_bytes - self.limits.quota_of(tenant)
        of_all = self.total + num_bytes - self.limits.capacity_bytes
        return max(0, of_tenant), max(0, of_all)

    def to_evict(self, tenant: str, num_bytes: int) -> tuple[int, int]:
        """As `missing`, without the bytes that come back by themselves when they are unmapped."""
        of_tenant, of_all = self.missing(tenant, num_bytes)
        return (
            max(0, of_tenant - self.unreclaimed.get(tenant, 0)),
            max(0, of_all - self.total_unreclaimed),
        )

    def above_watermark(self) -> int:
        """Bytes to evict now, so that the next who asks need not wait."""
        limits = self.limits
        if self.total <= limits.high_share * limits.capacity_bytes:
            return 0
        return max(0, self.total_in_use - int(limits.low_share * limits.capacity_bytes))

    def charge(self, tenant: str, num_bytes: int) -> None:
        """Note memory that was given. Raises MEMORY_EXHAUSTED if it may not be."""
        of_tenant, of_all = self.missing(tenant, num_bytes)
        if of_tenant or of_all:
            whose = "quota" if of_tenant else "capacity"
            raise UnbrokenError(
                Reason.MEMORY_EXHAUSTED,
                f"expected room for {num_bytes} bytes, {max(of_tenant, of_all)} are missing",
                metadata={"limit": whose},
                retry_after_s=1.0,
            )
        self.restore(tenant, num_bytes)

    def restore(self, tenant: str, num_bytes: int) -> None:
        """Note memory that is there, whatever the limits say now."""
        self.used[tenant] = self.used.get(tenant, 0) + num_bytes

    def free(self, tenant: str, num_bytes: int) -> None:
        """Note memory that nobody can find any more; it is not back yet."""
        self.unreclaimed[tenant] = self.unreclaimed.get(tenant, 0) + num_bytes
        assert self.unreclaimed[tenant] <= self.used[tenant], "nothing is freed twice"

    def credit(self, tenant: str, num_bytes: int) -> None:
        """Note that memory is back, after `free`."""
        _subtract(self.unreclaimed, tenant, num_bytes)
        _subtract(self.used, tenant, num_bytes)


def _subtract(amounts: dict[str, int], tenant: str, num_bytes: int) -> None:
    left = amounts[tenant] - num_bytes
    assert left >= 0, "nothing comes back twice"
    if left:
        amounts[tenant] = left
    else:
        del amounts[tenant]
