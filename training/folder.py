"""The folder of a run, runs/<run_name>."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path

from workloads.load import workload_name


def new_folder(workload: str, exp_name: str, seed: int) -> Path:
    """Make runs/WORKLOAD__EXP_NAME__SEED__TIME. Of two runs that start in the same second one gets the next."""
    for second in count(int(time.time())):
        folder = Path("runs") / f"{workload_name(workload)}__{exp_name}__{seed}__{second}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("there is always another second")
