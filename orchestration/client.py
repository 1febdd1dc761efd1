"""Asks Temporal for what the user wants: starts loops, tells them things, and shows how they do.

Where Temporal is, and who we are there, is read the standard way (docs.temporal.io/develop/environment-configuration):
TEMPORAL_ADDRESS, TEMPORAL_NAMESPACE, TEMPORAL_API_KEY, TEMPORAL_TLS... or a profile in temporal.toml.
"""

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
)
from temporalio.envconfig import ClientConfig
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.runtime import PrometheusConfig, Runtime, TelemetryConfig
from temporalio.service import RPCError, RPCStatusCode

from orchestration import server
from orchestration.config import (
    LOOP_ID,
    TASK_QUEUE,
    Champion,
    Loop,
    Round,
    Scheduled,
    SchedulerRequest,
    Settings,
    Status,
    TrainingConfig,
    check,
)
from orchestration.report import gains, when
from orchestration.store import Store, deploy

LOCAL = Path("runs/temporal-local.db")  # of --local
ANSWER_SECONDS = timedelta(seconds=20)
STOP_SECONDS = 30.0  # of Ctrl-C with --local


@dataclass
class Server:
    """Temporal's dev server, on loopback; any other Temporal will do as well."""

    db: Path = Path("runs/temporal.db")
    """the file that it keeps everything in"""
    port: int = 7233
    """where workers and commands find it"""
    ui_port: int = 8233
    """of its web page"""


@dataclass
class Connection:
    address: str | None = None
    """host:port of Temporal; by default TEMPORAL_ADDRESS, or localhost:7233"""
    namespace: str | None = None
    """by default TEMPORAL_NAMESPACE, or default"""
    profile: str | None = None
    """of Temporal's configuration file"""


@dataclass
class Worker(Connection):
    """Does the work; as many as there are machines."""

    trainings: int = 1
    """so many at once"""
    metrics_port: int | None = None
    """Prometheus, on loopback"""


@dataclass
class Runner(Connection):
    local: bool = False
    """if toggled, with a server and a worker of its own, until it is done"""
    trainings: int = 1
    """with --local: so many at once"""


@dataclass
class Test(TrainingConfig, Runner):
    """Whether everything works: a cluster, jobs, a short training, inference."""

    workload: str = "generated"
    total_timesteps: int = 20_000
    jobs: int = 3_000


@dataclass
class ScheduleJobs(TrainingConfig, Runner):
    """New jobs, scheduled by the champion or, where there is none, EASY-FIFO."""

    jobs: int = 200


@dataclass
class Named(Connection):
    id: str = LOOP_ID
    """of the loop"""


@dataclass
class Start(TrainingConfig, Runner):
    """Start the loop."""

    id: str = LOOP_ID
    """of the loop"""


@dataclass
class ShowStatus(Named):
    """What the loop does, and what came of its rounds."""


@dataclass
class Stop(Named):
    """End the loop after the round that runs."""

    now: bool = False
    """if toggled, end the round as well; its trainings save and can be resumed"""


@dataclass
class Pause(Named):
    """Begin no more rounds; the one that runs goes on."""


@dataclass
class Resume(Named):
    """After a pause."""


@dataclass
class RetrainNow(Named):
    """Do not wait for the next round's time."""


@dataclass
class Configure(Named):
    """Other settings from the next round on."""

    settings: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """KEY=VALUE, keys as the flags of `start` with _ for -"""


@dataclass
class ByHand(Named):
    store: str | None = None
    """change the champion in this store, where no loop is running that could do it"""
    deploy_to: str | None = None
    """with --store: and write it there"""


@dataclass
class Promote(ByHand):
    """Make a round's policy the champion."""

    round: Annotated[int, tyro.conf.Positional] = 0


@dataclass
class Rollback(ByHand):
    """Back to the champion before."""


@dataclass
class Every(TrainingConfig, Named):
    """A Temporal Schedule that starts a loop of --rounds (0: one) again and again; not while the last one runs."""

    period: Annotated[str, tyro.conf.Positional] = "7d"
    """such as 7d, 12h, 30m"""
    cron: str | None = None
    """instead: such as "0 3 * * 1", UTC"""


@dataclass
class Unschedule(Named):
    """End the schedule; a loop that runs goes on."""


