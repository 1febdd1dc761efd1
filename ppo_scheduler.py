"""PPO that learns to schedule: masked actions, rewards relative to a rule, checkpoints picked on held-out jobs.

    python ppo_scheduler.py                                              # the built-in cloud workload
    python ppo_scheduler.py --workload my_cluster.swf.gz --objective wait   # your own trace
    python ppo_scheduler.py --resume runs/<run_name>                     # go on as if never interrupted
    tensorboard --logdir runs

Writes runs/<run_name>/: TensorBoard events, args.json, checkpoint.pt, and policy.onnx, the best policy on the
validation split. The test split is never read here: that is what benchmark.py is for. The algorithm is Schulman et al.
2017 (https://arxiv.org/abs/1707.06347), laid out after CleanRL's ppo.py (Huang et al. 2022).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from policies import JOB_CHOICE, NODE_CHOICE, RULE_WAITS
from scheduler_env import SchedulerVectorEnv
from simulator.kernels import CLUSTER_WIDTH, JOB_WIDTH, NODE_WIDTH
from simulator.observation import Layout
from training.arguments import Count, NotNegative, Positive, RunArgs, Share, check, run_command
from training.export import NEVER
from training.run import Run


@dataclass
class Args(RunArgs):
    exp_name: str = Path(__file__).stem
    """the name of this experiment"""

    # Algorithm specific arguments
    total_timesteps: Count = 1_500_000
    """total decisions of the experiment"""
    learning_rate: Positive = 1e-3
    """the learning rate of the optimizer"""
    num_envs: Count = 512
    """the number of parallel clusters"""
    num_steps: Count = 32
    """the number of decisions in each cluster per policy rollout"""
    anneal_lr: bool = True
    """toggle learning rate annealing for policy and value networks"""
    gamma: Share = 0.0
    """the discount factor gamma; 0: one step of policy improvement over the reference"""
    gae_lambda: Share = 0.95
    """the lambda for the general advantage estimation"""
    num_minibatches: Count = 8
    """the number of mini-batches"""
    update_epochs: Count = 1
    """the K epochs to update the policy"""
    clip_coef: Positive = 0.2
    """the surrogate clipping coefficient"""
    advantage_clip: Positive = 5.0
    """normalised advantages are clipped at this many standard deviations"""
    ent_coef: NotNegative = 3e-3
    """coefficient of the entropy"""
    vf_coef: NotNegative = 0.5
    """coefficient of the value function"""
    max_grad_norm: Positive = 0.5
    """the maximum norm for the gradient clipping"""
    reward_scale: Positive = 100.0
    """rewards are multiplied by this: an improvement of one percent counts one"""
    rule_bonus: float = 0.5
    """initial log-odds of the reference's own choice against all the others together, where there are many (learned
    from there on): the policy starts near the rule"""
    hidden: Count = 32
    """width of the network"""
    ema_decay: Annotated[float, Meta(ge=0, lt=1)] = 0.95
    """the policy that is validated and exported is the moving average of the weights, with this decay an iteration"""

    # to be filled in runtime
    batch_size: int = 0
    """the batch size (computed in runtime)"""
    minibatch_size: int = 0
    """the mini-batch size (computed in runtime)"""
    num_iterations: int = 0
    """the number of iterations (computed in runtime)"""


def layer_init(layer: nn.Linear, std: float = 2**0.5, bias_const: float = 0.0) -> nn.Linear:
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, bias_const)
    return layer


class Agent(nn.Module):
    """Scores every pair of a visible job and a node; works for any number of either.

    Jobs and nodes go through a small network each, which is told a summary of all of them (mean and cluster features);
    the score of a pair is a dot product, plus a term for pairs that fit now, plus the bonus of the rule's own choice.
    """

    def __init__(self, resources: int, hidden: int = 32, rule_bonus: float = 0.5) -> None:
        super().__init__()
        self.resources = resources
        self.job_in = layer_init(nn.Linear(JOB_WIDTH + resources, hidden))
        self.node_in = layer_init(nn.Linear(NODE_WIDTH + 2 * resources, hidden))
        self.context = layer_init(nn.Linear(2 * hidden + CLUSTER_WIDTH, hidden))
        self.job_out = layer_init(nn.Linear(hidden, hidden))
        self.node_out = layer_init(nn.Linear(hidden, hidden))
        self.query = layer_init(nn.Linear(hidden, hidden + 1), std=0.01)
        self.wait = layer_init(nn.Linear(hidden, 1), std=0.01)
        self.value = nn.Sequential(
            layer_init(nn.Linear(hidden, hidden)), nn.Tanh(), layer_init(nn.Linear(hidden, 1), std=1.0)
        )
        self.rule_bonus = nn.Parameter(torch.tensor(rule_bonus))

    def forward(self, jobs: Tensor, nodes: Tensor, cluster: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """jobs[B, K, Fj], nodes[B, M, Fn], cluster[B, Fc], mask[B, K*M + 1] -> logits[B, K*M + 1], value[B]."""
        present = jobs[..., 0] > 0  # most windows are mostly empty: only the jobs that are there are computed
        places = present.flatten().nonzero()[:, 0]
        owner = places // present.shape[1]
        rows = jobs.flatten(0, 1).index_select(0, places)  # several times as fast as an index in brackets
        job = torch.relu(self.job_in(rows))
        node = torch.relu(self.node_in(nodes))
        pooled = torch.zeros_like(node[:, 0]).index_add(0, owner, job)
        pooled = pooled / present.sum(1, keepdim=True).clamp(min=1)
        context = torch.relu(self.context(torch.cat([pooled, node.mean(1), cluster], 1)))
        job = torch.relu(self.job_out(job) + context.index_select(0, owner))
        node = torch.relu(self.node_out(node) + context[:, None])
        query, fits = self.query(job).split([node.shape[-1], 1], 1)
        scores = (node.index_select(0, owner) * query[:, None]).sum(-1) / node.shape[-1] ** 0.5
        nodes = nodes.index_select(0, owner)
        demand, free = rows[:, None, JOB_WIDTH:], nodes[..., NODE_WIDTH : NODE_WIDTH + self.resources]
        scores = scores + fits * (demand <= free + 1e-6).all(-1)
        bonus = self.rule_bonus + mask.sum(1, keepdim=True).clamp(min=1).log()  # nearly as strong among many
        scores = scores + bonus.index_select(0, owner) * rows[:, JOB_CHOICE, None] * nodes[..., NODE_CHOICE]
        pairs = torch.full_like(mask[:, :-1], NEVER).unflatten(1, present.shape[1:] + node.shape[1:2])
        pairs = pairs.masked_scatter(present[..., None], scores)
        wait = self.wait(context) + bonus * cluster[:, RULE_WAITS, None]
        logits = torch.cat([pairs.flatten(1), wait], 1)
        return torch.where(mask > 0, logits, NEVER), self.value(context)[:, 0]

    def logits(self, jobs: Tensor, nodes: Tensor, cluster: Tensor, mask: Tensor) -> Tensor:
        """The same logits by products of whole matrices, empty places included: for export. A single observation takes
        onnxruntime a third of the time that way, with 256 nodes a ninth. To learn that way too would take 12 % more
        processor time an iteration on `cloud` and 39 % more on `hpc`, so the network is written twice."""
        present = (jobs[..., :1] > 0).float()
        job, node = torch.relu(self.job_in(jobs)), torch.relu(self.node_in(nodes))
        pooled = (present.transpose(1, 2) @ job)[:, 0] / present.sum(1).clamp(min=1)
        context = torch.relu(self.context(torch.cat([pooled, node.mean(1), cluster], 1)))
        job = torch.relu(self.job_out(job) + context[:, None])
        node = torch.relu(self.node_out(node) + context[:, None])
        query = self.query(job)
        scores = query[..., :-1] @ node.transpose(1, 2) / node.shape[-1] ** 0.5
        demand, free = jobs[..., JOB_WIDTH:], nodes[..., NODE_WIDTH : NODE_WIDTH + self.resources]
        fit = present > 0
        for r in range(self.resources):
            fit = fit & (demand[:, :, None, r] <= free[:, None, :, r] + 1e-6)
        scores = scores + query[..., -1:] * fit
        bonus = self.rule_bonus + mask.sum(1, keepdim=True).clamp(min=1).log()
        scores = scores + bonus[:, None] * jobs[..., JOB_CHOICE, None] * nodes[:, None, :, NODE_CHOICE]
        scores = torch.where(present > 0, scores, NEVER)
        wait = self.wait(context) + bonus * cluster[:, RULE_WAITS, None]
        return torch.where(mask > 0, torch.cat([scores.flatten(1), wait], 1), NEVER)


def sample(logits: Tensor) -> Tensor:
    """Actions[B] drawn from softmax(logits[B, A]) (the Gumbel-max trick)."""
    noise = torch.rand_like(logits).clamp(min=1e-12)  # of 0 it would be infinite, and an illegal action win
    return (logits - (-noise.log()).log()).argmax(1)


def log_prob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits[B, A] and actions[B]: log-probabilities[B] and entropies[B]."""
    log_probs = logits.log_softmax(1)
    probs = log_probs.clamp(min=-80).exp()  # exp(-1e9), of an illegal action, takes ten times as long
    entropy = -(probs * log_probs).sum(1)
    return log_probs.gather(1, actions[:, None])[:, 0], entropy


