"""The flags that all learners have, what is checked of them, and how a learner's command begins and ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro
from msgspec import Meta

from workloads.reading import Reading

# Ranges of flags, which `check` reads from their types
Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
AtLeastOne = Annotated[float, Meta(ge=1)]
Loads = Annotated[tuple[float, ...], Meta(gt=0)]  # each of them


@dataclass
class RunArgs(Reading):
    exp_name: str = "run"
    """the name of this experiment"""
    seed: Natural = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """if toggled, `torch.backends.cudnn.deterministic=True`"""
    cuda: bool = False
    """if toggled, the networks run on the GPU"""
    track: bool = False
    """if toggled, this experiment will be tracked with Weights and Biases (WANDB_MODE=offline needs no account)"""
    wandb_project_name: str = "resourcerl"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    resume: str | None = None
    """a run's folder: go on with it, under the flags that it was started with"""
    weights: str | None = None
    """weights.pt of an earlier run of the same algorithm: what the networks start from, instead of at random"""
    run_name: str | None = None
    """the run's folder is runs/RUN_NAME, instead of one whose name ends with the time"""
    checkpoint_seconds: NotNegative = 30.0
    """a checkpoint is written after the first iteration and then every so many seconds: what a kill may cost"""

    workload: str = "cloud"
    """a preset (cloud, hpc, manufacturing, datacenter, tasks), or the path of a trace or table (.swf, .csv, ...)"""
    objective: Literal["latency", "wait", "slowdown"] = "latency"
    """what to minimise"""
    learn_from: Literal["latency", "wait", "slowdown", "tail"] | None = None
    """what rewards and the choice of the reference are about, if not the objective itself: the wait says more surely
    which choice was good than the slowdown, which a few short jobs make up; tail: squares of the waits. A tuned
    reference is fitted to the objective"""
    reference: str = "auto"
    """the rule to start from, which rewards are relative to; auto: the one with the lowest mean and root mean square
    on training and validation; tuned: one that is fitted to the training jobs first"""
    tune_generations: Natural = 50
    """how long to fit a tuned one"""
    patience: Share = 0.8
    """a job that has waited for this share of the longest accepted wait (see max_longest) goes first; 0: no such thing.
    A rule with a patience of its own keeps it"""
    reward: Literal["improvement", "cost"] = "improvement"
    """improvement over the reference, or cost"""
    num_jobs: Count = 512
    """jobs that arrive while the agent decides"""
    warmup_jobs: Natural = 256
    """jobs that the reference schedules before"""
    followup_jobs: Natural = 512
    """jobs that the reference schedules after; their cost counts"""
    episodes_in_a_row: Count = 1
    """so many follow each other on one cluster, each beginning with the backlog that the agent left; more than a
    reference leaves after a warm-up. A row ends where a job is older than the last `warmup_jobs`"""
    training_loads: Loads = (1.0,)
    """training jobs arrive so many times as fast, each of the factors as often: several prepare for busier times than
    the trace has had"""
    queue_window: Annotated[int, Meta(ge=1, le=10_000)] = 64
    """how many queued jobs the agent sees, the oldest and those that the reference ranks first"""
    backfill: Literal["easy", "none"] = "easy"
    """what may happen while a reservation stands: backfilling or nothing"""
    lock_in: bool = False
    """RLScheduler's semantics: a chosen job holds the queue until it has started"""
    num_evaluations: Natural = 10
    """how often the policy is replayed on the validation split, besides what it starts from; the best one is kept"""
    validation_loads: Loads = (0.9, 1.0, 1.1)
    """it is replayed with arrivals compressed by these factors: one replay of a busy machine says little"""
    validation_jobs: Count = 65_000
    """at most so many jobs are replayed, all loads together"""
    max_tail: AtLeastOne = 1.2
    """the p99 of the wait on validation may be at most so many times EASY-FIFO's (without backfilling: FIFO's)"""
    max_longest: AtLeastOne = 3.6
    """nobody may wait on validation for longer than so many times the longest wait under EASY-FIFO, on training or on
    validation"""

    # Every learner has these, each with a default and a meaning of its own, among its algorithm's: see its script
    total_timesteps: int = 0
    learning_rate: float = 0.0
    num_envs: int = 0
    num_steps: int = 0
    anneal_lr: bool = True

    @property
    def decisions(self) -> int:
        """Of one iteration, in all clusters together."""
        return self.num_envs * self.num_steps

    @property
    def iterations(self) -> int:
        """How many a run has."""
        return max(1, self.total_timesteps // self.decisions)


def check(args: RunArgs) -> None:
    """Refuse what would fail later, and say less, or not at all.

    Raises:
        ValueError: a flag is out of its range.
    """
    check_ranges(args)
    if not args.validation_loads or not args.training_loads:
        raise ValueError("no load is given; name one behind --validation-loads and --training-loads, or leave them out")


def check_ranges(args: object) -> None:
    """Of a command's flags, those whose type names a range.

    Raises:
        ValueError: one is beyond it.
    """
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        for meta in getattr(hint, "__metadata__", ()):
            if not isinstance(meta, Meta):
                continue  # tyro's
            given = getattr(args, name)
            for value in given if isinstance(given, tuple) else (given,):
                if not _within(value, meta):
                    raise ValueError(f"{name} is {value}; use {_range(meta)}")


def _within(value: float, meta: Meta) -> bool:
    """NaN is in no range."""
    return (
        (meta.ge is None or value >= meta.ge) and (meta.gt is None or value > meta.gt)
        and (meta.le is None or value <= meta.le) and (meta.lt is None or value < meta.lt)
    )  # fmt: skip


def _range(meta: Meta) -> str:
    """In words."""
    least = f"{meta.ge} or more" if meta.ge is not None else f"more than {meta.gt}"
    if meta.le is None and meta.lt is None:
        return least
    most = f"at most {meta.le}" if meta.le is not None else f"less than {meta.lt}"
    return f"{meta.ge} to {meta.le}" if meta.ge is not None and meta.le is not None else f"{least}, {most}"


A = TypeVar("A", bound=RunArgs)


def command_line(kind: type[A]) -> A:
    """The flags; behind --resume those of the run, and no others.

    Raises:
        ValueError: a flag contradicts the run that is to go on, or there is none.
    """
    args = tyro.cli(kind)
    if args.resume is None:
        return args
    path = Path(args.resume) / "args.json"
    try:
        stored: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()
        }
        run = kind(**(stored | {"resume": args.resume}))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; name the folder of a run, as in runs/<run_name>") from error
    if others := asdict(tyro.cli(kind, default=run)).items() - asdict(run).items():
        names = ", ".join(sorted(name for name, _ in others))
        raise ValueError(f"--resume goes on with the flags of the run; leave out {names}, or start a new run")
    return run


def run_command(main: Callable[[A], int], kind: type[A], memory: str) -> None:
    """Call `main` with the flags of the command line. What the user can mend ends it with one line and exit code 2.

    Args:
        main: returns the exit code.
        memory: the flags that take less memory where they are lower.
    """
    try:
        code = main(command_line(kind))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # how PyTorch says it on the CPU
            raise
        why = str(error).partition("\n")[0]
        print(f"error: out of memory ({why}); use fewer {memory}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # in training Ctrl-C saves the run and ends it
        sys.exit(130)
    if code:
        sys.exit(code)
