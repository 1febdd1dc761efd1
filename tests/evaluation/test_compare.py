"""The statistics against known answers, the same jobs for all, results.json, and the published table."""

import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import tyro
from policy_files import write_policy

import benchmark
import dqn_scheduler
import evaluation.compare
import fifo_baseline
import ppo_scheduler
import tuned_rule
from evaluation.held_out import Compare, held_out, shorter, windows
from evaluation.speed import Speed
from evaluation.statistics import METRICS, block_metrics, bootstrap_weights, cut, difference, summary
from policies import load_policy
from simulator.replay import simulate
from simulator.rules import RULES
from workloads.files import write_json
from workloads.load import load_workload
from workloads.reading import Reading, quoted

SMALL = str(Path(__file__).parents[1] / "data" / "small.swf")
SHARED = Path(__file__).parents[3] / "shared"
REFERENCE = SHARED / "reference" / "rlscheduler.json"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason=f"the published figures are not in {REFERENCE}")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """benchmark.py with these arguments, in an empty folder; returns what --output holds."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> dict:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments), "--output", "results.json"])
        benchmark.main()
        return json.loads(Path("results.json").read_text())

    return call


# ------------------------------------------------------------------------------------------------ statistics
def test_interval_of_iid_normal_blocks() -> None:
    values = np.random.default_rng(0).normal(100, 15, size=200)
    found = summary(values, bootstrap_weights(200, seed=1))
    low, high = found["ci95"]
    assert found["mean"] == values.mean()
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(200), rel=0.03)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.1)


def test_interval_covers_the_truth_in_95_percent() -> None:
    rng, weights = np.random.default_rng(1), bootstrap_weights(50, seed=1)
    for sample, shift in ((rng.normal(size=(50, 800)), 0.0), (rng.exponential(size=(50, 800)), 1.0)):
        low, high = np.percentile(weights @ sample, [2.5, 97.5], axis=0)
        assert 0.91 <= np.mean((low <= shift) & (shift <= high)) <= 0.97


def test_weights_are_resamples_of_whole_blocks() -> None:
    weights = bootstrap_weights(7, seed=3)
    assert weights.shape == (10_000, 7)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights * 7, np.round(weights * 7))
    np.testing.assert_array_equal(weights, bootstrap_weights(7, seed=3))


def test_differences_are_paired() -> None:
    rng, weights = np.random.default_rng(0), bootstrap_weights(40, seed=1)
    first = rng.lognormal(5, 1, size=40)  # blocks differ by far more than the policies
    assert difference(first, first, weights) == {"mean": 0.0, "ci95": [0.0, 0.0]}
    halved = difference(first / 2, first, weights)
    assert halved["mean"] == pytest.approx(-50) and halved["ci95"] == pytest.approx([-50, -50])
    low, high = difference(first * rng.normal(0.9, 0.01, size=40), first, weights)["ci95"]
    assert -11 < low < high < -9 and high - low < 1.5
    alone_low, alone_high = summary(first, weights)["ci95"]
    assert 100 * (alone_high - alone_low) / first.mean() > 20 * (high - low)


def test_no_interval_for_one_block_and_no_percents_of_nothing() -> None:
    assert summary(np.array([3.0]), bootstrap_weights(1, 1)) == {"mean": 3.0, "ci95": [None, None]}
    assert difference(np.ones(4), np.zeros(4), bootstrap_weights(4, 1)) == {"mean": None, "ci95": [None, None]}


# ---------------------------------------------------------------------------------------- jobs, blocks, metrics
@pytest.mark.parametrize(
    ("jobs", "blocks", "warmup", "first", "length"),
    [
        (1000, 50, 0.05, 50, 19),
        (1010, 50, 0.05, 60, 19),
        (256, 1, 0.0, 0, 256),
        (10, 50, 0.05, 0, 1),
        (1, 5, 0.05, 0, 1),
    ],
)
def test_blocks_are_equally_long_and_end_with_the_replay(
    jobs: int, blocks: int, warmup: float, first: int, length: int
) -> None:
    found = cut(jobs, blocks, warmup)
    assert [(block.start, block.stop) for block in found] == [(a, a + length) for a in range(first, jobs, length)]
    assert len(found) == min(blocks, jobs) and found[-1].stop == jobs


def test_utilization_of_a_block_counts_whatever_runs_beside_it() -> None:
    [schedule] = simulate(load_workload(SMALL, "test"), "easy-fifo")
    block = slice(300, 340)
    latency, wait, slowdown, utilization, makespan = block_metrics(schedule, block)
    start, end = schedule.start_time, schedule.start_time + schedule.service_time
    begin = schedule.jobs.submit_time[300]
    assert makespan == end[block].max() - begin
    instants = np.unique(np.clip(np.append(start, end), begin, begin + makespan))
    used = ((start <= instants[:-1, None]) & (instants[:-1, None] < end)) @ schedule.jobs.demand[:, 0]
    share = used @ np.diff(instants) / (schedule.cluster.capacity[0, 0] * makespan)
    assert utilization == pytest.approx(share, rel=1e-9) and 0.3 < share < 1
    assert (latency, wait, slowdown) == pytest.approx(
        (schedule.latency[block].mean(), schedule.wait[block].mean(), schedule.bounded_slowdown[block].mean())
    )


@pytest.mark.parametrize("workload", ["hpc", "datacenter"])
def test_a_block_that_is_all_of_a_schedule_has_its_metrics(workload: str) -> None:
    [schedule] = simulate(load_workload(workload, "test", runs=1, run_jobs=300), "easy-sjf")
    expected = schedule.metrics()
    assert block_metrics(schedule, slice(0, 300)) == pytest.approx([expected[name] for name in METRICS], rel=1e-12)


@pytest.mark.parametrize(
    ("max_jobs", "expected"),
    [
        (3, [[0, 3]]),
        (10, [[0, 10]]),
        (15, [[0, 7], [10, 17]]),
        (25, [[0, 8], [10, 18], [20, 28]]),
        (99, [[0, 10], [10, 20], [20, 30]]),
    ],
)
def test_shorter_replays(max_jobs: int, expected: list[list[int]]) -> None:
    assert shorter(np.array([[0, 10], [10, 20], [20, 30]]), max_jobs).tolist() == expected


def test_windows_lie_side_by_side_within_segments_and_come_from_the_seed() -> None:
    segments = np.array([[0, 107], [107, 137], [137, 147]])
    found = np.stack([windows(segments, 2000, 20, np.random.default_rng(seed)) for seed in range(200)])
    assert found.shape == (200, 6, 2) and ((found[..., 1] - found[..., 0]) == 20).all()
    for some in np.sort(found, axis=1):
        assert (some[1:, 0] >= some[:-1, 1]).all()
    starts = {20 * k + spare for k in range(5) for spare in range(8)} | set(range(107, 118))
    assert starts == set(found[..., 0].flat)  # the grid begins anywhere, and no window is across two segments
    np.testing.assert_array_equal(found[5], windows(segments, 6, 20, np.random.default_rng(5)))
    assert windows(segments, 4, 20, np.random.default_rng(5)).tolist() == found[5, :4].tolist()


def test_load_compresses_arrivals_within_each_run() -> None:
    usual, busy = (held_out(Compare("hpc", runs=2, load=load)) for load in (1.0, 1.25))
    for first, last in usual.segments:
        slow, fast = usual.jobs.submit_time[first:last], busy.jobs.submit_time[first:last]
        np.testing.assert_allclose(fast - fast[0], (slow - slow[0]) / 1.25)
        assert fast[0] == slow[0]


# ---------------------------------------------------------------------------------------------- compare
def test_results_of_a_continuous_replay(run: Callable[..., dict], capsys: pytest.CaptureFixture[str]) -> None:
    results = run("compare", "--workload", SMALL, "--policies", "fifo", "easy-sjf", "fifo")
    table = capsys.readouterr().out
    assert (results["workload"], results["protocol"], results["jobs"]) == (SMALL, "continuous", 900)
    assert list(results["policies"]) == ["fifo", "easy-sjf"]
    for rule, metrics in results["policies"].items():
        [schedule] = simulate(load_workload(SMALL, "test"), rule)
        first = 900 - results["counted_jobs"]
        assert 45 <= first < 95 and set(metrics) == set(METRICS)
        for name in ("latency", "wait", "bounded_slowdown"):
            figure = metrics[name]
            assert set(figure) == {"mean", "ci95", "per_block"} and len(figure["per_block"]) == 50
            assert figure["mean"] == pytest.approx(getattr(schedule, name)[first:].mean())
            assert figure["ci95"][0] < figure["mean"] < figure["ci95"][1]
        assert results["tails"][rule]["wait_max"] == schedule.wait[first:].max()
        assert rule in table and f"{metrics['wait']['mean']:,.0f} " in table
    means = [results["policies"][rule]["wait"]["mean"] for rule in ("fifo", "easy-sjf")]
    assert results["differences"]["easy-sjf"]["wait"]["mean"] == pytest.approx(100 * (means[1] / means[0] - 1))
    assert results["differences"]["fifo"]["wait"] == {"mean": 0.0, "ci95": [0.0, 0.0]}


def test_results_of_windows(run: Callable[..., dict], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--protocol", "windows", "--episodes", 8, "--episode-jobs", 50, "--policies", "easy-fifo", "saf")
    results = run("compare", "--workload", SMALL, *flags)
    assert (results["jobs"], results["counted_jobs"]) == (400, 400)
    assert "empty" in capsys.readouterr().out
    workload = held_out(Compare(SMALL, protocol="windows", episodes=8, episode_jobs=50))
    expected = [schedule.utilization for schedule in simulate(workload, "saf")]
    assert results["policies"]["saf"]["utilization"]["per_block"] == pytest.approx(expected)


def test_blocks_of_a_preset_do_not_straddle_its_runs(run: Callable[..., dict]) -> None:
    results = run("compare", "--workload", "hpc", "--runs", 3, "--max-jobs", 12_000, "--policies", "easy-fifo")
    assert results["jobs"] == 12_000 and results["counted_jobs"] == 3 * 16 * (3800 // 16)
    assert len(results["policies"]["easy-fifo"]["wait"]["per_block"]) == 48


def test_one_block_says_that_it_has_no_interval(run: Callable[..., dict], capsys: pytest.CaptureFixture[str]) -> None:
    results = run("compare", "--workload", SMALL, "--blocks", 1, "--policies", "fifo", "sjf")
    assert results["policies"]["sjf"]["wait"]["ci95"] == [None, None]
    assert "no intervals" in capsys.readouterr().out


def test_all_stands_for_every_rule(run: Callable[..., dict]) -> None:
    results = run("compare", "--workload", SMALL, "--max-jobs", 50, "--policies", "saf", "all")
    assert list(results["policies"]) == ["saf", *(rule for rule in RULES if rule != "saf")]


def test_planning_is_compared_as_a_policy_and_is_not_the_best_rule(run: Callable[..., dict]) -> None:
    small = ("compare", "--workload", SMALL, "--max-jobs", 60, "--loads", 1.0, "--episode-jobs", 20)
    results = run(*small, "--policies", "easy-sjf", "plan:easy-fifo", "plan", "--report", "report")
    assert {"plan", "plan:easy-fifo"} < results["policies"].keys()
    report = json.loads(Path("report/results.json").read_text())
    assert report["best_rule"] in ("fifo", "easy-fifo", "easy-sjf") and report["planned"] == ["plan:easy-fifo", "plan"]
    assert re.search(r"^\*\*plan(:easy-fifo)? has a mean latency", Path("report/report.md").read_text(), re.MULTILINE)


def test_seeds_of_planning_are_rows_and_their_mean_is_a_line(
    run: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    """The line's figures are recounted from the rows."""
    flags = ("compare", "--workload", SMALL, "--policies", "easy-fifo", "easy-sjf", "plan", "--plan-seeds", 3)
    results = run(*flags)
    seeds = ["plan", "plan seed 2", "plan seed 3"]
    assert list(results["policies"]) == ["easy-fifo", "easy-sjf", *seeds]
    means = {name: found["wait"]["mean"] for name, found in results["policies"].items()}
    best = min(["easy-fifo", "easy-sjf"], key=means.__getitem__)
    [note] = results["notes"]
    for rule in ("easy-fifo", best):
        assert f"{100 * (np.mean([means[name] for name in seeds]) / means[rule] - 1):+.1f} % (" in note
    assert f") to {best}, seeds " + " ".join(f"{100 * (means[name] / means[best] - 1):+.1f}" for name in seeds) in note
    assert note in " ".join(capsys.readouterr().err.split("\n"))


