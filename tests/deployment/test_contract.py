"""What the service reads and refuses, and that its decisions keep within what is free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decisions import STATE, changed, client, post
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_files import write_random_policy

from deployment.contract import STATES, Refused, cluster_state, decode
from policies import RulePolicy
from simulator.moment import ClusterState
from workloads.load import load_workload

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
