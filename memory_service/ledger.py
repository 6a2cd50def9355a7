"""What every slab is charged for, and until when: the accounts of all memories of the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memory_service.accounts import Accounts, Device, Limits, MemoryKind
from memory_service.mappings import Mappings
from unbroken.errors import InvalidField, Reason, UnbrokenError


@dataclass(frozen=True, slots=True)
class Charge:
    """What a slab takes of one memory."""

    device: Device
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Charged:
    """A slab, and whose it is."""

    tenant: str
    charges: tuple[Charge, ...]


class Ledger:
    """All slabs: those in use, and those that are freed and not back yet.

    Attributes:
        accounts: Of each memory; the host's is the first.
        mappings: Who has them mapped.
    """

    def __init__(self, limits: Mapping[Device, Limits], *, slabs_max: int) -> None:
        self.accounts = {device: Accounts(of_device) for device, of_device in limits.items()}
        self.mappings = Mappings()
        self.slabs_max = slabs_max
        self._slabs: dict[int, Charged] = {}
        self._freed: dict[int, Charged] = {}

    @property
    def num_slabs(self) -> int:
        """Unreclaimed ones included."""
        return len(self._slabs) + len(self._freed)

    @property
    def total(self) -> int:
        """Bytes of all slabs that are in use."""
        return sum(
            charge.num_bytes for charged in self._slabs.values() for charge in charged.charges
        )

    def device(self, kind: int, uuid: str) -> Device:
        """The memory that a caller means; kind 0 is the host's. Raises InvalidField."""
        for device in self.accounts:
            if (device.kind, device.uuid) == ((kind or MemoryKind.HOST), uuid):
                return device
        known = ", ".join(str(device) for device in self.accounts)
        raise InvalidField("device", f"one of {known}", f"{kind} {uuid}")

    def is_used(self, slab_id: int) -> bool:
        """Whether it is charged and not freed."""
        return slab_id in self._slabs

    def size_of(self, slab_id: int, device: Device | None = None) -> int:
        """Bytes of a slab in use, records included; of one memory, or of all."""
        return sum(
            charge.num_bytes
            for charge in self._slabs[slab_id].charges
            if device is None or charge.device == device
        )

    def check_number(self, num_slabs: int) -> None:
        """Raise MEMORY_EXHAUSTED unless there may be so many more: each takes descriptors."""
        if self.num_slabs + num_slabs > self.slabs_max:
            raise UnbrokenError(
                Reason.MEMORY_EXHAUSTED,
                f"expected at most {self.slabs_max} slabs, there are {self.num_slabs}",
                metadata={"limit": "slabs"},
                retry_after_s=1.0,
            )

    def charge(self, slab_id: int, tenant: str, charges: Sequence[Charge]) -> None:
        """Note a new slab. Raises MEMORY_EXHAUSTED if it may not be."""
        done: list[Charge] = []
        try:
            for charge in charges:
                self.accounts[charge.device].charge(tenant, charge.num_bytes)
                done.append(charge)
        except UnbrokenError:
            for charge in done:
                self.accounts[charge.device].free(tenant, charge.num_bytes)
                self.accounts[charge.device].credit(tenant, charge.num_bytes)
            raise
        self._slabs[slab_id] = Charged(tenant, tuple(charges))

    def restore(self, slab_id: int, tenant: str, charges: Sequence[Charge]) -> None:
        """Note a slab of an earlier life, whatever the limits say now."""
        for charge in charges:
            self.accounts[charge.device].restore(tenant, charge.num_bytes)
        self._slabs[slab_id] = Charged(tenant, tuple(charges))

    def free(self, slab_id: int) -> None:
        """Nobody can find it any more. Its bytes are back when nobody has it mapped."""
        charged = self._freed[slab_id] = self._slabs.pop(slab_id)
        for charge in charged.charges:
            self.accounts[charge.device].free(charged.tenant, charge.num_bytes)
        self.mappings.freed(slab_id)
        self.settle()

    def settle(self) -> None:
        """Credit what came back."""
        for slab_id in self.mappings.back:
            charged = self._freed.pop(slab_id)
            for charge in charged.charges:
                self.accounts[charge.device].credit(charged.tenant, charge.num_bytes)
        self.mappings.back.clear()

    def check(self, slabs: Mapping[int, Charged]) -> None:
        """What is always true, given the slabs that there are."""
        assert slabs == self._slabs, "every slab is somewhere, once"
        used: dict[Device, dict[str, int]] = {device: {} for device in self.accounts}
        unreclaimed: dict[Device, dict[str, int]] = {device: {} for device in self.accounts}
        for charged in (*self._slabs.values(), *self._freed.values()):
            for charge in charged.charges:
                of_device = used[charge.device]
                of_device[charged.tenant] = of_device.get(charged.tenant, 0) + charge.num_bytes
        for charged in self._freed.values():
            for charge in charged.charges:
                of_device = unreclaimed[charge.device]
                of_device[charged.tenant] = of_device.get(charged.tenant, 0) + charge.num_bytes
        for device, accounts in self.accounts.items():
            assert used[device] == accounts.used, "the ledger is the sum of the slabs"
            assert unreclaimed[device] == accounts.unreclaimed, "and of those that are freed"
        assert all(self.mappings.is_mapped(slab_id) for slab_id in self._freed), "or it is back"
