"""The priority agent: the order it gives, pass by pass, and how it lives through bad days."""

import re
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import prometheus_client
import pytest
from fake_slurm import JOBS, RECORDED, FakeSlurm, agent_for, slurm_job, until
from hypothesis import given
from hypothesis import strategies as st
from policy_files import write_policy, write_random_policy
from tensorboard.summary import Writer

from deployment import priorities
from deployment.priorities import (
    HINDSIGHT_JOBS,
    LIVE_LEVELS,
    Agent,
    Args,
    Metrics,
    evenly,
    hindsight,
    longest_falling,
    predicted_starts,
    priority_order,
    relabel,
    warm_up,
)
from deployment.slurm import Slurm, Snapshot, pool
from policies import PolicyError, load_policy

# ---------------------------------------------------------------------------------------------------------------- order
labels = st.lists(st.integers(-3, 60), max_size=12)


@given(labels)
def test_relabel_changes_as_few_as_possible(current: list[int]) -> None:
    low, high = 0, 40
    new = relabel(current, low, high)
    assert len(new) == len(current) and all(a > b for a, b in pairwise(new))
    assert all(low <= label <= high for label in new)
    longest = [0] * len(current)  # the longest falling subsequence that ends at each, by definition
    for i, label in enumerate(current):
        if low <= label <= high:
            longest[i] = 1 + max((longest[j] for j in range(i) if current[j] > label and longest[j]), default=0)
    kept = longest_falling(current, low, high)
    assert len(kept) == max(longest, default=0)
    assert all(current[a] > current[b] for a, b in pairwise(kept))
    if all(new[k] == current[k] for k in kept):
        assert sum(a != b for a, b in zip(new, current, strict=True)) == len(current) - len(kept)
    else:  # no room: all anew
        assert new == evenly(len(current), low, high)


def test_relabel_leaves_room() -> None:
    low, high = LIVE_LEVELS
    order = relabel([0] * 1_000, low, high)
    assert len(set(order)) == 1_000
    rng, changed = np.random.default_rng(0), 0
    for _ in range(2_000):  # a job comes somewhere, often at the front or the back, and the first one starts
        order.insert(int(rng.choice([0, rng.integers(1_000), 1_000])), 0)
        new = relabel(order, low, high)
        changed += sum(a != b for a, b in zip(new, order, strict=True))
        order = new[1:]
    assert changed < 3 * 2_000
    with pytest.raises(ValueError, match="5 labels"):
        relabel([9] * 5, 0, 3)


def test_order_and_those_who_have_waited_too_long() -> None:
    pending = [
        slurm_job(1, 4, 600.0, 900.0),
        slurm_job(2, 1, 60.0, 990.0),
        slurm_job(3, 16, 600.0, 100.0),
        slurm_job(4, 8, 600.0, 50.0),
    ]
    snapshot = Snapshot(1000.0, 8, pending, [slurm_job(5, 6, 600.0, 0.0, 500.0)], [])
    saf = load_policy("easy-saf")
    # 2 fits; 1 is the head; 4 is larger than what is left; 3 is larger than the cluster.
    assert [job.job_id for job in priority_order(saf, snapshot, 5_000.0)] == [2, 1, 4, 3]
    assert [job.job_id for job in priority_order(saf, snapshot, 940.0)] == [4, 2, 1, 3]
    assert [job.job_id for job in priority_order(saf, snapshot, 500.0)] == [4, 3, 2, 1]


def test_predicted_starts_by_hand() -> None:
    """8 processors, 6 of them taken; the user's last jobs of 10 minutes took 100 and 200 s, so 150 are expected."""
    finished = [
        slurm_job(7, 1, 600.0, 0.0, 10.0, 1_000.0),
        slurm_job(8, 1, 600.0, 0.0, 100.0, 200.0),
        slurm_job(9, 1, 600.0, 0.0, 1.0, 201.0),
    ]
    finished.sort(key=lambda job: job.end)
    finished = [finished[-1], *finished[:-1]]  # the last two: 100 and 200 s
    running = [slurm_job(5, 6, 600.0, 0.0, 900.0)]
    pending = [slurm_job(1, 4, 600.0), slurm_job(2, 2, 60.0), slurm_job(3, 8, 120.0), slurm_job(4, 9, 60.0)]
    starts = predicted_starts(Snapshot(1000.0, 8, pending, running, finished), pending)
    # The running job is expected to end at 1050, the head starts then; 2 starts at once and ends at its limit, 1060;
    # 3 comes after the head, at 1200; 4 is too large for the cluster.
    assert starts == {1: 1050.0, 2: 1000.0, 3: 1200.0}


