"""slurm_agent.py against a small slurmrestd that gives answers recorded from Slurm 22.05.

A real Slurm is in test_slurm_cluster.py.
"""

import json
import re
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.summary import Writer
from test_policies import write_policy, write_random_policy

import slurm_agent as sa
from deployment import priorities
from deployment.accounting import JOBCOMP_COLUMNS, Export, export
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
from deployment.slurm import API, FOREVER, Slurm, SlurmError, SlurmJob, Snapshot, job_from_rest, pool, processors_in_use
from policies import Policy, PolicyError, load_policy
from workloads.generated import generate_jobs
from workloads.jobs import Jobs, Workload, WorkloadError, offered_load
from workloads.load import load_workload

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "tests" / "data" / "slurm_22_05.json").read_text())
JOBS = {record["job_id"]: record for record in RECORDED["jobs"]["jobs"]}
PENDING = next(record for record in JOBS.values() if record["job_state"] == "PENDING" and not record["dependency"])


class FakeSlurm(socketserver.ThreadingUnixStreamServer):
    """slurmrestd and slurmctld: lists jobs and nodes, takes priorities and nice values, remembers them."""

    daemon_threads = True  # connections are kept alive

    def __init__(self, path: Path) -> None:
        self.jobs: dict[int, dict[str, Any]] = {}
        self.nodes = RECORDED["nodes"]["nodes"]
        self.updates: list[tuple[int, dict[str, int]]] = []
        self.listings: list[int] = []  # the status of each
        self.slurmctld = True
        self.changed = time.time()
        super().__init__(str(path), Answers)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def add(self, *job_ids: int, **fields: Any) -> None:
        now = int(time.time())
        for job_id in job_ids:
            own = {"job_id": job_id, "submit_time": now, "eligible_time": now, "priority": 4294901760 - job_id}
            self.jobs[job_id] = PENDING | own | fields
        self.changed = time.time()

    def change(self, job_id: int, **fields: Any) -> None:
        self.jobs[job_id] = self.jobs[job_id] | fields
        self.changed = time.time()

    def start(self, job_id: int) -> None:
        self.change(job_id, job_state="RUNNING", start_time=int(time.time()), state_reason="None")

    def by_priority(self) -> list[int]:
        pending = [job for job in self.jobs.values() if job["job_state"] == "PENDING" and job["priority"]]
        return [job["job_id"] for job in sorted(pending, key=lambda job: -job["priority"])]

    def update(self, job_id: int, properties: dict[str, int]) -> tuple[int, dict[str, Any]]:
        self.updates.append((job_id, properties))
        job = self.jobs.get(job_id)
        if job is None or job["priority"] == 0 or job["job_state"] != "PENDING":
            return 500, RECORDED["refused: held" if job and not job["priority"] else "refused: ended"]
        self.change(job_id, **properties)
        return 200, RECORDED["array updated" if job["array_task_string"] else "updated"]


class Answers(BaseHTTPRequestHandler):
    server: FakeSlurm
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, _, query = self.path.removeprefix(API).partition("?")
        if not self.server.slurmctld:
            self.reply(500, RECORDED["slurmctld down"])
        elif path == "/nodes":
            self.reply(200, {"errors": [], "nodes": self.server.nodes})
        elif query and int(query.removeprefix("update_time=")) - 1 >= int(self.server.changed):
            self.server.listings.append(304)
            self.reply(304, None)
        else:
            self.server.listings.append(200)
            self.reply(200, {"errors": [], "jobs": list(self.server.jobs.values())})

    def do_POST(self) -> None:
        properties = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.server.slurmctld:
            self.reply(500, RECORDED["slurmctld down"])
        else:
            self.reply(*self.server.update(int(self.path.rsplit("/", 1)[1]), properties))

    def reply(self, status: int, answer: Any) -> None:
        text = "" if answer is None else json.dumps(answer, ensure_ascii=False)
        body = text.encode(errors="surrogateescape")  # as slurmrestd: a name is bytes
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: a unix socket's peer has no address."""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    monkeypatch.chdir(tmp_path)  # TensorBoard's files
    server = FakeSlurm(tmp_path / "restd.sock")
    yield server
    server.shutdown()
    server.server_close()


