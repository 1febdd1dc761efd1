"""How a trace or a table is read: flags that every command with `--workload` has, and what they come to."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from workloads.jobs import WorkloadError

MOST_BAD = 0.01  # of the lines: with more it is the file that is wrong


@dataclass
class Reading:
    """What somebody has to say of a trace, besides where it is. Commands inherit it, and pass themselves."""

    skip_bad_lines: bool = False
    """leave out the lines of a trace that make no sense, where they are 1 % of it or fewer"""
    partition: str | None = None
    """take the jobs of this partition alone (SWF: its number in field 16 or, where that is always the same, the
    queue's in field 15)"""

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
    bad = sorted(bad)
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
