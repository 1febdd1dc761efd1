"""SWF traces are read to the letter, or refused with one useful line; what is written reads back the same."""

import bz2
import gzip
import io
import lzma
import re
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import random_jobs, same
from places import SMALL, TRACES, needs_traces

from workloads.jobs import Cluster, WorkloadError
from workloads.load import load_workload, workload_name
from workloads.reading import Reading
from workloads.swf import jobs_from_swf, read_swf, write_swf

# job, submit, wait, run, allocated | CPU, memory | requested procs, time, memory | status, user, group, executable, ...
LINE = "1 100 5 60 4 -1 -1 8 3600 -1 1 12 3 7 2 -1 -1 -1"


def trace(folder: Path, *lines: str, header: str = "; MaxProcs: 128", end: str = "\n") -> str:
    path = folder / "cluster.swf"
    path.write_text("\n".join((header, *lines)) + end)
    return str(path)


def with_field(number: int, value: object) -> str:
    values = LINE.split()
    values[number - 1] = str(value)
    return " ".join(values)


def test_every_field_of_a_line_arrives(tmp_path):
    workload = load_workload(trace(tmp_path, LINE), "all")
    expected = {"submit_time": 100, "run_time": 60, "requested_time": 3600, "demand": [8], "user": 12, "group": 3}
    expected |= {"executable": 7, "queue": 2, "wait_time": 5, "job_id": 1}
    assert {name: getattr(workload.jobs, name)[0].tolist() for name in expected} == expected
    assert workload.cluster.capacity.tolist() == [[128]] and workload.cluster.resources == ("processors",)
    assert workload.segments.tolist() == [[0, 1]] and workload.skipped == {}


def test_missing_requests_fall_back_to_what_the_job_used(tmp_path):
    jobs = load_workload(trace(tmp_path, "1 0 -1 60 4 -1 -1 -1 -1 -1 1 -1 -1 -1 -1 -1 -1 -1"), "all").jobs
    assert (jobs.demand[0, 0], jobs.requested_time[0], jobs.wait_time[0], jobs.user[0]) == (4, 60, 0, -1)


@pytest.mark.parametrize(
    ("header", "processors"),
    [
        ("; MaxProcs: 338 (batch partition)", 338),
        (";MaxProcs:1024", 1024),
        ("; MaxProcs: 1,024 (see note 3)", 1024),
        ("; MaxProcs: 64,32", 64),
        (";  maxprocs : 128 ", 128),
        ("; MaxProcs 64", 64),
        ("; MaxNodes: 240", 240),
        ("; MaxProcs: 430 (336 batch, 94 interactive)", 430),
        ("; MaxNodes: 32\n; MaxProcs: 512\n; MaxProcs: 16", 512),
        ("; MaxProcs: -1\n; MaxNodes: 100", 100),
        ("; MaxProcs: unknown", 8),
        ("; Computer: no sizes given", 8),
    ],
)
def test_the_machine_is_as_large_as_the_header_says(tmp_path, header, processors):
    assert load_workload(trace(tmp_path, LINE, header=header), "all").cluster.capacity.tolist() == [[processors]]


def test_lines_are_sorted_by_submit_time_and_equal_ones_keep_their_order(tmp_path):
    lines = [LINE.replace("1 100", f"{job} {submit}", 1) for job, submit in ((1, 50), (2, 20), (3, 50), (4, 20))]
    assert load_workload(trace(tmp_path, *lines), "all").jobs.job_id.tolist() == [2, 4, 1, 3]


def test_jobs_that_never_ran_are_skipped_and_counted(tmp_path):
    cancelled = "2 110 5 0 -1 -1 -1 8 60 -1 5 1 1 1 1 -1 -1 -1"
    lines = [LINE, cancelled, with_field(4, 0), with_field(4, -1), with_field(11, 3), "9 9 9 9 0 -1 -1 0" + " -1" * 10]
    workload = load_workload(trace(tmp_path, *lines), "all")
    assert len(workload.jobs) == 1
    assert workload.skipped == {
        "part of a checkpointed job": 1,
        "cancelled before it started": 1,
        "no run time": 2,
        "no processors": 1,
    }


def test_short_lines_comments_blank_lines_and_foreign_line_ends_are_read(tmp_path):
    path = tmp_path / "cluster.swf"
    nine = " ".join(LINE.split()[:9])
    path.write_bytes(f"\ufeff; MaxProcs: 128\r\n; Müller\r\n\r\n  {nine}\r\n; a note\r\n\t{LINE}\r\n".encode())
    swf = read_swf(path)
    assert swf.lines.tolist() == [4, 6] and swf.max_procs == 128
    assert swf.records[0].tolist() == [*map(float, nine.split()), *[-1.0] * 9]


