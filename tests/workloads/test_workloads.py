"""Traces are read to the letter or refused with one useful line; generated workloads are what they say they are."""

import gzip
import json
import math
import re
import time
from dataclasses import fields, replace
from functools import partial, reduce
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import workloads.presets as presets_module
from workloads.generated import _arrivals, generate_cluster, generate_jobs
from workloads.jobs import DAY, Cluster, Jobs, WorkloadError, offered_load, scale_load
from workloads.load import load_workload
from workloads.lublin import (
    LOG_RUN_LIMIT,
    _daily_weights,
    _lublin_mean_work,
    _lublin_sizes,
    _mixture,
    _truncated_gamma,
    daily_clock,
    lublin_jobs,
)
from workloads.presets import PRESETS, cloud, hpc
from workloads.swf import jobs_from_swf, read_swf, write_swf
from workloads.users import NUM_USERS, TYPED_TIMES, _by_habit, _sessions

SMALL = Path(__file__).parents[1] / "data" / "small.swf"
TRACES = Path(__file__).parents[3] / "shared" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason=f"the public traces are not in {TRACES}")

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


def same(left: Jobs, right: Jobs) -> bool:
    return all(np.array_equal(getattr(left, field.name), getattr(right, field.name)) for field in fields(Jobs))


def random_jobs(rng: np.random.Generator, count: int) -> Jobs:
    """Any jobs that SWF can express, on up to 64 processors with up to 512 GB."""
    identifiers = rng.integers(-1, 2**31 - 1, size=(5, count))
    return Jobs(
        submit_time=np.sort(rng.uniform(0, 1e7, count)),
        run_time=rng.uniform(1e-3, 1e6, count),
        requested_time=rng.uniform(1e-3, 1e6, count),
        demand=np.stack([rng.integers(1, 65, count), rng.integers(1, 513, count)], axis=1).astype(float),
        **{
            name: row.astype(np.int32)
            for name, row in zip(("user", "group", "executable", "queue"), identifiers, strict=False)
        },
        wait_time=rng.uniform(0, 1e5, count),
        job_id=identifiers[4],
    )


# --- reading traces ---------------------------------------------------------------------------------------------------


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
        (gzip.compress(LINE.encode() * 50)[:-20], "damaged or truncated gzip file ("),
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


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(WorkloadError, match=r"^nope\.swf: no such file or preset; the presets are cloud, hpc, "):
        load_workload("nope.swf")
    with pytest.raises(WorkloadError, match="Is a directory; give the path of an SWF trace"):
        load_workload(str(tmp_path))
    with pytest.raises(WorkloadError, match="unknown split 'tset'; use one of train, validation, test, all"):
        load_workload("cloud", "tset")


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


# --- what the service has recorded ------------------------------------------------------------------------------------

JOB = {"id": 1, "demand": [2], "requested_time": 60.0, "user": "ann"}
WAITS = {
    "state": {"now": 5.0, "nodes": [{"name": "n", "capacity": [4]}], "queued": [JOB | {"submit_time": 1}]},
    "decision": {"start": [{"job": 1, "node": "n"}]},
}
RUNS = {
    "state": {
        "now": 9.0, "nodes": [{"name": "n", "capacity": [4]}],
        "running": [JOB | {"id": 2, "start_time": 4.0, "submit_time": None, "node": "n"}],
    },
    "decision": {"start": []},
}  # fmt: skip
ENDS = {"state": {"now": 45, "nodes": [{"name": "n", "capacity": [4]}]}, "decision": {"start": []}}


def record(folder: Path, *lines: object) -> str:
    path = folder / "decisions.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def with_value(line: dict, value: object, *path: str | int) -> dict:
    """The line with another value at that place."""
    line = json.loads(json.dumps(line))
    place = reduce(lambda found, step: found[step], path[:-1], line)
    place[path[-1]] = value
    return line


def test_a_record_of_two_jobs_by_hand(tmp_path):
    """One starts at 5 and has ended by 9, the other runs from 4 to 45; a blank and two torn lines change nothing."""
    path = record(tmp_path, WAITS, "", '{"state":{"now":{"state":{"now":5}', RUNS, ENDS)
    with open(path, "ab") as file:
        file.write('{"state":{"now":5,"nodes":[{"name":"\u00fc'.encode()[:-1])
    workload = load_workload(path, "all")
    assert workload.skipped == {"record cut short": 2}
    assert workload.jobs.submit_time.tolist() == [1, 4] and workload.jobs.run_time.tolist() == [4, 41]
    assert workload.jobs.wait_time.tolist() == [4, 0] and workload.cluster.capacity.tolist() == [[4]]


