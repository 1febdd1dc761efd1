"""Searches hyper-parameters on this machine with Optuna: `python benchmark.py sweep`. No account is needed.

    python benchmark.py sweep sweeps/ppo.yaml --trials 20 --workers 2

The search is described by the file that `wandb sweep` takes. A trial is a run of its program, in runs/ like any other;
bad ones are stopped early by what they log. The study is a journal file: a call that was interrupted, even by kill -9,
goes on with the next one, its unfinished runs included.
"""

import ctypes
import fcntl
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NotRequired, TypedDict, cast

import msgspec
import optuna
import tyro
import yaml
from matplotlib.figure import Figure
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState
from optuna.visualization.matplotlib import plot_param_importances
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from workloads.files import from_here

ROOT = Path(__file__).parents[1]
POLL = 0.5  # seconds between two looks at the runs


@dataclass
class Sweep:
    """Search hyper-parameters on this machine, as a W&B sweep's file describes it."""

    file: tyro.conf.Positional[Path]
    """the description: sweeps/ppo.yaml, sweeps/dqn.yaml or one of your own"""
    trials: int = 20
    """how many trials the study has in the end, those of earlier calls included"""
    workers: int = 1
    """how many run at a time"""
    journal: Path | None = None
    """the study; a further call with the same one goes on (default: runs/sweep-NAME.journal)"""
    seed: int = 1
    """of the sampler"""
    output: Path | None = None
    """where to write the trials as JSON"""


