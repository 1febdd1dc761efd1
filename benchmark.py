"""Compares policies on held-out jobs; replays RLScheduler's published protocol; measures the speed; searches flags.

    python benchmark.py compare --workload hpc --policies fifo easy-fifo easy-sjf runs/X/policy.onnx
    python benchmark.py compare --workload my_cluster.swf.gz --policies easy-fifo all --load 1.1 --output results.json
    python benchmark.py compare --workload my_cluster.swf.gz --policies easy-fifo easy-sjf runs/X --report report
    python benchmark.py rlscheduler --traces traces --reference rlscheduler.json
    python benchmark.py forecast --workload my_cluster.swf.gz
    python benchmark.py speed --output speed.json
    python benchmark.py sweep sweeps/ppo.yaml --trials 20

The work is done in evaluation/, in the file that is called like the command.
"""

import sys
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from typing import Any

import tyro
from rich import box
from rich.console import Console

from workloads.files import check_output, write_json

# The name of a command -> its module in evaluation, the class of its flags, and the function that does it. Only what is
# asked for is imported: speed and sweep take seconds.
COMMANDS = {
    "compare": ("compare", "Compare", "compare"),
    "rlscheduler": ("rlscheduler", "RLScheduler", "published"),
    "forecast": ("forecast", "Forecast", "forecast"),
    "speed": ("speed", "Speed", "measure"),
    "sweep": ("sweep", "Sweep", "optimise"),
}


def command_line() -> tuple[str, Any]:
    """The command's name and its flags; without a command, or with --help, all are listed."""
    name = sys.argv[1] if sys.argv[1:] and sys.argv[1] in COMMANDS else None
    named = {name: COMMANDS[name]} if name else COMMANDS
    flags = {name: getattr(import_module(f"evaluation.{module}"), args) for name, (module, args, _) in named.items()}
    args = tyro.extras.subcommand_cli_from_dict(flags, description=__doc__)
    return next(name for name, found in flags.items() if isinstance(args, found)), args


def main() -> None:
    name, args = command_line()
    module, _, function = COMMANDS[name]
    try:
        if args.output:
            check_output(args.output)
        results, table = getattr(import_module(f"evaluation.{module}"), function)(args)
        if args.output:
            write_json(args.output, results)
    except (ValueError, OSError) as error:  # also WorkloadError and PolicyError
        print(f"benchmark.py: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenProcessPool:
        lost = "a worker was ended, for want of memory perhaps; give fewer --workers"
        print(f"benchmark.py: {lost}; with --report, the same command goes on where it stopped", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        kept = name == "sweep" or (name == "compare" and args.report)
        more = "the same command goes on where it stopped" if kept else "nothing is kept"
        print(f"benchmark.py: interrupted; {more}", file=sys.stderr)
        sys.exit(130)
    table.box, table.padding, table.pad_edge = box.SIMPLE_HEAD, (0, 0), False
    Console(width=1000).print(table)  # as wide as its figures: a narrow terminal may wrap a line, but nothing is cut
    for line in results.get("notes", []):
        print(f"benchmark.py: {line}", file=sys.stderr)
    for line in (left_out := results.get("left_out", [])):
        print(f"benchmark.py: left out: {line}", file=sys.stderr)
    if left_out:
        sys.exit(1)


if __name__ == "__main__":
    main()
