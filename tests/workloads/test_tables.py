"""Tables of jobs: what their columns mean, the cluster, what is left out, and what is refused with one useful line."""

import bz2
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import ROOT, SMALL

from workloads.jobs import Workload, WorkloadError
from workloads.load import load_workload, workload_name
from workloads.reading import Reading

# In the form of Alibaba's openb_pod_list_default.csv and openb_node_list_all_node.csv
PODS = """name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time
pod-0,12000,16384,1,1000,,LS,Running,0,12537,0
pod-1,6000,12288,1,460,,LS,Running,427,12902,430
pod-2,88000,327680,8,1000,V100,BE,Running,1558,12902,1558
pod-3,18708,64512,1,1000,,LS,Pending,10019,10020,
pod-4,4000,2048,0,0,,LS,Running,5,65,15
"""
NODES = "sn,cpu_milli,memory_mib,gpu,model\nnode-0,32000,262144,0,\nnode-1,64000,262144,2,P100\n"


# In the form of Philly's cluster_job_log and cluster_machine_list
def philly(job: int, vc: str, user: str, submitted: str, *attempts: tuple[str, str | None, list[int]]) -> dict:
    """A record: of each attempt the times and how many GPUs it had on which server."""
    return {
        "status": "Pass", "vc": vc, "jobid": f"application_{job}", "user": user, "submitted_time": submitted,
        "attempts": [
            {"start_time": start, "end_time": end,
             "detail": [{"ip": f"m{k}", "gpus": [f"gpu{g}" for g in range(count)]} for k, count in enumerate(gpus)]}
            for start, end, gpus in attempts
        ],
    }  # fmt: skip


PHILLY = [
    philly(
        1, "ee9e8c", "ce2f4c", "2017-10-07 01:11:39", ("2017-10-07 01:12:09", "2017-10-07 01:13:23", [2]),
        ("2017-10-07 01:13:30", "2017-10-07 01:20:00", [1]),
    ),
    philly(2, "ee9e8c", "ce2f4c", "2017-10-07 01:10:00", ("2017-10-07 01:10:00", "2017-10-07 01:10:30", [2, 2])),
    philly(3, "11cb48", "0d3e0e", "2017-10-07 01:00:00"),
    philly(4, "11cb48", "0d3e0e", "2017-10-07 01:00:00", ("2017-10-07 01:05:00", None, [1])),
    philly(5, "11cb48", "0d3e0e", "2017-10-07 01:00:00", ("2017-10-07 01:05:00", "2017-10-07 03:05:00", [8])),
]  # fmt: skip
MACHINES = "machineId, number of GPUs, single GPU mem\nm1, 8, 24GB\nm2, 2, 12GB\n"
OPENB = ("submit=creation_time", "end=deletion_time", "demand.cpu=cpu_milli/1000")


def table(folder: Path, text: str | bytes, *columns: str, name: str = "jobs.csv", **reading: object) -> Workload:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return load_workload(str(folder / name), "all", Reading(columns=columns, **reading))  # type: ignore[arg-type]


def nodes(folder: Path, text: str = NODES) -> tuple[str, ...]:
    (folder / "nodes.csv").write_text(text)
    return (str(folder / "nodes.csv"),)


def test_the_format_of_openb(tmp_path: Path) -> None:
    workload = table(tmp_path, PODS, "openb", nodes=nodes(tmp_path))
    jobs = workload.jobs
    assert workload.cluster.resources == ("cpu", "memory", "gpu")
    assert workload.cluster.capacity.tolist() == [[32, 256, 0], [64, 256, 2]]
    assert jobs.submit_time.tolist() == [0, 5, 427] and jobs.wait_time.tolist() == [0, 10, 3]
    assert jobs.run_time.tolist() == [12_537, 50, 12_472] and jobs.requested_time.tolist() == jobs.run_time.tolist()
    assert jobs.demand.tolist() == [[12, 16, 1], [4, 2, 0], [6, 12, 0.46]]
    assert workload.skipped == {"never started": 1, "larger than any node (gangs)": 1} and workload.notes == []


