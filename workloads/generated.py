"""Generated clusters of many nodes, and jobs for any cluster: flavours, lognormal run times, bursts."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from workloads.jobs import DAY, Cluster, Jobs, WorkloadError
from workloads.lublin import daily_clock
from workloads.users import jobs_of_users

# Bursts: stretches of jobs that come at this multiple of the mean gap, and how many jobs such a stretch has.
BUSY_GAP, BUSY_JOBS, CALM_GAP, CALM_JOBS = 0.6, 150.0, 2.2, 50.0


def generate_cluster(
    rng: np.random.Generator, num_nodes: int = 8, resources: Sequence[str] = ("cpu", "memory")
) -> Cluster:
    """A random cluster: nodes of up to three kinds, each with its own speed and, for R resources, its own mix."""
    kinds = min(3, num_nodes)
    capacity = 2.0 ** rng.integers(3, 7, size=(kinds, len(resources)))
    speed = np.round(rng.uniform(0.6, 1.8, size=kinds), 1)
    kind = np.sort(rng.integers(kinds, size=num_nodes))
    return Cluster(capacity[kind], speed[kind], tuple(resources))


def generate_jobs(
    rng: np.random.Generator,
    num_jobs: int,
    cluster: Cluster,
    *,
    flavours: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    run_time: tuple[float, float, float] = (300.0, 1.6, DAY),
    arrivals: Literal["poisson", "bursty", "daily"] = "bursty",
    load: float = 0.85,
) -> Jobs:
    """Jobs of users with habits for any cluster.

    Args:
        flavours: float64[F, R], the demands that users choose from; by default halves, quarters, ... of each node.
        weights: float64[F], how often they do; by default inversely to the flavour's size.
        run_time: a lognormal's median (s) and sigma, and the limit at which it is cut (s).
        arrivals: "poisson", "bursty" (busy and calm stretches), or "daily" (the cycle of `lublin_jobs`).
        load: the offered load in expectation (over whole days); a single run's own varies around it.

    Raises:
        WorkloadError: a flavour fits on no node.
    """
    flavours = _default_flavours(cluster) if flavours is None else np.asarray(flavours, float)
    if not np.any(np.all(flavours[:, None] <= cluster.capacity, axis=2), axis=1).all():
        raise WorkloadError("a flavour is larger than any node of the cluster; leave it out")
    share = (flavours / cluster.capacity.max(axis=0)).max(axis=1)  # a flavour's size, whatever its main resource
    weights = 1 / share if weights is None else np.asarray(weights, float)
    probability = weights / weights.sum()
    flavour = rng.choice(len(flavours), size=num_jobs, p=probability)
    median, sigma, limit = run_time
    drawn = np.clip(np.round(rng.lognormal(math.log(median), sigma, num_jobs)), 1.0, limit)
    work = probability @ flavours * _mean_cut_lognormal(median, sigma, limit)
    mean_gap = (work / (cluster.speed @ cluster.capacity)).max() / load
    submit_time = np.round(arrival_times(rng, num_jobs, arrivals, mean_gap), 3)
    return jobs_of_users(rng, submit_time, share[flavour], flavours[flavour], drawn)


def _default_flavours(cluster: Cluster) -> np.ndarray:
    parts = np.concatenate([np.floor(cluster.capacity / 2**k) for k in range(6)])
    return np.unique(np.minimum(np.maximum(parts, 1.0), np.tile(cluster.capacity, (6, 1))), axis=0)


def _mean_cut_lognormal(median: float, sigma: float, limit: float) -> float:
    """E[min(X, limit)]"""
    z, normal = (math.log(limit / median)) / sigma, NormalDist()
    return median * math.exp(sigma**2 / 2) * normal.cdf(z - sigma) + limit * (1 - normal.cdf(z))


def arrival_times(rng: np.random.Generator, num_jobs: int, kind: str, mean_gap: float) -> np.ndarray:
    gap = rng.exponential(mean_gap, num_jobs)
    if kind == "bursty":
        gap *= _bursts(rng, num_jobs)
    time = np.cumsum(gap)
    return daily_clock(time) if kind == "daily" else time


def _bursts(rng: np.random.Generator, num_jobs: int) -> np.ndarray:
    """float64[N]: BUSY_GAP or CALM_GAP for each job, in stretches of geometric length; 1 on average."""
    gaps, jobs = np.array([BUSY_GAP, CALM_GAP]), np.array([BUSY_JOBS, CALM_JOBS])
    # A run starts in the middle of things: the chance of either kind is its share of all jobs.
    first = int(rng.random() < CALM_JOBS / (BUSY_JOBS + CALM_JOBS))
    kind = (first + np.arange(num_jobs)) % 2
    return np.repeat(gaps[kind], rng.geometric(1 / jobs[kind]))[:num_jobs]
