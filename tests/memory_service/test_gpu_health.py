"""Claims of `memory_service.gpu_health`, and of `memory_service.nvml` through the real bindings."""

import queue
import re
from collections.abc import Callable

import pytest

from memory_service import gpu_health
from memory_service.gpu_health import (
    EngineFault,
    Event,
    Gone,
    GpuHealth,
    Health,
    Poison,
    Recovery,
    Rows,
    Verify,
    Worsened,
    Xid,
)
from memory_service.nvml import NvmlWatch
from tests.support.fake_nvml import FakeDevice, FakeNvml, nvml, nvml_of
from unbroken.memory.gpu import GpuUnavailable

UUIDS = ("GPU-fa4efa4e-0000-0000-0000-000000000001", "GPU-fa4efa4e-0000-0000-0000-000000000002")


def judged(*events: Event) -> Health:
    gpu = GpuHealth()
    for now, event in enumerate(events):
        gpu.handle(event, float(now))
    return gpu.health


def test_the_table_says_what_is_done() -> None:
    assert gpu_health.__doc__ is not None
    table = {
        name: {int(number) for number in numbers.split()}
        for name, numbers in re.findall(
            r"^    (\w+) +((?:\d+ )+) ", gpu_health.__doc__, re.MULTILINE
        )
    }
    assert table["engine"] == gpu_health.ENGINE
    assert table["verify"] == gpu_health.VERIFY
    for health in (Health.DRAINING, Health.TAINTED, Health.LOST):
        assert table[health.name.lower()] == {
            number for number, worse in gpu_health.WORSE.items() if worse is health
        }


@pytest.mark.parametrize("number", sorted(gpu_health.ENGINE))
def test_an_engines_own_error_is_a_hint_and_no_more(number: int) -> None:
    gpu = GpuHealth()
    assert gpu.handle(Xid(number), 0.0) == [EngineFault(number)]
    assert gpu.health is Health.HEALTHY


def test_what_was_contained_is_compared() -> None:
    assert GpuHealth().handle(Xid(94), 0.0) == [Verify("Xid 94")]
    assert GpuHealth().handle(Poison(is_contained=True), 0.0) == [Verify("poison was contained")]


def test_it_says_once_that_it_is_worse_and_never_gets_better() -> None:
    gpu = GpuHealth()
    assert gpu.handle(Xid(95), 0.0) == [Worsened(Health.TAINTED, "Xid 95")]
    assert gpu.handle(Xid(48), 1.0) == []
    assert gpu.handle(Xid(63), 2.0) == []
    assert gpu.handle(Rows(is_pending=False, has_failed=False), 3.0) == []
    assert gpu.handle(Recovery(0), 4.0) == []
    assert gpu.health is Health.TAINTED
    assert gpu.handle(Gone(), 5.0) == [Worsened(Health.LOST, "the driver has lost it")]


@pytest.mark.parametrize(
    ("event", "health"),
    [
        (Xid(63), Health.DRAINING),
        (Xid(79), Health.LOST),
        (Xid(154), Health.HEALTHY),
        (Xid(9999), Health.HEALTHY),
        (Poison(is_contained=False), Health.TAINTED),
        (Rows(is_pending=True, has_failed=False), Health.DRAINING),
        (Rows(is_pending=True, has_failed=True), Health.TAINTED),
        (Recovery(nvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET), Health.LOST),
        (Recovery(nvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT), Health.LOST),
        (Recovery(nvml.NVML_GPU_RECOVERY_ACTION_DRAIN_P2P), Health.DRAINING),
        (Recovery(nvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET), Health.DRAINING),
        (Recovery(nvml.NVML_GPU_RECOVERY_ACTION_RECOVER_IMEX_DOMAIN), Health.HEALTHY),
        (Recovery(nvml.NVML_GPU_RECOVERY_ACTION_BUS_RESET), Health.LOST),
        (Recovery(nvml.NVML_GPU_RECOVERY_ACTION_SYSTEM_REBOOT), Health.LOST),
    ],
)
def test_trouble_is_sorted(event: Event, health: Health) -> None:
    assert judged(event) is health


def test_errors_of_a_link_count_when_they_are_often() -> None:
    gpu = GpuHealth()
    for now in (0.0, 500.0, 700.0):
        assert gpu.handle(Xid(74), now) == []
    assert gpu.handle(Xid(74), 900.0) == [Worsened(Health.LOST, "Xid 74, 3 times")]


