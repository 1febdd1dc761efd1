"""The loop promotes ten times while 16 clients ask the service: no request fails, and the version follows."""

import asyncio
import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import load
import pytest
from orchestration_helpers import ENVIRONMENT, ROOT, SMALL, Running, Site, Temporal, free_port, wait_for
from policy_files import write_policy

from deployment.service import RELOAD_SECONDS

PROMOTIONS, CLIENTS = 10, 16


@pytest.mark.slow
def test_no_request_fails_and_the_version_follows_within_a_second(temporal: Temporal, tmp_path: Path) -> None:
    nodes, deployed = 2, tmp_path / "var" / "policy.onnx"
    template = write_policy(tmp_path / "template" / "policy.onnx", nodes=nodes, resources=2)
    deployed.parent.mkdir()
    deployed.write_bytes(template.read_bytes())
    site, port = Site(tmp_path, temporal, STUB_POLICY=str(template)), free_port()
    command = [sys.executable, str(ROOT / "serve.py"), "--policy", str(deployed), "--port", str(port)]
    service = subprocess.Popen(command, env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, 120)
        site.worker()
        loop = Running(site, replace(SMALL, rounds=PROMOTIONS, deploy_to=str(deployed)))
        late: list[float] = []

        async def watch() -> int:
            """How late each version is, until the loop is over; how many there were."""
            version, seen, since = "", set(), 0.0
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                result = asyncio.create_task(loop.handle.result())
                while not result.done() or version not in seen:
                    wanted = hashlib.sha256(deployed.read_bytes()).hexdigest()[:12]
                    if wanted != version:
                        version, since = wanted, deployed.stat().st_mtime
                    if version not in seen and (await client.get("/v1/model")).json()["version"] == version:
                        seen.add(version)
                        late.append(time.time() - since)
                    await asyncio.sleep(0.05)
            return len(seen)

        async def ask(over: Callable[[], bool]) -> tuple[int, int]:
            """How many requests there were, and how many failed."""
            states, requests, errors = load.busy_states(8, nodes), 0, 0
            while not over():
                seconds, failed, _ = await load.load(load.Args(port=port, clients=CLIENTS, seconds=2), states)
                requests, errors = requests + len(seconds), errors + failed
            return requests, errors

        async def both() -> tuple[int, int, int]:
            watching = asyncio.create_task(watch())
            requests, errors = await ask(watching.done)
            return await watching, requests, errors

        versions, requests, errors = loop.do(both())
        loop.close()
    finally:
        site.close()
        service.kill()
        service.wait()
    assert versions >= PROMOTIONS
    assert requests > 500
    assert errors == 0
    assert RELOAD_SECONDS <= 0.25
    assert sorted(late)[len(late) // 2] < 1.0, late  # a machine may be busy for a moment, not most of the time
