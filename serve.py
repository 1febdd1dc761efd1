"""The decision service: the state of a cluster in, what starts where and the priority of every queued job out.

    python serve.py --policy runs/RUN/policy.onnx
    curl localhost:8000/v1/decisions --json @state.json

The contract, with examples, is in docs/deploy.md. The file reads downwards: what is sent and answered, how a state is
checked, the service, its HTTP interface, and the program that runs it.
"""

import asyncio
import gc
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain
from logging.handlers import RotatingFileHandler
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NoReturn

import msgspec
import numba
import numpy as np
import onnxruntime
import tyro
import uvicorn
import uvloop
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from msgspec import Meta, Struct
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from policies import ClusterState, Decision, OnnxPolicy, Policy, RulePolicy, load_policy
from scheduler_env import Layout, Moment, parse_rule
from workloads import Cluster, Jobs, WorkloadError

log = logging.getLogger("serve")
REQUEST_SECONDS = 10.0  # the head of a connection's first request has to arrive within
BODY_SECONDS = 10.0  # a request's body has to arrive within
TRIAL_SECONDS = 10.0  # a new policy has to decide its first state within
RELOAD_SECONDS = 1.0  # how often the policy's file is looked at
OPEN_PATHS = ("/healthz", "/readyz")  # without a token


@dataclass
class Args:
    policy: str
    """path of a policy.onnx, or the name of a rule; with @HOURS behind it who has waited for longer goes first"""
    host: str = "127.0.0.1"
    """address to listen on; other than loopback needs --token-file"""
    port: int = 8000
    """port to listen on"""
    unix_socket: Path | None = None
    """path of a unix socket to listen on instead, open to its user and group"""
    token_file: Path | None = None
    """file that holds the bearer token which requests have to carry"""
    workers: int = 1
    """so many processes share the work"""
    deadline_ms: float = 100.0
    """if the model takes longer, the answer comes from its reference rule"""
    record: Path | None = None
    """append every state and its decision here, as JSON lines; load_workload reads them back"""
    record_bytes: int = 100_000_000
    """size at which the record is rotated"""
    record_files: int = 10
    """how many full ones are kept"""
    max_body_bytes: int = 8_000_000
    """largest request"""
    max_jobs: int = 10_000
    """most jobs in one state"""
    max_nodes: int = 1_024
    """most nodes in one state"""


# --------------------------------------------------------------------------------------------- what is sent, answered
# gc=False: none of these can refer to itself, and a request has hundreds.
Id = str | int
Time = Annotated[float, Meta(ge=0, le=1e11, description="seconds; all times have one origin, Unix time for example")]
Duration = Annotated[float, Meta(gt=0, le=1e9, description="seconds")]
Amount = Annotated[float, Meta(ge=0, le=1e18)]
Amounts = Annotated[list[Amount], Meta(min_length=1, max_length=16, description="one number per resource")]


class Node(Struct, forbid_unknown_fields=True, gc=False):
    name: Id
    capacity: Amounts
    free: Amounts | None = None  # by default what the running jobs leave; less, where a node is not (all) in use
    speed: Annotated[float, Meta(ge=1e-6, le=1e6, description="a job takes its run time / speed")] = 1.0


class Job(Struct, forbid_unknown_fields=True, kw_only=True, gc=False):
    demand: Amounts
    requested_time: Duration
    user: Id | None = None  # these two tell whose history a job belongs to
    executable: Id | None = None


class QueuedJob(Job, kw_only=True, gc=False):
    id: Id
    submit_time: Time


class RunningJob(Job, kw_only=True, gc=False):
    id: Id
    node: Id
    start_time: Time
    submit_time: Time | None = None


class FinishedJob(Job, kw_only=True, gc=False):
    run_time: Duration  # what it would have taken at speed 1
    id: Id | None = None


class State(Struct, forbid_unknown_fields=True, gc=False):
    """A cluster at one moment. The order of resources is that of the workload on which the policy was trained."""

    now: Time
    nodes: Annotated[list[Node], Meta(min_length=1)]
    queued: list[QueuedJob] = []
    running: list[RunningJob] = []
    finished: list[FinishedJob] = []  # in order of their ends; the last two of every user and kind suffice
    resources: list[str] | None = None  # names, for the record


class Start(Struct, gc=False):
    job: Id
    node: Id


