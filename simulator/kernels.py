"""Everything that Numba compiles: the state of a simulation, its events, what a rule decides, roll-outs, observations.

One file, because Numba's cache does not see other files: a constant that a kernel reads from elsewhere would stay what
it was when the kernel was compiled. So the codes of rules and the widths of observations are defined here, too.

The file reads downwards: pointers to states, codes, the state of a simulation, its queue and running jobs, events, what
a rule decides, RLScheduler's lock-in, roll-outs, observations, episodes, one moment of a real cluster. Functions marked
``@kernel`` are called by others of this file, those marked ``@entry`` by Python.

Vocabulary: the *head* is the job a rule wants to start next; its *shadow time* is the earliest time at which it fits if
every running job ended at its requested time; *backfilling* starts other jobs that cannot delay it (EASY: Lifka 1995,
Mu'alem & Feitelson 2001). Times are seconds. Jobs are numbered by submission within an episode. In the names of
arguments ``p`` is the problem, ``sim`` the simulation, ``s`` its scalars, ``i`` a job, ``m`` a node, ``r`` a resource.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import namedtuple
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model

os.environ.setdefault("NUMBA_OPT", "2")  # three quarters of the compile time of 3, the default, and as fast
# Without reference counting (kernels allocate nothing): half the compile time, a third of the run time.
OPTIONS: dict[str, Any] = dict(cache=True, nogil=True, error_model="numpy", _nrt=False, no_cfunc_wrapper=True)
entry = numba.njit(**OPTIONS)
kernel = numba.njit(**(OPTIONS | {"no_cpython_wrapper": True}))


# --------------------------------------------------------------------------------------------------- pointers to states
class Ref(types.Type):
    """The type of a pointer to a named tuple. Numba passes tuples by value, word by word: with a state of ten arrays in
    every call, that doubles both the compile time and the run time. The next four say what it is in machine code, which
    type ref.field has, how it is read, and how a kernel makes a Ref."""

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

    def generic_resolve(self, ref: Ref, name: str) -> types.Type:  # type: ignore[override]  # which says NotImplemented
        return ref.target.types[ref.target.fields.index(name)]


@lower_getattr_generic(Ref)
def load_attribute(context: Any, builder: Any, ref: Ref, pointer: Any, name: str) -> Any:
    return builder.load(cgutils.gep_inbounds(builder, pointer, 0, ref.target.fields.index(name)))


@intrinsic
def by_reference(context, value):
    """A Ref to a named tuple, for as long as the calling kernel runs."""
    return Ref(value)(value), lambda _, builder, __, values: cgutils.alloca_once_value(builder, values[0])


# ---------------------------------------------------------------------------------------------------------------- codes
# Orders: the first seven never change while a job waits, so the queue is kept sorted by them.
FIFO, SJF, SAF, LJF, F1, RANDOM, STATIC, WFP3, UNICEP, UNICEP_RLSCHEDULER, XF, SJF_HISTORY, SAF_HISTORY = range(13)
TETRIS, TUNED = 13, 14
BLOCKING, GREEDY, EASY = range(3)  # what happens while the head does not fit: nothing, anything, backfilling
FASTEST, BEST_FIT, TUNED_NODE, FIRST, ROUND_ROBIN, RANDOM_NODE = range(6)
LATENCY, WAIT, SLOWDOWN, TAIL, PLANNED = range(5)
FAIRNESS = 1.25  # planning counts a wait to this power
SLOWDOWN_BOUND = 10.0  # seconds; Feitelson et al., "Theory and practice in parallel job scheduling", 1997
# What a tuned rule adds up, times weights: TERMS once for the order of heads, once for that of backfilling and once for
# whether the head gets a reservation (below zero); NODE_TERMS for the choice of its node. The classical orders that
# look at these are special cases, up to a monotone function: SJF, SAF, WFP3, UNICEP, XF.
TERMS = (
    "one", "requested", "size", "estimate", "expansion", "waited", "root_waited",
    "requested_queued", "size_queued", "waited_queued",
)  # fmt: skip
NODE_TERMS = ("speed", "left", "least_left", "most_left", "speed_requested")
TERM_COUNT, HEAD_TERMS, BACKFILL_TERMS, RESERVE_TERMS, NODE_WEIGHTS = len(TERMS), 0, 1, 2, 3 * len(TERMS)
PATIENCE = NODE_WEIGHTS + len(NODE_TERMS)  # the last number: who has waited for longer (hours) goes first, oldest first

# ------------------------------------------------------------------------------------------ the state of one simulation
# What does not change in an episode: its jobs, their demand[i, r], static features[i, f] and groups[i, c] (whose
# history they belong to); the nodes' capacity[m, r] and speed[m], unit[r] (one over the largest node's capacity), the
# fastest speed and the total of the first resource; the rule (see `Rule`), whether one sorted queue serves as its order
# of heads and of backfilling, and whether estimates are as recorded; the objective, and what reservations mean.
Problem = namedtuple(
    "Problem",
    "jobs demand features groups capacity speed unit fastest total "
    "head backfill mode nodes weights patience sorted_head recorded objective easy lock_in",
)
# Of a job: times in seconds, its size as in `job_size`, scores that never change, what a tuned rule looks at, and the
# estimate of its run time that the trace says was known.
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
START = np.dtype([("start", "f8"), ("node", "i8")])  # of a plan
# The record s.
SCALARS = np.dtype(
    [(x, "f8") for x in ("now", "shadow")]  # seconds; the shadow time of the reservation
    # Of a roll-out: what it has gained over the plan, and when all jobs that started differently have ended.
    + [(x, "f8") for x in ("gain", "clear")]
    # What rewards are relative to (improvement) or has accrued (cost); what started jobs have paid; rewards so far.
    + [(x, "f8") for x in ("cost", "paid", "returned")]
    # The episode's first job in the workload; how many of its jobs have arrived, ever do, are queued, are running; how
    # far `order` has been scanned since the last event.
    + [(x, "i8") for x in ("first", "arrived", "stop", "queued", "running", "scan")]
    # The job that a node is reserved for (-1: none); how many have started; what the rule would do (-1: wait).
    + [(x, "i8") for x in ("reserved", "reserved_node", "started", "rule_job", "rule_node")]
    # How many jobs the agent sees, and its rewards are of; whether it did what the rule does; see `Plan` for full; how
    # many decisions it has taken; and which of a row of episodes this is.
    + [(x, "i8") for x in ("visible", "counted", "on_track", "full", "decisions", "episode")]
)
LAST, PREVIOUS, COUNT, FEATURE = range(4)  # of a row of `history`: run times of the jobs of a group that have finished


# --------------------------------------------------------------------------------------- the queue and the running jobs
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
    """What a job that begins at that time on that node costs: latency, wait, bounded slowdown, the wait's square, or
    what planning counts."""
    wait = begin - p.jobs[i].submit
    if p.objective == WAIT:
        return wait
    if p.objective == TAIL:
        return wait * wait
    if p.objective == PLANNED:
        return wait**FAIRNESS + p.jobs[i].run / p.speed[m]
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


# --------------------------------------------------------------------------------------------------------------- events
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


# -------------------------------------------------------------------------------------------------- what a rule decides
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
    least = p.jobs[i].requested / p.fastest
    for k in range(s.running):
        j, when = release(sim, k, late, soon)
        if when + least >= best_end:
            break
        m = sim.plan[j].node
        enough = True
        for r in range(p.demand.shape[1]):
            sim.room[m, r] += p.demand[j, r]
            enough &= p.demand[i, r] <= sim.room[m, r] + 1e-9
        if enough and when + p.jobs[i].requested / p.speed[m] < best_end:
            best, best_end = m, when + p.jobs[i].requested / p.speed[m]
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
def find_most_beside(sim):
    """`find_most` of the nodes without a reservation."""
    s = sim.s[0]
    for r in range(sim.most.shape[0]):
        sim.most[r] = -1.0
        for m in range(sim.free.shape[0]):
            if s.reserved < 0 or m != s.reserved_node:
                sim.most[r] = max(sim.most[r], sim.free[m, r])


@kernel
def may_start(sim, p, i):
    """False: job i may start nowhere (after `find_most_beside`, without looking at every node)."""
    return within_most(sim, p, i) or (sim.s[0].reserved >= 0 and allowed(sim, p, i, sim.s[0].reserved_node))


@kernel
def first_allowed(sim, p):
    """The first job in backfill order that may start now, and its node; (-1, -1) where there is none."""
    s = sim.s[0]
    if p.backfill == TETRIS:
        return most_aligned(sim, p)
    if p.backfill <= STATIC:  # what was passed over cannot start before the next event: s.scan goes on behind it
        find_most_beside(sim)
        while s.scan < s.queued:
            i = sim.order[s.scan]
            if may_start(sim, p, i):
                m = choose_node(sim, p, i)
                if m >= 0:
                    return i, m
            s.scan += 1
        return -1, -1
    best, best_node, best_score = -1, -1, np.inf
    find_most_beside(sim)
    for k in range(s.queued):
        i = sim.queue[k]
        m = choose_node(sim, p, i) if may_start(sim, p, i) else -1
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


# ------------------------------------------------------------------------------------------------ RLScheduler's lock-in
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
    """The requested end of the k-th entry of `ends`."""
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


# ------------------------------------------------------------------------------------------------------------ roll-outs
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


# --------------------------------------------------------------------------------------------------------- observations
JOB_FEATURES = (
    "present", "requested", "size", "area", "waited", "expansion", "fits", "may_start", "earliest_start", "reserved",
    "rule_choice", "position", "behind",
    "user_time", "user_known", "request_time", "request_known", "kind_time", "kind_known",  # from HISTORY on
)  # then R columns: demand over the largest node's capacity # fmt: skip
NODE_FEATURES = ("speed", "reserved", "shadow", "next_release", "rule_choice")  # then R of free and R of capacity
CLUSTER_FEATURES = ("queued", "hidden", "running", "reservation", "shadow", "rule_waits", "queued_work")
PRESENT, REQUESTED, SIZE, AREA, WAITED, EXPANSION, FITS, MAY_START, EARLIEST, RESERVED = range(10)
RULE_CHOICE, POSITION, BEHIND, HISTORY = range(10, 14)
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
    """Write the observation (float32[D], see `Layout.split`) and the mask (bool[K*M + 1]) of a decision point."""
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


# ------------------------------------------------------------------------------------------------------------- episodes
# What an episode is, as the environment's arguments say it (not `Sim.plan`, a trajectory): how many jobs the agent sees
# (0: there is no agent, the rule schedules everything), how many arrive before it decides, meanwhile and after it;
# whether rewards are improvements over the rule, and whether roll-outs always go on to the end.
Plan = namedtuple("Plan", "window warmup decided followup improvement full")
# Simulations side by side: the fields of `Sim` with an axis of environments e before their others, and the groups[e, i,
# c] of the episodes' jobs, which number rows of history[e].
Batch = namedtuple("Batch", "s queue order seen rank score ends dues free spare most room history plan groups")
# The run times of the past, by group (of the workload's `groups`) and in order of their end: rows offset[g] ..
# offset[g + 1].
Past = namedtuple("Past", "offset end run")
# To number an episode's groups with: the new[g] and old[g] number of a group of the workload, which are -1 between two
# uses, and the history under the old numbers.
Numbers = namedtuple("Numbers", "new old history")


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


# ----------------------------------------------------------------------------------------- one moment of a real cluster
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


# ------------------------------------------------------------------------------------------- run times that may be
# What is known of run times, as ratios of run time to request: of each group (of `groups`) those of its last KEPT jobs
# that have finished, a ring, and how many there were; of everybody the last RECENT, a ring and sorted, and how many.
Known = namedtuple("Known", "ratio count ring ordered seen")
KEPT, RECENT = 8, 256
ENOUGH = 3  # so many of the same user and request, or else all of the user's count
PRIOR = 2.0  # and everybody's together as much as so many


@kernel
def asked(p, i):
    """What job i requests, in seconds (in some published sequences it is -1: then ratios are run times)."""
    return p.jobs[i].requested if p.jobs[i].requested > 0 else 1.0


@kernel
def learn(known, p, i):
    """Job i has finished."""
    ratio = p.jobs[i].run / asked(p, i)
    for c in range(2):
        g = p.groups[i, c]
        if g >= 0:
            known.ratio[g, known.count[g] % KEPT] = ratio
            known.count[g] += 1
    slot, k = known.seen[0] % RECENT, min(known.seen[0], RECENT)
    if k == RECENT:  # the oldest leaves
        k = first_above(known.ordered, RECENT, known.ring[slot]) - 1
        for j in range(k, RECENT - 1):
            known.ordered[j] = known.ordered[j + 1]
        k = RECENT - 1
    while k > 0 and known.ordered[k - 1] > ratio:
        known.ordered[k] = known.ordered[k - 1]
        k -= 1
    known.ordered[k], known.ring[slot] = ratio, ratio
    known.seen[0] += 1


@kernel
def first_above(values, count, least):
    """The first position of the ascending values[:count] that is above `least`."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if values[middle] <= least:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def run_time_at(known, p, i, elapsed, share):
    """What job i may take on a node of speed 1, having run there for `elapsed`: the run time at `share` (0 to 1) of
    those that are possible, in no order.

    They are its request times each ratio of its group, and of everybody, that leads to more than `elapsed`. A job that
    has outlived them all takes half as long again, but ends by its request if that is still to come.
    """
    requested = asked(p, i)
    least = elapsed / requested
    g = p.groups[i, 1]
    if g < 0 or known.count[g] < ENOUGH:
        g = p.groups[i, 0]
    own = 0
    count = min(known.count[g], KEPT) if g >= 0 else 0
    for k in range(count):
        own += known.ratio[g, k] > least
    all_of_them = min(known.seen[0], RECENT)
    first = first_above(known.ordered, all_of_them, least)
    weight = PRIOR / max(all_of_them, 1)
    at = share * (own + weight * (all_of_them - first))
    if at < own:
        for k in range(count):
            at -= known.ratio[g, k] > least
            if at < 0:
                return known.ratio[g, k] * requested
    if first < all_of_them:
        return known.ordered[min(first + int((at - own) / weight), all_of_them - 1)] * requested
    if all_of_them == 0 and elapsed < requested:
        return requested
    return 1.5 * elapsed if requested <= elapsed else min(1.5 * elapsed, requested)


