"""Where jobs and clusters come from: SWF traces, recorded decisions, the Lublin-Feitelson model, generated clusters.

    python -c "import workloads; print(workloads.load_workload('cloud').cluster)"
    python -c "import workloads; print(workloads.load_workload('my_cluster.swf.gz', 'test').segments)"

Times are seconds. N counts jobs, M nodes, R resources. A run time is what a job takes on a node of speed 1.
"""

import codecs
import gzip
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import ArrayLike

DAY = 86_400.0
SPLITS = {"train": 0, "validation": 1, "test": 2}


class WorkloadError(ValueError):
    """Input that cannot be used. The message is one line: the file, the line, the field, the remedy."""


@dataclass(frozen=True)
class Jobs:
    """N jobs as a structure of arrays. Times in seconds, demand in the units of `Cluster.capacity`."""

    submit_time: np.ndarray  # float64[N]
    run_time: np.ndarray  # float64[N], > 0, on a node of speed 1
    requested_time: np.ndarray  # float64[N], > 0, the user's estimate of the run time (-1 in published sequences)
    demand: np.ndarray  # float64[N, R]
    user: np.ndarray  # int32[N], -1 where unknown; so are the next three
    group: np.ndarray  # int32[N]
    executable: np.ndarray  # int32[N]
    queue: np.ndarray  # int32[N]
    wait_time: np.ndarray  # float64[N], as the trace recorded it, 0 where unknown: tells when past jobs had ended
    job_id: np.ndarray  # int64[N]

    def __len__(self) -> int:
        return len(self.submit_time)

    def __getitem__(self, index: slice | np.ndarray) -> "Jobs":
        return Jobs(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def concatenate(parts: Sequence["Jobs"]) -> "Jobs":
        """One after the other, as they are."""
        return Jobs(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Jobs)))


@dataclass(frozen=True)
class Cluster:
    """M nodes with R resources each. An HPC machine is one node that holds all its processors."""

    capacity: np.ndarray  # float64[M, R]
    speed: np.ndarray  # float64[M]: a job takes run_time / speed
    resources: tuple[str, ...]

    def __post_init__(self) -> None:
        if np.ndim(self.capacity) != 2 or len(self.capacity) == 0:
            raise WorkloadError(f"cluster: capacity has shape {np.shape(self.capacity)}; give one row per node, [M, R]")
        if np.shape(self.speed) != (len(self.capacity),) or len(self.resources) != self.capacity.shape[1]:
            raise WorkloadError(
                f"cluster: capacity is {self.capacity.shape}, but there are {np.size(self.speed)} speeds and "
                f"{len(self.resources)} resources; give one speed per node and one name per resource"
            )
        if not (np.isfinite(self.speed).all() and (self.speed > 0).all()):
            raise WorkloadError("cluster: a speed is not a positive number; leave out nodes that do not work")
        if not (np.isfinite(self.capacity).all() and (self.capacity >= 0).all()):
            raise WorkloadError("cluster: a capacity is negative or not a number; use 0 for what a node lacks")
        if not self.capacity.any(axis=0).all() or not self.capacity.any(axis=1).all():
            raise WorkloadError("cluster: a node or a resource has no capacity at all; leave it out")

    @cached_property
    def grid(self) -> np.ndarray:
        """float64[R], fine enough for anyone: sums of multiples of it are exact whatever the order of the events."""
        return 2.0 ** (np.ceil(np.log2(self.capacity.max(0))) - 40)

    @cached_property
    def on_grid(self) -> "Cluster":
        """The cluster with its capacity in multiples of its grid."""
        capacity = np.rint(self.capacity / self.grid) * self.grid
        return self if (capacity == self.capacity).all() else replace(self, capacity=capacity)


@dataclass(frozen=True)
class Workload:
    """A cluster and the jobs of one split.

    The split's jobs are `jobs[a:b]` for each row (a, b) of `segments`, int64[S, 2]; submit times never decrease
    within one. A trace has one segment, and `jobs` holds all of it: what comes before the segment is the users'
    history. A generated workload has independent runs that start at about time 0 and share no users.
    """

    name: str
    cluster: Cluster
    jobs: Jobs
    segments: np.ndarray
    skipped: dict[str, int]  # why a trace's line was left out -> how many were

    def report(self) -> None:
        """Say on stderr how many jobs were left out, and why; and where requests give the run times away."""
        if self.skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
            print(f"{self.name}: jobs skipped: {reasons}", file=sys.stderr)
        exact = (self.jobs.requested_time == self.jobs.run_time).mean()
        if exact > 0.1:
            print(
                f"{self.name}: {exact:.0%} of the jobs request exactly their run time, as in a trace without requests: "
                "rules and policies then know what no scheduler can, and gains are too large",
                file=sys.stderr,
            )