class Reservation(Struct, gc=False):
    job: Id
    node: Id
    time: float  # when the job can start if running jobs end as requested


class Priority(Struct, gc=False):
    job: Id
    priority: int  # higher first; from the number of queued jobs down to 1


class Answer(Struct, gc=False):
    start: list[Start]  # now, in this order
    reserved: Reservation | None
    priorities: list[Priority]  # of all queued jobs, the most urgent first
    decided_by: str
    policy_version: str
    fallback: str | None = None  # why a rule decided in place of the model


class Observed(Struct, forbid_unknown_fields=True, gc=False):
    """A raw observation, as of `SchedulerEnv`, from a window and nodes other than those of training if it says so."""

    observation: Annotated[list[float], Meta(min_length=1)]
    queue_window: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    nodes: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    resources: Annotated[int, Meta(ge=1, le=16)] | None = None
    deterministic: bool = True


class Action(Struct, gc=False):
    action: int
    decided_by: str
    policy_version: str
    fallback: str | None = None


class Problem(Struct):
    loc: list[Id]
    msg: str


class Refusal(Struct):
    detail: list[Problem]


class Refused(Exception):
    """Input that cannot be used: the status, the field, what is wrong with it and the remedy."""

    def __init__(self, where: Sequence[Id], message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status, self.refusal = status, Refusal([Problem(["body", *where], message)])


# ------------------------------------------------------------------------------------------------- checking a state
def decode(decoder: msgspec.json.Decoder, body: bytes) -> Any:
    """What the body says.

    Raises:
        Refused: it is no JSON, or a field is missing, unknown or out of range.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        where = [name or int(index) for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path)]
        if field := re.fullmatch(r"Object (?:missing required|contains unknown) field `(.*)`", message):
            where.append(field[1])
        raise Refused(where, message) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        for where in _not_finite(body):  # Python and JavaScript write NaN, which JSON does not know
            raise Refused(where, "not a finite number") from None
        raise Refused((), f"{error}; send JSON") from None


def _not_finite(body: bytes) -> Iterator[list[Id]]:
    """The places of numbers that are infinite or none, in what is JSON otherwise."""

    def search(value: Any, where: list[Id]) -> Iterator[list[Id]]:
        if isinstance(value, float) and not math.isfinite(value):
            yield where
        for key, part in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        ):
            yield from search(part, [*where, key])

    try:
        yield from search(json.loads(body), [])
    except (ValueError, RecursionError):
        return


def cluster_state(state: State) -> ClusterState:
    """The state in arrays.

    Raises:
        Refused: it contradicts itself.
    """
    names = [job.id for job in state.running] + [job.id for job in state.queued]
    if len(set(names)) < len(names):
        k, first = _first_repeated(names), len(state.running)
        raise Refused((*(("queued", k - first) if k >= first else ("running", k)), "id"), "there twice")
    index = {node.name: m for m, node in enumerate(state.nodes)}
    if len(index) < len(state.nodes):
        raise Refused(("nodes", _first_repeated([node.name for node in state.nodes]), "name"), "there twice")
    capacities = tuple(tuple(node.capacity) for node in state.nodes)
    cluster, resources = _cluster(capacities, tuple(node.speed for node in state.nodes)), len(capacities[0])
    if state.resources is not None and len(state.resources) != resources:
        raise Refused(("resources",), f"{len(state.resources)} names, and {resources} resources")
    finished, codes = None, None
    if state.finished:  # whose job it is counts only where something is known of its user
        codes = {None: -1}
        finished = _jobs("finished", state.finished, [0.0] * len(state.finished), resources, codes)
        finished = replace(finished, run_time=np.array([job.run_time for job in state.finished]))
    submitted = [job.start_time if job.submit_time is None else job.submit_time for job in state.running]
    queued = _jobs("queued", state.queued, [job.submit_time for job in state.queued], resources, codes)
    running = _jobs("running", state.running, submitted, resources, codes)
    start_time = np.array([job.start_time for job in state.running])
    node = np.array([index.get(job.node, -1) for job in state.running], np.int64)
    free = np.full_like(cluster.capacity, np.inf)
    if any(given.free is not None for given in state.nodes):
        rows = [unknown if given.free is None else given.free for given, unknown in zip(state.nodes, free, strict=True)]
        free = _amounts(rows, resources, "nodes", "free")
    problem, k = first_problem(
        state.now, queued.submit_time, queued.demand, running.submit_time, start_time, node, running.demand,
        cluster.capacity, free, np.zeros_like(free),
    )  # fmt: skip
    if problem >= 0:
        part, field, message = PROBLEMS[problem]
        raise Refused((part, k, field), message)
    return ClusterState(state.now, cluster, queued, running, start_time, node, finished, free)


@lru_cache(maxsize=16)
def _cluster(capacity: tuple[tuple[float, ...], ...], speed: tuple[float, ...]) -> Cluster:
    """Clusters change seldom."""
    resources = len(capacity[0])
    amounts = _amounts(capacity, resources, "nodes", "capacity")
    try:
        cluster = Cluster(amounts, np.array(speed), ("",) * resources)
    except WorkloadError as error:
        raise Refused(("nodes", "capacity"), str(error)) from None
    if amounts.max(0).min() < 1e-6:
        raise Refused(("nodes", "capacity"), "a resource of which no node has 1e-6; use smaller units")
    if not (kept := np.rint(amounts / cluster.grid).any(axis=1)).all():  # see `Cluster.on_grid`
        raise Refused(("nodes", int(kept.argmin()), "capacity"), "next to nothing beside the largest; leave it out")
    return cluster


PROBLEMS = (
    ("queued", "submit_time", "after now"),
    ("queued", "demand", "nothing; leave the job out"),
    ("queued", "demand", "more than any node has; leave it out"),
    ("running", "node", "none of the nodes"),
    ("running", "start_time", "after now"),
    ("running", "submit_time", "after start_time"),
    ("nodes", "capacity", "less than its running jobs take"),
    ("nodes", "free", "more than its running jobs leave"),
)


@numba.njit(cache=True)
def first_problem(now, submit, demand, running_submit, start, node, running_demand, capacity, free, used):
    """Which of PROBLEMS there is, and with which entry, or (-1, -1). Fills `used` float64[M, R] with what the running
    jobs take and `free` float64[M, R], where it is infinite, with what they leave."""
    for i in range(len(submit)):
        if submit[i] > now:
            return 0, i
        if demand[i].max() == 0:
            return 1, i
        m = r = 0
        while m < len(capacity) and r < demand.shape[1]:  # until a node has enough of every resource
            m, r = (m, r + 1) if demand[i, r] <= capacity[m, r] else (m + 1, 0)
        if m == len(capacity):
            return 2, i
    for i in range(len(start)):
        if node[i] < 0:
            return 3, i
        if start[i] > now:
            return 4, i
        if running_submit[i] > start[i]:
            return 5, i
        used[node[i]] += running_demand[i]
    for m in range(len(capacity)):
        for r in range(capacity.shape[1]):
            slack = 1e-9 * capacity[m, r]  # operators' sums are rounded
            if used[m, r] > capacity[m, r] + slack:
                return 6, m
            left = max(capacity[m, r] - used[m, r], 0.0)
            if free[m, r] == np.inf:
                free[m, r] = left
            if free[m, r] > left + slack:
                return 7, m
    return -1, -1


def _amounts(rows: Sequence[Any], resources: int, part: str, field: str) -> np.ndarray:
    """float64[len(rows), R]"""
    if not set(map(len, rows)) <= {resources}:
        index = next(index for index, row in enumerate(rows) if len(row) != resources)
        raise Refused((part, index, field), f"{len(rows[index])} numbers, and {resources} resources")
    return np.fromiter(chain.from_iterable(rows), float, len(rows) * resources).reshape(len(rows), resources)


def _jobs(
    part: str, jobs: Sequence[Job], submit: list[float], resources: int, codes: dict[Any, int] | None = None
) -> Jobs:
    """In the order given, with run times as requested; `codes` numbers users and executables."""
    demand = _amounts([job.demand for job in jobs], resources, part, "demand")
    requested, unknown = np.array([job.requested_time for job in jobs]), np.full(len(jobs), -1, np.int32)
    user, executable = unknown, unknown
    if codes is not None:
        user = np.array([codes.setdefault(job.user, len(codes)) for job in jobs], np.int32)
        executable = np.array([codes.setdefault(job.executable, len(codes)) for job in jobs], np.int32)
    zero = np.zeros(len(jobs))
    return Jobs(np.array(submit), requested, requested, demand, user, unknown, executable, unknown, zero, unknown)


def _first_repeated(names: list[Id]) -> int:
    """The first that has been there before."""
    seen: set[Id] = set()
    return next(k for k, name in enumerate(names) if name in seen or seen.add(name))


# -------------------------------------------------------------------------------------------------------- the service
@dataclass(frozen=True)
class Model:
    """A policy that has been tried out, and the rule that stands in for it."""

    policy: Policy
    fallback: RulePolicy
    version: str
    loaded: float  # Unix time

    @staticmethod
    def tried(policy: Policy) -> "Model":
        """
        Raises:
            PolicyError: it fails in a small state.
        """
        resources = policy.metadata.resources if isinstance(policy, OnnxPolicy) else 1
        compile_kernels(resources)  # before the clock starts
        timer = threading.Timer(TRIAL_SECONDS, end_calls, (policy,))
        timer.start()
        try:
            version = hashlib.sha256(policy.identity).hexdigest()[:12]
            model = Model(policy, RulePolicy(policy.reference), version, time.time())
            for chooser in (model.fallback, model.policy):
                chooser.decide(example(resources))
        finally:
            timer.cancel()
        return model


def example(resources: int) -> ClusterState:
    """A job of each kind on two nodes, and one more that is queued."""
    cluster = Cluster(np.full((2, resources), 4.0), np.ones(2), ("",) * resources)
    job = Job(demand=[2.0] * resources, requested_time=60.0, user=1)
    queued, one = _jobs("", [job, job], [1.0, 2.0], resources, {}), _jobs("", [job], [0.0], resources, {})
    return ClusterState(3.0, cluster, queued, one, np.zeros(1), np.zeros(1, np.int64), one)


def compile_kernels(resources: int) -> None:
    """Compile, or load, what decisions need, now and not in the first of them."""
    node = Node("a", [1.0])
    cluster_state(State(1.0, [node], [QueuedJob(demand=[1.0], requested_time=1.0, id=1, submit_time=0.0)]))
    moment, layout = Moment(example(resources), parse_rule("easy-fifo")), Layout(2, 2, resources)
    observation, _ = moment.observe(layout)
    moment.act(int(layout.split(observation).mask.argmax()))
    moment.follow_rule()
    moment.rule_order()


def end_calls(policy: Policy) -> None:
    """Make the model's present call fail."""
    if isinstance(policy, OnnxPolicy):
        policy.run_options.terminate = True


class Watchdog(threading.Thread):
    """Ends calls of the model that take too long."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self.seconds, self.guarded = seconds, None

    def run(self) -> None:
        while True:
            time.sleep(min(max(self.seconds / 4, 0.001), 0.05))
            guarded = self.guarded
            if guarded and time.perf_counter() - guarded[0] > self.seconds:
                guarded[1].terminate = True


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ  # by several workers, through files in that folder
        if shared:
            MultiProcessCollector(self.registry)
        named = {"namespace": "resourcerl", "registry": None if shared else self.registry}
        buckets = [0.0002 * 2**k for k in range(14)]
        self.decisions = Counter("decisions", "Decisions, by what decided", ["decided_by"], **named)
        self.seconds = Histogram("decision_seconds", "From body to answer", buckets=buckets, **named)
        self.queued = Gauge("queued_jobs", "Queued jobs in the last state", multiprocess_mode="mostrecent", **named)
        self.invalid = Counter("invalid_requests", "Requests refused", ["status"], **named)
        self.fallbacks = Counter("fallbacks", "Answers of the rule in place of the model", ["reason"], **named)
        self.reloads = Counter("reloads", "New files of the policy", ["result"], **named)
        self.unrecorded = Counter("unrecorded", "Decisions that could not be recorded", **named)
        self.policy = Info("policy", "What decides", namespace="resourcerl", registry=self.registry)
        ProcessCollector(registry=self.registry)


class Recorder(RotatingFileHandler):
    """Appends lines; a failure is counted, and delays or loses no answer."""

    def __init__(self, args: Args, failures: Counter) -> None:
        self.failures = failures
        super().__init__(args.record, maxBytes=args.record_bytes, backupCount=args.record_files, encoding="utf-8")
        if self.stream.tell():  # a line that a kill has cut short stays one of its own
            self.stream.write("\n")

    def handleError(self, record: logging.LogRecord) -> None:
        self.failures.inc()


class Service:
    """Decides, with the newest policy that works."""

    def __init__(self, args: Args, policy: Policy | None = None, seen: tuple[int, ...] = ()) -> None:
        """
        Args:
            policy, seen: another service's, to go on with whatever is in the policy's place by now.

        Raises:
            PolicyError, OSError: the policy or the record's place cannot be used.
        """
        self.args, self.metrics = args, Metrics()
        self.path = getattr(policy or load_policy(args.policy), "path", None)  # a rule has none
        self.seen = seen if policy else self._look()
        self._use(Model.tried(policy or load_policy(args.policy)))
        self.recorder = Recorder(args, self.metrics.unrecorded) if args.record else None
        self.watchdog = Watchdog(args.deadline_ms / 1e3)
        self.watchdog.start()
        self.reload_wanted = asyncio.Event()
        self._warned: set[tuple[str, str]] = set()

    def decide(self, body: bytes) -> bytes:
        """The Answer to a State, both JSON.

        Raises:
            Refused: the body is no state of a cluster, too large a one, or not of the kind that the policy knows.
        """
        state: State = decode(STATES, body)
        args, model = self.args, self.model
        for part in ("nodes", "queued", "running", "finished"):
            if len(getattr(state, part)) > (limit := args.max_nodes if part == "nodes" else args.max_jobs):
                raise Refused((part,), f"more than {limit}")
        cluster, resources = cluster_state(state), len(state.nodes[0].capacity)
        if isinstance(model.policy, OnnxPolicy) and resources != model.policy.metadata.resources:
            problem = f"{resources} resources, and the policy was made for {model.policy.metadata.resources}"
            raise Refused(("nodes", 0, "capacity"), problem)
        decision, *by = self._ask(model, lambda policy: policy.decide(cluster))
        answer = msgspec.json.encode(_answer(state, decision, *by))
        self.metrics.queued.set(len(state.queued))
        if self.recorder:
            self.recorder.emit(logging.makeLogRecord({"msg": _record(body, answer)}))
        return answer

    def predict(self, body: bytes) -> bytes:
        """The Action for an Observed, both JSON.

        Raises:
            Refused: the body is no observation that the policy can read.
        """
        asked: Observed = decode(OBSERVATIONS, body)
        model = self.model
        known = model.policy.layout or Layout(asked.queue_window or 1, asked.nodes or 1, asked.resources or 1)
        layout = Layout(
            asked.queue_window or known.window, asked.nodes or known.nodes, asked.resources or known.resources
        )
        with np.errstate(over="ignore"):  # what float32 does not hold becomes infinite, and is refused
            observation = np.array(asked.observation, np.float32)
        if len(observation) != layout.size:
            raise Refused(("observation",), f"{len(observation)} numbers, and {layout} has {layout.size}")
        if not np.isfinite(observation).all():
            raise Refused(("observation", int(np.argmin(np.isfinite(observation)))), "not a finite number")
        mask = layout.split(observation).mask
        if not (np.isin(mask, (0, 1)).all() and mask.any()):
            raise Refused(("observation",), "its mask is not of 0 and 1, or allows nothing")
        ask = lambda policy: policy.predict(observation, asked.deterministic, layout)  # noqa: E731
        return msgspec.json.encode(Action(*self._ask(model, ask)))

    def describe(self) -> dict[str, Any]:
        """What decides at present."""
        policy = self.model.policy
        metadata = asdict(policy.metadata) if isinstance(policy, OnnxPolicy) else None
        return {
            "name": policy.name,
            "version": self.model.version,
            "loaded": self.model.loaded,
            "fallback": self.model.fallback.name,
            "metadata": metadata,
        }

    async def watch(self) -> None:
        """Load the policy's file again whenever it has changed, or on demand."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.reload_wanted.wait(), RELOAD_SECONDS)
            if (supervisor := multiprocessing.parent_process()) and not supervisor.is_alive():
                signal.raise_signal(signal.SIGTERM)  # it was killed, and nobody would ever stop its workers
            wanted = self.reload_wanted.is_set()
            self.reload_wanted.clear()
            await asyncio.to_thread(self.refresh, wanted)

    def refresh(self, wanted: bool = False) -> None:
        """Take the policy that is in its place now, if the file is another one or it is wanted, and if it works."""
        seen = self._look()
        if seen == self.seen and not wanted:
            return
        self.seen = seen
        try:
            self._use(Model.tried(load_policy(self.args.policy)))
        except Exception as error:  # whatever is wrong with the file: the service has to stay up, and to look again
            log.error("%s; version %s stays", _in_one_line(error), self.model.version)
            self.metrics.reloads.labels("refused").inc()
        else:
            log.info("policy %s, version %s", self.model.policy.name, self.model.version)
            self.metrics.reloads.labels("loaded").inc()

    def _use(self, model: Model) -> None:
        self.model = model
        self.metrics.policy.info({"name": model.policy.name.partition(":")[0], "version": model.version})

    def _look(self) -> tuple[int, ...]:
        """Changes with the policy's file."""
        try:
            found = self.path.stat() if self.path else None
        except OSError:
            found = None
        return (found.st_ino, found.st_size, found.st_mtime_ns) if found else ()

    def _ask(self, model: Model, ask: Callable[[Policy], Any]) -> tuple[Any, str, str, str | None]:
        """What the model says or, if it fails or is too slow, its rule; who said so, its version, and why the rule."""
        fallback = None
        if isinstance(model.policy, OnnxPolicy):
            limit, began, options = self.args.deadline_ms / 1e3, time.perf_counter(), onnxruntime.RunOptions()
            model.policy.run_options, self.watchdog.guarded = options, (began, options)
            try:
                said = ask(model.policy)
            except Exception as error:  # whatever it is: a cluster waits for an answer
                fallback = "late" if options.terminate else "failing"
                self._warn(model, fallback, _in_one_line(error))
            finally:
                self.watchdog.guarded = None
            if not fallback and time.perf_counter() - began > limit:
                fallback = "late"
                self._warn(model, fallback, f"more than {self.args.deadline_ms:g} ms")
        else:
            said = ask(model.policy)
        chooser = model.policy
        if fallback:
            chooser = model.fallback
            said = ask(chooser)
            self.metrics.fallbacks.labels(fallback).inc()
        name = chooser.name.partition(":")[0]  # what follows are the weights of a tuned rule
        self.metrics.decisions.labels(name).inc()
        return said, name, model.version, fallback

    def _warn(self, model: Model, reason: str, message: str) -> None:
        """Once for each version; all are counted."""
        if (model.version, reason) not in self._warned:
            self._warned.add((model.version, reason))
            log.warning("version %s is %s (%s): its rule decides", model.version, reason, message)


def _in_one_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _answer(state: State, decision: Decision, decided_by: str, version: str, fallback: str | None) -> Answer:
    """The decision in the operator's names."""
    jobs, nodes = state.queued, state.nodes
    start = [Start(jobs[job].id, nodes[node].name) for job, node in decision.start]
    reserved = None
    if decision.reserved:
        job, node, when = decision.reserved
        reserved = Reservation(jobs[job].id, nodes[node].name, when)
    levels = range(len(jobs), 0, -1)
    priorities = [Priority(jobs[job].id, level) for job, level in zip(decision.order.tolist(), levels, strict=True)]
    return Answer(start, reserved, priorities, decided_by, version, fallback)


def _record(body: bytes, answer: bytes) -> str:
    """One line: in JSON, line ends are only ever white space."""
    state = body.replace(b"\n", b" ").replace(b"\r", b" ")
    return f'{{"state":{state.decode()},"decision":{answer.decode()}}}'


STATES, OBSERVATIONS = msgspec.json.Decoder(State), msgspec.json.Decoder(Observed)


# ----------------------------------------------------------------------------------------------------- over HTTP
class BearerToken:
    """ASGI middleware: only requests that carry the token get through."""

    def __init__(self, app: ASGIApp, token: bytes) -> None:
        self.app, self.expected = app, b"Bearer " + token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                refusal = _json(Refusal([Problem(["header", "authorization"], "not the token")]), 401)
                refusal.headers["WWW-Authenticate"] = "Bearer"
                return await refusal(scope, receive, send)
        return await self.app(scope, receive, send)


def _json(content: Any, status: int = 200) -> Response:
    data = content if isinstance(content, bytes) else msgspec.json.encode(content)
    return Response(data, status, media_type="application/json")


async def read_body(request: Request, limit: int) -> bytes:
    """
    Raises:
        Refused: it is not JSON, larger than the limit, or does not arrive.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused((), "send Content-Type: application/json", 415)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise Refused((), f"more than {limit} bytes", 413)
    except TimeoutError:
        raise Refused((), f"not there within {BODY_SECONDS:g} s", 408) from None
    return bytes(body)


def create_app(service: Service, token: bytes | None = None) -> FastAPI:
    """The service over HTTP; with a token, only for those who carry it."""
    app = FastAPI(title="ResourceRL", version="1", docs_url=None, redoc_url=None)
    metrics, limit = service.metrics, service.args.max_body_bytes

    @app.post("/v1/decisions", summary="What to start now and where, and the priority of every queued job",
              **_contract(State, Answer))  # fmt: skip
    async def decisions(request: Request) -> Response:
        body = await read_body(request, limit)
        with metrics.seconds.time():
            return _json(service.decide(body))

    @app.post("/v1/predict", summary="The action for a raw observation", **_contract(Observed, Action))
    async def predict(request: Request) -> Response:
        return _json(service.predict(await read_body(request, limit)))

    @app.get("/v1/model", summary="What decides")
    async def model() -> dict[str, Any]:
        return service.describe()

    @app.get("/healthz", summary="Whether the service lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Whether it can decide")
    async def readyz() -> dict[str, str]:
        return {"status": "ok", "version": service.model.version}

    @app.get("/metrics", summary="Prometheus' metrics", response_class=Response,
             responses={200: {"content": {"text/plain": {}}}})  # fmt: skip
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.exception_handler(Refused)
    async def refuse(request: Request, refused: Refused) -> Response:
        metrics.invalid.labels(refused.status).inc()
        return _json(refused.refusal, refused.status)

    # FastAPI's way to a function without parameters costs a tenth of a decision: Starlette's own comes first.
    app.router.routes.insert(0, Route("/v1/decisions", decisions, methods=["POST"]))
    app.openapi = lambda: _openapi(app, token is not None)
    if token is not None:
        app.add_middleware(BearerToken, token=token)
    return app


def _contract(sent: type, answered: type) -> dict[str, Any]:
    """The OpenAPI of a route that reads its body itself: msgspec's schemas, by name."""

    def content(kind: type) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}}

    refusals = {408: "too slow", 413: "too large", 415: "no JSON", 422: "refused, with the field"}
    return {
        "response_class": Response,
        "openapi_extra": {"requestBody": {"required": True, **content(sent)}},
        "responses": {
            200: {"description": answered.__name__, **content(answered)},
            **{status: {"description": text, **content(Refusal)} for status, text in refusals.items()},
        },
    }