def test_gzip_is_recognised_by_its_content(tmp_path):
    path = tmp_path / "cluster.swf"
    path.write_bytes(gzip.compress(f"; MaxProcs: 128\n{LINE}\n".encode()))
    assert len(load_workload(str(path), "all").jobs) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (with_field(2, -7), "line 3: field 2 (submit time): -7 is a negative time; correct or delete the line"),
        (with_field(2, -1), "line 3: field 2 (submit time): -1 is a negative time; correct or delete the line"),
        (with_field(4, -60), "line 3: field 4 (run time): -60 is a negative time; correct or delete the line"),
        (
            with_field(9, "nan"),
            "line 3: field 9 (requested time): nan is not a finite number; correct or delete the line",
        ),
        (with_field(8, "-inf"), "line 3: field 8 (requested processors): -inf is not a finite number"),
        (with_field(12, "alice"), "line 3: field 12 (user): 'alice' is not a number; correct or delete the line"),
        (with_field(1, 2**60), "line 3: field 1 (job number): 1.15292e+18 does not fit in 53 bits; correct or delete"),
        (with_field(2, 1_700_000_000_000), "line 3: field 2 (submit time): 1.7e+12 is no time in seconds, of millisec"),
        (with_field(8, 129), "line 3: field 8 (requested processors): 129 processors, but MaxProcs in the header"),
        ("1 2 3", "line 3: 3 fields where SWF has 18; correct or delete the line, or give an SWF trace"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = trace(tmp_path, LINE, line, LINE)
    with pytest.raises(WorkloadError, match="^" + re.escape(f"{path}: {message}")):
        load_workload(path)


@pytest.mark.parametrize("cut", [40, 20, 3])
def test_a_last_line_cut_short_is_named(tmp_path, cut):
    path = trace(tmp_path, LINE, LINE[:cut], end="")
    with pytest.raises(WorkloadError, match=re.escape(f"{path}: line 3: the last line is cut short, ")):
        load_workload(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 0: the end, and no job yet; give a trace with one line per job"),
        (b"; MaxProcs: 4\n\n", "line 2: the end, and no job yet; give a trace with one line per job"),
        (b"; fine\n\x7fELF\x00\x01", "line 2: binary data; give an SWF trace, plain text or compressed"),
        (gzip.compress(LINE.encode() * 50, mtime=0)[:-20], "damaged or truncated gzip file ("),
        (b"\x1f\x8bnot gzip at all", "damaged or truncated gzip file ("),
        (with_field(4, 0).encode(), "line 1: no job left, {'no run time': 1}; give a trace of jobs that ran"),
        (LINE.encode(), "its 1 jobs leave none for the train split; use a longer trace"),
    ],
)
def test_a_file_without_a_usable_trace_is_refused(tmp_path, content, message):
    path = tmp_path / "broken.swf"
    path.write_bytes(content)
    with pytest.raises(WorkloadError, match="^" + re.escape(f"{path}: {message}")):
        load_workload(str(path))


CHECKPOINTED = """; MaxProcs: 16
1 0 10 300 4 -1 -1 4 600 -1 1 1 1 1 1 1 -1 -1
1 0 10 100 4 -1 -1 4 600 -1 2 1 1 1 1 1 -1 -1
1 -1 60 200 4 -1 -1 4 600 -1 3 1 1 1 1 1 -1 -1
2 50 0 100 8 -1 -1 8 200 -1 1 1 1 1 1 1 -1 -1
"""


@pytest.mark.parametrize("status", [2, 3, 4])
def test_later_parts_of_a_checkpointed_job_need_no_submit_time(tmp_path, status):
    path = tmp_path / "cluster.swf"
    path.write_text(CHECKPOINTED.replace("-1 3 1 1", f"-1 {status} 1 1"))
    workload = load_workload(str(path), "all")
    assert workload.jobs.submit_time.tolist() == [0, 50] and workload.jobs.run_time.tolist() == [300, 100]
    assert workload.skipped == {"part of a checkpointed job": 2}
    path.write_text(CHECKPOINTED.replace("-1 3 1 1", "-1 1 1 1"))
    with pytest.raises(WorkloadError, match=r"line 4: field 2 \(submit time\): -1 is a negative time"):
        load_workload(str(path), "all")


BAD = {
    "negative time": with_field(4, -1_359_980_000),
    "larger than the machine": with_field(8, 200),
    "not a number": with_field(12, "alice"),
    "not a finite number": with_field(9, "nan"),
    "too few fields": "1 2 3",
}


