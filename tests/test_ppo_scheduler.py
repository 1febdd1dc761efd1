"""PPO: its parts against brute force, and the script as a user runs it."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import tyro
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import dqn_scheduler
import ppo_scheduler
from policies import load_policy
from ppo_scheduler import Agent, Args, Trainer, gae, log_prob_and_entropy, rollout, sample, some_runs
from scheduler_env import SchedulerVectorEnv
from simulator.kernels import EASY
from simulator.observation import Layout
from simulator.replay import simulate
from simulator.rules import parse_rule
from workloads.load import load_workload

ROOT = Path(ppo_scheduler.__file__).parent
SMALL = ("--workload", str(ROOT / "tests/data/small.swf"), "--objective", "wait", "--reference", "easy-sjf")
SMALL += ("--num-envs", "8", "--num-steps", "32", "--num-minibatches", "2", "--num-evaluations", "2")
SMALL += ("--num-jobs", "64", "--warmup-jobs", "32", "--followup-jobs", "64", "--episodes-in-a-row", "2")
SMALL += ("--total-timesteps", "2048")


def script(folder: Path, *flags: str, **kwargs) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "ppo_scheduler.py"), *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, **kwargs)


def run_folder(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def scalars(run: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(run))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that was not interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    result = script(folder, *SMALL)
    assert result.returncode == 0, result.stderr
    assert "easy-sjf" in result.stdout and "fifo" in result.stdout  # the closing table
    return run_folder(folder)


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
    logits = torch.tensor([[0.0, ppo_scheduler.NEVER, 1.0, 2.0]]).expand(100_000, 4)
    counts = torch.bincount(sample(logits), minlength=4)
    assert counts[1] == 0
    np.testing.assert_allclose(counts / 1e5, logits[0].softmax(0), atol=0.005)
    log_probs, entropy = log_prob_and_entropy(logits[:1], torch.tensor([2]))
    expected = torch.distributions.Categorical(logits=torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(log_probs[0], expected.log_prob(torch.tensor(1)))
    torch.testing.assert_close(entropy[0], expected.entropy())


def test_the_mask_is_never_violated() -> None:
    """In 10^5 decisions of an untrained agent, whose preferences are not yet the rule's."""
    torch.manual_seed(0)
    args = Args(reward="cost")
    envs = SchedulerVectorEnv(
        256, "cloud", num_jobs=64, warmup_jobs=16, followup_jobs=16, reward="cost", queue_window=16
    )
    envs.reset(seed=0)
    agent = Agent(envs.layout.resources, rule_bonus=0.0)
    batch = ppo_scheduler.Batch.empty(100, 256, envs.layout.size, torch.device("cpu"))
    for _ in range(4):
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
    ours, theirs = (SchedulerVectorEnv(2, "hpc", **episode) for _ in range(2))
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
    envs = SchedulerVectorEnv(clusters, "hpc", num_jobs=64, warmup_jobs=64, followup_jobs=16)
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
    envs = SchedulerVectorEnv(8, "hpc", num_jobs=64, warmup_jobs=64, followup_jobs=16)
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
    envs = SchedulerVectorEnv(16, "cloud", num_jobs=64, warmup_jobs=64, followup_jobs=16, queue_window=32)
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


def test_whole_runs_are_validated_evenly_spread() -> None:
    runs = np.stack([np.arange(24) * 5000, np.arange(1, 25) * 5000], axis=1)
    some = some_runs(runs, 65_000, 3)
    assert len(some) == 13 and (np.diff(some) == 5000).all() and {tuple(run) for run in some} <= {*map(tuple, runs)}
    assert set(np.diff(some[:, 0])) == {5000, 10_000} and some[-1, 1] == runs[-1, 1]
    assert some_runs(runs, 10**9, 3).tolist() == runs.tolist()
    assert some_runs(runs[:3], 12_000, 3).tolist() == [[0, 4000], [5000, 9000], [10_000, 14_000]]  # a long trace


def test_run_writes_what_it_says(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} >= {"args.json", "checkpoint.pt", "policy.onnx"}
    assert json.loads((finished / "args.json").read_text())["num_iterations"] == 8
    for tag in ("charts/SPS", "charts/episodic_return", "charts/wait", "losses/explained_variance", "losses/approx_kl"):
        assert scalars(finished, tag), tag
    assert set(scalars(finished, "eval/cost")) == {0, 1024, 2048}
    rates = scalars(finished, "charts/learning_rate")
    assert rates == {256 * (k + 1): pytest.approx(1e-3 * (1 - k / 8)) for k in range(8)}
    assert set(scalars(finished, "losses/policy_loss")) == set(rates)


