"""What can choose the next job: a rule by name, planning over a rule, or a trained policy.onnx by path.

    from policies import load_policy
    policy = load_policy("runs/cloud__ppo_scheduler__1__1700000000")  # or the policy.onnx in it, or "easy-sjf"
    patient = load_policy("runs/cloud__ppo_scheduler__1__1700000000@12")  # who has waited for 12 hours goes first
    planned = load_policy("plan")  # or "plan:RULE", "plan:RULE@HOURS": roll-outs of a rule, no training
    [schedule] = policy.schedule(load_workload("my_cluster.swf.gz", "test"))
    action = policy.predict(observation)
    decision = policy.decide(ClusterState(now, cluster, queued, running, start_time, node))  # of a real cluster

B counts observations, K the jobs in the window, M nodes, R resources; the action K*M waits for the next event.
"""

import os
import time
import zlib
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import onnxruntime

from scheduler_env import SchedulerVectorEnv
from simulator.kernels import CLUSTER_FEATURES, JOB_FEATURES, NODE_FEATURES
from simulator.moment import ClusterState, Moment
from simulator.observation import Layout, Observation
from simulator.planning import Planner, plan
from simulator.replay import simulate
from simulator.rules import parse_rule
from simulator.schedule import Schedule
from workloads.jobs import Cluster, Workload

METADATA_KEY, VERSION = "resourcerl", 1
# What an observation says of the reference rule's own choice.
JOB_CHOICE, NODE_CHOICE = JOB_FEATURES.index("rule_choice"), NODE_FEATURES.index("rule_choice")
RULE_WAITS = CLUSTER_FEATURES.index("rule_waits")


class PolicyError(ValueError):
    """A policy that cannot be used. The message is one line: the file or name, what is wrong, the remedy."""


@dataclass(frozen=True)
class Expected:
    """What planning expects of the queued jobs, and on how many samples that is founded."""

    starts: np.ndarray  # float64[Q, 3]: p10, p50 and p90 of when each starts; inf: on no node in use, or no time
    samples: int  # of the run times, in all choices and here: as many as there was time for
    wanted: int


@dataclass(frozen=True)
class Decision:
    """What to do in a `ClusterState`. Jobs are numbers into its `queued`, nodes into its cluster's."""

    start: list[tuple[int, int]]  # jobs to start now and their nodes, in order
    reserved: tuple[int, int, float] | None  # the job that a node is kept free for, that node, and from when on
    order: np.ndarray  # int64[Q], all queued jobs, the most urgent first: what starts, what is reserved, the rest
    expected: Expected | None = None  # what planning expects


class Policy(ABC):
    """Chooses actions from observations, decides in states of a real cluster, and replays workloads.

    Attributes:
        name: what tables call it (see `called`).
        stands_for: the name of the rule that a trained file stands for, or None.
        argument: what `load_policy` makes it from.
        identity: bytes that are another policy's where it decides differently.
        reference: the rule that the environment behind the observations has to be made with (`reference=`).
        layout: how the observations given to `predict` are laid out (`envs.layout`); set it for another cluster or
            window. A rule has none until it is set.
        generator: what `predict(..., deterministic=False)` draws from.
    """

    stands_for: str | None = None

    def __init__(self, name: str, argument: str, identity: bytes, reference: str, layout: Layout | None = None) -> None:
        self.name, self.argument, self.identity = name, argument, identity
        self.reference, self.layout = reference, layout
        self.generator = np.random.default_rng(0)

    def predict(
        self, observation: np.ndarray, deterministic: bool = True, layout: Layout | None = None
    ) -> int | np.ndarray:
        """The action for an observation float32[D], or int64[B] for float32[B, D]: always one that the mask allows.

        deterministic=False draws from the policy's distribution (a rule has only one choice). `layout` is that of the
        observation, by default `self.layout`.

        Raises:
            PolicyError: the observation is not of this policy's layout.
        """
        observation, layout = np.asarray(observation, np.float32), layout or self.layout
        if layout is None or observation.shape[-1] != layout.size:
            raise PolicyError(
                f"{self.name}: an observation of {observation.shape[-1]} numbers does not have the layout "
                f"{layout}; set policy.layout to that of the environment"
            )
        actions = self._choose(layout.split(np.atleast_2d(observation)), deterministic)
        return actions if observation.ndim == 2 else int(actions[0])

    @abstractmethod
    def schedule(
        self, workload: Workload, segments: np.ndarray | None = None, window: int | None = None
    ) -> list[Schedule]:
        """Replay the workload's segments, or others (int[S, 2] ranges of its jobs), each from an empty machine.

        Args:
            window: K of a trained policy, by default the one it was trained with; rules always see the whole queue.

        Raises:
            PolicyError: the policy was made for clusters with other resources.
        """

    @abstractmethod
    def decide(self, state: ClusterState, window: int | None = None) -> Decision:
        """What the policy does at this moment, to the last choice, as it would in the simulator (but for round-robin
        and random, which go on from what they did before); see `schedule`.

        Jobs that do not start are in the order of the policy's scores, those outside its window behind them in the
        order of its reference rule, those that are too large for every node in use last.

        Raises:
            PolicyError: the policy was made for clusters with other resources or for RLScheduler's lock-in, or its
                network failed.
        """

    @abstractmethod
    def _logits(self, parts: Observation) -> np.ndarray:
        """float32[B, K*M + 1]; what is said of forbidden actions does not matter."""

    def _choose(self, parts: Observation, deterministic: bool = True) -> np.ndarray:
        # nan_to_num: whatever a network says, some legal action is above all forbidden ones.
        logits = np.where(parts.mask > 0, np.nan_to_num(self._logits(parts)), -np.inf)
        if not deterministic:  # the Gumbel-max trick: the largest of the perturbed is a draw from the softmax
            logits = logits + self.generator.gumbel(size=logits.shape)
        return logits.argmax(axis=1)


