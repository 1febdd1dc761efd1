"""The rule `tuned`: a weighted sum of what the classical rules look at, fitted to training jobs by CMA-ES.

    python tuned_rule.py --workload my_cluster.swf.gz --objective wait

Prints how it does on the validation split beside the classical rules, and its name, whose numbers are its weights: any
program here takes that name for a rule. It is what the agents start from with `--reference tuned`, and a baseline for
them: what a rule can do that knows the workload. CMA-ES: Hansen 2016 (https://arxiv.org/abs/1604.00772).
"""

import sys
from dataclasses import dataclass
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import track

from simulator.replay import simulate
from simulator.rules import RULES, parse_rule
from training.arguments import Natural, check_ranges
from training.judgement import costs
from training.tuning import tune
from workloads.jobs import at_loads
from workloads.load import load_workload
from workloads.reading import Reading


@dataclass
class Args(Reading):
    workload: str = "cloud"
    """a preset (cloud, hpc, manufacturing, datacenter, tasks), or the path of a trace or table (.swf, .csv, ...)"""
    objective: Literal["latency", "wait", "slowdown"] = "latency"
    """what to minimise"""
    seed: Natural = 1
    """seed of the fit"""
    generations: Natural = 50
    """of CMA-ES, 14 candidates each"""


def main(args: Args) -> None:
    check_ranges(args)
    console = Console(stderr=True)
    workload = load_workload(args.workload, "train", args)
    workload.report()
    rule = tune(
        workload, args.objective, args.seed, args.generations,
        each=lambda steps: track(steps, "tuning", console=console),
    )  # fmt: skip
    validation = at_loads(load_workload(args.workload, "validation", args), (0.9, 1.0, 1.1))
    found = {name: costs(simulate(validation, name), args.objective).mean(0) for name in (*RULES, rule)}
    for name in (*sorted(RULES, key=lambda name: found[name][0])[:5], "easy-fifo", rule):
        cost, p99, longest, _ = found[name] / found["easy-fifo"] - 1
        title = f"{parse_rule(name).title:20s} {args.objective}"
        console.print(f"{title} {cost:+.1%}, p99 of the wait {p99:+.1%}, longest {longest:+.1%}")
    print(rule)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
