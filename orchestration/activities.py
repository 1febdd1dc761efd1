"""The steps of a round. Each is told everything in one dataclass, and done twice it leaves what it leaves done once.

Timeouts and retries are the workflows'. What is the user's mistake (ValueError, exit code 2) is not tried again.
"""

import functools
import json
import shlex
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from temporalio import activity
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory, CancelledError

from orchestration.children import WORKER_ENDED, beating, run_child
from orchestration.config import (
    USER_ERROR,
    Begin,
    Begun,
    Candidate,
    Champion,
    Data,
    Drift,
    EvaluateRequest,
    Evaluation,
    JobsRequest,
    Placement,
    PolicyRequest,
    Promotion,
    Reference,
    Report,
    Scheduled,
    Step,
    StoreRequest,
    TrainRequest,
)
from orchestration.store import Store, deploy

if TYPE_CHECKING:
    from workloads.reading import Reading

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")
RUNS = Path("runs")
CHECKPOINT_SECONDS = 15.0  # lost at most if a worker is killed; one of 512 clusters takes 130 MB
BEST_RULE = "best_rule.json"


def step(function: Callable[[Asked], Answered]) -> Callable[[Asked], Answered]:
    """An activity under the function's name, which says all the time that it lives. Its cancellation is not thrown into
    its thread: it looks by itself. What fails is tried again after a pause that grows to a minute."""

    @functools.wraps(function)
    def run(asked: Asked) -> Answered:
        progress = Path(asked.run) / "progress.json" if isinstance(asked, TrainRequest) else None
        try:
            with beating(progress):
                return function(asked)
        except CancelledError:
            raise
        except ApplicationError as error:  # of a command
            raise later(error.message, error.type or "", error.non_retryable) from error
        except Exception as error:  # ValueError: also WorkloadError, PolicyError, Damaged
            known = isinstance(error, ValueError)
            text = str(error).strip() or type(error).__name__
            raise later(text, USER_ERROR if known else type(error).__name__, known) from error

    return activity.defn(no_thread_cancel_exception=True)(run)


def later(text: str, kind: str, final: bool) -> ApplicationError:
    pause = timedelta(seconds=min(60, 2 ** min(activity.info().attempt, 6)))
    line = next((line for line in text.splitlines() if line.strip()), text)
    # The worker's log has no traceback of what is nobody's fault in the code.
    harmless = final or kind == WORKER_ENDED
    category = ApplicationErrorCategory.BENIGN if harmless else ApplicationErrorCategory.UNSPECIFIED
    return ApplicationError(
        line[:500], type=kind, non_retryable=final, next_retry_delay=None if final else pause, category=category
    )


def loop_folder() -> Path:
    """The loop's on this machine: TensorBoard's events, and what the rounds that run need."""
    return RUNS / "loop" / str(activity.info().workflow_id)


def scratch(step: Step) -> Path:
    """The round's folder on this machine, for what the store has too."""
    return loop_folder() / f"{step.number:06d}"


@step
def begin_round(asked: Begin) -> Begun:
    """A number of its own, and the champion that the round's candidates have to beat."""
    store = Store(asked.config.store)
    champion = store.champion()
    if champion and asked.config.deploy_to:  # also where the machine is a new one, or somebody has damaged the file
        deploy(store, champion, Path(asked.config.deploy_to))
    return Begun(store.begin(asked.loop, asked.sequence), champion)


@step
def generate_cluster(asked: Step) -> Reference:
    """The preset's cluster or, for `generated`, a random one: the same in all rounds of a loop."""
    from workloads.generated import generate_cluster as generate
    from workloads.presets import PRESETS
    from workloads.saved import save

    name = asked.config.workload
    cluster = generate(np.random.default_rng(asked.config.seed)) if name == "generated" else PRESETS[name]().cluster
    path = scratch(asked) / "cluster.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, cluster)
    return Store(asked.config.store).put(f"{asked.folder}/cluster.npz", path.read_bytes())