@pytest.mark.parametrize("base", ["easy-ljf", "fifo"])
def test_the_base_takes_the_place_of_planning_that_gains_nothing(run: Callable[..., dict], base: str) -> None:
    """Judged on validation jobs; one that is no better than its base is replaced."""
    flags = ("compare", "--workload", SMALL, "--policies", base, f"plan:{base}", "--plan-or-base")
    results = run(*flags)
    workload = load_workload(SMALL, "validation")
    [planned], [alone] = load_policy(f"plan:{base}").schedule(workload), simulate(workload, base)
    gains = planned.latency.mean() < alone.latency.mean()
    [note] = results["notes"]
    assert note.startswith(f"plan:{base}: latency on validation jobs ")
    assert note.endswith("it stays" if gains else "that takes its place")
    if not gains:
        same = [results["policies"][name]["wait"]["per_block"] for name in (base, f"plan:{base}")]
        assert same[0] == same[1]


def test_trained_policies_are_told_apart_and_get_the_same_jobs(run: Callable[..., dict]) -> None:
    for folder in ("one", "two", "other/two"):
        Path(folder).mkdir(parents=True)
        write_policy(Path(folder) / "policy.onnx", queue_window=256)
    files = ("one/policy.onnx", "two/policy.onnx", "other/two/policy.onnx")
    results = run("compare", "--workload", SMALL, "--max-jobs", 200, "--policies", "easy-sjf", *files)
    assert list(results["policies"]) == ["easy-sjf", *files]
    for name in files:  # these files' network follows easy-sjf
        assert results["policies"][name] == results["policies"]["easy-sjf"]
        assert results["differences"][name]["latency"] == {"mean": 0.0, "ci95": [0.0, 0.0]}
    results = run("compare", "--workload", SMALL, "--policies", "easy-sjf@1", "one@1", "one")["policies"]
    assert list(results) == ["easy-sjf@1", "one/policy.onnx@1", "one/policy.onnx"]
    assert results["one/policy.onnx@1"] == results["easy-sjf@1"]
    assert results["one/policy.onnx@1"]["wait"]["mean"] > 1.3 * results["one/policy.onnx"]["wait"]["mean"]


