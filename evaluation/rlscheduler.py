"""RLScheduler's published table (Zhang et al., SC'20) replayed: its rules, and our policies beside its network.

    python benchmark.py rlscheduler --traces traces --reference rlscheduler.json --policies runs/X

Each row is the mean over ten sequences of 1,024 jobs, each from an empty machine.
"""

import json
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
from rich.table import Table

from evaluation.replays import replaying
from policies import OnnxPolicy, Policy, load_policy
from simulator.kernels import BLOCKING, STATIC, UNICEP_RLSCHEDULER
from simulator.replay import simulate
from simulator.rules import Rule, parse_rule
from simulator.schedule import Schedule
from workloads.jobs import Cluster, Jobs, Workload, WorkloadError
from workloads.swf import read_swf


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


def published(args: RLScheduler) -> tuple[dict[str, Any], Table]:
    """What we get for every published number of a rule, and what our policies get beside RLScheduler's trained network,
    which we do not have.

    Raises:
        ValueError, WorkloadError, PolicyError: a file cannot be read, or is not what it should be.
    """
    reference = _read_reference(args.reference)
    policies = [policy for name in args.policies for policy in _as_replayed(load_policy(name))]
    rows = []
    for name in replaying(reference["traces"], len(reference["traces"])):
        workload = sequences(args.traces, name, reference["traces"][name])
        for backfill in (False, True):
            for rule in reference["published"]["order"]:
                schedules = [] if rule == "RL" else _schedules_of(workload, rule, backfill)
                rows.append(_published_row(reference, name, backfill, rule) | _measured(schedules, lock_in=True))
        for policy in policies:
            rows.append(_rival(reference, name, policy) | _measured(policy.schedule(workload), _locks_in(policy)))
    return {"rows": rows}, _published_table(rows)


def _read_reference(path: Path) -> dict[str, Any]:
    try:
        reference = json.loads(path.read_text())
        for trace, info in reference["traces"].items():
            info["trace_file"], info["n_jobs_loaded"], info["max_procs"]
            info["protocols"]["tableV_1024x10"]["start_indexes"]
            for backfill in (False, True):
                for rule in reference["published"]["order"]:
                    _published_row(reference, trace, backfill, rule)
            _best_without_lock_in(reference, trace)
        return reference
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give the path of rlscheduler.json") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path}: not the published figures; give the path of rlscheduler.json") from None


def sequences(traces: Path, name: str, info: dict[str, Any]) -> Workload:
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
    # What histories are made of. No rule that is published reads them, nor does RLScheduler's network; ours may.
    user, group, executable, queue = records[:, 11:15].T.astype(np.int32)
    jobs = Jobs(
        records[:, 1], run_time, requested_time, np.maximum(records[:, 4], records[:, 7])[:, None],
        user, group, executable, queue, np.maximum(records[:, 2], 0), records[:, 0].astype(np.int64),
    )  # fmt: skip
    cluster = Cluster(np.array([[float(info["max_procs"])]]), np.ones(1), ("processors",))
    starts = np.array(info["protocols"]["tableV_1024x10"]["start_indexes"])
    return Workload(name, cluster, jobs, np.stack([starts, starts + 1024], axis=1), {})


# What its queue orders are called here. In its code the job that was chosen first holds the queue: `lock_in`.
LOCK_IN_RULES = {
    "fcfs": parse_rule("fifo"),
    "sjf": parse_rule("sjf"),
    "f1": parse_rule("f1"),
    "wfp_fixed": parse_rule("wfp3"),
    "uni_fixed": Rule("uni_fixed", UNICEP_RLSCHEDULER, UNICEP_RLSCHEDULER, BLOCKING),
}


def _schedules_of(workload: Workload, rule: str, backfill: bool) -> list[Schedule]:
    """The ten sequences under one of LOCK_IN_RULES, or under wfp or uni as shipped.

    As shipped those two compute the wait from a start time that is -1 while a job is queued, so that it is -1 minus
    the submit time at all times: they prefer the latest jobs, and their scores do not change.
    """
    locked_in = partial(simulate, workload, backfill="easy" if backfill else "none", lock_in=True)
    if rule in LOCK_IN_RULES:
        return locked_in(LOCK_IN_RULES[rule])
    wait, requested, size = -1 - workload.jobs.submit_time, workload.jobs.requested_time, workload.jobs.demand[:, 0]
    scores = {
        "wfp": -((wait / requested) ** 3) * size,
        "uni": -(wait + 1e-15) / (np.log2(size + 1e-15) * requested),
    }
    return locked_in(Rule(rule, STATIC, STATIC, BLOCKING), scores=scores[rule])