def optimise(args: Sweep) -> tuple[dict[str, Any], Table]:
    """Search, or go on. Returns all trials, best first, and a table of the best; draws what mattered."""
    description = read_description(args.file)
    for flag in ("trials", "workers"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: give at least 1")
    journal = args.journal or Path("runs") / f"sweep-{args.file.stem}.journal"
    journal.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    console = Console(stderr=True)
    with alone(journal):
        study = _open_study(args, journal, description)
        _search(study, args, description, console)
    finished = study.get_trials(states=[TrialState.COMPLETE])
    if not finished:
        raise ValueError(f"none of the {len(study.trials)} trials in {journal} finished; the reasons are above")
    finished.sort(key=lambda trial: trial.value or 0.0, reverse=_maximizing(study))
    importances = _importance(study, picture := journal.with_suffix(".png"))
    console.print(f"What mattered: {picture}" if importances else "All trials are equal: nothing mattered")
    fixed = {key: p["value"] for key, p in description["parameters"].items() if _kind_of(p) == "value"}
    best = " ".join(f"--{key}={value}" for key, value in (fixed | finished[0].params).items())
    results = {
        "metric": description["metric"], "trials": [
            {"number": trial.number, "value": trial.value, **trial.params} for trial in finished
        ],
        "stopped_early": len(study.get_trials(states=[TrialState.PRUNED])),
        "failed": len(study.get_trials(states=[TrialState.FAIL])),
        "importances": importances, "best": f"python {from_here(ROOT / description['program'])} {best}",
    }  # fmt: skip
    console.print(f"The best again: {results['best']}", soft_wrap=True)
    return results, _table_of(results)


class Metric(TypedDict):
    name: str
    goal: NotRequired[Literal["minimize", "maximize"]]


class Stop(TypedDict, total=False):
    min_iter: Annotated[int, msgspec.Meta(ge=1)]
    eta: Annotated[int, msgspec.Meta(ge=2)]


class Parameter(TypedDict, total=False):
    value: Any
    values: Annotated[list[Any], msgspec.Meta(min_length=1)]
    distribution: str
    min: float
    max: float


class Description(TypedDict):
    """What is read here of a sweep's file; the rest is W&B's."""

    program: str
    metric: Metric
    parameters: dict[str, Parameter]
    early_terminate: NotRequired[Stop]


def read_description(path: Path) -> dict[str, Any]:
    """Raises ValueError: the file is missing, no YAML, or asks for what only W&B can do."""
    try:
        description = yaml.safe_load(path.read_text())
        msgspec.convert(description, Description)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give a sweep's file, such as sweeps/ppo.yaml") from None
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: no description of a sweep ({reason}); see sweeps/ppo.yaml") from None
    if "min_iter" not in description.get("early_terminate", {"min_iter": 1}):
        raise ValueError(
            f"{path}: early_terminate has no min_iter; say after how many validations a run may be stopped"
        )
    if description.get("method") not in ("bayes", "random"):
        raise ValueError(f"{path}: method is {description.get('method')!r}; bayes and random are what is here")
    if not (ROOT / description["program"]).is_file():
        raise ValueError(f"{path}: program is {description['program']!r}, and there is no such file")
    for name, parameter in description["parameters"].items():
        if _kind_of(parameter) not in ("value", "values", "uniform", "int_uniform", "log_uniform_values"):
            raise ValueError(
                f"{path}: {name}: distribution {_kind_of(parameter)!r}; use value, values, or min and max with "
                "uniform, int_uniform or log_uniform_values"
            )
        if _kind_of(parameter) not in ("value", "values") and not {"min", "max"} <= parameter.keys():
            raise ValueError(f"{path}: {name}: give min and max, or value, or values")
    return description


def _kind_of(parameter: dict[str, Any]) -> str:
    """The distribution as W&B fills it in where it is not said."""
    for kind in ("value", "values"):
        if kind in parameter:
            return kind
    whole = all(isinstance(parameter.get(bound), int) for bound in ("min", "max"))
    return parameter.get("distribution", "int_uniform" if whole else "uniform")


def suggest(trial: Trial, name: str, parameter: dict[str, Any]) -> Any:
    kind = _kind_of(parameter)
    if kind == "value":
        return parameter["value"]
    if kind == "values":
        return trial.suggest_categorical(name, parameter["values"])
    if kind == "int_uniform":
        return trial.suggest_int(name, parameter["min"], parameter["max"])
    return trial.suggest_float(name, parameter["min"], parameter["max"], log=kind == "log_uniform_values")


def _open_study(args: Sweep, journal: Path, description: dict[str, Any]) -> optuna.Study:
    """Raises ValueError: the journal is of another search."""
    stop = description.get("early_terminate")
    pruner: BasePruner = NopPruner()
    if stop:  # W&B's hyperband has one bracket, which is successive halving: at min_iter * eta**k the best 1/eta go on
        pruner = SuccessiveHalvingPruner(min_resource=stop["min_iter"], reduction_factor=stop.get("eta", 3))
    sampler: BaseSampler = RandomSampler(args.seed)
    if description["method"] == "bayes":
        sampler = TPESampler(seed=args.seed, constant_liar=args.workers > 1)
    direction = description["metric"].get("goal", "minimize")
    name = args.file.stem
    try:
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(
            storage=storage, study_name=name, sampler=sampler, pruner=pruner, direction=direction, load_if_exists=True
        )
    except (ValueError, KeyError, TypeError):  # what its reader raises for whatever it finds
        raise ValueError(f"{journal}: no journal of a study, or a damaged one; give a new --journal") from None
    searched = {key: description[key] for key in ("program", "metric", "parameters")}
    if study.user_attrs.get("searched", searched) != searched:
        raise ValueError(f"{journal}: the study of another search than {args.file} describes now; give a new --journal")
    study.set_user_attr("searched", searched)
    if "id" not in study.user_attrs:  # for the names of its runs: another study of the same file has runs there as well
        study.set_user_attr("id", secrets.token_hex(3))
    return study


def _maximizing(study: optuna.Study) -> bool:
    return study.direction == StudyDirection.MAXIMIZE


@contextmanager
def alone(journal: Path) -> Iterator[None]:
    """Nobody else searches here meanwhile: trials that run would be taken for those of an interrupted call.

    Raises:
        ValueError: somebody does.
    """
    with journal.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{journal}: another sweep goes on there; wait, or give a new --journal") from None
        yield


def _search(study: optuna.Study, args: Sweep, description: dict[str, Any], console: Console) -> None:
    """Run trials until there are as many as asked for. Whatever ends it early leaves the others to the next call."""
    metric, name = description["metric"]["name"], f"sweep-{study.study_name}-{study.user_attrs['id']}"
    waiting = [Trial(study, trial._trial_id) for trial in study.get_trials(states=[TrialState.RUNNING])]
    running: list[Run] = []
    try:
        while True:
            while len(running) < args.workers and (waiting or len(study.trials) < args.trials):
                trial = waiting.pop() if waiting else study.ask()
                running.append(launch(trial, name, description))
            if not running:
                return
            time.sleep(POLL)
            for run in list(running):
                ended = run.process.poll() is not None
                run.look(metric)
                pruned = not ended and run.trial.should_prune()
                if pruned:
                    run.process.send_signal(signal.SIGINT)
                    run.process.wait()
                if ended or pruned:
                    running.remove(run)
                    console.print(finish(study, run, pruned))
    finally:
        for run in running:
            run.process.send_signal(signal.SIGINT)
        for run in running:
            run.process.wait()


@dataclass
class Run:
    """A trial's process, and what it has logged so far."""

    name: str
    trial: Trial
    process: subprocess.Popen[bytes]
    said: IO[bytes]  # on stderr
    events: EventAccumulator | None = None
    values: list[float] = field(default_factory=list)

    def look(self, metric: str) -> None:
        """Report to the study what the run has logged since the last look."""
        if not (files := list(Path("runs").glob(f"*__{self.name}__*/events*"))):
            return
        # A run that died before its first checkpoint is begun anew, in a folder that may come after the first look. The
        # names of the folders differ in the time only, so the newest is the largest.
        folder = str(max(files).parent)
        if self.events is None or self.events.path != folder:
            self.events = EventAccumulator(folder)
        self.events.Reload()
        if metric in self.events.Tags()["scalars"]:
            steps = {event.step: event.value for event in self.events.Scalars(metric)}  # twice where a run was killed
            values = list(steps.values())
            for step in range(len(self.values), len(values)):
                self.trial.report(values[step], step + 1)  # as W&B counts: how often the metric was logged
            self.values = values


def launch(trial: Trial, name: str, description: dict[str, Any]) -> Run:
    """Start the trial's run, or go on with it if an earlier call was interrupted."""
    flags = [f"--{key}={suggest(trial, key, parameter)}" for key, parameter in description["parameters"].items()]
    flags.append(f"--exp_name={name}-{trial.number}")
    for checkpoint in Path("runs").glob(f"*__{name}-{trial.number}__*/checkpoint.pt"):
        flags = ["--resume", str(checkpoint.parent)]
    command = [sys.executable, str(ROOT / description["program"]), *flags]
    said = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the run)
    # A session of its own: Ctrl-C is for this process, which then tells the runs to save what they have. So does its
    # end, whatever it is (1 is PR_SET_PDEATHSIG): nobody else may be at work on a run that the next call goes on with.
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True,
        preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGINT),
    )  # fmt: skip
    return Run(f"{name}-{trial.number}", trial, process, said)


