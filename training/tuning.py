"""Fits the rule `tuned`, a weighted sum of what the classical rules look at, to training jobs by CMA-ES (Hansen 2016,
https://arxiv.org/abs/1604.00772). `tuned_rule.py` is its command; agents start from it with `--reference tuned`.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

import cma
import numpy as np

from simulator.kernels import NODE_TERMS, NODE_WEIGHTS, PATIENCE, RESERVE_TERMS, TERM_COUNT, TERMS
from simulator.replay import Replay, simulate
from simulator.rules import tuned_rule
from training.judgement import costs
from workloads.jobs import Workload, resampled

EACH = 16  # runs that a candidate is judged by


def start_from(orders: dict[str, float], backfill: dict[str, float] | None = None) -> np.ndarray:
    """Weights that order heads by these terms, backfill by the same or others, always reserve, and place each job on
    the fastest node, or the one that it fills best."""
    weights = np.zeros(PATIENCE + 1)
    weights[PATIENCE] = 1e9
    for row, terms in enumerate((orders, orders if backfill is None else backfill)):
        for name, weight in terms.items():
            weights[row * TERM_COUNT + TERMS.index(name)] = weight
    weights[RESERVE_TERMS * TERM_COUNT] = -1.0
    weights[NODE_WEIGHTS:PATIENCE][[NODE_TERMS.index("speed"), NODE_TERMS.index("left")]] = 3.0, 0.3
    return weights


# The classical orders that are such sums (of the logarithm of their score), to start from the best of them.
STARTS = {
    "easy-sjf": start_from({"requested": 1.0}),
    "easy-saf": start_from({"requested": 1.0, "size": 1.0}),
    "easy-wfp3": start_from({"requested": 3.0, "size": -1.0, "waited": -3.0}),
    "easy-wfp3+sjf": start_from({"requested": 3.0, "size": -1.0, "waited": -3.0}, {"requested": 1.0}),
    "easy-unicep": start_from({"requested": 1.0, "waited": -1.0}),
    "easy-xf": start_from({"expansion": -1.0}),
    "easy-sjf-history": start_from({"estimate": 1.0}),
    "easy-saf-history": start_from({"estimate": 1.0, "size": 1.0}),
}


def badness(found: np.ndarray, base: np.ndarray) -> float:
    """What the fit minimises, of costs[S, 4] and EASY-FIFO's on the same segments: the logarithm of the mean and the
    mean of the logarithms of the costs, and what says that jobs starve: longer tails of the wait than EASY-FIFO's."""
    ratio, (_, p99, longest, _) = found[:, 0] / base[:, 0], found.sum(0) / base.sum(0)
    mean = 0.5 * np.log(found[:, 0].sum() / base[:, 0].sum()) + 0.5 * np.log(ratio).mean()
    return float(mean + 0.5 * max(0.0, p99 - 1.0) + 0.05 * max(0.0, longest - 2.0))


def tune(
    workload: Workload,
    objective: str,
    seed: int,
    generations: int = 50,
    *,
    backfill: str = "easy",
    lock_in: bool = False,
    each: Callable[[range], Iterable[int]] = lambda steps: steps,
) -> str:
    """The name of the tuned rule that CMA-ES finds on runs put together from the workload's segments.

    `each` may wrap the range of generations, to show how far it is. The same arguments give the same rule.
    """
    rng = np.random.default_rng(seed)
    runs = resampled(workload, seed)
    options: dict[str, Any] = {"backfill": backfill, "lock_in": lock_in, "threads": os.cpu_count() or 1}
    base = costs(Replay(runs, "easy-fifo", **options)(), objective)
    replay = Replay(runs, tuned_rule(STARTS["easy-sjf-history"]), **options)

    def judge(weights: np.ndarray, which: np.ndarray) -> float:
        return badness(costs(replay(which, weights), objective), base[which])

    start = min(STARTS.values(), key=lambda weights: judge(weights, np.arange(EACH)))
    # A job that a rule never starts costs little within a run of a few weeks, and everything in one of years: nobody
    # waits for much longer than twice as long as the one who waits longest under EASY-FIFO in the whole workload.
    start = start.copy()
    whole = simulate(workload, "easy-fifo", backfill=backfill, lock_in=lock_in)
    start[PATIENCE] = 2 * costs(whole, objective)[:, 2].max() / 3600
    free = free_weights(runs)
    settings = {"seed": seed or 2**31 - 1, "verbose": -9, "popsize": 14}  # for CMA-ES a seed of 0 is the time
    search = cma.CMAEvolutionStrategy(np.zeros(free.sum()), 0.3, settings)

    def weights_of(offsets: np.ndarray) -> np.ndarray:
        weights = start.copy()
        weights[free] += offsets
        return weights

    for _ in each(range(generations)):
        which = np.sort(rng.permutation(len(base))[:EACH])  # others every time: no order of weeks is learned by heart
        offsets = search.ask()
        search.tell(offsets, [judge(weights_of(o), which) for o in offsets])
    return tuned_rule(weights_of(search.mean))


def free_weights(workload: Workload) -> np.ndarray:
    """bool[weights]: those that can change a decision on this workload."""
    free = np.ones(PATIENCE + 1, bool)
    free[[0, TERM_COUNT, PATIENCE]] = False  # "one" orders nothing
    if len(workload.cluster.speed) == 1:
        free[NODE_WEIGHTS:PATIENCE] = False
    if (workload.jobs.user < 0).all():
        free[:NODE_WEIGHTS].reshape(-1, TERM_COUNT)[:, TERMS.index("estimate")] = False
    return free
