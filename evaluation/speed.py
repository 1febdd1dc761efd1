"""Measures how fast everything is on this machine: `python benchmark.py speed`.

    python benchmark.py speed --output speed.json                # ten minutes on two cores; draws speed.png as well
    python benchmark.py speed --num-envs 4096 --cuda             # the learners on a GPU

Every figure is the median of `--repetitions` counts after a burn-in (a learner's: of one whole run), so that ratios
mean something also on a noisy machine. docs/benchmark.md says what each key of the JSON is.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

import dqn_scheduler
import ppo_scheduler
from policies import load_policy
from scheduler_env import SchedulerVectorEnv
from simulator.replay import simulate
from training.run import Run
from workloads.generated import generate_jobs
from workloads.jobs import Cluster, Workload, scale_load
from workloads.load import load_workload
from workloads.reading import Reading

ID = "ResourceRL/Scheduler-v0"
RULES = ("easy-fifo", "easy-sjf", "easy-wfp3+sjf")
ENVIRONMENTS, BATCHES = (1, 16, 256, 4096), (1, 64, 4096)
WINDOWS, NODES, JOBS = (16, 64, 256, 1024), (1, 4, 16, 64, 256), (256, 1024, 4096, 16_384, 65_536)
EPISODE: dict[str, Any] = {"warmup_jobs": 256, "num_jobs": 512, "followup_jobs": 256}
FEW = 10_000  # jobs: of what is copied for every environment by those that hold single ones


def measure(args: Speed) -> tuple[dict[str, Any], Table]:
    """All figures, and a table of them. Compiling and loading are not counted."""
    if args.repetitions < 1:
        raise ValueError(f"--repetitions {args.repetitions}: give at least 1")
    if not args.seconds > 0:
        raise ValueError(f"--seconds {args.seconds}: give more than 0")
    if args.cuda and not torch.cuda.is_available():
        raise ValueError("--cuda: PyTorch finds no GPU here; leave it out")
    workload = load_workload(args.workload, "all", args)
    workload.report()
    few = first_jobs(workload, FEW)
    flags = {name: value for name, value in asdict(args).items() if name != "output"}
    results: dict[str, Any] = {"flags": flags, "machine": machine()}
    with Console(stderr=True).status("") as status:
        for title, part in {
            "memory": lambda: memory(workload),  # first, while nothing that was freed can be used again
            "the simulator": lambda: simulator(args, workload),
            "the vector environment": lambda: environments(args, workload, few),
            "PPO": lambda: ppo(args),
            "DQN": lambda: dqn(args),
            "Stable-Baselines3": lambda: stable_baselines3(args, few),
            "what grows with what": lambda: growth(args),
        }.items():
            status.update(f"Measuring {title}")
            results |= part()
    results |= ratios(results)
    if args.output:
        draw(results, args.output)
    return results, table_of(results)


def median(args: Speed, measure: Callable[[], float]) -> float:
    measure()  # burn in: compiles, fills caches
    return float(np.median([measure() for _ in range(args.repetitions)]))


def per_second(args: Speed, call: Callable[[], object], count: int = 1) -> float:
    """How often a second `call` does what it does `count` times."""

    def measure() -> float:
        calls, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < args.seconds or calls == 0:
            call()
            calls += 1
        return calls * count / spent

    return median(args, measure)


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numba", "numpy", "gymnasium")}
    return {
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    } | versions


def first_jobs(workload: Workload, most: int) -> Workload:
    """The first jobs of the first segment."""
    first, last = workload.segments[0]
    last = min(last, first + most)
    return replace(workload, jobs=workload.jobs[first:last], segments=np.array([[0, last - first]]))


def simulator(args: Speed, workload: Workload) -> dict[str, Any]:
    """Replays of the whole workload, everything that `simulate` does included."""

    def decisions(rule: str) -> int:
        return sum(schedule.decisions for schedule in simulate(workload, rule))

    rules = {rule: per_second(args, partial(decisions, rule), decisions(rule)) for rule in RULES}
    slowest = min(rules, key=lambda rule: rules[rule])
    with ThreadPoolExecutor(2) as pool:  # the kernels release the GIL: two replays side by side
        both = per_second(args, lambda: list(pool.map(decisions, (slowest, slowest))), 2 * decisions(slowest))
    return {
        "simulator_decisions_per_second": rules[slowest],
        "simulator_decisions_per_second_by_rule": rules,
        "simulator_decisions_per_second_2_threads": both,
    }


def steps_per_second(args: Speed, envs: gym.vector.VectorEnv, layout: Any) -> float:
    """Steps of all environments together under random legal actions; drawing them is not counted."""
    rng = np.random.default_rng(0)
    obs, _ = envs.reset(seed=0)

    def measure() -> float:
        nonlocal obs
        steps, spent = 0, 0.0
        while spent < args.seconds:
            mask = layout.split(obs).mask
            actions = (mask * rng.random(mask.shape)).argmax(1)
            begin = time.perf_counter()
            obs = envs.step(actions)[0]
            spent += time.perf_counter() - begin
            steps += envs.num_envs
        return steps / spent

    rate = median(args, measure)
    envs.close()
    return rate


def environments(args: Speed, workload: Workload, few: Workload) -> dict[str, Any]:
    def native(count: int, reward: str, workload: Workload = workload) -> float:
        envs = SchedulerVectorEnv(count, workload, reward=reward, **EPISODE)
        return steps_per_second(args, envs, envs.layout)

    counts = {str(count): native(count, "cost") for count in ENVIRONMENTS}
    sync: Any = gym.make_vec(ID, num_envs=16, vectorization_mode="sync", workload=few, reward="cost", **EPISODE)
    return {
        "vector_env_steps_per_second": counts[str(ENVIRONMENTS[-2])],
        "vector_env_steps_per_second_by_environments": counts,
        "vector_env_steps_per_second_improvement": native(ENVIRONMENTS[-2], "improvement"),
        "gymnasium_sync_steps_per_second": steps_per_second(args, sync, sync.envs[0].unwrapped.layout),
        "vector_env_steps_per_second_beside_sync": native(16, "cost", few),
    }


def memory(workload: Workload) -> dict[str, Any]:
    """MB of resident memory that environments of 1,024 jobs take, in use; those of the compiled code are not theirs."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def use(count: int) -> SchedulerVectorEnv:
        envs = SchedulerVectorEnv(count, workload, **EPISODE)
        obs, _ = envs.reset(seed=0)
        for _ in range(20):
            envs.step(envs.split(obs).mask.argmax(1))
        return envs

    use(1).close()
    found = {}
    for count in ENVIRONMENTS[-2:]:
        before = resident()
        envs = use(count)
        found[str(count)] = resident() - before
        del envs
    return {"memory_256_environments_mb": found[str(ENVIRONMENTS[-2])], "memory_mb_by_environments": found}


