"""A run that was interrupted, however, goes on as if it had never been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from learners import SMALL, begun, command, logged, run_folder, scalars, script, train
from places import ROOT
from places import SMALL as SMALL_TRACE

import dqn_scheduler
import training.run
from dqn_scheduler import Replay
from policies import OnnxPolicy
from simulator.observation import Layout
from training.checkpoint import load, save
from training.run import Run

Change = pytest.MonkeyPatch


def checkpoint_of(run: Path) -> dict[str, Any]:
    return load(run / "checkpoint.pt", torch.device("cpu"))


def in_iteration(monkeypatch: Change, number: int, happens: Callable[[Run], object]) -> None:
    """This happens while that iteration (from 1 on) is under way."""
    usual = Run.log

    def log(run: Run, *others: Any) -> None:
        usual(run, *others)
        if run.iteration + 1 == number:
            happens(run)

    monkeypatch.setattr(Run, "log", log)


def assert_equal(run: Path, finished: Path) -> None:
    """To the last bit: all that was logged, and the networks."""
    assert logged(run) == logged(finished)
    ours, theirs = checkpoint_of(run), checkpoint_of(finished)
    for part in ("model", "average"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])
    assert ours["policy"] == theirs["policy"] and ours["iteration"] == theirs["iteration"] == 8


def test_an_interrupted_run_is_saved_and_equals_an_uninterrupted_one(
    finished: Path, tmp_path: Path, algorithm: ModuleType
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as change:
        in_iteration(change, 3, lambda _: signal.raise_signal(signal.SIGINT))
        stopped = command(algorithm, tmp_path, *SMALL[algorithm])
    run = run_folder(tmp_path)
    assert stopped.code == 130 and "Stopping" in stopped.err and "easy-sjf" in stopped.out
    said = f"Go on with: python {os.path.relpath(ROOT, tmp_path)}/{algorithm.__name__}.py --resume runs/{run.name}\n"
    assert stopped.err.endswith(said)
    assert checkpoint_of(run)["iteration"] == 3
    assert list(scalars(run, "charts/SPS")) == [64, 128, 192]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    result = command(algorithm, tmp_path, "--resume", str(run), "--objective", "wait")  # which is the run's own
    assert result.code == 0, result.err
    assert list(scalars(run, "charts/SPS")) == [64 * (k + 1) for k in range(8)]  # each once
    assert_equal(run, finished)


@pytest.mark.slow
def test_sigterm_is_as_good_as_ctrl_c(tmp_path: Path, algorithm: ModuleType, monkeypatch: Change) -> None:
    in_iteration(monkeypatch, 1, lambda _: signal.raise_signal(signal.SIGTERM))
    stopped = command(algorithm, tmp_path, *SMALL[algorithm])
    assert stopped.code == 143 and "Interrupted. Go on with: python" in stopped.err
    assert checkpoint_of(run_folder(tmp_path))["iteration"] == 1


class Killed(BaseException):
    """What no handler catches, as kill -9."""


def die(run: Run) -> None:
    raise Killed


@pytest.mark.parametrize(
    "number", [5, pytest.param(2, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(
    finished: Path, tmp_path: Path, algorithm: ModuleType, number: int
) -> None:
    with pytest.MonkeyPatch.context() as change:
        in_iteration(change, number, die)
        with pytest.raises(Killed):
            command(algorithm, tmp_path, *SMALL[algorithm], "--checkpoint-seconds", "0")
    run = run_folder(tmp_path)
    assert checkpoint_of(run)["iteration"] == number - 1
    result = command(algorithm, tmp_path, "--resume", str(run))
    assert result.code == 0, result.err
    assert_equal(run, finished)


@pytest.mark.slow
def test_a_validation_under_way_is_not_lost(
    finished: Path, tmp_path: Path, algorithm: ModuleType, monkeypatch: Change
) -> None:
    """That of what was there after the fourth iteration, whose network is another one by the fifth."""
    go_on, usual = threading.Event(), OnnxPolicy.schedule

    def schedule(policy: OnnxPolicy, *others: Any) -> Any:
        if policy.metadata.steps == 256:
            go_on.wait()
        return usual(policy, *others)

    with monkeypatch.context() as change:
        change.setattr(OnnxPolicy, "schedule", schedule)
        in_iteration(change, 6, die)
        with pytest.raises(Killed):
            command(algorithm, tmp_path, *SMALL[algorithm], "--checkpoint-seconds", "0")
        go_on.set()
    run = run_folder(tmp_path)
    state = checkpoint_of(run)
    assert state["iteration"] == 5 and state["judged"] == 0 and state["proposed"][0] == 4
    (run / "candidate.onnx").unlink()
    assert command(algorithm, tmp_path, "--resume", str(run)).code == 0
    assert_equal(run, finished)


@pytest.mark.parametrize("number", [6, 8])
def test_a_stop_does_not_wait_for_a_validation(
    finished: Path, tmp_path: Path, algorithm: ModuleType, number: int
) -> None:
    """That of the fourth iteration, which never ends: the stop comes in the sixth or, while the end of the eighth waits
    for it. The run goes on as if nothing had been."""
    usual, waited_for, main = OnnxPolicy.choices, threading.Event(), threading.main_thread().ident

    def choices(policy: OnnxPolicy, *others: Any) -> Any:
        if policy.metadata.steps == 256:
            waited_for.wait()
            time.sleep(0.1)
            signal.pthread_kill(main, signal.SIGINT)
            while not policy.run_options.terminate:
                time.sleep(0.01)
        return usual(policy, *others)

    with pytest.MonkeyPatch.context() as change:
        change.setattr(OnnxPolicy, "choices", choices)
        in_iteration(change, number, lambda run: (waited_for.set(), number == 8 or wait_for_signal(run)))
        stopped = command(algorithm, tmp_path, *SMALL[algorithm])
    run = run_folder(tmp_path)
    assert stopped.code == 130, stopped.err
    state = checkpoint_of(run)
    assert (state["iteration"], state["judged"], state["proposed"][0]) == (number, 0, 4)
    result = command(algorithm, tmp_path, "--resume", str(run))
    assert result.code == 0, result.err
    assert_equal(run, finished)


def wait_for_signal(run: Run) -> None:
    while not run.signal:
        time.sleep(0.01)


def test_a_checkpoint_of_a_former_version_is_gone_on_with(
    finished: Path, tmp_path: Path, algorithm: ModuleType
) -> None:
    """It was written when nothing was under way, before what was due was proposed; DQN's counted its updates."""
    with pytest.MonkeyPatch.context() as change:
        in_iteration(change, 5, die)
        with pytest.raises(Killed):
            command(algorithm, tmp_path, *SMALL[algorithm], "--checkpoint-seconds", "0")
    run = run_folder(tmp_path)
    state = checkpoint_of(run)
    del state["proposed"]
    torch.save(state | {"judged": 0, "updates": 99}, run / "checkpoint.pt")
    assert command(algorithm, tmp_path, "--resume", str(run)).code == 0
    assert_equal(run, finished)


