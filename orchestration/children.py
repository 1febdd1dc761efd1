"""Runs the project's own commands within an activity: heartbeats, cancellation, exit codes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

from temporalio import activity
from temporalio.exceptions import ApplicationError, CancelledError

from orchestration.config import USER_ERROR

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "ppo": [str(ROOT / "ppo_scheduler.py")],
    "dqn": [str(ROOT / "dqn_scheduler.py")],
    "compare": [str(ROOT / "benchmark.py"), "compare"],
}  # each runs in the worker's Python
BEAT_SECONDS, POLL_SECONDS = 1.0, 0.2
GRACE_SECONDS = 7.0  # to save and end after Ctrl-C; a stop is promised within ten
WORKER_ENDED = "WorkerEnded"  # the type of the error; the next worker goes on
PASSING = ("No space left", "make room", "another process is at work")  # exit code 2 too, but it passes


@contextmanager
def beating(progress: Path | None = None) -> Iterator[None]:
    """Tells Temporal every second that the activity lives, and what `progress` says, a JSON file: silence means that
    the worker is lost."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            activity.heartbeat(read_progress(progress))

    thread = threading.Thread(target=copy_context().run, args=(beat,), daemon=True)  # the activity is in the context
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def run_child(name: str, arguments: list[str], log: Path) -> None:
    """Run a command until it ends, with what it says appended to `log`. If the activity is cancelled or the worker
    ends, it is told to end as by Ctrl-C, and waited for.

    Raises:
        ApplicationError: it failed; of USER_ERROR, which is not tried again, if its exit code says that trying again
            does not help.
        CancelledError: the activity was cancelled; the command has ended.
    """
    command = [sys.executable, *COMMANDS[name], *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        print(f"$ {shlex.join(command)}", file=output, flush=True)
        launched = [sys.executable, str(ROOT / "orchestration" / "launch.py"), str(os.getpid()), *command]
        # A session of its own: Ctrl-C in the worker's terminal is the worker's to pass on.
        child = subprocess.Popen(launched, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while not ended_within(child, POLL_SECONDS):
            if activity.is_cancelled() or activity.is_worker_shutdown():
                child.send_signal(signal.SIGINT)
                ended_within(child, GRACE_SECONDS)
                break
    finally:
        child.kill()
        child.wait()
    if activity.is_cancelled():
        raise CancelledError(f"{name} was stopped")
    if child.returncode and activity.is_worker_shutdown():
        raise ApplicationError(f"{name} was stopped, since the worker ends", type=WORKER_ENDED)
    if child.returncode:
        raise failure(child.returncode, last_line(log))


def ended_within(child: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def failure(code: int, line: str) -> ApplicationError:
    """What a command's exit code and last line mean to Temporal."""
    if code == 2 and not any(text in line for text in PASSING):
        return ApplicationError(line.removeprefix("error: "), type=USER_ERROR, non_retryable=True)
    return ApplicationError(f"exit code {code}: {line}", type="ChildFailed")


def last_line(log: Path) -> str:
    """Of what is no progress bar."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        lines = file.read().decode(errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines[-20:] if "error: " in line]
    return (errors or lines or ["it said nothing"])[-1][-500:]


def read_progress(path: Path | None) -> dict[str, Any]:
    """Empty before the file is there."""
    try:
        return json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}
