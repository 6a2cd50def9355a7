"""`unbroken memory …`: what a memory service of this host holds, and for whom."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Final

import grpc.aio
import typer
import uvloop

from unbroken import terminal
from unbroken.errors import UnbrokenError
from unbroken.status import from_rpc_error
from unbroken.terminal import Output, Table, short
from unbroken.transport import open_channel
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_pb2_grpc

CALL_TIMEOUT_S: Final = 30.0
VERIFY_TIMEOUT_S: Final = 3600.0
"""It reads everything."""
HOST: Final = "host"
"""What the memory of no GPU is called here."""

app = typer.Typer(
    name="memory", no_args_is_help=True, help="Look into the memory service of this host."
)

ControlOption = Annotated[
    Path,
    typer.Option(
        "--control", envvar="UNBROKEN_MEMORY_CONTROL", help="control.sock in its directory."
    ),
]
TenantOption = Annotated[str, typer.Option("--tenant", help="Of this tenant only.")]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="Text for people, or JSON.")]
CONTROL_DEFAULT: Final = Path(".run") / "memory" / "control.sock"

Stub = memory_pb2_grpc.MemoryServiceStub


@app.command()
def usage(control: ControlOption = CONTROL_DEFAULT, output: OutputOption = Output.TEXT) -> None:
    """Say how much memory there is, and who has it."""

    async def scenario(stub: Stub) -> None:
        found = await stub.GetUsage(pb.GetUsageRequest(), timeout=CALL_TIMEOUT_S)
        if output is Output.JSON:
            terminal.show_message(found)
            return
        vault = "a vault keeps it" if found.has_vault else "there is no vault"
        terminal.write(
            f"{_size(found.used_bytes)} of {_size(found.capacity_bytes)} used, "
            f"{found.num_blocks} blocks, {found.num_pinned} of them read; {vault}\n"
        )
        for memory in found.memories:
            if memory.device:
                terminal.write(
                    f"{memory.device}: {_size(memory.used_bytes)} of "
                    f"{_size(memory.capacity_bytes)} used; it is "
                    f"{short(pb.MemoryHealth, memory.health)}\n"
                )
        if found.tenants:
            terminal.show_list(output, found.tenants, TENANTS)

    _run(control, output, scenario)


@app.command()
def segments(
    tenant: TenantOption = "",
    control: ControlOption = CONTROL_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """List the versions of all segments."""

    async def scenario(stub: Stub) -> None:
        found = [segment for segment in await _segments(stub, tenant) if segment.name]
        terminal.show_list(output, found, SEGMENTS)

    _run(control, output, scenario)


@app.command()
def blocks(
    tenant: TenantOption = "",
    control: ControlOption = CONTROL_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """List the slabs of the block store, and how many blocks each has."""

    async def scenario(stub: Stub) -> None:
        found = [segment for segment in await _segments(stub, tenant) if not segment.name]
        terminal.show_list(output, found, SLABS)

    _run(control, output, scenario)


@app.command()
def sessions(control: ControlOption = CONTROL_DEFAULT, output: OutputOption = Output.TEXT) -> None:
    """List the processes that hold memory, or did."""

    async def scenario(stub: Stub) -> None:
        found = await stub.ListSessions(pb.ListSessionsRequest(), timeout=CALL_TIMEOUT_S)
        terminal.show_list(output, found.sessions, SESSIONS)

    _run(control, output, scenario)


@app.command()
def verify(
    tenant: TenantOption = "",
    control: ControlOption = CONTROL_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Compare everything with its checksum. Exit status 1 if something did not match."""

    async def scenario(stub: Stub) -> None:
        request = pb.VerifyRequest(tenant=tenant)
        found = await stub.Verify(request, timeout=VERIFY_TIMEOUT_S)
        facts = {
            "intact": found.num_intact,
            "corrupt": found.num_corrupt,
            "bytes": found.num_bytes,
        }
        text = (
            f"{found.num_intact} blocks and slabs are intact, {found.num_corrupt} were not and "
            f"are dropped ({_size(found.num_bytes)} read)"
        )
        terminal.show_result(output, facts, text)
        if found.num_corrupt:
            raise typer.Exit(1)

    _run(control, output, scenario)


