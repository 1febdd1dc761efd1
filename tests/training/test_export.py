"""What is exported is the network that was trained, and the moving average of it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch
from learners import SMALL, begun, command

import dqn_scheduler
from policies import load_policy
from scheduler_env import SchedulerVectorEnv
from simulator.observation import Layout, Observation
from simulator.replay import simulate
from training.checkpoint import load
from training.export import export_onnx
from workloads.load import load_workload


def logits_of(path: Path, parts: Observation) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {name: value.numpy() for name, value in parts._asdict().items()})
    return logits


def trained_logits(agent: torch.nn.Module, parts: Observation) -> torch.Tensor:
    found = agent(*parts)
    return found[0] if isinstance(found, tuple) else found


def test_exported_policy_equals_the_agent(finished: Path, tmp_path: Path, algorithm: ModuleType) -> None:
    state = load(finished / "checkpoint.pt", torch.device("cpu"))
    agent = algorithm.Agent(1)
    agent.load_state_dict(state["model"])
    path = tmp_path / "again.onnx"
    export_onnx(agent, path, Layout(64, 1, 1), {"version": 1})
    for window, nodes in ((64, 1), (128, 1), (5, 3)):  # other windows and other numbers of nodes than in training
        layout = Layout(window, nodes, 1)
        parts = layout.split(torch.rand(7, layout.size, generator=torch.Generator().manual_seed(0)))
        parts.jobs[:, window // 2 :] = 0
        parts.mask[:] = (parts.mask > 0.5).float()
        expected = trained_logits(agent, parts).detach().numpy()
        np.testing.assert_allclose(logits_of(path, parts), expected, rtol=1e-4, atol=1e-5)


def test_both_forms_of_the_network_are_the_same_on_a_cluster_of_nodes(algorithm: ModuleType) -> None:
    torch.manual_seed(0)
    envs = SchedulerVectorEnv(8, "cloud", num_jobs=64, warmup_jobs=64, followup_jobs=16, queue_window=32)
    parts = envs.split(torch.from_numpy(envs.reset(seed=1)[0]))
    agent = algorithm.Agent(envs.layout.resources)
    torch.testing.assert_close(agent.logits(*parts), trained_logits(agent, parts), rtol=1e-4, atol=1e-5)


def test_policy_file_schedules_the_test_split(finished: Path) -> None:
    workload = load_workload(load_policy(str(finished)).metadata.workload, "test")
    (schedule,) = load_policy(str(finished / "policy.onnx")).schedule(workload)
    (fifo,) = simulate(workload, "fifo")
    assert np.isfinite(schedule.start_time).all()
    assert schedule.wait.mean() < 0.75 * fifo.wait.mean()


def test_what_is_validated_is_the_moving_average(tmp_path: Path, algorithm: ModuleType) -> None:
    run = begun(algorithm, tmp_path)
    agent, average = run.parts["model"], run.parts["average"].module
    with torch.no_grad():
        for ours, theirs in zip(agent.parameters(), average.parameters(), strict=True):
            ours += torch.randn_like(ours)
            theirs -= 0.1 * torch.randn_like(theirs)
    run.propose()
    assert run.proposed is not None
    run.proposed[1].result()
    parts = run.layout.split(torch.from_numpy(run.envs.observations))
    expected = average.logits(*parts)
    if algorithm is dqn_scheduler:
        expected = dqn_scheduler.preferring(expected, *parts[:3], run.args.margin)
    found = logits_of(run.folder / "candidate.onnx", parts)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_network_that_is_changed_in_one_of_its_two_forms_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: ModuleType
) -> None:
    usual = algorithm.Agent.logits
    monkeypatch.setattr(algorithm.Agent, "logits", lambda self, *parts: 1.1 * usual(self, *parts))
    result = command(algorithm, tmp_path, *SMALL[algorithm])
    assert result.code == 2 and result.last.endswith("change both")
    assert not (tmp_path / "runs").exists()