@step
def generate_jobs(asked: JobsRequest) -> Data:
    """A run of new jobs for the cluster, others in every round."""
    from workloads.generated import generate_jobs as generate
    from workloads.presets import PRESETS
    from workloads.saved import read_cluster, save

    config, store = asked.step.config, Store(asked.step.config.store)
    cluster = read_cluster(store.fetch(asked.cluster, scratch(asked.step) / "cluster.npz"))
    rng = np.random.default_rng([config.seed, asked.step.number])
    if config.workload == "generated":
        jobs = generate(rng, config.jobs, cluster)
    else:
        jobs = PRESETS[config.workload]().generate(rng, config.jobs)
    path = scratch(asked.step) / "workload.npz"
    save(path, cluster, jobs)
    return Data(store.put(f"{asked.step.folder}/workload.npz", path.read_bytes()), len(jobs), recorded=False)


@step
def collect_records(asked: Step) -> Data:
    """The trace, or all jobs that have run to their end in what serve.py has recorded so far."""
    from workloads.load import load_workload
    from workloads.saved import save

    name = asked.config.workload
    workload = load_workload(name, "all", reading_of(asked.config.reading_flags))
    path = scratch(asked) / "workload.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, workload.cluster, workload.jobs)
    reference = Store(asked.config.store).put(f"{asked.folder}/workload.npz", path.read_bytes())
    return Data(reference, len(workload.jobs), recorded=name.endswith(".jsonl"))


def reading_of(flags: str) -> "Reading":
    """
    Raises:
        ValueError: they are not flags of reading.
    """
    import tyro

    from workloads.reading import Reading

    try:
        return tyro.cli(Reading, args=shlex.split(flags), console_outputs=False)
    except SystemExit:
        raise ValueError(f"reading_flags {flags!r}: give --columns, --nodes, --partition or --skip-bad-lines") from None


@step
def train_policy(asked: TrainRequest) -> Candidate:
    """A training, in a process of its own. Tried again on the same machine it goes on from its last checkpoint."""
    config, store, number = asked.step.config, Store(asked.step.config.store), asked.candidate
    place, run = f"{asked.step.folder}/candidates/{number}", Path(asked.run)
    mine = scratch(asked.step) / str(number)
    workload = store.fetch(asked.data.workload, mine / "workload.npz")
    seed = config.seed + 1000 * asked.step.number + number
    arguments = [
        "--workload", str(workload), "--objective", config.objective, "--seed", str(seed),
        "--total-timesteps", str(config.total_timesteps), "--run-name", run.name,
        "--checkpoint-seconds", str(CHECKPOINT_SECONDS), *(["--track"] if config.track else []),
        *(["--weights", str(store.fetch(asked.weights, mine / "weights.pt"))] if asked.weights else []),
        *shlex.split(config.training_flags),
    ]  # fmt: skip
    if (run / "checkpoint.pt").exists():
        arguments = ["--resume", str(run)]
    elif run.exists():  # ended before its first checkpoint
        shutil.rmtree(run)
    run_child(config.algorithm, arguments, mine / "training.log")
    files = ("policy.onnx", "args.json", "weights.pt")
    policy, args, weights = (store.put(f"{place}/{name}", (run / name).read_bytes()) for name in files)
    (run / "checkpoint.pt").unlink(missing_ok=True)  # as large as all the environments
    return Candidate(number, seed, policy, args, weights)


@step
def run_evaluation(asked: EvaluateRequest) -> Evaluation:
    """The champion, the candidates, EASY-FIFO and the best rule on the newest jobs, which no training has seen."""
    from orchestration.verdict import CANDIDATE, judge

    config, store, mine = asked.step.config, Store(asked.step.config.store), scratch(asked.step) / "evaluation"
    shutil.rmtree(mine, ignore_errors=True)
    workload = store.fetch(asked.data.workload, mine / "workload.npz")
    champion = store.fetch(asked.champion.policy, mine / "champion" / "policy.onnx") if asked.champion else None
    candidates = [
        store.fetch(candidate.policy, mine / f"{CANDIDATE}{candidate.number}" / "policy.onnx")
        for candidate in asked.candidates
    ]
    best_rule = find_best_rule(workload, config.objective)
    policies = [str(path) for path in (champion, "easy-fifo", best_rule, *candidates) if path]
    output, report = mine / "results.json", mine / "report"
    arguments = ["--workload", str(workload), "--objective", config.objective, "--policies", *policies]
    run_child("compare", [*arguments, "--report", str(report), "--output", str(output)], mine / "evaluation.log")
    shutil.rmtree(report / "replays", ignore_errors=True)
    store.put_folder(f"{asked.step.folder}/report", report)
    results = store.put(f"{asked.step.folder}/results.json", output.read_bytes())
    judged = judge(json.loads(output.read_text()), config.objective, config.max_tail)
    return Evaluation(**judged, results=results, drift=find_drift(asked, workload, champion))


