"""DQN that learns to schedule: masked actions, rewards relative to a rule, checkpoints picked on held-out jobs.

    python dqn_scheduler.py                                              # the built-in cloud workload
    python dqn_scheduler.py --workload my_cluster.swf.gz --objective wait   # your own trace
    python dqn_scheduler.py --resume runs/<run_name>                     # go on as if never interrupted
    tensorboard --logdir runs

Writes runs/<run_name>/: TensorBoard events, args.json, checkpoint.pt, and policy.onnx, the best policy on the
validation split. The test split is never read here: that is what benchmark.py is for. The algorithm is Double DQN (van
Hasselt et al. 2016, https://arxiv.org/abs/1509.06461) with n-step returns, laid out after CleanRL's dqn.py (Huang et
al. 2022); `diff ppo_scheduler.py dqn_scheduler.py` shows the algorithm and nothing else.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
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
from simulator.observation import Layout, Observation
from training.arguments import Count, Natural, NotNegative, Positive, RunArgs, Share, check, run_command
from training.export import NEVER, rule_choice
from training.run import Run


@dataclass
class Args(RunArgs):
    exp_name: str = Path(__file__).stem
    """the name of this experiment"""

    # Algorithm specific arguments
    total_timesteps: Count = 1_500_000
    """total decisions of the experiment"""
    learning_rate: Positive = 5e-4
    """the learning rate of the optimizer"""
    num_envs: Count = 512
    """the number of parallel clusters"""
    num_steps: Count = 32
    """the number of decisions in each cluster between two logs and looks at the clock"""
    anneal_lr: bool = True
    """toggle learning rate annealing for the network"""
    buffer_steps: Count = 128
    """the replay memory holds so many decisions of each cluster"""
    learning_starts: Natural = 8
    """decisions of each cluster before the first update"""
    batch_size: Count = 2048
    """how many transitions of the replay memory an update takes"""
    updates_per_decision: Positive = 1 / 1024
    """gradient steps per decision, whatever the number of clusters; times the batch size it is the replay ratio"""
    gamma: Share = 0.0
    """the discount factor gamma; 0: one step of policy improvement over the reference"""
    n_step: Count = 1
    """how many rewards a target adds up before it bootstraps"""
    tau: Annotated[float, Meta(gt=0, le=1)] = 0.01
    """the target network moves so far to the network at each update (1.0 with target_frequency: hard updates)"""
    target_frequency: Count = 1
    """the target network moves every so many updates"""
    start_e: Share = 1.0
    """epsilon at the start, in all clusters"""
    end_e: Share = 0.8
    """epsilon of the most curious cluster after the exploration; the i-th of N has end_e ** (1 + 7 i / (N - 1))"""
    exploration_fraction: Share = 0.1
    """the fraction of `total_timesteps` it takes from start_e to end_e"""
    max_grad_norm: Positive = 10.0
    """the maximum norm for the gradient clipping"""
    reward_scale: Positive = 100.0
    """rewards are multiplied by this: an improvement of one percent counts one"""
    rule_bonus: float = 0.5
    """what the reference's own choice is worth more than others at first (learned from there on)"""
    margin: NotNegative = 0.05
    """another choice than the reference's own is taken only if it is worth so much more"""
    huber_delta: Positive = 10.0
    """errors count linearly from here on: much less than the largest rewards, and rare losses look cheap"""
    hidden: Count = 32
    """width of the network"""
    ema_decay: Annotated[float, Meta(ge=0, lt=1)] = 0.95
    """the policy that is validated and exported is the moving average of the weights, with this decay an iteration"""

    # to be filled in runtime
    num_iterations: int = 0
    """the number of iterations (computed in runtime)"""


def layer_init(layer: nn.Linear, std: float = 2**0.5, bias_const: float = 0.0) -> nn.Linear:
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, bias_const)
    return layer


