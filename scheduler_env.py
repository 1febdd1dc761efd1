"""The cluster: an exact event-driven simulator, the classical priority rules, and a Gymnasium environment.

    import gymnasium as gym, scheduler_env
    envs = gym.make_vec("ResourceRL/Scheduler-v0", num_envs=64, workload="cloud")
    schedule = scheduler_env.simulate(load_workload("cloud", "test"), "easy-sjf")

The file reads downwards: rules, the state of one simulation, events, what a rule decides, roll-outs, observations, one
step, and at the end the Python classes. Functions marked ``@kernel`` are compiled by Numba (once, then cached).

Vocabulary: the *head* is the job a rule wants to start next; its *shadow time* is the earliest time at which it fits if
every running job ended at its requested time; *backfilling* starts other jobs that cannot delay it (EASY: Lifka 1995,
Mu'alem & Feitelson 2001). Times are seconds. Jobs are numbered by submission within an episode.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

os.environ.setdefault("NUMBA_OPT", "2")  # three quarters of the compile time of 3, the default, and as fast

import gymnasium as gym
import numba
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model

from workloads import Cluster, Jobs, Workload, load_workload

# Without reference counting (kernels allocate nothing): half the compile time, a third of the run time.
entry = numba.njit(cache=True, nogil=True, error_model="numpy", _nrt=False, no_cfunc_wrapper=True)
kernel = numba.njit(
    cache=True, nogil=True, error_model="numpy", _nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True
)


class Ref(types.Type):
    """A pointer to a named tuple. Numba passes tuples by value, word by word: with a state of ten arrays in every call,
    that doubles both the compile time and the run time."""

    def __init__(self, target: types.NamedTuple) -> None:
        self.target = target
        super().__init__(f"Ref({target})")


@register_model(Ref)
class RefModel(models.PrimitiveModel):
    def __init__(self, manager: Any, ref: Ref) -> None:
        super().__init__(manager, ref, manager.lookup(ref.target).get_value_type().as_pointer())


@infer_getattr
class RefAttributes(AttributeTemplate):
    key = Ref

    def generic_resolve(self, ref: Ref, name: str) -> types.Type:
        return ref.target.types[ref.target.fields.index(name)]


@lower_getattr_generic(Ref)
def load_attribute(context: Any, builder: Any, ref: Ref, pointer: Any, name: str) -> Any:
    return builder.load(cgutils.gep_inbounds(builder, pointer, 0, ref.target.fields.index(name)))


@intrinsic
def by_reference(context, value):
    """A Ref to a named tuple, for as long as the calling kernel runs."""
    return Ref(value)(value), lambda _, builder, __, values: cgutils.alloca_once_value(builder, values[0])


# --------------------------------------------------------------------------------------------------------- rules
# Orders: the first seven never change while a job waits, so the queue is kept sorted by them.
FIFO, SJF, SAF, LJF, F1, RANDOM, STATIC, WFP3, UNICEP, UNICEP_RLSCHEDULER, XF, SJF_HISTORY, SAF_HISTORY = range(13)
TETRIS, TUNED = 13, 14
ORDERS = {
    "fifo": FIFO,
    "sjf": SJF,
    "saf": SAF,
    "ljf": LJF,
    "f1": F1,
    "wfp3": WFP3,
    "unicep": UNICEP,
    "xf": XF,
    "sjf-history": SJF_HISTORY,
    "saf-history": SAF_HISTORY,
}
BLOCKING, GREEDY, EASY = range(3)  # what happens while the head does not fit: nothing, anything, backfilling
FASTEST, BEST_FIT, TUNED_NODE, FIRST, ROUND_ROBIN, RANDOM_NODE = range(6)
OBJECTIVES = {"latency": 0, "wait": 1, "slowdown": 2, "tail": 3}
LATENCY, WAIT, SLOWDOWN, TAIL = range(4)
# What schedules are compared by: a property of `Schedule`.
METRIC = {"latency": "latency", "wait": "wait", "slowdown": "bounded_slowdown", "tail": "wait"}
SLOWDOWN_BOUND = 10.0  # seconds; Feitelson et al., "Theory and practice in parallel job scheduling", 1997


class Rule(NamedTuple):
    """A classical scheduler: the order of heads, the order of backfill, the mode, and the choice of node."""

    name: str
    head: int
    backfill: int
    mode: int
    nodes: int = FASTEST
    weights: tuple[float, ...] = ()  # of a tuned rule
    patience: float = np.inf  # seconds: a job that has waited for longer goes first, the oldest before the others

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.name.partition(":")[0]


# What a tuned rule adds up, times weights: TERMS once for the order of heads, once for that of backfilling and once for
# whether the head gets a reservation (below zero); NODE_TERMS for the choice of its node. The classical orders that
# look at these are special cases, up to a monotone function: SJF, SAF, WFP3, UNICEP, XF.
TERMS = ("one", "requested", "size", "estimate", "expansion", "waited", "root_waited")
TERMS += ("requested_queued", "size_queued", "waited_queued")
NODE_TERMS = ("speed", "left", "least_left", "most_left", "speed_requested")
TERM_COUNT, HEAD_TERMS, BACKFILL_TERMS, RESERVE_TERMS, NODE_WEIGHTS = len(TERMS), 0, 1, 2, 3 * len(TERMS)
PATIENCE = NODE_WEIGHTS + len(NODE_TERMS)  # the last number: who has waited for longer (hours) goes first, oldest first


def tuned_rule(weights: np.ndarray) -> str:
    """The name of the tuned rule with these weights float64[PATIENCE + 1]; they are part of the name."""
    return "tuned:" + ",".join(f"{w:.6g}" for w in weights)


_NAMED_RULES = {
    "tetris": Rule("tetris", TETRIS, TETRIS, GREEDY),  # Grandl et al., SIGCOMM 2014: alignment of demand and free
    "best-fit": Rule("best-fit", FIFO, FIFO, GREEDY, BEST_FIT),
    "fastest-node": Rule("fastest-node", FIFO, FIFO, GREEDY, FASTEST),
    "round-robin": Rule("round-robin", FIFO, FIFO, GREEDY, ROUND_ROBIN),
    "random": Rule("random", RANDOM, RANDOM, GREEDY, RANDOM_NODE),
    "fifo-first-fit": Rule("fifo-first-fit", FIFO, FIFO, GREEDY, FIRST),
}
RULES: tuple[str, ...] = (
    *ORDERS,
    *(f"greedy-{order}" for order in ORDERS),
    *(f"easy-{order}" for order in ORDERS),
    *(f"easy-{order}+sjf" for order in ("fifo", "f1", "wfp3", "unicep", "xf")),
    *(f"easy-{order}+sjf-history" for order in ("fifo", "wfp3", "xf")),
    *_NAMED_RULES,
)


def parse_rule(name: str) -> Rule:
    """The rule ``[easy-|greedy-]ORDER[+BACKFILL]`` or one of the named ones.

    Without a prefix the head blocks the queue; ``greedy-`` starts anything that fits, in order; ``easy-`` reserves the
    head's shadow time and backfills in BACKFILL order (the same as ORDER unless given). With ``@HOURS`` behind it a job
    that has waited for longer is the head, the oldest first, and gets a reservation.

    Raises:
        ValueError: the name is unknown; the message lists what is known.
    """
    if name in _NAMED_RULES:
        return _NAMED_RULES[name]
    plain, at, hours = name.partition("@")
    if at:
        return _patient(parse_rule(plain), name, hours)
    if name.startswith("tuned:"):
        return Rule(name, TUNED, TUNED, EASY, TUNED_NODE, _weights(name))
    mode, order = BLOCKING, name
    for prefix, prefix_mode in (("easy-", EASY), ("greedy-", GREEDY)):
        if name.startswith(prefix):
            mode, order = prefix_mode, name[len(prefix) :]
    head, plus, backfill = order.partition("+")
    if head not in ORDERS or (plus and (mode != EASY or backfill not in ORDERS)):
        known = ", ".join([*ORDERS, *_NAMED_RULES])
        raise ValueError(f"unknown rule {name!r}: use [easy-|greedy-]ORDER or easy-ORDER+BACKFILL; known: {known}")
    return Rule(name, ORDERS[head], ORDERS[backfill] if plus else ORDERS[head], mode)


def _patient(rule: Rule, name: str, hours: str) -> Rule:
    try:
        patience = 3600 * float(hours)
    except ValueError:
        patience = -1.0
    if rule.head == TETRIS or not patience >= 0:
        raise ValueError(
            f"unknown rule {name!r}: behind @ goes a number of hours, behind a rule that has an order of jobs"
        )
    return rule._replace(name=name, patience=patience)


def _weights(name: str) -> tuple[float, ...]:
    expected = PATIENCE + 1
    try:
        weights = tuple(float(w) for w in name.removeprefix("tuned:").split(","))
    except ValueError:
        weights = ()
    if len(weights) != expected or not np.isfinite(weights).all():
        raise ValueError(f"{name!r}: a tuned rule has {expected} numbers behind its colon; let tuned_rule.py find them")
    return weights


def static_score(order: int, jobs: Jobs, size: np.ndarray) -> np.ndarray:
    """float64[N]: the score of every job (lowest first) under an order that does not change while it waits."""
    if order in (SJF, LJF):
        return jobs.requested_time if order == SJF else -jobs.requested_time
    if order == SAF:
        return jobs.requested_time * size
    if order == F1:  # Carastan-Santos & de Camargo, SC'17, table 3
        return np.log10(np.maximum(jobs.requested_time, 0.1)) * size + 870 * np.log10(np.maximum(jobs.submit_time, 0.1))
    if order == RANDOM:
        return np.random.default_rng(0).random(len(jobs))
    return jobs.submit_time


# --------------------------------------------------------------------------------- the state of one simulation
# What does not change in an episode: its jobs, their demand[i, r], features[i, f] and groups[i, c]; the nodes'
# capacity[m, r] and speed[m], unit[r] (one over the largest node's capacity); the rule and the semantics.
Problem = namedtuple(
    "Problem",
    "jobs demand features groups capacity speed unit fastest total "
    "head backfill mode nodes weights patience sorted_head recorded objective easy lock_in",
)
JOB = np.dtype(
    [(x, "f8") for x in ("submit", "run", "requested", "size", "head_score", "backfill_score")]
    + [(x, "f8") for x in ("log_requested", "log_size", "recorded")]
)
# What does change: s, one record; the queue in order of submission, and in the rule's backfill order; the jobs of it
# that an agent has seen, their ranks and scores under the rule; the running jobs by their ends (descending) and by
# when they are due, which is by requested time (ascending); what is free[m, r] and what stays spare[r] beside the
# reservation; most[r], more than which no node has free; room[m, r] to reckon in; history[g], what is known of a group
# of jobs; and the plan, which says when and where a job has started or, if it has not, is going to be started by the
# reference rule.
Sim = namedtuple("Sim", "s queue order seen rank score ends dues free spare most room history plan")
TIMED = np.dtype([("time", "f8"), ("job", "i8")])
START = np.dtype([("start", "f8"), ("node", "i8")])
SCALARS = np.dtype(
    [("now", "f8"), ("shadow", "f8"), ("gain", "f8"), ("clear", "f8"), ("cost", "f8"), ("paid", "f8")]
    + [("returned", "f8")]
    + [(name, "i8") for name in "first arrived stop queued running scan reserved reserved_node started".split()]
    + [(name, "i8") for name in "rule_job rule_node visible counted on_track full decisions episode".split()]
)
LAST, PREVIOUS, COUNT, FEATURE = range(4)  # of a row of `history`: run times of the jobs of a group that have finished


@kernel
def copy_rows(source, to):
    """As many rows as `to` has (an assignment of slices would allocate, in case they overlap)."""
    for k in range(to.shape[0]):
        for r in range(to.shape[1]):
            to[k, r] = source[k, r]


@kernel
def position_in_dues(sim, count, time, i):
    """The first position of dues[:count] that is not before (time, i)."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if sim.dues[middle].time < time or (sim.dues[middle].time == time and sim.dues[middle].job < i):
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def position_in_order(sim, p, i):
    low, high, key = 0, sim.s[0].queued, p.jobs[i].backfill_score
    while low < high:
        middle = (low + high) // 2
        j = sim.order[middle]
        if p.jobs[j].backfill_score < key or (p.jobs[j].backfill_score == key and j < i):
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def position_in_queue(sim, i):
    low, high = 0, sim.s[0].queued
    while low < high:
        middle = (low + high) // 2
        if sim.queue[middle] < i:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def enqueue(sim, p, i):
    s = sim.s[0]
    where = position_in_order(sim, p, i)
    for k in range(s.queued, where, -1):
        sim.order[k] = sim.order[k - 1]
    sim.order[where] = i
    sim.queue[s.queued] = i
    s.queued += 1