def agent_for(slurm: FakeSlurm, **args: Any) -> Agent:
    args = {"mode": "live", "policy": "easy-saf"} | args
    settings = Args(socket=Path(str(slurm.server_address)), **args)
    return Agent(settings, Slurm(settings.socket), load_policy(settings.policy), Metrics(settings.mode))


# --------------------------------------------------------------------------------------------------- what Slurm says
def test_recorded_jobs_are_understood() -> None:
    """An array, one that depends, one that is held, one for tomorrow, others that wait, run, and have ended."""
    jobs = {job_id: job_from_rest(record) for job_id, record in JOBS.items()}
    named = {job.name: job for job in jobs.values()}
    assert named["after"].left_alone == "dependency" and named["held"].left_alone == "held"
    assert named["tomorrow"].left_alone == "begin time"
    assert named["array"].left_alone == "" and named["array"].state == "PENDING"
    assert (named["pending"].cpus, named["pending"].limit, named["pending"].nice) == (2, 180.0, 7)
    assert named["endless"].limit == FOREVER
    running, ended, cancelled = named["running"], named["ended"], named["cancelled"]
    assert running.state == "RUNNING" and running.start >= running.eligible and not running.ran
    assert ended.ran and ended.end - ended.start in (1, 2) and ended.user == "root"
    assert cancelled.state == "CANCELLED" and not cancelled.ran


def test_processors_of_nodes_that_take_jobs() -> None:
    nodes = RECORDED["nodes"]["nodes"]
    assert [node["cpus"] for node in nodes] == [4] * 4 and processors_in_use(nodes, None) == 16
    drained = [{**nodes[0], "state_flags": ["DRAIN"], "alloc_cpus": 3}, {**nodes[1], "state": "down", "alloc_cpus": 0}]
    drained += nodes[2:]
    assert processors_in_use(drained, None) == 3 + 0 + 8
    assert processors_in_use(nodes, "main") == 16 and processors_in_use(nodes, "other") == 0


def test_nodes_that_sleep_take_jobs() -> None:
    """The flags that Slurm 22.05 gives with SuspendProgram; one that is down, or drained, does not wake up."""
    node = RECORDED["nodes"]["nodes"][0] | {"state": "idle", "alloc_cpus": 0}
    for flags in (["POWERING_DOWN"], ["POWERED_DOWN"], ["NOT_RESPONDING", "POWERING_UP"]):
        assert processors_in_use([node | {"state_flags": flags}], None) == 4, flags
    down = node | {"state": "down", "state_flags": ["POWERED_DOWN", "NOT_RESPONDING"]}
    drained = node | {"state_flags": ["DRAIN", "POWERED_DOWN"]}
    silent = node | {"state_flags": ["NOT_RESPONDING"]}
    assert processors_in_use([down, drained, silent], None) == 0


# ------------------------------------------------------------------------------------------------------------- order
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


def job(job_id: int, cpus: int, limit: float, eligible: float = 0.0, start: float = 0.0, end: float = 0.0) -> SlurmJob:
    state = "COMPLETED" if end else "RUNNING" if start else "PENDING"
    return SlurmJob(job_id, state, "ann", "", "app", "main", eligible, start, end, limit, cpus)


def test_order_and_those_who_have_waited_too_long() -> None:
    pending = [job(1, 4, 600.0, 900.0), job(2, 1, 60.0, 990.0), job(3, 16, 600.0, 100.0), job(4, 8, 600.0, 50.0)]
    snapshot = Snapshot(1000.0, 8, pending, [job(5, 6, 600.0, 0.0, 500.0)], [])
    saf = load_policy("easy-saf")

    def order(policy: Policy, max_wait: float) -> list[int]:
        return [job.job_id for job in priority_order(policy, snapshot, max_wait)[0]]

    # 2 fits; 1 is the head; 4 is larger than what is left; 3 is larger than the cluster.
    assert order(saf, 5_000.0) == [2, 1, 4, 3]
    assert order(saf, 940.0) == [4, 2, 1, 3]
    assert order(saf, 500.0) == [4, 3, 2, 1]


