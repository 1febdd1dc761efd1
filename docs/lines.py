"""Puts the line numbers in docs/*.md right: `make docs`.

A link such as [ppo_scheduler.py:279](../ppo_scheduler.py#L279) with `code` behind it says where that code is. The code
is a piece of one line of the file that no other line has.
"""

import re
import sys
from pathlib import Path

QUOTED = re.compile(r"\[([\w/]+\.py):\d+\]\(\.\./\1#L\d+\) `([^`]+)`")


def with_lines(text: str, page: Path) -> str:
    """The text of a page with the numbers of today.

    Raises:
        ValueError: a quotation is in no line of its file, or in several.
    """

    def link(match: re.Match[str]) -> str:
        file, code = match.groups()
        lines = (page.parent.parent / file).read_text().splitlines()
        found = [number for number, line in enumerate(lines, 1) if code in line]
        if len(found) != 1:
            where = f"lines {found}" if found else "no line"
            raise ValueError(f"docs/{page.name}: `{code}` is in {where} of {file}; quote a piece of exactly one")
        return f"[{file}:{found[0]}](../{file}#L{found[0]}) `{code}`"

    return QUOTED.sub(link, text)


if __name__ == "__main__":
    try:
        for page in sorted(Path(__file__).parent.glob("*.md")):
            page.write_text(with_lines(page.read_text(), page))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
