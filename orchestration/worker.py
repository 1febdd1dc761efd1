"""Takes the loop's work from Temporal: workflows and short steps on one task queue, trainings on another."""

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from temporalio.client import Client
from temporalio.worker import Worker

from orchestration.activities import HEAVY, LIGHT
from orchestration.children import GRACE_SECONDS
from orchestration.config import TASK_QUEUE, TRAINING_QUEUE
from orchestration.workflows import SchedulerWorkflow, TestWorkflow, TrainingLoopWorkflow

WORKFLOWS = [TestWorkflow, SchedulerWorkflow, TrainingLoopWorkflow]
SHORT_STEPS = 4  # side by side
STICKY_SECONDS = 2.0  # how long a workflow waits for the worker that holds it; then another one replays it, in a moment


@asynccontextmanager
async def working(client: Client, trainings: int) -> AsyncIterator[None]:
    """Work in the background of the block, on so many trainings at once. At its end trainings save and end, and what
    is not done yet is done by the next worker."""
    options: dict[str, Any] = {
        # How late a cancellation arrives, and how late progress is shown.
        "max_heartbeat_throttle_interval": timedelta(seconds=1),
        "default_heartbeat_throttle_interval": timedelta(seconds=1),
        "graceful_shutdown_timeout": timedelta(seconds=GRACE_SECONDS + 3),
    }
    with ThreadPoolExecutor(SHORT_STEPS, "step") as short, ThreadPoolExecutor(trainings, "training") as long:
        general = Worker(
            client, task_queue=TASK_QUEUE, workflows=WORKFLOWS, activities=LIGHT, activity_executor=short,
            max_concurrent_activities=SHORT_STEPS,
            sticky_queue_schedule_to_start_timeout=timedelta(seconds=STICKY_SECONDS), **options,
        )  # fmt: skip
        training = Worker(
            client, task_queue=TRAINING_QUEUE, activities=HEAVY, activity_executor=long,
            max_concurrent_activities=trainings, **options,
        )  # fmt: skip
        async with general, training:
            yield