def test_what_a_running_job_leaves_out_is_known_from_the_queue(tmp_path):
    """Left out, or null."""
    queued = {"id": 1, "submit_time": 1, "requested_time": 60, "demand": [2], "user": "u", "executable": "e"}
    first = {
        "state": {"now": 5, "nodes": [{"name": "n", "capacity": [4]}], "queued": [queued]},
        "decision": {"start": []},
    }
    runs = {"id": 1, "requested_time": 60, "demand": [2], "start_time": 9, "node": "n"}
    for unknown in ({}, {"submit_time": None, "user": None, "executable": None}):
        second = with_value(with_value(first, [], "state", "queued"), [runs | unknown], "state", "running")
        jobs = load_workload(record(tmp_path, first, with_value(second, 9, "state", "now"), ENDS), "all").jobs
        assert jobs.submit_time.tolist() == [1] and jobs.wait_time.tolist() == [8]
        assert jobs.user.tolist() == [0] and jobs.executable.tolist() == [0]


def test_what_is_decided_and_not_done_is_no_start(tmp_path):
    """In shadow: job 1 is told to start at 5, 6 and 7, stays queued, and is cancelled; 2 runs untold."""
    still = [with_value(WAITS, now, "state", "now") for now in (6, 7)]
    workload = load_workload(record(tmp_path, WAITS, *still, RUNS, ENDS), "all")
    assert workload.skipped == {"not run to the end": 1}
    assert workload.jobs.submit_time.tolist() == [4] and workload.jobs.run_time.tolist() == [41]


ODD_RECORDS = {
    "empty": ({"state": {}, "decision": {}}, "missing required field `now`"),
    "numbers": ({"state": 1, "decision": 2}, "Expected `object`, got `int` - at `$.state`"),
    "another's": ({"text": "hello"}, "missing required field `state`"),
    "list": ([], "Expected `object`, got `array`"),
    "text": (with_value(WAITS, "a lot", "state", "queued", 0, "requested_time"), "$.state.queued[0].requested_time"),
    "negative": (with_value(WAITS, -1, "state", "queued", 0, "demand", 0), "$.state.queued[0].demand[0]"),
    "other node": (with_value(RUNS, "m", "state", "running", 0, "node"), "'m' is no node"),
    "other job": (with_value(WAITS, 7, "decision", "start", 0, "job"), "7 is no node, or no queued job"),
    "start elsewhere": (with_value(WAITS, "m", "decision", "start", 0, "node"), "'m' is no node"),
    "wider jobs": (with_value(WAITS, [2, 1], "state", "queued", 0, "demand"), "[1, 2] resources"),
    "wider nodes": (with_value(ENDS, [4, 1], "state", "nodes", 0, "capacity"), "[1, 2] resources"),
    "no nodes": (with_value(ENDS, [], "state", "nodes"), "cluster: capacity has shape (0,)"),
    "nothing there": (with_value(ENDS, [0], "state", "nodes", 0, "capacity"), "cluster: a node or a resource"),
    "standing still": (with_value(ENDS, 0, "state", "nodes", 0, "speed"), "cluster: a speed is not"),
    "names": (with_value(ENDS, ["cpu", "gpu"], "state", "resources"), "2 resources; give one speed"),
}


@pytest.mark.parametrize("case", ODD_RECORDS)
def test_a_line_that_is_no_record_is_named(tmp_path, case):
    line, message = ODD_RECORDS[case]
    path = record(tmp_path, WAITS, RUNS, line)
    with pytest.raises(WorkloadError) as caught:
        load_workload(path, "all")
    text = str(caught.value)
    assert text.startswith(f"{path}: line 3: ") and message in text and "; delete the line" in text
    assert "\n" not in text


def test_a_record_without_a_usable_line_says_what_was_skipped(tmp_path):
    for lines, why in ((["hello", "there"], "2 record cut short"), ([], "it is empty"), ([WAITS], "1 not run to the")):
        with pytest.raises(WorkloadError, match=rf"decisions\.jsonl: no job in it .* \({why}.*\); record"):
            load_workload(record(tmp_path, *lines), "all")


# --- splits -----------------------------------------------------------------------------------------------------------