# ------------------------------------------------------------------------------------------------------- where it runs
async def connect(where: Connection, runtime: Runtime | None = None) -> Client:
    """
    Raises:
        ValueError: nobody answers there, or not to us.
    """
    options: dict[str, Any] = {"target_host": "localhost:7233"}
    options |= ClientConfig.load_client_connect_config(profile=where.profile)
    options |= {"target_host": where.address} if where.address else {}
    options |= {"namespace": where.namespace} if where.namespace else {}
    try:
        client = await Client.connect(**options, runtime=runtime)
        await client.service_client.check_health()
        return client
    except (RuntimeError, RPCError) as error:
        why = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"{options['target_host']}: no Temporal answers ({why}); start python training_loop.py server, or give "
            "--address"
        ) from None


async def connect_soon(where: Connection) -> Client:
    """`connect` to a server that has just been started: it listens a moment before it answers."""
    until = time.monotonic() + server.START_SECONDS
    while True:
        try:
            return await connect(where)
        except ValueError:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.1)


@asynccontextmanager
async def reached(args: Runner) -> AsyncIterator[Client]:
    """Temporal, with --local one of its own and a worker, which end with the block."""
    if not args.local:
        yield await connect(args)
        return
    from orchestration.worker import working

    port, ui_port = server.free_port(), server.free_port()
    LOCAL.parent.mkdir(exist_ok=True)
    with server.running(LOCAL, port, ui_port, LOCAL.with_suffix(".log")):
        say(f"Temporal's page: http://127.0.0.1:{ui_port}")
        client = await connect_soon(Connection(f"127.0.0.1:{port}", "default"))
        async with working(client, args.trainings):
            yield client


async def work(args: Worker) -> None:
    """Until Ctrl-C or SIGTERM."""
    from orchestration.worker import working

    if args.trainings < 1:
        raise ValueError(f"--trainings {args.trainings}: give 1 or more")
    metrics = PrometheusConfig(f"127.0.0.1:{args.metrics_port}") if args.metrics_port is not None else None
    client = await connect(args, Runtime(telemetry=TelemetryConfig(metrics=metrics)))
    told: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told.put_nowait, number)
    async with working(client, args.trainings):
        say(f"working for {client.service_client.config.target_host}, namespace {client.namespace}")
        received = await told.get()
        say("ending, once trainings have saved")
    if received == signal.SIGINT:
        raise KeyboardInterrupt


# -------------------------------------------------------------------------------------------------------- the commands
async def test(args: Test) -> None:
    asked = SchedulerRequest(config_of(args), shown=5)
    show_schedule(await run_to_the_end(args, "test_workflow", asked, "test", Scheduled))


async def schedule_jobs(args: ScheduleJobs) -> None:
    asked = SchedulerRequest(config_of(args))
    show_schedule(await run_to_the_end(args, "scheduler_workflow", asked, "schedule", Scheduled))


async def run_to_the_end(args: Runner, workflow: str, asked: Any, name: str, answer: type[Any]) -> Any:
    async with reached(args) as client:
        handle = await client.start_workflow(
            workflow, asked, id=f"{name}-{time.time_ns() // 1_000_000}", task_queue=TASK_QUEUE, result_type=answer
        )
        try:
            return await handle.result()
        except WorkflowFailureError as error:
            raise ValueError(reason(error)) from None
        except asyncio.CancelledError:
            await handle.cancel()
            await wait(handle)
            raise


async def start(args: Start) -> None:
    config = config_of(args)
    async with reached(args) as client:
        try:
            handle = await client.start_workflow(
                "training_loop_workflow", Loop(config), id=args.id, task_queue=TASK_QUEUE, result_type=Status
            )
        except WorkflowAlreadyStartedError:
            if not args.local:
                raise ValueError(f"{args.id}: this loop runs already; stop it, or give another --id") from None
            say(f"{args.id}: going on with the loop that was cut off, and with its flags")
            handle = client.get_workflow_handle(args.id, result_type=Status)
        if not args.local:
            say(f"{args.id} runs; see python training_loop.py status")
            return
        try:
            show(await follow(handle), {})
        except asyncio.CancelledError:
            say("Stopping, once trainings have saved. Ctrl-C again: at once.")
            await handle.signal("stop_now")
            await wait(handle)
            raise


async def wait(handle: WorkflowHandle[Any, Any]) -> None:
    """For the end of what was told to end, whatever it is, but not for ever."""
    with suppress(TimeoutError, WorkflowFailureError):
        await asyncio.wait_for(handle.result(), STOP_SECONDS)