def test_a_few_bad_lines_are_left_out_if_one_says_so(tmp_path):
    """Counted by reason, the first three named; the refusal without the flag names their number and the flag."""
    lines = [*[LINE] * 250, *BAD.values(), *[LINE] * 245]
    path = trace(tmp_path, *lines)
    first = f"{path}: line 252: field 4 (run time): -1.35998e+09 is a negative time; correct or delete the line"
    with pytest.raises(WorkloadError, match=re.escape(f"{first} (5 bad lines of 500; --skip-bad-lines leaves them")):
        load_workload(path, "all")
    workload = load_workload(path, "all", Reading(skip_bad_lines=True))
    assert len(workload.jobs) == 495
    assert workload.skipped == {f"bad line: {reason}": 1 for reason in BAD}
    assert workload.notes == [
        "bad lines left out, such as line 252: field 4 (run time): -1.35998e+09 is a negative time; "
        "line 253: field 8 (requested processors): 200 processors, but MaxProcs in the header says that the machine "
        "has 128; line 254: field 12 (user): 'alice' is not a number"
    ]


@pytest.mark.parametrize("reading", [Reading(), Reading(skip_bad_lines=True)])
def test_more_than_one_bad_line_in_a_hundred_is_a_bad_file(tmp_path, reading):
    path = trace(tmp_path, *[LINE] * 99, *[with_field(2, -7)] * 2)
    with pytest.raises(WorkloadError, match=r"\(2 bad lines of 101; --skip-bad-lines leaves out 1% at most\)$"):
        load_workload(path, "all", reading)


def test_a_last_line_cut_short_is_left_out(tmp_path):
    path = trace(tmp_path, *[LINE] * 100, LINE[:30], end="")
    assert load_workload(path, "all", Reading(skip_bad_lines=True)).skipped == {"bad line: cut short": 1}


@pytest.mark.parametrize("more", [["0"], ["qsub:4", "n1=2"], ["7"] * 20, ["; checked"], ["x|y,z,w"]])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_fields_after_the_last_are_not_read(tmp_path, more, all_of_them):
    """As in the traces of MetaCentrum and in those for Alea."""
    longer = " ".join([LINE, *more])
    workload = load_workload(trace(tmp_path, longer, *[longer if all_of_them else LINE] * 2), "all")
    assert workload.jobs.run_time.tolist() == [60, 60, 60] and workload.skipped == {}
    assert workload.notes == [f"{3 if all_of_them else 1} lines have more than 18 fields; the first 18 are read"]


def test_large_numbers_of_jobs_and_users(tmp_path):
    lines = [with_field(1, 9_007_199_254_740_992), with_field(12, 2**40), with_field(12, -1), with_field(12, 2**40 + 1)]
    jobs = load_workload(trace(tmp_path, *lines, LINE), "all").jobs
    assert jobs.job_id.tolist() == [2**53, 1, 1, 1, 1] and jobs.user.dtype == np.int32
    assert jobs.user[2] == -1 and jobs.user[0] == jobs.user[4] and len(set(jobs.user.tolist())) == 4


def test_times_in_milliseconds_are_refused(tmp_path):
    """Unix times by their size; other times by a trace that would go on for centuries."""
    millis = [f"{job} {1_700_000_000_000 + job * 60_000} 0 60000 4 -1 -1 4 3600000" for job in range(9)]
    with pytest.raises(WorkloadError, match=r"milliseconds it seems; give all times in seconds \(9 bad lines of 9; "):
        load_workload(trace(tmp_path, *millis), "all")
    with pytest.raises(WorkloadError, match=r"field 2 \(submit time\): more than 20 years from the first job to the l"):
        load_workload(trace(tmp_path, LINE, with_field(2, 7e8)), "all")