def _rule_logits(parts: Observation) -> np.ndarray:
    """float32[B, K*M + 1]: highest for what the reference rule would do, as the observations tell it; then for the
    first action, which counts where the rule's is hidden (a job beyond the window). Too far apart to be drawn."""
    starts = (parts.jobs[:, :, None, JOB_CHOICE] * parts.nodes[:, None, :, NODE_CHOICE]).reshape(len(parts.jobs), -1)
    choice = np.concatenate([starts, parts.cluster[:, RULE_WAITS, None]], axis=1)
    return 1e9 * choice - 1e3 * np.arange(choice.shape[1], dtype=np.float32)


def _decision(
    moment: Moment, choices: list[tuple[int, int]], order: np.ndarray, expected: Expected | None = None
) -> Decision:
    """From what was started or reserved, in order, and the order of all jobs."""
    reserved = moment.reserved
    start = [choice for choice in choices if reserved is None or choice[0] != reserved[0]]
    first = np.array([job for job, _ in start] + ([reserved[0]] if reserved else []), np.int64)
    return Decision(start, reserved, np.concatenate([first, _without(order, first)]), expected)


def _without(jobs: np.ndarray, others: np.ndarray) -> np.ndarray:
    """All jobs int64[Q] in some order, without the others."""
    stays = np.ones(len(jobs), bool)
    stays[others] = False
    return jobs[stays[jobs]]


class RulePolicy(Policy):
    """A classical rule (see simulator/rules.py). `predict` reads its choice from the observation."""

    def __init__(self, name: str) -> None:
        self.rule = parse_rule(name)
        # The name of a tuned rule is its weights, too long for a table; a checksum tells two of them apart.
        short = f"{self.rule.title}-{zlib.crc32(name.encode()):08x}" if self.rule.weights else name
        super().__init__(short, name, name.encode(), name)

    def schedule(
        self, workload: Workload, segments: np.ndarray | None = None, window: int | None = None
    ) -> list[Schedule]:
        return simulate(workload, self.rule, segments)

    def decide(self, state: ClusterState, window: int | None = None) -> Decision:
        moment = Moment(state, self.rule)
        return _decision(moment, moment.follow_rule(), moment.rule_order())

    def _logits(self, parts: Observation) -> np.ndarray:
        return _rule_logits(parts)


