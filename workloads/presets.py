"""The built-in workloads: a cluster, and what makes jobs for it; their splits are runs with disjoint seeds."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from workloads.generated import generate_jobs
from workloads.jobs import DAY, SPLITS, Cluster, Jobs, Workload
from workloads.lublin import lublin_jobs
from workloads.users import EXECUTABLES_EACH, NUM_USERS, USERS_PER_GROUP


@dataclass(frozen=True)
class Preset:
    """A cluster, and what makes `n` jobs for it from a random generator: generate(rng, n)."""

    cluster: Cluster
    generate: Callable[[np.random.Generator, int], Jobs]


def _nodes(resources: tuple[str, ...], *kinds: tuple[int, tuple[float, ...], float]) -> Cluster:
    """A cluster from (how many nodes, capacity of each, speed) for each kind of node."""
    counts, capacity, speed = zip(*kinds, strict=True)
    return Cluster(np.repeat(np.array(capacity, float), counts, axis=0), np.repeat(speed, counts), resources)


def cloud() -> Preset:
    """Containers and virtual machines, minutes to hours, on eight nodes of three generations."""
    cluster = _nodes(("cpu", "memory"), (3, (32, 128), 1.0), (3, (16, 64), 1.6), (2, (64, 256), 0.7))
    flavours = [[1, 2], [1, 8], [2, 4], [2, 16], [4, 8], [4, 32], [8, 16], [8, 64], [16, 32], [16, 64], [32, 96]]
    weights = [16, 10, 16, 10, 16, 8, 10, 5, 5, 3, 1]
    return Preset(cluster, partial(generate_jobs, cluster=cluster, flavours=flavours, weights=weights))


def hpc() -> Preset:
    """A supercomputer of 256 processors with the batch jobs of Lublin & Feitelson (2003)."""
    return Preset(_nodes(("processors",), (1, (256,), 1.0)), partial(lublin_jobs, max_procs=256))


def manufacturing() -> Preset:
    """A shop floor: machines that take one lot at a time, and furnaces that take two, over the day."""
    cluster = _nodes(("slots",), (4, (1,), 0.8), (4, (1,), 1.3), (4, (2,), 1.0))
    orders = partial(generate_jobs, run_time=(1_500.0, 1.2, DAY), arrivals="daily")
    return Preset(cluster, partial(orders, cluster=cluster, flavours=[[1], [2]], weights=[88, 12]))


def datacenter() -> Preset:
    """24 nodes for services, analytics (much memory) and training (GPUs)."""
    cluster = _nodes(("cpu", "memory", "gpu"), (16, (32, 128, 0), 1.0), (4, (32, 512, 0), 1.2), (4, (64, 512, 8), 1.0))
    flavours = [[2, 4, 0], [4, 16, 0], [8, 32, 0], [16, 64, 0], [32, 128, 0], [8, 128, 0], [16, 256, 0]]
    flavours += [[4, 32, 1], [8, 64, 2], [16, 128, 4], [32, 256, 8]]
    weights = [200, 200, 160, 120, 50, 60, 30, 70, 30, 15, 5]
    services = partial(generate_jobs, run_time=(900.0, 1.6, 2 * DAY))
    return Preset(cluster, partial(services, cluster=cluster, flavours=flavours, weights=weights))


def tasks() -> Preset:
    """A queue of short tasks, seconds to minutes, and its workers: four older hosts, four newer ones, in bursts."""
    cluster = _nodes(("slots",), (4, (4,), 1.0), (4, (8,), 1.5))
    queue = partial(generate_jobs, run_time=(8.0, 1.5, 3_600.0))
    return Preset(cluster, partial(queue, cluster=cluster, flavours=[[1], [2], [4], [8]], weights=[70, 16, 10, 4]))


PRESETS: dict[str, Callable[[], Preset]] = {
    preset.__name__: preset for preset in (cloud, hpc, manufacturing, datacenter, tasks)
}
RUNS = {"train": (16, 10_000), "validation": (8, 5_000), "test": (20, 5_000)}


def generate_split(name: str, split: str, seed: int, runs: int | None, run_jobs: int | None) -> Workload:
    preset = PRESETS[name]()
    parts: list[Jobs] = []
    for part in RUNS if split == "all" else (split,):
        # The same run whatever the number of runs, and never the same in two splits or presets.
        seeds = np.random.SeedSequence([seed, SPLITS[part], zlib.crc32(name.encode())])
        for child in seeds.spawn(runs or RUNS[part][0]):
            parts.append(preset.generate(np.random.default_rng(child), run_jobs or RUNS[part][1]))
    ends = np.cumsum([len(part) for part in parts])
    jobs = Jobs.concatenate([_renumbered(part, index) for index, part in enumerate(parts)])
    jobs = replace(jobs, job_id=np.arange(1, len(jobs) + 1))
    return Workload(name, preset.cluster, jobs, np.stack([np.append(0, ends[:-1]), ends], axis=1), {})


def _renumbered(jobs: Jobs, run: int) -> Jobs:
    """The jobs of the run-th run with users of its own."""
    return replace(
        jobs,
        user=jobs.user + np.int32(run * NUM_USERS),
        group=jobs.group + np.int32(run * NUM_USERS // USERS_PER_GROUP),
        executable=jobs.executable + np.int32(run * NUM_USERS * EXECUTABLES_EACH),
    )
