"""The service's contract: what is sent and answered, and how a state is checked."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Annotated, Any

import msgspec
import numba
import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from simulator.moment import ClusterState
from workloads.jobs import Cluster, Jobs, WorkloadError
from workloads.reading import MILLISECONDS

# gc=False: none of these can refer to itself, and a request has hundreds.
Id = str | int
Time = Annotated[
    float, Meta(ge=0, le=MILLISECONDS, description="seconds; all times have one origin, Unix time for example")
]
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
    """A cluster at one moment. The order of resources is that of `resources` or, without names, that of the workload on
    which the policy was trained."""

    now: Time
    nodes: Annotated[list[Node], Meta(min_length=1)]
    queued: list[QueuedJob] = []
    running: list[RunningJob] = []
    finished: list[FinishedJob] = []  # in order of their ends; the last two, for plan eight, of a user and kind suffice
    resources: list[str] | None = None  # names; a policy that was trained with names takes these, in any order


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


class ExpectedStart(Struct, gc=False):
    job: Id
    p10: float  # when it starts, if no other job comes: with a chance of 10 % before this, ...
    p50: float
    p90: float


class Expected(Struct, gc=False):
    samples: int  # of run times that were tried, of
    wanted: int  # as many as it would have been with more time
    starts: list[ExpectedStart]  # of the queued jobs that fit on some node in use; none: there was no time


class Answer(Struct, gc=False):
    start: list[Start]  # now, in this order
    reserved: Reservation | None
    priorities: list[Priority]  # of all queued jobs, the most urgent first
    decided_by: str
    policy_version: str
    fallback: str | None = None  # why a rule decided in place of the model
    expected: Expected | UnsetType = UNSET  # by `plan` only


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
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in parts:
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
    cluster, resources = _to_cluster(capacities, tuple(node.speed for node in state.nodes)), len(capacities[0])
    if state.resources is not None and len(state.resources) != resources:
        raise Refused(("resources",), f"{len(state.resources)} names, and {resources} resources")
    finished, codes = None, None
    if state.finished:  # whose job it is counts only where something is known of its user
        codes = {None: -1}
        finished = to_jobs("finished", state.finished, [0.0] * len(state.finished), resources, codes)
        finished = replace(finished, run_time=np.array([job.run_time for job in state.finished]))
    submitted = [job.start_time if job.submit_time is None else job.submit_time for job in state.running]
    queued = to_jobs("queued", state.queued, [job.submit_time for job in state.queued], resources, codes)
    running = to_jobs("running", state.running, submitted, resources, codes)
    start_time = np.array([job.start_time for job in state.running])
    node = np.array([index.get(job.node, -1) for job in state.running], np.int64)
    free = np.full_like(cluster.capacity, np.inf)
    if any(given.free is not None for given in state.nodes):
        rows = [unknown if given.free is None else given.free for given, unknown in zip(state.nodes, free, strict=True)]
        free = _read_amounts(rows, resources, "nodes", "free")
    problem, k = _first_problem(
        state.now, queued.submit_time, queued.demand, running.submit_time, start_time, node, running.demand,
        cluster.capacity, free, np.zeros_like(free),
    )  # fmt: skip
    if problem >= 0:
        part, field, message = PROBLEMS[problem]
        raise Refused((part, k, field), message)
    return ClusterState(state.now, cluster, queued, running, start_time, node, finished, free)


def in_order(state: State, names: list[str]) -> None:
    """Put the amounts of a state that names its resources in the order of the policy's names.

    Raises:
        Refused: it names others.
    """
    given = state.resources
    if given is None or given == names:
        return
    if sorted(given) != sorted(names):
        known = f"the policy was trained with {', '.join(names)}"
        raise Refused(("resources",), f"{', '.join(given)}, and {known}; use these names, in any order, or none")
    amounts: list[tuple[Any, str]] = [(node, "capacity") for node in state.nodes]
    amounts += [(node, "free") for node in state.nodes if node.free is not None]
    amounts += [(job, "demand") for job in chain(state.queued, state.running, state.finished)]
    if any(len(getattr(owner, field)) != len(given) for owner, field in amounts):
        return  # which `cluster_state` refuses
    order = [given.index(name) for name in names]
    for owner, field in amounts:
        row = getattr(owner, field)
        setattr(owner, field, [row[place] for place in order])
    state.resources = names


@lru_cache(maxsize=16)
def _to_cluster(capacity: tuple[tuple[float, ...], ...], speed: tuple[float, ...]) -> Cluster:
    """Clusters change seldom."""
    resources = len(capacity[0])
    amounts = _read_amounts(capacity, resources, "nodes", "capacity")
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
def _first_problem(
    now: float,
    submit: np.ndarray,
    demand: np.ndarray,
    running_submit: np.ndarray,
    start: np.ndarray,
    node: np.ndarray,
    running_demand: np.ndarray,
    capacity: np.ndarray,
    free: np.ndarray,
    used: np.ndarray,
) -> tuple[int, int]:
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


def _read_amounts(rows: Sequence[Any], resources: int, part: str, field: str) -> np.ndarray:
    """float64[len(rows), R]"""
    if not set(map(len, rows)) <= {resources}:
        index = next(index for index, row in enumerate(rows) if len(row) != resources)
        raise Refused((part, index, field), f"{len(rows[index])} numbers, and {resources} resources")
    return np.fromiter(chain.from_iterable(rows), float, len(rows) * resources).reshape(len(rows), resources)


def to_jobs(
    part: str, jobs: Sequence[Job], submit: list[float], resources: int, codes: dict[Any, int] | None = None
) -> Jobs:
    """In the order given, with run times as requested; `codes` numbers users and executables."""
    demand = _read_amounts([job.demand for job in jobs], resources, part, "demand")
    requested, unknown = np.array([job.requested_time for job in jobs]), np.full(len(jobs), -1, np.int32)
    user, executable = unknown, unknown
    if codes is not None:
        user = np.array([codes.setdefault(job.user, len(codes)) for job in jobs], np.int32)
        executable = np.array([codes.setdefault(job.executable, len(codes)) for job in jobs], np.int32)
    zero = np.zeros(len(jobs))
    return Jobs(np.array(submit), requested, requested, demand, user, unknown, executable, unknown, zero, unknown)


def _first_repeated(names: list[Id]) -> int:
    """The first that has been there before."""
    first: dict[Id, int] = {}
    return next(k for k, name in enumerate(names) if first.setdefault(name, k) != k)


STATES, OBSERVATIONS = msgspec.json.Decoder(State), msgspec.json.Decoder(Observed)
