"""DQN: its parts against brute force, and the script as a user runs it. What it shares with PPO is tested there."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ppo_scheduler import ROOT, run_folder, scalars

from dqn_scheduler import (
    NEVER,
    RULE_CHOICE,
    RULE_NODE,
    Agent,
    Args,
    Replay,
    collect,
    epsilons,
    explore,
    move_target,
    n_step_returns,
    preferring,
    targets,
    update,
    updates_due,
)
from policies import load_policy
from scheduler_env import SchedulerVectorEnv
from simulator.observation import Layout, Observation
from simulator.replay import simulate
from workloads.load import load_workload

SMALL = ("--workload", str(ROOT / "tests/data/small.swf"), "--objective", "wait", "--reference", "easy-sjf")
SMALL += ("--num-envs", "8", "--num-steps", "32", "--num-evaluations", "2", "--gamma", "0.9", "--n-step", "3")
SMALL += ("--batch-size", "64", "--updates-per-decision", "0.05", "--buffer-steps", "100", "--learning-starts", "10")
SMALL += ("--num-jobs", "64", "--warmup-jobs", "32", "--followup-jobs", "64", "--episodes-in-a-row", "2")
SMALL += ("--total-timesteps", "4096")


def script(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "dqn_scheduler.py"), *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    result = script(folder, *SMALL)
    assert result.returncode == 0, result.stderr
    assert "easy-sjf" in result.stdout and "fifo" in result.stdout  # the closing table
    return run_folder(folder)


def test_n_step_returns_stop_at_the_end_of_an_episode() -> None:
    rng = np.random.default_rng(0)
    rewards, dones, gamma = rng.normal(size=(200, 4)), rng.random((200, 4)) < 0.3, 0.9
    returns, discount = n_step_returns(torch.tensor(rewards), torch.tensor(dones, dtype=torch.double), gamma)
    for row in range(200):
        expected, factor = 0.0, 1.0
        for k in range(4):
            expected += factor * rewards[row, k]
            factor *= gamma
            if dones[row, k]:
                factor = 0.0
                break
        assert returns[row].item() == pytest.approx(expected)
        assert discount[row].item() == pytest.approx(factor)


class Fixed(torch.nn.Module):
    """A network that gives these values[B, A] where the mask allows."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, jobs: torch.Tensor, nodes: torch.Tensor, cluster: torch.Tensor, mask: torch.Tensor):
        return torch.where(mask > 0, self.values, NEVER)


def test_double_dqn_targets_choose_by_one_network_and_value_by_the_other_among_legal_actions() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 300, 7)).astype(np.float32)
    mask = (rng.random((300, 7)) < 0.4).astype(np.float32)
    mask[:5] = 0  # an episode is over
    returns, discount = rng.normal(size=300).astype(np.float32), np.float32(0.9)
    following = Observation(*(torch.zeros(300, 1),) * 3, torch.from_numpy(mask))
    found = targets(
        Fixed(torch.from_numpy(ours)), Fixed(torch.from_numpy(theirs)), following, torch.from_numpy(returns), discount
    )
    for row in range(300):
        legal = np.flatnonzero(mask[row])
        value = theirs[row, max(legal, key=lambda a: ours[row, a])] if len(legal) else 0.0
        assert found[row].item() == pytest.approx(returns[row] + 0.9 * value, rel=1e-5)


def test_exploration_is_legal_uniform_and_as_often_as_asked() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0]]).expand(100_000, 5)
    greedy = torch.full((100_000,), 2)
    for epsilon in (0.0, 0.3, 1.0):
        shares = torch.bincount(explore(greedy, mask, torch.full((100_000,), epsilon)), minlength=5) / 1e5
        expected = epsilon * np.array([0.25, 0, 0.25, 0.25, 0.25]) + (1 - epsilon) * np.array([0, 0, 1, 0, 0])
        np.testing.assert_allclose(shares, expected, atol=0.006)
        assert shares[1] == 0


def test_every_cluster_has_an_epsilon_of_its_own() -> None:
    args = Args(num_envs=8, start_e=1.0, end_e=0.4, exploration_fraction=0.5)
    assert epsilons(args, 0.0).tolist() == [1.0] * 8
    np.testing.assert_allclose(epsilons(args, 0.5), 0.4 ** np.arange(1, 9), rtol=1e-4)
    np.testing.assert_allclose(epsilons(args, 0.25), 0.5 + 0.5 * 0.4 ** np.arange(1, 9), rtol=1e-4)