class PlanPolicy(Policy):
    """A rule that looks ahead (see simulator/planning.py).

    Attributes:
        seconds: what a decision may take; after that the base rule chooses. None: no limit.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        """
        Args:
            name: "plan", or "plan:RULE" with another rule as its base.
            settings: other fields of a Planner.

        Raises:
            ValueError: an unknown rule, one without an order of jobs, or a number out of range.
        """
        base = name.removeprefix("plan").removeprefix(":")
        self.planner = Planner(base, **settings) if base else Planner(**settings)
        self.seconds: float | None = None
        self.rule = self.planner.rule
        short = f"plan:{RulePolicy(base).name}" if base else name
        super().__init__(short, name, repr(self.planner).encode(), self.planner.base)

    def schedule(
        self, workload: Workload, segments: np.ndarray | None = None, window: int | None = None
    ) -> list[Schedule]:
        return plan(workload, self.planner, segments, threads=os.cpu_count() or 1)

    def decide(self, state: ClusterState, window: int | None = None) -> Decision:
        # A tenth is left for what comes after it.
        until = np.inf if self.seconds is None else time.perf_counter() + 0.9 * self.seconds
        moment = Moment(state, self.rule)
        found = moment.plan(self.planner, until)
        order = moment.rule_order()
        if len(found.starts) == 0:  # no time
            nothing = Expected(np.full((len(order), 3), np.inf), found.samples, found.wanted)
            return _decision(moment, found.choices, order, nothing)
        starts = np.quantile(found.starts, (0.1, 0.5, 0.9), axis=0, method="inverted_cdf").T
        order = order[np.argsort(starts[order, 1], kind="stable")]
        return _decision(moment, found.choices, order, Expected(starts, found.samples, found.wanted))

    def _logits(self, parts: Observation) -> np.ndarray:
        raise PolicyError(f"{self.name}: planning needs a state, not an observation; use decide or schedule")


Count = Annotated[int, msgspec.Meta(ge=1, le=10_000)]  # more than that is a damaged number: arrays are as large


@dataclass(frozen=True)
class Metadata:
    """What a policy.onnx says about itself: JSON under the key "resourcerl" of the model's metadata."""

    version: int
    algorithm: str
    workload: str
    objective: str
    reference: str
    backfill: Literal["easy", "none"]
    lock_in: bool
    queue_window: Count
    nodes: Count
    resources: Count
    job_features: list[str]
    node_features: list[str]
    cluster_features: list[str]
    steps: int
    seed: int
    rule: str | None  # where training did not beat this rule and the file stands for it
    resource_names: list[str] | None = None  # those of former versions do not know them


