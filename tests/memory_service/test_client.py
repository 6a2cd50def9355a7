"""Claims of `unbroken.memory.client`: what it does when it loses the service, or some memory."""

import contextlib
import fcntl
import os
import resource
import socket
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from memory_service.accounts import HOST
from tests.memory_service.inside import Inside, inside
from tests.memory_service.processes import until
from tests.memory_service.scripted import Scripted
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory import channel, checksums, records
from unbroken.memory.checksums import Algorithm
from unbroken.memory.client import MemoryClient, SegmentClass
from unbroken.memory.rows import Rows
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_session_pb2 as wire

PAGE = 4096
KEYS = [bytes([number]) * 32 for number in range(8)]


@pytest.fixture
def service(tmp_path: Path) -> Generator[Inside]:
    with inside(tmp_path) as service:
        yield service


def fill(client: MemoryClient, number: int = 4, *, first: int = 0) -> None:
    writer = client.open_writer(PAGE, number)
    for index in range(first, first + number):
        assert writer.put(KEYS[index], bytes([index]) * PAGE, 16)
    writer.flush()


# Pins.


def test_a_pin_is_not_valid_once_the_service_is_gone(service: Inside) -> None:
    with service.client() as writing, service.client() as reading:
        fill(writing)
        with reading.get(KEYS[:4]) as blocks:
            assert len(blocks) == 4
            assert blocks.is_valid
            service.end()
            assert not blocks.is_valid, "its writer may be bound to the next service already"
        service.begin()


def test_a_pin_is_not_valid_once_it_is_released_or_its_client_closed(service: Inside) -> None:
    with service.client() as writing:
        fill(writing)
        reading = service.client()
        with reading.get(KEYS[:1]) as blocks:
            pass
        assert not blocks.is_valid
        pinned = reading.get(KEYS[:1])
        reading.close()
        assert not pinned.is_valid


def two_blocks(*sums: int) -> wire.Pinned:
    """A slab of two blocks with these checksums, as a client is first told of it."""
    return wire.Pinned(
        pin_id=1,
        slab_ids=[5, 5],
        slots=[0, 1],
        generations=[1, 1],
        num_tokens=[16, 16],
        checksums=sums,
        new_slabs=[pb.Slab(slab_id=5, size_bytes=2 * PAGE, block_bytes=PAGE, num_slots=2)],
    )


def test_a_pin_of_before_a_restart_is_not_taken_for_one_of_after_it(tmp_path: Path) -> None:
    # The second block is corrupt, and the service dies over the report of that.
    data = b"a" * PAGE + b"b" * PAGE
    pinned = two_blocks(checksums.compute(data[:PAGE]), 7)
    service = Scripted(tmp_path / "session.sock")
    with service.running():
        service.answers("get", wire.SessionResponse(pinned=pinned), [data])
        service.ends_connection("report_corrupt")
        client = MemoryClient(tmp_path / "session.sock")
        blocks = client.get(KEYS[:2])
        assert service.num_bound == 2, "it bound again over the report"
        assert len(blocks) == 1
        assert not blocks.is_valid
        client.close()


def test_a_block_whose_checksum_nobody_here_can_compute_is_a_miss(tmp_path: Path) -> None:
    data = b"a" * PAGE + b"b" * PAGE
    pinned = two_blocks(checksums.compute(data[:PAGE]), checksums.compute(data[PAGE:]))
    cases: list[tuple[list[int], int]] = [([], 2), ([1, 99], 1), ([1, -1], 1), ([99, 1], 0)]
    service = Scripted(tmp_path / "session.sock")
    with service.running(), MemoryClient(tmp_path / "session.sock") as client:
        for algorithms, number in cases:
            del pinned.checksum_algorithms[:]
            pinned.checksum_algorithms.extend(map(pb.ChecksumAlgorithm.ValueType, algorithms))
            service.answers("get", wire.SessionResponse(pinned=pinned), [data])
            with client.get(KEYS[:2]) as blocks:
                assert len(blocks) == number


