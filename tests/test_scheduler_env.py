"""The environment: what an agent may do, sees and gets, against slow plain Python and against the simulator."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    Chooser,
    Episode,
    SlowCluster,
    again,
    at_random,
    environment,
    job_costs,
    like_the_rule,
    make_workload,
    play,
    simulate_one,
    within,
    workloads,
)

from scheduler_env import SchedulerEnv, SchedulerVectorEnv
from simulator.kernels import CLUSTER_FEATURES, EASY, JOB_FEATURES, NODE_FEATURES
from simulator.rules import RULES, parse_rule
from simulator.schedule import OBJECTIVES, Schedule
from workloads.jobs import Workload
from workloads.load import load_workload

BACKFILLS, SEEDS = st.sampled_from(["none", "easy"]), st.integers(0, 1000)
JOB = {name: column for column, name in enumerate(JOB_FEATURES)}
NODE = {name: column for column, name in enumerate(NODE_FEATURES)}
CLUSTER = {name: column for column, name in enumerate(CLUSTER_FEATURES)}


@pytest.fixture(scope="module")
def cloud() -> Workload:
    return load_workload("cloud", "train", runs=2, run_jobs=400)


# --- decisions --------------------------------------------------------------------------------------------------------


def follow(env: SchedulerEnv, slow: SlowCluster, choose: Chooser) -> tuple[Episode, list[tuple[float, float]]]:
    """Play an episode and let the slow cluster do the same; the two must agree before every decision.

    Returns, with the episode, the shadow time of a standing reservation after each action, and what it was when made.
    """
    actions, shadows = [], []

    def watch(observation: np.ndarray) -> None:
        if actions:
            before = slow.reservation
            slow.step(actions[-1])
            if slow.reservation is not None and slow.reservation is before:
                shadows.append((slow.shadow(before.job, before.node)[0], before.shadow))
        assert env.split(observation).mask.astype(bool).tolist() == slow.mask().tolist()

    def choose_and_note(env: SchedulerEnv, mask: np.ndarray) -> int:
        actions.append(choose(env, mask))
        return actions[-1]

    episode = play(env, choose_and_note, watch)
    slow.step(actions[-1])
    return episode, shadows


@given(workload=workloads(max_jobs=25), backfill=BACKFILLS, window=st.sampled_from([1, 3, 25]), seed=SEEDS)
@settings(max_examples=120)
def test_random_actions_do_what_slow_python_does(workload, backfill, window, seed):
    """Legal actions at every decision, where time stops, start times and nodes; every job starts exactly once."""
    env = environment(workload, backfill=backfill, queue_window=window)
    slow = SlowCluster(workload, window, backfill)
    slow.settle()
    episode, _ = follow(env, slow, at_random(seed))
    assert episode.schedule.start_time.tolist() == slow.start.tolist()
    assert episode.schedule.node.tolist() == slow.node.tolist()
    assert sorted(slow.order) == list(range(len(workload.jobs)))
    assert (episode.terminated, episode.truncated) == (True, False)


@given(workload=workloads(max_jobs=25), seconds=st.sampled_from([0.0, 3.0, 20.0]), seed=SEEDS)
@settings(max_examples=80)
def test_who_has_waited_for_too_long_is_the_only_choice_for_the_head(workload, seconds, seed):
    env = environment(workload, reference=f"easy-sjf@{seconds / 3600!r}")
    slow = SlowCluster(workload, len(workload.jobs), patience=seconds / 3600 * 3600)
    slow.settle()
    episode, _ = follow(env, slow, at_random(seed))
    assert episode.schedule.start_time.tolist() == slow.start.tolist()


@given(workload=workloads(min_jobs=10, max_jobs=25), window=st.sampled_from([1, 2, 3]), seed=SEEDS)
@settings(max_examples=80)
def test_who_has_waited_for_too_long_is_seen_in_the_smallest_window(workload, window, seed):
    """So there is always something that is allowed (choosing at random from nothing would raise)."""
    env = environment(workload, reference="easy-sjf@0.001", queue_window=window)
    assert play(env, at_random(seed)).terminated


@given(workload=workloads(max_jobs=25, estimates="exact"), seed=SEEDS)
@settings(max_examples=120)
def test_what_an_agent_backfills_never_delays_its_reservation(workload, seed):
    env = environment(workload)
    slow = SlowCluster(workload, len(workload.jobs))
    slow.settle()
    _, shadows = follow(env, slow, at_random(seed))
    assert all(after <= promised for after, promised in shadows)


@given(workload=workloads(min_jobs=12, max_jobs=25), seed=SEEDS, backfill=BACKFILLS)
def test_the_agent_takes_over_a_busy_cluster_and_hands_it_back(workload, seed, backfill):
    """Warm-up by the reference, decisions until the last of the agent's jobs has arrived, then the reference again."""
    env = environment(workload, warmup_jobs=5, followup_jobs=4, reference="easy-saf", backfill=backfill)
    slow = SlowCluster(workload, len(workload.jobs), backfill)
    slow.warm_up(simulate_one(workload, "easy-saf"), 5)
    episode, _ = follow(env, slow, at_random(seed))
    own = len(workload.jobs) - 4
    assert slow.arrived > own
    assert (episode.terminated, episode.truncated) == (False, True)
    started = slow.order
    assert episode.schedule.start_time[started].tolist() == slow.start[started].tolist()
    assert len(slow.order) == len(set(slow.order))
    later = np.setdiff1d(np.arange(len(workload.jobs)), started)
    assert (episode.schedule.start_time[later] >= slow.now).all()
    assert episode.info["wait"] == pytest.approx(episode.schedule.wait[5:own].mean(), rel=1e-12)


