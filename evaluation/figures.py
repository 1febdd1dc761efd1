"""The numbers of a report, beside those of the comparison: everything that results.json holds of it, and episodes.csv.

`add_figures` lists them: tails, the lower bound, fairness, the other protocol and loads, training seeds, what its plots
draw, and how it was made. What is said about them is in report.py, how they are drawn in plots.py.
"""

import csv
import hashlib
import platform
import re
import shlex
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

from evaluation.held_out import BASELINES, Compare
from evaluation.lower_bound import lower_bound
from evaluation.replays import Replays, Scenario
from evaluation.statistics import (
    METRICS,
    QUANTILE_RESAMPLES,
    RESAMPLES,
    against,
    against_easy_fifo,
    bootstrap_weights,
    interval,
    quantile_resamples,
    summary,
)
from policies import OnnxPolicy, PlanPolicy, Policy, RulePolicy
from simulator.arrays import job_size
from simulator.kernels import JOB_FEATURES
from simulator.schedule import METRIC
from workloads.files import replacing
from workloads.jobs import Jobs, Workload, offered_load, workload_digest

STARVING_P99, STARVING_MAX = 1.2, 2.0  # so many times EASY-FIFO's wait, and a policy is said to starve somebody


def add_figures(
    args: Compare, results: dict[str, Any], replays: dict[Scenario, Replays], policies: dict[str, Policy]
) -> None:
    """Add to the results of a comparison what only a report needs."""
    headline, metric = replays[Scenario(args.protocol, args.load)], METRIC[args.objective]
    networks = {name: policy for name, policy in policies.items() if isinstance(policy, OnnxPolicy)}
    rules = [name for name, policy in policies.items() if isinstance(policy, RulePolicy) or policy.stands_for]
    rules.sort(key=lambda name: policies[name].stands_for is not None)  # of equals, the rule and not what stands for it
    best_rule = min(rules, key=lambda rule: results["policies"][rule][metric]["mean"])
    results |= {
        "objective": args.objective, "best_rule": best_rule,
        "trained": {name: trained(policy) for name, policy in networks.items()},
        "planned": [name for name, policy in policies.items() if isinstance(policy, PlanPolicy)],
        "quantiles": {name: quantiles(headline, name, args.seed) for name in policies},
        "against": {rule: against(headline.per_block, rule, args.seed) for rule in dict.fromkeys(("fifo", best_rule))},
        "bound": bound(headline, args.objective, results),
        "fairness": {name: fairness(headline, name) for name in policies},
        "protocols": protocols(args, replays), "loads": by_load(args, replays),
        "seeds": training_seeds(headline, best_rule, metric, args.seed), "made": made(args, headline.workload),
    }  # fmt: skip
    shown = shown_policies(results)
    asked = {name: networks[name] for name in shown if name in networks and not networks[name].stands_for}
    results["plots"] = {
        "waits": wait_distribution(headline, shown), "time": over_time(headline, shown),
        "classes": by_size(headline, shown),
        "attention": {name: attention(policy, headline.workload) for name, policy in asked.items()},
        "learning": {name: learning_curve(policy.path.parent) for name, policy in networks.items()},
    }  # fmt: skip
    notes = results.get("notes", [])
    results["notes"] = notes + [found["note"] for found in results["plots"]["learning"].values() if found["note"]]


def trained(policy: OnnxPolicy) -> dict[str, Any]:
    names = ("algorithm", "workload", "objective", "reference", "rule", "steps", "seed")
    file = {"file": policy.argument, "sha256": hashlib.sha256(policy.data).hexdigest()}
    return {name: getattr(policy.metadata, name) for name in names} | file


def shown_policies(results: dict[str, Any]) -> list[str]:
    """Eight lines are as many as a plot can hold: the baselines, the trained and planned ones and the best of the
    rest."""
    metric = METRIC[results["objective"]]
    cost = {name: found[metric]["mean"] for name, found in results["policies"].items()}
    own = [*results["trained"], *results["planned"]]
    wanted = [*BASELINES, results["best_rule"], *own, *sorted(cost, key=cost.__getitem__)]
    shown = list(dict.fromkeys(wanted))[:8]
    return [name for name in cost if name in shown]


def run_of(name: str) -> re.Match[str] | None:
    """The parts of a policy's name that is a run's (`training.folder.new_folder`, `policies.called`)."""
    run = r"(?P<workload>.+)__(?P<exp_name>.+)__(?P<seed>\d+)__\d+(-\d+)?"
    return re.fullmatch(rf"{run}(/policy\.onnx(?P<at>@.+)?| (?P<rule>\(= .+\)))", name)


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


