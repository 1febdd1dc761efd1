"""The decision service: its decisions against the simulator's, what it refuses, and how it lives through bad days."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import onnx
import psutil
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from load import busy_states, state_at
from onnx import TensorProto, helper, numpy_helper
from schemathesis.specs.openapi.checks import positive_data_acceptance
from test_policies import META, ODD_METADATA, write_policy, write_random_policy

import deployment.http_api
import deployment.processes
import deployment.service
import scheduler_env as se
import serve
from deployment.contract import STATES, Refused, cluster_state, decode
from deployment.http_api import create_app
from deployment.processes import read_token
from deployment.processes import serve as serve_on
from deployment.service import Args, Service
from policies import PolicyError, RulePolicy, load_policy
from simulator.moment import ClusterState
from simulator.observation import Observation
from workloads.jobs import Workload, WorkloadError, at_loads
from workloads.load import load_workload
from workloads.records import read_decisions

ROOT = Path(serve.__file__).parent
STATE: dict[str, Any] = {
    "now": 50.0,
    "nodes": [{"name": "small", "capacity": [4]}, {"name": "large", "capacity": [8]}],
    "running": [{"id": "r", "node": "large", "start_time": 0.0, "requested_time": 100.0, "demand": [4]}],
    "queued": [
        {"id": "a", "submit_time": 0, "requested_time": 60.0, "demand": [8]},
        {"id": "b", "submit_time": 1, "requested_time": 50.0, "demand": [3]},
        {"id": 3, "submit_time": 2, "requested_time": 40.0, "demand": [2]},
        {"id": "d", "submit_time": 3, "requested_time": 200.0, "demand": [1]},
    ],
}


def changed(*path: str | int, to: Any = None) -> dict[str, Any]:
    """STATE with another value at that place."""
    state = json.loads(json.dumps(STATE))
    place = state
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return state


def client(policy: str = "easy-fifo", **args: Any) -> TestClient:
    """`client.service` is the service."""
    service = Service(Args(policy, **({"deadline_ms": 1e4} | args)))  # the machine may be busy
    session = TestClient(create_app(service))
    session.service = service
    return session


def post(session: TestClient, state: Any, path: str = "/v1/decisions") -> httpx.Response:
    content = state if isinstance(state, bytes) else json.dumps(state).encode()
    return session.post(path, content=content, headers={"Content-Type": "application/json"})


def metric(session: Any, name: str) -> float:
    """The sum over its labels."""
    lines = session.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


# ------------------------------------------------------------------------------------------------------- its decisions
def test_a_decision_by_hand() -> None:
    """EASY-FIFO: the job of 8 waits for the end of the running one; what ends before, or runs elsewhere, starts."""
    answer = post(client(), STATE).json()
    starts = [("b", "small"), (3, "large"), ("d", "small")]
    assert answer["start"] == [{"job": job, "node": node} for job, node in starts]
    assert answer["reserved"] == {"job": "a", "node": "large", "time": 100.0}
    levels = [("b", 4), (3, 3), ("d", 2), ("a", 1)]
    assert answer["priorities"] == [{"job": job, "priority": level} for job, level in levels]
    assert answer["decided_by"] == "easy-fifo" and answer["fallback"] is None


def test_docs_deploy_shows_what_happens() -> None:
    """Its state, answer and refusal, and its flags with their defaults."""
    page = (ROOT / "docs/deploy.md").read_text()
    state, answer, refusal = map(json.loads, re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[:3])
    assert post(client(), state).json() == answer
    state["queued"][1]["submit_time"] = state["now"] + 1
    assert post(client(), state).json() == refusal
    section = page[page.index("### Flags") : page.index("### Record")]
    flags = dict(re.findall(r"^\| `--([\w-]+)` \| `(.*?)` \|", section, re.MULTILINE))
    fields = [field for field in dataclasses.fields(Args) if field.name != "policy"]
    expected = {field.name.replace("_", "-"): str(field.default) for field in fields}
    assert {flag: default.replace("_", "") for flag, default in flags.items()} == expected


@pytest.mark.parametrize("name", ["easy-wfp3+sjf", "easy-sjf-history", "plan:easy-fifo", "network"])
@pytest.mark.parametrize("workload", ["hpc", "cloud"])
def test_every_decision_of_an_episode_is_the_simulators(tmp_path: Path, workload: str, name: str) -> None:
    """At every arrival and every end: the same jobs start on the same nodes, those outside the window have a level."""
    jobs = at_loads(load_workload(workload, "test", runs=1, run_jobs=200), [2.0])
    if name == "network":
        name = str(write_random_policy(tmp_path / "policy.onnx", jobs.cluster))
    [schedule] = load_policy(name).schedule(jobs)
    session, longest = client(name, plan_budget_ms=1e4), 0
    for now in np.unique([schedule.jobs.submit_time, schedule.start_time + schedule.service_time]):
        state = state_at(schedule, now, history=True)
        answer = post(session, state).json()
        due = np.flatnonzero(schedule.start_time == now)
        expected = {(int(schedule.jobs.job_id[i]), f"n{schedule.node[i]}") for i in due}
        assert {(start["job"], start["node"]) for start in answer["start"]} == expected
        levels = {level["job"]: level["priority"] for level in answer["priorities"]}
        assert levels.keys() == {job["id"] for job in state["queued"]}
        assert list(levels.values()) == list(range(len(levels), 0, -1))
        longest = max(longest, len(levels))
    assert longest > 16 and metric(session, "resourcerl_fallbacks_total") == 0


def test_planning_says_when_jobs_will_probably_start_and_on_how_many_samples() -> None:
    """The same state gives the same answer; with next to no time the answer is the base's, without expectations."""
    state = busy_states(jobs=60, nodes=8, count=1)[0]
    session = client("plan:easy-fifo", plan_budget_ms=1e5)
    answer = post(session, state).json()
    assert answer == post(session, state).json()
    expected = answer["expected"]
    assert expected["samples"] <= expected["wanted"] and len(expected["starts"]) == 60
    starting = {start["job"] for start in answer["start"]}
    for start in expected["starts"]:
        assert state["now"] <= start["p10"] <= start["p50"] <= start["p90"]
        assert (start["job"] not in starting) or start["p90"] == state["now"]
    middle = {start["job"]: start["p50"] for start in expected["starts"]}
    rest = [level["job"] for level in answer["priorities"]][len(starting) + (answer["reserved"] is not None) :]
    assert [middle[job] for job in rest] == sorted(middle[job] for job in rest) and len(rest) > 20
    in_no_time = post(client("plan:easy-fifo", plan_budget_ms=0.001), state).json()
    base = post(client("easy-fifo"), state).json()
    assert in_no_time["expected"]["samples"] == 0 and not in_no_time["expected"]["starts"] and "expected" not in base
    assert [in_no_time[part] for part in ("start", "reserved")] == [base[part] for part in ("start", "reserved")]


