"""What the tests compare the simulator with: small random workloads, and the same semantics in slow, plain Python.

`SlowCluster` knows no Numba, sorted queues or increments: it recounts everything at every question. `play` takes it
along with an environment and compares the two at every decision.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from hypothesis import strategies as st

from scheduler_env import SchedulerEnv
from simulator.replay import simulate
from simulator.schedule import Schedule
from workloads.jobs import Cluster, Jobs, Workload

Chooser = Callable[[SchedulerEnv, np.ndarray], int]  # (environment, mask) -> action


def make_workload(
    seed: int,
    count: int,
    nodes: int = 1,
    resources: int = 1,
    estimates: str = "any",
    speeds: bool = False,
    whole: bool = True,
    grain: float = 1.0,
    past: int = 0,
) -> Workload:
    """A segment of `count` jobs behind `past` older ones, in bursts and with ties, of four users and of nobody.

    Args:
        estimates: "exact", "over", or "any", which is under as well.
        whole: times in whole seconds; else in fractions of them, also below one second.
        grain: demands and capacities are multiples of it (sums of 0.1 are not exact).
    """
    rng = np.random.default_rng(seed)
    total = past + count
    capacity = rng.integers(1, 9, (nodes, resources)).astype(float)
    demand = np.ceil(rng.uniform(0, 1, (total, resources)) * capacity[rng.integers(nodes, size=total)])
    gap = rng.integers(1, 12, total) * (rng.random(total) < 0.5) * rng.choice([0.2, 1, 4])
    run = rng.choice([1, 2, 3, 5, 8, 13, 21, 60], total).astype(float)
    if not whole:
        gap, run = gap * rng.random(total), run * rng.choice([0.05, 0.3, 1.0], total)
    else:
        gap = np.ceil(gap)
    factor = {"exact": [1.0], "over": [1, 1, 2, 10], "any": [0.5, 1, 2, 10]}[estimates]
    requested = run * rng.choice(factor, total)
    identity = rng.integers(-1, 4, (4, total)).astype(np.int32)
    jobs = Jobs(
        submit_time=100.0 + np.cumsum(gap),
        run_time=run,
        requested_time=requested if not whole else np.ceil(requested),
        demand=demand * grain,
        user=identity[0],
        group=identity[1],
        executable=identity[2],
        queue=identity[3],
        wait_time=rng.integers(0, 10, total) * (rng.random(total) < 0.5) * 1.0,
        job_id=np.arange(1, total + 1),
    )
    speed = rng.choice([0.5, 1.0, 1.6], nodes) if speeds else np.ones(nodes)
    cluster = Cluster(capacity * grain, speed, tuple(f"r{r}" for r in range(resources)))
    return Workload("small", cluster, jobs, np.array([[past, total]]), {})


def workloads(min_jobs: int = 1, max_jobs: int = 40, **fixed: object) -> st.SearchStrategy[Workload]:
    """Workloads of 1 to 4 nodes and 1 or 2 resources; `fixed` are arguments of make_workload."""
    free = {
        "seed": st.integers(0, 2**20),
        "count": st.integers(min_jobs, max_jobs),
        "nodes": st.integers(1, 4),
        "resources": st.integers(1, 2),
        "estimates": st.sampled_from(["exact", "over", "any"]),
        "speeds": st.booleans(),
        "whole": st.booleans(),
        "grain": st.sampled_from([1.0, 0.1]),
    }
    return st.builds(make_workload, **(free | {name: st.just(value) for name, value in fixed.items()}))


def random_jobs(rng: np.random.Generator, count: int) -> Jobs:
    """Any jobs that SWF can express, on up to 64 processors with up to 512 GB."""
    identifiers = rng.integers(-1, 2**31 - 1, size=(5, count))
    return Jobs(
        submit_time=np.sort(rng.uniform(0, 1e7, count)),
        run_time=rng.uniform(1e-3, 1e6, count),
        requested_time=rng.uniform(1e-3, 1e6, count),
        demand=np.stack([rng.integers(1, 65, count), rng.integers(1, 513, count)], axis=1).astype(float),
        **{
            name: row.astype(np.int32)
            for name, row in zip(("user", "group", "executable", "queue"), identifiers, strict=False)
        },
        wait_time=rng.uniform(0, 1e5, count),
        job_id=identifiers[4],
    )


def same(left: Jobs, right: Jobs) -> bool:
    return all(np.array_equal(getattr(left, field.name), getattr(right, field.name)) for field in fields(Jobs))


def job_costs(schedule: Schedule, objective: str) -> np.ndarray:
    """float64[N]: the objective's cost of each job, from start times alone."""
    jobs = schedule.jobs
    wait = schedule.start_time - jobs.submit_time
    latency = wait + jobs.run_time / schedule.cluster.speed[schedule.node]
    slowdown = np.maximum(1.0, latency / np.maximum(jobs.run_time, 10.0))
    return {"wait": wait, "latency": latency, "slowdown": slowdown, "tail": wait**2}[objective]