def test_exported_policy_equals_the_agent(finished: Path) -> None:
    state = torch.load(finished / "checkpoint.pt", weights_only=False)
    agent = Agent(1)
    agent.load_state_dict(state["model"])
    path = finished / "again.onnx"
    ppo_scheduler.export_onnx(agent, path, Layout(64, 1, 1), {"version": 1})
    session = onnxruntime.InferenceSession(path)
    for window, nodes in ((64, 1), (128, 1), (5, 3)):  # other windows and other numbers of nodes than in training
        layout = Layout(window, nodes, 1)
        obs = torch.rand(7, layout.size, generator=torch.Generator().manual_seed(0))
        parts = layout.split(obs)
        parts.jobs[:, window // 2 :] = 0
        parts.mask[:] = (parts.mask > 0.5).float()
        expected = agent(*parts)[0].detach().numpy()
        (logits,) = session.run(None, {name: value.numpy() for name, value in parts._asdict().items()})
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_policy_file_schedules_the_test_split(finished: Path) -> None:
    workload = load_workload(str(ROOT / "tests/data/small.swf"), "test")
    (schedule,) = load_policy(str(finished / "policy.onnx")).schedule(workload)
    (fifo,) = simulate(workload, "fifo")
    assert np.isfinite(schedule.start_time).all()
    assert schedule.wait.mean() < 0.75 * fifo.wait.mean()


def test_resumed_run_equals_an_uninterrupted_one(finished: Path, tmp_path: Path) -> None:
    """Ctrl-C after the first checkpoint; then --resume: the same losses to the last bit, the same model."""
    command = [sys.executable, str(ROOT / "ppo_scheduler.py"), *SMALL]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and not list(tmp_path.glob("runs/*/checkpoint.pt")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    run = run_folder(tmp_path)
    state = torch.load(run / "checkpoint.pt", weights_only=False)
    assert state["iteration"] < 8, "the run ended before it was interrupted"
    assert "--resume" in errors and "Stopping" in errors
    result = script(tmp_path, "--resume", str(run), "--objective", "wait")  # which is the run's own
    assert result.returncode == 0, result.stderr
    for tag in ("losses/policy_loss", "losses/value_loss", "losses/entropy", "charts/episodic_return", "eval/cost"):
        assert scalars(run, tag) == scalars(finished, tag), tag
    resumed, whole = (torch.load(r / "checkpoint.pt", weights_only=False)["average"] for r in (run, finished))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def trainer_of(algorithm: ModuleType, folder: Path, *flags: str) -> Any:
    args = tyro.cli(algorithm.Args, args=["--workload", SMALL[1], "--reference", "fifo", "--num-jobs", "30", *flags])
    return algorithm.Trainer(args, folder, Console())


BOTH = pytest.mark.parametrize("algorithm", [ppo_scheduler, dqn_scheduler])


@BOTH
def test_a_gain_bought_with_starvation_does_not_count(tmp_path: Path, algorithm: ModuleType) -> None:
    trainer = trainer_of(algorithm, tmp_path)
    base = trainer.rules["easy-fifo"]
    for p99, longest, fine in ((1.19, 3.59, True), (1.21, 1.0, False), (1.0, 3.61, False)):
        found = base._replace(cost=0.0, wait_p99=p99 * base.wait_p99, wait_max=longest * base.wait_max)
        assert trainer.acceptable(found) == fine


@BOTH
def test_a_robust_rule_is_good_in_mean_and_in_square_on_training_too(tmp_path: Path, algorithm: ModuleType) -> None:
    trainer = trainer_of(algorithm, tmp_path)

    def judgement(cost: float, rms: float) -> object:
        return algorithm.Judgement(cost, 0.0, 0.0, rms)

    trainer.rules = {"mean": judgement(10, 100), "validation": judgement(20, 20), "both": judgement(21, 20)}
    training = {"mean": judgement(10, 10), "validation": judgement(20, 30), "both": judgement(20, 10)}
    trainer.judge_rule = lambda name, *_: training[name]
    assert trainer.robust_rule(load_workload(SMALL[1]), list(training)) == "both"


@BOTH
def test_what_is_validated_is_the_moving_average(tmp_path: Path, algorithm: ModuleType) -> None:
    trainer = trainer_of(algorithm, tmp_path / "run")
    trainer.start()
    with torch.no_grad():
        for ours, theirs in zip(trainer.agent.parameters(), trainer.average.module.parameters(), strict=True):
            ours += torch.randn_like(ours)
            theirs -= 0.1 * torch.randn_like(theirs)
    trainer.propose()
    trainer.proposed[1].result()
    parts = trainer.layout.split(torch.from_numpy(trainer.envs.observations))
    session = onnxruntime.InferenceSession(tmp_path / "run" / "candidate.onnx")
    (found,) = session.run(None, {name: value.numpy() for name, value in parts._asdict().items()})
    expected = trainer.average.module.logits(*parts)
    if algorithm is dqn_scheduler:
        expected = dqn_scheduler.preferring(expected, *parts[:3], trainer.args.margin)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


@BOTH
def test_a_checkpoint_takes_its_policy_with_it(tmp_path: Path, algorithm: ModuleType) -> None:
    trainer = trainer_of(algorithm, tmp_path / "run")
    trainer.start()
    policy = (tmp_path / "run" / "policy.onnx").read_bytes()
    trainer.checkpoint()
    (tmp_path / "run" / "policy.onnx").write_bytes(b"a later one, after which the run was killed")
    trainer.restore()
    assert (tmp_path / "run" / "policy.onnx").read_bytes() == policy


@BOTH
def test_a_network_that_is_changed_in_one_of_its_two_forms_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: ModuleType
) -> None:
    usual = algorithm.Agent.logits
    monkeypatch.setattr(algorithm.Agent, "logits", lambda self, *parts: 1.1 * usual(self, *parts))
    with pytest.raises(ValueError, match="change both"):
        trainer_of(algorithm, tmp_path / "run").start()
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_killed_before_a_validation_does_not_lose_it(tmp_path: Path) -> None:
    """kill -9 right after the checkpoint that is written while one is due."""
    code = (
        "import os, tyro, ppo_scheduler as ppo\n"
        "write, ppo.CHECKPOINT_SECONDS = ppo.Trainer.checkpoint, 0.0\n"
        "def write_and_die(trainer): write(trainer); trainer.iteration == 4 and os._exit(9)\n"
        "ppo.Trainer.checkpoint = write_and_die\n"
        "ppo.main(tyro.cli(ppo.Args))\n"
    )
    flags = (*SMALL, "--num-evaluations", "8")  # after each iteration, so that the one before is judged just then
    killed = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300
    )
    assert killed.returncode == 9
    run = run_folder(tmp_path)
    assert torch.load(run / "checkpoint.pt", weights_only=False)["judged"] == 3
    assert script(tmp_path, "--resume", str(run)).returncode == 0
    events = EventAccumulator(str(run))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/cost")] == list(range(0, 2049, 256))


