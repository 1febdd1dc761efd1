"""The statistics of a comparison: what is measured of a block of jobs, bootstrap intervals, paired differences.

All policies are compared in the same blocks of consecutive jobs, so that what is hard about a block cancels in the
differences. Times are seconds; N counts jobs, B blocks.
"""

from typing import Any

import numpy as np

from simulator.schedule import Schedule

METRICS = ("latency", "wait", "bounded_slowdown", "utilization", "makespan")
RESAMPLES = 10_000
QUANTILE_RESAMPLES = 1_000


def cut(jobs: int, blocks: int, warmup: float) -> list[slice]:
    """`blocks` equally long blocks of the last jobs of a replay; the first `warmup` of it, and what is over, is out."""
    counted = jobs - int(warmup * jobs)
    length = counted // min(blocks, counted)
    first = jobs - length * min(blocks, counted)
    return [slice(a, a + length) for a in range(first, jobs, length)]


def block_metrics(schedule: Schedule, block: slice) -> list[float]:
    """The METRICS of a block of consecutive jobs within a schedule.

    Those of jobs are means. Makespan is the time from the block's first submission to its last completion, and
    utilization that of the machine in this time, whoever's jobs it runs: next to a block's jobs are always others'.
    """
    jobs, cluster = schedule.jobs, schedule.cluster
    own = Schedule(jobs[block], cluster, schedule.start_time[block], schedule.node[block])
    begin = own.jobs.submit_time[0]
    utilization = schedule.utilization_between(begin, begin + own.makespan)
    return [own.latency.mean(), own.wait.mean(), own.bounded_slowdown.mean(), utilization, own.makespan]


def bootstrap_weights(blocks: int, seed: int) -> np.ndarray:
    """float64[RESAMPLES, B]: how often each block is in each resample of B blocks, over B.

    One matrix serves all metrics and policies: their resamples are paired.
    """
    return np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=RESAMPLES) / blocks


def interval(resamples: np.ndarray, blocks: int) -> list[float | None]:
    """The 95 % percentile interval (Efron & Tibshirani 1993) of float64[RESAMPLES]; one block has none."""
    return np.percentile(resamples, [2.5, 97.5]).tolist() if blocks > 1 else [None, None]


def summary(values: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """The mean of float64[B] and its interval."""
    return {"mean": float(values.mean()), "ci95": interval(weights @ values, len(values))}


def difference(values: np.ndarray, first: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """By how many percent the mean of float64[B] differs from that of `first`, and the interval of this figure."""
    resamples = weights @ np.stack([values, first], axis=1)
    if not resamples[:, 1].all() or not first.mean():  # of nothing (the wait where nobody waits) there are no percents
        return {"mean": None, "ci95": [None, None]}
    percent = 100 * (resamples[:, 0] / resamples[:, 1] - 1)
    return {"mean": float(100 * (values.mean() / first.mean() - 1)), "ci95": interval(percent, len(values))}


def improvement(values: np.ndarray, first: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """The probability that a block has a lower value than in `first`, float64[B] both; equal ones count one half
    (Agarwal et al. 2021, on paired blocks)."""
    return summary((values < first) + 0.5 * (values == first), weights)


def quantile_resamples(values: np.ndarray, block: np.ndarray, weights: np.ndarray, levels: list[float]) -> np.ndarray:
    """float64[resamples, levels]: quantiles of float64[N] where int[N] blocks count as often as weights[resamples, B]
    say."""
    order = np.argsort(values)
    values, block = values[order], block[order]
    found = np.empty((len(weights), len(levels)))
    for resample, weight in enumerate(weights):
        share = np.cumsum(weight[block])
        found[resample] = values[
            np.minimum(np.searchsorted(share, np.array(levels) * share[-1] - 1e-9), len(values) - 1)
        ]
    return found


def against_easy_fifo(values: np.ndarray, easy_fifo: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """The difference in percent; side: -1 or 1 where its whole interval is below or above zero."""
    figure = difference(values, easy_fifo, weights)
    low, high = figure["ci95"]
    return figure | {"side": 0 if low is None else int(low > 0) - int(high < 0)}


def tail(waits: np.ndarray) -> dict[str, float]:
    return {"wait_p99": float(np.percentile(waits, 99)), "wait_max": float(waits.max())}


def statistics(per_block: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """From float64[B, len(METRICS)] per policy: "policies", and their paired "differences" to the first one in percent
    of the first one's mean."""
    first = next(iter(per_block.values()))
    weights = bootstrap_weights(len(first), seed)
    policies: dict[str, Any] = {name: {} for name in per_block}
    differences: dict[str, Any] = {name: {} for name in per_block}
    for name, values in per_block.items():
        for m, metric in enumerate(METRICS):
            policies[name][metric] = summary(values[:, m], weights) | {"per_block": values[:, m].tolist()}
            differences[name][metric] = difference(values[:, m], first[:, m], weights)
    return {"policies": policies, "differences": differences}


def against(per_block: dict[str, np.ndarray], rule: str, seed: int) -> dict[str, dict[str, Any]]:
    """What each policy's metrics differ from the rule's, in percent, and how likely it has the lower one in a block."""
    weights = bootstrap_weights(len(per_block[rule]), seed)
    return {
        name: {
            metric: difference(values[:, m], per_block[rule][:, m], weights)
            | {"improvement": improvement(values[:, m], per_block[rule][:, m], weights)}
            for m, metric in enumerate(METRICS)
        }
        for name, values in per_block.items()
    }
