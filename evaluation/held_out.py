"""What is compared: the flags of `benchmark.py compare`, and the held-out jobs that they ask for."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from evaluation.replays import Scenario
from evaluation.statistics import cut
from workloads.jobs import Workload, scale_load
from workloads.load import load_workload
from workloads.reading import Reading

WARMUP = 0.05  # the share of a continuous replay that is not counted: its machine starts empty
BASELINES = ("fifo", "easy-fifo")  # a report always has them


@dataclass
class Compare(Reading):
    """Compare policies on jobs that no training has seen."""

    workload: str = "cloud"
    """a preset (cloud, hpc, manufacturing, datacenter, tasks), or the path of a trace or table (.swf, .csv, ...)"""
    policies: tuple[str, ...] = ("fifo", "easy-fifo", "easy-sjf")
    """rules, run folders and paths of policy.onnx, each with its own patience if @HOURS is behind it; `plan` or
    `plan:RULE`, which plans ahead over a rule; `all` is every rule; the first is what the others differ from"""
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
    ray: tuple[str, ...] | None = None
    """replay on a Ray cluster: the address of one, or nothing behind the flag for one on this machine"""


def held_out(args: Compare) -> Workload:
    """The jobs that all policies get: segments to replay, each from an empty machine.

    Raises:
        ValueError: a flag makes no sense, or (WorkloadError) the workload cannot be used.
    """
    least = dict.fromkeys(("max_jobs", "runs", "blocks", "episodes", "episode_jobs", "workers"), 1) | {"seed": 0}
    for name, lowest in least.items():
        if (value := getattr(args, name)) is not None and value < lowest:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least {lowest}")
    workload = load_workload(args.workload, args.split, args, runs=args.runs)
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


def cuts(args: Compare, scenario: Scenario, workload: Workload) -> list[list[slice]]:
    """A window is a block; a continuous replay is cut into some, none of which straddles two runs."""
    windows = scenario.protocol == "windows"
    blocks, warmup = (1, 0.0) if windows else (max(1, args.blocks // len(workload.segments)), WARMUP)
    return [cut(last - first, blocks, warmup) for first, last in workload.segments]


def other_scenarios(args: Compare, headline: Scenario) -> dict[Scenario, Workload]:
    """What a report replays beside the headline: both protocols and the sweep over loads."""
    scenarios = dict.fromkeys(Scenario("continuous", load) for load in sorted({args.load, *args.loads}))
    try:
        held_out(replace(args, protocol="windows"))
        scenarios[Scenario("windows", args.load)] = None
    except ValueError:  # too few jobs for a window: the report says so
        pass
    return {s: held_out(replace(args, protocol=s.protocol, load=s.load)) for s in scenarios if s != headline}