def bound(replays: Replays, objective: str, results: dict[str, Any]) -> dict[str, Any]:
    """The lower bound on the mean over all counted jobs, run by run, and the share of the way from FIFO to it that each
    policy goes."""
    total = jobs = 0.0
    for (first, last), own in zip(replays.workload.segments, replays.cuts, strict=True):
        counted = replays.workload.jobs[first:last][slice(own[0].start, own[-1].stop)]
        total += len(counted) * lower_bound(counted, replays.workload.cluster, objective)
        jobs += len(counted)
    mean, cost = total / jobs, {name: p[METRIC[objective]]["mean"] for name, p in results["policies"].items()}
    way = cost["fifo"] - mean
    return {"mean": mean, "closed": {n: (cost["fifo"] - c) / way if way > 0 else None for n, c in cost.items()}}


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
    metric = METRICS.index(METRIC[args.objective])
    found: dict[str, Any] = {}
    for scenario in (Scenario("continuous", args.load), Scenario("windows", args.load)):
        if own := replays.get(scenario):
            column = {name: values[:, metric] for name, values in own.per_block.items()}
            weights = bootstrap_weights(len(column["fifo"]), args.seed)
            figures = {
                name: summary(values, weights)
                | {"to_easy_fifo": against_easy_fifo(values, column["easy-fifo"], weights)}
                for name, values in column.items()
            }
            found[scenario.protocol] = {
                "policies": figures, "best": min(figures, key=lambda name: figures[name]["mean"]),
                "jobs": own.counted_jobs, "blocks": len(column["fifo"]),
            }  # fmt: skip
    if len(found) == 2:
        here, there = (found[protocol]["policies"] for protocol in ("continuous", "windows"))
        sides = {name: here[name]["to_easy_fifo"]["side"] * there[name]["to_easy_fifo"]["side"] for name in here}
        found["change_sides"] = [name for name, product in sides.items() if product < 0]
    return found


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
        if run := run_of(name):
            groups.setdefault(f"{run['workload']}__{run['exp_name']}{run['at'] or ''}", []).append(name)
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
            area = np.diff(_elapsed(begin, weight, edges) - _elapsed(until, weight, edges))
            found[key][name] = (area / np.diff(edges)).tolist()
    return found


def _elapsed(times: np.ndarray, weight: np.ndarray, at: np.ndarray) -> np.ndarray:
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
DECODED = {  # features of a job -> what they tell, in seconds or processors; see simulator.kernels.job_row
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
    return {name: _binned(rows[:, column], rows[:, -1]) for column, name in enumerate(DECODED)}


def _binned(x: np.ndarray, y: np.ndarray) -> dict[str, list[float]]:
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
    changed = " with uncommitted changes" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD") + changed or "not a git checkout",
        "trace_sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        "jobs_sha256": workload_digest(workload),
        "seed": args.seed, "resamples": RESAMPLES, "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip


def _git(*arguments: str) -> str:
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
        for (protocol, load), own in replays.items():
            runs = np.repeat(np.arange(len(own.cuts)), [len(blocks) for blocks in own.cuts])
            bounds: list[float] = []  # the same for all policies
            for name, per_block in own.per_block.items():
                blocks = own.blocks(name)
                bounds = bounds or [lower_bound(s.jobs[b], s.cluster, objective, iterations=20) for s, b in blocks]
                for run, least, (schedule, block), metrics in zip(runs, bounds, blocks, per_block, strict=True):
                    wait = schedule.wait[block]
                    figures = (*metrics, *np.percentile(wait, [50, 95, 99]), wait.max(), least)
                    row = [protocol, load, name, run, schedule.jobs.job_id[block.start], len(wait)]
                    writer.writerow([*row, *(f"{figure:.9g}" for figure in figures)])


CURVES = {"eval/improvement": "validation (%)", "charts/episodic_return": "training (%)"}  # tag -> what a plot calls it


def learning_curve(folder: Path) -> dict[str, Any]:
    """{"scalars": {tag: [[step, value], ...]}, "note": what is missing or None}, as far as the events can be read."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        return {"scalars": {}, "note": f"{folder}: no TensorBoard events, so there is no learning curve."}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    known = [tag for tag in CURVES if tag in events.Tags()["scalars"]]
    scalars = {tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in known}
    cut = [file for file in files if _readable_bytes(file) < file.stat().st_size]
    points = max(map(len, scalars.values()), default=0)
    note = f"{cut[0]}: cut short or damaged; {points} points of the learning curve can be read." if cut else None
    return {"scalars": scalars, "note": note}


def _readable_bytes(file: Path) -> int:
    """A record is its length (8 bytes), the length's checksum (4), the event, and the event's checksum (4)."""
    return sum(len(event) + 16 for event in RawEventFileLoader(str(file)).Load())
