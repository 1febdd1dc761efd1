"""`benchmark.py forecast`: coverage and pinball losses by hand, and forecasts that know everything."""

import sys

import numpy as np
import pytest
from oracles import make_workload

import benchmark
import evaluation.forecast
from evaluation.forecast import Forecast, calibration, forecast


def test_coverage_and_pinball_loss_by_hand() -> None:
    expected = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    found = calibration(expected, np.array([0.0, 2.0, 3.0, 7.0]))
    assert found["below"] == [0.25, 0.5, 0.75] and found["inside"] == 0.5 and found["mean"] == 3.0
    losses = [0.9 * 1 + 0.1 * (1 + 2 + 6), 0.5 * (2 + 0 + 1 + 5), 0.1 * (3 + 1 + 0) + 0.9 * 4]
    assert found["pinball"] == pytest.approx([loss / 4 / 3 for loss in losses])


def test_forecasts_are_exact_where_everything_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """All jobs are there from the beginning and take what they request, and nobody has finished: one moment."""
    workload = make_workload(3, 40)
    jobs = workload.jobs
    jobs.submit_time[:], jobs.run_time[:] = 0.0, jobs.requested_time
    monkeypatch.setattr(evaluation.forecast, "load_workload", lambda *_: workload)
    results, _ = forecast(Forecast(rule="easy-sjf", moments=1, samples=2))
    assert results["forecasts"] > 10 and results["inside"] == 1.0
    assert results["pinball"] == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)


@pytest.mark.parametrize("flags", [["--moments", "0"], ["--rule", "tetris"], ["--rule", "easy-nothing"]])
def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "forecast", *flags])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("benchmark.py: ")