def nobody(_uuid: str, _event: Event) -> None:
    """Listens to nothing."""


def heard(
    news: Callable[[FakeNvml], None], wanted: Event, *devices: FakeDevice
) -> list[tuple[str, Event]]:
    """All that is told up to what is wanted."""
    told: queue.Queue[tuple[str, Event]] = queue.Queue()
    found: list[tuple[str, Event]] = []
    with nvml_of(*devices) as fake:
        watch = NvmlWatch(
            [device.uuid for device in devices], lambda uuid, event: told.put((uuid, event))
        )
        watch.start()
        try:
            news(fake)
            while not found or found[-1][1] != wanted:
                found.append(told.get(timeout=10))
        finally:
            watch.close()
    return found


def test_an_xid_is_told_of_the_gpu_that_has_it() -> None:
    devices = [FakeDevice(uuid) for uuid in UUIDS]
    told = heard(
        lambda fake: fake.tell(1, nvml.nvmlEventTypeXidCriticalError, 31), Xid(31), *devices
    )
    assert told[-1] == (UUIDS[1], Xid(31))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (nvml.nvmlEventTypeNonFatalPoisonError, Poison(is_contained=True)),
        (nvml.nvmlEventTypeFatalPoisonError, Poison(is_contained=False)),
        (nvml.nvmlEventTypeGpuUnavailableError, Gone()),
    ],
)
def test_news_without_a_number_is_told(kind: int, wanted: Event) -> None:
    heard(lambda fake: fake.tell(0, kind), wanted, FakeDevice(UUIDS[0]))


def test_what_has_a_state_is_told_at_the_start_and_after_news() -> None:
    device = FakeDevice(UUIDS[0], is_pending=True)
    told = heard(lambda _: None, Rows(is_pending=True, has_failed=False), device)
    assert judged(*(event for _, event in told)) is Health.DRAINING

    def action(fake: FakeNvml) -> None:
        device.action = nvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET
        fake.tell(0, nvml.nvmlEventTypeGpuRecoveryAction)

    told = heard(action, Recovery(nvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET), device)
    assert judged(*(event for _, event in told)) is Health.LOST


def test_a_gpu_that_is_lost_is_told_once() -> None:
    devices = FakeDevice(UUIDS[0], is_lost=True), FakeDevice(UUIDS[1])
    told = heard(
        lambda fake: fake.tell(1, nvml.nvmlEventTypeXidCriticalError, 45), Xid(45), *devices
    )
    assert [event for uuid, event in told if uuid == UUIDS[0]] == [Gone()]


def test_a_gpu_that_knows_less_tells_less() -> None:
    device = FakeDevice(UUIDS[0], types=nvml.nvmlEventTypeXidCriticalError)
    heard(lambda fake: fake.tell(0, nvml.nvmlEventTypeXidCriticalError, 13), Xid(13), device)
    assert device.registered == nvml.nvmlEventTypeXidCriticalError


def test_older_bindings_tell_less(monkeypatch: pytest.MonkeyPatch) -> None:
    action = nvml.nvmlEventTypeGpuRecoveryAction
    device = FakeDevice(UUIDS[0], types=action | nvml.nvmlEventTypeXidCriticalError)
    monkeypatch.delattr(nvml, "nvmlEventTypeGpuRecoveryAction")
    monkeypatch.delattr(nvml, "nvmlEventTypeFatalPoisonError")
    monkeypatch.delattr(nvml, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION")
    heard(lambda fake: fake.tell(0, nvml.nvmlEventTypeXidCriticalError, 13), Xid(13), device)
    assert device.registered == nvml.nvmlEventTypeXidCriticalError


def test_it_knows_what_is_used_and_whether_the_gpu_is_kept_up() -> None:
    with nvml_of(FakeDevice(UUIDS[0], is_persistent=False)):
        watch = NvmlWatch(UUIDS[:1], nobody)
        assert watch.used_bytes(UUIDS[0]) == 615 << 20
        assert not watch.is_kept_up(UUIDS[0])
        watch.close()
        watch.close()


def test_a_gpu_that_is_not_there_is_said_to_be() -> None:
    with nvml_of(FakeDevice(UUIDS[0])), pytest.raises(GpuUnavailable, match=UUIDS[1]):
        NvmlWatch(UUIDS[1:], nobody)
