"""One moment of a real cluster, and what a rule or an agent would do there."""

import time
from dataclasses import dataclass

import numpy as np

from simulator.arrays import empty_sim, job_groups, problem_arrays
from simulator.kernels import (
    act_at_moment,
    compiling,
    follow_rule,
    forecast,
    look_at_moment,
    observe_moment,
    plan_moment,
    restore,
    rule_scores,
)
from simulator.observation import Layout
from simulator.planning import Imagination, Planner
from simulator.rules import Rule
from simulator.run_times import RunTimes
from workloads.jobs import Cluster, Jobs

DEPTH = 64  # of a longer queue planning in limited time looks at so many jobs, the base's first
CHOICES = 0.7  # of the time goes to the choices, what is left to the expected starts


@dataclass(frozen=True)
class ClusterState:
    """A cluster at one moment. Demands are in the units of its capacity; all times have one origin.

    Run times of jobs that have not finished are not looked at. Jobs in `queued` and `running` may be in any order;
    equal submit times count in the order given.
    """

    now: float
    cluster: Cluster
    queued: Jobs
    running: Jobs
    start_time: np.ndarray  # float64[running]
    node: np.ndarray  # int[running], their nodes
    finished: Jobs | None = None  # in order of their ends: what is known of their users; eight of a kind suffice
    free: np.ndarray | None = None  # float64[M, R]; None: what the running jobs leave; less: not in use for now


@dataclass(frozen=True)
class Plan:
    """What planning does at a moment, and when it expects the others to start."""

    choices: list[tuple[int, int]]  # the jobs and nodes, in order, that it starts or reserves
    starts: np.ndarray  # float64[samples, Q]: when each queued job starts in each sample; inf: on no node in use
    samples: int  # how many were taken for the choices and for `starts`
    wanted: int  # how many would have been


class Moment:
    """A `ClusterState` in the form that the kernels take, and what a rule or an agent would do there.

    Jobs in `queued` have the same numbers as in the state, here in everything that is returned.
    """

    def __init__(self, state: ClusterState, rule: Rule, backfill: str = "easy") -> None:
        cluster, grid = state.cluster.on_grid, state.cluster.grid
        parts = [*([] if state.finished is None else [state.finished]), state.running, state.queued]
        finished = 0 if state.finished is None else len(state.finished)
        ordered = [np.argsort(part.submit_time, kind="stable") for part in parts[-2:]]
        self.numbers, self._first = ordered[1], finished + len(ordered[0])
        self._finished, self._cluster = finished, cluster
        order = np.concatenate([np.arange(finished), finished + ordered[0], self._first + ordered[1]])

        def joined(field: str) -> np.ndarray:
            return np.concatenate([getattr(part, field) for part in parts])[order]

        requested, unknown = joined("requested_time"), order  # what no rule or agent looks at: any numbers
        run_time = joined("run_time") if finished else requested
        user, executable = (joined("user"), joined("executable")) if finished else (unknown, unknown)
        demand = np.rint(joined("demand") / grid) * grid
        jobs = Jobs(
            joined("submit_time"), run_time, requested, demand, user, unknown, executable, unknown, unknown, unknown
        )
        groups = job_groups(jobs) if finished else np.full((len(jobs), 3), -1, np.int32)
        problem = problem_arrays(jobs, cluster, groups, rule, backfill=backfill)
        self.problem = problem._replace(capacity=cluster.capacity.copy())
        self.sim = empty_sim(len(jobs), cluster, int(groups.max(initial=-1)) + 1)
        self.sim.free[:] = np.inf if state.free is None else np.rint(state.free / grid) * grid
        start, running = self.sim.plan["start"], slice(finished, self._first)
        start[:] = np.inf
        start[running], self.sim.plan["node"][running] = state.start_time[ordered[0]], state.node[ordered[0]]
        with compiling():
            restore(self.problem, self.sim, float(state.now), finished, len(state.running))

    @property
    def reserved(self) -> tuple[int, int, float] | None:
        """The job that a node is reserved for, that node, and the job's shadow time."""
        s = self.sim.s[0]
        if s["reserved"] < 0:
            return None
        return self._number(s["reserved"]), int(s["reserved_node"]), float(s["shadow"])

    def observe(self, layout: Layout) -> tuple[np.ndarray, bool]:
        """The observation float32[D], and whether some visible job may start now."""
        obs, mask = np.empty(layout.size, np.float32), np.empty(layout.actions, bool)
        return obs, observe_moment(self.problem, self.sim, layout.window, obs, mask)

    def act(self, action: int) -> tuple[int, int]:
        """Take a legal action other than to wait: the job and node that it starts or, if it does not fit, reserves."""
        job, node = act_at_moment(self.problem, self.sim, action)
        return self._number(job), node

    def follow_rule(self) -> list[tuple[int, int]]:
        """Do what the rule does now: the jobs and nodes, in order, that it starts or reserves."""
        choices = np.empty((len(self.numbers) + 1, 2), np.int64)
        count = follow_rule(self.problem, self.sim, choices)
        return [(self._number(job), int(node)) for job, node in choices[:count]]

    def plan(self, planner: Planner, until: float = np.inf) -> Plan:
        """Do what planning does now. From a time on (of `time.perf_counter`) the choices are the base's; where there is
        such a time, only the DEPTH most urgent jobs are looked at."""
        run_times = RunTimes(self.problem)
        run_times.learn(np.arange(self._finished))
        imagination = Imagination(self.problem, self._cluster, planner, run_times)
        choices, starts = np.empty((len(self.numbers) + 1, 2), np.int64), np.empty((planner.samples, len(self.numbers)))
        if until < np.inf:
            scores = np.empty(len(self.numbers))
            rule_scores(self.problem, self.sim, scores)
            imagination.leave_out(self._first + np.argsort(scores, kind="stable")[DEPTH:])
        with compiling(), imagination.for_seconds(CHOICES * (until - time.perf_counter())):
            count = plan_moment(self.problem, self.sim, *imagination.arrays, choices)
        with imagination.for_seconds(until - time.perf_counter()):
            samples = forecast(self.sim, *imagination.arrays, starts)
        s = imagination.look.s[0]
        in_state = np.empty((samples, len(self.numbers)))
        in_state[:, self.numbers] = starts[:samples]
        wanted = planner.samples * (int(s["planned"]) + 1)
        chosen = [(self._number(job), int(node)) for job, node in choices[:count]]
        return Plan(chosen, in_state, int(s["taken"]) + samples, wanted)

    def visible(self, window: int) -> np.ndarray:
        """int64[...]: the jobs in the window of an agent, in the order of its actions."""
        look_at_moment(self.problem, self.sim, window)
        return self.numbers[self.sim.seen[: self.sim.s[0]["visible"]] - self._first]

    def rule_order(self) -> np.ndarray:
        """int64[Q]: all queued jobs in the rule's order of heads; those that are too large for every node last."""
        scores = np.empty(len(self.numbers))
        rule_scores(self.problem, self.sim, scores)
        return self.numbers[np.argsort(scores, kind="stable")]

    def _number(self, job: int) -> int:
        return int(self.numbers[job - self._first])