def _openapi(app: FastAPI, token: bool) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, schemas = msgspec.json.schema_components(
            [State, Answer, Observed, Action, Refusal], ref_template="#/components/schemas/{name}"
        )
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        if token:
            document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            for path, operations in document["paths"].items():
                for operation in operations.values() if path not in OPEN_PATHS else ():
                    operation["security"] = [{"token": []}]
                    operation["responses"]["401"] = {"description": "without the token"}
        app.openapi_schema = document
    return app.openapi_schema


# -------------------------------------------------------------------------------------------------------- the program
LEAST = {
    "port": 0, "workers": 1, "deadline_ms": 0.001, "record_bytes": 0, "record_files": 1,
    "max_body_bytes": 1, "max_jobs": 1, "max_nodes": 1,
}  # fmt: skip


def check(args: Args) -> None:
    """
    Raises:
        ValueError: a number is out of its range, or two flags do not go together.
    """
    for name, least in LEAST.items():
        if not (value := getattr(args, name)) >= least:  # nor is NaN
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least {least}")
    if args.port > 65_535:
        raise ValueError(f"--port {args.port}: give at most 65535")
    if args.record and args.record.suffix != ".jsonl":
        raise ValueError(f"--record {args.record}: call it .jsonl, or --workload takes it for an SWF trace")
    if args.workers > 1 and args.record:
        raise ValueError(f"--workers {args.workers}: with --record give 1: it is one file")


