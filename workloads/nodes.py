"""The cluster of a trace that does not say: `--nodes`."""

import os
import re
from collections.abc import Sequence

import numpy as np

from workloads.frames import bad_rows, evaluate, read_frame
from workloads.jobs import WorkloadError
from workloads.reading import Reading, judge_bad_lines


def nodes_of(
    words: Sequence[str], resources: Sequence[str], mapping: dict[str, str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """float64[M, R] and float64[M], the capacity and the speed of each node of `--nodes`.

    It is a table with a row for each node (or kind of node, with a column `count`), a column for each resource (or what
    `node.NAME` in the mapping says) and perhaps `speed`; or kinds of nodes, as in 3xcpu=32,memory=128@1.6.

    Raises:
        WorkloadError: it is none of them.
    """
    mapping = mapping or {}
    if len(words) == 1 and os.path.isfile(words[0]):
        frame, lines, bad = read_frame(words[0])
        values = {}
        for name in (*resources, "count", "speed"):
            expression = mapping.get(f"node.{name}", name)
            if name in ("count", "speed") and expression not in frame.columns:
                values[name] = np.ones(len(frame))
                continue
            values[name], wrong = evaluate(words[0], frame, f"node.{name}", expression)
            if name == "count":
                wrong |= ~(values[name] >= 0) | (values[name] % 1 != 0)
            elif name == "speed":
                wrong |= ~(values[name] > 0)
            bad += bad_rows(lines, wrong | (values[name] < 0), "no number", f"node.{name}={expression} makes no sense")
        judge_bad_lines(words[0], bad, len(frame), Reading())
        capacity = np.nan_to_num(np.stack([values[name] for name in resources], axis=1))
        count, speed = values["count"].astype(int), values["speed"]
    else:
        kinds = [_kind(word, resources) for word in words]
        count = np.array([kind[0] for kind in kinds])
        capacity = np.array([kind[1] for kind in kinds])
        speed = np.array([kind[2] for kind in kinds])
    capacity, speed = np.repeat(capacity, count, axis=0), np.repeat(speed, count)
    some = capacity.any(axis=1) if len(capacity) else np.zeros(0, bool)
    if not some.any():
        raise WorkloadError(f"--nodes {' '.join(words)}: no node has any {' or '.join(resources)}")
    return capacity[some], speed[some]


def _kind(word: str, resources: Sequence[str]) -> tuple[int, list[float], float]:
    """3xcpu=32,memory=128@1.6: how many nodes, the capacity of each, and their speed."""
    found = re.fullmatch(r"(\d+)x([^@]+)(?:@([\d.]+))?", word)
    try:
        if not found:
            raise ValueError
        amounts = {name.strip(): float(amount) for name, amount in (part.split("=") for part in found[2].split(","))}
        speed = float(found[3] or 1)
        if not speed > 0 or not all(amount >= 0 for amount in amounts.values()):
            raise ValueError
    except ValueError:
        raise WorkloadError(f"--nodes {word}: no such file, and no kind of nodes as 3xcpu=32,memory=128@1.6") from None
    if unknown := [name for name in amounts if name not in resources]:
        raise WorkloadError(f"--nodes {word}: {unknown[0]} is nothing that jobs demand; that is {', '.join(resources)}")
    return int(found[1]), [amounts.get(name, 0.0) for name in resources], speed
