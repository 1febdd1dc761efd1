"""A real Prometheus scrapes a running loop and a service: every query of the dashboard finds something."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from load import busy_states
from orchestration_helpers import ENVIRONMENT, ROOT, SMALL, Running, Site, eventually, free_port, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deployment.priorities import Metrics as SlurmMetrics

DASHBOARD = json.loads((ROOT / "docs" / "deploy" / "grafana.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
# Nothing of the kind happens here: no record of a real cluster, no failure, no Slurm.
NOT_HERE = ("drift_ratio", "_failed", "fallbacks", "invalid_requests", "slurm")
SCRAPE = (
    "global: {{scrape_interval: 1s}}\nscrape_configs: [{{job_name: all, static_configs: [{{targets: {targets}}}]}}]\n"
)


@pytest.fixture
def prometheus(site: Site, tmp_path: Path) -> Iterator[str]:
    """The address of one that scrapes a worker after a loop of two rounds, and a service that has decided something."""
    if shutil.which("prometheus") is None:
        pytest.skip("without Prometheus (apt-get install prometheus)")
    ports = worker, service, own = free_port(), free_port(), free_port()
    site.worker("--metrics-port", str(worker))
    loop = Running(site, replace(SMALL, rounds=2))
    loop.result()
    config = tmp_path / "prometheus.yml"
    config.write_text(SCRAPE.format(targets=json.dumps([f"127.0.0.1:{port}" for port in ports[:2]])))
    commands = [
        [sys.executable, str(ROOT / "serve.py"), "--policy", "easy-sjf", "--port", str(service)],
        ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}",
         f"--web.listen-address=127.0.0.1:{own}"],
    ]  # fmt: skip
    log = (tmp_path / "log").open("wb")
    processes = [
        subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, stdout=log, stderr=log) for command in commands
    ]
    try:
        wait_for(service), wait_for(own)
        [state] = busy_states(8, 2, count=1)
        for _ in range(8):  # rates need several scrapes that differ
            assert httpx.post(f"http://127.0.0.1:{service}/v1/decisions", json=state).status_code == 200
            time.sleep(0.5)
        yield f"http://127.0.0.1:{own}"
    finally:
        for process in processes:
            process.kill()
            process.wait()
        log.close()
        loop.close()


def ask(prometheus: str, query: str) -> list[dict[str, Any]]:
    found = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}).json()
    assert found["status"] == "success", found
    return found["data"]["result"]


@pytest.mark.slow
def test_every_query_of_the_dashboard_finds_what_it_asks_for(prometheus: str) -> None:
    eventually(lambda: ask(prometheus, "rate(resourcerl_decisions_total[5m]) > 0"))
    empty = [query for query in QUERIES if not ask(prometheus, query)]
    assert not [query for query in empty if not any(word in query for word in NOT_HERE)]
    [gain] = ask(prometheus, 'resourcerl_loop_cost_ratio{rival="champion",bound="mean"}')
    assert float(gain["value"][1]) == pytest.approx(0.9)
    [age] = ask(prometheus, "time() - max(resourcerl_loop_champion_since_timestamp_seconds)")
    assert 0 < float(age["value"][1]) < 300


def test_what_the_dashboard_asks_of_slurms_agent_is_there() -> None:
    known = {metric.name for metric in SlurmMetrics("shadow").registry.collect()}
    asked = {name for query in QUERIES for name in re.findall(r"resourcerl_slurm_\w+", query)}
    assert asked
    assert {re.sub(r"_(total|bucket)$", "", name) for name in asked} <= known


@pytest.mark.slow
def test_a_round_is_a_point_in_tensorboard(site: Site) -> None:
    site.worker()
    loop = Running(site, replace(SMALL, rounds=3))
    loop.result()
    events = EventAccumulator(str(site.folder / "runs" / "loop" / loop.id))
    events.Reload()
    points = {
        tag: [(point.step, events_value(point)) for point in events.Tensors(tag)] for tag in events.Tags()["tensors"]
    }
    assert points["loop/champion_round"] == [(1, 1), (2, 2), (3, 3)]
    assert [step for step, _ in points["candidate/to_champion"]] == [2, 3]
    assert points["candidate/to_easy_fifo"][0][1] == pytest.approx(-10)
    assert all(value > 0 for _, value in points["seconds/training"])
    loop.close()


def events_value(point: Any) -> float:
    return float(point.tensor_proto.float_val[0])