def test_planning_remembers_what_has_finished(tmp_path: Path) -> None:
    """States that say nothing of it: jobs of 10 minutes have all taken half a one, and a restart knows that."""
    path = tmp_path / "decisions.jsonl"
    node, job = {"name": "n", "capacity": [4]}, {"demand": [4], "requested_time": 600, "user": "ann"}
    session = client("plan:easy-fifo", record=path, plan_budget_ms=1e4)
    waiting = [{"id": f"w{k}", "submit_time": 0, **job} for k in range(2)]

    def state(now: float, running: str) -> dict[str, Any]:
        since = [{"id": running, "node": "n", "start_time": now, **job}]
        return {"now": now, "nodes": [node], "queued": waiting, "running": since}

    for k in range(400):  # everybody's last 256, too
        answer = post(session, state(60.0 * k, f"r{k}")).json()
    last = {start["job"]: start["p50"] - 60.0 * 399 for start in answer["expected"]["starts"]}
    assert last == {"w0": pytest.approx(30.0), "w1": pytest.approx(60.0)}  # they end between two states: after 30 s
    again = post(client("plan:easy-fifo", record=path, plan_budget_ms=1e4), state(60.0 * 400, "r400")).json()
    [first, _] = again["expected"]["starts"]
    assert first["p50"] - 60.0 * 400 == pytest.approx(30.0)


def test_planning_reads_no_observations() -> None:
    refused = client("plan").post("/v1/predict", json={"observation": [0.0] * 10})
    assert refused.status_code == 422 and "/v1/decisions" in refused.json()["detail"][0]["msg"]


def test_more_nodes_and_jobs_than_in_training(tmp_path: Path) -> None:
    session = client(str(write_random_policy(tmp_path / "policy.onnx", load_workload("cloud").cluster)))
    for state in busy_states(jobs=150, nodes=40, count=4):
        answer = post(session, state).json()
        assert answer["fallback"] is None and len(answer["priorities"]) == len(state["queued"]) > 140


def test_predict_is_the_policys(tmp_path: Path) -> None:
    path = str(write_random_policy(tmp_path / "policy.onnx", load_workload("cloud").cluster))
    session, policy = client(path), load_policy(path)
    for window in (16, 24):  # that of training, and another
        env = se.SchedulerEnv("cloud", reference=policy.reference, queue_window=window, reward="cost")
        observation, _ = env.reset(seed=1)
        for _ in range(20):
            asked = {"observation": observation.tolist(), "queue_window": window}
            action = post(session, asked, "/v1/predict").json()["action"]
            assert action == policy.predict(observation, deterministic=True, layout=env.layout)
            observation = env.step(action)[0]
    for wrong, problem in (
        (observation[:-1], "numbers"),
        (np.where(np.arange(len(observation)) < len(observation) - env.layout.actions, observation, 0), "mask"),
    ):
        refused = post(session, {"observation": wrong.tolist(), "queue_window": 24}, "/v1/predict")
        assert refused.status_code == 422 and problem in refused.json()["detail"][0]["msg"]


