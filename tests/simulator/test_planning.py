"""Planning looks at nothing that nobody can know, falls back on its base, and with the truth in hand finds the best."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import simulate_one, workloads
from test_simulator import check_possible

from simulator.planning import Planner, plan
from simulator.rules import RULES
from workloads.jobs import Workload

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