def test_a_run_of_before_the_rooms_is_gone_on_with(tmp_path: Path, algorithm: ModuleType) -> None:
    """tests/data/before holds runs that stopped after three of six iterations, and the losses of the other three; all
    three files are of revision 27ce463."""
    before, run = ROOT / "tests" / "data" / "before" / algorithm.__name__.partition("_")[0], tmp_path / "run"
    run.mkdir()
    args = json.loads((before / "args.json").read_text()) | {"workload": str(SMALL_TRACE)}
    (run / "args.json").write_text(json.dumps(args))
    (run / "checkpoint.pt").write_bytes((before / "checkpoint.pt").read_bytes())
    result = command(algorithm, tmp_path, "--resume", str(run))
    assert result.code == 0, result.err
    for name, losses in json.loads((before / "losses.json").read_text()).items():
        assert list(scalars(run, name).values()) == pytest.approx(losses, rel=1e-3, abs=1e-6), name


def test_the_first_checkpoint_is_written_at_once_and_others_as_often_as_asked_for(
    tmp_path: Path, algorithm: ModuleType, monkeypatch: Change
) -> None:
    """On a clock on which an iteration takes ten seconds."""
    begin, written, told, run_of = Run.begin, [], [], []

    def count(run: Run, *others: Any, **parts: Any) -> None:
        begin(run, *others, **parts)
        run_of.append(run)
        monkeypatch.setattr(run, "checkpoint", lambda save=run.checkpoint: (written.append(run.iteration), save()))
        monkeypatch.setattr(run, "write_progress", lambda: told.append(run.iteration))

    monkeypatch.setattr(Run, "begin", count)
    monkeypatch.setattr(
        training.run, "time", SimpleNamespace(time=time.time, monotonic=lambda: 10.0 * run_of[0].iteration)
    )
    train(algorithm, tmp_path)
    assert written == [1, 4, 7, 8]
    assert told == [*range(1, 9), 8]


