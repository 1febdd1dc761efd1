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

import json
import os
import shlex
import signal
import sys
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from policies import load_policy
from scheduler_env import SchedulerVectorEnv
from simulator.gantt import gantt
from simulator.kernels import (
    CLUSTER_FEATURES,
    CLUSTER_WIDTH,
    EASY,
    JOB_FEATURES,
    JOB_WIDTH,
    NODE_FEATURES,
    NODE_WIDTH,
    TETRIS,
    TUNED,
)
from simulator.observation import Layout, Observation
from simulator.replay import simulate
from simulator.rules import RULES, parse_rule
from simulator.schedule import METRIC, Schedule
from training.tuning import costs, tune
from workloads.files import replacing, write_json
from workloads.jobs import Workload, at_loads
from workloads.load import load_workload, workload_name


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """if toggled, `torch.backends.cudnn.deterministic=True`"""
    cuda: bool = False
    """if toggled, the networks run on the GPU"""
    track: bool = False
    """if toggled, this experiment will be tracked with Weights and Biases (WANDB_MODE=offline needs no account)"""
    wandb_project_name: str = "resourcerl"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    resume: str | None = None
    """a run's folder: go on with it, under the flags that it was started with"""

    workload: str = "cloud"
    """cloud, hpc, manufacturing, datacenter, tasks, or the path of a trace (.swf, .swf.gz, .jsonl)"""
    objective: Literal["latency", "wait", "slowdown"] = "latency"
    """what to minimise"""
    learn_from: Literal["latency", "wait", "slowdown", "tail"] | None = None
    """what rewards and the choice of the reference are about, if not the objective itself: the wait says more surely
    which choice was good than the slowdown, which a few short jobs make up; tail: squares of the waits. A tuned
    reference is fitted to the objective"""
    reference: str = "auto"
    """the rule to start from, which rewards are relative to; auto: the one with the lowest mean and root mean square
    on training and validation; tuned: one that is fitted to the training jobs first"""
    tune_generations: int = 50
    """how long to fit a tuned one"""
    patience: float = 4.0
    """a job that waits for longer than so many times the longest wait under EASY-FIFO on the training split goes first;
    0: no such thing. A rule with a patience of its own keeps it, a tuned one has twice that wait"""
    reward: Literal["improvement", "cost"] = "improvement"
    """improvement over the reference, or cost"""
    num_jobs: int = 512
    """jobs that arrive while the agent decides"""
    warmup_jobs: int = 256
    """jobs that the reference schedules before"""
    followup_jobs: int = 512
    """jobs that the reference schedules after; their cost counts"""
    episodes_in_a_row: int = 1
    """so many follow each other on one cluster, each beginning with the backlog that the agent left; more than a
    reference leaves after a warm-up. A row ends where a job is older than the last `warmup_jobs`"""
    training_loads: tuple[float, ...] = (1.0,)
    """training jobs arrive so many times as fast, each of the factors as often: several prepare for busier times than
    the trace has had"""
    queue_window: int = 64
    """how many queued jobs the agent sees, the oldest and those that the reference ranks first"""
    backfill: Literal["easy", "none"] = "easy"
    """what may happen while a reservation stands: backfilling or nothing"""
    lock_in: bool = False
    """RLScheduler's semantics: a chosen job holds the queue until it has started"""
    num_evaluations: int = 10
    """how often the policy is replayed on the validation split, besides what it starts from; the best one is kept"""
    validation_loads: tuple[float, ...] = (0.9, 1.0, 1.1)
    """it is replayed with arrivals compressed by these factors: one replay of a busy machine says little"""
    validation_jobs: int = 65_000
    """at most so many jobs are replayed, all loads together"""
    max_tail: float = 1.2
    """the p99 of the wait on validation may be at most so many times EASY-FIFO's (without backfilling: FIFO's), the
    longest three times as many"""

    # Algorithm specific arguments
    total_timesteps: int = 1_500_000
    """total decisions of the experiment"""
    learning_rate: float = 1e-3
    """the learning rate of the optimizer"""
    num_envs: int = 512
    """the number of parallel clusters"""
    num_steps: int = 32
    """the number of decisions in each cluster per policy rollout"""
    anneal_lr: bool = True
    """toggle learning rate annealing for policy and value networks"""
    gamma: float = 0.0
    """the discount factor gamma; 0: one step of policy improvement over the reference"""
    gae_lambda: float = 0.95
    """the lambda for the general advantage estimation"""
    num_minibatches: int = 8
    """the number of mini-batches"""
    update_epochs: int = 1
    """the K epochs to update the policy"""
    clip_coef: float = 0.2
    """the surrogate clipping coefficient"""
    advantage_clip: float = 5.0
    """normalised advantages are clipped at this many standard deviations"""
    ent_coef: float = 3e-3
    """coefficient of the entropy"""
    vf_coef: float = 0.5
    """coefficient of the value function"""
    max_grad_norm: float = 0.5
    """the maximum norm for the gradient clipping"""
    reward_scale: float = 100.0
    """rewards are multiplied by this: an improvement of one percent counts one"""
    rule_bonus: float = 0.5
    """initial log-odds of the reference's own choice against all the others together, where there are many (learned
    from there on): the policy starts near the rule"""
    hidden: int = 32
    """width of the network"""
    ema_decay: float = 0.95
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
        scores = scores + bonus.index_select(0, owner) * rows[:, RULE_CHOICE, None] * nodes[..., RULE_NODE]
        pairs = torch.full_like(mask[:, :-1], NEVER).unflatten(1, present.shape[1:] + node.shape[1:2])
        pairs = pairs.masked_scatter(present[..., None], scores)
        wait = self.wait(context) + bonus * cluster[:, RULE_WAITS, None]
        logits = torch.cat([pairs.flatten(1), wait], 1)
        return torch.where(mask > 0, logits, NEVER), self.value(context)[:, 0]

    def logits(self, jobs: Tensor, nodes: Tensor, cluster: Tensor, mask: Tensor) -> Tensor:
        """The same logits by products of whole matrices, empty places included: for export. A single observation takes
        onnxruntime a third of the time that way, with 256 nodes a ninth."""
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
        scores = scores + bonus[:, None] * jobs[..., RULE_CHOICE, None] * nodes[:, None, :, RULE_NODE]
        scores = torch.where(present > 0, scores, NEVER)
        wait = self.wait(context) + bonus * cluster[:, RULE_WAITS, None]
        return torch.where(mask > 0, torch.cat([scores.flatten(1), wait], 1), NEVER)


