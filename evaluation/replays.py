"""Replays the held-out jobs under every policy, in several processes if wanted, and keeps what is done."""

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from evaluation.fan_out import Run, ray_map
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
    workloads: dict[Scenario, Workload],
    policies: dict[str, Policy],
    folder: Path | None,
    workers: int,
    cluster: tuple[str, ...] | None = None,
) -> Iterator[tuple[Scenario, str, tuple[np.ndarray, np.ndarray] | str]]:
    """What `_replay` returns for every policy in every scenario, in this order, with a progress bar.

    Args:
        workers: so many processes of this machine.
        cluster: or else a Ray cluster, by its address; (): one on this machine.
    """
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
        if cluster is not None:
            run = partial(_on_cluster, stack.enter_context(ray_map(cluster)))
        elif workers > 1:
            # Spawned: neither onnxruntime nor Numba survives a fork. Ctrl-C is the parent's: what runs is kept.
            ignore = (signal.SIGINT, signal.SIG_IGN)
            pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=signal.signal, initargs=ignore)
            stack.callback(pool.shutdown, cancel_futures=True)
            run = pool.map
        found = run(_replay, [policies[name] for _, name in tasks], [workloads[where] for where, _ in tasks], files)
        for (scenario, name), result in replaying(zip(tasks, found, strict=True), len(tasks)):
            yield scenario, name, result


Found = tuple[np.ndarray, np.ndarray] | str


def _on_cluster(
    run: Run, replay: Callable[..., Found], policies: list[Policy], workloads: list[Workload], files: list[Path | None]
) -> Iterator[Found]:
    """What is not kept yet is replayed there, and kept here as soon as it is ready: nodes have disks of their own."""
    results: dict[int, Found] = {}
    for index, file in enumerate(files):
        if (found := _kept(file)) is not None:
            results[index] = found
    left = [index for index in range(len(files)) if index not in results]
    ready = run(replay, [policies[i] for i in left], [workloads[i] for i in left], [None] * len(left))
    for index in range(len(files)):
        while index not in results:
            done, found = next(ready)
            results[left[done]] = found
            _keep(files[left[done]], found)
        yield results.pop(index)


def _replay(policy: Policy, workload: Workload, file: Path | None) -> Found:
    """Start times and nodes of the jobs of all segments, from the file or else into it; or what is wrong."""
    if (kept := _kept(file)) is not None:
        return kept
    try:
        schedules = policy.schedule(workload)
    except PolicyError as error:
        return str(error)
    start_time = np.concatenate([schedule.start_time for schedule in schedules])
    node = np.concatenate([schedule.node for schedule in schedules])
    _keep(file, (start_time, node))
    return start_time, node


def _kept(file: Path | None) -> Found | None:
    if file and file.exists():
        try:
            with np.load(file) as found:
                return found["start_time"], found["node"]
        except Exception:  # whatever the damage leads to: replay again
            pass
    return None


def _keep(file: Path | None, found: Found) -> None:
    """Refusals are not kept: they are soon found again."""
    if file and not isinstance(found, str):
        with replacing(file) as temporary, open(temporary, "wb") as stream:
            np.savez_compressed(stream, start_time=found[0], node=found[1])


def replaying(items: Iterable[T], total: int) -> Iterable[T]:
    """The items, with a progress bar beside the output; a log gets none."""
    bar = Console(stderr=True)
    return track(items, "Replaying", total, console=bar, transient=True, disable=not bar.is_terminal)