def test_the_format_of_philly(tmp_path: Path) -> None:
    """A JSON array: attempts are taken together, jobs on several servers are counted."""
    text = json.dumps(PHILLY)
    workload = table(tmp_path, text, "philly", name="cluster_job_log", nodes=nodes(tmp_path, MACHINES))
    assert workload.cluster.capacity.tolist() == [[8], [2]] and workload.cluster.resources == ("gpu",)
    jobs = workload.jobs
    assert np.diff(jobs.submit_time).tolist() == [699] and jobs.submit_time[0] == 1_507_338_000
    assert jobs.run_time.tolist() == [7_200, 74 + 390] and jobs.demand.tolist() == [[8], [1]]
    assert jobs.wait_time.tolist() == [300, 30] and jobs.user.tolist() == [1, 0]
    assert workload.skipped == {"never started": 2, "on several nodes (gangs)": 1}
    assert workload.notes == ["2 queues in one pool: ee9e8c (1 jobs), 11cb48 (1 jobs); if each has its own, take one "
                              "with --partition"]  # fmt: skip
    one = table(tmp_path, text, "philly", name="cluster_job_log", partition="11cb48", nodes=nodes(tmp_path, MACHINES))
    assert one.jobs.demand.tolist() == [[8]]


def test_columns_by_name(tmp_path: Path) -> None:
    """As in the issue: submission, end, and one amount; run times have waits in them, and it is said."""
    workload = table(tmp_path, PODS, *OPENB, nodes=("2xcpu=32", "1xcpu=96@1.6"))
    assert workload.cluster.capacity.tolist() == [[32], [32], [96]] and workload.cluster.speed.tolist() == [1, 1, 1.6]
    assert workload.jobs.run_time.tolist() == [12_537, 60, 12_475, 11_344, 1]
    assert workload.jobs.demand[:, 0].tolist() == [12, 4, 6, 88, 18.708]
    assert "run times are counted from the submission" in workload.notes[0]


ROWS = (
    "id,submit,start,end,limit,user,gpu,queue\n7,2024-03-01 08:00:00,2024-03-01T08:00:30,2024-03-01T09:00:30,2:00:00,"
)
ROWS += "ann,2,a\n9,2024-03-01 07:00:00,2024-03-01T08:00:00Z,2024-03-01T10:00:00+01:00,3600,bob,1,b\n"


@pytest.mark.parametrize("words", [(), ("mapping.yaml",), ("submit=submit", "mapping.yaml")])
def test_names_mapping_files_and_texts_as_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """Columns that are called after what they are need no flag; the cluster is what was in use at once."""
    monkeypatch.chdir(tmp_path)
    roles = {role: role for role in ("submit", "start", "end", "limit", "user", "queue", "id")}
    (tmp_path / "mapping.yaml").write_text(json.dumps({**roles, "demand": {"gpu": "gpu"}}))
    workload = table(tmp_path, ROWS, *words)
    jobs = workload.jobs
    assert jobs.job_id.tolist() == [9, 7] and np.diff(jobs.submit_time).tolist() == [3600]
    assert jobs.run_time.tolist() == [3600, 3600] and jobs.wait_time.tolist() == [3600, 30]
    assert jobs.requested_time.tolist() == [3600, 7200] and jobs.user.tolist() == [1, 0]
    assert workload.cluster.capacity.tolist() == [[3]] and workload.cluster.resources == ("gpu",)
    assert workload.notes[-1] == "the cluster is one node with 3 gpu, the most in use at once; --nodes gives its own"
    if not words:
        named = "submit=submit, start=start, end=end, limit=limit, user=user, queue=queue, id=id, demand.gpu=gpu"
        assert workload.notes[0] == f"columns by their names: {named}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("jobs.csv.gz", gzip.compress(PODS.encode())),
        ("jobs.csv.bz2", bz2.compress(PODS.encode())),
        ("jobs.csv", b"\xef\xbb\xbf" + PODS.replace("\n", "\r\n").encode()),
        ("jobs.csv", PODS.encode("utf-16")),
        ("jobs.csv", PODS.replace(",", ";").encode()),
        ("jobs.tsv", PODS.replace(",", "\t").encode()),
        ("jobs.csv", PODS.replace("\n", "\n\n").encode()),
        ("jobs.csv", re.sub(r"[^,\n]+", lambda found: f'"{found[0]}"', PODS).encode()),
        ("jobs.parquet", None),
        ("jobs", None),
        ("jobs.json", None),
    ],
)
def test_the_same_table_in_other_forms(tmp_path: Path, name: str, content: bytes | None) -> None:
    plain = table(tmp_path, PODS, "openb", name="plain.csv")
    if content is None:
        frame = pd.read_csv(tmp_path / "plain.csv")
        if name.endswith(".json"):
            frame.to_json(tmp_path / name, orient="records")
        else:
            frame.to_parquet(tmp_path / name)
        content = (tmp_path / name).read_bytes()
    workload = table(tmp_path, content, "openb", name=name)
    assert workload_name(str(tmp_path / name)).partition(".")[0] == "jobs"
    for field in ("submit_time", "run_time", "demand", "wait_time", "job_id"):
        assert getattr(workload.jobs, field).tolist() == getattr(plain.jobs, field).tolist(), field
    assert workload.skipped == plain.skipped == {"never started": 1}