class OnnxPolicy(Policy):
    """A trained policy: a network that reads jobs[B, K, Fj], nodes[B, M, Fn], cluster[B, Fc] and mask[B, K*M + 1], all
    float32, and gives logits[B, K*M + 1], for any B, K and M."""

    def __init__(self, path: Path, data: bytes | None = None, hours: str = "") -> None:
        """`data` is what the file holds, if it has been read; `hours` the patience instead of the one trained with."""
        self.path, self.data, self.hours = path, _read(path) if data is None else data, hours
        self.session = _session(path, self.data)
        self.metadata = meta = _with_patience(_metadata(path, self.session), hours)
        # All trained policies are called policy.onnx: the folder of the run tells them apart.
        name, layout = "/".join(path.parts[-2:]), Layout(meta.queue_window, meta.nodes, meta.resources)
        at = f"@{hours}" if hours else ""
        super().__init__(name + at, f"{path}{at}", self.data + at.encode(), meta.rule or meta.reference, layout)
        try:
            self.rule = parse_rule(self.reference)
            self.stands_for = RulePolicy(meta.rule).name if meta.rule else None
        except ValueError as error:
            raise PolicyError(f"{path}: {error}; " + ("try another" if hours else "train it again")) from None
        if self.stands_for:  # whose patience is the rule's
            self.name = called(name, self.stands_for)
        # terminate = True, from any thread, ends a call that takes too long
        self.run_options = onnxruntime.RunOptions()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it is the same policy, whatever the file holds by then."""
        return OnnxPolicy, (self.path, self.data, self.hours)

    def schedule(
        self, workload: Workload, segments: np.ndarray | None = None, window: int | None = None
    ) -> list[Schedule]:
        meta = self.metadata
        self._check_resources(workload.cluster, workload.name)
        segments = workload.segments if segments is None else np.asarray(segments)
        if meta.rule:
            return simulate(workload, meta.rule, segments, backfill=meta.backfill, lock_in=meta.lock_in)
        schedules: dict[int, Schedule] = {}
        lengths = segments[:, 1] - segments[:, 0]
        for length in np.unique(lengths):  # the episodes of one vector environment are equally long
            chosen = np.flatnonzero(lengths == length)
            part = replace(workload, segments=segments[chosen])
            schedules |= zip(chosen.tolist(), self._replay(part, int(length), window), strict=True)
        return [schedules[index] for index in range(len(segments))]

    def decide(self, state: ClusterState, window: int | None = None) -> Decision:
        meta = self.metadata
        self._check_resources(state.cluster, "this cluster")
        if meta.lock_in:
            raise PolicyError(f"{self.path}: trained with lock_in, which no real cluster has; train one without it")
        moment = Moment(state, self.rule, meta.backfill)
        if meta.rule:
            return _decision(moment, moment.follow_rule(), moment.rule_order())
        layout = Layout(meta.queue_window if window is None else window, *state.cluster.capacity.shape)
        visible, choices = moment.visible(layout.window), []
        ranked, others = visible[:0], visible[:0]
        if len(visible) < len(state.queued):
            others = _without(moment.rule_order(), visible)
        observation, more = moment.observe(layout)
        while more or len(ranked) < len(visible):
            parts = layout.split(observation[None])
            logits = self.choices(parts)[0]
            action = int(logits.argmax())
            if not len(ranked):  # before anything is reserved, all jobs have a score
                pairs = np.where(parts.mask[0] > 0, logits, -np.inf)[:-1].reshape(layout.window, layout.nodes)
                ranked = visible[np.argsort(-pairs.max(1)[: len(visible)], kind="stable")]
            if not more or action == layout.actions - 1:
                break
            choices.append(moment.act(action))
            observation, more = moment.observe(layout)
        return _decision(moment, choices, np.concatenate([ranked, others]))

    def _check_resources(self, cluster: Cluster, name: str) -> None:
        meta, resources = self.metadata, cluster.capacity.shape[1]
        if resources != meta.resources:
            raise PolicyError(
                f"{self.path}: made for clusters with {meta.resources} kinds of resources ({meta.workload}), and "
                f"{name} has {resources}; train one for it with ppo_scheduler.py"
            )

    def environments(
        self, workload: Workload, count: int, length: int, window: int | None = None
    ) -> SchedulerVectorEnv:
        """`count` environments of `length` jobs without warm-up or follow-up, whose observations this policy reads."""
        meta = self.metadata
        return SchedulerVectorEnv(
            count, workload, num_jobs=length, warmup_jobs=0, followup_jobs=0,
            queue_window=meta.queue_window if window is None else window, backfill=meta.backfill,
            objective=meta.objective, reward="cost", reference=meta.reference, lock_in=meta.lock_in,
        )  # fmt: skip

    def _replay(self, workload: Workload, length: int, window: int | None) -> list[Schedule]:
        """Each of the workload's segments, which have `length` jobs, in an environment of its own."""
        count = len(workload.segments)
        envs = self.environments(workload, count, length, window)
        observations, infos = envs.reset(seed=0, options={"first": workload.segments[:, 0]})
        schedules: dict[int, Schedule] = {}
        while len(schedules) < count:
            actions = self.choices(envs.split(observations)).argmax(axis=1)
            observations, _, _, _, infos = envs.step(actions)
            # Environments that end start again at once: only the first end of each counts.
            for e in np.flatnonzero(infos.get("_final_schedule", ())).tolist():
                schedules.setdefault(e, infos["final_schedule"][e])
        envs.close()
        return [schedules[e] for e in range(count)]

    def choices(self, parts: Observation) -> np.ndarray:
        """float32[B, K*M + 1]: the logits as they are, the best of which decide in `schedule` and `decide`: there it is
        the policy itself that counts, so what `predict` would mend is refused.

        Raises:
            PolicyError: the network does not run, or its best logit is NaN or of an action that the mask forbids.
        """
        try:
            logits = self._logits(parts)
        except Exception as error:  # onnxruntime's errors have no class in common, and their texts several lines
            reason = str(error).strip().splitlines()[0]
            raise PolicyError(f"{self.path}: its network does not run ({reason}); export it again") from None
        if logits.shape != parts.mask.shape:
            shapes = f"logits {list(logits.shape)} for a mask {list(parts.mask.shape)}"
            raise PolicyError(f"{self.path}: its network gives {shapes}; export it again")
        best = np.arange(len(logits)), logits.argmax(axis=1)  # the first NaN, if there is one
        for wrong, what in (
            (np.isnan(logits[best]), "gives NaN"),
            (parts.mask[best] == 0, "chooses an action that the mask forbids"),
        ):
            if wrong.any():
                raise PolicyError(f"{self.path}: its network {what}; train or export it again")
        return logits

    def _logits(self, parts: Observation) -> np.ndarray:
        if self.metadata.rule:
            return _rule_logits(parts)
        return self.session.run(["logits"], parts._asdict(), self.run_options)[0]


