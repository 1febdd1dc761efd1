"""What no schedule can beat: a lower bound on the mean wait, latency or bounded slowdown of given jobs on a cluster.

    lower_bound(workload.jobs, workload.cluster, "wait")

It is a Lagrangian relaxation (Fisher 1981, https://doi.org/10.1287/mnsc.27.1.1). Nodes that are alike are pooled. What
they have costs a price, which may change over time, and nothing else keeps jobs from running together: each job starts
where its own cost plus what it pays is least. A real schedule uses no more than there is, so its cost is at least

    sum of these minima - sum over kinds of nodes, resources and time of price * capacity

whatever the prices are, if none is negative; good ones are found by raising them where too much is used. Speeds,
release times and the least time that a job takes are exact; lost are the borders between nodes of one kind, and that
jobs are whole (a price can make two jobs share a place that only one can have).

N counts jobs, C kinds of nodes, R resources, K equal parts of the time. Times are seconds.
"""

import numba
import numpy as np

from simulator.kernels import SLOWDOWN_BOUND
from workloads.jobs import Cluster, Jobs

MOST_PARTS, PARTS_PER_JOB = 2_000, 4
STEP, MOMENTUM, SCALE_MEMORY = 0.3, 0.9, 0.98  # of the ascent, which is Adam's (Kingma & Ba 2015)


def lower_bound(jobs: Jobs, cluster: Cluster, objective: str, iterations: int = 60) -> float:
    """A mean over the jobs that no schedule can go below, whatever else the cluster runs; tighter with iterations.

    Args:
        objective: "wait", "latency" or "slowdown".
    """
    kinds, kind = np.unique(np.column_stack([cluster.speed, cluster.capacity]), axis=0, return_inverse=True)
    capacity = np.bincount(kind.ravel())[:, None] * kinds[:, 1:]  # [C, R]
    fits = np.all(jobs.demand[:, None] <= kinds[:, 1:] + 1e-9, axis=2)  # [N, C]
    time = np.where(fits, jobs.run_time[:, None] / kinds[:, 0], np.inf)
    share = np.where(fits[:, :, None], jobs.demand[:, None] / np.maximum(capacity, 1e-9), 0.0)  # [N, C, R]
    # A job costs the larger of `least` and its constant[N, C] + weight * wait.
    scale = np.maximum(jobs.run_time, SLOWDOWN_BOUND) if objective == "slowdown" else np.ones(len(jobs))
    constant = (time if objective != "wait" else np.zeros_like(time)) / scale[:, None]
    own = constant, 1 / scale, 1.0 if objective == "slowdown" else 0.0

    release, shortest = jobs.submit_time - jobs.submit_time[0], time.min(1)
    parts = min(max(PARTS_PER_JOB * len(jobs), 64), MOST_PARTS)
    part = float(release[-1] + shortest.max()) / parts  # seconds; afterwards everything is free
    unit = (shortest / scale).sum() / (parts * part)  # a price that makes sense: what runs at a time, times its weight
    prices, excess = np.zeros((*capacity.shape, parts)), np.zeros((*capacity.shape, parts))
    mean, square, best = np.zeros_like(prices), np.zeros_like(prices), -np.inf
    for iteration in range(iterations):
        best = max(best, relaxed_cost(release, time, share, *own, prices, part, excess))
        mean = MOMENTUM * mean + (1 - MOMENTUM) * excess
        square = SCALE_MEMORY * square + (1 - SCALE_MEMORY) * excess**2
        step = STEP * unit / (1 + iteration / 50)
        prices = np.maximum(0.0, prices + step * mean / (np.sqrt(square) + 1e-8))
    return best / len(jobs)


@numba.njit(cache=True)
def relaxed_cost(
    release: np.ndarray,
    time: np.ndarray,
    share: np.ndarray,
    constant: np.ndarray,
    weight: np.ndarray,
    least: float,
    prices: np.ndarray,
    part: float,
    excess: np.ndarray,
) -> float:
    """The sum of all jobs' least costs at prices[C, R, K], less what the whole capacity costs.

    Writes into excess[C, R, K] by how much of the capacity the jobs use more than there is (its gradient).
    """
    kinds, resources, parts = prices.shape
    until = np.zeros((kinds, resources, parts + 1))  # what all of the capacity costs up to the beginning of a part
    total = 0.0
    for c in range(kinds):
        for r in range(resources):
            for k in range(parts):
                until[c, r, k + 1] = until[c, r, k] + prices[c, r, k] * part
            total -= until[c, r, parts]
    excess[:] = -1.0
    for j in range(len(release)):
        best, where, start = np.inf, 0, 0.0
        for c in range(kinds):
            run = time[j, c]
            if run == np.inf:
                continue
            # The cost is linear between these times: at release, where the job begins to cost more than the least, and
            # where it starts or ends with a part.
            kink = max(release[j], release[j] + (least - constant[j, c]) / weight[j])
            for offset, first in ((-1.0, release[j]), (-1.0, kink), (0.0, 0.0), (run, 0.0)):
                k = int((release[j] + offset) / part) + 1
                while True:
                    at = first if offset < 0 else k * part - offset
                    cost = max(least, constant[j, c] + weight[j] * (at - release[j]))
                    if cost >= best:
                        break
                    cost += paid(until[c], prices[c], share[j, c], at + run, part)
                    cost -= paid(until[c], prices[c], share[j, c], at, part)
                    if cost < best:
                        best, where, start = cost, c, at
                    if offset < 0:
                        break
                    k += 1
        total += best
        end = start + time[j, where]
        for k in range(int(start / part), min(int(end / part) + 1, parts)):
            overlap = (min(end, (k + 1) * part) - max(start, k * part)) / part
            for r in range(resources):
                excess[where, r, k] += share[j, where, r] * overlap
    return total


@numba.njit(cache=True)
def paid(until: np.ndarray, prices: np.ndarray, share: np.ndarray, at: float, part: float) -> float:
    """What shares[R] of a kind of nodes cost from the beginning up to a time."""
    k = min(int(at / part), prices.shape[1])
    total = 0.0
    for r in range(len(share)):
        total += share[r] * until[r, k]
        if k < prices.shape[1]:
            total += share[r] * prices[r, k] * (at - k * part)
    return total
