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

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from policies import Policy, load_policy
from scheduler_env import (
    BLOCKING,
    RULES,
    STATIC,
    UNICEP_RLSCHEDULER,
    Rule,
    Schedule,
    SchedulerVectorEnv,
    parse_rule,
    simulate,
)
from sweep import Sweep, sweep
from workloads import Cluster, Jobs, Workload, WorkloadError, load_workload, read_swf, scale_load, write_json

METRICS = ("latency", "wait", "bounded_slowdown", "utilization", "makespan")
RESAMPLES = 10_000
WARMUP = 0.05  # the share of a continuous replay that is not counted: its machine starts empty


@dataclass
class Compare:
    """Compare policies on jobs that no training has seen."""

    workload: str = "cloud"
    """a preset (cloud, hpc, manufacturing, datacenter, tasks) or the path of an SWF trace, plain or gzipped"""
    policies: tuple[str, ...] = ("fifo", "easy-fifo", "easy-sjf")
    """names of rules, run folders and paths of policy.onnx; `all` is every rule; the first is what the others differ from"""
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
    """the number of windows, each a block"""
    episode_jobs: int = 256
    """the jobs of a window"""
    seed: int = 1
    """draws the windows and the bootstrap's blocks"""
    output: Path | None = None
    """where to write the results as JSON"""
    report: Path | None = None
    """the folder for a report: index.html, report.md, results.json, episodes.csv, plots; what was replayed is kept there,
    so that an interrupted comparison goes on where it stopped"""
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
    output: Path | None = None
    """where to write the rows as JSON"""


@dataclass
class Speed:
    """Measure the simulator and the environment on this machine."""

    workload: str = "hpc"
    """a preset or the path of an SWF trace"""
    repetitions: int = 5
    """the median of so many counts"""
    output: Path | None = None
    """where to write the figures as JSON"""


