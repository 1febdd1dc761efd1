"""Traces in the Standard Workload Format: https://www.cs.huji.ac.il/labs/parallel/workload/swf.html"""

import codecs
import gzip
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from workloads.compressed import read_bytes
from workloads.files import replacing
from workloads.jobs import Cluster, Jobs, Trace, WorkloadError, most_at_once
from workloads.nodes import nodes_of
from workloads.reading import MILLISECONDS, BadLine, Reading, check_span, judge_bad_lines, pooled

# fmt: off
SWF_FIELDS = (
    "job number", "submit time", "wait time", "run time", "allocated processors", "average CPU time", "used memory",
    "requested processors", "requested time", "requested memory", "status", "user", "group", "executable", "queue",
    "partition", "preceding job", "think time",
)
# fmt: on
SWF_TIMES, SWF_IDENTIFIERS = [1, 2, 3, 8], [0, 11, 12, 13, 14]  # columns
SUBMIT, STATUS, QUEUE, PARTITION = 1, 10, 14, 15  # columns
PARTIAL = (2, 3, 4)  # status of the parts of a checkpointed job
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
    skipped: dict[str, int] = field(default_factory=dict)  # bad lines that are left out, by reason
    notes: list[str] = field(default_factory=list)  # what else the user should know of how it was read


def read_swf(path: str | os.PathLike[str], reading: Reading | None = None) -> SWF:
    """Read an SWF trace, plain or compressed. Fields after the 18th are not read.

    Raises:
        WorkloadError: the file cannot be read, is binary, cut short, something else or without jobs, or lines of it
            are malformed and `reading` does not say that they may be left out.
    """
    path, reading = os.fspath(path), reading or Reading()
    text, notes = _read_lines(path)
    numbered = [(number, line) for number, line in enumerate(text, 1) if line and not line.isspace()]
    header = _swf_header(line for _, line in numbered if line.lstrip().startswith(";"))
    body = [(number, line) for number, line in numbered if not line.lstrip().startswith(";")]
    if not body:
        raise WorkloadError(f"{path}: line {len(text)}: the end, and no job yet; give a trace with one line per job")
    if advice := foreign(body[0][1]):
        raise WorkloadError(f"{path}: line {body[0][0]}: {advice}")
    records, bad, longer = _parse(body)
    if longer:
        notes.append(f"{longer:,} lines have more than 18 fields; the first 18 are read")
    lines = np.array([number for number, _ in body])
    max_procs, max_nodes = (_first_integer(header.get(key, "")) for key in ("maxprocs", "maxnodes"))
    swf = SWF(path, header, max_procs, max_nodes, records, lines)
    bad += _bad_records(swf, np.isin(lines, [line for line, *_ in bad], invert=True))
    skipped, named = judge_bad_lines(path, bad, len(body), reading)
    good = np.isin(lines, [line for line, *_ in bad], invert=True)
    return replace(swf, records=records[good], lines=lines[good], skipped=skipped, notes=notes + named)


def _read_lines(path: str) -> tuple[list[str], list[str]]:
    """The file's lines, and a note if it goes on after its end."""
    data, notes = read_bytes(path), []
    if (end := _end_of_file(data)) < len(data):
        line = data.count(b"\n", 0, end) + 1
        if data[end:].strip(b"\x1a\0\r\n\t "):
            notes.append(f"what follows the end-of-file mark (^Z) in line {line} is not read")
        data = data[:end]
    if (nul := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, nul) + 1
        raise WorkloadError(f"{path}: line {line}: binary data; give an SWF trace, plain text or compressed")
    # Comments may hold anything; Latin-1 never fails. Bytes split at line ends only, text at form feeds too.
    return [line.decode("latin-1") for line in data.removeprefix(codecs.BOM_UTF8).splitlines()], notes


def _end_of_file(data: bytes) -> int:
    """Where DOS's ^Z ends it, if one stands outside of the comments; else its length."""
    end = data.find(b"\x1a")
    while end >= 0:
        begin = max(data.rfind(b"\n", 0, end), data.rfind(b"\r", 0, end)) + 1
        if not data[begin:end].lstrip().startswith(b";"):
            return end
        end = data.find(b"\x1a", end + 1)
    return len(data)


def foreign(line: str) -> str:
    """One line of advice, if this is the first line of a well-known format that is none of a trace; else nothing."""
    line = line.strip()
    if _is_number(line.split()[0]):
        return ""
    export = "`python slurm_agent.py export --inputs FILE --output my_cluster.swf` makes a trace of it"
    if line.startswith(("{", "[")):
        return f"JSON, no SWF trace; if it is `squeue --json` of finished jobs, {export}"
    if line.startswith("JobId="):
        return f"a log of Slurm's jobcomp/filetxt, no SWF trace; {export}"
    if "|" in line or re.match(r"JobID(Raw)?\s", line):
        return f"a table of sacct, it seems, no SWF trace; with `sacct -P`, {export}"
    if line.startswith("PAR1"):
        return "a table in the format of Parquet, no SWF trace; let its name end in .parquet"
    if line.count(",") >= 2:
        return "a table (CSV), no SWF trace; let its name end in .csv, and name its columns with --columns"
    return ""


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


