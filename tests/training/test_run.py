"""A run's folder: what is in it, under which name, and what other programs read there."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from learners import SMALL, begun, command, run_folder, scalars, train
from places import SMALL as TRACE

import dqn_scheduler
from training.folder import lock
from training.run import Run


def test_run_writes_what_it_says(finished: Path) -> None:
    names = {"args.json", "checkpoint.pt", "policy.onnx", "progress.json", "lock", "weights.pt"}
    assert {path.name for path in finished.iterdir() if "tfevents" not in path.name} == names
    for tag in ("charts/SPS", "charts/episodic_return", "charts/wait"):
        assert scalars(finished, tag), tag
    assert set(scalars(finished, "eval/cost")) == {0, 256, 512}
    learning_rate = json.loads((finished / "args.json").read_text())["learning_rate"]
    rates = scalars(finished, "charts/learning_rate")
    assert rates == {64 * (k + 1): pytest.approx(learning_rate * (1 - k / 8)) for k in range(8)}


def test_a_run_keeps_how_its_trace_is_read(tmp_path: Path, algorithm: ModuleType) -> None:
    """In args.json, and so when it goes on, and in the command that it prints at its end."""
    lines = TRACE.read_text().splitlines()
    (tmp_path / "trace.swf").write_text("\n".join([*lines, "1 2 3"]) + "\n")
    flags = ("--skip-bad-lines", "--nodes", "1xprocessors=300")
    result = command(algorithm, tmp_path, *SMALL[algorithm], "--workload", "trace.swf", *flags)
    assert result.code == 0, result.err
    compare = "--workload trace.swf --skip-bad-lines --nodes 1xprocessors=300 --objective wait"
    assert "trace.swf: jobs skipped: 1 bad line: cut short" in result.err and compare in result.err
    run = run_folder(tmp_path)
    assert json.loads((run / "args.json").read_text())["nodes"] == ["1xprocessors=300"]
    again = command(algorithm, tmp_path, "--resume", str(run))
    assert again.code == 0 and compare in again.err
    refused = command(algorithm, tmp_path, "--resume", str(run), "--nodes", "1xprocessors=400")
    assert refused.code == 2 and "leave out nodes" in refused.last


def test_progress_says_how_far_it_is(tmp_path: Path, algorithm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    log, seen = Run.log, []

    def look(run: Run, *others: Any) -> None:
        log(run, *others)
        if run.iteration:
            seen.append(json.loads((run.folder / "progress.json").read_text()))

    monkeypatch.setattr(Run, "log", look)
    run = train(algorithm, tmp_path)
    last = json.loads((run / "progress.json").read_text())
    assert seen[0] == {
        "step": 64, "total": 512, "best": 0.0, "checkpoint": 64,
        "decisions_per_second": scalars(run, "charts/SPS")[64],
    }  # fmt: skip
    assert last["step"] == last["total"] == last["checkpoint"] == 512
    best = scalars(run, "eval/best_improvement")[512]
    assert last["best"] == pytest.approx(-best, abs=1e-6)


def test_a_run_has_the_name_that_it_is_given(tmp_path: Path, algorithm: ModuleType) -> None:
    run = begun(algorithm, tmp_path, "--run-name", "mine")
    assert run.folder == tmp_path / "runs" / "mine"
    first, again = (command(algorithm, tmp_path, *SMALL[algorithm], "--run-name", "mine") for _ in range(2))
    # The first one finds what has ended before its first checkpoint.
    assert (first.code, again.code) == (0, 2)
    assert again.last == "error: runs/mine is there already; go on with it by --resume runs/mine, or give another " + (
        "--run-name"
    )


def test_the_flags_of_an_episode_reach_the_clusters(tmp_path: Path, algorithm: ModuleType) -> None:
    episode = dict(num_envs=4, num_jobs=30, warmup_jobs=20, episodes_in_a_row=5)
    flags = [str(part) for name, value in episode.items() for part in (f"--{name.replace('_', '-')}", value)]
    flags += ["--followup-jobs", "10", "--queue-window", "9", "--training-loads", "1.0", "2.0"]
    envs = begun(algorithm, tmp_path, *flags).envs
    usual, busy = (np.ptp(envs.workload.jobs.submit_time[slice(*segment)]) for segment in envs.workload.segments)
    assert busy == pytest.approx(usual / 2)
    assert {name: getattr(envs, name) for name in episode} == episode
    assert envs.length == 60 and envs.layout.window == 9


def test_a_run_that_fails_puts_everything_back(tmp_path: Path, algorithm: ModuleType) -> None:
    def fail(run: Run, *_: Any) -> None:
        raise ValueError("something is wrong with this iteration")

    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as change:
        change.setattr(Run, "log", fail)
        result = command(algorithm, tmp_path, *SMALL[algorithm])
    assert result.code == 2 and result.last == "error: something is wrong with this iteration"
    assert signal.getsignal(signal.SIGINT) is handler
    lock(run_folder(tmp_path)).close()


@pytest.mark.slow
def test_after_a_minute_of_training_the_network_itself_is_a_quarter_below_fifo(
    algorithm: ModuleType, tmp_path: Path
) -> None:
    """It starts as FIFO without backfilling. The network's own replays of the validation split count, not those of a
    rule that it stands for."""
    flags = ("--workload", "hpc", "--objective", "wait", "--reference", "fifo", "--total-timesteps", "80_000")
    flags += ("--num-envs", "64", "--num-steps", "64", "--num-evaluations", "4", "--validation-jobs", "12_000")
    flags += ("--num-jobs", "128", "--warmup-jobs", "64", "--followup-jobs", "64", "--queue-window", "16")
    flags += ("--ema-decay", "0.8")
    if algorithm is dqn_scheduler:
        flags += ("--margin", "0", "--updates-per-decision", "0.002")
    result = command(algorithm, tmp_path, *flags)
    assert result.code == 0, result.err
    run = run_folder(tmp_path)
    fifo = next(line for line in result.out.splitlines() if line.startswith("│ fifo ")).split("│")[2]
    assert min(scalars(run, "eval/cost").values()) < 0.75 * float(fifo.replace(",", ""))