def finish(study: optuna.Study, run: Run, pruned: bool) -> str:
    """Tell the study how a run has ended. Returns a line that says so."""
    trial = run.trial
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)
        return f"trial {trial.number} stopped early: {run.values[-1]:.4g} with {trial.params}"
    if run.process.returncode or not run.values:
        run.said.seek(0)
        words = run.said.read().decode(errors="replace").strip().splitlines()
        study.tell(trial, state=TrialState.FAIL)
        return f"trial {trial.number} failed: {words[-1] if run.process.returncode and words else 'nothing was logged'}"
    best = max if _maximizing(study) else min
    study.tell(trial, best(run.values))
    return f"trial {trial.number}: {best(run.values):.4g} with {trial.params}"


def _importance(study: optuna.Study, picture: Path) -> dict[str, float]:
    """The share of each parameter in what the trials differ in (PED-ANOVA, Watanabe et al. 2023), and its plot."""
    evaluator = PedAnovaImportanceEvaluator()
    if len({trial.value for trial in study.get_trials(states=[TrialState.COMPLETE])}) < 2:
        return {}  # nothing differs
    figure = cast(Figure, plot_param_importances(study, evaluator=evaluator).figure)
    figure.savefig(picture, dpi=150, bbox_inches="tight")
    return get_param_importances(study, evaluator=evaluator)


def _table_of(results: dict[str, Any]) -> Table:
    """The ten best trials; below them what mattered."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in results["importances"].items())
    ended = f"{len(results['trials'])} finished, {results['stopped_early']} stopped early, {results['failed']} failed"
    table = Table(title=results["metric"]["name"], caption=f"{ended}. What mattered: {shares or 'nothing yet'}")
    for name in results["trials"][0]:
        table.add_column(name, justify="right")
    for trial in results["trials"][:10]:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in trial.values()))
    return table
