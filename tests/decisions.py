"""A state of a cluster, and a decision service in this process to send it to."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
from fastapi.testclient import TestClient

from deployment.http_api import create_app
from deployment.service import Args, Service

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