class Agent(nn.Module):
    """The value of every pair of a visible job and a node; works for any number of either.

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
        self.rule_bonus = nn.Parameter(torch.tensor(rule_bonus))

    def forward(self, jobs: Tensor, nodes: Tensor, cluster: Tensor, mask: Tensor) -> Tensor:
        """jobs[B, K, Fj], nodes[B, M, Fn], cluster[B, Fc], mask[B, K*M + 1] -> values[B, K*M + 1]."""
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
        scores = scores + self.rule_bonus * rows[:, JOB_CHOICE, None] * nodes[..., NODE_CHOICE]
        pairs = torch.full_like(mask[:, :-1], NEVER).unflatten(1, present.shape[1:] + node.shape[1:2])
        pairs = pairs.masked_scatter(present[..., None], scores)
        wait = self.wait(context) + self.rule_bonus * cluster[:, RULE_WAITS, None]
        return torch.where(mask > 0, torch.cat([pairs.flatten(1), wait], 1), NEVER)

    def logits(self, jobs: Tensor, nodes: Tensor, cluster: Tensor, mask: Tensor) -> Tensor:
        """The same values by products of whole matrices, empty places included: for export. A single observation takes
        onnxruntime a third of the time that way, with 256 nodes a ninth. To learn that way too would take 15 % more
        processor time an iteration on `cloud` and 59 % more on `hpc`, so the network is written twice."""
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
        scores = scores + self.rule_bonus * jobs[..., JOB_CHOICE, None] * nodes[:, None, :, NODE_CHOICE]
        scores = torch.where(present > 0, scores, NEVER)
        wait = self.wait(context) + self.rule_bonus * cluster[:, RULE_WAITS, None]
        return torch.where(mask > 0, torch.cat([scores.flatten(1), wait], 1), NEVER)


def epsilons(args: Args, fraction: float) -> Tensor:
    """[E]: how often each cluster explores when that fraction of the decisions is taken (spread as in Ape-X, Horgan et
    al. 2018, eq. 1)."""
    ends = args.end_e ** (1 + 7 * torch.arange(args.num_envs) / max(1, args.num_envs - 1))
    begun = min(1.0, fraction / args.exploration_fraction) if args.exploration_fraction > 0 else 1.0
    return args.start_e + begun * (ends - args.start_e)


def explore(greedy: Tensor, mask: Tensor, epsilon: Tensor) -> Tensor:
    """Actions[B]: the greedy ones or, with probability epsilon[B], any that mask[B, A] allows, all as likely."""
    anything = (mask * torch.rand_like(mask).clamp(min=1e-12)).argmax(1)  # a legal one even where all draws are 0
    return torch.where(torch.rand_like(epsilon) < epsilon, anything, greedy)


class Replay:
    """The last `buffer_steps` decisions in each of E clusters, in a ring: obs[T, E, D], the rest [T, E]."""

    def __init__(self, steps: int, envs: int, width: int, device: torch.device) -> None:
        # In memory a cluster's decisions lie side by side: they are alike, so a checkpoint is half as large.
        self.obs = torch.zeros(envs, steps, width, device=device).transpose(0, 1)
        self.actions = torch.zeros(steps, envs, dtype=torch.long, device=device)
        self.rewards, self.dones = torch.zeros(2, steps, envs, device=device)
        self.count = 0

    def add(self, obs: Tensor, actions: Tensor, rewards: Tensor, dones: Tensor) -> None:
        row = self.count % len(self.obs)
        self.obs[row], self.actions[row], self.rewards[row], self.dones[row] = obs, actions, rewards, dones
        self.count += 1

    def sample(self, size: int, n_step: int) -> tuple[Tensor, Tensor]:
        """Rows[size, n_step + 1] of successive decisions, and clusters[size], all as likely."""
        steps = len(self.obs)
        oldest = max(0, self.count - steps)
        first = oldest + torch.randint(min(self.count, steps) - n_step, (size,), device=self.obs.device)
        cluster = torch.randint(self.obs.shape[1], (size,), device=self.obs.device)
        return (first[:, None] + torch.arange(n_step + 1, device=first.device)) % steps, cluster

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs; not a copy."""
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.obs.copy_(state["obs"])
        vars(self).update({name: value for name, value in state.items() if name != "obs"})

    def observations(self, layout: Layout, rows: Tensor, clusters: Tensor) -> Observation:
        """Those of rows[B] in clusters[B]."""
        places = clusters * self.obs.shape[0] + rows
        parts = layout.split(self.obs.transpose(0, 1).flatten(0, 1))
        return Observation(*(part.index_select(0, places) for part in parts))


