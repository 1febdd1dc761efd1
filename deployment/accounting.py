"""Finished jobs from Slurm's accounting (jobcomp logs, JSON, sacct), and a trace made of them."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from deployment.slurm import FOREVER, SlurmJob, job_from_rest, jobs_of, pool
from workloads.jobs import WorkloadError
from workloads.swf import write_swf


@dataclass
class Export:
    """Write finished jobs as an SWF trace.

    For sacct: sacct -aXP -S now-60days -o
    JobIDRaw,User,Account,JobName,Partition,Submit,Eligible,Start,End,TimelimitRaw,NCPUS,State
    """

    inputs: tuple[Path, ...]
    """jobcomp/filetxt logs, outputs of `squeue --json -t all` or of sacct; jobs may occur in several"""
    output: Path
    """the trace, gzipped if its name ends in .gz"""
    processors: int | None = None
    """of the cluster; by default as many as ever ran at the same time"""


def _read_finished(path: Path, left_out: Counter[str]) -> Iterator[SlurmJob]:
    """The jobs in a jobcomp/filetxt log, or in the output of `squeue --json` or `sacct -P`, in any state.

    Lines of sacct that cannot be told apart into columns are counted in `left_out`.

    Raises:
        WorkloadError: the file cannot be read, or is none of them.
    """
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise WorkloadError(f"{path}: {error.strerror}; give a file of Slurm's") from None
    first = text.lstrip().partition("\n")[0]
    if first.startswith("{"):
        yield from _from_json(path, text)
    elif "|" in first and not first.startswith("JobId="):  # a name in jobcomp's may have a | too
        yield from _from_lines(path, _sacct_rows(path, text.splitlines(), left_out))
    else:
        yield from _from_lines(path, _jobcomp_rows(text.splitlines()))


def _from_json(path: Path, text: str) -> Iterator[SlurmJob]:
    try:
        records = json.loads(text)["jobs"]
        yield from map(job_from_rest, records)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WorkloadError(f"{path}: not what `squeue --json` of Slurm 22.05 writes ({error!r})") from None


JOBCOMP_COLUMNS = {
    "JobIDRaw": "JobId", "User": "UserId", "Account": "Account", "JobName": "Name", "Partition": "Partition",
    "Submit": "SubmitTime", "Eligible": "EligibleTime", "Start": "StartTime", "End": "EndTime",
    "TimelimitRaw": "TimeLimit", "NCPUS": "ProcCnt", "State": "JobState",
}  # fmt: skip
NEEDED = ("JobIDRaw", "Submit", "Start", "End", "NCPUS", "State")


def _jobcomp_rows(lines: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and values by sacct's names."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            found = dict(re.findall(r"(\w+)=(.*?)(?=\s+\w+=|\s*$)", line))
            row = {ours: found[theirs] for ours, theirs in JOBCOMP_COLUMNS.items() if theirs in found}
            row["User"] = row.get("User", "").partition("(")[0]  # root(0)
            yield number, row


def _sacct_rows(path: Path, lines: list[str], left_out: Counter[str]) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(lines, delimiter="|", quoting=csv.QUOTE_NONE)
    if missing := [name for name in NEEDED if name not in (reader.fieldnames or ())]:
        raise WorkloadError(f"{path}: line 1: no column {', '.join(missing)}; name them with sacct's -o, see --help")
    for row in reader:
        if None in row or None in row.values():  # sacct does not escape its delimiter
            left_out["with more or fewer columns than line 1 (a | in a name, or cut short)"] += 1
        elif "." not in row["JobIDRaw"]:  # steps of a job
            yield reader.line_num, row


def _from_lines(path: Path, rows: Iterable[tuple[int, dict[str, str]]]) -> Iterator[SlurmJob]:
    for number, row in rows:
        try:
            minutes = row.get("TimelimitRaw", "")
            submit, eligible = _seconds(row["Submit"]), _seconds(row.get("Eligible", ""))
            yield SlurmJob(
                job_id=int(row["JobIDRaw"]), state=row["State"].partition(" ")[0], user=row.get("User", ""),
                account=row.get("Account", ""), name=row.get("JobName", ""), partition=row.get("Partition", ""),
                eligible=max(submit, eligible), start=_seconds(row["Start"]), end=_seconds(row["End"]),
                limit=60.0 * int(minutes) if minutes.isdigit() else FOREVER, cpus=int(row["NCPUS"]),
            )  # fmt: skip
        except (KeyError, ValueError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise WorkloadError(
                f"{path}: line {number}: {what}; give a jobcomp/filetxt log, or `squeue --json` or `sacct -P` output"
            ) from None


def _seconds(text: str) -> float:
    """Slurm's local time, or seconds (SLURM_TIME_FORMAT=%s); 0 for Unknown or None."""
    if text.isdigit():
        return float(text)
    return datetime.fromisoformat(text).timestamp() if text[:1].isdigit() else 0.0


def _most_at_once(jobs: Sequence[SlurmJob]) -> int:
    """The most processors that were taken at the same time."""
    changes = sorted(
        [(job.start, job.cpus) for job in jobs] + [(max(job.end, job.start + 1), -job.cpus) for job in jobs]
    )
    return int(np.cumsum([cpus for _, cpus in changes]).max())


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
    return f"{args.output}: {len(jobs)} jobs{skipped}; {processors} processors ({source})"
