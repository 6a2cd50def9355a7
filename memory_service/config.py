"""What a memory service can be told."""

from pathlib import Path

from pydantic import Field, model_validator

from unbroken.config import Address, ProcessConfig
from unbroken.transport import TlsFiles


class MemoryConfig(ProcessConfig):
    """Keeps weights and KV blocks of this host, so that they outlive the engines that use them."""

    directory: Path
    """For its sockets: session.sock for engines, control.sock for gRPC, vault.sock."""
    listen: Address | None = None
    """host:port at which other hosts read blocks, with tickets; none if not given."""
    tls_certificate: Path | None = None
    """PEM file with the certificate shown there, its chain after it; without, no TLS."""
    tls_key: Path | None = None
    """PEM file with its private key."""
    tls_client_ca: Path | None = None
    """PEM file of the authority whose certificates readers have to show; without, none do."""
    metrics_listen: Address | None = None
    """host:port of the metrics endpoint; none if not given."""
    capacity_bytes: int = Field(4 * 1024**3, ge=1024**2, le=2**50)
    """Memory that may be given out at all."""
    quota_bytes: int = Field(2**50, ge=0, le=2**50)
    """Memory of each tenant without a quota of its own."""
    quotas: tuple[str, ...] = ()
    """Quotas of single tenants, as tenant=bytes."""
    grants: tuple[str, ...] = ()
    """Users beside our own that may use a tenant's memory, as uid=tenant."""
    gpus: tuple[str, ...] = ()
    """GPUs whose memory may be given out, and how much of it, as uuid=bytes. Needs extra cuda."""
    gpu_quota_bytes: int = Field(2**50, ge=0, le=2**50)
    """Memory of each GPU for each tenant without a quota of its own."""
    gpu_quotas: tuple[str, ...] = ()
    """Quotas of single tenants in each GPU's memory, as tenant=bytes."""
    high_share: float = Field(0.95, gt=0, le=1)
    """Above this share of the capacity, blocks are evicted before anybody asks."""
    low_share: float = Field(0.85, gt=0, le=1)
    """Down to this share."""
    slabs_max: int = Field(8192, ge=1, le=1_000_000)
    """Slabs of all tenants: each takes two descriptors at most, here and in the vault."""
    orphan_grace_s: float = Field(600.0, ge=0, le=86400)
    """How long the pool of a dead engine waits to be adopted."""
    rebind_grace_s: float = Field(5.0, ge=0.05, le=600)
    """How long a process may be without a connection before its memory is quarantined."""
    kills_unbound: bool = False
    """Whether a process that is without a connection for longer is killed instead."""
    seal_is_proof: bool = True
    """Whether a sealed lifeline proves that a process writes no more. Not under CUDA's MPS."""
    scrub_bytes_per_s: int = Field(64 * 1024**2, ge=0, le=2**40)
    """How fast stored bytes are compared with their checksums all the time; 0: never."""
    has_vault: bool = True
    """Whether a vault keeps the descriptors, so that the service can crash or be upgraded."""
    vault_idle_exit_s: float = Field(60.0, ge=0.1, le=86400)
    """A vault that no service uses for so long gives everything back."""

    @model_validator(mode="after")
    def _shares(self) -> "MemoryConfig":
        if self.low_share > self.high_share:
            raise ValueError(
                f"expected low_share up to high_share ({self.high_share:g}), got {self.low_share:g}"
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("expected tls_certificate and tls_key together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("expected tls_certificate with tls_client_ca")
        self.tenant_quotas()
        self.tenant_gpu_quotas()
        self.gpu_bytes()
        self.user_grants()
        return self

    @property
    def tls(self) -> TlsFiles | None:
        """How other hosts are spoken to; None if in the clear."""
        if self.tls_certificate is None or self.tls_key is None:
            return None
        return TlsFiles(self.tls_certificate, self.tls_key, self.tls_client_ca)

    def tenant_quotas(self) -> dict[str, int]:
        """Of the host's memory, by tenant."""
        return _sizes("quotas", "tenant", self.quotas)

    def tenant_gpu_quotas(self) -> dict[str, int]:
        """Of each GPU's memory, by tenant."""
        return _sizes("gpu_quotas", "tenant", self.gpu_quotas)

    def gpu_bytes(self) -> dict[str, int]:
        """What may be given out, by GPU."""
        return _sizes("gpus", "uuid", self.gpus)

    def user_grants(self) -> frozenset[tuple[int, str]]:
        """Pairs of user and tenant."""
        found: set[tuple[int, str]] = set()
        for text in self.grants:
            uid, equals, tenant = text.partition("=")
            if not uid.isdecimal() or not equals:
                raise ValueError(f"grants: expected uid=tenant, got {text!r}")
            found.add((int(uid), tenant))
        return frozenset(found)


def _sizes(name: str, of: str, texts: tuple[str, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in texts:
        key, _, size = text.rpartition("=")
        if not size.isdecimal():
            raise ValueError(f"{name}: expected {of}=bytes, got {text!r}")
        found[key] = int(size)
    return found
