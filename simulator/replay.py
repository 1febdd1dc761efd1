"""Simulations side by side, and replays of a workload under a rule.

    from simulator.replay import simulate
    [schedule] = simulate(load_workload("cloud", "test", runs=1), "easy-sjf")

`Simulator` owns the arrays that the kernels work on, for environments and for replays.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from simulator.arrays import check_workload, empty_batch, job_groups, past_runs, problem_arrays, recorded_estimates
from simulator.kernels import TETRIS, Numbers, Past, Plan, compiling, go_on_envs, reset_envs, step_envs
from simulator.rules import Rule, parse_rule, uses_history
from simulator.schedule import Schedule
from workloads.jobs import Workload


class Simulator:
    """The arrays of a workload and of `count` simulations over it, in the form that the kernels take."""

    def __init__(
        self,
        workload: Workload,
        rule: Rule,
        count: int,
        length: int,
        *,
        threads: int = 1,
        objective: str = "latency",
        backfill: str = "easy",
        lock_in: bool = False,
        history: bool = True,
        recorded: bool = False,
        scores: np.ndarray | None = None,
    ) -> None:
        jobs, cluster = workload.jobs, workload.cluster
        check_workload(jobs, cluster)
        jobs = replace(jobs, demand=np.rint(jobs.demand / cluster.grid) * cluster.grid)
        cluster = replace(cluster.on_grid, speed=np.asarray(cluster.speed, float))
        self.jobs, self.cluster, self.length = jobs, cluster, length
        if lock_in and rule.head == TETRIS:
            raise ValueError("tetris has no order of jobs, which lock_in needs; use another rule")
        self.rule_uses_history = uses_history(rule) and not recorded
        history = history or self.rule_uses_history
        groups = job_groups(jobs) if history else np.full((len(jobs), 3), -1, np.int32)
        self.past = past_runs(jobs, groups) if history else Past(np.zeros(1, np.int64), np.zeros(0), np.zeros(0))
        self.whole = problem_arrays(
            jobs, cluster, groups, rule, objective=objective, backfill=backfill, lock_in=lock_in, scores=scores,
            recorded=recorded_estimates(jobs) if recorded and uses_history(rule) else None,
        )  # fmt: skip
        self.batch = empty_batch(length, cluster, 3 * length if history else 0, count)
        self.batch.s["stop"] = length
        parts = max(threads, min(4 * threads, count // 64)) if threads > 1 else 1  # who is done early takes the next
        self._others = empty_batch(length, cluster, 3 * length if self.rule_uses_history else 0, parts)  # for roll-outs
        unknown = np.full(len(self.past.offset), -1)
        rows = self.batch.history.shape[1:]
        self._numbers = [Numbers(unknown.copy(), unknown.copy(), np.zeros(rows)) for _ in range(parts)]
        self._bounds = np.linspace(0, count, parts + 1).astype(int)
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def reset(self, indices: np.ndarray, plan: Plan, obs: np.ndarray, mask: np.ndarray) -> None:
        """Start the simulations `indices` at their `first` jobs; plan.window 0: the rule schedules all their jobs."""

        def work(part: int, low: int, high: int) -> None:
            mine = indices[(indices >= low) & (indices < high)]
            numbers = self._numbers[part]
            reset_envs(mine, self.whole, self.batch, self._others, part, self.past, numbers, plan, obs, mask)

        self._parallel(work)

    def go_on(self, indices: np.ndarray, plan: Plan, obs: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Begin the next episode where the last one ended; returns the simulations in which that was possible."""
        went_on = np.zeros(len(self.batch.s), bool)

        def work(part: int, low: int, high: int) -> None:
            mine = indices[(indices >= low) & (indices < high)]
            numbers = self._numbers[part]
            go_on_envs(mine, self.whole, self.batch, self._others, part, self.past, numbers, plan, obs, mask, went_on)

        self._parallel(work)
        return np.flatnonzero(went_on)

    def step(self, actions: np.ndarray, plan: Plan, obs: np.ndarray, mask: np.ndarray, *out: np.ndarray) -> None:
        """Take an action in every simulation; `out`: rewards, terminated, truncated."""

        def work(part: int, low: int, high: int) -> None:
            step_envs(low, high, actions, self.whole, self.batch, self._others, part, plan, obs, mask, *out)

        self._parallel(work)

    def schedule(self, e: int, first: int = 0, last: int | None = None) -> Schedule:
        """What simulation e did, or plans to do, with its jobs first..last."""
        s = self.batch.s[e]
        last = s["stop"] if last is None else last
        plan, jobs = self.batch.plan[e, first:last], self.jobs[s["first"] + first : s["first"] + last]
        return Schedule(jobs, self.cluster, plan["start"].copy(), plan["node"].copy(), int(s["decisions"]))

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()

    def _parallel(self, work: Callable[[int, int, int], None]) -> None:
        """work(part, low, high) over the simulations, parts side by side (the kernels release the GIL)."""
        with compiling():
            parts = list(zip(range(len(self._numbers)), self._bounds[:-1], self._bounds[1:], strict=True))
            if self._pool:
                list(self._pool.map(lambda part: work(*part), parts))
            else:
                work(*parts[0])


class Replay:
    """Segments of a workload, replayed again and again under a rule, from an empty machine each.

    Args:
        workload, rule, segments, backfill, lock_in, scores, threads: as of `simulate`.
    """

    def __init__(
        self,
        workload: Workload,
        rule: str | Rule,
        segments: np.ndarray | None = None,
        *,
        backfill: str = "easy",
        lock_in: bool = False,
        scores: np.ndarray | None = None,
        threads: int = 1,
    ) -> None:
        rule = parse_rule(rule) if isinstance(rule, str) else rule
        segments = workload.segments if segments is None else np.asarray(segments)
        lengths = segments[:, 1] - segments[:, 0]
        self._core = Simulator(
            workload, rule, len(segments), int(lengths.max()), threads=min(threads, len(segments)),
            backfill=backfill, lock_in=lock_in, history=False, scores=scores,
        )  # fmt: skip
        self._core.batch.s["first"], self._core.batch.s["stop"] = segments[:, 0], lengths

    def __call__(self, which: np.ndarray | None = None, weights: np.ndarray | None = None) -> list[Schedule]:
        """The schedules of the segments int[W] (None: all), a tuned rule having other weights from now on."""
        if weights is not None:
            self._core.whole.weights[:] = weights
        which = np.arange(len(self._core.batch.s)) if which is None else which
        nothing = np.zeros((len(self._core.batch.s), 0), np.float32)
        plan = Plan(0, self._core.length, 0, 0, False, True)
        self._core.reset(which, plan, nothing, nothing.astype(bool))
        return [self._core.schedule(e) for e in which.tolist()]


def simulate(
    workload: Workload,
    rule: str | Rule,
    segments: np.ndarray | None = None,
    *,
    backfill: str = "easy",
    lock_in: bool = False,
    scores: np.ndarray | None = None,
    threads: int = 1,
) -> list[Schedule]:
    """Replay the workload's segments, or others (int[S, 2] ranges of its jobs), from an empty machine under a rule.

    Args:
        lock_in: RLScheduler's semantics, in which `backfill` ("none" or "easy") decides and the rule gives the order.
        scores: float64[N] for rules whose order is STATIC (lowest first).
        threads: the segments are shared out among so many.
    """
    return Replay(workload, rule, segments, backfill=backfill, lock_in=lock_in, scores=scores, threads=threads)()