@contextmanager
def timed(owner: Any, attribute: str, seconds: list[float]) -> Iterator[None]:
    """Append how long each call of owner.attribute takes."""
    original = getattr(owner, attribute)

    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = original(*args, **kwargs)
        seconds.append(time.perf_counter() - begin)
        return result

    with patch.object(owner, attribute, call):
        yield


PARTS = ("simulator", "policy", "update", "validation")


def learner(args: Speed, script: ModuleType, last: Callable[[Run], None]) -> dict[str, Any]:
    """Run a script as its command does, with fewer decisions (and evaluations) if `args.seconds` is less than one.

    Returns the decisions_per_second of its training loop, validation included, the shares[part] of its time, and the
    update_seconds of one call of `update`.

    Args:
        last: called with the run after all its iterations.
    """
    usual = script.Args()
    flags = script.Args(
        workload=os.path.abspath(args.workload) if os.path.exists(args.workload) else args.workload, cuda=args.cuda,
        **{field.name: getattr(args, field.name) for field in fields(Reading)},
        num_envs=args.num_envs, num_steps=args.num_steps, tune_generations=1,
        total_timesteps=round(usual.total_timesteps * min(1.0, args.seconds)),
        num_evaluations=max(1, round(usual.num_evaluations * min(1.0, args.seconds))),
    )  # fmt: skip
    found: dict[str, Any] = {}
    iterations = Run.iterations

    def measured(run: Run) -> Iterator[int]:
        steps: list[float] = []
        updates: list[float] = []
        validations: list[float] = []
        with (
            timed(run.envs, "step", steps),
            timed(script, "update", updates),
            timed(run, "propose", validations),
            timed(run, "judge_proposed", validations),
            timed(run, "checkpoint", validations),
        ):
            begin = time.perf_counter()
            yield from iterations(run)
            whole = time.perf_counter() - begin
        rest = whole - sum(steps + updates + validations)  # the forward passes of the rollout, mostly
        parts = dict(zip(PARTS, (sum(steps), rest, sum(updates), sum(validations)), strict=True))
        found["decisions_per_second"] = len(steps) * args.num_envs / whole
        found["shares"] = {part: seconds / whole for part, seconds in parts.items()}
        found["update_seconds"] = float(np.median(updates))
        last(run)

    quiet = StringIO()
    hidden = redirect_stdout(quiet), redirect_stderr(quiet)
    with TemporaryDirectory() as folder, chdir(folder), hidden[0], hidden[1], patch.object(Run, "iterations", measured):
        script.main(flags)
    return found


