"""Tables with a row for each job, as people have them of cloud and GPU clusters: CSV, Parquet, or a JSON array.

    load_workload("jobs.csv", reading=Reading(columns=("submit=created", "end=deleted", "demand.cpu=cores")))

`--columns` says which column is what: `role=column`, and amounts may be products and quotients of columns and numbers,
as in demand.cpu=cpu_milli/1000. Numeric times are seconds; texts are ISO 8601, in UTC where they do not say.
N counts rows, R resources, M nodes.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from workloads.compressed import ENDINGS
from workloads.frames import DURATIONS, MOMENTS, bad_rows, columns_of, evaluate, read_frame, texts
from workloads.jobs import Cluster, Jobs, Trace, WorkloadError, most_at_once
from workloads.nodes import nodes_of
from workloads.reading import MILLISECONDS, BadLine, Reading, check_span, judge_bad_lines, pooled

if TYPE_CHECKING:
    import pandas as pd

# What a column can be, and by which names it is known where --columns says nothing.
ROLES = {
    "submit": ("submit", "submit_time", "submitted_time", "submission_time", "creation_time", "arrival_time"),
    "start": ("start", "start_time", "scheduled_time"),
    "end": ("end", "end_time", "deletion_time", "finish_time"),
    "duration": ("duration", "run_time", "runtime"),
    "limit": ("limit", "requested_time", "time_limit"),
    "user": ("user", "user_id"),
    "group": ("group", "group_id", "account"),
    "executable": ("executable", "app", "job_name", "jobname"),
    "queue": ("queue", "vc"),
    "partition": ("partition",),
    "id": ("id", "job_id", "jobid"),
    "nodes": ("nodes", "node_num", "num_nodes"),
}
AMOUNTS = {
    "cpu": ("cpu", "cpus", "cpu_num", "num_cpus"),
    "memory": ("memory", "mem"),
    "gpu": ("gpu", "gpus", "gpu_num", "num_gpus"),
    "processors": ("processors",),
}
BUILT_IN = {
    # https://github.com/alibaba/clusterdata/tree/master/cluster-trace-gpu-v2023
    "openb": {
        "submit": "creation_time", "start": "scheduled_time", "end": "deletion_time",
        "demand.cpu": "cpu_milli/1000", "demand.memory": "memory_mib/1024", "demand.gpu": "num_gpu*gpu_milli/1000",
        "node.cpu": "cpu_milli/1000", "node.memory": "memory_mib/1024", "node.gpu": "gpu",
    },
    # https://github.com/msr-fiddle/philly-traces: cluster_job_log (see _of_attempts) and cluster_machine_list
    "philly": {
        "submit": "submitted_time", "start": "start_time", "duration": "duration", "user": "user", "queue": "vc",
        "nodes": "servers", "demand.gpu": "gpus", "node.gpu": "number of GPUs",
    },
}  # fmt: skip
NAMED_BY = ("user", "group", "executable", "queue", "partition", "id")
ADVICE = "name it, as in --columns submit=creation_time end=deletion_time demand.cpu=cpu_milli/1000"


def is_table(name: str, reading: Reading) -> bool:
    """Whether the file is read as a table: by its name, or because somebody has named its columns."""
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return bool(reading.columns) or name.lower().endswith((".csv", ".tsv", ".parquet"))


def read_table(path: str, reading: Reading) -> Trace:
    """The jobs by submit time, the cluster, what was left out, and how the table was understood.

    Raises:
        WorkloadError: the table or a mapping cannot be used, or rows make no sense and may not be left out.
    """
    frame, lines, bad = read_frame(path)
    mapping, notes = _mapping(path, reading.columns, frame)
    column: dict[str, np.ndarray] = {}
    for role, expression in mapping.items():
        if role in (*MOMENTS, *DURATIONS, "nodes") or role.startswith("demand."):
            form = ", and no time as 2024-03-01T08:00:00" if role in MOMENTS else ""
            column[role], wrong = evaluate(path, frame, role, expression)
            bad += bad_rows(lines, wrong, "no number", f"{role}={expression} is no number{form}")
    named = {role: texts(path, frame, role, mapping[role]) for role in NAMED_BY if role in mapping}
    if "duration" not in column:
        column["duration"] = column["end"] - column["start" if "start" in column else "submit"]
        if "start" not in column:
            notes.append("without start or duration, run times are counted from the submission: waits are in them")
    resources = tuple(role.removeprefix("demand.") for role in mapping if role.startswith("demand."))
    demand = np.nan_to_num(np.stack([column[f"demand.{name}"] for name in resources], axis=1))
    bad += _senseless(lines, column, mapping, demand)
    skipped, left_out = judge_bad_lines(path, bad, len(frame), reading)
    usable = _left_out(~np.isin(lines, [line.line for line in bad]), _unusable(column, demand), skipped)
    if reading.partition is not None:
        usable &= _of_partition(path, named, usable, reading.partition)
    elif by := _told_apart_by(named):
        notes += pooled(by, Counter(map(str, named[by][usable])))
    if reading.nodes:
        capacity, speed = nodes_of(reading.nodes, resources, mapping)
        fits = np.any([(demand <= kind).all(axis=1) for kind in np.unique(capacity, axis=0)], axis=0)
        usable = _left_out(usable, {"larger than any node (gangs)": ~fits}, skipped)
    if not usable.any():
        raise WorkloadError(f"{path}: no job left, {skipped}; see --columns, --nodes and --partition")
    keep = np.flatnonzero(usable)[np.argsort(column["submit"][usable], kind="stable")]
    if not reading.nodes:
        capacity, speed = _pool(path, column, demand, keep), np.ones(1)
        amounts = ", ".join(f"{amount:g} {name}" for name, amount in zip(resources, capacity[0], strict=True))
        notes.append(f"the cluster is one node with {amounts}, the most in use at once; --nodes gives its own")
    some, used = capacity.any(axis=1), capacity.any(axis=0)  # a resource that no node has nobody who is left demands
    cluster = Cluster(capacity[some][:, used], speed[some], tuple(np.array(resources)[used].tolist()))
    check_span(f"{path}: submit={mapping['submit']}", column["submit"][keep])
    run_time, limit = column["duration"], column.get("limit", np.zeros(len(frame)))
    jobs = Jobs(
        submit_time=column["submit"],
        run_time=run_time,
        requested_time=np.where(limit > 0, limit, run_time),
        demand=demand[:, used],
        **{role: _codes(named.get(role), len(frame)) for role in ("user", "group", "executable", "queue")},
        wait_time=np.maximum(column.get("start", column["submit"]) - column["submit"], 0.0),
        job_id=_job_ids(named.get("id"), len(frame)),
    )[keep]
    return Trace(jobs, cluster, skipped, notes + left_out)


def _senseless(
    lines: np.ndarray, column: dict[str, np.ndarray], mapping: dict[str, str], demand: np.ndarray
) -> list[BadLine]:
    """Rows whose numbers make no sense."""
    bad: list[BadLine] = []
    for role in column.keys() & {*MOMENTS}:
        problem = f"{role}={mapping[role]}: no time in seconds, of milliseconds it seems; write {mapping[role]}/1000"
        bad += bad_rows(lines, np.greater(np.abs(column[role]), MILLISECONDS), "no time in seconds", problem)
    bad += bad_rows(lines, np.isnan(column["submit"]), "no submit time", f"submit={mapping['submit']} is empty")
    bad += bad_rows(lines, column["duration"] < 0, "negative time", "it ends before it starts")
    return bad + bad_rows(lines, demand.min(axis=1) < 0, "negative amount", "a demand is negative")


def _unusable(column: dict[str, np.ndarray], demand: np.ndarray) -> dict[str, np.ndarray]:
    """bool[N] for each reason why a row does not describe a job which ran, and which the simulator knows."""
    return {
        "never started": np.isnan(column.get("start", column["submit"])),
        "not ended": np.isnan(column["duration"]),
        "no run time": column["duration"] <= 0,
        "no demand": ~(demand > 0).any(axis=1),
        "on several nodes (gangs)": column.get("nodes", np.zeros(len(demand))) > 1,
    }


def _left_out(usable: np.ndarray, reasons: dict[str, np.ndarray], skipped: dict[str, int]) -> np.ndarray:
    """The rows that none of the reasons applies to; the others are counted by their first one."""
    for reason, applies in reasons.items():
        if count := int((usable & applies).sum()):
            skipped[reason] = count
        usable = usable & ~applies
    return usable


def _pool(path: str, column: dict[str, np.ndarray], demand: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """float64[1, R]: one node with as much as ever was in use at once."""
    if "start" not in column:
        raise WorkloadError(f"{path}: how large is the cluster? give --nodes nodes.csv, or --nodes 8xcpu=32,memory=128")
    start = column["start"][keep]
    end = start + column["duration"][keep]
    return np.array([[most_at_once(start, end, amount) for amount in demand[keep].T]])


def _told_apart_by(named: dict[str, np.ndarray]) -> str | None:
    return next((by for by in ("partition", "queue") if by in named), None)


def _mapping(path: str, words: Sequence[str], frame: pd.DataFrame) -> tuple[dict[str, str], list[str]]:
    """Role -> expression, and a note where the names of the columns decided.

    Raises:
        WorkloadError: something is named that there is not, or something that is needed is not named.
    """
    found: dict[str, str] = {}
    for word in words:
        role, given, expression = word.partition("=")
        if given:
            found[role] = expression
        elif word in BUILT_IN:
            found |= BUILT_IN[word]
        elif os.path.isfile(word):
            found |= _mapping_file(word)
        else:
            known = ", ".join(BUILT_IN)
            raise WorkloadError(f"--columns {word}: no role=column, no file, and no format known by name ({known})")
    notes = []
    if not words:
        if {"JobIDRaw", "JobID"} & {*frame.columns}:
            advice = "`python slurm_agent.py export --inputs FILE --output my_cluster.swf` makes a trace of it"
            raise WorkloadError(f"{path}: a table of sacct, it seems; {advice}")
        plain = {column.lower(): column for column in reversed(frame.columns)}
        known_names = {**ROLES, **{f"demand.{name}": names for name, names in AMOUNTS.items()}}
        for role, names in known_names.items():
            if name := next((name for name in (role, *names) if name in plain), None):
                found[role] = plain[name]
        found |= {plain[name]: plain[name] for name in plain if name.startswith("demand.")}
        notes.append("columns by their names: " + ", ".join(f"{role}={column}" for role, column in found.items()))
    for role in found:
        if role not in ROLES and not re.fullmatch(r"(demand|node)\.\S+", role):
            roles = f"{', '.join(ROLES)}, demand.NAME, node.NAME"
            raise WorkloadError(f"--columns {role}={found[role]}: {role} is no role; the roles are {roles}")
    amounts = any(role.startswith("demand.") for role in found)
    for missing, what in (
        ("submit" not in found, "the time of submission (submit)"),
        (not {"end", "duration"} & found.keys(), "the end or the duration (end, duration)"),
        (not amounts, "what a job takes (demand.NAME)"),
    ):
        if missing:
            raise WorkloadError(f"{path}: no column is {what}; {ADVICE} ({columns_of(frame)})")
    return found, notes


def _mapping_file(path: str) -> dict[str, str]:
    """A mapping in YAML or JSON: `submit: creation_time`, and `demand: {cpu: cpu_milli/1000}` or `demand.cpu: ...`."""
    import yaml

    try:
        with open(path) as file:
            found = yaml.safe_load(file)
        flat: dict[str, str] = {}
        for role, value in found.items():
            inner = value if isinstance(value, dict) else {None: value}
            flat |= {str(role) if key is None else f"{role}.{key}": str(column) for key, column in inner.items()}
        return flat
    except (AttributeError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = str(error).replace("\n", " ")
        raise WorkloadError(f"--columns {path}: no mapping in YAML, as in `submit: creation_time` ({why})") from None


def _codes(names: np.ndarray | None, count: int) -> np.ndarray:
    """int32[N]: numbers for names, in order of appearance, -1 where there is none."""
    if names is None:
        return np.full(count, -1, np.int32)
    import pandas as pd

    return pd.factorize(names)[0].astype(np.int32)


def _job_ids(names: np.ndarray | None, count: int) -> np.ndarray:
    """int64[N]: the names, if all are whole numbers, else the numbers of the rows, from 1."""
    if names is not None and all(name is not None and re.fullmatch(r"[0-9]{1,18}", name) for name in names):
        return np.array([int(name) for name in names], np.int64)
    return np.arange(1, count + 1)


def _of_partition(path: str, named: dict[str, np.ndarray], usable: np.ndarray, partition: str) -> np.ndarray:
    by = _told_apart_by(named)
    if by is None:
        raise WorkloadError(f"{path}: --partition {partition}: name the column, as in --columns partition=COLUMN")
    if not (found := usable & (named[by] == partition)).any():
        known = ", ".join(sorted({str(name) for name in named[by][usable]})[:20])
        raise WorkloadError(f"{path}: --partition {partition}: no job has this {by}; there are {known}")
    return found
