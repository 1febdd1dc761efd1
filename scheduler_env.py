"""The Gymnasium environments: a learner decides what an exact event-driven cluster starts next.

    import gymnasium as gym, scheduler_env
    envs = gym.make_vec("ResourceRL/Scheduler-v0", num_envs=64, workload="cloud")

`SchedulerVectorEnv` steps many clusters together; `SchedulerEnv` is one of them. What they simulate is in simulator/.
"""

import os
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from simulator.gantt import gantt
from simulator.kernels import Plan
from simulator.observation import Layout
from simulator.planning import Planner, planned_gains
from simulator.replay import Simulator
from simulator.rules import parse_rule
from simulator.schedule import OBJECTIVES, Schedule
from workloads.jobs import Workload
from workloads.load import load_workload


class SchedulerVectorEnv(VectorEnv):
    """`num_envs` clusters, each with jobs of its own, stepped together.

    An episode is cut out of running operation: the reference rule schedules `warmup_jobs`, the agent decides while
    `num_jobs` more arrive, and the reference takes over through `followup_jobs` more (0: the agent goes on until all
    have started). Action k*M + m starts job k of the window on node m or, where it does not fit, reserves the node
    for it; K*M waits for the next event. An action that the mask forbids counts as the first one that it allows.

    Args:
        workload: a preset's name, the path of a trace, or a Workload.
        queue_window: K, how many queued jobs the agent sees: all or, where there are more, the oldest for one half and
            the first in the reference's order for the other.
        backfill: "easy", or "none": a reservation blocks until the next event.
        objective: "latency", "wait", "slowdown" or "tail" (squares of the waits: long ones count for more).
        reward: "improvement": what the choice gained over the reference rule, relative to its cost in the episode, by
            simulating the rule to the end (potential-based shaping, Ng, Harada & Russell 1999, with Bertsekas'
            roll-out as potential); "cost": minus the cost that accrued, per job.
        reference: the rule; `simulate` knows the same ones.
        lock_in: RLScheduler's semantics, in which a chosen job holds the queue until it has started.
        split: "train", "validation", "test" or "all".
        num_threads: default: one a core, if each has 8 environments or more.
        episodes_in_a_row: so many follow each other on one cluster, each beginning with the backlog that the agent left
            in the one before it, instead of one that the reference leaves after a warm-up. A row ends early with the
            workload's segment, or where a job is still there that is older than the last `warmup_jobs`.
        full_rollouts: never stop a roll-out early, where it meets the known trajectory (slower, the same rewards).
        recorded_history: a reference that looks at the history of users takes, for each job, what the trace says was
            known when it was submitted, not what has finished in the simulation: roll-outs can then stop early.
        planned_gain: `infos["planned_gain"]` float32[num_envs, K*M + 1] tells what planning thinks of each action: by
            how many seconds less all jobs would take on average if it were taken in place of the reference's own
            (NaN: forbidden). It costs milliseconds a step.

    `infos["action_mask"]` int8[num_envs, K*M + 1] are the legal actions, as `envs.action_space.sample` takes them:
    `envs.action_space.sample(tuple(infos["action_mask"]))`. `action_masks()` gives the same as bool.

    Observations, masks and rewards are written into the same buffers at every step; copy what you keep. Sub-environment
    i draws its episodes from seed + i alone, so they do not depend on `num_envs` or `num_threads`.

    Raises:
        ValueError: an argument makes no sense, or the split has fewer jobs in a row than an episode needs.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (Gymnasium's own spelling)
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        workload: str | Workload = "cloud",
        *,
        num_jobs: int = 512,
        warmup_jobs: int = 256,
        followup_jobs: int = 512,
        queue_window: int = 64,
        backfill: str = "easy",
        objective: str = "latency",
        reward: str = "improvement",
        reference: str = "easy-sjf",
        lock_in: bool = False,
        split: str = "train",
        episodes_in_a_row: int = 1,
        num_threads: int | None = None,
        full_rollouts: bool = False,
        recorded_history: bool = False,
        planned_gain: bool = False,
        render_mode: str | None = None,
    ) -> None:
        _check_numbers(
            num_envs=(num_envs, 1), queue_window=(queue_window, 1), num_jobs=(num_jobs, 1),
            warmup_jobs=(warmup_jobs, 0), followup_jobs=(followup_jobs, 0),
            num_threads=(1 if num_threads is None else num_threads, 1), episodes_in_a_row=(episodes_in_a_row, 1),
        )  # fmt: skip
        _check_choices(
            backfill=(backfill, ("easy", "none")), objective=(objective, OBJECTIVES),
            reward=(reward, ("improvement", "cost")), render_mode=(render_mode or "ansi", ("ansi", "rgb_array")),
        )  # fmt: skip
        self.workload = load_workload(workload, split) if isinstance(workload, str) else workload
        self.length = warmup_jobs + num_jobs + followup_jobs
        self._places = _places(self.workload, self.length)
        self.num_envs, self.render_mode, self.num_jobs, self.warmup_jobs = num_envs, render_mode, num_jobs, warmup_jobs
        self.episodes_in_a_row = episodes_in_a_row
        nodes, resources = self.workload.cluster.capacity.shape
        self.layout = Layout(queue_window, nodes, resources)
        self.split = self.layout.split
        rule = parse_rule(reference)
        threads = num_threads or max(1, min(os.cpu_count() or 1, num_envs // 8))
        self._core = Simulator(
            self.workload, rule, num_envs, self.length, threads=min(threads, num_envs),
            objective=objective, backfill=backfill, lock_in=lock_in, recorded=recorded_history,
        )  # fmt: skip
        full = full_rollouts or lock_in or self._core.rule_uses_history or reward == "cost"
        self._plan = Plan(queue_window, warmup_jobs, num_jobs, followup_jobs, reward == "improvement", full)
        if planned_gain and lock_in:
            raise ValueError("planned_gain is True; planning knows no lock_in, so leave one of them out")
        self._planner = Planner(reference) if planned_gain else None
        self._obs = np.zeros((num_envs, self.layout.size), np.float32)
        self._mask = np.zeros((num_envs, self.layout.actions), bool)
        self._rewards = np.zeros(num_envs)
        self._terminated, self._truncated = np.zeros(num_envs, bool), np.zeros(num_envs, bool)
        self._generators: list[np.random.Generator] = []
        self.single_observation_space = gym.spaces.Box(0, 16, (self.layout.size,), np.float32)
        self.single_action_space = gym.spaces.Discrete(self.layout.actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start new episodes; options={"first": ints[num_envs]} says at which jobs of the workload."""
        if seed is not None or not self._generators:
            if not isinstance(seed, list):
                seed = [None if seed is None else seed + i for i in range(self.num_envs)]
            self._generators = [np.random.default_rng(s) for s in seed]
        first = (options or {}).get("first")
        if first is not None:
            outside = ~self._in_one_segment(np.asarray(first), self.length)
            if outside.any():
                job = np.asarray(first)[outside][0]
                raise ValueError(f"first is {job}; no segment of the workload has {self.length} jobs from there on")
        self._reset(np.arange(self.num_envs), first)
        return self._obs, self._infos()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One decision in every environment. Those that end are reset: see `final_obs`, `final_info` and
        `final_schedule` (a Schedule of all the jobs) in the infos.

        Raises:
            ValueError: there is not one action for each environment.
        """
        self._step(actions)
        infos: dict[str, Any] = {}
        done = np.flatnonzero(self._terminated | self._truncated)
        if len(done):
            for e in done.tolist():
                final = {"final_obs": self._obs[e].copy(), "final_info": self._final_info(e)}
                final["final_schedule"] = self.schedule(e)
                infos = self._add_info(infos, final, e)
            self._reset(np.setdiff1d(done, self._go_on(done)))
        infos |= self._infos()
        return self._obs, self._rewards.copy(), self._terminated.copy(), self._truncated.copy(), infos

    @property
    def observations(self) -> np.ndarray:
        """float32[num_envs, D]: the current ones (the buffer that `reset` and `step` return)."""
        return self._obs

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on from here as if never interrupted. Not a copy: what has to
        outlive the next step is saved, or copied (`copy.deepcopy`)."""
        names = ("_obs", "_mask", "_generators")
        return {"batch": self._core.batch._asdict(), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where an environment with the same arguments was when it gave its `state_dict`."""
        for name, array in state["batch"].items():
            getattr(self._core.batch, name)[...] = array
        self._obs[...], self._mask[...] = state["_obs"], state["_mask"]
        self._generators = deepcopy(state["_generators"])

    def action_masks(self) -> np.ndarray:
        """bool[num_envs, K*M + 1]: the legal actions (where sb3-contrib looks for them)."""
        return self._mask

    def rule_actions(self) -> np.ndarray:
        """int64[num_envs]: what the reference rule would do; the first legal action where that is out of sight."""
        s = self._core.batch.s
        actions = np.full(self.num_envs, self.layout.actions - 1)
        for e in np.flatnonzero(s["rule_job"] >= 0):
            seen = np.flatnonzero(self._core.batch.seen[e, : s["visible"][e]] == s["rule_job"][e])
            actions[e] = seen[0] * self.layout.nodes + s["rule_node"][e] if len(seen) else self._mask[e].argmax()
        return np.where(self._mask[np.arange(self.num_envs), actions], actions, self._mask.argmax(1))

    def schedule(self, e: int = 0) -> Schedule:
        """What environment e did and, for jobs that have not started, what the reference is about to do (with rewards
        by cost nobody knows: their start is inf)."""
        return self._core.schedule(e)

    def render(self) -> tuple[Any, ...] | None:
        """One text or image uint8[H, W, 3] an environment, as `render_mode` says."""
        if self.render_mode is None:
            return None
        draw = self._text if self.render_mode == "ansi" else self._image
        return tuple(draw(e) for e in range(self.num_envs))

    def close_extras(self, **_: Any) -> None:
        self._core.close()

    def _reset(self, indices: np.ndarray, first: Any = None) -> None:
        if first is None:
            first = [self._draw(self._generators[e]) for e in indices]
        self._core.batch.s["first"][indices] = first
        self._core.reset(indices, self._plan, self._obs, self._mask)

    def _infos(self) -> dict[str, Any]:
        """The legal actions as Gymnasium's spaces take them, and what planning thinks of them, if that is wanted."""
        infos = {"action_mask": self._mask.view(np.int8)}
        return infos | ({"planned_gain": planned_gains(self._core, self._planner, self._mask)} if self._planner else {})

    def _go_on(self, done: np.ndarray) -> np.ndarray:
        """Begin the next episodes of rows that are not over; returns whose."""
        s = self._core.batch.s[done]
        more = self._truncated[done] & (s["episode"] < self.episodes_in_a_row)
        more &= self._in_one_segment(s["first"], self.num_jobs + self.length)
        return self._core.go_on(done[more], self._plan, self._obs, self._mask) if more.any() else done[more]

    def _in_one_segment(self, first: np.ndarray, count: int) -> np.ndarray:
        """bool[N]: whether so many jobs from first[N] on are of one segment."""
        begin, end = self.workload.segments.T
        return ((begin <= first[:, None]) & (first[:, None] + count <= end)).any(1)

    def _draw(self, generator: np.random.Generator) -> int:
        """The first job of a random episode: all places in all segments are as likely."""
        place = int(generator.integers(self._places[-1]))
        segment = int(np.searchsorted(self._places, place, side="right"))
        return int(self.workload.segments[segment, 0]) + place - (int(self._places[segment - 1]) if segment else 0)

    def _step(self, actions: np.ndarray) -> None:
        actions = np.asarray(actions, np.int64)
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions of shape {actions.shape}; give one for each of the {self.num_envs} environments")
        out = self._rewards, self._terminated, self._truncated
        self._core.step(actions, self._plan, self._obs, self._mask, *out)

    def _final_info(self, e: int) -> dict[str, Any]:
        """Of the agent's jobs; the utilization is the machine's while it decided, whoever's jobs it ran."""
        whole = self._core.schedule(e)
        own = self._core.schedule(e, self.warmup_jobs, self.warmup_jobs + self.num_jobs)
        s, begin = self._core.batch.s[e], own.jobs.submit_time[0]
        end = max(s["now"], begin + 1.0)  # it may all have been one instant
        return {
            **own.metrics(),
            "utilization": whole.utilization_between(begin, end),
            "return": float(s["returned"]),
            "decisions": int(s["decisions"]),
            "first_job": int(s["first"]),
        }

    def _started(self, e: int) -> Schedule:
        """The jobs that have started by now."""
        s, schedule = self._core.batch.s[e], self._core.schedule(e)
        started = np.setdiff1d(np.arange(s["arrived"]), self._core.batch.queue[e, : s["queued"]])
        return Schedule(schedule.jobs[started], schedule.cluster, schedule.start_time[started], schedule.node[started])

    def _text(self, e: int) -> str:
        batch, cluster = self._core.batch, self.workload.cluster
        s, jobs = batch.s[e], self._core.jobs
        lines = [f"t = {s['now']:,.0f} s   {s['running']} running   {s['queued']} queued   {s['decisions']} decisions"]
        for m, (free, capacity) in enumerate(zip(batch.free[e], cluster.capacity, strict=True)):
            used = [
                f"{name} {'#' * round(20 * share):.<20} {share:4.0%}"
                for name, share in zip(cluster.resources, 1 - free / np.maximum(capacity, 1e-9), strict=True)
            ]
            reserved = ""
            if s["reserved_node"] == m and s["reserved"] >= 0:
                reserved = f"   reserved for job {s['reserved']} at {s['shadow']:,.0f} s"
            lines.append(f"node {m:3d} (x{cluster.speed[m]:.2f})  " + "   ".join(used) + reserved)
        for i in batch.queue[e, : min(10, s["queued"])]:
            j = s["first"] + i
            asks = ", ".join(f"{d:g} {name}" for d, name in zip(jobs.demand[j], cluster.resources, strict=True))
            wait = s["now"] - jobs.submit_time[j]
            lines.append(f"job {i:5d}  waits {wait:9,.0f} s  asks {asks} for {jobs.requested_time[j]:,.0f} s")
        return "\n".join(lines)

    def _image(self, e: int) -> np.ndarray:
        s = self._core.batch.s[e]
        queue = self._core.jobs[s["first"] + self._core.batch.queue[e, : s["queued"]].astype(int)]
        return gantt(self._started(e), s["now"], queue)


def _check_numbers(**numbers: tuple[int, int]) -> None:
    """Of each argument: its value, and the least that makes sense."""
    for name, (value, least) in numbers.items():
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def _check_choices(**choices: tuple[str, Iterable[str]]) -> None:
    """Of each argument: its value, and those that are known."""
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} is {value!r}; use one of {', '.join(known)}")


