"""Golden numbers: what training, rules, environments, comparisons and decisions gave before the code was moved about.

    python tests/test_golden.py        # records tests/data/golden.json anew: only where results are meant to change

With the same versions and a processor of the same kind everything is the same to the last bit. PyTorch and matrix
products round differently on others of the kind, everything may on others still: hashes are left out there, and figures
may differ a little.
"""

import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # where it records

# Whoever moves the project's files changes these lines, and no others.
from deployment.service import Args, Service  # noqa: E402
from scheduler_env import SchedulerVectorEnv  # noqa: E402
from simulator.kernels import PATIENCE  # noqa: E402
from simulator.replay import simulate  # noqa: E402
from simulator.rules import tuned_rule  # noqa: E402
from training.checkpoint import load  # noqa: E402
from workloads.jobs import Workload  # noqa: E402
from workloads.load import load_workload  # noqa: E402

PPO, DQN, BENCHMARK = (ROOT / name for name in ("ppo_scheduler.py", "dqn_scheduler.py", "benchmark.py"))

GOLDEN, TRACE = ROOT / "tests/data/golden.json", ROOT / "tests/data/small.swf"


# --------------------------------------------------------------------------------------- the scripts, as a user does
TRAIN = "--num-envs 8 --num-steps 16 --total-timesteps 384 --num-jobs 24 --warmup-jobs 16 --followup-jobs 24 "
TRAIN += "--learning-rate 0.02 --ema-decay 0.5 --num-evaluations 1 --validation-jobs 600 --validation-loads 1.0"
REPLAY = "--batch-size 64 --updates-per-decision 0.05 --buffer-steps 40 --learning-starts 10"
BY_COST = "--objective wait --reward cost --reward-scale 1e-3 --gamma 0.9 --episodes-in-a-row 2"
FROM_RULE = "--reference easy-sjf --rule-bonus -4.0"  # but not close to it: the network is what is validated
TRAINING: dict[str, list[str]] = {
    "ppo-cloud": [str(PPO), *f"{FROM_RULE} --num-minibatches 2 {TRAIN}".split()],
    "ppo-trace": [str(PPO), *f"--num-minibatches 4 --update-epochs 2 {BY_COST} {TRAIN}".split()],
    "dqn-cloud": [str(DQN), *f"{FROM_RULE} --objective slowdown {REPLAY} {TRAIN}".split()],
    "dqn-trace": [str(DQN), *f"--n-step 3 {BY_COST} {REPLAY} {TRAIN}".split()],
}
COMPARE = "compare --workload cloud --policies fifo easy-fifo easy-sjf --max-jobs 2000 --output results.json"
COMMANDS = {name: [*line, "--workload", name.partition("-")[2]] for name, line in TRAINING.items()}
COMMANDS = {name: [str(TRACE) if word == "trace" else word for word in line] for name, line in COMMANDS.items()}
COMMANDS["comparison"] = [str(BENCHMARK), *COMPARE.split()]
# One process for all of them, which imports PyTorch once; each is __main__ in a folder of its own.
RUN_ALL = """
import json, os, runpy, sys
root, home, commands = sys.argv[1], os.getcwd(), json.loads(sys.argv[2])
sys.path.insert(0, root)
for name, command in commands.items():
    os.makedirs(os.path.join(home, name))
    os.chdir(os.path.join(home, name))
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
"""