# ------------------------------------------------------------------------------------------------------ the jobs
def held_out(args: Compare) -> Workload:
    """The jobs that all policies get: segments to replay, each from an empty machine.

    Raises:
        ValueError: a flag makes no sense, or (WorkloadError) the workload cannot be used.
    """
    for name in ("max_jobs", "runs", "blocks", "episodes", "episode_jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least 1")
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
    """int[episodes, 2]: windows of `length` jobs, each place as likely; they may overlap."""
    places = np.concatenate([np.arange(first, last - length + 1) for first, last in segments])
    if len(places) == 0:
        longest = (segments[:, 1] - segments[:, 0]).max()
        raise ValueError(f"--episode-jobs {length}: the split has only {longest} jobs in a row; give fewer")
    first = rng.choice(places, episodes)
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
    begin, end = own.jobs.submit_time[0], own.jobs.submit_time[0] + own.makespan
    overlap = np.minimum(schedule.start_time + schedule.service_time, end) - np.maximum(schedule.start_time, begin)
    used = np.maximum(overlap, 0) @ jobs.demand / cluster.capacity.sum(0)
    means = own.latency.mean(), own.wait.mean(), own.bounded_slowdown.mean()
    return [*means, used.mean() / own.makespan, own.makespan]


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
    workload = held_out(args)
    policies = named_policies(args.policies)  # all of them are read before the first one runs
    workload.report_skipped()
    # A window is a block; a continuous replay is cut into some, none of which straddles two runs.
    blocks, warmup = (1, 0.0) if args.protocol == "windows" else (args.blocks // len(workload.segments), WARMUP)
    cuts = [cut(last - first, max(1, blocks), warmup) for first, last in workload.segments]
    per_block, tails = {}, {}
    for name in replaying(policies):
        schedules = policies[name].schedule(workload)
        pairs = [(schedule, block) for schedule, own in zip(schedules, cuts, strict=True) for block in own]
        per_block[name] = np.array([block_metrics(*pair) for pair in pairs])  # [B, len(METRICS)]
        waits = np.concatenate([schedule.wait[block] for schedule, block in pairs])
        tails[name] = {"wait_p99": float(np.percentile(waits, 99)), "wait_max": float(waits.max())}
    results = {
        "workload": args.workload, "protocol": args.protocol, "split": args.split, "load": args.load,
        "jobs": int((workload.segments[:, 1] - workload.segments[:, 0]).sum()), "counted_jobs": len(waits),
        **statistics(per_block, args.seed), "tails": tails,
    }  # fmt: skip
    return results, comparison_table(results)


def named_policies(names: Sequence[str]) -> dict[str, Policy]:
    """The policies under the names that results use; an argument given twice counts once."""
    arguments = dict.fromkeys(rule for name in names for rule in (RULES if name == "all" else [name]))
    if not arguments:
        raise ValueError("--policies: none given; name some, such as: fifo easy-fifo")
    policies = {argument: load_policy(argument) for argument in arguments}
    own = [policy.name for policy in policies.values()]
    return {p.name if own.count(p.name) == 1 else argument: p for argument, p in policies.items()}


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
    """A row a policy: each mean, half the width of its interval, and the difference to the first policy."""
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
            cells.append(plus_minus(figure, form, "\n±"))
            if name != first:
                cells[-1] += "\n" + plus_minus(results["differences"][name][metric], "+.1f", "±", "%")
        table.add_row(name, *cells, "\n".join(f"{tail:,.0f}" for tail in results["tails"][name].values()))
        table.add_section()
    return table


def plus_minus(figure: dict[str, Any], form: str, between: str, unit: str = "") -> str:
    """A mean and half the width of its interval, as text."""
    if figure["mean"] is None:
        return "-"
    low, high = figure["ci95"]
    margin = "" if low is None else f"{between}{(high - low) / 2:{form.lstrip('+')}}"
    return f"{figure['mean']:{form}}{margin}{unit}"


# --------------------------------------------------------------------------------------- RLScheduler's published table
# What its queue orders are called here. In its code the job that was chosen first holds the queue: `lock_in`.
LOCK_IN_RULES = {
    "fcfs": parse_rule("fifo"),
    "sjf": parse_rule("sjf"),
    "f1": parse_rule("f1"),
    "wfp_fixed": parse_rule("wfp3"),
    "uni_fixed": Rule("uni_fixed", UNICEP_RLSCHEDULER, UNICEP_RLSCHEDULER, BLOCKING),
}


def rlscheduler_workload(traces: Path, name: str, info: dict[str, Any]) -> Workload:
    """A trace as RLScheduler's code reads it; the segments are its ten sequences of 1,024 jobs.

    Args:
        info: the trace's entry under "traces" in rlscheduler.json.

    Raises:
        WorkloadError: the trace cannot be read, or is not the one that was replayed.
    """
    records = read_swf(traces / info["trace_file"]).records
    run_time = np.where(records[:, 3] < 0, 10.0, records[:, 3])
    kept = np.flatnonzero(run_time != 0)
    kept = kept[np.argsort(records[kept, 0], kind="stable")]  # by job number, not by submit time
    records, run_time = records[kept], run_time[kept]
    if len(kept) != info["n_jobs_loaded"]:
        raise WorkloadError(
            f"{traces / info['trace_file']}: {len(kept)} jobs, and RLScheduler's file has {info['n_jobs_loaded']}; "
            "give the trace that the reference file describes"
        )
    # A missing request becomes the raw run time, before a negative one of those becomes 10: such jobs ask for -1 s.
    requested_time = np.where(records[:, 8] == -1, records[:, 3], records[:, 8])
    unknown = np.full(len(kept), -1, np.int32)
    jobs = Jobs(
        records[:, 1], run_time, requested_time, np.maximum(records[:, 4], records[:, 7])[:, None],
        unknown, unknown, unknown, unknown, np.zeros(len(kept)), records[:, 0].astype(np.int64),
    )  # fmt: skip
    cluster = Cluster(np.array([[float(info["max_procs"])]]), np.ones(1), ("processors",))
    starts = np.array(info["protocols"]["tableV_1024x10"]["start_indexes"])
    return Workload(name, cluster, jobs, np.stack([starts, starts + 1024], axis=1), {})


def rlscheduler_schedules(workload: Workload, rule: str, backfill: bool) -> list[Schedule]:
    """The ten sequences under one of LOCK_IN_RULES, or under wfp or uni as shipped.

    As shipped those two compute the wait from a start time that is -1 while a job is queued, so that it is -1 minus
    the submit time at all times: they prefer the latest jobs, and their scores do not change.
    """
    mode = {"backfill": "easy" if backfill else "none", "lock_in": True}
    if rule in LOCK_IN_RULES:
        return simulate(workload, LOCK_IN_RULES[rule], **mode)
    wait, requested, size = -1 - workload.jobs.submit_time, workload.jobs.requested_time, workload.jobs.demand[:, 0]
    scores = {
        "wfp": -((wait / requested) ** 3) * size,
        "uni": -(wait + 1e-15) / (np.log2(size + 1e-15) * requested),
    }
    return simulate(workload, Rule(rule, STATIC, STATIC, BLOCKING), scores=scores[rule], **mode)


def rlscheduler_utilization(schedule: Schedule) -> float:
    """As RLScheduler has it: until the last start, so that what runs afterwards counts as if it were done by then."""
    work = schedule.service_time @ schedule.jobs.demand[:, 0]
    return float(work / schedule.cluster.capacity.sum() / (schedule.start_time.max() - schedule.jobs.submit_time[0]))


def rlscheduler(args: RLScheduler) -> tuple[dict[str, Any], Table]:
    """What we get for every published number of a rule; RL is its trained network, which we do not have."""
    reference = read_reference(args.reference)
    published = reference["published"]
    rows: dict[str, list[dict[str, Any]]] = {"bsld": [], "utilization": []}
    for name in replaying(reference["traces"]):
        workload = rlscheduler_workload(args.traces, name, reference["traces"][name])
        for backfill in (False, True):
            for column, rule in enumerate(published["order"]):
                schedules = None if rule == "RL" else rlscheduler_schedules(workload, rule, backfill)
                for metric, of in (
                    ("bsld", lambda s: s.bounded_slowdown.mean()),
                    ("utilization", rlscheduler_utilization),
                ):
                    theirs = published[metric]["backfill_on" if backfill else "backfill_off"][name][column]
                    ours = None if schedules is None else float(np.mean([of(schedule) for schedule in schedules]))
                    row = {"trace": name, "backfill": backfill, "rule": rule, "published": theirs, "ours": ours}
                    rows[metric].append(row)
    return {"rows": rows["bsld"], "utilization": rows["utilization"]}, published_table(rows)


def read_reference(path: Path) -> dict[str, Any]:
    try:
        reference = json.loads(path.read_text())
        reference["published"]["order"], reference["traces"]
        return reference
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give the path of rlscheduler.json") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not the published figures; give the path of rlscheduler.json") from None