def workload_name(workload: str) -> str:
    """What runs are called after: the preset's name, or the trace's without folder and endings."""
    return Path(workload).name.removesuffix(".gz").removesuffix(".swf").removesuffix(".jsonl")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which then takes the place of `path`: killed at any instant, the old or the new is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: Path) -> None:
    """Before the work, not after it.

    Raises:
        ValueError: no file can be written there.
    """
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ValueError(f"--output {path}: a folder; give the name of a file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path}: the folder cannot be written to; give another")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def load_workload(
    name: str, split: str = "train", *, seed: int = 0, runs: int | None = None, run_jobs: int | None = None
) -> Workload:
    """The named split of a preset or of a trace.

    Args:
        name: one of PRESETS, or the path of an SWF trace, plain or gzipped, or of what serve.py has recorded (.jsonl).
        split: "train", "validation", "test", or "all" of them. A trace is cut by order of submission at 60 % and 70 %;
            the splits of a preset have disjoint seeds.
        seed, runs, run_jobs: for presets only: which runs, how many, and how many jobs each.

    Raises:
        WorkloadError: the name is unknown or the trace unusable; the message says what to do.
    """
    if split not in (*SPLITS, "all"):
        raise WorkloadError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}, all")
    if name in PRESETS:
        return _generated(name, split, seed, runs, run_jobs)
    if not os.path.exists(name):
        raise WorkloadError(f"{name}: no such file or preset; the presets are {', '.join(PRESETS)}")
    jobs, cluster, skipped = read_decisions(name) if name.endswith(".jsonl") else jobs_from_swf(read_swf(name))
    cuts = {"train": (0.0, 0.6), "validation": (0.6, 0.7), "test": (0.7, 1.0), "all": (0.0, 1.0)}[split]
    first, last = (int(cut * len(jobs)) for cut in cuts)
    if first == last:
        raise WorkloadError(f"{name}: its {len(jobs)} jobs leave none for the {split} split; use a longer trace")
    return Workload(name, cluster, jobs, np.array([[first, last]]), skipped)


def offered_load(jobs: Jobs, cluster: Cluster) -> float:
    """The work that arrives per second over what the cluster can do, for the most loaded resource.

    `jobs` is one run: the time is that between its first and its last submission.
    """
    span = jobs.submit_time.max() - jobs.submit_time.min()
    work = jobs.run_time @ jobs.demand
    return float((work / (cluster.speed @ cluster.capacity)).max() / span) if span > 0 else math.inf


def scale_load(jobs: Jobs, factor: float) -> Jobs:
    """The same jobs, arriving `factor` times as fast; the first submit time stays."""
    if not factor > 0:
        raise WorkloadError(f"load factor {factor}: give a positive number")
    first = jobs.submit_time.min()
    return replace(jobs, submit_time=first + (jobs.submit_time - first) / factor)


def at_loads(workload: Workload, factors: Sequence[float]) -> Workload:
    """The workload's segments once for each factor by which arrivals are compressed (users are kept apart)."""
    users = int(workload.jobs.user.max()) + 1
    parts, segments = [], []
    for copy, factor in enumerate(factors):
        jobs = scale_load(workload.jobs, factor)
        parts.append(replace(jobs, user=np.where(jobs.user >= 0, jobs.user + copy * users, -1).astype(np.int32)))
        segments.append(workload.segments + copy * len(jobs))
    return replace(workload, jobs=Jobs.concatenate(parts), segments=np.concatenate(segments))


WEEK = 7 * 86_400.0


def resampled(
    workload: Workload, seed: int, *, runs: int = 64, run_jobs: int = 3_000, loads: tuple[float, float] = (0.9, 1.3)
) -> Workload:
    """New runs of at most `run_jobs` jobs each, put together from weeks drawn from the workload's segments at random
    (with replacement, each from its beginning; of a week with more jobs than a run, all that follows a random one),
    with arrivals compressed by a factor drawn from `loads`, one a run. A workload of a single week with at most
    `run_jobs` jobs gives the same run each time, but for the factor.

    A trace has only so many busy times; what is fitted to one order of its weeks need not hold for another.
    """
    rng = np.random.default_rng(seed)
    weeks = [week for begin, end in workload.segments for week in _weeks(workload.jobs[begin:end])]
    parts: list[Jobs] = []
    segments, now, count = [], 0.0, 0
    run_jobs = min(run_jobs, sum(len(week) for week in weeks))
    for _ in range(runs):
        first, factor = count, float(np.exp(rng.uniform(*np.log(loads))))
        while count < first + run_jobs:
            week = weeks[rng.integers(len(weeks))]
            if len(week) > run_jobs:
                week = week[int(rng.integers(len(week) - run_jobs)) :]
                week = replace(week, submit_time=week.submit_time - week.submit_time[0])
            week = week[: first + run_jobs - count]
            parts.append(replace(week, submit_time=now + week.submit_time / factor))
            now += max(WEEK, week.submit_time.max(initial=0.0)) / factor
            count += len(week)
        segments.append((first, count))
    return replace(workload, jobs=Jobs.concatenate(parts), segments=np.array(segments))