def test_predicted_starts_by_hand() -> None:
    """8 processors, 6 of them taken; the user's last jobs of 10 minutes took 100 and 200 s, so 150 are expected."""
    finished = [
        job(7, 1, 600.0, 0.0, 10.0, 1_000.0),
        job(8, 1, 600.0, 0.0, 100.0, 200.0),
        job(9, 1, 600.0, 0.0, 1.0, 201.0),
    ]
    finished.sort(key=lambda job: job.end)
    finished = [finished[-1], *finished[:-1]]  # the last two: 100 and 200 s
    running = [job(5, 6, 600.0, 0.0, 900.0)]
    pending = [job(1, 4, 600.0), job(2, 2, 60.0), job(3, 8, 120.0), job(4, 9, 60.0)]
    starts = predicted_starts(Snapshot(1000.0, 8, pending, running, finished), pending)
    # The running job is expected to end at 1050, the head starts then; 2 starts at once and ends at its limit, 1060;
    # 3 comes after the head, at 1200; 4 is too large for the cluster.
    assert starts == {1: (1050.0,) * 3, 2: (1000.0,) * 3, 3: (1200.0,) * 3}


def test_a_planned_order_is_that_of_the_expected_starts() -> None:
    """8 processors, 6 of them taken; every job of the user has taken half of its limit."""
    finished = [job(10 + k, 1, 600.0, 0.0, 100.0, 400.0) for k in range(300)]
    running = [job(5, 6, 600.0, 0.0, 900.0)]  # half of its limit has it to 1200
    pending = [job(1, 8, 600.0), job(2, 2, 60.0), job(3, 4, 120.0), job(4, 9, 60.0)]
    order, starts = priority_order(load_policy("plan:easy-fifo"), Snapshot(1000.0, 8, pending, running, finished), 1e9)
    # 2 starts at once; the others go before 1, which needs all processors and gets them when 3 has had its minute.
    assert [job.job_id for job in order] == [2, 1, 3, 4]
    assert starts == {1: (1200.0,) * 3, 2: (1000.0,) * 3, 3: (1500.0,) * 3}


