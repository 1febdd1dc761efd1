"""`benchmark.py forecast`: how good the expected starts are that planning gives an operator.

At moments of a rule's replay the starts of the queued jobs are forecast as the service does, and compared with when
they did start. A forecast leaves out who is still to come; the replay does not. Times are seconds; N counts forecasts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from evaluation.replays import replaying
from policies import PlanPolicy, RulePolicy
from simulator.moment import ClusterState
from simulator.run_times import ended_before
from simulator.schedule import Schedule
from workloads.jobs import Jobs
from workloads.load import load_workload

LEVELS = (0.1, 0.5, 0.9)
REMEMBERED = 4096  # finished jobs, as many as the service keeps


@dataclass
class Forecast:
    """Compare forecasts of start times with what happened."""

    workload: str = "hpc"
    """a preset (cloud, hpc, manufacturing, datacenter, tasks) or the path of an SWF trace, plain or gzipped"""
    rule: str = "easy-xf+sjf"
    """the rule that schedules, and whose starts are forecast"""
    split: Literal["train", "validation"] = "validation"
    """which part of the trace, or which runs of the preset"""
    moments: int = 200
    """at so many arrivals, evenly spread over all"""
    samples: int = 64
    """of run times, in each forecast"""
    output: Path | None = None
    """where to write the results as JSON"""


def forecast(args: Forecast) -> tuple[dict[str, Any], Table]:
    """Returns what results.json holds, and its table.

    Raises:
        ValueError: a flag makes no sense, or nobody ever waits.
    """
    for name in ("moments", "samples"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give at least 1")
    planner = PlanPolicy(f"plan:{args.rule}", samples=args.samples, threshold=np.inf)  # does what the rule does
    workload = load_workload(args.workload, args.split)
    schedules = RulePolicy(args.rule).schedule(workload)
    places = [(k, i) for k, (first, last) in enumerate(workload.segments) for i in range(last - first)]
    chosen = [places[j] for j in np.linspace(0, len(places) - 1, min(args.moments, len(places))).astype(int)]
    expected, actual = [], []
    for k, i in replaying(chosen, len(chosen)):
        first, schedule = int(workload.segments[k, 0]), schedules[k]
        now = float(schedule.jobs.submit_time[i])
        state, queued = _state(schedule, now, workload.jobs[ended_before(workload.jobs, first)])
        found = planner.decide(state).expected
        later = schedule.start_time[queued] > now
        if found is None or not later.any():
            continue
        expected.append(found.starts[later] - now)
        actual.append(schedule.start_time[queued][later] - now)
    if not expected:
        raise ValueError(f"{args.workload}: nobody waits at any of these moments; give more --moments")
    results = calibration(np.concatenate(expected), np.concatenate(actual))
    named = {"workload": args.workload, "split": args.split, "rule": args.rule, "moments": len(chosen)}
    return named | results, _table(named | results)


def _state(schedule: Schedule, now: float, before: Jobs) -> tuple[ClusterState, np.ndarray]:
    """The cluster at that moment, before anything starts, and the numbers of its queued jobs; `before` had finished
    when the schedule began."""
    jobs, start = schedule.jobs, schedule.start_time
    end = start + schedule.service_time
    running = np.flatnonzero((start < now) & (end > now))
    ended = np.flatnonzero(end <= now)
    ended = ended[np.argsort(end[ended], kind="stable")]
    queued = np.flatnonzero((jobs.submit_time <= now) & (start >= now))
    finished = Jobs.concatenate([before, jobs[ended]])[-REMEMBERED:]
    state = ClusterState(
        now, schedule.cluster, jobs[queued], jobs[running], start[running], schedule.node[running], finished
    )
    return state, queued


def calibration(expected: np.ndarray, actual: np.ndarray) -> dict[str, Any]:
    """From quantiles float64[N, 3] and what happened, float64[N]: how often that was below each quantile (calibrated:
    the level itself) and between the outer two (0.8), and the mean pinball loss of each (Koenker & Bassett 1978) over
    the mean of what happened."""
    below = (actual[:, None] <= expected).mean(0)
    over = actual[:, None] - expected
    pinball = np.maximum(np.array(LEVELS) * over, (np.array(LEVELS) - 1) * over).mean(0)
    inside = ((actual >= expected[:, 0]) & (actual <= expected[:, 2])).mean()
    return {
        "forecasts": len(actual), "mean": float(actual.mean()),
        "below": below.tolist(), "inside": float(inside), "pinball": (pinball / actual.mean()).tolist(),
    }  # fmt: skip


def _table(results: dict[str, Any]) -> Table:
    title = f"{results['workload']}, {results['split']} split, {results['rule']}: {results['forecasts']:,} forecasts"
    caption = f"{results['inside']:.0%} lie between p10 and p90; the mean time to the start is {results['mean']:,.0f} s"
    table = Table(title=title, caption=caption)
    for heading in ("quantile", "started before it", "pinball loss / mean time"):
        table.add_column(heading, justify="right")
    for level, below, loss in zip(LEVELS, results["below"], results["pinball"], strict=True):
        table.add_row(f"p{100 * level:.0f}", f"{below:.1%}", f"{loss:.3f}")
    return table
