"""PPO: its parts against brute force. What it shares with DQN is tested in training/."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from learners import logged, train

import ppo_scheduler
from ppo_scheduler import Agent, Args, gae, log_prob_and_entropy, rollout, sample
from scheduler_env import SchedulerVectorEnv
from training.export import NEVER
from workloads.load import load_workload

HPC, CLOUD = (load_workload(name, "train", runs=1) for name in ("hpc", "cloud"))


def test_gae_equals_the_sum_of_discounted_deltas() -> None:
    steps, envs, gamma, lam = 12, 3, 0.97, 0.9
    rng = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, steps, envs, generator=rng)
    dones = (torch.rand(steps, envs, generator=rng) < 0.2).float()
    last_value = torch.randn(envs, generator=rng)
    following = torch.cat([values[1:], last_value[None]])
    deltas = rewards + gamma * following * (1 - dones) - values
    expected = torch.zeros(steps, envs)
    for t in range(steps):
        for e in range(envs):
            weight = 1.0
            for k in range(t, steps):
                expected[t, e] += weight * deltas[k, e]
                weight *= gamma * lam * (1 - dones[k, e].item())
    torch.testing.assert_close(gae(rewards, values, dones, last_value, gamma, lam), expected)


def test_sampling_follows_the_softmax_and_never_an_illegal_action() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, NEVER, 1.0, 2.0]]).expand(100_000, 4)
    counts = torch.bincount(sample(logits), minlength=4)
    assert counts[1] == 0
    np.testing.assert_allclose(counts / 1e5, logits[0].softmax(0), atol=0.005)
    log_probs, entropy = log_prob_and_entropy(logits[:1], torch.tensor([2]))
    expected = torch.distributions.Categorical(logits=torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(log_probs[0], expected.log_prob(torch.tensor(1)))
    torch.testing.assert_close(entropy[0], expected.entropy())


@pytest.mark.parametrize("rollouts", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_the_mask_is_never_violated(rollouts: int) -> None:
    """In up to 10^5 decisions of an untrained agent, whose preferences are not yet the rule's."""
    torch.manual_seed(0)
    args = Args(reward="cost")
    envs = SchedulerVectorEnv(256, CLOUD, num_jobs=64, warmup_jobs=16, followup_jobs=16, reward="cost", queue_window=16)
    envs.reset(seed=0)
    agent = Agent(envs.layout.resources, rule_bonus=0.0)
    batch = ppo_scheduler.Batch.empty(25, 256, envs.layout.size, torch.device("cpu"))
    for _ in range(rollouts):
        rollout(agent, envs, batch, args)
        mask = envs.split(batch.obs).mask
        assert mask.gather(2, batch.actions[..., None]).min() == 1
        assert (mask.sum(2) >= 1).all()


@pytest.mark.parametrize("reward", ["improvement", "cost"])
def test_a_truncated_episode_is_bootstrapped_from_its_last_observation(reward: str) -> None:
    """The decisions of a rollout, taken once more: what `gae` gets is the reward and, at the end, gamma * V besides. In
    a cost what is to come is contained."""
    torch.manual_seed(0)
    args = Args(gamma=0.5, reward_scale=10.0, reward=reward)
    episode = dict(num_jobs=8, warmup_jobs=4, followup_jobs=4, reward=reward)
    ours, theirs = (SchedulerVectorEnv(2, HPC, **episode) for _ in range(2))
    ours.reset(seed=0), theirs.reset(seed=0)
    agent, batch = Agent(1), ppo_scheduler.Batch.empty(40, 2, ours.layout.size, torch.device("cpu"))
    rollout(agent, ours, batch, args)
    ends = 0
    for actions, got in zip(batch.actions.numpy(), batch.rewards, strict=True):
        _, rewards, _, truncated, infos = theirs.step(actions)
        expected = torch.from_numpy(10.0 * rewards).float()
        for e in np.flatnonzero(truncated):
            last = torch.from_numpy(infos["final_obs"][e])[None]
            expected[e] += (reward == "improvement") * 0.5 * agent(*theirs.split(last))[1].item()
            ends += 1
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert ends >= 2