@kernel
def dequeue(sim, p, i):
    s = sim.s[0]
    where = position_in_order(sim, p, i)
    if where < s.scan:
        s.scan -= 1
    for k in range(where, s.queued - 1):
        sim.order[k] = sim.order[k + 1]
    for k in range(position_in_queue(sim, i), s.queued - 1):
        sim.queue[k] = sim.queue[k + 1]
    s.queued -= 1


@kernel
def job_cost(p, i, begin, m):
    """What a job that begins at that time on that node costs: latency, wait, bounded slowdown, or the wait's square."""
    wait = begin - p.jobs[i].submit
    if p.objective == WAIT:
        return wait
    if p.objective == TAIL:
        return wait * wait
    latency = wait + p.jobs[i].run / p.speed[m]
    if p.objective == LATENCY:
        return latency
    return max(1.0, latency / max(p.jobs[i].run, SLOWDOWN_BOUND))


@kernel
def waiting_cost(p, i, now):
    """The part of a queued job's cost that has accrued by waiting until now."""
    wait = now - p.jobs[i].submit
    if p.objective == SLOWDOWN:
        return max(0.0, (wait + p.jobs[i].run) / max(p.jobs[i].run, SLOWDOWN_BOUND) - 1.0)
    return wait * wait if p.objective == TAIL else wait


@kernel
def fits(sim, p, i, m):
    for r in range(p.demand.shape[1]):
        if p.demand[i, r] > sim.free[m, r] + 1e-9:  # fractional demands add up with rounding
            return False
    return True


@kernel
def possible(p, i, m):
    """Whether job i would fit on node m if nothing else ran there."""
    for r in range(p.demand.shape[1]):
        if p.demand[i, r] > p.capacity[m, r]:
            return False
    return True


@kernel
def allowed(sim, p, i, m):
    """Whether job i may start on node m now: it fits and does not delay the reservation, if there is one."""
    if not fits(sim, p, i, m):
        return False
    s = sim.s[0]
    if s.reserved < 0:
        return True
    if i == s.reserved:
        return False
    if m != s.reserved_node or s.now + p.jobs[i].requested / p.speed[m] <= s.shadow:
        return True
    for r in range(p.demand.shape[1]):
        if p.demand[i, r] > sim.spare[r] + 1e-9:
            return False
    return True


@kernel
def add_running(sim, i, end, due):
    s = sim.s[0]
    k = s.running  # `end` descends, so that the next completion is the last entry; equal ones leave in order of start
    while k > 0 and sim.ends[k - 1].time <= end:
        sim.ends[k].time, sim.ends[k].job = sim.ends[k - 1].time, sim.ends[k - 1].job
        k -= 1
    sim.ends[k].time, sim.ends[k].job = end, i
    where = position_in_dues(sim, s.running, due, i)
    for k in range(s.running, where, -1):
        sim.dues[k].time, sim.dues[k].job = sim.dues[k - 1].time, sim.dues[k - 1].job
    sim.dues[where].time, sim.dues[where].job = due, i
    s.running += 1
    s.started += 1


@kernel
def begin(sim, p, i, m):
    """Start queued job i on node m; note what that changes against the trajectory stored so far."""
    s = sim.s[0]
    end, due = s.now + p.jobs[i].run / p.speed[m], s.now + p.jobs[i].requested / p.speed[m]
    if s.reserved >= 0 and m == s.reserved_node and due > s.shadow:
        for r in range(p.demand.shape[1]):
            sim.spare[r] -= p.demand[i, r]
    for r in range(p.demand.shape[1]):
        sim.free[m, r] -= p.demand[i, r]
    if sim.plan[i].start != s.now or sim.plan[i].node != m:
        s.gain += job_cost(p, i, sim.plan[i].start, sim.plan[i].node) - job_cost(p, i, s.now, m)
        s.clear = max(s.clear, max(end, sim.plan[i].start + p.jobs[i].run / p.speed[sim.plan[i].node]))
        sim.plan[i].start, sim.plan[i].node = s.now, m
    s.paid += job_cost(p, i, s.now, m)
    dequeue(sim, p, i)
    add_running(sim, i, end, due)


# ------------------------------------------------------------------------------------------------------- events
@kernel
def remember(sim, p, i):
    """A job has finished: its run time becomes known to the history of its user and its kind."""
    for c in range(p.groups.shape[1]):
        g = p.groups[i, c]
        if g >= 0:
            h = sim.history[g]
            h[PREVIOUS], h[LAST] = h[LAST], p.jobs[i].run
            h[COUNT] += 1
            h[FEATURE] = np.log1p(h[LAST] if h[COUNT] == 1 else 0.5 * (h[LAST] + h[PREVIOUS])) / 12


@kernel
def complete(sim, p):
    """Release the running job that ends first."""
    s = sim.s[0]
    s.running -= 1
    i = sim.ends[s.running].job
    m = sim.plan[i].node
    for r in range(p.demand.shape[1]):
        sim.free[m, r] += p.demand[i, r]
    due = sim.plan[i].start + p.jobs[i].requested / p.speed[m]
    for k in range(position_in_dues(sim, s.running + 1, due, i), s.running):
        sim.dues[k].time, sim.dues[k].job = sim.dues[k + 1].time, sim.dues[k + 1].job
    if sim.history.shape[0] > 0:
        remember(sim, p, i)


@kernel
def next_event(sim, p):
    """Move to the next instant at which jobs end or arrive, and handle all of them. False: nothing is to come."""
    s = sim.s[0]
    if s.running == 0 and s.arrived == s.stop:
        return False
    now = sim.ends[s.running - 1].time if s.running > 0 else np.inf
    if s.arrived < s.stop:
        now = min(now, p.jobs[s.arrived].submit)
    s.now = now
    while s.running > 0 and sim.ends[s.running - 1].time <= now:
        complete(sim, p)
    while s.arrived < s.stop and p.jobs[s.arrived].submit <= now:
        enqueue(sim, p, s.arrived)
        s.arrived += 1
    s.reserved, s.scan = -1, 0
    return True


@kernel
def next_second(sim):
    """How many running jobs are late, and how many are late or due within the next second."""
    s, late = sim.s[0], 0
    while late < s.running and sim.dues[late].time <= s.now:
        late += 1
    soon = late
    while soon < s.running and sim.dues[soon].time < s.now + 1.0:
        soon += 1
    return late, soon


@kernel
def release(sim, k, late, soon):
    """The k-th job to end, and when, if running jobs ended as requested (late ones: in a second, so after `soon`)."""
    if k < soon:
        k = k + late if k < soon - late else k - (soon - late)
    return sim.dues[k].job, sim.dues[k].time if k >= late else sim.s[0].now + 1.0


@kernel
def shadow_time(sim, p, i, m, spare):
    """When job i would fit on node m if running jobs ended as requested (late ones: in a second).

    Leaves in `spare` what is free at that time beside the job.
    """
    s = sim.s[0]
    when = s.now
    for r in range(spare.shape[0]):
        spare[r] = sim.free[m, r] - p.demand[i, r]
    missing = False
    for r in range(spare.shape[0]):
        missing |= spare[r] < -1e-9
    late, soon = next_second(sim)
    for k in range(s.running):
        if not missing:
            break
        j, end = release(sim, k, late, soon)
        if sim.plan[j].node == m:
            when, missing = end, False
            for r in range(spare.shape[0]):
                spare[r] += p.demand[j, r]
                missing |= spare[r] < -1e-9
    return when


@kernel
def earliest_start(sim, p, i):
    """When job i, which fits nowhere now, would fit on some node: the least of its shadow times, in one pass."""
    s = sim.s[0]
    when = s.now
    copy_rows(sim.free, sim.room)
    late, soon = next_second(sim)
    for k in range(s.running):
        j, when = release(sim, k, late, soon)
        m = sim.plan[j].node
        enough = True
        for r in range(p.demand.shape[1]):
            sim.room[m, r] += p.demand[j, r]
            enough &= p.demand[i, r] <= sim.room[m, r] + 1e-9
        if enough:
            break
    return when


@kernel
def reserve(sim, p, i, m):
    s = sim.s[0]
    s.shadow = shadow_time(sim, p, i, m, sim.spare)
    s.reserved, s.reserved_node, s.scan = i, m, 0


# ------------------------------------------------------------------------------------------- what a rule decides
@kernel
def estimate(sim, p, i):
    """Mean of the user's last two run times, at most what was requested (Tsafrir, Etsion & Feitelson 2007)."""
    if p.recorded:
        return p.jobs[i].recorded
    g = p.groups[i, 0]
    if g < 0 or sim.history[g, COUNT] < 2:
        return p.jobs[i].requested
    return min(p.jobs[i].requested, 0.5 * (sim.history[g, LAST] + sim.history[g, PREVIOUS]))


@kernel
def score(sim, p, order, i):
    """The score (lowest first) of job i under an order that changes with time."""
    wait = sim.s[0].now - p.jobs[i].submit
    if order == WFP3:  # Tang et al., Cluster 2009
        ratio = wait / p.jobs[i].requested
        return -(ratio * ratio * ratio) * p.jobs[i].size
    if order == UNICEP:
        return -wait / (max(1e-3, np.log2(p.jobs[i].size)) * p.jobs[i].requested)
    if order == UNICEP_RLSCHEDULER:
        return -(wait + 1e-15) / (np.log2(p.jobs[i].size + 1e-15) * p.jobs[i].requested)
    if order == XF:
        return -(wait + p.jobs[i].requested) / p.jobs[i].requested
    if order == SJF_HISTORY:
        return estimate(sim, p, i)
    return estimate(sim, p, i) * p.jobs[i].size  # SAF_HISTORY


@kernel
def tuned_score(sim, p, terms, i):
    """The weighted sum of a tuned rule's TERMS for job i; logarithms of minutes and of 256ths of the cluster."""
    w = p.weights[terms * TERM_COUNT : (terms + 1) * TERM_COUNT]
    wait = sim.s[0].now - p.jobs[i].submit
    if wait > 3600 * p.weights[PATIENCE]:  # no sum of short runs shows what it costs never to start a job
        return -1e6 - wait
    requested, size, waited = p.jobs[i].log_requested, p.jobs[i].log_size, np.log1p(wait / 60)
    value = w[0] + w[1] * requested + w[2] * size
    if w[3] != 0:
        value += w[3] * np.log1p(estimate(sim, p, i) / 60)
    value += w[4] * np.log1p(wait / (p.jobs[i].requested + 60)) + w[5] * waited + w[6] * np.sqrt(wait / 3600)
    return value + np.log1p(sim.s[0].queued) / 5 * (w[7] * requested + w[8] * size + w[9] * waited)


@kernel
def overdue(sim, p):
    """Whether the oldest queued job, if there is one, has waited for longer than the rule's patience."""
    return sim.s[0].queued > 0 and sim.s[0].now - p.jobs[sim.queue[0]].submit > p.patience


@kernel
def head_score(sim, p, i):
    wait = sim.s[0].now - p.jobs[i].submit
    if wait > p.patience:
        return -1e12 - wait
    if p.head <= STATIC or p.head == TETRIS:  # which has no order of jobs: as submitted
        return p.jobs[i].head_score
    return tuned_score(sim, p, HEAD_TERMS, i) if p.head == TUNED else score(sim, p, p.head, i)


