"""Compares policies on held-out jobs; replays RLScheduler's published protocol; measures the speed; searches flags.

    python benchmark.py compare --workload hpc --policies fifo easy-fifo easy-sjf runs/X/policy.onnx
    python benchmark.py compare --workload my_cluster.swf.gz --policies easy-fifo all --load 1.1 --output results.json
    python benchmark.py compare --workload my_cluster.swf.gz --policies easy-fifo easy-sjf runs/X --report report
    python benchmark.py rlscheduler --traces traces --reference rlscheduler.json
    python benchmark.py speed --output speed.json
    python benchmark.py sweep sweeps/ppo.yaml --trials 20

All policies get the same jobs and are compared in the same blocks of consecutive jobs, so that what is hard about a
block cancels in the differences. Times are seconds; N counts jobs, B blocks.
"""

import csv
import hashlib
import math
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lower_bound import lower_bound
from policies import OnnxPolicy, Policy, PolicyError, load_policy
from scheduler_env import (
    JOB_FEATURES,
    METRIC,
    RULES,
    Schedule,
    job_size,
)
from workloads import (
    Jobs,
    Workload,
    check_output,
    load_workload,
    offered_load,
    replacing,
    scale_load,
    write_json,
)

T = TypeVar("T")
METRICS = ("latency", "wait", "bounded_slowdown", "utilization", "makespan")
RESAMPLES = 10_000
WARMUP = 0.05  # the share of a continuous replay that is not counted: its machine starts empty


@dataclass
class Compare:
    """Compare policies on jobs that no training has seen."""

    workload: str = "cloud"
    """a preset (cloud, hpc, manufacturing, datacenter, tasks) or the path of an SWF trace, plain or gzipped"""
    policies: tuple[str, ...] = ("fifo", "easy-fifo", "easy-sjf")
    """rules, run folders and paths of policy.onnx, each with its own patience if @HOURS is behind it; `all` is every
    rule; the first is what the others differ from"""
    protocol: Literal["continuous", "windows"] = "continuous"
    """replay the split as one run, or windows of it from an empty machine, as the literature does"""
    split: Literal["test", "validation"] = "test"
    """which part of the trace, or which runs of the preset"""
    load: float = 1.0
    """how many times as fast the jobs arrive"""
    max_jobs: int | None = None
    """replay only so many jobs of the split"""
    runs: int | None = None
    """the number of runs of a preset (test split: 20 of 5,000 jobs)"""
    blocks: int = 50
    """into how many blocks a continuous replay is cut for the intervals"""
    episodes: int = 100
    """the number of windows, each a block; as many as there are side by side, if that is fewer"""
    episode_jobs: int = 256
    """the jobs of a window"""
    seed: int = 1
    """draws the windows and the bootstrap's blocks"""
    output: Path | None = None
    """where to write the results as JSON"""
    report: Path | None = None
    """the folder for a report: index.html, report.md, results.json, episodes.csv, plots; replays are kept there too, so
    that an interrupted comparison goes on where it stopped"""
    objective: Literal["latency", "wait", "slowdown"] = "latency"
    """what the report is about: it picks the best rule, and the lower bound is on it"""
    loads: tuple[float, ...] = (0.8, 0.9, 1.0, 1.1)
    """the report's sweep: arrivals compressed by these factors"""
    workers: int = 1
    """replay in so many processes"""


@dataclass
class RLScheduler:
    """Replay the protocol of RLScheduler (Zhang et al., SC'20) beside what it publishes."""

    traces: Path
    """the folder with the traces"""
    reference: Path
    """rlscheduler.json: the published figures, and which jobs they are of"""
    policies: tuple[str, ...] = ()
    """trained policies (policy.onnx or a run's folder) to replay as well: one that was trained with --lock-in beside
    the published RL, without backfilling and with it; another, or a rule, beside the best rule without lock-in"""
    output: Path | None = None
    """where to write the rows as JSON"""


@dataclass
class Speed:
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


@dataclass
class Sweep:
    """Search hyper-parameters on this machine, as a W&B sweep's file describes it."""

    file: tyro.conf.Positional[Path]
    """the description: sweeps/ppo.yaml, sweeps/dqn.yaml or one of your own"""
    trials: int = 20
    """how many trials the study has in the end, those of earlier calls included"""
    workers: int = 1
    """how many run at a time"""
    journal: Path | None = None
    """the study; a further call with the same one goes on (default: runs/sweep-NAME.journal)"""
    seed: int = 1
    """of the sampler"""
    output: Path | None = None
    """where to write the trials as JSON"""


