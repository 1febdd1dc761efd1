"""The agent that sets the priorities of a Slurm cluster's pending jobs in a policy's order.

`Agent.run` looks again and again; `Agent.one_pass` is one look. Before it stand what it computes: the order, the labels
that express it with few changes, predicted starts, and what the jobs would have waited. Times are seconds since 1970.
"""

import logging
import threading
import time
from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import prometheus_client
from tensorboard.summary import Writer

from deployment.slurm import (
    FINISHED,
    PENDING,
    RUNNING,
    NotUnderstood,
    Refused,
    Slurm,
    SlurmError,
    SlurmJob,
    Snapshot,
    job_from_rest,
    jobs_of,
    pool,
    processors_in_use,
)
from policies import Policy, load_policy
from simulator.kernels import EASY, STATIC
from simulator.replay import simulate
from simulator.rules import Rule
from training.folder import timed_folder
from workloads.jobs import Workload

log = logging.getLogger("slurm_agent")
# priority/basic gives new jobs priorities from 0xFFFF0000 downwards, the other plugins far smaller ones. What lies
# above is the agent's, up to Slurm's special values: a job that the agent has not seen (yet) waits behind.
LIVE_LEVELS = 0xFFFF0001, 0xFFFFFFF0
STEP = 64  # between two levels where there is room, for jobs to come between
UPDATING = 0.5  # seconds after which a pass stops sending and looks again: 1,000 new priorities take Slurm longer
FULL_LISTING = 30.0  # seconds after which jobs are listed although nothing is said to have changed: waits have grown
NOT_UNDERSTOOD = 60.0  # seconds of answers that are not understood, and the agent gives up
NODES_EVERY = 10.0  # seconds between two looks at which nodes are in use
RECORDED = 10_000  # finished jobs that are kept for hindsight and for what is known of their users
HINDSIGHT_JOBS = 20  # fewer say nothing
BACKFILL_REFERENCE = "easy-fifo"  # FIFO as Slurm runs it by default, beside strict FIFO


@dataclass
class Args:
    policy: str = "easy-fifo"
    """the path of a policy.onnx, trained on a trace (one pool of processors), the name of a rule, or `plan`"""
    mode: Literal["shadow", "advise", "live"] = "shadow"
    """shadow: log only; advise: set the nice values of pending jobs; live: set their priorities"""
    socket: Path = Path("/run/slurmrestd/slurmrestd.socket")
    """slurmrestd's unix socket"""
    partition: str | None = None
    """order only this partition's jobs, on its nodes; by default all"""
    max_wait: float = 259_200.0
    """seconds; jobs that have waited longer go to the front, oldest first"""
    max_nice: int = 1_000
    """advise: the largest nice value; the first of the pending jobs has 0"""
    interval: float = 0.25
    """seconds between two looks at the queue"""
    metrics_port: int | None = None
    """serve Prometheus metrics on this port"""
    metrics_host: str = "127.0.0.1"
    """the address that they are served on"""
    hindsight: float = 300.0
    """seconds between two replays of the recorded jobs, under the policy and under FIFO"""


def check(args: Args) -> None:
    """Refuse numbers with which the agent would start and then not work.

    Raises:
        ValueError: a flag, and what to give.
    """
    port = 0 if args.metrics_port is None else args.metrics_port
    for flag, value, fits, remedy in (
        ("max-wait", args.max_wait, args.max_wait >= 0, "seconds, 0 or more (inf: without end)"),
        ("max-nice", args.max_nice, args.max_nice >= 1, "1 or more"),
        ("interval", args.interval, 0 < args.interval <= threading.TIMEOUT_MAX, "seconds, more than 0"),
        ("hindsight", args.hindsight, args.hindsight >= 0, "seconds, 0 or more"),
        ("metrics-port", port, 0 <= port <= 65_535, "a port up to 65535"),
    ):
        if not fits:
            raise ValueError(f"--{flag} {value}: give {remedy}")


Range = tuple[float, float, float]  # p10, p50, p90 of a job's start, or three times the same


def priority_order(policy: Policy, snapshot: Snapshot, max_wait: float) -> tuple[list[SlurmJob], dict[int, Range]]:
    """All jobs to order, most urgent first: who has waited too long, oldest first; then as the policy says. And if it
    plans, when each of them will probably start."""
    state = snapshot.state()
    decision = policy.decide(state)
    ordered = [snapshot.pending[i] for i in decision.order]
    overdue = [job for job in ordered if snapshot.now - job.eligible > max_wait]
    late = {job.job_id for job in overdue}
    order = sorted(overdue, key=lambda job: job.eligible) + [job for job in ordered if job.job_id not in late]
    if decision.expected is None:
        return order, {}
    starts = (decision.expected.starts + (snapshot.now - state.now)).tolist()
    return order, {job.job_id: tuple(row) for job, row in zip(snapshot.pending, starts, strict=True) if row[2] < np.inf}


