"""A workload in one file (.npz): what the retraining loop hands from step to step."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from workloads.files import replacing
from workloads.jobs import Cluster, Jobs, Trace, WorkloadError

CLUSTER = tuple(field.name for field in fields(Cluster))


def save(path: Path, cluster: Cluster, jobs: Jobs | None = None) -> None:
    """Write the cluster and the jobs, in order of submission, whole or not at all."""
    arrays: dict[str, Any] = {f"cluster_{name}": np.asarray(getattr(cluster, name)) for name in CLUSTER}
    if jobs is not None:
        arrays |= {field.name: getattr(jobs, field.name) for field in fields(Jobs)}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_cluster(path: Path) -> Cluster:
    """
    Raises:
        WorkloadError: not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            capacity, speed, resources = (found[f"cluster_{name}"] for name in CLUSTER)
    except Exception as error:  # whatever the damage leads to
        raise WorkloadError(f"{path}: no saved workload ({error}); save it again") from None
    return Cluster(capacity, speed, tuple(resources.tolist()))


def read_saved(path: Path) -> Trace:
    """The jobs, the cluster, and what was skipped: nothing.

    Raises:
        WorkloadError: not such a file.
    """
    cluster = read_cluster(path)
    try:
        with np.load(path, allow_pickle=False) as found:
            jobs = Jobs(*(found[field.name] for field in fields(Jobs)))
    except Exception as error:
        raise WorkloadError(f"{path}: no saved workload ({error}); save it again") from None
    return Trace(jobs, cluster, {})