@entry
def learn_all(problem, known, jobs):
    """These jobs have finished, in this order."""
    p = by_reference(problem)
    for i in jobs:
        learn(known, p, i)


@entry
def run_times_at(problem, known, jobs, elapsed, shares, found):
    """found[j, k] = what jobs[j], which has run for elapsed[j], may take, at shares[k]."""
    p = by_reference(problem)
    for j in range(jobs.shape[0]):
        for k in range(shares.shape[0]):
            found[j, k] = run_time_at(known, p, jobs[j], elapsed[j], shares[k])


# -------------------------------------------------------------------------------------------------------- planning
# A roll-out algorithm (Bertsekas, Tsitsiklis & Wu 1997): what would come of each of a few candidates if the rule went
# on from there until the present queue is empty? Run times are drawn, `samples` times, the same for all candidates.
#
# The real run time of a job that has not finished must not tell: planning sees the state (but for `ends`, which are
# real), and the problem `q` whose jobs have no run times but those that it draws.
#
# s, one record; runs[k, i], the run time of job i in sample k; the running jobs by their ends in the sample at hand;
# of each candidate its job (-1: wait), its node, its rank, and the sum and the sum of squares of what it gains;
# starts[k, i], when job i starts in sample k if the rule goes on; the jobs left_out[i] of roll-outs, as if they had not
# come yet; and whether the time is up.
Lookahead = namedtuple("Lookahead", "s known runs ends job node rank gain square starts left_out stop")
LOOKAHEAD = np.dtype(
    [("threshold", "f8"), ("drawn", "f8"), ("random", "u8")]
    + [(name, "i8") for name in "candidates samples seed planned taken shorter foreseen".split()]
)
LAP, RACE = 4, 2.0  # after so many samples candidates leave that are so many standard errors behind
SOON = 1e-3  # seconds after now at which a running job ends at the earliest