def _parse(body: list[tuple[int, str]]) -> tuple[np.ndarray, list[BadLine], int]:
    """float64[L, 18], with -1 in what is malformed; the malformed lines; and how many lines have more fields."""
    try:
        records = np.loadtxt([line for _, line in body], ndmin=2, comments=None)
    except ValueError:  # some line differs from the first: the slow way mends it or says which
        return _parse_lines(body)
    if records.shape[1] < len(SWF_FIELDS):
        return _parse_lines(body)
    return records[:, : len(SWF_FIELDS)], [], len(body) * (records.shape[1] > len(SWF_FIELDS))


def _parse_lines(body: list[tuple[int, str]]) -> tuple[np.ndarray, list[BadLine], int]:
    """The slow way: pads short lines with -1, finds those that are malformed."""
    records, longer = np.full((len(body), len(SWF_FIELDS)), -1.0), 0
    bad: list[BadLine] = []
    usual = min(len(body[0][1].split()), len(SWF_FIELDS))
    for row, (number, line) in enumerate(body):
        values = line.split()
        count, values = len(values), values[: len(SWF_FIELDS)]
        longer += count > len(SWF_FIELDS)
        try:
            if row == len(body) - 1 and count < usual:
                problem = (
                    f"the last line is cut short, {count} of {usual} fields; fetch the file again or delete the line"
                )
                bad.append(BadLine(number, "cut short", problem))
            elif count < SWF_LEAST_FIELDS:
                problem = f"{count} fields where SWF has 18; correct or delete the line, or give an SWF trace"
                bad.append(BadLine(number, "too few fields", problem))
            else:
                records[row, : len(values)] = list(map(float, values))
        except ValueError:
            column = next(column for column, value in enumerate(values) if not _is_number(value))
            bad.append(_bad_field(number, column, "not a number", f"{values[column][:40]!r} is not a number"))
    return records, bad, longer


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _bad_records(swf: SWF, parsed: np.ndarray) -> list[BadLine]:
    """Of the lines that could be parsed, bool[L], those whose numbers make no sense."""
    records, columns = swf.records, np.arange(len(SWF_FIELDS))
    whole = ~np.isin(records[:, STATUS], PARTIAL)[:, None]  # SWF gives later parts of a job no submit time
    unknown = (records == -1) & (columns != SUBMIT)  # SWF lacks no submit time
    times = np.isin(columns, SWF_TIMES) & whole
    bad: dict[int, BadLine] = {}
    for wrong, reason, problem in (
        (~np.isfinite(records), "not a finite number", "is not a finite number"),
        ((records < 0) & ~unknown & times, "negative time", "is a negative time"),
        ((records > MILLISECONDS) & times, "no time in seconds", "is no time in seconds, of milliseconds it seems"),
        ((np.abs(records) > 2**53) & np.isin(columns, SWF_IDENTIFIERS), "too large", "does not fit in 53 bits"),
    ):
        for row, column in np.argwhere(wrong & parsed[:, None]).tolist():
            if row not in bad:
                value = f"{records[row, column]:g} {problem}"
                remedy = "give all times in seconds" if "milliseconds" in problem else "correct or delete the line"
                bad[row] = _bad_field(int(swf.lines[row]), column, reason, value, remedy)
    processors, machine, source = (
        _processors(records),
        swf.max_procs or swf.max_nodes,
        "MaxProcs" if swf.max_procs else "MaxNodes",
    )
    usable = ~np.any(list(_unusable(records).values()), axis=0) & parsed
    for row in np.flatnonzero(usable & (processors > (machine or np.inf))).tolist():
        if row not in bad:
            column = 7 if records[row, 7] > 0 else 4
            problem = (
                f"{processors[row]:g} processors, but {source} in the header says that the machine has {machine:g}"
            )
            remedy = f"correct {source} or delete the line"
            bad[row] = _bad_field(int(swf.lines[row]), column, "larger than the machine", problem, remedy)
    return list(bad.values())


def _bad_field(
    line: int, column: int, reason: str, problem: str, remedy: str = "correct or delete the line"
) -> BadLine:
    return BadLine(line, reason, f"field {column + 1} ({SWF_FIELDS[column]}): {problem}; {remedy}")


def _processors(records: np.ndarray) -> np.ndarray:
    """float64[L]: those that were asked for; those that it got where that is not known."""
    allocated, requested = records[:, 4], records[:, 7]
    return np.where(requested > 0, requested, allocated)


def _unusable(records: np.ndarray) -> dict[str, np.ndarray]:
    """bool[L] for each reason why a line does not describe a job which ran."""
    run_time, status = records[:, 3], records[:, STATUS]
    return {
        "part of a checkpointed job": np.isin(status, PARTIAL),  # the whole job has a line of its own
        "cancelled before it started": (status == 5) & (run_time <= 0),
        "no run time": run_time <= 0,
        "no processors": _processors(records) <= 0,
    }