@BOTH
def test_the_flags_of_an_episode_reach_the_clusters(tmp_path: Path, algorithm: ModuleType) -> None:
    episode = dict(num_envs=3, num_jobs=30, warmup_jobs=20, episodes_in_a_row=5)
    flags = [str(part) for name, value in episode.items() for part in (f"--{name.replace('_', '-')}", value)]
    flags += ["--followup-jobs", "10", "--queue-window", "9", "--training-loads", "1.0", "2.0"]
    envs = trainer_of(algorithm, tmp_path, *flags).envs
    usual, busy = (np.ptp(envs.workload.jobs.submit_time[slice(*segment)]) for segment in envs.workload.segments)
    assert busy == pytest.approx(usual / 2)
    assert {name: getattr(envs, name) for name in episode} == episode
    assert envs.length == 60 and envs.layout.window == 9


def test_a_run_with_lock_in_trains(tmp_path: Path) -> None:
    result = script(tmp_path, *SMALL, "--lock-in", "--total-timesteps", "512", "--num-evaluations", "1")
    assert result.returncode == 0, result.stderr
    assert load_policy(str(run_folder(tmp_path) / "policy.onnx")).metadata.lock_in
    assert len(scalars(run_folder(tmp_path), "losses/policy_loss")) == 2


@pytest.mark.parametrize("flags", [("--lock-in",), ("--lock-in", "--backfill", "none"), ("--backfill", "none")])
def test_rules_and_pictures_follow_the_semantics_of_the_run(tmp_path: Path, flags: tuple[str, ...]) -> None:
    args = tyro.cli(Args, args=[*SMALL, "--validation-jobs", "600", "--reference", "auto", *flags])
    trainer = Trainer(args, tmp_path, Console())
    first = trainer.segments[:1]
    [expected] = simulate(trainer.validation, trainer.best_rule, first, backfill=args.backfill, lock_in=args.lock_in)
    assert np.array_equal(trainer.example.start_time, expected.start_time)
    if not args.lock_in:  # the agent may not backfill: neither do the rule it starts from, nor the one to stand for
        assert {parse_rule(name).mode != EASY for name in (trainer.best_rule, args.reference)} == {True}
        assert trainer.stands_for is not None and parse_rule(trainer.stands_for).mode != EASY