# ------------------------------------------------------------------------------------------------------ the jobs
def held_out(args: Compare) -> Workload:
    """The jobs that all policies get: segments to replay, each from an empty machine.

    Raises:
        ValueError: a flag makes no sense, or (WorkloadError) the workload cannot be used.
    """
    least = dict.fromkeys(("max_jobs", "runs", "blocks", "episodes", "episode_jobs", "workers"), 1) | {"seed": 0}
    for name, lowest in least.items():
        if (value := getattr(args, name)) is not None and value < lowest:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least {lowest}")
    workload = load_workload(args.workload, args.split, runs=args.runs)
    if args.max_jobs:
        workload = replace(workload, segments=shorter(workload.segments, args.max_jobs))
    submit_time = workload.jobs.submit_time.copy()
    for first, last in workload.segments:
        submit_time[first:last] = scale_load(workload.jobs[first:last], args.load).submit_time
    workload = replace(workload, jobs=replace(workload.jobs, submit_time=submit_time))
    if args.protocol == "windows":
        segments = windows(workload.segments, args.episodes, args.episode_jobs, np.random.default_rng(args.seed))
        workload = replace(workload, segments=segments)
    return workload


def shorter(segments: np.ndarray, max_jobs: int) -> np.ndarray:
    """int[S', 2]: the first jobs of the first segments, as few and as equally long as `max_jobs` in all allow."""
    lengths = segments[:, 1] - segments[:, 0]
    count = min(math.ceil(max_jobs / lengths.max()), len(segments))
    return np.stack([segments[:count, 0], segments[:count, 0] + np.minimum(lengths[:count], max_jobs // count)], axis=1)


def windows(segments: np.ndarray, episodes: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """int[E, 2]: windows of `length` jobs in random order, `episodes` or as many as fit side by side: jobs that were in
    several would make intervals narrower without telling more."""
    fitting = [(first, *divmod(last - first, length)) for first, last in segments]
    starts = [first + rng.integers(spare + 1) + length * np.arange(count) for first, count, spare in fitting]
    places = np.concatenate(starts).astype(int)
    if len(places) == 0:
        longest = (segments[:, 1] - segments[:, 0]).max()
        raise ValueError(f"--episode-jobs {length}: the split has only {longest} jobs in a row; give fewer")
    first = rng.permutation(places)[:episodes]
    return np.stack([first, first + length], axis=1)


# ------------------------------------------------------------------------------------------------ the statistics
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


def compare(args: Compare) -> tuple[dict[str, Any], Table]:
    """Replay the same jobs under every policy. Returns what results.json holds, and its table."""
    headline = Scenario(args.protocol, args.load)
    workloads = {headline: held_out(args)}
    policies, left_out = named_policies(args.policies)  # all of them are read before the first one runs
    if args.report:
        check_folder(args.report)
        workloads |= other_scenarios(args, headline)
        policies |= {rule: load_policy(rule) for rule in BASELINES if rule not in policies}
    workloads[headline].report()
    replays = {scenario: Replays(workload, cuts(args, scenario, workload)) for scenario, workload in workloads.items()}
    for scenario, name, found in replay_all(workloads, policies, args.report and args.report / "replays", args.workers):
        if isinstance(found, str):
            left_out.append(found)
            policies.pop(name, None)
        elif name in policies:
            replays[scenario].add(name, *found)
    if not policies or set(policies) <= set(BASELINES) - set(args.policies):
        raise ValueError(left_out[0])
    for found in replays.values():
        found.keep(policies)
    counted = replays[headline]
    results = {
        "workload": args.workload, "protocol": args.protocol, "split": args.split, "load": args.load,
        "jobs": int((counted.workload.segments[:, 1] - counted.workload.segments[:, 0]).sum()),
        "counted_jobs": counted.counted_jobs,
        **statistics(counted.per_block, args.seed), "tails": {name: tail(counted.waits(name)) for name in policies},
        "left_out": list(dict.fromkeys(left_out)),
    }  # fmt: skip
    if args.report:
        write_report(args, results, replays, policies)
    return results, comparison_table(results)


def named_policies(names: Sequence[str]) -> tuple[dict[str, Policy], list[str]]:
    """The policies under the names that results use, and what is wrong with those that are there but cannot be used;
    an argument given twice counts once.

    Raises:
        ValueError: no policy can be used, or a name is of no rule, file or folder.
    """
    arguments = dict.fromkeys(rule for name in names for rule in (RULES if name == "all" else [name]))
    if not arguments:
        raise ValueError("--policies: none given; name some, such as: fifo easy-fifo")
    policies, left_out = {}, []
    for argument in arguments:
        try:
            policies[argument] = load_policy(argument)
        except PolicyError as error:
            if not Path(argument).exists() or len(arguments) == 1:  # a slip of the pen stops before anything is run
                raise
            left_out.append(str(error))
    own = [policy.name for policy in policies.values()]
    return {p.name if own.count(p.name) == 1 else argument: p for argument, p in policies.items()}, left_out


# ------------------------------------------------------------------------------------------------------- the replays
class Scenario(NamedTuple):
    """How the jobs are replayed."""

    protocol: str
    load: float


@dataclass
class Replays:
    """The same jobs under several policies; only some blocks of each segment's jobs are counted."""

    workload: Workload
    cuts: list[list[slice]]
    schedules: dict[str, list[Schedule]] = field(default_factory=dict)
    per_block: dict[str, np.ndarray] = field(default_factory=dict)  # float64[B, len(METRICS)]

    def add(self, name: str, start_time: np.ndarray, node: np.ndarray) -> None:
        """A policy's float64[N] and int[N] for the jobs of all segments, one after the other."""
        schedules, jobs, done = [], self.workload.jobs, 0
        for first, last in self.workload.segments:
            own = slice(done, done := done + last - first)
            schedules.append(Schedule(jobs[first:last], self.workload.cluster, start_time[own], node[own]))
        self.schedules[name] = schedules
        self.per_block[name] = np.array([block_metrics(*pair) for pair in self.blocks(name)])

    def keep(self, names: Iterable[str]) -> None:
        """These policies, in this order."""
        self.schedules = {name: self.schedules[name] for name in names}
        self.per_block = {name: self.per_block[name] for name in names}

    def blocks(self, name: str) -> list[tuple[Schedule, slice]]:
        return [
            (schedule, block) for schedule, own in zip(self.schedules[name], self.cuts, strict=True) for block in own
        ]

    def waits(self, name: str) -> np.ndarray:
        """float64[counted jobs], block after block."""
        return np.concatenate([schedule.wait[block] for schedule, block in self.blocks(name)])

    @property
    def counted_jobs(self) -> int:
        return int(sum(block.stop - block.start for own in self.cuts for block in own))


def cuts(args: Compare, scenario: Scenario, workload: Workload) -> list[list[slice]]:
    """A window is a block; a continuous replay is cut into some, none of which straddles two runs."""
    windows = scenario.protocol == "windows"
    blocks, warmup = (1, 0.0) if windows else (max(1, args.blocks // len(workload.segments)), WARMUP)
    return [cut(last - first, blocks, warmup) for first, last in workload.segments]


def check_folder(folder: Path) -> None:
    """Make it, if need be, and see that it can be written to, before anything is run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--report {folder}: {error.strerror}; give a folder that can be written to") from None


def other_scenarios(args: Compare, headline: Scenario) -> dict[Scenario, Workload]:
    """What a report replays beside the headline: both protocols and the sweep over loads."""
    scenarios = dict.fromkeys(Scenario("continuous", load) for load in sorted({args.load, *args.loads}))
    try:
        held_out(replace(args, protocol="windows"))
        scenarios[Scenario("windows", args.load)] = None
    except ValueError:  # too few jobs for a window: the report says so
        pass
    return {s: held_out(replace(args, protocol=s.protocol, load=s.load)) for s in scenarios if s != headline}


def replay_all(
    workloads: dict[Scenario, Workload], policies: dict[str, Policy], folder: Path | None, workers: int
) -> Iterator[tuple[Scenario, str, tuple[np.ndarray, np.ndarray] | str]]:
    """What `replay` returns for every policy in every scenario, as it comes in, with a progress bar."""
    if folder:
        folder.mkdir(exist_ok=True)
    tasks = [(scenario, name) for scenario in workloads for name in policies]
    code = [Path(__file__).with_name(f"{module}.py").read_bytes() for module in ("scheduler_env", "policies")]
    jobs = {scenario: workload_digest(workload) for scenario, workload in workloads.items()}
    files = [
        folder and folder / f"{digest(*code, jobs[scenario].encode(), policies[name].identity)[:24]}.npz"
        for scenario, name in tasks
    ]
    with ExitStack() as stack:
        run: Callable[..., Iterable[Any]] = map
        if workers > 1:
            # Spawned: neither onnxruntime nor Numba survives a fork. Ctrl-C is the parent's: what runs is kept.
            ignore = (signal.SIGINT, signal.SIG_IGN)
            pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=signal.signal, initargs=ignore)
            stack.callback(pool.shutdown, cancel_futures=True)
            run = pool.map
        found = run(replay, [policies[name] for _, name in tasks], [workloads[where] for where, _ in tasks], files)
        for (scenario, name), result in replaying(zip(tasks, found, strict=True), len(tasks)):
            yield scenario, name, result


def replay(policy: Policy, workload: Workload, file: Path | None) -> tuple[np.ndarray, np.ndarray] | str:
    """Start times and nodes of the jobs of all segments, from the file or else into it; or what is wrong."""
    if file and file.exists():
        try:
            with np.load(file) as found:
                return found["start_time"], found["node"]
        except Exception:  # whatever the damage leads to: replay again
            pass
    try:
        schedules = policy.schedule(workload)
    except PolicyError as error:
        return str(error)
    start_time = np.concatenate([schedule.start_time for schedule in schedules])
    node = np.concatenate([schedule.node for schedule in schedules])
    if file:
        with replacing(file) as temporary, open(temporary, "wb") as stream:
            np.savez_compressed(stream, start_time=start_time, node=node)
    return start_time, node


def digest(*parts: bytes) -> str:
    """SHA-256 of the parts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def workload_digest(workload: Workload) -> str:
    arrays = [getattr(workload.jobs, column.name) for column in fields(workload.jobs)]
    arrays += [workload.segments, workload.cluster.capacity, workload.cluster.speed]
    return digest(*(np.ascontiguousarray(array).tobytes() for array in arrays))


# ----------------------------------------------------------------------------------------------------- the statistics
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


def comparison_table(results: dict[str, Any]) -> Table:
    """A row a policy: each mean with its interval, and the difference to the first policy with its own."""
    workload, split, protocol = (results[key] for key in ("workload", "split", "protocol"))
    first = next(iter(results["policies"]))
    blocks = len(results["policies"][first]["wait"]["per_block"])
    caption = f"95 % bootstrap intervals over {blocks} blocks" if blocks > 1 else "One block, so no intervals"
    caption += "; every window starts on an empty machine" if protocol == "windows" else ""
    table = Table(title=f"{workload}, {split} split, {protocol}, {results['counted_jobs']:,} jobs", caption=caption)
    table.add_column("policy", overflow="fold", max_width=22)  # the longest rule's name; those of runs fold
    for heading in ("latency", "wait", "bounded\nslowdown", "utili-\nzation", "makespan", "wait p99\nand max"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, metrics in results["policies"].items():
        cells = []
        for metric, figure in metrics.items():
            form = {"bounded_slowdown": ",.2f", "utilization": ",.4f"}.get(metric, ",.0f")
            cells.append(with_interval(figure, form))
            if name != first:
                cells[-1] += "\n" + with_interval(results["differences"][name][metric], "+.1f", "%")
        table.add_row(name, *cells, "\n".join(f"{tail:,.0f}" for tail in results["tails"][name].values()))
        table.add_section()
    return table


def with_interval(figure: dict[str, Any], form: str, unit: str = "") -> str:
    """A mean and, below it, its interval, as text."""
    if figure["mean"] is None:
        return "-"
    low, high = figure["ci95"]
    return f"{figure['mean']:{form}}{unit}" + ("" if low is None else f"\n{low:{form}} … {high:{form}}")


# ------------------------------------------------------------------------------------- what the report says beside it
BASELINES = ("fifo", "easy-fifo")  # a report always has them
STARVING_P99, STARVING_MAX = 1.2, 2.0  # so many times EASY-FIFO's wait, and a policy is said to starve somebody
QUANTILE_RESAMPLES = 1_000


def write_report(
    args: Compare, results: dict[str, Any], replays: dict[Scenario, Replays], policies: dict[str, Policy]
) -> None:
    """Add to the results what only a report needs, and write the report's folder."""
    import report  # matplotlib and jinja2 take a second to import, which only a report is worth

    headline, metric = replays[Scenario(args.protocol, args.load)], METRIC[args.objective]
    rules = [name for name, policy in policies.items() if not isinstance(policy, OnnxPolicy)]
    best_rule = min(rules, key=lambda rule: results["policies"][rule][metric]["mean"])
    results |= {
        "objective": args.objective, "best_rule": best_rule,
        "trained": {n: trained(p) for n, p in policies.items() if isinstance(p, OnnxPolicy)},
        "quantiles": {name: quantiles(headline, name, args.seed) for name in policies},
        "against": {rule: against(headline.per_block, rule, args.seed) for rule in dict.fromkeys(("fifo", best_rule))},
        "bound": bound_figures(headline, args.objective, results),
        "fairness": {name: fairness(headline, name) for name in policies},
        "protocols": protocols(args, replays), "loads": by_load(args, replays),
        "seeds": training_seeds(headline, best_rule, metric, args.seed), "made": made(args, headline.workload),
    }  # fmt: skip
    shown = shown_policies(results, metric)
    results["plots"] = {
        "waits": wait_distribution(headline, shown), "time": over_time(headline, shown),
        "classes": by_size(headline, shown),
        "attention": {n: attention(p, headline.workload) for n, p in policies.items() if n in shown and looks(p)},
        "learning": {n: report.learning_curve(p.path.parent) for n, p in policies.items() if n in results["trained"]},
    }  # fmt: skip
    windows = replays.get(Scenario("windows", args.load))
    episode = None
    if windows:  # a busy one, where there is something to see
        order = np.argsort(windows.per_block["fifo"][:, METRICS.index("wait")], kind="stable")
        busy = order[int(0.9 * len(order))]
        drawn = list(dict.fromkeys(["fifo", *(name for name in shown if name in results["trained"]), best_rule]))[:3]
        episode = {name: windows.schedules[name][busy] for name in drawn}
    write_episodes(args.report / "episodes.csv", replays, args.objective)
    results["notes"] = [found["note"] for found in results["plots"]["learning"].values() if found["note"]]
    report.write(args.report, results, shown, episode)
    write_json(args.report / "results.json", results)


def trained(policy: OnnxPolicy) -> dict[str, Any]:
    names = ("algorithm", "workload", "objective", "reference", "rule", "steps", "seed")
    file = {"file": policy.argument, "sha256": hashlib.sha256(policy.data).hexdigest()}
    return {name: getattr(policy.metadata, name) for name in names} | file


def looks(policy: Policy) -> bool:
    """Whether there is a network to ask (some files stand for a rule)."""
    return isinstance(policy, OnnxPolicy) and policy.metadata.rule is None


def shown_policies(results: dict[str, Any], metric: str) -> list[str]:
    """Eight lines are as many as a plot can hold: the baselines, the trained ones and the best of the rest."""
    cost = {name: found[metric]["mean"] for name, found in results["policies"].items()}
    wanted = [*BASELINES, results["best_rule"], *results["trained"], *sorted(cost, key=cost.__getitem__)]
    shown = list(dict.fromkeys(wanted))[:8]
    return [name for name in cost if name in shown]


def quantiles(replays: Replays, name: str, seed: int) -> dict[str, dict[str, Any]]:
    """Of single jobs: medians, and the tail of the wait, with block-bootstrap intervals."""
    block = np.repeat(np.arange(len(blocks := replays.blocks(name))), [b.stop - b.start for _, b in blocks])
    weights = bootstrap_weights(len(blocks), seed)[:QUANTILE_RESAMPLES]
    found: dict[str, dict[str, Any]] = {}
    for metric, levels in (("latency", [0.5]), ("wait", [0.5, 0.95, 0.99]), ("bounded_slowdown", [0.5])):
        values = np.concatenate([getattr(schedule, metric)[b] for schedule, b in blocks])
        resamples = quantile_resamples(values, block, weights, levels)
        found[metric] = {
            f"p{level * 100:.0f}": {"value": value, "ci95": interval(resamples[:, q], len(blocks))}
            for q, (level, value) in enumerate(zip(levels, np.quantile(values, levels).tolist(), strict=True))
        }
    found["wait"]["max"] = {"value": float(replays.waits(name).max()), "ci95": [None, None]}
    return found


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


def improvement(values: np.ndarray, first: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """The probability that a block has a lower value than in `first`, float64[B] both; equal ones count one half
    (Agarwal et al. 2021, on paired blocks)."""
    return summary((values < first) + 0.5 * (values == first), weights)


def bound_figures(replays: Replays, objective: str, results: dict[str, Any]) -> dict[str, Any]:
    """The lower bound on the mean over all counted jobs, run by run, and the share of the way from FIFO to it that each
    policy goes."""
    total = jobs = 0.0
    for (first, last), own in zip(replays.workload.segments, replays.cuts, strict=True):
        counted = replays.workload.jobs[first:last][slice(own[0].start, own[-1].stop)]
        total += len(counted) * lower_bound(counted, replays.workload.cluster, objective)
        jobs += len(counted)
    bound, cost = total / jobs, {name: p[METRIC[objective]]["mean"] for name, p in results["policies"].items()}
    way = cost["fifo"] - bound
    return {"mean": bound, "closed": {n: (cost["fifo"] - c) / way if way > 0 else None for n, c in cost.items()}}


def fairness(replays: Replays, name: str) -> dict[str, Any]:
    """Who pays: the tail of the wait, the share of jobs that wait longer than under FIFO, and whether some starve."""
    wait, fifo, easy = (replays.waits(policy) for policy in (name, *BASELINES))
    found = {
        "wait_p99": float(np.percentile(wait, 99)), "wait_max": float(wait.max()),
        "longer_than_fifo": float((wait > fifo + 1e-6).mean()), "beyond_easy_fifo_max": int((wait > easy.max()).sum()),
    }  # fmt: skip
    p99 = float(np.percentile(easy, 99))
    starves = found["wait_p99"] > STARVING_P99 * p99 or found["wait_max"] > STARVING_MAX * easy.max()
    return found | {"starves": bool(starves and name not in BASELINES)}


def protocols(args: Compare, replays: dict[Scenario, Replays]) -> dict[str, Any]:
    """The cost under both protocols, and what changes sides against EASY-FIFO between them."""
    metric, found = METRIC[args.objective], {}
    for protocol in ("continuous", "windows"):
        if own := replays.get(Scenario(protocol, args.load)):
            column = {name: values[:, METRICS.index(metric)] for name, values in own.per_block.items()}
            weights = bootstrap_weights(len(column["fifo"]), args.seed)
            figures = {
                name: summary(values, weights)
                | {"to_easy_fifo": against_easy_fifo(values, column["easy-fifo"], weights)}
                for name, values in column.items()
            }
            best = min(figures, key=lambda name: figures[name]["mean"])
            found[protocol] = {
                "policies": figures,
                "best": best,
                "jobs": own.counted_jobs,
                "blocks": len(column["fifo"]),
            }
    if len(found) == 2:
        here, there = (found[protocol]["policies"] for protocol in ("continuous", "windows"))
        sides = {name: here[name]["to_easy_fifo"]["side"] * there[name]["to_easy_fifo"]["side"] for name in here}
        found["change_sides"] = [name for name, product in sides.items() if product < 0]
    return found


def against_easy_fifo(values: np.ndarray, easy_fifo: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """The difference in percent; side: -1 or 1 where its whole interval is below or above zero."""
    figure = difference(values, easy_fifo, weights)
    low, high = figure["ci95"]
    return figure | {"side": 0 if low is None else int(low > 0) - int(high < 0)}


def by_load(args: Compare, replays: dict[Scenario, Replays]) -> list[dict[str, Any]]:
    """Mean waits at each load, continuous operation."""
    found = []
    for scenario in sorted(s for s in replays if s.protocol == "continuous"):
        own = replays[scenario]
        jobs, cluster = own.workload.jobs, own.workload.cluster
        offered = np.mean([offered_load(jobs[first:last], cluster) for first, last in own.workload.segments])
        waits = {name: values[:, METRICS.index("wait")] for name, values in own.per_block.items()}
        weights = bootstrap_weights(len(waits["fifo"]), args.seed)
        policies = {
            name: {"wait": summary(wait, weights), "to_easy_fifo": against_easy_fifo(wait, waits["easy-fifo"], weights)}
            for name, wait in waits.items()
        }
        found.append({"factor": scenario.load, "offered_load": float(offered), "policies": policies})
    return found


def training_seeds(replays: Replays, best_rule: str, metric: str, seed: int) -> dict[str, Any]:
    """Runs that differ only in seed and time, taken together with rliable (Agarwal et al. 2021): the tasks are the
    blocks, a score is the best rule's cost over the policy's (above 1: better than the rule). Empty: there are none."""
    groups: dict[str, list[str]] = {}
    for name in replays.per_block:
        if run := re.fullmatch(r"(.+)__\d+__\d+/policy\.onnx(@.+)?", name):
            groups.setdefault(run[1] + (run[2] or ""), []).append(name)
    groups = {group: names for group, names in groups.items() if len(names) > 1}
    if not groups:
        return {}
    from rliable import library, metrics  # imports pandas and statsmodels

    column, one = METRICS.index(metric), 1.0 * (metric == "wait")  # a second more, where nobody may have waited
    cost = {name: values[:, column] + one for name, values in replays.per_block.items()}
    scores = {group: np.stack([cost[best_rule] / cost[name] for name in names]) for group, names in groups.items()}
    scores |= {rule: (cost[best_rule] / cost[rule])[None] for rule in BASELINES if rule != best_rule}
    np.random.seed(seed)  # noqa: NPY002 (what rliable draws from)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # arch announces its next version
        iqm, ci95 = library.get_interval_estimates(scores, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=2_000)
        levels = np.linspace(0, 2, 81)
        profile, band = library.create_performance_profile(scores, levels, reps=1_000)
    figures = {
        group: {
            "runs": groups.get(group, [group]), "iqm": float(iqm[group][0]), "ci95": ci95[group][:, 0].tolist(),
            "improvement": float(metrics.probability_of_improvement(own, np.ones((1, own.shape[1])))),
            "means": [float(cost[name].mean() - one) for name in groups.get(group, [group])],
            "profile": profile[group].tolist(), "band": band[group].tolist(),
        }
        for group, own in scores.items()
    }  # fmt: skip
    return {"levels": levels.tolist(), "groups": figures}


def wait_distribution(replays: Replays, names: list[str]) -> dict[str, Any]:
    """The share of jobs that wait longer than so many seconds."""
    waits = {name: np.sort(replays.waits(name)) for name in names}
    longest = max(wait[-1] for wait in waits.values())
    at = np.geomspace(1, max(longest, 10), 160)
    share = {name: 1 - np.searchsorted(wait, at, side="right") / len(wait) for name, wait in waits.items()}
    return {"seconds": at.tolist(), "share": {name: values.tolist() for name, values in share.items()}}


def over_time(replays: Replays, names: list[str], bins: int = 150) -> dict[str, Any]:
    """Mean queue length and utilization in equal parts of the first run, from its first submission to its last."""
    submit = replays.schedules[names[0]][0].jobs.submit_time
    edges = np.linspace(submit[0], max(submit[-1], submit[0] + 1), bins + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    found: dict[str, Any] = {"hours": ((middle - submit[0]) / 3600).tolist(), "queue": {}, "utilization": {}}
    for name in names:
        [schedule, *_] = replays.schedules[name]
        share = (schedule.jobs.demand / schedule.cluster.capacity.sum(0)).mean(1)
        start, end = schedule.start_time, schedule.start_time + schedule.service_time
        for key, begin, until, weight in (
            ("queue", submit, start, np.ones(len(submit))), ("utilization", start, end, share)
        ):  # fmt: skip
            area = np.diff(elapsed(begin, weight, edges) - elapsed(until, weight, edges))
            found[key][name] = (area / np.diff(edges)).tolist()
    return found


def elapsed(times: np.ndarray, weight: np.ndarray, at: np.ndarray) -> np.ndarray:
    """float64[len(at)]: the sum over i of weight[i] * max(0, at - times[i])."""
    order = np.argsort(times)
    total, moment = (np.concatenate([[0.0], np.cumsum(x[order])]) for x in (weight, weight * times))
    count = np.searchsorted(times[order], at)
    return total[count] * at - moment[count]


def by_size(replays: Replays, names: list[str]) -> dict[str, Any]:
    """The mean wait of up to five classes of jobs by size."""
    jobs = Jobs.concatenate([schedule.jobs[block] for schedule, block in replays.blocks(names[0])])
    size = job_size(jobs, replays.workload.cluster)
    limits = np.unique(np.quantile(size, [0.3, 0.6, 0.85, 0.97, 1.0], method="higher"))
    number = np.searchsorted(limits, size)
    unit = replays.workload.cluster.resources[0]
    labels = [f"{size[number == k].min():.3g}–{limit:.3g}" for k, limit in enumerate(limits)]
    return {
        "unit": unit if len(replays.workload.cluster.resources) == 1 else f"dominant share in {unit}",
        "labels": [label if len(set(ends := label.split("–"))) > 1 else ends[0] for label in labels],
        "jobs": np.bincount(number).tolist(),
        "wait": {n: (np.bincount(number, replays.waits(n)) / np.bincount(number)).tolist() for n in names},
    }


ATTENTION_DECISIONS, ATTENTION_BINS = 3_000, 12
DECODED = {  # features of a job -> what they tell, in seconds or processors; see scheduler_env.job_row
    "requested": lambda x: np.expm1(12 * x), "size": lambda x: np.exp2(10 * x) - 1, "waited": lambda x: np.expm1(12 * x)
}  # fmt: skip


def attention(policy: OnnxPolicy, workload: Workload) -> dict[str, Any]:
    """How the score of a job, beside the others in the queue, goes with what it asks for and how long it has waited.

    Means and quartiles over equally full bins, of the first decisions of the replay; a job's score is the logit of its
    best node minus the mean of this over the jobs that could be chosen.
    """
    length = int((workload.segments[:, 1] - workload.segments[:, 0]).min())
    count = min(8, len(workload.segments))
    envs = policy.environments(workload, count, length)
    observations, _ = envs.reset(seed=0, options={"first": workload.segments[:count, 0]})
    seen: list[np.ndarray] = []
    over = np.zeros(count, bool)
    while len(seen) < ATTENTION_DECISIONS and not over.any():
        parts = envs.split(observations)
        logits = policy.choices(parts)
        legal = parts.mask[:, :-1].reshape(count, parts.jobs.shape[1], -1) > 0
        score = np.where(legal, logits[:, :-1].reshape(legal.shape), -np.inf).max(2)
        for e in np.flatnonzero(legal.any(2).sum(1) > 1):
            jobs = np.flatnonzero(legal[e].any(1))
            columns = [decode(parts.jobs[e, jobs, JOB_FEATURES.index(name)]) for name, decode in DECODED.items()]
            seen.append(np.column_stack([*columns, score[e, jobs] - score[e, jobs].mean()]))
        observations, _, terminated, truncated, _ = envs.step(logits.argmax(1))
        over = terminated | truncated
    envs.close()
    if not seen:
        return {}
    rows = np.concatenate(seen)
    return {name: binned(rows[:, column], rows[:, -1]) for column, name in enumerate(DECODED)}


def binned(x: np.ndarray, y: np.ndarray) -> dict[str, list[float]]:
    """Mean x, and mean and quartiles of y, in about equally full bins of x."""
    number = np.searchsorted(np.unique(np.quantile(x, np.linspace(0, 1, ATTENTION_BINS + 1)[1:-1])), x)
    groups = [number == k for k in np.unique(number) if (number == k).mean() > 0.01]  # few jobs tell nothing
    quartiles = np.array([np.quantile(y[own], [0.25, 0.75]) for own in groups])
    means = {key: [float(values[own].mean()) for own in groups] for key, values in (("x", x), ("mean", y))}
    return means | {"low": quartiles[:, 0].tolist(), "high": quartiles[:, 1].tolist()}


PACKAGES = ("numpy", "numba", "gymnasium", "onnxruntime", "matplotlib")


def made(args: Compare, workload: Workload) -> dict[str, Any]:
    """What somebody needs to get the same figures."""
    path = Path(args.workload)
    changed = " with uncommitted changes" * bool(git("status", "--porcelain", "--untracked-files=no"))
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD") + changed or "not a git checkout",
        "trace_sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        "jobs_sha256": workload_digest(workload),
        "seed": args.seed, "resamples": RESAMPLES, "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip


def git(*arguments: str) -> str:
    """What git says of the folder of this file; nothing, where it is no checkout or there is no git."""
    try:
        call = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def write_episodes(path: Path, replays: dict[Scenario, Replays], objective: str) -> None:
    """A row for each policy and episode: a window, or a block of a continuous replay; and the lower bound on each."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        head = ("protocol", "load", "policy", "run", "first_job", "jobs", *METRICS)
        writer.writerow([*head, "wait_p50", "wait_p95", "wait_p99", "wait_max", f"{objective}_bound"])
        for scenario, own in replays.items():
            bounds = None
            for name in own.schedules:
                rows = zip(own.blocks(name), own.per_block[name], strict=True)
                runs = np.repeat(np.arange(len(own.cuts)), [len(blocks) for blocks in own.cuts])
                pairs = own.blocks(name)
                bounds = bounds or [lower_bound(s.jobs[b], s.cluster, objective, iterations=20) for s, b in pairs]
                for run, bound, ((schedule, block), metrics) in zip(runs, bounds, rows, strict=True):
                    wait = schedule.wait[block]
                    tail = [*np.percentile(wait, [50, 95, 99]), wait.max(), bound]
                    jobs = (schedule.jobs.job_id[block.start], len(wait))
                    figures = [f"{figure:.9g}" for figure in (*metrics, *tail)]
                    writer.writerow([scenario.protocol, scenario.load, name, run, *jobs, *figures])


# ------------------------------------------------------------------------------------------------- the other commands
def rlscheduler(args: RLScheduler) -> tuple[dict[str, Any], Table]:
    from rlscheduler import published

    return published(args, lambda names: replaying(names, len(names)))


def speed(args: Speed) -> tuple[dict[str, Any], Table]:
    from speed import measure

    return measure(args)


def sweep(args: Sweep) -> tuple[dict[str, Any], Table]:
    from sweep import optimise

    return optimise(args)


# -------------------------------------------------------------------------------------------------------------- main
def replaying(items: Iterable[T], total: int) -> Iterable[T]:
    """The items, with a progress bar beside the output; a log gets none."""
    bar = Console(stderr=True)
    return track(items, "Replaying", total, console=bar, transient=True, disable=not bar.is_terminal)


def main() -> None:
    commands = {"compare": Compare, "rlscheduler": RLScheduler, "speed": Speed, "sweep": Sweep}
    args = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    try:
        if args.output:
            check_output(args.output)
        results, table = {Compare: compare, RLScheduler: rlscheduler, Speed: speed, Sweep: sweep}[type(args)](args)
        if args.output:
            write_json(args.output, results)
    except (ValueError, OSError) as error:  # also WorkloadError and PolicyError
        print(f"benchmark.py: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenProcessPool:
        lost = "a worker was ended, for want of memory perhaps; give fewer --workers"
        print(f"benchmark.py: {lost}; with --report, the same command goes on where it stopped", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        kept = isinstance(args, Sweep) or (isinstance(args, Compare) and args.report)
        more = "the same command goes on where it stopped" if kept else "nothing is kept"
        print(f"benchmark.py: interrupted; {more}", file=sys.stderr)
        sys.exit(130)
    table.box, table.padding, table.pad_edge = box.SIMPLE_HEAD, (0, 0), False
    Console(width=1000).print(table)  # as wide as its figures: a narrow terminal may wrap a line, but nothing is cut
    for line in results.get("notes", []):
        print(f"benchmark.py: {line}", file=sys.stderr)
    for line in (left_out := results.get("left_out", [])):
        print(f"benchmark.py: left out: {line}", file=sys.stderr)
    if left_out:
        sys.exit(1)


if __name__ == "__main__":
    main()
