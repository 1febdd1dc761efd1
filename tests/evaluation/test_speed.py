"""The speed suite: every documented figure is measured, short; and what is not installed is null."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmark
from evaluation import speed
from evaluation.speed import PARTS, RATIOS, Speed, first_jobs, flat, ratios, stable_baselines3
from workloads.load import load_workload

ROOT = Path(__file__).parents[2]
SMALL = str(ROOT / "tests" / "data" / "small.swf")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A short run of everything."""
    folder = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as change:
        for name, value in {
            "ENVIRONMENTS": (1, 2, 8, 16), "BATCHES": (1, 8), "WINDOWS": (4, 64), "NODES": (1, 8), "JOBS": (64, 256),
            "EPISODE": {"warmup_jobs": 16, "num_jobs": 64, "followup_jobs": 32},
        }.items():  # fmt: skip
            change.setattr(speed, name, value)
        change.chdir(folder)
        flags = [
            "--workload",
            SMALL,
            "--repetitions",
            "1",
            "--seconds",
            "0.005",
            "--num-envs",
            "8",
            "--num-steps",
            "256",
        ]
        change.setattr(sys, "argv", ["benchmark.py", "speed", *flags, "--output", "speed.json"])
        benchmark.main()
    assert {path.name for path in folder.iterdir()} == {"speed.json", "speed.png", "speed.svg"}  # and no runs/
    assert (folder / "speed.png").stat().st_size > 10_000
    return json.loads((folder / "speed.json").read_text())


def test_every_figure_is_measured(results: dict[str, Any]) -> None:
    for name, figure in flat(results):
        assert (figure is not None and figure > 0) or name.startswith("memory"), name
    assert results["simulator_decisions_per_second"] == min(results["simulator_decisions_per_second_by_rule"].values())
    assert results["simulator_decisions_per_second"] > 10_000
    assert results["vector_env_steps_per_second_by_environments"].keys() == {"1", "2", "8", "16"}
    assert 1_000 < results["vector_env_steps_per_second"] == results["vector_env_steps_per_second_by_environments"]["8"]
    assert min(results["policy_calls_per_second"].values()) > 10  # which is faster, one short count does not tell
    for shares in (results["ppo_time_shares"], results["dqn_time_shares"]):
        assert sum(shares.values()) == pytest.approx(1) and set(shares) == set(PARTS)
    for key, (a, b) in RATIOS.items():
        assert results[key] == pytest.approx(results[a] / results[b])


def test_the_update_is_compared_with_its_own_matrix_products(results: dict[str, Any]) -> None:
    ideal = results["ppo_update_gflop"] / results["matmul_gflops"]
    assert results["ppo_update_over_matmul"] == pytest.approx(results["ppo_update_seconds"] / ideal)
    assert results["ppo_update_over_matmul"] > 1  # nothing is faster than that
    assert 1 < results["matmul_gflops"] < 100_000


def test_operations_are_counted_as_one_would_by_hand() -> None:
    layer = torch.nn.Linear(20, 30)
    counter = speed.FlopCounterMode(display=False)
    with counter:
        layer(torch.rand(10, 20)).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 10 * 20 * 30)  # the product itself, and the weights' gradient


def test_every_key_is_documented(results: dict[str, Any]) -> None:
    documented = re.findall(r"^\| `([a-z0-9_]+)` \|", (ROOT / "docs" / "benchmark.md").read_text(), re.MULTILINE)
    assert set(results) <= set(documented)
    assert set(results) >= {
        "simulator_decisions_per_second", "vector_env_steps_per_second", "ppo_decisions_per_second",
        "dqn_decisions_per_second", "sb3_ppo_decisions_per_second", "ppo_over_sb3", "ppo_update_over_matmul",
    }  # fmt: skip


def test_without_stable_baselines3_its_figures_are_null(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    workload = load_workload(SMALL, "all")
    found = stable_baselines3(Speed(), workload)
    assert set(found.values()) == {None} and "not installed" in capsys.readouterr().err
    both = dict.fromkeys((key for pair in RATIOS.values() for key in pair), 2.0)
    assert ratios(both | found)["ppo_over_sb3"] is None and ratios(both)["ppo_over_sb3"] == 1


def test_first_jobs_are_a_workload_of_their_own() -> None:
    workload = first_jobs(load_workload(SMALL, "test"), 100)
    assert workload.segments.tolist() == [[0, 100]] and len(workload.jobs) == 100
