"""Jobs, clusters, workloads: what the simulator replays and the agents learn from; loads and resampled weeks.

Times are seconds. N counts jobs, M nodes, R resources. A run time is what a job takes on a node of speed 1.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from workloads.files import digest

MINUTE, HOUR, DAY, WEEK = 60.0, 3_600.0, 86_400.0, 7 * 86_400.0
SPLITS = {"train": 0, "validation": 1, "test": 2}


class WorkloadError(ValueError):
    """Input that cannot be used. The message is one line: the file, the line, the field, the remedy."""


@dataclass(frozen=True)
class Jobs:
    """N jobs as a structure of arrays. Times in seconds, demand in the units of `Cluster.capacity`."""

    submit_time: np.ndarray  # float64[N]
    run_time: np.ndarray  # float64[N], > 0, on a node of speed 1
    requested_time: np.ndarray  # float64[N], > 0, the user's estimate of the run time (-1 in published sequences)
    demand: np.ndarray  # float64[N, R]
    user: np.ndarray  # int32[N], -1 where unknown; so are the next three
    group: np.ndarray  # int32[N]
    executable: np.ndarray  # int32[N]
    queue: np.ndarray  # int32[N]
    wait_time: np.ndarray  # float64[N], as the trace recorded it, 0 where unknown: tells when past jobs had ended
    job_id: np.ndarray  # int64[N], what a trace calls a job (generated ones: from 1): for messages and tables

    def __len__(self) -> int:
        return len(self.submit_time)

    def __getitem__(self, index: slice | np.ndarray) -> "Jobs":
        return Jobs(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def concatenate(parts: Sequence["Jobs"]) -> "Jobs":
        """One after the other, as they are."""
        return Jobs(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Jobs)))


@dataclass(frozen=True)
class Cluster:
    """M nodes with R resources each. An HPC machine is one node that holds all its processors."""

    capacity: np.ndarray  # float64[M, R]
    speed: np.ndarray  # float64[M]: a job takes run_time / speed
    resources: tuple[str, ...]

    def __post_init__(self) -> None:
        if np.ndim(self.capacity) != 2 or len(self.capacity) == 0:
            raise WorkloadError(f"cluster: capacity has shape {np.shape(self.capacity)}; give one row per node, [M, R]")
        if np.shape(self.speed) != (len(self.capacity),) or len(self.resources) != self.capacity.shape[1]:
            raise WorkloadError(
                f"cluster: capacity is {self.capacity.shape}, but there are {np.size(self.speed)} speeds and "
                f"{len(self.resources)} resources; give one speed per node and one name per resource"
            )
        if not (np.isfinite(self.speed).all() and (self.speed > 0).all()):
            raise WorkloadError("cluster: a speed is not a positive number; leave out nodes that do not work")
        if not (np.isfinite(self.capacity).all() and (self.capacity >= 0).all()):
            raise WorkloadError("cluster: a capacity is negative or not a number; use 0 for what a node lacks")
        if not self.capacity.any(axis=0).all() or not self.capacity.any(axis=1).all():
            raise WorkloadError("cluster: a node or a resource has no capacity at all; leave it out")

    @cached_property
    def grid(self) -> np.ndarray:
        """float64[R], fine enough for anyone: sums of multiples of it are exact whatever the order of the events."""
        return 2.0 ** (np.ceil(np.log2(self.capacity.max(0))) - 40)

    @cached_property
    def on_grid(self) -> "Cluster":
        """The cluster with its capacity in multiples of its grid."""
        capacity = np.rint(self.capacity / self.grid) * self.grid
        same = np.array_equal(capacity, self.capacity) and self.capacity.dtype == float  # whole numbers: other kernels
        return self if same else replace(self, capacity=capacity)


class Trace(NamedTuple):
    """What a file holds."""

    jobs: Jobs  # by submit time
    cluster: Cluster
    skipped: dict[str, int]  # why something was left out -> how many were
    notes: Sequence[str] = ()  # what else somebody should know of how it was read


@dataclass(frozen=True)
class Workload:
    """A cluster and the jobs of one split.

    The split's jobs are `jobs[a:b]` for each row (a, b) of `segments`, int64[S, 2]; submit times never decrease
    within one. A trace has one segment, and `jobs` holds all of it: what comes before the segment is the users'
    history. A generated workload has independent runs that start at about time 0 and share no users.
    """

    name: str
    cluster: Cluster
    jobs: Jobs
    segments: np.ndarray
    skipped: dict[str, int]  # why a trace's line was left out -> how many were
    notes: Sequence[str] = ()  # what else somebody should know of how it was read

    def report(self) -> None:
        """Say on stderr how many jobs were left out, and why; how it was read; and where requests give the run times
        away."""
        if self.skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
            print(f"{self.name}: jobs skipped: {reasons}", file=sys.stderr)
        for note in self.notes:
            print(f"{self.name}: {note}", file=sys.stderr)
        exact = (self.jobs.requested_time == self.jobs.run_time).mean()
        if exact > 0.1:
            print(
                f"{self.name}: {exact:.0%} of the jobs request exactly their run time, as in a trace without requests: "
                "rules and policies then know what no scheduler can, and gains are too large",
                file=sys.stderr,
            )


def workload_digest(workload: Workload) -> str:
    """SHA-256 of its jobs, segments and cluster: another one where anything would be replayed differently."""
    arrays = [getattr(workload.jobs, column.name) for column in fields(workload.jobs)]
    arrays += [workload.segments, workload.cluster.capacity, workload.cluster.speed]
    return digest(*(np.ascontiguousarray(array).tobytes() for array in arrays))


def offered_load(jobs: Jobs, cluster: Cluster) -> float:
    """The work that arrives per second over what the cluster can do, for the most loaded resource.

    `jobs` is one run: the time is that between its first and its last submission.
    """
    span = jobs.submit_time.max() - jobs.submit_time.min()
    work = jobs.run_time @ jobs.demand
    return float((work / (cluster.speed @ cluster.capacity)).max() / span) if span > 0 else math.inf


def most_at_once(start: np.ndarray, end: np.ndarray, amount: np.ndarray) -> float:
    """The most that was taken at the same time; what ends in an instant makes room for what starts in it."""
    time = np.concatenate([end, start])
    change = np.concatenate([-amount, amount])
    return float(np.cumsum(change[np.argsort(time, kind="stable")]).max(initial=0.0))


def scale_load(jobs: Jobs, factor: float) -> Jobs:
    """The same jobs, arriving `factor` times as fast; the first submit time stays."""
    if not factor > 0:
        raise WorkloadError(f"load factor {factor}: give a positive number")
    first = jobs.submit_time.min()
    return replace(jobs, submit_time=first + (jobs.submit_time - first) / factor)


def at_loads(workload: Workload, factors: Sequence[float]) -> Workload:
    """The workload's segments once for each factor by which arrivals are compressed (users are kept apart)."""
    users = int(workload.jobs.user.max()) + 1
    parts, segments = [], []
    for copy, factor in enumerate(factors):
        jobs = scale_load(workload.jobs, factor)
        parts.append(replace(jobs, user=np.where(jobs.user >= 0, jobs.user + copy * users, -1).astype(np.int32)))
        segments.append(workload.segments + copy * len(jobs))
    return replace(workload, jobs=Jobs.concatenate(parts), segments=np.concatenate(segments))