def published_table(rows: dict[str, list[dict[str, Any]]]) -> Table:
    """Bounded slowdown and utilization side by side, as many decimals as are published.

    One differs: the utilization of sjf with backfilling on SDSC-SP2, 0.66046 in RLScheduler's own code as well, is
    published as 0.661, which is what rounding it twice gives.
    """
    title, caption = "RLScheduler (SC'20), ten sequences of 1,024 jobs", "= the same to all published decimals"
    table = Table(title=title, caption=caption)
    for heading in ("trace", "backfill", "rule", "slowdown", "ours", "", "utilization", "ours", ""):
        table.add_column(heading, justify="left" if heading in ("trace", "backfill", "rule") else "right", no_wrap=True)
    for slowdown, utilization in zip(rows["bsld"], rows["utilization"], strict=True):
        cells = [slowdown["trace"], "yes" if slowdown["backfill"] else "no", slowdown["rule"]]
        for row, digits in ((slowdown, 2), (utilization, 3)):
            ours = None if row["ours"] is None else round(row["ours"], digits)
            cells += [f"{row['published']:,.{digits}f}", "-" if ours is None else f"{ours:,.{digits}f}"]
            cells.append("=" if ours == row["published"] else "")
        table.add_row(*cells)
    return table


# ------------------------------------------------------------------------------------------------------------- speed
SPEED_RULES = ("easy-fifo", "easy-sjf", "easy-wfp3+sjf")
ENVIRONMENTS, EPISODE_JOBS, STEPS = 256, 1024, 200


