"""Gymnasium, Stable-Baselines3 and sb3-contrib take the environment as it is; and what it costs in memory and time."""

import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from places import ROOT, SMALL

import scheduler_env
from workloads.jobs import Workload
from workloads.load import load_workload

ID = "ResourceRL/Scheduler-v0"
SHORT = {"num_jobs": 12, "warmup_jobs": 6, "followup_jobs": 6, "queue_window": 8}
DOCUMENTED = {
    "num_jobs": 20,
    "warmup_jobs": 10,
    "followup_jobs": 0,
    "queue_window": 8,
    "backfill": "none",
    "objective": "slowdown",
    "reward": "cost",
    "reference": "easy-fifo",
    "lock_in": True,
    "split": "test",
}


@pytest.fixture(scope="module")
def cloud() -> Workload:
    return load_workload("cloud", "test", runs=1, run_jobs=300)


@pytest.fixture(scope="module")
def small() -> str:
    return str(SMALL)


@pytest.mark.parametrize(
    "options",
    [{}, {"followup_jobs": 0}, {"lock_in": True}, {"reward": "cost", "backfill": "none", "objective": "wait"}],
    ids=str,
)
@pytest.mark.parametrize("render_mode", [None, "ansi", "rgb_array"])
def test_the_checker_of_gymnasium_has_nothing_to_say(cloud, options, render_mode, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # gymnasium's logger warns through `warnings`
        check_env(gym.make(ID, workload=cloud, render_mode=render_mode, **(SHORT | options)).unwrapped)
    assert "WARN" not in capfd.readouterr().err


def test_make_and_make_vec_take_the_documented_arguments(small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single = gym.make(ID, workload=small, **DOCUMENTED)
        many = gym.make_vec(ID, num_envs=3, workload=small, **DOCUMENTED)
    assert isinstance(many.unwrapped, scheduler_env.SchedulerVectorEnv) and many.num_envs == 3
    assert many.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert single.action_space.n == many.single_action_space.n == 8 * 1 + 1
    assert single.observation_space == many.single_observation_space
    assert many.observation_space.shape == (3, *single.observation_space.shape)
    obs, _ = many.reset(seed=4)
    assert np.array_equal(obs[0], single.reset(seed=4)[0])
    assert obs in many.observation_space
    assert many.unwrapped.workload.segments.tolist() == load_workload(small, "test").segments.tolist()


def test_every_documented_default_is_the_same_for_one_and_many():
    single, many = gym.make(ID).unwrapped.envs, gym.make_vec(ID, num_envs=1).unwrapped
    assert single._plan == many._plan and single.layout == many.layout
    assert (many.length, many.layout.window) == (256 + 512 + 512, 64)


@pytest.mark.parametrize(("followup_jobs", "reason"), [(6, "truncated"), (0, "terminated")])
def test_episodes_are_truncated_with_a_follow_up_and_terminate_without(cloud, followup_jobs, reason):
    env = gym.make(ID, workload=cloud, **(SHORT | {"followup_jobs": followup_jobs}))
    env.reset(seed=0)
    for _ in range(20):
        terminated = truncated = False
        while not (terminated or truncated):
            _, _, terminated, truncated, info = env.step(int(env.unwrapped.action_masks().argmax()))
        assert {"terminated": terminated, "truncated": truncated} == {
            "terminated": reason == "terminated",
            "truncated": reason == "truncated",
        }
        assert info["action_mask"].any() == truncated  # there would be something to decide, or there is nothing left
        env.reset()


def test_the_mask_is_in_three_places(cloud):
    env = gym.make(ID, workload=cloud, **SHORT)
    obs, info = env.reset(seed=0)
    for _ in range(40):
        in_obs = env.unwrapped.split(obs).mask == 1
        assert info["action_mask"].dtype == np.int8 and info["action_mask"].any()
        assert np.array_equal(in_obs, info["action_mask"]) and np.array_equal(in_obs, env.unwrapped.action_masks())
        obs, _, terminated, truncated, info = env.step(int(np.flatnonzero(info["action_mask"])[-1]))
        if terminated or truncated:
            obs, info = env.reset()


def test_gymnasiums_own_sampler_takes_the_masks(cloud):
    env = gym.make(ID, workload=cloud, **SHORT)
    _, info = env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(60):
        action = env.action_space.sample(info["action_mask"])
        assert info["action_mask"][action] == 1
        _, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            _, info = env.reset()
    for envs in (
        gym.make_vec(ID, num_envs=4, workload=cloud, **SHORT),
        gym.make_vec(ID, num_envs=4, vectorization_mode="sync", workload=cloud, **SHORT),
    ):
        _, infos = envs.reset(seed=0)
        envs.action_space.seed(0)
        for _ in range(60):
            actions = envs.action_space.sample(tuple(infos["action_mask"]))
            assert (infos["action_mask"][np.arange(4), actions] == 1).all()
            infos = envs.step(actions)[4]


def test_what_the_single_environment_returned_never_changes(cloud):
    env = gym.make(ID, workload=cloud, **SHORT)
    obs, info = env.reset(seed=0)
    obs_then, mask_then = obs.copy(), info["action_mask"].copy()
    for _ in range(5):
        env.step(int(env.unwrapped.action_masks().argmax()))
    assert np.array_equal(obs, obs_then) and np.array_equal(info["action_mask"], mask_then)


def test_record_episode_statistics_of_the_vector_environment(cloud):
    envs = gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec(ID, num_envs=4, workload=cloud, **SHORT))
    envs.reset(seed=0)
    returns, lengths, episodes = np.zeros(4), np.zeros(4, int), 0
    for _ in range(80):
        _, rewards, terminated, truncated, infos = envs.step(envs.unwrapped.action_masks().argmax(1))
        returns, lengths = returns + rewards, lengths + 1
        for e in np.flatnonzero(terminated | truncated):
            assert infos["episode"]["r"][e] == pytest.approx(returns[e], rel=1e-6, abs=1e-9)
            assert infos["episode"]["r"][e] == pytest.approx(infos["final_info"]["return"][e], rel=1e-6, abs=1e-9)
            assert infos["episode"]["l"][e] == lengths[e] == infos["final_info"]["decisions"][e]
            returns[e], lengths[e], episodes = 0, 0, episodes + 1
    assert episodes >= 8


def test_record_episode_statistics_of_the_single_environment(cloud):
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(ID, workload=cloud, **SHORT))
    env.reset(seed=0)
    rewards, over, info = [], False, {}
    while not over:
        _, reward, terminated, truncated, info = env.step(int(env.unwrapped.action_masks().argmax()))
        rewards.append(reward)
        over = terminated or truncated
    assert info["episode"]["r"] == pytest.approx(sum(rewards), rel=1e-6, abs=1e-9)
    assert info["episode"]["l"] == len(rewards) == info["decisions"]


