"""What a vault keeps beside descriptors, and what another life of the service makes of it.

A version with several slabs has several entries, which are put one after the other; so a service
that dies in between leaves some that are older. The oldest counts then: nobody was told of any that
is newer.
"""

from collections.abc import Iterable

from memory_service.accounts import Device
from memory_service.gpu_health import Health
from memory_service.holdings import Holdings
from memory_service.segments import SegmentClass, State, Version
from memory_service.sessions import Peer, Session
from memory_service.store import SlabState, StoreSlab
from unbroken.memory import checksums
from unbroken.memory.checksums import Algorithm
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_session_pb2 as wire


def session_to_proto(session: Session) -> pb.Session:
    """As operators and vaults see it."""
    peer = session.peer
    return pb.Session(
        session_id=session.session_id,
        client=peer.client,
        tenant=peer.tenant,
        pid=peer.pid,
        uid=peer.uid,
        cohort=peer.cohort,
        rank=peer.rank,
        num_ranks=peer.num_ranks,
        fence=pb.FenceLevel.ValueType(int(session.fence.fence)),
        is_connected=session.is_connected,
    )


def version_to_proto(holdings: Holdings, version: Version) -> pb.Segment:
    """With all its slabs."""
    sums = version.checksums or (None,) * len(version.slab_ids)
    slabs = [
        pb.Slab(
            slab_id=slab_id,
            size_bytes=holdings.size_of(slab_id),
            checksum=checksum,
            memory_kind=kind_to_proto(version.device),
            device=version.device.uuid,
            checksum_algorithm=algorithm_to_proto(version.algorithm),
            allocated_bytes=holdings.size_of(slab_id),
        )
        for slab_id, checksum in zip(version.slab_ids, sums, strict=True)
    ]
    return pb.Segment(
        name=version.name,
        tenant=version.tenant,
        state=pb.SegmentState.ValueType(int(version.state)),
        epoch=version.epoch,
        version=version.version,
        owner_session_id=version.owner,
        layout=version.layout,
        slabs=slabs,
        num_readers=len(version.readers),
        segment_class=pb.SegmentClass.ValueType(int(version.kind)),
    )


def health_to_proto(health: Health) -> pb.MemoryHealth.ValueType:
    """How a memory is."""
    return pb.MemoryHealth.ValueType(int(health))


def kind_to_proto(device: Device) -> pb.MemoryKind.ValueType:
    """Of which kind a memory is."""
    return pb.MemoryKind.ValueType(int(device.kind))


def algorithm_to_proto(algorithm: Algorithm) -> pb.ChecksumAlgorithm.ValueType:
    """As the contract numbers it."""
    return pb.ChecksumAlgorithm.ValueType(int(algorithm))


def slab_to_proto(slab: StoreSlab) -> pb.Slab:
    """A slab of the block store."""
    return pb.Slab(
        slab_id=slab.slab_id,
        size_bytes=slab.block_bytes * slab.num_slots,
        block_bytes=slab.block_bytes,
        num_slots=slab.num_slots,
        state=pb.SlabState.ValueType(int(slab.state)),
        memory_kind=kind_to_proto(slab.device),
        device=slab.device.uuid,
        allocated_bytes=slab.allocated_bytes,
    )


def store_to_proto(slab: StoreSlab) -> pb.Segment:
    """A slab of the block store, as the segment that it stands for."""
    return pb.Segment(
        tenant=slab.tenant,
        epoch=slab.epoch,
        version=slab.epoch,
        owner_session_id=slab.owner,
        slabs=[slab_to_proto(slab)],
        num_blocks=len(slab.blocks),
        num_pinned=sum(1 for block in slab.blocks.values() if block.num_pins),
        segment_class=pb.SEGMENT_CLASS_KV_STORE,
    )


def slab_entry(holdings: Holdings, slab_id: int) -> wire.VaultEntry | None:
    """What the vault has to know of a slab; None if it is gone."""
    slab = holdings.store.get_slab(slab_id)
    if slab is not None:
        return wire.VaultEntry(entry_id=slab_id, segment=store_to_proto(slab), num_slabs=1)
    for version in holdings.segments:
        if slab_id in version.slab_ids:
            index = version.slab_ids.index(slab_id)
            segment = version_to_proto(holdings, version)
            mine = segment.slabs[index]
            del segment.slabs[:]
            segment.slabs.append(mine)
            return wire.VaultEntry(
                entry_id=slab_id,
                segment=segment,
                slab_index=index,
                num_slabs=len(version.slab_ids),
            )
    return None


