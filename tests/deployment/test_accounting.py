"""Slurm's own records, in each of their formats, as traces."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from fake_slurm import FORMS, PENDING, RECORDED, slurm_job
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployment.accounting import JOBCOMP_COLUMNS, Export, export
from deployment.slurm import FOREVER, SlurmJob, pool
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
        ("Submit|End\n1|2\n", "line 1: no column JobIDRaw, Start, NCPUS, State; name them with"),
        ("a|b\n1|2\n", "line 1: 'a.b' is nothing of Slurm's; give a jobcomp/filetxt log, or the output of"),
        ("JobId=1 JobState=COMPLETED\n", "line 1: no field 'SubmitTime'|line 1: no field 'Submit'"),
        ("hello world\n", "line 1: 'hello world' is nothing of Slurm's"),
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


SACCT = "JobIDRaw|User|JobName|Submit|Start|End|Timelimit|NCPUS|State"
LIMITS = {
    "1-00:00:00": 86_400, "00:10:00": 600, "10": 600, "10:30": 630, "2-12": 216_000, "2-12:30": 217_800,
    "30-00:00:00": 30 * 86_400, "UNLIMITED": 0, "Partition_Limit": 0, "": 0, "INVALID": 0,
}  # fmt: skip


def sacct(*rows: tuple[object, ...], head: str = SACCT, delimiter: str = "|") -> str:
    return "\n".join([head.replace("|", delimiter), *(delimiter.join(map(str, row)) for row in rows)]) + "\n"


def row(job: int = 1, limit: str = "10", start: str = "2024-03-01T08:00:00", end: str = "2024-03-01T09:00:00") -> tuple:
    return job, "ann", "app", "2024-03-01T08:00:00", start, end, limit, 2, "COMPLETED"


def exported(tmp_path: Path, text: str | bytes, name: str = "source") -> tuple[str, Jobs]:
    """What is said, and the jobs."""
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    said = export(Export((tmp_path / name,), tmp_path / "trace.swf"))
    return said, load_workload(str(tmp_path / "trace.swf"), "all").jobs


def test_time_limits_in_all_their_forms(tmp_path: Path) -> None:
    """The column Timelimit where there is no TimelimitRaw; without a limit they are counted, and warned about."""
    said, jobs = exported(tmp_path, sacct(*(row(job, limit) for job, limit in enumerate(LIMITS))))
    assert jobs.requested_time.tolist() == [seconds or FOREVER for seconds in LIMITS.values()]
    assert "; 4 without a time limit, which stands as 30 days\nwarning: rules and policies go by these" in said
    said, _ = exported(tmp_path, sacct(*(row(job, "UNLIMITED" if job == 1 else "5") for job in range(20))))
    assert said.endswith("; 1 without a time limit, which stands as 30 days")
    assert "without" not in exported(tmp_path, sacct(row(), row(2)))[0]
    raw = sacct((*row(), 7), (*row(2), "UNLIMITED"), (*row(3), ""), head=f"{SACCT}|TimelimitRaw")
    assert exported(tmp_path, raw)[1].requested_time.tolist() == [420, 600, 600]


def test_jobs_that_ended_before_they_started_are_left_out(tmp_path: Path) -> None:
    """As in local time, where a clock is put back; in UTC or in seconds the same jobs are whole."""
    back = row(7, start="2024-10-27T02:50:00", end="2024-10-27T02:10:00")
    unknown = (8, "ann", "app", "Unknown", *row()[4:])
    assert "1 jobs, 1 without a submit time" in exported(tmp_path, sacct(row(), unknown))[0]
    said, jobs = exported(tmp_path, sacct(row(), back))
    assert "1 jobs, 1 ended before they started (a clock that was put back?)" in said and jobs.job_id.tolist() == [1]
    for start, end in (
        ("1729990200", "1729991400"), ("2024-10-27T00:50:00Z", "2024-10-27T01:10:00Z"),
        ("2024-10-27T02:50:00+0200", "2024-10-27T02:10:00+0100"),
    ):  # fmt: skip
        said, jobs = exported(tmp_path, sacct(row(), row(7, start=start, end=end)))
        assert jobs.run_time.tolist() == [3600, 1200], said


@pytest.mark.parametrize(
    "disguise",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: gzip.compress(text.encode()),
        lambda text: b"sacct: warning: something or other\n\n" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: ('"' + text.strip().replace("|", '"|"').replace("\n", '"\n"') + '"\n').encode(),
        lambda text: text.replace("|", ",").encode(),
        lambda text: text.replace("|", "\t").encode(),
        lambda text: text.replace("\n", "|\n").encode(),  # sacct -p
        lambda text: text.replace("NCPUS", "AllocCPUS").encode(),
    ],
)
def test_sacct_in_disguise(tmp_path: Path, disguise: Callable[[str], bytes]) -> None:
    said, jobs = exported(tmp_path, disguise(sacct(row(), row(2, "20"))))
    assert jobs.job_id.tolist() == [1, 2] and jobs.requested_time.tolist() == [600, 1200], said


@pytest.mark.parametrize("version", FORMS)
@pytest.mark.parametrize("program", ["squeue", "sacct"])
def test_json_of_every_version(tmp_path: Path, program: str, version: str) -> None:
    text = json.dumps(FORMS[version]["jobs" if program == "squeue" else "sacct"])
    said, jobs = exported(tmp_path, f"{program}: warning: not today\n{text}\ndone\n")
    ran = {"squeue": ([1, 14], [60, 40]), "sacct": ([1, 3, 6], [60, 100, 90])}[program]
    assert (jobs.job_id.tolist(), jobs.run_time.tolist()) == ran, said


def test_json_of_which_one_record_is_not_as_expected(tmp_path: Path) -> None:
    answer = json.loads(json.dumps(FORMS["24.11"]["sacct"]))
    answer["jobs"].append({"time": None})
    said, jobs = exported(tmp_path, json.dumps(answer))
    assert len(jobs) == 3 and "1 not as expected" in said
    with pytest.raises(WorkloadError, match=r"not what `squeue --json` or `sacct --json` of Slurm 24.11.5 write"):
        exported(tmp_path, json.dumps(answer | {"jobs": [{"time": None}]}))


FIELDS = st.one_of(
    st.sampled_from(["", "Unknown", "None", "2024-03-01T08:00:00", "1709280000", "1-00:00:00", "UNLIMITED", "7", "x"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=8),
)


@given(rows=st.lists(st.lists(FIELDS, min_size=8, max_size=10), max_size=4), junk=st.text(max_size=20))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_of_sacct_is_jobs_or_counted_or_refused(tmp_path: Path, rows: list[list[str]], junk: str) -> None:
    try:
        said, jobs = exported(tmp_path, (junk.replace("\n", " ") + "\n" + sacct(row(), *map(tuple, rows))).encode())
    except WorkloadError as error:
        assert "\n" not in str(error)
    else:
        assert (jobs.run_time > 0).all() and "jobs" in said