def relabel(labels: Sequence[int], low: int, high: int) -> list[int]:
    """Strictly falling labels within low..high in place of `labels`, with as few as possible changed.

    A longest falling subsequence stays; the others get levels between, evenly, or STEP apart at the ends. Where there
    is no room all are labelled anew.

    Raises:
        ValueError: more labels than low..high has.
    """
    kept = longest_falling(labels, low, high)
    new = list(labels)
    for above, below in zip([-1, *kept], [*kept, len(labels)], strict=True):
        count = below - above - 1
        if not kept:
            return evenly(len(labels), low, high)
        top = labels[above] if above >= 0 else min(labels[below] + STEP * (count + 1), high + 1)
        bottom = labels[below] if below < len(labels) else max(labels[above] - STEP * (count + 1), low - 1)
        if top - bottom <= count:
            return evenly(len(labels), low, high)
        for k in range(1, count + 1):
            new[above + k] = top - (top - bottom) * k // (count + 1)
    return new


def _hints(labels: Sequence[int], low: int, high: int) -> list[int]:
    """As `relabel`, but the first one is `high`, whatever came before it, and where there are more labels than levels
    the last ones are all `low`: jobs that are not labelled would be at `high`, before the others."""
    room = high - low
    return [high][: len(labels)] + relabel(labels[1:room], low + 1, high - 1) + [low] * len(labels[room:])