def test_model_and_health(tmp_path: Path) -> None:
    session = client(str(write_policy(tmp_path / "policy.onnx")))
    model = session.get("/v1/model").json()
    assert model["metadata"] == META and model["fallback"] == "easy-sjf" and len(model["version"]) == 12
    assert session.get("/healthz").json() == {"status": "ok"}
    assert session.get("/readyz").json() == {"status": "ok", "version": model["version"]}
    assert client("easy-saf").get("/v1/model").json()["metadata"] is None


def test_metrics_count_what_happened() -> None:
    session = client()
    for _ in range(3):
        post(session, STATE)
    post(session, {})
    assert (
        metric(session, "resourcerl_decisions_total") == metric(session, "resourcerl_decision_seconds_count") - 1 == 3
    )
    assert metric(session, "resourcerl_queued_jobs") == 4
    assert metric(session, "resourcerl_invalid_requests_total") == 1
    assert 'resourcerl_policy_info{name="easy-fifo"' in session.get("/metrics").text


# ----------------------------------------------------------------------------------------------------- what it refuses
REFUSED = {
    "missing": ({k: v for k, v in STATE.items() if k != "now"}, ["now"]),
    "no nodes": (changed("nodes", to=[]), ["nodes"]),
    "unknown field": (changed("queued", 1, "requsted_time", to=5.0), ["queued", 1, "requsted_time"]),
    "text": (changed("queued", 0, "submit_time", to="monday"), ["queued", 0, "submit_time"]),
    "NaN": (changed("queued", 2, "requested_time", to=float("nan")), ["queued", 2, "requested_time"]),
    "infinity": (changed("nodes", 0, "capacity", 0, to=float("inf")), ["nodes", 0, "capacity", 0]),
    "negative time": (changed("now", to=-1.0), ["now"]),
    "negative demand": (changed("queued", 3, "demand", 0, to=-1), ["queued", 3, "demand", 0]),
    "no time": (changed("queued", 1, "requested_time", to=0), ["queued", 1, "requested_time"]),
    "milliseconds": (changed("now", to=1.7e12), ["now"]),
    "standing still": (changed("nodes", 1, "speed", to=0), ["nodes", 1, "speed"]),
    "from the future": (changed("queued", 1, "submit_time", to=51), ["queued", 1, "submit_time"]),
    "starts in the future": (changed("running", 0, "start_time", to=51), ["running", 0, "start_time"]),
    "ran before": (changed("running", 0, "submit_time", to=5), ["running", 0, "submit_time"]),
    "nowhere": (changed("running", 0, "node", to="huge"), ["running", 0, "node"]),
    "twice": (changed("queued", 3, "id", to="a"), ["queued", 3, "id"]),
    "queued and running": (changed("queued", 2, "id", to="r"), ["queued", 2, "id"]),
    "two nodes of a name": (changed("nodes", 1, "name", to="small"), ["nodes", 1, "name"]),
    "other resources": (changed("queued", 2, "demand", to=[1, 1]), ["queued", 2, "demand"]),
    "asks for nothing": (changed("queued", 2, "demand", to=[0]), ["queued", 2, "demand"]),
    "too large": (changed("queued", 2, "demand", to=[9]), ["queued", 2, "demand"]),
    "overcommitted": (changed("running", 0, "demand", to=[9]), ["nodes", 1, "capacity"]),
    "more free than there is": (changed("nodes", 0, "free", to=[5]), ["nodes", 0, "free"]),
    "free where a job runs": (changed("nodes", 1, "free", to=[5]), ["nodes", 1, "free"]),
    "no capacity": (changed("nodes", 0, "capacity", to=[0]), ["nodes", "capacity"]),
    "lost on the grid": (changed("nodes", 1, "capacity", to=[1e13]), ["nodes", 0, "capacity"]),
    "names of other resources": (changed("resources", to=["cpu", "gpu"]), ["resources"]),
    "a list": ([], []),
    "no JSON": (b'{"now": 50,', []),
    "deep": (b"[" * 100_000, []),
    "not UTF-8": (b'{"now": 1, "nodes": [{"name": "\xff", "capacity": [1]}]}', []),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_with_its_field(case: str) -> None:
    state, where = REFUSED[case]
    answer = post(client(), state)
    assert answer.status_code == 422, answer.text
    [problem] = answer.json()["detail"]
    assert problem["loc"] == ["body", *where] and problem["msg"]


def test_other_resources_than_the_policys_are_refused(tmp_path: Path) -> None:
    session = client(str(write_random_policy(tmp_path / "policy.onnx", load_workload("cloud").cluster)))
    [problem] = post(session, STATE).json()["detail"]
    assert problem["loc"] == ["body", "nodes", 0, "capacity"] and "made for 2" in problem["msg"]


def test_limits() -> None:
    session = client(max_body_bytes=5_000, max_jobs=3, max_nodes=1)
    assert post(session, STATE).json()["detail"][0]["loc"] == ["body", "nodes"]
    assert post(client(max_jobs=3), STATE).json()["detail"][0]["loc"] == ["body", "queued"]
    assert post(session, b" " * 5_001).status_code == 413
    assert post(session, b" " * 5_000).status_code == 422
    assert session.post("/v1/decisions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert metric(session, "resourcerl_invalid_requests_total") == 4


amounts = st.one_of(st.integers(0, 10), st.floats(0, 10), st.floats(), st.just("4"), st.none())
times = st.one_of(st.floats(0, 100), st.floats(), st.integers(-5, 10**13))
names = st.sampled_from(["a", "b", "c", 1, 2, "1"])
rows = st.lists(amounts, min_size=1, max_size=2)
nodes = st.fixed_dictionaries({"name": names, "capacity": rows}, optional={"free": rows, "speed": times})
jobs = {"id": names, "requested_time": times, "demand": rows}
queued = st.fixed_dictionaries({**jobs, "submit_time": times}, optional={"user": names})
running = st.fixed_dictionaries({**jobs, "start_time": times, "node": names}, optional={"submit_time": times})
finished = st.fixed_dictionaries({"requested_time": times, "demand": rows, "run_time": times}, optional={"user": names})
wild = st.fixed_dictionaries(
    {"now": times, "nodes": st.lists(nodes, max_size=3)},
    optional={"queued": st.lists(queued), "running": st.lists(running), "finished": st.lists(finished)},
)


@given(wild)
@settings(max_examples=400)
def test_wild_states_are_read_or_refused(state: dict[str, Any]) -> None:
    try:
        found = cluster_state(decode(STATES, json.dumps(state).encode()))
    except Refused as refused:
        assert refused.status == 422 and refused.refusal.detail[0].msg
    else:
        check_decision(state, found)


@st.composite
def sane(draw: st.DrawFn) -> dict[str, Any]:
    """Clusters of up to four nodes and two resources, with jobs that run within them."""
    resources, now = draw(st.integers(1, 2)), draw(st.floats(0, 1e9))
    amount = st.one_of(st.integers(1, 8), st.floats(1e-3, 8))
    vector = st.lists(amount, min_size=resources, max_size=resources)
    cluster = [{"name": m, "capacity": draw(vector)} for m in range(draw(st.integers(1, 4)))]
    common = {"requested_time": st.floats(1e-3, 1e6), "demand": vector}
    state = {"now": now, "nodes": cluster, "queued": [], "running": []}
    for key in range(draw(st.integers(0, 12))):
        job = {"id": key, **draw(st.fixed_dictionaries(common))}
        m, before = draw(st.integers(0, len(cluster) - 1)), draw(st.floats(0, 1))
        taken = sum((np.array(other["demand"]) for other in state["running"] if other["node"] == m), start=0.0)
        if (taken + np.array(job["demand"]) <= cluster[m]["capacity"]).all() and draw(st.booleans()):
            state["running"].append(job | {"node": m, "start_time": now * before})
        elif any((np.array(job["demand"]) <= node["capacity"]).all() for node in cluster):
            state["queued"].append(job | {"submit_time": now * before})
    if draw(st.booleans()):
        cluster[0]["free"] = [0.0] * resources
    return state


@given(sane(), st.sampled_from(["easy-sjf", "greedy-saf", "fifo", "tetris", "round-robin", "easy-wfp3+sjf"]))
@settings(max_examples=300)
def test_decisions_keep_within_what_is_free(state: dict[str, Any], rule: str) -> None:
    check_decision(state, cluster_state(decode(STATES, json.dumps(state).encode())), rule)


def check_decision(state: dict[str, Any], found: ClusterState, rule: str = "easy-sjf") -> None:
    """Every job once, all that start fit, and a reservation is for a job and a time to come."""
    decision, free = RulePolicy(rule).decide(found), found.free.copy()
    assert sorted(decision.order) == list(range(len(state.get("queued", ()))))
    for job, node in decision.start:
        free[node] -= found.queued.demand[job]
    assert (free >= -1e-6 * found.cluster.capacity).all() and len({job for job, _ in decision.start}) == len(
        decision.start
    )
    if decision.reserved:
        assert decision.reserved[0] not in dict(decision.start) and decision.reserved[2] > found.now


document = schemathesis.openapi.from_asgi("/openapi.json", create_app(Service(Args("easy-sjf"))))


@document.parametrize()
@settings(max_examples=40)
def test_it_does_what_its_document_says(case: schemathesis.Case) -> None:
    """No 5xx, nothing that is not in it. What is valid by the document may still contradict itself."""
    case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=10)


# ---------------------------------------------------------------------------------------------------- when models fail
def write_endless_policy(path: Path, least: int = 3) -> Path:
    """A policy that counts to 10^12 before it answers, if there are so many jobs or more."""

    def scalar(name: str, kind: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, [])

    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["x", "one"], ["y"])], "count",
        [scalar("i", TensorProto.INT64), scalar("go", TensorProto.BOOL), scalar("x", TensorProto.FLOAT)],
        [scalar("on", TensorProto.BOOL), scalar("y", TensorProto.FLOAT)],
    )  # fmt: skip
    steps = [
        helper.make_node("Slice", ["jobs", "first", "last", "window", "each"], ["present"]),
        helper.make_node("ReduceMax", ["present"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["many"]),
        helper.make_node("Loop", ["times", "many", "zero"], ["end"], body=body),
        helper.make_node("Add", ["mask", "end"], ["logits"]),
    ]
    constants = {
        "first": np.array([0, least - 1, 0]), "last": np.array([1, least, 1]), "window": np.array([0, 1, 2]),
        "each": np.array([1, 1, 1]), "times": np.array(10**12), "zero": np.float32(0), "one": np.float32(1),
    }  # fmt: skip
    shapes = {"jobs": ["B", "K", None], "nodes": ["B", "M", None], "cluster": ["B", None], "mask": ["B", "A"]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "A"])]
    initial = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(steps, "endless", inputs, outputs, initial),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=9,
    )  # fmt: skip
    helper.set_model_props(model, {"resourcerl": json.dumps(META)})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("deadline_ms", [0.001, 1.0])