async def follow(handle: WorkflowHandle[Any, Status]) -> Status:
    """A line for each round that ends, until the loop does."""
    result, shown = asyncio.create_task(handle.result()), 0
    with Console(stderr=True).status("starting") as line:
        while True:
            done, _ = await asyncio.wait([result], timeout=1.0)
            status = result.result() if done else await ask_status(handle)
            for found in status.loop.rounds[shown - status.loop.done or None :] if status.loop.done > shown else []:
                say(f"round {found.number}: {found.status}: {found.why}")
            shown = status.loop.done
            if done:
                return status
            line.update(f"round {status.number or '…'}: {status.state}{', '.join(await trainings(handle))}")


async def ask_status(handle: WorkflowHandle[Any, Any]) -> Status:
    return await handle.query("status", result_type=Status, rpc_timeout=ANSWER_SECONDS)


async def trainings(handle: WorkflowHandle[Any, Any]) -> list[str]:
    """What the trainings say of themselves."""
    description, said = await handle.describe(), []
    for pending in description.raw_description.pending_activities:
        if pending.activity_type.name != "train_policy" or not pending.heartbeat_details.payloads:
            continue
        [found] = await description.data_converter.decode(pending.heartbeat_details.payloads[:1])
        if found and found.get("total"):
            best = f", best {found['best']:+.1%}" if isinstance(found.get("best"), float) else ""
            tried = f", attempt {pending.attempt}" if pending.attempt > 1 else ""
            said.append(f" {found['step'] / found['total']:.0%} of {found['total']:,}{best}{tried}")
    return said


async def status(args: ShowStatus) -> None:
    handle = await handle_of(args)
    show(await ask_status(handle), {"trainings": await trainings(handle)})


async def tell(args: Named, what: str, said: str) -> None:
    """A signal."""
    await (await handle_of(args)).signal(what)
    say(f"{args.id}: {said}")


async def stop(args: Stop) -> None:
    if not args.now:
        return await tell(args, "stop", "ends after the round that runs")
    await tell(args, "stop_now", "ends")
    handle = await handle_of(args)
    await wait(handle)


async def pause(args: Pause) -> None:
    await tell(args, "pause", "paused")


async def resume(args: Resume) -> None:
    await tell(args, "resume", "goes on")


async def retrain_now(args: RetrainNow) -> None:
    await tell(args, "retrain_now", "the next round begins as soon as none runs")


async def configure(args: Configure) -> None:
    if not args.settings or not all("=" in setting for setting in args.settings):
        raise ValueError("configure: give KEY=VALUE, such as candidates=2")
    values = dict(setting.split("=", 1) for setting in args.settings)
    new = await update(args, "configure", Settings(values), TrainingConfig)
    say(f"{args.id}: from the next round on " + ", ".join(f"{name}={getattr(new, name)}" for name in values))


async def promote(args: Promote) -> None:
    if args.store:
        champion = Store(args.store).promote(args.round, "promoted by hand")
        deploy_if_asked(args, champion)
    else:
        champion = await update(args, "promote", args.round, Champion)
    say(f"{args.store or args.id}: round {champion.round} is the champion")


async def rollback(args: Rollback) -> None:
    if args.store:
        champion = Store(args.store).rollback("rolled back by hand")
        deploy_if_asked(args, champion)
    else:
        champion = await update(args, "rollback", None, Champion)
    say(f"{args.store or args.id}: round {champion.round} is the champion again")


def deploy_if_asked(args: ByHand, champion: Champion) -> None:
    if args.store and args.deploy_to:
        deploy(Store(args.store), champion, Path(args.deploy_to))


async def every(args: Every) -> None:
    config = config_of(args)
    config = replace(config, rounds=config.rounds or 1)
    intervals = [] if args.cron else [ScheduleIntervalSpec(every=period(args.period))]
    client = await connect(args)
    loop = ScheduleActionStartWorkflow("training_loop_workflow", Loop(config), id=args.id, task_queue=TASK_QUEUE)
    spec = ScheduleSpec(intervals=intervals, cron_expressions=[args.cron] if args.cron else [])
    try:
        policy = SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP)
        await client.create_schedule(args.id, Schedule(action=loop, spec=spec, policy=policy))
    except ScheduleAlreadyRunningError:
        raise ValueError(f"{args.id}: is scheduled already; unschedule it first, or give another --id") from None
    say(f"{args.id}: {config.rounds} round(s) every {args.cron or args.period}")


