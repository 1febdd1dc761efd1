"""A run of a learner: all of it that is no algorithm.

    with Run(args, "ppo") as run:
        agent = Agent(run.layout.resources)
        run.begin(agent, {}, model=agent)
        for iteration in run.iterations():
            ...
            run.log(losses, learning_rate, episodes)
        run.end()

Whatever ends the run, leaving it closes its logs and gives its folder free.
"""

from __future__ import annotations

import inspect
import math
import os
import shlex
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from policies import VERSION, OnnxPolicy
from scheduler_env import SchedulerVectorEnv
from simulator.kernels import CLUSTER_FEATURES, JOB_FEATURES, NODE_FEATURES
from simulator.rules import parse_rule
from simulator.schedule import Schedule
from training.arguments import RunArgs
from training.checkpoint import Stateful, load, load_networks, networks, random_state, save, set_random_state
from training.export import FollowRule, check_export, export_onnx
from training.folder import free_folder, lock, named_folder, new_folder
from training.logs import CHARTS, end_wandb, log_start, log_success, log_validation, start_wandb
from training.validation import TAILS, Validation
from workloads.files import digest, from_here, replacing, write_json
from workloads.jobs import Workload, at_loads, workload_digest
from workloads.load import load_workload
from workloads.reading import quoted

BENCHMARK = Path(__file__).parents[1] / "benchmark.py"


UNNAMED = tuple(f"resource {r}" for r in range(16))  # in a record of states that do not name them


class Changed(Exception):
    """The workload of a run is not what it was when the run began."""