def test_replay_gives_successive_decisions_of_one_cluster_and_forgets_the_oldest() -> None:
    torch.manual_seed(0)
    replay = Replay(10, 3, 2, torch.device("cpu"))
    for step in range(27):
        obs = torch.stack([torch.tensor([step, e]) for e in range(3)])
        replay.add(obs, torch.full((3,), step), torch.full((3,), float(step)), torch.zeros(3))
    rows, cluster = replay.sample(5000, 3)
    steps = replay.obs[rows, cluster[:, None]][..., 0]
    assert (steps[:, 1:] - steps[:, :-1] == 1).all()
    assert (replay.obs[rows, cluster[:, None]][..., 1] == cluster[:, None]).all()
    assert set(steps[:, 0].tolist()) == {17.0, 18.0, 19.0, 20.0, 21.0, 22.0, 23.0}
    assert torch.equal(replay.actions[rows, cluster[:, None]].float(), steps)


def test_exploring_is_legal_even_where_all_draws_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    assert explore(torch.tensor([1]), torch.tensor([[0.0, 1.0, 1.0]]), torch.ones(1)).tolist() == [1]
    assert explore(torch.tensor([1]), torch.tensor([[0.0, 0.0, 1.0]]), torch.ones(1)).tolist() == [2]


@pytest.mark.parametrize(("gamma", "size"), [(0.0, 500), (0.9, 500), (0.9, 15)])
def test_an_update_is_a_gradient_step_on_the_huber_loss(gamma: float, size: int) -> None:
    """Of the whole batch, whatever threads share it, evenly or not."""
    torch.manual_seed(0)
    args = Args(batch_size=size, gamma=gamma, n_step=2, huber_delta=1.0)
    envs = SchedulerVectorEnv(16, "hpc", num_jobs=16, warmup_jobs=64, followup_jobs=16)
    envs.reset(seed=0)
    ours, target, replay = Agent(1), Agent(1), Replay(64, 16, envs.layout.size, torch.device("cpu"))
    for _ in range(64):
        collect(ours, envs, replay, torch.full((16,), 0.5), args)
    assert replay.dones.any()
    theirs = deepcopy(ours)
    torch.manual_seed(1)
    td_loss, q_values = update(
        ours, target, torch.optim.SGD(ours.parameters(), lr=1.0), replay, envs.layout, args
    ).tolist()
    torch.manual_seed(1)
    (first, second, third), cluster = (x.unbind(1) if x.ndim == 2 else x for x in replay.sample(size, 2))
    going_on = 1 - replay.dones[first, cluster]
    expected = replay.rewards[first, cluster] + gamma * going_on * replay.rewards[second, cluster]
    following = envs.split(replay.obs[third, cluster])
    with torch.no_grad():
        best = target(*following).gather(1, theirs(*following).argmax(1, keepdim=True))[:, 0]
        expected += gamma**2 * going_on * (1 - replay.dones[second, cluster]) * following.mask.any(1) * best
    values = theirs(*envs.split(replay.obs[first, cluster]))[torch.arange(size), replay.actions[first, cluster]]
    error = (values - expected).abs()
    loss = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), args.max_grad_norm)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other - other.grad, rtol=1e-4, atol=1e-6)
    assert td_loss == pytest.approx(loss.item(), rel=1e-5) and q_values == pytest.approx(values.mean().item(), rel=1e-5)


def test_the_references_choice_is_left_for_what_is_worth_more_than_the_margin() -> None:
    layout = Layout(2, 1, 1)
    jobs, nodes, cluster, _ = layout.split(torch.zeros(1, layout.size))
    jobs[0, 1, RULE_CHOICE] = nodes[0, 0, RULE_NODE] = 1
    values = torch.tensor([[0.04, 0.0, -1.0]])
    assert preferring(values, jobs, nodes, cluster, 0.05).argmax() == 1
    assert preferring(values, jobs, nodes, cluster, 0.03).argmax() == 0


def test_the_target_network_moves_by_tau() -> None:
    agent, target = Agent(1), Agent(1)
    before = [p.clone() for p in target.parameters()]
    move_target(agent, target, 0.25)
    for ours, old, new in zip(agent.parameters(), before, target.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * ours)


@pytest.mark.parametrize(("num_envs", "ratio"), [(1, 0.25), (7, 0.1), (128, 1 / 1024), (64, 0.5)])
def test_the_ratio_of_updates_to_decisions_does_not_depend_on_the_number_of_clusters(num_envs, ratio) -> None:
    args = Args(num_envs=num_envs, updates_per_decision=ratio)
    total = sum(updates_due(count, args) for count in range(1, 1001))
    assert total == int(1000 * num_envs * ratio)


def test_the_mask_is_never_violated() -> None:
    """In 10^5 decisions of an untrained agent, half of them exploring."""
    torch.manual_seed(0)
    envs = SchedulerVectorEnv(
        256, "cloud", num_jobs=64, warmup_jobs=16, followup_jobs=16, reward="cost", queue_window=8
    )
    envs.reset(seed=0)
    agent, replay = Agent(envs.layout.resources), Replay(100, 256, envs.layout.size, torch.device("cpu"))
    for step in range(400):
        collect(agent, envs, replay, torch.full((256,), 0.5), Args())
        mask = envs.split(replay.obs[step % 100]).mask
        assert mask.gather(1, replay.actions[step % 100][:, None]).min() == 1


