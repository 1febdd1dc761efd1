"""The learners as tests run them: small, in this process or one of their own; and what their runs have logged."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from places import ROOT
from places import SMALL as TRACE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dqn_scheduler
import ppo_scheduler
from training.arguments import run_command
from training.run import Run

WORKLOAD = ("--workload", str(TRACE), "--objective", "wait", "--reference", "easy-sjf")
EPISODE = ("--num-jobs", "24", "--warmup-jobs", "16", "--followup-jobs", "32", "--episodes-in-a-row", "2")
CLUSTERS = ("--num-envs", "8", "--num-steps", "8", "--num-evaluations", "2", "--validation-jobs", "900")
REPLAY = ("--gamma", "0.9", "--n-step", "3", "--batch-size", "64", "--updates-per-decision", "0.05")
REPLAY += ("--buffer-steps", "30", "--learning-starts", "10")
# Eight iterations of 64 decisions, the replay memory being full after the fourth.
SMALL = {
    ppo_scheduler: (*WORKLOAD, *EPISODE, *CLUSTERS, "--total-timesteps", "512", "--num-minibatches", "2"),
    dqn_scheduler: (*WORKLOAD, *EPISODE, *CLUSTERS, "--total-timesteps", "512", *REPLAY),
}


@dataclass
class Result:
    """How a command ended."""

    code: int | str | None
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of its errors."""
        return self.err.strip().splitlines()[-1]


def command(algorithm: ModuleType, folder: Path, *flags: str) -> Result:
    """What the script does with these flags, in this process."""
    out, err, code = StringIO(), StringIO(), None
    argv = patch.object(sys, "argv", [f"{algorithm.__name__}.py", *flags])
    with chdir(folder), redirect_stdout(out), redirect_stderr(err), argv:
        try:
            run_command(algorithm.main, algorithm.Args, memory="of anything")
        except SystemExit as end:
            code = end.code
    return Result(code or 0, out.getvalue(), err.getvalue())


def train(algorithm: ModuleType, folder: Path, *flags: str) -> Path:
    """A short run, in this process. Returns its folder."""
    result = command(algorithm, folder, *SMALL[algorithm], *flags)
    assert result.code == 0, result.err
    return run_folder(folder)


def script(algorithm: ModuleType, folder: Path, *flags: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own."""
    command = [sys.executable, str(ROOT / f"{algorithm.__name__}.py"), *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, **kwargs)


def begun(algorithm: ModuleType, folder: Path, *flags: str) -> Run:
    """A short run in which no iteration has begun yet."""
    runs: list[Run] = []

    def none(run: Run) -> Iterator[int]:
        runs.append(run)
        return iter(())

    with patch.object(Run, "iterations", none), patch.object(Run, "end", lambda _: 0), chdir(folder):
        result = command(algorithm, folder, *SMALL[algorithm], *flags)
    assert result.code == 0, result.err
    run = runs[0]
    run.folder = folder / run.folder
    return run


def run_folder(folder: Path) -> Path:
    """Of the only run there."""
    (run,) = (folder / "runs").iterdir()
    return run


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def scalars(run: Path, tag: str) -> dict[int, float]:
    """The values of a tag by their steps."""
    return {event.step: event.value for event in events(run).Scalars(tag)}


def logged(run: Path) -> dict[str, dict[int, float]]:
    """All scalars of a run that do not depend on how fast it was."""
    found = events(run)
    tags = set(found.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in sorted(tags)}


def records(path: Path) -> list[Any]:
    """What an offline W&B run's .wandb file holds: LevelDB's log format after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, found, part, place = path.read_bytes(), [], b"", 7
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block is padding
            place += 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return found
