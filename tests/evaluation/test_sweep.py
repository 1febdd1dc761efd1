"""Sweeps: Optuna's on a program with a known best, through interruptions; W&B's with the engine that W&B publishes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from learners import records
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from places import ROOT
from tensorboard.summary.writer.event_file_writer import EventFileWriter

import benchmark
from evaluation.sweep import alone, finish, launch, read_description, suggest

FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
# Logs score = x - (y - 2)^2 / 100 + k / 1000 at "validations" k = 1 to 9, and can go on where it was interrupted. Where
# there is a file `wait`, it waits after the second validation until there is none.
PROGRAM = """
import json, sys, time
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
if sys.argv[1] == "--resume":
    folder = Path(sys.argv[2])
    flags = json.loads((folder / "checkpoint.pt").read_text())
else:
    flags = dict(flag[2:].split("=") for flag in sys.argv[1:]) | {"k": 0}
    folder = Path(f"runs/w__{flags['exp_name']}__1__{int(time.time())}")
    folder.mkdir(parents=True)
if float(flags["x"]) > 0.9:
    sys.exit("error: x is too large")
writer = EventFileWriter(str(folder))
try:
    for k in range(flags["k"] + 1, 10):
        score = float(flags["x"]) - (int(flags["y"]) - 2) ** 2 / 100 + k / 1000
        summary = Summary(value=[Summary.Value(tag="eval/score", simple_value=score)])
        writer.add_event(Event(step=k, summary=summary, wall_time=time.time()))
        writer.flush()
        (folder / "checkpoint.pt").write_text(json.dumps(flags | {"k": k}))
        time.sleep(float(flags["pause"]))
        while k == 2 and Path("wait").exists():
            time.sleep(0.05)
except KeyboardInterrupt:
    pass