@kernel
def backfill_score(sim, p, i):
    if p.backfill <= STATIC or p.backfill == TETRIS:
        return p.jobs[i].backfill_score
    return tuned_score(sim, p, BACKFILL_TERMS, i) if p.backfill == TUNED else score(sim, p, p.backfill, i)


@kernel
def head_job(sim, p):
    if p.head == FIFO or overdue(sim, p):
        return sim.queue[0]
    if p.sorted_head:
        return sim.order[0]
    best, best_score = -1, np.inf
    for k in range(sim.s[0].queued):
        i = sim.queue[k]
        value = head_score(sim, p, i)
        if value < best_score or best < 0:
            best, best_score = i, value
    return best


@kernel
def choose_node(sim, p, i):
    """The node on which a rule starts job i now, -1 where it may not start."""
    nodes = p.speed.shape[0]
    offset = 0
    if nodes == 1:
        return offset if allowed(sim, p, i, offset) else -1
    if p.nodes == ROUND_ROBIN:
        offset = sim.s[0].started % nodes
    elif p.nodes == RANDOM_NODE:
        offset = (i * 2654435761 % 4294967296) % nodes
    best, best_speed, best_left = -1, -np.inf, np.inf
    for k in range(nodes):
        m = (k + offset) % nodes
        if not allowed(sim, p, i, m):
            continue
        if p.nodes >= FIRST:
            return m
        left, least, most = 0.0, np.inf, -np.inf
        for r in range(p.demand.shape[1]):
            over = (sim.free[m, r] - p.demand[i, r]) * p.unit[r]
            left, least, most = left + over, min(least, over), max(most, over)
        speed = p.speed[m] if p.nodes == FASTEST else 0.0
        if p.nodes == TUNED_NODE:
            w = p.weights[NODE_WEIGHTS:]
            speed = p.speed[m] / p.fastest * (w[0] + w[4] * p.jobs[i].log_requested)
            speed -= w[1] * left + w[2] * least + w[3] * most
        if speed > best_speed or (speed == best_speed and left < best_left):
            best, best_speed, best_left = m, speed, left
    return best


@kernel
def choose_reservation(sim, p, i):
    """The node on which job i would end first if running jobs ended as requested."""
    s = sim.s[0]
    best, best_end = -1, np.inf
    copy_rows(sim.free, sim.room)
    late, soon = next_second(sim)
    for k in range(s.running):
        j, when = release(sim, k, late, soon)
        if when + p.jobs[i].requested / p.fastest >= best_end:
            break
        m = sim.plan[j].node
        end = when + p.jobs[i].requested / p.speed[m]
        enough = end < best_end
        for r in range(p.demand.shape[1]):
            sim.room[m, r] += p.demand[j, r]
            enough &= p.demand[i, r] <= sim.room[m, r] + 1e-9
        if enough:
            best, best_end = m, end
    return best


@kernel
def most_aligned(sim, p):
    """Tetris: the job and node, among those allowed, with the largest product of demand and free."""
    best, best_node, best_score = -1, -1, -1.0
    for k in range(sim.s[0].queued):
        i = sim.queue[k]
        for m in range(p.speed.shape[0]):
            if allowed(sim, p, i, m):
                alignment = 0.0
                for r in range(p.demand.shape[1]):
                    alignment += p.demand[i, r] * sim.free[m, r] * p.unit[r] * p.unit[r]
                if alignment > best_score:
                    best, best_node, best_score = i, m, alignment
    return best, best_node


@kernel
def find_most(sim):
    for r in range(sim.most.shape[0]):
        sim.most[r] = 0.0
        for m in range(sim.free.shape[0]):
            sim.most[r] = max(sim.most[r], sim.free[m, r])


@kernel
def within_most(sim, p, i):
    """False: job i fits nowhere (without looking at every node)."""
    for r in range(sim.most.shape[0]):
        if p.demand[i, r] > sim.most[r] + 1e-9:
            return False
    return True


@kernel
def first_allowed(sim, p):
    """The first job in backfill order that may start now, and its node; (-1, -1) where there is none."""
    s = sim.s[0]
    if p.backfill == TETRIS:
        return most_aligned(sim, p)
    if p.backfill <= STATIC:  # what was passed over cannot start before the next event: s.scan goes on behind it
        if s.scan == 0:
            find_most(sim)
        while s.scan < s.queued:
            i = sim.order[s.scan]
            if within_most(sim, p, i):
                m = choose_node(sim, p, i)
                if m >= 0:
                    return i, m
            s.scan += 1
        return -1, -1
    best, best_node, best_score = -1, -1, np.inf
    find_most(sim)
    for k in range(s.queued):
        i = sim.queue[k]
        m = choose_node(sim, p, i) if within_most(sim, p, i) else -1
        if m >= 0:
            value = backfill_score(sim, p, i)
            if value < best_score:
                best, best_node, best_score = i, m, value
    return best, best_node


@kernel
def rule_decision(sim, p):
    """What the rule does next: start or reserve (job, node); (-1, -1): wait for the next event."""
    s = sim.s[0]
    if s.queued == 0:
        return -1, -1
    if p.lock_in and p.mode == GREEDY and not overdue(sim, p):  # something that fits holds nobody up
        s.scan = 0
        i, m = first_allowed(sim, p)
        if i >= 0:
            return i, m
    if s.reserved < 0 and (p.mode != GREEDY or p.lock_in or overdue(sim, p)):
        head = head_job(sim, p)
        m = choose_node(sim, p, head)
        waives = p.head == TUNED and not p.lock_in and not overdue(sim, p)
        if m < 0 and waives and tuned_score(sim, p, RESERVE_TERMS, head) > 0:
            return first_allowed(sim, p)
        return head, m if m >= 0 else choose_reservation(sim, p, head)
    if p.mode == BLOCKING:
        return -1, -1
    return first_allowed(sim, p)


@kernel
def act(sim, p, i, m):
    if fits(sim, p, i, m):
        begin(sim, p, i, m)
    else:
        reserve(sim, p, i, m)


@kernel
def lock_in_event(sim, p):
    """RLScheduler's clock: one arrival, or else one completion, at a time."""
    s = sim.s[0]
    end = sim.ends[s.running - 1].time if s.running > 0 else np.inf
    if s.arrived < s.stop and p.jobs[s.arrived].submit <= end:
        s.now = max(s.now, p.jobs[s.arrived].submit)
        enqueue(sim, p, s.arrived)
        s.arrived += 1
    elif s.running > 0:
        s.now = max(s.now, end)
        complete(sim, p)
    else:
        return False
    return True


@kernel
def due_of(sim, p, k):
    """The requested end of the k-th entry of `end_job`."""
    i = sim.ends[k].job
    return sim.plan[i].start + p.jobs[i].requested / p.speed[sim.plan[i].node]


@kernel
def lock_in_start(sim, p, i, m):
    """RLScheduler's step (SC'20): job i holds the queue until it has started.

    The shadow time is computed once; before each event the queued jobs that fit and would end before it start, first
    come, first served; there is no spare-node rule.
    """
    s = sim.s[0]
    s.reserved = -1
    shadow = s.now
    if not fits(sim, p, i, m):
        for k in range(1, s.running):  # its sort by requested end is what orders equal ends from now on
            j = k
            while (
                j > 0
                and p.easy
                and sim.ends[j - 1].time == sim.ends[j].time
                and due_of(sim, p, j - 1) < due_of(sim, p, j)
            ):
                sim.ends[j - 1].job, sim.ends[j].job = sim.ends[j].job, sim.ends[j - 1].job
                j -= 1
        for r in range(sim.spare.shape[0]):
            sim.spare[r] = sim.free[m, r]
        for k in range(s.running):
            j = sim.dues[k].job
            if sim.plan[j].node == m:
                shadow = sim.dues[k].time
                enough = True
                for r in range(p.demand.shape[1]):
                    sim.spare[r] += p.demand[j, r]
                    enough &= sim.spare[r] >= p.demand[i, r]
                if enough:
                    break
    while not fits(sim, p, i, m):
        k = 0
        while p.easy and k < s.queued:
            j = sim.queue[k]
            if s.now + p.jobs[j].requested / p.speed[m] < shadow and fits(sim, p, j, m):
                begin(sim, p, j, m)
            else:
                k += 1
        lock_in_event(sim, p)
    begin(sim, p, i, m)


@kernel
def overtaken(sim):
    """Whether a job still queued here has started on the stored trajectory."""
    for k in range(sim.s[0].queued):
        if sim.plan[sim.queue[k]].start <= sim.s[0].now:
            return True
    return False


@kernel
def run_rule(sim, p, until):
    """Let the rule go on until more than `until` jobs have arrived or, unless s.full, it meets the stored plan.

    They have met when, at the end of an instant, every job that started differently has ended in both (`clear`) and
    none waits here that has started there: from then on the two are the same.
    """
    s = sim.s[0]
    while s.arrived <= until:
        if p.lock_in:
            i, m = rule_decision(sim, p)
            if i >= 0:
                lock_in_start(sim, p, i, m)
                s.decisions += 1
            elif not lock_in_event(sim, p):
                return
            continue
        i, m = rule_decision(sim, p)
        if i >= 0:
            act(sim, p, i, m)
            s.decisions += 1
        elif (not s.full and s.now >= s.clear and not overtaken(sim)) or not next_event(sim, p):
            return


# ------------------------------------------------------------------------------------ observations and one step
JOB_FEATURES = ("present", "requested", "size", "area", "waited", "expansion", "fits", "may_start", "earliest_start")
JOB_FEATURES += (
    "reserved",
    "rule_choice",
    "position",
    "behind",
    "user_time",
    "user_known",
    "request_time",
    "request_known",
)
JOB_FEATURES += ("kind_time", "kind_known")  # then R columns: demand over the largest node's capacity
NODE_FEATURES = ("speed", "reserved", "shadow", "next_release", "rule_choice")  # then R of free and R of capacity
CLUSTER_FEATURES = ("queued", "hidden", "running", "reservation", "shadow", "rule_waits", "queued_work")
(
    PRESENT,
    REQUESTED,
    SIZE,
    AREA,
    WAITED,
    EXPANSION,
    FITS,
    MAY_START,
    EARLIEST,
    RESERVED,
    RULE_CHOICE,
    POSITION,
    BEHIND,
) = range(13)
HISTORY = 13
STATIC_FEATURES = 4  # the first ones never change while a job waits
JOB_WIDTH, NODE_WIDTH, CLUSTER_WIDTH = len(JOB_FEATURES), len(NODE_FEATURES), len(CLUSTER_FEATURES)


@kernel
def look(sim, p, window):
    """Bring the queue into view, in order of submission or, where it is longer than the window, its oldest jobs for one
    half and those of the others that the rule ranks first for the other; and always the one that the rule would start.
    """
    s = sim.s[0]
    s.visible = min(window, s.queued)
    oldest = s.queued if s.queued <= window else (window + 1) // 2
    for k in range(oldest):
        sim.seen[k] = sim.queue[k]
    count = oldest
    for k in range(oldest, s.queued):
        i = sim.queue[k]
        value = head_score(sim, p, i)
        if count == window and (window == oldest or value >= sim.rank[count - 1]):
            continue
        count = min(count + 1, window)
        j = count - 1
        while j > oldest and sim.rank[j - 1] > value:
            sim.seen[j], sim.rank[j] = sim.seen[j - 1], sim.rank[j - 1]
            j -= 1
        sim.seen[j], sim.rank[j] = i, value
    if s.queued > window and (window > 1 or not overdue(sim, p)):  # who is overdue stays in the only place
        i, m = rule_decision(sim, p)
        if i >= 0 and not p.lock_in and not fits(sim, p, i, m):
            i, m = first_allowed(sim, p)
        for k in range(window):
            if sim.seen[k] == i:
                i = -1
        if i >= 0:
            sim.seen[window - 1] = i


@kernel
def can_choose(sim, p):
    """Whether some visible job may start now."""
    if sim.s[0].reserved >= 0 and not p.easy:
        return False
    for k in range(sim.s[0].visible):
        for m in range(p.speed.shape[0]):
            if allowed(sim, p, sim.seen[k], m):
                return True
    return False


