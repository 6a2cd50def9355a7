"""Claims of `memory_service.fencing`."""

from memory_service.fencing import (
    Connected,
    ConnectionLost,
    Exited,
    Fence,
    FencePolicy,
    GiveUp,
    Kill,
    LifelineSealed,
    Rose,
    SessionFence,
    Verdict,
    judge_cohort,
)

POLICY = FencePolicy(rebind_grace_s=5.0, kill_grace_s=2.0)


def test_the_end_of_a_connection_is_a_hint_and_no_proof() -> None:
    fence = SessionFence(POLICY)
    assert fence.handle(ConnectionLost(), 1.0) == [Rose(Fence.HINT)]
    assert fence.fence < Fence.QUIET


def test_a_sealed_lifeline_is_a_proof_unless_another_process_owns_the_channels() -> None:
    fence = SessionFence(POLICY)
    fence.handle(ConnectionLost(), 1.0)
    assert fence.handle(LifelineSealed(), 1.1) == [Rose(Fence.QUIET)]
    under_mps = SessionFence(FencePolicy(seal_is_proof=False))
    under_mps.handle(ConnectionLost(), 1.0)
    assert under_mps.handle(LifelineSealed(), 1.1) == []
    assert under_mps.handle(Exited(), 1.2) == [Rose(Fence.GONE)]


def test_a_fence_only_rises() -> None:
    fence = SessionFence(POLICY)
    assert fence.handle(Exited(), 1.0) == [Rose(Fence.GONE)]
    assert fence.handle(LifelineSealed(), 1.1) == []
    assert fence.handle(ConnectionLost(), 1.2) == []
    assert fence.deadline() is None


def test_who_binds_again_in_time_is_alive() -> None:
    fence = SessionFence(POLICY)
    fence.handle(ConnectionLost(), 1.0)
    assert fence.deadline() == 6.0
    assert fence.handle(Connected(), 5.0) == []
    assert fence.handle_timeout(7.0) == []
    assert fence.fence is Fence.NONE


def test_who_does_not_come_back_and_does_not_die_is_given_up() -> None:
    fence = SessionFence(POLICY)
    fence.handle(ConnectionLost(), 1.0)
    assert fence.handle_timeout(5.9) == []
    assert fence.handle_timeout(6.0) == [GiveUp()]
    assert fence.is_given_up
    assert fence.handle(Exited(), 9.0) == [Rose(Fence.GONE)], "at last"


def test_where_that_is_allowed_it_is_killed_first() -> None:
    fence = SessionFence(FencePolicy(rebind_grace_s=5.0, kills=True, kill_grace_s=2.0))
    fence.handle(ConnectionLost(), 1.0)
    assert fence.handle_timeout(6.0) == [Kill()]
    assert fence.handle_timeout(7.0) == []
    assert fence.handle_timeout(8.0) == [GiveUp()]


def test_a_cohort_is_adopted_as_a_whole_or_not_at_all() -> None:
    quiet, gone, hint = (Fence.QUIET, False), (Fence.GONE, False), (Fence.HINT, False)
    assert judge_cohort([quiet, gone], num_ranks=2) is Verdict.ADOPT
    assert judge_cohort([quiet, hint], num_ranks=2) is Verdict.WAIT
    assert judge_cohort([quiet], num_ranks=2) is Verdict.REFUSE, "one never had memory"
    assert judge_cohort([quiet, (Fence.HINT, True)], num_ranks=2) is Verdict.REFUSE