def test_gymnasiums_own_vector_environments_take_the_single_one(cloud):
    envs = gym.make_vec(ID, num_envs=2, vectorization_mode="sync", workload=cloud, **SHORT)
    obs, _ = envs.reset(seed=7)
    native, _ = gym.make_vec(ID, num_envs=2, workload=cloud, **SHORT).reset(seed=7)
    assert np.array_equal(obs, native)


def test_stable_baselines3_ppo_learns(cloud):
    ppo = pytest.importorskip("stable_baselines3").PPO
    env = gym.make(ID, workload=cloud, **SHORT)
    model = ppo("MlpPolicy", env, n_steps=64, batch_size=32, n_epochs=1, seed=0, device="cpu").learn(256)
    assert model.num_timesteps == 256
    assert len(model.ep_info_buffer) >= 2 and all(np.isfinite(e["r"]) for e in model.ep_info_buffer)
    assert env.action_space.contains(model.predict(env.reset(seed=1)[0])[0])


def test_sb3_contrib_maskable_ppo_learns_and_takes_legal_actions_only(cloud):
    maskable_ppo = pytest.importorskip("sb3_contrib").MaskablePPO
    env = gym.make(ID, workload=cloud, **SHORT)
    model = maskable_ppo("MlpPolicy", env, n_steps=64, batch_size=32, n_epochs=1, seed=0, device="cpu").learn(256)
    assert model.num_timesteps == 256
    masks = model.rollout_buffer.action_masks.reshape(64, -1).astype(bool)
    actions = model.rollout_buffer.actions.reshape(64).astype(int)
    assert masks[np.arange(64), actions].all()
    obs, info = env.reset(seed=1)
    for _ in range(30):
        action, _ = model.predict(obs, action_masks=info["action_mask"])
        assert info["action_mask"][action]
        obs, _, terminated, truncated, info = env.step(int(action))
        if terminated or truncated:
            obs, info = env.reset()


# --- cost -------------------------------------------------------------------------------------------------------------


def in_a_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_256_environments_of_1024_jobs_take_less_than_500_megabytes():
    """All that the process holds at its peak, above what it held with the module and one small environment."""
    code = """
import numpy as np, scheduler_env
from workloads import load_workload
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
workload = load_workload("cloud", runs=2, run_jobs=3000)
def run(num_envs, jobs):
    envs = scheduler_env.SchedulerVectorEnv(num_envs, workload, num_jobs=jobs, warmup_jobs=0, followup_jobs=0)
    envs.reset(seed=0)
    for _ in range(20):
        envs.step(envs.action_masks().argmax(1))
run(1, 8)
before = peak()
run(256, 1024)
print(peak() - before)
"""
    assert 10 < float(in_a_new_process(code)) < 500


def test_import_takes_little_longer_than_that_of_its_libraries():
    """Processor time, the least of three, whatever the machine's speed today."""
    code = "import time, numpy, numba, gymnasium; before = time.process_time(); import scheduler_env; "
    code += "print((time.process_time() - before) / before)"
    assert min(float(in_a_new_process(code)) for _ in range(3)) < 0.5


def test_import_does_not_bring_a_learning_framework_along():
    code = "import scheduler_env, sys; print({'torch', 'matplotlib', 'pandas', 'stable_baselines3'} & set(sys.modules))"
    assert in_a_new_process(code).strip() == "set()"
