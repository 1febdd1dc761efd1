"""FIFO, or any other priority rule, run and logged like an agent: the line that a policy has to beat.

    python fifo_baseline.py --workload cloud --rules fifo easy-fifo easy-sjf
    python fifo_baseline.py --workload my_cluster.swf.gz --rules easy-fifo plan --split test --output results.json
    tensorboard --logdir runs

A rule replays the split as it came, each segment from an empty machine. In TensorBoard `charts/...` are of one block of
about EPISODE_JOBS consecutive jobs after the other, as an agent's are of its episodes, and `eval/...` of the whole
replay; the global step counts jobs. Times are seconds.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from policies import load_policy
from simulator.schedule import Schedule, nothing_to_schedule
from training.arguments import Natural, check_ranges
from training.folder import new_folder
from training.logs import log_flags, start_wandb
from workloads.files import check_output, write_json
from workloads.load import load_workload
from workloads.reading import Reading

EPISODE_JOBS = 512  # the environment's default `num_jobs`
CHARTS = ("latency", "wait", "bounded_slowdown", "utilization")
EVAL = (*CHARTS, "wait_p99")


@dataclass
class Args(Reading):
    exp_name: str = "fifo_baseline"
    """the name of this experiment"""
    seed: Natural = 1
    """part of the run's name, as an agent's; rules always choose the same"""
    track: bool = False
    """if toggled, this experiment will be tracked with Weights and Biases"""
    wandb_project_name: str = "resourcerl"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""

    # Algorithm specific arguments
    workload: str = "cloud"
    """a preset (cloud, hpc, manufacturing, datacenter, tasks), or the path of a trace or table (.swf, .csv, ...)"""
    rules: tuple[str, ...] = ("fifo",)
    """the rules to run, each logged under its name; `plan` and `plan:RULE` plan ahead over a rule"""
    split: Literal["train", "validation", "test", "all"] = "validation"
    """which part of the trace, or which runs of the preset"""
    output: Path | None = None
    """where to write the figures as JSON"""

    # to be filled in runtime
    run_name: tyro.conf.Suppress[str] = ""


def figures(schedules: list[Schedule]) -> dict[str, float]:
    """Of a whole replay: means and tails over all its jobs, and the segments' mean utilization and makespan."""
    wait = np.concatenate([schedule.wait for schedule in schedules])
    return {
        "latency": float(np.concatenate([schedule.latency for schedule in schedules]).mean()),
        "wait": float(wait.mean()),
        "bounded_slowdown": float(np.concatenate([schedule.bounded_slowdown for schedule in schedules]).mean()),
        "utilization": float(np.mean([schedule.utilization for schedule in schedules])),
        "makespan": float(np.mean([schedule.makespan for schedule in schedules])),
        "wait_p99": float(np.percentile(wait, 99)),
        "wait_max": float(wait.max()),
    }


def log(schedules: list[Schedule], writer: SummaryWriter) -> None:
    """charts/... of every block of consecutive jobs, eval/... of all."""
    step = 0
    for schedule in schedules:
        jobs = np.arange(len(schedule.jobs))
        for own in np.array_split(jobs, max(1, len(jobs) // EPISODE_JOBS)):
            step += len(own)
            block = Schedule(schedule.jobs[own], schedule.cluster, schedule.start_time[own], schedule.node[own])
            metrics = block.metrics()
            for name in CHARTS:
                writer.add_scalar(f"charts/{name}", metrics[name], step)
    whole = figures(schedules)
    for name in EVAL:
        writer.add_scalar(f"eval/{name}", whole[name], step)


def run(args: Args) -> dict[str, dict[str, float]]:
    """Replay and log every rule. Returns their figures."""
    check_ranges(args)
    workload = load_workload(args.workload, args.split, args)
    rules = [load_policy(name) for name in dict.fromkeys(args.rules)]  # a wrong name ends it before anything is written
    if not rules:
        raise ValueError("--rules: none given; name some, such as: fifo easy-fifo")
    workload.report()
    folder = new_folder(args.workload, args.exp_name, args.seed)
    args.run_name = folder.name
    if args.track:
        from wandb.integration import tensorboard

        tensorboard.patch(root_logdir=str(folder))
        start_wandb(folder, asdict(args))
    results, waits = {}, []
    bar = Console(stderr=True)
    for rule in track(rules, "Replaying", console=bar, transient=True, disable=not bar.is_terminal):
        schedules = rule.schedule(workload)
        # An event file a rule: TensorBoard overlays their lines.
        with SummaryWriter(folder / rule.name) as writer:
            log_flags(writer, asdict(args))
            log(schedules, writer)
        results[rule.name] = figures(schedules)
        waits += [schedule.wait for schedule in schedules]
    if idle := nothing_to_schedule(workload, waits):
        print(idle, file=sys.stderr)
    return results


def table_of(args: Args, results: dict[str, dict[str, float]]) -> Table:
    title, caption = f"{args.workload}, {args.split} split", f"Logged under runs/{args.run_name}"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("rule")
    for heading in next(iter(results.values())):
        table.add_column(heading.replace("_", "\n"), justify="right")
    digits = {"bounded_slowdown": 2, "utilization": 4}
    for rule, metrics in results.items():
        table.add_row(rule, *(f"{value:,.{digits.get(name, 0)}f}" for name, value in metrics.items()))
    return table


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    try:
        if args.output:
            check_output(args.output)
        results = run(args)
        if args.output:
            write_json(args.output, {"workload": args.workload, "split": args.split, "policies": results})
    except (ValueError, OSError) as error:  # also WorkloadError
        print(f"fifo_baseline.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    # As wide as its figures: a narrow terminal may wrap a line, but nothing is cut.
    Console(width=1000).print(table_of(args, results))


if __name__ == "__main__":
    main()
