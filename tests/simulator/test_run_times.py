"""The distributions of run times equal a slow reference, and know nothing but what has finished."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import make_workload

from simulator.arrays import job_groups, problem_arrays
from simulator.rules import parse_rule
from simulator.run_times import RunTimes, ended_before
from workloads.jobs import Jobs


def slow_run_time(jobs: Jobs, finished: list[int], i: int, elapsed: float, share: float) -> float:
    """The distribution written out: (run time, weight) for each ratio, of those that are above `elapsed`."""
    ratio, requested = jobs.run_time / jobs.requested_time, jobs.requested_time[i]
    mine = [j for j in finished if jobs.user[j] == jobs.user[i] and jobs.user[i] >= 0]
    alike = [j for j in mine if jobs.requested_time[j] == jobs.requested_time[i]]
    kind = alike if len(alike) >= 3 else mine
    ring = [0.0] * 8
    for count, j in enumerate(kind):
        ring[count % 8] = ratio[j]
    own = [(value, 1.0) for value in ring[: len(kind)]]
    everybody = sorted(ratio[j] for j in finished[-256:])
    others = [(value, 2.0 / len(everybody)) for value in everybody]
    alive = [(value, weight) for value, weight in own + others if value > elapsed / requested]
    at = share * sum(weight for _, weight in alive)
    for value, weight in alive:
        at -= weight
        if at < -1e-12:
            return value * requested
    if alive:
        return alive[-1][0] * requested
    if not finished and elapsed < requested:
        return requested
    return min(1.5 * elapsed, requested) if elapsed < requested else 1.5 * elapsed


@given(st.integers(0, 2**20), st.integers(1, 300), st.integers(0, 10))
@settings(max_examples=40)
def test_they_equal_the_slow_reference(seed, count, elapsed):
    workload = make_workload(seed, count)
    jobs, rng = workload.jobs, np.random.default_rng(seed)
    problem = problem_arrays(jobs, workload.cluster, job_groups(jobs), parse_rule("fifo"))
    run_times, order, done = RunTimes(problem), rng.permutation(count).tolist(), 0
    shares = rng.random(20)
    for learnt in sorted(rng.integers(0, count + 1, 4).tolist()):
        run_times.learn(order[done:learnt])
        done = learnt
        asked = rng.integers(count, size=5)
        ran = elapsed * rng.random(5)
        for i, so_long, found in zip(asked, ran, run_times.at(asked, ran, shares), strict=True):
            expected = [slow_run_time(jobs, order[:done], i, so_long, share) for share in shares]
            np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_quantiles_by_hand():
    """A user whose jobs took a tenth, a fifth, ..., of what they asked for, and nobody else."""
    workload = make_workload(0, 6)
    jobs = workload.jobs
    jobs.user[:], jobs.requested_time[:] = 1, 100.0
    jobs.run_time[:] = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    problem = problem_arrays(jobs, workload.cluster, job_groups(jobs), parse_rule("fifo"))
    run_times = RunTimes(problem)
    assert run_times.quantiles([5], [0.0], [0.1, 0.5, 0.9]).tolist() == [[100.0, 100.0, 100.0]]  # nothing known
    run_times.learn(range(5))
    assert run_times.quantiles([5], [0.0], [0.1, 0.5, 0.9]).tolist() == [[10.0, 30.0, 50.0]]
    assert run_times.quantiles([5], [25.0], [0.1, 0.5, 0.9]).tolist() == [[30.0, 40.0, 50.0]]
    assert run_times.quantiles([5, 5], [60.0, 90.0], [0.5]).tolist() == [[90.0], [100.0]]  # longer than any of them


def test_what_had_ended_before_a_segment():
    workload = make_workload(3, 40)
    jobs = workload.jobs
    end = jobs.submit_time + jobs.wait_time + jobs.run_time
    expected = [j for j in np.argsort(end, kind="stable") if j < 30 and end[j] <= jobs.submit_time[30]]
    assert ended_before(jobs, 30).tolist() == expected and expected