def test_run_writes_what_it_says(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} >= {"args.json", "checkpoint.pt", "policy.onnx"}
    for tag in ("charts/SPS", "charts/episodic_return", "charts/wait", "losses/td_loss", "losses/q_values"):
        assert scalars(finished, tag), tag
    assert set(scalars(finished, "eval/cost")) == {0, 2048, 4096}
    workload = load_workload(str(ROOT / "tests/data/small.swf"), "test")
    (schedule,) = load_policy(str(finished / "policy.onnx")).schedule(workload)
    (fifo,) = simulate(workload, "fifo")
    assert schedule.wait.mean() < 0.75 * fifo.wait.mean()


def test_exported_policy_equals_the_agent() -> None:
    torch.manual_seed(0)
    envs = SchedulerVectorEnv(8, "cloud", num_jobs=64, warmup_jobs=64, followup_jobs=16, queue_window=32)
    parts = envs.split(torch.from_numpy(envs.reset(seed=1)[0]))
    agent = Agent(envs.layout.resources)
    torch.testing.assert_close(agent.logits(*parts), agent(*parts), rtol=1e-4, atol=1e-5)


def test_resumed_run_equals_an_uninterrupted_one(finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "dqn_scheduler.py"), *SMALL]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and not list(tmp_path.glob("runs/*/checkpoint.pt")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    run = run_folder(tmp_path)
    state = torch.load(run / "checkpoint.pt", weights_only=False)
    assert state["iteration"] < 16, "the run ended before it was interrupted"
    result = script(tmp_path, "--resume", str(run))
    assert result.returncode == 0, result.stderr
    for tag in ("losses/td_loss", "losses/q_values", "charts/episodic_return", "eval/cost"):
        assert scalars(run, tag) == scalars(finished, tag), tag
    resumed, whole = (torch.load(r / "checkpoint.pt", weights_only=False)["average"] for r in (run, finished))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--n-step", "200"), "n_step is 200; use less than buffer_steps"),
        (("--n-step", "0"), "n_step is 0; use 1 or more"),
        (("--batch-size", "0"), "batch_size is 0; use 1 or more"),
        (("--backfill", "none"), "reference easy-sjf backfills"),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path: Path, flags: tuple[str, str], message: str) -> None:
    result = script(tmp_path, *SMALL, *flags)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: {message}")


def test_a_run_updates_from_learning_starts_on_and_moves_its_target(tmp_path: Path) -> None:
    for starts, updates in (("1000", 0), ("8", 1)):
        folder = tmp_path / starts
        folder.mkdir()
        assert script(folder, *SMALL, "--learning-starts", starts, "--tau", "1.0").returncode == 0
        state = torch.load(run_folder(folder) / "checkpoint.pt", weights_only=False)
        assert (state["updates"] > 0) == updates
        assert all(torch.equal(state["target"][name], state["model"][name]) for name in state["model"])
        moved = [not torch.equal(state["average"][f"module.{name}"], state["model"][name]) for name in state["model"]]
        assert any(moved) == updates


def test_a_loss_is_logged_where_there_was_an_update(tmp_path: Path) -> None:
    result = script(tmp_path, *SMALL, "--num-envs", "1", "--updates-per-decision", "0.0157", "--total-timesteps", "256")
    assert result.returncode == 0, result.stderr
    run = run_folder(tmp_path)
    losses, returns = scalars(run, "losses/td_loss"), scalars(run, "charts/SPS")
    assert len(returns) == 8 and 2 <= len(losses) <= 4 and min(losses.values()) > 0


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_after_a_minute_of_training_the_network_itself_is_a_quarter_below_fifo(algorithm: str, tmp_path: Path) -> None:
    """It starts as FIFO without backfilling. The network's own replays of the validation split count, not those of a
    rule that it stands for."""
    flags = ("--workload", "hpc", "--objective", "wait", "--reference", "fifo", "--total-timesteps", "80_000")
    flags += ("--num-envs", "64", "--num-steps", "64", "--num-evaluations", "4", "--validation-jobs", "12_000")
    flags += ("--num-jobs", "128", "--warmup-jobs", "64", "--followup-jobs", "64", "--queue-window", "16")
    flags += ("--ema-decay", "0.8")
    if algorithm == "dqn":
        flags += ("--margin", "0", "--updates-per-decision", "0.002")
    command = [sys.executable, str(ROOT / f"{algorithm}_scheduler.py"), *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    run = run_folder(tmp_path)
    fifo = next(line for line in result.stdout.splitlines() if line.startswith("│ fifo ")).split("│")[2]
    assert min(scalars(run, "eval/cost").values()) < 0.75 * float(fifo.replace(",", ""))
