"""The classical schedulers by name: parsing, the rules that everybody knows, and scores that never change.

A name becomes a `Rule`, which the kernels follow:

    from simulator.rules import RULES, parse_rule
    parse_rule("easy-wfp3+sjf@48")
"""

from typing import NamedTuple

import numpy as np

from simulator.kernels import (
    BEST_FIT,
    BLOCKING,
    EASY,
    F1,
    FASTEST,
    FIFO,
    FIRST,
    GREEDY,
    LJF,
    NODE_WEIGHTS,
    PATIENCE,
    RANDOM,
    RANDOM_NODE,
    ROUND_ROBIN,
    SAF,
    SAF_HISTORY,
    SJF,
    SJF_HISTORY,
    TERM_COUNT,
    TERMS,
    TETRIS,
    TUNED,
    TUNED_NODE,
    UNICEP,
    WFP3,
    XF,
)
from workloads.jobs import Jobs

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


def tuned_rule(weights: np.ndarray) -> str:
    """The name of the tuned rule with these weights float64[PATIENCE + 1]; they are part of the name."""
    return "tuned:" + ",".join(f"{w:.6g}" for w in weights)


def _weights(name: str) -> tuple[float, ...]:
    expected = PATIENCE + 1
    try:
        weights = tuple(float(w) for w in name.removeprefix("tuned:").split(","))
    except ValueError:
        weights = ()
    if len(weights) != expected or not np.isfinite(weights).all():
        raise ValueError(f"{name!r}: a tuned rule has {expected} numbers behind its colon; let tuned_rule.py find them")
    return weights


def uses_history(rule: Rule) -> bool:
    """Whether the rule looks at what the users' jobs took that have finished."""
    estimates = np.array(rule.weights[:NODE_WEIGHTS]).reshape(-1, TERM_COUNT)[:, TERMS.index("estimate")]
    return bool({rule.head, rule.backfill} & {SJF_HISTORY, SAF_HISTORY}) or bool(estimates.any())


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
