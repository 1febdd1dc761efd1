"""A Schedule starts loops, and never two at once."""

import time
from collections.abc import AsyncIterator
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from orchestration_helpers import SMALL, Running, Site, eventually

from orchestration.client import period


async def found(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


@pytest.mark.slow
def test_a_schedule_triggers_and_overlapping_triggers_do_not_run_two_loops(site: Site) -> None:
    site.worker()
    watcher = Running(site, SMALL)  # for its client
    watcher.result()
    name = f"scheduled-{time.time_ns()}"
    said = site.run("every", "2s", "--id", name, "--total-timesteps", "5000", "--jobs", "300")
    assert "1 round(s) every 2s" in said
    assert "is scheduled already" in site.run("every", "2s", "--id", name, code=2)

    async def loops() -> list[Any]:
        query = f"WorkflowId STARTS_WITH '{name}-'"
        return await found(watcher.client.list_workflows(query))

    def finished() -> list[Any] | None:
        done = [loop for loop in watcher.do(loops()) if loop.close_time]
        return done if len(done) >= 2 else None

    try:
        eventually(finished, 90)
    finally:
        site.run("unschedule", "--id", name)
    # The last one may still run, and the next test's worker would go on with it.
    eventually(lambda: all(loop.close_time for loop in watcher.do(loops())), 90)
    spans = sorted((loop.start_time, loop.close_time) for loop in watcher.do(loops()))
    for (_, end), (begin, _) in pairwise(spans):
        assert end is not None and begin >= end
    rounds = sorted(path.name for path in (site.folder / "runs/store/rounds").iterdir())
    assert rounds == [f"{n:06d}" for n in range(1, len(rounds) + 1)]  # they count on in the same store
    assert len(rounds) >= 3
    watcher.close()


@pytest.mark.parametrize(("text", "seconds"), [("7d", 604_800), ("12h", 43_200), ("30m", 1_800), ("90s", 90)])
def test_periods(text: str, seconds: int) -> None:
    assert period(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "7", "d", "7w", "0d", "-1d", "1.5h"])
def test_no_periods(text: str) -> None:
    with pytest.raises(ValueError, match="give a number and a unit, such as 7d"):
        period(text)
