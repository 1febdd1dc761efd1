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
from simulator.rules import RULES, parse_rule
from training.judgement import Judgement
from training.validation import TAILS, Validation
from workloads.jobs import Workload
from workloads.load import load_workload


def validation(*flags: str) -> Validation:
    args = tyro.cli(ppo_scheduler.Args, args=[*SMALL[ppo_scheduler], *flags])
    return Validation(args, load_workload(args.workload, "train"), Console())


def test_a_gain_bought_with_starvation_does_not_count() -> None:
    found = validation()
    base = found.rules["easy-fifo"]
    for p99, longest, fine in ((1.19, 0.99, True), (1.21, 0.3, False), (1.0, 1.01, False)):
        judged = base._replace(cost=0.0, wait_p99=p99 * base.wait_p99, wait_max=longest * found.longest)
        assert found.acceptable(judged) == fine


def test_the_refusal_names_the_flags_that_would_accept_it() -> None:
    found = validation()
    bad = found.rules["easy-fifo"]._replace(
        wait_p99=1.31 * found.rules["easy-fifo"].wait_p99, wait_max=2 * found.longest
    )
    refusal = found.refusal(bad)
    assert refusal is not None and "its p99 of the wait is 1.31 times easy-fifo's and one job waits for" in refusal
    assert refusal.endswith("; `--max-tail 1.4 --max-longest 7.2` accepts it")
    assert validation("--max-tail", "1.4", "--max-longest", "7.2").acceptable(bad)


def test_one_bound_is_for_patience_and_guard() -> None:
    """A rule that starves a job is refused, and accepted with the patience that keeps it within the bound."""
    found = validation("--max-longest", "1.1", "--max-tail", "3")
    before = max(s.wait.max() for s in found.replay("easy-fifo", found.training, found.training.segments))
    assert found.longest == pytest.approx(1.1 * max(before, found.rules["easy-fifo"].wait_max))
    assert found.hours == pytest.approx(0.8 * found.longest / 3600)
    found.longest = 1.1 * found.rules["easy-fifo"].wait_max  # as if training had been no busier than validation
    starving = [name for name in RULES if found.rules[name].wait_max > found.longest and found.patient(name) != name]
    assert max(found.rules[name].wait_max for name in starving) > 1.5 * found.longest
    assert not any(map(found.acceptable, starving))
    patient = {name: found.judge_rule(found.patient(name), found.workload, found.segments) for name in starving}
    kept = {name for name in starving if patient[name].wait_max <= found.longest}
    assert {"wfp3", "greedy-fifo", "greedy-ljf", "easy-ljf", "easy-xf"} <= kept
    assert max(found.wait_max for found in patient.values()) < 1.04 * found.longest
    assert found.patient("easy-saf@3") == "easy-saf@3" and found.patient("tetris") == "tetris"


def test_a_robust_rule_is_good_in_mean_and_in_square_on_training_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def judgement(cost: float, rms: float) -> Judgement:
        return Judgement(cost, 0.0, 0.0, rms)

    found = validation()
    found.rules = {"mean": judgement(10, 100), "validation": judgement(20, 20), "both": judgement(21, 20)}
    training = {"mean": judgement(10, 10), "validation": judgement(20, 30), "both": judgement(20, 10)}

    def judge_rule(name: str, workload: Workload, segments: np.ndarray, objective: str | None = None) -> Judgement:
        return training[name]

    monkeypatch.setattr(found, "judge_rule", judge_rule)
    assert found.robust_rule(list(training), found.args.objective) == "both"


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
    found.longest = 1.0  # second
    worse = found.consider(found.replay("fifo", found.workload, found.segments), 0)
    assert worse.files == [] and "refused for its tail: one job waits for 21" in worse.said
    assert "`--max-longest " in worse.said
    found = validation()
    assert found.best == 0 and found.best_cost == found.rules[found.best_rule].cost and found.stands_for is not None
    worse = found.consider(found.replay("fifo", found.workload, found.segments), 0)
    assert worse.files == [] and found.stands_for is not None and "not better than the best so far, " in worse.said
    unmoved = found.consider(found.replay("fifo", found.workload, found.segments), 64)
    assert unmoved.files == [] and "unmoved: not one decision of the replays differs" in unmoved.said
    found.best_cost = np.inf  # whatever is acceptable is better than that
    better = found.consider(found.replay("easy-fifo", found.workload, found.segments), 128)
    assert better.files == [*TAILS, "policy.onnx"] and better.said.endswith("the best so far")
    assert found.stands_for is None and found.best_cost == found.rules["easy-fifo"].cost
    assert better.metrics["eval/best_improvement"] == better.metrics["eval/improvement"] == -found.best < 0
    other = found.consider(found.replay("easy-wfp3+sjf", found.workload, found.segments), 192)
    assert other.metrics["eval/cost"] == found.rules["easy-wfp3+sjf"].cost < found.best_cost
    assert found.best_cost == found.rules["easy-fifo"].cost and "policy.onnx" not in other.files
    assert other.said.endswith("its p99 of the wait is 1.21 times easy-fifo's; `--max-tail 1.3` accepts it")


def test_the_best_network_of_each_bound_on_the_tail_is_kept() -> None:
    found = validation()
    schedules = found.replay("easy-saf", found.workload, found.segments)
    judged = found.rules["easy-saf"]
    ratio = judged.wait_p99 / found.rules["easy-fifo"].wait_p99
    fitting = [
        file for file, tail in TAILS.items()
        if ratio <= tail and judged.wait_max <= found.longest * tail / found.args.max_tail
    ]  # fmt: skip
    found.consider(found.replay("fifo", found.workload, found.segments), 0)
    kept = found.consider(schedules, 64).files
    assert [file for file in kept if file in TAILS] == fitting and "policy-any.onnx" in fitting
    again = found.consider(found.replay("easy-saf", found.workload, found.segments), 128)
    assert not set(again.files) & set(TAILS)  # it is as good as what is there, not better


def test_the_table_shows_what_the_guard_costs() -> None:
    """Rules that do the same are one row; what was refused is named with what it would gain."""
    found = validation("--max-tail", "1")
    rows = found.results("PPO")
    assert [row[1] for row in rows] == sorted(row[1] for row in rows) and len({row[1:] for row in rows}) == len(rows)
    by_name = {name: row for row in rows for name in row[0].split("\n")}
    easy = by_name["easy-fifo"]
    assert easy[3] == 0 and easy[5:] == (1, 1) and by_name["fifo"][2] == 0
    for name, line in zip(found.refused(), found.thrown_out(), strict=True):
        assert line.startswith(f"{name}: -") and f"% to {found.best_rule}, but " in line and name in by_name
    title = parse_rule(found.stands_for or "").title
    assert by_name[f"PPO (= {title})"][1] == found.rules[found.stands_for or ""].cost


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