def zipped(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


TEXT = f"; MaxProcs: 128\n{LINE}\n".encode() * 40
COMPRESSED = {
    "gz": gzip.compress(TEXT),
    "bz2": bz2.compress(TEXT),
    "xz": lzma.compress(TEXT),
    "zst": pyarrow.compress(TEXT, codec="zstd", asbytes=True),
    "zip": zipped(("folder/", b""), ("folder/cluster.swf", TEXT), ("__MACOSX/._cluster.swf", b"\0")),
}


@pytest.mark.parametrize("ending", COMPRESSED)
def test_compressed_traces(tmp_path, ending):
    """By their content, whatever they are called; one that is cut short is refused."""
    path = tmp_path / f"cluster.swf.{ending}"
    path.write_bytes(COMPRESSED[ending])
    assert len(load_workload(str(path), "all").jobs) == 40 and workload_name(str(path)) == "cluster"
    (tmp_path / "cluster").write_bytes(COMPRESSED[ending])
    assert len(load_workload(str(tmp_path / "cluster"), "all").jobs) == 40
    path.write_bytes(COMPRESSED[ending][:-20])
    with pytest.raises(WorkloadError, match=rf"^{re.escape(str(path))}: damaged or truncated \w+ file \("):
        load_workload(str(path), "all")


def test_a_zip_of_several_files_is_refused(tmp_path):
    path = tmp_path / "traces.zip"
    path.write_bytes(zipped(("a.swf", TEXT), ("b.swf", TEXT)))
    with pytest.raises(WorkloadError, match=r"2 files in it \(a.swf, b.swf\); unpack it, and give the trace"):
        load_workload(str(path), "all")


@pytest.mark.parametrize(
    ("end", "notes"),
    [
        (b"\x1a", []),
        (b"\r\n\x1a\x1a\0\0\0", []),
        (b"\n\x1aThis was sent with ...\n1 2 3\n", ["what follows the end-of-file mark (^Z) in line 4 is not read"]),
    ],
)
def test_the_end_of_file_mark_of_dos(tmp_path, end, notes):
    path = tmp_path / "cluster.swf"
    path.write_bytes(f"; MaxProcs: 128\n; a comment with \x1a in it\n{LINE}".encode() + end)
    workload = load_workload(str(path), "all")
    assert len(workload.jobs) == 1 and workload.notes == notes


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (
            "JobIDRaw|User|Submit\n1|a|2024",
            "line 1: a table of sacct, it seems, no SWF trace; with `sacct -P`, `python",
        ),
        ("JobID           JobName  Partition\n----- ----- -----\n", "line 1: a table of sacct, it seems"),
        ('\n{\n "jobs": []}', "line 2: JSON, no SWF trace; if it is `squeue --json` of finished jobs, `python slurm_a"),
        ("JobId=7 UserId=ann(7) Name=x", "line 1: a log of Slurm's jobcomp/filetxt, no SWF trace; `python slurm_agent"),
        ("job_name,submit_time,duration\nx,1,2", "line 1: a table (CSV), no SWF trace; let its name end in .csv, and"),
    ],
)
def test_known_foreign_formats_get_advice(tmp_path, content, advice):
    path = tmp_path / "cluster.swf"
    path.write_text(content)
    with pytest.raises(WorkloadError, match="^" + re.escape(f"{path}: {advice}")):
        load_workload(str(path), "all")


def parted(job: int, submit: int, processors: int, queue: int, partition: int, run: int = 60) -> str:
    return f"{job} {submit} 0 {run} {processors} -1 -1 {processors} 600 -1 1 1 1 1 {queue} {partition} -1 -1"