def jobs_from_swf(swf: SWF, reading: Reading | None = None) -> Trace:
    """The trace's jobs by submit time, its machine as one node, how many lines were skipped, and what else to say.

    The machine has as many processors as `--nodes` says, else MaxProcs, else MaxNodes, else those of the largest job.
    A single partition has as many as ever were in use at once.

    Raises:
        WorkloadError: no job is left, or no such partition.
    """
    reading = reading or Reading()
    usable, skipped, notes = np.ones(len(swf.records), bool), dict(swf.skipped), list(swf.notes)
    for reason, applies in _unusable(swf.records).items():
        if count := int((usable & applies).sum()):
            skipped[reason] = count
        usable &= ~applies
    if not usable.any():
        raise WorkloadError(f"{swf.path}: line {swf.lines[-1]}: no job left, {skipped}; give a trace of jobs that ran")
    keep = np.flatnonzero(usable)
    processors, submit_time = _processors(swf.records), swf.records[:, SUBMIT]
    machine = swf.max_procs or swf.max_nodes or processors[keep].max()
    if reading.partition is None:
        notes += _pooled(swf, keep)
    else:
        keep = _of_partition(swf, keep, reading.partition)
    if reading.nodes:
        machine = float((nodes_of(reading.nodes, ("processors",))[0]).sum())
        if (largest := processors[keep].max()) > machine:
            raise WorkloadError(f"{swf.path}: --nodes: {machine:g} processors, and a job has {largest:g}; give more")
    elif reading.partition is not None:
        machine = _largest_use(swf, keep)
        size = f"taken for {machine:g} processors, the most in use at once"
        notes.append(
            f"partition {reading.partition}: its size is not in the file; {size}; --nodes 1xprocessors=N says otherwise"
        )
    keep = keep[np.argsort(submit_time[keep], kind="stable")]
    check_span(f"{swf.path}: field 2 (submit time)", submit_time[keep])
    column = dict(zip(SWF_FIELDS, swf.records[keep].T, strict=True))
    jobs = Jobs(
        submit_time=column["submit time"],
        run_time=column["run time"],
        requested_time=np.where(column["requested time"] > 0, column["requested time"], column["run time"]),
        demand=processors[keep, None],
        **{name: _codes(column[name]) for name in ("user", "group", "executable", "queue")},
        wait_time=np.maximum(column["wait time"], 0.0),
        job_id=column["job number"].astype(np.int64),
    )
    return Trace(jobs, Cluster(np.array([[float(machine)]]), np.ones(1), ("processors",)), skipped, notes)


def _codes(identifiers: np.ndarray) -> np.ndarray:
    """int32[N]: as they are, or, where that is not enough, other numbers for them (-1 stays)."""
    if (np.abs(identifiers) < 2**31).all():
        return identifiers.astype(np.int32)
    return np.where(identifiers == -1, -1, np.unique(identifiers, return_inverse=True)[1]).astype(np.int32)


def _largest_use(swf: SWF, keep: np.ndarray) -> float:
    """The most processors in use at once, as far as the file says when jobs started; at least those of the largest."""
    _, submit, wait, run = swf.records[keep, :4].T
    processors = _processors(swf.records)[keep]
    start = submit + wait
    return max(processors.max(), most_at_once(start, start + run, processors) if (wait >= 0).all() else 0.0)


def _partitions(swf: SWF, keep: np.ndarray) -> tuple[str, np.ndarray, dict[float, int]]:
    """Whether the jobs are told apart by partition or by queue; float64[L], which each has; how many jobs each has."""
    counted = {
        column: np.unique(swf.records[keep, column][swf.records[keep, column] >= 0], return_counts=True)
        for column in (PARTITION, QUEUE)
    }
    column = PARTITION if len(counted[PARTITION][0]) > 1 else QUEUE
    numbers, counts = counted[column]
    by, values = SWF_FIELDS[column], swf.records[:, column]
    return by, values, dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def _pooled(swf: SWF, keep: np.ndarray) -> list[str]:
    """A note, where there may be several machines in the trace."""
    by, _, counts = _partitions(swf, keep)
    if len(counts) <= 1:
        said = {key: _first_integer(swf.header.get(f"max{key}s", "")) for key in ("partition", "queue")}
        return [f"{n} {key}s, its header says, but no line says which" for key, n in said.items() if n > 1][:1]
    return pooled(by, {f"{number:g}": count for number, count in counts.items()})


def _of_partition(swf: SWF, keep: np.ndarray, partition: str) -> np.ndarray:
    by, values, counts = _partitions(swf, keep)
    try:
        found = keep[values[keep] == float(partition)]
    except ValueError:
        found = keep[:0]
    if not len(found):
        known = ", ".join(f"{number:g}" for number in list(counts)[:20]) or "none"
        raise WorkloadError(f"{swf.path}: --partition {partition}: no job has this {by}; there are {known}")
    return found


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
