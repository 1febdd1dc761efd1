"""Slurm's own records, in each of their formats, as traces."""

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from fake_slurm import PENDING, RECORDED, slurm_job

from deployment.accounting import JOBCOMP_COLUMNS, Export, export
from deployment.slurm import SlurmJob, pool
from policies import load_policy
from workloads.generated import generate_jobs
from workloads.jobs import Jobs, Workload, WorkloadError, offered_load
from workloads.load import load_workload


def records(count: int = 300) -> tuple[Jobs, list[SlurmJob]]:
    """Jobs as generated, and as a Slurm of 16 processors would have run them, whole seconds and minutes."""
    cluster = pool(16)
    jobs = generate_jobs(np.random.default_rng(3), count, cluster, run_time=(300.0, 1.0, 3_600.0), load=0.5)
    [schedule] = load_policy("fifo").schedule(
        Workload("x", cluster, replace(jobs, submit_time=np.round(jobs.submit_time)), np.array([[0, count]]), {})
    )
    origin = 1_780_000_000.0
    return jobs, [
        SlurmJob(
            int(jobs.job_id[k]), "COMPLETED", f"user{jobs.user[k]:03}", f"group{jobs.group[k]:03}",
            f"app {jobs.executable[k]:03}", "main", origin + round(jobs.submit_time[k]),
            origin + schedule.start_time[k], origin + schedule.start_time[k] + jobs.run_time[k],
            60 * np.ceil(jobs.requested_time[k] / 60), int(jobs.demand[k, 0]),
        )
        for k in range(count)
    ]  # fmt: skip