def test_partitions_are_one_pool_only_with_a_warning(tmp_path):
    """Each has jobs on all of its processors at some time, as many as are known to have been in use at once."""
    lines = [parted(k, 100 * (k // 2), 3 if k % 2 else 8, 1, 1 + k % 2) for k in range(20)]
    path = trace(tmp_path, *lines, parted(99, 5, 1, 1, 2))
    pool = load_workload(path, "all")
    assert pool.notes == [
        "2 partitions in one pool: 2 (11 jobs), 1 (10 jobs); if each has its own, take one with --partition"
    ]
    assert pool.cluster.capacity.tolist() == [[128]]
    one, two = (load_workload(path, "all", Reading(partition=name)) for name in ("1", "2"))
    assert (one.cluster.capacity.tolist(), len(one.jobs)) == ([[8]], 10)
    assert (two.cluster.capacity.tolist(), two.jobs.demand[:, 0].tolist()) == ([[4]], [3, 1, *[3] * 9])
    assert two.notes == [
        "partition 2: its size is not in the file; taken for 4 processors, the most in use at once; "
        "--nodes 1xprocessors=N says otherwise"
    ]
    with pytest.raises(WorkloadError, match="--partition 3: no job has this partition; there are 1, 2"):
        load_workload(path, "all", Reading(partition="3"))


@pytest.mark.parametrize(
    ("header", "partitions", "queues", "said"),
    [
        ("; MaxQueues: 7", [1, 1], [0, 3], "2 queues in one pool: 0 (1 jobs), 3 (1 jobs); if each has"),
        ("; MaxPartitions: 3", [-1, -1], [-1, -1], "3 partitions, its header says, but no line says which"),
        ("; MaxQueues: 3", [-1, -1], [1, 1], "3 queues, its header says, but no line says which"),
        ("; MaxQueues: 1", [-1, 1], [1, 1], ""),
    ],
)
def test_queues_and_headers_are_looked_at(tmp_path, header, partitions, queues, said):
    lines = [parted(k, k, 1, q, p) for k, (q, p) in enumerate(zip(queues, partitions, strict=True))]
    assert "".join(load_workload(trace(tmp_path, *lines, header=header), "all").notes).startswith(said)
    if "0" in said[:50]:
        assert load_workload(trace(tmp_path, *lines, header=header), "all", Reading(partition="3")).jobs.job_id == [1]


def test_what_means_nothing_for_a_workload_is_refused():
    with pytest.raises(WorkloadError, match=r"^cloud: --partition means nothing for this kind of workload; leave it"):
        load_workload("cloud", reading=Reading(partition="1"))


FIELD = st.one_of(
    st.integers(-2, 200).map(str),
    st.sampled_from(["-1", "1e400", "nan", "x", "1700000000000", "-1359980000", str(2**54)]),
)


@given(
    lines=st.lists(st.lists(FIELD, min_size=7, max_size=21), max_size=4),
    status=st.integers(-1, 5), skip=st.booleans(), partition=st.sampled_from([None, "1", "x"]),
)  # fmt: skip
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lines_are_jobs_or_counted_or_refused(tmp_path, lines, status, skip, partition):
    """Among many good lines, whatever four others hold."""
    others = [" ".join([*values[:10], str(status), *values[10:]]) for values in lines]
    path = trace(tmp_path, *[LINE] * 200, *others, *[LINE] * 200)
    try:
        workload = load_workload(path, "all", Reading(skip_bad_lines=skip, partition=partition))
    except WorkloadError as error:
        assert "\n" not in str(error) and str(error).startswith(path)
        assert ("--skip-bad-lines leaves them out)" in str(error) and not skip) or "--partition" in str(error)
        return
    assert partition is not None or len(workload.jobs) + sum(workload.skipped.values()) == 400 + len(lines)
    assert (workload.jobs.run_time > 0).all() and (workload.jobs.demand <= 128).all()
    assert np.isfinite(workload.jobs.submit_time).all() and (workload.jobs.requested_time > 0).all()


@given(content=st.binary(max_size=200) | st.text("0123456789-.e; \nnaifMxProcs:", max_size=200).map(str.encode))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused_with_one_line(tmp_path, content):
    path = tmp_path / "fuzz.swf"
    path.write_bytes(content)
    try:
        assert len(load_workload(str(path), "all").jobs) > 0
    except WorkloadError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 30), suffix=st.sampled_from([".swf", ".swf.gz"]))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_reads_back_the_same(tmp_path, seed, count, suffix):
    jobs = random_jobs(np.random.default_rng(seed), count)
    path = tmp_path / f"export{suffix}"
    write_swf(path, jobs, Cluster(np.array([[64.0, 512.0], [8.0, 64.0]]), np.ones(2), ("cpu", "memory")))
    swf = read_swf(path)
    again, cluster, skipped, _ = jobs_from_swf(swf)
    assert same(again, replace(jobs, demand=jobs.demand[:, :1])) and not skipped and not swf.notes
    assert (cluster.capacity.tolist(), swf.max_nodes) == ([[72]], 2)
    # KB per processor, as the standard has it
    assert np.allclose(swf.records[:, 9] * swf.records[:, 7] / 2**20, jobs.demand[:, 1], atol=1e-4)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_the_fixture_is_what_the_hpc_preset_makes(tmp_path):
    made = load_workload("hpc", runs=1, run_jobs=3_000)
    write_swf(tmp_path / "small.swf", made.jobs, made.cluster)
    assert (tmp_path / "small.swf").read_bytes() == SMALL.read_bytes()
    assert same(load_workload(str(SMALL)).jobs, made.jobs)


@needs_traces
@pytest.mark.parametrize(
    ("name", "records", "jobs", "processors"),
    [
        ("SDSC-SP2-1998-4.2-cln", 59_715, 54_034, 128),
        ("HPC2N-2002-2.2-cln", 202_871, 202_871, 240),
        ("lublin_256", 10_000, 10_000, 256),
        ("lublin_256_new2", 10_000, 10_000, 256),
    ],
)
def test_public_traces_are_read_whole_and_quickly(name, records, jobs, processors):
    started = time.process_time()
    workload = load_workload(str(TRACES / f"{name}.swf.gz"), "all")
    assert time.process_time() - started < 5
    assert len(workload.jobs) == jobs and workload.cluster.capacity.tolist() == [[processors]]
    assert jobs + sum(workload.skipped.values()) == records
    assert (np.diff(workload.jobs.submit_time) >= 0).all()