def _places(workload: Workload, length: int) -> np.ndarray:
    """int64[S]: at how many jobs of the segments an episode may begin, up to and with each."""
    spare = workload.segments[:, 1] - workload.segments[:, 0] - length + 1
    if spare.max() < 1:
        raise ValueError(
            f"{workload.name}: an episode needs {length} jobs in a row (warm-up, own and follow-up), "
            f"and this split has {spare.max() - 1 + length}; lower num_jobs, warmup_jobs or followup_jobs"
        )
    return np.maximum(spare, 0).cumsum()


class SchedulerEnv(gym.Env):
    """One cluster; arguments, observations and actions as in `SchedulerVectorEnv`. Every `reset` draws a new episode:
    with `episodes_in_a_row` nothing is different here."""

    metadata: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012

    def __init__(self, workload: str | Workload = "cloud", **kwargs: Any) -> None:
        self.envs = SchedulerVectorEnv(1, workload, **kwargs)
        self.render_mode = self.envs.render_mode
        self.observation_space, self.action_space = self.envs.single_observation_space, self.envs.single_action_space
        self.layout, self.split = self.envs.layout, self.envs.split

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.envs.reset(seed=seed, options=options)
        return self.envs._obs[0].copy(), self._info(self.envs._infos())

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        envs = self.envs
        envs._step(np.array([action]))
        terminated, truncated = bool(envs._terminated[0]), bool(envs._truncated[0])
        if terminated or truncated:  # nothing more is to be planned
            info = {"action_mask": self.action_masks().view(np.int8)} | envs._final_info(0)
        else:
            info = self._info(envs._infos())
        return envs._obs[0].copy(), float(envs._rewards[0]), terminated, truncated, info

    def _info(self, infos: dict[str, Any]) -> dict[str, Any]:
        return {name: values[0].copy() for name, values in infos.items()}

    def action_masks(self) -> np.ndarray:
        """bool[K*M + 1]: the legal actions."""
        return self.envs._mask[0].copy()

    def render(self) -> Any:
        frames = self.envs.render()
        return frames[0] if frames else None


if "ResourceRL/Scheduler-v0" not in gym.registry:
    gym.register(
        "ResourceRL/Scheduler-v0",
        entry_point="scheduler_env:SchedulerEnv",
        vector_entry_point="scheduler_env:SchedulerVectorEnv",
    )