@app.command()
def evict(
    tenant: TenantOption = "",
    segment: Annotated[
        str, typer.Option(help="Name of a segment; sealed slabs of blocks, unless given.")
    ] = "",
    control: ControlOption = CONTROL_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Free what nobody uses: blocks whose writer is gone, or a segment without readers."""

    async def scenario(stub: Stub) -> None:
        request = pb.EvictRequest(tenant=tenant, segment=segment)
        freed = (await stub.Evict(request, timeout=CALL_TIMEOUT_S)).freed_bytes
        terminal.show_result(output, {"freed_bytes": freed}, f"freed {_size(freed)}")

    _run(control, output, scenario)


@app.command()
def watch(
    boot_token: Annotated[
        int, typer.Option(min=0, help="Life of the service that --after is of.")
    ] = 0,
    after: Annotated[int, typer.Option(min=0, help="Sequence of the last event seen.")] = 0,
    control: ControlOption = CONTROL_DEFAULT,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show what happens, until interrupted. With JSON, one message a line."""

    async def scenario(stub: Stub) -> None:
        request = pb.WatchRequest(boot_token=boot_token, sequence=after)
        async for response in stub.Watch(request):
            if output is Output.JSON:
                terminal.show_message(response)
            else:
                terminal.write(_events_text(response))

    _run(control, output, scenario)


def _events_text(response: pb.WatchResponse) -> str:
    """One line for each event."""
    lines = ["events are missing here\n"] if response.has_gap else []
    for event in response.events:
        facts = [
            f"{field.name}={value}"
            for field, value in event.ListFields()
            if field.name not in {"sequence", "kind"}
        ]
        kind = short(pb.MemoryEventKind, event.kind)
        lines.append(f"{event.sequence:>8}  {' '.join((kind, *facts))}\n")
    return "".join(lines)


async def _segments(stub: Stub, tenant: str) -> list[pb.Segment]:
    request = pb.ListSegmentsRequest(tenant=tenant)
    return list((await stub.ListSegments(request, timeout=CALL_TIMEOUT_S)).segments)


def _run(control: Path, output: Output, scenario: Callable[[Stub], Awaitable[None]]) -> None:
    address = f"unix:{control.absolute()}"

    async def whole() -> None:
        async with open_channel(address) as channel:
            try:
                await scenario(memory_pb2_grpc.MemoryServiceStub(channel))
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error

    try:
        uvloop.run(whole())
    except UnbrokenError as error:
        terminal.show_error(output, error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _joined(size: int) -> str:
    return _size(size).replace(" ", "")


def _tenant_row(tenant: pb.TenantUsage) -> Sequence[object]:
    has_quota = tenant.quota_bytes < 2**50
    return (
        tenant.tenant or "-",
        tenant.device or HOST,
        _joined(tenant.used_bytes),
        _joined(tenant.quota_bytes) if has_quota else "-",
    )


def _segment_row(segment: pb.Segment) -> Sequence[object]:
    return (
        segment.tenant or "-",
        segment.name,
        short(pb.SegmentClass, segment.segment_class),
        short(pb.SegmentState, segment.state),
        segment.version,
        segment.epoch,
        _joined(sum(slab.size_bytes for slab in segment.slabs)),
        len(segment.slabs),
        segment.slabs[0].device or HOST,
        segment.owner_session_id or "-",
        segment.num_readers,
    )


def _slab_row(segment: pb.Segment) -> Sequence[object]:
    (slab,) = segment.slabs
    return (
        segment.tenant or "-",
        slab.slab_id,
        short(pb.SlabState, slab.state),
        segment.num_blocks,
        slab.num_slots,
        segment.num_pinned,
        _joined(slab.size_bytes),
        slab.device or HOST,
        segment.owner_session_id or "-",
    )


def _session_row(session: pb.Session) -> Sequence[object]:
    return (
        session.session_id,
        session.client or "-",
        session.tenant or "-",
        session.pid,
        session.uid,
        session.cohort or "-",
        f"{session.rank}/{max(1, session.num_ranks)}",
        short(pb.FenceLevel, session.fence),
        "yes" if session.is_connected else "no",
    )


TENANTS: Final = Table("TENANT MEMORY USED QUOTA", _tenant_row)
SEGMENTS: Final = Table(
    "TENANT NAME CLASS STATE VERSION EPOCH SIZE SLABS MEMORY OWNER READERS", _segment_row
)
SLABS: Final = Table("TENANT SLAB STATE BLOCKS SLOTS READ SIZE MEMORY OWNER", _slab_row)
SESSIONS: Final = Table("SESSION CLIENT TENANT PID UID COHORT RANK FENCE CONNECTED", _session_row)