def test_rows_and_columns_tell_the_same(service: Inside) -> None:
    with service.client() as writing:
        fill(writing)
        answers: list[wire.Pinned] = []
        with channel.connect(service.socket) as sock:
            sock.settimeout(10)
            token = ask(sock, bind=wire.Bind(protocol_version=1)).bound.boot_token
            for in_rows in (False, True):
                get = wire.GetBlocks(keys=b"".join(KEYS[:4]), in_rows=in_rows)
                answers.append(ask(sock, boot_token=token, get=get).pinned)
        columns, rows = answers
        assert not columns.rows
        assert not rows.slab_ids
        told = Rows(rows.rows)
        assert [told[index] for index in range(len(told))] == [
            (slab, checksum, slot, generation, 16, Algorithm.XXH3)
            for slab, checksum, slot, generation in zip(
                columns.slab_ids,
                columns.checksums,
                columns.slots,
                columns.generations,
                strict=True,
            )
        ]


def test_half_a_row_is_a_broken_contract(tmp_path: Path) -> None:
    service = Scripted(tmp_path / "session.sock")
    with service.running(), MemoryClient(tmp_path / "session.sock") as client:
        service.answers("get", wire.SessionResponse(pinned=wire.Pinned(rows=bytes(33))), [])
        with pytest.raises(UnbrokenError) as raised:
            client.get(KEYS[:2])
        assert raised.value.reason is Reason.PROTOCOL_VIOLATION


def test_a_silent_release_is_done_and_not_answered(service: Inside) -> None:
    with service.client() as writing:
        fill(writing)
        with channel.connect(service.socket) as sock:
            sock.settimeout(10)
            bound = ask(sock, bind=wire.Bind(protocol_version=1)).bound
            assert bound.releases_silently
            token = bound.boot_token
            get = wire.GetBlocks(keys=KEYS[0])
            pin_id = ask(sock, boot_token=token, get=get).pinned.pin_id
            assert service.run(lambda: service.holdings.store.num_pins) == 1
            for pin in (pin_id, 99):
                release = wire.ReleasePin(pin_id=pin, is_silent=True)
                channel.send(sock, wire.SessionRequest(boot_token=token, release_pin=release))
            find = wire.FindBlocks(keys=KEYS[0])
            assert ask(sock, boot_token=token, find=find).HasField("found"), "the first answer"
            assert service.run(lambda: service.holdings.store.num_pins) == 0


def test_an_older_service_answers_to_releases_and_is_heard(tmp_path: Path) -> None:
    service = Scripted(tmp_path / "session.sock")
    with service.running(), MemoryClient(tmp_path / "session.sock") as client:
        service.answers("get", wire.SessionResponse(pinned=wire.Pinned(pin_id=1)), [])
        for _ in range(3):
            with client.get(KEYS[:1]) as blocks:
                assert len(blocks) == 0
        assert client.num_lives == 1, "no answer was taken for another"


def ask(sock: socket.socket, **request: Any) -> wire.SessionResponse:
    """One call; descriptors are closed."""
    channel.send(sock, wire.SessionRequest(**request))
    response, fds = channel.receive(sock, wire.SessionResponse)
    channel.close_all(fds)
    return response


# Writers.


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_key_of_another_length_is_refused(service: Inside, length: int) -> None:
    with service.client() as client:
        writer = client.open_writer(PAGE, 1)
        with pytest.raises(ValueError, match="32 bytes"):
            writer.put(bytes(length), bytes(PAGE), 16)
        assert writer.put(bytes(32), bytes(PAGE), 16), "no slot was taken"


@pytest.mark.parametrize("num_tokens", [-1, 65_536])
def test_a_number_of_tokens_that_fits_into_no_record_is_refused(
    service: Inside, num_tokens: int
) -> None:
    with service.client() as client:
        writer = client.open_writer(PAGE, 1)
        with pytest.raises(ValueError, match="65535 tokens"):
            writer.put(bytes(32), bytes(PAGE), num_tokens)
        assert writer.put(bytes(32), bytes(PAGE), 16), "no slot was taken"


def test_a_block_is_measured_in_bytes_whatever_its_items_are(service: Inside) -> None:
    with service.client() as client:
        writer = client.open_writer(PAGE, 1)
        words = memoryview(bytes(range(256)) * 16).cast("Q")
        assert writer.put(KEYS[0], words, 16)
        writer.flush()
        with client.get(KEYS[:1]) as blocks:
            assert blocks[0].data == words.cast("B")


