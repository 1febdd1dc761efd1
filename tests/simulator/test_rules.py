"""What each rule says: against the textbook in slow plain Python, and by hand; and the names of rules."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import simulate_one, within, workloads
from tables import event_times, table, two_nodes, waiting_at

from scheduler_env import SchedulerEnv
from simulator.kernels import JOB_FEATURES
from simulator.rules import RULES, parse_rule
from workloads.jobs import Cluster, Workload


def slow_schedule(
    workload: Workload,
    head: Callable[[int], float],
    backfill: Callable[[int], float],
    mode: str,
    patience: float = math.inf,
) -> list[float]:
    """Start times of one resource on one node, by the textbook: fixed orders; "block", "greedy" or "easy"; who has
    waited for longer than `patience` is the head, and has a reservation under "greedy" too."""
    jobs, capacity = workload.jobs, workload.cluster.capacity[0, 0]
    submit, run, requested, need = jobs.submit_time, jobs.run_time, jobs.requested_time, jobs.demand[:, 0]
    start: dict[int, float] = {}
    now = submit[0]
    while len(start) < len(jobs):

        def free(now: float = now) -> float:
            return capacity - sum(need[i] for i in start if start[i] + run[i] > now)

        queue = [i for i in range(len(jobs)) if submit[i] <= now and i not in start]
        overdue = {i for i in queue if now - submit[i] > patience}
        by_head = sorted(queue, key=lambda i: (i not in overdue, 0 if i in overdue else head(i), i))
        while by_head and need[by_head[0]] <= free() + 1e-9:
            start[by_head.pop(0)] = now
        if by_head and mode != "block":
            reserved = by_head.pop(0)
            shadow, spare = now, free()
            due = {i: start[i] + requested[i] for i in start if start[i] + run[i] > now}
            releases = [(end if end > now else now + 1, end, i) for i, end in due.items()]  # late ones by their dues
            for time, _, released in sorted(releases):
                if need[reserved] <= spare + 1e-9:
                    break
                shadow, spare = time, spare + need[released]
            spare -= need[reserved]
            for i in sorted(by_head, key=lambda i: (backfill(i), i)):
                harmless = now + requested[i] <= shadow or need[i] <= spare + 1e-9
                if need[i] <= free() + 1e-9 and (harmless or (mode == "greedy" and reserved not in overdue)):
                    start[i] = now
                    if now + requested[i] > shadow:
                        spare -= need[i]
        times = [*submit, *(start[i] + run[i] for i in start)]
        now = min((time for time in times if time > now), default=math.inf)
    return [start[i] for i in range(len(jobs))]


def orders(workload: Workload) -> dict[str, Callable[[int], float]]:
    jobs = workload.jobs
    submit, requested, size = jobs.submit_time, jobs.requested_time, jobs.demand[:, 0]
    return {
        "fifo": lambda i: submit[i],
        "sjf": lambda i: requested[i],
        "ljf": lambda i: -requested[i],
        "saf": lambda i: requested[i] * size[i],
        "f1": lambda i: math.log10(max(requested[i], 0.1)) * size[i] + 870 * math.log10(submit[i]),
    }


@pytest.mark.parametrize("head", ["fifo", "sjf", "ljf", "saf", "f1"])
@given(workload=workloads(nodes=1, resources=1, speeds=False, grain=1.0))
def test_fixed_orders_equal_the_textbook(head, workload):
    order = orders(workload)
    for rule, mode, backfill in (
        (head, "block", head),
        (f"greedy-{head}", "greedy", head),
        (f"easy-{head}", "easy", head),
        (f"easy-{head}+sjf", "easy", "sjf"),
    ):
        expected = slow_schedule(workload, order[head], order[backfill], mode)
        assert simulate_one(workload, rule).start_time.tolist() == expected, rule


@pytest.mark.parametrize("seconds", [0.0, 3.0, 20.0, 1e9])
@given(workload=workloads(nodes=1, resources=1, speeds=False, grain=1.0))
def test_patience_equals_the_textbook(seconds, workload):
    order = orders(workload)
    for rule, mode, head, backfill in (
        ("sjf", "block", "sjf", "sjf"),
        ("greedy-saf", "greedy", "saf", "saf"),
        ("easy-ljf", "easy", "ljf", "ljf"),
        ("easy-f1+sjf", "easy", "f1", "sjf"),
    ):
        expected = slow_schedule(workload, order[head], order[backfill], mode, seconds)
        found = simulate_one(workload, parse_rule(rule)._replace(patience=seconds))
        assert found.start_time.tolist() == expected, rule
    assert parse_rule("easy-sjf@2").patience == 7200


@given(
    workloads(estimates="exact", speeds=False), st.sampled_from(["easy-fifo", "easy-fifo+sjf", "easy-fifo+sjf-history"])
)
@settings(max_examples=150)
def test_backfilling_never_delays_the_head(workload, rule):
    """With exact requests the oldest job starts no later than it would if nothing had been backfilled at any event."""
    schedule = simulate_one(workload, rule)
    jobs, start = schedule.jobs, schedule.start_time
    end = start + jobs.run_time
    for now in event_times(schedule):
        waiting = waiting_at(schedule, now)
        if len(waiting) == 0:
            continue
        head = waiting[0]
        before = ((start < now) | ((start == now) & (np.arange(len(jobs)) < head))) & (end > now)
        possible = []
        for m, capacity in enumerate(workload.cluster.capacity):
            for time in [now, *end[before & (schedule.node == m)]]:
                used = jobs.demand[before & (schedule.node == m) & (end > time)].sum(0)
                if within(jobs.demand[head], capacity - used):
                    possible.append(time)
        assert start[head] <= min(possible), f"job {head} at {now}"


def test_the_classical_example():
    """10 processors. Job 0 runs; job 1 needs all and waits for it; 2 is short enough to pass; 3 is too long, and so is
    4 when 2 has ended."""
    workload = table(10, (0, 100, 100, 6), (1, 50, 50, 10), (2, 90, 90, 4), (3, 98, 98, 4), (4, 10, 10, 1))
    assert simulate_one(workload, "fifo").start_time.tolist() == [0, 100, 150, 150, 150]
    assert simulate_one(workload, "easy-fifo").start_time.tolist() == [0, 100, 2, 150, 150]
    assert simulate_one(workload, "greedy-fifo").start_time.tolist() == [0, 190, 2, 92, 100]


def test_spare_processors_are_given_away_once():
    """At the shadow time 100 job 1 leaves 4 spare: job 2 takes 3 of them, job 3 would need 2 of the 1 that is left."""
    workload = table(10, (0, 100, 100, 5), (1, 50, 50, 6), (2, 500, 500, 3), (2, 500, 500, 2), (2, 500, 500, 1))
    assert simulate_one(workload, "easy-fifo").start_time.tolist() == [0, 100, 2, 150, 2]


def test_a_job_that_runs_longer_than_requested_is_expected_to_end_in_a_second():
    workload = table(10, (0, 100, 10, 6), (1, 50, 50, 10), (20, 1, 1, 4), (20, 2, 2, 4))
    assert simulate_one(workload, "easy-fifo").start_time.tolist() == [0, 100, 20, 150]


def test_a_shadow_time_less_than_a_second_ahead_is_kept():
    """Job 0 ends at 0.5, exactly as requested; job 2 would end at 1.1, after the reservation of job 1."""
    workload = table(2, (0.0, 0.5, 0.5, 1), (0.1, 1.0, 1.0, 2), (0.2, 0.9, 0.9, 1))
    assert simulate_one(workload, "easy-fifo").start_time.tolist() == [0, 0.5, 1.5]


def test_a_late_job_on_one_node_moves_no_other_nodes_shadow_time():
    rows = (0, 100, 5, 2), (0, 10.5, 10.5, 1), (10, 50, 50, 2), (10, 40, 40, 1)
    workload = table(2, *rows)
    workload = replace(workload, cluster=Cluster(np.full((2, 1), 2.0), np.ones(2), ("procs",)))
    schedule = simulate_one(workload, "easy-fifo")  # at 10 the head is promised 10.5 on node 1, not 11 on node 0
    assert schedule.start_time.tolist() == [0, 0, 10.5, 60.5] and schedule.node.tolist() == [0, 1, 1, 1]
    env = SchedulerEnv(workload, num_jobs=4, warmup_jobs=0, followup_jobs=0, queue_window=4, reference="easy-fifo")
    obs, _ = env.reset(seed=0)
    for _ in range(2):
        obs, *_ = env.step(int(env.envs.rule_actions()[0]))
    waits = env.split(obs).jobs[0, JOB_FEATURES.index("earliest_start")]
    assert np.expm1(12 * waits) == pytest.approx(0.5, abs=1e-4)


def test_all_completions_and_arrivals_of_an_instant_come_before_decisions():
    workload = table(2, (0, 10, 10, 1), (0, 10, 10, 1), (1, 5, 5, 2), (10, 1, 1, 1))
    assert simulate_one(workload, "sjf").start_time.tolist() == [0, 0, 11, 10]


def test_wfp3_unicep_and_expansion_factor_at_one_decision():
    """Three jobs have waited 90, 60 and 40 s and exclude each other: WFP3 takes the third, the others the second."""
    workload = table(7, (0, 100, 100, 7), (10, 9, 50, 4), (40, 9, 11, 5), (60, 9, 8, 7))
    wait, requested, size = np.array([90, 60, 40]), np.array([50, 11, 8]), np.array([4, 5, 7])
    for rule, value in (
        ("wfp3", -((wait / requested) ** 3) * size),
        ("unicep", -wait / (np.maximum(1e-3, np.log2(size)) * requested)),
        ("xf", -(wait + requested) / requested),
    ):
        assert simulate_one(workload, rule).start_time[1 + value.argmin()] == 100, rule


def of_users(workload: Workload, *users: int) -> Workload:
    return replace(workload, jobs=replace(workload.jobs, user=np.array(users, np.int32)))


def test_history_rules_rank_by_the_last_two_run_times_of_the_user():
    """User 7 asked for 1,000 s and ran 2 s twice: its next job is expected to be shorter than user 8's of 100 s."""
    workload = table(2, (0, 2, 1000, 1), (0, 2, 1000, 1), (1, 50, 50, 2), (2, 100, 100, 2), (3, 2, 1000, 2))
    workload = of_users(workload, 7, 7, 9, 8, 7)
    assert simulate_one(workload, "sjf").start_time.tolist() == [0, 0, 2, 52, 152]
    assert simulate_one(workload, "sjf-history").start_time.tolist() == [0, 0, 2, 54, 52]
    # One job of the past is not enough, and nobody's jobs say nothing.
    assert simulate_one(of_users(workload, 7, 6, 9, 8, 7), "sjf-history").start_time.tolist() == [0, 0, 2, 52, 152]
    assert simulate_one(of_users(workload, -1, -1, 9, 8, -1), "sjf-history").start_time.tolist() == [0, 0, 2, 52, 152]


