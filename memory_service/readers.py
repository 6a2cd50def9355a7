"""Decides how many readers of other hosts each tenant may have at once.

A reader holds a pin and a few messages. One tenant's many must not keep another's first one out: so
there is room beside the shared one for a first reader, and none has more than a share.
"""

from typing import Final

from unbroken.errors import Reason, UnbrokenError

SHARED_MAX: Final = 16
"""Readers of all tenants, from which on only first ones come in."""
TENANT_MAX: Final = 8
"""Readers of one tenant."""
READERS_MAX: Final = 32
"""Readers of all tenants."""
RETRY_S: Final = 0.1


class Readers:
    """All that read now."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def begin(self, tenant: str) -> None:
        """One more, until `end`. Raises OVERLOADED."""
        total, own = sum(self._numbers.values()), self._numbers.get(tenant, 0)
        if own >= TENANT_MAX or total >= (SHARED_MAX if own else READERS_MAX):
            raise UnbrokenError(
                Reason.OVERLOADED,
                f"expected at most {TENANT_MAX} readers of a tenant and {SHARED_MAX} in all, "
                f"there are {own} and {total}",
                retry_after_s=RETRY_S,
            )
        self._numbers[tenant] = own + 1

    def end(self, tenant: str) -> None:
        """One that began is gone."""
        left = self._numbers[tenant] - 1
        if left:
            self._numbers[tenant] = left
        else:
            del self._numbers[tenant]
