"""The report: its statistics against known answers, the lower bound against brute force, what it writes, how it looks
in a browser, and what it says of bad input."""

import csv
import hashlib
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import job_costs, make_workload, workloads
from PIL import Image
from policy_files import write_policy
from torch.utils.tensorboard import SummaryWriter

import benchmark
import evaluation.report as report_module
import policies
from evaluation.figures import by_size, fairness, learning_curve, over_time, training_seeds, wait_distribution
from evaluation.held_out import Compare, cuts
from evaluation.lower_bound import lower_bound, relaxed_cost
from evaluation.plots import Look, duration, short_name
from evaluation.replays import Replays, Scenario
from evaluation.report import agreement
from evaluation.statistics import METRICS, bootstrap_weights, improvement, quantile_resamples
from simulator.replay import simulate
from simulator.rules import RULES
from simulator.schedule import Schedule
from workloads.jobs import Cluster, Workload
from workloads.load import load_workload

SMALL = str(Path(__file__).parents[1] / "data" / "small.swf")
COMPARED = ("latency", "wait", "slowdown")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# ------------------------------------------------------------------------------------------------- the lower bound
def best_cost(workload: Workload, objective: str) -> float:
    """The least mean cost of all active schedules, one of which is optimal (Sprecher et al. 1995)."""
    jobs, cluster = workload.jobs, workload.cluster
    count, best = len(jobs), np.inf
    fits = [[m for m, c in enumerate(cluster.capacity) if (jobs.demand[i] <= c).all()] for i in range(count)]
    for nodes in itertools.product(*fits):
        time = jobs.run_time / cluster.speed[list(nodes)]
        for order in itertools.permutations(range(count)):
            start = np.full(count, np.inf)
            for i in order:  # as early as it fits beside those before it in the order
                ends = [start[j] + time[j] for j in order if start[j] < np.inf]
                for at in sorted({jobs.submit_time[i], *(end for end in ends if end > jobs.submit_time[i])}):
                    moments = [at, *(s for s in start if at < s < at + time[i])]
                    on = [j for j in range(count) if start[j] < np.inf and nodes[j] == nodes[i]]
                    used = [jobs.demand[[j for j in on if start[j] <= t < start[j] + time[j]]].sum(0) for t in moments]
                    if all((u + jobs.demand[i] <= cluster.capacity[nodes[i]] + 1e-9).all() for u in used):
                        start[i] = at
                        break
            schedule = Schedule(jobs, cluster, start, np.array(nodes))
            best = min(best, job_costs(schedule, objective).mean())
    return best


@pytest.mark.parametrize("jobs", [4, pytest.param(5, marks=pytest.mark.slow)])  # of which all orders are tried
@pytest.mark.parametrize("objective", COMPARED)
@given(data=st.data())
@settings(max_examples=40)
def test_no_schedule_at_all_is_below_the_bound(objective: str, jobs: int, data: st.DataObject) -> None:
    workload = data.draw(workloads(2, jobs, nodes=2))
    best = best_cost(workload, objective)
    assert lower_bound(workload.jobs, workload.cluster, objective) <= best * (1 + 1e-7) + 1e-9