def test_nobody_binds_between_a_slot_being_given_back_and_its_record_saying_so(
    tmp_path: Path,
) -> None:
    # A thread is told that it may overwrite a block; before it can say so, the connection ends and
    # another thread binds again. The records that the service reads then must not have the block.
    service = Scripted(tmp_path / "session.sock")
    with service.running():
        slab = pb.Slab(slab_id=5, size_bytes=PAGE, block_bytes=PAGE, num_slots=1)
        granted = wire.Granted(segment=pb.Segment(slabs=[slab]))
        fds = service.answers(
            "open_slab", wire.SessionResponse(granted=granted), [bytes(PAGE), bytes(64)]
        )
        service.answers("commit", wire.SessionResponse(committed=wire.Committed()))
        service.answers("find", wire.SessionResponse(found=wire.Found()))
        reclaimed = wire.SessionResponse(reclaimed=wire.Reclaimed(slots=[0]))
        service.answers("reclaim", reclaimed)
        client = MemoryClient(tmp_path / "session.sock")
        writer = client.open_writer(PAGE, 1)
        assert writer.put(KEYS[0], bytes(PAGE), 16)
        other = threading.Thread(target=lambda: client.find(KEYS[:1]))

        def after_reclaim() -> None:  # In the service's thread, before the answer is sent.
            other.start()
            service.bind_slabs = [slab]
            service.end_after_answer = True

        service.before_answer = after_reclaim
        read: list[bytes] = []
        service.on_bind = lambda: read.append(os.pread(fds[1], records.RECORD_BYTES, 0))
        assert writer.put(KEYS[1], bytes(PAGE), 16)
        other.join(20)
        assert not other.is_alive()
        record = records.parse(read[-1], slab_id=5, slot=0)
        assert record is not None
        assert record.key != KEYS[0], "the block that it may overwrite"
        client.close()


# Calls.


def test_a_call_that_ends_every_connection_is_not_made_for_ever(tmp_path: Path) -> None:
    service = Scripted(tmp_path / "session.sock")
    with service.running():
        service.ends_connection("get", times=1000)
        client = MemoryClient(tmp_path / "session.sock")
        with pytest.raises(UnbrokenError) as raised:
            client.get(KEYS[:1])
        assert raised.value.reason is Reason.UNREACHABLE
        assert service.num_bound < 10
        client.close()


def test_blocks_in_more_new_slabs_than_a_packet_has_room_for_come_in_two_answers(
    service: Inside,
) -> None:
    keys = [number.to_bytes(32, "little") for number in range(channel.FDS_MAX + 3)]
    with service.client() as first, service.client() as second, service.client() as reading:
        for index, key in enumerate(keys):
            writer = (first if index % 2 else second).open_writer(8, 1)
            assert writer.put(key, index.to_bytes(8, "little"), 1)
            writer.flush()
        assert reading.find(keys) == len(keys)
        with reading.get(keys) as blocks:
            assert len(blocks) == channel.FDS_MAX
        with reading.get(keys) as blocks:
            assert len(blocks) == len(keys)
            assert bytes(blocks[-1].data) == (len(keys) - 1).to_bytes(8, "little")


@pytest.mark.parametrize("seconds", [61, -1, 10**14, 2**63 - 1])
def test_a_time_that_is_too_long_is_refused_however_long(service: Inside, seconds: int) -> None:
    with service.client() as client:
        get = wire.GetBlocks(keys=KEYS[0])
        get.ttl.seconds = seconds
        grant = wire.GrantReads()
        grant.ttl.seconds = seconds if seconds != 61 else 86_401
        for request in (wire.SessionRequest(get=get), wire.SessionRequest(grant_reads=grant)):
            with pytest.raises(UnbrokenError) as raised:
                client.call(request)
            assert raised.value.reason is Reason.INVALID_FIELD


def test_a_call_that_hits_a_bug_is_answered_and_so_are_the_next(service: Inside) -> None:
    with service.client() as client:
        writer = client.open_writer(PAGE, 1)
        assert writer.put(KEYS[0], bytes(PAGE), 16)
        service.keeper.bug = ZeroDivisionError("a bug")
        with pytest.raises(UnbrokenError) as raised:
            writer.flush()
        assert raised.value.reason is Reason.INTERNAL
        writer.flush()
        assert client.find(KEYS[:1]) == 1
        assert client.num_lives == 1


# What is mapped, and charged.


def used(service: Inside) -> tuple[int, int]:
    accounts = service.holdings.ledger.accounts[HOST]
    return service.run(lambda: (accounts.total, accounts.total_unreclaimed))