def called(name: str, stands_for: str | None) -> str:
    """A policy's name in tables or, where its file stands for a rule, `RUN (= easy-saf)`: nobody shall credit training
    with what a rule does."""
    return f"{name.removesuffix('/policy.onnx')} (= {stands_for})" if stands_for else name


def load_policy(name_or_path: str) -> Policy:
    """The rule of that name, planning over it (`plan:RULE`, or `plan` over the rule that suits most), or the trained
    policy in that file or run folder. Behind a rule, a file or a folder, `@HOURS` is its patience:
    who has waited for longer goes first (`parse_rule`), which a trained policy otherwise has from where it was trained.
    (The weights of a tuned rule hold one more, which stays: the shorter of the two acts.)

    Raises:
        PolicyError: no such rule or file, a file that is no ONNX or none of ours, or made for other features.
    """
    if name_or_path == "plan" or name_or_path.startswith("plan:"):
        return _plan_policy(name_or_path)
    if name_or_path.startswith("tuned:"):  # longer than the name of any file
        return _rule_policy(name_or_path)
    if "/" not in name_or_path:
        with suppress(ValueError):  # a rule's name is the rule, whatever lies beside
            return RulePolicy(name_or_path)
    plain, _, hours = name_or_path.rpartition("@")
    if not plain or "/" in hours or Path(name_or_path).exists():
        plain, hours = name_or_path, ""
    path = Path(plain)
    if path.is_dir() and not (path / "policy.onnx").exists():
        raise PolicyError(f"{path}: no such file as policy.onnx in this folder; give one of a run that was validated")
    path = path / "policy.onnx" if path.is_dir() else path
    if path.suffix == ".onnx" or path.exists() or len(path.parts) > 1:
        return OnnxPolicy(path, hours=hours)
    return _rule_policy(name_or_path)


def _rule_policy(name: str) -> RulePolicy:
    try:
        return RulePolicy(name)
    except ValueError as error:
        raise PolicyError(f"{error}; or give the path of a policy.onnx") from None


def _plan_policy(name: str) -> PlanPolicy:
    try:
        return PlanPolicy(name)
    except ValueError as error:
        raise PolicyError(f"{name}: {error}") from None


def _with_patience(meta: Metadata, hours: str) -> Metadata:
    """With another patience of the reference and of the rule that the file stands for, if hours are given."""
    if not hours:
        return meta

    def patient(rule: str) -> str:
        return f"{rule.partition('@')[0]}@{hours}"

    return replace(meta, reference=patient(meta.reference), rule=meta.rule and patient(meta.rule))


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise PolicyError(f"{path}: no such file; give the name of a rule or the path of a trained policy.onnx")
    try:
        return path.read_bytes()
    except OSError as error:
        raise PolicyError(f"{path}: {error.strerror}; give a file that can be read") from None


def _session(path: Path, data: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # for small batches threads cost more than they do
    options.log_severity_level = 4  # what goes wrong is in the exception
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime's errors have no class in common, and their texts several lines
        raise PolicyError(f"{path}: no ONNX file, or a damaged one; export it again") from None


def _metadata(path: Path, session: onnxruntime.InferenceSession) -> Metadata:
    try:
        text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "")
        metadata = msgspec.json.decode(text, type=Metadata)
    except (ValueError, RecursionError) as error:  # also msgspec's, which names the field
        raise PolicyError(
            f"{path}: an ONNX file, but no policy of ResourceRL's ({error}); export one with ppo_scheduler.py"
        ) from None
    if metadata.version != VERSION:
        raise PolicyError(f"{path}: a policy of version {metadata.version}, and this is {VERSION}; train it again")
    for name, ours in (("job", JOB_FEATURES), ("node", NODE_FEATURES), ("cluster", CLUSTER_FEATURES)):
        if tuple(theirs := getattr(metadata, f"{name}_features")) != ours:
            odd = ", ".join(sorted(set(theirs) ^ set(ours))) or "their order"
            raise PolicyError(f"{path}: made for other {name} features ({odd}); train it again")
    if {node.name for node in session.get_inputs()} != set(Observation._fields):
        raise PolicyError(f"{path}: its inputs are not {', '.join(Observation._fields)}; train it again")
    return metadata