def test_a_trace_is_split_by_order_of_submission():
    splits = {split: load_workload(str(SMALL), split) for split in ("train", "validation", "test", "all")}
    assert {name: workload.segments.tolist() for name, workload in splits.items()} == {
        "train": [[0, 1800]],
        "validation": [[1800, 2100]],
        "test": [[2100, 3000]],
        "all": [[0, 3000]],
    }
    assert all(len(workload.jobs) == 3000 for workload in splits.values())  # the past is there as well


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
    started = time.perf_counter()
    workload = load_workload(str(TRACES / f"{name}.swf.gz"), "all")
    assert time.perf_counter() - started < 5
    assert len(workload.jobs) == jobs and workload.cluster.capacity.tolist() == [[processors]]
    assert jobs + sum(workload.skipped.values()) == records
    assert (np.diff(workload.jobs.submit_time) >= 0).all()


# --- jobs and clusters ------------------------------------------------------------------------------------------------


def test_offered_load_is_work_over_capacity_of_the_most_loaded_resource():
    jobs = replace(
        random_jobs(np.random.default_rng(0), 3),
        submit_time=np.array([10.0, 30.0, 110.0]),
        run_time=np.array([100.0, 20.0, 40.0]),
        demand=np.array([[1.0, 8.0], [2.0, 2.0], [4.0, 1.0]]),
    )
    cluster = Cluster(np.array([[4.0, 8.0], [4.0, 4.0]]), np.array([1.0, 0.5]), ("cpu", "memory"))
    # cpu: 100 + 40 + 160 = 300 over (4 + 2) * 100 s; memory: 800 + 40 + 40 = 880 over (8 + 2) * 100 s
    assert offered_load(jobs, cluster) == pytest.approx(0.88)
    assert offered_load(scale_load(jobs, 1.25), cluster) == pytest.approx(1.1)
    assert scale_load(jobs, 2.0).submit_time.tolist() == [10, 20, 60]
    assert offered_load(jobs[:1], cluster) == math.inf
    with pytest.raises(WorkloadError, match="give a positive number"):
        scale_load(jobs, 0.0)


@pytest.mark.parametrize(
    ("capacity", "speed", "resources", "message"),
    [
        (np.zeros((0, 1)), [], ("cpu",), "one row per node"),
        (np.ones((2, 1)), [1.0], ("cpu",), "one speed per node"),
        (np.ones((1, 2)), [1.0], ("cpu",), "one name per resource"),
        (np.ones((1, 1)), [0.0], ("cpu",), "a speed is not a positive number"),
        (np.ones((1, 1)), [math.nan], ("cpu",), "a speed is not a positive number"),
        (np.ones((1, 1)), [math.inf], ("cpu",), "a speed is not a positive number"),
        (np.full((1, 1), math.nan), [1.0], ("cpu",), "a capacity is negative or not a number"),
        (np.full((1, 1), -1.0), [1.0], ("cpu",), "a capacity is negative or not a number"),
        (np.zeros((1, 1)), [1.0], ("cpu",), "no capacity at all"),
        (np.array([[1.0, 0.0], [1.0, 0.0]]), [1.0, 1.0], ("cpu", "gpu"), "no capacity at all"),
    ],
)
def test_an_impossible_cluster_is_refused(capacity, speed, resources, message):
    with pytest.raises(WorkloadError, match=message):
        Cluster(capacity, np.array(speed), resources)


# --- the Lublin-Feitelson model ---------------------------------------------------------------------------------------


def test_lublin_sizes_and_run_times_follow_the_published_distributions():
    jobs = lublin_jobs(np.random.default_rng(1), 100_000, max_procs=256)
    size, log_run = jobs.demand[:, 0], np.log(jobs.run_time)
    assert size.max() == 256 and (size >= 1).all()
    assert np.mean(size == 1) == pytest.approx(0.2927, abs=0.005)
    # beside the chosen ones a few others hit a power of two by rounding
    assert np.mean(np.log2(size) % 1 == 0) == pytest.approx(0.2927 + 0.6686 + 0.006, abs=0.004)
    # log2 of a parallel size: 7/8 in [1.2, 5.5], 1/8 in [5.5, 8]
    assert np.log2(size[size > 1]).mean() == pytest.approx(0.875 * 3.35 + 0.125 * 6.75, abs=0.03)
    # serial jobs: 69.56 % gamma(6.57, .823), cut at 12, else gamma(639.1, .0156); larger jobs run longer
    assert log_run[size == 1].mean() == pytest.approx(0.6956 * 5.36 + 0.3044 * 9.97, abs=0.05)
    assert log_run[size >= 128].mean() > log_run[size == 1].mean() + 1
    assert jobs.run_time.max() <= math.exp(12)