def test_a_run_learns_from_the_tail_and_is_judged_by_its_objective(tmp_path: Path) -> None:
    result = script(tmp_path, *SMALL, "--learn-from", "tail", "--reference", "auto")
    assert result.returncode == 0, result.stderr
    run = run_folder(tmp_path)
    assert load_policy(str(run)).metadata.objective == "wait"
    costs, waits = scalars(run, "eval/cost"), scalars(run, "eval/wait")
    assert all(0.5 < costs[step] / waits[step] < 2 for step in waits)  # seconds, not their squares


@pytest.mark.parametrize(
    ("flags", "reference"),
    [
        (("--reference", "easy-saf"), r"easy-saf@[\d.e+]+"),
        (("--reference", "easy-saf", "--patience", "0"), "easy-saf"),
        (("--reference", "easy-saf@5"), "easy-saf@5"),
        (("--workload", "cloud", "--reference", "tetris"), "tetris"),
        (("--reference", "tuned", "--tune-generations", "1"), r"tuned:[-\d.,e]*"),
    ],
)
def test_the_reference_has_a_patience_and_keeps_it_when_resumed(tmp_path: Path, flags, reference: str) -> None:
    args = tyro.cli(Args, args=[*SMALL, "--validation-jobs", "600", *flags])
    chosen = Trainer(args, tmp_path, Console()).args.reference
    assert re.fullmatch(reference, chosen)
    assert Trainer(args, tmp_path, Console()).args.reference == chosen


def test_kill_leaves_a_whole_checkpoint(finished: Path, tmp_path: Path) -> None:
    """kill -9 at many instants of a loop that does nothing but write checkpoints."""
    code = (
        "import torch, sys; from pathlib import Path; from workloads import replacing\n"
        "k = 0\n"
        "while True:\n"
        "    k += 1\n"
        "    with replacing(Path(sys.argv[1])) as path: torch.save({'k': k, 'x': torch.full((100_000,), k)}, path)\n"
        "    print(k, flush=True)\n"
    )
    path = tmp_path / "checkpoint.pt"
    rng = np.random.default_rng(0)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
        state = torch.load(path)
        assert (state["x"] == state["k"]).all()