def find_best_rule(workload: Path, objective: str) -> str:
    """The one that does best on the same jobs, with hindsight."""
    from simulator.rules import RULES
    from simulator.schedule import METRIC

    output = workload.with_name(BEST_RULE)
    arguments = ["--workload", str(workload), "--policies", "easy-fifo", "all", "--output", str(output)]
    run_child("compare", arguments, workload.with_name("rules.log"))
    found = json.loads(output.read_text())["policies"]
    return min((rule for rule in found if rule in RULES), key=lambda rule: found[rule][METRIC[objective]]["mean"])


def find_drift(asked: EvaluateRequest, workload: Path, champion: Path | None) -> Drift | None:
    """None where nothing was recorded under the champion."""
    if not (asked.data.recorded and asked.champion and champion):
        return None
    from orchestration.verdict import drift
    from policies import PolicyError, load_policy
    from workloads.load import load_workload

    try:
        policy = load_policy(str(champion))
        return drift(load_workload(str(workload), "all"), policy, asked.champion.since, asked.step.config.drift_bound)
    except PolicyError as error:  # the candidates can do without it
        activity.logger.warning("drift: %s", error)
        return None


@step
def store_checkpoint(asked: StoreRequest) -> Reference:
    """The best candidate is the round's policy from now on; what only training needed is deleted on this machine."""
    store, folder = Store(asked.step.config.store), asked.step.folder
    store.put(f"{folder}/args.json", store.get(asked.candidate.args))
    reference = store.keep(asked.step.number, store.get(asked.candidate.policy), asked.candidate.weights)
    shutil.rmtree(scratch(asked.step), ignore_errors=True)
    return reference


@step
def promote(asked: Promotion) -> Champion:
    """Change the champion, then deploy it. In between, a retry deploys."""
    store = Store(asked.config.store)
    if asked.round:
        champion = store.promote(asked.round, asked.why, asked.champion)
    else:
        champion = store.rollback(asked.why, asked.champion)
    if asked.config.deploy_to:
        deploy(store, champion, Path(asked.config.deploy_to))
    return champion


@step
def run_policy(asked: PolicyRequest) -> Scheduled:
    """Schedules the jobs with the policy, else the champion or, where there is none, EASY-FIFO."""
    from policies import load_policy
    from simulator.replay import simulate
    from workloads.load import load_workload

    store, mine = Store(asked.step.config.store), scratch(asked.step) / "inference"
    workload = load_workload(str(store.fetch(asked.data.workload, mine / "workload.npz")), "all")
    champion = store.champion()
    reference = asked.policy or (champion and champion.policy)
    policy = load_policy(str(store.fetch(reference, mine / "policy.onnx")) if reference else "easy-fifo")
    [schedule] = policy.schedule(workload)
    [easy_fifo] = simulate(workload, "easy-fifo")
    shutil.rmtree(mine)
    jobs = schedule.jobs
    placements = [
        Placement(int(jobs.job_id[i]), float(jobs.submit_time[i]), float(schedule.start_time[i]), int(schedule.node[i]))
        for i in range(min(asked.shown, len(jobs)))
    ]
    wait = schedule.wait
    name = "the new policy" if asked.policy else f"the champion, round {champion.round}" if champion else "easy-fifo"
    figures = float(wait.mean()), float(np.percentile(wait, 99)), float(easy_fifo.wait.mean())
    return Scheduled(name, len(jobs), *figures, placements)


@step
def report_round(asked: Report) -> None:
    """TensorBoard, metrics, the loop's report and, with `track`, W&B."""
    from orchestration.report import show

    show(asked, loop_folder().name, loop_folder())


LIGHT: list[Callable[..., Any]] = [
    begin_round, generate_cluster, generate_jobs, collect_records, run_evaluation, store_checkpoint, promote,
    run_policy, report_round,
]  # fmt: skip
HEAVY: list[Callable[..., Any]] = [train_policy]
