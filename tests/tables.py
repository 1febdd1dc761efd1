"""Workloads written as tables, and what one reads off a schedule."""

import numpy as np
from oracles import within

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


def check_possible(schedule: Schedule) -> None:
    """Every job starts, at an event, not before its submit, and at no instant is a node over capacity."""
    jobs, start = schedule.jobs, schedule.start_time
    end = start + jobs.run_time / schedule.cluster.speed[schedule.node]
    assert np.isfinite(start).all() and (start >= jobs.submit_time).all()
    assert set(start) <= set(jobs.submit_time) | set(end)  # time only stops at arrivals and completions
    for now in start:  # what is used only grows at starts
        active = (start <= now) & (now < end)
        for m, capacity in enumerate(schedule.cluster.capacity):
            used = jobs.demand[active & (schedule.node == m)].sum(0)
            assert within(used, capacity), f"node {m} at {now}: {used} of {capacity}"
