"""The decision service: its decisions against the simulator's, what happens when models fail, what it records."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from decisions import STATE, changed, client, metric, post
from load import busy_states, state_at
from onnx import TensorProto, helper, numpy_helper
from places import ROOT
from policy_files import META, ODD_METADATA, write_policy, write_random_policy

import deployment.http_api
import deployment.processes
import deployment.service
from deployment.contract import STATES, Refused, decode, in_order
from deployment.service import Args, Service
from policies import PolicyError, load_policy
from simulator.moment import DEPTH
from simulator.observation import Observation
from workloads.jobs import Workload, at_loads
from workloads.load import load_workload


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


def test_resources_are_names_that_a_policy_takes_in_any_order(tmp_path: Path) -> None:
    names = ["cpu", "memory", "gpu"]
    path = write_policy(tmp_path / "policy.onnx", resources=3, resource_names=names)
    service = Service(Args(str(path)))
    node = {"cpu": 8, "memory": 64, "gpu": 4}
    demands = [{"cpu": 1, "memory": 60, "gpu": 1}, {"cpu": 2, "memory": 8, "gpu": 4}, {"cpu": 8, "memory": 1, "gpu": 0}]

    def state(order: list[str], named: bool = True) -> bytes:
        row = lambda amounts: [amounts[name] for name in order]  # noqa: E731
        job = lambda k: {"id": k, "demand": row(demands[k]), "requested_time": 60}  # noqa: E731
        return json.dumps(
            {
                "now": 100, "nodes": [{"name": "a", "capacity": row(node), "free": row(node | {"cpu": 6})}],
                "queued": [job(0) | {"submit_time": 1}, job(1) | {"submit_time": 2}],
                "finished": [job(2) | {"run_time": 5}], **({"resources": order} if named else {}),
            }
        ).encode()  # fmt: skip

    expected = service.decide(state(names))
    assert expected == service.decide(state(names, named=False))
    for order in permutations(names):
        assert service.decide(state(list(order))) == expected
        found = decode(STATES, state(list(order)))
        in_order(found, names)
        assert found == decode(STATES, state(names))  # to the last amount
    node |= {"disk": 1}
    demands = [demand | {"disk": 1} for demand in demands]
    for order in (["cpu", "memory", "disk"], ["cpu", "memory"], [*names, "disk"], ["cpu", "cpu", "gpu"]):
        with pytest.raises(Refused, match="and the policy was trained with cpu, memory, gpu; use these names"):
            service.decide(state(order))
    unnamed = write_policy(tmp_path / "former.onnx", resources=3)  # of a version that did not know them
    assert Service(Args(str(unnamed))).decide(state(["cpu", "memory", "disk"]))


def test_a_file_that_stands_for_a_rule_is_called_so(tmp_path: Path) -> None:
    path = write_policy(tmp_path / "run" / "policy.onnx", reference="easy-saf", rule="easy-saf")
    service = Service(Args(str(path)))
    assert service.describe()["name"] == "run (= easy-saf)"
    assert json.loads(service.decide(json.dumps(STATE).encode()))["decided_by"] == "run (= easy-saf)"


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


def test_of_a_long_queue_planning_looks_at_the_jobs_that_its_base_ranks_first() -> None:
    """And at what the base starts; the others have levels behind theirs, and no expectations."""
    state = busy_states(jobs=150, nodes=8, count=1)[0]
    answer = post(client("plan:easy-fifo", plan_budget_ms=1e5), state).json()
    first = {job["id"] for job in state["queued"][:DEPTH]}  # FIFO's order is that of submission
    expected = {start["job"] for start in answer["expected"]["starts"]}
    assert first <= expected and len(answer["priorities"]) == len(state["queued"]) > len(expected)
    base = post(client("easy-fifo"), state).json()
    assert expected - first <= {start["job"] for start in base["start"] + answer["start"]}
    later = [level["job"] for level in answer["priorities"]][len(expected) :]
    assert later == [job["id"] for job in state["queued"] if job["id"] not in expected]


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


# ----------------------------------------------------------------------------------------------------- when models fail
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
    began = time.monotonic()
    answer = post(session, STATE).json()
    assert time.monotonic() - began < 60.0  # by itself it would count for hours
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


# ----------------------------------------------------------------------------------------------------------- the record
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
def test_fast_and_of_steady_memory(tmp_path: Path) -> None:
    """A tenth of what docs/deploy.md says, in processor time, so that it also holds on a busy machine."""
    service = Service(Args(str(write_random_policy(tmp_path / "policy.onnx", load_workload("cloud").cluster))))

    def seconds(jobs: int, nodes: int, times: int) -> float:
        bodies = [json.dumps(state).encode() for state in busy_states(jobs, nodes, count=8)]
        took = []
        for k in range(times):
            began = time.process_time()
            service.decide(bodies[k % 8])
            took.append(time.process_time() - began)
        return float(np.median(took))

    assert seconds(1000, 256, 8) < 0.25
    assert seconds(64, 16, 500) < 0.01
    before = resident()
    seconds(64, 16, 2000)
    assert resident() - before < 4 * 2**20


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