def test_a_late_model_is_replaced_by_its_rule(tmp_path: Path, deadline_ms: float) -> None:
    session = client(str(write_endless_policy(tmp_path / "policy.onnx")), deadline_ms=deadline_ms)
    began = time.perf_counter()
    answer = post(session, STATE).json()
    assert time.perf_counter() - began < 2.0
    assert answer["fallback"] == "late" and answer["decided_by"] == "easy-sjf"
    assert answer["start"] == post(client("easy-sjf"), STATE).json()["start"]
    assert metric(session, "resourcerl_fallbacks_total") == 1


def test_a_policy_that_does_not_answer_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment.service, "TRIAL_SECONDS", 0.2)
    with pytest.raises(PolicyError, match="its network does not run"):
        Service(Args(str(write_endless_policy(tmp_path / "policy.onnx", least=1))))


@pytest.mark.parametrize("failure", [RuntimeError("the driver\nis gone"), np.nan])
def test_a_failing_model_is_replaced_by_its_rule(tmp_path: Path, failure: Any, caplog: Any) -> None:
    def fail(parts: Observation) -> np.ndarray:
        if isinstance(failure, Exception):
            raise failure
        return np.full((1, parts.mask.shape[1]), failure, np.float32)

    session = client(str(write_policy(tmp_path / "policy.onnx")))
    assert post(session, STATE).json()["fallback"] is None
    session.service.model.policy._logits = fail
    for _ in range(3):
        answer = post(session, STATE).json()
        assert answer["fallback"] == "failing" and answer["decided_by"] == "easy-sjf" and len(answer["start"]) == 3
    assert metric(session, "resourcerl_fallbacks_total") == 3
    assert len(caplog.records) == 1 and "its rule decides" in caplog.text  # all are counted, one is told


