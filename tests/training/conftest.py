"""Tests that take `algorithm` run for both learners."""

import os
from pathlib import Path
from types import ModuleType

import pytest
from learners import SMALL, command, run_folder
from places import ROOT

import dqn_scheduler
import ppo_scheduler


@pytest.fixture(scope="session", params=[ppo_scheduler, dqn_scheduler], ids=["ppo", "dqn"])
def algorithm(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


@pytest.fixture(scope="session")
def finished(algorithm: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that was not interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    result = command(algorithm, folder, *SMALL[algorithm])
    assert result.code == 0, result.err
    assert "easy-sjf" in result.out and "fifo" in result.out  # the closing table
    script = os.path.relpath(ROOT / "benchmark.py", folder)
    assert f"Compare on the test split: python {script} compare" in result.err
    return run_folder(folder)
