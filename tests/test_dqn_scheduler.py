"""DQN: its parts against brute force. What it shares with PPO is tested in training/."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from learners import logged, train

import dqn_scheduler
from dqn_scheduler import (
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
    updates_by,
)
from policies import JOB_CHOICE, NODE_CHOICE
from scheduler_env import SchedulerVectorEnv
from simulator.observation import Layout, Observation
from training.checkpoint import load
from training.export import NEVER
from workloads.load import load_workload

HPC, CLOUD = (load_workload(name, "train", runs=1) for name in ("hpc", "cloud"))


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
    envs = SchedulerVectorEnv(16, HPC, num_jobs=16, warmup_jobs=64, followup_jobs=16)
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
    jobs[0, 1, JOB_CHOICE] = nodes[0, 0, NODE_CHOICE] = 1
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
    args = Args(num_envs=num_envs, updates_per_decision=ratio, learning_starts=20, n_step=3)
    done = [updates_by(count, args) for count in range(1021)]
    assert not any(done[:21]) and np.diff(done).min() >= 0
    assert done[1020] == pytest.approx(1000 * num_envs * ratio, abs=1)
    assert updates_by(20, Args(num_envs=num_envs, updates_per_decision=ratio, learning_starts=0, n_step=20)) == 0


@pytest.mark.parametrize("steps", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_the_mask_is_never_violated(steps: int) -> None:
    """In up to 10^5 decisions of an untrained agent, half of them exploring."""
    torch.manual_seed(0)
    envs = SchedulerVectorEnv(256, CLOUD, num_jobs=64, warmup_jobs=16, followup_jobs=16, reward="cost", queue_window=8)
    envs.reset(seed=0)
    agent, replay = Agent(envs.layout.resources), Replay(100, 256, envs.layout.size, torch.device("cpu"))
    for step in range(steps):
        collect(agent, envs, replay, torch.full((256,), 0.5), Args())
        mask = envs.split(replay.obs[step % 100]).mask
        assert mask.gather(1, replay.actions[step % 100][:, None]).min() == 1


def test_a_run_updates_from_learning_starts_on_and_moves_its_target(tmp_path: Path) -> None:
    for starts, updates in (("1000", False), ("8", True)):
        folder = tmp_path / starts
        folder.mkdir()
        run = train(dqn_scheduler, folder, "--learning-starts", starts, "--tau", "1.0")
        assert ("losses/td_loss" in logged(run)) == updates
        state = load(run / "checkpoint.pt", torch.device("cpu"))
        assert state["replay"]["count"] == 64 and len(state["replay"]["obs"]) == 30
        assert all(torch.equal(state["target"][name], state["model"][name]) for name in state["model"])
        moved = [not torch.equal(state["average"][f"module.{name}"], state["model"][name]) for name in state["model"]]
        assert any(moved) == updates


def test_the_target_moves_after_every_so_many_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over the ends of iterations: of 3 to 4 updates in each of them, every fifth."""
    happened: list[str] = []
    for name in ("update", "move_target"):
        usual = getattr(dqn_scheduler, name)
        change = lambda *others, name=name, usual=usual: (happened.append(name), usual(*others))[1]  # noqa: E731
        monkeypatch.setattr(dqn_scheduler, name, change)
    train(dqn_scheduler, tmp_path, "--target-frequency", "5")
    assert happened.count("update") > 15
    for place in range(0, len(happened) - 5, 6):
        assert happened[place : place + 6] == ["update"] * 5 + ["move_target"]


def test_a_loss_is_logged_where_there_was_an_update(tmp_path: Path) -> None:
    flags = ("--num-envs", "1", "--num-steps", "32", "--updates-per-decision", "0.0157", "--total-timesteps", "256")
    found = logged(train(dqn_scheduler, tmp_path, *flags))
    losses, rates = found["losses/td_loss"], found["charts/learning_rate"]
    assert len(rates) == 8 and 2 <= len(losses) <= 4 and min(losses.values()) > 0