def test_lublin_work_is_integrated_correctly():
    rng = np.random.default_rng(2)
    size = _lublin_sizes(rng, 1_000_000, 256)
    run_time = np.exp(_truncated_gamma(rng, *_mixture(rng, size), LOG_RUN_LIMIT))
    assert _lublin_mean_work(256) == pytest.approx((size * run_time).mean(), rel=0.015)


def test_the_daily_clock_spends_points_like_lublin99():
    """The published algorithm, one bucket at a time: a job's points pay for half hours until they do not suffice."""
    weights, gaps = _daily_weights(), np.random.default_rng(3).lognormal(5, 2, 500)
    bucket, points, passed, expected = 0, 0.0, 0.0, []
    for gap in gaps:
        points += gap / 1800
        while points > weights[bucket % 48]:
            points -= weights[bucket % 48]
            bucket, passed = bucket + 1, passed + 1800
        expected.append(passed + 1800 * points / weights[bucket % 48])
    assert np.allclose(daily_clock(np.cumsum(gaps)), expected)


def test_arrivals_follow_the_hours_of_the_day():
    weights = _daily_weights()
    # The gamma density peaks at (6.1271 - 1) * 5.2740 = 27.04 half hours, counted from 1; the day turns at the 11th.
    assert (weights.sum(), weights.argmax(), weights.argmin()) == (pytest.approx(48), 26, 9)
    times = lublin_jobs(np.random.default_rng(4), 200_000).submit_time
    counts = np.bincount((times % 86_400 // 1_800).astype(int), minlength=48)
    assert np.corrcoef(counts, weights)[0, 1] > 0.97


@pytest.mark.parametrize("load", [0.6, 0.9])
def test_lublin_load_is_exact_in_expectation_and_varies_between_runs(load):
    cluster = hpc().cluster
    loads = [offered_load(lublin_jobs(np.random.default_rng(run), 5_000, load=load), cluster) for run in range(80)]
    assert np.mean(loads) == pytest.approx(load, rel=0.04)
    assert 0.04 < np.std(loads) / load < 0.2


# --- generated workloads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_presets_load_the_cluster_but_do_not_swamp_it(name, seed):
    for split, (runs, run_jobs) in presets_module.RUNS.items():
        workload = load_workload(name, split, seed=seed)
        assert workload.segments.tolist() == [[i * run_jobs, (i + 1) * run_jobs] for i in range(runs)]
        loads = [offered_load(workload.jobs[a:b], workload.cluster) for a, b in workload.segments]
        assert 0.7 < np.mean(loads) < 1.1


@pytest.mark.parametrize("name", PRESETS)
def test_preset_jobs_are_sound(name):
    workload = load_workload(name, runs=3, run_jobs=2_000)
    jobs, cluster = workload.jobs, workload.cluster
    assert (jobs.demand[:, None] <= cluster.capacity).all(axis=2).any(axis=1).all()
    assert (jobs.demand == np.round(jobs.demand)).all() and (jobs.demand.sum(axis=1) > 0).all()
    assert (jobs.run_time >= 1).all() and (jobs.requested_time >= 1).all()
    assert 0.95 < np.mean(jobs.requested_time >= jobs.run_time) < 1
    assert np.isin(jobs.requested_time, TYPED_TIMES).all()
    assert jobs.job_id.tolist() == list(range(1, 6_001))
    for a, b in workload.segments:
        assert (np.diff(jobs.submit_time[a:b]) >= 0).all() and jobs.submit_time[a] >= 0
        assert jobs.submit_time[a] < 0.2 * jobs.submit_time[b - 1]
    for owner in (jobs.user, jobs.group, jobs.executable):
        runs = [set(owner[a:b].tolist()) for a, b in workload.segments]
        assert not (runs[0] & runs[1] or runs[0] & runs[2] or runs[1] & runs[2])
    dtypes = {field.name: getattr(jobs, field.name).dtype for field in fields(jobs)}
    whole = dict.fromkeys(("user", "group", "executable", "queue"), np.int32) | {"job_id": np.int64}
    assert dtypes == {name: whole.get(name, np.float64) for name in dtypes}


@pytest.mark.parametrize("name", PRESETS)
def test_the_same_seed_gives_the_same_jobs_and_splits_share_none(name):
    first = load_workload(name, runs=2, run_jobs=500)
    assert same(first.jobs, load_workload(name, runs=2, run_jobs=500).jobs)
    assert same(first.jobs[:500], load_workload(name, runs=1, run_jobs=500).jobs)
    others = [load_workload(name, split, runs=2, run_jobs=500) for split in ("validation", "test")]
    others.append(load_workload(name, seed=1, runs=2, run_jobs=500))
    # Runs that share a random stream would share their gaps.
    gaps = [np.diff(w.jobs.submit_time[a:b])[:20].tolist() for w in (first, *others) for a, b in w.segments]
    assert len({tuple(gap) for gap in gaps}) == len(gaps)
    assert all(np.array_equal(first.cluster.capacity, other.cluster.capacity) for other in others)


def test_all_of_a_preset_is_its_three_splits():
    everything = load_workload("cloud", "all", runs=2, run_jobs=100)
    parts = [load_workload("cloud", split, runs=2, run_jobs=100) for split in ("train", "validation", "test")]
    assert np.array_equal(everything.jobs.submit_time, np.concatenate([part.jobs.submit_time for part in parts]))
    assert len(everything.segments) == 6 and len(np.unique(everything.jobs.user // NUM_USERS)) == 6


@pytest.mark.parametrize("name", PRESETS)
def test_users_have_habits(name):
    jobs = load_workload(name, "validation", runs=1).jobs
    log_run = np.log(jobs.run_time)
    _, kind, count = np.unique(jobs.executable, return_inverse=True, return_counts=True)
    typical = np.bincount(kind, log_run) / count
    assert np.mean((log_run - typical[kind]) ** 2) < 0.35 * log_run.var()
    # Consecutive jobs often come from one session; were they independent, about one in forty would match.
    assert np.mean(jobs.executable[1:] == jobs.executable[:-1]) > 0.25
    assert np.bincount(jobs.user % NUM_USERS).max() > 0.1 * len(jobs)


def test_habits_only_hand_out_the_draws():
    rng = np.random.default_rng(5)
    draw = _by_habit(rng, _sessions(rng, 1_000), rng.integers(1, 9, 1_000), rng.random(1_000))
    assert sorted(draw.tolist()) == list(range(1_000))


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 50),
    nodes=st.integers(1, 9),
    resources=st.integers(1, 3),
    arrivals=st.sampled_from(["poisson", "bursty", "daily"]),
)
@settings(max_examples=60)
def test_jobs_for_any_cluster_fit_it(seed, count, nodes, resources, arrivals):
    rng = np.random.default_rng(seed)
    cluster = generate_cluster(rng, nodes, ("cpu", "memory", "gpu")[:resources])
    jobs = generate_jobs(rng, count, cluster, arrivals=arrivals)
    assert cluster.capacity.shape == (nodes, resources) and jobs.demand.shape == (count, resources)
    assert (jobs.demand[:, None] <= cluster.capacity).all(axis=2).any(axis=1).all() and (jobs.demand >= 1).all()
    assert (np.diff(jobs.submit_time) >= 0).all() and (jobs.run_time >= 1).all()


@pytest.mark.parametrize("arrivals", ["poisson", "bursty", "daily"])
def test_generated_load_is_exact_in_expectation(arrivals):
    # Each run lasts some weeks, so that a part of a day at its end does not matter.
    cluster, long = cloud().cluster, (6_000.0, 1.2, DAY)
    make = partial(generate_jobs, num_jobs=10_000, cluster=cluster, run_time=long, arrivals=arrivals)
    loads = [offered_load(make(np.random.default_rng(run)), cluster) for run in range(40)]
    assert np.mean(loads) == pytest.approx(0.85, rel=0.03)


def test_bursts_are_bursty():
    """The arrivals of 100 mean gaps vary far more than the Poisson process's 100."""
    rng = np.random.default_rng(6)
    for kind, low, high in (("poisson", 0.8, 1.2), ("bursty", 10, 100)):
        counts = np.bincount((_arrivals(rng, 100_000, kind, 1.0) // 100).astype(int))[:-1]
        assert low < counts.var() / counts.mean() < high


def test_a_flavour_that_fits_no_node_is_refused():
    with pytest.raises(WorkloadError, match="larger than any node"):
        generate_jobs(np.random.default_rng(0), 5, cloud().cluster, flavours=[[64, 300]])


def test_training_jobs_are_made_quickly():
    for name in PRESETS:
        started = time.perf_counter()
        assert len(load_workload(name).jobs) == 160_000
        assert time.perf_counter() - started < 1.5