def test_times_of_parquet(tmp_path: Path) -> None:
    """Moments with and without a zone, durations, numbers with gaps, categories."""
    at = pd.to_datetime(["2024-03-01T08:00", "2024-03-01T07:00", None])
    frame = pd.DataFrame({
        "submit": at, "start": at.tz_localize("UTC").tz_convert("Asia/Tokyo") + pd.Timedelta(seconds=5),
        "duration": pd.to_timedelta([60, 90, None], unit="s"), "cpu": pd.array([2, 3, None], "Int64"),
        "user": pd.Categorical(["b", "a", "b"]),
    })  # fmt: skip
    frame[:2].to_parquet(tmp_path / "jobs.parquet")
    workload = load_workload(str(tmp_path / "jobs.parquet"), "all")
    assert workload.jobs.run_time.tolist() == [90, 60] and workload.jobs.wait_time.tolist() == [5, 5]
    assert workload.jobs.demand.tolist() == [[3], [2]] and workload.jobs.user.tolist() == [1, 0]
    frame.to_parquet(tmp_path / "jobs.parquet")
    with pytest.raises(WorkloadError, match=r"line 3: submit=submit is empty; correct .* \(1 bad line of 3; "):
        load_workload(str(tmp_path / "jobs.parquet"), "all")


GOOD = "submit,start,end,cpu\n" + "0,1,2,3\n" * 400