@kernel
def settle(sim, p, window):
    """Let time pass until the agent has a choice. False: every job of the episode has started."""
    s = sim.s[0]
    while s.queued > 0 or s.arrived < s.stop:
        look(sim, p, window)
        if p.lock_in:
            if s.queued > 0:
                return True
            lock_in_event(sim, p)
            continue
        if can_choose(sim, p):
            return True
        if s.on_track and (s.queued > window or not p.easy):  # the rule sees and may do what the agent cannot
            i, m = rule_decision(sim, p)
            if i >= 0 and not fits(sim, p, i, m):
                reserve(sim, p, i, m)
                i, m = rule_decision(sim, p)
            s.on_track = i < 0
        next_event(sim, p)
    return False


@kernel
def job_row(sim, p, i, row, legal):
    """Fill the features of job i, and legal[m]: whether it may start or be reserved on node m."""
    s = sim.s[0]
    wait = np.float32(s.now - p.jobs[i].submit)
    requested = max(np.float32(p.jobs[i].requested), np.float32(1))  # -1 in some published sequences
    row[WAITED] = np.log(np.float32(1) + wait) * np.float32(1 / 12)
    row[EXPANSION] = np.log(np.float32(1) + wait / requested) * np.float32(0.2)
    fit = may = False
    later = s.reserved < 0 and i != sim.queue[0] and overdue(sim, p)
    for m in range(p.speed.shape[0]):
        if fits(sim, p, i, m):
            fit, legal[m] = True, not later and allowed(sim, p, i, m)
            may |= legal[m]
        else:
            legal[m] = (s.reserved < 0 or p.lock_in) and not later and possible(p, i, m)
    row[FITS], row[MAY_START] = fit, may
    row[EARLIEST] = np.log(np.float32(1 + earliest_start(sim, p, i) - s.now)) * np.float32(1 / 12) if not fit else 0
    row[RESERVED], row[RULE_CHOICE] = i == s.reserved, i == s.rule_job
    for c in range(p.groups.shape[1]):
        g = p.groups[i, c]
        known = sim.history[g, COUNT] if g >= 0 else 0.0
        row[HISTORY + 2 * c] = sim.history[g, FEATURE] if known > 0 else p.features[i, REQUESTED]
        row[HISTORY + 2 * c + 1] = min(known, 2.0) * 0.5


@kernel
def rank_view(sim, p):
    """Leave in `rank` how far each job in view is from the rule's choice in the rule's order, or from the first where
    it chooses none: the logarithm of the distance, for a tuned rule the difference of the scores. While a reservation
    stands it is the backfill order that counts."""
    s = sim.s[0]
    chosen, first = -1, 0
    for k in range(s.visible):
        i = sim.seen[k]
        if s.reserved < 0 or p.mode == BLOCKING:
            sim.score[k] = head_score(sim, p, i)
        else:
            sim.score[k] = backfill_score(sim, p, i)
        sim.rank[k] = 0
        for j in range(k):
            after = sim.score[j] <= sim.score[k]
            sim.rank[k] += after
            sim.rank[j] += not after
        chosen = k if i == s.rule_job else chosen
        first = k if sim.score[k] < sim.score[first] else first
    chosen = first if chosen < 0 else chosen
    place = sim.rank[chosen]
    for k in range(s.visible):
        if p.head == TUNED:
            sim.rank[k] = min(abs(sim.score[k] - sim.score[chosen]), 8.0)
        else:
            sim.rank[k] = np.log1p(abs(sim.rank[k] - place))


@kernel
def observe(sim, p, window, obs, mask):
    """Write the observation (float32[D], see `split`) and the mask (bool[K*M + 1]) of a decision point."""
    s = sim.s[0]
    nodes, resources = p.capacity.shape
    visible = s.visible
    s.rule_job, s.rule_node = rule_decision(sim, p)
    job_width, node_width = JOB_WIDTH + resources, NODE_WIDTH + 2 * resources
    obs[:] = 0
    mask[:] = False
    work = 0.0
    rank_view(sim, p)
    for k in range(visible):
        i = sim.seen[k]
        row = obs[k * job_width : (k + 1) * job_width]
        for f in range(STATIC_FEATURES):
            row[f] = p.features[i, f]
        for r in range(resources):
            row[JOB_WIDTH + r] = p.features[i, STATIC_FEATURES + r]
        job_row(sim, p, i, row, mask[k * nodes : (k + 1) * nodes])
        row[POSITION] = k / window
        row[BEHIND] = sim.rank[k] / 4
        work += max(p.jobs[i].requested, 0.0) * p.jobs[i].size
    mask[window * nodes] = s.reserved >= 0 and not p.lock_in
    until_shadow = np.log1p(max(0.0, s.shadow - s.now)) / 12 if s.reserved >= 0 else 0.0
    for m in range(nodes):
        row = obs[window * job_width + m * node_width : window * job_width + (m + 1) * node_width]
        row[0] = p.speed[m] / p.fastest
        if s.reserved >= 0 and m == s.reserved_node:
            row[1], row[2] = 1, until_shadow
        for k in range(s.running):
            if sim.plan[sim.dues[k].job].node == m:
                row[3] = np.log1p(max(0.0, sim.dues[k].time - s.now)) / 12
                break
        row[4] = m == s.rule_node
        for r in range(resources):
            row[NODE_WIDTH + r] = max(0.0, sim.free[m, r]) * p.unit[r]
            row[NODE_WIDTH + resources + r] = p.capacity[m, r] * p.unit[r]
    row = obs[window * job_width + nodes * node_width :]
    row[0] = np.log1p(s.queued) / 8
    row[1] = np.log1p(s.queued - visible) / 8
    row[2] = np.log1p(s.running) / 8
    row[3], row[4] = s.reserved >= 0, until_shadow
    row[5] = s.rule_job < 0
    row[6] = np.log1p(work / p.total) / 12
    for a in range(mask.shape[0]):
        row[CLUSTER_WIDTH + a] = mask[a]


@kernel
def copy_sim(sim, to):
    s, t = sim.s[0], to.s[0]
    t.now, t.shadow, t.gain, t.clear, t.paid = s.now, s.shadow, s.gain, s.clear, s.paid
    t.arrived, t.stop, t.queued, t.running, t.scan = s.arrived, s.stop, s.queued, s.running, s.scan
    t.reserved, t.reserved_node, t.started, t.full = s.reserved, s.reserved_node, s.started, s.full
    for k in range(s.queued):
        to.queue[k], to.order[k] = sim.queue[k], sim.order[k]
    for k in range(s.running):
        to.ends[k].time, to.ends[k].job, to.dues[k].time, to.dues[k].job = (
            sim.ends[k].time,
            sim.ends[k].job,
            sim.dues[k].time,
            sim.dues[k].job,
        )
    copy_rows(sim.free, to.free)
    copy_rows(sim.history, to.history)
    for r in range(sim.spare.shape[0]):
        to.spare[r] = sim.spare[r]
        to.most[r] = sim.most[r]


@kernel
def accrued(sim, p):
    """The cost so far of the jobs that had not started when the agent took over."""
    cost = sim.s[0].paid
    for k in range(sim.s[0].queued):
        cost += waiting_cost(p, sim.queue[k], sim.s[0].now)
    return cost


# What an episode is: whole numbers and flags of the environment's arguments.
Plan = namedtuple("Plan", "window warmup decided followup improvement full")
# The run times of the past, by group (of `groups`) and in order of their end: rows offset[g] .. offset[g + 1].
Past = namedtuple("Past", "offset end run")
# To number groups with: new[g] and old[g], which are -1 between two uses, and the history under the old numbers.
Numbers = namedtuple("Numbers", "new old history")


@kernel
def problem_of(whole, batch, e):
    """The problem of environment e, whose jobs are some of the whole."""
    a, b = batch.s[e].first, batch.s[e].first + batch.s[e].stop
    return Problem(
        whole.jobs[a:b], whole.demand[a:b], whole.features[a:b], batch.groups[e],
        whole.capacity, whole.speed, whole.unit, whole.fastest, whole.total,
        whole.head, whole.backfill, whole.mode, whole.nodes, whole.weights, whole.patience, whole.sorted_head,
        whole.recorded, whole.objective, whole.easy, whole.lock_in,
    )  # fmt: skip


@kernel
def sim_of(batch, e, plan):
    """Row e of the batch of states, with that plan (roll-outs share their environment's)."""
    b = batch
    return Sim(
        b.s[e : e + 1],
        b.queue[e],
        b.order[e],
        b.seen[e],
        b.rank[e],
        b.score[e],
        b.ends[e],
        b.dues[e],
        b.free[e],
        b.spare[e],
        b.most[e],
        b.room[e],
        b.history[e],
        plan,
    )


@kernel
def seed_history(sim, p, groups, past, numbers):
    """Number the groups of the episode's jobs, and give them what the episode before it had seen of them or, to those
    it did not have, what had ended before the first job was submitted."""
    count = 0
    for i in range(groups.shape[0]):
        for c in range(groups.shape[1]):
            g = groups[i, c]
            if g >= 0 and numbers.new[g] < 0:
                numbers.new[g] = count
                h = sim.history[count]
                if numbers.old[g] >= 0:
                    for k in range(h.shape[0]):
                        h[k] = numbers.history[numbers.old[g], k]
                else:
                    recall(h, past, g, p.jobs[0].submit)
                count += 1
            p.groups[i, c] = numbers.new[g] if g >= 0 else -1
    for i in range(groups.shape[0]):
        for c in range(groups.shape[1]):
            if groups[i, c] >= 0:
                numbers.new[groups[i, c]] = -1


@kernel
def recall(h, past, g, now):
    """Fill row h of a history with what had ended of group g by now."""
    first, last = past.offset[g], past.offset[g + 1]
    while first < last:
        middle = (first + last) // 2
        if past.end[middle] <= now:
            first = middle + 1
        else:
            last = middle
    h[COUNT] = first - past.offset[g]
    h[LAST] = past.run[first - 1] if h[COUNT] >= 1 else 0.0
    h[PREVIOUS] = past.run[first - 2] if h[COUNT] >= 2 else h[LAST]
    h[FEATURE] = np.log1p(0.5 * (h[LAST] + h[PREVIOUS])) / 12


@kernel
def number_old(p, groups, numbers, known):
    """Note the number that each group has, or forget it."""
    for i in range(groups.shape[0]):
        for c in range(groups.shape[1]):
            if groups[i, c] >= 0:
                numbers.old[groups[i, c]] = p.groups[i, c] if known else -1


@kernel
def clear_sim(sim, p):
    s = sim.s[0]
    s.arrived, s.queued, s.running, s.scan, s.started, s.decisions = 0, 0, 0, 0, 0, 0
    s.reserved, s.reserved_node, s.rule_job, s.rule_node = -1, -1, -1, -1
    s.now, s.paid, s.on_track, s.full, s.episode = p.jobs[0].submit, 0.0, 1, 1, 1
    copy_rows(p.capacity, sim.free)
    for i in range(s.stop):
        sim.plan[i].start, sim.plan[i].node = np.inf, 0


@kernel
def reset_env(sim, p, other, plan):
    """Let the rule run the warm-up, and find the first choice."""
    clear_sim(sim, p)
    run_rule(sim, p, plan.warmup)
    if plan.window > 0:
        settle(sim, p, plan.window)
        begin_episode(sim, p, other, plan)


@kernel
def begin_episode(sim, p, other, plan):
    """Simulate what the rule would make of the rest."""
    s = sim.s[0]
    s.paid, s.returned, s.decisions = 0.0, 0.0, 0
    s.counted = s.queued + s.stop - s.arrived
    s.cost = waited = accrued(sim, p)
    if plan.improvement:
        copy_sim(sim, other)
        run_rule(other, p, s.stop)
        s.cost = other.s[0].paid - waited  # the reference's cost from here on: what rewards are relative to
        if s.cost <= 0:
            s.cost = np.float64(s.counted)
    s.full = plan.full


