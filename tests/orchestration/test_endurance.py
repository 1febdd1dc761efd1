"""Fifty rounds in one loop, and two workers that share two candidates."""

import json
import re
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from orchestration_helpers import SMALL, Running, Site, Temporal, eventually
from temporalio.client import WorkflowExecutionStatus

from orchestration.workflows import ROUNDS_EACH

ROUNDS = 50


@pytest.mark.slow
def test_fifty_rounds_keep_history_and_memory_small(temporal: Temporal, tmp_path: Path) -> None:
    site = Site(tmp_path, temporal)
    worker = psutil.Process(site.worker().pid)
    loop = Running(site, replace(SMALL, rounds=ROUNDS, total_timesteps=10))
    folder, memory = site.folder / "runs" / "store" / "rounds", {}

    def over() -> bool:
        """Without a question to the worker, which would have to answer with all rounds."""
        begun = len(list(folder.glob("*"))) if folder.exists() else 0
        memory[begun] = worker.memory_info().rss
        return begun == ROUNDS

    eventually(over, 560)
    status = loop.result()
    assert [found.number for found in status.loop.rounds] == list(range(1, ROUNDS + 1))

    async def histories() -> list[tuple[int, int]]:
        """Events and bytes of each run of the loop."""
        found, run = [], None
        handle = loop.client.get_workflow_handle(loop.id, first_execution_run_id=loop.handle.first_execution_run_id)
        async for workflow in loop.client.list_workflows(f"WorkflowId = '{loop.id}'"):
            run = loop.client.get_workflow_handle(loop.id, run_id=workflow.run_id)
            history = await run.fetch_history()
            found.append((len(history.events), len(history.to_json())))
        assert (await handle.describe()).status == WorkflowExecutionStatus.COMPLETED
        return found

    runs = loop.do(histories())
    assert len(runs) == -(-ROUNDS // ROUNDS_EACH)
    assert max(events for events, _ in runs) < 5_000  # Temporal warns at 10,240 events
    assert max(size for _, size in runs) < 10_000_000  # and at 10 MB
    late, later = min(n for n in memory if n >= 20), max(memory)
    assert memory[later] - memory[late] < 20_000_000, memory
    loop.close()
    site.close()


@pytest.mark.slow
def test_two_workers_train_two_candidates_at_once(temporal: Temporal, tmp_path: Path) -> None:
    site = Site(tmp_path, temporal)
    workers = {site.worker().pid, site.worker().pid}  # one training each
    loop = Running(site, replace(SMALL, candidates=2, total_timesteps=10_000_000))
    runs = lambda: list(site.folder.glob(f"runs/{loop.id}__*/pids"))  # noqa: E731
    eventually(lambda: len(runs()) == 2, 120)
    trainers = [psutil.Process(int(run.read_text().split()[0])) for run in runs()]
    assert {trainer.ppid() for trainer in trainers} == workers
    steps = lambda: [json.loads((run.parent / "progress.json").read_text())["step"] for run in runs()]  # noqa: E731
    before = steps()
    eventually(lambda: all(now > then for now, then in zip(steps(), before, strict=True)))
    assert re.fullmatch(r"loop-\w+__000001__[12]__\w{8}", runs()[0].parent.name)
    loop.tell("stop_now")
    loop.result()
    loop.close()
    site.close()
