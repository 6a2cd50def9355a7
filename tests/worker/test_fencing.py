"""Claims of `worker.fencing`."""

from worker.fencing import EpochFence

A, B = ("", "a", 0), ("", "b", 0)


def test_only_a_newer_epoch_is_admitted() -> None:
    fence = EpochFence()
    assert fence.admit(A, 3) is None
    assert fence.admit(A, 3) == 3
    assert fence.admit(A, 2) == 3
    assert fence.admit(A, 7) is None
    assert fence.admit(A, 4) == 7


def test_streams_do_not_fence_each_other() -> None:
    fence = EpochFence()
    fence.admit(A, 3)
    assert fence.admit(B, 1) is None
    assert fence.admit(("other tenant", "a", 0), 1) is None
    assert fence.admit(("", "a", 1), 1) is None


def test_the_streams_last_started_are_remembered() -> None:
    fence = EpochFence(streams_max=2)
    fence.admit(A, 1)
    fence.admit(B, 1)
    fence.admit(A, 2)
    fence.admit(("", "c", 0), 1)
    assert fence.admit(A, 2) == 2
    assert fence.admit(B, 1) is None, "forgotten"
