"""Files are written whole or not at all. Every room writes some, so this is in the lowest one."""

import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which then takes the place of `path`: killed at any instant, the old or the new is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: Path) -> None:
    """Before the work, not after it.

    Raises:
        ValueError: no file can be written there.
    """
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ValueError(f"--output {path}: a folder; give the name of a file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path}: the folder cannot be written to; give another")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def digest(*parts: bytes) -> str:
    """SHA-256 of the parts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def from_here(path: Path) -> str:
    """How a shell finds the file from where its user stands: for commands that are printed."""
    return shlex.quote(os.path.relpath(path))
