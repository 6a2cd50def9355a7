"""What a frontend can be told."""

import dataclasses
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from unbroken.config import Address, ProcessConfig
from unbroken.http2.limits import EdgeLimits
from unbroken.realtime import RealtimePriority
from unbroken.thresholds import PREFILL_SHARE_MAX, PREFILL_TOKENS_MAX
from unbroken.transport import TlsFiles

_EDGE = EdgeLimits()


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
    realtime_priority: RealtimePriority = 0
    """SCHED_RR priority: news of a failure waits for no other process; 0: none."""
    tls_certificate: Path | None = None
    """PEM file with the certificate shown to clients, its chain after it; without, no TLS."""
    tls_key: Path | None = None
    """PEM file with its private key."""
    tls_client_ca: Path | None = None
    """PEM file of the authority whose certificates clients have to show; without, none do."""
    admin_tokens: Path | None = None
    """File of the tokens that callers of AdminService have to bring; without, they need none."""
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
    busy_kv_blocks_share: float | None = Field(None, ge=0, le=1)
    """A worker is busy when more of the KV blocks of each of its ranks are held, or about to be;
    if all are, new requests are refused (docs/decisions/thresholds.md)."""
    busy_prefill_tokens: int | None = Field(None, ge=0, le=PREFILL_TOKENS_MAX)
    """A worker is busy when each of its ranks has more prompt tokens to compute."""
    busy_prefill_share: float | None = Field(None, ge=0, le=PREFILL_SHARE_MAX)
    """As busy_prefill_tokens, as a multiple of what a rank can compute in one step."""
    queue_requests_max: int = Field(1024, ge=0, le=1_000_000)
    """New requests of one model that may wait while all its workers are busy
    (docs/decisions/admission-queue.md); with 0 they are refused at once."""
    queue_tokens_max: int = Field(1_000_000, ge=1, le=PREFILL_TOKENS_MAX)
    """Prompt tokens of those."""
    queue_wait_s_max: float = Field(5.0, gt=0, le=3600)
    """No new request waits for longer; one that would is refused at once."""
    preemption: bool = False
    """Streams may be paused for waiting requests of a higher priority, and go on later
    (docs/decisions/preemption.md). Needs thresholds and the queue of new requests."""
    preemption_run_s_min: float = Field(2.0, ge=0, le=3600)
    """How long a stream runs at least between two pauses."""
    preemption_pauses_max: int = Field(3, ge=1, le=1000)
    """How often one stream is paused at most."""
    preemption_wait_s_max: float = Field(30.0, gt=0, le=86400)
    """A stream that was paused for so long goes on, however busy workers are."""
    requests_running_max: int = Field(10_000, ge=1)
    """More requests at once are refused."""
    load_trailers: bool = True
    """Whether the end of each call tells the client how busy this frontend is, as ORCA has it."""
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
    relay: Literal["grpcio", "native"] = "native"
    """What carries the calls to sidecars: grpcio, or the HTTP/2 of docs/decisions/relay-hop.md."""
    edge: Literal["grpcio", "native"] = "native"
    """What serves clients: the HTTP/2 server of docs/decisions/edge.md, or grpcio's."""
    processes: int = Field(1, ge=1, le=64)
    """Processes that serve the port together, each a frontend with links and limits of its own
    (native edge; docs/decisions/processes.md)."""
    edge_connections_max: int = Field(_EDGE.connections_max, ge=1)
    """Native edge: connections at once, from accept to close; those beyond are closed at once."""
    edge_streams_max: int = Field(_EDGE.streams_max, ge=1, le=2**31 - 1)
    """Native edge: streams of a connection at once; those beyond are refused."""
    edge_header_list_bytes_max: int = Field(_EDGE.header_list_bytes_max, ge=1024, le=1024 * 1024)
    """Native edge: header fields of a request, uncompressed and 32 bytes more for each."""
    edge_header_frames_max: int = Field(_EDGE.header_frames_max, ge=1)
    """Native edge: HEADERS and CONTINUATION frames of one request."""
    edge_request_bytes_max: int = Field(_EDGE.request_bytes_max, ge=1024, le=2**31 - 1)
    """Native edge: one request message."""
    edge_held_bytes_max: int = Field(_EDGE.held_bytes_max, ge=1024)
    """Native edge: requests of all connections that have come in part."""
    edge_stream_window: int = Field(_EDGE.stream_window, ge=1024, le=2**31 - 1)
    """Native edge: what a client may send ahead on one stream."""
    edge_connection_window: int = Field(_EDGE.connection_window, ge=65535, le=2**31 - 1)
    """Native edge: what a client may send ahead on all streams of a connection."""
    edge_settings_burst: int = Field(_EDGE.settings_burst, ge=1)
    """Native edge: SETTINGS frames that a connection may send at once."""
    edge_settings_per_s: float = Field(_EDGE.settings_per_s, ge=0)
    """Native edge: SETTINGS frames that it may send each second after that."""
    edge_resets_burst: int = Field(_EDGE.resets_burst, ge=1)
    """Native edge: streams that a client may open and reset, or have reset, at once."""
    edge_resets_per_s: float = Field(_EDGE.resets_per_s, ge=0)
    """Native edge: such streams each second after that."""
    edge_control_burst: int = Field(_EDGE.control_burst, ge=1)
    """Native edge: frames that bring nothing (PING, WINDOW_UPDATE, unknown ones), at once."""
    edge_control_per_s: float = Field(_EDGE.control_per_s, ge=0)
    """Native edge: such frames each second, and four more for each DATA frame sent."""
    edge_handshake_timeout_s: float = Field(_EDGE.handshake_timeout_s, gt=0, le=600)
    """Native edge: how long TLS and the HTTP/2 greeting after it may take together."""
    edge_header_timeout_s: float = Field(_EDGE.header_timeout_s, gt=0, le=600)
    """Native edge: how long a frame or a header block may take to come."""
    edge_request_timeout_s: float = Field(_EDGE.request_timeout_s, gt=0, le=3600)
    """Native edge: how long the message of a call may take, or, once begun, each one of many."""
    edge_stall_timeout_s: float = Field(_EDGE.stall_timeout_s, gt=0, le=86400)
    """Native edge: a stream whose client takes nothing of what waits for so long is cut off, and
    so is a connection whose socket is full."""
    edge_unsent_bytes_max: int = Field(_EDGE.unsent_bytes_max, ge=65536)
    """Native edge: a connection with more waiting in its socket is closed."""
    edge_ping_idle_interval_s: float = Field(_EDGE.ping_idle_interval_s, gt=0, le=3600)
    """Native edge: as client_ping_interval_s, for connections without streams."""
    edge_pings_per_s_max: float = Field(_EDGE.pings_per_s_max, gt=0)
    """Native edge: signs of life asked for in all; with more clients, each is asked less often."""
    deadline_margin_s: float = Field(0.02, ge=0, le=1)
    """So long before its client's deadline a stream ends, so that the client still hears why; at
    most half of the time that is left."""
    deadline_estimate_share: float = Field(0.5, ge=0, le=1)
    """A new request is refused if it has less time than this share of what its first token is
    estimated to take at the fastest worker. 0: never."""
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

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "FrontendConfig":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("expected tls_certificate and tls_key together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("expected tls_certificate with tls_client_ca")
        return self

    @model_validator(mode="after")
    def _port_can_be_shared(self) -> "FrontendConfig":
        if self.processes > 1 and self.edge != "native":
            raise ValueError(
                f"expected edge native with processes above 1, got {self.edge} and "
                f"{self.processes}: grpcio takes no connections that were accepted elsewhere"
            )
        return self

    @property
    def tls(self) -> TlsFiles | None:
        """How clients are spoken to; None if in the clear."""
        if self.tls_certificate is None or self.tls_key is None:
            return None
        return TlsFiles(self.tls_certificate, self.tls_key, self.tls_client_ca)

    @property
    def edge_limits(self) -> EdgeLimits:
        """The limits of the native edge."""
        names = [field.name for field in dataclasses.fields(EdgeLimits)]
        own = {name: getattr(self, key) for name in names if hasattr(self, key := f"edge_{name}")}
        return EdgeLimits(
            **own,
            ping_interval_s=self.client_ping_interval_s,
            ping_timeout_s=self.client_ping_timeout_s,
        )
