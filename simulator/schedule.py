"""Who started when and where, and what that cost the jobs: waits, latencies, slowdowns, utilization."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from simulator.kernels import LATENCY, SLOWDOWN, SLOWDOWN_BOUND, TAIL, WAIT
from workloads.jobs import Cluster, Jobs, Workload, offered_load

OBJECTIVES = {"latency": LATENCY, "wait": WAIT, "slowdown": SLOWDOWN, "tail": TAIL}
# What schedules are compared by: a property of `Schedule`.
METRIC = {"latency": "latency", "wait": "wait", "slowdown": "bounded_slowdown", "tail": "wait"}


@dataclass
class Schedule:
    """Who started when and where: float64[N] start times (seconds) and int[N] nodes of N jobs, in submission order."""

    jobs: Jobs
    cluster: Cluster
    start_time: np.ndarray
    node: np.ndarray
    decisions: int = 0

    @property
    def service_time(self) -> np.ndarray:
        return self.jobs.run_time / self.cluster.speed[self.node]

    @property
    def wait(self) -> np.ndarray:
        return self.start_time - self.jobs.submit_time

    @property
    def latency(self) -> np.ndarray:
        return self.wait + self.service_time

    @property
    def bounded_slowdown(self) -> np.ndarray:
        return np.maximum(1.0, self.latency / np.maximum(self.jobs.run_time, SLOWDOWN_BOUND))

    @property
    def makespan(self) -> float:
        """Seconds from the first submission to the last completion."""
        return float((self.start_time + self.service_time).max() - self.jobs.submit_time.min())

    @property
    def utilization(self) -> float:
        """Work done over capacity, from the first submission to the last completion (mean over resources)."""
        begin = self.jobs.submit_time.min()
        return self.utilization_between(begin, begin + self.makespan)

    def utilization_between(self, begin: float, end: float) -> float:
        """Work done over capacity between two times in seconds (mean over resources)."""
        overlap = np.minimum(self.start_time + self.service_time, end) - np.maximum(self.start_time, begin)
        work = np.maximum(overlap, 0) @ self.jobs.demand
        return float((work / self.cluster.capacity.sum(0)).mean() / (end - begin))

    def metrics(self) -> dict[str, float]:
        """Means of the per-job metrics, the tails of the wait, and the figures of the whole."""
        wait, makespan = self.wait, self.makespan
        median, p95, p99 = np.percentile(wait, (50, 95, 99)).tolist()
        return {
            "latency": float(self.latency.mean()),
            "wait": float(wait.mean()),
            "bounded_slowdown": float(self.bounded_slowdown.mean()),
            "wait_median": median,
            "wait_p95": p95,
            "wait_p99": p99,
            "wait_max": float(wait.max()),
            "utilization": self.utilization,
            "throughput": len(self.jobs) / makespan,
            "makespan": makespan,
        }


def nothing_to_schedule(workload: Workload, waits: Iterable[np.ndarray]) -> str | None:
    """A line that says so, where under none of some policies, whose waits float64[N] these are, more than one job in a
    hundred waits: policies cannot differ there."""
    share = max(float((wait > 1e-6).mean()) for wait in waits)
    if share > 0.01:
        return None
    load = np.mean([offered_load(workload.jobs[first:last], workload.cluster) for first, last in workload.segments])
    return (
        f"{workload.name}: there is {'next to ' * (share > 0)}nothing to schedule: {share:.2%} of the jobs wait at "
        f"all, and the offered load is {load:.1%} of what the cluster can do"
    )