def evenly(count: int, low: int, high: int) -> list[int]:
    """Falling labels around the middle of low..high, STEP apart if that leaves half of it free."""
    if count > high - low + 1:
        raise ValueError(f"{count} labels between {low} and {high}")
    step = max(1, min(STEP, (high - low + 1) // max(2 * count, 1)))
    top = (low + high + step * (count - 1)) // 2
    return [top - step * k for k in range(count)]


def longest_falling(labels: Sequence[int], low: int, high: int) -> list[int]:
    """Positions of a longest strictly falling subsequence of the labels within low..high (patience sorting)."""
    ends: list[int] = []  # the largest label (negated) that ends a falling run of each length, and its position
    positions: list[int] = []
    before = [-1] * len(labels)
    for i, label in enumerate(labels):
        if low <= label <= high:
            k = bisect_left(ends, -label)
            ends[k : k + 1], positions[k : k + 1] = [-label], [i]
            before[i] = positions[k - 1] if k else -1
    chain, i = [], positions[-1] if positions else -1
    while i >= 0:
        chain.append(i)
        i = before[i]
    return chain[::-1]


def predicted_starts(snapshot: Snapshot, order: Sequence[SlurmJob]) -> dict[int, Range]:
    """When each job would start under EASY backfilling in this order, if no other job came, by the simulator.

    A job is expected to take as long as the last two of its user with its time limit did, else all of its limit.
    """
    past: dict[tuple[str, float], list[float]] = defaultdict(list)
    for job in snapshot.finished:
        past[job.user, job.limit].append(job.end - job.start)
    records = snapshot.running + [job for job in order if job.cpus <= snapshot.processors]
    if len(records) == len(snapshot.running):
        return {}
    expected = [float(np.mean(past.get((job.user, job.limit), [job.limit])[-2:])) for job in records]
    elapsed = np.array([max(snapshot.now - job.start, 0.0) if job.start else 0.0 for job in records])
    limits = np.array([job.limit for job in records])
    jobs = jobs_of(records)
    jobs = replace(
        jobs, submit_time=np.zeros(len(records)), run_time=np.maximum(expected - elapsed, 1.0),
        requested_time=np.maximum(limits - elapsed, 1.0), demand=np.minimum(jobs.demand, snapshot.processors),
    )  # fmt: skip
    rule = Rule("order", STATIC, STATIC, EASY)
    workload = Workload("queue", pool(snapshot.processors), jobs, np.array([[0, len(jobs)]]), {})
    [schedule] = simulate(workload, rule, scores=np.arange(len(jobs), dtype=float))
    starts = dict(zip((job.job_id for job in records), (snapshot.now + schedule.start_time).tolist(), strict=True))
    return {job.job_id: (starts[job.job_id],) * 3 for job in order if job.job_id in starts}


def hindsight(policy: Policy, finished: Sequence[SlurmJob], processors: int) -> dict[str, float]:
    """Mean wait of the recorded jobs: as they came, and replayed in the simulator under the policy and under FIFO."""
    jobs = jobs_of(ordered := sorted(finished, key=lambda job: job.eligible), ordered[0].eligible)
    workload = Workload("recorded", pool(processors), jobs, np.array([[0, len(jobs)]]), {})
    replayed = {"policy": policy, "fifo": load_policy("fifo"), BACKFILL_REFERENCE: load_policy(BACKFILL_REFERENCE)}
    waits = {name: float(who.schedule(workload)[0].wait.mean()) for name, who in replayed.items()}
    return {"recorded": float(jobs.wait_time.mean())} | waits


class Board:
    """TensorBoard's events. Where they cannot be written, on a full disk, the agent goes on without them."""

    def __init__(self, name: str) -> None:
        self.writer: Writer | None = None
        try:
            self.writer = Writer(str(timed_folder(name)))
        except OSError as error:
            self.give_up(error)

    def draw(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self.write(Writer.add_scalar, tag, value, step)

    def write(self, what: Callable[..., None], *arguments: Any) -> None:
        """Writer's method `what`, if there is one yet."""
        try:
            if self.writer:
                what(self.writer, *arguments)
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        self.writer = None
        log.warning("TensorBoard's events: %s; the agent goes on without them", error)


class Metrics:
    """For Prometheus (names as below, each with its help) and for TensorBoard (under runs/)."""

    def __init__(self, mode: str) -> None:
        self.registry = registry = prometheus_client.CollectorRegistry()

        def named(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"resourcerl_slurm_{name}", text, labels, registry=registry, **options)

        counter, gauge, histogram = prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram
        waits = (1, 10, 60, 300, 1_800, 3_600, 14_400, 43_200, 86_400, 259_200, 604_800)
        self.jobs = named(gauge, "jobs", "Jobs by what the agent makes of them", "state")
        self.wait = named(histogram, "wait_seconds", "From eligible to started", buckets=waits)
        errors = sorted((*waits, 0, *(-bound for bound in waits)))
        self.error = named(histogram, "start_error_seconds", "Start, less the start first predicted", buckets=errors)
        self.within = named(
            counter, "starts", "Starts before, within or after p10 to p90 of what planning expected", "where"
        )
        self.updates = named(counter, "updates_total", "Priorities or nice values set")
        self.refused = named(counter, "refused_total", "Changes that Slurm refused")
        self.failures = named(counter, "failures_total", "Passes that failed, and were tried again later")
        self.own = named(histogram, "pass_seconds", "A pass's own time, without waiting for Slurm")
        self.last = named(gauge, "last_pass_timestamp_seconds", "When the queue was last known")
        replayed = "Mean wait of the recorded jobs under an order"
        self.hindsight = named(gauge, "hindsight_wait_seconds", replayed, "order")
        self.board = Board(f"slurm__{mode}")
        self.started = 0

    def count(self, snapshot: Snapshot, left_alone: Counter[str]) -> None:
        for state, number in (
            ("pending", len(snapshot.pending)), ("running", len(snapshot.running)), *left_alone.items(),
        ):  # fmt: skip
            self.jobs.labels(state).set(number)
        self.last.set(snapshot.now)

    def note_start(self, job: SlurmJob, predicted: Range | None) -> None:
        self.started += 1
        self.wait.observe(job.wait)
        self.board.draw({"charts/wait": job.wait}, self.started)
        if predicted is not None:
            early, middle, late = predicted
            self.error.observe(job.start - middle)
            self.board.draw({"charts/start_error": job.start - middle}, self.started)
            if early < late:
                where = "before" if job.start < early else "after" if job.start > late else "within"
                self.within.labels(where).inc()

    def note_hindsight(self, waits: dict[str, float]) -> None:
        for order, wait in waits.items():
            self.hindsight.labels(order).set(wait)
        self.board.draw({f"hindsight/{order}": wait for order, wait in waits.items()}, self.started)
        self.board.write(Writer.flush)


class Agent:
    """Looks at the queue again and again, and sends what has to change."""

    def __init__(self, args: Args, slurm: Slurm, policy: Policy, metrics: Metrics) -> None:
        self.args, self.slurm, self.policy, self.metrics = args, slurm, policy, metrics
        self.began = time.time()
        self.listed = self.looked = self.replayed = 0.0  # when jobs were listed, nodes looked at, jobs replayed
        self.unsent = False
        self.processors = 0
        self.places: dict[int, int] = {}  # pending job -> its place in the policy's order
        self.predicted: dict[int, Range] = {}  # pending job -> when it was first predicted to start
        self.started: set[tuple[int, float]] = set()
        self.finished: OrderedDict[tuple[int, float], SlurmJob] = OrderedDict()
        self.refused: dict[int, float] = {}  # job -> until when it is not tried again
        self.complained: set[str] = set()
        self.replay: Future[dict[str, float]] | None = None
        self.worker = ThreadPoolExecutor(1)

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set. Whatever fails is tried again, after pauses that grow to 30 s.

        Raises:
            NotUnderstood: for a minute no answer of Slurm's has been understood, so that the agent is of no use.
        """
        pause, failed, puzzled = 0.0, 0.0, 0.0
        while not stop.wait(pause or self.args.interval):
            try:
                self.one_pass()
                self.look_back()
            except (SlurmError, ValueError) as error:  # ValueError: also PolicyError and WorkloadError
                self.metrics.failures.inc()
                puzzled = (puzzled or time.time()) if isinstance(error, NotUnderstood) else 0.0
                if puzzled and time.time() - puzzled >= NOT_UNDERSTOOD:
                    self.close()
                    raise
                failed, pause = failed or time.time(), min(max(0.5, 2 * pause), 30.0)
                log.warning("%s; the order stays as it is, next try in %.1f s", error, pause)
                self.listed = self.looked = 0.0
            else:
                if failed:
                    log.info("Slurm answers again, after %.0f s", time.time() - failed)
                pause = failed = puzzled = 0.0
        self.look_back(last=True)
        self.close()

    def close(self) -> None:
        self.worker.shutdown()
        self.metrics.board.write(Writer.close)

    def one_pass(self) -> None:
        """Look; if something has changed, order the queue and send what differs.

        Raises:
            SlurmError: no answer.
            PolicyError: the policy failed.
        """
        now, own, waiting = time.time(), time.perf_counter(), self.slurm.seconds
        fresh = self.unsent or now - self.listed > FULL_LISTING
        # Slurm tells changes to the second; two of them make up for clocks that differ.
        records = self.slurm.jobs(0.0 if fresh else self.listed - 2)
        if records is None:
            return
        if now - self.looked > NODES_EVERY:
            self.look_at_nodes()
            self.looked = now
        snapshot = self.snapshot(records, now)
        self.listed = now
        self.note_starts(snapshot)
        order: list[SlurmJob] = []
        if snapshot.pending and snapshot.processors:
            order, expected = priority_order(self.policy, snapshot, self.args.max_wait)
            if any(job.job_id not in self.predicted for job in order):
                self.predicted = (expected or predicted_starts(snapshot, order)) | self.predicted
        self.places = {job.job_id: place for place, job in enumerate(order, 1)}
        self.predicted = {job: start for job, start in self.predicted.items() if job in self.places}
        self.send(order)
        self.metrics.own.observe(time.perf_counter() - own - (self.slurm.seconds - waiting))

    def look_at_nodes(self) -> None:
        self.processors = processors_in_use(self.slurm.nodes(), self.args.partition, self.slurm.listings["nodes"])
        if not self.processors:
            which = f" of partition {self.args.partition}" if self.args.partition else ""
            self.complain(f"no node{which} takes jobs, so no job is ordered; sinfo shows partitions and nodes")

    def snapshot(self, records: list[dict[str, Any]], now: float) -> Snapshot:
        """Sort the records into pending, running and finished jobs; count, or complain about, the others."""
        unreadable = 0
        pending, running, others = [], [], Counter({"held": 0, "dependency": 0, "begin time": 0, "unknown": 0})
        for record in records:
            try:
                job = job_from_rest(record)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                self.complain(f"a job record that is not as expected ({error!r}); left alone")
                unreadable += 1
                continue
            if self.args.partition not in (None, *job.partition.split(",")):
                continue
            if job.state in PENDING:
                if job.left_alone:
                    others[job.left_alone] += 1
                else:
                    pending.append(job)
            elif job.state in RUNNING:
                running.append(job)
            elif job.ran:
                self.finished[job.key] = job
            elif job.state not in FINISHED:
                self.complain(f"jobs in the unknown state {job.state}; left alone")
                others["unknown"] += 1
        others["unknown"] += unreadable
        if records and unreadable == len(records):
            what = f"HTTP 200, and not one of {unreadable} jobs is as expected"
            raise NotUnderstood(f"GET {self.slurm.listings['jobs']}: {what}")
        while len(self.finished) > RECORDED:
            self.finished.popitem(last=False)
        snapshot = Snapshot(now, self.processors, pending, running, sorted(self.finished.values(), key=lambda j: j.end))
        self.metrics.count(snapshot, others)
        return snapshot

    def complain(self, what: str) -> None:
        if what not in self.complained:
            self.complained.add(what)
            log.warning("%s", what)

    def note_starts(self, snapshot: Snapshot) -> None:
        """Log and measure the jobs that have started since the last pass."""
        known = {job.key: job for job in snapshot.running + snapshot.finished if job.start >= self.began - 1}
        for key in known.keys() - self.started:
            job, predicted = known[key], self.predicted.get(key[0])
            self.metrics.note_start(job, predicted)
            place = f"place {self.places[key[0]]} of {len(self.places)}" if key[0] in self.places else "not yet ordered"
            guess = f", {job.start - predicted[1]:+.0f} s from the prediction" if predicted else ""
            log.info("Slurm started job %d (%s) after %.0f s%s", key[0], place, job.wait, guess)
        self.started = set(known)

    def send(self, order: list[SlurmJob]) -> None:
        """Bring priorities or nice values into the order, from its front, for at most about UPDATING seconds."""
        if self.args.mode == "advise":
            name, (low, high), sign = "nice", (-self.args.max_nice, 0), -1
        else:
            name, (low, high), sign = "priority", LIVE_LEVELS, 1
        if name == "priority":
            order = order[: high - low + 1]  # what comes after so many has time, and is below them all
        current = [sign * getattr(job, name) for job in order]
        wanted = _hints(current, low, high) if name == "nice" else relabel(current, low, high)
        changes = [(job.job_id, sign * new) for job, old, new in zip(order, current, wanted, strict=True) if new != old]
        front = " ".join(str(job.job_id) for job in order[:5])
        if self.args.mode == "shadow":
            log.info("would change %d of %d priorities; first: %s", len(changes), len(order), front)
            return
        changed, until = 0, time.monotonic() + UPDATING
        self.unsent = False
        for job_id, value in changes:
            if time.monotonic() > until:
                self.unsent = True
                break
            changed += self.update(job_id, **{name: value})
        if changed:
            what = "nice values" if sign < 0 else "priorities"
            log.info("changed %d of %d %s; first: %s", changed, len(order), what, front)

    def update(self, job_id: int, **properties: int) -> bool:
        """Whether Slurm has done it."""
        if self.refused.get(job_id, 0.0) > time.time():
            return False
        try:
            self.slurm.update(job_id, **properties)
            self.metrics.updates.inc()
            return True
        except Refused as reason:
            self.metrics.refused.inc()
            self.refused[job_id] = time.time() + 60.0
            log.warning("job %d: not changed: %s", job_id, reason)
            return False

    def look_back(self, last: bool = False) -> None:
        """Every so often, beside the passes: what the recorded jobs would have waited under the policy and FIFO."""
        if self.replay and self.replay.done():
            replay, self.replay = self.replay, None
            self.note_hindsight(replay)
        fitting = [job for job in self.finished.values() if job.cpus <= self.processors]
        if len(fitting) < HINDSIGHT_JOBS:
            return
        arguments = self.policy, fitting, self.processors
        if last:
            self.note_hindsight(self.worker.submit(hindsight, *arguments))
        elif not self.replay and time.time() - self.replayed > self.args.hindsight:
            self.replayed, self.replay = time.time(), self.worker.submit(hindsight, *arguments)

    def note_hindsight(self, replay: Future[dict[str, float]]) -> None:
        try:
            waits = replay.result()
        except Exception as error:  # whatever it is: the order does not depend on it
            log.warning("the recorded jobs could not be replayed: %s", error)
            return
        self.metrics.note_hindsight(waits)
        text = ", ".join(f"{order} {wait:,.1f} s" for order, wait in waits.items())
        log.info("mean wait of %d recorded jobs, replayed: %s", len(self.finished), text)


def warm_up(policy: Policy) -> None:
    """Compile all that a pass needs (once; then it is cached), and refuse a policy that was made for other clusters."""
    jobs = [SlurmJob(k, state, "", "", "", "", 0.0, 0.0, 1.0, 60.0, 1) for k, state in enumerate((*PENDING, *FINISHED))]
    snapshot = Snapshot(0.0, 1, jobs[:1], [], jobs[1:])
    predicted_starts(snapshot, priority_order(policy, snapshot, 1.0)[0])
    hindsight(policy, jobs[1:], 1)


def serve_metrics(args: Args, metrics: Metrics) -> None:
    if args.metrics_port is not None:
        try:
            prometheus_client.start_http_server(args.metrics_port, args.metrics_host, metrics.registry)
        except OSError as error:
            raise ValueError(f"--metrics-port {args.metrics_port}: {error.strerror}; choose another") from None
