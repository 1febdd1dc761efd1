"""From jobs and clusters to the arrays that the kernels take; N counts jobs, M nodes, R resources."""

import numpy as np

from simulator.kernels import (
    AREA,
    JOB,
    REQUESTED,
    SCALARS,
    SIZE,
    START,
    STATIC,
    STATIC_FEATURES,
    TIMED,
    Batch,
    Past,
    Problem,
    Sim,
)
from simulator.rules import Rule, static_score
from simulator.schedule import OBJECTIVES
from workloads.jobs import Cluster, Jobs


def check_workload(jobs: Jobs, cluster: Cluster) -> None:
    """
    Raises:
        ValueError: there are no jobs, or there is one that no simulation could run.
    """
    if len(jobs) == 0:
        raise ValueError("the workload has no jobs")
    if not (np.isfinite(jobs.submit_time).all() and (jobs.run_time > 0).all()):
        raise ValueError("the workload has a submit time that is not finite or a run time that is not positive")
    if (jobs.requested_time == 0).any() or not (jobs.demand >= 0).all():  # -1 s: unknown, in published sequences
        raise ValueError("the workload has a job that requests 0 seconds or less than nothing of a resource")
    fitting = np.zeros(len(jobs), bool)
    for capacity in cluster.capacity:
        fitting |= (jobs.demand <= capacity).all(1)
    if not fitting.all():
        i = int(np.argmin(fitting))
        raise ValueError(
            f"job {jobs.job_id[i]} asks for {jobs.demand[i].tolist()}, more than any node of the cluster has"
        )


def job_size(jobs: Jobs, cluster: Cluster) -> np.ndarray:
    """float64[N]: processors; with several resources, the dominant share of the cluster in units of the first one."""
    total = cluster.capacity.sum(0)
    return (jobs.demand / total).max(1) * total[0] if len(total) > 1 else jobs.demand[:, 0]


def job_groups(jobs: Jobs) -> np.ndarray:
    """int32[N, 3]: the groups whose history a job belongs to (user; + requested time; + size and executable)."""
    user = jobs.user.astype(np.int64)
    columns, offset = [], 0
    for keys in (
        (user,),
        (user, jobs.requested_time),
        (user, *jobs.demand.T, jobs.executable),
    ):
        _, group = np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)
        columns.append(np.where(user >= 0, group.ravel() + offset, -1))
        offset += int(group.max()) + 1
    return np.stack(columns, axis=1).astype(np.int32)


def past_runs(jobs: Jobs, groups: np.ndarray) -> Past:
    """What each group had run, in order of the recorded ends (where no wait was recorded: submit + run)."""
    end = np.repeat(jobs.submit_time + jobs.wait_time + jobs.run_time, groups.shape[1])
    group, run = groups.ravel(), np.repeat(jobs.run_time, groups.shape[1])
    order = np.lexsort((end, group))
    order = order[group[order] >= 0]
    offset = np.searchsorted(group[order], np.arange(groups.max(initial=-1) + 2))
    return Past(offset, end[order], run[order])


def recorded_estimates(jobs: Jobs) -> np.ndarray:
    """float64[N]: what `estimate` would have been when each job was submitted, by the ends that the trace recorded."""
    users = job_groups(jobs)[:, :1]
    past, group = past_runs(jobs, users), users[:, 0]
    estimates = np.maximum(jobs.requested_time, 0.0)
    for g in range(len(past.offset) - 1):
        mine, run = np.flatnonzero(group == g), past.run[past.offset[g] : past.offset[g + 1]]
        known = np.searchsorted(past.end[past.offset[g] : past.offset[g + 1]], jobs.submit_time[mine], side="right")
        mine, known = mine[known >= 2], known[known >= 2]
        estimates[mine] = np.minimum(estimates[mine], 0.5 * (run[known - 1] + run[known - 2]))
    return estimates


def problem_arrays(
    jobs: Jobs,
    cluster: Cluster,
    groups: np.ndarray,
    rule: Rule,
    *,
    objective: str = "latency",
    backfill: str = "easy",
    lock_in: bool = False,
    scores: np.ndarray | None = None,
    recorded: np.ndarray | None = None,
) -> Problem:
    """What does not change while these jobs are simulated under the rule.

    Args:
        groups: int32[N, 3], see `job_groups`.
        scores: float64[N] in place of the rule's, whose order is STATIC.
        recorded: float64[N], the estimates of run times (see `recorded_estimates`); None: those of the simulation.
    """
    size = job_size(jobs, cluster)
    unit = 1.0 / cluster.capacity.max(0)
    requested = np.maximum(jobs.requested_time, 0.0)  # -1 in some published sequences
    features = np.ones((len(jobs), STATIC_FEATURES + jobs.demand.shape[1]), np.float32)
    features[:, REQUESTED], features[:, SIZE] = np.log1p(requested) / 12, np.log2(1 + size) / 10
    features[:, AREA], features[:, STATIC_FEATURES:] = np.log1p(requested * size) / 20, jobs.demand * unit
    table = np.empty(len(jobs), JOB)
    table["submit"], table["run"], table["requested"] = jobs.submit_time, jobs.run_time, jobs.requested_time
    table["size"], table["head_score"] = size, static_score(rule.head, jobs, size) if scores is None else scores
    table["backfill_score"] = static_score(rule.backfill, jobs, size) if scores is None else scores
    table["log_requested"] = np.log1p(requested / 60)
    table["log_size"] = np.log1p(256 * size / cluster.capacity[:, 0].sum())
    table["recorded"] = requested if recorded is None else recorded
    return Problem(
        table, np.ascontiguousarray(jobs.demand), features, groups,
        cluster.capacity, cluster.speed, unit, float(cluster.speed.max()), float(cluster.capacity[:, 0].sum()),
        rule.head, rule.backfill, rule.mode, rule.nodes, np.array(rule.weights), rule.patience,
        rule.head == rule.backfill and rule.head <= STATIC,
        recorded is not None, OBJECTIVES[objective], backfill == "easy", lock_in,
    )  # fmt: skip


def empty_sim(length: int, cluster: Cluster, groups: int, *count: int) -> Sim:
    """The state of a simulation of at most `length` jobs, with histories of `groups` groups; with a count, so many."""
    nodes, resources = cluster.capacity.shape
    queue, order, seen = np.zeros((3, *count, length), np.int64)
    rank, score = np.zeros((2, *count, length))
    ends, dues = np.zeros((2, *count, length), TIMED)
    free, room = np.zeros((2, *count, nodes, resources))
    spare, most = np.zeros((2, *count, resources))
    history, plan = np.zeros((*count, groups, 4)), np.zeros((*count, length), START)
    s = np.zeros(count or 1, SCALARS)
    return Sim(s, queue, order, seen, rank, score, ends, dues, free, spare, most, room, history, plan)


def empty_batch(length: int, cluster: Cluster, groups: int, count: int) -> Batch:
    """`count` simulations (see `empty_sim`), whose jobs are of no group: that stays so where no history is kept."""
    return Batch(*empty_sim(length, cluster, groups, count), groups=np.full((count, length, 3), -1, np.int32))