@kernel
def step_env(sim, p, other, plan, action):
    """Take one action. Returns (reward, terminated, truncated)."""
    s = sim.s[0]
    nodes = p.speed.shape[0]
    i = m = -1
    if action < plan.window * nodes:
        i, m = sim.seen[action // nodes], action % nodes
    s.on_track = i == s.rule_job and m == s.rule_node
    s.gain, s.clear = 0.0, -np.inf
    if i < 0:
        next_event(sim, p)
    elif p.lock_in:
        lock_in_start(sim, p, i, m)
    else:
        act(sim, p, i, m)
    s.decisions += 1
    more = settle(sim, p, plan.window)
    truncated = more and plan.followup > 0 and s.arrived > plan.warmup + plan.decided
    reward = 0.0
    if truncated if not plan.improvement else not s.on_track:
        copy_sim(sim, other)
        run_rule(other, p, s.stop)
        reward = other.s[0].gain / s.cost
    if not plan.improvement:
        paid = other.s[0].paid if truncated else accrued(sim, p)
        reward = (s.cost - paid) / s.counted
        s.cost = paid
    s.returned += reward
    return reward, not more, truncated


@kernel
def oldest_job(sim):
    """The job that was submitted first of those that wait or run."""
    s = sim.s[0]
    oldest = sim.queue[0] if s.queued > 0 else s.arrived
    for k in range(s.running):
        oldest = min(oldest, sim.ends[k].job)
    return oldest


@kernel
def shift_jobs(sim, by):
    """Forget the first jobs, none of which is there any more, and make room for as many that are to come."""
    s = sim.s[0]
    for k in range(s.queued):
        sim.queue[k] -= by
        sim.order[k] -= by
    for k in range(s.running):
        sim.ends[k].job -= by
        sim.dues[k].job -= by
    for i in range(s.stop):
        known = i + by < s.stop
        sim.plan[i].start = sim.plan[i + by].start if known else np.inf
        sim.plan[i].node = sim.plan[i + by].node if known else 0
    s.first, s.arrived, s.episode = s.first + by, s.arrived - by, s.episode + 1
    s.reserved = s.reserved - by if s.reserved >= 0 else -1
    s.gain, s.clear, s.on_track, s.full = 0.0, -np.inf, 1, 1


@entry
def go_on_envs(indices, whole, batch, others, part, past, numbers, plan, obs, mask, went_on):
    """Begin the next episode where the last one ended, unless a job older than its warm-up is still there."""
    for e in indices:
        p, sim = by_reference(problem_of(whole, batch, e)), by_reference(sim_of(batch, e, batch.plan[e]))
        went_on[e] = oldest_job(sim) >= plan.decided
        if not went_on[e]:
            continue
        first, count = batch.s[e].first, batch.s[e].stop
        before, after = whole.groups[first : first + count], whole.groups[first + plan.decided :][:count]
        shift_jobs(sim, plan.decided)
        p = by_reference(problem_of(whole, batch, e))  # its jobs are others now
        other = by_reference(sim_of(others, part, batch.plan[e]))
        if sim.history.shape[0] > 0:
            copy_rows(sim.history, numbers.history)
            number_old(p, before, numbers, True)
            seed_history(sim, p, after, past, numbers)
            number_old(p, before, numbers, False)
        look(sim, p, plan.window)
        begin_episode(sim, p, other, plan)
        observe(sim, p, plan.window, obs[e], mask[e])


@entry
def reset_envs(indices, whole, batch, others, part, past, numbers, plan, obs, mask):
    for e in indices:
        p, sim = by_reference(problem_of(whole, batch, e)), by_reference(sim_of(batch, e, batch.plan[e]))
        other = by_reference(sim_of(others, part, batch.plan[e]))
        first = batch.s[e].first
        if sim.history.shape[0] > 0:
            seed_history(sim, p, whole.groups[first : first + batch.s[e].stop], past, numbers)
        reset_env(sim, p, other, plan)
        if plan.window > 0:
            observe(sim, p, plan.window, obs[e], mask[e])


@entry
def step_envs(low, high, actions, whole, batch, others, part, plan, obs, mask, rewards, terminated, truncated):
    for e in range(low, high):
        p, sim = by_reference(problem_of(whole, batch, e)), by_reference(sim_of(batch, e, batch.plan[e]))
        other = by_reference(sim_of(others, part, batch.plan[e]))
        action = actions[e]
        if action < 0 or action >= mask.shape[1] or not mask[e, action]:
            action = 0  # an illegal action counts as the first legal one
            while action < mask.shape[1] - 1 and not mask[e, action]:
                action += 1
        rewards[e], terminated[e], truncated[e] = step_env(sim, p, other, plan, action)
        if not terminated[e]:
            observe(sim, p, plan.window, obs[e], mask[e])
        else:
            obs[e], mask[e] = 0, False


# ------------------------------------------------------------------------------------ one moment of a real cluster
@kernel
def possible_somewhere(p, i):
    for m in range(p.speed.shape[0]):
        if possible(p, i, m):
            return True
    return False


@entry
def restore(problem, simulation, now, finished, running):
    """Put the simulation where it would be had it lived through it: the first `finished` jobs have ended, in order, the
    next `running` run as the plan says, and the rest waits, but for those that are too large for every node.

    sim.free is at most what the running jobs leave. Of the capacity there stays what is free or due to be: the rest is
    of no use now, nor for a reservation.
    """
    p, sim = by_reference(problem), by_reference(simulation)
    s = sim.s[0]
    s.now, s.full, s.reserved, s.reserved_node, s.rule_job, s.rule_node = now, 1, -1, -1, -1, -1
    s.arrived = s.stop = p.jobs.shape[0]
    for i in range(finished):
        remember(sim, p, i)
    for i in range(finished, finished + running):
        due = sim.plan[i].start + p.jobs[i].requested / p.speed[sim.plan[i].node]
        add_running(sim, i, due, due)
        for r in range(p.demand.shape[1]):
            sim.room[sim.plan[i].node, r] += p.demand[i, r]
    for m in range(p.capacity.shape[0]):
        for r in range(p.capacity.shape[1]):
            sim.free[m, r] = max(0.0, min(sim.free[m, r], p.capacity[m, r] - sim.room[m, r]))
            p.capacity[m, r] = min(p.capacity[m, r], sim.free[m, r] + sim.room[m, r])
    for i in range(finished + running, s.stop):
        if possible_somewhere(p, i):
            enqueue(sim, p, i)


@entry
def observe_moment(problem, simulation, window, obs, mask):
    """Write what an agent sees; whether it has a choice."""
    p, sim = by_reference(problem), by_reference(simulation)
    look(sim, p, window)
    observe(sim, p, window, obs, mask)
    return can_choose(sim, p)


@entry
def look_at_moment(problem, simulation, window):
    look(by_reference(simulation), by_reference(problem), window)


@entry
def act_at_moment(problem, simulation, action):
    """Start or reserve; returns the job and its node."""
    p, sim = by_reference(problem), by_reference(simulation)
    i, m = sim.seen[action // p.speed.shape[0]], action % p.speed.shape[0]
    act(sim, p, i, m)
    return i, m


@entry
def follow_rule(problem, simulation, choices):
    """Let the rule act until it waits for the next event; choices[n] = (job, node). Returns how many there are."""
    p, sim = by_reference(problem), by_reference(simulation)
    n = 0
    while n < choices.shape[0]:
        i, m = rule_decision(sim, p)
        if i < 0:
            break
        act(sim, p, i, m)
        choices[n, 0], choices[n, 1] = i, m
        n += 1
    return n


@entry
def rule_scores(problem, simulation, scores):
    """The scores (lowest first) of the last jobs in the rule's order of heads (tetris has none: as submitted); infinite
    for those that are too large for every node."""
    p, sim = by_reference(problem), by_reference(simulation)
    first = p.jobs.shape[0] - scores.shape[0]
    for k in range(scores.shape[0]):
        i = first + k
        if not possible_somewhere(p, i):
            scores[k] = np.inf
        else:
            scores[k] = head_score(sim, p, i)


# ------------------------------------------------------------------------------------------- from jobs to arrays
@dataclass
class Schedule:
    """Who started when and where: float64[N] start times (seconds) and int[N] nodes of N jobs, in submission order."""

    jobs: Jobs
    cluster: Cluster
    start_time: np.ndarray
    node: np.ndarray
    decisions: int = 0

    @property
    def service_time(self) -> np.ndarray:
        return self.jobs.run_time / self.cluster.speed[self.node]

    @property
    def wait(self) -> np.ndarray:
        return self.start_time - self.jobs.submit_time

    @property
    def latency(self) -> np.ndarray:
        return self.wait + self.service_time

    @property
    def bounded_slowdown(self) -> np.ndarray:
        return np.maximum(1.0, self.latency / np.maximum(self.jobs.run_time, SLOWDOWN_BOUND))

    @property
    def makespan(self) -> float:
        """Seconds from the first submission to the last completion."""
        return float((self.start_time + self.service_time).max() - self.jobs.submit_time.min())

    @property
    def utilization(self) -> float:
        """Work done over capacity, from the first submission to the last completion (mean over resources)."""
        begin = self.jobs.submit_time.min()
        return self.utilization_between(begin, begin + self.makespan)

    def utilization_between(self, begin: float, end: float) -> float:
        """Work done over capacity between two times in seconds (mean over resources)."""
        overlap = np.minimum(self.start_time + self.service_time, end) - np.maximum(self.start_time, begin)
        work = np.maximum(overlap, 0) @ self.jobs.demand
        return float((work / self.cluster.capacity.sum(0)).mean() / (end - begin))

    def metrics(self) -> dict[str, float]:
        """Means of the per-job metrics, the tails of the wait, and the figures of the whole."""
        wait, makespan = self.wait, self.makespan
        median, p95, p99 = np.percentile(wait, (50, 95, 99)).tolist()
        return {
            "latency": float(self.latency.mean()),
            "wait": float(wait.mean()),
            "bounded_slowdown": float(self.bounded_slowdown.mean()),
            "wait_median": median,
            "wait_p95": p95,
            "wait_p99": p99,
            "wait_max": float(wait.max()),
            "utilization": self.utilization,
            "throughput": len(self.jobs) / makespan,
            "makespan": makespan,
        }


def job_size(jobs: Jobs, cluster: Cluster) -> np.ndarray:
    """float64[N]: processors; with several resources, the dominant share of the cluster in units of the first one."""
    total = cluster.capacity.sum(0)
    return (jobs.demand / total).max(1) * total[0] if len(total) > 1 else jobs.demand[:, 0]


def _groups(jobs: Jobs) -> np.ndarray:
    """int32[N, 3]: the groups whose history a job belongs to (user; + requested time; + size and executable)."""
    user = jobs.user.astype(np.int64)
    columns, offset = [], 0
    for keys in (
        (user,),
        (user, jobs.requested_time),
        (user, *jobs.demand.T, jobs.executable),
    ):
        _, group = np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)
        columns.append(np.where(user >= 0, group.ravel() + offset, -1))
        offset += int(group.max()) + 1
    return np.stack(columns, axis=1).astype(np.int32)


def _past(jobs: Jobs, groups: np.ndarray) -> Past:
    """What each group had run, in order of the recorded ends (where no wait was recorded: submit + run)."""
    end = np.repeat(jobs.submit_time + jobs.wait_time + jobs.run_time, groups.shape[1])
    group, run = groups.ravel(), np.repeat(jobs.run_time, groups.shape[1])
    order = np.lexsort((end, group))
    order = order[group[order] >= 0]
    offset = np.searchsorted(group[order], np.arange(groups.max(initial=-1) + 2))
    return Past(offset, end[order], run[order])


def uses_history(rule: Rule) -> bool:
    """Whether the rule looks at what the users' jobs took that have finished."""
    estimates = np.array(rule.weights[:NODE_WEIGHTS]).reshape(-1, TERM_COUNT)[:, TERMS.index("estimate")]
    return bool({rule.head, rule.backfill} & {SJF_HISTORY, SAF_HISTORY}) or bool(estimates.any())


def _recorded(jobs: Jobs) -> np.ndarray:
    """float64[N]: what `estimate` would have been when each job was submitted, by the ends that the trace recorded."""
    users = _groups(jobs)[:, :1]
    past, group = _past(jobs, users), users[:, 0]
    estimates = np.maximum(jobs.requested_time, 0.0)
    for g in range(len(past.offset) - 1):
        mine, run = np.flatnonzero(group == g), past.run[past.offset[g] : past.offset[g + 1]]
        known = np.searchsorted(past.end[past.offset[g] : past.offset[g + 1]], jobs.submit_time[mine], side="right")
        mine, known = mine[known >= 2], known[known >= 2]
        estimates[mine] = np.minimum(estimates[mine], 0.5 * (run[known - 1] + run[known - 2]))
    return estimates


def _problem(
    jobs: Jobs,
    cluster: Cluster,
    groups: np.ndarray,
    rule: Rule,
    *,
    objective: str = "latency",
    backfill: str = "easy",
    lock_in: bool = False,
    scores: np.ndarray | None = None,
    recorded: np.ndarray | None = None,
) -> Problem:
    size = job_size(jobs, cluster)
    unit = 1.0 / cluster.capacity.max(0)
    requested = np.maximum(jobs.requested_time, 0.0)  # -1 in some published sequences
    features = np.ones((len(jobs), STATIC_FEATURES + jobs.demand.shape[1]), np.float32)
    features[:, REQUESTED], features[:, SIZE] = np.log1p(requested) / 12, np.log2(1 + size) / 10
    features[:, AREA], features[:, STATIC_FEATURES:] = np.log1p(requested * size) / 20, jobs.demand * unit
    table = np.empty(len(jobs), JOB)
    table["submit"], table["run"], table["requested"] = jobs.submit_time, jobs.run_time, jobs.requested_time
    table["size"], table["head_score"] = size, static_score(rule.head, jobs, size) if scores is None else scores
    table["backfill_score"] = static_score(rule.backfill, jobs, size) if scores is None else scores
    table["log_requested"] = np.log1p(requested / 60)
    table["log_size"] = np.log1p(256 * size / cluster.capacity[:, 0].sum())
    table["recorded"] = requested if recorded is None else recorded
    return Problem(
        table, np.ascontiguousarray(jobs.demand), features, groups,
        cluster.capacity, cluster.speed, unit, float(cluster.speed.max()), float(cluster.capacity[:, 0].sum()),
        rule.head, rule.backfill, rule.mode, rule.nodes, np.array(rule.weights), rule.patience,
        rule.head == rule.backfill and rule.head <= STATIC,
        recorded is not None, OBJECTIVES[objective], backfill == "easy", lock_in,
    )  # fmt: skip


class _Simulator:
    """The arrays of a workload and of `count` simulations over it, in the form that the kernels take."""

    def __init__(
        self,
        workload: Workload,
        rule: Rule,
        count: int,
        length: int,
        *,
        threads: int = 1,
        objective: str = "latency",
        backfill: str = "easy",
        lock_in: bool = False,
        history: bool = True,
        recorded: bool = False,
        scores: np.ndarray | None = None,
    ) -> None:
        jobs, cluster = workload.jobs, workload.cluster
        _check(jobs, cluster)
        jobs = replace(jobs, demand=np.rint(jobs.demand / cluster.grid) * cluster.grid)
        cluster = replace(cluster.on_grid, speed=np.asarray(cluster.speed, float))
        self.jobs, self.cluster, self.length = jobs, cluster, length
        if lock_in and rule.head == TETRIS:
            raise ValueError("tetris has no order of jobs, which lock_in needs; use another rule")
        self.rule_uses_history = uses_history(rule) and not recorded
        history = history or self.rule_uses_history
        groups = _groups(jobs) if history else np.full((len(jobs), 3), -1, np.int32)
        self.past = _past(jobs, groups) if history else Past(np.zeros(1, np.int64), np.zeros(0), np.zeros(0))
        self.whole = _problem(
            jobs, cluster, groups, rule, objective=objective, backfill=backfill, lock_in=lock_in, scores=scores,
            recorded=_recorded(jobs) if recorded and uses_history(rule) else None,
        )  # fmt: skip
        self.batch = self._allocate(count, length, 3 * length if history else 0)
        self.batch.s["stop"] = length
        parts = max(threads, min(4 * threads, count // 64)) if threads > 1 else 1  # who is done early takes the next
        self._others = self._allocate(parts, length, 3 * length if self.rule_uses_history else 0)
        unknown = np.full(len(self.past.offset), -1)
        rows = self.batch.history.shape[1:]
        self._numbers = [Numbers(unknown.copy(), unknown.copy(), np.zeros(rows)) for _ in range(parts)]
        self._bounds = np.linspace(0, count, parts + 1).astype(int)
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def reset(self, indices: np.ndarray, plan: Plan, obs: np.ndarray, mask: np.ndarray) -> None:
        """Start the simulations `indices` at their `first` jobs; plan.window 0: the rule schedules all their jobs."""

        def work(part: int, low: int, high: int) -> None:
            mine = indices[(indices >= low) & (indices < high)]
            numbers = self._numbers[part]
            reset_envs(mine, self.whole, self.batch, self._others, part, self.past, numbers, plan, obs, mask)

        self._parallel(work)

    def go_on(self, indices: np.ndarray, plan: Plan, obs: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Begin the next episode where the last one ended; returns the simulations in which that was possible."""
        went_on = np.zeros(len(self.batch.s), bool)

        def work(part: int, low: int, high: int) -> None:
            mine = indices[(indices >= low) & (indices < high)]
            numbers = self._numbers[part]
            go_on_envs(mine, self.whole, self.batch, self._others, part, self.past, numbers, plan, obs, mask, went_on)

        self._parallel(work)
        return np.flatnonzero(went_on)

    def step(self, actions: np.ndarray, plan: Plan, obs: np.ndarray, mask: np.ndarray, *out: np.ndarray) -> None:
        """Take an action in every simulation; `out`: rewards, terminated, truncated."""

        def work(part: int, low: int, high: int) -> None:
            step_envs(low, high, actions, self.whole, self.batch, self._others, part, plan, obs, mask, *out)

        self._parallel(work)

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()

    def _parallel(self, work: Callable[[int, int, int], None]) -> None:
        """work(part, low, high) over the simulations, parts side by side (the kernels release the GIL)."""
        with _compiling():
            parts = list(zip(range(len(self._numbers)), self._bounds[:-1], self._bounds[1:], strict=True))
            if self._pool:
                list(self._pool.map(lambda part: work(*part), parts))
            else:
                work(*parts[0])

    def _allocate(self, count: int, length: int, groups: int) -> Any:
        """`count` states for episodes of at most `length` jobs, with histories of `groups` groups."""
        nodes, resources = self.cluster.capacity.shape

        def empty(*shape: int, dtype: type = np.float64) -> np.ndarray:
            return np.zeros((count, *shape), dtype)

        return Batch(
            np.zeros(count, SCALARS),
            empty(length, dtype=np.int64),
            empty(length, dtype=np.int64),
            empty(length, dtype=np.int64),
            empty(length),
            empty(length),
            empty(length, dtype=TIMED),
            empty(length, dtype=TIMED),
            empty(nodes, resources),
            empty(resources),
            empty(resources),
            empty(nodes, resources),
            empty(groups, 4),
            empty(length, dtype=START),
            np.full((count, length, 3), -1, np.int32),  # of no group: so it stays where the rule uses no history
        )

    def schedule(self, e: int, first: int = 0, last: int | None = None) -> Schedule:
        """What simulation e did, or plans to do, with its jobs first..last."""
        s = self.batch.s[e]
        last = s["stop"] if last is None else last
        plan, jobs = self.batch.plan[e, first:last], self.jobs[s["first"] + first : s["first"] + last]
        return Schedule(jobs, self.cluster, plan["start"].copy(), plan["node"].copy(), int(s["decisions"]))


Batch = namedtuple("Batch", (*Sim._fields, "groups"))


def _check(jobs: Jobs, cluster: Cluster) -> None:
    if len(jobs) == 0:
        raise ValueError("the workload has no jobs")
    if not (np.isfinite(jobs.submit_time).all() and (jobs.run_time > 0).all()):
        raise ValueError("the workload has a submit time that is not finite or a run time that is not positive")
    if (jobs.requested_time == 0).any() or not (jobs.demand >= 0).all():  # -1 s: unknown, in published sequences
        raise ValueError("the workload has a job that requests 0 seconds or less than nothing of a resource")
    fitting = np.zeros(len(jobs), bool)
    for capacity in cluster.capacity:
        fitting |= (jobs.demand <= capacity).all(1)
    if not fitting.all():
        i = int(np.argmin(fitting))
        raise ValueError(
            f"job {jobs.job_id[i]} asks for {jobs.demand[i].tolist()}, more than any node of the cluster has"
        )


class Replay:
    """Segments of a workload, replayed again and again under a rule, from an empty machine each.

    Args:
        workload, rule, segments, backfill, lock_in, scores, threads: as of `simulate`.
    """

    def __init__(
        self,
        workload: Workload,
        rule: str | Rule,
        segments: np.ndarray | None = None,
        *,
        backfill: str = "easy",
        lock_in: bool = False,
        scores: np.ndarray | None = None,
        threads: int = 1,
    ) -> None:
        rule = parse_rule(rule) if isinstance(rule, str) else rule
        segments = workload.segments if segments is None else np.asarray(segments)
        lengths = segments[:, 1] - segments[:, 0]
        self._core = _Simulator(
            workload, rule, len(segments), int(lengths.max()), threads=min(threads, len(segments)),
            backfill=backfill, lock_in=lock_in, history=False, scores=scores,
        )  # fmt: skip
        self._core.batch.s["first"], self._core.batch.s["stop"] = segments[:, 0], lengths

    def __call__(self, which: np.ndarray | None = None, weights: np.ndarray | None = None) -> list[Schedule]:
        """The schedules of the segments int[W] (None: all), a tuned rule having other weights from now on."""
        if weights is not None:
            self._core.whole.weights[:] = weights
        which = np.arange(len(self._core.batch.s)) if which is None else which
        nothing = np.zeros((len(self._core.batch.s), 0), np.float32)
        plan = Plan(0, self._core.length, 0, 0, False, True)
        self._core.reset(which, plan, nothing, nothing.astype(bool))
        return [self._core.schedule(e) for e in which]


def simulate(
    workload: Workload,
    rule: str | Rule,
    segments: np.ndarray | None = None,
    *,
    backfill: str = "easy",
    lock_in: bool = False,
    scores: np.ndarray | None = None,
    threads: int = 1,
) -> list[Schedule]:
    """Replay the workload's segments, or others (int[S, 2] ranges of its jobs), from an empty machine under a rule.

    Args:
        lock_in: RLScheduler's semantics, in which `backfill` ("none" or "easy") decides and the rule gives the order.
        scores: float64[N] for rules whose order is STATIC (lowest first).
        threads: the segments are shared out among so many.
    """
    return Replay(workload, rule, segments, backfill=backfill, lock_in=lock_in, scores=scores, threads=threads)()


@dataclass(frozen=True)
class ClusterState:
    """A cluster at one moment. Demands are in the units of its capacity; all times have one origin.

    Run times of jobs that have not finished are not looked at. Jobs in `queued` and `running` may be in any order;
    equal submit times count in the order given.
    """

    now: float
    cluster: Cluster
    queued: Jobs
    running: Jobs
    start_time: np.ndarray  # float64[running]
    node: np.ndarray  # int[running], their nodes
    finished: Jobs | None = None  # in order of their ends: what is known of their users; the last two of a kind suffice
    free: np.ndarray | None = None  # float64[M, R]; None: what the running jobs leave; less: not in use for now


class Moment:
    """A `ClusterState` in the form that the kernels take, and what a rule or an agent would do there.

    Jobs in `queued` have the same numbers as in the state, here in everything that is returned.
    """

    def __init__(self, state: ClusterState, rule: Rule, backfill: str = "easy") -> None:
        cluster, grid = state.cluster.on_grid, state.cluster.grid
        parts = (
            [state.running, state.queued] if state.finished is None else [state.finished, state.running, state.queued]
        )
        finished = 0 if state.finished is None else len(state.finished)
        ordered = [np.argsort(part.submit_time, kind="stable") for part in parts[-2:]]
        self.numbers, self._first = ordered[1], finished + len(ordered[0])
        order = np.concatenate([np.arange(finished), finished + ordered[0], self._first + ordered[1]])

        def joined(field: str) -> np.ndarray:
            return np.concatenate([getattr(part, field) for part in parts])[order]

        requested, unknown = joined("requested_time"), order  # what no rule or agent looks at: any numbers
        run_time = joined("run_time") if finished else requested
        user, executable = (joined("user"), joined("executable")) if finished else (unknown, unknown)
        demand = np.rint(joined("demand") / grid) * grid
        jobs = Jobs(
            joined("submit_time"), run_time, requested, demand, user, unknown, executable, unknown, unknown, unknown
        )
        groups = _groups(jobs) if finished else np.full((len(jobs), 3), -1, np.int32)
        count, (nodes, resources) = len(jobs), cluster.capacity.shape
        plan = np.zeros(count, START)
        plan["start"] = np.inf
        running = slice(finished, self._first)
        plan["start"][running], plan["node"][running] = state.start_time[ordered[0]], state.node[ordered[0]]
        free = np.full_like(cluster.capacity, np.inf) if state.free is None else np.rint(state.free / grid) * grid
        problem = _problem(jobs, cluster, groups, rule, backfill=backfill)
        self.problem = problem._replace(capacity=cluster.capacity.copy())
        self.sim = Sim(
            np.zeros(1, SCALARS), *np.zeros((3, count), np.int64), *np.zeros((2, count)), np.zeros(count, TIMED),
            np.zeros(count, TIMED), free, np.zeros(resources), np.zeros(resources), np.zeros((nodes, resources)),
            np.zeros((int(groups.max(initial=-1)) + 1, 4)), plan,
        )  # fmt: skip
        with _compiling():
            restore(self.problem, self.sim, float(state.now), finished, len(state.running))

    @property
    def reserved(self) -> tuple[int, int, float] | None:
        """The job that a node is reserved for, that node, and the job's shadow time."""
        s = self.sim.s[0]
        return (
            (self._number(s["reserved"]), int(s["reserved_node"]), float(s["shadow"])) if s["reserved"] >= 0 else None
        )

    def observe(self, layout: Layout) -> tuple[np.ndarray, bool]:
        """The observation float32[D], and whether some visible job may start now."""
        obs, mask = np.empty(layout.size, np.float32), np.empty(layout.actions, bool)
        return obs, observe_moment(self.problem, self.sim, layout.window, obs, mask)

    def act(self, action: int) -> tuple[int, int]:
        """Take a legal action other than to wait: the job and node that it starts or, if it does not fit, reserves."""
        job, node = act_at_moment(self.problem, self.sim, action)
        return self._number(job), node

    def follow_rule(self) -> list[tuple[int, int]]:
        """Do what the rule does now: the jobs and nodes, in order, that it starts or reserves."""
        choices = np.empty((len(self.numbers) + 1, 2), np.int64)
        count = follow_rule(self.problem, self.sim, choices)
        return [(self._number(job), int(node)) for job, node in choices[:count]]

    def visible(self, window: int) -> np.ndarray:
        """int64[...]: the jobs in the window of an agent, in the order of its actions."""
        look_at_moment(self.problem, self.sim, window)
        return self.numbers[self.sim.seen[: self.sim.s[0]["visible"]] - self._first]

    def rule_order(self) -> np.ndarray:
        """int64[Q]: all queued jobs in the rule's order of heads; those that are too large for every node last."""
        scores = np.empty(len(self.numbers))
        rule_scores(self.problem, self.sim, scores)
        return self.numbers[np.argsort(scores, kind="stable")]

    def _number(self, job: int) -> int:
        return int(self.numbers[job - self._first])


class _compiling:
    """Say so when the kernels are being compiled, that is when the first call takes more than a moment."""

    warm = False

    def __enter__(self) -> None:
        self.timer = None
        if not _compiling.warm:
            text = "Compiling the simulator (once, about ten seconds; then cached) ..."
            self.timer = threading.Timer(1.0, print, (text,), {"file": sys.stderr, "flush": True})
            self.timer.start()

    def __exit__(self, *_: object) -> None:
        _compiling.warm = True
        if self.timer:
            self.timer.cancel()


# --------------------------------------------------------------------------------------------- the environments
class Observation(NamedTuple):
    """The parts of an observation: jobs[..., K, Fj], nodes[..., M, Fn], cluster[..., Fc], mask[..., K*M + 1]."""

    jobs: Any
    nodes: Any
    cluster: Any
    mask: Any


@dataclass(frozen=True)
class Layout:
    """How a flat observation is laid out: K visible jobs, M nodes, R resources."""

    window: int
    nodes: int
    resources: int

    @property
    def actions(self) -> int:
        return self.window * self.nodes + 1

    @property
    def size(self) -> int:
        jobs, nodes = self.window * (JOB_WIDTH + self.resources), self.nodes * (NODE_WIDTH + 2 * self.resources)
        return jobs + nodes + CLUSTER_WIDTH + self.actions

    def split(self, obs: Any) -> Observation:
        """Views of an observation [..., D], an array or a tensor."""
        job_width, node_width = JOB_WIDTH + self.resources, NODE_WIDTH + 2 * self.resources
        a = self.window * job_width
        b = a + self.nodes * node_width
        c = b + CLUSTER_WIDTH
        jobs = obs[..., :a].reshape(*obs.shape[:-1], self.window, job_width)
        nodes = obs[..., a:b].reshape(*obs.shape[:-1], self.nodes, node_width)
        return Observation(jobs, nodes, obs[..., b:c], obs[..., c:])


class SchedulerVectorEnv(VectorEnv):
    """`num_envs` clusters, each with jobs of its own, stepped together.

    An episode is cut out of running operation: the reference rule schedules `warmup_jobs`, the agent decides while
    `num_jobs` more arrive, and the reference takes over through `followup_jobs` more (0: the agent goes on until all
    have started). Action k*M + m starts job k of the window on node m or, where it does not fit, reserves the node
    for it; K*M waits for the next event. An action that the mask forbids counts as the first one that it allows.

    Args:
        workload: a preset's name, the path of a trace, or a Workload.
        queue_window: K, how many queued jobs the agent sees: all or, where there are more, the oldest for one half and
            the first in the reference's order for the other.
        backfill: "easy", or "none": a reservation blocks until the next event.
        objective: "latency", "wait", "slowdown" or "tail" (squares of the waits: long ones count for more).
        reward: "improvement": what the choice gained over the reference rule, relative to its cost in the episode, by
            simulating the rule to the end (potential-based shaping, Ng, Harada & Russell 1999, with Bertsekas'
            roll-out as potential); "cost": minus the cost that accrued, per job.
        reference: the rule; `simulate` knows the same ones.
        lock_in: RLScheduler's semantics, in which a chosen job holds the queue until it has started.
        split: "train", "validation", "test" or "all".
        num_threads: default: one a core, if each has 8 environments or more.
        episodes_in_a_row: so many follow each other on one cluster, each beginning with the backlog that the agent left
            in the one before it, instead of one that the reference leaves after a warm-up. A row ends early with the
            workload's segment, or where a job is still there that is older than the last `warmup_jobs`.
        full_rollouts: never stop a roll-out early, where it meets the known trajectory (slower, the same rewards).
        recorded_history: a reference that looks at the history of users takes, for each job, what the trace says was
            known when it was submitted, not what has finished in the simulation: roll-outs can then stop early.

    Observations, masks and rewards are written into the same buffers at every step; copy what you keep. Sub-environment
    i draws its episodes from seed + i alone, so they do not depend on `num_envs` or `num_threads`.

    Raises:
        ValueError: an argument makes no sense, or the split has fewer jobs in a row than an episode needs.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (Gymnasium's own spelling)
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        workload: str | Workload = "cloud",
        *,
        num_jobs: int = 512,
        warmup_jobs: int = 256,
        followup_jobs: int = 512,
        queue_window: int = 64,
        backfill: str = "easy",
        objective: str = "latency",
        reward: str = "improvement",
        reference: str = "easy-sjf",
        lock_in: bool = False,
        split: str = "train",
        episodes_in_a_row: int = 1,
        num_threads: int | None = None,
        full_rollouts: bool = False,
        recorded_history: bool = False,
        render_mode: str | None = None,
    ) -> None:
        for name, value, least in (
            ("num_envs", num_envs, 1), ("queue_window", queue_window, 1), ("num_jobs", num_jobs, 1),
            ("warmup_jobs", warmup_jobs, 0), ("followup_jobs", followup_jobs, 0),
            ("num_threads", 1 if num_threads is None else num_threads, 1), ("episodes_in_a_row", episodes_in_a_row, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        for name, value, known in (
            ("backfill", backfill, ("easy", "none")), ("objective", objective, OBJECTIVES),
            ("reward", reward, ("improvement", "cost")),
            ("render_mode", render_mode or "ansi", ("ansi", "rgb_array")),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} is {value!r}; use one of {', '.join(known)}")
        self.workload = load_workload(workload, split) if isinstance(workload, str) else workload
        self.length = warmup_jobs + num_jobs + followup_jobs
        spare = self.workload.segments[:, 1] - self.workload.segments[:, 0] - self.length + 1
        if spare.max() < 1:
            raise ValueError(
                f"{self.workload.name}: an episode needs {self.length} jobs in a row (warm-up, own and follow-up), "
                f"and this split has {spare.max() - 1 + self.length}; lower num_jobs, warmup_jobs or followup_jobs"
            )
        self._places = np.maximum(spare, 0).cumsum()
        self.num_envs, self.render_mode, self.num_jobs, self.warmup_jobs = num_envs, render_mode, num_jobs, warmup_jobs
        self.episodes_in_a_row = episodes_in_a_row
        nodes, resources = self.workload.cluster.capacity.shape
        self.layout = Layout(queue_window, nodes, resources)
        self.split = self.layout.split
        rule = parse_rule(reference)
        threads = num_threads or max(1, min(os.cpu_count() or 1, num_envs // 8))
        self._core = _Simulator(
            self.workload, rule, num_envs, self.length, threads=min(threads, num_envs),
            objective=objective, backfill=backfill, lock_in=lock_in, recorded=recorded_history,
        )  # fmt: skip
        full = full_rollouts or lock_in or self._core.rule_uses_history or reward == "cost"
        self._plan = Plan(queue_window, warmup_jobs, num_jobs, followup_jobs, reward == "improvement", full)
        self._obs = np.zeros((num_envs, self.layout.size), np.float32)
        self._mask = np.zeros((num_envs, self.layout.actions), bool)
        self._rewards = np.zeros(num_envs)
        self._terminated, self._truncated = np.zeros(num_envs, bool), np.zeros(num_envs, bool)
        self._generators: list[np.random.Generator] | None = None
        self.single_observation_space = gym.spaces.Box(0, 16, (self.layout.size,), np.float32)
        self.single_action_space = gym.spaces.Discrete(self.layout.actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start new episodes; options={"first": ints[num_envs]} says at which jobs of the workload."""
        if seed is not None or self._generators is None:
            seeds = (
                [None if seed is None else seed + i for i in range(self.num_envs)]
                if not isinstance(seed, list)
                else seed
            )
            self._generators = [np.random.default_rng(s) for s in seeds]
        first = (options or {}).get("first")
        if first is not None:
            outside = ~self._in_one_segment(np.asarray(first), self.length)
            if outside.any():
                job = np.asarray(first)[outside][0]
                raise ValueError(f"first is {job}; no segment of the workload has {self.length} jobs from there on")
        self._reset(np.arange(self.num_envs), first)
        return self._obs, {"action_mask": self._mask}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One decision in every environment. Those that end are reset: see `final_obs`, `final_info` and
        `final_schedule` (a Schedule of all the jobs) in the infos.

        Raises:
            ValueError: there is not one action for each environment.
        """
        self._step(actions)
        infos: dict[str, Any] = {}
        done = np.flatnonzero(self._terminated | self._truncated)
        if len(done):
            for e in done:
                final = {"final_obs": self._obs[e].copy(), "final_info": self._final_info(e)}
                final["final_schedule"] = self.schedule(e)
                infos = self._add_info(infos, final, e)
            self._reset(np.setdiff1d(done, self._go_on(done)))
        infos["action_mask"] = self._mask
        return self._obs, self._rewards.copy(), self._terminated.copy(), self._truncated.copy(), infos

    @property
    def observations(self) -> np.ndarray:
        """float32[num_envs, D]: the current ones (the buffer that `reset` and `step` return)."""
        return self._obs

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on from here as if never interrupted. Not a copy: what has to
        outlive the next step is saved, or copied (`copy.deepcopy`)."""
        names = ("_obs", "_mask", "_generators")
        return {"batch": self._core.batch._asdict(), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where an environment with the same arguments was when it gave its `state_dict`."""
        for name, array in state["batch"].items():
            getattr(self._core.batch, name)[...] = array
        self._obs[...], self._mask[...] = state["_obs"], state["_mask"]
        self._generators = deepcopy(state["_generators"])

    def action_masks(self) -> np.ndarray:
        """bool[num_envs, K*M + 1]: the legal actions (where sb3-contrib looks for them)."""
        return self._mask

    def rule_actions(self) -> np.ndarray:
        """int64[num_envs]: what the reference rule would do; the first legal action where that is out of sight."""
        s = self._core.batch.s
        actions = np.full(self.num_envs, self.layout.actions - 1)
        for e in np.flatnonzero(s["rule_job"] >= 0):
            seen = np.flatnonzero(self._core.batch.seen[e, : s["visible"][e]] == s["rule_job"][e])
            actions[e] = seen[0] * self.layout.nodes + s["rule_node"][e] if len(seen) else self._mask[e].argmax()
        return np.where(self._mask[np.arange(self.num_envs), actions], actions, self._mask.argmax(1))

    def schedule(self, e: int = 0) -> Schedule:
        """What environment e did and, for jobs that have not started, what the reference is about to do (with rewards
        by cost nobody knows: their start is inf)."""
        return self._core.schedule(e)

    def render(self) -> tuple[Any, ...] | None:
        """One text or image uint8[H, W, 3] an environment, as `render_mode` says."""
        if self.render_mode is None:
            return None
        draw = self._text if self.render_mode == "ansi" else self._image
        return tuple(draw(e) for e in range(self.num_envs))

    def close_extras(self, **_: Any) -> None:
        self._core.close()

    def _reset(self, indices: np.ndarray, first: Any = None) -> None:
        if first is None:
            first = [self._draw(self._generators[e]) for e in indices]
        self._core.batch.s["first"][indices] = first
        self._core.reset(indices, self._plan, self._obs, self._mask)

    def _go_on(self, done: np.ndarray) -> np.ndarray:
        """Begin the next episodes of rows that are not over; returns whose."""
        s = self._core.batch.s[done]
        more = self._truncated[done] & (s["episode"] < self.episodes_in_a_row)
        more &= self._in_one_segment(s["first"], self.num_jobs + self.length)
        return self._core.go_on(done[more], self._plan, self._obs, self._mask) if more.any() else done[more]

    def _in_one_segment(self, first: np.ndarray, count: int) -> np.ndarray:
        """bool[N]: whether so many jobs from first[N] on are of one segment."""
        begin, end = self.workload.segments.T
        return ((begin <= first[:, None]) & (first[:, None] + count <= end)).any(1)

    def _draw(self, generator: np.random.Generator) -> int:
        """The first job of a random episode: all places in all segments are as likely."""
        place = int(generator.integers(self._places[-1]))
        segment = int(np.searchsorted(self._places, place, side="right"))
        return int(self.workload.segments[segment, 0]) + place - (int(self._places[segment - 1]) if segment else 0)

    def _step(self, actions: np.ndarray) -> None:
        actions = np.asarray(actions, np.int64)
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions of shape {actions.shape}; give one for each of the {self.num_envs} environments")
        out = self._rewards, self._terminated, self._truncated
        self._core.step(actions, self._plan, self._obs, self._mask, *out)

    def _final_info(self, e: int) -> dict[str, Any]:
        """Of the agent's jobs; the utilization is the machine's while it decided, whoever's jobs it ran."""
        whole = self._core.schedule(e)
        own = self._core.schedule(e, self.warmup_jobs, self.warmup_jobs + self.num_jobs)
        s, begin = self._core.batch.s[e], own.jobs.submit_time[0]
        end = max(s["now"], begin + 1.0)  # it may all have been one instant
        return {
            **own.metrics(),
            "utilization": whole.utilization_between(begin, end),
            "return": float(s["returned"]),
            "decisions": int(s["decisions"]),
            "first_job": int(s["first"]),
        }

    def _started(self, e: int) -> Schedule:
        """The jobs that have started by now."""
        s, schedule = self._core.batch.s[e], self._core.schedule(e)
        started = np.setdiff1d(np.arange(s["arrived"]), self._core.batch.queue[e, : s["queued"]])
        return Schedule(schedule.jobs[started], schedule.cluster, schedule.start_time[started], schedule.node[started])

    def _text(self, e: int) -> str:
        batch, cluster = self._core.batch, self.workload.cluster
        s, jobs = batch.s[e], self._core.jobs
        lines = [f"t = {s['now']:,.0f} s   {s['running']} running   {s['queued']} queued   {s['decisions']} decisions"]
        for m, (free, capacity) in enumerate(zip(batch.free[e], cluster.capacity, strict=True)):
            used = [
                f"{name} {'#' * round(20 * share):.<20} {share:4.0%}"
                for name, share in zip(cluster.resources, 1 - free / np.maximum(capacity, 1e-9), strict=True)
            ]
            reserved = (
                f"   reserved for job {s['reserved']} at {s['shadow']:,.0f} s"
                if s["reserved_node"] == m and s["reserved"] >= 0
                else ""
            )
            lines.append(f"node {m:3d} (x{cluster.speed[m]:.2f})  " + "   ".join(used) + reserved)
        for i in batch.queue[e, : min(10, s["queued"])]:
            j = s["first"] + i
            asks = ", ".join(f"{d:g} {name}" for d, name in zip(jobs.demand[j], cluster.resources, strict=True))
            wait = s["now"] - jobs.submit_time[j]
            lines.append(f"job {i:5d}  waits {wait:9,.0f} s  asks {asks} for {jobs.requested_time[j]:,.0f} s")
        return "\n".join(lines)

    def _image(self, e: int) -> np.ndarray:
        s = self._core.batch.s[e]
        queue = self._core.jobs[s["first"] + self._core.batch.queue[e, : s["queued"]].astype(int)]
        return gantt(self._started(e), s["now"], queue)


class SchedulerEnv(gym.Env):
    """One cluster; arguments, observations and actions as in `SchedulerVectorEnv`. Every `reset` draws a new episode:
    with `episodes_in_a_row` nothing is different here."""

    metadata: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012

    def __init__(self, workload: str | Workload = "cloud", **kwargs: Any) -> None:
        self.envs = SchedulerVectorEnv(1, workload, **kwargs)
        self.render_mode = self.envs.render_mode
        self.observation_space, self.action_space = self.envs.single_observation_space, self.envs.single_action_space
        self.layout, self.split = self.envs.layout, self.envs.split

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.envs.reset(seed=seed, options=options)
        return self.envs._obs[0].copy(), {"action_mask": self.action_masks()}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        envs = self.envs
        envs._step(np.array([action]))
        terminated, truncated = bool(envs._terminated[0]), bool(envs._truncated[0])
        info = {"action_mask": self.action_masks()}
        if terminated or truncated:
            info |= envs._final_info(0)
        return envs._obs[0].copy(), float(envs._rewards[0]), terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """bool[K*M + 1]: the legal actions."""
        return self.envs._mask[0].copy()

    def render(self) -> Any:
        frames = self.envs.render()
        return frames[0] if frames else None


def gantt(schedule: Schedule, now: float, queue: Jobs | None = None, rows: int = 256, columns: int = 640) -> np.ndarray:
    """uint8[rows, columns, 3]: a Gantt chart (see `gantt_chart`) of what runs where around `now`, queue at the right.

    A job's colour is its user's. The window of time ends a quarter after `now` (the black line); the part of a job to
    the right of it is what was requested. The bars of the queue tell requested times.
    """
    image = np.full((rows, columns, 3), 255, np.uint8)
    chart = int(columns * 0.8)
    begin = min(schedule.jobs.submit_time[-64:].min(initial=now), now - 1.0)
    end = schedule.start_time + schedule.service_time
    due = schedule.start_time + schedule.jobs.requested_time / schedule.cluster.speed[schedule.node]
    until = np.where(end > now, np.maximum(due, now), end)
    palette = np.random.default_rng(1).integers(60, 230, (64, 3)).astype(np.uint8)
    colours = palette[schedule.jobs.user % 64]
    image[:, :chart] = gantt_chart(schedule, begin, now + (now - begin) / 4, colours, rows, chart, until)
    image[:, int(0.8 * chart)] = 0
    image[:, chart + 2 : chart + 4] = 128
    if queue is not None and len(queue):
        asked = np.log1p(queue.requested_time) / np.log1p(queue.requested_time.max())
        height = max(rows // max(len(queue), 32), 1)
        for k in range(min(len(queue), rows // height)):
            width = max(1, int(asked[k] * (columns - chart - 6)))
            image[k * height : (k + 1) * height - (height > 2), chart + 6 : chart + 6 + width] = palette[
                queue.user[k] % 64
            ]
    return image


def gantt_chart(
    schedule: Schedule,
    begin: float,
    end: float,
    colours: np.ndarray,
    rows: int = 256,
    columns: int = 640,
    until: np.ndarray | None = None,
) -> np.ndarray:
    """uint8[rows, columns, 3]: what runs where between two times; time runs to the right, each node is a band of rows.

    A job is a rectangle, in one piece where there is room, whose height is its dominant share of the node.

    Args:
        colours: uint8[N, 3], a colour a job.
        until: float64[N], where the rectangles end, by default where the jobs do.
    """
    image = np.full((rows, columns, 3), 255, np.uint8)
    capacity, nodes = schedule.cluster.capacity, len(schedule.cluster.speed)
    lanes = int(np.clip(capacity.max(), 1, 1024))  # of a node: its processors, if those are what it has
    edge = (np.arange(nodes * lanes + 1) * rows / (nodes * lanes)).astype(int)  # the row at which a lane begins
    share = (schedule.jobs.demand / np.maximum(capacity[schedule.node], 1e-9)).max(1)
    stop = schedule.start_time + schedule.service_time
    left, right = (
        (np.clip((t - begin) / (end - begin), 0, 1) * columns).astype(int)
        for t in (schedule.start_time, stop if until is None else until)
    )
    free_at = np.full((nodes, lanes), -np.inf)
    for i in np.argsort(schedule.start_time, kind="stable"):
        free = np.flatnonzero(free_at[schedule.node[i]] <= schedule.start_time[i])
        need = max(1, round(share[i] * lanes))
        holes = [hole for hole in np.split(free, np.flatnonzero(np.diff(free) > 1) + 1) if len(hole) >= need]
        used = (min(holes, key=len) if holes else free)[:need]
        free_at[schedule.node[i], used] = stop[i]
        if left[i] == columns or right[i] == 0 or len(used) == 0:
            continue
        for piece in np.split(used, np.flatnonzero(np.diff(used) > 1) + 1):
            top, bottom = edge[schedule.node[i] * lanes + piece[[0, -1]] + [0, 1]]
            box = image[top : max(bottom, top + 1), left[i] : max(right[i], left[i] + 2)]
            box[:] = 255
            box[: max(1, box.shape[0] - 1), : max(1, box.shape[1] - 1)] = colours[i]
    return image


if "ResourceRL/Scheduler-v0" not in gym.registry:
    gym.register(
        "ResourceRL/Scheduler-v0",
        entry_point="scheduler_env:SchedulerEnv",
        vector_entry_point="scheduler_env:SchedulerVectorEnv",
    )