def read_token(args: Args) -> bytes | None:
    """
    Raises:
        ValueError: the token is missing where one is needed, or empty.
        OSError: its file cannot be read.
    """
    if args.token_file is None:
        if args.unix_socket is None and not _is_loopback(args.host):
            raise ValueError(f"--host {args.host}: others can reach it; give a --token-file, or use 127.0.0.1")
        return None
    token = args.token_file.read_bytes().strip()
    if not token:
        raise ValueError(f"{args.token_file}: no token; write one: openssl rand -hex 32 > {args.token_file}")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(args: Args) -> socket.socket:
    """
    Raises:
        OSError: the address is taken or not ours.
    """
    if args.unix_socket is None:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        return socket.create_server((args.host, args.port), family=family, backlog=1024)
    if args.unix_socket.is_socket():  # what a killed service left; a living one is left alone
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(args.unix_socket)) == 0:
                raise OSError(f"{args.unix_socket}: another service listens there")
        args.unix_socket.unlink()
    listener, mask = socket.socket(socket.AF_UNIX), os.umask(0o117)
    try:
        listener.bind(str(args.unix_socket))
    finally:
        os.umask(mask)
    listener.listen(1024)
    return listener


class Connection(HttpToolsProtocol):
    """uvicorn's, that does not wait for ever for the first request: who says nothing counts towards its limit too."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(REQUEST_SECONDS, self.close_if_silent)

    def close_if_silent(self) -> None:
        if self.cycle is None:  # no request yet, or half a one
            self.transport.close()


async def serve(service: Service, app: FastAPI, listener: socket.socket) -> None:
    """Until SIGTERM or Ctrl-C."""
    config = uvicorn.Config(
        app, http=Connection, ws="none", lifespan="off", access_log=False, log_config=None, server_header=False,
        proxy_headers=False, timeout_keep_alive=75, timeout_graceful_shutdown=5, limit_concurrency=1024,
    )  # fmt: skip
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, service.reload_wanted.set)
    watching = asyncio.create_task(service.watch())
    await uvicorn.Server(config).serve(sockets=[listener])
    watching.cancel()


def log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def work(service: Service, token: bytes | None, listener: socket.socket) -> None:
    """Decide until SIGTERM or Ctrl-C."""
    gc.collect()
    gc.freeze()  # or the collector goes through all that was imported, for tens of milliseconds, in some request
    with suppress(KeyboardInterrupt):
        uvloop.run(serve(service, create_app(service, token), listener))


def work_for(args: Args, policy: Policy, seen: tuple[int, ...], token: bytes | None, listener: socket.socket) -> None:
    """`work` in another process than that of the service whose policy it is."""
    log_to_stderr()
    work(Service(args, policy, seen), token, listener)


def supervise(service: Service, token: bytes | None, listener: socket.socket) -> None:
    """Keep so many workers alive until SIGTERM or Ctrl-C. SIGHUP is for nobody here: they look for another policy every
    second, and one that has just begun would end.

    The service of this process answers nobody. It keeps the newest policy that works for workers that start when the
    file has been damaged.
    """
    args = service.args
    spawn, workers, stopping = multiprocessing.get_context("spawn"), [], []

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopping.append(number))
    with TemporaryDirectory(prefix="resourcerl-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        while not stopping:
            for worker in [worker for worker in workers if not worker.is_alive()]:
                log.error("worker %d has ended (%s); another one starts", worker.pid, worker.exitcode)
                workers.remove(worker)
            service.refresh()
            while len(workers) < args.workers and not stopping:
                handed = service.model.policy, service.seen
                worker = spawn.Process(target=work_for, args=(args, *handed, token, listener))
                worker.start()
                workers.append(worker)
            time.sleep(RELOAD_SECONDS)  # also between the deaths of workers that cannot live
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def main(args: Args) -> None:
    log_to_stderr()
    signal.signal(signal.SIGHUP, lambda *_: None)  # too early to reload anything, and no reason to end
    try:
        check(args)
        token = read_token(args)
        service = Service(args)
        listener = listen(args)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    where = args.unix_socket or "http://{}:{}".format(*listener.getsockname()[:2])
    log.info("policy %s, version %s, at %s", service.model.policy.name, service.model.version, where)
    if args.workers == 1:
        work(service, token, listener)
    else:
        supervise(service, token, listener)


def fail(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(tyro.cli(Args))
