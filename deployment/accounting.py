"""Finished jobs from Slurm's accounting (jobcomp logs, JSON, sacct), and a trace made of them."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from deployment.slurm import FOREVER, SlurmJob, job_from_accounting, job_from_rest, jobs_of, pool, state_of
from workloads.compressed import as_text, read_bytes
from workloads.jobs import DAY, WorkloadError, most_at_once
from workloads.swf import write_swf


@dataclass
class Export:
    """Write finished jobs as an SWF trace.

    For sacct: SLURM_TIME_FORMAT=%s sacct -aXP -S now-60days -o
    JobIDRaw,User,Account,JobName,Partition,Submit,Eligible,Start,End,TimelimitRaw,NCPUS,State
    """

    inputs: tuple[Path, ...]
    """jobcomp/filetxt logs, outputs of `squeue --json -t all`, `sacct --json` or `sacct -P`, plain or compressed; jobs
    may occur in several"""
    output: Path
    """the trace, gzipped if its name ends in .gz"""
    processors: int | None = None
    """of the cluster; by default as many as ever ran at the same time"""


MANY = 0.1  # of the jobs: more than that without a time limit, and what is learned from the trace is doubtful
JOBCOMP_COLUMNS = {
    "JobIDRaw": "JobId", "User": "UserId", "Account": "Account", "JobName": "Name", "Partition": "Partition",
    "Submit": "SubmitTime", "Eligible": "EligibleTime", "Start": "StartTime", "End": "EndTime",
    "TimelimitRaw": "TimeLimit", "NCPUS": "ProcCnt", "State": "JobState",
}  # fmt: skip
NEEDED = ("JobIDRaw", "Submit", "Start", "End", "NCPUS", "State")
OTHER_NAMES = {"AllocCPUS": "NCPUS"}
FORMATS = "a jobcomp/filetxt log, or the output of `squeue --json`, `sacct --json` or `sacct -P`"
NOTICES = 20  # lines before the first that is Slurm's: warnings of sacct, notices of a login


def _read_finished(path: Path, left_out: Counter[str]) -> Iterator[SlurmJob]:
    """The jobs in a jobcomp/filetxt log, or in the output of `squeue --json`, `sacct --json` or `sacct -P`, in any
    state, plain or compressed.

    Lines of sacct that cannot be told apart into columns are counted in `left_out`.

    Raises:
        WorkloadError: the file cannot be read, or is none of them.
    """
    text = as_text(read_bytes(str(path), "a file of Slurm's"))
    lines = text.splitlines()
    for skipped, line in enumerate(lines[:NOTICES]):
        if line.startswith("{"):
            yield from _from_json(path, "\n".join(lines[skipped:]), left_out)
        elif line.startswith("JobId="):
            yield from _from_lines(path, _jobcomp_rows(lines, skipped))
        elif len({*re.findall(r"\w+", line)} & {*JOBCOMP_COLUMNS, "JobID", *OTHER_NAMES}) > 1:
            yield from _from_lines(path, _sacct_rows(path, lines, skipped, left_out))
        else:
            continue
        return
    if text.strip():
        first = next(line for line in lines if line.strip())
        raise WorkloadError(f"{path}: line 1: {first.strip()[:40]!r} is nothing of Slurm's; give {FORMATS}")


def _from_json(path: Path, text: str, left_out: Counter[str]) -> Iterator[SlurmJob]:
    """Records that are not as expected are counted, unless all are so."""
    problem: Exception | None = None
    try:
        answer, _ = json.JSONDecoder().raw_decode(text)
        records, understood = answer["jobs"], 0
        for record in records:
            try:
                job = job_from_accounting(record) if "time" in record else job_from_rest(record)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                problem = error
                left_out["not as expected"] += 1
            else:
                understood += 1
                yield job
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WorkloadError(f"{path}: {error!r}: not what `squeue --json` or `sacct --json` write") from None
    if problem is not None and not understood:
        raise WorkloadError(
            f"{path}: {problem!r}: not what `squeue --json` or `sacct --json` of {_release(answer)} write"
        )


def _release(answer: dict[str, Any]) -> str:
    meta = answer.get("meta")
    slurm = (meta.get("slurm") or meta.get("Slurm")) if isinstance(meta, dict) else None
    return f"Slurm {slurm.get('release')}" if isinstance(slurm, dict) else "Slurm 22.05 to 25.05"


def _jobcomp_rows(lines: list[str], skipped: int) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and values by sacct's names."""
    for number, line in enumerate(lines[skipped:], skipped + 1):
        if line.strip():
            found = dict(re.findall(r"(\w+)=(.*?)(?=\s+\w+=|\s*$)", line))
            row = {ours: found[theirs] for ours, theirs in JOBCOMP_COLUMNS.items() if theirs in found}
            row["User"] = row.get("User", "").partition("(")[0]  # root(0)
            yield number, row


