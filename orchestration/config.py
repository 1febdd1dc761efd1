"""What the loop's workflows, activities and commands exchange: dataclasses that Temporal keeps as JSON.

Nothing large is among them. What a step makes is in the store; its `Reference` goes on to the next step.
"""

import shlex
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

TASK_QUEUE = "resourcerl"
TRAINING_QUEUE = "resourcerl-training"  # of its own: a worker takes only so many trainings, and anything else besides
LOOP_ID = "training-loop"
KEPT_ROUNDS = 100  # in a loop's status; older ones are in the store
SILENCE = 30.0  # seconds without a heartbeat, and a worker is taken for dead
USER_ERROR = "UserError"  # the type of errors that trying again does not mend


PRESETS = ("cloud", "hpc", "manufacturing", "datacenter", "tasks")  # workloads.presets.PRESETS, which needs NumPy


@dataclass
class TrainingConfig:
    """How a loop trains; `configure` changes it between two rounds."""

    workload: str = "cloud"
    """a preset or `generated` (both: new jobs every round), a trace or table, or the record of serve.py (.jsonl)"""
    reading_flags: str = ""
    """how the trace or table is read, as the other commands have it, in one word:
    --reading-flags='--columns openb --nodes nodes.csv'"""
    objective: Literal["latency", "wait", "slowdown"] = "latency"
    """what to minimise"""
    algorithm: Literal["ppo", "dqn"] = "ppo"
    """which of the two trains"""
    total_timesteps: int = 400_000
    """decisions of a training"""
    start_from: Literal["scratch", "champion"] = "scratch"
    """champion: its networks as they were at the end of its training, of the same algorithm and as many resources"""
    candidates: int = 1
    """so many trainings a round, side by side, which differ in the seed"""
    training_flags: str = ""
    """more flags of ppo_scheduler.py or dqn_scheduler.py, in one word: --training-flags='--hidden 64'"""
    jobs: int = 30_000
    """so many jobs are generated a round, where there is no trace"""
    rounds: int = 0
    """so many; 0: until told to stop"""
    interval: float = 86_400.0
    """seconds from the beginning of a round to that of the next; a longer round is followed at once"""
    max_tail: float = 1.2
    """no promotion if the p99 of the wait is so many times EASY-FIFO's, or the longest three times as many"""
    store: str = "runs/store"
    """a folder, or s3://, gs://, az://; the workers have to reach it"""
    deploy_to: str | None = None
    """the file that serve.py or slurm_agent.py watches: champions are written there"""
    drift_bound: float = 50.0
    """warn if the waits recorded under the champion are more than so many percent off the simulator's"""
    retrain_on_drift: bool = False
    """then do not wait for the next round's time"""
    track: bool = False
    """if toggled, rounds, candidates and champions are tracked with Weights and Biases"""
    seed: int = 1
    """of the loop; every training and every generated workload has one that is made from it"""


FIXED = ("store",)  # of a loop that runs
OURS = (
    "weights",
    "workload",
    "objective",
    "total-timesteps",
    "seed",
    "run-name",
    "resume",
    "checkpoint-seconds",
    "track",
)


def check(config: TrainingConfig) -> None:
    """
    Raises:
        ValueError: a setting makes no sense; the message names it and what to give.
    """
    least = {"total_timesteps": 1, "candidates": 1, "jobs": 100, "rounds": 0, "interval": 0, "seed": 0}
    for name, lowest in (least | {"max_tail": 1, "drift_bound": 0}).items():
        if not getattr(config, name) >= lowest:  # nor is NaN
            raise ValueError(f"{name} {getattr(config, name)}: give {lowest} or more")
    for name, kind in get_type_hints(TrainingConfig).items():
        if (choices := get_args(kind)) and isinstance(choices[0], str) and getattr(config, name) not in choices:
            raise ValueError(f"{name} {getattr(config, name)!r}: give one of {', '.join(choices)}")
    scheme, there, _ = config.store.partition("://")
    if there and scheme not in ("s3", "gs", "az"):
        raise ValueError(f"store {config.store}: give a folder, or an address that begins with s3://, gs:// or az://")
    _words("reading_flags", config.reading_flags)
    flags = _words("training_flags", config.training_flags)
    if taken := [flag for flag in flags if flag.partition("=")[0].lstrip("-").replace("_", "-") in OURS]:
        raise ValueError(f"training_flags {taken[0]}: the loop gives this one itself; leave it out")