def test_estimates_from_history_never_exceed_the_request():
    """User 7's last two ran 200 s, but now it asks for 10 s, less than user 8's 50 s."""
    workload = table(2, (0, 200, 200, 1), (0, 200, 200, 1), (1, 50, 50, 2), (2, 10, 10, 2))
    assert simulate_one(of_users(workload, 7, 7, 8, 7), "sjf-history").start_time.tolist() == [0, 0, 210, 200]


# --- nodes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rule", "nodes"),
    [
        ("greedy-fifo", [1, 1, 0]),  # the fastest that fits
        ("fastest-node", [1, 1, 0]),
        ("best-fit", [1, 1, 0]),  # least left over: node 1 has 2, node 0 has 4
        ("fifo-first-fit", [0, 0, 0]),
        ("round-robin", [0, 1, 0]),
    ],
)
def test_nodes_are_chosen_as_named(rule, nodes):
    workload = two_nodes((1.0, 2.0), (4.0, 2.0), (0, 10, 10, 1), (0, 10, 10, 1), (0, 10, 10, 1))
    schedule = simulate_one(workload, rule)
    assert schedule.node.tolist() == nodes
    assert schedule.latency.tolist() == [10 / (1.0, 2.0)[m] for m in nodes]


def test_tetris_takes_the_job_that_aligns_best_with_what_is_free():
    """Free is (8, 2): the job that wants (4, 0) aligns better than the one that wants (1, 2), so it goes first."""
    one = table(1, (0, 10, 10, 1), (0, 10, 10, 1))
    demand = np.array([[5.0, 2.0], [6.0, 0.0]])
    workload = Workload(
        "two",
        Cluster(np.array([[8.0, 2.0]]), np.ones(1), ("cpu", "memory")),
        replace(one.jobs, demand=demand),
        one.segments,
        {},
    )
    # alignment: 5/8 + 2/2 = 1.625 against 6/8 = 0.75
    assert simulate_one(workload, "tetris").start_time.tolist() == [0, 10]
    demand = np.array([[5.0, 0.0], [6.0, 0.0]])
    workload = Workload("two", workload.cluster, replace(one.jobs, demand=demand), one.segments, {})
    assert simulate_one(workload, "tetris").start_time.tolist() == [10, 0]


# --- names ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["", "fcfs", "easy-", "easy-tetris", "sjf+fifo", "greedy-sjf+fifo", "easy-fifo+", "EASY-fifo"]
)
def test_unknown_rules_are_refused_with_a_list_of_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown rule .*easy-.*fifo, sjf, saf"):
        parse_rule(name)


def test_every_rule_has_its_own_name():
    assert len(set(RULES)) == len(RULES) and all(parse_rule(rule).name == rule for rule in RULES)