"""
DESCRIPTION = {
    "program": "program.py",
    "method": "bayes",
    "metric": {"name": "eval/score", "goal": "maximize"},
    "parameters": {"x": {"min": 0.0, "max": 0.8}, "y": {"values": [1, 2, 3]}, "pause": {"value": 0.02}},
}


@pytest.fixture
def describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write known.yaml (the program with a known best, with these changes) into an empty folder, the current one."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def write(**changes: object) -> None:
        Path("known.yaml").write_text(yaml.safe_dump(DESCRIPTION | {"program": str(program)} | changes))

    write()
    return write


Sweep = Callable[..., tuple[int, str]]


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sweep:
    """`benchmark.py sweep known.yaml` with these flags; returns the exit code and what it said on stderr."""

    def call(*flags: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "sweep", "known.yaml", *map(str, flags)])
        try:
            benchmark.main()
        except SystemExit as stopped:
            return stopped.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return call


def trials() -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend("runs/sweep-known.journal"))
    return optuna.load_study(study_name="known", storage=storage).trials


@pytest.mark.slow
def test_search_finds_what_matters_and_stops_bad_runs(describe: Callable[..., None], sweep: Sweep) -> None:
    slow = DESCRIPTION["parameters"] | {"pause": {"value": 0.25}}
    describe(parameters=slow, early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2})
    code, said = sweep("--trials", 12, "--workers", 2, "--output", "results.json")
    assert code == 0, said
    results = json.loads(Path("results.json").read_text())
    values = [trial["value"] for trial in results["trials"]]
    assert values == sorted(values, reverse=True) and values[0] > 0.5
    assert len(values) + results["stopped_early"] == 12 and results["stopped_early"] >= 2 and results["failed"] == 0
    for trial in results["trials"]:
        assert trial["value"] == pytest.approx(trial["x"] - (trial["y"] - 2) ** 2 / 100 + 0.009, abs=1e-6)
    assert max(results["importances"], key=results["importances"].get) == "x"
    assert Path("runs/sweep-known.png").stat().st_size > 5_000
    assert f"--x={results['trials'][0]['x']}" in results["best"] and "--pause=0.25" in results["best"]
    code, _ = sweep("--trials", 12)  # there is nothing left to do
    assert code == 0 and len(trials()) == 12 and len(list(Path("runs").glob("w__*"))) == 12


def until(happened: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_study_goes_on_with_its_runs(
    describe: Callable[..., None], sweep: Sweep, blow: signal.Signals
) -> None:
    describe()
    Path("wait").touch()
    command = [sys.executable, str(ROOT / "benchmark.py"), "sweep", "known.yaml", "--trials", "2", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    begun = lambda: [json.loads(path.read_text())["k"] for path in Path("runs").glob("*/checkpoint.pt")]  # noqa: E731
    until(lambda: begun() == [2, 2])
    runs = [child for child in psutil.Process(process.pid).children() if "program.py" in " ".join(child.cmdline())]
    process.send_signal(blow)
    _, said = process.communicate(timeout=120)
    if blow == signal.SIGINT:
        assert process.returncode == 130 and said.strip().splitlines()[-1].startswith("benchmark.py: interrupted")
    before = [trial.params for trial in trials()]
    assert len(before) == 2 and {trial.state for trial in trials()} == {TrialState.RUNNING}
    assert len(runs) == 2
    until(lambda: not any(run.is_running() for run in runs))  # nor do the orphans of kill -9 live on
    assert begun() == [2, 2]
    Path("wait").unlink()
    code, said = sweep("--trials", 3)
    assert code == 0, said
    assert [trial.params for trial in trials()[:2]] == before and {t.state for t in trials()} == {TrialState.COMPLETE}
    assert len(list(Path("runs").glob("w__*"))) == 3  # none was begun anew


@pytest.mark.usefixtures("describe")
def test_two_do_not_search_the_same_study_at_once(sweep: Sweep) -> None:
    Path("runs").mkdir()
    with alone(Path("runs/sweep-known.journal")):
        code, said = sweep("--trials", 1)
    assert code == 2 and said.startswith("benchmark.py: runs/sweep-known.journal: another sweep")
    assert not list(Path("runs").glob("w__*"))
    assert sweep("--trials", 1)[0] == 0 and len(trials()) == 1


def test_what_fails_is_said_and_the_rest_goes_on(describe: Callable[..., None], sweep: Sweep) -> None:
    describe(method="random", parameters=DESCRIPTION["parameters"] | {"x": {"values": [0.5, 0.95]}})
    code, said = sweep("--trials", 6, "--workers", 2, "--output", "results.json")
    assert code == 0 and "failed: error: x is too large" in said
    results = json.loads(Path("results.json").read_text())
    assert results["failed"] > 0 < len(results["trials"]) and results["failed"] + len(results["trials"]) == 6


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"parameters": DESCRIPTION["parameters"] | {"x": {"value": 2}}}, (), "none of the 1 trials in runs/"),
        (
            {"parameters": DESCRIPTION["parameters"] | {"x": {"distribution": "beta"}}},
            (),
            "known.yaml: x: distribution",
        ),
        ({"method": "grid"}, (), "known.yaml: method is 'grid'"),
        ({"program": "nowhere.py"}, (), "known.yaml: program is 'nowhere.py'"),
        (
            {"metric": {"goal": "maximize"}},
            (),
            "known.yaml: no description of a sweep (Object missing required field `name`",
        ),
        (
            {"metric": {"name": "eval/cost", "goal": "minimise"}},
            (),
            "known.yaml: no description of a sweep (Invalid enum",
        ),
        ({"parameters": {"x": 0.1}}, (), "known.yaml: no description of a sweep (Expected `object`, got `float`"),
        ({"parameters": {"x": {"values": 3}}}, (), "known.yaml: no description of a sweep (Expected `array`"),
        ({"parameters": {"x": {"min": 0.1}}}, (), "known.yaml: x: give min and max"),
        ({"early_terminate": None}, (), "known.yaml: no description of a sweep (Expected `object`, got `null`"),
        ({"early_terminate": {"type": "hyperband", "s": 2}}, (), "known.yaml: early_terminate has no min_iter"),
        ({}, ("--trials", 0), "--trials 0: give at least 1"),
        ({}, ("--journal", "known.yaml"), "known.yaml: no journal of a study"),
    ],
)
def test_bad_input_is_one_line(
    describe: Callable[..., None], sweep: Sweep, changes: dict[str, object], flags: tuple[object, ...], message: str
) -> None:
    describe(**changes)
    code, said = sweep("--trials", 1, *flags)
    assert code == 2 and said.strip().splitlines()[-1].startswith(f"benchmark.py: {message}"), said


def test_a_journal_is_for_one_search(describe: Callable[..., None], sweep: Sweep) -> None:
    assert sweep("--trials", 1)[0] == 0
    describe(parameters=DESCRIPTION["parameters"] | {"x": {"min": 0.0, "max": 1.0}})
    code, said = sweep("--trials", 2)
    assert code == 2 and "give a new --journal" in said and len(trials()) == 1


@pytest.mark.parametrize("journal", ["runs/new.journal", "runs/sweep-known.journal"])
def test_a_new_study_has_runs_of_its_own(describe: Callable[..., None], sweep: Sweep, journal: str) -> None:
    assert sweep("--trials", 1)[0] == 0
    describe(parameters=DESCRIPTION["parameters"] | {"x": {"min": 0.0, "max": 0.01}})
    Path(journal).unlink(missing_ok=True)
    code, said = sweep("--trials", 1, "--journal", journal, "--output", "results.json")
    assert code == 0 and len(list(Path("runs").glob("w__*"))) == 2, said
    (trial,) = json.loads(Path("results.json").read_text())["trials"]
    assert trial["value"] == pytest.approx(trial["x"] - (trial["y"] - 2) ** 2 / 100 + 0.009, abs=1e-6)


def test_a_run_that_died_before_its_first_checkpoint_is_begun_anew(describe: Callable[..., None]) -> None:
    EventFileWriter("runs/w__sweep-known-0__1__1700000000").close()
    study = optuna.create_study(direction="maximize")
    run = launch(study.ask(), "sweep-known", read_description(Path("known.yaml")))
    run.look("eval/score")  # at the dead one: there is no other yet
    assert run.process.wait() == 0
    run.look("eval/score")
    assert len(run.values) == 9, finish(study, run, False)


# ------------------------------------------------------------------------------------------------------- W&B's own way
# Answers one JSON request, in an environment of its own: the engine wants NumPy 1.
ENGINE = """
import json, sys
from sweeps import SweepRun, RunState, next_run, schema_violations_from_proposed_config, stop_runs
request = json.load(sys.stdin)
runs = [SweepRun(name=str(k), state=RunState.finished, config=config, summary_metrics=metrics[-1], history=metrics)
        for k, (config, metrics) in enumerate(request["runs"])]
