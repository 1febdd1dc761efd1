"""When a candidate is promoted, and when recorded waits are not what the simulator says."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from orchestration.config import Figure
from orchestration.verdict import drift, judge
from policies import load_policy
from simulator.replay import simulate
from workloads.jobs import Workload
from workloads.load import load_workload


def results(**policies: tuple[float, float, float]) -> dict[str, Any]:
    """Of policies whose mean, p99 and longest wait are given; a `_` in a name is a `-`, blocks vary by a percent."""
    names = {name: name.replace("_", "-") for name in policies}
    names |= {name: f"{names[name]}/policy.onnx" for name in policies if name.startswith(("champion", "candidate"))}
    spread = np.random.default_rng(0).normal(1, 0.01, (len(policies), 50))
    return {
        "policies": {
            names[name]: {"wait": {"mean": mean, "per_block": (mean * row).tolist()}}
            for (name, (mean, _, _)), row in zip(policies.items(), spread, strict=True)
        },
        "tails": {names[name]: {"wait_p99": p99, "wait_max": top} for name, (_, p99, top) in policies.items()},
        "left_out": [],
    }  # fmt: skip


RULES = {"easy_fifo": (100.0, 1_000.0, 5_000.0), "easy_sjf": (80.0, 1_100.0, 6_000.0)}
CHAMPION = {"champion": (70.0, 1_000.0, 5_000.0)}


def test_a_better_one_is_better() -> None:
    found = judge(results(**RULES, **CHAMPION, candidate_1=(63.0, 1_000.0, 5_000.0)), "wait", 1.2)
    assert (found["candidate"], found["better"], found["best_rule"]) == (1, True, "easy-sjf")
    gain = found["gains"]["champion"]
    assert gain.low < gain.mean < gain.high < 0
    assert gain.mean == pytest.approx(-10, abs=0.5)
    assert found["gains"]["easy-fifo"].mean == pytest.approx(-37, abs=0.5)
    assert found["gains"]["best rule"].mean == pytest.approx(100 * (63 / 80 - 1), abs=0.5)
    assert found["standing"]["easy-fifo"].mean == pytest.approx(-30, abs=0.5)


def test_one_that_may_be_luck_is_not() -> None:
    found = judge(results(**RULES, **CHAMPION, candidate_1=(70.0, 1_000.0, 5_000.0)), "wait", 1.2)
    assert not found["better"]
    assert found["why"].startswith("not surely better: ")


@pytest.mark.parametrize("tail", [(1_201.0, 5_000.0), (1_000.0, 18_001.0)])
def test_one_that_starves_somebody_is_not(tail: tuple[float, float]) -> None:
    found = judge(results(**RULES, **CHAMPION, candidate_1=(50.0, *tail)), "wait", 1.2)
    assert not found["better"]
    assert found["why"].startswith("long waits: p99 ")


def test_of_several_the_best_whose_tail_is_allowed() -> None:
    rivals = {"candidate_1": (60.0, 1_000.0, 5_000.0), "candidate_2": (55.0, 1_000.0, 5_000.0)}
    found = judge(results(**RULES, **CHAMPION, **rivals, candidate_3=(40.0, 9_000.0, 9_000.0)), "wait", 1.2)
    assert (found["candidate"], found["better"]) == (2, True)


def test_the_first_one_has_to_beat_easy_fifo() -> None:
    found = judge(results(**RULES, candidate_1=(90.0, 1_000.0, 5_000.0)), "wait", 1.2)
    assert found["better"]
    assert found["standing"] == {}
    assert "to easy-fifo" in found["why"]
    assert not judge(results(**RULES, candidate_1=(101.0, 1_000.0, 5_000.0)), "wait", 1.2)["better"]


def test_without_a_candidate_that_can_be_used_it_says_why() -> None:
    with pytest.raises(ValueError, match="no candidate can be compared: damaged"):
        judge(results(**RULES) | {"left_out": ["damaged"]}, "wait", 1.2)


@pytest.fixture(scope="module")
def recorded() -> Workload:
    """2,000 jobs whose recorded waits are those of EASY-SJF in the simulator."""
    workload = load_workload("cloud", "test", runs=1, run_jobs=2_000)
    [schedule] = simulate(workload, "easy-sjf")
    return replace(workload, jobs=replace(workload.jobs, wait_time=schedule.wait))


def test_no_drift_where_the_record_is_what_the_simulator_says(recorded: Workload) -> None:
    since = float(recorded.jobs.submit_time[500])
    found = drift(recorded, load_policy("easy-sjf"), since, bound=50)
    assert found.jobs == 1_500
    assert found.recorded == found.predicted > 0
    assert found.difference == Figure(0, 0, 0)
    assert not found.beyond


def test_drift_where_jobs_wait_longer_than_the_simulator_says(recorded: Workload) -> None:
    longer = replace(recorded, jobs=replace(recorded.jobs, wait_time=2 * recorded.jobs.wait_time))
    found = drift(longer, load_policy("easy-sjf"), 0.0, bound=50)
    assert found.difference.mean == pytest.approx(100)
    assert found.beyond
    assert not drift(longer, load_policy("easy-sjf"), 0.0, bound=150).beyond


def test_of_few_jobs_nothing_is_said(recorded: Workload) -> None:
    assert drift(recorded, load_policy("easy-sjf"), float(recorded.jobs.submit_time[-99]), bound=50) is None