async def unschedule(args: Unschedule) -> None:
    await (await connect(args)).get_schedule_handle(args.id).delete()
    say(f"{args.id}: no longer scheduled")


def period(text: str) -> timedelta:
    """
    Raises:
        ValueError: not such as 7d, 12h, 30m, 90s.
    """
    found = re.fullmatch(r"(\d+)([smhd])", text)
    if not found or not int(found[1]):
        raise ValueError(f"every {text}: give a number and a unit, such as 7d, 12h, 30m, 90s")
    return timedelta(seconds=int(found[1]) * {"s": 1, "m": 60, "h": 3_600, "d": 86_400}[found[2]])


# ------------------------------------------------------------------------------------------------------------- helpers
def config_of(args: TrainingConfig) -> TrainingConfig:
    """The configuration among the flags.

    Raises:
        ValueError: it makes no sense.
    """
    config = TrainingConfig(**{field.name: getattr(args, field.name) for field in fields(TrainingConfig)})
    check(config)
    return config


async def handle_of(args: Named) -> WorkflowHandle[Any, Any]:
    return (await connect(args)).get_workflow_handle(args.id)


async def update(args: Named, name: str, asked: Any, answer: type[Any]) -> Any:
    handle = await handle_of(args)
    arguments = [] if asked is None else [asked]
    try:
        return await handle.execute_update(name, args=arguments, result_type=answer)
    except WorkflowUpdateFailedError as error:
        raise ValueError(reason(error)) from None


def reason(error: BaseException) -> str:
    """The words of whoever noticed."""
    while (cause := getattr(error, "cause", None)) is not None:
        error = cause
    return error.message if isinstance(error, ApplicationError) else str(error)


def in_one_line(error: RPCError | WorkflowQueryFailedError, name: str) -> str:
    """What a refusal of Temporal's means here."""
    status = getattr(error, "status", None)
    if status == RPCStatusCode.NOT_FOUND:
        return f"{name}: no such loop, or it has ended; start it with python training_loop.py start"
    if status in (RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED, RPCStatusCode.FAILED_PRECONDITION):
        return f"{name}: no worker answers; start one with python training_loop.py worker"
    return str(error).strip().splitlines()[0]


def say(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def show(status: Status, more: dict[str, list[str]]) -> None:
    loop = status.loop
    title = f"{loop.config.workload}, {loop.config.objective}, {loop.config.algorithm}: {loop.done} round(s)"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("round", "came of it", "to champion", "to EASY-FIFO", "to best rule", "p99"):
        table.add_column(heading, justify="left" if heading == "came of it" else "right")
    table.add_column("why")
    for found in loop.rounds:
        table.add_row(*row(found))
    console = Console(width=1000)
    console.print(table)
    if loop.champion:
        console.print(
            f"Champion: round {loop.champion.round}, since {when(loop.champion.since)}, {loop.champion.policy.uri}",
            highlight=False, markup=False,
        )  # fmt: skip
    now = f", round {status.number}" if status.number else ""
    due = "" if status.state != "waiting" else f", until {when(loop.began + loop.config.interval)}"
    console.print(f"Now: {status.state}{now}{due}", *more.get("trainings", []), highlight=False, markup=False)
    for found in loop.rounds[-1:]:
        if found.status == "stopped":
            for run in found.runs:
                say(f"Go on with a training: python {loop.config.algorithm}_scheduler.py --resume {run}")


def row(found: Round) -> list[str]:
    cells = [cell if isinstance(cell, str) else " ".join(cell) for cell in gains(found)]
    return [str(found.number or "–"), found.status, *cells, found.why]


def show_schedule(found: Scheduled) -> None:
    table = Table(title=f"{found.jobs:,} jobs, scheduled by {found.policy}", box=box.SIMPLE_HEAD)
    for heading in ("job", "submitted (s)", "started (s)", "waited (s)", "node"):
        table.add_column(heading, justify="right")
    for job in found.placements:
        times = job.submitted, job.started, job.started - job.submitted
        table.add_row(str(job.job), *(f"{time:,.0f}" for time in times), str(job.node))
    console = Console(width=1000)
    console.print(table)
    console.print(
        f"Mean wait {found.wait:,.0f} s (p99 {found.wait_p99:,.0f} s); EASY-FIFO {found.easy_fifo_wait:,.0f} s",
        highlight=False,
    )
