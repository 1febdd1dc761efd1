"""`benchmark.py compare`: the same held-out jobs under every policy, and what results.json says of them.

All policies get the same jobs and are compared in the same blocks of consecutive jobs, so that what is hard about a
block cancels in the differences. Times are seconds; N counts jobs, B blocks.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from rich.table import Table

from evaluation.held_out import BASELINES, Compare, cuts, held_out, other_scenarios
from evaluation.replays import Replays, Scenario, replay_all
from evaluation.statistics import METRICS, bootstrap_weights, difference, statistics, tail
from policies import PlanPolicy, Policy, PolicyError, RulePolicy, called, load_policy
from simulator.rules import RULES
from simulator.schedule import METRIC, nothing_to_schedule
from workloads.jobs import Workload

JUDGED_JOBS = 5000  # so many validation jobs tell whether planning gains anything


def compare(args: Compare) -> tuple[dict[str, Any], Table]:
    """Replay the same jobs under every policy. Returns what results.json holds, and its table."""
    headline = Scenario(args.protocol, args.load)
    workloads = {headline: held_out(args)}
    policies, left_out = _named_policies(args.policies)  # all of them are read before the first one runs
    added: dict[str, Policy] = {}
    if args.report:
        _check_folder(args.report)
        workloads |= other_scenarios(args, headline)
        wanted = *BASELINES, _best_rule(args, headline, workloads[headline])
        added = {rule: RulePolicy(rule) for rule in wanted if rule not in policies}
        policies |= added
    notes = _without_gain(args, policies) if args.plan_or_base else []
    seeds = {name: _with_seeds(name, policy, args.plan_seeds) for name, policy in policies.items()}
    policies = {own: policy for several in seeds.values() for own, policy in several.items()}
    workloads[headline].report()
    replays = {scenario: Replays(workload, cuts(args, scenario, workload)) for scenario, workload in workloads.items()}
    kept_in = args.report and args.report / "replays"
    for scenario, name, found in replay_all(workloads, policies, kept_in, args.workers, args.ray):
        if isinstance(found, str):
            left_out.append(found)
            policies.pop(name, None)
        elif name in policies:
            replays[scenario].add(name, *found)
    if set(policies) <= set(added):
        raise ValueError(left_out[0])
    for kept in replays.values():
        kept.keep(policies)
    counted = replays[headline]
    results = {
        "workload": args.workload, "protocol": args.protocol, "split": args.split, "load": args.load,
        "jobs": int((counted.workload.segments[:, 1] - counted.workload.segments[:, 0]).sum()),
        "counted_jobs": counted.counted_jobs,
        **statistics(counted.per_block, args.seed), "tails": {name: tail(counted.waits(name)) for name in policies},
        "left_out": list(dict.fromkeys(left_out)),
    }  # fmt: skip
    if args.plan_seeds > 1:
        planned = {name: own for name, own in seeds.items() if isinstance(policies.get(name), PlanPolicy)}
        notes += [_mean_of_seeds(counted, name, [*own], policies, args.seed) for name, own in planned.items()]
    if idle := nothing_to_schedule(counted.workload, map(counted.waits, policies)):
        results["nothing_to_schedule"] = idle
        notes.append(idle)
    if notes:
        results["notes"] = notes
    if args.report:
        from evaluation.report import write_report  # matplotlib and jinja2 take a second, which only a report is worth

        write_report(args.report, args, results, replays, policies)
    return results, _comparison_table(results)


def _named_policies(names: Sequence[str]) -> tuple[dict[str, Policy], list[str]]:
    """The policies under the names that results use, and what is wrong with those that are there but cannot be used;
    an argument given twice counts once.

    Raises:
        ValueError: no policy can be used, or a name is of no rule, file or folder.
    """
    arguments = dict.fromkeys(rule for name in names for rule in (RULES if name == "all" else [name]))
    if not arguments:
        raise ValueError("--policies: none given; name some, such as: fifo easy-fifo")
    policies, left_out = {}, []
    for argument in arguments:
        try:
            policies[argument] = load_policy(argument)
        except PolicyError as error:
            if not Path(argument).exists() or len(arguments) == 1:  # a slip of the pen stops before anything is run
                raise
            left_out.append(str(error))
    own = [policy.name for policy in policies.values()]
    named = {
        policy.name if own.count(policy.name) == 1 else called(argument, policy.stands_for): policy
        for argument, policy in policies.items()
    }
    return named, left_out


def _best_rule(args: Compare, scenario: Scenario, workload: Workload) -> str:
    """The best of all rules on these jobs, whether it is to be shown or not: the first of those that are equal."""
    rules: dict[str, Policy] = {rule: RulePolicy(rule) for rule in RULES}
    metric, cost = METRICS.index(METRIC[args.objective]), {}
    for _, rule, found in replay_all(
        {scenario: workload}, rules, args.report and args.report / "replays", args.workers, args.ray
    ):
        assert not isinstance(found, str)  # a rule knows every cluster
        replays = Replays(workload, cuts(args, scenario, workload))
        replays.add(rule, *found)
        cost[rule] = replays.per_block[rule][:, metric].mean()
    return min(RULES, key=cost.__getitem__)


def _without_gain(args: Compare, policies: dict[str, Policy]) -> list[str]:
    """Put the base rule in the place of what plans without gaining anything on validation jobs, and say so. Latency
    counts, since where nodes differ in speed it may pay to wait for a faster one."""
    notes = []
    planned = {name: policy for name, policy in policies.items() if isinstance(policy, PlanPolicy)}
    if not planned:
        return []
    workload = held_out(replace(args, split="validation", max_jobs=JUDGED_JOBS, protocol="continuous"))
    for name, policy in planned.items():
        base = RulePolicy(policy.reference)
        both = [np.concatenate([s.latency for s in p.schedule(workload)]).mean() for p in (base, policy)]
        gains = both[1] < both[0]
        if not gains:
            policies[name] = base
        choice = "it stays" if gains else "that takes its place"
        change = 100 * (both[1] / both[0] - 1)
        notes.append(f"{name}: latency on validation jobs {change:+.2f} % to its base, {base.name}: {choice}")
    return notes


def _with_seeds(name: str, policy: Policy, count: int) -> dict[str, Policy]:
    """The policy and, if it draws samples, others that draw with the seeds 2 to `count`."""
    more = range(2, count + 1) if isinstance(policy, PlanPolicy) else ()
    return {name: policy} | {f"{name} seed {seed}": PlanPolicy(policy.argument, seed=seed) for seed in more}


def _mean_of_seeds(replays: Replays, name: str, own: list[str], policies: dict[str, Policy], seed: int) -> str:
    """How the wait under the mean over the seeds compares with the first policy and with the best rule in hindsight,
    and its tail with the first policy's, in a sentence."""
    wait = METRICS.index("wait")
    per_block = {other: values[:, wait] for other, values in replays.per_block.items()}
    mean = np.mean([per_block[one] for one in own], axis=0)
    first, weights = next(iter(policies)), bootstrap_weights(len(mean), seed)
    rules = [other for other, policy in policies.items() if isinstance(policy, RulePolicy)]
    best = min(rules, key=lambda rule: per_block[rule].mean(), default=first)

    def against(other: str) -> str:
        change, _, interval = _with_interval(difference(mean, per_block[other], weights), "+.1f", " %").partition("\n")
        return f"{change}{interval and f' ({interval})'} to {other}"

    def tails(names: list[str]) -> str:
        longest = [tail(replays.waits(one)) for one in names]
        figures = [np.mean([one[key] for one in longest]) / tail(replays.waits(first))[key] for key in longest[0]]
        return " and ".join(f"{figure:.2f}" for figure in figures)

    each = " ".join(f"{100 * (per_block[one].mean() / per_block[best].mean() - 1):+.1f}" for one in own)
    text = f"{name}, wait, mean of {len(own)} seeds: {against(first)}; {against(best)}"
    text += f", seeds {each}; p99 and longest {tails(own)} times {first}'s"
    return text if best == first else f"{text} ({best}: {tails([best])})"