RULE_CHOICE, RULE_NODE = JOB_FEATURES.index("rule_choice"), NODE_FEATURES.index("rule_choice")
RULE_WAITS = CLUSTER_FEATURES.index("rule_waits")
NEVER = -1e9  # the logit of an illegal action


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


# ---------------------------------------------------------------------------------- validation, files, the main loop
class Judgement(NamedTuple):
    """Of continuous replays: the mean of the objective, the 99th percentile of the wait, the longest, and the root mean
    square of the objective."""

    cost: float
    wait_p99: float
    wait_max: float
    rms: float


def judge(schedules: list[Schedule], objective: str) -> Judgement:
    """Means over the replays, without the first 5 % of each one's jobs."""
    return Judgement(*costs(schedules, objective).mean(0).tolist())


def some_runs(segments: np.ndarray, most: int, least: int) -> np.ndarray:
    """int[S, 2]: some of the segments, evenly spread, with at most `most` jobs together. At least `least` of them, one
    for each load, and only then cut short: in a run that is, nobody waits for long."""
    begin, end = segments.T
    count = min(len(segments), max(least, int(most // (end - begin).max())))
    chosen = np.linspace(0, len(segments) - 1, count).astype(int)
    return np.stack([begin, np.minimum(end, begin + max(1, most // count))], axis=1)[chosen]


class FollowRule(nn.Module):
    """The reference's own choice in the form of an agent: exported where training found nothing better."""

    def logits(self, jobs: Tensor, nodes: Tensor, cluster: Tensor, mask: Tensor) -> Tensor:
        pairs = jobs[..., RULE_CHOICE, None] * nodes[..., RULE_NODE][:, None]
        return torch.where(mask > 0, torch.cat([pairs.flatten(1), cluster[:, RULE_WAITS, None]], 1), NEVER)


class LogitsOnly(nn.Module):
    """What the exported file computes: the critic stays behind."""

    def __init__(self, agent: nn.Module) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, jobs: Tensor, nodes: Tensor, cluster: Tensor, mask: Tensor) -> Tensor:
        return self.agent.logits(jobs, nodes, cluster, mask)


def export_onnx(agent: nn.Module, path: Path, layout: Layout, metadata: dict[str, Any]) -> None:
    """Write policy.onnx: jobs, nodes, cluster, mask -> logits; batch, queue window and node count are dynamic."""
    example = layout.split(torch.zeros(2, layout.size))
    axes = {"jobs": {0: "batch", 1: "window"}, "nodes": {0: "batch", 1: "nodes"}, "cluster": {0: "batch"}}
    axes |= {"mask": {0: "batch", 1: "actions"}, "logits": {0: "batch", 1: "actions"}}
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is deprecated; its successor cannot tell K*M + 1 from K and M
        torch.onnx.export(
            LogitsOnly(deepcopy(agent)).cpu().eval(), tuple(example), str(temporary), opset_version=17, dynamo=False,
            input_names=list(Observation._fields), output_names=["logits"], dynamic_axes=axes,
        )  # fmt: skip
        model = onnx.load(temporary)
        entry = model.metadata_props.add()
        entry.key, entry.value = "resourcerl", json.dumps(metadata)
        onnx.save(model, temporary)


class Trainer:
    """One run: the environments, the agent, and everything that a checkpoint holds."""

    def __init__(self, args: Args, folder: Path, console: Console) -> None:
        self.args, self.folder = args, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
        torch.manual_seed(args.seed)
        torch.set_num_threads(1)  # the other cores are for the simulator, and for the halves of an update
        torch.backends.cudnn.deterministic = args.torch_deterministic
        workload = load_workload(args.workload, "train")
        workload.report()
        self.validation = at_loads(load_workload(args.workload, "validation"), args.validation_loads)
        self.segments = some_runs(self.validation.segments, args.validation_jobs, len(args.validation_loads))
        known = [name for name in RULES if name != "tetris" or not args.lock_in]  # lock_in needs an order of jobs
        self.rules = {name: self.judge_rule(name, self.validation, self.segments) for name in known}
        rivals = [name for name in known if self.can_follow(name)]
        self.best_rule = min(filter(self.acceptable, rivals), key=lambda name: self.rules[name].cost)
        [self.example] = simulate(
            self.validation, self.best_rule, self.segments[:1], backfill=args.backfill, lock_in=args.lock_in
        )
        submitted, started = self.example.jobs.submit_time, np.sort(self.example.start_time)
        queued = np.arange(len(submitted)) - np.searchsorted(started, submitted)
        self.moment = float(submitted[queued.argmax()])  # of the pictures: the longest queue under the best rule
        args.reference = self.choose_reference(workload, console)
        self.rules[args.reference] = self.judge_rule(args.reference, self.validation, self.segments)
        self.envs = SchedulerVectorEnv(
            args.num_envs, at_loads(workload, args.training_loads), num_jobs=args.num_jobs,
            warmup_jobs=args.warmup_jobs, followup_jobs=args.followup_jobs, episodes_in_a_row=args.episodes_in_a_row,
            queue_window=args.queue_window,
            backfill=args.backfill, lock_in=args.lock_in, reference=args.reference, recorded_history=True,
            objective=args.learn_from or args.objective, reward=args.reward,
        )  # fmt: skip
        self.layout = self.envs.layout
        self.agent = Agent(self.layout.resources, args.hidden, args.rule_bonus).to(self.device)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
        self.average = AveragedModel(self.agent, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
        self.iteration = 0
        self.worker = ThreadPoolExecutor(1)
        self.proposed: tuple[int, Future[list[Schedule]]] | None = None
        self.judged = -1  # the iteration that was judged last
        # Until a policy is better than every rule on validation, the file stands for the best rule.
        kept = filter(self.acceptable, (*rivals, args.reference))
        self.stands_for: str | None = min(kept, key=lambda name: self.rules[name].cost)
        self.best_cost = self.rules[self.stands_for].cost

    def judge_rule(
        self, name: str, workload: Workload, segments: np.ndarray, objective: str | None = None
    ) -> Judgement:
        args = self.args
        schedules = simulate(
            workload, name, segments, backfill=args.backfill, lock_in=args.lock_in, threads=os.cpu_count() or 1
        )
        return judge(schedules, objective or args.objective)

    def can_follow(self, rule: str) -> bool:
        """Whether the agent may do what the rule does: without backfilling it may not."""
        return self.args.backfill == "easy" or self.args.lock_in or parse_rule(rule).mode != EASY

    @property
    def yardstick(self) -> str:
        """The rule whose tail of the wait is the measure: EASY-FIFO or, without backfilling, FIFO."""
        return "easy-fifo" if self.can_follow("easy-fifo") else "fifo"

    def choose_reference(self, workload: Workload, console: Console) -> str:
        """The rule that training starts from and rewards are relative to; it gets `--patience` where it has none."""
        args, name = self.args, self.args.reference
        if name != "auto" and not self.can_follow("easy-fifo" if name == "tuned" else name):
            raise ValueError(f"reference {name} backfills; with --backfill none use auto or a rule without easy-")
        if name == "tuned":
            return tune(
                workload, args.objective, args.seed, args.tune_generations, backfill=args.backfill,
                lock_in=args.lock_in, each=lambda steps: track(steps, "tuning the rule to start from", console=console),
            )  # fmt: skip
        if name == "auto":
            # In training, rules with history are followed only approximately (`recorded_history`).
            without = [name for name in RULES if "history" not in name and name != "tetris"]
            name = self.robust_rule(workload, [name for name in without if self.can_follow(name)])
        rule = parse_rule(name)
        if args.patience <= 0 or rule.patience < np.inf or rule.head in (TETRIS, TUNED):
            return name  # tetris has no order to put anyone in front of, a tuned rule a patience of its own
        schedules = simulate(workload, self.yardstick, backfill=args.backfill, lock_in=args.lock_in)
        return f"{name}@{args.patience * max(schedule.wait.max() for schedule in schedules) / 3600:.3g}"

    def robust_rule(self, training: Workload, names: list[str]) -> str:
        """The rule that does best in mean and in root mean square, on training and on validation. The mean alone, or
        the few busy weeks of validation alone, favour rules that starve some jobs: it shows later, in a busier time."""
        objective = self.args.learn_from or self.args.objective

        def weakness(name: str, workload: Workload, segments: np.ndarray) -> float:
            known = workload is self.validation and objective == self.args.objective
            found = self.rules[name] if known else self.judge_rule(name, workload, segments, objective)
            return np.log(found.cost) + np.log(found.rms)

        found = {name: weakness(name, self.validation, self.segments) for name in names}
        shortlist = sorted(names, key=found.__getitem__)[:8]  # training has many more jobs
        return min(shortlist, key=lambda name: found[name] + weakness(name, training, training.segments))

    def acceptable(self, found: Judgement | str) -> bool:
        """No gain is bought with starvation: the tail of the wait is not much longer than EASY-FIFO's."""
        found = self.rules[found] if isinstance(found, str) else found
        base, factor = self.rules[self.yardstick], self.args.max_tail
        return found.wait_p99 <= factor * base.wait_p99 and found.wait_max <= 3 * factor * base.wait_max

    def start(self) -> None:
        """
        Raises:
            ValueError: what is trained and what is exported are not the same network.
        """
        self.envs.reset(seed=self.args.seed)
        parts = self.layout.split(torch.from_numpy(self.envs.observations).to(self.device))
        if not torch.allclose(self.agent(*parts)[0], self.agent.logits(*parts), atol=1e-4):
            raise ValueError("Agent.logits, which is exported, is not what Agent.forward computes; change both")
        self.folder.mkdir(parents=True)
        export_onnx(FollowRule(), self.folder / "policy.onnx", self.layout, self.metadata(self.stands_for))

    def checkpoint(self) -> None:
        with replacing(self.folder / "checkpoint.pt") as temporary:
            state = {
                "iteration": self.iteration,
                "model": self.agent.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "judged": self.judged,
                "best_cost": self.best_cost,
                "stands_for": self.stands_for,
                "policy": (self.folder / "policy.onnx").read_bytes(),
                "environments": self.envs.state_dict(),
                "random": torch.get_rng_state(),
                "cuda_random": torch.cuda.get_rng_state_all(),
            }
            try:
                torch.save(state, temporary, pickle_protocol=5)  # 2, the default, takes twice as long for arrays
            except RuntimeError as error:  # how PyTorch says that a disk is full
                raise OSError(
                    f"{self.folder}: checkpoint.pt cannot be written; make room, then go on from the last one"
                ) from error

    def restore(self) -> None:
        """Raises ValueError: the checkpoint is damaged or from another version."""
        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, map_location=self.device, weights_only=False)
            self.agent.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.iteration, self.best_cost = state["iteration"], state["best_cost"]
            self.judged, self.stands_for = state["judged"], state["stands_for"]
            with replacing(self.folder / "policy.onnx") as temporary:  # it may be newer, where the run was killed
                temporary.write_bytes(state["policy"])
            self.envs.load_state_dict(state["environments"])
            torch.set_rng_state(state["random"].cpu())
            if self.device.type == "cuda" and state["cuda_random"]:
                torch.cuda.set_rng_state_all([random.cpu() for random in state["cuda_random"]])
        except Exception as error:  # torch.load raises whatever the damage leads to
            raise ValueError(
                f"{path}: not a checkpoint that can be resumed ({type(error).__name__}); start a new run"
            ) from error

    def propose(self) -> None:
        """Export the averaged policy, and begin to replay it on the validation split while training goes on."""
        candidate = self.folder / "candidate.onnx"
        export_onnx(self.average.module, candidate, self.layout, self.metadata(None))
        policy = load_policy(str(candidate))
        self.proposed = self.iteration, self.worker.submit(policy.schedule, self.validation, self.segments)

    def judge_proposed(self) -> tuple[int, dict[str, float], Schedule]:
        """Wait until the replay is over; the best policy so far is policy.onnx.

        Returns the number of decisions before it, what is logged, and the first replay.
        """
        self.judged, replay = self.proposed
        self.proposed = None
        schedules, candidate = replay.result(), self.folder / "candidate.onnx"
        found = judge(schedules, self.args.objective)
        if found.cost < self.best_cost and self.acceptable(found):
            self.best_cost, self.stands_for = found.cost, None
            os.replace(candidate, self.folder / "policy.onnx")
        candidate.unlink(missing_ok=True)
        metrics = [s.metrics() for s in schedules]
        means = {f"eval/{name}": float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        improvement = 1 - found.cost / self.rules[self.best_rule].cost
        means |= {"eval/cost": found.cost, "eval/wait_p99": found.wait_p99, "eval/improvement": improvement}
        means["eval/best_improvement"] = 1 - self.best_cost / self.rules[self.best_rule].cost
        return self.judged * self.args.batch_size, means, schedules[0]

    def metadata(self, rule: str | None) -> dict[str, Any]:
        """What policy.onnx says about itself; `rule`: it stands for that rule."""
        args = self.args
        return {
            "version": 1, "algorithm": "ppo", "workload": args.workload, "objective": args.objective,
            "reference": rule or args.reference, "backfill": args.backfill, "lock_in": args.lock_in,
            "queue_window": args.queue_window, "nodes": self.layout.nodes, "resources": self.layout.resources,
            "job_features": JOB_FEATURES, "node_features": NODE_FEATURES, "cluster_features": CLUSTER_FEATURES,
            "steps": self.iteration * args.batch_size, "seed": args.seed, "rule": rule,
        }  # fmt: skip

    def results(self) -> list[tuple[str, float, float, float, float]]:
        """The policy and the rules worth knowing, best first: validation cost, and relative to FIFO, EASY-FIFO and the
        best rule."""
        names = dict.fromkeys(("fifo", "easy-fifo", "easy-sjf", "easy-saf", self.args.reference, self.best_rule))
        rows = {parse_rule(name).title: self.rules[name].cost for name in names}
        rows["PPO" if self.stands_for is None else "PPO, which stands for a rule"] = self.best_cost
        others = [self.rules[name].cost for name in ("fifo", "easy-fifo", self.best_rule)]
        ranked = sorted(rows.items(), key=lambda row: row[1])
        return [(name, cost, *(cost / other - 1 for other in others)) for name, cost in ranked]

    def columns(self) -> list[str]:
        return ["policy", METRIC[self.args.objective], "to FIFO", "to EASY-FIFO", f"to {self.best_rule}"]

    def table(self) -> Table:
        table = Table(title=f"{Path(self.args.workload).name}: mean {self.args.objective} on the validation split")
        for column in self.columns():
            table.add_column(column, justify="left" if column == "policy" else "right")
        for name, cost, *relative in self.results():
            table.add_row(name, f"{cost:,.1f}", *(f"{share:+.1%}" for share in relative))
        return table


def train(trainer: Trainer, writer: SummaryWriter, console: Console) -> bool:
    """Run the iterations that are left. False: stopped by Ctrl-C."""
    args, agent, layout = trainer.args, trainer.agent, trainer.layout
    batch = Batch.empty(args.num_steps, args.num_envs, layout.size, trainer.device)
    stop: list[int] = []

    def interrupt(*_: object) -> None:
        if stop:
            os._exit(130)  # sys.exit would wait for the validation
        stop.append(1)
        console.print("Stopping, once a validation under way has ended. Ctrl-C again: without saving what is new.")

    previous = signal.signal(signal.SIGINT, interrupt)
    evaluations = max(1, args.num_evaluations)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    started, first, saved = time.time(), trainer.iteration, 0.0

    def due() -> bool:
        """A validation: before the first iteration, after the last, and evenly in between."""
        return trainer.iteration * evaluations % args.num_iterations < evaluations

    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("training", total=args.num_iterations, completed=trainer.iteration)
            if due() and trainer.judged < trainer.iteration:  # a checkpoint is written before what is due is proposed
                trainer.propose()
            while trainer.iteration < args.num_iterations and not stop:
                if args.anneal_lr:
                    fraction = 1.0 - trainer.iteration / args.num_iterations
                    trainer.optimizer.param_groups[0]["lr"] = fraction * args.learning_rate
                last_value, episodes = rollout(agent, trainer.envs, batch, args)
                advantages = gae(batch.rewards, batch.values, batch.dones, last_value, args.gamma, args.gae_lambda)
                losses = update(agent, trainer.optimizer, batch, advantages, layout, args)
                trainer.average.update_parameters(agent)
                trainer.iteration += 1
                step = trainer.iteration * args.batch_size
                sps = int((trainer.iteration - first) * args.batch_size / (time.time() - started))
                for name, value in losses.items():
                    writer.add_scalar(f"losses/{name}", value, step)
                writer.add_scalar("charts/learning_rate", trainer.optimizer.param_groups[0]["lr"], step)
                writer.add_scalar("charts/SPS", sps, step)
                if episodes:
                    for tag, name in CHARTS.items():
                        writer.add_scalar(f"charts/{tag}", np.mean([e[name] for e in episodes]), step)
                if trainer.proposed and (due() or trainer.proposed[1].done()):
                    log_validation(trainer, writer)
                    if time.time() - saved > CHECKPOINT_SECONDS:
                        trainer.checkpoint()
                        saved = time.time()
                if due():
                    trainer.propose()
                best = trainer.best_cost / trainer.rules[trainer.best_rule].cost - 1
                progress.update(
                    bar, advance=1, description=f"{sps:,} decisions/s, best so far {best:+.1%} to {trainer.best_rule}"
                )
            if trainer.proposed:
                log_validation(trainer, writer)
        trainer.checkpoint()
    finally:
        signal.signal(signal.SIGINT, previous)
    return not stop


def log_validation(trainer: Trainer, writer: SummaryWriter) -> None:
    step, metrics, schedule = trainer.judge_proposed()
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)
    writer.add_image("gantt/policy", snapshot(schedule, trainer.moment), step, dataformats="HWC")
    writer.flush()  # somebody may be waiting for it: TensorBoard, or a sweep that stops bad runs


CHECKPOINT_SECONDS = 30.0  # and no more often: all the environments are in it
CHARTS = {"episodic_return": "return", "episodic_length": "decisions", "latency": "latency", "wait": "wait"}
CHARTS |= {"bounded_slowdown": "bounded_slowdown", "utilization": "utilization"}
LAYOUT = {  # TensorBoard's Custom Scalars tab: what belongs together is in one chart
    "does it learn": {
        "improvement over the reference, per episode": ["Multiline", ["charts/episodic_return"]],
        "improvement over the best rule, validation": ["Multiline", ["eval/improvement", "eval/best_improvement"]],
    },
    "who waits, validation": {
        "wait (s)": ["Multiline", ["eval/wait", "eval/wait_median", "eval/wait_p95", "eval/wait_p99"]],
        "longest wait (s)": ["Multiline", ["eval/wait_max"]],
    },
    "is the update healthy": {
        "how far the policy moves": ["Multiline", ["losses/approx_kl", "losses/clipfrac"]],
        "entropy": ["Multiline", ["losses/entropy"]],
        "losses": ["Multiline", ["losses/policy_loss", "losses/value_loss"]],
        "explained variance": ["Multiline", ["losses/explained_variance"]],
    },
}


def snapshot(schedule: Schedule, now: float) -> np.ndarray:
    """uint8[H, W, 3]: the Gantt chart of what has started by `now`, and beside it the queue at that time."""
    started = schedule.start_time <= now
    queue = schedule.jobs[~started & (schedule.jobs.submit_time <= now)]
    past = Schedule(schedule.jobs[started], schedule.cluster, schedule.start_time[started], schedule.node[started])
    return gantt(past, now, queue)


def log_start(trainer: Trainer, writer: SummaryWriter) -> None:
    """What TensorBoard shows of the run besides its curves; the HParams tab sets the last eval/ values beside it."""
    config = asdict(trainer.args)
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in config.items()))
    values = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in config.items()}
    metrics = dict.fromkeys(("eval/best_improvement", "eval/improvement", "eval/cost", "eval/wait_p99"))
    for summary in hparams(values, metrics)[:2]:  # the third one ends the session
        writer.file_writer.add_summary(summary)
    writer.add_custom_scalars(LAYOUT)
    writer.add_image(f"gantt/{trainer.best_rule}", snapshot(trainer.example, trainer.moment), 0, dataformats="HWC")


def log_end(trainer: Trainer) -> None:
    """Give W&B the closing table, and the policy with its metadata."""
    import wandb

    wandb.log({"validation": wandb.Table(trainer.columns(), [list(row) for row in trainer.results()])})
    metadata = asdict(load_policy(str(trainer.folder / "policy.onnx")).metadata)
    artifact = wandb.Artifact("policy", "model", metadata=metadata)
    artifact.add_file(str(trainer.folder / "policy.onnx"))
    wandb.log_artifact(artifact)


def check(args: Args) -> None:
    """Raises ValueError: what would fail later, and say less."""
    least = {"seed": 0, "num_envs": 1, "num_steps": 1, "max_tail": 1, "hidden": 1, "update_epochs": 1}
    for name, value in least.items():
        if not getattr(args, name) >= value:  # nor is NaN
            raise ValueError(f"{name} is {getattr(args, name)}; use {value} or more")
    if args.num_envs * args.num_steps < 2:
        raise ValueError("num_envs * num_steps is 1; an update needs 2 decisions or more")
    if args.queue_window > 10_000:
        raise ValueError(f"queue_window is {args.queue_window}; use 10000 or less")
    for name in ("batch_size", "minibatch_size", "num_iterations"):
        if getattr(args, name):
            raise ValueError(f"{name} is computed; use num_envs, num_steps, num_minibatches and total_timesteps")
    if not args.validation_loads or not args.training_loads:
        raise ValueError("no load is given; name one behind --validation-loads and --training-loads, or leave them out")


def command_line() -> Args:
    """The flags; behind --resume those of the run, and no others.

    Raises:
        ValueError: a flag contradicts the run that is to go on, or there is none.
    """
    args = tyro.cli(Args)
    if args.resume is None:
        return args
    path = Path(args.resume) / "args.json"
    try:
        stored = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()}
        run = Args(**stored | {"resume": args.resume})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; name the folder of a run, as in runs/<run_name>") from error
    if others := asdict(tyro.cli(Args, default=run)).items() - asdict(run).items():
        names = ", ".join(sorted(name for name, _ in others))
        raise ValueError(f"--resume goes on with the flags of the run; leave out {names}, or start a new run")
    return run


def main(args: Args) -> None:
    console = Console(stderr=True)
    resume = args.resume is not None
    if resume:
        folder, args = Path(args.resume), replace(args, resume=None)
    else:
        check(args)
        args.batch_size = args.num_envs * args.num_steps
        if args.num_minibatches < 1 or args.batch_size % args.num_minibatches:
            raise ValueError(
                f"num_minibatches is {args.num_minibatches}; use a divisor of num_envs * num_steps = {args.batch_size}"
            )
        args.minibatch_size = args.batch_size // args.num_minibatches
        args.num_iterations = max(1, args.total_timesteps // args.batch_size)
        folder = Path("runs") / f"{workload_name(args.workload)}__{args.exp_name}__{args.seed}__{int(time.time())}"
    trainer = Trainer(args, folder, console)
    if args.track:
        import wandb

        try:
            wandb.init(
                project=args.wandb_project_name, entity=args.wandb_entity, sync_tensorboard=True, config=asdict(args),
                name=folder.name, id=folder.name, resume="allow", save_code=True,
            )  # fmt: skip
        except wandb.Error as error:
            raise ValueError(f"--track: {error}; run wandb login, or set WANDB_MODE=offline") from error
    if resume:
        trainer.restore()
    else:
        trainer.start()
        write_json(folder / "args.json", asdict(args))
    reference = parse_rule(args.reference).title
    say = partial(console.print, markup=False, soft_wrap=True)  # commands to copy
    say(f"run: {folder}   reference rule: {reference}   best rule on validation: {trainer.best_rule}")
    writer = SummaryWriter(folder, purge_step=trainer.iteration * args.batch_size + 1 if resume else None)
    log_start(trainer, writer)
    finished = train(trainer, writer, console)
    if finished:
        writer.file_writer.add_summary(hparams({}, {})[2])
    writer.close()
    if args.track:
        log_end(trainer)
    Console().print(trainer.table())
    if trainer.stands_for:
        title = parse_rule(trainer.stands_for).title
        say(f"Nothing better than {title} on validation: policy.onnx stands for that rule.")
    if not finished:
        say(f"Interrupted. Go on with: python {Path(__file__).name} --resume {shlex.quote(str(folder))}")
    else:
        say(
            f"Compare on the test split: python benchmark.py compare --workload {shlex.quote(args.workload)} "
            f"--objective {args.objective} "
            f"--policies {' '.join(dict.fromkeys(('fifo', 'easy-fifo', trainer.best_rule)))} "
            f"{shlex.quote(str(folder / 'policy.onnx'))}"
        )


if __name__ == "__main__":
    try:
        main(command_line())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # how PyTorch says it on the CPU
            raise
        why = str(error).partition("\n")[0]
        print(f"error: out of memory ({why}); use fewer num_envs or num_steps", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # in training Ctrl-C saves the run and ends it
        sys.exit(130)
