"""The workload of a name: a preset's, or the path of a trace."""

import os
from pathlib import Path

import numpy as np

from workloads.compressed import ENDINGS
from workloads.jobs import SPLITS, Trace, Workload, WorkloadError
from workloads.presets import PRESETS, generate_split
from workloads.reading import Reading
from workloads.records import read_decisions
from workloads.saved import read_saved
from workloads.swf import jobs_from_swf, read_swf
from workloads.tables import is_table, read_table

FORMATS = (".swf", ".jsonl", ".npz", ".csv", ".tsv", ".parquet")


def workload_name(workload: str) -> str:
    """What runs are called after: the preset's name, or the trace's without folder and endings."""
    name = Path(workload).name
    for ending in (*ENDINGS, *FORMATS):
        name = name.removesuffix(ending)
    return name


def load_workload(
    name: str,
    split: str = "train",
    reading: Reading | None = None,
    *,
    seed: int = 0,
    runs: int | None = None,
    run_jobs: int | None = None,
) -> Workload:
    """The named split of a preset or of a trace.

    Args:
        name: one of PRESETS, or the path of an SWF trace or a table (.csv, .parquet), plain or compressed, of what
            serve.py has recorded (.jsonl), or of a saved workload (.npz).
        split: "train", "validation", "test", or "all" of them. A trace is cut by order of submission at 60 % and 70 %;
            the splits of a preset have disjoint seeds.
        reading: how the file is read.
        seed, runs, run_jobs: for presets only: which runs, how many, and how many jobs each.

    Raises:
        WorkloadError: the name is unknown or the trace unusable; the message says what to do.
    """
    if split not in (*SPLITS, "all"):
        raise WorkloadError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}, all")
    reading = reading or Reading()
    if name in PRESETS:
        reading.refuse(name)
        return generate_split(name, split, seed, runs, run_jobs)
    if not os.path.exists(name):
        raise WorkloadError(f"{name}: no such file or preset; the presets are {', '.join(PRESETS)}")
    jobs, cluster, skipped, notes = _read(name, reading)
    cuts = {"train": (0.0, 0.6), "validation": (0.6, 0.7), "test": (0.7, 1.0), "all": (0.0, 1.0)}[split]
    first, last = (int(cut * len(jobs)) for cut in cuts)
    if first == last:
        raise WorkloadError(f"{name}: its {len(jobs)} jobs leave none for the {split} split; use a longer trace")
    return Workload(name, cluster, jobs, np.array([[first, last]]), skipped, notes)


def _read(name: str, reading: Reading) -> Trace:
    """What the file holds, by its name's ending."""
    if name.endswith(".npz"):
        reading.refuse(name)
        return read_saved(Path(name))
    if name.endswith(".jsonl"):
        reading.refuse(name)
        return read_decisions(name)
    if is_table(name, reading):
        return read_table(name, reading)
    return jobs_from_swf(read_swf(name, reading), reading)