@pytest.mark.parametrize("objective", COMPARED)
@given(workload=workloads(1, 60), rule=st.sampled_from(RULES))
@settings(max_examples=60)
def test_no_rule_is_below_the_bound(objective: str, workload: Workload, rule: str) -> None:
    [schedule] = simulate(workload, rule)
    cost = job_costs(schedule, objective)
    for part in (slice(None), slice(len(cost) // 2, None), slice(0, 1)):
        bound = lower_bound(workload.jobs[part], workload.cluster, objective)
        assert 0 <= bound <= cost[part].mean() * (1 + 1e-7) + 1e-9


def one_machine(run: list[float], size: list[float], submit: list[float], processors: float = 4) -> Workload:
    workload = make_workload(0, len(run))
    column = np.array(size, float)[:, None]
    jobs = replace(workload.jobs, run_time=np.array(run, float), submit_time=np.array(submit, float), demand=column)
    return replace(workload, jobs=jobs, cluster=Cluster(np.array([[processors]]), np.ones(1), ("processors",)))


def tightness(workload: Workload, objective: str) -> float:
    return lower_bound(workload.jobs, workload.cluster, objective, iterations=300) / best_cost(workload, objective)


def test_the_bound_comes_near_the_optimum() -> None:
    whole = one_machine(run=[30, 10, 20], size=[4, 4, 4], submit=[0, 0, 0])
    # Shortest first: they end at 10, 30 and 60; slowdowns 1, 1.5 and 2.
    assert best_cost(whole, "latency") == pytest.approx(100 / 3) and best_cost(whole, "slowdown") == pytest.approx(1.5)
    small = one_machine([10] * 6, [1] * 6, [0] * 6, processors=3)
    assert best_cost(small, "wait") == pytest.approx(5)  # three start at 0, three at 10
    for workload in (whole, small):
        for objective in COMPARED:
            assert 0.95 < tightness(workload, objective) < 1 + 1e-9
    # Later a lone job that waits for nothing takes nothing away from that.
    seven = one_machine([10] * 7, [1] * 7, [0] * 6 + [40], processors=3)
    assert 0.95 * 30 / 7 < lower_bound(seven.jobs, seven.cluster, "wait", 300) < 30 / 7 * (1 + 1e-9)


def test_the_bound_knows_speeds_and_which_nodes_are_large_enough() -> None:
    workload = one_machine(run=[10, 10, 10], size=[1, 1, 3], submit=[0, 0, 0])
    cluster = Cluster(np.array([[1.0], [4.0]]), np.array([2.0, 1.0]), ("processors",))
    workload = replace(workload, cluster=cluster)
    # A small job takes 5 s on the fast node, where there is room for one; the large one fits on the slow node only.
    assert best_cost(workload, "latency") == pytest.approx((5 + 10 + 10) / 3)
    assert tightness(workload, "latency") > 0.95
    assert lower_bound(workload.jobs, cluster, "latency", iterations=1) == pytest.approx((5 + 5 + 10) / 3)


@given(workload=workloads(2, 12), seed=st.integers(0, 1000), objective=st.sampled_from(COMPARED))
@settings(max_examples=40)
def test_any_prices_give_a_bound(workload: Workload, seed: int, objective: str) -> None:
    """Prices are only as good as they are found, but never wrong."""
    [schedule] = simulate(workload, "easy-sjf")
    jobs, cluster = workload.jobs[slice(*workload.segments[0])], workload.cluster
    fits = (jobs.demand[:, None] <= cluster.capacity + 1e-9).all(2)  # every node is a kind here
    time = np.where(fits, jobs.run_time[:, None] / cluster.speed, np.inf)
    share = np.where(fits[:, :, None], jobs.demand[:, None] / cluster.capacity, 0.0)
    scale = np.maximum(jobs.run_time, 10.0) if objective == "slowdown" else np.ones(len(jobs))
    constant = (time if objective != "wait" else np.zeros_like(time)) / scale[:, None]
    least = 1.0 if objective == "slowdown" else 0.0
    rng = np.random.default_rng(seed)
    part = float(rng.uniform(0.2, 20))
    prices, others = rng.exponential(rng.choice([0.01, 1, 100]), (2, *cluster.capacity.shape, 20)) * (
        rng.random(20) < 0.7
    )
    excess, unused = np.zeros_like(prices), np.zeros_like(prices)
    given_jobs = jobs.submit_time - jobs.submit_time[0], time, share, constant, 1 / scale, least
    bound = relaxed_cost(*given_jobs, prices, part, excess)
    assert bound <= job_costs(schedule, objective).sum() * (1 + 1e-7) + 1e-7
    # The bound is a concave function of the prices, and `excess` its supergradient.
    tangent = bound + part * (excess * (others - prices)).sum()
    assert relaxed_cost(*given_jobs, others, part, unused) <= tangent + 1e-7 * (1 + abs(tangent) + abs(bound))


# --------------------------------------------------------------------------------------------------- the statistics
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_probability_of_improvement_is_a_count_of_pairs(pairs: list[tuple[int, int]]) -> None:
    values, first = np.array(pairs, float).T
    expected = sum(1.0 if a < b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert improvement(values, first, bootstrap_weights(len(pairs), 1))["mean"] == pytest.approx(expected)


def test_the_interval_of_an_improvement_covers_the_truth() -> None:
    rng, weights, covered = np.random.default_rng(2), bootstrap_weights(60, 1), 0
    for _ in range(300):  # policies that are better in 70 % of the blocks
        wins = rng.random(60) < 0.7
        low, high = improvement(np.where(wins, 0.0, 2.0), np.ones(60), weights)["ci95"]
        covered += low <= 0.7 <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_quantiles_of_resamples() -> None:
    rng = np.random.default_rng(3)
    values, block = rng.lognormal(size=600), np.repeat(np.arange(30), 20)
    counts = bootstrap_weights(30, 1)[:50] * 30
    found = quantile_resamples(values, block, counts / 30, [0.5, 0.95, 0.99])
    for row, count in zip(found, counts.round().astype(int), strict=True):
        drawn = np.concatenate([np.tile(values[block == b], n) for b, n in enumerate(count)])
        expected = np.quantile(drawn, [0.5, 0.95, 0.99], method="inverted_cdf")
        assert row == pytest.approx(expected)


def test_the_interval_of_a_median_covers_the_truth() -> None:
    rng, weights, covered = np.random.default_rng(4), bootstrap_weights(50, 1)[:400], 0
    block = np.repeat(np.arange(50), 8)
    for _ in range(200):
        low, high = np.percentile(
            quantile_resamples(rng.exponential(size=400), block, weights, [0.5])[:, 0], [2.5, 97.5]
        )
        covered += low <= np.log(2) <= high
    assert 0.91 <= covered / 200 <= 0.99


def replays_of(workload: Workload, *rules: str) -> Replays:
    scenario = Scenario("continuous", 1.0)
    found = Replays(workload, cuts(Compare(), scenario, workload))
    for rule in rules:
        schedules = simulate(workload, rule)
        found.add(rule, *(np.concatenate([getattr(s, name) for s in schedules]) for name in ("start_time", "node")))
    return found


def test_queue_and_utilization_over_time() -> None:
    replays = replays_of(load_workload(SMALL, "test"), "easy-fifo")
    [schedule] = replays.schedules["easy-fifo"]
    found = over_time(replays, ["easy-fifo"], bins=20)
    submit, start, end = schedule.jobs.submit_time, schedule.start_time, schedule.start_time + schedule.service_time
    edges = np.linspace(submit[0], submit[-1], 21)
    for b, (low, high) in enumerate(itertools.pairwise(edges)):
        queued = np.maximum(0, np.minimum(start, high) - np.maximum(submit, low)).sum() / (high - low)
        running = np.maximum(0, np.minimum(end, high) - np.maximum(start, low)) @ schedule.jobs.demand[:, 0]
        assert found["queue"]["easy-fifo"][b] == pytest.approx(queued, abs=1e-6)
        used = running / (high - low) / schedule.cluster.capacity[0, 0]
        assert found["utilization"]["easy-fifo"][b] == pytest.approx(used, abs=1e-9)
    assert max(found["queue"]["easy-fifo"]) > 1


def test_waits_by_size_add_up_and_the_tail_is_counted() -> None:
    replays = replays_of(load_workload(SMALL, "test"), "fifo", "easy-fifo", "easy-sjf")
    found = by_size(replays, ["fifo", "easy-sjf"])
    waits = {rule: replays.waits(rule) for rule in replays.schedules}
    assert sum(found["jobs"]) == len(waits["fifo"]) and 2 <= len(found["labels"]) <= 5
    for rule in ("fifo", "easy-sjf"):
        assert np.dot(found["jobs"], found["wait"][rule]) == pytest.approx(waits[rule].sum())
    fair = fairness(replays, "easy-sjf")
    assert fair["longer_than_fifo"] == sum(a > b for a, b in zip(waits["easy-sjf"], waits["fifo"], strict=True)) / len(
        waits["fifo"]
    )
    assert fair["beyond_easy_fifo_max"] == (waits["easy-sjf"] > waits["easy-fifo"].max()).sum()
    share = wait_distribution(replays, ["fifo"])
    at = 77
    assert share["share"]["fifo"][at] == pytest.approx((waits["fifo"] > share["seconds"][at]).mean())


def test_starvation_is_called_by_its_name() -> None:
    workload = make_workload(0, 100)
    replays = Replays(workload, [[slice(0, 50), slice(50, 100)]])
    usual = workload.jobs.submit_time + 10.0
    node = np.zeros(100, int)
    for name, start in (("fifo", usual + 90), ("easy-fifo", usual), ("fair", usual), ("one", usual.copy())):
        replays.add(name, start, node)
    replays.schedules["one"][0].start_time[3] += 15  # 25 s, where nobody else waits more than 10
    assert not any(fairness(replays, name)["starves"] for name in ("fifo", "easy-fifo", "fair"))
    found = fairness(replays, "one")
    assert found["starves"] and found["beyond_easy_fifo_max"] == 1 and found["longer_than_fifo"] == 0


@pytest.mark.slow
def test_seeds_are_taken_together_by_name() -> None:
    rng = np.random.default_rng(5)
    rule = rng.lognormal(3, 1, size=(40, len(METRICS)))
    cost = {"fifo": rule * 4, "easy-fifo": rule, "best": rule / 2}
    cost |= {
        f"w__ppo__{seed}__17000000{seed}/policy.onnx": rule / factor for seed, factor in enumerate((1.0, 2.0, 4.0))
    }
    cost["w__dqn__1__1700000001/policy.onnx"] = rule  # a single run
    replays = Replays(make_workload(0, 5), [])
    replays.per_block = cost
    found = training_seeds(replays, "best", "latency", seed=1)["groups"]
    assert set(found) == {"w__ppo", "fifo", "easy-fifo"}
    # Scores: 40 blocks each of 0.5, 1 and 2; the middle half of the 120 is ten of 0.5, forty of 1 and ten of 2.
    assert found["w__ppo"]["iqm"] == pytest.approx((10 * 0.5 + 40 * 1 + 10 * 2) / 60)
    low, high = found["w__ppo"]["ci95"]
    assert 0.5 < low < found["w__ppo"]["iqm"] < high < 2
    assert found["w__ppo"]["improvement"] == pytest.approx((0 + 0.5 + 1) / 3)
    assert (found["fifo"]["iqm"], found["easy-fifo"]["iqm"]) == pytest.approx((0.125, 0.5))
    levels = np.linspace(0, 2, 81)
    assert found["w__ppo"]["profile"][int(np.searchsorted(levels, 0.8))] == pytest.approx(2 / 3)
    replays.per_block = {name: cost[name] for name in ("fifo", "easy-fifo", "w__dqn__1__1700000001/policy.onnx")}
    assert training_seeds(replays, "fifo", "latency", seed=1) == {}
    replays.per_block = {f"{name}{'@5' * ('w__' in name)}": values for name, values in cost.items()} | cost
    groups = training_seeds(replays, "best", "latency", seed=1)["groups"]  # another patience is another group
    assert set(groups) == {"w__ppo", "w__ppo@5", "fifo", "easy-fifo"} and len(groups["w__ppo@5"]["runs"]) == 3


def test_runs_are_called_by_what_they_are() -> None:
    assert short_name("w__ppo__3__17000/policy.onnx") == "ppo (seed 3)"
    assert short_name("w__ppo__3__17000/policy.onnx@5") == "ppo@5 (seed 3)"
    assert short_name("mine/policy.onnx@5") == "mine@5"
    assert short_name("easy-sjf@5") == "easy-sjf@5"


# -------------------------------------------------------------------------------------------------------- the report
RUNS = ["runs/small__ppo_scheduler__1__1700000001", "runs/small__ppo_scheduler__2__1700000002"]
POLICIES = ["easy-fifo", "easy-sjf", *RUNS]
SHORT = ["--workload", SMALL, "--episodes", "12", "--episode-jobs", "60", "--loads", "0.9", "1.2"]


def make_runs(folder: Path) -> None:
    for number, run in enumerate(RUNS):
        (folder / run).mkdir(parents=True)
        write_policy(folder / run / "policy.onnx", follow=float(number), seed=number + 1, steps=256)
        with SummaryWriter(str(folder / run)) as writer:
            for step in range(20):
                writer.add_scalar("charts/episodic_return", step / 100, 100 * step)
                writer.add_scalar("eval/improvement", step / 200, 100 * step)


def call(*arguments: object) -> None:
    sys.argv = ["benchmark.py", "compare", *map(str, arguments)]
    benchmark.main()


@pytest.fixture(autouse=True)
def arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a report."""
    folder = tmp_path_factory.mktemp("report")
    make_runs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [])
        call(*SHORT, "--policies", *POLICIES, "--report", "out", "--output", "same.json")
    return folder / "out"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longest, and is not what these tests are about."""
    monkeypatch.setattr(report_module, "write_pages", lambda *_: None)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_everything_is_written(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    assert names == {"index.html", "report.md", "results.json", "episodes.csv", "plots", "replays"}
    plots = {path.name for path in (written / "plots").iterdir()}
    drawn = "metrics loads waits classes time gantt attention-1 attention-2 learning profiles".split()
    assert plots == {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    for path in (written / "plots").glob("*.png"):
        image = np.asarray(Image.open(path).convert("L"))
        assert image.std() > 5 and image[0, 0] == 255, path.name
    assert results_of(written) == json.loads((written.parent / "same.json").read_text())


def test_the_figures_of_the_report_are_those_of_the_results(written: Path) -> None:
    results = results_of(written)
    page, text = (written / "index.html").read_text(), (written / "report.md").read_text()
    for content in (unescape(re.sub(r"<[^>]+>", " ", page)), text):
        for name, figures in results["policies"].items():
            mean, (low, high) = figures["latency"]["mean"], figures["latency"]["ci95"]
            assert f"{mean:,.0f}" in content and f"{low:,.0f} … {high:,.0f}" in content, name
            assert f"{100 * results['bound']['closed'][name]:.1f}\u00a0%" in content
        assert f"it is the best of {len(RUNS)} trained policies, picked on these very jobs" in content
        made = results["made"]
        for found in (made["command"], made["commit"], made["trace_sha256"], *made["versions"].values()):
            assert found in content
    assert results["made"]["trace_sha256"] == hashlib.sha256(Path(SMALL).read_bytes()).hexdigest()
    for run in RUNS:
        digest = hashlib.sha256((written.parent / run / "policy.onnx").read_bytes()).hexdigest()
        assert results["trained"][f"{Path(run).name}/policy.onnx"]["sha256"] == digest and digest in text
    assert list(results["policies"]) == [
        "easy-fifo",
        "easy-sjf",
        *(f"{Path(r).name}/policy.onnx" for r in RUNS),
        "fifo",
        "easy-saf",  # the best of all rules
    ]
    assert results["made"]["command"].startswith(f"python benchmark.py compare --workload {SMALL}")


def test_the_statistics_of_the_results(written: Path) -> None:
    results = results_of(written)
    cost = {name: figures["latency"]["mean"] for name, figures in results["policies"].items()}
    bound, closed = results["bound"]["mean"], results["bound"]["closed"]
    assert results["best_rule"] == min(("fifo", "easy-fifo", "easy-sjf", "easy-saf"), key=cost.__getitem__)
    for name in cost:
        assert bound <= cost[name] and closed[name] == pytest.approx(
            (cost["fifo"] - cost[name]) / (cost["fifo"] - bound)
        )
        wait = results["quantiles"][name]["wait"]
        assert wait["p50"]["value"] <= wait["p95"]["value"] <= wait["p99"]["value"] <= wait["max"]["value"]
        assert wait["p99"]["value"] == pytest.approx(results["tails"][name]["wait_p99"])
        low, high = wait["p95"]["ci95"]
        assert low <= wait["p95"]["value"] <= high
        against = results["against"]["fifo"][name]["latency"]
        assert against["mean"] == pytest.approx(100 * (cost[name] / cost["fifo"] - 1))
    assert [point["factor"] for point in results["loads"]] == [0.9, 1.0, 1.2]
    loads = [point["offered_load"] for point in results["loads"]]
    assert loads[2] == pytest.approx(loads[1] * 1.2)
    assert results["loads"][1]["policies"]["fifo"]["wait"]["mean"] == results["policies"]["fifo"]["wait"]["mean"]
    assert next(iter(results["seeds"]["groups"])) == "small__ppo_scheduler"
    assert results["protocols"]["windows"]["blocks"] == 12


def test_no_episode_of_any_policy_is_below_its_bound(written: Path) -> None:
    with open(written / "episodes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    policies = set(results_of(written)["policies"])
    assert {row["policy"] for row in rows} == policies
    count = {
        (r["protocol"], r["load"]): sum((s["protocol"], s["load"]) == (r["protocol"], r["load"]) for s in rows)
        for r in rows
    }
    per_replay = {
        ("continuous", "1.0"): 50,
        ("continuous", "0.9"): 50,
        ("continuous", "1.2"): 50,
        ("windows", "1.0"): 12,
    }
    assert count == {key: blocks * len(policies) for key, blocks in per_replay.items()}
    for row in rows:
        assert float(row["latency_bound"]) <= float(row["latency"]) * (1 + 1e-7)
        assert float(row["wait_p50"]) <= float(row["wait_p95"]) <= float(row["wait_p99"]) <= float(row["wait_max"])


@pytest.mark.usefixtures("undrawn")
def test_the_same_command_reads_what_it_has_replayed(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(written.parent)
    before = {path: path.stat().st_mtime_ns for path in (written / "replays").iterdir()}
    first = results_of(written)
    monkeypatch.setattr(policies.OnnxPolicy, "schedule", None)
    monkeypatch.setattr(policies.RulePolicy, "schedule", None)
    call(*SHORT, "--policies", *POLICIES, "--report", "out", "--output", "same.json")
    assert {path: path.stat().st_mtime_ns for path in (written / "replays").iterdir()} == before
    again = results_of(written)
    assert {**first, "made": 0} == {**again, "made": 0}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_same_file_with_another_patience_is_replayed_anew(tmp_path: Path) -> None:
    make_runs(tmp_path)
    waits = {}
    for policy in (RUNS[1], f"{RUNS[1]}@1"):
        call(*SHORT, "--policies", "easy-sjf", policy, "--report", "out")
        waits[policy] = list(results_of(Path("out"))["policies"].values())[1]["wait"]["mean"]
    assert waits[RUNS[1]] != waits[f"{RUNS[1]}@1"]


@pytest.mark.usefixtures("undrawn")
def test_a_file_that_is_replaced_meanwhile_is_compared_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that goes on writes a better policy.onnx whenever it finds one."""
    for rule in ("fifo", "sjf"):
        write_policy(tmp_path / rule / "policy.onnx", rule=rule, resources=1)
    (tmp_path / "run").mkdir()
    usual = policies.RulePolicy.schedule

    def schedule(self: policies.Policy, *rest: object) -> list[Schedule]:
        shutil.copy("sjf/policy.onnx", "run/policy.onnx")
        return usual(self, *rest)

    monkeypatch.setattr(policies.RulePolicy, "schedule", schedule)
    shutil.copy("fifo/policy.onnx", "run/policy.onnx")
    call(*SHORT, "--policies", "fifo", "run", "--report", "out")
    fifo, run, *_ = (figures["wait"]["mean"] for figures in results_of(Path("out"))["policies"].values())
    assert fifo == run and Path("run/policy.onnx").read_bytes() == Path("sjf/policy.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_comparison_goes_on_where_it_stopped(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_runs(tmp_path)
    usual, done = policies.RulePolicy.schedule, []

    def schedule(self: policies.Policy, *rest: object) -> list[Schedule]:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(self.name)
        return usual(self, *rest)

    monkeypatch.setattr(policies.RulePolicy, "schedule", schedule)
    flags = (*SHORT, "--policies", *POLICIES, "--report", "out")
    with pytest.raises(SystemExit) as stopped:
        call(*flags)
    assert stopped.value.code == 130 and "goes on where" in capsys.readouterr().err
    kept = sorted((tmp_path / "out" / "replays").iterdir())
    assert len(kept) >= 5 and not (tmp_path / "out" / "results.json").exists()
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # a damaged one is replayed again
    done.clear()
    monkeypatch.setattr(
        policies.RulePolicy, "schedule", lambda self, *rest: (done.append(self.name), usual(self, *rest))[1]
    )
    call(*flags)
    ours, theirs = results_of(tmp_path / "out"), results_of(written)
    shown = [name for name in ours["policies"] if name in RULES]  # in three more scenarios than all rules are
    assert len(done) == len(RULES) + 3 * len(shown) - 5 + 1
    assert ours["policies"] == theirs["policies"] and ours["protocols"] == theirs["protocols"]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_several_workers_give_the_same(written: Path, tmp_path: Path) -> None:
    make_runs(tmp_path)
    call(*SHORT, "--policies", *POLICIES, "--report", "out", "--workers", "2")
    ours, theirs = results_of(tmp_path / "out"), results_of(written)
    for key in ("policies", "quantiles", "fairness", "loads", "protocols", "seeds"):
        assert ours[key] == theirs[key]


def test_the_protocols_agree_or_not_in_plain_words() -> None:
    def found(here: tuple[float, float], there: tuple[float, float]) -> dict:
        rows = {
            protocol: {
                "policies": {
                    name: {"mean": cost, "to_easy_fifo": {"mean": 100 * (cost / costs[0] - 1)}}
                    for name, cost in zip(("easy-fifo", "easy-saf"), costs, strict=True)
                },
                "best": ("easy-fifo", "easy-saf")[int(np.argmin(costs))],
                "blocks": 100,
                "jobs": 25_600,
            }
            for protocol, costs in (("continuous", here), ("windows", there))
        }
        sides = ["easy-saf"] if (here[0] < here[1]) != (there[0] < there[1]) else []
        return {"policies": {"easy-fifo": {}, "easy-saf": {}}, "protocols": rows | {"change_sides": sides}}

    def said(results: dict) -> str:
        return agreement(results, Look(results, [])).replace("\u00a0", " ")

    assert said(found((10, 8), (5, 4))).startswith("The protocols agree: easy-saf is the best")
    text = said(found((10, 22), (10, 7)))
    assert "disagree" in text and "easy-saf is at −30.0 % there and at +120 % here" in text
    assert "100 windows of 256 jobs" in text and "easy-saf is the best; in continuous operation it is easy-fifo" in text


def test_durations_and_shares_are_for_people() -> None:
    assert [duration(x) for x in (5, 90, 5400, 2_343_413)] == ["5 s", "1.5 min", "1.5 h", "27.1 d"]
    found = [report_module.share(x).replace("\u00a0", " ") for x in (0, 1, 0.0012, 0.5, 0.999999)]
    assert found == ["0 %", "100 %", "0.1 %", "50 %", "100 %"]


# ---------------------------------------------------------------------------------------------------------- bad input
def outcome(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines of stderr."""
    code = 0
    try:
        call(*flags)
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err.splitlines()


def never_legal(path: Path) -> None:
    """A policy that likes what the mask forbids."""
    import onnx

    model = onnx.load(write_policy(path))
    [never] = [t for t in model.graph.initializer if t.name == "never"]
    never.CopyFrom(onnx.numpy_helper.from_array(np.float32(1e9), "never"))
    onnx.save(model, path)


BAD_POLICIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nan": (lambda folder: write_policy(folder / "policy.onnx", follow=np.nan), "run/policy.onnx: its network gives"),
    "illegal": (lambda folder: never_legal(folder / "policy.onnx"), "run/policy.onnx: its network chooses an action"),
    "no policy": (lambda folder: (folder / "args.json").write_text("{}"), "run: no such file as policy.onnx in this"),
    "damaged": (lambda folder: (folder / "policy.onnx").write_bytes(b"\x08\x07"), "run/policy.onnx: no ONNX file"),
    "another cluster": (lambda folder: write_policy(folder / "policy.onnx", resources=2), "run/policy.onnx: made for"),
}  # fmt: skip


@pytest.mark.parametrize("reported", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", BAD_POLICIES)
def test_a_bad_policy_is_left_out_and_the_rest_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, reported: bool
) -> None:
    make, message = BAD_POLICIES[case]
    (tmp_path / "run").mkdir()
    make(tmp_path / "run")
    flags = ["--workload", SMALL, "--max-jobs", 200, "--output", "results.json"]
    flags += ["--report", "out", "--loads", 1.0, "--episode-jobs", 50, "--episodes", 3] * reported
    code, out, err = outcome(capsys, *flags, "--policies", "fifo", "run", "easy-sjf")
    assert code == 1 and "easy-sjf" in out
    [line] = err
    assert line.startswith(f"benchmark.py: left out: {message}") and "; " in line
    results = json.loads(Path("results.json").read_text())
    added = {"easy-fifo", results_of(tmp_path / "out")["best_rule"]} if reported else set()
    assert set(results["policies"]) == {"fifo", "easy-sjf"} | added
    if reported:
        assert message in unescape((tmp_path / "out" / "report.md").read_text())
    assert outcome(capsys, *flags[:6], "--policies", "run")[0] == 2  # nothing to compare


def test_a_folder_that_cannot_be_written_is_known_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/inside"):
        code, out, [line] = outcome(capsys, "--workload", SMALL, "--policies", "fifo", "--report", folder)
        assert code == 2 and out == ""
        assert line.startswith(f"benchmark.py: --report {folder}: ") and line.endswith("that can be written to")


def test_one_episode_has_no_intervals_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--workload", SMALL, "--max-jobs", 40, "--blocks", 1, "--policies", "fifo", "easy-sjf", "--report", "out")
    code, out, err = outcome(capsys, *flags)
    assert (code, err) == (0, []) and "no intervals" in out
    text = (tmp_path / "out" / "report.md").read_text()
    assert "One episode, so there are no intervals: these figures may be luck." in text
    assert "too few jobs in a row for windows" in text and "nan" not in text.lower()
    assert results_of(tmp_path / "out")["against"]["fifo"]["easy-sjf"]["latency"]["ci95"] == [None, None]


def test_nobody_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("--workload", SMALL, "--max-jobs", 60, "--load", 0.00001, "--loads", 0.00001, "--objective", "wait")
    code, _, err = outcome(capsys, *short, "--policies", "fifo", "easy-sjf", "--report", "out")
    assert code == 0 and len(err) == 1 and "there is nothing to schedule: 0.00% of the jobs wait at all" in err[0]
    results, text = results_of(tmp_path / "out"), (tmp_path / "out" / "report.md").read_text()
    assert results["bound"] == {"mean": 0.0, "closed": {"fifo": None, "easy-sjf": None, "easy-fifo": None}}
    assert results["against"]["fifo"]["easy-sjf"]["wait"]["mean"] is None
    assert "No policy in this comparison starves anybody" in text and "nan" not in text.lower()


@pytest.mark.slow
def test_an_event_file_cut_short_is_drawn_as_far_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_runs(tmp_path)
    [events] = (tmp_path / RUNS[0]).glob("events*")
    whole = learning_curve(tmp_path / RUNS[0])
    assert whole["note"] is None and len(whole["scalars"]["eval/improvement"]) == 20
    assert whole["scalars"]["eval/improvement"][4] == pytest.approx([400, 0.02])
    events.write_bytes(events.read_bytes()[: events.stat().st_size // 2])
    for file in (tmp_path / RUNS[1]).glob("events*"):
        file.unlink()
    short = ("--workload", SMALL, "--max-jobs", 200, "--loads", 1.0, "--episode-jobs", 50, "--episodes", 3)
    code, _, err = outcome(capsys, *short, "--policies", *RUNS, "--report", "out")
    assert code == 0 and len(err) == 2
    assert re.match(rf"benchmark.py: {RUNS[0]}/events\S+: cut short or damaged; (9|10) points", err[0])
    assert err[1].startswith(f"benchmark.py: {RUNS[1]}: no TensorBoard events")
    curve = results_of(tmp_path / "out")["plots"]["learning"]["small__ppo_scheduler__1__1700000001/policy.onnx"]
    assert curve["scalars"]["eval/improvement"][:9] == whole["scalars"]["eval/improvement"][:9]
    assert (tmp_path / "out" / "plots" / "learning.png").exists()


def test_a_damaged_trace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut.swf").write_text(Path(SMALL).read_text()[:20_007])
    code, out, [line] = outcome(capsys, "--workload", "cut.swf", "--policies", "fifo", "--report", "out")
    assert code == 2 and out == "" and line.startswith("benchmark.py: cut.swf: line ") and not Path("out").exists()


# -------------------------------------------------------------------------------------------------------- in a browser
LOADED = """Promise.all([...document.querySelectorAll('svg image')].map(one => new Promise(done => {
    const copy = new Image();
    copy.onload = () => done(copy.naturalWidth > 100);
    copy.onerror = () => done(false);
    copy.src = one.href.baseVal;
})))"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium)")
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)])
def test_the_page_in_a_browser(written: Path, scheme: str, width: int) -> None:
    from playwright.sync_api import sync_playwright

    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 844}, offline=True)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: said.append(request.url))
        page.goto((written / "index.html").as_uri())
        images = page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        plots = page.eval_on_selector_all("figure svg", "all => all.map(one => one.getBoundingClientRect().width)")
        embedded = page.eval_on_selector_all("svg image", "all => all.map(one => one.href.baseVal.slice(0, 22))")
        loaded = page.evaluate(LOADED)
        scrolls = page.evaluate("document.documentElement.scrollWidth")
        text = page.evaluate("document.body.innerText")
        ids = page.eval_on_selector_all("defs [id], clipPath", "all => all.map(one => one.id)")  # that others refer to
        picture = np.asarray(Image.open(BytesIO(page.screenshot(full_page=True))).convert("L")).astype(float)
        browser.close()
    assert said == [] and images and scrolls <= width
    assert len(plots) == 10 and min(plots) > 250 and max(plots) <= width
    assert embedded and set(embedded) == {"data:image/png;base64,"} and all(loaded)
    assert len(ids) == len(set(ids))
    assert "ppo_scheduler (seed 1)" in text and "Who pays for the gain" in text
    ground = np.median(picture)
    assert (ground > 230) if scheme == "light" else (ground < 40)
    assert 0.03 < (np.abs(picture - ground) > 40).mean() < 0.7 and picture.std() > 15
    parts = np.array_split(picture, 12)  # no part of the page is empty
    assert all(part.std() > 2 for part in parts)


def test_the_page_needs_no_network(written: Path) -> None:
    page = (written / "index.html").read_text()
    references = re.findall(r'(?:src|href)="([^"#][^"]*)"', page) + re.findall(r"url\(([^)#]+)\)", page)
    assert all(reference.startswith("data:") for reference in references) and "@import" not in page
    assert "<script" not in page and len(page) < 2_000_000
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
