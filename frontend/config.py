"""What a frontend can be told."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from unbroken.config import Address, ProcessConfig


class FrontendConfig(ProcessConfig):
    """Serves InferenceService and AdminService: clients call it, it calls the sidecars."""

    frontend_id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")
    """Stable name, unique in the mesh."""
    discovery: Path
    """Directory in which the processes of this machine find each other."""
    listen: Address = "127.0.0.1:0"
    """host:port for clients; port 0 lets the kernel choose."""
    advertise: Address | None = None
    """host:port under which others reach it, if that is not where it listens."""
    metrics_listen: Address | None = None
    """host:port of the metrics endpoint; none if not given."""
    continuation: Literal["prefer_exact", "require_exact", "allow_inexact", "never"] = (
        "prefer_exact"
    )
    """What happens to a stream that loses its worker, unless its request says."""
    migrations_max: int = Field(3, ge=0, le=1000)
    """How many workers a choice may lose and still go on, unless its request says."""
    window_tokens: int = Field(1024, ge=2, le=65536)
    """Tokens of a choice that a worker may be ahead of the client."""
    placement_timeout_s: float = Field(30.0, gt=0, le=3600)
    """How long a request looks for a worker."""
    regenerate_tokens_max: int = Field(4096, ge=0)
    """Delivered tokens that may be generated again to go on with a stream."""
    resume_queue: bool = True
    """Streams that lost their worker go to others as fast as those bear it; without, at once."""
    resume_share: float = Field(0.5, gt=0, le=1)
    """Of its measured prefill rate that a worker gives while streams wait to resume."""
    new_work_share: float = Field(0.2, gt=0, lt=1)
    """Of that, for new requests."""
    resume_burst_tokens: int = Field(4096, ge=1)
    """Prompt tokens that a worker is given at once in any case, however slow it is."""
    prefill_tokens_per_s: float = Field(20_000.0, gt=0)
    """Prefill rate of a worker that has not been measured yet."""
    fleet_loss_share: float = Field(0.5, gt=0, le=1)
    """If more of a model's workers are lost at once, new requests are refused until all resumed."""
    relink_s: float = Field(0.25, ge=0, le=60)
    """How long a stream whose link broke waits for it, before it goes on at another worker."""
    resume_keys: Path | None = None
    """File with the keys that sign resume tokens, shared by all frontends; unless given, one is
    made in the discovery directory."""
    resume_token_lifetime_s: float = Field(3600.0, ge=1, le=604800)
    """How long a resume token can be used; streams that run longer get newer ones."""
    requests_running_max: int = Field(10_000, ge=1)
    """More requests at once are refused."""
    client_ping_interval_s: float = Field(1.0, ge=0.1, le=3600)
    """A client that was silent for so long is asked for a sign of life."""
    client_ping_timeout_s: float = Field(1.5, ge=0.1, le=3600)
    """A client that gives no sign of life for so long after it was asked is gone."""
    heartbeat_interval_s: float = Field(0.1, ge=0.01, le=10)
    """Between two heartbeats to a sidecar."""
    link_silence_max_s: float = Field(2.0, ge=0.1, le=60)
    """A link on which nothing comes for so long is lost, whatever pauses it was used to."""
    link_suspect_phi: float = Field(1.0, gt=0, le=50)
    """A worker whose silence is so surprising (-log10 of its probability) gets no new work."""
    link_dead_phi: float = Field(8.0, gt=0, le=50)
    """A link whose silence is so surprising is lost."""
    link_allowance_s: float = Field(0.25, ge=0, le=60)
    """Pauses of a link beyond its heartbeat interval that surprise nobody."""
    link_forgotten_grace_s: float = Field(5.0, ge=0, le=3600)
    """How long a worker that discovery forgot is called again after its link was lost."""
    outlier_failures_max: int = Field(3, ge=1, le=1000)
    """A worker that fails so many attempts in a row by its own fault is ejected for a while."""
    outlier_slow_factor: float = Field(3.0, gt=1, le=1000)
    """A worker that takes so many times as long as the median of its peers is ejected."""
    ejection_s: float = Field(5.0, gt=0, le=3600)
    """How long a worker is ejected the first time; each time after, twice as long."""
    ejection_s_max: float = Field(300.0, gt=0, le=86400)
    """How long a worker is ejected at most."""
    ejected_share_max: float = Field(0.5, ge=0, le=1)
    """No more than this share of a model's ready workers is ejected, and never the last one."""
    query_deaths_max: int = Field(3, ge=2, le=1000)
    """A request is stopped when so many engines died under it and it never got any further."""
    query_of_death_memory_s: float = Field(600.0, ge=0, le=86400)
    """For how long a request that was stopped so is refused when it is asked again."""
    deadline_margin_s: float = Field(0.02, ge=0, le=1)
    """So long before its client's deadline a stream ends, so that the client still hears why."""
    shutdown_grace_s: float = Field(30.0, ge=0, le=3600)
    """How long running streams may go on after SIGTERM."""

    @model_validator(mode="after")
    def _silence_is_noticed(self) -> "FrontendConfig":
        # Else one heartbeat that is late is a death.
        if 2 * self.heartbeat_interval_s >= self.link_silence_max_s:
            raise ValueError(
                "expected heartbeat_interval_s below half of link_silence_max_s "
                f"({self.link_silence_max_s:g}), got {self.heartbeat_interval_s:g}"
            )
        if self.link_suspect_phi > self.link_dead_phi:
            raise ValueError(
                f"expected link_suspect_phi up to link_dead_phi ({self.link_dead_phi:g}), "
                f"got {self.link_suspect_phi:g}"
            )
        return self
