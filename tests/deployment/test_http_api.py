"""The service over HTTP: its document, limits, metrics and token."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
from decisions import STATE, client, metric, post
from fastapi.testclient import TestClient
from hypothesis import settings
from policy_files import META, write_policy, write_random_policy
from schemathesis.specs.openapi.checks import positive_data_acceptance

import deployment.http_api
import deployment.processes
import deployment.service
import scheduler_env as se
from deployment.http_api import create_app
from deployment.processes import read_token
from deployment.service import Args, Service
from policies import load_policy
from workloads.load import load_workload

document = schemathesis.openapi.from_asgi("/openapi.json", create_app(Service(Args("easy-sjf"))))


@document.parametrize()
@settings(max_examples=40)
def test_it_does_what_its_document_says(case: schemathesis.Case) -> None:
    """No 5xx, nothing that is not in it. What is valid by the document may still contradict itself."""
    case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=10)


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
    assert (
        model["metadata"] == META | {"resource_names": None}
        and model["fallback"] == "easy-sjf"
        and len(model["version"]) == 12
    )
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


def test_limits() -> None:
    session = client(max_body_bytes=5_000, max_jobs=3, max_nodes=1)
    assert post(session, STATE).json()["detail"][0]["loc"] == ["body", "nodes"]
    assert post(client(max_jobs=3), STATE).json()["detail"][0]["loc"] == ["body", "queued"]
    assert post(session, b" " * 5_001).status_code == 413
    assert post(session, b" " * 5_000).status_code == 422
    assert session.post("/v1/decisions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert metric(session, "resourcerl_invalid_requests_total") == 4


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