@dataclass
class Batch:
    """What `num_steps` decisions in `num_envs` clusters gave: obs[T, E, D], the rest [T, E]."""

    obs: Tensor
    actions: Tensor
    log_probs: Tensor
    rewards: Tensor
    dones: Tensor
    values: Tensor

    @staticmethod
    def empty(steps: int, envs: int, width: int, device: torch.device) -> Batch:
        obs = torch.zeros(steps, envs, width, device=device)
        return Batch(
            obs, torch.zeros(steps, envs, dtype=torch.long, device=device), *torch.zeros(4, steps, envs, device=device)
        )


@torch.no_grad()
def rollout(agent: Agent, envs: SchedulerVectorEnv, batch: Batch, args: Args) -> tuple[Tensor, list[dict[str, Any]]]:
    """Fill the batch. Returns the values[E] of the observations after it and the infos of the episodes that ended."""
    episodes = []
    device = batch.obs.device
    for t in range(len(batch.obs)):
        batch.obs[t] = torch.from_numpy(envs.observations).to(device)
        logits, batch.values[t] = agent(*envs.split(batch.obs[t]))
        batch.actions[t] = sample(logits)
        batch.log_probs[t] = logits.log_softmax(1).gather(1, batch.actions[t, :, None])[:, 0]
        _, rewards, terminated, truncated, infos = envs.step(batch.actions[t].cpu().numpy())
        rewards *= args.reward_scale
        if "final_info" in infos:
            final = infos["final_info"]
            done = np.flatnonzero(terminated | truncated)
            episodes += [{name: final[name][e] for name in final if not name.startswith("_")} for e in done]
            # An improvement could have gone on, so what was to come is bootstrapped; a cost contains the follow-up's.
            cut = np.flatnonzero(truncated)
            if args.reward == "improvement" and len(cut):
                last = torch.from_numpy(np.stack(infos["final_obs"][cut])).to(device)
                rewards[cut] += args.gamma * agent(*envs.split(last))[1].cpu().numpy()
        batch.rewards[t] = torch.from_numpy(rewards).to(device)
        batch.dones[t] = torch.from_numpy(terminated | truncated).to(device)
    return agent(*envs.split(torch.from_numpy(envs.observations).to(device)))[1], episodes


