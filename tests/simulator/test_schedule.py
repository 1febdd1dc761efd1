"""The metrics of a schedule."""

import pytest
from oracles import simulate_one
from tables import table


def test_metrics_of_a_schedule_by_hand():
    schedule = simulate_one(table(2, (0, 4, 4, 2), (1, 20, 20, 1), (2, 5, 5, 2)), "fifo")
    assert schedule.start_time.tolist() == [0, 4, 24]
    expected = {
        "wait": (0 + 3 + 22) / 3,
        "latency": (4 + 23 + 27) / 3,
        "bounded_slowdown": (1.0 + 23 / 20 + 27 / 10) / 3,
        "wait_median": 3,
        "wait_max": 22,
        "makespan": 29,
        "utilization": (8 + 20 + 10) / (2 * 29),
        "throughput": 3 / 29,
    }
    assert {name: schedule.metrics()[name] for name in expected} == pytest.approx(expected, rel=1e-12)
