"""Records the histories that test_histories.py replays: python tests/orchestration/histories.py

Needed where a new kind of history is wanted. A change of the workflows that cannot replay the old ones is put behind
`workflow.patched` instead, or the loops that run somewhere break.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
from orchestration_helpers import ROOT, SMALL, Running, Site, Temporal, eventually  # noqa: E402

from orchestration.config import TASK_QUEUE, Champion, Scheduled, SchedulerRequest, Settings, TrainingConfig  # noqa: E402

FOLDER = HERE / "histories"


def keep(name: str, loop: Running, handle: Any = None) -> None:
    history = loop.do((handle or loop.handle).fetch_history())
    text = history.to_json()
    for folder in (ROOT, Path(sys.prefix).parent, sys.base_prefix):  # of this machine, in tracebacks
        text = text.replace(f"{folder}/", "")
    (FOLDER / f"{name}.json").write_text(text)
    print(name, len(history.events), "events")


def record(site: Site) -> None:
    site.worker("--trainings", "2")
    loop = Running(site, replace(SMALL, rounds=2, workload="nowhere.swf"))
    loop.result()
    keep("failed_rounds", loop)
    for workflow in ("scheduler_workflow", "test_workflow"):  # the second one fails in the end: a stub's policy is none
        asked = SchedulerRequest(SMALL)
        begin = loop.client.start_workflow(workflow, asked, id=workflow, task_queue=TASK_QUEUE, result_type=Scheduled)
        handle = loop.do(begin)
        eventually(lambda h=handle: loop.do(h.describe()).status.name in ("FAILED", "COMPLETED"))
        keep(workflow, loop, handle)
    loop = Running(site, replace(SMALL, rounds=3, candidates=2))
    loop.result()
    keep("three_rounds", loop)
    loop = Running(site, replace(SMALL, rounds=0, total_timesteps=10_000_000))
    loop.training()
    loop.tell("stop_now")
    loop.result()
    keep("stopped_now", loop)
    loop = Running(site, replace(SMALL, rounds=0, interval=3_600.0))
    for wanted in (1, 2):
        eventually(lambda n=wanted: loop.status().loop.done >= n)
        loop.tell("retrain_now")
    loop.tell("pause")
    loop.until("paused")
    loop.update("rollback", answer=Champion)
    loop.update("promote", loop.status().loop.rounds[-1].number, answer=Champion)
    loop.update("configure", Settings({"candidates": "2"}), answer=TrainingConfig)
    loop.tell("resume")
    time.sleep(1)
    loop.tell("stop")
    loop.result()
    keep("told", loop)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        temporal = Temporal(Path(folder))
        temporal.start()
        site = Site(Path(folder), temporal)
        try:
            record(site)
        finally:
            site.close()
            temporal.kill()