def test_bad_input_ends_with_one_line(finished: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "args.json").write_bytes((finished / "args.json").read_bytes())
    whole = (finished / "checkpoint.pt").read_bytes()
    (damaged / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    for flags, words in (
        (("--resume", str(damaged)), ("checkpoint.pt", "start a new run")),
        (("--resume", "nowhere"), ("args.json", "folder of a run")),
        (("--resume", str(finished), "--total-timesteps", "4096"), ("--resume", "leave out total_timesteps")),
        (("--resume", str(finished), "--total-timesteps", "1500000"), ("--resume", "leave out total_timesteps")),
        ((*SMALL, "--batch-size", "64"), ("batch_size is computed",)),
        ((*SMALL, "--max-tail", "nan"), ("max_tail is nan",)),
        ((*SMALL, "--queue-window", "20000"), ("queue_window is 20000",)),
        (("--workload", "nowhere.swf"), ("nowhere.swf", "presets")),
        ((*SMALL, "--queue-window", "0"), ("queue_window", "at least 1")),
        ((*SMALL, "--reference", "alphabetical"), ("alphabetical", "easy-")),
        ((*SMALL, "--num-jobs", "100000"), ("lower num_jobs",)),
        ((*SMALL, "--num-minibatches", "1000"), ("num_minibatches", "divisor")),
        ((*SMALL, "--num-minibatches", "3"), ("num_minibatches", "divisor")),
        ((*SMALL, "--num-envs", "0"), ("num_envs is 0",)),
        ((*SMALL, "--max-tail", "0.5"), ("max_tail is 0.5",)),
        ((*SMALL, "--update-epochs", "0"), ("update_epochs is 0; use 1",)),
        ((*SMALL, "--seed", "-1"), ("seed is -1; use 0",)),
        ((*SMALL, "--num-envs", "1", "--num-steps", "1"), ("num_envs * num_steps is 1",)),
        ((*SMALL, "--backfill", "none", "--reference", "easy-saf"), ("easy-saf backfills", "without easy-")),
        ((*SMALL, "--backfill", "none", "--reference", "tuned"), ("tuned backfills", "without easy-")),
        ((*SMALL, "--validation-loads"), ("no load is given",)),
    ):
        result = script(tmp_path, *flags)
        assert result.returncode == 2, result.stderr
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and all(word in last for word in words), last
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("name", "flag"), [("ppo", "num-steps"), ("dqn", "buffer-steps")])
def test_too_little_memory_ends_with_one_line(tmp_path: Path, name: str, flag: str) -> None:
    """More than any address space has, where rewards and observations of that many decisions are to be kept."""
    flags = ("--workload", SMALL[1], "--num-jobs", "64", "--reference", "easy-sjf", f"--{flag}", str(10**11))
    command = [sys.executable, str(ROOT / f"{name}_scheduler.py"), *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and last.startswith("error: out of memory (") and flag.replace("-", "_") in last
    assert "Traceback" not in result.stderr


@BOTH
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, algorithm: ModuleType) -> None:
    """The disk is full (what it is written to before it takes the old one's place is /dev/full)."""
    trainer = trainer_of(algorithm, tmp_path / "run", "--num-envs", "2", "--num-steps", "2")
    trainer.start()
    trainer.checkpoint()
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    (tmp_path / f"run/.checkpoint.pt.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"checkpoint.pt cannot be written; make room"):
        trainer.checkpoint()
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == []


def test_tensorboard_shows_the_run_and_not_only_its_curves(finished: Path) -> None:
    events = EventAccumulator(str(finished), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    content = {name: HParamsPluginData.FromString(c) for name, c in events.PluginTagToContent("hparams").items()}
    values = content["_hparams_/session_start_info"].session_start_info.hparams
    assert values["learning_rate"].number_value == 1e-3 and values["objective"].string_value == "wait"
    assert set(values) == {field.name for field in fields(Args)}
    metrics = {m.name.tag for m in content["_hparams_/experiment"].experiment.metric_infos}
    assert "eval/best_improvement" in metrics and metrics <= set(tags["scalars"])
    assert content["_hparams_/session_end_info"].session_end_info.status == 1  # success
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charted = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    assert len(charted) > 10 and charted <= set(tags["scalars"])
    assert (
        "|learning_rate|0.001|" in events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    )
    assert len(tags["images"]) == 2 and [image.step for image in events.Images("gantt/policy")] == [0, 1024, 2048]
    for tag in tags["images"]:
        picture = np.asarray(Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string)))
        assert picture.shape == (256, 640, 3) and len(np.unique(picture.reshape(-1, 3), axis=0)) > 5
    best = scalars(finished, "eval/best_improvement")
    raw = scalars(finished, "eval/improvement")
    assert all(best[step] >= raw[step] or step not in best for step in raw) and sorted(best.values()) == [
        *best.values()
    ]


def records(path: Path) -> list[Any]:
    """What an offline run's .wandb file holds: LevelDB's log format after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, found, part, place = path.read_bytes(), [], b"", 7
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block is padding
            place += 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return found


def test_tracking_with_no_way_to_log_in_is_one_line_and_writes_no_run(tmp_path: Path) -> None:
    alone = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_A")}
    result = script(tmp_path, *SMALL, "--track", env=alone | {"HOME": str(tmp_path), "WANDB_MODE": "online"})
    assert result.returncode == 2 and not list(tmp_path.glob("runs/*/*"))
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: --track: ") and last.endswith("run wandb login, or set WANDB_MODE=offline")


def test_tracking_works_without_an_account(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    result = script(
        tmp_path, *SMALL, "--track", "--total-timesteps", "512", env={**os.environ, "WANDB_MODE": "offline"}
    )
    assert result.returncode == 0, result.stderr
    run = run_folder(tmp_path)
    (offline,) = tmp_path.glob("wandb/offline-run-*")
    kept = records(next(offline.glob("*.wandb")))
    assert {item.key for r in kept for item in r.run.config.update} >= {field.name for field in fields(Args)}
    logged = {item.nested_key[0] if item.nested_key else item.key for r in kept for item in r.history.item}
    events = EventAccumulator(str(run))
    events.Reload()
    assert logged >= {*events.Tags()["scalars"], *events.Tags()["images"], "validation"}
    assert len(list(offline.glob("files/media/images/*.png"))) == 4  # the rule, and the policy three times
    (table,) = offline.glob("files/media/table/*.json")
    columns, rows = (json.loads(table.read_text())[key] for key in ("columns", "data"))
    assert columns[:3] == ["policy", "wait", "to FIFO"] and {"PPO", "fifo"} < {row[0].split(",")[0] for row in rows}
    (artifact,) = (r.artifact for r in kept if r.WhichOneof("record_type") == "artifact" and r.artifact.type == "model")
    metadata = json.loads(artifact.metadata)
    assert metadata == asdict(load_policy(str(run / "policy.onnx")).metadata)
    assert [entry.path for entry in artifact.manifest.contents] == ["policy.onnx"]