def ppo(args: Speed) -> dict[str, Any]:
    """PPO's training; its update beside the time that its matrix products need; and calls of the exported policy."""
    results: dict[str, Any] = {}
    flops: list[int] = []
    update = ppo_scheduler.update

    def counted(*others: Any) -> Any:
        if flops:
            return update(*others)
        # In the burn-in; on this thread, which is the only one that is counted.
        with (
            patch.object(ppo_scheduler, "THREADS", SimpleNamespace(map=map)),
            FlopCounterMode(display=False) as counter,
        ):
            result = update(*others)
        flops.append(counter.get_total_flops())
        return result

    def last(run: Run) -> None:
        a = torch.rand(1024, 1024, device=run.device)
        rate = per_second(args, lambda: (a @ a)[0, 0].item(), 2 * 1024**3)
        results.update(matmul_gflops=rate / 1e9, ppo_update_gflop=flops[0] / 1e9)
        run.export(run.exported, "last.onnx", None)
        policy = load_policy(str(run.folder / "last.onnx"))
        observations = np.resize(run.envs.observations, (max(BATCHES), run.layout.size))
        calls = {str(size): per_second(args, partial(policy.predict, observations[:size])) for size in BATCHES}
        results.update(policy_calls_per_second=calls)

    with patch.object(ppo_scheduler, "update", counted):
        found = learner(args, ppo_scheduler, last)
    ideal = results["ppo_update_gflop"] / results["matmul_gflops"]
    return {
        "ppo_decisions_per_second": found["decisions_per_second"], "ppo_time_shares": found["shares"],
        "ppo_update_seconds": found["update_seconds"], "ppo_update_over_matmul": found["update_seconds"] / ideal,
        **results,
    }  # fmt: skip


def dqn(args: Speed) -> dict[str, Any]:
    found = learner(args, dqn_scheduler, lambda _: None)
    return {"dqn_decisions_per_second": found["decisions_per_second"], "dqn_time_shares": found["shares"]}


def stable_baselines3(args: Speed, few: Workload) -> dict[str, Any]:
    """PPO and MaskablePPO on as many single environments as our PPO has, with its batches; null where not installed."""
    results: dict[str, Any] = {"sb3_ppo_decisions_per_second": None, "sb3_maskable_ppo_decisions_per_second": None}
    try:
        from sb3_contrib import MaskablePPO
        from stable_baselines3 import PPO
        from stable_baselines3.common.env_util import make_vec_env
    except ImportError as error:
        print(f"{error.name} is not installed (requirements-dev.txt), so it is not measured", file=sys.stderr)
        return results
    usual = ppo_scheduler.Args()
    episode = {name: getattr(usual, name) for name in ("num_jobs", "warmup_jobs", "followup_jobs", "queue_window")}
    batch = args.num_envs * args.num_steps
    for key, algorithm in zip(results, (PPO, MaskablePPO), strict=True):
        envs = make_vec_env(ID, args.num_envs, seed=1, env_kwargs={"workload": few, **episode})
        model = algorithm(
            "MlpPolicy", envs, n_steps=args.num_steps, batch_size=batch // usual.num_minibatches,
            n_epochs=usual.update_epochs, gamma=usual.gamma, device="cuda" if args.cuda else "cpu",
        )  # fmt: skip
        seconds: list[float] = []
        with timed(model, "learn", seconds):
            for _ in range(args.repetitions):  # without burn-in: nothing is left to be compiled
                model.learn(batch, reset_num_timesteps=False)
        results[key] = batch / float(np.median(seconds))
        envs.close()
    return results