def test_hours_behind_the_file_are_a_promise_to_those_who_wait(tmp_path: Path) -> None:
    path, overdue = write_policy(tmp_path / "policy.onnx"), changed("now", to=5_000.0)
    for job in overdue["queued"][:3]:  # all but the last, which has waited since 3 s
        job["submit_time"] = 4_990.0
    plain, patient = client(str(path)), client(f"{path}@1")
    first, second = post(plain, overdue).json(), post(patient, overdue).json()
    assert (first["start"][0]["job"], second["start"][0]["job"]) == (3, "d")
    assert first["policy_version"] == hashlib.sha256(path.read_bytes()).hexdigest()[:12] != second["policy_version"]
    assert second["decided_by"] == f"{tmp_path.name}/policy.onnx@1"
    assert patient.service.model.fallback.reference == "easy-sjf@1"
    before = patient.service.model.version
    write_policy(path, seed=2)
    patient.service.refresh()
    assert patient.service.model.version != before and patient.service.model.policy.hours == "1"


def test_a_new_file_that_is_odd_in_any_way_leaves_the_old_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    path = write_policy(tmp_path / "policy.onnx")
    session = client(str(path))
    service, first = session.service, session.service.model
    for odd in ODD_METADATA:
        write_policy(path, **odd)
        service.refresh()
    with monkeypatch.context() as broken:
        broken.setattr(deployment.service, "load_policy", lambda name: [].popp)  # an error that nobody has thought of
        service.refresh(wanted=True)
    assert service.model is first and metric(session, "resourcerl_reloads_total") == len(ODD_METADATA) + 1
    assert all(f"version {first.version} stays" in line for line in caplog.messages)
    assert len(caplog.messages) == len(ODD_METADATA) + 1
    write_policy(path, seed=2)
    service.refresh()
    service.refresh()  # no other file
    assert service.model.version != first.version and len(caplog.messages) == len(ODD_METADATA) + 1


