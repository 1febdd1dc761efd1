"""The decision service without its HTTP: the policy in use and its reloading, deadlines, metrics, the record."""

import asyncio
import hashlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.multiprocess import MultiProcessCollector

from deployment.contract import (
    OBSERVATIONS,
    STATES,
    Action,
    Answer,
    Expected,
    ExpectedStart,
    Job,
    Node,
    Observed,
    Priority,
    QueuedJob,
    Refused,
    Reservation,
    Start,
    State,
    cluster_state,
    decode,
    in_order,
    to_jobs,
)
from deployment.history import History
from policies import Decision, OnnxPolicy, PlanPolicy, Policy, RulePolicy, load_policy
from simulator.moment import ClusterState, Moment
from simulator.observation import Layout
from simulator.rules import parse_rule
from workloads.jobs import Cluster

log = logging.getLogger("serve")
TRIAL_SECONDS = 10.0  # a new policy has to decide its first state within
RELOAD_SECONDS = 0.25  # how often the policy's file is looked at: a new one is in use within a second, under load too


@dataclass
class Args:
    policy: str
    """path of a policy.onnx, or the name of a rule; with @HOURS behind it who has waited for longer goes first; or
    `plan` or `plan:RULE`, which plans ahead over a rule"""
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
    plan_budget_ms: float = 50.0
    """planning takes so long at most, with as many samples as fit; what is left to decide then its base rule decides"""
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
        _compile_kernels(resources)  # before the clock starts
        timer = threading.Timer(TRIAL_SECONDS, _end_calls, (policy,))
        timer.start()
        try:
            version = hashlib.sha256(policy.identity).hexdigest()[:12]
            model = Model(policy, RulePolicy(policy.reference), version, time.time())
            for chooser in (model.fallback, model.policy):
                chooser.decide(_example(resources))
        finally:
            timer.cancel()
        return model


def _example(resources: int) -> ClusterState:
    """A job of each kind on two nodes, and one more that is queued."""
    cluster = Cluster(np.full((2, resources), 4.0), np.ones(2), ("",) * resources)
    job = Job(demand=[2.0] * resources, requested_time=60.0, user=1)
    queued, one = to_jobs("", [job, job], [1.0, 2.0], resources, {}), to_jobs("", [job], [0.0], resources, {})
    return ClusterState(3.0, cluster, queued, one, np.zeros(1), np.zeros(1, np.int64), one)


def _compile_kernels(resources: int) -> None:
    """Compile, or load, what decisions need, now and not in the first of them."""
    node = Node("a", [1.0])
    cluster_state(State(1.0, [node], [QueuedJob(demand=[1.0], requested_time=1.0, id=1, submit_time=0.0)]))
    moment, layout = Moment(_example(resources), parse_rule("easy-fifo")), Layout(2, 2, resources)
    observation, _ = moment.observe(layout)
    moment.act(int(layout.split(observation).mask.argmax()))
    moment.follow_rule()
    moment.rule_order()


def _end_calls(policy: Policy) -> None:
    """Make the model's present call fail."""
    if isinstance(policy, OnnxPolicy):
        policy.run_options.terminate = True


class Watchdog(threading.Thread):
    """Ends calls of the model that take too long."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self.seconds = seconds
        self.guarded: tuple[float, onnxruntime.RunOptions] | None = None  # when the present call began, and its options

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
        named: dict[str, Any] = {"namespace": "resourcerl", "registry": None if shared else self.registry}
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

    def __init__(self, path: Path, most_bytes: int, files: int, failures: Counter) -> None:
        self.failures = failures
        super().__init__(path, maxBytes=most_bytes, backupCount=files, encoding="utf-8")
        if self.stream and self.stream.tell():  # a line that a kill has cut short stays one of its own
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
        self.history = History()
        if args.record:
            self.history.read_back(args.record)
        limits, failures = (args.record_bytes, args.record_files), self.metrics.unrecorded
        self.recorder = Recorder(args.record, *limits, failures) if args.record else None
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
        if isinstance(model.policy, OnnxPolicy) and model.policy.metadata.resource_names:
            in_order(state, model.policy.metadata.resource_names)
        cluster, resources = cluster_state(state), len(state.nodes[0].capacity)
        if isinstance(model.policy, PlanPolicy) and self.history.complete(state):
            cluster = cluster_state(state)
        if isinstance(model.policy, OnnxPolicy) and resources != model.policy.metadata.resources:
            problem = f"{resources} resources, and the policy was made for {model.policy.metadata.resources}"
            raise Refused(("nodes", 0, "capacity"), problem)
        decision, name, version, fallback = self._ask(model, lambda policy: policy.decide(cluster))
        answer = msgspec.json.encode(_answer(state, decision, name, version, fallback))
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
        if isinstance(model.policy, PlanPolicy):
            raise Refused(("observation",), "planning needs a state; send that to /v1/decisions")
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
            "name": policy.name, "version": self.model.version, "loaded": self.model.loaded,
            "fallback": self.model.fallback.name, "metadata": metadata,
        }  # fmt: skip

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
        if isinstance(model.policy, PlanPolicy):
            model.policy.seconds = self.args.plan_budget_ms / 1e3
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
    answer = Answer(start, reserved, priorities, decided_by, version, fallback)
    if found := decision.expected:
        starts = [
            ExpectedStart(job.id, *row) for job, row in zip(jobs, found.starts.tolist(), strict=True) if row[2] < np.inf
        ]
        answer.expected = Expected(found.samples, found.wanted, starts)
    return answer


def _record(body: bytes, answer: bytes) -> str:
    """One line: in JSON, line ends are only ever white space."""
    state = body.replace(b"\n", b" ").replace(b"\r", b" ")
    return f'{{"state":{state.decode()},"decision":{answer.decode()}}}'
