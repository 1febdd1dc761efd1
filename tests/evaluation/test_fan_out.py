"""`--ray`: independent work on a Ray cluster gives what one process gives, and is kept as soon as it is ready."""

import ast
import importlib.util
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from places import ROOT
from rich.console import Console

import benchmark
import evaluation.fan_out
from evaluation.fan_out import as_they_are_ready, wait_for_a_core
from evaluation.replays import Scenario, _keep, _kept, _on_cluster, replay_all
from policies import load_policy
from workloads.load import load_workload

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: make setup-ray")
POLICIES = ("fifo", "easy-fifo", "sjf", "saf", "easy-sjf", "easy-saf", "easy-wfp3", "easy-xf", "easy-unicep", "easy-f1")
POLICIES += ("greedy-sjf", "greedy-saf")
LOADS = (0.9, 1.0, 1.1)


def stopped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[Any, str]:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "compare", "--policies", "fifo", "--max-jobs", "20", *flags])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    [line] = capsys.readouterr().err.splitlines()
    return end.value.code, line


def test_results_come_in_order_and_are_kept_when_they_are_ready(tmp_path: Path) -> None:
    """Of four replays the second is there already; the others become ready in another order."""
    files: list[Path | None] = [tmp_path / f"{number}.npz" for number in range(4)]
    _keep(files[1], (np.array([1.0]), np.array([1])))
    asked = []

    def run(_: Any, policies: list[int], *others: list[Any]) -> Iterator[tuple[int, Any]]:
        asked.extend(policies)
        assert others == ([None] * 3, [None] * 3)
        yield 2, (np.array([3.0]), np.array([3]))
        assert _kept(files[3]) is not None
        yield 1, "cannot be used here"
        yield 0, (np.array([0.0]), np.array([0]))

    found = list(_on_cluster(run, print, [0, 1, 2, 3], [None] * 4, files))  # type: ignore[list-item, arg-type]
    assert asked == [0, 2, 3] and found[2] == "cannot be used here" and _kept(files[2]) is None
    assert [found[number][0] for number in (0, 1, 3)] == [0.0, 1.0, 3.0]


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = stopped(monkeypatch, capsys, "--ray")
    assert code == 2 and line == "benchmark.py: --ray: Ray is not installed here; run: make setup-ray"


@needs_ray
def test_a_cluster_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    code, line = stopped(monkeypatch, capsys, "--ray", f"127.0.0.1:{port}")
    assert code == 2 and line.startswith(f"benchmark.py: --ray 127.0.0.1:{port}: [Errno 111] Connection refused; see")


def test_who_does_not_ask_does_not_import_ray() -> None:
    """It is imported by a function of fan_out, and nowhere else in the project."""
    importing = set()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")):
        tree = ast.parse(path.read_text())
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Import) and node.names[0].name == "ray"]
        assert not {*found} & {*tree.body}, path
        importing |= {path.name} if found else set()
    assert importing == {"fan_out.py"}


@needs_ray
@pytest.mark.slow
def test_two_nodes_give_what_one_process_gives_though_one_of_them_dies(tmp_path: Path) -> None:
    """Twelve policies at three loads; the second node is killed after the third result."""
    from ray.cluster_utils import Cluster

    workload = load_workload("cloud", "test", runs=8)
    workloads = {Scenario("continuous", load): workload for load in LOADS}
    policies = {name: load_policy(name) for name in POLICIES}
    alone = [(where, name, *found) for where, name, found in replay_all(workloads, policies, None, 1)]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second, together = cluster.add_node(num_cpus=1), []
        for where, name, found in replay_all(workloads, policies, tmp_path / "kept", 1, (cluster.address,)):
            together.append((where, name, *found))
            if len(together) == 3:
                cluster.remove_node(second, allow_graceful=False)
    finally:
        cluster.shutdown()
    assert len(together) == len(alone) == 36
    for ours, theirs in zip(together, alone, strict=True):
        assert ours[:2] == theirs[:2] and all(map(np.array_equal, ours[2:], theirs[2:]))


def test_a_lost_node_is_told_and_a_busy_cluster_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    class Ray:
        """Two nodes, one of which is lost at the third look; calls are their results, ready from the last one on."""

        looks = 0

        def nodes(self) -> list[dict[str, Any]]:
            self.looks += 1
            return [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": self.looks < 3}]

        def wait(self, calls: list[str], timeout: float) -> tuple[list[str], list[str]]:
            return calls[-1:], calls[:-1]

        def get(self, call: str) -> str:
            return call

    found = list(as_they_are_ready(Ray(), ["first", "second", "third"], Console(stderr=True)))
    assert found == [(2, "third"), (1, "second"), (0, "first")]
    said = "1 of 2 nodes of the cluster lost: what ran there is repeated"
    assert capsys.readouterr().err.splitlines() == [said]


def test_a_minute_without_a_free_core_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter(range(0, 1000, 25))
    monkeypatch.setattr(evaluation.fan_out, "time", SimpleNamespace(monotonic=lambda: next(now)))
    ray = MagicMock()
    ray.wait.return_value = [], ["a core"]
    with pytest.raises(ValueError, match="--ray there: no core was free for a minute; see `ray status`"):
        wait_for_a_core(ray, "there", Console(stderr=True))
    assert capsys.readouterr().err.splitlines() == [
        f"waiting for a free core of the cluster ({waited} s)" for waited in (25, 50)
    ]