# ----------------------------------------------------------------------------------------------------------- in motion
def start(*flags: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "serve.py"), *map(str, flags)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def running(
    *flags: object, transport: httpx.HTTPTransport | None = None, headers: Any = None
) -> Iterator[httpx.Client]:
    """A service in a process of its own, ready; `client.process` is the process."""
    port = free_port()
    process = start(*flags, "--port", port)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, headers=headers, timeout=10) as session:
        try:
            wait_until(lambda: is_ready(session), process)
            session.process = process
            yield session
        finally:
            process.kill()
            process.communicate()


def is_ready(session: httpx.Client) -> bool:
    try:
        return session.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "in vain"
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def version(session: httpx.Client) -> str:
    return session.get("/readyz").json()["version"]


def test_a_new_file_is_loaded_and_a_damaged_one_refused_without_a_dropped_request(tmp_path: Path) -> None:
    path = write_policy(tmp_path / "policy.onnx")
    good = [path.read_bytes(), write_policy(tmp_path / "other" / "policy.onnx", seed=2).read_bytes()]
    with running("--policy", path) as session:
        first, stop, codes = version(session), threading.Event(), []

        def ask() -> None:
            with httpx.Client(base_url=session.base_url, timeout=10) as mine:
                while not stop.is_set():
                    codes.append(mine.post("/v1/decisions", json=STATE).status_code)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        [thread.start() for thread in threads]
        try:
            path.write_bytes(good[1])
            wait_until(lambda: version(session) != first)
            second = version(session)
            path.write_bytes(good[0][: len(good[0]) // 2])
            wait_until(lambda: metric(session, "resourcerl_reloads_total") == 2)
            assert version(session) == second
            path.unlink()
            wait_until(lambda: metric(session, "resourcerl_reloads_total") == 3)
            assert version(session) == second
            path.write_bytes(good[0])
            wait_until(lambda: version(session) == first)
        finally:
            stop.set()
            [thread.join() for thread in threads]
        assert len(codes) > 100 and set(codes) == {200}
        assert 'resourcerl_reloads_total{result="refused"} 2.0' in session.get("/metrics").text


def test_sighup_reloads(tmp_path: Path) -> None:
    path = write_policy(tmp_path / "policy.onnx")
    with running("--policy", path) as session:
        session.process.send_signal(signal.SIGHUP)
        wait_until(lambda: metric(session, "resourcerl_reloads_total") == 1)
    with running("--policy", "easy-sjf") as session:  # nothing to load: it lives on
        session.process.send_signal(signal.SIGHUP)
        wait_until(lambda: metric(session, "resourcerl_reloads_total") == 1)


def test_kill_during_a_reload(tmp_path: Path) -> None:
    """kill -9 while the file changes all the time: it starts again with a whole policy, and the record can be read."""
    path, record = write_policy(tmp_path / "policy.onnx"), tmp_path / "decisions.jsonl"
    new = [path.read_bytes(), write_policy(tmp_path / "other" / "policy.onnx", seed=2).read_bytes()]
    rng = np.random.default_rng(0)
    for _ in range(3):
        with running("--policy", path, "--record", record) as session:
            end = time.monotonic() + rng.uniform(0.1, 0.3)
            while time.monotonic() < end:
                (tmp_path / "new").write_bytes(new[rng.integers(2)])
                os.replace(tmp_path / "new", path)
                session.process.send_signal(signal.SIGHUP)
                assert session.post("/v1/decisions", json=STATE).status_code == 200
            session.process.kill()
            session.process.wait()
    assert len([line for line in record.read_text().splitlines() if line]) > 3
    with pytest.raises(WorkloadError, match="no job"):  # they are all the same moment
        read_decisions(record)


def test_workers_share_the_work_are_replaced_and_end_with_their_supervisor(tmp_path: Path) -> None:
    path = write_policy(tmp_path / "policy.onnx")
    with running("--policy", path, "--workers", 2) as session:
        supervisor = psutil.Process(session.process.pid)

        def workers() -> list[psutil.Process]:
            alive = [child for child in supervisor.children() if child.status() != psutil.STATUS_ZOMBIE]
            return [child for child in alive if "spawn_main" in " ".join(child.cmdline())]

        wait_until(lambda: len(workers()) == 2)
        threads = [threading.Thread(target=lambda: [httpx.post(f"{session.base_url}/v1/decisions", json=STATE)
                                                    for _ in range(20)]) for _ in range(4)]  # fmt: skip
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert metric(session, "resourcerl_decisions_total") == 80  # of both workers, whoever answers
        first, killed = version(session), workers()
        path.write_bytes(b"?")
        [worker.kill() for worker in killed]  # those that take their places go on with the last policy that worked
        wait_until(lambda: len(workers()) == 2 and not set(killed) & set(workers()))
        wait_until(lambda: is_ready(session) and version(session) == first)
        write_policy(path, seed=2)
        wait_until(lambda: is_ready(session) and version(session) != first)
        others = workers()
        session.process.kill()
        psutil.wait_procs(others, timeout=20)
        assert len(others) == 2 and not any(other.is_running() for other in others)


@pytest.mark.parametrize("told, code", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)])
def test_it_ends_when_told_to(told: int, code: int) -> None:
    with running("--policy", "easy-sjf") as session:
        session.process.send_signal(told)
        assert session.process.wait(20) == code
        assert "Traceback" not in session.process.stderr.read()