violations = schema_violations_from_proposed_config(request["description"])
stop_runs(request["description"], runs, validate=True)
print(json.dumps({"violations": violations, "config": next_run(request["description"], runs, validate=True).config}))
"""
SHORT = ("--workload", str(ROOT / "tests/data/small.swf"), "--objective", "wait", "--reference", "easy-sjf")
SHORT += (
    "--tune-generations",
    "1",
    "--total-timesteps",
    "512",
    "--num-envs",
    "8",
    "--num-steps",
    "32",
    "--num-evaluations",
    "2",
)
SHORT += ("--num-jobs", "64", "--warmup-jobs", "16", "--followup-jobs", "32", "--validation-jobs", "600")


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    folder = tmp_path_factory.mktemp("engine")
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "pip", "install", "--quiet", "--retries", "1", "sweeps==0.3.0", "numpy==1.26.4"]
    installed = subprocess.run(pip, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"pip cannot install W&B's sweeps: {installed.stderr.strip().splitlines()[-1]}")

    def answer(description: dict[str, Any], runs: list[Any]) -> dict[str, Any]:
        request = json.dumps({"description": description, "runs": runs})
        done = subprocess.run(
            [folder / "bin" / "python", "-c", ENGINE], input=request, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return answer


def as_the_agent_does(description: dict[str, Any], config: dict[str, Any], run: str) -> list[dict[str, float]]:
    """Run the program with W&B's own reading of command and config; what it then holds of the metric, in order."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
    from wandb.sdk.lib.config_util import save_config_file_from_dict

    macros = create_sweep_command_args({"args": config})
    macros |= {
        "env": ["/usr/bin/env"],
        "interpreter": [sys.executable],
        "program": [str(ROOT / description["program"])],
    }
    words = [part for word in create_sweep_command(description["command"]) for part in macros.get(word[2:-1], [word])]
    save_config_file_from_dict(f"wandb/sweep-s/config-{run}.yaml", config)
    settings = {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": run}
    settings["WANDB_SWEEP_PARAM_PATH"] = f"wandb/sweep-s/config-{run}.yaml"
    done = subprocess.run([*words, *SHORT], env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = Path("wandb").glob(f"offline-run-*-{run}/run-{run}.wandb")  # under the agent's name for it
    kept, name = records(file), description["metric"]["name"]
    chosen = {item.key: json.loads(item.value_json) for r in kept for item in r.run.config.update}
    assert all(chosen[key] == entry["value"] for key, entry in config.items()), chosen
    history = [{i.nested_key[0] if i.nested_key else i.key: i.value_json for i in r.history.item} for r in kept]
    return [{name: json.loads(row[name])} for row in history if name in row]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_three_proposals_of_wandbs_engine_run_for_real(
    file: Path, engine: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    description = yaml.safe_load(file.read_text())
    known = {field.name for field in fields(import_module(Path(description["program"]).stem).Args)}
    assert set(description["parameters"]) < known
    runs: list[Any] = []
    for k in range(3):
        answer = engine(description, runs)
        assert answer["violations"] == []
        metrics = as_the_agent_does(description, answer["config"], f"proposal{k}")
        assert len(metrics) == 3 and all(-1000 < row[description["metric"]["name"]] < 1 for row in metrics)
        runs.append((answer["config"], metrics))
    assert len({json.dumps(config, sort_keys=True) for config, _ in runs}) == 3


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_optuna_reads_the_same_file(file: Path) -> None:
    description = read_description(file)
    study = optuna.create_study()
    for _ in range(20):
        trial = study.ask()
        for name, parameter in description["parameters"].items():
            value = suggest(trial, name, parameter)
            if "values" in parameter:
                assert value in parameter["values"]
            elif "value" not in parameter:
                assert parameter["min"] <= value <= parameter["max"]
                assert isinstance(value, type(parameter["min"]))
