"""What the workflows did once, as histories.py recorded it, they would do again: loops that run survive the change."""

import asyncio
import json
from pathlib import Path

import pytest
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer
from temporalio.workflow import NondeterminismError

from orchestration.worker import WORKFLOWS

HISTORIES = sorted((Path(__file__).parent / "histories").glob("*.json"))


def replay(text: str) -> None:
    asyncio.run(Replayer(workflows=WORKFLOWS).replay_workflow(WorkflowHistory.from_json("replayed", text)))


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_a_recorded_history_replays(path: Path) -> None:
    replay(path.read_text())


def test_there_is_one_of_each_workflow() -> None:
    started = [json.loads(path.read_text())["events"][0] for path in HISTORIES]
    names = {event["workflowExecutionStartedEventAttributes"]["workflowType"]["name"] for event in started}
    assert names == {"test_workflow", "scheduler_workflow", "training_loop_workflow"}


def test_a_history_of_other_steps_is_noticed() -> None:
    text = next(path.read_text() for path in HISTORIES if path.stem == "three_rounds")
    with pytest.raises(NondeterminismError):
        replay(text.replace('"collect_records"', '"x"').replace('"generate_cluster"', '"collect_records"'))
