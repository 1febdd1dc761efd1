"""Rules are logged like agents: the same names, one event file a rule, and the figures of the replay."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fifo_baseline
import training.folder
from simulator.replay import simulate
from workloads.load import load_workload

SMALL = Path(__file__).parent / "data" / "small.swf"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def baseline(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["fifo_baseline.py", *arguments])
    fifo_baseline.main()


def test_what_is_logged_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--workload", str(SMALL), "--split", "train", "--rules", "fifo", "easy-sjf", "fifo", "--seed", "3")
    baseline(monkeypatch, *flags, "--output", "results.json")
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["policies"]) == ["fifo", "easy-sjf"]
    [run] = (tmp_path / "runs").iterdir()
    assert run.name.startswith("small__fifo_baseline__3__") and run.name in printed
    for rule, figures in results["policies"].items():
        [schedule] = simulate(load_workload(str(SMALL), "train"), rule)
        assert figures["wait"] == pytest.approx(schedule.wait.mean(), rel=1e-12)
        assert figures["utilization"] == schedule.utilization and figures["makespan"] == schedule.makespan
        assert rule in printed and f"{figures['wait_max']:,.0f}" in printed
        [events] = (run / rule).iterdir()
        log = EventAccumulator(str(events)).Reload()
        charts = [f"charts/{name}" for name in ("latency", "wait", "bounded_slowdown", "utilization")]
        evaluated = ["latency", "wait", "bounded_slowdown", "utilization", "wait_p99"]
        assert set(log.Tags()["scalars"]) == {*charts, *(f"eval/{name}" for name in evaluated)}
        for name in evaluated:
            [point] = log.Scalars(f"eval/{name}")
            assert point.step == 1800 and point.value == pytest.approx(figures[name], rel=1e-6)
        points = log.Scalars("charts/wait")  # 1,800 jobs are three blocks of 600
        assert [point.step for point in points] == [600, 1200, 1800]
        expected = [block.mean() for block in np.split(schedule.wait, 3)]
        np.testing.assert_allclose([point.value for point in points], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rules", "fastest"), "unknown rule 'fastest'"),
        (("--rules",), "--rules: none given"),
        (("--workload", "nowhere.swf"), "nowhere.swf: no such file or preset"),
        (("--workload", "empty.swf"), "empty.swf: line"),
        (("--output", "nowhere/results.json"), "--output nowhere/results.json: there is no folder nowhere"),
        (("--output", "."), "--output .: a folder"),
        (("--seed", "-1"), "seed is -1; use 0 or more"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "empty.swf").write_text("")
    with pytest.raises(SystemExit) as stopped:
        baseline(monkeypatch, "--workload", str(SMALL), *flags)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith(f"fifo_baseline.py: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["empty.swf"]


def test_two_in_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.folder, "time", SimpleNamespace(time=lambda: 1_700_000_000.5))
    for _ in range(2):
        baseline(monkeypatch, "--workload", str(SMALL))
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["small__fifo_baseline__1__1700000000", "small__fifo_baseline__1__1700000000-2"]


@pytest.mark.slow
def test_tracking_with_no_way_to_log_in_is_one_line(tmp_path: Path) -> None:
    alone = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_A")}
    command = [sys.executable, fifo_baseline.__file__, "--workload", str(SMALL), "--track"]
    environment = alone | {"HOME": str(tmp_path), "WANDB_MODE": "online"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert last.startswith("fifo_baseline.py: --track: ") and last.endswith("or set WANDB_MODE=offline")
    assert not list(tmp_path.glob("runs/*"))


def test_nobody_waits_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = "{0} {0}000 0 50 4 -1 -1 4 100 -1 1 1 1 1 1 1 -1 -1\n"
    (tmp_path / "idle.swf").write_text("; MaxProcs: 8\n" + "".join(map(job.format, range(1, 51))))
    baseline(monkeypatch, "--workload", "idle.swf")
    assert "idle.swf: there is nothing to schedule: 0.00% of the jobs wait at all" in capsys.readouterr().err
    baseline(monkeypatch, "--workload", str(SMALL))
    assert "to schedule" not in capsys.readouterr().err


def test_skipped_jobs_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = "{0} {0}0 0 {1} 4 -1 -1 4 100 -1 1 1 1 1 1 -1 -1 -1\n"
    lines = [job.format(number, 0 if number % 5 == 0 else 50) for number in range(1, 51)]
    (tmp_path / "some.swf").write_text("; MaxProcs: 8\n" + "".join(lines))
    baseline(monkeypatch, "--workload", "some.swf")
    assert capsys.readouterr().err == "some.swf: jobs skipped: 10 no run time\n"


def test_a_trace_whose_requests_are_the_run_times_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = "{0} {0}0 0 50 4 -1 -1 4 {1} -1 1 1 1 1 1 -1 -1 -1\n"
    lines = [job.format(number, -1 if number % 5 == 0 else 100) for number in range(1, 51)]
    (tmp_path / "some.swf").write_text("; MaxProcs: 8\n" + "".join(lines))
    baseline(monkeypatch, "--workload", "some.swf")
    assert "some.swf: 20% of the jobs request exactly their run time" in capsys.readouterr().err