def look_at(client: MemoryClient) -> memoryview:
    """A view that outlives its pin."""
    with client.get(KEYS[:1]) as blocks:
        return blocks[0].data


@contextlib.contextmanager
def descriptors(number: int) -> Generator[None]:
    """This process may open so many more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(number + 1)]
    channel.close_all(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def evict(service: Inside) -> None:
    def work() -> None:
        service.holdings.evict("", "")
        service.keeper.obey()

    service.run(work)


def test_memory_that_a_reader_has_mapped_is_charged_until_it_lets_go(service: Inside) -> None:
    writing, reading = service.client(), service.client()
    fill(writing)
    with reading.get(KEYS[:4]) as blocks:
        assert len(blocks) == 4
    writing.close()
    total, _ = used(service)
    evict(service)
    assert used(service) == (total, total), "freed, and mapped"
    reading.get(KEYS[:1]).release()
    assert used(service) == (0, 0), "it was told, and unmapped it"
    reading.close()


def test_memory_that_somebody_looks_at_comes_back_when_he_looks_away(service: Inside) -> None:
    with service.client() as writing:
        fill(writing)
        reading = service.client()
        view = look_at(reading)
    evict(service)
    reading.get(KEYS[:1]).release()
    assert used(service)[1] > 0, "he has a view of it"
    assert bytes(view) == bytes([0]) * PAGE
    view.release()
    reading.get(KEYS[:1]).release()
    assert used(service) == (0, 0)
    reading.close()


def test_a_client_that_closes_with_views_is_charged_for_them_and_no_other_is(
    service: Inside,
) -> None:
    with service.client() as writing:
        fill(writing)
        reading, other = service.client(), service.client()
        view = look_at(reading)
        other.get(KEYS[:1]).release()
        other.close()
        reading.close()
    evict(service)
    assert used(service)[1] > 0
    assert bytes(view) == bytes([0]) * PAGE
    sessions = service.run(lambda: [one.session_id for one in service.holdings.sessions])
    assert sessions == [reading.session_id], "until its process exits"


def test_a_pool_that_somebody_has_a_view_of_is_not_another_ones_after_close(
    service: Inside,
) -> None:
    owner, heir = service.client(), service.client()
    pool = owner.create("pool", SegmentClass.KV_POOL, [PAGE])
    owner.freeze(pool)
    view = memoryview(pool.slabs[0])
    owner.close()
    with pytest.raises(UnbrokenError) as raised:
        heir.adopt("pool", timeout_s=0.05)
    assert raised.value.reason is Reason.NOT_FENCED, "it could still be written to"
    view[0] = 1
    heir.close()


def test_what_a_process_lost_is_marked_when_it_binds_again(service: Inside) -> None:
    with service.client() as owner, service.client() as other:
        pool = owner.create("pool", SegmentClass.KV_POOL, [PAGE])
        owner.seal(owner.create("weights", SegmentClass.WEIGHTS, [PAGE]))
        weights = other.attach("weights")
        writer = owner.open_writer(PAGE, 1)
        service.end()
        service.begin()
        assert owner.find(KEYS[:1]) == 0
        assert other.find(KEYS[:1]) == 0
        assert (pool.is_lost, weights.is_lost, writer.is_lost) == (True, True, True)
        again = owner.create("pool", SegmentClass.KV_POOL, [PAGE])
        assert not again.is_lost
        owner.release(pool)
        other.release(weights)


def test_what_a_process_has_it_has_after_its_connection_broke(service: Inside) -> None:
    with service.client() as owner, service.client() as other:
        pool = owner.create("pool", SegmentClass.KV_POOL, [PAGE])
        owner.freeze(pool)
        fill(owner)
        standby = other.attach("pool")
        other.get(KEYS[:4]).release()
        before = used(service)
        for client in (owner, other):
            service.cut_off(client)
            assert client.find(KEYS[:4]) == 4
            assert client.num_lives == 2
        assert (pool.is_lost, standby.is_lost) == (False, False)
        assert used(service) == before
        readers = service.run(
            lambda: [len(version.readers) for version in service.holdings.segments]
        )
        assert readers == [1]
        with other.get(KEYS[:4]) as blocks:
            assert bytes(blocks[2].data) == bytes([2]) * PAGE
    assert used(service)[0] == 0 or service.holdings.store.num_blocks == 4


def test_a_reader_hears_when_it_binds_again_what_was_freed_meanwhile(service: Inside) -> None:
    with service.client() as writing:
        fill(writing)
        reading = service.client()
        reading.get(KEYS[:4]).release()
    service.cut_off(reading)
    evict(service)
    reading.find(KEYS[:1])
    reading.get(KEYS[:1]).release()
    assert used(service) == (0, 0)
    reading.close()


def test_a_version_that_is_created_in_an_answer_that_was_lost_is_given_back(
    service: Inside,
) -> None:
    with service.client() as client:
        create = wire.CreateSegment(
            name="w", slab_bytes=[PAGE], segment_class=pb.SEGMENT_CLASS_WEIGHTS
        )
        client.call(wire.SessionRequest(create=create))  # And forgets about it.
        service.cut_off(client)
        client.find(KEYS[:1])
        assert service.run(lambda: len(list(service.holdings.segments))) == 0
        assert used(service) == (0, 0)


def test_a_new_version_that_cannot_be_allocated_leaves_the_old_one(service: Inside) -> None:
    with service.client() as client, service.client() as other:
        pool = client.create("pool", SegmentClass.KV_POOL, [PAGE])
        pool.slabs[0][:3] = b"old"
        client.freeze(pool)
        before = used(service)
        with descriptors(1), pytest.raises(UnbrokenError) as raised:
            client.create("pool", SegmentClass.KV_POOL, [PAGE, PAGE])
        assert raised.value.reason is Reason.MEMORY_EXHAUSTED
        assert used(service) == before
        standby = other.attach("pool")
        assert standby.slabs[0][:3] == b"old"


def test_who_could_not_be_given_a_descriptor_has_nothing_and_hears_of_it_again(
    service: Inside,
) -> None:
    with service.client() as reading:
        with service.client() as leaving:
            fill(leaving)
            reading.get(KEYS[:4]).release()
        evict(service)
        assert used(service)[1] > 0, "it has yet to hear of it"
        with service.client() as owner:
            owner.seal(owner.create("w", SegmentClass.WEIGHTS, [PAGE]))
            fill(owner, first=4)
            before = service.run(lambda: set(mapped_by(service, reading)))
            with descriptors(0):
                for call in (lambda: reading.attach("w"), lambda: reading.get(KEYS[4:])):
                    with pytest.raises(UnbrokenError) as raised:
                        call()
                    assert raised.value.reason is Reason.MEMORY_EXHAUSTED
            assert service.run(lambda: set(mapped_by(service, reading))) == before
            assert service.run(
                lambda: [version.readers for version in service.holdings.segments]
            ) == [set()]
            with reading.get(KEYS[4:]) as blocks:
                assert len(blocks) == 4
            assert used(service)[1] == 0, "it heard of what was evicted, too"


def mapped_by(service: Inside, client: MemoryClient) -> set[int]:
    """What the service takes it to have mapped."""
    return service.holdings.ledger.mappings.of(client.session_id)


# What hostile ones do.


def test_who_does_not_know_the_secret_does_not_end_anothers_connection(service: Inside) -> None:
    with service.client() as client:
        with channel.connect(service.socket) as sock:
            sock.settimeout(10)
            bind = wire.Bind(
                protocol_version=1, session_id=client.session_id, secret=b"guessed" + bytes(9)
            )
            channel.send(sock, wire.SessionRequest(bind=bind))
            response, _ = channel.receive(sock, wire.SessionResponse)
            assert response.error.reason == "NOT_PERMITTED"
        client.find(KEYS[:1])
        assert client.num_lives == 1, "its connection is the first one still"


def test_without_descriptors_the_service_waits_and_does_not_spin(service: Inside) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    clock = service.run(lambda: time.pthread_getcpuclockid(threading.get_ident()))
    with sock:
        sock.settimeout(20)
        with descriptors(0):
            sock.connect(str(service.socket))
            before = time.clock_gettime(clock)
            time.sleep(0.5)
            assert time.clock_gettime(clock) - before < 0.2, "it tried again all the time"
        channel.send(sock, wire.SessionRequest(bind=wire.Bind(protocol_version=1)))
        response, fds = channel.receive(sock, wire.SessionResponse)
        channel.close_all(fds)
        assert response.bound.session_id


def test_a_writer_that_forbids_seals_loses_its_blocks_and_nobody_else_anything(
    service: Inside,
) -> None:
    def num_blocks() -> int:
        return service.run(lambda: service.holdings.store.num_blocks)

    with service.client() as good:
        fill(good)
        with channel.connect(service.socket) as sock:
            sock.settimeout(20)
            hostile_slab(sock)
        until(lambda: num_sessions(service) == 2, "its connection is noticed")
        assert num_blocks() == 4
        assert good.find(KEYS[:4]) == 4


def num_sessions(service: Inside) -> int:
    return service.run(lambda: len(service.holdings.sessions))


def hostile_slab(sock: socket.socket) -> None:
    """Open a slab, forbid its sealing, ask for it to be sealed, and be gone."""
    channel.send(sock, wire.SessionRequest(bind=wire.Bind(protocol_version=1)))
    response, fds = channel.receive(sock, wire.SessionResponse)
    boot_token = response.bound.boot_token
    for fd in fds:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    channel.close_all(fds)
    request = wire.SessionRequest(boot_token=boot_token)
    request.open_slab.block_bytes, request.open_slab.num_slots = PAGE, 1
    channel.send(sock, request)
    response, fds = channel.receive(sock, wire.SessionResponse)
    for fd in fds:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    channel.close_all(fds)
    (slab,) = response.granted.segment.slabs
    request = wire.SessionRequest(boot_token=boot_token)
    request.close_slab.slab_id = slab.slab_id
    channel.send(sock, request)
    response, _ = channel.receive(sock, wire.SessionResponse)
    assert response.error.reason == "SEGMENT_BUSY"


# Who waits for whom.


def test_records_and_bytes_are_read_in_threads_and_not_on_the_loop(service: Inside) -> None:
    def in_threads() -> bool:
        readers = set(service.keeper.readers)
        service.keeper.readers.clear()
        return bool(readers) and service.thread.ident not in readers

    with service.client() as client:
        fill(client)
        service.cut_off(client)
        client.find(KEYS[:1])
        assert in_threads(), "when it binds again"
        client.close()
        until(in_threads, "and when its slab is sealed")


def test_records_that_were_read_for_a_connection_that_is_gone_do_not_count(
    service: Inside,
) -> None:
    def ask(sock: socket.socket, request: wire.SessionRequest) -> wire.SessionResponse:
        channel.send(sock, request)
        response, fds = channel.receive(sock, wire.SessionResponse)
        kept.extend(fds)
        return response

    def num_blocks() -> int:
        return service.run(lambda: service.holdings.store.num_blocks)

    kept: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: channel.close_all(kept))
        socks = [stack.enter_context(channel.connect(service.socket)) for _ in range(3)]
        for sock in socks:
            sock.settimeout(20)
        first, slow, second = socks
        bind = wire.SessionRequest(bind=wire.Bind(protocol_version=1))
        bound = ask(first, bind).bound
        token = bound.boot_token
        open_slab = wire.OpenSlab(block_bytes=PAGE, num_slots=1)
        granted = ask(first, wire.SessionRequest(boot_token=token, open_slab=open_slab)).granted
        (slab,) = granted.segment.slabs
        record = records.Record(records.RecordState.COMMITTED, 16, 1, 0, KEYS[0], 0)
        os.pwrite(kept[-1], record.to_bytes(slab.slab_id), 0)
        commit = wire.CommitBlocks(slab_id=slab.slab_id, slots=[0])
        ask(first, wire.SessionRequest(boot_token=token, commit=commit))
        assert num_blocks() == 1
        bind.bind.session_id, bind.bind.secret = bound.session_id, bound.secret
        service.keeper.held = held = threading.Event()
        channel.send(slow, bind)
        until(lambda: bool(service.keeper.readers), "its records are read")
        assert ask(second, bind).bound.is_resumed
        reclaim = wire.ReclaimSlots(slab_id=slab.slab_id, num_slots=1)
        answer = ask(second, wire.SessionRequest(boot_token=token, reclaim=reclaim))
        assert list(answer.reclaimed.slots) == [0], "it may overwrite the block"
        held.set()
        until(lambda: service.keeper.num_read == 2, "the first reading is over")
        time.sleep(0.05)  # Were it to be taken in, that would be in the next turns of the loop.
        assert num_blocks() == 0
