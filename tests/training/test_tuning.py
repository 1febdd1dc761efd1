"""The tuned rule: special cases that are classical rules, what it is fitted to, and the fit."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import simulate_one, workloads

import scheduler_env as se
import tuned_rule as tuned_rule_command
from policies import load_policy
from scheduler_env import SchedulerVectorEnv
from simulator.arrays import recorded_estimates
from simulator.kernels import PATIENCE, RESERVE_TERMS, TERM_COUNT
from simulator.replay import simulate
from simulator.rules import parse_rule, tuned_rule
from training.judgement import costs
from training.tuning import STARTS, badness, free_weights, tune
from workloads.jobs import Workload, at_loads, resampled
from workloads.load import load_workload

ROOT = Path(se.__file__).parent


def one_node(workload: Workload) -> bool:
    return len(workload.cluster.speed) == 1


@pytest.mark.parametrize("rule", ["easy-sjf", "easy-sjf-history"])
@given(workload=workloads(past=15).filter(one_node))
@settings(max_examples=40)
def test_the_shortest_job_first_is_a_tuned_rule(rule: str, workload: Workload) -> None:
    ours, theirs = simulate_one(workload, tuned_rule(STARTS[rule])), simulate_one(workload, rule)
    assert ours.start_time.tolist() == theirs.start_time.tolist()


@given(workload=workloads().filter(one_node))
@settings(max_examples=40)
def test_a_tuned_rule_that_never_reserves_is_greedy(workload: Workload) -> None:
    weights = STARTS["easy-sjf"].copy()
    weights[RESERVE_TERMS * TERM_COUNT] = 1.0
    greedy = simulate_one(workload, "greedy-sjf")
    assert simulate_one(workload, tuned_rule(weights)).start_time.tolist() == greedy.start_time.tolist()


def test_who_has_waited_for_longer_than_its_patience_goes_first() -> None:
    """With none at all the rule is EASY-FIFO, whatever its weights."""
    workload = load_workload("hpc", "validation", runs=1, run_jobs=500)
    weights = STARTS["easy-saf"].copy()
    weights[RESERVE_TERMS * TERM_COUNT], weights[PATIENCE] = 1.0, -1.0
    [ours], [fifo] = simulate(workload, tuned_rule(weights)), simulate(workload, "easy-fifo")
    assert ours.start_time.tolist() == fifo.start_time.tolist()
    weights[PATIENCE] = 4.0
    [patient], [greedy] = simulate(workload, tuned_rule(weights)), simulate(workload, "greedy-saf")
    assert patient.wait.max() < 0.5 * greedy.wait.max()


@given(workload=workloads(max_jobs=25).filter(one_node), seconds=st.sampled_from([0.0, 3.0, 20.0]))
@settings(max_examples=60)
def test_a_patience_from_outside_makes_it_reserve_too(workload: Workload, seconds: float) -> None:
    """As `runs/RUN@HOURS` gives it to the tuned rule that a network started from."""
    weights = STARTS["easy-sjf"].copy()
    weights[RESERVE_TERMS * TERM_COUNT] = 1.0  # never, by itself
    ours = simulate_one(workload, parse_rule(tuned_rule(weights))._replace(patience=seconds))
    greedy = simulate_one(workload, parse_rule("greedy-sjf")._replace(patience=seconds))
    assert ours.start_time.tolist() == greedy.start_time.tolist()


def test_a_tuned_rule_is_a_policy_with_a_short_name() -> None:
    workload = load_workload("cloud", "validation", runs=1, run_jobs=300)
    names = [tuned_rule(STARTS[rule]) for rule in ("easy-sjf", "easy-xf")]
    policies = [load_policy(name) for name in names]
    assert all(re.fullmatch("tuned-[0-9a-f]{8}", policy.name) for policy in policies)
    assert policies[0].name != policies[1].name and policies[0].reference == names[0]
    [ours], [theirs] = policies[0].schedule(workload), simulate(workload, names[0])
    assert ours.start_time.tolist() == theirs.start_time.tolist()


def test_the_name_holds_the_weights() -> None:
    weights = np.random.default_rng(0).normal(size=len(STARTS["easy-sjf"]))
    rule = parse_rule(tuned_rule(weights))
    assert rule.title == "tuned"
    np.testing.assert_allclose(rule.weights, weights, rtol=1e-5)
    for name in ("tuned:", "tuned:1,2", "tuned:" + ",".join(["nan"] * len(weights)), "tuned:a,b"):
        with pytest.raises(ValueError, match=f"has {len(weights)} numbers behind its colon; let tuned_rule.py"):
            parse_rule(name)


@given(workload=workloads(min_jobs=10, past=15), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_recorded_estimates_are_the_users_last_two_run_times(workload: Workload, seed: int) -> None:
    jobs = replace(workload.jobs, wait_time=np.random.default_rng(seed).uniform(0, 500, len(workload.jobs)))
    ends = jobs.submit_time + jobs.wait_time + jobs.run_time
    found = recorded_estimates(jobs)
    for i in range(len(jobs)):
        known = [j for j in range(len(jobs)) if jobs.user[j] == jobs.user[i] >= 0 and ends[j] <= jobs.submit_time[i]]
        last = sorted(known, key=lambda j: ends[j])[-2:]
        expected = min(jobs.requested_time[i], jobs.run_time[last].mean()) if len(last) == 2 else jobs.requested_time[i]
        assert found[i] == pytest.approx(expected)


def test_roll_outs_of_a_rule_with_history_stop_early_and_stay_exact_when_it_is_recorded() -> None:
    workload = load_workload(str(ROOT / "tests/data/small.swf"), "train")
    options = dict(reference=tuned_rule(STARTS["easy-saf-history"]), recorded_history=True)
    options |= dict(num_jobs=64, warmup_jobs=32, followup_jobs=64, objective="wait")
    early, full = (SchedulerVectorEnv(8, workload, full_rollouts=f, **options) for f in (False, True))
    assert not early._plan.full
    early.reset(seed=0), full.reset(seed=0)
    rng, total = np.random.default_rng(0), 0.0
    for _ in range(150):
        mask = early.action_masks()
        anything = (mask * rng.random(mask.shape)).argmax(1)
        actions = np.where(rng.random(8) < 0.3, anything, early.rule_actions())
        rewards = early.step(actions)[1]
        np.testing.assert_allclose(rewards, full.step(actions)[1], atol=1e-12)
        total += np.abs(rewards).sum()
    assert total > 0


def test_resampled_runs_are_weeks_of_the_workload_at_other_loads() -> None:
    whole = load_workload("hpc", "train", runs=2, run_jobs=4000)
    runs = resampled(whole, 1, runs=6, run_jobs=700, loads=(0.5, 2.0))
    assert (np.diff(runs.segments, axis=1) == 700).all() and len(runs.jobs) == 6 * 700
    assert (np.diff(runs.jobs.submit_time) >= 0).all()
    assert set(runs.jobs.job_id) <= set(whole.jobs.job_id)
    index = {job: i for i, job in enumerate(whole.jobs.job_id)}
    original = np.array([index[job] for job in runs.jobs.job_id])
    assert (runs.jobs.run_time == whole.jobs.run_time[original]).all()
    for begin, end in runs.segments:  # one factor a run
        gaps, before = np.diff(runs.jobs.submit_time[begin:end]), np.diff(whole.jobs.submit_time[original[begin:end]])
        following = (np.diff(original[begin:end]) == 1) & (before > 1)
        factors = before[following] / gaps[following]
        assert 0.5 <= np.median(factors) <= 2.0
        np.testing.assert_allclose(factors, np.median(factors), rtol=1e-6)
    again, other = resampled(whole, 1, runs=6, run_jobs=700), resampled(whole, 2, runs=6, run_jobs=700)
    assert again.jobs.job_id.tolist() == resampled(whole, 1, runs=6, run_jobs=700).jobs.job_id.tolist()
    assert again.jobs.job_id.tolist() != other.jobs.job_id.tolist()


def test_badness_is_zero_for_the_base_and_counts_starvation() -> None:
    base = np.array([[100.0, 1000.0, 5000.0, 200.0], [300.0, 3000.0, 9000.0, 500.0]])
    assert badness(base, base) == 0.0
    assert badness(base * [0.5, 1, 1, 1], base) == pytest.approx(np.log(0.5))
    assert badness(base * [0.5, 1.5, 1, 1], base) == pytest.approx(np.log(0.5) + 0.5 * 0.5)
    assert badness(base * [0.5, 1, 5, 1], base) == pytest.approx(np.log(0.5) + 0.05 * 3)


def test_weights_that_change_nothing_are_not_searched() -> None:
    hpc, cloud = (
        load_workload("hpc", "train", runs=1, run_jobs=100),
        load_workload("cloud", "train", runs=1, run_jobs=9),
    )
    assert free_weights(cloud).sum() == PATIENCE - 2
    assert free_weights(hpc).sum() == 3 * TERM_COUNT - 2
    nobody = replace(hpc, jobs=replace(hpc.jobs, user=np.full(100, -1, np.int32)))
    assert free_weights(nobody).sum() == 3 * TERM_COUNT - 2 - 3


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_fits_the_same_rule(seed: int) -> None:
    train = load_workload("hpc", "train", runs=1, run_jobs=100)
    assert tune(train, "wait", seed, generations=1) == tune(train, "wait", seed, generations=1)


def test_where_nobody_waits_all_rules_are_as_good() -> None:
    idle = at_loads(load_workload("hpc", "train", runs=1, run_jobs=100), (0.001,))
    assert simulate(idle, "easy-fifo")[0].wait.max() == 0
    base, found = (costs(simulate(idle, rule), "wait") for rule in ("easy-fifo", "easy-sjf"))
    assert badness(found, base) == 0


def test_the_fit_beats_where_it_starts() -> None:
    train = load_workload("hpc", "train", runs=1, run_jobs=500)
    name = tune(train, "wait", seed=1, generations=8)
    held_out = resampled(train, 2)
    base = costs(simulate(held_out, "easy-fifo"), "wait")
    tuned, started = (costs(simulate(held_out, rule), "wait") for rule in (name, "easy-saf"))
    assert badness(tuned, base) < badness(started, base)


def test_the_command_prints_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    tuned_rule_command.main(tuned_rule_command.Args(str(ROOT / "tests/data/small.swf"), generations=1))
    printed = capsys.readouterr()
    assert parse_rule(printed.out.strip()).title == "tuned"
    assert "tuned " in printed.err and "easy-fifo" in printed.err


@pytest.mark.slow
def test_script_prints_the_rule(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tuned_rule.py"), "--workload", str(ROOT / "tests/data/small.swf")]
    result = subprocess.run([*command, "--generations", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert parse_rule(result.stdout.strip()).title == "tuned"
    assert "tuned " in result.stderr and "easy-fifo" in result.stderr
    result = subprocess.run([*command[:-1], "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stderr.startswith("error: nowhere: no such file")


@pytest.mark.parametrize("flags", [{"seed": -1}, {"generations": -1}])
def test_numbers_out_of_range_are_refused(flags: dict[str, int]) -> None:
    [name] = flags
    with pytest.raises(ValueError, match=f"{name} is -1; use 0 or more"):
        tuned_rule_command.main(tuned_rule_command.Args(**flags))
