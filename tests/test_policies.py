"""What can choose: rules by name and policy.onnx by path, on observations and on whole workloads."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from places import ROOT
from policy_files import ODD_METADATA, write_policy, write_random_policy

import scheduler_env as se
from policies import JOB_CHOICE, RULE_WAITS, Decision, OnnxPolicy, PlanPolicy, Policy, PolicyError, load_policy
from simulator.kernels import CLUSTER_FEATURES, JOB_FEATURES, NODE_FEATURES
from simulator.moment import ClusterState
from simulator.replay import simulate
from simulator.rules import RULES
from simulator.schedule import Schedule
from workloads.jobs import Cluster, Workload, at_loads
from workloads.load import load_workload


@pytest.fixture
def policy(tmp_path: Path) -> OnnxPolicy:
    return load_policy(str(write_policy(tmp_path / "run" / "policy.onnx")))


def vector_env(**changes: object) -> se.SchedulerVectorEnv:
    arguments = dict(workload="hpc", num_jobs=64, warmup_jobs=64, followup_jobs=0, queue_window=16, reward="cost")
    return se.SchedulerVectorEnv(4, **(arguments | changes))


@pytest.mark.parametrize("rule", ["easy-sjf", "easy-fifo", "greedy-saf", "fifo"])
def test_a_rule_reads_its_own_choice_from_the_observation(rule: str) -> None:
    envs, policy = vector_env(reference=rule), load_policy(rule)
    policy.layout = envs.layout
    observations, _ = envs.reset(seed=3)
    for _ in range(100):
        actions = policy.predict(observations)
        assert actions.dtype == np.int64
        np.testing.assert_array_equal(actions, envs.rule_actions())
        assert policy.predict(observations[2]) == actions[2] and policy.predict(observations[2], False) == actions[2]
        observations = envs.step(actions)[0]


def test_the_rules_own_choice_is_never_hidden() -> None:
    envs, policy = vector_env(reference="easy-saf", queue_window=1, lock_in=True), load_policy("easy-saf")
    policy.layout = envs.layout
    observations, longest = envs.reset(seed=3)[0], 0.0
    for _ in range(200):
        parts, actions = envs.split(observations), policy.predict(observations)
        assert (parts.jobs[..., JOB_CHOICE].sum(1) == 1).all()
        np.testing.assert_array_equal(actions, envs.rule_actions())
        assert (parts.mask[np.arange(4), actions] == 1).all()
        longest = max(longest, parts.cluster[:, CLUSTER_FEATURES.index("hidden")].max())
        observations = envs.step(actions)[0]
    assert longest > 0  # queues were longer than the window


def test_where_a_foreign_observation_shows_no_choice_the_first_legal_action_is_taken() -> None:
    envs, policy = vector_env(reference="easy-saf"), load_policy("easy-saf")
    policy.layout = envs.layout
    observations = envs.reset(seed=3)[0].copy()
    parts = envs.split(observations)
    parts.jobs[..., JOB_CHOICE], parts.cluster[:, RULE_WAITS] = 0, 0
    np.testing.assert_array_equal(policy.predict(observations), parts.mask.argmax(1))


@pytest.mark.parametrize("rule", ["easy-sjf", "easy-wfp3+sjf"])
@pytest.mark.parametrize("workload", ["hpc", "cloud"])
def test_a_network_that_follows_the_rule_gives_its_schedule(tmp_path: Path, rule: str, workload: str) -> None:
    jobs = load_workload(workload, "test", runs=3, run_jobs=300)
    nodes, resources = jobs.cluster.capacity.shape
    size = {"nodes": nodes, "resources": resources, "queue_window": 300}  # the whole queue fits in the window
    policy = load_policy(str(write_policy(tmp_path / "policy.onnx", reference=rule, **size)))
    segments = np.array([[0, 300], [350, 500], [600, 900]])  # of two lengths, and not the workload's own
    for ours, theirs in zip(policy.schedule(jobs, segments), load_policy(rule).schedule(jobs, segments), strict=True):
        np.testing.assert_array_equal(ours.jobs.job_id, theirs.jobs.job_id)
        np.testing.assert_array_equal(ours.start_time, theirs.start_time)
        np.testing.assert_array_equal(ours.node, theirs.node)


def test_the_window_can_be_another_than_the_trained_one(policy: OnnxPolicy) -> None:
    jobs = load_workload("hpc", "test", runs=1, run_jobs=400)
    [wide] = policy.schedule(jobs, window=400)
    [wider] = policy.schedule(jobs, window=800)  # nothing is hidden in either
    assert wide.start_time.tolist() == wider.start_time.tolist()
    np.testing.assert_array_equal(wide.start_time, simulate(jobs, "easy-sjf")[0].start_time)
    with pytest.raises(ValueError, match="queue_window is 0"):
        policy.schedule(jobs, window=0)


def test_a_file_that_stands_for_a_rule_schedules_as_the_rule(tmp_path: Path) -> None:
    policy = load_policy(str(write_policy(tmp_path / "policy.onnx", rule="easy-saf", follow=-9)))
    jobs = load_workload("hpc", "test", runs=2, run_jobs=400)
    assert policy.reference == "easy-saf"
    for ours, theirs in zip(policy.schedule(jobs), simulate(jobs, "easy-saf"), strict=True):
        np.testing.assert_array_equal(ours.start_time, theirs.start_time)
    envs = vector_env(reference="easy-saf")
    observations, _ = envs.reset(seed=3)
    np.testing.assert_array_equal(policy.predict(observations), envs.rule_actions())


@pytest.mark.parametrize("stands_for", [None, "easy-sjf@500"])
def test_hours_behind_a_file_are_its_patience(tmp_path: Path, stands_for: str | None) -> None:
    """A network that follows its rule, and a file that stands for it: as the rule of that patience, in every use."""
    jobs = load_workload("hpc", "test", runs=1, run_jobs=800)
    size = {"nodes": 1, "resources": 1, "queue_window": 800}
    write_policy(tmp_path / "run@3" / "policy.onnx", reference="easy-sjf@500", rule=stands_for, **size)
    [without], [patient] = simulate(jobs, "easy-sjf"), simulate(jobs, "easy-sjf@2")
    assert patient.wait.max() < 0.9 * without.wait.max()
    plain = load_policy(f"{tmp_path}/run@3")
    policy = load_policy(f"{tmp_path}/run@3@2")
    named = ("run@3 (= easy-sjf@500)", "run@3 (= easy-sjf@2)") if stands_for else None
    assert (plain.name, policy.name) == (named or ("run@3/policy.onnx", "run@3/policy.onnx@2"))
    assert (plain.reference, policy.reference) == ("easy-sjf@500", "easy-sjf@2")
    assert plain.identity != policy.identity
    for again in (policy, load_policy(policy.argument), pickle.loads(pickle.dumps(policy))):
        assert again.schedule(jobs)[0].start_time.tolist() == patient.start_time.tolist()
    state = small_state(now=7_300.0)
    waited = np.array([10.0, 10.0, 10.0, 7_201.0])  # the last one requests the most time
    overdue = replace(state, queued=replace(state.queued, submit_time=state.now - waited))
    assert plain.decide(overdue).start[0][0] == 2 and policy.decide(overdue).start[0][0] == 3


@pytest.mark.parametrize("hours", ["two", "-1", "nan"])
def test_odd_hours_behind_a_file_are_refused(policy: OnnxPolicy, hours: str) -> None:
    with pytest.raises(PolicyError, match=rf"policy.onnx: .*'easy-sjf@{hours}': behind @ goes a number.*; try another"):
        load_policy(f"{policy.path}@{hours}")


def test_predict_and_sampling(tmp_path: Path) -> None:
    policy = load_policy(str(write_policy(tmp_path / "run" / "policy.onnx", follow=1.0)))
    assert policy.name == "run/policy.onnx"
    envs = vector_env(reference="easy-sjf")
    observation = envs.reset(seed=3)[0][0]
    action, legal = policy.predict(observation), np.flatnonzero(envs.split(observation).mask)
    assert isinstance(action, int) and action == envs.rule_actions()[0] and len(legal) >= 3
    draws = policy.predict(np.repeat(observation[None], 20_000, axis=0), deterministic=False)
    share = np.bincount(draws, minlength=envs.layout.actions) / len(draws)
    expected = np.zeros(envs.layout.actions)
    expected[legal] = np.where(legal == action, np.e, 1) / (np.e + len(legal) - 1)
    np.testing.assert_allclose(share, expected, atol=0.015)
    with pytest.raises(PolicyError, match=r"set policy\.layout"):
        policy.predict(observation[:-1])


@pytest.mark.parametrize("follow", [np.nan, np.inf, -np.inf])
def test_no_illegal_action_whatever_the_network_says(tmp_path: Path, follow: float) -> None:
    policy, envs = load_policy(str(write_policy(tmp_path / "policy.onnx", follow=follow))), vector_env()
    observations, _ = envs.reset(seed=0)
    for deterministic in (True, False):
        actions = policy.predict(observations, deterministic)
        assert (envs.split(observations).mask[np.arange(4), actions] == 1).all()


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "no ONNX file"),
    "text": (lambda path: path.write_text("not a model"), "no ONNX file"),
    "truncated": (lambda path: path.write_bytes(write_policy(path).read_bytes()[:300]), "no ONNX file"),
    "no metadata": (lambda path: write_policy(path, metadata=""), "no policy of ResourceRL"),
    "no JSON": (lambda path: write_policy(path, metadata="{"), "no policy of ResourceRL"),
    "another's": (lambda path: write_policy(path, metadata='["?"]'), "no policy of ResourceRL"),
    "half": (lambda path: write_policy(path, metadata='{"version": 1}'), "no policy of ResourceRL.*`algorithm`"),
    "deep": (lambda path: write_policy(path, metadata='{"?": ' + "[" * 100_000), "no policy of ResourceRL"),
    "newer": (lambda path: write_policy(path, version=2), "version 2"),
    "features": (lambda path: write_policy(path, job_features=["age", *JOB_FEATURES[1:]]), r"\(age, present\)"),
    "rule": (lambda path: write_policy(path, reference="alphabetical"), "unknown rule 'alphabetical'"),
    "order": (lambda path: write_policy(path, node_features=list(NODE_FEATURES)[::-1]), "node features"),
}


@pytest.mark.parametrize("odd", ODD_METADATA, ids=str)
def test_odd_metadata_is_refused_with_its_field(tmp_path: Path, odd: dict[str, object]) -> None:
    path = write_policy(tmp_path / "policy.onnx", **odd)
    with pytest.raises(PolicyError, match=r"\$\." + "".join(odd)) as caught:
        load_policy(str(path))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_policy_goes_to_another_process_whatever_its_file_holds_by_then(policy: OnnxPolicy) -> None:
    policy.path.write_bytes(b"?")
    again = pickle.loads(pickle.dumps(policy))
    assert (again.name, again.metadata, again.data) == (policy.name, policy.metadata, policy.data)
    assert again.decide(small_state()).start == policy.decide(small_state()).start


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_remedy(tmp_path: Path, case: str) -> None:
    path, (make, message) = tmp_path / "policy.onnx", BAD_FILES[case]
    make(path)
    with pytest.raises(PolicyError, match=message) as caught:
        load_policy(str(path))
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and "; " in text


def test_an_unknown_rule_lists_the_known_ones() -> None:
    with pytest.raises(PolicyError, match=r"unknown rule 'fastest': .*sjf"):
        load_policy("fastest")
    with pytest.raises(PolicyError, match="tuned"):
        load_policy("tuned:1,2")


def test_other_resources_are_refused(policy: OnnxPolicy) -> None:
    with pytest.raises(
        PolicyError,
        match=r"policy\.onnx: made for clusters with 1 kinds of resources \(hpc\), and cloud has 2; train one",
    ):
        policy.schedule(load_workload("cloud", "test", runs=1, run_jobs=50))


# ------------------------------------------------------------------------------------------- states of a real cluster
def state_at(schedule: Schedule, now: float, rng: np.random.Generator) -> tuple[ClusterState, np.ndarray]:
    """What an operator would have seen at that moment of a schedule, jobs in any order; which jobs were queued."""
    jobs, start, end = schedule.jobs, schedule.start_time, schedule.start_time + schedule.service_time
    finished = np.flatnonzero(end <= now)
    finished = finished[np.lexsort((start[finished], end[finished]))]
    running = rng.permutation(np.flatnonzero((start < now) & (end > now)))
    queued = np.flatnonzero((jobs.submit_time <= now) & (start >= now))
    return ClusterState(
        now, schedule.cluster, jobs[queued], jobs[running], start[running], schedule.node[running], jobs[finished]
    ), queued


def assert_decides_as_it_schedules(policy: Policy, workload: Workload, window: int | None = None) -> None:
    """At every arrival and every end of a job, `decide` starts what the simulator started at that instant."""
    [schedule] = policy.schedule(workload, window=window)
    rng, started, longest = np.random.default_rng(0), 0, 0
    for now in np.unique([schedule.jobs.submit_time, schedule.start_time + schedule.service_time]):
        state, queued = state_at(schedule, now, rng)
        decision = policy.decide(state, window)
        expected = {(i, schedule.node[i]) for i in queued if schedule.start_time[i] == now}
        assert {(queued[job], node) for job, node in decision.start} == expected, now
        assert sorted(decision.order) == list(range(len(queued)))
        front = [job for job, _ in decision.start] + ([decision.reserved[0]] if decision.reserved else [])
        assert decision.order[: len(front)].tolist() == front
        started, longest = started + len(expected), max(longest, len(queued))
    assert started == len(schedule.jobs) and longest > 16


@pytest.mark.parametrize("workload", ["cloud", pytest.param("hpc", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", sorted(set(RULES) - {"random", "round-robin"}))  # these two remember, or draw
def test_a_rule_decides_as_it_schedules(workload: str, rule: str) -> None:
    jobs = at_loads(load_workload(workload, "test", runs=1, run_jobs=200), [2.0])
    assert_decides_as_it_schedules(load_policy(rule), jobs)


@pytest.mark.parametrize("backfill", ["easy", "none"])
@pytest.mark.parametrize("workload", ["hpc", "cloud", "datacenter"])
def test_a_network_decides_as_it_schedules(tmp_path: Path, workload: str, backfill: str) -> None:
    """Also with the history, and with jobs outside the window."""
    jobs = at_loads(load_workload(workload, "test", runs=1, run_jobs=250), [2.0])
    policy = load_policy(str(write_random_policy(tmp_path / "policy.onnx", jobs.cluster, backfill=backfill)))
    assert_decides_as_it_schedules(policy, jobs)
    assert_decides_as_it_schedules(policy, jobs, window=40)


@pytest.mark.parametrize("workload", [pytest.param("hpc", marks=pytest.mark.slow), "cloud"])
@pytest.mark.parametrize("base", ["easy-fifo", "easy-wfp3+sjf-history", "greedy-saf", "easy-sjf@1"])
def test_planning_decides_as_it_schedules_and_reads_no_run_time_of_an_unfinished_job(workload: str, base: str) -> None:
    """Those that it gets here are no numbers, and the replay, which has them, does the same."""

    class Poisoned(PlanPolicy):
        def decide(self, state: ClusterState, window: int | None = None) -> Decision:
            queued, running = (
                replace(jobs, run_time=np.full(len(jobs), np.nan)) for jobs in (state.queued, state.running)
            )
            return super().decide(replace(state, queued=queued, running=running), window)

    jobs = at_loads(load_workload(workload, "test", runs=1, run_jobs=150), [2.0])
    assert_decides_as_it_schedules(Poisoned(f"plan:{base}", samples=4, threshold=0.0), jobs)


def small_state(**changes: object) -> ClusterState:
    """Two nodes of 4 and 8 processors; jobs ask for 8, 3, 2 and 1 of them; one of 4 runs on the larger until 100 s."""
    jobs = load_workload("hpc", "test", runs=1, run_jobs=5)
    jobs = replace(
        jobs.jobs, submit_time=np.arange(5.0), requested_time=np.array([60.0, 50.0, 40.0, 200.0, 100.0]),
        demand=np.array([[8.0], [3.0], [2.0], [1.0], [4.0]]),
    )  # fmt: skip
    cluster = Cluster(np.array([[4.0], [8.0]]), np.ones(2), ("processors",))
    state = ClusterState(50.0, cluster, jobs[:4], jobs[4:], np.array([0.0]), np.array([1]))
    return replace(state, **changes)


def test_decisions_by_hand() -> None:
    """EASY-FIFO: the job of 8 waits for the end of the running one; what ends before, or runs elsewhere, starts."""
    state = small_state()
    decision = load_policy("easy-fifo").decide(state)
    assert decision.start == [(1, 0), (2, 1), (3, 0)] and decision.reserved == (0, 1, 100.0)
    assert decision.order.tolist() == [1, 2, 3, 0]
    blocked = load_policy("fifo").decide(state)
    assert blocked.start == [] and blocked.reserved == (0, 1, 100.0) and blocked.order.tolist() == [0, 1, 2, 3]
    assert load_policy("greedy-sjf").decide(state).start == [(2, 0), (1, 1), (3, 1)]


def test_what_is_not_in_use_takes_no_job_and_no_reservation() -> None:
    halved = small_state(free=np.array([[4.0], [0.0]]))  # of the larger node only the half that is taken is in use
    decision = load_policy("easy-fifo").decide(halved)
    assert decision.start == [(1, 0), (3, 0)] and decision.reserved == (2, 1, 100.0)
    assert decision.order.tolist() == [1, 3, 2, 0]  # the job of 8 fits nowhere and comes last


def test_decisions_without_jobs(policy: OnnxPolicy) -> None:
    none = small_state().queued[:0]
    state = small_state(queued=none, running=none, start_time=np.zeros(0), node=np.zeros(0, int))
    for chooser in (policy, load_policy("easy-fifo")):
        decision = chooser.decide(state)
        assert decision.start == [] and decision.reserved is None and decision.order.tolist() == []


def test_states_that_a_policy_cannot_decide(tmp_path: Path, policy: OnnxPolicy) -> None:
    two = load_workload("cloud", "test", runs=1, run_jobs=5)
    nothing = np.zeros(0)
    with pytest.raises(PolicyError, match="kinds of resources"):
        policy.decide(ClusterState(9e9, two.cluster, two.jobs, two.jobs[:0], nothing, nothing.astype(int)))
    with pytest.raises(PolicyError, match="lock_in"):
        load_policy(str(write_policy(tmp_path / "policy.onnx", lock_in=True))).decide(small_state())
    with pytest.raises(PolicyError, match="gives NaN"):
        load_policy(str(write_policy(tmp_path / "policy.onnx", follow=np.nan))).decide(small_state())
    policy.run_options.terminate = True
    with pytest.raises(PolicyError, match=r"does not run.*terminate"):
        policy.decide(small_state())


def test_a_policy_of_before_the_rooms_decides_as_it_did() -> None:
    """tests/data/before/cloud_ppo.onnx was trained and exported by revision 27ce463, which gave these figures."""
    policy = load_policy(str(ROOT / "tests" / "data" / "before" / "cloud_ppo.onnx"))
    assert isinstance(policy, OnnxPolicy) and policy.reference == "easy-sjf@57.5" and policy.metadata.rule is None
    workload, segments = load_workload("cloud", "test", runs=1), np.array([[1_000, 1_300], [3_000, 3_300]])
    schedules = policy.schedule(workload, segments)
    assert [schedule.wait.mean() for schedule in schedules] == pytest.approx([120.950316, 15.076471], abs=1e-6)
    assert [list(schedule.node[-5:]) for schedule in schedules] == [[0, 5, 5, 5, 5], [3, 5, 3, 3, 3]]
    rule = load_policy(policy.reference).schedule(workload, segments)
    assert [(ours.start_time != theirs.start_time).sum() for ours, theirs in zip(schedules, rule, strict=True)] == [
        88,
        3,
    ]