def local(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%dT%H:%M:%S")


def as_jobcomp(job: SlurmJob) -> str:
    """The format of the recorded line in RECORDED["jobcomp"]."""
    return (
        f"JobId={job.job_id} UserId={job.user}(1000) GroupId=x(1000) Name={job.name} JobState={job.state} Partition="
        f"{job.partition} TimeLimit={job.limit / 60:.0f} StartTime={local(job.start)} EndTime={local(job.end)} "
        f"NodeList=n1 NodeCnt=1 ProcCnt={job.cpus} WorkDir=/tmp ReservationName= Tres=cpu={job.cpus},mem=1M "
        f"Account={job.account} QOS= WcKey= Cluster=unknown SubmitTime={local(job.eligible)} "
        f"EligibleTime={local(job.eligible)} DerivedExitCode=0:0 ExitCode=0:0 \n"
    )


def as_sacct(jobs: list[SlurmJob]) -> str:
    rows = ["JobIDRaw|User|Account|JobName|Partition|Submit|Start|End|TimelimitRaw|NCPUS|State"]
    for job in jobs:
        rows.append(
            f"{job.job_id}|{job.user}|{job.account}|{job.name}|main|{local(job.eligible)}|{local(job.start)}|"
            f"{local(job.end)}|{job.limit / 60:.0f}|{job.cpus}|{job.state}"
        )
        rows.append(f"{job.job_id}.batch||{job.account}|batch||||||{job.cpus}|COMPLETED")
    rows.append("9999|u|a|x|main|2026-01-01T00:00:00|Unknown|Unknown|5|1|PENDING")
    rows.append("9998|u|a|x|main|2026-01-01T00:00:00|None|2026-01-01T00:00:01|5|0|CANCELLED by 0")
    return "\n".join(rows) + "\n"


def as_json(jobs: list[SlurmJob]) -> str:
    return json.dumps({"jobs": [
        PENDING | {
            "job_id": job.job_id, "job_state": job.state, "user_name": job.user, "account": job.account,
            "name": job.name, "submit_time": int(job.eligible), "eligible_time": int(job.eligible), "cpus": job.cpus,
            "start_time": int(job.start), "end_time": int(job.end), "time_limit": int(job.limit / 60),
        } for job in jobs
    ]})  # fmt: skip


@pytest.mark.parametrize("form", ["jobcomp", "sacct", "json"])
def test_export_round_trip(tmp_path: Path, form: str) -> None:
    """Jobs, through each of Slurm's formats, come back as a trace with the same jobs, which loads and can be run."""
    jobs, ran = records()
    text = {"jobcomp": "".join(map(as_jobcomp, ran)), "sacct": as_sacct(ran), "json": as_json(ran)}[form]
    source, trace = tmp_path / "source", tmp_path / "trace.swf.gz"
    source.write_text(text)
    said = export(Export((source, source), trace))
    assert f"{trace}: 300 jobs" in said and "300 again" in said
    loaded = load_workload(str(trace), "all")
    back, order = loaded.jobs, np.lexsort((jobs.job_id, np.round(jobs.submit_time)))
    jobs = jobs[order]
    assert back.job_id.tolist() == jobs.job_id.tolist()
    assert back.run_time.tolist() == jobs.run_time.tolist()
    assert back.submit_time.tolist() == (np.round(jobs.submit_time) - np.round(jobs.submit_time[0])).tolist()
    assert back.requested_time.tolist() == (60 * np.ceil(jobs.requested_time / 60)).tolist()
    assert back.demand.tolist() == jobs.demand.tolist()
    assert back.wait_time.tolist() == [ran[k].wait for k in order]
    for ours, theirs in ((back.user, jobs.user), (back.executable, jobs.executable), (back.group, jobs.group)):
        assert ours.tolist() == np.unique(theirs, return_inverse=True)[1].tolist()
    assert loaded.cluster.capacity.tolist() == [[16.0]] and loaded.skipped == {}
    assert offered_load(back, loaded.cluster) == pytest.approx(offered_load(jobs, pool(16)), rel=1e-3)
    [schedule] = load_policy("easy-fifo").schedule(load_workload(str(trace), "train"))
    assert len(schedule.jobs) == 180


def test_lines_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    """A name with sacct's delimiter, a line cut short, and a job that its node has lost: its end is not known."""
    lines = as_sacct([slurm_job(k, 2, 600.0, 1_780_000_000.0, 1_780_000_100.0, 1_780_000_200.0) for k in (1, 2, 3)])
    lines = lines.replace("2|ann||app|", "2|ann||a|9|").replace("\n3|ann", "\n3\n4|ann").replace(
        "Unknown|Unknown|5|1|PENDING", "2026-01-01T00:00:01|Unknown|5|8|NODE_FAIL"
    )  # fmt: skip
    (tmp_path / "source").write_text(lines)
    said = export(Export((tmp_path / "source",), tmp_path / "trace.swf"))
    assert "2 jobs, 2 with more or fewer columns than line 1" in said and "1 not finished, 1 never ran" in said
    back = load_workload(str(tmp_path / "trace.swf"), "all").jobs
    assert back.job_id.tolist() == [1, 4] and back.run_time.tolist() == [100.0, 100.0]


def test_export_of_recorded_files(tmp_path: Path) -> None:
    """What Slurm 22.05 itself wrote of the same jobs, as a log and as JSON, is the same trace, whatever their names."""
    (tmp_path / "jobcomp.log").write_text(RECORDED["jobcomp"].replace("Name=ended ", "Name=a|b "))
    (tmp_path / "squeue.json").write_text(json.dumps(RECORDED["jobs"]))
    for name in ("jobcomp.log", "squeue.json"):
        export(Export((tmp_path / name,), tmp_path / f"{name}.swf", processors=16))
    ours, theirs = (load_workload(str(tmp_path / f"{name}.swf"), "all").jobs for name in ("jobcomp.log", "squeue.json"))
    assert len(ours) == 2
    for name in ("job_id", "submit_time", "run_time", "requested_time", "demand", "wait_time"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), name


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no job that has run"),
        ("{nonsense", "not what `squeue --json`"),
        ("a|b\n1|2\n", "line 1: no column JobIDRaw, Submit"),
        ("JobId=1 JobState=COMPLETED\n", "line 1: no field 'SubmitTime'|line 1: no field 'Submit'"),
        ("hello world\n", "line 1: no field"),
        ('{"jobs": ["x"]}', "not what `squeue --json`"),
        ("|".join(JOBCOMP_COLUMNS) + "\n1|ann|a", "no job that has run, 1 with more or fewer columns"),
    ],
)
def test_what_cannot_be_exported(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "source").write_text(text)
    with pytest.raises(WorkloadError, match=problem):
        export(Export((tmp_path / "source",), tmp_path / "trace.swf"))
    assert not (tmp_path / "trace.swf").exists()
    with pytest.raises(WorkloadError, match="nowhere: No such file"):
        export(Export((tmp_path / "nowhere",), tmp_path / "trace.swf"))


def test_processors_that_are_too_few(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("".join(map(as_jobcomp, records()[1])))
    with pytest.raises(WorkloadError, match=r"--processors 2: job \d+ had"):
        export(Export((tmp_path / "source",), tmp_path / "trace.swf", processors=2))
