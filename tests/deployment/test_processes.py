"""The service as processes: reloading, workers, signals, sockets."""

from __future__ import annotations

import asyncio
import os
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
import psutil
import pytest
from decisions import STATE, metric
from places import ROOT
from policy_files import write_policy

import deployment.http_api
import deployment.processes
import deployment.service
from deployment.http_api import create_app
from deployment.processes import serve as serve_on
from deployment.service import Args, Service
from workloads.jobs import WorkloadError
from workloads.records import read_decisions


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
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, headers=headers, timeout=60) as session:
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


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "in vain"
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def version(session: httpx.Client) -> str:
    return session.get("/readyz").json()["version"]


def test_ready_soon_and_without_torch() -> None:
    code = "import sys, serve; serve.Service(serve.Args('easy-sjf')); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    with running("--policy", "easy-sjf") as session:  # 1 s where nothing else runs
        took = psutil.Process(session.process.pid).cpu_times()
        assert took.user + took.system < 15  # a processor may be three times slower than usual


def test_a_new_file_is_loaded_and_a_damaged_one_refused_without_a_dropped_request(tmp_path: Path) -> None:
    path = write_policy(tmp_path / "policy.onnx")
    good = [path.read_bytes(), write_policy(tmp_path / "other" / "policy.onnx", seed=2).read_bytes()]
    with running("--policy", path) as session:
        first, stop, codes = version(session), threading.Event(), []

        def ask() -> None:
            with httpx.Client(base_url=session.base_url, timeout=60) as mine:
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
            wait_until(lambda: version(session) == first and len(codes) > 100)
        finally:
            stop.set()
            [thread.join() for thread in threads]
        assert set(codes) == {200}
        assert 'resourcerl_reloads_total{result="refused"} 2.0' in session.get("/metrics").text


def test_sighup_reloads(tmp_path: Path) -> None:
    path = write_policy(tmp_path / "policy.onnx")
    with running("--policy", path) as session:
        session.process.send_signal(signal.SIGHUP)
        wait_until(lambda: metric(session, "resourcerl_reloads_total") == 1)
    with running("--policy", "easy-sjf") as session:  # nothing to load: it lives on
        session.process.send_signal(signal.SIGHUP)
        wait_until(lambda: metric(session, "resourcerl_reloads_total") == 1)


@pytest.mark.slow
def test_kill_during_a_reload(tmp_path: Path) -> None:
    """kill -9 while the file changes all the time: it starts again with a whole policy, and the record can be read."""
    path, record = write_policy(tmp_path / "policy.onnx"), tmp_path / "decisions.jsonl"
    new = [path.read_bytes(), write_policy(tmp_path / "other" / "policy.onnx", seed=2).read_bytes()]
    rng = np.random.default_rng(0)
    for _ in range(3):
        with running("--policy", path, "--record", record) as session:
            for _ in range(rng.integers(2, 40)):
                (tmp_path / "new").write_bytes(new[rng.integers(2)])
                os.replace(tmp_path / "new", path)
                session.process.send_signal(signal.SIGHUP)
                assert session.post("/v1/decisions", json=STATE).status_code == 200
            session.process.kill()
            session.process.wait()
    assert len([line for line in record.read_text().splitlines() if line]) > 3
    with pytest.raises(WorkloadError, match="no job"):  # they are all the same moment
        read_decisions(record)


@pytest.mark.slow
def test_workers_share_the_work_are_replaced_and_end_with_their_supervisor(tmp_path: Path) -> None:
    path = write_policy(tmp_path / "policy.onnx")
    with running("--policy", path, "--workers", 2) as session:
        supervisor = psutil.Process(session.process.pid)

        def workers() -> list[psutil.Process]:
            alive = [child for child in supervisor.children() if child.status() != psutil.STATUS_ZOMBIE]
            return [child for child in alive if "spawn_main" in " ".join(child.cmdline())]

        wait_until(lambda: len(workers()) == 2)

        def ask() -> None:
            for _ in range(20):
                httpx.post(f"{session.base_url}/v1/decisions", json=STATE, timeout=60)

        threads = [threading.Thread(target=ask) for _ in range(4)]
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
        psutil.wait_procs(others, timeout=60)
        assert len(others) == 2 and not any(other.is_running() for other in others)


@pytest.mark.parametrize("told, code", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)])
def test_it_ends_when_told_to(told: int, code: int) -> None:
    with running("--policy", "easy-sjf") as session:
        session.process.send_signal(told)
        assert session.process.wait(60) == code
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


@pytest.mark.slow
def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "decide.sock"
    flags = ("--policy", "easy-sjf", "--unix-socket", path)
    for _ in range(2):  # the second time over what the killed one left
        with running(*flags, transport=httpx.HTTPTransport(uds=str(path))) as session:
            assert path.stat().st_mode & 0o777 == 0o660
            assert session.post("/v1/decisions", json=STATE).status_code == 200
            second = start(*flags)
            assert second.wait(120) == 2 and "another service listens there" in second.communicate()[1]
