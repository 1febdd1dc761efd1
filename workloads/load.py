"""The workload of a name: a preset's, or the path of a trace."""

import os
from pathlib import Path

import numpy as np

from workloads.jobs import SPLITS, Workload, WorkloadError
from workloads.presets import PRESETS, generate_split
from workloads.records import read_decisions
from workloads.saved import read_saved
from workloads.swf import jobs_from_swf, read_swf


def workload_name(workload: str) -> str:
    """What runs are called after: the preset's name, or the trace's without folder and endings."""
    return Path(workload).name.removesuffix(".gz").removesuffix(".swf").removesuffix(".jsonl").removesuffix(".npz")


def load_workload(
    name: str, split: str = "train", *, seed: int = 0, runs: int | None = None, run_jobs: int | None = None
) -> Workload:
    """The named split of a preset or of a trace.

    Args:
        name: one of PRESETS, or the path of an SWF trace, plain or gzipped, of what serve.py has recorded (.jsonl), or
            of a saved workload (.npz).
        split: "train", "validation", "test", or "all" of them. A trace is cut by order of submission at 60 % and 70 %;
            the splits of a preset have disjoint seeds.
        seed, runs, run_jobs: for presets only: which runs, how many, and how many jobs each.

    Raises:
        WorkloadError: the name is unknown or the trace unusable; the message says what to do.
    """
    if split not in (*SPLITS, "all"):
        raise WorkloadError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}, all")
    if name in PRESETS:
        return generate_split(name, split, seed, runs, run_jobs)
    if not os.path.exists(name):
        raise WorkloadError(f"{name}: no such file or preset; the presets are {', '.join(PRESETS)}")
    if name.endswith(".npz"):
        jobs, cluster, skipped = read_saved(Path(name))
    else:
        jobs, cluster, skipped = read_decisions(name) if name.endswith(".jsonl") else jobs_from_swf(read_swf(name))
    cuts = {"train": (0.0, 0.6), "validation": (0.6, 0.7), "test": (0.7, 1.0), "all": (0.0, 1.0)}[split]
    first, last = (int(cut * len(jobs)) for cut in cuts)
    if first == last:
        raise WorkloadError(f"{name}: its {len(jobs)} jobs leave none for the {split} split; use a longer trace")
    return Workload(name, cluster, jobs, np.array([[first, last]]), skipped)