def test_hindsight_by_hand() -> None:
    """One processor: a long job, then a short one before it has started. FIFO waits for the long one."""
    jobs = [job(1, 1, 60.0, 0.0, 0.5, 10.5), job(2, 1, 600.0, 1.0, 10.5, 110.5), job(3, 1, 60.0, 2.0, 110.5, 120.5)]
    waits = hindsight(load_policy("easy-sjf"), jobs, 1)
    assert waits == {
        "recorded": pytest.approx((0.5 + 9.5 + 108.5) / 3), "fifo": pytest.approx((0 + 9 + 108) / 3),
        "easy-fifo": pytest.approx((0 + 9 + 108) / 3), "policy": pytest.approx((0 + 19 + 8) / 3),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- passes
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


def test_names_are_any_bytes(slurm: FakeSlurm) -> None:
    slurm.add(1, name=b"Gr\xf6\xdfe".decode(errors="surrogateescape"))
    agent_for(slurm).one_pass()
    assert [job_id for job_id, _ in slurm.updates] == [1]


@pytest.mark.parametrize("network", [False, True])
def test_a_thousand_jobs_take_less_than_a_second(
    slurm: FakeSlurm, tmp_path: Path, network: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = time.time()  # while jobs grow older a random network changes its mind, and they are sent again
    monkeypatch.setattr(time, "time", lambda: frozen)
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


def test_new_and_finished_jobs_within_a_second(slurm: FakeSlurm) -> None:
    slurm.add(1, 2, cpus=16)
    agent, stop = agent_for(slurm), threading.Event()
    warm_up(agent.policy)
    thread = threading.Thread(target=agent.run, args=(stop,))
    thread.start()
    try:
        until(lambda: len(slurm.updates) == 2)
        began = time.monotonic()
        slurm.add(3, cpus=1)
        until(lambda: slurm.by_priority() == [3, 1, 2])
        assert time.monotonic() - began < 1.0
        began = time.monotonic()
        slurm.start(3)
        until(lambda: agent.metrics.started == 1)
        assert time.monotonic() - began < 1.0
    finally:
        stop.set()
        thread.join()


def until(happened: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.02)


# -------------------------------------------------------------------------------------------------------- what breaks
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


@pytest.mark.parametrize("nodes", [[None], ["n1"], [{"state_flags": None}], [{"state_flags": [1]}], None])
def test_nodes_of_another_form_are_tried_again(slurm: FakeSlurm, nodes: Any) -> None:
    slurm.add(1)
    known, slurm.nodes = slurm.nodes, nodes
    agent = agent_for(slurm)
    with pytest.raises(SlurmError, match="GET nodes: "):
        agent.one_pass()
    slurm.nodes = known
    agent.one_pass()
    assert len(slurm.updates) == 1


@pytest.mark.parametrize(
    ("status", "errors"),
    [(200, ["held"]), (500, ["held"]), (500, None), (500, [{"error_number": None}]), (200, "held"), (200, [None])],
)
def test_errors_of_another_form_are_tried_again(slurm: FakeSlurm, status: int, errors: Any) -> None:
    slurm.add(1)
    slurm.update = lambda *_: (status, {"errors": errors})  # type: ignore[method-assign]
    agent = agent_for(slurm)
    with pytest.raises(SlurmError, match=f"POST /job/1: HTTP {status}"):
        agent.one_pass()
    del slurm.update
    agent.listed = 0.0
    agent.one_pass()
    assert len(slurm.updates) == 1


@pytest.mark.parametrize("answer", [{"errors": None}, {}, {"errors": [{"error_number": None}]}])
def test_an_update_without_an_error_is_one(slurm: FakeSlurm, answer: dict[str, Any]) -> None:
    slurm.add(1)
    slurm.update = lambda *_: (200, answer)  # type: ignore[method-assign]
    agent = agent_for(slurm)
    agent.one_pass()
    assert agent.metrics.updates._value.get() == 1


def test_a_job_that_is_no_object_is_left_alone(slurm: FakeSlurm, caplog: pytest.LogCaptureFixture) -> None:
    slurm.add(1)
    slurm.jobs[2] = "x"  # type: ignore[assignment]
    agent_for(slurm).one_pass()
    assert len(slurm.updates) == 1 and "not as expected" in caplog.text


def test_a_replay_that_fails_is_logged_once(
    slurm: FakeSlurm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> dict[str, float]:
        raise RuntimeError("no such order")

    monkeypatch.setattr(priorities, "hindsight", fails)
    agent = agent_for(slurm)
    agent.finished.update({k: job(k, 1, 60.0, 0.0, 1.0, 2.0) for k in range(HINDSIGHT_JOBS)})  # type: ignore[misc]
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


def start_agent(slurm: FakeSlurm, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "slurm_agent.py"), "--policy", "easy-saf", "--mode", "live", *flags]
    return subprocess.Popen([*command, "--socket", str(slurm.server_address)], stderr=subprocess.PIPE)


def test_killed_and_started_again(slurm: FakeSlurm) -> None:
    """The order stays; the next agent goes on from it, and sends nothing that is set already."""
    slurm.add(1, 2, 3, cpus=16)
    process = start_agent(slurm)
    until(lambda: len(slurm.updates) == 3, 60)
    process.kill()
    process.wait()
    order = slurm.by_priority()
    slurm.add(4, cpus=1)
    process = start_agent(slurm)
    until(lambda: len(slurm.updates) == 4, 60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert slurm.updates[3][0] == 4 and slurm.by_priority() == [4, *order]


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "slurm_agent.py"), "--policy", "nonsense"], cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("slurm_agent.py: unknown rule 'nonsense'")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--metrics-port", "99999"), ("--metrics-port", "-1"), ("--max-nice", "-5"), ("--max-nice", "0"),
        ("--interval", "0"), ("--interval", "nan"), ("--interval", "inf"), ("--max-wait", "nan"), ("--max-wait", "-1"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_work_are_refused(
    flag: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["slurm_agent.py", flag, value])
    monkeypatch.setattr(Agent, "run", lambda *_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="2"):
        sa.main()
    said = capsys.readouterr().err
    assert said.startswith(f"slurm_agent.py: {flag} {value}") and ": give " in said and said.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ metrics
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
    assert 100 <= agent.metrics.wait._sum.get() <= 103
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


# ------------------------------------------------------------------------------------------------------------- export
def records(count: int = 300) -> tuple[Jobs, list[SlurmJob]]:
    """Jobs as generated, and as a Slurm of 16 processors would have run them, whole seconds and minutes."""
    cluster = pool(16)
    jobs = generate_jobs(np.random.default_rng(3), count, cluster, run_time=(300.0, 1.0, 3_600.0), load=0.5)
    [schedule] = load_policy("fifo").schedule(
        Workload("x", cluster, replace(jobs, submit_time=np.round(jobs.submit_time)), np.array([[0, count]]), {})
    )
    origin = 1_780_000_000.0
    return jobs, [
        SlurmJob(
            int(jobs.job_id[k]), "COMPLETED", f"user{jobs.user[k]:03}", f"group{jobs.group[k]:03}",
            f"app {jobs.executable[k]:03}", "main", origin + round(jobs.submit_time[k]),
            origin + schedule.start_time[k], origin + schedule.start_time[k] + jobs.run_time[k],
            60 * np.ceil(jobs.requested_time[k] / 60), int(jobs.demand[k, 0]),
        )
        for k in range(count)
    ]  # fmt: skip


def local(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%dT%H:%M:%S")


def as_jobcomp(job: SlurmJob) -> str:
    """The format of the recorded line in RECORDED["jobcomp"]."""
    return (
        f"JobId={job.job_id} UserId={job.user}(1000) GroupId=x(1000) Name={job.name} JobState={job.state} Partition="
        f"{job.partition} TimeLimit={job.limit / 60:.0f} StartTime={local(job.start)} EndTime={local(job.end)} "
        f"NodeList=n1 NodeCnt=1 ProcCnt={job.cpus} WorkDir=/tmp ReservationName= Tres=cpu={job.cpus},mem=1M "
        f"Account={job.account} QOS= WcKey= Cluster=unknown SubmitTime={local(job.eligible)} "
        f"EligibleTime={local(job.eligible)} DerivedExitCode=0:0 ExitCode=0:0 \n"
    )


def as_sacct(jobs: list[SlurmJob]) -> str:
    rows = ["JobIDRaw|User|Account|JobName|Partition|Submit|Start|End|TimelimitRaw|NCPUS|State"]
    for job in jobs:
        rows.append(
            f"{job.job_id}|{job.user}|{job.account}|{job.name}|main|{local(job.eligible)}|{local(job.start)}|"
            f"{local(job.end)}|{job.limit / 60:.0f}|{job.cpus}|{job.state}"
        )
        rows.append(f"{job.job_id}.batch||{job.account}|batch||||||{job.cpus}|COMPLETED")
    rows.append("9999|u|a|x|main|2026-01-01T00:00:00|Unknown|Unknown|5|1|PENDING")
    rows.append("9998|u|a|x|main|2026-01-01T00:00:00|None|2026-01-01T00:00:01|5|0|CANCELLED by 0")
    return "\n".join(rows) + "\n"


def as_json(jobs: list[SlurmJob]) -> str:
    return json.dumps({"jobs": [
        PENDING | {
            "job_id": job.job_id, "job_state": job.state, "user_name": job.user, "account": job.account,
            "name": job.name, "submit_time": int(job.eligible), "eligible_time": int(job.eligible), "cpus": job.cpus,
            "start_time": int(job.start), "end_time": int(job.end), "time_limit": int(job.limit / 60),
        } for job in jobs
    ]})  # fmt: skip


@pytest.mark.parametrize("form", ["jobcomp", "sacct", "json"])
def test_export_round_trip(tmp_path: Path, form: str) -> None:
    """Jobs, through each of Slurm's formats, come back as a trace with the same jobs, which loads and can be run."""
    jobs, ran = records()
    text = {"jobcomp": "".join(map(as_jobcomp, ran)), "sacct": as_sacct(ran), "json": as_json(ran)}[form]
    source, trace = tmp_path / "source", tmp_path / "trace.swf.gz"
    source.write_text(text)
    said = export(Export((source, source), trace))
    assert f"{trace}: 300 jobs" in said and "300 again" in said
    loaded = load_workload(str(trace), "all")
    back, order = loaded.jobs, np.lexsort((jobs.job_id, np.round(jobs.submit_time)))
    jobs = jobs[order]
    assert back.job_id.tolist() == jobs.job_id.tolist()
    assert back.run_time.tolist() == jobs.run_time.tolist()
    assert back.submit_time.tolist() == (np.round(jobs.submit_time) - np.round(jobs.submit_time[0])).tolist()
    assert back.requested_time.tolist() == (60 * np.ceil(jobs.requested_time / 60)).tolist()
    assert back.demand.tolist() == jobs.demand.tolist()
    assert back.wait_time.tolist() == [ran[k].wait for k in order]
    for ours, theirs in ((back.user, jobs.user), (back.executable, jobs.executable), (back.group, jobs.group)):
        assert ours.tolist() == np.unique(theirs, return_inverse=True)[1].tolist()
    assert loaded.cluster.capacity.tolist() == [[16.0]] and loaded.skipped == {}
    assert offered_load(back, loaded.cluster) == pytest.approx(offered_load(jobs, pool(16)), rel=1e-3)
    [schedule] = load_policy("easy-fifo").schedule(load_workload(str(trace), "train"))
    assert len(schedule.jobs) == 180


def test_lines_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    """A name with sacct's delimiter, a line cut short, and a job that its node has lost: its end is not known."""
    lines = as_sacct([job(k, 2, 600.0, 1_780_000_000.0, 1_780_000_100.0, 1_780_000_200.0) for k in (1, 2, 3)])
    lines = lines.replace("2|ann||app|", "2|ann||a|9|").replace("\n3|ann", "\n3\n4|ann").replace(
        "Unknown|Unknown|5|1|PENDING", "2026-01-01T00:00:01|Unknown|5|8|NODE_FAIL"
    )  # fmt: skip
    (tmp_path / "source").write_text(lines)
    said = export(Export((tmp_path / "source",), tmp_path / "trace.swf"))
    assert "2 jobs, 2 with more or fewer columns than line 1" in said and "1 not finished, 1 never ran" in said
    back = load_workload(str(tmp_path / "trace.swf"), "all").jobs
    assert back.job_id.tolist() == [1, 4] and back.run_time.tolist() == [100.0, 100.0]


def test_export_of_recorded_files(tmp_path: Path) -> None:
    """What Slurm 22.05 itself wrote of the same jobs, as a log and as JSON, is the same trace, whatever their names."""
    (tmp_path / "jobcomp.log").write_text(RECORDED["jobcomp"].replace("Name=ended ", "Name=a|b "))
    (tmp_path / "squeue.json").write_text(json.dumps(RECORDED["jobs"]))
    for name in ("jobcomp.log", "squeue.json"):
        export(Export((tmp_path / name,), tmp_path / f"{name}.swf", processors=16))
    ours, theirs = (load_workload(str(tmp_path / f"{name}.swf"), "all").jobs for name in ("jobcomp.log", "squeue.json"))
    assert len(ours) == 2
    for name in ("job_id", "submit_time", "run_time", "requested_time", "demand", "wait_time"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), name


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no job that has run"),
        ("{nonsense", "not what `squeue --json`"),
        ("a|b\n1|2\n", "line 1: no column JobIDRaw, Submit"),
        ("JobId=1 JobState=COMPLETED\n", "line 1: no field 'SubmitTime'|line 1: no field 'Submit'"),
        ("hello world\n", "line 1: no field"),
        ('{"jobs": ["x"]}', "not what `squeue --json`"),
        ("|".join(JOBCOMP_COLUMNS) + "\n1|ann|a", "no job that has run, 1 with more or fewer columns"),
    ],
)
def test_what_cannot_be_exported(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "source").write_text(text)
    with pytest.raises(WorkloadError, match=problem):
        export(Export((tmp_path / "source",), tmp_path / "trace.swf"))
    assert not (tmp_path / "trace.swf").exists()
    with pytest.raises(WorkloadError, match="nowhere: No such file"):
        export(Export((tmp_path / "nowhere",), tmp_path / "trace.swf"))


def test_processors_that_are_too_few(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("".join(map(as_jobcomp, records()[1])))
    with pytest.raises(WorkloadError, match=r"--processors 2: job \d+ had"):
        export(Export((tmp_path / "source",), tmp_path / "trace.swf", processors=2))


def test_policies_for_other_clusters_are_refused(tmp_path: Path) -> None:
    write_policy(tmp_path / "policy.onnx", resources=2, workload="cloud")
    with pytest.raises(
        PolicyError, match=r"made for clusters with 2 kinds of resources \(cloud\), and this cluster has 1"
    ):
        warm_up(load_policy(str(tmp_path / "policy.onnx")))


def test_the_documented_flags_have_the_documented_defaults() -> None:
    section = (ROOT / "docs" / "deploy.md").read_text().partition("## Slurm")[2]
    rows = re.findall(r"^\| `--([\w-]+)` \| `(.*?)` \|", section, re.MULTILINE)
    assert len(rows) >= 7
    for flag, default in rows:
        assert default == str(getattr(Args, flag.replace("-", "_"))), flag