def within(demand: np.ndarray, room: np.ndarray) -> bool:
    """Whether it fits, but for the rounding of sums of fractions."""
    return bool((demand <= room + 1e-9).all())


@dataclass
class Reservation:
    job: int
    node: int
    shadow: float
    spare: np.ndarray


class SlowCluster:
    """The semantics of an agent's decisions, for one segment of a workload."""

    def __init__(self, workload: Workload, window: int, backfill: str = "easy", patience: float = np.inf) -> None:
        first, last = workload.segments[0]
        self.jobs, self.cluster, self.window, self.backfill = (
            workload.jobs[first:last],
            workload.cluster,
            window,
            backfill,
        )
        self.count, self.patience = len(self.jobs), patience
        self.service = self.jobs.run_time[:, None] / self.cluster.speed  # [N, M]
        self.requested = self.jobs.requested_time[:, None] / self.cluster.speed
        self.start = np.full(self.count, np.inf)
        self.node = np.zeros(self.count, int)
        self.order: list[int] = []  # jobs in the order in which they started
        self.now = self.jobs.submit_time[0]
        self.reservation: Reservation | None = None

    def warm_up(self, schedule: Schedule, jobs: int) -> None:
        """Begin where job number `jobs` arrives, having done what the schedule says until then (easy-sjf's, for the
        order of what started at the same time)."""
        self.now = self.jobs.submit_time[jobs]
        early = schedule.start_time < self.now
        self.start[early], self.node[early] = schedule.start_time[early], schedule.node[early]
        self.order = sorted(np.flatnonzero(early), key=lambda i: (self.start[i], self.jobs.requested_time[i]))
        self.settle()

    @property
    def end(self) -> np.ndarray:
        return self.start + self.service[np.arange(self.count), self.node]

    @property
    def queue(self) -> list[int]:
        return [i for i in range(self.count) if self.jobs.submit_time[i] <= self.now and self.start[i] == np.inf]

    @property
    def view(self) -> list[int]:
        """The jobs in the window: all or, for easy-sjf, the oldest for one half, the shortest of the others for the
        other, and in the last place the one that it would start, where that is none of these."""
        queue = self.queue
        if len(queue) <= self.window:
            return queue
        oldest, nodes = queue[: (self.window + 1) // 2], range(len(self.cluster.speed))
        ranked = sorted(queue, key=lambda i: (self.jobs.requested_time[i], i))
        view = (oldest + [i for i in ranked if i not in oldest])[: self.window]
        chosen = [i for i in ranked if any(self.may_start(i, m) for m in nodes)][:1]
        return view if not chosen or chosen[0] in view else view[:-1] + chosen

    @property
    def arrived(self) -> int:
        return int((self.jobs.submit_time <= self.now).sum())

    @property
    def finished(self) -> list[int]:
        """Jobs that have ended, in the order in which they did."""
        end = self.end
        return sorted((i for i in self.order if end[i] <= self.now), key=lambda i: end[i])

    def running(self, m: int) -> list[int]:
        end = self.end
        return [i for i in self.order if self.node[i] == m and end[i] > self.now]

    def free(self, m: int) -> np.ndarray:
        return self.cluster.capacity[m] - self.jobs.demand[self.running(m)].sum(0)

    def fits(self, i: int, m: int) -> bool:
        return within(self.jobs.demand[i], self.free(m))

    def shadow(self, i: int, m: int) -> tuple[float, np.ndarray]:
        """When job i fits on node m if running jobs end as requested, and what is spare. Late ones end in a second, in
        the order in which they were due."""
        due = {j: self.start[j] + self.requested[j, m] for j in self.running(m)}
        ends = {j: end if end > self.now else self.now + 1.0 for j, end in due.items()}
        when, free = self.now, self.free(m)
        for j in sorted(due, key=lambda j: (ends[j], due[j], j)):
            if within(self.jobs.demand[i], free):
                break
            when = ends[j]
            free = free + self.jobs.demand[j]
        return when, free - self.jobs.demand[i]

    def may_start(self, i: int, m: int) -> bool:
        if not self.fits(i, m):
            return False
        r = self.reservation
        if r is None:
            return True
        if self.backfill == "none" or i == r.job:
            return False
        in_time = self.now + self.requested[i, m] <= r.shadow
        return m != r.node or in_time or within(self.jobs.demand[i], r.spare)

    def has_choice(self) -> bool:
        return any(self.may_start(i, m) for i in self.view for m in range(len(self.cluster.speed)))

    def next_event(self) -> None:
        times = np.concatenate([self.jobs.submit_time, self.end[self.order]])
        self.now, self.reservation = times[times > self.now].min(), None

    def settle(self) -> bool:
        """Let time pass until there is a choice. False: every job has started."""
        while len(self.order) < self.count:
            if self.has_choice():
                return True
            self.next_event()
        return False

    def mask(self) -> np.ndarray:
        nodes, queue = len(self.cluster.speed), self.queue
        mask = np.zeros((self.window, nodes), bool)
        hurry = self.reservation is None and queue and self.now - self.jobs.submit_time[queue[0]] > self.patience
        for k, i in enumerate(self.view):
            if hurry and i != queue[0]:
                continue
            for m in range(nodes):
                ever = within(self.jobs.demand[i], self.cluster.capacity[m])
                mask[k, m] = self.may_start(i, m) or (not self.fits(i, m) and ever and self.reservation is None)
        return np.append(mask.ravel(), self.reservation is not None)

    def begin(self, i: int, m: int) -> None:
        r = self.reservation
        if r is not None and m == r.node and self.now + self.requested[i, m] > r.shadow:
            r.spare = r.spare - self.jobs.demand[i]
        self.start[i], self.node[i] = self.now, m
        self.order.append(i)

    def step(self, action: int) -> bool:
        """Take an action; whether there is another choice."""
        k, m = divmod(int(action), len(self.cluster.speed))
        if k == self.window:
            self.next_event()
        else:
            i = self.view[k]
            if self.fits(i, m):
                self.begin(i, m)
            else:
                self.reservation = Reservation(i, m, *self.shadow(i, m))
        return self.settle()


@dataclass
class Episode:
    observations: list[np.ndarray]  # before each action
    actions: list[int]
    rewards: list[float]
    terminated: bool
    truncated: bool
    info: dict
    schedule: Schedule


def play(env: SchedulerEnv, choose: Chooser, watch: Callable[[np.ndarray], None] | None = None) -> Episode:
    """One episode from the workload's first job; `watch` sees every observation before the action is chosen."""
    observation, info = env.reset(seed=0, options={"first": [int(env.envs.workload.segments[0, 0])]})
    observations, actions, rewards, over = [], [], [], False
    while not over:
        observations.append(observation)
        if watch:
            watch(observation)
        actions.append(choose(env, info["action_mask"]))
        observation, reward, terminated, truncated, info = env.step(actions[-1])
        rewards.append(reward)
        over = terminated or truncated
    return Episode(observations, actions, rewards, terminated, truncated, info, env.envs.schedule())


def at_random(seed: int) -> Chooser:
    rng = np.random.default_rng(seed)
    return lambda _, mask: int(rng.choice(np.flatnonzero(mask)))


def like_the_rule(env: SchedulerEnv, _: np.ndarray) -> int:
    return int(env.envs.rule_actions()[0])


def again(actions: list[int]) -> Chooser:
    remaining = iter(actions)
    return lambda _, mask: next(remaining)


def environment(workload: Workload, *, warmup_jobs: int = 0, followup_jobs: int = 0, **options: object) -> SchedulerEnv:
    """A single environment whose only episode is the workload's segment; a window of all jobs unless given."""
    jobs = int(workload.segments[0, 1] - workload.segments[0, 0])
    options = {"queue_window": jobs} | options
    own = jobs - warmup_jobs - followup_jobs
    return SchedulerEnv(workload, num_jobs=own, warmup_jobs=warmup_jobs, followup_jobs=followup_jobs, **options)


def simulate_one(workload: Workload, rule: object, **options: object) -> Schedule:
    return simulate(workload, rule, **options)[0]