@pytest.mark.parametrize(("steps", "clusters"), [(32, 16), (9, 5)])
def test_an_update_is_a_gradient_step_on_ppos_loss(steps: int, clusters: int) -> None:
    """Of the whole minibatch, whatever threads share it, evenly or not."""
    torch.manual_seed(0)
    size = steps * clusters
    args = Args(num_minibatches=1, batch_size=size, minibatch_size=size, num_steps=steps)
    envs = SchedulerVectorEnv(clusters, HPC, num_jobs=64, warmup_jobs=64, followup_jobs=16)
    envs.reset(seed=0)
    ours, batch = Agent(1), ppo_scheduler.Batch.empty(steps, clusters, envs.layout.size, torch.device("cpu"))
    rollout(ours, envs, batch, args)
    ours.rule_bonus.data += 0.3  # the policy is not the one of the rollout any more: some ratios are clipped
    theirs = deepcopy(ours)
    advantages = torch.randn(steps, clusters)
    advantages[0, 0] = 1000.0
    logged = ppo_scheduler.update(
        ours, torch.optim.SGD(ours.parameters(), lr=1.0), batch, advantages, envs.layout, args
    )
    logits, values = theirs(*envs.split(batch.obs.flatten(0, 1)))
    policy = torch.distributions.Categorical(logits=logits)
    ratio = (policy.log_prob(batch.actions.flatten()) - batch.log_probs.flatten()).exp()
    normal = ((advantages - advantages.mean()) / advantages.std()).flatten()
    assert normal[0] > 5
    normal = normal.clamp(-5, 5)
    gains = torch.stack([ratio * normal, ratio.clamp(0.8, 1.2) * normal]).min(0).values.mean()
    value_loss = torch.nn.functional.smooth_l1_loss(values, (advantages + batch.values).flatten())
    (-gains + 0.5 * value_loss - 3e-3 * policy.entropy().mean()).backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other - other.grad, rtol=1e-4, atol=1e-6)
    assert logged["clipfrac"] > 0.01 and logged["policy_loss"] == pytest.approx(-gains.item(), abs=1e-5)
    assert logged["value_loss"] == pytest.approx(value_loss.item(), rel=1e-4)


def test_an_update_goes_so_often_over_all_minibatches_and_logs_the_means() -> None:
    torch.manual_seed(0)
    envs = SchedulerVectorEnv(8, HPC, num_jobs=64, warmup_jobs=64, followup_jobs=16)
    envs.reset(seed=0)
    agent, batch = Agent(1), ppo_scheduler.Batch.empty(16, 8, envs.layout.size, torch.device("cpu"))
    rollout(agent, envs, batch, Args())
    advantages, logged = torch.randn(16, 8), []
    for epochs, minibatches in ((1, 1), (3, 4)):
        args = Args(
            batch_size=128, minibatch_size=128 // minibatches, update_epochs=epochs, num_minibatches=minibatches
        )
        standing_still, steps = torch.optim.SGD(agent.parameters(), lr=0.0), []
        standing_still.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        logged.append(ppo_scheduler.update(agent, standing_still, batch, advantages, envs.layout, args))
        assert len(steps) == epochs * minibatches
    assert logged[0] == pytest.approx(logged[1], rel=1e-4, abs=1e-6)


def test_agent_does_not_depend_on_empty_places_or_the_order_of_jobs() -> None:
    torch.manual_seed(0)
    envs = SchedulerVectorEnv(16, CLOUD, num_jobs=64, warmup_jobs=64, followup_jobs=16, queue_window=32)
    obs, _ = envs.reset(seed=1)
    few = envs.split(obs).jobs[:, 16:, 0].sum(1) == 0  # at most 16 jobs are waiting
    jobs, nodes, cluster, mask = envs.split(torch.from_numpy(obs[few]))
    assert len(jobs) >= 4
    agent = Agent(envs.layout.resources)
    logits, value = agent(jobs, nodes, cluster, mask)
    narrow = torch.cat([mask[:, : 16 * envs.layout.nodes], mask[:, -1:]], 1)
    narrow_logits, narrow_value = agent(jobs[:, :16], nodes, cluster, narrow)
    torch.testing.assert_close(narrow_value, value)
    torch.testing.assert_close(narrow_logits[narrow > 0], logits[mask > 0])
    order = torch.randperm(32)
    pairs = mask[:, :-1].unflatten(1, (32, -1))[:, order].flatten(1)
    shuffled, shuffled_value = agent(jobs[:, order], nodes, cluster, torch.cat([pairs, mask[:, -1:]], 1))
    torch.testing.assert_close(shuffled_value, value)
    torch.testing.assert_close(shuffled[:, :-1].unflatten(1, (32, -1)), logits[:, :-1].unflatten(1, (32, -1))[:, order])


def test_every_iteration_logs_its_losses(tmp_path: Path) -> None:
    found = logged(train(ppo_scheduler, tmp_path, "--total-timesteps", "256"))
    names = {"policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance"}
    losses = {tag: values for tag, values in found.items() if tag.startswith("losses/")}
    assert set(losses) == {f"losses/{name}" for name in names}
    assert all(list(values) == [64, 128, 192, 256] for values in losses.values())
    assert min(losses["losses/entropy"].values()) > 0