@kernel
def uniform(s):
    """The next number, 0 <= u < 1, of splitmix64 (Steele, Lea & Flood 2014)."""
    s.random += np.uint64(0x9E3779B97F4A7C15)
    z = s.random
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.float64((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


@kernel
def draw_runs(sim, q, look):
    """Draw the run times of all that waits or runs, once an instant: the same state and seed give the same ones."""
    s, ahead = sim.s[0], look.s[0]
    if ahead.drawn == s.now:
        return
    ahead.drawn = s.now
    ahead.random = np.uint64(ahead.seed) * np.uint64(0xD1342543DE82EF95) + np.uint64(np.int64(1024 * s.now))
    for j in range(s.queued):
        i = sim.queue[j]
        for k in range(ahead.samples):
            look.runs[k, i] = run_time_at(look.known, q, i, 0.0, uniform(ahead))
    for j in range(s.running):
        i = sim.dues[j].job
        elapsed = (s.now - sim.plan[i].start) * q.speed[sim.plan[i].node]
        for k in range(ahead.samples):
            look.runs[k, i] = run_time_at(look.known, q, i, elapsed, uniform(ahead))


@kernel
def imagine(sim, q, look, k):
    """Let the jobs have the run times of sample k."""
    s = sim.s[0]
    for j in range(s.queued):
        q.jobs[sim.queue[j]].run = look.runs[k, sim.queue[j]]
    for j in range(s.running):
        i = sim.dues[j].job  # in the order in which they are due, not in that of their real ends
        q.jobs[i].run = look.runs[k, i]
        end = max(sim.plan[i].start + look.runs[k, i] / q.speed[sim.plan[i].node], s.now + SOON)
        c = j
        while c > 0 and look.ends[c - 1].time <= end:
            look.ends[c].time, look.ends[c].job = look.ends[c - 1].time, look.ends[c - 1].job
            c -= 1
        look.ends[c].time, look.ends[c].job = end, i


@kernel
def enter(sim, other, look):
    """Copy the state into the one to imagine in, with the ends of the sample at hand."""
    copy_sim(sim, other)
    for k in range(sim.s[0].running):
        other.ends[k].time, other.ends[k].job = look.ends[k].time, look.ends[k].job
    other.s[0].gain, other.s[0].clear, other.s[0].stop = 0.0, -np.inf, sim.s[0].arrived
    if look.s[0].shorter:
        leave_out(other, look)


@kernel
def leave_out(other, look):
    """Take jobs out of the imagined queue."""
    t, n, k = other.s[0], 0, 0
    for j in range(t.queued):
        if not look.left_out[other.queue[j]]:
            other.queue[n] = other.queue[j]
            n += 1
        if not look.left_out[other.order[j]]:
            other.order[k] = other.order[j]
            k += 1
    t.queued, t.scan = n, 0


@kernel
def some_fit(sim, q):
    """Whether some queued job fits somewhere. If none does, no rule starts one before the next event."""
    find_most(sim)
    for k in range(sim.s[0].queued):
        if within_most(sim, q, sim.queue[k]):
            return True
    return False


@kernel
def go_on(other, q, look, full):
    """Follow the rule until the queue is empty or, unless `full`, the trajectory meets the one before (`run_rule`)."""
    t = other.s[0]
    while t.queued > 0 and not look.stop[0]:
        i = m = -1
        if some_fit(other, q):
            i, m = rule_decision(other, q)
        if i >= 0:
            act(other, q, i, m)
        elif (not full and t.now >= t.clear and not overtaken(other)) or not next_event(other, q):
            return


@kernel
def try_out(sim, other, q, look, i, m, full):
    """Start or reserve (i, m), or wait, in the sample at hand, and go on. Returns what that costs less than the
    trajectory before, which was in other.plan (`begin`)."""
    enter(sim, other, look)
    if i >= 0:
        act(other, q, i, m)
    else:
        next_event(other, q)
    go_on(other, q, look, full)
    return other.s[0].gain


@kernel
def show_running(sim, other):
    """Let the imagined state know where the running jobs run, and since when."""
    for k in range(sim.s[0].running):
        i = sim.dues[k].job
        other.plan[i].start, other.plan[i].node = sim.plan[i].start, sim.plan[i].node


@kernel
def find_candidates(sim, q, look, i, m):
    """Candidate 0 is what the rule does, (i, m); then come the first other jobs in its order that may start now, and
    other nodes. Returns how many there are."""
    s, ahead = sim.s[0], look.s[0]
    look.job[0], look.node[0] = i, m
    n = 1
    find_most_beside(sim)
    for k in range(s.queued):
        j = sim.queue[k]
        if j == i or look.left_out[j] or not may_start(sim, q, j):
            continue
        value = head_score(sim, q, j) if s.reserved < 0 else backfill_score(sim, q, j)
        if n > ahead.candidates and value >= look.rank[n - 1]:
            continue
        node = choose_node(sim, q, j)
        if node < 0:
            continue
        n = min(n + 1, ahead.candidates + 1)
        c = n - 1
        while c > 1 and look.rank[c - 1] > value:
            look.rank[c], look.job[c], look.node[c] = look.rank[c - 1], look.job[c - 1], look.node[c - 1]
            c -= 1
        look.rank[c], look.job[c], look.node[c] = value, j, node
    if i >= 0 and fits(sim, q, i, m):
        n = add_nodes(sim, q, look, n, i, m)
    if i >= 0 and s.running > 0 and (n > 1 or fits(sim, q, i, m)):
        look.job[n], look.node[n] = -1, -1
        n += 1
    return n


@kernel
def add_nodes(sim, q, look, n, i, m):
    """Of each other kind of node the first that job i may start on."""
    first = n
    for a in range(q.speed.shape[0]):
        new = a != m and not alike(q, a, m) and allowed(sim, q, i, a)
        for c in range(first, n):
            new = new and not alike(q, a, look.node[c])
        if new:
            look.job[n], look.node[n] = i, a
            n += 1
    return n


@kernel
def alike(q, a, b):
    """Whether two nodes are of one kind."""
    if q.speed[a] != q.speed[b]:
        return False
    for r in range(q.demand.shape[1]):
        if q.capacity[a, r] != q.capacity[b, r]:
            return False
    return True


@kernel
def all_fit(sim, q):
    """Whether all that waits fits at once on the only node: then the order does not matter."""
    if q.speed.shape[0] > 1:
        return False
    for r in range(q.demand.shape[1]):
        total = 0.0
        for k in range(sim.s[0].queued):
            total += q.demand[sim.queue[k], r]
        if total > sim.free[0, r] + 1e-9:
            return False
    return True


@kernel
def lead(look, c, samples):
    """What candidate c gains on average, and the standard error of that."""
    mean = look.gain[c] / samples
    return mean, np.sqrt(max(look.square[c] / samples - mean * mean, 0.0) / max(samples - 1, 1))


@kernel
def drop_losers(look, count, samples):
    """Forget the candidates that are worse than the best by more than RACE standard errors; returns how many stay."""
    best = 0.0
    for c in range(1, count):
        best = max(best, look.gain[c] / samples)
    n = 1
    for c in range(1, count):
        mean, error = lead(look, c, samples)
        if mean + RACE * error >= best:
            look.job[n], look.node[n], look.gain[n], look.square[n] = (
                look.job[c],
                look.node[c],
                look.gain[c],
                look.square[c],
            )
            n += 1
    return n


@kernel
def foresee(sim, other, look, k):
    """Note when the jobs that wait start in sample k, the rest of which was the rule's."""
    for j in range(sim.s[0].queued):
        i = sim.queue[j]
        look.starts[k, i] = np.inf if look.left_out[i] else other.plan[i].start


@kernel
def compare_candidates(sim, other, q, look, count):
    """Try all candidates in as many samples as there is time for, the losers in a few only; returns how many candidates
    are left, and the number of samples."""
    ahead = look.s[0]
    draw_runs(sim, q, look)
    show_running(sim, other)
    ahead.foreseen = 0
    for c in range(count):
        look.gain[c] = look.square[c] = 0.0
    for k in range(ahead.samples):
        imagine(sim, q, look, k)
        try_out(sim, other, q, look, look.job[0], look.node[0], 1)
        foresee(sim, other, look, k)
        total = 0.0
        for c in range(1, count):
            total += try_out(sim, other, q, look, look.job[c], look.node[c], 0)
            look.rank[c] = total
        if look.stop[0]:
            return count if k >= LAP else 1, k  # less than that is no reason to do what the rule would not
        ahead.taken += 1
        ahead.foreseen = k + 1
        for c in range(1, count):
            look.gain[c] += look.rank[c]
            look.square[c] += look.rank[c] * look.rank[c]
        if k % LAP == LAP - 1:
            count = drop_losers(look, count, k + 1)
            if count == 1:
                return count, k + 1
    return count, ahead.samples


@kernel
def planned_decision(sim, other, q, look, i, m):
    """What to do in place of (i, m), which the rule would: the candidate that gains most on average, if that is by more
    than `threshold` standard errors."""
    ahead = look.s[0]
    if sim.s[0].queued == 0 or look.stop[0] or ahead.threshold == np.inf or overdue(sim, q) or all_fit(sim, q):
        return i, m
    count = find_candidates(sim, q, look, i, m)
    if count == 1:
        return i, m
    ahead.planned += 1
    if i >= 0:
        look.left_out[i] = False
    count, samples = compare_candidates(sim, other, q, look, count)
    best = 0
    for c in range(1, count):
        mean, error = lead(look, c, samples)
        if look.gain[c] > look.gain[best] and mean > ahead.threshold * error + 1e-6:
            best = c
    if best > 0:
        ahead.foreseen = 0
    return look.job[best], look.node[best]


@kernel
def recall_estimates(sim, p, q):
    """In the imagined state no history goes on: the rule's estimates stay what they are."""
    if q.recorded:
        for k in range(sim.s[0].queued):
            q.jobs[sim.queue[k]].recorded = estimate(sim, p, sim.queue[k])


@kernel
def planned_choice(sim, p, other, q, look):
    """What planning does next: start or reserve (job, node); (-1, -1): wait for the next event."""
    recall_estimates(sim, p, q)
    i, m = rule_decision(sim, p)
    return planned_decision(sim, other, q, look, i, m)


@entry
def action_gains(problem, simulation, imagined, imaginary, look, mask, gains):
    """gains[a]: what each legal action costs less on average than what the rule does; NaN for those that are not."""
    p, sim, q, other = by_reference(problem), by_reference(simulation), by_reference(imagined), by_reference(imaginary)
    recall_estimates(sim, p, q)
    draw_runs(sim, q, look)
    show_running(sim, other)
    nodes, samples = p.speed.shape[0], look.s[0].samples
    for a in range(mask.shape[0]):
        gains[a] = 0.0 if mask[a] else np.nan
    for k in range(samples):
        imagine(sim, q, look, k)
        try_out(sim, other, q, look, sim.s[0].rule_job, sim.s[0].rule_node, 1)
        total = 0.0
        for a in range(mask.shape[0]):
            if mask[a]:
                i = sim.seen[a // nodes] if a < mask.shape[0] - 1 else -1
                total += try_out(sim, other, q, look, i, a % nodes, 0)
                gains[a] += total / samples


@entry
def recall_all(history, past, now):
    """What had ended by now, of all groups."""
    for g in range(history.shape[0]):
        recall(history[g], past, g, now)


@entry
def plan_run(problem, simulation, imagined, imaginary, look):
    """Schedule all jobs of the problem from an empty machine."""
    p, sim, q, other = by_reference(problem), by_reference(simulation), by_reference(imagined), by_reference(imaginary)
    clear_sim(sim, p)
    s = sim.s[0]
    while True:
        i, m = planned_choice(sim, p, other, q, look)
        if i >= 0:
            act(sim, p, i, m)
            s.decisions += 1
            continue
        before = s.running
        if not next_event(sim, p):
            return
        for k in range(before - 1, s.running - 1, -1):
            learn(look.known, p, sim.ends[k].job)


@entry
def plan_moment(problem, simulation, imagined, imaginary, look, choices):
    """As `follow_rule`, with planning."""
    p, sim, q, other = by_reference(problem), by_reference(simulation), by_reference(imagined), by_reference(imaginary)
    n = 0
    while n < choices.shape[0]:
        i, m = planned_choice(sim, p, other, q, look)
        if i < 0:
            break
        act(sim, p, i, m)
        choices[n, 0], choices[n, 1] = i, m
        n += 1
    return n


@entry
def forecast(simulation, imagined, imaginary, look, starts):
    """starts[k, j]: when the j-th of the last jobs has started or would in sample k if the rule went on from here
    (infinite: it fits on no node, or was left out). Returns how many samples there was time for.

    The roll-outs of the last decision that was planned serve if it was the rule's, as far as they go."""
    sim, q, other = by_reference(simulation), by_reference(imagined), by_reference(imaginary)
    first, n = q.jobs.shape[0] - starts.shape[1], look.s[0].foreseen
    draw_runs(sim, q, look)
    show_running(sim, other)
    for k in range(n, look.s[0].samples):
        imagine(sim, q, look, k)
        enter(sim, other, look)
        go_on(other, q, look, 1)
        if look.stop[0]:
            break
        foresee(sim, other, look, k)
        n += 1
    for k in range(n):
        for j in range(starts.shape[1]):
            starts[k, j] = sim.plan[first + j].start
        for j in range(sim.s[0].queued):
            starts[k, sim.queue[j] - first] = look.starts[k, sim.queue[j]]
    return n


class compiling:
    """Say so when the kernels are being compiled, that is when the first call takes more than a moment."""

    warm = False

    def __enter__(self) -> None:
        self.timer = None
        if not compiling.warm:
            text = "Compiling the simulator (once, about ten seconds; then cached) ..."
            self.timer = threading.Timer(1.0, print, (text,), {"file": sys.stderr, "flush": True})
            self.timer.start()

    def __exit__(self, *_: object) -> None:
        compiling.warm = True
        if self.timer:
            self.timer.cancel()
