"""SWF traces are read to the letter, or refused with one useful line; what is written reads back the same."""

import gzip
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import random_jobs, same
from places import SMALL, TRACES, needs_traces

from workloads.jobs import Cluster, WorkloadError
from workloads.load import load_workload
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
        (with_field(12, 2**31), "line 3: field 12 (user): 2.14748e+09 does not fit in 32 bits"),
        (with_field(8, 129), "line 3: field 8 (requested processors): 129 processors, but MaxProcs in the header"),
        ("1 2 3", "line 3: 3 fields where SWF has 18; correct or delete the line, or give an SWF trace"),
        (LINE + " 0", "line 3: 19 fields where SWF has 18"),
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
        (b"; fine\n\x7fELF\x00\x01", "line 2: binary data; give an SWF trace, plain text or gzipped"),
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
    again, cluster, skipped = jobs_from_swf(swf)
    assert same(again, replace(jobs, demand=jobs.demand[:, :1])) and not skipped
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