def gae(rewards: Tensor, values: Tensor, dones: Tensor, last_value: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages[T, E] (Schulman et al. 2016, eq. 16); dones[t]: the episode ended with decision t."""
    advantages = torch.zeros_like(rewards)
    following, advantage = last_value, torch.zeros_like(last_value)
    for t in reversed(range(len(rewards))):
        going_on = 1.0 - dones[t]
        delta = rewards[t] + gamma * following * going_on - values[t]
        advantage = delta + gamma * lam * going_on * advantage
        advantages[t], following = advantage, values[t]
    return advantages


THREADS = ThreadPoolExecutor(2)


def update(
    agent: Agent, optimizer: torch.optim.Optimizer, batch: Batch, advantages: Tensor, layout: Layout, args: Args
) -> dict[str, float]:
    """PPO's epochs over the batch. Returns the means over all minibatches of what CleanRL logs.

    Halves of a minibatch go side by side on two threads. (PyTorch's own threads, which share every single operation
    instead, gain as much on two idle cores, and on busy ones lose more by waiting for each other.)
    """
    obs, actions = layout.split(batch.obs.flatten(0, 1)), batch.actions.flatten()
    old_log_probs, returns = batch.log_probs.flatten(), (advantages + batch.values).flatten()
    advantages = advantages.flatten()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    advantages = advantages.clamp(-args.advantage_clip, args.advantage_clip)
    parameters = list(agent.parameters())

    def gradients(mb: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Of the loss over some of the decisions; and what is logged of them."""
        logits, values = agent(*(part.index_select(0, mb) for part in obs))
        log_probs, entropy = log_prob_and_entropy(logits, actions[mb])
        log_ratio = log_probs - old_log_probs[mb]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        policy_loss = -torch.min(ratio * advantages[mb], clipped * advantages[mb]).mean()
        value_loss = nn.functional.smooth_l1_loss(values, returns[mb])
        loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy.mean()
        approx_kl = (ratio - 1 - log_ratio).mean()  # http://joschu.net/blog/kl-approx.html
        clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
        logged = torch.stack([policy_loss, value_loss, entropy.mean(), approx_kl, clipfrac]).detach()
        return torch.autograd.grad(loss, parameters), logged

    sums = torch.zeros(5, device=actions.device)
    for _ in range(args.update_epochs):
        for mb in torch.randperm(args.batch_size, device=actions.device).split(args.minibatch_size):
            halves = mb.chunk(1 if actions.is_cuda else 2)
            parts, logged = zip(*THREADS.map(gradients, halves), strict=True)
            shares = torch.tensor([len(half) / len(mb) for half in halves], device=actions.device)
            for parameter, *grads in zip(parameters, *parts, strict=True):
                parameter.grad = torch.tensordot(shares, torch.stack(grads), 1)
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            sums += shares @ torch.stack(logged)
    means = (sums / (args.update_epochs * args.num_minibatches)).tolist()
    losses = dict(zip(("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"), means, strict=True))
    unexplained = (returns - batch.values.flatten()).var() / returns.var().clamp(min=1e-12)
    return losses | {"explained_variance": 1 - unexplained.item()}


# What tells whether the updates are healthy: charts of the Custom Scalars tab, and the losses in each
HEALTH = {
    "how far the policy moves": ["approx_kl", "clipfrac"],
    "entropy": ["entropy"],
    "losses": ["policy_loss", "value_loss"],
    "explained variance": ["explained_variance"],
}


def prepare(args: Args) -> None:
    """Fill in what is computed.

    Raises:
        ValueError: a flag is out of its range.
    """
    check(args)
    if args.decisions < 2:
        raise ValueError("num_envs * num_steps is 1; an update needs 2 decisions or more")
    if args.batch_size or args.minibatch_size or args.num_iterations:
        name = "batch_size" if args.batch_size else "minibatch_size" if args.minibatch_size else "num_iterations"
        raise ValueError(f"{name} is computed; use num_envs, num_steps, num_minibatches and total_timesteps")
    args.batch_size, args.num_iterations = args.decisions, args.iterations
    if args.batch_size % args.num_minibatches:
        raise ValueError(
            f"num_minibatches is {args.num_minibatches}; use a divisor of num_envs * num_steps = {args.batch_size}"
        )
    args.minibatch_size = args.batch_size // args.num_minibatches


def main(args: Args) -> int:
    """Train. Returns the exit code."""
    if args.resume is None:
        prepare(args)
    with Run(args, "ppo") as run:
        agent = Agent(run.layout.resources, args.hidden, args.rule_bonus).to(run.device)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
        average = AveragedModel(agent, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
        batch = Batch.empty(args.num_steps, args.num_envs, run.layout.size, run.device)
        run.begin(average.module, HEALTH, model=agent, average=average, optimizer=optimizer)
        for iteration in run.iterations():
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1.0 - iteration / args.num_iterations) * args.learning_rate
            last_value, episodes = rollout(agent, run.envs, batch, args)
            advantages = gae(batch.rewards, batch.values, batch.dones, last_value, args.gamma, args.gae_lambda)
            losses = update(agent, optimizer, batch, advantages, run.layout, args)
            average.update_parameters(agent)
            run.log(losses, optimizer.param_groups[0]["lr"], episodes)
        return run.end()


if __name__ == "__main__":
    run_command(main, Args, memory="num_envs or num_steps")