def preferring(values: Tensor, jobs: Tensor, nodes: Tensor, cluster: Tensor, margin: float) -> Tensor:
    """Values[B, K*M + 1] with the margin added to the reference's own choice. Among many choices the one that is most
    overrated looks best; the reference's is left only for one that is worth clearly more."""
    return values + margin * rule_choice(jobs, nodes, cluster)


class Preferring(nn.Module):
    """An agent that prefers the reference's own choice by that margin: what is exported."""

    def __init__(self, agent: Any, margin: float) -> None:
        super().__init__()
        self.agent, self.margin = agent, margin

    def logits(self, jobs: Tensor, nodes: Tensor, cluster: Tensor, mask: Tensor) -> Tensor:
        return preferring(self.agent.logits(jobs, nodes, cluster, mask), jobs, nodes, cluster, self.margin)


@torch.no_grad()
def collect(
    agent: Agent, envs: SchedulerVectorEnv, replay: Replay, epsilon: Tensor, args: Args
) -> list[dict[str, Any]]:
    """One decision in every cluster, into the replay memory. Returns the infos of the episodes that ended."""
    obs = torch.from_numpy(envs.observations).to(replay.obs.device, copy=True)
    parts = envs.split(obs)
    greedy = preferring(agent(*parts), *parts[:3], args.margin).argmax(1)
    actions = explore(greedy, parts.mask, epsilon.to(obs.device))
    _, rewards, terminated, truncated, infos = envs.step(actions.cpu().numpy())
    done = terminated | truncated
    # What comes after a truncation would be bootstrapped from another episode's observation: it counts as an end, which
    # for improvements (following the reference from there on earns nothing) it is.
    replay.add(obs, actions, torch.from_numpy(rewards * args.reward_scale).to(obs), torch.from_numpy(done).to(obs))
    final = infos.get("final_info", {})
    return [{name: final[name][e] for name in final if not name.startswith("_")} for e in np.flatnonzero(done)]


