"""What all tests share: Hypothesis' settings, kernels that are compiled once, and a small slurmrestd."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from fake_slurm import FakeSlurm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the project's files, also where plain `pytest` is called
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C, and so do theirs

os.environ["WANDB__SERVICE_WAIT"] = "300"  # seconds: on busy cores its own process starts slowly
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported: there is a worker for every core already

# The same examples in every run of the same files. (Of other files others: Hypothesis also tries the constants of the
# modules that are imported.)
settings.register_profile(
    "deterministic",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("deterministic")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Before xdist's workers start, compile the kernels: they share the cache, and would all begin with compiling."""
    if getattr(session.config.option, "dist", "no") != "no" and not hasattr(session.config, "workerinput"):
        subprocess.run([sys.executable, str(ROOT / "tests" / "compile_kernels.py")], check=True)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["FakeSlurm"]:
    """A slurmrestd of its own for the test, which runs in an empty folder."""
    from fake_slurm import FakeSlurm

    monkeypatch.chdir(tmp_path)  # TensorBoard's files
    server = FakeSlurm(tmp_path / "restd.sock")
    yield server
    server.shutdown()
    server.server_close()