@pytest.mark.parametrize("rule", [*RULES, "easy-sjf@0.001", "greedy-wfp3@0.005", "saf@0.001"])
@given(workload=workloads(), objective=st.sampled_from(list(OBJECTIVES)))
@settings(max_examples=6)
def test_following_the_rule_is_the_rule_and_earns_exactly_nothing(rule, workload, objective):
    env = environment(workload, reference=rule, objective=objective)
    episode = play(env, like_the_rule)
    expected = simulate_one(workload, rule)
    assert episode.schedule.start_time.tolist() == expected.start_time.tolist()
    assert episode.schedule.node.tolist() == expected.node.tolist()
    assert set(episode.rewards) == {0.0}


@pytest.mark.parametrize("rule", [rule for rule in RULES if parse_rule(rule).mode != EASY])
@given(workload=workloads())
@settings(max_examples=4)
def test_without_backfilling_the_rules_that_use_none_earn_exactly_nothing(rule, workload):
    episode = play(environment(workload, reference=rule, backfill="none"), like_the_rule)
    assert episode.schedule.start_time.tolist() == simulate_one(workload, rule).start_time.tolist()
    assert set(episode.rewards) == {0.0}


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "tetris"])  # which has no order of jobs
@given(workload=workloads(max_jobs=30), backfill=BACKFILLS)
@settings(max_examples=6)
def test_lock_in_follows_the_rule(rule, workload, backfill):
    episode = play(environment(workload, reference=rule, lock_in=True, backfill=backfill), like_the_rule)
    expected = simulate_one(workload, rule, lock_in=True, backfill=backfill)
    assert episode.schedule.start_time.tolist() == expected.start_time.tolist()
    assert set(episode.rewards) == {0.0}


@given(workload=workloads(max_jobs=25), seed=SEEDS, backfill=BACKFILLS)
def test_lock_in_under_random_actions_is_possible_and_pays_what_it_gains(workload, seed, backfill):
    env = environment(workload, lock_in=True, backfill=backfill, reference="fifo")
    episode = play(env, at_random(seed))
    assert np.isfinite(episode.schedule.start_time).all()
    reference = simulate_one(workload, "fifo", lock_in=True, backfill=backfill)
    check_gain(episode, reference, "latency")


# --- rewards ----------------------------------------------------------------------------------------------------------


def check_gain(episode: Episode, reference: Schedule, objective: str) -> None:
    """The sum of the rewards is (C_ref - C_policy) / C_ref, from the two schedules alone."""
    cost, mine = (job_costs(schedule, objective).sum() for schedule in (reference, episode.schedule))
    base = cost if cost > 0 else len(reference.jobs)
    assert sum(episode.rewards) == pytest.approx((cost - mine) / base, rel=1e-9, abs=1e-9)
    assert episode.info["return"] == pytest.approx(sum(episode.rewards), rel=1e-12, abs=1e-12)


@given(
    workload=workloads(min_jobs=8),
    seed=SEEDS,
    rule=st.sampled_from(RULES),
    objective=st.sampled_from(list(OBJECTIVES)),
    backfill=BACKFILLS,
    followup_jobs=st.sampled_from([0, 3]),
    queue_window=st.sampled_from([2, 40]),
)
@settings(max_examples=200)
def test_the_return_is_the_relative_gain_over_the_rule(
    workload, seed, rule, objective, backfill, followup_jobs, queue_window
):
    options = dict(objective=objective, backfill=backfill, followup_jobs=followup_jobs, queue_window=queue_window)
    episode = play(environment(workload, reference=rule, **options), at_random(seed))
    check_gain(episode, simulate_one(workload, rule), objective)


@given(workload=workloads(min_jobs=12, estimates="over"), seed=SEEDS, objective=st.sampled_from(list(OBJECTIVES)))
@settings(max_examples=100)
def test_after_a_warm_up_the_gain_is_relative_to_the_cost_still_to_come(workload, seed, objective):
    """C_ref counts what the jobs cost that have not started at the take-over, less what had accrued by then."""
    env = environment(workload, warmup_jobs=6, objective=objective, reference="easy-sjf")
    reference = simulate_one(workload, "easy-sjf")
    episode = play(env, at_random(seed))
    slow = SlowCluster(workload, len(workload.jobs))
    slow.warm_up(reference, 6)
    wait, run = slow.now - workload.jobs.submit_time[slow.queue], workload.jobs.run_time[slow.queue]
    slowdown = np.maximum(0, (wait + run) / np.maximum(run, 10) - 1)
    accrued = {"slowdown": slowdown, "tail": wait**2}.get(objective, wait)
    counted = np.setdiff1d(np.arange(len(workload.jobs)), slow.order)
    cost, mine = job_costs(reference, objective), job_costs(episode.schedule, objective)
    base = cost[counted].sum() - accrued.sum()
    expected = (cost.sum() - mine.sum()) / (base if base > 1e-9 else len(counted))
    assert sum(episode.rewards) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("rule", RULES)
