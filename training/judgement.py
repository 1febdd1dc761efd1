"""How a continuous replay is judged: by its mean cost, and by who waits long."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from simulator.schedule import METRIC, Schedule


class Judgement(NamedTuple):
    """Of continuous replays: the mean of the objective, the 99th percentile of the wait, the longest, and the root mean
    square of the objective."""

    cost: float
    wait_p99: float
    wait_max: float
    rms: float


def costs(schedules: list[Schedule], objective: str) -> np.ndarray:
    """float64[S, 4]: the Judgement of each schedule, without the first 5 % of its jobs."""
    rows = []
    for schedule in schedules:
        counted = slice(len(schedule.jobs) // 20, None)
        cost, wait = getattr(schedule, METRIC[objective])[counted], schedule.wait[counted]
        rows.append((cost.mean(), np.percentile(wait, 99), wait.max(), np.sqrt((cost**2).mean())))
    return np.maximum(rows, 1e-9)  # on an idle cluster nobody waits, and ratios and logarithms are taken of this


def judge(schedules: list[Schedule], objective: str) -> Judgement:
    """The means over the replays."""
    return Judgement(*costs(schedules, objective).mean(0).tolist())


def some_runs(segments: np.ndarray, most: int, least: int) -> np.ndarray:
    """int[S, 2]: some of the segments, evenly spread, with at most `most` jobs together. At least `least` of them, one
    for each load, and only then cut short: in a run that is, nobody waits for long."""
    begin, end = segments.T
    count = min(len(segments), max(least, int(most // (end - begin).max())))
    chosen = np.linspace(0, len(segments) - 1, count).astype(int)
    return np.stack([begin, np.minimum(end, begin + max(1, most // count))], axis=1)[chosen]