@pytest.mark.parametrize(
    ("row", "reason", "problem"),
    [
        ("x,1,2,3", "no number", "submit=submit is no number, and no time as 2024-03-01T08:00:00"),
        ("0,1,2,many", "no number", "demand.cpu=cpu is no number"),
        (",1,2,3", "no submit time", "submit=submit is empty"),
        ("0,5,2,3", "negative time", "it ends before it starts"),
        ("0,1,2,-3", "negative amount", "a demand is negative"),
        ("0,1,2,inf", "no number", "demand.cpu=cpu is no number"),
        ("1700000000000,1,2,3", "no time in seconds",
         "submit=submit: no time in seconds, of milliseconds it seems; write submit/1000"),
        ("0,1,2,3,4", "too many fields", "5 fields where line 1 has 4"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_or_left_out(tmp_path: Path, row: str, reason: str, problem: str) -> None:
    lines = GOOD.splitlines()
    text = "\n".join([*lines[:100], row, *lines[100:]]) + "\n"
    path = tmp_path / "jobs.csv"
    message = f"{path}: line 101: {problem}; correct or delete the line (1 bad line of 40"
    with pytest.raises(WorkloadError, match="^" + re.escape(message) + r"\d; --skip-bad-lines leaves them out\)$"):
        table(tmp_path, text)
    workload = table(tmp_path, text, skip_bad_lines=True)
    assert len(workload.jobs) == 400 and workload.skipped == {f"bad line: {reason}": 1}
    assert workload.notes[-1] == f"bad lines left out, such as line 101: {problem.partition(';')[0]}"
    with pytest.raises(WorkloadError, match=r"\(9 bad lines of \d+; --skip-bad-lines leaves out 1% at most\)$"):
        table(tmp_path, text + f"{row}\n" * 8, skip_bad_lines=True)


def test_amounts_with_units(tmp_path: Path) -> None:
    """As Kubernetes writes them; bytes, or what an expression makes of them."""
    rows = "submit,duration,cpu,memory\n0,60,500m,16Gi\n1,60,2,512 MiB\n2,60,0.25,1.5GB\n"
    columns = ("submit=submit", "duration=duration", "demand.cpu=cpu", "demand.memory=memory/1073741824")
    workload = table(tmp_path, rows, *columns, nodes=nodes(tmp_path, "cpu,memory\n4000m,64\n"))
    assert workload.jobs.demand[:, 0].tolist() == [0.5, 2, 0.25] and workload.cluster.capacity.tolist() == [[4, 64]]
    assert workload.jobs.demand[:, 1].tolist() == [16, 0.5, 1.5e9 / 2**30]
    with pytest.raises(WorkloadError, match=r"line 2: demand.cpu=cpu is no number; correct"):
        table(tmp_path, "submit,start,end,cpu\n0,1,2,3Q\n")
    with pytest.raises(WorkloadError, match=r"submit=submit: more than 20 years from the first job to the last; give"):
        table(tmp_path, "submit,start,end,cpu\n0,1,2,3\n700000000,700000001,700000002,3\n")


def test_rows_that_are_no_jobs_yet(tmp_path: Path) -> None:
    rows = "submit,start,end,cpu,nodes\n0,1,2,3,1\n0,,2,3,1\n0,1,,3,1\n0,1,1,3,1\n0,1,2,0,1\n0,1,2,,1\n0,1,2,3,4\n"
    workload = table(tmp_path, rows)
    assert len(workload.jobs) == 1
    assert workload.skipped == {
        "never started": 1, "not ended": 1, "no run time": 1, "no demand": 2, "on several nodes (gangs)": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        (PODS, (), "no column is what a job takes (demand.NAME); name it, as in --columns submit=creation_time end="),
        (PODS, OPENB[:1], "no column is the end or the duration (end, duration); name it"),
        (PODS, OPENB[1:], "no column is the time of submission (submit); name it"),
        (PODS, ("submit=created", *OPENB[1:]), "submit=created: no column 'created'; columns: name, cpu_milli, memory"),
        (PODS, (*OPENB, "user=owner"), "user=owner: no column 'owner'; columns: name, cpu_milli"),
        (PODS, OPENB, "how large is the cluster? give --nodes nodes.csv, or --nodes 8xcpu=32,memory=128"),
        ("JobIDRaw,User\n1,a\n", (), "a table of sacct, it seems; `python slurm_agent.py export"),
        ("", (), "empty; give a table with a row for each job"),
        ("submit,end,cpu\n", (), "no row; give a table"),
        ("submit,start,end,cpu\n0,,,1\n", (), "no job left, {'never started': 1}; see --columns, --nodes and --part"),
        (b"\0\1\2", (), "binary data; give CSV, Parquet or a JSON array"),
        (b"PAR1\0\0", (), "no table that can be read ("),
        ("[1, 2]", (), "no table that can be read ("),
        ("[]", (), "no row; give a table"),
    ],
)
def test_what_is_no_table_of_jobs(tmp_path: Path, text: str | bytes, columns: tuple[str, ...], message: str) -> None:
    with pytest.raises(WorkloadError, match="^" + re.escape(f"{tmp_path / 'jobs.csv'}: {message}")):
        table(tmp_path, text, *columns)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"columns": ("openbb",)}, "--columns openbb: no role=column, no file, and no format known by name (openb"),
        ({"columns": ("submitted=x",)}, "--columns submitted=x: submitted is no role; the roles are submit, start"),
        ({"columns": ("nodes.csv",)}, "--columns nodes.csv: no mapping in YAML, as in `submit: creation_time` ("),
        ({"nodes": ("nowhere.csv",)}, "--nodes nowhere.csv: no such file, and no kind of nodes as 3xcpu=32,memory="),
        ({"nodes": ("3xcpu=many",)}, "--nodes 3xcpu=many: no such file, and no kind of nodes"),
        ({"nodes": ("3xcpu=4@0",)}, "--nodes 3xcpu=4@0: no such file, and no kind of nodes"),
        ({"nodes": ("3xram=4",)}, "--nodes 3xram=4: ram is nothing that jobs demand; that is cpu, memory, gpu"),
        ({"nodes": ("0xcpu=4",)}, "--nodes 0xcpu=4: no node has any cpu or memory or gpu"),
        ({"nodes": ("pods.csv",), "columns": (*OPENB, "node.cpu=cores")}, "pods.csv: node.cpu=cores: no column 'co"),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, tuple[str, ...]], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    nodes(tmp_path)
    (tmp_path / "pods.csv").write_text(PODS)
    with pytest.raises(WorkloadError, match="^" + re.escape(message)):
        load_workload("pods.csv", "all", Reading(**({"columns": ("openb",)} | flags)))  # type: ignore[arg-type]


def test_kinds_of_nodes_in_a_table(tmp_path: Path) -> None:
    """`count` of each, and `speed`; a resource that no node has is none, and who demands it is too large."""
    text = "cpu,memory,gpu,count,speed\n32,128,0,2,1\n16,64,0,1,1.6\n0,0,0,5,1\n"
    jobs = "submit,duration,cpu,memory,gpu\n0,60,1,1,0\n1,60,1,1,1\n2,60,32,100,0\n"
    workload = table(tmp_path, jobs, nodes=nodes(tmp_path, text))
    assert workload.cluster.resources == ("cpu", "memory")
    assert workload.cluster.capacity.tolist() == [[32, 128], [32, 128], [16, 64]]
    assert workload.cluster.speed.tolist() == [1, 1, 1.6]
    assert workload.jobs.demand.tolist() == [[1, 1], [32, 100]]
    assert workload.skipped == {"larger than any node (gangs)": 1}


