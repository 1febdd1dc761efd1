"""RLScheduler (SC'20) replayed to the last second, and an independent simulator's rules without its lock-in.

The figures are in shared/reference/rlscheduler.json beside the repository, the traces in shared/traces.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from evaluation.rlscheduler import LOCK_IN_RULES, sequences
from simulator.replay import simulate
from simulator.schedule import Schedule
from workloads.jobs import Workload

SHARED = Path(__file__).parents[3] / "shared"
REFERENCE, TRACES = SHARED / "reference" / "rlscheduler.json", SHARED / "traces"
pytestmark = pytest.mark.skipif(not (REFERENCE.is_file() and TRACES.is_dir()), reason=f"no reference in {SHARED}")

NAMES = ("lublin_256", "SDSC-SP2", "HPC2N", "lublin_256_new2")
BACKFILL = {"backfill_off": "none", "backfill_on": "easy"}
PUBLISHED = {"fcfs": 0, "sjf": 3, "f1": 4}  # the columns of the published table
# The rules as the reference spells them.
WITHOUT_LOCK_IN = {
    "blocking-SJF": "sjf",
    "blocking-F1": "f1",
    "greedy-FCFS": "greedy-fifo",
    "greedy-SJF": "greedy-sjf",
    "greedy-SAF": "greedy-saf",
    "greedy-F1": "greedy-f1",
    "EASY-FCFS": "easy-fifo",
    "EASY-FCFS+SJFbf": "easy-fifo+sjf",
    "EASY-SJF+SJFbf": "easy-sjf",
    "EASY-SAF+SAFbf": "easy-saf",
    "EASY-F1+SJFbf": "easy-f1+sjf",
    "EASY-WFP3+SJFbf": "easy-wfp3+sjf",
    "EASY-UNICEP+SJFbf": "easy-unicep+sjf",
    "EASY-XF+SJFbf": "easy-xf+sjf",
}
NUM_JOBS = {"tableV_1024x10": 1024, "short_256x20": 256}


@cache
def reference() -> dict:
    return json.loads(REFERENCE.read_text())


@cache
def trace(name: str) -> Workload:
    return sequences(TRACES, name, reference()["traces"][name])


@cache
def replay(name: str, protocol: str, mode: str, rule: str) -> list[Schedule]:
    starts = np.array(reference()["traces"][name]["protocols"][protocol]["start_indexes"])
    segments = np.stack([starts, starts + NUM_JOBS[protocol]], axis=1)
    return simulate(trace(name), LOCK_IN_RULES[rule], segments, lock_in=True, backfill=BACKFILL[mode])


@pytest.mark.parametrize("name", NAMES)
def test_the_ten_sequences_are_the_published_ones(name):
    dumps = reference()["traces"][name]["protocols"]["tableV_1024x10"]["dump"]
    segments = trace(name).segments
    assert segments.shape == (10, 2) and (np.diff(segments) == 1024).all()
    for dump in dumps:
        assert segments[dump["seq"], 0] == dump["start_index"]
        assert len(dump["jobs"]) == 1024


@pytest.mark.parametrize("rule", PUBLISHED)
@pytest.mark.parametrize("mode", BACKFILL)
@pytest.mark.parametrize("name", NAMES)
def test_published_bounded_slowdown_to_both_decimals(name, mode, rule):
    published = reference()["published"]["bsld"][mode][name][PUBLISHED[rule]]
    ours = np.mean([schedule.bounded_slowdown.mean() for schedule in replay(name, "tableV_1024x10", mode, rule)])
    assert f"{ours:.2f}" == f"{published:.2f}"


@pytest.mark.parametrize("rule", LOCK_IN_RULES)
@pytest.mark.parametrize("mode", BACKFILL)
@pytest.mark.parametrize("protocol", NUM_JOBS)
@pytest.mark.parametrize("name", NAMES)
def test_every_start_time_and_mean_of_the_dumps(name, protocol, mode, rule):
    expected = reference()["traces"][name]["protocols"][protocol]
    schedules = replay(name, protocol, mode, rule)
    assert len(expected["dump"]) == 2
    for dump in expected["dump"]:
        start_time = schedules[dump["seq"]].start_time
        assert start_time.tolist() == dump["start_times"][mode][rule]
    mean = expected[mode][rule]["mean"]
    ours = {
        "bsld": np.mean([schedule.bounded_slowdown.mean() for schedule in schedules]),
        "max_bsld": np.mean([schedule.bounded_slowdown.max() for schedule in schedules]),
        "wait": np.mean([schedule.wait.mean() for schedule in schedules]),
        "max_wait": np.mean([schedule.wait.max() for schedule in schedules]),
        "turnaround": np.mean([schedule.latency.mean() for schedule in schedules]),
        "makespan": np.mean([schedule.makespan for schedule in schedules]),
        "util": np.mean([schedule.utilization for schedule in schedules]),
    }
    assert ours == pytest.approx({metric: mean[metric] for metric in ours}, rel=1e-9)


@pytest.mark.parametrize("rule", WITHOUT_LOCK_IN)
@pytest.mark.parametrize("name", NAMES)
def test_rules_without_lock_in_to_nine_digits(name, rule):
    expected = reference()["rules_without_lock_in"]["results"][name][rule]
    schedules = simulate(trace(name), WITHOUT_LOCK_IN[rule])
    ours = {
        "bsld": np.mean([schedule.bounded_slowdown.mean() for schedule in schedules]),
        "wait": np.mean([schedule.wait.mean() for schedule in schedules]),
        "util": np.mean([schedule.utilization for schedule in schedules]),
        "max_wait": np.mean([schedule.wait.max() for schedule in schedules]),
    }
    assert ours == pytest.approx({metric: expected[metric] for metric in ours}, rel=1e-9)
    each = [schedule.bounded_slowdown.mean() for schedule in schedules]
    assert each == pytest.approx(expected["per_seq_bsld"], rel=1e-9)


def test_no_rule_of_the_reference_is_left_out():
    assert set(reference()["traces"]) == set(NAMES)
    assert all(set(rules) == set(WITHOUT_LOCK_IN) for rules in reference()["rules_without_lock_in"]["results"].values())
