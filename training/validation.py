"""What is judged on the validation split: the rules, the reference among them, and every policy that is proposed."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import NamedTuple

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

POLICY = "policy.onnx"  # the best network within the flags' bounds, or the rule that stands for it
# Beside it the best network of each bound on the tail: the p99 at most so many times EASY-FIFO's.
TAILS = {
    "policy-tail-1.0.onnx": 1.0,
    "policy-tail-1.5.onnx": 1.5,
    "policy-tail-2.0.onnx": 2.0,
    "policy-any.onnx": math.inf,
}


class Considered(NamedTuple):
    """What has been found of a network: the files that it is now the best for, what is logged, and what is said."""

    files: list[str]
    metrics: dict[str, float]
    said: str


class Validation:
    """The validation split, how the rules do on it, and the best that a run has found so far.

    Every rule counts twice: as it is, and with a patience that keeps the longest wait within the bound.

    Attributes:
        workload, segments: what is replayed: some of the split's segments, at each of `validation_loads`.
        longest: seconds that nobody may wait for longer than (on average over the replays): `max_longest` times the
            longest wait under EASY-FIFO, on the training or on the validation split, whichever is longer.
        rules: the Judgement of each rule, and of those with patience whose name it changes something for.
        best_rule: the best of them that the agent may follow and that starves nobody.
        reference: the rule that training starts from, and that rewards are relative to.
        example, moment: the first replay under the best rule, and when its queue is longest: for the pictures.
        best_cost: of the best policy so far, at first of the best rule.
        stands_for: the rule that policy.onnx stands for as long as no network is better, else None.
        kept: of each file that holds a network, the decisions of training before it and its Judgement.
        at_first: a checksum of what the first network decided.
    """

    def __init__(self, args: RunArgs, training: Workload, console: Console) -> None:
        self.args, self.training = args, training
        self.workload = at_loads(load_workload(args.workload, "validation", args), args.validation_loads)
        self.segments = some_runs(self.workload.segments, args.validation_jobs, len(args.validation_loads))
        known = [name for name in RULES if name != "tetris" or not args.lock_in]  # lock_in needs an order of jobs
        self.rules = {self.yardstick: self.judge_rule(self.yardstick, self.workload, self.segments)}
        before = max(schedule.wait.max() for schedule in self.replay(self.yardstick, training, training.segments))
        self.longest = args.max_longest * max(before, self.rules[self.yardstick].wait_max)
        for name in known:
            self.rules[name] = self.judge_rule(name, self.workload, self.segments)
            if (patient := self.patient(name)) != name and self.rules[name].wait_max > 3600 * self.hours:
                self.rules[patient] = self.judge_rule(patient, self.workload, self.segments)
        rivals = [name for name in self.rules if self.can_follow(name)]
        accepted = [name for name in rivals if self.acceptable(name)]
        self.best_rule = min(accepted, key=lambda name: self.rules[name].cost)
        [self.example] = self.replay(self.best_rule, self.workload, self.segments[:1])
        submitted, started = self.example.jobs.submit_time, np.sort(self.example.start_time)
        queued = np.arange(len(submitted)) - np.searchsorted(started, submitted)
        self.moment = float(submitted[queued.argmax()])
        self.reference = self.choose_reference(accepted, console)
        self.rules[self.reference] = self.judge_rule(self.reference, self.workload, self.segments)
        kept = [*accepted, self.reference] if self.acceptable(self.reference) else accepted
        self.stands_for: str | None = self.robust_rule(kept, self.args.objective)
        self.best_cost = self.rules[self.best_rule].cost
        self.kept: dict[str, tuple[int, Judgement]] = {}
        self.at_first = ""

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

    @property
    def hours(self) -> float:
        """The patience of rules that have none of their own. It keeps the longest wait within the bound, less what the
        machine takes to make room for who has lost it."""
        return self.args.patience * self.longest / 3600

    def patient(self, name: str) -> str:
        """The rule with that patience, if it has none and can have one: tetris has no order to put anyone in front
        of."""
        rule = parse_rule(name)
        if self.args.patience <= 0 or rule.patience < np.inf or rule.head in (TETRIS, TUNED):
            return name
        return f"{name}@{self.hours:.3g}"

    def acceptable(self, found: Judgement | str) -> bool:
        """No gain is bought with starvation: the tail of the wait is not much longer than the yardstick's."""
        return self.refusal(found) is None

    def refusal(self, found: Judgement | str) -> str | None:
        """Why that is not accepted: what is wrong with the tail of its wait, and the flags that would accept it."""
        found = self.rules[found] if isinstance(found, str) else found
        base, args = self.rules[self.yardstick], self.args
        p99, longest = found.wait_p99 / base.wait_p99, found.wait_max / self.longest * args.max_longest
        if p99 <= args.max_tail and longest <= args.max_longest:
            return None
        tails, flags = [], []
        if p99 > args.max_tail:
            tails.append(f"its p99 of the wait is {p99:.2f} times {parse_rule(self.yardstick).title}'s")
            flags.append(f"--max-tail {rounded_up(p99)}")
        if longest > args.max_longest:
            tails.append(f"one job waits for {found.wait_max / 3600:.3g} hours")
            flags.append(f"--max-longest {rounded_up(longest)}")
        return f"{' and '.join(tails)}; `{' '.join(flags)}` accepts it"

    def choose_reference(self, accepted: list[str], console: Console) -> str:
        """The rule that training starts from and rewards are relative to; it gets `--patience` where it has none."""
        args, name = self.args, self.args.reference
        if name != "auto" and not self.can_follow("easy-fifo" if name == "tuned" else name):
            raise ValueError(f"reference {name} backfills; with --backfill none use auto or a rule without easy-")
        if name == "tuned":
            return tune(
                self.training, args.objective, args.seed, args.tune_generations, backfill=args.backfill,
                lock_in=args.lock_in, each=lambda steps: track(steps, "tuning the rule to start from", console=console),
            )  # fmt: skip
        if name == "auto":
            # In training, rules with history are followed only approximately (`recorded_history`).
            without = [name for name in accepted if "history" not in name and name != "tetris"]
            name = self.robust_rule(without or [self.yardstick], args.learn_from or args.objective)
        return self.patient(name)

    def robust_rule(self, names: list[str], objective: str) -> str:
        """The rule that does best in mean and in root mean square, on training and on validation. The mean alone, or
        the few busy weeks of validation alone, favour rules that starve some jobs: it shows later, in a busier time
        (docs/experiments.md, how a rule is chosen)."""

        def weakness(name: str, workload: Workload, segments: np.ndarray) -> float:
            known = workload is self.workload and objective == self.args.objective
            found = self.rules[name] if known else self.judge_rule(name, workload, segments, objective)
            return float(np.log(found.cost) + np.log(found.rms))

        found = {name: weakness(name, self.workload, self.segments) for name in names}
        shortlist = sorted(names, key=found.__getitem__)[:8]  # training has many more jobs
        training = self.training
        return min(shortlist, key=lambda name: found[name] + weakness(name, training, training.segments))

    def consider(self, schedules: list[Schedule], steps: int) -> Considered:
        """Judge a network by its replays, after so many decisions of training."""
        found, best_rule = judge(schedules, self.args.objective), self.rules[self.best_rule]
        refusal, so_far = self.refusal(found), self.best_cost
        started = hashlib.sha256(b"".join(schedule.start_time.tobytes() for schedule in schedules)).hexdigest()
        self.at_first = self.at_first or started
        unmoved = started == self.at_first and steps > 0
        kept = [file for file, tail in TAILS.items() if self.within(found, tail) and self.cheapest(file, found)]
        kept = [] if unmoved or steps == 0 else kept
        if refusal is None and found.cost < self.best_cost:
            self.best_cost, self.stands_for = found.cost, None
            kept.append(POLICY)
        self.kept |= {file: (steps, found) for file in kept}
        metrics = [schedule.metrics() for schedule in schedules]
        means = {f"eval/{name}": float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        means |= {"eval/cost": found.cost, "eval/wait_p99": found.wait_p99}
        means |= {"eval/improvement": 1 - found.cost / best_rule.cost}
        means |= {"eval/best_improvement": 1 - self.best_cost / best_rule.cost}
        said = f"{steps:,} decisions: {found.cost / best_rule.cost - 1:+.1%} to {self.best_rule}, "
        if unmoved:
            said += "unmoved: not one decision of the replays differs from those at the start"
        elif refusal:
            said += f"refused for its tail: {refusal}"
        else:
            said += "the best so far" if POLICY in kept else f"not better than the best so far, {so_far:,.1f}"
        return Considered(kept, means, said)

    def within(self, found: Judgement, tail: float) -> bool:
        """Whether that would be accepted if `max_tail` were `tail`, and `max_longest` lower or higher by as much."""
        share = tail / self.args.max_tail
        p99 = found.wait_p99 <= tail * self.rules[self.yardstick].wait_p99
        return p99 and found.wait_max <= share * self.longest

    def cheapest(self, file: str, found: Judgement) -> bool:
        return file not in self.kept or found.cost < self.kept[file][1].cost

    @property
    def best(self) -> float:
        """The cost of the best policy so far relative to the best rule's; -0.1: it is a tenth less."""
        return self.best_cost / self.rules[self.best_rule].cost - 1

    def refused(self) -> list[str]:
        """The three best of the rules that have a lower mean than the best rule, and starve somebody."""
        names = [name for name in self.rules if self.can_follow(name) and not self.acceptable(name)]
        better = [name for name in names if self.rules[name].cost < self.rules[self.best_rule].cost]
        return sorted(better, key=lambda name: self.rules[name].cost)[:3]

    def results(self, title: str) -> list[tuple[str, float, float, float, float, float, float]]:
        """The policy, by that title, the rules worth knowing, and the best networks of other tails, best first:
        validation cost, relative to FIFO, EASY-FIFO and the best rule; p99 and longest wait in EASY-FIFO's. What does
        the same is one row, its names a line each."""
        known = ("fifo", "easy-fifo", "easy-sjf", "easy-saf", self.reference, self.best_rule)
        named = [(parse_rule(name).title, self.rules[name]) for name in dict.fromkeys((*known, *self.refused()))]
        if self.stands_for is not None:
            named.append((called(title, parse_rule(self.stands_for).title), self.rules[self.stands_for]))
        files = {file: self.kept[file] for file in (POLICY, *TAILS) if file in self.kept}
        networks = {steps: (file, found) for file, (steps, found) in reversed(files.items())}  # POLICY's name first
        for steps, (file, found) in networks.items():
            named.append((f"{title if file == POLICY else file}, {steps:,} decisions", found))
        rows: dict[Judgement, list[str]] = {}
        for name, found in named:
            rows.setdefault(found, []).append(name)
        fifo, easy, best = (self.rules[name].cost for name in ("fifo", "easy-fifo", self.best_rule))
        base = self.rules[self.yardstick]
        return [
            ("\n".join(names), found.cost, found.cost / fifo - 1, found.cost / easy - 1, found.cost / best - 1,
             found.wait_p99 / base.wait_p99, found.wait_max / base.wait_max)
            for found, names in sorted(rows.items(), key=lambda row: row[0].cost)
        ]  # fmt: skip

    def columns(self) -> list[str]:
        """What the results are."""
        relative = ["to FIFO", "to EASY-FIFO", f"to {self.best_rule}"]
        return ["policy", METRIC[self.args.objective], *relative, "p99", "longest"]

    def table(self, title: str) -> Table:
        """The results, for the terminal."""
        table = Table(
            title=f"{Path(self.args.workload).name}: mean {self.args.objective} on the validation split"
            f"\n(p99 and longest wait: so many times {parse_rule(self.yardstick).title}'s)"
        )
        for column in self.columns():
            table.add_column(column, justify="left" if column == "policy" else "right")
        for name, cost, *relative, p99, longest in self.results(title):
            table.add_row(
                name, f"{cost:,.1f}", *(f"{share:+.1%}" for share in relative), f"{p99:.2f}", f"{longest:.2f}"
            )
        return table

    def thrown_out(self) -> list[str]:
        """A line for each of the refused rules: what it would gain, and what would accept it."""
        best = self.rules[self.best_rule].cost
        return [
            f"{name}: {self.rules[name].cost / best - 1:+.1%} to {self.best_rule}, but {self.refusal(name)}"
            for name in self.refused()
        ]


def rounded_up(factor: float) -> str:
    """To one decimal, never below."""
    return f"{math.ceil(10 * factor) / 10:g}"
