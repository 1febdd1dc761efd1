"""Replays: whatever the rule, schedules are possible and exact; and what cannot be replayed is refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import make_workload, simulate_one, within, workloads
from tables import check_possible, event_times, table, two_nodes, waiting_at

from simulator.kernels import EASY, GREEDY, STATIC
from simulator.replay import simulate
from simulator.rules import RULES, Rule, parse_rule
from simulator.schedule import Schedule
from workloads.jobs import Cluster, Jobs, Workload

GREEDY_RULES = [rule for rule in RULES if parse_rule(rule).mode == GREEDY]
EASY_RULES = [rule for rule in RULES if parse_rule(rule).mode == EASY]


def free_at(schedule: Schedule, now: float, m: int) -> np.ndarray:
    """What is free on node m after everything that happened at that time."""
    end = schedule.start_time + schedule.service_time
    active = (schedule.start_time <= now) & (now < end) & (schedule.node == m)
    return schedule.cluster.capacity[m] - schedule.jobs.demand[active].sum(0)


@given(workloads(), st.sampled_from(RULES))
@settings(max_examples=300)
def test_every_rule_makes_possible_schedules(workload, rule):
    check_possible(simulate_one(workload, rule))


@given(workloads(), st.sampled_from([rule for rule in RULES if rule != "tetris"]), st.sampled_from(["none", "easy"]))
@settings(max_examples=150)
def test_lock_in_makes_possible_schedules(workload, rule, backfill):
    check_possible(simulate_one(workload, rule, lock_in=True, backfill=backfill))


def test_lock_in_needs_an_order_of_jobs():
    with pytest.raises(ValueError, match="tetris has no order"):
        simulate_one(make_workload(0, 5), "tetris", lock_in=True)


@given(workloads(), st.sampled_from(GREEDY_RULES))
def test_greedy_rules_leave_no_job_waiting_that_fits(workload, rule):
    schedule = simulate_one(workload, rule)
    for now in event_times(schedule):
        for i in waiting_at(schedule, now):
            room = [free_at(schedule, now, m) for m in range(len(workload.cluster.speed))]
            assert not any(within(schedule.jobs.demand[i], free) for free in room)


@given(workloads(), st.sampled_from(EASY_RULES))
def test_easy_rules_leave_no_job_waiting_on_an_idle_node(workload, rule):
    schedule = simulate_one(workload, rule)
    for now in event_times(schedule):
        for i in waiting_at(schedule, now):
            fitting = [
                m
                for m in range(len(workload.cluster.speed))
                if within(schedule.jobs.demand[i], workload.cluster.capacity[m])
            ]
            idle = [within(workload.cluster.capacity[m], free_at(schedule, now, m)) for m in fitting]
            assert not all(idle)


@given(workloads(speeds=False))
def test_fifo_starts_jobs_in_order(workload):
    assert (np.diff(simulate_one(workload, "fifo").start_time) >= 0).all()


@given(
    st.lists(workloads(max_jobs=12, nodes=2, resources=1, speeds=False, grain=1.0), min_size=2, max_size=4),
    st.sampled_from(RULES),
)
def test_segments_are_independent(parts, rule):
    """Several segments in one call are scheduled as each alone (users apart, clusters alike)."""
    cluster = Cluster(np.full((2, 1), 8.0), np.ones(2), ("procs",))
    first, pieces, segments = 0, [], []
    for k, part in enumerate(parts):
        jobs = part.jobs
        pieces.append(replace(jobs, user=np.where(jobs.user < 0, -1, jobs.user + 4 * k).astype(np.int32)))
        segments.append([first, first + len(jobs)])
        first += len(jobs)
    together = simulate(Workload("all", cluster, Jobs.concatenate(pieces), np.array(segments), {}), rule)
    for piece, schedule in zip(pieces, together, strict=True):
        alone = simulate_one(Workload("one", cluster, piece, np.array([[0, len(piece)]]), {}), rule)
        if rule != "random" and "f1" not in rule:  # drawn for the whole workload
            assert schedule.start_time.tolist() == alone.start_time.tolist()
            assert schedule.node.tolist() == alone.node.tolist()
        assert schedule.jobs.job_id.tolist() == piece.job_id.tolist()


@given(workloads(), st.sampled_from(RULES))
@settings(max_examples=30)
def test_the_same_schedule_every_time(workload, rule):
    one, two = simulate_one(workload, rule), simulate_one(workload, rule)
    assert one.start_time.tolist() == two.start_time.tolist() and one.node.tolist() == two.node.tolist()


@given(workloads(), st.integers(0, 1000))
@settings(max_examples=30)
def test_static_scores_given_by_the_caller_order_the_queue(workload, seed):
    """scores= with a STATIC rule is SJF if the scores are the requests."""
    mine = simulate_one(workload, Rule("mine", STATIC, STATIC, EASY), scores=workload.jobs.requested_time)
    assert mine.start_time.tolist() == simulate_one(workload, "easy-sjf").start_time.tolist()


def test_a_job_larger_than_every_node_is_named():
    with pytest.raises(ValueError, match=r"job 2 asks for \[5\.0\]"):
        simulate(two_nodes((1, 1), (4, 4), (0, 1, 1, 4), (0, 1, 1, 5)), "fifo")


@pytest.mark.parametrize("row", [(0, 10, 0, 1), (0, 10, 10, -1)])
def test_a_request_of_no_time_and_a_negative_demand_are_refused(row):
    with pytest.raises(ValueError, match="requests 0 seconds or less than nothing"):
        simulate(table(2, row), "fifo")


def test_a_workload_without_jobs_is_refused():
    workload = make_workload(0, 1)
    with pytest.raises(ValueError, match="no jobs"):
        simulate(Workload("none", workload.cluster, workload.jobs[:0], np.array([[0, 0]]), {}), "fifo")


def test_whole_numbers_are_as_good_as_floats():
    """A user's own arrays may hold integers, and need not be contiguous."""
    rows = ((0, 100, 100, 6), (1, 50, 50, 10), (2, 90, 90, 4))
    floats = table(10, *rows)
    demand = np.array([[6, 0], [10, 0], [4, 0]])[:, :1]
    jobs = replace(floats.jobs, demand=demand, submit_time=np.array([0, 1, 2]))
    whole = Workload("whole", Cluster(np.array([[10]]), np.array([1]), ("procs",)), jobs, floats.segments, {})
    assert simulate_one(whole, "easy-fifo").start_time.tolist() == simulate_one(floats, "easy-fifo").start_time.tolist()