def test_hindsight_by_hand() -> None:
    """One processor: a long job, then a short one before it has started. FIFO waits for the long one."""
    jobs = [
        slurm_job(1, 1, 60.0, 0.0, 0.5, 10.5),
        slurm_job(2, 1, 600.0, 1.0, 10.5, 110.5),
        slurm_job(3, 1, 60.0, 2.0, 110.5, 120.5),
    ]
    waits = hindsight(load_policy("easy-sjf"), jobs, 1)
    assert waits == {
        "recorded": pytest.approx((0.5 + 9.5 + 108.5) / 3), "fifo": pytest.approx((0 + 9 + 108) / 3),
        "easy-fifo": pytest.approx((0 + 9 + 108) / 3), "policy": pytest.approx((0 + 19 + 8) / 3),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- passes
def test_live_sets_the_order_and_only_what_changes(slurm: FakeSlurm) -> None:
    slurm.add(1, 2, 3, cpus=16)
    slurm.add(4, cpus=2)
    agent = agent_for(slurm)
    agent.one_pass()
    assert slurm.by_priority() == [4, 1, 2, 3] and len(slurm.updates) == 4
    assert all(priority > 0xFFFF0000 for _, update in slurm.updates for priority in update.values())
    agent.listed = 0.0
    agent.one_pass()
    assert len(slurm.updates) == 4  # nothing has changed
    slurm.add(5, cpus=8)  # comes behind all that are ordered, until the agent has seen it
    assert slurm.by_priority() == [4, 1, 2, 3, 5]
    agent.one_pass()
    assert slurm.by_priority() == [4, 5, 1, 2, 3] and [job_id for job_id, _ in slurm.updates[4:]] == [5]
    slurm.start(4)
    agent.one_pass()
    assert len(slurm.updates) == 5 and agent.metrics.started == 1


def test_an_unchanged_queue_is_not_listed(slurm: FakeSlurm) -> None:
    slurm.add(1)
    agent = agent_for(slurm)
    agent.one_pass()
    slurm.changed -= 10
    for _ in range(3):
        agent.one_pass()
    assert slurm.listings == [200, 304, 304, 304]


def test_held_dependent_and_later_jobs_are_left_alone(slurm: FakeSlurm) -> None:
    for job_id, record in JOBS.items():
        slurm.jobs[job_id] = record
    before = {record["name"]: record["priority"] for record in slurm.jobs.values()}
    agent_for(slurm).one_pass()
    changed = {slurm.jobs[job_id]["name"] for job_id, _ in slurm.updates}
    assert changed == {"pending", "array", "endless"}
    assert all(record["priority"] == before[name] for name, record in
               ((record["name"], record) for record in slurm.jobs.values()) if name not in changed)  # fmt: skip


def test_shadow_changes_nothing(slurm: FakeSlurm, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    slurm.add(1, 2, cpus=16)
    slurm.add(3, cpus=2)
    agent = agent_for(slurm, mode="shadow")
    agent.one_pass()
    slurm.start(1)
    agent.one_pass()
    assert slurm.updates == []
    assert "would change 3 of 3 priorities; first: 3 1 2" in caplog.text
    assert re.search(r"Slurm started job 1 \(place 2 of 3\) after \d s", caplog.text)


def test_advise_sets_nice_values_only(slurm: FakeSlurm) -> None:
    slurm.add(1, 2, 3, cpus=16)
    slurm.add(4, cpus=2)
    agent_for(slurm, mode="advise", max_nice=100).one_pass()
    nice = {job_id: job["nice"] or 0 for job_id, job in slurm.jobs.items()}
    assert 0 <= nice[4] < nice[1] < nice[2] < nice[3] <= 100
    assert {name for _, update in slurm.updates for name in update} == {"nice"}


def test_advice_keeps_the_order_of_more_jobs_than_there_are_nice_values(slurm: FakeSlurm) -> None:
    for k in range(1, 17):
        slurm.add(k, cpus=k)
    agent_for(slurm, mode="advise", max_nice=10).one_pass()
    assert [job["nice"] or 0 for job in slurm.jobs.values()] == [*range(10), *[10] * 6]


def test_the_first_job_is_always_advised_0(slurm: FakeSlurm) -> None:
    """Or what the site's other jobs are to it would depend on who was there before."""
    for k in range(1, 4):
        slurm.add(k, cpus=k)
    agent = agent_for(slurm, mode="advise")
    agent.one_pass()
    before = {job_id: job["nice"] or 0 for job_id, job in slurm.jobs.items()}
    assert before[1] == 0 < before[2] < before[3]
    slurm.start(1)
    agent.one_pass()
    assert slurm.jobs[2]["nice"] == 0 and slurm.jobs[3]["nice"] == before[3]


class FullDisk:
    """TensorBoard's Writer where it cannot write: at once, or the first chart."""

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once

    def __call__(self, folder: str) -> "FullDisk":
        if self.at_once:
            self.add_scalar()
        return self

    def add_scalar(self, *_: object) -> None:
        raise OSError(28, "No space left on device")

    flush = close = add_scalar


@pytest.mark.parametrize("at_once", [True, False])
def test_a_full_disk_ends_the_charts_and_not_the_agent(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at_once: bool
) -> None:
    disk = FullDisk(at_once)
    monkeypatch.setattr(priorities, "Writer", disk)
    slurm.add(1, 2)
    agent = agent_for(slurm)
    agent.one_pass()
    slurm.start(1)
    slurm.add(3)
    agent.one_pass()
    agent.metrics.note_hindsight({"fifo": 1.0})
    assert {job_id for job_id, _ in slurm.updates} == {1, 2, 3} and agent.metrics.started == 1
    assert caplog.text.count("goes on without them") == 1


def test_what_is_refused_is_not_counted_as_changed(slurm: FakeSlurm, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    slurm.add(1, 2, 3)
    refused = {1, 2, 3}
    slurm.update = lambda job_id, properties: (  # type: ignore[method-assign]
        (500, RECORDED["refused: ended"]) if job_id in refused else FakeSlurm.update(slurm, job_id, properties)
    )
    agent_for(slurm).one_pass()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3 and all("not changed: " in warning for warning in warnings)
    assert "changed 3 of" not in caplog.text and "changed 0 of" not in caplog.text
    refused.remove(2)
    agent_for(slurm).one_pass()
    assert "changed 1 of 3 priorities; first: 1 2 3" in caplog.text


def test_a_job_that_is_refused_stops_nothing(slurm: FakeSlurm, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    slurm.add(1, 2, 3)
    slurm.update = lambda job_id, properties: (  # type: ignore[method-assign]
        (500, RECORDED["refused: ended"]) if job_id == 2 else FakeSlurm.update(slurm, job_id, properties)
    )
    agent = agent_for(slurm)
    agent.one_pass()
    assert {job_id for job_id, _ in slurm.updates} == {1, 3}
    assert f"job 2: not changed: {RECORDED['refused: ended']['errors'][0]['error']} (" in caplog.text
    agent.listed = 0.0
    agent.one_pass()
    assert caplog.text.count("job 2: ") == 1 and agent.metrics.refused._value.get() == 1


def test_unknown_states_and_records_are_reported_once(slurm: FakeSlurm, caplog: pytest.LogCaptureFixture) -> None:
    slurm.add(1, 2)
    slurm.add(3, job_state="TELEPORTED")
    slurm.jobs[4] = {"job_id": 4, "job_state": "PENDING"}
    agent = agent_for(slurm)
    for _ in range(2):
        agent.listed = 0.0
        agent.one_pass()
    assert caplog.text.count("unknown state TELEPORTED") == 1 and caplog.text.count("not as expected") == 1
    assert {job_id for job_id, _ in slurm.updates} == {1, 2}


def test_only_the_partition_that_was_asked_for(slurm: FakeSlurm) -> None:
    slurm.add(1, 2, partition="main")
    slurm.add(3, partition="gpu")
    agent_for(slurm, partition="main").one_pass()
    assert {job_id for job_id, _ in slurm.updates} == {1, 2}


def test_a_partition_without_nodes_is_reported_once(slurm: FakeSlurm, caplog: pytest.LogCaptureFixture) -> None:
    slurm.add(1)
    agent = agent_for(slurm, partition="nosuch")
    for _ in range(2):
        agent.listed = agent.looked = 0.0
        agent.one_pass()
    assert caplog.text.count("no node of partition nosuch takes jobs") == 1 and slurm.updates == []


def test_a_job_whose_nodes_wake_up_runs(slurm: FakeSlurm, caplog: pytest.LogCaptureFixture) -> None:
    agent = agent_for(slurm)
    slurm.add(1, job_state="CONFIGURING", start_time=int(time.time()))
    agent.one_pass()
    assert agent.metrics.started == 1 and caplog.text == ""


@pytest.mark.parametrize("network", [False, True])
def test_a_thousand_jobs_take_less_than_a_second(
    slurm: FakeSlurm, tmp_path: Path, network: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = time.time()  # while jobs grow older a random network changes its mind, and they are sent again
    monkeypatch.setattr(time, "time", lambda: frozen)
    monkeypatch.setattr(time, "perf_counter", time.thread_time)  # however busy the machine is
    monkeypatch.setattr(priorities, "UPDATING", 0.1)  # several passes, however fast the machine is
    rng = np.random.default_rng(0)
    for job_id in range(1, 1_001):
        slurm.add(job_id, cpus=int(rng.integers(1, 17)), time_limit=int(rng.integers(1, 600)))
    policy = str(write_random_policy(tmp_path / "policy.onnx", pool(16))) if network else "easy-saf"
    agent = agent_for(slurm, policy=policy)
    warm_up(agent.policy)
    passes = 0
    while agent.unsent or not passes:  # each sends for a while and looks again
        agent.one_pass()
        passes += 1
    own = agent.metrics.own._sum.get()
    assert own / passes < 1.0
    assert len(slurm.updates) == 1_000  # each once, whatever the number of passes
    if network:
        return
    areas = [slurm.jobs[job_id]["cpus"] * slurm.jobs[job_id]["time_limit"] for job_id in slurm.by_priority()]
    assert areas[40:] == sorted(areas[40:])  # behind what starts at once and the head
    slurm.add(2_000)
    agent.one_pass()
    assert len(slurm.updates) == 1_001


def test_new_and_finished_jobs_are_seen_at_the_next_look_a_quarter_of_a_second_later(slurm: FakeSlurm) -> None:
    slurm.add(1, 2, cpus=16)
    agent, seen, pauses = agent_for(slurm), [], []

    class Waits:
        """The pauses between passes: what happens in each, and what is seen then."""

        def wait(self, seconds: float) -> bool:
            pauses.append(seconds)
            seen.append((slurm.by_priority(), agent.metrics.started))
            if len(pauses) == 2:
                slurm.add(3, cpus=1)
            if len(pauses) == 3:
                slurm.start(3)
            return len(pauses) == 4

    agent.run(Waits())  # type: ignore[arg-type]
    assert seen[1:] == [([1, 2], 0), ([3, 1, 2], 0), ([1, 2], 1)] and set(pauses) == {0.25}


# ---------------------------------------------------------------------------------------------------------- what breaks
def test_slurmctld_goes_and_comes_back(slurm: FakeSlurm, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    slurm.add(1, 2, cpus=16)
    agent, stop = agent_for(slurm), threading.Event()
    warm_up(agent.policy)
    thread = threading.Thread(target=agent.run, args=(stop,))
    thread.start()
    try:
        until(lambda: len(slurm.updates) == 2)
        slurm.slurmctld = False
        until(lambda: agent.metrics.failures._value.get() >= 2)
        slurm.add(3, cpus=1)
        slurm.slurmctld = True
        until(lambda: slurm.by_priority() == [3, 1, 2])
    finally:
        stop.set()
        thread.join()
    assert "HTTP 500, Failed while looking for jobs: Unspecified error" in caplog.text
    assert (
        "next try in 0.5 s" in caplog.text
        and "next try in 1.0 s" in caplog.text
        and "Slurm answers again, after" in caplog.text
    )


def test_without_slurmrestd_pauses_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Args(socket=tmp_path / "nothing.sock", mode="live")
    agent = Agent(settings, Slurm(settings.socket), load_policy("easy-saf"), Metrics("live"))

    class Waits:
        pauses: list[float] = []  # noqa: RUF012

        def wait(self, seconds: float) -> bool:
            self.pauses.append(seconds)
            return len(self.pauses) > 9

    agent.run(Waits())  # type: ignore[arg-type]
    assert Waits.pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_a_replay_that_fails_is_logged_once(
    slurm: FakeSlurm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> dict[str, float]:
        raise RuntimeError("no such order")

    monkeypatch.setattr(priorities, "hindsight", fails)
    agent = agent_for(slurm)
    agent.finished.update({k: slurm_job(k, 1, 60.0, 0.0, 1.0, 2.0) for k in range(HINDSIGHT_JOBS)})  # type: ignore[misc]
    agent.processors = 16
    agent.look_back()
    until(lambda: agent.replay is not None and agent.replay.done())
    for _ in range(2):
        agent.look_back()
    assert caplog.text.count("could not be replayed: no such order") == 1
    stop = threading.Event()
    stop.set()
    agent.run(stop)  # a last replay, and out
    assert caplog.text.count("could not be replayed: no such order") == 2


def test_policies_for_other_clusters_are_refused(tmp_path: Path) -> None:
    write_policy(tmp_path / "policy.onnx", resources=2, workload="cloud")
    with pytest.raises(
        PolicyError, match=r"made for clusters with 2 kinds of resources \(cloud\), and this cluster has 1"
    ):
        warm_up(load_policy(str(tmp_path / "policy.onnx")))


# -------------------------------------------------------------------------------------------------------------- metrics
def test_metrics(slurm: FakeSlurm) -> None:
    now = int(time.time())
    slurm.add(1, 2, cpus=16, submit_time=now - 100, eligible_time=now - 100)
    slurm.add(3, priority=0)
    agent = agent_for(slurm)
    agent.one_pass()
    slurm.start(1)
    agent.one_pass()
    text = prometheus_client.generate_latest(agent.metrics.registry).decode()
    for line in (
        'resourcerl_slurm_jobs{state="pending"} 1.0', 'resourcerl_slurm_jobs{state="running"} 1.0',
        'resourcerl_slurm_jobs{state="held"} 1.0', "resourcerl_slurm_wait_seconds_count 1.0",
        "resourcerl_slurm_start_error_seconds_count 1.0", "resourcerl_slurm_updates_total 2.0",
        "resourcerl_slurm_pass_seconds_count 2.0",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    assert 100 <= agent.metrics.wait._sum.get() <= 160
    for k in range(4, 40):
        slurm.add(
            k,
            job_state="COMPLETED",
            eligible_time=now - 90,
            submit_time=now - 91,
            start_time=now - 50,
            end_time=now - 40,
        )
    agent.one_pass()
    agent.look_back()
    until(lambda: agent.replay is not None and agent.replay.done(), 60)
    agent.look_back()
    text = prometheus_client.generate_latest(agent.metrics.registry).decode()
    assert 'resourcerl_slurm_hindsight_wait_seconds{order="fifo"}' in text
    assert 'resourcerl_slurm_hindsight_wait_seconds{order="recorded"} 40.0' in text
    agent.metrics.board.write(Writer.close)
    assert list(Path("runs").glob("slurm__live__*/events*"))
