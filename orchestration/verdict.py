"""Whether a candidate is better than the champion, from what `benchmark.py compare` says of them; and drift."""

from typing import Any

import numpy as np

from evaluation.statistics import bootstrap_weights, difference
from orchestration.config import Drift, Figure
from policies import Policy
from simulator.rules import RULES
from simulator.schedule import METRIC
from workloads.jobs import Workload

YARDSTICK = "easy-fifo"
CHAMPION, CANDIDATE = "champion", "candidate-"  # how their names in a comparison begin
BLOCKS = 20
LEAST_RECORDED = 100  # jobs; of fewer, nothing is said about drift


def figure(found: dict[str, Any]) -> Figure:
    low, high = found["ci95"]
    mean = found["mean"] or 0.0  # nobody waits, with either
    return Figure(mean, mean if low is None else low, mean if high is None else high)


def judge(results: dict[str, Any], objective: str, max_tail: float) -> dict[str, Any]:
    """The fields of an Evaluation that a comparison says something about.

    Args:
        results: of `benchmark.py compare` with EASY-FIFO, rules, CHAMPION where there is one, and CANDIDATE + number;
            behind these names stands "/policy.onnx" or, where the file stands for a rule, which one.

    Raises:
        ValueError: no candidate could be compared.
    """
    metric = METRIC[objective]
    cost = {name: found[metric]["mean"] for name, found in results["policies"].items()}
    candidates = [name for name in cost if name.startswith(CANDIDATE)]
    if not candidates:
        raise ValueError(f"no candidate can be compared: {'; '.join(results['left_out'])}")
    tails = {name: tail_ratio(results["tails"], name) for name in candidates}
    allowed = [name for name in candidates if tails[name][0] <= max_tail and tails[name][1] <= 3 * max_tail]
    best = min(allowed or candidates, key=cost.__getitem__)
    best_rule = min((name for name in cost if name in RULES), key=cost.__getitem__)
    per_block = {name: np.array(found[metric]["per_block"]) for name, found in results["policies"].items()}
    weights = bootstrap_weights(len(per_block[best]), 0)

    def against(name: str, rivals: dict[str, str]) -> dict[str, Figure]:
        known = {title: rival for title, rival in rivals.items() if name in per_block and rival in per_block}
        return {t: figure(difference(per_block[name], per_block[rival], weights)) for t, rival in known.items()}

    rules = {YARDSTICK: YARDSTICK, "best rule": best_rule}
    champion = next((name for name in cost if name.startswith(CHAMPION)), "")
    gains, standing = against(best, {"champion": champion} | rules), against(champion, rules)
    rival = "champion" if "champion" in gains else YARDSTICK
    gain = gains[rival]
    p99, longest = tails[best]
    said = f"{gain.mean:+.1f} % to {rival} ({gain.low:+.1f} … {gain.high:+.1f})"
    if best not in allowed:
        why = f"long waits: p99 {p99:.2f} and longest {longest:.2f} times EASY-FIFO's; {said}"
    elif gain.high >= 0:
        why = f"not surely better: {said}"
    else:
        why = said
    number = int(best.replace("/", " ").split()[0].removeprefix(CANDIDATE))
    better = best in allowed and gain.high < 0
    return {
        "candidate": number, "better": better, "why": why, "best_rule": best_rule, "gains": gains,
        "standing": standing, "p99": p99,
    }  # fmt: skip


def tail_ratio(tails: dict[str, dict[str, float]], name: str) -> tuple[float, float]:
    """p99 and longest of the wait, EASY-FIFO = 1."""
    p99, longest = (tails[name][key] / max(tails[YARDSTICK][key], 1e-9) for key in ("wait_p99", "wait_max"))
    return p99, longest


def drift(workload: Workload, policy: Policy, since: float, bound: float) -> Drift | None:
    """The recorded waits of the jobs submitted since then, against the simulator's under the policy.

    Args:
        workload: all recorded jobs, in one segment.
        since: Unix time, as the record's times are.
        bound: percent.

    Returns:
        None where too few jobs were recorded since.
    """
    jobs = workload.jobs
    first = int(np.searchsorted(jobs.submit_time, since))
    if len(jobs) - first < LEAST_RECORDED:
        return None
    [schedule] = policy.schedule(workload, np.array([[0, len(jobs)]]))
    recorded, predicted = jobs.wait_time[first:], schedule.wait[first:]
    blocks = [part.mean(axis=1) for part in np.array_split(np.stack([recorded, predicted]), BLOCKS, axis=1)]
    found = figure(difference(np.array(blocks)[:, 0], np.array(blocks)[:, 1], bootstrap_weights(BLOCKS, 0)))
    beyond = found.low > bound or found.high < -bound
    return Drift(len(recorded), float(recorded.mean()), float(predicted.mean()), found, beyond)
