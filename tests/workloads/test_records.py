"""What the service has recorded, as a workload."""

import json
from functools import reduce
from pathlib import Path

import pytest

from workloads.jobs import WorkloadError
from workloads.load import load_workload

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