def session_entry(session: Session) -> wire.VaultEntry:
    """What the vault has to know of a session."""
    return wire.VaultEntry(
        entry_id=session.session_id, session=session_to_proto(session), secret=session.secret
    )


def gpu_entry(holdings: Holdings, device: Device) -> wire.VaultEntry:
    """What the vault has to know of a GPU that is in trouble."""
    gpu = wire.VaultGpu(device=device.uuid, health=health_to_proto(holdings.health_of(device)))
    return wire.VaultEntry(entry_id=holdings.gpu_entries[device], gpu=gpu)


def device_of(entry: wire.VaultEntry) -> str:
    """The GPU that an entry is of; empty if it is of none."""
    if entry.HasField("gpu"):
        return entry.gpu.device
    return entry.segment.slabs[0].device if entry.segment.slabs else ""


def restore_absent(holdings: Holdings, entry: wire.VaultEntry) -> None:
    """An entry of a GPU that is not there now."""
    segment = entry.segment
    holdings.restore_absent(
        segment.owner_session_id, (entry.entry_id, segment.epoch, segment.version)
    )


def restore(holdings: Holdings, entries: Iterable[wire.VaultEntry], now: float) -> None:
    """Hold what an earlier life of the service held. What is left over belongs to nobody."""
    parts: dict[tuple[str, str, int], list[wire.VaultEntry]] = {}
    stores: list[pb.Segment] = []
    for entry in entries:
        if entry.HasField("session"):
            holdings.restore_session(
                entry.session.session_id, _peer(entry.session), entry.secret, now
            )
        elif entry.HasField("gpu"):
            device = holdings.ledger.device(pb.MEMORY_KIND_CUDA, entry.gpu.device)
            holdings.restore_gpu(device, Health(entry.gpu.health), entry.entry_id)
        elif entry.segment.segment_class == pb.SEGMENT_CLASS_KV_STORE:
            stores.append(entry.segment)
        else:
            segment = entry.segment
            key = (segment.tenant, segment.name, segment.version)
            parts.setdefault(key, []).append(entry)
    for segment in stores:
        holdings.restore_slab(_store_slab(holdings, segment))
    newest: dict[tuple[str, str], int] = {}
    whole: list[tuple[Version, list[int]]] = []
    for key in sorted(parts):
        some = parts[key]
        if len(some) != some[0].num_slabs:
            continue
        version = _version(holdings, some)
        whole.append((version, [entry.segment.slabs[0].size_bytes for entry in some]))
        if version.state is State.SEALED:
            newest[key[:2]] = max(newest.get(key[:2], 0), version.version)
    for version, sizes in whole:
        is_old = version.version < newest.get((version.tenant, version.name), 0)
        if version.state is State.SEALED and is_old:
            version.state = State.RETIRED
        holdings.restore_version(version, sizes, now)
    holdings.restored()


def _peer(session: pb.Session) -> Peer:
    return Peer(
        client=session.client,
        tenant=session.tenant,
        pid=session.pid,
        uid=session.uid,
        cohort=session.cohort,
        rank=session.rank,
        num_ranks=session.num_ranks,
    )


def _store_slab(holdings: Holdings, segment: pb.Segment) -> StoreSlab:
    (slab,) = segment.slabs
    return StoreSlab(
        slab.slab_id,
        segment.tenant,
        segment.owner_session_id,
        segment.epoch,
        slab.block_bytes,
        slab.num_slots,
        SlabState(slab.state),
        holdings.ledger.device(slab.memory_kind, slab.device),
    )


def _version(holdings: Holdings, entries: list[wire.VaultEntry]) -> Version:
    entries.sort(key=lambda entry: entry.slab_index)
    segments = [entry.segment for entry in entries]
    oldest = min(segments, key=lambda segment: (segment.epoch, segment.state))
    state = State(oldest.state)
    is_immutable = state in (State.SEALED, State.RETIRED)
    slab = oldest.slabs[0]
    return Version(
        oldest.tenant,
        oldest.name,
        SegmentClass(oldest.segment_class),
        oldest.version,
        oldest.epoch,
        oldest.owner_session_id,
        tuple(segment.slabs[0].slab_id for segment in segments),
        state,
        oldest.layout,
        tuple(segment.slabs[0].checksum for segment in segments) if is_immutable else (),
        checksums.of_contract(slab.checksum_algorithm),
        holdings.ledger.device(slab.memory_kind, slab.device),
    )