def growth(args: Speed) -> dict[str, Any]:
    """Microseconds a decision on one thread, with 16 environments and random actions, by reward: what has to be rolled
    out (improvement), or not (cost)."""

    def microseconds(workload: Workload, **flags: int) -> dict[str, float]:
        found = {}
        for reward in ("cost", "improvement"):
            envs = SchedulerVectorEnv(16, workload, num_threads=1, reward=reward, **(EPISODE | flags))
            found[reward] = 1e6 / steps_per_second(args, envs, envs.layout)
        return found

    def cluster(nodes: int) -> Workload:
        machine = Cluster(np.full((nodes, 1), 32.0), np.ones(nodes), ("cpu",))
        jobs = generate_jobs(np.random.default_rng(0), 5_000, machine, flavours=[[1], [2], [4], [8], [16]])
        return Workload(f"{nodes} nodes", machine, jobs, np.array([[0, 5_000]]), {})

    usual = load_workload("hpc", "train", runs=1, run_jobs=JOBS[-1] + 10_000)
    busy = replace(usual, jobs=scale_load(usual.jobs, 1.5))  # so that there are as many jobs as the window shows
    figures = {
        "queue_window": {window: microseconds(busy, queue_window=window, warmup_jobs=4096) for window in WINDOWS},
        "nodes": {nodes: microseconds(cluster(nodes)) for nodes in NODES},
        "jobs": {jobs: microseconds(usual, num_jobs=jobs) for jobs in JOBS},
    }
    return {
        f"microseconds_per_decision_by_{what}": {
            reward: {str(x): found[reward] for x, found in figure.items()} for reward in ("cost", "improvement")
        }
        for what, figure in figures.items()
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """The growth of the cost, as PNG and SVG."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.5), sharey=True, layout="constrained")
    labels = {"queue_window": "jobs in the queue window", "nodes": "nodes", "jobs": "jobs in an episode"}
    for panel, (what, label) in zip(panels, labels.items(), strict=True):
        for reward, found in results[f"microseconds_per_decision_by_{what}"].items():
            panel.loglog([int(x) for x in found], list(found.values()), "o-", label=f"reward {reward}")
        panel.set_xticks([int(x) for x in found], list(found))
        panel.minorticks_off()
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("microseconds a decision")
    panels[0].legend()
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=120)
    plt.close(figure)


RATIOS = {  # key: of what, to what
    "simulator_2_threads_over_1": ("simulator_decisions_per_second_2_threads", "simulator_decisions_per_second"),
    "vector_env_over_gymnasium_sync": ("vector_env_steps_per_second_beside_sync", "gymnasium_sync_steps_per_second"),
    "ppo_over_sb3": ("ppo_decisions_per_second", "sb3_ppo_decisions_per_second"),
    "ppo_over_sb3_maskable": ("ppo_decisions_per_second", "sb3_maskable_ppo_decisions_per_second"),
    "dqn_over_sb3": ("dqn_decisions_per_second", "sb3_ppo_decisions_per_second"),
}


def ratios(results: dict[str, Any]) -> dict[str, float | None]:
    found = {key: (results[a], results[b]) for key, (a, b) in RATIOS.items()}
    return {key: None if None in pair else pair[0] / pair[1] for key, pair in found.items()}


def table_of(results: dict[str, Any]) -> Table:
    """A row a key, in the JSON's order; those that hold several figures, one each."""
    flags, machine = results["flags"], results["machine"]
    table = Table(
        title=f"Speed on {flags['workload']}; medians of {flags['repetitions']}",
        caption=f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, numba {machine['numba']}",
    )
    table.add_column("key")
    table.add_column("figure", justify="right")
    for name, figure in flat(results):
        text = "-" if figure is None else f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"
        table.add_row(name, text)
    return table


def flat(results: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    """The figures, with the path to each."""
    for key, value in results.items():
        if key in ("flags", "machine"):
            continue
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key} ")
        else:
            yield prefix + key, value


@dataclass
class Speed(Reading):
    """Measure how fast the simulator, the environments and the learners are on this machine."""

    workload: str = "hpc"
    """a preset or the path of an SWF trace"""
    repetitions: int = 5
    """the median of so many counts"""
    seconds: float = 1.0
    """how long a count goes on at least; a learner's is one whole run, or, below 1, that part of one"""
    num_envs: int = 512
    """environments of the learners, Stable-Baselines3's too"""
    num_steps: int = 32
    """decisions in each of them before an update of PPO, Stable-Baselines3's too"""
    cuda: bool = False
    """the learners' networks on a GPU"""
    output: Path | None = None
    """where to write the figures as JSON; the plots go beside it"""
