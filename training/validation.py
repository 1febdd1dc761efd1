"""What is judged on the validation split: the rules, the reference among them, and every policy that is proposed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from policies import called
from simulator.kernels import EASY, TETRIS, TUNED
from simulator.replay import simulate
from simulator.rules import RULES, parse_rule
from simulator.schedule import METRIC, Schedule, nothing_to_schedule
from training.arguments import RunArgs
from training.judgement import Judgement, judge, some_runs
from training.tuning import tune
from workloads.jobs import Workload, at_loads
from workloads.load import load_workload


class Validation:
    """The validation split, how the rules do on it, and the best that a run has found so far.

    Attributes:
        workload, segments: what is replayed: some of the split's segments, at each of `validation_loads`.
        rules: the Judgement of each rule.
        best_rule: the best of them that the agent may follow and that starves nobody.
        reference: the rule that training starts from, and that rewards are relative to.
        example, moment: the first replay under the best rule, and when its queue is longest: for the pictures.
        best_cost, stands_for: of the best policy so far; as long as that is a rule, its name, else None.
    """

    def __init__(self, args: RunArgs, training: Workload, console: Console) -> None:
        self.args = args
        self.workload = at_loads(load_workload(args.workload, "validation"), args.validation_loads)
        self.segments = some_runs(self.workload.segments, args.validation_jobs, len(args.validation_loads))
        known = [name for name in RULES if name != "tetris" or not args.lock_in]  # lock_in needs an order of jobs
        self.rules = {name: self.judge_rule(name, self.workload, self.segments) for name in known}
        rivals = [name for name in known if self.can_follow(name)]
        self.best_rule = min(filter(self.acceptable, rivals), key=lambda name: self.rules[name].cost)
        [self.example] = self.replay(self.best_rule, self.workload, self.segments[:1])
        submitted, started = self.example.jobs.submit_time, np.sort(self.example.start_time)
        queued = np.arange(len(submitted)) - np.searchsorted(started, submitted)
        self.moment = float(submitted[queued.argmax()])
        self.reference = self.choose_reference(training, console)
        self.rules[self.reference] = self.judge_rule(self.reference, self.workload, self.segments)
        kept = filter(self.acceptable, (*rivals, self.reference))
        self.stands_for: str | None = min(kept, key=lambda name: self.rules[name].cost)
        self.best_cost = self.rules[self.stands_for].cost

    def replay(self, rule: str, workload: Workload, segments: np.ndarray) -> list[Schedule]:
        """Under the semantics of the run."""
        args, threads = self.args, os.cpu_count() or 1
        return simulate(workload, rule, segments, backfill=args.backfill, lock_in=args.lock_in, threads=threads)

    def nothing_to_schedule(self) -> str | None:
        """A line that says so, where under plain FIFO, under which most wait, hardly anybody does."""
        schedules = self.replay("fifo", self.workload, self.segments)
        return nothing_to_schedule(self.workload, [np.concatenate([schedule.wait for schedule in schedules])])

    def judge_rule(
        self, name: str, workload: Workload, segments: np.ndarray, objective: str | None = None
    ) -> Judgement:
        return judge(self.replay(name, workload, segments), objective or self.args.objective)

    def can_follow(self, rule: str) -> bool:
        """Whether the agent may do what the rule does: without backfilling it may not."""
        return self.args.backfill == "easy" or self.args.lock_in or parse_rule(rule).mode != EASY

    @property
    def yardstick(self) -> str:
        """The rule whose tail of the wait is the measure: EASY-FIFO or, without backfilling, FIFO."""
        return "easy-fifo" if self.can_follow("easy-fifo") else "fifo"

    def acceptable(self, found: Judgement | str) -> bool:
        """No gain is bought with starvation: the tail of the wait is not much longer than the yardstick's."""
        found = self.rules[found] if isinstance(found, str) else found
        base, factor = self.rules[self.yardstick], self.args.max_tail
        return found.wait_p99 <= factor * base.wait_p99 and found.wait_max <= 3 * factor * base.wait_max

    def choose_reference(self, training: Workload, console: Console) -> str:
        """The rule that training starts from and rewards are relative to; it gets `--patience` where it has none."""
        args, name = self.args, self.args.reference
        if name != "auto" and not self.can_follow("easy-fifo" if name == "tuned" else name):
            raise ValueError(f"reference {name} backfills; with --backfill none use auto or a rule without easy-")
        if name == "tuned":
            return tune(
                training, args.objective, args.seed, args.tune_generations, backfill=args.backfill,
                lock_in=args.lock_in, each=lambda steps: track(steps, "tuning the rule to start from", console=console),
            )  # fmt: skip
        if name == "auto":
            # In training, rules with history are followed only approximately (`recorded_history`).
            without = [name for name in RULES if "history" not in name and name != "tetris"]
            name = self.robust_rule(training, [name for name in without if self.can_follow(name)])
        rule = parse_rule(name)
        if args.patience <= 0 or rule.patience < np.inf or rule.head in (TETRIS, TUNED):
            return name  # tetris has no order to put anyone in front of, a tuned rule a patience of its own
        longest = max(schedule.wait.max() for schedule in self.replay(self.yardstick, training, training.segments))
        return f"{name}@{args.patience * longest / 3600:.3g}"

    def robust_rule(self, training: Workload, names: list[str]) -> str:
        """The rule that does best in mean and in root mean square, on training and on validation. The mean alone, or
        the few busy weeks of validation alone, favour rules that starve some jobs: it shows later, in a busier time."""
        objective = self.args.learn_from or self.args.objective

        def weakness(name: str, workload: Workload, segments: np.ndarray) -> float:
            known = workload is self.workload and objective == self.args.objective
            found = self.rules[name] if known else self.judge_rule(name, workload, segments, objective)
            return float(np.log(found.cost) + np.log(found.rms))

        found = {name: weakness(name, self.workload, self.segments) for name in names}
        shortlist = sorted(names, key=found.__getitem__)[:8]  # training has many more jobs
        return min(shortlist, key=lambda name: found[name] + weakness(name, training, training.segments))

    def consider(self, schedules: list[Schedule]) -> tuple[bool, dict[str, float]]:
        """Judge a policy by its replays. Returns whether it is the best so far, and what is logged of it."""
        found, best_rule = judge(schedules, self.args.objective), self.rules[self.best_rule]
        better = found.cost < self.best_cost and self.acceptable(found)
        if better:
            self.best_cost, self.stands_for = found.cost, None
        metrics = [schedule.metrics() for schedule in schedules]
        means = {f"eval/{name}": float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        means |= {"eval/cost": found.cost, "eval/wait_p99": found.wait_p99}
        means |= {"eval/improvement": 1 - found.cost / best_rule.cost}
        return better, means | {"eval/best_improvement": 1 - self.best_cost / best_rule.cost}

    @property
    def best(self) -> float:
        """The cost of the best policy so far relative to the best rule's; -0.1: it is a tenth less."""
        return self.best_cost / self.rules[self.best_rule].cost - 1

    def results(self, title: str) -> list[tuple[str, float, float, float, float]]:
        """The policy, by that title, and the rules worth knowing, best first: validation cost, and relative to FIFO,
        EASY-FIFO and the best rule."""
        names = dict.fromkeys(("fifo", "easy-fifo", "easy-sjf", "easy-saf", self.reference, self.best_rule))
        rows = {parse_rule(name).title: self.rules[name].cost for name in names}
        rows[called(title, self.stands_for and parse_rule(self.stands_for).title)] = self.best_cost
        fifo, easy, best = (self.rules[name].cost for name in ("fifo", "easy-fifo", self.best_rule))
        ranked = sorted(rows.items(), key=lambda row: row[1])
        return [(name, cost, cost / fifo - 1, cost / easy - 1, cost / best - 1) for name, cost in ranked]

    def columns(self) -> list[str]:
        """What the results are."""
        return ["policy", METRIC[self.args.objective], "to FIFO", "to EASY-FIFO", f"to {self.best_rule}"]

    def table(self, title: str) -> Table:
        """The results, for the terminal."""
        table = Table(title=f"{Path(self.args.workload).name}: mean {self.args.objective} on the validation split")
        for column in self.columns():
            table.add_column(column, justify="left" if column == "policy" else "right")
        for name, cost, *relative in self.results(title):
            table.add_row(name, f"{cost:,.1f}", *(f"{share:+.1%}" for share in relative))
        return table
