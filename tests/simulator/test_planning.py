"""Planning looks at nothing that nobody can know, falls back on its base, and with the truth in hand finds the best."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import environment, make_workload, simulate_one, workloads
from tables import check_possible

from simulator.kernels import FAIRNESS, GREEDY, STATIC
from simulator.planning import Planner, plan
from simulator.replay import simulate
from simulator.rules import RULES, Rule
from simulator.schedule import Schedule
from workloads.jobs import Workload
from workloads.load import load_workload

BASES = [rule for rule in RULES if rule != "tetris"]


def with_run_times(workload: Workload, run_time: np.ndarray) -> Workload:
    return replace(workload, jobs=replace(workload.jobs, run_time=run_time))


# --- what nobody can know ---------------------------------------------------------------------------------------------


@given(
    workloads(20, 60, past=20),
    st.sampled_from(["easy-fifo", "easy-wfp3+sjf", "easy-sjf-history", "greedy-saf"]),
    st.integers(0, 59),
)
@settings(max_examples=150)
def test_a_run_time_changes_nothing_before_the_job_has_ended(workload, base, which):
    first, last = workload.segments[0]
    job = first + which % (last - first)
    planner = Planner(base, samples=4, threshold=0.0)
    [before] = plan(workload, planner)
    end = before.start_time[job - first] + before.service_time[job - first]
    longer = workload.jobs.run_time.copy()
    longer[job] *= 2
    [after] = plan(with_run_times(workload, longer), planner)
    early = (before.start_time < end) | (after.start_time < end)
    assert (before.start_time[early] == after.start_time[early]).all()
    assert (before.node[early] == after.node[early]).all()


# --- the base ---------------------------------------------------------------------------------------------------------


@given(workloads(past=10), st.sampled_from(BASES))
@settings(max_examples=200)
def test_with_an_infinite_threshold_it_is_the_base(workload, base):
    [planned], expected = plan(workload, Planner(base, threshold=np.inf)), simulate_one(workload, base)
    assert (planned.start_time == expected.start_time).all() and (planned.node == expected.node).all()


@given(workloads(past=10), st.sampled_from(BASES))
@settings(max_examples=200)
def test_plans_are_possible_schedules(workload, base):
    check_possible(plan(workload, Planner(base, samples=3, threshold=0.0))[0])


@pytest.mark.parametrize("workload", ["cloud", "hpc", "manufacturing", "datacenter", "tasks"])
def test_with_an_infinite_threshold_it_is_the_base_on_real_workloads(workload):
    jobs = load_workload(workload, "validation", runs=2, run_jobs=1_000)
    for base in BASES:
        planned, expected = plan(jobs, Planner(base, threshold=np.inf), threads=2), simulate(jobs, base)
        for one, other in zip(planned, expected, strict=True):
            assert (one.start_time == other.start_time).all() and (one.node == other.node).all(), base


# --- the truth in hand ------------------------------------------------------------------------------------------------


def all_at_once(workload: Workload) -> Workload:
    """All jobs there from the beginning, and each takes exactly what it requests: planning knows all there is."""
    jobs = workload.jobs
    return replace(
        workload, jobs=replace(jobs, submit_time=np.zeros(len(jobs)), requested_time=jobs.run_time.copy())
    )  # fmt: skip


def planned_cost(schedule: Schedule) -> float:
    return float((schedule.wait**FAIRNESS + schedule.service_time).sum())


@given(workloads(2, 12), st.sampled_from(BASES))
@settings(max_examples=200)
def test_who_knows_the_run_times_is_never_worse_than_the_base(workload, base):
    workload = all_at_once(workload)
    [planned] = plan(workload, Planner(base, candidates=12, samples=1, threshold=0.0))
    assert planned_cost(planned) <= planned_cost(simulate_one(workload, base)) + 1e-6


def test_with_five_jobs_it_goes_most_of_the_way_to_the_best_of_all_orders():
    base = planned = best = 0.0
    rule = Rule("order", STATIC, STATIC, GREEDY)
    for seed in range(60):
        workload = all_at_once(make_workload(seed, 5))
        costs = [
            planned_cost(simulate_one(workload, rule, scores=np.array(order, float)))
            for order in itertools.permutations(range(5))
        ]
        [found] = plan(workload, Planner("easy-fifo", candidates=5, samples=1, threshold=0.0))
        base += planned_cost(simulate_one(workload, "easy-fifo"))
        planned += planned_cost(found)
        best += min(costs)
    assert best <= planned < base and planned - best < 0.2 * (base - best), (base, planned, best)


# --- what it is called with -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base": "fastest"}, "unknown rule 'fastest'"),
        ({"base": "tetris"}, "tetris has no order of jobs"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"candidates": 0}, "candidates is 0"),
        ({"threshold": np.nan}, "threshold is nan"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(settings, words):
    with pytest.raises(ValueError, match=words) as refused:
        Planner(**settings)
    assert len(str(refused.value).splitlines()) == 1


def test_the_same_seed_gives_the_same_schedule_on_any_number_of_threads():
    jobs = load_workload("hpc", "validation", runs=3, run_jobs=400)
    first, again, other = (
        np.concatenate(
            [schedule.start_time for schedule in plan(jobs, Planner("easy-fifo", seed=seed), threads=threads)]
        )
        for seed, threads in ((1, 1), (1, 3), (2, 1))
    )
    assert (first == again).all() and (first != other).any()


# --- what learners can ask --------------------------------------------------------------------------------------------


@given(workloads(3, 15, past=5), st.sampled_from(["easy-fifo", "easy-saf", "easy-wfp3+sjf", "greedy-saf"]))
@settings(max_examples=60)
def test_the_planned_gain_of_an_action_is_what_it_gains_where_all_is_known(workload, reference):
    """All jobs are there and take what they request, as those before them did: then the reward tells the same."""
    env = environment(all_at_once(workload), reference=reference, planned_gain=True)
    _, info = env.reset(seed=0, options={"first": [int(env.envs.workload.segments[0, 0])]})
    whole, over, rng = float(env.envs._core.batch.s["cost"][0]), False, np.random.default_rng(0)
    while not over:
        gains, mask = info["planned_gain"], info["action_mask"].astype(bool)
        assert (np.isnan(gains) == ~mask).all()
        assert gains[env.envs.rule_actions()[0]] == pytest.approx(0, abs=1e-3)
        action = int(rng.choice(np.flatnonzero(mask)))
        _, reward, terminated, truncated, info = env.step(action)
        assert reward * whole == pytest.approx(gains[action], rel=1e-4, abs=1e-3)
        over = terminated or truncated


def test_nobody_who_does_not_ask_gets_planned_gains():
    env = environment(make_workload(0, 10))
    _, info = env.reset(seed=0)
    assert set(info) == {"action_mask"}