def _words(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{name} {text!r}: {error}; close what is quoted") from None


def changed(config: TrainingConfig, settings: dict[str, str]) -> TrainingConfig:
    """The configuration with other values, given as text; `none` where there may be none.

    Raises:
        ValueError: no such setting, one that cannot change while the loop runs, or a value that makes no sense.
    """
    kinds, values = get_type_hints(TrainingConfig), {}
    for name, text in settings.items():
        if name not in kinds or name in FIXED:
            known = ", ".join(field.name for field in fields(TrainingConfig) if field.name not in FIXED)
            raise ValueError(f"{name}: no setting that can be changed; those are {known}")
        values[name] = _value(name, text, kinds[name])
    new = replace(config, **values)
    check(new)
    return new


def _value(name: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} {text!r}: give true or false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{name} {text!r}: give a number{' without fraction' * (kind is int)}") from None
    return None if type(None) in get_args(kind) and text.lower() == "none" else text


@dataclass
class Reference:
    """A file in the store, and what it has to hold."""

    uri: str
    sha256: str
    size: int  # bytes


@dataclass
class Champion:
    """The policy in use."""

    round: int
    policy: Reference
    since: float  # Unix time
    why: str
    weights: Reference | None = None  # to train on from


@dataclass
class Begin:
    """The `sequence`-th round of a loop asks for a number that no other round in the store has."""

    config: TrainingConfig
    loop: str  # the id of its first run: a loop that begins anew is another one
    sequence: int


@dataclass
class Begun:
    number: int
    champion: Champion | None


@dataclass
class Step:
    """What every activity of a round is told: `folder` is the round's place in the store."""

    config: TrainingConfig
    number: int
    folder: str


@dataclass
class JobsRequest:
    step: Step
    cluster: Reference


@dataclass
class Data:
    """The workload of a round."""

    workload: Reference
    jobs: int
    recorded: bool  # its waits are those of a real cluster under the champion of the time


@dataclass
class TrainRequest:
    step: Step
    data: Data
    candidate: int
    run: str  # the folder on the machine that trains
    weights: Reference | None = None  # to start from; None: from scratch


@dataclass
class Candidate:
    """A trained policy."""

    number: int  # in its round
    seed: int
    policy: Reference
    args: Reference
    weights: Reference | None = None


@dataclass
class EvaluateRequest:
    step: Step
    data: Data
    candidates: list[Candidate]
    champion: Champion | None


@dataclass
class Figure:
    """A difference in percent, negative is better, with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass
class Drift:
    """Waits recorded under the champion, against those that the simulator says of the same jobs under it."""

    jobs: int
    recorded: float  # mean, seconds
    predicted: float
    difference: Figure  # percent of the predicted
    beyond: bool  # the whole interval is outside the bound


@dataclass
class Evaluation:
    """The best candidate against the champion (the first time: EASY-FIFO), EASY-FIFO and the best rule."""

    candidate: int
    better: bool
    why: str
    best_rule: str
    gains: dict[str, Figure]  # champion (where there is one), easy-fifo, best rule -> the candidate's difference to it
    standing: dict[str, Figure]  # the champion's difference to EASY-FIFO and the best rule
    p99: float  # of the candidate's wait, EASY-FIFO = 1
    results: Reference
    drift: Drift | None = None


@dataclass
class StoreRequest:
    step: Step
    candidate: Candidate
    evaluation: Evaluation


@dataclass
class Promotion:
    """Make the policy of a round the champion, or (round 0) the one before champion again."""

    config: TrainingConfig
    round: int
    why: str
    champion: int | None = None  # only if this round's still is the champion (0: none); None: whatever is


@dataclass
class Round:
    """What came of a round."""

    number: int = 0  # 0: it failed before it had one
    began: float = 0.0  # Unix time
    ended: float = 0.0
    status: Literal["promoted", "kept", "failed", "stopped"] = "failed"
    why: str = ""
    jobs: int = 0
    champion: int = 0  # the round of the champion after it; 0: none
    evaluation: Evaluation | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # step -> duration
    runs: list[str] = field(default_factory=list)  # folders of the trainings on their machines


@dataclass
class Report:
    """What is shown of a round: TensorBoard, W&B, metrics, the loop's report."""

    config: TrainingConfig
    round: Round
    champion: Champion | None
    rounds: list[Round]  # the last ones
    failures: int  # so far


@dataclass
class Loop:
    """A loop, and all that it takes along when it continues as new."""

    config: TrainingConfig = field(default_factory=TrainingConfig)
    done: int = 0  # rounds
    failures: int = 0  # of them
    began: float = 0.0  # Unix time of the last round; 0: none yet
    paused: bool = False
    wanted: bool = False  # a round at once
    drifted: bool = False  # the next round is because of drift
    champion: Champion | None = None
    rounds: list[Round] = field(default_factory=list)


@dataclass
class Status:
    """The answer to the query `status`."""

    loop: Loop
    state: str  # what it does now
    number: int  # the round that runs, 0: none
    runs: list[str]  # its trainings


@dataclass
class Settings:
    """The argument of the update `configure`."""

    values: dict[str, str]


@dataclass
class SchedulerRequest:
    """What `scheduler_workflow` and `test_workflow` are asked for."""

    config: TrainingConfig
    shown: int = 20  # placements


@dataclass
class PolicyRequest:
    step: Step
    data: Data
    policy: Reference | None  # None: the champion, or EASY-FIFO where there is none
    shown: int


@dataclass
class Placement:
    job: int
    submitted: float  # seconds
    started: float
    node: int


@dataclass
class Scheduled:
    """What a policy did with the jobs."""

    policy: str
    jobs: int
    wait: float  # mean, seconds
    wait_p99: float
    easy_fifo_wait: float
    placements: list[Placement]  # the first ones
