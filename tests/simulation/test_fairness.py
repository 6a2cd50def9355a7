"""What one tenant that asks for far too much does to the others."""

from collections.abc import Iterable

from tests.simulation.fairness import CAPACITY, DURATION_S, FULL_STEP_S, GREEDY, Job, lived

NUM_TENANTS = 4
SHARE = CAPACITY / NUM_TENANTS
MODEST = dict.fromkeys(("a", "b", "c"), SHARE / 2)
NORMAL = 0.9 * CAPACITY - sum(MODEST.values())
RATIO_MAX = 1.25
SEEDS = range(3)


def p99_s(jobs: Iterable[Job]) -> float:
    """Until a first token, of the modest ones."""
    waits = sorted(
        job.served_at - job.came_at
        for job in jobs
        if job.tenant != GREEDY and job.served_at is not None
    )
    assert len(waits) > 400 * len(SEEDS)
    return waits[int(0.99 * len(waits))]


def test_a_tenant_at_20_times_its_share_raises_nobodys_p99_by_a_quarter() -> None:
    normal = [job for seed in SEEDS for job in lived(seed, MODEST | {GREEDY: NORMAL})]
    greedy = [job for seed in SEEDS for job in lived(seed, MODEST | {GREEDY: 20 * SHARE})]
    assert p99_s(greedy) <= RATIO_MAX * p99_s(normal)
    # A prompt waits for the step that runs and then takes its own, and now and then another's.
    assert p99_s(greedy) < 3.3 * FULL_STEP_S
    num_served = sum(job.served_at is not None for job in greedy)
    assert num_served > 0.95 * CAPACITY * DURATION_S * len(SEEDS), "nobody idles for it"