@given(
    workload=workloads(min_jobs=10, max_jobs=60),
    seed=SEEDS,
    objective=st.sampled_from(list(OBJECTIVES)),
    backfill=BACKFILLS,
    queue_window=st.sampled_from([1, 3, 60]),
    warmup_jobs=st.sampled_from([0, 4]),
    followup_jobs=st.sampled_from([0, 3]),
)
@settings(max_examples=8)
def test_roll_outs_stopped_early_give_the_rewards_of_full_ones(rule, workload, seed, **options):
    early = play(environment(workload, reference=rule, **options), at_random(seed))
    full = play(environment(workload, reference=rule, full_rollouts=True, **options), at_random(seed))
    assert early.actions == full.actions
    assert np.allclose(early.rewards, full.rewards, rtol=0, atol=1e-12)
    assert early.schedule.start_time.tolist() == full.schedule.start_time.tolist()


@given(
    workload=workloads(min_jobs=4),
    seed=SEEDS,
    objective=st.sampled_from(list(OBJECTIVES)),
    backfill=BACKFILLS,
    lock_in=st.booleans(),
    followup_jobs=st.sampled_from([0, 3]),
)
def test_costs_sum_to_minus_the_mean_objective(workload, seed, objective, **options):
    episode = play(environment(workload, reward="cost", objective=objective, **options), at_random(seed))
    mean = job_costs(episode.schedule, objective).mean()
    assert sum(episode.rewards) == pytest.approx(-mean, rel=1e-9, abs=1e-9)


@given(workload=workloads(min_jobs=4), seed=SEEDS, reward=st.sampled_from(["cost", "improvement"]))
def test_an_illegal_action_counts_as_the_first_legal_one(workload, seed, reward):
    rng = np.random.default_rng(seed)
    meant = []

    def illegal(env: SchedulerEnv, mask: np.ndarray) -> int:
        meant.append(int(mask.argmax()))
        return int(rng.choice([*np.flatnonzero(mask == 0), -1, len(mask), 10**9]))

    wrong = play(environment(workload, reward=reward), illegal)
    right = play(environment(workload, reward=reward), again(meant))
    assert wrong.rewards == right.rewards
    assert np.array_equal(wrong.observations, right.observations)


# --- observations -----------------------------------------------------------------------------------------------------


def last_two(runs: list[float], requested: float) -> tuple[float, float]:
    """(feature, known) of a group: the logarithm of the mean of its last two run times, else of the request."""
    value = sum(runs[-2:]) / len(runs[-2:]) if runs else requested
    return np.log1p(value) / 12, min(len(runs), 2) / 2


def own_jobs(workload: Workload) -> int:
    return int(workload.segments[0, 1] - workload.segments[0, 0])


def past_and_present(workload: Workload, slow: SlowCluster) -> list[int]:
    """Jobs of the workload whose run times are known now, in the order in which they became so."""
    jobs, first = workload.jobs, workload.segments[0, 0]
    recorded = jobs.submit_time + jobs.wait_time + jobs.run_time
    past = np.flatnonzero(recorded <= jobs.submit_time[first])
    return [*past[np.argsort(recorded[past], kind="stable")], *(first + i for i in slow.finished)]


@given(workload=workloads(min_jobs=8, max_jobs=20, past=20), seed=SEEDS, warmup_jobs=st.sampled_from([0, 5]))
@settings(max_examples=50)
def test_history_features_are_recounted(workload, seed, warmup_jobs):
    env = environment(workload, warmup_jobs=warmup_jobs)
    slow = SlowCluster(workload, own_jobs(workload))
    slow.warm_up(simulate_one(workload, "easy-sjf"), warmup_jobs)
    jobs, first, actions = workload.jobs, workload.segments[0, 0], []

    def keys(j: int) -> dict[str, tuple]:
        user = jobs.user[j]
        kind = (user, *jobs.demand[j], jobs.executable[j])
        return {"user": (user,), "request": (user, jobs.requested_time[j]), "kind": kind}

    def watch(observation: np.ndarray) -> None:
        if actions:
            slow.step(actions[-1])
        known = past_and_present(workload, slow)
        rows = env.split(observation).jobs
        for row, i in zip(rows, slow.queue, strict=False):
            for name, key in keys(first + i).items():
                runs = [jobs.run_time[j] for j in known if jobs.user[j] >= 0 and keys(j)[name] == key]
                expected = last_two(runs, jobs.requested_time[first + i])
                assert row[[JOB[f"{name}_time"], JOB[f"{name}_known"]]] == pytest.approx(expected, rel=1e-6)
        assert not rows[len(slow.queue) :].any()

    def choose(env: SchedulerEnv, mask: np.ndarray) -> int:
        actions.append(at_random(seed + len(actions))(env, mask))
        return actions[-1]

    play(env, choose, watch)