def _weeks(jobs: Jobs) -> list[Jobs]:
    """The jobs of each whole week, submit times counted from its beginning; the rest goes with the last one."""
    since = jobs.submit_time - jobs.submit_time.min()
    count = max(1, int(since.max() // WEEK))
    cuts = np.searchsorted(since, WEEK * np.arange(1, count))
    bounds = [0, *cuts, len(jobs)]
    return [
        replace(jobs[a:b], submit_time=since[a:b] - WEEK * i) for i, (a, b) in enumerate(itertools.pairwise(bounds))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Traces in the Standard Workload Format: https://www.cs.huji.ac.il/labs/parallel/workload/swf.html
# ---------------------------------------------------------------------------------------------------------------------

# fmt: off
SWF_FIELDS = (
    "job number", "submit time", "wait time", "run time", "allocated processors", "average CPU time", "used memory",
    "requested processors", "requested time", "requested memory", "status", "user", "group", "executable", "queue",
    "partition", "preceding job", "think time",
)
# fmt: on
SWF_TIMES = [1, 2, 3, 8]
SWF_IDENTIFIERS = [0, 11, 12, 13, 14]
# Nothing that a scheduler needs comes after the requested time.
SWF_LEAST_FIELDS = 9


@dataclass(frozen=True)
class SWF:
    """A trace as it is written: L job lines, unknown values -1."""

    path: str
    header: dict[str, str]  # from the comment lines `; Key: value`, keys in lower case, the first of each
    max_procs: int  # the header's MaxProcs, 0 where it has none
    max_nodes: int  # the header's MaxNodes, 0 where it has none
    records: np.ndarray  # float64[L, 18]
    lines: np.ndarray  # int64[L]: each record's line in the file, from 1


def read_swf(path: str | os.PathLike[str]) -> SWF:
    """Read an SWF trace, plain or gzipped.

    Raises:
        WorkloadError: the file cannot be read, is binary, cut short or without jobs, or a line of it is malformed.
    """
    path = os.fspath(path)
    text = _read_lines(path)
    numbered = [(number, line) for number, line in enumerate(text, 1) if line and not line.isspace()]
    header = _swf_header(line for _, line in numbered if line.lstrip().startswith(";"))
    body = [(number, line) for number, line in numbered if not line.lstrip().startswith(";")]
    if not body:
        raise WorkloadError(f"{path}: line {len(text)}: the end, and no job yet; give a trace with one line per job")
    lines = np.array([number for number, _ in body])
    try:
        records = np.loadtxt([line for _, line in body], ndmin=2, comments=None)
    except ValueError:  # some line differs from the first: the slow way mends it or says which
        records = _parse_lines(path, body)
    if records.shape[1] != len(SWF_FIELDS):
        records = _parse_lines(path, body)
    _check_records(path, records, lines)
    max_procs, max_nodes = (_first_integer(header.get(key, "")) for key in ("maxprocs", "maxnodes"))
    return SWF(path, header, max_procs, max_nodes, records, lines)


def _read_lines(path: str) -> list[str]:
    try:
        data = Path(path).read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise WorkloadError(f"{path}: damaged or truncated gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise WorkloadError(f"{path}: {error.strerror}; give the path of an SWF trace") from error
    if (nul := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, nul) + 1
        raise WorkloadError(f"{path}: line {line}: binary data; give an SWF trace, plain text or gzipped")
    # Comments may hold anything; Latin-1 never fails. Bytes split at line ends only, text at form feeds too.
    return [line.decode("latin-1") for line in data.removeprefix(codecs.BOM_UTF8).splitlines()]


def _swf_header(comments: Iterable[str]) -> dict[str, str]:
    header: dict[str, str] = {}
    for comment in comments:
        # Archives write "MaxProcs: 128", "MaxProcs:128", and now and then "MaxProcs 128".
        if found := re.match(r"\s*;+\s*(?:(\w+)\s*:|(max\w+)\s)\s*(.*)", comment, re.IGNORECASE):
            header.setdefault((found[1] or found[2]).lower(), found[3].strip())
    return header


def _first_integer(text: str) -> int:
    found = re.search(r"-?\d{1,15}", re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))  # 1,024 is one number
    return max(0, int(found[0])) if found else 0


def _parse_lines(path: str, body: list[tuple[int, str]]) -> np.ndarray:
    """The slow way, float64[L, 18]: pads short lines with -1, names the first that is malformed."""
    records = np.full((len(body), len(SWF_FIELDS)), -1.0)
    usual = len(body[0][1].split())
    for row, (number, line) in enumerate(body):
        values = line.split()
        if row == len(body) - 1 and len(values) < usual:
            raise WorkloadError(
                f"{path}: line {number}: the last line is cut short, {len(values)} of {usual} fields; "
                "fetch the file again or delete the line"
            )
        if not SWF_LEAST_FIELDS <= len(values) <= len(SWF_FIELDS):
            raise WorkloadError(
                f"{path}: line {number}: {len(values)} fields where SWF has {len(SWF_FIELDS)}; "
                "correct or delete the line, or give an SWF trace"
            )
        for column, value in enumerate(values):
            try:
                records[row, column] = float(value)
            except ValueError:
                raise _bad_field(path, number, column, f"{value[:40]!r} is not a number") from None
    return records


def _check_records(path: str, records: np.ndarray, lines: np.ndarray) -> None:
    times, identifiers = (np.isin(np.arange(len(SWF_FIELDS)), columns) for columns in (SWF_TIMES, SWF_IDENTIFIERS))
    unknown = (records == -1) & (np.arange(len(SWF_FIELDS)) != 1)  # SWF lacks no submit time
    for wrong, problem in (
        (~np.isfinite(records), "is not a finite number"),
        ((records < 0) & ~unknown & times, "is a negative time"),
        ((np.abs(records) >= 2**31) & identifiers, "does not fit in 32 bits"),
    ):
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise _bad_field(path, lines[row], column, f"{records[row, column]:g} {problem}")


def _bad_field(
    path: str, line: int, column: int, problem: str, remedy: str = "correct or delete the line"
) -> WorkloadError:
    return WorkloadError(f"{path}: line {line}: field {column + 1} ({SWF_FIELDS[column]}): {problem}; {remedy}")


def jobs_from_swf(swf: SWF) -> tuple[Jobs, Cluster, dict[str, int]]:
    """The trace's jobs by submit time, its machine as one node, and how many lines were skipped for which reason.

    The machine has MaxProcs processors, else MaxNodes, else as many as the largest job asks for.

    Raises:
        WorkloadError: a job is larger than the machine, or no job is left.
    """
    field = {name: swf.records[:, column] for column, name in enumerate(SWF_FIELDS)}
    allocated, requested = field["allocated processors"], field["requested processors"]
    processors = np.where(requested > 0, requested, allocated)
    keep, skipped = _usable(swf, processors)
    machine = swf.max_procs or swf.max_nodes or processors[keep].max()
    _check_sizes(swf, processors, keep, machine)

    keep = keep[np.argsort(field["submit time"][keep], kind="stable")]
    column = {name: values[keep] for name, values in field.items()}
    jobs = Jobs(
        submit_time=column["submit time"],
        run_time=column["run time"],
        requested_time=np.where(column["requested time"] > 0, column["requested time"], column["run time"]),
        demand=processors[keep, None],
        **{name: column[name].astype(np.int32) for name in ("user", "group", "executable", "queue")},
        wait_time=np.maximum(column["wait time"], 0.0),
        job_id=column["job number"].astype(np.int64),
    )
    return jobs, Cluster(np.array([[float(machine)]]), np.ones(1), ("processors",)), skipped


def _usable(swf: SWF, processors: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Rows that describe a job which ran, and the other rows' count by reason."""
    run_time, status = swf.records[:, 3], swf.records[:, 10]
    reasons = {
        "part of a checkpointed job": np.isin(status, (2, 3, 4)),  # the whole job has a line of its own
        "cancelled before it started": (status == 5) & (run_time <= 0),
        "no run time": run_time <= 0,
        "no processors": processors <= 0,
    }
    usable, skipped = np.ones(len(run_time), bool), {}
    for reason, applies in reasons.items():
        if count := int((usable & applies).sum()):
            skipped[reason] = count
        usable &= ~applies
    if not usable.any():
        raise WorkloadError(f"{swf.path}: line {swf.lines[-1]}: no job left, {skipped}; give a trace of jobs that ran")
    return np.flatnonzero(usable), skipped


def _check_sizes(swf: SWF, processors: np.ndarray, keep: np.ndarray, machine: float) -> None:
    too_large = keep[processors[keep] > machine]
    if len(too_large):
        row = too_large[0]
        column = 7 if swf.records[row, 7] > 0 else 4
        source = "MaxProcs" if swf.max_procs else "MaxNodes"
        problem = f"{processors[row]:g} processors, but {source} in the header says that the machine has {machine:g}"
        raise _bad_field(swf.path, swf.lines[row], column, problem, f"correct {source} or delete the line")


def write_swf(path: str | os.PathLike[str], jobs: Jobs, cluster: Cluster) -> None:
    """Write jobs as an SWF trace, gzipped if the name ends in .gz; the file appears whole or not at all.

    SWF knows one machine: the first resource becomes processors, the second (in GB) memory in KB per processor, and
    nodes and speeds are lost.
    """
    path = Path(path)
    columns = np.full((len(SWF_FIELDS), len(jobs)), -1.0)
    columns[:5] = jobs.job_id, jobs.submit_time, jobs.wait_time, jobs.run_time, jobs.demand[:, 0]
    columns[7:9] = jobs.demand[:, 0], jobs.requested_time
    if len(cluster.resources) > 1:
        columns[9] = np.round(jobs.demand[:, 1] * 2**20 / np.maximum(jobs.demand[:, 0], 1))
    columns[10] = 1
    columns[11:15] = jobs.user, jobs.group, jobs.executable, jobs.queue
    header = (
        f"; Version: 2.2\n; Computer: {len(cluster.capacity)} node(s) with {', '.join(cluster.resources)}\n"
        f"; MaxJobs: {len(jobs)}\n; MaxRecords: {len(jobs)}\n"
        f"; MaxNodes: {len(cluster.capacity)}\n; MaxProcs: {cluster.capacity[:, 0].sum():.0f}\n"
    )
    text = header + "".join(" ".join(map(_shortest, row)) + "\n" for row in columns.T.tolist())
    data = text.encode()
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _shortest(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


# ---------------------------------------------------------------------------------------------------------------------
# What the decision service has recorded (serve.py --record)
# ---------------------------------------------------------------------------------------------------------------------


# What is read of a line: parts of serve.py's State and Answer.
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


def read_decisions(path: str | os.PathLike[str]) -> tuple[Jobs, Cluster, dict[str, int]]:
    """The recorded jobs by submit time, the cluster as it was last, and how many were skipped for which reason.

    Rotated parts (`path.1` is the latest) are read first. A job's run time is the one that it was reported with as
    finished; else it ran until the first state in which it no longer does.

    Raises:
        WorkloadError: the file cannot be read, a line of it is something else or contradicts itself, or no job in it
            has run from start to end.
    """
    path, skipped = Path(path), Counter[str]()
    jobs: dict[Id, dict[str, Any]] = {}
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
    rows += [job["demand"] for part in ("queued", "running") for job in state.get(part, ())]
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
    queued, running = ({job["id"]: job for job in state.get(part, ())} for part in ("queued", "running"))
    for key, job in (queued | running).items():
        known = {field: value for field, value in job.items() if value is not None}
        jobs.setdefault(key, {}).update(known)
    for job in state.get("finished", ()):
        if job.get("id") in jobs:
            jobs[job["id"]]["run_time"] = job["run_time"]
    for key in started & queued.keys():  # nobody did what was decided (in shadow), so deciding it again tells nothing
        jobs[key]["ignored"] = True
    for key in started - running.keys() - queued.keys():
        jobs[key].setdefault("run_time", (now - jobs[key]["start_time"]) * jobs[key]["speed"])
    for key, job in running.items():
        jobs[key]["speed"] = speed[job["node"]]
    for start in decision["start"]:
        jobs[queued[start["job"]]["id"]] |= {"start_time": now, "speed": speed[start["node"]]}
    return running.keys() | {start["job"] for start in decision["start"] if "ignored" not in jobs[start["job"]]}


def _recorded_jobs(
    path: Path, found: dict[Id, dict[str, Any]], cluster: Cluster | None, skipped: Counter[str]
) -> tuple[Jobs, Cluster, dict[str, int]]:
    """Those that have run, in arrays, on the last cluster."""
    ran = {key: job for key, job in found.items() if job.get("run_time", 0) > 0}
    skipped["not run to the end"] += len(found) - len(ran)
    fits = {key: job for key, job in ran.items() if (np.array(job["demand"]) <= cluster.capacity).all(axis=1).any()}
    skipped["larger than any node"] += len(ran) - len(fits)
    skipped = {reason: count for reason, count in skipped.items() if count}
    if not fits:
        why = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items()) or "it is empty"
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
    return jobs, cluster, skipped


def _codes(names: Sequence[Any]) -> np.ndarray:
    """int32[...]: numbers for names, in order of appearance, -1 for None."""
    codes: dict[Any, int] = {None: -1}
    return np.array([codes.setdefault(name, len(codes) - 1) for name in names], np.int32)


# ---------------------------------------------------------------------------------------------------------------------
# The batch jobs of Lublin & Feitelson, "The workload on parallel supercomputers: modeling the characteristics of rigid
# jobs", JPDC 63(11), 2003. Constants and algorithm as in their lublin99.c (Parallel Workloads Archive).
# ---------------------------------------------------------------------------------------------------------------------

SERIAL_SHARE, POWER_OF_TWO_SHARE = 0.2927, 0.6686
# log2 of a parallel job's size is uniform in [LOW, med], or (one in eight) in [med, hi = log2 of the machine].
SIZE_LOW, SIZE_MED_BELOW_HI, SIZE_LOW_SHARE = 1.2, 2.5, 0.875
# (shape, scale) of the natural logarithms of the times, which are drawn again above the limit.
SHORT_RUN, LONG_RUN, LOG_RUN_LIMIT = (6.57, 0.823), (639.1, 0.0156), 12.0
SHORT_SHARE_SLOPE, SHORT_SHARE_AT_ZERO = -0.003, 0.6986
GAP, LOG_GAP_LIMIT = (6.0415 * 1.0519, 0.8531), 13.0
# Arrivals over the day: a gamma density over half hours that starts at the 11th and wraps around midnight.
DAY_CURVE, DAY_START, BUCKETS = (6.1271, 5.2740), 11, 48


def lublin_jobs(rng: np.random.Generator, num_jobs: int, max_procs: int = 256, load: float = 0.85) -> Jobs:
    """Batch jobs of the Lublin-Feitelson model with users, habits and estimates, which the model leaves open.

    Sizes and run times are the model's, handed to users by `_by_habit`. The gaps between arrivals are stretched so
    that the expected offered load on `max_procs` processors is `load`; a single run's own varies around it.
    """
    size = _lublin_sizes(rng, num_jobs, max_procs)
    log_run = _truncated_gamma(rng, *_mixture(rng, size), LOG_RUN_LIMIT)
    run_time = np.maximum(1.0, np.floor(np.exp(log_run)))
    gap = np.exp(_truncated_gamma(rng, *(np.full(num_jobs, value) for value in GAP), LOG_GAP_LIMIT))
    stretch = _lublin_mean_work(max_procs) / (max_procs * load) / _gamma_mean_exp(*GAP, LOG_GAP_LIMIT)[1]
    submit_time = np.floor(_daily_clock(np.cumsum(gap * stretch)))
    return _jobs_of_users(rng, submit_time, size, size[:, None], run_time)


def _lublin_sizes(rng: np.random.Generator, num_jobs: int, max_procs: int) -> np.ndarray:
    """float64[N] processors; a machine that is no power of two cuts its largest jobs."""
    kind, stage, u = rng.random((3, num_jobs))
    high = math.log2(max_procs)
    medium = max(SIZE_LOW, high - SIZE_MED_BELOW_HI)
    log_size = np.where(stage < SIZE_LOW_SHARE, SIZE_LOW + (medium - SIZE_LOW) * u, medium + (high - medium) * u)
    log_size = np.where(kind <= SERIAL_SHARE + POWER_OF_TWO_SHARE, np.floor(log_size + 0.5), log_size)
    return np.where(kind <= SERIAL_SHARE, 1.0, np.minimum(np.floor(2**log_size + 0.5), max_procs))


def _short_share(size: np.ndarray) -> np.ndarray:
    return np.clip(SHORT_SHARE_SLOPE * size + SHORT_SHARE_AT_ZERO, 0.0, 1.0)


def _mixture(rng: np.random.Generator, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    short = rng.random(len(size)) <= _short_share(size)
    return np.where(short, SHORT_RUN[0], LONG_RUN[0]), np.where(short, SHORT_RUN[1], LONG_RUN[1])


def _truncated_gamma(rng: np.random.Generator, shape: np.ndarray, scale: np.ndarray, limit: float) -> np.ndarray:
    values = rng.gamma(shape, scale)
    while len(again := np.flatnonzero(values > limit)):
        values[again] = rng.gamma(shape[again], scale[again])
    return values


def _gamma_density(x: np.ndarray, shape: float, scale: float) -> np.ndarray:
    return np.exp((shape - 1) * np.log(x / scale) - x / scale - math.lgamma(shape)) / scale


@cache
def _gamma_mean_exp(shape: float, scale: float, limit: float) -> tuple[float, float]:
    """P(X <= limit) and E[exp X | X <= limit] of a gamma variable, by the midpoint rule."""
    step = limit / 20_000
    x = np.arange(step / 2, limit, step)
    mass = _gamma_density(x, shape, scale) * step
    return float(mass.sum()), float(mass @ np.exp(x) / mass.sum())


@cache
def _lublin_mean_work(max_procs: int) -> float:
    """E[size * run time] of the model in processor seconds, to about 0.3 %: sizes sampled, run times integrated."""
    size = _lublin_sizes(np.random.default_rng(0), 2**18, max_procs)
    (short_mass, short_mean), (long_mass, long_mean) = (
        _gamma_mean_exp(*g, LOG_RUN_LIMIT) for g in (SHORT_RUN, LONG_RUN)
    )
    short, long = _short_share(size) * short_mass, (1 - _short_share(size)) * long_mass
    return float((size * (short * short_mean + long * long_mean) / (short + long)).mean())


@cache
def _daily_weights() -> np.ndarray:
    """float64[48]: the rate of arrivals in each half hour from midnight, over the mean rate."""
    fine = DAY_START - 0.5 + (np.arange(BUCKETS * 100) + 0.5) / 100
    weights = _gamma_density(fine, *DAY_CURVE).reshape(BUCKETS, 100).sum(axis=1)
    return np.roll(weights / weights.mean(), DAY_START - 1)


def _daily_clock(seconds: np.ndarray) -> np.ndarray:
    """When the daily cycle has let pass as many arrivals as the mean rate does in so many seconds."""
    day, within = np.divmod(seconds, DAY)
    bucket = DAY / BUCKETS
    marks = np.concatenate(([0.0], np.cumsum(_daily_weights()))) * bucket
    return day * DAY + np.interp(within, marks, np.arange(BUCKETS + 1) * bucket)


# ---------------------------------------------------------------------------------------------------------------------
# Users. Their jobs resemble each other (Tsafrir, Etsion & Feitelson, "Backfilling using system-generated predictions
# rather than user runtime estimates", TPDS 18(6), 2007) and come in sessions (Zilber, Amit & Talby, "What is worth
# learning from parallel workloads?", ICS 2005).
# ---------------------------------------------------------------------------------------------------------------------

NUM_USERS, EXECUTABLES_EACH, USERS_PER_GROUP = 64, 4, 8
SESSION_JOBS, SESSION_OVERLAP = 8.0, 4.0
# Correlation of a job's rank in size and run time with what is typical of its executable.
SIZE_HABIT, RUN_HABIT = 0.98, 0.95
MINUTE, HOUR = 60, 3_600
TYPED_TIMES = np.array(
    [1, 2, 5, 10, 20, 30, *(MINUTE * m for m in (1, 2, 5, 10, 15, 20, 30, 45))]
    + [HOUR * h for h in (1, 2, 3, 4, 6, 8, 10, 12, 18, 24, 36, 48, 72, 96, 120, 168)],
    dtype=float,
)


def _jobs_of_users(
    rng: np.random.Generator, submit_time: np.ndarray, size: np.ndarray, demand: np.ndarray, run_time: np.ndarray
) -> Jobs:
    """Jobs at these times whose independent draws of (size, demand, run time) are handed to users of steady habits."""
    executable = _sessions(rng, len(submit_time))
    draw = _by_habit(rng, executable, size, run_time)
    user = executable // EXECUTABLES_EACH
    return Jobs(
        submit_time=submit_time,
        run_time=run_time[draw],
        requested_time=_typed_requests(rng, executable, run_time[draw]),
        demand=demand[draw],
        user=user.astype(np.int32),
        group=(user // USERS_PER_GROUP).astype(np.int32),
        executable=executable.astype(np.int32),
        queue=np.full(len(user), -1, np.int32),
        wait_time=np.zeros(len(user)),
        job_id=np.arange(1, len(user) + 1),
    )


def _sessions(rng: np.random.Generator, num_jobs: int) -> np.ndarray:
    """int64[N]: the executable of each job in order of submission; executable // EXECUTABLES_EACH is its user.

    Users are active by Zipf's law, have a favourite executable, and run it several times in a row, a few at a time.
    """
    activity = 1 / np.arange(1, NUM_USERS + 1)
    user = rng.choice(NUM_USERS, size=num_jobs, p=activity / activity.sum())
    choice = np.minimum(rng.geometric(0.5, size=num_jobs), EXECUTABLES_EACH) - 1
    session = np.repeat(np.arange(num_jobs), rng.geometric(1 / SESSION_JOBS, size=num_jobs))[:num_jobs]
    overlap = np.argsort(np.arange(num_jobs) + rng.exponential(SESSION_OVERLAP, num_jobs))
    return (user * EXECUTABLES_EACH + choice)[session[overlap]]


def _by_habit(rng: np.random.Generator, executable: np.ndarray, size: np.ndarray, run_time: np.ndarray) -> np.ndarray:
    """int64[N]: which draw of (size, run time) each job gets, so that an executable's jobs resemble each other.

    A permutation: the draws keep their distribution whatever the habits are, and with it the offered load. Each job
    has a rank it wishes for, mostly its executable's; sizes go by that rank, run times so among jobs of equal size.
    """

    def wish(habit: float) -> np.ndarray:
        typical = rng.normal(size=NUM_USERS * EXECUTABLES_EACH)
        return habit * typical[executable] + math.sqrt(1 - habit**2) * rng.normal(size=len(executable))

    own_size = np.empty_like(size)
    own_size[np.argsort(wish(SIZE_HABIT))] = np.sort(size)
    draw = np.empty(len(size), np.int64)
    draw[np.lexsort((wish(RUN_HABIT), own_size))] = np.lexsort((run_time, size))
    return draw


def _typed_requests(rng: np.random.Generator, executable: np.ndarray, run_time: np.ndarray) -> np.ndarray:
    """float64[N]: one round number for most jobs of an executable, well above its usual run time.

    Who knows that a job takes longer asks for more; one in four does not know.
    """
    order = np.lexsort((run_time, executable))
    _, first, kind, count = np.unique(executable[order], return_index=True, return_inverse=True, return_counts=True)
    usual = run_time[order][first + (0.9 * (count - 1)).astype(int)]
    typed = np.empty(len(run_time))
    typed[order] = _round_up(usual * np.exp(np.abs(rng.normal(0.0, 0.5, len(usual)))))[kind]
    unforeseen = rng.random(len(run_time)) < 0.25
    return np.where((run_time <= typed) | unforeseen, typed, _round_up(run_time))


def _round_up(seconds: np.ndarray) -> np.ndarray:
    slot = np.minimum(np.searchsorted(TYPED_TIMES, seconds), len(TYPED_TIMES) - 1)
    return np.maximum(TYPED_TIMES[slot], np.ceil(seconds))


# ---------------------------------------------------------------------------------------------------------------------
# Generated clusters and jobs
# ---------------------------------------------------------------------------------------------------------------------

# Bursts: stretches of jobs that come at this multiple of the mean gap, and how many jobs such a stretch has.
BUSY_GAP, BUSY_JOBS, CALM_GAP, CALM_JOBS = 0.6, 150.0, 2.2, 50.0


def generate_cluster(
    rng: np.random.Generator, num_nodes: int = 8, resources: Sequence[str] = ("cpu", "memory")
) -> Cluster:
    """A random cluster: nodes of up to three kinds, each with its own speed and, for R resources, its own mix."""
    kinds = min(3, num_nodes)
    capacity = 2.0 ** rng.integers(3, 7, size=(kinds, len(resources)))
    speed = np.round(rng.uniform(0.6, 1.8, size=kinds), 1)
    kind = np.sort(rng.integers(kinds, size=num_nodes))
    return Cluster(capacity[kind], speed[kind], tuple(resources))


def generate_jobs(
    rng: np.random.Generator,
    num_jobs: int,
    cluster: Cluster,
    *,
    flavours: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    run_time: tuple[float, float, float] = (300.0, 1.6, DAY),
    arrivals: Literal["poisson", "bursty", "daily"] = "bursty",
    load: float = 0.85,
) -> Jobs:
    """Jobs of users with habits for any cluster.

    Args:
        flavours: float64[F, R], the demands that users choose from; by default halves, quarters, ... of each node.
        weights: float64[F], how often they do; by default inversely to the flavour's size.
        run_time: a lognormal's median (s) and sigma, and the limit at which it is cut (s).
        arrivals: "poisson", "bursty" (busy and calm stretches), or "daily" (the cycle of `lublin_jobs`).
        load: the offered load in expectation (over whole days); a single run's own varies around it.

    Raises:
        WorkloadError: a flavour fits on no node.
    """
    flavours = _default_flavours(cluster) if flavours is None else np.asarray(flavours, float)
    if not (flavours[:, None] <= cluster.capacity).all(axis=2).any(axis=1).all():
        raise WorkloadError("a flavour is larger than any node of the cluster; leave it out")
    share = (flavours / cluster.capacity.max(axis=0)).max(axis=1)  # a flavour's size, whatever its main resource
    weights = 1 / share if weights is None else np.asarray(weights, float)
    probability = weights / weights.sum()
    flavour = rng.choice(len(flavours), size=num_jobs, p=probability)
    median, sigma, limit = run_time
    drawn = np.clip(np.round(rng.lognormal(math.log(median), sigma, num_jobs)), 1.0, limit)
    work = probability @ flavours * _mean_cut_lognormal(median, sigma, limit)
    mean_gap = (work / (cluster.speed @ cluster.capacity)).max() / load
    submit_time = np.round(_arrivals(rng, num_jobs, arrivals, mean_gap), 3)
    return _jobs_of_users(rng, submit_time, share[flavour], flavours[flavour], drawn)


def _default_flavours(cluster: Cluster) -> np.ndarray:
    parts = np.concatenate([np.floor(cluster.capacity / 2**k) for k in range(6)])
    return np.unique(np.minimum(np.maximum(parts, 1.0), np.tile(cluster.capacity, (6, 1))), axis=0)


def _mean_cut_lognormal(median: float, sigma: float, limit: float) -> float:
    """E[min(X, limit)]"""
    z, normal = (math.log(limit / median)) / sigma, NormalDist()
    return median * math.exp(sigma**2 / 2) * normal.cdf(z - sigma) + limit * (1 - normal.cdf(z))


def _arrivals(rng: np.random.Generator, num_jobs: int, kind: str, mean_gap: float) -> np.ndarray:
    gap = rng.exponential(mean_gap, num_jobs)
    if kind == "bursty":
        gap *= _bursts(rng, num_jobs)
    time = np.cumsum(gap)
    return _daily_clock(time) if kind == "daily" else time


def _bursts(rng: np.random.Generator, num_jobs: int) -> np.ndarray:
    """float64[N]: BUSY_GAP or CALM_GAP for each job, in stretches of geometric length; 1 on average."""
    gaps, jobs = np.array([BUSY_GAP, CALM_GAP]), np.array([BUSY_JOBS, CALM_JOBS])
    # A run starts in the middle of things: the chance of either kind is its share of all jobs.
    first = int(rng.random() < CALM_JOBS / (BUSY_JOBS + CALM_JOBS))
    kind = (first + np.arange(num_jobs)) % 2
    return np.repeat(gaps[kind], rng.geometric(1 / jobs[kind]))[:num_jobs]


# ---------------------------------------------------------------------------------------------------------------------
# Presets
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """A cluster, and what makes `n` jobs for it from a random generator: generate(rng, n)."""

    cluster: Cluster
    generate: Callable[[np.random.Generator, int], Jobs]


def _nodes(resources: tuple[str, ...], *kinds: tuple[int, tuple[float, ...], float]) -> Cluster:
    """A cluster from (how many nodes, capacity of each, speed) for each kind of node."""
    counts, capacity, speed = zip(*kinds, strict=True)
    return Cluster(np.repeat(np.array(capacity, float), counts, axis=0), np.repeat(speed, counts), resources)


def cloud() -> Preset:
    """Containers and virtual machines, minutes to hours, on eight nodes of three generations."""
    cluster = _nodes(("cpu", "memory"), (3, (32, 128), 1.0), (3, (16, 64), 1.6), (2, (64, 256), 0.7))
    flavours = [[1, 2], [1, 8], [2, 4], [2, 16], [4, 8], [4, 32], [8, 16], [8, 64], [16, 32], [16, 64], [32, 96]]
    weights = [16, 10, 16, 10, 16, 8, 10, 5, 5, 3, 1]
    return Preset(cluster, partial(generate_jobs, cluster=cluster, flavours=flavours, weights=weights))


def hpc() -> Preset:
    """A supercomputer of 256 processors with the batch jobs of Lublin & Feitelson (2003)."""
    return Preset(_nodes(("processors",), (1, (256,), 1.0)), partial(lublin_jobs, max_procs=256))


def manufacturing() -> Preset:
    """A shop floor: machines that take one lot at a time, and furnaces that take two, over the day."""
    cluster = _nodes(("slots",), (4, (1,), 0.8), (4, (1,), 1.3), (4, (2,), 1.0))
    orders = partial(generate_jobs, run_time=(1_500.0, 1.2, DAY), arrivals="daily")
    return Preset(cluster, partial(orders, cluster=cluster, flavours=[[1], [2]], weights=[88, 12]))


def datacenter() -> Preset:
    """24 nodes for services, analytics (much memory) and training (GPUs)."""
    cluster = _nodes(("cpu", "memory", "gpu"), (16, (32, 128, 0), 1.0), (4, (32, 512, 0), 1.2), (4, (64, 512, 8), 1.0))
    flavours = [[2, 4, 0], [4, 16, 0], [8, 32, 0], [16, 64, 0], [32, 128, 0], [8, 128, 0], [16, 256, 0]]
    flavours += [[4, 32, 1], [8, 64, 2], [16, 128, 4], [32, 256, 8]]
    weights = [200, 200, 160, 120, 50, 60, 30, 70, 30, 15, 5]
    services = partial(generate_jobs, run_time=(900.0, 1.6, 2 * DAY))
    return Preset(cluster, partial(services, cluster=cluster, flavours=flavours, weights=weights))


def tasks() -> Preset:
    """A queue of short tasks, seconds to minutes, and its workers: four older hosts, four newer ones, in bursts."""
    cluster = _nodes(("slots",), (4, (4,), 1.0), (4, (8,), 1.5))
    queue = partial(generate_jobs, run_time=(8.0, 1.5, 3_600.0))
    return Preset(cluster, partial(queue, cluster=cluster, flavours=[[1], [2], [4], [8]], weights=[70, 16, 10, 4]))


PRESETS: dict[str, Callable[[], Preset]] = {
    preset.__name__: preset for preset in (cloud, hpc, manufacturing, datacenter, tasks)
}
RUNS = {"train": (16, 10_000), "validation": (8, 5_000), "test": (20, 5_000)}


def _generated(name: str, split: str, seed: int, runs: int | None, run_jobs: int | None) -> Workload:
    preset = PRESETS[name]()
    parts: list[Jobs] = []
    for part in RUNS if split == "all" else (split,):
        # The same run whatever the number of runs, and never the same in two splits or presets.
        seeds = np.random.SeedSequence([seed, SPLITS[part], zlib.crc32(name.encode())])
        for child in seeds.spawn(runs or RUNS[part][0]):
            parts.append(preset.generate(np.random.default_rng(child), run_jobs or RUNS[part][1]))
    ends = np.cumsum([len(part) for part in parts])
    jobs = Jobs.concatenate([_renumbered(part, index) for index, part in enumerate(parts)])
    jobs = replace(jobs, job_id=np.arange(1, len(jobs) + 1))
    return Workload(name, preset.cluster, jobs, np.stack([np.append(0, ends[:-1]), ends], axis=1), {})


def _renumbered(jobs: Jobs, run: int) -> Jobs:
    """The jobs of the run-th run with users of its own."""
    return replace(
        jobs,
        user=jobs.user + np.int32(run * NUM_USERS),
        group=jobs.group + np.int32(run * NUM_USERS // USERS_PER_GROUP),
        executable=jobs.executable + np.int32(run * NUM_USERS * EXECUTABLES_EACH),
    )