def run_scripts(folder: Path) -> None:
    """Every one of COMMANDS, in a folder of its name."""
    command = [sys.executable, "-c", RUN_ALL, str(ROOT), json.dumps(COMMANDS)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    result = subprocess.run(command, cwd=folder, env=os.environ | one_thread, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def training(folder: Path) -> dict[str, Any]:
    """All that TensorBoard shows of a run, except its speed; the rule it started from, and its weights."""
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    tags = sorted(set(events.Tags()["scalars"]) - {"charts/SPS"})
    scalars = {tag: {str(event.step): event.value for event in events.Scalars(tag)} for tag in tags}
    state = load(run / "checkpoint.pt", torch.device("cpu"))
    reference = json.loads((run / "args.json").read_text())["reference"]
    return {"reference": reference, **scalars, "model": weights(state["model"]), "average": weights(state["average"])}


def weights(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Of a state_dict, whatever its names are."""
    flat = torch.cat([values.flatten().double() for values in state.values()]).numpy()
    return {"norm": math.sqrt(math.fsum(flat**2)), "sha256": sha256(flat)}


def comparison(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    results.pop("made", None)
    means = {
        part: {name: {metric: figure["mean"] for metric, figure in found.items()} for name, found in rows.items()}
        for part, rows in results.items()
        if part in ("policies", "differences")
    }
    return {**means, "tails": results["tails"], "jobs": results["counted_jobs"], "sha256": sha256(canonical(results))}


# ------------------------------------------------------------------------------------------------------ the simulator
TUNED = np.cos(np.arange(PATIENCE + 1.0)).round(3)
TUNED[PATIENCE] = 12.0  # hours
RULES = {name: name for name in ("fifo", "wfp3", "greedy-f1", "greedy-ljf@6", "easy-sjf", "easy-unicep", "easy-saf@12")}
RULES |= {name: name for name in ("easy-wfp3+sjf", "easy-saf-history", "easy-xf+sjf-history", "tetris", "random")}
RULES |= {name: name for name in ("round-robin", "best-fit")} | {"tuned": tuned_rule(TUNED)}
VARIANTS: dict[str, dict[str, Any]] = {
    "sjf-lock-in": {"rule": "sjf", "lock_in": True},
    "f1-lock-in-no-backfill": {"rule": "f1", "lock_in": True, "backfill": "none"},
}
WORKLOADS = ("cloud", "hpc", "trace")


def schedules(name: str) -> dict[str, Any]:
    """What the rules make of a workload."""
    workload = load_workload(str(TRACE), "all") if name == "trace" else load_workload(name, "test", runs=1)
    cases = {title: {"rule": rule} for title, rule in RULES.items()} | VARIANTS
    return {title: schedule(workload, **how) for title, how in cases.items()}


def schedule(workload: Workload, **how: Any) -> dict[str, Any]:
    [found] = simulate(workload, **how)
    start_time, node = found.start_time.astype(np.float64), found.node.astype(np.int64)
    return {
        "mean_wait": float(found.wait.mean()),
        "start_time_sha256": sha256(start_time),
        "node_sha256": sha256(node),
    }


# --------------------------------------------------------------------------------------------------- the environments
SHORT = {"num_jobs": 12, "warmup_jobs": 16, "followup_jobs": 24, "queue_window": 16}
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "cloud": {"workload": "cloud", "reference": "easy-sjf"},
    "trace": {"workload": str(TRACE), "reference": "easy-saf-history", "reward": "cost", "objective": "slowdown"},
    "trace-in-a-row": {"workload": str(TRACE), "reference": "easy-f1", "objective": "wait", "episodes_in_a_row": 3},
    "trace-lock-in": {"workload": str(TRACE), "reference": "sjf", "lock_in": True, "backfill": "none"},
}


def environment(setting: str, steps: int = 50, num_envs: int = 4) -> dict[str, Any]:
    how = SHORT | ENVIRONMENTS[setting]
    how["workload"] = load_workload(how["workload"], "train", runs=1)
    found = {}
    for actions in ("rule", "random"):
        envs = SchedulerVectorEnv(num_envs, **how)
        envs.reset(seed=1)
        found[actions] = walk(envs, steps, None if actions == "rule" else np.random.default_rng(1))
        envs.close()
    return found


def walk(envs: SchedulerVectorEnv, steps: int, random: np.random.Generator | None) -> dict[str, Any]:
    """Under the rule's actions, or legal ones at random."""
    seen, rewards, legal, episodes = hashlib.sha256(), np.zeros(envs.num_envs), 0, 0
    for _ in range(steps):
        mask = envs.action_masks()
        legal += int(mask.sum())
        actions = envs.rule_actions() if random is None else random_actions(mask, random)
        observations, reward, terminated, truncated, infos = envs.step(actions)
        for array in (actions.astype(np.int64), observations, infos["action_mask"], reward, terminated, truncated):
            seen.update(np.ascontiguousarray(array).tobytes())
        rewards += reward
        episodes += int((terminated | truncated).sum())
    return {"rewards": rewards.tolist(), "legal": legal, "episodes": episodes, "sha256": seen.hexdigest()}


def random_actions(mask: np.ndarray, random: np.random.Generator) -> np.ndarray:
    legal = [np.flatnonzero(row) for row in mask]
    return np.array([actions[random.integers(len(actions))] for actions in legal])


# ------------------------------------------------------------------------------------------------------- the decisions
STATE: dict[str, Any] = {
    "now": 1000.0,
    "nodes": [
        {"name": "a", "capacity": [16, 64]},
        {"name": "b", "capacity": [32, 128], "speed": 1.5},
        {"name": "c", "capacity": [8, 32], "speed": 2},
    ],
    "running": [
        {"id": f"r{k}", "node": node, "start_time": start, "requested_time": 3600, "demand": demand}
        for k, (node, start, demand) in enumerate(
            [("a", 100, [12, 32]), ("b", 500, [20, 64]), ("b", 740, [8, 32]), ("c", 730, [6, 16])]
        )
    ],
    "queued": [
        {"id": k, "submit_time": 900 + 7 * k, "requested_time": 60 * (1 + k * 7 % 11), "user": k % 3,
         "executable": k % 2, "demand": [1 + k * 5 % 13, 4 + 4 * (k * 3 % 7)]}
        for k in range(14)
    ],
    "finished": [
        {"run_time": 30 + 100 * k, "requested_time": 600, "demand": [1, 4], "user": k % 3, "executable": k % 2}
        for k in range(6)
    ],
}  # fmt: skip
DECIDING = ("easy-sjf", "greedy-saf", "easy-fifo+sjf-history")


def decision(rule: str) -> dict[str, Any]:
    return json.loads(Service(Args(rule)).decide(json.dumps(STATE).encode()))


# ------------------------------------------------------------------------------------------------ record, and compare
def sha256(data: np.ndarray | bytes) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()).hexdigest()


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def machine() -> dict[str, str]:
    """What rounding depends on; SIMULATOR is what that of the simulator does."""
    path = Path("/proc/cpuinfo")
    lines = dict(re.findall(r"^(.*?)\s*: (.*)$", path.read_text(), re.MULTILINE)) if path.exists() else {}
    names = ("model name", "cpu family", "model", "stepping")
    processor = ", ".join(lines[name] for name in names if name in lines) or platform.processor()
    used = {"kind": platform.machine(), "processor": processor, "torch uses": torch.backends.cpu.get_cpu_capability()}
    return used | {name: version(name) for name in ("torch", "numpy", "numba")}


SIMULATOR = ("kind", "numpy", "numba")


def record() -> None:
    with TemporaryDirectory() as folder:
        run_scripts(Path(folder))
        found: dict[str, Any] = {
            "machine": machine(),
            "training": {name: training(Path(folder) / name) for name in TRAINING},
            "comparison": comparison(Path(folder) / "comparison"),
        }
    found["schedules"] = {name: schedules(name) for name in WORKLOADS}
    found["environments"] = {name: environment(name) for name in ENVIRONMENTS}
    found["decisions"] = {rule: decision(rule) for rule in DECIDING}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every figure, and the path that leads to it."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        yield path, value
        return
    for key, part in parts:
        yield from leaves(part, f"{path} > {key}" if path else str(key))


def same(found: Any, golden: Any, exact: bool, rel: float) -> bool:
    """Figures are the same if their bits are (NaN, and the sign of zero, too) or, elsewhere, nearly."""
    if not (isinstance(found, float) and isinstance(golden, float)):
        return type(found) is type(golden) and found == golden
    return found.hex() == golden.hex() or (not exact and math.isclose(found, golden, rel_tol=rel, abs_tol=rel / 100))


def check(found: Any, *path: str, rel: float, machines: tuple[str, ...] = ()) -> None:
    """Compare with what golden.json has at that path: to the last bit on machines that are like the recording one in
    `machines` (default: in all respects), otherwise without hashes.

    Raises:
        AssertionError: with every figure that differs.
    """
    golden = json.loads(GOLDEN.read_text())
    recorded, here = golden["machine"], machine()
    for key in path:
        golden = golden[key]
    other = {name: here.get(name) for name in machines or recorded if recorded[name] != here.get(name)}
    ours, theirs = dict(leaves(found)), dict(leaves(golden))
    wrong = [
        f"{name}: {ours.get(name, 'missing')!r}, golden is {theirs.get(name, 'missing')!r}"
        for name in theirs | ours
        if (not other or "sha256" not in name)
        and not (name in ours and name in theirs and same(ours[name], theirs[name], not other, rel))
    ]
    if wrong:
        how = f"to {rel:g}, without hashes, on another machine ({other})" if other else "to the last bit"
        raise AssertionError(f"{len(wrong)} of {' > '.join(path)} differ, compared {how}:\n" + "\n".join(wrong))


def test_a_difference_is_found_and_named() -> None:
    golden = json.loads(GOLDEN.read_text())["comparison"]
    golden["tails"]["fifo"]["wait_max"] *= 1.1
    golden["jobs"] += 1
    with pytest.raises(AssertionError, match="2 of comparison differ") as raised:
        check(golden, "comparison", rel=1e-3)
    assert "\njobs: " in str(raised.value) and "\ntails > fifo > wait_max: " in str(raised.value)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all the scripts have run."""
    folder = tmp_path_factory.mktemp("golden")
    run_scripts(folder)
    return folder


@pytest.mark.parametrize("name", TRAINING)
def test_training(outputs: Path, name: str) -> None:
    check(training(outputs / name), "training", name, rel=1e-3)


def test_comparison(outputs: Path) -> None:
    check(comparison(outputs / "comparison"), "comparison", rel=1e-9)


@pytest.mark.parametrize("name", WORKLOADS)
def test_schedules(name: str) -> None:
    check(schedules(name), "schedules", name, rel=1e-9, machines=SIMULATOR)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments(name: str) -> None:
    check(environment(name), "environments", name, rel=1e-6, machines=SIMULATOR)


@pytest.mark.parametrize("rule", DECIDING)
def test_decisions(rule: str) -> None:
    check(decision(rule), "decisions", rule, rel=1e-9, machines=SIMULATOR)


if __name__ == "__main__":
    record()
