"""Drives a real Slurm cluster with a policy: reads the queue over slurmrestd's unix socket, sets the jobs' priorities.

    python slurm_agent.py --policy runs/RUN/policy.onnx --mode shadow     # says what it would do, changes nothing
    python slurm_agent.py --policy runs/RUN/policy.onnx --mode live --metrics-port 9101
    python slurm_agent.py export --inputs jobcomp.log --output my_cluster.swf.gz   # finished jobs, to train on

Slurm keeps placement and backfilling; the agent only says in which order the pending jobs come. It keeps nothing that
Slurm does not know: killed at any moment it goes on from what Slurm says, and a cluster whose agent is dead has the
last order, with new jobs behind it in the order of their submission.

The cluster is one pool of processors, as in an SWF trace. Spoken is whichever version of Slurm's REST API slurmrestd
knows, from v0.0.38 (Slurm 22.05) to v0.0.43 (25.05).
The work is done in deployment/: priorities.py (the agent: see Agent.one_pass), slurm.py (Slurm's REST API) and
accounting.py (the export).
"""

import logging
import signal
import sys
import threading

import tyro

from deployment.accounting import Export, export
from deployment.priorities import Agent, Args, Metrics, check, log, serve_metrics, warm_up
from deployment.slurm import Slurm, SlurmError
from policies import load_policy


def main() -> None:
    try:
        if sys.argv[1:2] == ["export"]:
            print(export(tyro.cli(Export, prog="slurm_agent.py export", args=sys.argv[2:])))
            return
        args = tyro.cli(Args, description=__doc__)
        check(args)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        policy = load_policy(args.policy)
        warm_up(policy)
        metrics = Metrics(args.mode)
        serve_metrics(args, metrics)
        log.info("mode %s, policy %s, socket %s", args.mode, policy.name, args.socket)
        Agent(args, Slurm(args.socket), policy, metrics).run(stop)
    except (ValueError, OSError, SlurmError) as error:  # also PolicyError and WorkloadError
        print(f"slurm_agent.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