def test_a_checkpoint_by_default_flags_is_small(tmp_path: Path) -> None:
    """A replay memory and environments as large as DQN's by default, which are all but empty so far: 640 MB."""
    layout, clusters = Layout(64, 8, 2), dqn_scheduler.Args.num_envs
    replay = Replay(dqn_scheduler.Args.buffer_steps, clusters, layout.size, torch.device("cpu"))
    obs = torch.zeros(clusters, layout.size)
    for step in range(128):  # every cluster has three jobs in its queue, each a row of 16 features, one of which moves
        obs[:, :48] = torch.rand(clusters, 48, generator=torch.Generator().manual_seed(1))
        obs[:, 0] = torch.rand(clusters, generator=torch.Generator().manual_seed(step))
        replay.add(obs, *torch.zeros(3, clusters))
    save(tmp_path / "checkpoint.pt", {"replay": replay.state_dict()})
    assert replay.obs.nbytes > 500e6 and (tmp_path / "checkpoint.pt").stat().st_size < 10e6
    again = Replay(128, clusters, layout.size, torch.device("cpu"))
    again.load_state_dict(load(tmp_path / "checkpoint.pt", torch.device("cpu"))["replay"])
    assert torch.equal(again.obs, replay.obs) and again.obs.stride() == replay.obs.stride() and again.count == 128


def test_two_do_not_work_on_the_same_run(tmp_path: Path, algorithm: ModuleType) -> None:
    def another(run: Run) -> None:
        second = command(algorithm, tmp_path, "--resume", str(run.folder))
        assert second.code == 2 and second.last == f"error: {run.folder}: another process is at work on this run; " + (
            "wait for its end, or end it"
        )
        seen.append(run.folder)

    seen: list[Path] = []
    with pytest.MonkeyPatch.context() as change:
        in_iteration(change, 2, another)
        train(algorithm, tmp_path, "--total-timesteps", "128")
    assert len(seen) == 1


def test_a_checkpoint_takes_its_policy_with_it(tmp_path: Path, algorithm: ModuleType) -> None:
    run = begun(algorithm, tmp_path)
    policy = (run.folder / "policy.onnx").read_bytes()
    run.checkpoint()
    (run.folder / "policy.onnx").write_bytes(b"a later one, after which the run was killed")
    run.restore()
    assert (run.folder / "policy.onnx").read_bytes() == policy