def resampled(
    workload: Workload, seed: int, *, runs: int = 64, run_jobs: int = 3_000, loads: tuple[float, float] = (0.9, 1.3)
) -> Workload:
    """New runs of at most `run_jobs` jobs each, put together from weeks drawn from the workload's segments at random
    (with replacement, each from its beginning; of a week with more jobs than a run, all that follows a random one),
    with arrivals compressed by a factor drawn from `loads`, one a run. A workload of a single week with at most
    `run_jobs` jobs gives the same run each time, but for the factor.

    A trace has only so many busy times; what is fitted to one order of its weeks need not hold for another.
    """
    rng = np.random.default_rng(seed)
    weeks = [week for begin, end in workload.segments for week in _weeks(workload.jobs[begin:end])]
    parts: list[Jobs] = []
    segments, now, count = [], 0.0, 0
    run_jobs = min(run_jobs, sum(len(week) for week in weeks))
    for _ in range(runs):
        first, factor = count, float(np.exp(rng.uniform(*np.log(loads))))
        while count < first + run_jobs:
            week = weeks[rng.integers(len(weeks))]
            if len(week) > run_jobs:
                week = week[int(rng.integers(len(week) - run_jobs)) :]
                week = replace(week, submit_time=week.submit_time - week.submit_time[0])
            week = week[: first + run_jobs - count]
            parts.append(replace(week, submit_time=now + week.submit_time / factor))
            now += max(WEEK, week.submit_time.max(initial=0.0)) / factor
            count += len(week)
        segments.append((first, count))
    return replace(workload, jobs=Jobs.concatenate(parts), segments=np.array(segments))


def _weeks(jobs: Jobs) -> list[Jobs]:
    """The jobs of each whole week, submit times counted from its beginning; the rest goes with the last one."""
    since = jobs.submit_time - jobs.submit_time.min()
    count = max(1, int(since.max() // WEEK))
    cuts = np.searchsorted(since, WEEK * np.arange(1, count))
    bounds = [0, *cuts, len(jobs)]
    return [
        replace(jobs[a:b], submit_time=since[a:b] - WEEK * i) for i, (a, b) in enumerate(itertools.pairwise(bounds))
    ]