class Run:
    """Its folder and environments, validation beside the training, checkpoints, logs, and what is printed.

    Attributes:
        args: the flags; behind them the reference that was chosen.
        envs, layout, device: the clusters that the agent learns from, how their observations are laid out, and where
            the networks are.
        iteration: how many are over.
    """

    def __init__(self, args: RunArgs, algorithm: str) -> None:
        """Read the workload, judge the rules, and make the environments. Random numbers begin with the seed here.

        Raises:
            ValueError: the workload or a flag cannot be used.
        """
        self.args, self.algorithm = args, algorithm
        self.resumed, self.folder, args.resume = args.resume is not None, Path(args.resume or "runs"), None
        self.open = ExitStack()  # what has to be put back or closed, whatever ends the run
        if self.resumed:
            self.open.enter_context(lock(self.folder))
        elif args.run_name is not None:
            self.folder = free_folder(args.run_name)
        self.console = Console(stderr=True)
        self.say = partial(self.console.print, markup=False, soft_wrap=True)  # commands to copy
        self.device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
        if args.cuda and not torch.cuda.is_available():
            if not self.resumed:
                raise ValueError("--cuda: PyTorch finds no GPU here; leave it out")
            self.say("PyTorch finds no GPU here: the run, which had one, goes on without.")
        torch.manual_seed(args.seed)
        torch.set_num_threads(1)  # the other cores are for the simulator, and for the halves of an update
        torch.backends.cudnn.deterministic = args.torch_deterministic
        workload = self.read_workload()
        workload.report()
        self.validation = Validation(args, workload, self.console)
        # Of a trace these are all jobs, of a preset those of training.
        self.jobs_sha256 = digest(*(workload_digest(w).encode() for w in (workload, self.validation.workload)))
        if idle := self.validation.nothing_to_schedule():
            self.say(idle)
        args.reference = self.validation.reference
        self.envs = SchedulerVectorEnv(
            args.num_envs, at_loads(workload, args.training_loads), num_jobs=args.num_jobs,
            warmup_jobs=args.warmup_jobs, followup_jobs=args.followup_jobs, episodes_in_a_row=args.episodes_in_a_row,
            queue_window=args.queue_window, backfill=args.backfill, lock_in=args.lock_in, reference=args.reference,
            recorded_history=True, objective=args.learn_from or args.objective, reward=args.reward,
        )  # fmt: skip
        self.layout = self.envs.layout
        self.iteration, self.speed, self.signal = 0, 0, 0
        self.worker = ThreadPoolExecutor(1)
        self.proposed: tuple[int, Future[list[Schedule]]] | None = None  # the iteration, and its replay
        self.candidate: OnnxPolicy | None = None  # the one that was proposed last
        self.judged = -1  # the iteration that was judged last
        self.saved: int | None = None  # the number of decisions before the last checkpoint

    def read_workload(self) -> Workload:
        """Raises ValueError: it cannot be used; or where to resume a run from that was started elsewhere."""
        args = self.args
        try:
            return load_workload(args.workload, "train", args)
        except ValueError as error:
            started = self.folder.resolve().parent.parent  # runs/RUN is there
            if not self.resumed or Path(args.workload).exists() or not (started / args.workload).exists():
                raise
            raise ValueError(
                f"{args.workload}: no such file here; the run's --workload names it. Resume from where the run was "
                f"started: cd {shlex.quote(str(started))}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.open.close()

    def begin(self, exported: nn.Module, health: dict[str, list[str]], *, model: nn.Module, **parts: Stateful) -> None:
        """Make the folder, or go on from its checkpoint; begin the logs.

        Args:
            exported: the network that is validated and exported, as it is at the time.
            health: titles of charts, and the losses in each, that tell whether updates are healthy.
            model: the network that is trained.
            parts: what else a checkpoint holds, besides the state of the run itself.

        Raises:
            ValueError: the checkpoint is damaged or from another version, nobody is logged in at W&B, or what is
                trained and what is exported are not the same network.
        """
        args, self.exported = self.args, exported
        self.parts: dict[str, Stateful] = {"model": model, **parts}
        if not self.resumed:
            self.envs.reset(seed=args.seed)
            check_export(model, self.layout.split(torch.from_numpy(self.envs.observations).to(self.device)))
            if args.run_name is None:
                self.folder = new_folder(args.workload, args.exp_name, args.seed)
            else:
                self.folder = named_folder(args.run_name)
            self.open.enter_context(lock(self.folder))
        if args.track:
            start_wandb(self.folder, asdict(args), sync_tensorboard=True, id=self.folder.name, resume="allow")
        if self.resumed:
            self.restore()
        else:
            if args.weights is not None:
                load_networks(Path(args.weights), self.parts, self.device)
            # Until a policy is better than every rule on validation, the file stands for the best of them.
            self.export(FollowRule(), "policy.onnx", self.validation.stands_for)
            write_json(self.folder / "args.json", asdict(args))
        reference, best_rule = parse_rule(args.reference).title, self.validation.best_rule
        self.say(f"run: {self.folder}   reference rule: {reference}   best rule on validation: {best_rule}")
        purge_step = self.iteration * args.decisions + 1 if self.resumed else None
        self.writer = SummaryWriter(self.folder, purge_step=purge_step)
        self.open.callback(self.writer.close)
        log_start(self.writer, asdict(args), self.validation, health)

    def iterations(self) -> Iterator[int]:
        """The numbers of the iterations that are left, until the last is over or somebody stops the run. Between them
        it proposes and judges policies, writes checkpoints, and shows how far it is."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        validation, total, saved, told = self.validation, self.args.iterations, -math.inf, -math.inf
        with ExitStack() as training:
            self.open.push(training)  # also where an iteration fails
            for number in (signal.SIGINT, signal.SIGTERM):
                training.callback(signal.signal, number, signal.signal(number, self.interrupt))
            progress = training.enter_context(Progress(*columns, console=self.console))
            bar = progress.add_task("training", total=total, completed=self.iteration)
            if self.proposed and self.due() and self.proposed[0] < self.iteration:
                self.judge_proposed()
            if self.due() and not self.proposed and self.judged < self.iteration:
                self.propose()
            self.began, self.first = time.time(), self.iteration
            while self.iteration < total and not self.signal:
                yield self.iteration
                self.iteration += 1
                if self.proposed and (self.due() or self.proposed[1].done()):
                    self.judge_proposed()
                if self.due() and not self.signal:
                    self.propose()
                if time.monotonic() - saved >= self.args.checkpoint_seconds:
                    self.checkpoint()
                    saved = time.monotonic()
                if time.monotonic() - told >= 1.0:
                    self.write_progress()
                    told = time.monotonic()
                said = f"{self.speed:,} decisions/s, best so far {validation.best:+.1%} to {validation.best_rule}"
                progress.update(bar, advance=1, description=said)
            if self.proposed:
                self.judge_proposed()
            self.checkpoint()
            with replacing(self.folder / "weights.pt") as temporary:
                torch.save(networks(self.parts), temporary)  # in a form that `torch.load` reads without running code
            self.write_progress()

    def due(self) -> bool:
        """A validation: before the first iteration, after the last, and evenly in between."""
        evaluations = max(1, self.args.num_evaluations)
        return self.iteration * evaluations % self.args.iterations < evaluations

    def interrupt(self, number: int, _: object) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        self.end_replay()
        self.console.print("Stopping, once what is new is saved. Ctrl-C again: without.")

    def log(self, losses: dict[str, float], learning_rate: float, episodes: list[dict[str, Any]]) -> None:
        """Of the iteration under way: its losses, and the `final_info` of the episodes that ended in it."""
        done = self.iteration + 1 - self.first
        self.speed = int(done * self.args.decisions / (time.time() - self.began))
        scalars = {f"losses/{name}": value for name, value in losses.items()}
        scalars |= {"charts/learning_rate": learning_rate, "charts/SPS": self.speed}
        if episodes:
            scalars |= {f"charts/{tag}": float(np.mean([e[name] for e in episodes])) for tag, name in CHARTS.items()}
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, (self.iteration + 1) * self.args.decisions)

    def end(self) -> int:
        """Close the logs, and print how the policy did and what to do with it.

        Returns the exit code: 0 or, where a signal ended it early, 128 and its number.
        """
        args, validation, title = self.args, self.validation, self.algorithm.upper()
        finished = self.iteration == args.iterations and not self.proposed
        if finished:
            log_success(self.writer)
        self.writer.close()
        if args.track:
            policy = self.folder / "policy.onnx"
            end_wandb(validation, title, policy, asdict(OnnxPolicy(policy).metadata))
        Console().print(validation.table(title))
        for line in validation.thrown_out():
            self.say(f"Refused: {line}")
        if validation.stands_for:
            rule = parse_rule(validation.stands_for).title
            self.say(
                f"No network within these bounds is better than {validation.best_rule} on validation: policy.onnx "
                f"stands for {rule}, the rule that does best on training and validation."
            )
        if not finished:
            script = from_here(Path(inspect.getfile(type(args))))  # somebody's copy, it may be
            self.say(f"Interrupted. Go on with: python {script} --resume {shlex.quote(str(self.folder))}")
        else:
            policies = *dict.fromkeys(("fifo", "easy-fifo", validation.best_rule)), str(self.folder / "policy.onnx")
            self.say(
                f"Compare on the test split: python {from_here(BENCHMARK)} compare --workload "
                f"{shlex.quote(args.workload)}{quoted(args.flags())} --objective {args.objective} "
                f"--policies {shlex.join(policies)}"
            )
        return 0 if finished else 128 + self.signal

    def propose(self) -> None:
        """Export the network, and begin to replay it on the validation split while training goes on."""
        self.export(self.exported, "candidate.onnx", None)
        self.replay_candidate(self.iteration)

    def replay_candidate(self, iteration: int) -> None:
        self.candidate = OnnxPolicy(self.folder / "candidate.onnx")
        replay = self.worker.submit(self.candidate.schedule, self.validation.workload, self.validation.segments)
        self.proposed = iteration, replay

    def end_replay(self) -> None:
        """At its next decision. A run that goes on begins it anew."""
        if self.candidate:
            self.candidate.run_options.terminate = True

    def judge_proposed(self) -> None:
        """Wait until the replay is over; the best policy so far is policy.onnx. If somebody stops the run meanwhile,
        the policy is still proposed."""
        assert self.proposed is not None
        iteration, replay = self.proposed
        if self.signal:
            self.end_replay()
        try:
            schedules, candidate = replay.result(), self.folder / "candidate.onnx"
        except Exception:
            if self.signal:
                return
            raise
        self.judged, self.proposed = iteration, None
        steps = iteration * self.args.decisions
        considered = self.validation.consider(schedules, steps)
        for file in considered.files:
            with replacing(self.folder / file) as temporary:
                temporary.write_bytes(candidate.read_bytes())
        candidate.unlink(missing_ok=True)
        self.say(considered.said)
        log_validation(self.writer, self.validation, considered.metrics, schedules[0], steps)

    def export(self, network: nn.Module, file: str, rule: str | None) -> None:
        """Write a network into the folder; `rule`: it stands for that rule."""
        args, names = self.args, self.envs.workload.cluster.resources
        metadata = {
            "version": VERSION, "algorithm": self.algorithm, "workload": args.workload, "objective": args.objective,
            "reference": rule or args.reference, "backfill": args.backfill, "lock_in": args.lock_in,
            "queue_window": args.queue_window, "nodes": self.layout.nodes, "resources": self.layout.resources,
            "job_features": JOB_FEATURES, "node_features": NODE_FEATURES, "cluster_features": CLUSTER_FEATURES,
            "steps": self.iteration * args.decisions, "seed": args.seed, "rule": rule,
            "resource_names": None if names == UNNAMED[: len(names)] else names,
        }  # fmt: skip
        export_onnx(network, self.folder / file, self.layout, metadata)

    def write_progress(self) -> None:
        """progress.json, for programs that watch the run: decisions so far and in all, the best policy so far relative
        to the best rule, decisions a second, and how many decisions are safe in the last checkpoint."""
        progress = {
            "step": self.iteration * self.args.decisions,
            "total": self.args.iterations * self.args.decisions,
            "best": self.validation.best,
            "decisions_per_second": self.speed,
            "checkpoint": self.saved,
        }
        write_json(self.folder / "progress.json", progress)

    def checkpoint(self) -> None:
        """Raises OSError: there is no room for it; the last one is still there."""
        state = {
            "iteration": self.iteration,
            **{name: part.state_dict() for name, part in self.parts.items()},
            "judged": self.judged,
            "best_cost": self.validation.best_cost,
            "stands_for": self.validation.stands_for,
            "policy": (self.folder / "policy.onnx").read_bytes(),
            "kept": self.validation.kept,
            "tails": {file: (self.folder / file).read_bytes() for file in self.validation.kept if file in TAILS},
            "at_first": self.validation.at_first,
            "proposed": self.proposed and (self.proposed[0], (self.folder / "candidate.onnx").read_bytes()),
            "environments": self.envs.state_dict(),
            "jobs_sha256": self.jobs_sha256,
            **random_state(),
        }
        save(self.folder / "checkpoint.pt", state)
        self.saved = self.iteration * self.args.decisions

    def restore(self) -> None:
        """Raises ValueError: the checkpoint is damaged or from another version, or the workload is not what it was."""
        path = self.folder / "checkpoint.pt"
        try:
            state = load(path, self.device)
            if state.get("jobs_sha256", self.jobs_sha256) != self.jobs_sha256:  # older checkpoints have none
                raise Changed
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.iteration, self.judged = state["iteration"], state["judged"]
            self.validation.best_cost, self.validation.stands_for = state["best_cost"], state["stands_for"]
            self.validation.kept, self.validation.at_first = state.get("kept", {}), state.get("at_first", "")
            # They may be newer, where the run was killed; older checkpoints have policy.onnx only.
            for file, data in ({"policy.onnx": state["policy"]} | state.get("tails", {})).items():
                with replacing(self.folder / file) as temporary:
                    temporary.write_bytes(data)
            self.envs.load_state_dict(state["environments"])
            set_random_state(state, self.device)
            if proposed := state.get("proposed"):  # under way when it was written; older checkpoints have none
                iteration, candidate = proposed
                (self.folder / "candidate.onnx").write_bytes(candidate)
                self.replay_candidate(iteration)
            self.saved = self.iteration * self.args.decisions
        except Changed:
            raise ValueError(
                f"{self.args.workload}: not the jobs that the run began with (their SHA-256 was "
                f"{state['jobs_sha256'][:12]}, now it is {self.jobs_sha256[:12]}); put them back, or start a new run"
            ) from None
        except Exception as error:  # torch.load raises whatever the damage leads to
            raise ValueError(
                f"{path}: not a checkpoint that can be resumed ({type(error).__name__}); start a new run"
            ) from error