def test_a_file_that_stands_for_a_rule_is_a_rule_and_is_called_so(
    run: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nowhere is training credited with what a rule does, and the best rule is the best of all of them."""
    name = "small__ppo_scheduler__1__1700000000-2"
    write_policy(Path(name) / "policy.onnx", reference="easy-ljf", rule="easy-ljf", steps=0)
    write_policy(Path("other/policy.onnx"))
    small = ("compare", "--workload", SMALL, "--loads", 1.0, "--episode-jobs", 901, "--objective", "wait")
    results = run(*small, "--policies", "easy-fifo", "easy-sjf", name, "other", "--report", "report")
    standing = f"{name} (= easy-ljf)"
    table = capsys.readouterr().out  # where long names fold
    wait = {rule: figures["wait"]["mean"] for rule, figures in results["policies"].items()}
    means = {rule: simulate(load_workload(SMALL, "test"), rule) for rule in RULES}
    counted = 900 - results["counted_jobs"]
    best = min(RULES, key=lambda rule: means[rule][0].wait[counted:].mean())
    assert best not in ("fifo", "easy-fifo", "easy-sjf", "easy-ljf")  # named by nobody
    assert list(wait) == ["easy-fifo", "easy-sjf", standing, "other/policy.onnx", "fifo", best]
    assert wait[standing] == pytest.approx(means["easy-ljf"][0].wait[counted:].mean())
    assert results["best_rule"] == best and "(=" in table and "easy-ljf)" in table
    # other/policy.onnx follows easy-sjf by a network: it alone is credited
    page = Path("report/report.md").read_text()
    [verdict] = re.findall(r"^\*\*(.*)\*\*$", page, re.MULTILINE)
    assert verdict.startswith("other has a mean wait") and f"the best rule, {best}:" in verdict
    assert verdict.endswith("ppo_scheduler (seed 1) (= easy-ljf) stands for a rule: training found nothing better.")
    # Alone with worse rules it is no contender, though it is the best that is named.
    results = run(*small, "--policies", "easy-fifo", name, "--report", "report")
    [verdict] = re.findall(r"^\*\*(.*)\*\*$", Path("report/report.md").read_text(), re.MULTILINE)
    assert verdict.startswith(f"{best} has a mean wait") and "of all rules" in verdict
    assert standing in results["plots"]["waits"]["share"]


def idle_trace(path: Path, count: int, waiting: int = 0) -> None:
    """Jobs of a minute an hour apart on a machine of eight; so many come with the one before them."""
    job = "{0} {1} 0 60 8 -1 -1 8 100 -1 1 1 1 1 1 1 -1 -1\n"
    times = [3600 * (k - (count - waiting <= k)) for k in range(count)]
    path.write_text("; MaxProcs: 8\n" + "".join(job.format(k + 1, time) for k, time in enumerate(sorted(times))))


def test_nobody_waits_and_it_says_so(run: Callable[..., dict], capsys: pytest.CaptureFixture[str]) -> None:
    idle_trace(Path("idle.swf"), 200)
    said = "idle.swf: there is nothing to schedule: 0.00% of the jobs wait at all, and the offered load is 1.7% of what"
    rest = ("--loads", 1.0, "--episode-jobs", 1000, "--report", "report")
    results = run("compare", "--workload", "idle.swf", "--policies", "fifo", "easy-sjf", *rest)
    assert f"benchmark.py: {said} the cluster can do\n" in capsys.readouterr().err
    assert results["notes"] == [f"{said} the cluster can do"] and said in Path("report/report.md").read_text()
    idle_trace(Path("idle.swf"), 1000, waiting=1)  # the 0.3 % of the test split
    assert run("compare", "--workload", "idle.swf", "--policies", "fifo")["notes"][0].startswith(
        "idle.swf: there is next to nothing to schedule: 0."
    )
    assert "notes" not in run("compare", "--workload", SMALL, "--policies", "easy-fifo")


def test_two_files_that_stand_for_the_same_rule_are_told_apart(run: Callable[..., dict]) -> None:
    for folder in ("one/run", "two/run"):
        Path(folder).mkdir(parents=True)
        write_policy(Path(folder) / "policy.onnx", reference="easy-saf@2", rule="easy-saf@2")
    results = run("compare", "--workload", SMALL, "--policies", "one/run", "two/run/policy.onnx", "two/run@9")
    assert list(results["policies"]) == ["one/run (= easy-saf@2)", "two/run (= easy-saf@2)", "run (= easy-saf@9)"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("compare --policies fifo fastest", "unknown rule 'fastest'"),
        ("compare --policies", "--policies: none given"),
        ("compare --policies fifo run/policy.onnx", "run/policy.onnx: no such file"),
        ("compare --policies text.onnx", "text.onnx: no ONNX file"),
        ("compare --policies cloud/policy.onnx", "cloud/policy.onnx: made for clusters with 2 kinds"),
        ("compare --workload nowhere.swf", "nowhere.swf: no such file or preset"),
        ("compare --max-jobs 0", "--max-jobs 0: give at least 1"),
        ("compare --blocks -3", "--blocks -3: give at least 1"),
        ("compare --workers 0", "--workers 0: give at least 1"),
        ("compare --seed -1", "--seed -1: give at least 0"),
        ("compare --load 0", "load factor 0.0"),
        ("compare --protocol windows --episode-jobs 5000", "--episode-jobs 5000: the split has only 900 jobs"),
        ("compare --output nowhere/r.json", "--output nowhere/r.json: there is no folder nowhere"),
        ("compare --output .", "--output .: a folder"),
        ("rlscheduler --traces . --reference r.json", "r.json: No such file"),
        ("rlscheduler --traces . --reference text.onnx", "text.onnx: not the published figures"),
        ("rlscheduler --traces . --reference odd.json", "lublin.swf: No such file"),
        ("rlscheduler --traces . --reference half.json", "half.json: not the published figures"),
        ("compare --plan-seeds 0", "--plan-seeds 0: give at least 1"),
        ("speed --repetitions 0", "--repetitions 0: give at least 1"),
        ("speed --seconds 0", "--seconds 0.0: give more than 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.onnx").write_text("no model")
    protocols = {"tableV_1024x10": {"start_indexes": [0]}}
    info = {"trace_file": "lublin.swf", "n_jobs_loaded": 1, "max_procs": 1, "protocols": protocols}
    rules = {"rules_without_lock_in": {"results": {"a": {"sjf": {"bsld": 1.0, "util": 0.5}}}}}
    odd = {"published": {"order": []}, "traces": {"a": info}} | rules
    Path("odd.json").write_text(json.dumps(odd))
    Path("half.json").write_text(json.dumps(odd | {"published": {"order": ["sjf"]}}))  # and no figures
    write_policy(Path("cloud/policy.onnx"), resources=2)
    before = sorted(tmp_path.rglob("*"))
    command, *rest = flags.split()
    usual = [] if command == "rlscheduler" else ["--workload", SMALL]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", command, "--output", "results.json", *usual, *rest])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert stopped.value.code == 2 and printed.out == ""
    assert line.startswith(f"benchmark.py: {message}") and sorted(tmp_path.rglob("*")) == before


def test_a_lost_worker_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pool = ProcessPoolExecutor(1, get_context("spawn"))
    monkeypatch.setattr(evaluation.compare, "compare", lambda _: pool.submit(os._exit, 9).result())
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "compare"])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "fewer --workers" in line


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"new": 1})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------- published table
@needs_reference
def test_all_published_slowdowns_of_rules(run: Callable[..., dict], capsys: pytest.CaptureFixture[str]) -> None:
    results = run("rlscheduler", "--traces", SHARED / "traces", "--reference", REFERENCE)
    assert len(results["rows"]) == 4 * 2 * 6
    for row in results["rows"]:
        assert row["policy"] is None and row["lock_in"]
        assert row["our_bsld"] is None if row["rule"] == "RL" else round(row["our_bsld"], 2) == row["bsld"], row
    # Of the 40 utilizations one is published as rounded twice.
    rules = [row for row in results["rows"] if row["rule"] != "RL"]
    wrong = [row for row in rules if round(row["our_utilization"], 3) != row["utilization"]]
    assert [(r["trace"], r["backfill"], r["rule"], round(r["our_utilization"], 4)) for r in wrong] == [
        ("SDSC-SP2", True, "sjf", 0.6605)
    ]
    assert len(re.findall(r"7,273\.77", capsys.readouterr().out)) == 2


@needs_reference
def test_policies_are_put_beside_what_is_published_for_their_semantics(
    run: Callable[..., dict], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A file that stands for F1 with lock-in is F1, with backfilling and without, and EASY-SAF without lock-in is the
    best rule on HPC2N."""
    path = write_policy(tmp_path / "lock" / "policy.onnx", rule="f1", lock_in=True, backfill="none", resources=1)
    common = ("rlscheduler", "--traces", SHARED / "traces", "--reference", REFERENCE)
    rows = run(*common, "--policies", path, "easy-saf")["rows"]
    ours = {(r["trace"], r["lock_in"], r["backfill"]): r for r in rows if r["policy"]}
    assert len(ours) == 12
    lublin, hpc2n = ours["lublin_256", True, False], ours["HPC2N", False, True]
    assert (lublin["rule"], lublin["bsld"], round(lublin["our_bsld"], 2)) == ("RL", 254.67, 258.37)
    f1 = {(r["trace"], r["backfill"]): r["bsld"] for r in rows if r["rule"] == "f1"}
    assert {key: round(ours[key[0], True, key[1]]["our_bsld"], 2) for key in f1} == f1
    assert (hpc2n["rule"], hpc2n["policy"]) == ("EASY-SAF+SAFbf", "easy-saf")
    assert hpc2n["our_bsld"] == pytest.approx(hpc2n["bsld"], rel=1e-9)
    assert hpc2n["our_utilization"] == pytest.approx(hpc2n["utilization"], rel=1e-9)
    assert "+1.5%" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind", [Compare, Speed, fifo_baseline.Args, tuned_rule.Args, ppo_scheduler.Args, dqn_scheduler.Args]
)
def test_every_command_takes_the_flags_of_reading(kind: type[Reading]) -> None:
    """And they can be written down again, as words of a command line; what is not given is not written."""
    columns, nodes = ("openb", "demand.cpu=cpu_milli/1000"), ("3xcpu=32,memory=128", "1xcpu=8")
    given = Reading(skip_bad_lines=True, partition="2", columns=columns, nodes=nodes)
    args = tyro.cli(kind, args=["--workload", "jobs.csv", *given.flags()])
    assert args.flags() == given.flags() and (args.columns, args.nodes) == (given.columns, given.nodes)
    assert tyro.cli(kind, args=[]).flags() == []
    assert quoted(Reading(columns=("submit=a b",)).flags()) == " --columns 'submit=a b'" and quoted([]) == ""


def test_a_table_is_compared_on(run: Callable[..., dict]) -> None:
    """The partition's jobs, on the nodes that are named."""
    rows = [f"{k},{k},{k + 5},{1 + k % 3},{'ab'[k % 2]}" for k in range(40)]
    Path("jobs.csv").write_text("\n".join(["at,began,ended,cores,queue", *rows]) + "\n")
    columns = ("submit=at", "start=began", "end=ended", "demand.cpu=cores", "partition=queue")
    flags = ("--workload", "jobs.csv", "--columns", *columns, "--nodes", "2xcpu=4", "--partition", "b")
    results = run("compare", *flags, "--policies", "fifo", "--blocks", "2")
    assert results["jobs"] == 6 and results["policies"]["fifo"]["latency"]["mean"] >= 5
