"""Replays the held-out jobs under every policy, in several processes if wanted, and keeps what is done."""

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from evaluation.statistics import block_metrics
from policies import Policy, PolicyError
from simulator.schedule import Schedule
from workloads.files import digest, replacing
from workloads.jobs import Workload, workload_digest

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
CODE = (*sorted((ROOT / "simulator").glob("*.py")), ROOT / "scheduler_env.py", ROOT / "policies.py")  # decides replays


class Scenario(NamedTuple):
    """How the jobs are replayed."""

    protocol: Literal["continuous", "windows"]
    load: float


@dataclass
class Replays:
    """The same jobs under several policies; only some blocks of each segment's jobs are counted."""

    workload: Workload
    cuts: list[list[slice]]
    schedules: dict[str, list[Schedule]] = field(default_factory=dict)
    per_block: dict[str, np.ndarray] = field(default_factory=dict)  # float64[B, len(METRICS)]

    def add(self, name: str, start_time: np.ndarray, node: np.ndarray) -> None:
        """A policy's float64[N] and int[N] for the jobs of all segments, one after the other."""
        schedules, jobs, done = [], self.workload.jobs, 0
        for first, last in self.workload.segments:
            own = slice(done, done := done + last - first)
            schedules.append(Schedule(jobs[first:last], self.workload.cluster, start_time[own], node[own]))
        self.schedules[name] = schedules
        self.per_block[name] = np.array([block_metrics(*pair) for pair in self.blocks(name)])

    def keep(self, names: Iterable[str]) -> None:
        """These policies, in this order."""
        self.schedules = {name: self.schedules[name] for name in names}
        self.per_block = {name: self.per_block[name] for name in names}

    def blocks(self, name: str) -> list[tuple[Schedule, slice]]:
        return [
            (schedule, block) for schedule, own in zip(self.schedules[name], self.cuts, strict=True) for block in own
        ]

    def waits(self, name: str) -> np.ndarray:
        """float64[counted jobs], block after block."""
        return np.concatenate([schedule.wait[block] for schedule, block in self.blocks(name)])

    @property
    def counted_jobs(self) -> int:
        return int(sum(block.stop - block.start for own in self.cuts for block in own))


def replay_all(
    workloads: dict[Scenario, Workload], policies: dict[str, Policy], folder: Path | None, workers: int
) -> Iterator[tuple[Scenario, str, tuple[np.ndarray, np.ndarray] | str]]:
    """What `_replay` returns for every policy in every scenario, as it comes in, with a progress bar."""
    if folder:
        folder.mkdir(exist_ok=True)
    tasks = [(scenario, name) for scenario in workloads for name in policies]
    code = [path.read_bytes() for path in CODE]
    jobs = {scenario: workload_digest(workload) for scenario, workload in workloads.items()}
    files = [
        folder and folder / f"{digest(*code, jobs[scenario].encode(), policies[name].identity)[:24]}.npz"
        for scenario, name in tasks
    ]
    with ExitStack() as stack:
        run: Callable[..., Iterable[Any]] = map
        if workers > 1:
            # Spawned: neither onnxruntime nor Numba survives a fork. Ctrl-C is the parent's: what runs is kept.
            ignore = (signal.SIGINT, signal.SIG_IGN)
            pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=signal.signal, initargs=ignore)
            stack.callback(pool.shutdown, cancel_futures=True)
            run = pool.map
        found = run(_replay, [policies[name] for _, name in tasks], [workloads[where] for where, _ in tasks], files)
        for (scenario, name), result in replaying(zip(tasks, found, strict=True), len(tasks)):
            yield scenario, name, result


def _replay(policy: Policy, workload: Workload, file: Path | None) -> tuple[np.ndarray, np.ndarray] | str:
    """Start times and nodes of the jobs of all segments, from the file or else into it; or what is wrong."""
    if file and file.exists():
        try:
            with np.load(file) as found:
                return found["start_time"], found["node"]
        except Exception:  # whatever the damage leads to: replay again
            pass
    try:
        schedules = policy.schedule(workload)
    except PolicyError as error:
        return str(error)
    start_time = np.concatenate([schedule.start_time for schedule in schedules])
    node = np.concatenate([schedule.node for schedule in schedules])
    if file:
        with replacing(file) as temporary, open(temporary, "wb") as stream:
            np.savez_compressed(stream, start_time=start_time, node=node)
    return start_time, node


def replaying(items: Iterable[T], total: int) -> Iterable[T]:
    """The items, with a progress bar beside the output; a log gets none."""
    bar = Console(stderr=True)
    return track(items, "Replaying", total, console=bar, transient=True, disable=not bar.is_terminal)