def test_a_damaged_checkpoint_is_refused_in_one_line(finished: Path, tmp_path: Path, algorithm: ModuleType) -> None:
    (tmp_path / "args.json").write_bytes((finished / "args.json").read_bytes())
    whole = (finished / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    result = command(algorithm, tmp_path, "--resume", str(tmp_path))
    assert result.code == 2 and "checkpoint.pt" in result.last and result.last.endswith("start a new run")
    assert "Traceback" not in result.err


def test_a_run_does_not_go_on_with_other_jobs(tmp_path: Path, algorithm: ModuleType) -> None:
    """Its trace has been written anew: what it has learnt and what it is judged by would be two things."""
    trace = tmp_path / "mine.swf"
    shutil.copy(SMALL_TRACE, trace)
    run = begun(algorithm, tmp_path, "--workload", "mine.swf")
    run.checkpoint()
    before = {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    lines = trace.read_text().splitlines()
    fields = lines[-1].split()
    trace.write_text("\n".join([*lines[:-1], " ".join([*fields[:3], str(int(fields[3]) + 1), *fields[4:]])]) + "\n")
    result = command(algorithm, tmp_path, "--resume", str(run.folder))
    assert result.code == 2 and result.last.startswith("error: mine.swf: not the jobs that the run began with (their")
    assert result.last.endswith("put them back, or start a new run") and "Traceback" not in result.err
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_names_its_trace_relatively_says_from_where_to_resume(
    finished: Path, tmp_path: Path, algorithm: ModuleType
) -> None:
    (here := tmp_path / "elsewhere").mkdir()
    (run := tmp_path / "runs" / "mine").mkdir(parents=True)
    stored = json.loads((finished / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(stored | {"workload": "mine.swf"}))
    shutil.copy(SMALL_TRACE, tmp_path / "mine.swf")
    result = command(algorithm, here, "--resume", "../runs/mine")
    assert result.code == 2 and result.last == (
        "error: mine.swf: no such file here; the run's --workload names it. Resume from where the run was started: "
        f"cd {tmp_path}"
    )


def test_a_checkpoint_of_another_network_is_refused(finished: Path, tmp_path: Path, algorithm: ModuleType) -> None:
    (tmp_path / "args.json").write_bytes((finished / "args.json").read_bytes())
    state = checkpoint_of(finished)
    state["model"].pop("rule_bonus")
    torch.save(state, tmp_path / "checkpoint.pt")
    result = command(algorithm, tmp_path, "--resume", str(tmp_path))
    assert result.code == 2 and result.last.endswith("can be resumed (RuntimeError); start a new run")


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, algorithm: ModuleType) -> None:
    """The disk is full (what it is written to before it takes the old one's place is /dev/full)."""
    run = begun(algorithm, tmp_path, "--num-envs", "2", "--num-steps", "2")
    run.checkpoint()
    before = (run.folder / "checkpoint.pt").read_bytes()
    (run.folder / f".checkpoint.pt.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"checkpoint.pt cannot be written; make room"):
        run.checkpoint()
    assert (run.folder / "checkpoint.pt").read_bytes() == before
    assert [path.name for path in run.folder.iterdir() if path.name.startswith(".")] == []


def test_a_run_starts_from_the_weights_of_another(
    finished: Path, tmp_path: Path, monkeypatch: Change, algorithm: ModuleType
) -> None:
    monkeypatch.chdir(tmp_path)
    run = begun(algorithm, tmp_path, "--weights", str(finished / "weights.pt"), "--seed", "7")
    before = torch.load(finished / "weights.pt")
    assert set(before) == {name for name, part in run.parts.items() if isinstance(part, torch.nn.Module)}
    for name, weights in before.items():
        for key, value in run.parts[name].state_dict().items():
            assert torch.equal(value, weights[key]), (name, key)


def test_weights_of_another_network_are_refused(finished: Path, tmp_path: Path, algorithm: ModuleType) -> None:
    weights = str(finished / "weights.pt")
    done = command(algorithm, tmp_path, *SMALL[algorithm], "--weights", weights, "--hidden", "48")
    assert done.code == 2
    assert done.err.startswith(f"error: {weights}: no weights for this network (")


# ------------------------------------------------------------------------------------------- processes that are killed
# The script, which waits for a signal in its third iteration.
WAITING = """
import runpy, sys, time
from training.run import Run
usual = Run.log
def log(run, *others):
    usual(run, *others)
    if run.iteration == 2:
        print("waiting", flush=True)
        while not run.signal:
            time.sleep(0.01)
Run.log, sys.argv = log, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_process_that_gets_a_signal_leaves_what_can_be_resumed(
    finished: Path, tmp_path: Path, algorithm: ModuleType, number: signal.Signals, code: int
) -> None:
    flags = (str(ROOT / f"{algorithm.__name__}.py"), *SMALL[algorithm], "--run-name", "mine")
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *flags], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    run = tmp_path / "runs" / "mine"
    assert checkpoint_of(run)["iteration"] in ((1, 2) if number == signal.SIGKILL else (3,))
    result = script(algorithm, tmp_path, "--resume", str(run))
    assert result.returncode == 0, result.stderr
    assert_equal(run, finished)
    again = script(algorithm, tmp_path, *SMALL[algorithm], "--run-name", "mine")
    assert again.returncode == 2
    assert again.stderr.startswith("error: runs/mine is there already; go on with it by --resume runs/mine, or give")


@pytest.mark.slow
def test_kill_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """kill -9 at many instants of a loop that does nothing but write checkpoints."""
    code = (
        "import torch, sys; from pathlib import Path; from training.checkpoint import save\n"
        "k = 0\n"
        "while True:\n"
        "    k += 1\n"
        "    save(Path(sys.argv[1]), {'k': k, 'x': torch.full((100_000,), k)})\n"
        "    print(k, flush=True)\n"
    )
    path = tmp_path / "checkpoint.pt"
    rng = np.random.default_rng(0)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
        state = load(path, torch.device("cpu"))
        assert (state["x"] == state["k"]).all()