@given(
    workload=workloads(min_jobs=10, max_jobs=30, past=15),
    seed=SEEDS,
    moment=st.floats(0, 1),
    rule=st.sampled_from(["easy-sjf", "easy-fifo+sjf-history", "greedy-saf-history", "tetris"]),
    warmup_jobs=st.sampled_from([0, 5]),
    backfill=BACKFILLS,
)
@settings(max_examples=120)
def test_no_observation_depends_on_a_run_time_before_the_job_has_finished(workload, seed, moment, rule, **options):
    """Change every run time that cannot be known at some observation; all observations until then stay as they were."""
    warmup_jobs = options["warmup_jobs"]
    episode = play(environment(workload, reference=rule, **options), at_random(seed))
    until = int(moment * (len(episode.observations) - 1))
    slow = SlowCluster(workload, own_jobs(workload), options["backfill"])
    slow.warm_up(simulate_one(workload, rule), warmup_jobs)
    for action in episode.actions[:until]:
        slow.step(action)
    secret = np.ones(len(workload.jobs), bool)
    secret[past_and_present(workload, slow)] = False
    rng = np.random.default_rng(seed)
    run_time = np.where(secret, workload.jobs.run_time * rng.uniform(2, 5, len(secret)) + 1000, workload.jobs.run_time)
    changed = replace(workload, jobs=replace(workload.jobs, run_time=run_time))
    env = environment(changed, reference=rule, **options)
    observation, _ = env.reset(options={"first": [workload.segments[0, 0]]})
    for t in range(until + 1):
        assert np.array_equal(observation, episode.observations[t]), f"observation {t} of {until}"
        observation = env.step(episode.actions[t])[0]


