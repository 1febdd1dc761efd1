"""A loop whose steps are canned: drift begins one round at once; a stop that comes together with the end of a step."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from orchestration_helpers import SMALL, Temporal
from temporalio import activity
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client
from temporalio.worker import Worker

from orchestration import config as c
from orchestration.workflows import TrainingLoopWorkflow

NOTHING = c.Reference("", "", 0)
CHAMPION = c.Champion(1, NOTHING, 0.0, "")
DRIFT = c.Drift(500, 200.0, 100.0, c.Figure(100, 90, 110), beyond=True)
EVALUATION = c.Evaluation(1, False, "", "easy-sjf", {}, {}, 1.0, NOTHING, DRIFT)
ANSWERS: dict[str, Any] = {
    "begin_round": c.Begun(1, CHAMPION),
    "collect_records": c.Data(NOTHING, 500, True),
    "train_policy": c.Candidate(1, 1, NOTHING, NOTHING),
    "run_evaluation": EVALUATION,
    "store_checkpoint": NOTHING,
    "report_round": None,
}


def canned(name: str) -> Any:
    @activity.defn(name=name)
    def step(asked: dict[str, Any]) -> Any:
        return ANSWERS[name]

    return step


def test_drift_begins_one_round_at_once(temporal: Temporal) -> None:
    async def loop() -> c.Status:
        client = await Client.connect(temporal.address)
        queue = {"activity_executor": ThreadPoolExecutor(2), "activities": [canned(name) for name in ANSWERS]}
        settings = replace(SMALL, workload="a.jsonl", rounds=0, interval=3_600.0, retrain_on_drift=True)
        general = Worker(client, task_queue=c.TASK_QUEUE, workflows=[TrainingLoopWorkflow], **queue)
        async with general, Worker(client, task_queue=c.TRAINING_QUEUE, **queue):
            handle = await client.start_workflow(
                "training_loop_workflow", c.Loop(settings), id="drift", task_queue=c.TASK_QUEUE, result_type=c.Status
            )
            status = None
            while status is None or (status.loop.done, status.state) != (2, "waiting"):
                await asyncio.sleep(0.2)
                status = await handle.query("status", result_type=c.Status)
            await asyncio.sleep(1)
            assert (await handle.query("status", result_type=c.Status)).loop.done == 2
            await handle.signal("stop")
            return await handle.result()

    status = asyncio.run(asyncio.wait_for(loop(), 60))
    first, second = status.loop.rounds
    assert second.began - first.ended < 30  # and not an hour


def test_a_stop_that_comes_together_with_the_end_of_a_step_stops(temporal: Temporal) -> None:
    """The workflow's worker is away for a moment, and finds both when it is back."""
    begun, go_on, called = threading.Event(), threading.Event(), []

    def recorded(name: str) -> Any:
        @activity.defn(name=name)
        def step(asked: dict[str, Any]) -> Any:
            called.append(name)
            begun.set()
            go_on.wait()
            return ANSWERS[name]

        return step

    async def loop() -> c.Status:
        client = await Client.connect(temporal.address)
        steps = [recorded(name) for name in ANSWERS]
        queue = {"task_queue": c.TASK_QUEUE, "activity_executor": ThreadPoolExecutor(2), "activities": steps}
        workflows = {"task_queue": c.TASK_QUEUE, "workflows": [TrainingLoopWorkflow]}
        settings = replace(SMALL, workload="a.jsonl", rounds=0)
        async with Worker(client, **queue):
            async with Worker(client, **workflows):
                handle = await client.start_workflow(
                    "training_loop_workflow", c.Loop(settings), id="both", task_queue=c.TASK_QUEUE, result_type=c.Status
                )
                await asyncio.to_thread(begun.wait)
            go_on.set()
            completed = EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED
            while completed not in [event.event_type for event in (await handle.fetch_history()).events]:
                await asyncio.sleep(0.1)
            await handle.signal("stop_now")
            async with Worker(client, **workflows):
                return await handle.result()

    [found] = asyncio.run(asyncio.wait_for(loop(), 60)).loop.rounds
    assert (found.status, called) == ("stopped", ["begin_round", "report_round"])
