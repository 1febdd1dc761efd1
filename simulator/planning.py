"""Planning at decision time: what a rule would do is compared with a few alternatives by roll-outs of the rule.

    from simulator.planning import Planner, plan
    [schedule] = plan(load_workload("my_cluster.swf.gz", "test"), Planner("easy-fifo"))

How it works is in docs/planning.md, what is compiled in kernels.py.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from simulator.arrays import check_workload, empty_sim, job_groups, past_runs, problem_arrays
from simulator.kernels import (
    LATENCY,
    LOOKAHEAD,
    PLANNED,
    TETRIS,
    TIMED,
    Lookahead,
    Problem,
    Sim,
    action_gains,
    compiling,
    plan_run,
    recall_all,
)
from simulator.replay import Simulator
from simulator.rules import Rule, parse_rule, uses_history
from simulator.run_times import RunTimes, ended_before
from simulator.schedule import Schedule
from workloads.jobs import Cluster, Workload


@dataclass(frozen=True)
class Planner:
    """A rule to start from, and how hard to look for something better.

    Raises:
        ValueError: the base is no rule or one without an order of jobs, or a number is out of range.
    """

    base: str = "easy-xf+sjf"
    candidates: int = 4  # other jobs that are tried
    samples: int = 16  # of all run times
    threshold: float = 1.0  # by so many standard errors a candidate has to be better than the rule's choice
    seed: int = 1

    def __post_init__(self) -> None:
        if self.rule.head == TETRIS:
            raise ValueError("tetris has no order of jobs, which planning needs; use another base")
        for name, least in (("candidates", 1), ("samples", 1), ("threshold", 0.0), ("seed", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def rule(self) -> Rule:
        return parse_rule(self.base)


def plan(
    workload: Workload, planner: Planner, segments: np.ndarray | None = None, *, threads: int = 1
) -> list[Schedule]:
    """Replay the workload's segments, or others (int[S, 2] ranges of its jobs), from an empty machine."""
    check_workload(workload.jobs, workload.cluster)
    jobs = replace(workload.jobs, demand=np.rint(workload.jobs.demand / workload.cluster.grid) * workload.cluster.grid)
    cluster = replace(workload.cluster.on_grid, speed=np.asarray(workload.cluster.speed, float))
    groups = job_groups(jobs)
    whole = problem_arrays(jobs, cluster, groups, planner.rule)
    past = past_runs(jobs, groups)

    def work(segment: np.ndarray) -> Schedule:
        first, last = (int(bound) for bound in segment)
        own = slice(first, last)
        problem = whole._replace(
            jobs=whole.jobs[own], demand=whole.demand[own], features=whole.features[own], groups=groups[own]
        )
        run_times = RunTimes(whole)
        run_times.learn(ended_before(jobs, first))
        sim = empty_sim(last - first, cluster, int(groups.max(initial=-1)) + 1 if uses_history(planner.rule) else 0)
        sim.s["stop"] = last - first
        recall_all(sim.history, past, float(jobs.submit_time[first]))
        imagination = Imagination(problem, cluster, planner, run_times)
        plan_run(problem, sim, *imagination.arrays)
        decisions = int(sim.s[0]["decisions"])
        return Schedule(jobs[own], cluster, sim.plan["start"].copy(), sim.plan["node"].copy(), decisions)

    segments = workload.segments if segments is None else np.asarray(segments)
    with compiling(), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, segments))


class Imagination:
    """What planning works on: the problem without its run times, a state to go on from, and what is known."""

    def __init__(
        self, problem: Problem, cluster: Cluster, planner: Planner, run_times: RunTimes, places: int = 0
    ) -> None:
        """`places`: so many candidates at most, unless those that planning itself finds."""
        jobs, count = problem.jobs.copy(), len(problem.jobs)
        jobs["run"] = np.nan
        self.problem = problem._replace(jobs=jobs, objective=PLANNED, recorded=uses_history(planner.rule))
        self.sim = empty_sim(count, cluster, 0)
        places = places or planner.candidates + 2 + len(problem.speed)
        self.look = Lookahead(
            s=np.zeros(1, LOOKAHEAD), known=run_times.known, runs=np.zeros((planner.samples, count)),
            ends=np.zeros(count, TIMED), job=np.zeros(places, np.int64), node=np.zeros(places, np.int64),
            rank=np.zeros(places), gain=np.zeros(places), square=np.zeros(places),
            starts=np.zeros((planner.samples, count)), left_out=np.zeros(count, bool), stop=np.zeros(1, bool),
        )  # fmt: skip
        s = self.look.s[0]
        for name in ("candidates", "samples", "threshold", "seed"):
            s[name] = getattr(planner, name)
        s["drawn"] = np.nan

    @property
    def arrays(self) -> tuple[Problem, Sim, Lookahead]:
        """As the kernels take them."""
        return self.problem, self.sim, self.look

    def leave_out(self, jobs: np.ndarray) -> None:
        """Look at the queue without these jobs (numbers), as if they had not come yet."""
        self.look.left_out[jobs] = True
        self.look.s[0]["shorter"] = len(jobs) > 0

    @contextmanager
    def for_seconds(self, seconds: float) -> Iterator[None]:
        """Take no more samples after that time, if it is finite."""
        self.look.stop[0] = seconds <= 0
        timer = threading.Timer(seconds, self.look.stop.fill, (True,))
        if 0 < seconds < np.inf:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if timer.ident:
                timer.join()


def planned_gains(simulator: Simulator, planner: Planner, mask: np.ndarray) -> np.ndarray:
    """float32[E, A]: by how many seconds less the jobs of each simulation would take in all, on average over the
    samples and until the present queue is empty, if each action that bool[E, A] allows were taken in place of the
    rule's own, and the rule went on from there. NaN: forbidden."""
    gains = np.empty(mask.shape, np.float32)
    whole, batch = simulator.whole, simulator.batch
    for e, s in enumerate(batch.s):
        first, count = int(s["first"]), int(s["stop"])
        own = slice(first, first + count)
        sim = Sim(batch.s[e : e + 1], *(field[e] for field in batch[1:-1]))
        problem = whole._replace(
            jobs=whole.jobs[own], demand=whole.demand[own], features=whole.features[own], groups=batch.groups[e][:count]
        )
        run_times = RunTimes(whole)
        run_times.learn(ended_before(simulator.jobs, first))
        schedule = simulator.schedule(e)
        end = schedule.start_time + schedule.service_time
        end[sim.queue[: s["queued"]]] = np.inf  # their start is what the reference rule is about to do
        order = np.argsort(end, kind="stable")
        run_times.learn(first + order[: np.searchsorted(end[order], s["now"], side="right")])
        imagination = Imagination(problem, simulator.cluster, planner, run_times, mask.shape[1])
        imagined = imagination.problem._replace(groups=whole.groups[own], objective=LATENCY)
        action_gains(problem, sim, imagined, imagination.sim, imagination.look, mask[e], gains[e])
    return gains
