"""What the decision service has recorded (serve.py --record), as jobs.

A job is submitted, started and finished somewhere in a row of states: `_follow` goes through them.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
import numpy as np
from msgspec import Meta

from workloads.jobs import Cluster, Jobs, Trace, WorkloadError

# What is read of a line: parts of the service's State and Answer (see deployment/contract.py). They are written down
# once more, and looser, because imports only point downwards, and because a record outlives the service: what another
# version has added or left out does not matter as long as these are there.
Id = str | int
Amounts = Annotated[list[Annotated[float, Meta(ge=0)]], Meta(min_length=1)]
Duration = Annotated[float, Meta(gt=0)]


class RecordedNode(TypedDict):
    name: Id
    capacity: Amounts
    speed: NotRequired[float]


class RecordedJob(TypedDict):
    id: Id
    demand: Amounts
    requested_time: Duration
    user: NotRequired[Id | None]
    executable: NotRequired[Id | None]


class RecordedQueued(RecordedJob):
    submit_time: float


class RecordedRunning(RecordedJob):
    node: Id
    start_time: float
    submit_time: NotRequired[float | None]


class RecordedFinished(TypedDict):
    id: NotRequired[Id | None]
    run_time: Duration


class RecordedState(TypedDict):
    now: float
    nodes: list[RecordedNode]
    queued: NotRequired[list[RecordedQueued]]
    running: NotRequired[list[RecordedRunning]]
    finished: NotRequired[list[RecordedFinished]]
    resources: NotRequired[list[str] | None]


class RecordedStart(TypedDict):
    job: Id
    node: Id


class RecordedDecision(TypedDict):
    start: list[RecordedStart]


class Recorded(TypedDict):
    state: RecordedState
    decision: RecordedDecision


NO_RECORD = "delete the line, or give a file that serve.py --record has written"


def read_decisions(path: str | os.PathLike[str]) -> Trace:
    """The recorded jobs by submit time, the cluster as it was last, and how many were skipped for which reason.

    Rotated parts (`path.1` is the latest) are read first. A job's run time is the one that it was reported with as
    finished; else it ran until the first state in which it no longer does.

    Raises:
        WorkloadError: the file cannot be read, a line of it is something else or contradicts itself, or no job in it
            has run from start to end.
    """
    path, skipped = Path(path), Counter[str]()
    jobs: dict[Id, dict[str, Any]] = {}  # the fields that states had of a job and, once known, its run_time and speed
    started: set[Id] = set()
    cluster: Cluster | None = None
    for where, record in _recorded(path, skipped):
        try:
            cluster = _recorded_cluster(record["state"], cluster)
            started = _follow(jobs, started, record["state"], record["decision"])
        except KeyError as error:  # the only ones that are looked up
            raise WorkloadError(f"{where}: {error} is no node, or no queued job, of this state; {NO_RECORD}") from None
        except ValueError as error:
            raise WorkloadError(f"{where}: {error}; {NO_RECORD}") from None
    return _recorded_jobs(path, jobs, cluster, skipped)


def _recorded(path: Path, skipped: Counter[str]) -> Iterator[tuple[str, Recorded]]:
    """(file and line, what it says) in order; lines that a kill has cut short are counted."""
    parts = [part for part in path.parent.glob(f"{path.name}.*") if part.suffix[1:].isdigit()]
    for part in [*sorted(parts, key=lambda part: -int(part.suffix[1:])), path]:
        try:
            with part.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    where = f"{part}: line {number}"
                    if line.isspace():
                        continue
                    if record := _record_of(line, where):
                        yield where, record
                    else:
                        skipped["record cut short"] += 1
        except OSError as error:
            raise WorkloadError(f"{part}: {error.strerror}; give a file that serve.py --record has written") from error


def _record_of(line: bytes, where: str) -> Recorded | None:
    """What the line says, None if it is cut short."""
    try:
        found = msgspec.json.decode(line)
    except (ValueError, RecursionError):
        return None
    try:
        return msgspec.convert(found, Recorded)
    except msgspec.ValidationError as error:
        raise WorkloadError(f"{where}: {error}; {NO_RECORD}") from None


def _recorded_cluster(state: RecordedState, before: Cluster | None) -> Cluster:
    """The cluster in this state; `before` is the one in the line before.

    Raises:
        ValueError: it is none, or jobs or the line before have other resources.
    """
    rows = [node["capacity"] for node in state["nodes"]]
    rows += [job["demand"] for job in (*state.get("queued", ()), *state.get("running", ()))]
    counts = {len(row) for row in rows} | ({before.capacity.shape[1]} if before else set())
    if len(counts) != 1:
        raise ValueError(f"nodes and jobs of {sorted(counts)} resources, here and in the line before")
    names = tuple(state.get("resources") or (f"resource {r}" for r in range(*counts)))
    speed = np.array([node.get("speed", 1.0) for node in state["nodes"]])
    return Cluster(np.array(rows[: len(speed)]), speed, names)


def _follow(
    jobs: dict[Id, dict[str, Any]], started: set[Id], state: RecordedState, decision: RecordedDecision
) -> set[Id]:
    """Add to `jobs` what a state says of them. Returns those that run then, `started` ran before.

    Raises:
        KeyError: a job runs or starts on no node of the state, or one starts that is not queued in it.
    """
    now, speed = state["now"], {node["name"]: node.get("speed", 1.0) for node in state["nodes"]}
    queued = {job["id"]: job for job in state.get("queued", ())}
    running = {job["id"]: job for job in state.get("running", ())}
    for key, job in {**queued, **running}.items():
        known = {field: value for field, value in job.items() if value is not None}
        jobs.setdefault(key, {}).update(known)
    for finished in state.get("finished", ()):
        if (name := finished.get("id")) is not None and name in jobs:
            jobs[name]["run_time"] = finished["run_time"]
    for key in started & queued.keys():  # nobody did what was decided (in shadow), so deciding it again tells nothing
        jobs[key]["ignored"] = True
    for key in started - running.keys() - queued.keys():
        jobs[key].setdefault("run_time", (now - jobs[key]["start_time"]) * jobs[key]["speed"])
    for key, runs in running.items():
        jobs[key]["speed"] = speed[runs["node"]]
    for start in decision["start"]:
        jobs[queued[start["job"]]["id"]] |= {"start_time": now, "speed": speed[start["node"]]}
    return running.keys() | {start["job"] for start in decision["start"] if "ignored" not in jobs[start["job"]]}


def _recorded_jobs(
    path: Path, found: dict[Id, dict[str, Any]], cluster: Cluster | None, skipped: Counter[str]
) -> Trace:
    """Those that have run, in arrays, on the last cluster."""
    ran = {key: job for key, job in found.items() if job.get("run_time", 0) > 0}
    skipped["not run to the end"] += len(found) - len(ran)
    fits = {key: job for key, job in ran.items() if cluster and _fits(job["demand"], cluster)}
    skipped["larger than any node"] += len(ran) - len(fits)
    reasons = {reason: count for reason, count in skipped.items() if count}
    if cluster is None or not fits:
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "it is empty"
        raise WorkloadError(f"{path}: no job in it has run from start to end ({why}); record with serve.py, for longer")
    for job in fits.values():
        job["start_time"] = job.get("start_time", job.get("submit_time"))
        if job.get("submit_time") is None:
            job["submit_time"] = job["start_time"]
    keys = sorted(fits, key=lambda key: fits[key]["submit_time"])
    submit, start, run, requested = (
        np.array([fits[key][field] for key in keys], float)
        for field in ("submit_time", "start_time", "run_time", "requested_time")
    )
    users, executables = (_codes([fits[key].get(field) for key in keys]) for field in ("user", "executable"))
    unknown = np.full(len(keys), -1, np.int32)
    jobs = Jobs(
        submit, run, requested, np.array([fits[key]["demand"] for key in keys], float), users, unknown, executables,
        unknown, start - submit, np.arange(1, len(keys) + 1),
    )  # fmt: skip
    return Trace(jobs, cluster, reasons)


def _fits(demand: list[float], cluster: Cluster) -> bool:
    """Whether some node of the cluster is large enough."""
    return bool((np.array(demand) <= cluster.capacity).all(axis=1).any())


def _codes(names: Sequence[Any]) -> np.ndarray:
    """int32[...]: numbers for names, in order of appearance, -1 for None."""
    codes: dict[Any, int] = {None: -1}
    return np.array([codes.setdefault(name, len(codes) - 1) for name in names], np.int32)