def n_step_returns(rewards: Tensor, dones: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Of rewards[B, n] and dones[B, n]: the discounted sums[B] up to the first end, and what to multiply the value of
    what follows with: gamma ** n, or 0 where the episode ended."""
    going_on = torch.ones_like(rewards[:, 0])
    returns = torch.zeros_like(going_on)
    for k in range(rewards.shape[1]):
        returns += going_on * rewards[:, k]
        going_on = going_on * gamma * (1 - dones[:, k])
    return returns, going_on


def targets(agent: nn.Module, target: nn.Module, following: Observation, returns: Tensor, discount: Tensor) -> Tensor:
    """Double DQN's targets[B] (van Hasselt et al. 2016, eq. 4): the network chooses among the legal actions, the target
    network says what that is worth. Where nothing can be chosen (an episode is over) nothing is added."""
    chosen = agent(*following).argmax(1, keepdim=True)
    value = target(*following).gather(1, chosen)[:, 0]
    return returns + discount * torch.where(following.mask.any(1), value, 0.0)


THREADS = ThreadPoolExecutor(2)


def update(
    agent: Agent, target: Agent, optimizer: torch.optim.Optimizer, replay: Replay, layout: Layout, args: Args
) -> Tensor:
    """One gradient step on a batch of the replay memory, whose halves go side by side on two threads, as in
    `ppo_scheduler.update`. Returns [td_loss, q_values], the means."""
    parameters = list(agent.parameters())

    def gradients(rows: Tensor, cluster: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Of the loss over some of the transitions; and what is logged of them."""
        with torch.no_grad():
            past = rows[:, :-1], cluster[:, None]
            returns, discount = n_step_returns(replay.rewards[past], replay.dones[past], args.gamma)
            if args.gamma > 0:
                following = replay.observations(layout, rows[:, -1], cluster)
                returns = targets(agent, target, following, returns, discount)
        values = agent(*replay.observations(layout, rows[:, 0], cluster))
        values = values.gather(1, replay.actions[rows[:, 0], cluster][:, None])[:, 0]
        loss = nn.functional.huber_loss(values, returns, delta=args.huber_delta) / args.huber_delta
        return torch.autograd.grad(loss, parameters), torch.stack([loss, values.mean()]).detach()

    count = 1 if replay.obs.is_cuda else 2
    rows, clusters = (sampled.chunk(count) for sampled in replay.sample(args.batch_size, args.n_step))
    parts, logged = zip(*THREADS.map(gradients, rows, clusters), strict=True)
    shares = torch.tensor([len(half) / args.batch_size for half in rows], device=replay.obs.device)
    for parameter, *grads in zip(parameters, *parts, strict=True):
        parameter.grad = torch.tensordot(shares, torch.stack(grads), 1)
    nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    optimizer.step()
    return shares @ torch.stack(logged)


@torch.no_grad()
def move_target(agent: Agent, target: Agent, tau: float) -> None:
    for ours, theirs in zip(agent.parameters(), target.parameters(), strict=True):
        theirs.lerp_(ours, tau)


def updates_by(count: int, args: Args) -> int:
    """How many gradient steps there have been when every cluster has taken `count` decisions: on average as many as
    asked for, from where there is enough to learn from."""
    start, per_step = max(args.learning_starts, args.n_step), args.updates_per_decision * args.num_envs
    return max(0, int(count * per_step) - int(start * per_step))


# What tells whether the updates are healthy: charts of the Custom Scalars tab, and the losses in each
HEALTH = {
    "loss": ["td_loss"],
    "values": ["q_values"],
}


def prepare(args: Args) -> None:
    """Fill in what is computed.

    Raises:
        ValueError: a flag is out of its range.
    """
    check(args)
    if args.num_iterations:
        raise ValueError("num_iterations is computed; use total_timesteps, num_envs and num_steps")
    if not args.n_step < args.buffer_steps:
        raise ValueError(f"n_step is {args.n_step}; use less than buffer_steps, which is {args.buffer_steps}")
    args.num_iterations = args.iterations


def main(args: Args) -> int:
    """Train. Returns the exit code."""
    if args.resume is None:
        prepare(args)
    with Run(args, "dqn") as run:
        agent = Agent(run.layout.resources, args.hidden, args.rule_bonus).to(run.device)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
        average = AveragedModel(agent, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
        target = deepcopy(agent)
        replay = Replay(args.buffer_steps, args.num_envs, run.layout.size, run.device)
        exported = Preferring(average.module, args.margin)
        run.begin(exported, HEALTH, model=agent, target=target, average=average, optimizer=optimizer, replay=replay)
        for iteration in run.iterations():
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1.0 - iteration / args.num_iterations) * args.learning_rate
            episodes, sums, count = [], torch.zeros(2, device=run.device), 0
            for _ in range(args.num_steps):
                fraction = replay.count / (args.num_iterations * args.num_steps)
                episodes += collect(agent, run.envs, replay, epsilons(args, fraction), args)
                for number in range(updates_by(replay.count - 1, args), updates_by(replay.count, args)):
                    sums += update(agent, target, optimizer, replay, run.layout, args)
                    count += 1
                    if (number + 1) % args.target_frequency == 0:
                        move_target(agent, target, args.tau)
            losses = dict(zip(("td_loss", "q_values"), (sums / count).tolist(), strict=True)) if count else {}
            average.update_parameters(agent)
            run.log(losses, optimizer.param_groups[0]["lr"], episodes)
        return run.end()


if __name__ == "__main__":
    run_command(main, Args, memory="num_envs, num_steps or buffer_steps")
