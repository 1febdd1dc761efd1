"""Real servers for the tests: S3 (moto) and Temporal, on free ports of loopback."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import psutil
from temporalio.client import Client, WorkflowHandle
from temporalio.service import RPCError

from orchestration.config import TASK_QUEUE, Loop, Status, TrainingConfig

T = TypeVar("T")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for(port: int, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nobody listens on port {port}")


class S3:
    """An S3 server that can be away; stopped it forgets everything."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self.port)

    def pause(self) -> None:
        """Connections are accepted, and nobody answers."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def bucket(self, name: str) -> str:
        import httpx

        assert httpx.put(f"{self.url}/{name}", timeout=60).status_code == 200
        return f"s3://{name}/loop"


def environment(s3: S3) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": s3.url, "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "key-of-a-test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-a-test", "AWS_REGION": "us-east-1",
    }  # fmt: skip


ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


STUB = Path(__file__).with_name("stub_worker.py")


class Temporal:
    """The dev server, which can be killed and started again on its file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        from orchestration.client import Connection, connect_soon
        from orchestration.server import command

        with (self.folder / "temporal.log").open("ab") as log:
            program = command(self.folder / "temporal.db", self.port, free_port())
            self.process = subprocess.Popen(program, stdout=log, stderr=log)
        asyncio.run(connect_soon(Connection(self.address, "default")))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Site:
    """A folder with workers, whose trainer and comparison are stubs, and commands that are given in it."""

    every: ClassVar[list["Site"]] = []

    def __init__(self, folder: Path, temporal: Temporal, **environment: str) -> None:
        self.every.append(self)
        self.folder, self.temporal = folder, temporal
        self.environment = ENVIRONMENT | {"TEMPORAL_ADDRESS": temporal.address} | environment
        self.workers: list[subprocess.Popen[bytes]] = []

    def worker(self, *flags: str) -> subprocess.Popen[bytes]:
        with (self.folder / "worker.log").open("ab") as log:
            command = [sys.executable, str(STUB), "worker", *flags]
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)
        self.workers.append(process)
        return process

    def run(self, *command: str, code: int = 0) -> str:
        """What a command of training_loop.py says, on stdout and stderr."""
        done = subprocess.run(
            [sys.executable, str(STUB), *command], cwd=self.folder, env=self.environment,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()


def eventually(found: Callable[[], T | None], seconds: float = 60.0) -> T:
    """What it finds, as soon as it does."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := found():
            return value
        time.sleep(0.1)
    raise TimeoutError(f"nothing within {seconds} s")


def alive(word: str) -> list[int]:
    """Processes whose command line holds the word."""
    return [
        process.pid for process in psutil.process_iter(["cmdline"]) if word in " ".join(process.info["cmdline"] or [])
    ]


SMALL = TrainingConfig(total_timesteps=200, jobs=300, interval=0.0, rounds=1)


class Running:
    """A loop, asked and told from a test."""

    def __init__(self, site: Site, config: TrainingConfig) -> None:
        self.site, self.id = site, f"loop-{uuid.uuid4().hex[:8]}"
        self.runner = asyncio.Runner()
        self.client = self.do(Client.connect(site.temporal.address))
        self.handle: WorkflowHandle[Any, Status] = self.do(
            self.client.start_workflow(
                "training_loop_workflow", Loop(config), id=self.id, task_queue=TASK_QUEUE, result_type=Status
            )
        )

    def do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(coroutine)

    def status(self) -> Status:
        return self.do(self.handle.query("status", result_type=Status))

    def result(self, seconds: float = 90) -> Status:
        return self.do(asyncio.wait_for(self.handle.result(), seconds))

    def tell(self, signal: str) -> None:
        self.do(self.handle.signal(signal))

    def update(self, name: str, *asked: Any, answer: type[Any]) -> Any:
        return self.do(self.handle.execute_update(name, args=asked, result_type=answer))

    def until(self, state: str) -> Status:
        return eventually(lambda: (status := self.status()).state == state and status)

    def training(self) -> Path:
        """The folder of the training that runs, as soon as it does."""
        found = lambda: next(iter(self.site.folder.glob(f"runs/{self.id}__*/progress.json")), None)  # noqa: E731
        return eventually(found).parent

    def close(self) -> None:
        with suppress(RPCError):  # it has ended
            self.do(self.handle.terminate())
        self.runner.close()
