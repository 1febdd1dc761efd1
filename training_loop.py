"""The retraining loop: collect, train, evaluate, store, promote, and again; Temporal keeps it going.

    python training_loop.py start --local --rounds 3 --interval 0      # everything in one terminal, to the end

    python training_loop.py server                                     # each of these in a terminal of its own
    python training_loop.py worker
    python training_loop.py start --workload decisions.jsonl --deploy-to policy.onnx
    python training_loop.py status

The work is done in orchestration/. docs/retraining.md says what happens when something fails.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import tyro
from temporalio.client import WorkflowQueryFailedError
from temporalio.service import RPCError

from orchestration import client
from orchestration.server import command

# The name of a command -> the class of its flags, and what does it.
COMMANDS: dict[str, tuple[type[Any], Callable[[Any], Coroutine[Any, Any, None]]]] = {
    "worker": (client.Worker, client.work),
    "test": (client.Test, client.test),
    "schedule-jobs": (client.ScheduleJobs, client.schedule_jobs),
    "start": (client.Start, client.start),
    "status": (client.ShowStatus, client.status),
    "stop": (client.Stop, client.stop),
    "pause": (client.Pause, client.pause),
    "resume": (client.Resume, client.resume),
    "retrain-now": (client.RetrainNow, client.retrain_now),
    "configure": (client.Configure, client.configure),
    "promote": (client.Promote, client.promote),
    "rollback": (client.Rollback, client.rollback),
    "every": (client.Every, client.every),
    "unschedule": (client.Unschedule, client.unschedule),
}


def serve(args: client.Server) -> None:
    """Becomes the server."""
    program = command(args.db, args.port, args.ui_port)
    print(f"Temporal at 127.0.0.1:{args.port}, its page: http://127.0.0.1:{args.ui_port}", file=sys.stderr)
    os.execv(program[0], program)


def command_line(arguments: list[str] | None = None) -> Any:
    """The flags of the command."""
    flags = {"server": client.Server} | {name: flags for name, (flags, _) in COMMANDS.items()}
    return tyro.extras.subcommand_cli_from_dict(flags, description=__doc__, args=arguments)


def run(args: Any) -> int:
    """Do what the flags say. Returns the exit code."""
    try:
        if isinstance(args, client.Server):
            serve(args)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has started it with &
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        asyncio.run(dict(COMMANDS.values())[type(args)](args))
    except (RPCError, WorkflowQueryFailedError) as error:
        print(f"training_loop.py: {client.in_one_line(error, getattr(args, 'id', 'Temporal'))}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"training_loop.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> None:
    code = run(command_line())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        code
    )  # threads of Temporal's library may still run, and must not meet an interpreter that takes itself down


if __name__ == "__main__":
    main()
