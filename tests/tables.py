"""Workloads written as tables, and what one reads off a schedule."""

import numpy as np

from simulator.schedule import Schedule
from workloads.jobs import Cluster, Jobs, Workload


def table(capacity: float, *rows: tuple[float, float, float, float]) -> Workload:
    """One node, and a job for each row of (submit, run, requested, demand)."""
    submit, run, requested, demand = np.array(rows, float).T
    nobody = np.full(len(rows), -1, np.int32)
    jobs = Jobs(
        submit_time=submit, run_time=run, requested_time=requested, demand=demand[:, None].copy(),
        user=nobody, group=nobody, executable=nobody, queue=nobody,
        wait_time=np.zeros(len(rows)), job_id=np.arange(1, len(rows) + 1),
    )  # fmt: skip
    return Workload(
        "table", Cluster(np.array([[float(capacity)]]), np.ones(1), ("procs",)), jobs, np.array([[0, len(rows)]]), {}
    )


def two_nodes(
    speeds: tuple[float, float], capacity: tuple[float, float], *rows: tuple[float, float, float, float]
) -> Workload:
    one = table(1, *rows)
    cluster = Cluster(np.array(capacity, float)[:, None].copy(), np.array(speeds, float), ("procs",))
    return Workload("two", cluster, one.jobs, one.segments, {})


def event_times(schedule: Schedule) -> np.ndarray:
    return np.unique(np.append(schedule.jobs.submit_time, schedule.start_time + schedule.service_time))


def waiting_at(schedule: Schedule, now: float) -> np.ndarray:
    return np.flatnonzero((schedule.jobs.submit_time <= now) & (now < schedule.start_time))