@pytest.mark.parametrize("row", ["4,2.5,1", "4,,1", "4,1,0", "4,1,fast", "many,1,1", "-4,1,1"])
def test_nodes_that_make_no_sense(tmp_path: Path, row: str) -> None:
    file = nodes(tmp_path, f"cpu,count,speed\n4,1,1\n{row}\n")
    with pytest.raises(WorkloadError, match=r"nodes.csv: line 3: node.(cpu|count|speed)=\1 makes no sense; correct or"):
        table(tmp_path, "submit,duration,cpu\n0,60,1\n", nodes=file)


def test_the_size_of_a_partition_of_a_trace(tmp_path: Path) -> None:
    (tmp_path / "a.swf").write_text("; MaxProcs: 64\n1 0 0 9 4 -1 -1 4 9 -1 1 1 1 1 1 1 -1 -1\n" * 2)
    reading = Reading(nodes=("2xprocessors=8", "1xprocessors=4"))
    assert load_workload(str(tmp_path / "a.swf"), "all", reading).cluster.capacity.tolist() == [[20]]
    with pytest.raises(WorkloadError, match="--nodes: 2 processors, and a job has 4; give more"):
        load_workload(str(tmp_path / "a.swf"), "all", Reading(nodes=("1xprocessors=2",)))


def test_what_is_no_table_is_read_without_the_readers_of_tables() -> None:
    code = "import sys, workloads; workloads.load_workload(sys.argv[1]); print({'pandas', 'pyarrow'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code, str(SMALL)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


UNITS = {"seconds": 1, "milliseconds": 1000, "microseconds": 1_000_000}


NUMBERS = st.integers(0, 10**6), st.integers(0, 10**4), st.integers(1, 10**5), st.integers(1, 64), st.integers(0, 8)


@given(
    jobs=st.lists(st.tuples(*NUMBERS), min_size=1, max_size=12),
    unit=st.sampled_from([*UNITS, "text"]), by_duration=st.booleans(), delimiter=st.sampled_from(",;\t|"),
    users=st.lists(st.text("abc ,;|'\"\n1é", min_size=1, max_size=5), min_size=12, max_size=12),
)  # fmt: skip
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_jobs_come_back_from_any_way_of_writing_them(
    tmp_path: Path, jobs: list[tuple[int, ...]], unit: str, by_duration: bool, delimiter: str, users: list[str]
) -> None:
    submit, wait, run, cpu, gpu = (np.array(values, float) for values in zip(*jobs, strict=True))
    scale = UNITS.get(unit, 1)
    moments = {"created": submit, "began": submit + wait, "ended": submit + wait + run}
    frame = pd.DataFrame({
        name: pd.to_datetime(at, unit="s").strftime("%Y-%m-%dT%H:%M:%S") if unit == "text" else at * scale
        for name, at in moments.items()
    })  # fmt: skip
    frame = frame.assign(took=run * scale, milli=cpu * 1000, gpus=gpu, half=0.5, who=users[: len(run)])
    frame.to_csv(tmp_path / "jobs.csv", sep=delimiter, index=False)
    by = "" if scale == 1 else f"/{scale}"
    last = f"duration=took{by}" if by_duration else f"end=ended{by}"
    columns = (f"submit=created{by}", f"start=began{by}", last, "demand.cpu=milli/1000", "demand.gpu=gpus*half*2")
    workload = table(tmp_path, (tmp_path / "jobs.csv").read_bytes(), *columns, "user=who")
    order = np.argsort(submit, kind="stable")
    found = workload.jobs
    assert np.allclose(found.submit_time, submit[order]) and np.allclose(found.run_time, run[order])
    assert np.allclose(found.wait_time, wait[order]) and np.allclose(found.demand[:, 0], cpu[order])
    assert found.demand.shape[1] == (2 if gpu.any() else 1)
    assert (workload.cluster.capacity[0] >= found.demand.max(axis=0) - 1e-9).all()


@given(text=st.binary(max_size=120) | st.text("submit,endcpu\n0123456789.-\"'xT: ", max_size=200).map(str.encode))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_table_or_refused_with_one_line(tmp_path: Path, text: bytes) -> None:
    for head in (b"", b"submit,end,cpu\n", b"submit,start,duration,cpu\n0,0,60,1\n"):
        try:
            assert len(table(tmp_path, head + text).jobs) > 0
        except WorkloadError as error:
            assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