def speed(args: Speed) -> tuple[dict[str, Any], Table]:
    """Medians on this machine. Compiling and loading are not counted; observations are."""
    if args.repetitions < 1:
        raise ValueError(f"--repetitions {args.repetitions}: give at least 1")
    workload = load_workload(args.workload, "all")
    workload.report_skipped()
    memory = environment_memory(workload)  # first, while nothing that was freed can be used again
    rules = {rule: median(args, lambda rule=rule: simulator_speed(workload, rule)) for rule in SPEED_RULES}
    environments = {reward: median(args, vector_env_speed(workload, reward)) for reward in ("cost", "improvement")}
    results = {
        "workload": args.workload,
        "simulator_decisions_per_second": min(rules.values()),
        "simulator_decisions_per_second_by_rule": rules,
        "vector_env_steps_per_second": environments["cost"],
        "vector_env_steps_per_second_improvement": environments["improvement"],
        "memory_256_environments_mb": memory,
    }
    title = f"Speed on {args.workload}, {len(workload.jobs):,} jobs; medians of {args.repetitions}"
    table = Table(title=title)
    table.add_column("what")
    table.add_column("figure", justify="right")
    for rule, figure in rules.items():
        table.add_row(f"simulator, one thread, {rule}: decisions/s", f"{figure:,.0f}")
    for reward, figure in environments.items():
        table.add_row(f"{ENVIRONMENTS} environments, random actions, reward {reward}: steps/s", f"{figure:,.0f}")
    table.add_row(f"{ENVIRONMENTS} environments of {EPISODE_JOBS:,} jobs: MB", f"{memory:,.0f}")
    return results, table


def median(args: Speed, measure: Callable[[], float]) -> float:
    measure()  # burn in: compiles, fills caches
    return float(np.median([measure() for _ in range(args.repetitions)]))


def simulator_speed(workload: Workload, rule: str) -> float:
    """Decisions per second of a replay of the whole workload, everything that `simulate` does included."""
    begin = time.perf_counter()
    schedules = simulate(workload, rule)
    return sum(schedule.decisions for schedule in schedules) / (time.perf_counter() - begin)


def make_envs(workload: Workload, count: int, reward: str) -> SchedulerVectorEnv:
    quarter = EPISODE_JOBS // 4
    lengths = {"warmup_jobs": quarter, "num_jobs": 2 * quarter, "followup_jobs": quarter}
    return SchedulerVectorEnv(count, workload, reward=reward, **lengths)


def vector_env_speed(workload: Workload, reward: str) -> Callable[[], float]:
    """Measures steps per second (of all environments) under random legal actions; drawing them is not counted."""
    envs, rng = make_envs(workload, ENVIRONMENTS, reward), np.random.default_rng(0)
    envs.reset(seed=0)

    def measure() -> float:
        seconds = 0.0
        for _ in range(STEPS):
            actions = (envs.action_masks() * rng.random((ENVIRONMENTS, envs.layout.actions))).argmax(1)
            begin = time.perf_counter()
            envs.step(actions)
            seconds += time.perf_counter() - begin
        return STEPS * ENVIRONMENTS / seconds

    return measure


def environment_memory(workload: Workload) -> float:
    """MB of resident memory that the environments take, in use; those of the compiled code are not theirs."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    make_envs(workload, 1, "improvement").reset(seed=0)
    before, envs = resident(), make_envs(workload, ENVIRONMENTS, "improvement")
    envs.reset(seed=0)
    for _ in range(STEPS):
        envs.step(envs.action_masks().argmax(1))
    return resident() - before


# -------------------------------------------------------------------------------------------------------------- main
def replaying(names: Iterable[str]) -> Iterable[str]:
    """The names, with a progress bar beside the output; a log gets none."""
    bar = Console(stderr=True)
    return track(list(names), "Replaying", console=bar, transient=True, disable=not bar.is_terminal)


def main() -> None:
    commands = {"compare": Compare, "rlscheduler": RLScheduler, "speed": Speed, "sweep": Sweep}
    args = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    try:
        if args.output and not args.output.parent.is_dir():
            raise ValueError(f"--output {args.output}: there is no folder {args.output.parent}; make it first")
        results, table = {Compare: compare, RLScheduler: rlscheduler, Speed: speed, Sweep: sweep}[type(args)](args)
        if args.output:
            write_json(args.output, results)
    except (ValueError, OSError) as error:  # also WorkloadError and PolicyError
        print(f"benchmark.py: {error}", file=sys.stderr)
        sys.exit(2)
    table.box, table.padding, table.pad_edge = box.SIMPLE_HEAD, (0, 0), False
    Console(width=1000).print(table)  # as wide as its figures: a narrow terminal may wrap a line, but nothing is cut


if __name__ == "__main__":
    main()