def _measured(schedules: list[Schedule], lock_in: bool) -> dict[str, float | None]:
    """Our means over the ten sequences; None where there are no schedules."""
    if not schedules:
        return {"our_bsld": None, "our_utilization": None}
    utilization = _utilization_until_last_start if lock_in else lambda schedule: schedule.utilization
    return {
        "our_bsld": float(np.mean([schedule.bounded_slowdown.mean() for schedule in schedules])),
        "our_utilization": float(np.mean([utilization(schedule) for schedule in schedules])),
    }


def _utilization_until_last_start(schedule: Schedule) -> float:
    """As RLScheduler has it: until the last start, so that what runs afterwards counts as if it were done by then."""
    work = schedule.service_time @ schedule.jobs.demand[:, 0]
    return float(work / schedule.cluster.capacity.sum() / (schedule.start_time.max() - schedule.jobs.submit_time[0]))


def _published_row(reference: dict[str, Any], trace: str, backfill: bool, rule: str) -> dict[str, Any]:
    published, mode = reference["published"], "backfill_on" if backfill else "backfill_off"
    column = published["order"].index(rule)
    figures = {metric: published[metric][mode][trace][column] for metric in ("bsld", "utilization")}
    return {"trace": trace, "lock_in": True, "backfill": backfill, "rule": rule, "policy": None} | figures


def _rival(reference: dict[str, Any], trace: str, policy: Policy) -> dict[str, Any]:
    """The figures that a policy is put beside: the published RL, or the best rule where nothing is locked in."""
    if _locks_in(policy):
        row = _published_row(reference, trace, policy.metadata.backfill == "easy", "RL")
    else:
        row = _best_without_lock_in(reference, trace)
    return row | {"policy": policy.name}


def _best_without_lock_in(reference: dict[str, Any], trace: str) -> dict[str, Any]:
    rules = reference["rules_without_lock_in"]["results"][trace]
    best = min(rules, key=lambda rule: rules[rule]["bsld"])
    figures = {"bsld": rules[best]["bsld"], "utilization": rules[best]["util"]}
    return {"trace": trace, "lock_in": False, "backfill": True, "rule": best} | figures


def _locks_in(policy: Policy) -> TypeGuard[OnnxPolicy]:
    return isinstance(policy, OnnxPolicy) and policy.metadata.lock_in


def _as_replayed(policy: Policy) -> list[Policy]:
    """One that locks in without and with backfilling, whichever it was trained with: RLScheduler trains one network a
    trace, too, and only switches backfilling on where that is replayed (its make_table_script.py)."""
    if not _locks_in(policy):
        return [policy]
    modes: tuple[Literal["easy", "none"], ...] = ("none", "easy")
    ways = [copy(policy) for _ in modes]
    for way, backfill in zip(ways, modes, strict=True):
        way.metadata = replace(policy.metadata, backfill=backfill)
    return [*ways]


def _published_table(rows: list[dict[str, Any]]) -> Table:
    """Bounded slowdown and utilization beside the published, to as many decimals.

    One differs: the utilization of sjf with backfilling on SDSC-SP2, 0.66046 in RLScheduler's own code as well, is
    published as 0.661, which is what rounding it twice gives.
    """
    title, caption = "RLScheduler (SC'20), ten sequences of 1,024 jobs", "= the same to all published decimals"
    table = Table(title=title, caption=caption)
    for heading in ("trace", "backfill", "rule", "slowdown", "ours", "", "utilization", "ours", ""):
        table.add_column(heading, justify="left" if heading in ("trace", "backfill", "rule") else "right", no_wrap=True)
    for row in rows:
        mode = "yes" if row["backfill"] else "no"
        rule = row["rule"] if row["policy"] is None else f"{row['rule']}; ours: {row['policy']}"
        cells = [row["trace"], mode if row["lock_in"] else "no lock-in", rule]
        for metric, digits in (("bsld", 2), ("utilization", 3)):
            theirs, ours = row[metric], row[f"our_{metric}"]
            cells += [f"{theirs:,.{digits}f}", "-" if ours is None else f"{ours:,.{digits}f}"]
            if row["policy"] is None:
                cells.append("=" if ours is not None and round(ours, digits) == theirs else "")
            else:
                cells.append(f"{ours / theirs - 1:+.1%}")
        table.add_row(*cells)
    return table
