"""Which rules and policies count: the reference, the best rule, and what is not bought with starvation."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tyro
from learners import SMALL, command, scalars, train
from rich.console import Console

import ppo_scheduler
from policies import load_policy
from simulator.kernels import EASY
from simulator.replay import simulate
from simulator.rules import parse_rule
from training.judgement import Judgement
from training.validation import Validation
from workloads.jobs import Workload
from workloads.load import load_workload


def validation(*flags: str) -> Validation:
    args = tyro.cli(ppo_scheduler.Args, args=[*SMALL[ppo_scheduler], *flags])
    return Validation(args, load_workload(args.workload, "train"), Console())


def test_a_gain_bought_with_starvation_does_not_count() -> None:
    found = validation()
    base = found.rules["easy-fifo"]
    for p99, longest, fine in ((1.19, 3.59, True), (1.21, 1.0, False), (1.0, 3.61, False)):
        judged = base._replace(cost=0.0, wait_p99=p99 * base.wait_p99, wait_max=longest * base.wait_max)
        assert found.acceptable(judged) == fine


def test_a_robust_rule_is_good_in_mean_and_in_square_on_training_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def judgement(cost: float, rms: float) -> Judgement:
        return Judgement(cost, 0.0, 0.0, rms)

    found = validation()
    found.rules = {"mean": judgement(10, 100), "validation": judgement(20, 20), "both": judgement(21, 20)}
    training = {"mean": judgement(10, 10), "validation": judgement(20, 30), "both": judgement(20, 10)}

    def judge_rule(name: str, workload: Workload, segments: np.ndarray, objective: str | None = None) -> Judgement:
        return training[name]

    monkeypatch.setattr(found, "judge_rule", judge_rule)
    assert found.robust_rule(load_workload("hpc", "train", runs=1, run_jobs=9), list(training)) == "both"


@pytest.mark.parametrize("flags", [("--lock-in",), ("--lock-in", "--backfill", "none"), ("--backfill", "none")])
def test_rules_and_pictures_follow_the_semantics_of_the_run(flags: tuple[str, ...]) -> None:
    found = validation("--reference", "auto", *flags)
    args, first = found.args, found.segments[:1]
    [expected] = simulate(found.workload, found.best_rule, first, backfill=args.backfill, lock_in=args.lock_in)
    assert np.array_equal(found.example.start_time, expected.start_time)
    if not args.lock_in:  # the agent may not backfill: neither do the rule it starts from, nor the one to stand for
        assert {parse_rule(name).mode != EASY for name in (found.best_rule, found.reference)} == {True}
        assert found.stands_for is not None and parse_rule(found.stands_for).mode != EASY


@pytest.mark.parametrize(
    ("flags", "reference"),
    [
        (("--reference", "easy-saf"), r"easy-saf@[\d.e+]+"),
        (("--reference", "easy-saf", "--patience", "0"), "easy-saf"),
        (("--reference", "easy-saf@5"), "easy-saf@5"),
        (("--reference", "tetris"), "tetris"),
        pytest.param(("--reference", "tuned", "--tune-generations", "1"), r"tuned:[-\d.,e]*", marks=pytest.mark.slow),
    ],
)
def test_the_reference_has_a_patience_and_keeps_it_when_resumed(flags: tuple[str, ...], reference: str) -> None:
    chosen = validation(*flags).reference
    assert re.fullmatch(reference, chosen)
    assert validation(*flags, "--reference", chosen).reference == chosen


def test_a_better_policy_is_the_best_so_far() -> None:
    found = validation()
    assert found.best == 0 and found.stands_for == found.best_rule
    [known] = [found.replay("easy-sjf", found.workload, found.segments[:1])]
    better, metrics = found.consider(known)
    assert better == (metrics["eval/cost"] < found.rules[found.best_rule].cost)
    found.best_cost, found.stands_for = np.inf, found.best_rule  # whatever is acceptable is better than that
    better, metrics = found.consider(found.replay("easy-fifo", found.workload, found.segments))
    assert better and found.stands_for is None and found.best_cost == found.rules["easy-fifo"].cost
    assert metrics["eval/best_improvement"] == metrics["eval/improvement"] == -found.best < 0
    worse, metrics = found.consider(found.replay("fifo", found.workload, found.segments))
    assert not worse and found.best_cost == found.rules["easy-fifo"].cost
    assert metrics["eval/improvement"] < metrics["eval/best_improvement"]
    rows = {name: relative for name, _, *relative in found.results("PPO")}
    assert rows["PPO"] == rows["easy-fifo"] and rows["fifo"][0] == rows["easy-fifo"][1] == 0


def test_a_run_with_lock_in_trains(tmp_path: Path) -> None:
    run = train(ppo_scheduler, tmp_path, "--lock-in", "--total-timesteps", "128", "--num-evaluations", "1")
    assert load_policy(str(run)).metadata.lock_in
    assert len(scalars(run, "charts/learning_rate")) == 2


def test_a_run_learns_from_the_tail_and_is_judged_by_its_objective(tmp_path: Path) -> None:
    flags = ("--learn-from", "tail", "--reference", "auto", "--total-timesteps", "128")
    run = train(ppo_scheduler, tmp_path, *flags)
    assert load_policy(str(run)).metadata.objective == "wait"
    costs, waits = scalars(run, "eval/cost"), scalars(run, "eval/wait")
    assert waits and all(0.5 < costs[step] / waits[step] < 2 for step in waits)  # seconds, not their squares


def test_nobody_waits_and_it_says_so(tmp_path: Path) -> None:
    job = "{0} {0}000 0 50 4 -1 -1 4 100 -1 1 1 1 1 1 1 -1 -1\n"
    (tmp_path / "idle.swf").write_text("; MaxProcs: 8\n" + "".join(map(job.format, range(1, 801))))
    flags = (*SMALL[ppo_scheduler], "--workload", "idle.swf", "--total-timesteps", "64")
    result = command(ppo_scheduler, tmp_path, *flags)
    assert result.code == 0, result.err
    assert "idle.swf: there is nothing to schedule: 0.00% of the jobs wait at all" in result.err