def _sacct_rows(
    path: Path, lines: list[str], skipped: int, left_out: Counter[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    head = lines[skipped]
    # sacct quotes nothing, and names may hold anything; with quoted names of columns it has been through other programs
    delimiter = next((mark for mark in "|\t;," if mark in head), "|")
    if '"' in head:
        reader = csv.DictReader(lines[skipped:], delimiter=delimiter)
    else:
        reader = csv.DictReader(lines[skipped:], delimiter=delimiter, quoting=csv.QUOTE_NONE)
    names = [OTHER_NAMES.get(name.strip(), name.strip()) for name in reader.fieldnames or ()]
    reader.fieldnames = names
    if missing := [name for name in NEEDED if name not in names]:
        problem = f"no column {', '.join(missing)}; name them with sacct's -P -o, see --help"
        raise WorkloadError(f"{path}: line {skipped + 1}: {problem}")
    for row in reader:
        if None in row or None in row.values():  # sacct does not escape its delimiter
            left_out["with more or fewer columns than line 1 (a | in a name, or cut short)"] += 1
        elif "." not in row["JobIDRaw"]:  # steps of a job
            yield skipped + reader.line_num, row


def _from_lines(path: Path, rows: Iterable[tuple[int, dict[str, str]]]) -> Iterator[SlurmJob]:
    for number, row in rows:
        try:
            submit, eligible = _seconds(row["Submit"]), _seconds(row.get("Eligible", ""))
            limit = _limit(row.get("TimelimitRaw", "")) or _limit(row.get("Timelimit", ""))
            yield SlurmJob(
                job_id=int(row["JobIDRaw"]), state=state_of(row["State"]), user=row.get("User", ""),
                account=row.get("Account", ""), name=row.get("JobName", ""), partition=row.get("Partition", ""),
                eligible=max(submit, eligible), start=_seconds(row["Start"]), end=_seconds(row["End"]),
                limit=limit or FOREVER, endless=not limit, cpus=int(row["NCPUS"]),
            )  # fmt: skip
        except (KeyError, ValueError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise WorkloadError(f"{path}: line {number}: {what}; give {FORMATS}") from None


def _seconds(text: str) -> float:
    """Slurm's local time, or seconds (SLURM_TIME_FORMAT=%s); 0 for Unknown or None."""
    text = text.strip()
    if text.isdigit():
        return float(text)
    return datetime.fromisoformat(text).timestamp() if text[:1].isdigit() else 0.0


def _limit(text: str) -> float | None:
    """Seconds of a time limit in any of Slurm's forms (minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes, days-hours:minutes:seconds); None where there is none, as for UNLIMITED and Partition_Limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not found:
        return None
    days, *parts = (float(part or 0) for part in found.groups())
    hours = days or found[1] or found[4]  # what the first number counts, else it is minutes
    first, second, third = parts
    seconds = 3600 * first + 60 * second + third if hours else 60 * first + second
    return DAY * days + seconds or None


def _most_at_once(jobs: Sequence[SlurmJob]) -> int:
    """The most processors that were taken at the same time."""
    start, end, cpus = (np.array([getattr(job, name) for job in jobs], float) for name in ("start", "end", "cpus"))
    return int(most_at_once(start, np.maximum(end, start + 1), cpus))


def export(args: Export) -> str:
    """Write the trace; returns what was done.

    Raises:
        WorkloadError: an input is unusable, or no job in them has run.
    """
    ran: dict[tuple[int, float], SlurmJob] = {}
    left_out: Counter[str] = Counter()
    for job in (job for path in args.inputs for job in _read_finished(path, left_out)):
        if not job.has_ended:
            left_out["not finished"] += 1
        elif not job.eligible:
            left_out["without a submit time"] += 1
        elif job.start > job.end:
            left_out["ended before they started (a clock that was put back?)"] += 1
        elif not job.ran:
            left_out["never ran"] += 1
        elif job.key in ran:
            left_out["again"] += 1
        else:
            ran[job.key] = job
    skipped = "".join(f", {count} {why}" for why, count in left_out.items())
    if not ran:
        raise WorkloadError(f"{', '.join(map(str, args.inputs))}: no job that has run{skipped}; give a longer record")
    jobs = sorted(ran.values(), key=lambda job: (job.eligible, job.job_id))
    processors, source = args.processors or _most_at_once(jobs), "as given"
    if not args.processors:
        source = "as many as were ever taken at once; --processors says otherwise"
    if (largest := max(jobs, key=lambda job: job.cpus)).cpus > processors:
        raise WorkloadError(f"--processors {processors}: job {largest.job_id} had {largest.cpus}; give the cluster's")
    write_swf(args.output, jobs_of(jobs, jobs[0].eligible), pool(processors))
    return f"{args.output}: {len(jobs)} jobs{skipped}; {processors} processors ({source}){_limits(jobs)}"


def _limits(jobs: Sequence[SlurmJob]) -> str:
    """What is said of jobs without a time limit."""
    without = sum(job.endless for job in jobs)
    if not without:
        return ""
    said = f"; {without} without a time limit, which stands as {FOREVER / DAY:.0f} days"
    if without <= MANY * len(jobs):
        return said
    advice = "where Slurm knows their limits, give sacct's -o TimelimitRaw (or Timelimit) too"
    return f"{said}\nwarning: rules and policies go by these times, and cannot backfill behind such jobs; {advice}"
