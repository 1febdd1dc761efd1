"""The three workflows. Nothing here touches files, clocks or networks: activities do, and Temporal replays the rest.

`tests/orchestration/histories/` holds recorded runs. A change after which they no longer replay breaks the loops that
run somewhere: put it behind `workflow.patched`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, is_cancelled_exception
from temporalio.workflow import ActivityCancellationType

with workflow.unsafe.imports_passed_through():
    import orchestration.config as c
    from orchestration.config import KEPT_ROUNDS, PRESETS, TRAINING_QUEUE, USER_ERROR

T = TypeVar("T")
ROUNDS_EACH = 20  # in one history; Temporal's own advice comes later, after thousands of events
# After a lost worker the next try is a second away. What fails says itself when to try again (activities.py), and these
# do not get better.
FINAL = [USER_ERROR, "Conflict"]


async def short(activity: str, asked: Any, answer: type[T] | None) -> T:
    """A step of seconds. A store that is away is tried again for six hours."""
    return await workflow.execute_activity(
        activity, asked, result_type=answer,
        start_to_close_timeout=timedelta(hours=1), schedule_to_close_timeout=timedelta(hours=6),
        heartbeat_timeout=timedelta(seconds=c.SILENCE),
        retry_policy=RetryPolicy(
            initial_interval=timedelta(seconds=1), backoff_coefficient=1, non_retryable_error_types=FINAL,
        ),
    )  # fmt: skip


async def train(asked: c.TrainRequest) -> c.Candidate:
    """Hours. A lost worker is noticed by its silence, and the next one goes on from the checkpoint."""
    return await workflow.execute_activity(
        "train_policy", asked, result_type=c.Candidate, task_queue=TRAINING_QUEUE,
        start_to_close_timeout=timedelta(days=7), heartbeat_timeout=timedelta(seconds=c.SILENCE),
        retry_policy=RetryPolicy(
            initial_interval=timedelta(seconds=1), backoff_coefficient=1, maximum_attempts=100,
            non_retryable_error_types=FINAL,
        ),
        cancellation_type=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
    )  # fmt: skip


async def evaluate(asked: c.EvaluateRequest) -> c.Evaluation:
    """Minutes; longer where a trace is long. It begins anew when tried again."""
    return await workflow.execute_activity(
        "run_evaluation", asked, result_type=c.Evaluation,
        start_to_close_timeout=timedelta(days=1), heartbeat_timeout=timedelta(seconds=c.SILENCE),
        retry_policy=RetryPolicy(
            initial_interval=timedelta(seconds=1), backoff_coefficient=1, maximum_attempts=100,
            non_retryable_error_types=FINAL,
        ),
        cancellation_type=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
    )  # fmt: skip


async def workload_of(step: c.Step) -> c.Data:
    """New jobs where they are generated, else those of the trace or the record as it is now."""
    if step.config.workload in (*PRESETS, "generated"):
        cluster = await short("generate_cluster", step, c.Reference)
        return await short("generate_jobs", c.JobsRequest(step, cluster), c.Data)
    return await short("collect_records", step, c.Data)


def run_folder(number: int, candidate: int) -> str:
    """Of a training, on the machine where it runs. Part of the workflow's run is in it: a loop that begins anew under
    the same name does not go on with what it finds there."""
    info = workflow.info()
    return f"runs/{info.workflow_id}__{number:06d}__{candidate}__{info.run_id[:8]}"


def now() -> float:
    return workflow.now().timestamp()


def line(error: BaseException) -> str:
    """What went wrong in the words of whoever noticed."""
    while isinstance(error, ActivityError) and error.cause:
        error = error.cause
    return getattr(error, "message", "") or str(error) or type(error).__name__


@workflow.defn(name="test_workflow")
class TestWorkflow:
    """Whether everything works: a cluster, jobs, a short training, inference."""

    __test__ = False  # not pytest's

    @workflow.run
    async def run(self, asked: c.SchedulerRequest) -> c.Scheduled:
        step = c.Step(asked.config, 0, f"tests/{workflow.info().workflow_id}")
        data = await workload_of(step)
        candidate = await train(c.TrainRequest(step, data, 1, run_folder(0, 1)))
        return await short("run_policy", c.PolicyRequest(step, data, candidate.policy, asked.shown), c.Scheduled)


@workflow.defn(name="scheduler_workflow")
class SchedulerWorkflow:
    """What the champion does with new jobs."""

    @workflow.run
    async def run(self, asked: c.SchedulerRequest) -> c.Scheduled:
        step = c.Step(asked.config, 0, f"schedules/{workflow.info().workflow_id}")
        data = await workload_of(step)
        return await short("run_policy", c.PolicyRequest(step, data, None, asked.shown), c.Scheduled)


@workflow.defn(name="training_loop_workflow")
class TrainingLoopWorkflow:
    """Rounds of training, one after the other, each when it is due."""

    @workflow.init
    def __init__(self, loop: c.Loop) -> None:
        self.loop = loop
        self.state = "waiting"
        self.stopping = False
        self.ending = False  # the round that runs, too
        self.current: asyncio.Task[None] | None = None  # the round that runs
        self.round: c.Round | None = None

    @workflow.run
    async def run(self, loop: c.Loop) -> c.Status:
        here = 0
        try:
            while not self.over():
                await self.until_due()
                if not self.over():
                    self.current = asyncio.create_task(self.one_round())
                    await self.current
                    here += 1
                if not self.over() and (here >= ROUNDS_EACH or workflow.info().is_continue_as_new_suggested()):
                    await workflow.wait_condition(workflow.all_handlers_finished)
                    workflow.continue_as_new(self.loop)
        except asyncio.CancelledError:  # between two rounds
            self.stopping = True
        await workflow.wait_condition(workflow.all_handlers_finished)
        self.state = "stopped" if self.stopping else "done"
        return self.status()

    def over(self) -> bool:
        rounds = self.loop.config.rounds
        return self.stopping or (rounds > 0 and self.loop.done >= rounds)

    async def until_due(self) -> None:
        """Wait for the next round's time, or for a signal that begins it, or ends the loop."""
        loop = self.loop
        while not self.over():
            left = None if loop.paused else loop.began + loop.config.interval - now()
            if left is not None and (loop.wanted or left <= 0):
                return
            self.state = "paused" if loop.paused else "waiting"
            seen = self.asked_for()
            with suppress(asyncio.TimeoutError):
                await workflow.wait_condition(lambda: self.asked_for() != seen, timeout=left)  # noqa: B023

    def asked_for(self) -> tuple[bool, bool, bool, float, int]:
        """What decides whether a round begins, besides the time."""
        config = self.loop.config
        return self.stopping, self.loop.paused, self.loop.wanted, config.interval, config.rounds

    async def one_round(self) -> None:
        """Whatever happens in it, it is kept, and the loop goes on."""
        loop = self.loop
        loop.wanted, loop.began = False, now()
        found = self.round = c.Round(began=loop.began)
        try:
            await self.steps(found)
        except (Exception, asyncio.CancelledError) as error:
            found.why = line(error)
            if is_cancelled_exception(error):
                found.status, found.why, self.stopping = "stopped", "told to stop", True
            else:
                loop.failures += 1
        found.ended = now()
        found.champion = loop.champion.round if loop.champion else 0
        loop.done += 1
        loop.rounds = [*loop.rounds, found][-KEPT_ROUNDS:]
        drift = found.evaluation and found.evaluation.drift
        if loop.config.retrain_on_drift and drift and drift.beyond and not loop.drifted:
            loop.wanted = loop.drifted = True
        else:  # the round after one that drift began waits for its time: its champion has not been recorded yet
            loop.drifted = False
        self.state = "reporting"
        try:
            await short("report_round", c.Report(loop.config, found, loop.champion, loop.rounds, loop.failures), None)
        except ActivityError as error:  # what is shown is not what is
            workflow.logger.warning("round %d is not reported: %s", found.number, line(error))
        self.round = None

    async def steps(self, found: c.Round) -> None:
        """Fills in what comes of the round."""
        config = self.loop.config
        begin = c.Begin(config, workflow.info().first_execution_run_id, self.loop.done + 1)
        begun = await self.timed(found, "beginning", lambda: short("begin_round", begin, c.Begun))
        found.number, self.loop.champion = begun.number, begun.champion
        step = c.Step(config, begun.number, f"rounds/{begun.number:06d}")
        data = await self.timed(found, "collecting", lambda: workload_of(step))
        found.jobs = data.jobs
        numbers = range(1, config.candidates + 1)
        found.runs = [run_folder(begun.number, number) for number in numbers]
        weights = begun.champion.weights if begun.champion and config.start_from == "champion" else None

        async def trainings() -> list[c.Candidate | BaseException]:
            asked = [
                c.TrainRequest(step, data, number, run, weights)
                for number, run in zip(numbers, found.runs, strict=True)
            ]
            return await asyncio.gather(*map(train, asked), return_exceptions=True)

        trained = await self.timed(found, "training", trainings)
        candidates = [candidate for candidate in trained if isinstance(candidate, c.Candidate)]
        if not candidates:
            raise next(error for error in trained if isinstance(error, BaseException))
        asked = c.EvaluateRequest(step, data, candidates, begun.champion)
        found.evaluation = await self.timed(found, "evaluating", lambda: evaluate(asked))
        best = next(candidate for candidate in candidates if candidate.number == found.evaluation.candidate)
        request = c.StoreRequest(step, best, found.evaluation)
        await self.timed(found, "storing", lambda: short("store_checkpoint", request, c.Reference))
        found.status, found.why = "kept", found.evaluation.why
        if found.evaluation.better:
            await self.timed(found, "promoting", lambda: self.promotion(found, begun.champion))

    async def promotion(self, found: c.Round, champion: c.Champion | None) -> None:
        """Of the round's policy, if what it was compared with is still the champion."""
        asked = c.Promotion(self.loop.config, found.number, found.why, champion.round if champion else 0)
        try:
            self.loop.champion = await short("promote", asked, c.Champion)
            found.status = "promoted"
        except ActivityError as error:
            if getattr(error.cause, "type", None) != "Conflict":
                raise
            found.why = f"{line(error)}; {found.why}"

    async def timed(self, found: c.Round, name: str, step: Callable[[], Awaitable[T]]) -> T:
        if self.ending or workflow.cancellation_reason() is not None:
            raise asyncio.CancelledError  # which the step before has swallowed, if it ended at the same moment
        self.state, began = name, workflow.time()
        result = await step()
        found.seconds[name] = workflow.time() - began
        return result

    @workflow.signal
    def stop(self) -> None:
        """After the round that runs."""
        self.stopping = True

    @workflow.signal
    def stop_now(self) -> None:
        """Trainings save and end; the round is not finished."""
        self.stopping = self.ending = True
        if self.current and not self.current.done():
            self.current.cancel()

    @workflow.signal
    def pause(self) -> None:
        """No new round until `resume`; the one that runs goes on."""
        self.loop.paused = True

    @workflow.signal
    def resume(self) -> None:
        self.loop.paused = False

    @workflow.signal
    def retrain_now(self) -> None:
        """Do not wait for the next round's time."""
        self.loop.wanted = True

    @workflow.update
    def configure(self, settings: c.Settings) -> c.TrainingConfig:
        """From the next round on."""
        self.loop.config = c.changed(self.loop.config, settings.values)
        return self.loop.config

    @configure.validator
    def check_settings(self, settings: c.Settings) -> None:
        c.changed(self.loop.config, settings.values)

    @workflow.update
    async def promote(self, number: int) -> c.Champion:
        """The policy of a round, whatever the figures say."""
        asked = c.Promotion(self.loop.config, number, "promoted by hand")
        self.loop.champion = await short("promote", asked, c.Champion)
        return self.loop.champion

    @promote.validator
    def check_number(self, number: int) -> None:
        if number < 1:
            raise ValueError(f"round {number}: give the number of a round, 1 or more")

    @workflow.update
    async def rollback(self) -> c.Champion:
        """To the champion before."""
        champion = self.loop.champion
        asked = c.Promotion(self.loop.config, 0, "rolled back by hand", champion.round if champion else None)
        self.loop.champion = await short("promote", asked, c.Champion)
        return self.loop.champion

    @workflow.query
    def status(self) -> c.Status:
        runs = self.round.runs if self.round else []
        return c.Status(self.loop, self.state, self.round.number if self.round else 0, runs)