def test_who_connects_and_asks_for_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of a request's head; who has asked may stay."""
    monkeypatch.setattr(deployment.processes, "REQUEST_SECONDS", 0.3)

    async def answers() -> list[Any]:
        listener = socket.create_server(("127.0.0.1", 0))
        service = Service(Args("easy-sjf"))
        serving = asyncio.create_task(serve_on(service, create_app(service), listener))
        found = []
        for request in (b"", b"GET /healthz HTTP/1.1\r\n", b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(request)
            await asyncio.sleep(0.6)
            found.append(await asyncio.wait_for(reader.read(15), 5))
        writer.write(request)
        await asyncio.wait_for(reader.readuntil(b"HTTP/1.1 200 OK"), 5)
        serving.cancel()
        return found

    assert asyncio.run(answers()) == [b"", b"", b"HTTP/1.1 200 OK"]


def test_slow_bodies_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment.http_api, "BODY_SECONDS", 0.05)

    async def never() -> Any:
        await asyncio.sleep(60)

    async def ask() -> list[int]:
        app, statuses = create_app(Service(Args("easy-sjf"))), []

        async def send(message: Any) -> None:
            statuses.append(message.get("status"))

        scope = {
            "type": "http", "method": "POST", "path": "/v1/decisions", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
            "server": ("testserver", 80), "client": ("testclient", 1), "root_path": "",
        }  # fmt: skip
        await app(scope, never, send)
        return statuses

    assert asyncio.run(ask())[0] == 408


# --------------------------------------------------------------------------------------------------- who may talk to it
def test_the_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    app = create_app(Service(Args("easy-sjf")), read_token(Args("easy-sjf", token_file=tmp_path / "token")))
    session = TestClient(app)
    for path in ("/v1/model", "/metrics", "/openapi.json", "/nowhere"):
        for header in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            answer = session.get(path, headers=header)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert post(session, STATE).status_code == 401
    assert session.get("/healthz").status_code == session.get("/readyz").status_code == 200
    session.headers["Authorization"] = "Bearer secret"
    assert post(session, STATE).status_code == 200 and session.get("/nowhere").status_code == 404
    assert session.get("/openapi.json").json()["paths"]["/v1/decisions"]["post"]["security"] == [{"token": []}]


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "decide.sock"
    flags = ("--policy", "easy-sjf", "--unix-socket", path)
    for _ in range(2):  # the second time over what the killed one left
        with running(*flags, transport=httpx.HTTPTransport(uds=str(path))) as session:
            assert path.stat().st_mode & 0o777 == 0o660
            assert session.post("/v1/decisions", json=STATE).status_code == 200
            second = start(*flags)
            assert second.wait(60) == 2 and "another service listens there" in second.communicate()[1]


