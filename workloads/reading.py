"""How a trace or a table is read: flags that every command with `--workload` has, and what they come to."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from workloads.jobs import DAY, WorkloadError

MILLISECONDS = 1e11  # a time of more seconds is none
LONGEST = 20 * 365 * DAY  # seconds that a trace may span; in milliseconds a week
MOST_BAD = 0.01  # of the lines: with more it is the file that is wrong


@dataclass(kw_only=True)
class Reading:
    """What somebody has to say of a trace, besides where it is. Commands inherit it, and pass themselves."""

    skip_bad_lines: bool = False
    """leave out the lines of a trace that make no sense, where they are 1 % of it or fewer"""
    partition: str | None = None
    """take the jobs of this partition alone (SWF: its number in field 16 or, where that is always the same, the
    queue's in field 15)"""

    columns: tuple[str, ...] = ()
    """what the columns of a table are, as in submit=creation_time end=deletion_time demand.cpu=cpu_milli/1000; or a
    file that says so (YAML); or a format that is known by name: openb, philly"""
    nodes: tuple[str, ...] = ()
    """the cluster of a table or a partition: a table of its nodes, or kinds of nodes, with their number and perhaps
    their speed, as in 3xcpu=32,memory=128 2xcpu=64,memory=256@1.6"""

    def flags(self) -> list[str]:
        """These flags as words of a command line, but for those that say what is the default."""
        words: list[str] = []
        for field in fields(Reading):
            flag, value = "--" + field.name.replace("_", "-"), getattr(self, field.name)
            if value != field.default:
                words += [flag] if value is True else [flag, *(value if isinstance(value, tuple) else [str(value)])]
        return words

    def refuse(self, name: str, *takes: str) -> None:
        """
        Raises:
            WorkloadError: a flag is given that means nothing for this workload, which only takes these.
        """
        given = [f.name for f in fields(Reading) if f.name not in takes and getattr(self, f.name) != f.default]
        if given:
            flags = ", ".join("--" + field.replace("_", "-") for field in given)
            raise WorkloadError(f"{name}: {flags} means nothing for this kind of workload; leave it out")


def check_span(where: str, submit_time: np.ndarray) -> None:
    """
    Raises:
        WorkloadError: the jobs would have been submitted over decades, so that it is no seconds that are counted.
    """
    if np.ptp(submit_time) > LONGEST:
        years = f"{LONGEST / DAY / 365:.0f} years"
        raise WorkloadError(f"{where}: more than {years} from the first job to the last; give all times in seconds")


def pooled(by: str, counts: Mapping[str, int]) -> list[str]:
    """A note, where the jobs of several partitions (or queues: `by`) are taken for those of one machine."""
    if len(counts) < 2:
        return []
    largest = sorted(counts, key=lambda name: -counts[name])[:4]
    named = ", ".join(f"{name} ({counts[name]:,} jobs)" for name in largest) + ", ..." * (len(counts) > 4)
    own = "if each has its own, take one with --partition"
    return [f"{len(counts)} {by}s in one pool: {named}; {own}"]


class BadLine(NamedTuple):
    """A line that makes no sense."""

    line: int  # in the file, from 1
    reason: str  # what bad lines are counted by
    problem: str  # what is wrong, and what to do


def judge_bad_lines(
    path: str, bad: Sequence[BadLine], total: int, reading: Reading
) -> tuple[dict[str, int], list[str]]:
    """What was left out, by reason, and a note that names the first three.

    Raises:
        WorkloadError: there are bad lines, and nobody has said that they may be left out, or they are too many.
    """
    bad = sorted({line.line: line for line in reversed(bad)}.values())  # the first of each line
    if not bad:
        return {}, []
    few = len(bad) <= MOST_BAD * total
    first, lines = f"{path}: line {bad[0].line}: {bad[0].problem}", "line" if len(bad) == 1 else "lines"
    if not few:
        most = f"--skip-bad-lines leaves out {MOST_BAD:.0%} at most"
        raise WorkloadError(f"{first} ({len(bad):,} bad {lines} of {total:,}; {most})")
    if not reading.skip_bad_lines:
        raise WorkloadError(f"{first} ({len(bad):,} bad {lines} of {total:,}; --skip-bad-lines leaves them out)")
    named = "; ".join(f"line {line}: {problem.partition(';')[0]}" for line, _, problem in bad[:3])
    return dict(Counter(f"bad line: {b.reason}" for b in bad)), [f"bad lines left out, such as {named}"]


def quoted(words: Sequence[str]) -> str:
    """Words of a command line, to be copied, with a space before them if there are any."""
    return "".join(f" {shlex.quote(word)}" for word in words)