def _check_folder(folder: Path) -> None:
    """Make it, if need be, and see that it can be written to, before anything is run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--report {folder}: {error.strerror}; give a folder that can be written to") from None


def _comparison_table(results: dict[str, Any]) -> Table:
    """A row a policy: each mean with its interval, and the difference to the first policy with its own."""
    workload, split, protocol = (results[key] for key in ("workload", "split", "protocol"))
    first = next(iter(results["policies"]))
    blocks = len(results["policies"][first]["wait"]["per_block"])
    caption = f"95 % bootstrap intervals over {blocks} blocks" if blocks > 1 else "One block, so no intervals"
    caption += "; every window starts on an empty machine" if protocol == "windows" else ""
    table = Table(title=f"{workload}, {split} split, {protocol}, {results['counted_jobs']:,} jobs", caption=caption)
    table.add_column("policy", overflow="fold", max_width=22)  # the longest rule's name; those of runs fold
    for heading in ("latency", "wait", "bounded\nslowdown", "utili-\nzation", "makespan", "wait p99\nand max"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, metrics in results["policies"].items():
        cells = []
        for metric, figure in metrics.items():
            form = {"bounded_slowdown": ",.2f", "utilization": ",.4f"}.get(metric, ",.0f")
            cells.append(_with_interval(figure, form))
            if name != first:
                cells[-1] += "\n" + _with_interval(results["differences"][name][metric], "+.1f", "%")
        table.add_row(name, *cells, "\n".join(f"{tail:,.0f}" for tail in results["tails"][name].values()))
        table.add_section()
    return table


def _with_interval(figure: dict[str, Any], form: str, unit: str = "") -> str:
    """A mean and, below it, its interval, as text."""
    if figure["mean"] is None:
        return "-"
    low, high = figure["ci95"]
    return f"{figure['mean']:{form}}{unit}" + ("" if low is None else f"\n{low:{form}} … {high:{form}}")