def test_what_cannot_be_served_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "damaged.onnx").write_bytes(b"?")
    write_policy(tmp_path / "odd.onnx", resources=None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags, words in (
            (("--policy", "alphabetical"), ("alphabetical", "easy-")),
            (("--policy", tmp_path / "damaged.onnx"), ("damaged.onnx", "export it again")),
            (("--policy", tmp_path / "odd.onnx"), ("odd.onnx", "$.resources", "export one")),
            (("--policy", "fifo", "--host", "0.0.0.0"), ("0.0.0.0", "--token-file")),
            (("--policy", "fifo", "--host", "example.org"), ("example.org", "--token-file")),
            (("--policy", "fifo", "--token-file", tmp_path / "empty"), ("empty", "no token")),
            (("--policy", "fifo", "--token-file", tmp_path / "nowhere"), ("nowhere",)),
            (("--policy", "fifo", "--workers", 2, "--record", tmp_path / "a.jsonl"), ("--workers 2", "--record")),
            (("--policy", "fifo", "--record", tmp_path / "no" / "a.jsonl"), ("a.jsonl",)),
            (("--policy", "fifo", "--record", tmp_path / "a.json"), ("a.json", ".jsonl")),
            (("--policy", "fifo", "--port", taken.getsockname()[1]), ("in use",)),
        ):
            process = start(*flags)
            errors = process.communicate(timeout=60)[1]
            assert process.returncode == 2, errors
            [line] = errors.strip().splitlines()
            assert line.startswith("error: ") and all(word in line for word in words), line


@pytest.mark.parametrize(
    "flag", ["port=99999", "port=-1", "workers=0", "deadline_ms=nan", "deadline_ms=-5", "deadline_ms=0",
             "plan_budget_ms=0", "max_jobs=-1", "max_nodes=0", "max_body_bytes=0", "record_bytes=-1", "record_files=0"],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, _, value = flag.partition("=")
    with pytest.raises(SystemExit) as ended:
        serve.main(Args("easy-fifo", **{name: float(value) if name.endswith("_ms") else int(value)}))
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(f"error: --{name.replace('_', '-')} {value}") and "give" in line


# ---------------------------------------------------------------------------------------------------------- the record
@pytest.mark.parametrize("reported", [True, False])
def test_a_record_reads_back_as_the_workload(tmp_path: Path, reported: bool) -> None:
    """What the service decided through a simulated episode, in rotated parts; with and without reports of run times."""
    jobs = load_workload("cloud", "test", runs=1, run_jobs=150)
    [schedule] = load_policy("easy-sjf").schedule(jobs)
    path = tmp_path / "decisions.jsonl"
    session = client("easy-sjf", record=path, record_bytes=100_000, record_files=20)
    previous = -1.0
    for now in np.unique([schedule.jobs.submit_time, schedule.start_time + schedule.service_time]):
        state = state_at(schedule, now)
        if reported:
            end = schedule.start_time + schedule.service_time
            state["finished"] = [
                {"id": i + 1, "run_time": jobs.jobs.run_time[i], "requested_time": 1, "demand": [1, 1]}
                for i in np.flatnonzero((end > previous) & (end <= now)).tolist()
            ]
        assert post(session, state).status_code == 200
        previous = now
    assert len(list(tmp_path.glob("decisions.jsonl.*"))) > 2
    with path.open("a") as torn:
        torn.write('{"state": {"now": 1, "no')
    Service(Args("easy-sjf", record=path)).recorder.close()  # a service that starts again ends the torn line
    again = load_workload(str(path), "all")
    assert again.skipped == {"record cut short": 1} and len(again.jobs) == 150
    for name in ("submit_time", "requested_time", "demand", "job_id"):
        np.testing.assert_array_equal(getattr(again.jobs, name), getattr(jobs.jobs, name), name)
    np.testing.assert_allclose(again.jobs.run_time, jobs.jobs.run_time, rtol=0 if reported else 1e-9)
    np.testing.assert_allclose(again.jobs.wait_time, schedule.wait)
    np.testing.assert_array_equal(again.cluster.capacity, jobs.cluster.capacity)
    np.testing.assert_array_equal(again.cluster.speed, jobs.cluster.speed)
    assert again.cluster.resources == ("cpu", "memory")
    same = lambda codes: codes[:, None] == codes  # noqa: E731
    np.testing.assert_array_equal(same(again.jobs.user), same(jobs.jobs.user))
    [replayed] = load_policy("easy-sjf").schedule(again)
    assert replayed.wait.mean() == pytest.approx(schedule.wait.mean(), rel=1e-6)
    assert isinstance(load_workload(str(path), "train"), Workload)


def test_a_full_disk_costs_no_decision(tmp_path: Path) -> None:
    session = client("easy-sjf", record=Path("/dev/full"))
    assert post(session, STATE).status_code == 200
    assert metric(session, "resourcerl_unrecorded_total") == 1


# ---------------------------------------------------------------------------------------------------------- the figures
def test_ready_soon_and_without_torch() -> None:
    code = "import sys, serve; serve.Service(serve.Args('easy-sjf')); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    began = time.monotonic()
    with running("--policy", "easy-sjf"):  # 1 s where nothing else runs
        assert time.monotonic() - began < 10


def test_fast_and_of_steady_memory(tmp_path: Path) -> None:
    """A tenth of what README.md and docs/deploy.md say, so that it also holds on a busy machine."""
    service = Service(Args(str(write_random_policy(tmp_path / "policy.onnx", load_workload("cloud").cluster))))

    def seconds(jobs: int, nodes: int, times: int) -> float:
        bodies = [json.dumps(state).encode() for state in busy_states(jobs, nodes, count=8)]
        took = []
        for k in range(times):
            began = time.perf_counter()
            service.decide(bodies[k % 8])
            took.append(time.perf_counter() - began)
        return float(np.median(took))

    assert seconds(1000, 256, 8) < 0.25
    assert seconds(64, 16, 500) < 0.01
    before = resident()
    seconds(64, 16, 2000)
    assert resident() - before < 4 * 2**20


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
