"""Traces in the Standard Workload Format: https://www.cs.huji.ac.il/labs/parallel/workload/swf.html"""

import codecs
import gzip
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workloads.files import replacing
from workloads.jobs import Cluster, Jobs, WorkloadError

# fmt: off
SWF_FIELDS = (
    "job number", "submit time", "wait time", "run time", "allocated processors", "average CPU time", "used memory",
    "requested processors", "requested time", "requested memory", "status", "user", "group", "executable", "queue",
    "partition", "preceding job", "think time",
)
# fmt: on
SWF_TIMES, SWF_IDENTIFIERS = [1, 2, 3, 8], [0, 11, 12, 13, 14]  # columns
SWF_LEAST_FIELDS = 9  # nothing that a scheduler needs comes after the requested time


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