@given(workload=workloads(max_jobs=20), window=st.sampled_from([3, 20]), seed=SEEDS)
@settings(max_examples=40)
def test_job_node_and_cluster_features_are_recounted(workload, window, seed):
    env = environment(workload, queue_window=window)
    slow = SlowCluster(workload, window)
    slow.settle()
    jobs, cluster, actions = workload.jobs, workload.cluster, []
    largest, total = cluster.capacity.max(0), cluster.capacity.sum(0)
    size = (jobs.demand / total).max(1) * total[0]

    def watch(observation: np.ndarray) -> None:
        if actions:
            slow.step(actions[-1])
        assert env.observation_space.contains(observation)
        part = env.split(observation)
        visible = slow.view
        ranked = sorted(visible, key=lambda i: (jobs.requested_time[i], visible.index(i)))
        chosen = [i for i, row in zip(visible, part.jobs, strict=False) if row[JOB["rule_choice"]]]
        place = ranked.index(chosen[0]) if chosen else 0
        for row, i in zip(part.jobs, visible, strict=False):
            wait = slow.now - jobs.submit_time[i]
            fitting = [m for m in range(len(cluster.speed)) if slow.fits(i, m)]
            able = [m for m in range(len(cluster.speed)) if within(jobs.demand[i], cluster.capacity[m])]
            expected = {
                "present": 1.0,
                "requested": np.log1p(jobs.requested_time[i]) / 12,
                "size": np.log2(1 + size[i]) / 10,
                "area": np.log1p(jobs.requested_time[i] * size[i]) / 20,
                "waited": np.log1p(wait) / 12,
                "expansion": np.log1p(wait / max(jobs.requested_time[i], 1)) / 5,
                "fits": float(len(fitting) > 0),
                "may_start": float(any(slow.may_start(i, m) for m in fitting)),
                "earliest_start": np.log1p(min(slow.shadow(i, m)[0] for m in able) - slow.now) / 12,
                "reserved": float(slow.reservation is not None and slow.reservation.job == i),
                "behind": np.log1p(abs(ranked.index(i) - place)) / 4,
            }
            assert {name: row[JOB[name]] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert row[len(JOB_FEATURES) :] == pytest.approx(jobs.demand[i] / largest, rel=1e-6)
        until = np.log1p(max(0, slow.reservation.shadow - slow.now)) / 12 if slow.reservation else 0
        for m, row in enumerate(part.nodes):
            due = [slow.start[i] + slow.requested[i, m] for i in slow.running(m)]
            here = slow.reservation is not None and slow.reservation.node == m
            expected = {
                "speed": cluster.speed[m] / cluster.speed.max(),
                "reserved": float(here),
                "shadow": until if here else 0,
                "next_release": np.log1p(max(0, min(due) - slow.now)) / 12 if due else 0,
            }
            assert {name: row[NODE[name]] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
            amounts = np.concatenate([slow.free(m) / largest, cluster.capacity[m] / largest])
            assert row[len(NODE_FEATURES) :] == pytest.approx(amounts, rel=1e-6, abs=1e-6)
        running = sum(len(slow.running(m)) for m in range(len(cluster.speed)))
        expected = {
            "queued": np.log1p(len(slow.queue)) / 8,
            "hidden": np.log1p(len(slow.queue) - len(visible)) / 8,
            "running": np.log1p(running) / 8,
            "reservation": float(slow.reservation is not None),
            "shadow": until,
            "queued_work": np.log1p(sum(jobs.requested_time[i] * size[i] for i in visible) / total[0]) / 12,
        }
        assert {name: part.cluster[CLUSTER[name]] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)

    def choose(env: SchedulerEnv, mask: np.ndarray) -> int:
        actions.append(at_random(seed + len(actions))(env, mask))
        return actions[-1]

    play(env, choose, watch)


@pytest.mark.parametrize("requested", [-1.0, 0.5])
def test_observations_are_finite_for_jobs_that_ask_for_next_to_no_time(requested: float) -> None:
    """Some in RLScheduler's sequences ask for -1 s."""
    hpc = load_workload("hpc", "train", runs=1, run_jobs=200)
    odd = replace(hpc, jobs=replace(hpc.jobs, requested_time=np.where(np.arange(200) % 3, 3600.0, requested)))
    envs = SchedulerVectorEnv(4, odd, num_jobs=100, warmup_jobs=0, followup_jobs=0, reward="cost", lock_in=True)
    observations, infos = envs.reset(seed=1)
    for _ in range(100):
        assert np.isfinite(observations).all()
        observations, _, _, _, infos = envs.step(infos["action_mask"].argmax(1))


@given(workload=workloads(max_jobs=20), rule=st.sampled_from(RULES), seed=SEEDS)
@settings(max_examples=40)
def test_the_rules_choice_is_marked(workload, rule, seed):
    """The features point at the job and node that rule_actions() names, or say that the rule waits."""
    env = environment(workload, reference=rule)

    def choose(env: SchedulerEnv, mask: np.ndarray) -> int:
        part, action = env.split(env.envs._obs[0]), like_the_rule(env, mask)
        jobs, nodes = (
            np.flatnonzero(part.jobs[:, JOB["rule_choice"]]),
            np.flatnonzero(part.nodes[:, NODE["rule_choice"]]),
        )
        if action == len(mask) - 1:
            assert len(jobs) == 0 and part.cluster[CLUSTER["rule_waits"]] == 1
        else:
            assert [*jobs, *nodes] == [*divmod(action, len(part.nodes))] and part.cluster[CLUSTER["rule_waits"]] == 0
        return at_random(seed)(env, mask)

    play(env, choose)


def test_split_gives_the_documented_shapes(cloud):
    envs = SchedulerVectorEnv(3, cloud, num_jobs=20, warmup_jobs=10, followup_jobs=10, queue_window=16)
    obs, _ = envs.reset(seed=1)
    nodes, resources = cloud.cluster.capacity.shape
    part = envs.split(obs)
    assert part.jobs.shape == (3, 16, len(JOB_FEATURES) + resources)
    assert part.nodes.shape == (3, nodes, len(NODE_FEATURES) + 2 * resources)
    assert part.cluster.shape == (3, len(CLUSTER_FEATURES))
    assert part.mask.shape == (3, 16 * nodes + 1)
    assert obs.shape == (3, sum(np.prod(x.shape[1:]) for x in part)) and obs.dtype == np.float32
    assert [x.shape for x in envs.split(obs[1])] == [x.shape[1:] for x in part]
    assert envs.action_space.nvec.tolist() == [16 * nodes + 1] * 3


# --- many environments ------------------------------------------------------------------------------------------------


def trail(envs: SchedulerVectorEnv, seed: int, steps: int) -> dict[str, np.ndarray]:
    """What happens under random actions that every sub-environment draws for itself."""
    rngs = [np.random.default_rng([seed, e]) for e in range(envs.num_envs)]
    obs, _ = envs.reset(seed=seed)
    rows = {"obs": [obs.copy()], "rewards": [], "done": [], "first_job": []}
    for _ in range(steps):
        mask = envs.action_masks()
        actions = np.array([rng.choice(np.flatnonzero(row)) for rng, row in zip(rngs, mask, strict=True)])
        obs, rewards, terminated, truncated, infos = envs.step(actions)
        rows["obs"].append(obs.copy())
        rows["rewards"].append(rewards)
        rows["done"].append(terminated | truncated)
        if "final_info" in infos:
            rows["first_job"].append(np.where(infos["_final_info"], infos["final_info"]["first_job"], -1))
        else:
            rows["first_job"].append(np.full(envs.num_envs, -1))
    return {name: np.stack(values) for name, values in rows.items()}


@pytest.mark.parametrize(("reward", "row"), [("improvement", 1), ("improvement", 3), ("cost", 1)])
def test_the_same_seed_gives_the_same_episodes_whatever_the_number_of_environments_and_threads(cloud, reward, row):
    options = dict(num_jobs=24, warmup_jobs=16, followup_jobs=8, queue_window=16, reward=reward, episodes_in_a_row=row)
    trails = {}
    for num_envs, threads in ((64, 1), (64, 2), (7, 2), (1, 1)):
        envs = SchedulerVectorEnv(num_envs, cloud, num_threads=threads, **options)
        trails[num_envs, threads] = trail(envs, seed=5, steps=120)
        envs.close()
    all_of_them = trails[64, 1]
    assert all_of_them["done"].sum() > 64
    assert len(set(all_of_them["first_job"][all_of_them["done"]])) > 50
    for (num_envs, _), rows in trails.items():
        for name, values in rows.items():
            assert np.array_equal(values, all_of_them[name][:, :num_envs]), (num_envs, name)


def test_other_seeds_give_other_episodes(cloud):
    envs = SchedulerVectorEnv(8, cloud, num_jobs=24, warmup_jobs=16, followup_jobs=8)
    one, other = trail(envs, 1, 5), trail(envs, 100, 5)
    assert not any(np.array_equal(one["obs"][0, e], other["obs"][0, e]) for e in range(8))
    again_one = trail(envs, 1, 5)
    assert all(np.array_equal(one[name], again_one[name]) for name in one)


def test_a_list_of_seeds_names_each_sub_environments_own(cloud):
    options = dict(num_jobs=24, warmup_jobs=16, followup_jobs=8)
    envs = SchedulerVectorEnv(3, cloud, **options)
    obs = envs.reset(seed=[12, 10, 11])[0].copy()
    assert np.array_equal(obs[[1, 2, 0]], envs.reset(seed=10)[0])


def test_the_single_environment_is_the_first_of_many(cloud):
    options = dict(num_jobs=24, warmup_jobs=16, followup_jobs=8, queue_window=16)
    rows = trail(SchedulerVectorEnv(2, cloud, **options), seed=5, steps=120)
    env, rng = SchedulerEnv(cloud, **options), np.random.default_rng([5, 0])
    observation, info = env.reset(seed=5)
    for t in range(120):
        assert np.array_equal(observation, rows["obs"][t, 0])
        action = rng.choice(np.flatnonzero(info["action_mask"]))
        observation, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated or truncated) == (rows["rewards"][t, 0], rows["done"][t, 0])
        if terminated or truncated:
            assert info["first_job"] == rows["first_job"][t, 0]
            observation, info = env.reset()


def test_first_jobs_are_drawn_from_every_place_with_the_same_chance():
    """Two segments of 12 and 10 jobs have room for 3 and 1 episodes of 10 jobs."""
    workload = make_workload(1, 22)
    workload = replace(workload, segments=np.array([[0, 12], [12, 22]]))
    envs = SchedulerVectorEnv(400, workload, num_jobs=10, warmup_jobs=0, followup_jobs=0)
    envs.reset(seed=0)
    count = Counter(int(first) for first in envs._core.batch.s["first"])
    assert set(count) == {0, 1, 2, 12}
    assert all(70 < n < 130 for n in count.values())  # 100 each, five standard deviations of 8.7 are 43


def test_the_vector_environment_restarts_in_the_same_step(cloud):
    options = dict(num_jobs=8, warmup_jobs=4, followup_jobs=4, queue_window=8)
    envs, single = SchedulerVectorEnv(4, cloud, **options), SchedulerEnv(cloud, **options)
    envs.reset(seed=3)
    single.reset(seed=5)  # is sub-environment 2
    ended = 0
    for _ in range(60):
        actions = envs.action_masks().argmax(1)
        final_obs, reward, terminated, truncated, final_info = single.step(int(actions[2]))
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        assert (rewards[2], terminations[2], truncations[2]) == (reward, terminated, truncated)
        assert infos["action_mask"].any(1).all() and np.array_equal(infos["action_mask"], envs.split(obs).mask == 1)
        if terminated or truncated:
            ended += 1
            assert infos["_final_obs"][2] and infos["_final_info"][2]
            assert np.array_equal(infos["final_obs"][2], final_obs)
            final_info.pop("action_mask")
            assert {name: infos["final_info"][name][2] for name in final_info} == final_info
            restarted, _ = single.reset()
            assert np.array_equal(obs[2], restarted)
        else:
            assert "final_obs" not in infos or not infos["_final_obs"][2]
            assert np.array_equal(obs[2], final_obs)
    assert ended >= 3


def test_final_info_sums_up_the_episode(cloud):
    env = SchedulerEnv(cloud, num_jobs=30, warmup_jobs=10, followup_jobs=10)
    env.reset(seed=0)
    episode_rewards, over, info = [], False, {}
    while not over:
        _, reward, terminated, truncated, info = env.step(int(env.action_masks().argmax()))
        episode_rewards.append(reward)
        over = terminated or truncated
    schedule = env.envs.schedule()
    own = slice(10, 40)
    expected = {
        "wait": schedule.wait[own].mean(),
        "latency": schedule.latency[own].mean(),
        "bounded_slowdown": schedule.bounded_slowdown[own].mean(),
        "wait_p95": np.percentile(schedule.wait[own], 95),
        "wait_p99": np.percentile(schedule.wait[own], 99),
        "return": sum(episode_rewards),
        "decisions": len(episode_rewards),
    }
    assert {name: info[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert len(schedule.jobs) == 50 and schedule.jobs.job_id[0] == cloud.jobs.job_id[info["first_job"]]
    begin, end = schedule.jobs.submit_time[10], env.envs._core.batch.s["now"][0]
    times = np.unique(np.clip([schedule.start_time, schedule.start_time + schedule.service_time], begin, end))
    middle, length = (times[1:] + times[:-1]) / 2, np.diff(times)
    running = (schedule.start_time <= middle[:, None]) & (middle[:, None] < schedule.start_time + schedule.service_time)
    share = (running @ schedule.jobs.demand / schedule.cluster.capacity.sum(0)).mean(1)
    assert info["utilization"] == pytest.approx(share @ length / (end - begin), rel=1e-9) and share.max() > 0


# --- episodes in a row ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks() -> Workload:
    return load_workload("tasks", "train", runs=2, run_jobs=400)


ROW = dict(num_jobs=20, warmup_jobs=240, followup_jobs=20, queue_window=16)


@pytest.mark.parametrize("lock_in", [False, True])
def test_episodes_in_a_row_are_one_long_operation(tasks, lock_in):
    row = SchedulerVectorEnv(1, tasks, **ROW, episodes_in_a_row=4, lock_in=lock_in)
    whole = SchedulerVectorEnv(1, tasks, **(ROW | {"num_jobs": 80}), lock_in=lock_in)
    rng, ended = np.random.default_rng(0), [0, 0]
    for envs in (row, whole):
        envs.reset(seed=1, options={"first": [0]})  # nobody has a history from before
    while not ended[1]:
        assert np.array_equal(row.observations, whole.observations), ended
        choices = np.flatnonzero(whole.action_masks()[0])
        action = rng.choice(choices, 1) if rng.random() < 0.2 else whole.rule_actions()  # so that no job gets too old
        for k, envs in enumerate((row, whole)):
            _, _, terminated, truncated, _ = envs.step(action)
            ended[k] += int(truncated[0])
            assert not terminated[0]
    assert ended == [2 if lock_in else 4, 1]  # while one job holds the queue, those of a whole episode may arrive


@given(workload=workloads(min_jobs=60, max_jobs=60), seed=SEEDS, reference=st.sampled_from(["easy-sjf", "wfp3"]))
@settings(max_examples=25)
def test_rewards_in_a_row_are_those_of_full_roll_outs_and_the_rule_gains_nothing(workload, seed, reference):
    options = dict(num_jobs=8, warmup_jobs=20, followup_jobs=8, reference=reference, episodes_in_a_row=5)
    early, full = (SchedulerVectorEnv(2, workload, **options, full_rollouts=full) for full in (False, True))
    rng, deviate = np.random.default_rng(seed), False
    early.reset(seed=seed), full.reset(seed=seed)
    for _ in range(100):
        masks = early.action_masks()
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks]) if deviate else early.rule_actions()
        (_, rewards, *_), (_, expected, *_) = early.step(actions), full.step(actions)
        assert rewards == pytest.approx(expected, abs=1e-9) and np.array_equal(early.observations, full.observations)
        assert deviate or rewards == pytest.approx([0, 0], abs=1e-12)
        deviate = rng.random() < 0.3


def first_jobs(workload: Workload, seed: int, count: int, **options: int) -> list[int]:
    """Where the first episodes of an environment begin that follows the rule."""
    envs, found = SchedulerVectorEnv(1, workload, **options), []
    envs.reset(seed=seed)
    while len(found) < count:
        infos = envs.step(envs.rule_actions())[-1]
        found += infos["final_info"]["first_job"].tolist() if "final_info" in infos else []
    return found


def test_a_row_ends_with_its_length_its_segment_or_a_job_older_than_the_warm_up(tasks):
    steps = np.diff(first_jobs(tasks, 2, 12, **ROW, episodes_in_a_row=3))
    assert (np.diff(np.flatnonzero(steps != 20)) <= 3).all() and (steps == 20).sum() >= 6
    ends = [first % 400 + 280 for first in first_jobs(tasks, 2, 40, **ROW, episodes_in_a_row=100)]
    assert 380 < max(ends) <= 400
    old = ROW | {"warmup_jobs": 0}  # at the end of an episode there are always jobs that run
    assert 20 not in np.diff(first_jobs(tasks, 2, 10, **old, episodes_in_a_row=100))


def test_a_state_that_two_environments_load_is_not_shared(cloud):
    options = dict(num_jobs=20, warmup_jobs=60, followup_jobs=5, episodes_in_a_row=2)
    first, second = (SchedulerVectorEnv(2, cloud, **options) for _ in range(2))
    first.reset(seed=3)
    second.load_state_dict(first.state_dict())
    began = first._core.batch.s["first"].tolist()
    for _ in range(60):
        ours, theirs = (env.step(env.rule_actions()) for env in (first, second))
        assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
    assert began != first._core.batch.s["first"].tolist()  # new episodes have been drawn, the same ones


@given(workload=workloads(min_jobs=3, max_jobs=30), seed=SEEDS, lock_in=st.booleans(), rule=st.sampled_from(RULES))
@settings(max_examples=150)
def test_an_episode_of_one_decided_job_begins_with_a_choice(workload, seed, lock_in, rule):
    """However the warm-up goes, the agent has something to decide."""
    jobs = len(workload.jobs)
    lock_in = lock_in and rule != "tetris"
    env = environment(workload, warmup_jobs=jobs - 2, followup_jobs=1, lock_in=lock_in, reference=rule)
    _, info = env.reset(options={"first": [0]})
    assert info["action_mask"].any()


# --- rendering --------------------------------------------------------------------------------------------------------


def test_the_text_says_what_is_there():
    workload = make_workload(3, 20)
    env = environment(workload, render_mode="ansi")
    slow = SlowCluster(workload, 20)
    slow.settle()
    env.reset(options={"first": [0]})
    for action in range(6):
        text = env.render()
        time, running, queued = re.match(r"t = ([\d,]+) s +(\d+) running +(\d+) queued", text).groups()
        assert int(time.replace(",", "")) == slow.now
        assert (int(running), int(queued)) == (len(slow.running(0)), len(slow.queue))
        assert [int(i) for i in re.findall(r"^job +(\d+) ", text, re.MULTILINE)] == slow.queue[:10]
        share = 1 - slow.free(0)[0] / workload.cluster.capacity[0, 0]
        assert f"{share:4.0%}" in text
        action = int(np.flatnonzero(slow.mask())[-1])
        env.step(action)
        slow.step(action)


@given(workload=workloads(), seed=SEEDS)
@settings(max_examples=15)
def test_the_picture_is_an_image_and_not_blank(workload, seed):
    env = environment(workload, render_mode="rgb_array")
    pictures = []

    def choose(env: SchedulerEnv, mask: np.ndarray) -> int:
        pictures.append(env.render())
        return at_random(seed)(env, mask)

    play(env, choose)
    pictures.append(env.render())
    assert {(p.shape, p.dtype) for p in pictures} == {((256, 640, 3), np.dtype(np.uint8))}
    chart = pictures[-1][:, :500]
    assert (chart != 255).any(2).mean() > 0.005 and len(np.unique(chart.reshape(-1, 3), axis=0)) >= 3


def test_no_render_mode_draws_nothing(cloud):
    env = SchedulerEnv(cloud, num_jobs=20, followup_jobs=20)
    env.reset(seed=0, options={"first": [0]})
    assert env.render() is None


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue_window": 0}, "queue_window is 0; it must be at least 1"),
        ({"num_jobs": 0}, "num_jobs is 0; it must be at least 1"),
        ({"warmup_jobs": -1}, "warmup_jobs is -1; it must be at least 0"),
        ({"followup_jobs": -1}, "followup_jobs is -1; it must be at least 0"),
        ({"num_envs": 0}, "num_envs is 0; it must be at least 1"),
        ({"num_threads": -1}, "num_threads is -1; it must be at least 1"),
        ({"episodes_in_a_row": 0}, "episodes_in_a_row is 0; it must be at least 1"),
        ({"backfill": "conservative"}, "backfill is 'conservative'; use one of easy, none"),
        ({"objective": "makespan"}, "objective is 'makespan'; use one of latency, wait, slowdown"),
        ({"reward": "sparse"}, "reward is 'sparse'; use one of improvement, cost"),
        ({"reference": "fcfs"}, "unknown rule 'fcfs'"),
        ({"render_mode": "human"}, "render_mode is 'human'; use one of ansi, rgb_array"),
        (
            {"num_jobs": 350, "warmup_jobs": 30, "followup_jobs": 30},
            "needs 410 jobs in a row .* this split has 400; lower num_jobs",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_one_line(cloud, options, message):
    with pytest.raises(ValueError, match=message) as error:
        SchedulerVectorEnv(
            **({"num_envs": 2, "workload": cloud, "num_jobs": 20, "warmup_jobs": 0, "followup_jobs": 0} | options)
        )
    assert "\n" not in str(error.value)


def test_unknown_splits_and_workloads_are_refused():
    with pytest.raises(ValueError, match="unknown split 'dev'; use one of train, validation, test, all"):
        SchedulerVectorEnv(1, "cloud", split="dev")
    with pytest.raises(ValueError, match=r"nowhere\.swf: no such file or preset"):
        SchedulerVectorEnv(1, "nowhere.swf")


def test_a_job_larger_than_every_node_is_refused(cloud):
    demand = cloud.jobs.demand.copy()
    demand[7] = 1000
    with pytest.raises(ValueError, match=r"job 8 asks for \[1000.0, 1000.0\], more than any node"):
        SchedulerVectorEnv(1, replace(cloud, jobs=replace(cloud.jobs, demand=demand)), num_jobs=20, followup_jobs=0)


@pytest.mark.parametrize("first", [-1, 361, 380])
def test_a_first_job_without_enough_jobs_behind_it_is_refused(cloud, first):
    """The first segment has 400 jobs and an episode 40."""
    envs = SchedulerVectorEnv(1, cloud, num_jobs=20, warmup_jobs=10, followup_jobs=10)
    with pytest.raises(ValueError, match="first"):
        envs.reset(options={"first": [first]})


def test_one_action_for_each_environment_is_asked_for(cloud):
    envs = SchedulerVectorEnv(3, cloud, num_jobs=20, warmup_jobs=0, followup_jobs=0)
    envs.reset(seed=1)
    for actions in ([0], [0] * 4, [[0, 0, 0]]):
        with pytest.raises(ValueError, match="give one for each of the 3 environments"):
            envs.step(np.array(actions))


def test_a_step_after_the_end_changes_nothing():
    env = environment(make_workload(0, 3))
    episode = play(env, at_random(0))
    for action in (0, 3):
        _, reward, terminated, truncated, _ = env.step(action)
        assert (reward, terminated, truncated) == (0, True, False)
    assert env.envs.schedule().start_time.tolist() == episode.schedule.start_time.tolist()
