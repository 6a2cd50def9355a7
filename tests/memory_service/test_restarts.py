"""The service, its vault, or both die in mid-work; with one of them alive, nothing is lost."""

from pathlib import Path

import pytest

from tests.memory_service.processes import serving, until
from tests.memory_service.restarts import Users, owns
from tests.memory_service.trials import Control
from tests.memory_service.victim import bytes_of, key_of
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory.client import SegmentClass


def test_the_service_dies_twice_and_all_is_there(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        users = Users(service)
        for _ in range(2):
            users.until_written(30)
            session = users.writing.session_id
            outage = users.lose_service()
            assert outage.violations == []
            assert outage.num_blocks >= 30
            assert users.writing.session_id == session, "it is the same session"
            assert owns(users.writing, "pool", users.epoch)
        users.close()


def test_a_vault_that_dies_is_replaced_and_the_new_one_has_everything(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        users = Users(service)
        users.until_written(20)
        old = service.vault_pid
        before = service.num_vault_fds()
        service.kill_vault()
        until(lambda: service.vault_pid != old, "there is another vault")
        until(lambda: service.num_vault_fds() >= before, "it has everything")
        outage = users.lose_service()
        assert outage.violations == []
        users.close()


def test_when_both_die_everything_is_lost_and_nobody_is_told_otherwise(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        users = Users(service)
        users.until_written(20)
        users.lose_service(with_vault=True)
        users.stop()
        assert users.writer.is_lost
        key = key_of(1, 0)
        assert not users.writer.put(key, bytes_of(key), 16)
        assert users.reading.find([key]) == 0
        with pytest.raises(UnbrokenError) as raised:
            users.writing.freeze(users.pool)
        assert raised.value.reason is Reason.SEGMENT_NOT_FOUND
        again = users.writing.create("pool", SegmentClass.KV_POOL, [4096])
        assert again.epoch > users.epoch, "epochs never go back"
        users.close()


def test_what_a_process_left_while_the_service_was_away_is_there(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        users = Users(service)
        users.until_written(10)
        users.stop()
        service.kill()
        key = key_of(2, 0)
        assert users.writer.put(key, bytes_of(key), 16), "nobody is asked"
        service.start()
        assert users.reading.find([key]) == 0, "its writer might be about to overwrite it"
        users.writing.find([key])
        assert users.reading.find([key]) == 1, "it has bound again"
        users.close()


def test_nothing_leaks_into_the_vault(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        empty = service.num_vault_fds()
        users = Users(service)
        users.until_written(5)
        users.writing.release(users.pool)
        users.close()
        control = Control(service)
        for segment in ("", "weights"):
            control.evict(segment)
        until(lambda: service.num_vault_fds() == empty, "its descriptors are closed")
        assert control.usage().used_bytes == 0
        control.close()
