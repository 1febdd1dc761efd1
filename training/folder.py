"""The folder of a run, runs/<run_name>."""

from __future__ import annotations

import fcntl
import shutil
import time
from itertools import count
from pathlib import Path
from typing import IO

from workloads.load import workload_name


def new_folder(workload: str, exp_name: str, seed: int) -> Path:
    """Make runs/WORKLOAD__EXP_NAME__SEED__TIME, see `timed_folder`."""
    return timed_folder(f"{workload_name(workload)}__{exp_name}__{seed}")


def timed_folder(name: str) -> Path:
    """Make runs/NAME__TIME; behind the time of others that start in the same second stands -2, -3, and so on. Whoever
    makes a folder has it: no two runs ever share one."""
    first = Path("runs") / f"{name}__{int(time.time())}"
    for number in count(1):
        folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("there is always another number")


def named_folder(name: str) -> Path:
    """Make runs/NAME, which was free before the work (`free_folder`).

    Raises:
        ValueError: another run has been as fast.
    """
    folder = Path("runs") / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise _taken(folder) from None
    return folder


def _taken(folder: Path) -> ValueError:
    return ValueError(f"{folder} is there already; go on with it by --resume {folder}, or give another --run-name")


def free_folder(name: str) -> Path:
    """runs/NAME, which is still to be made. What a run has left that was killed before its first checkpoint is deleted.

    Raises:
        ValueError: there is one already, or the name is none.
    """
    folder = Path("runs") / name
    if name in ("", ".", "..") or folder.name != name:
        raise ValueError(f"run_name is {name!r}; give a name without folders")
    worth = ("checkpoint.pt", "progress.json", "weights.pt")  # of a run that has ended the first may have been deleted
    if (folder / "lock").exists() and not any((folder / name).exists() for name in worth):
        with lock(folder):
            shutil.rmtree(folder)
    if folder.exists():
        raise _taken(folder)
    return folder


def lock(folder: Path) -> IO[str]:
    """A file that has to stay open while this process works in the folder. However it ends, the kernel closes it.

    Raises:
        ValueError: another process works there.
    """
    file = (folder / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{folder}: another process is at work on this run; wait for its end, or end it") from None
    return file
