"""slurm_agent.py on a real Slurm of one machine (tests/slurm), as root where Debian's packages are there."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "slurm"))

import demo

from deployment.accounting import Export, export
from deployment.priorities import LIVE_LEVELS, Args
from workloads.load import load_workload

PROGRAMS = ("slurmctld", "slurmd", "slurmrestd", "munged")
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.defpath}:/usr/sbin:/sbin")]
REASON = "not root" if os.geteuid() else f"no {', '.join(MISSING)}; make slurm-packages"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=f"needs a real Slurm: {REASON}"),
]


def until(happened: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.1)


class Desk:
    """A user's commands on a running cluster."""

    def __init__(self, slurm: demo.Cluster) -> None:
        self.slurm, self.base = slurm, slurm.base
        self.environment = os.environ | {"SLURM_CONF": str(slurm.base / "slurm.conf")}

    def types(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True, cwd=self.base)
        return done.stdout

    def submits(self, name: str, processors: int, *options: str, seconds: int = 300, minutes: int = 5) -> int:
        command = ["sbatch", "--parsable", "-J", name, "-n", str(processors), "-t", str(minutes), "-o", "/dev/null"]
        return int(self.types(*command, *options, "--wrap", f"exec sleep {seconds}"))

    def jobs(self) -> dict[str, dict[str, object]]:
        """By name."""
        return {job["name"]: job for job in self.slurm.client.get("/jobs").json()["jobs"]}

    def order(self) -> list[str]:
        """The pending jobs that are not held, by falling priority."""
        pending = [job for job in self.jobs().values() if job["job_state"] == "PENDING" and job["priority"]]
        return [job["name"] for job in sorted(pending, key=lambda job: -job["priority"])]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with demo.cluster(tmp_path / "slurm") as slurm:
        yield Desk(slurm)


def test_orders_and_survives(desk: Desk) -> None:
    """Arrays and jobs with dependencies, held, for tomorrow; slurmctld and slurmrestd stopped; the agent killed."""
    running = desk.submits("running", 16)
    until(lambda: desk.jobs()["running"]["job_state"] == "RUNNING")
    desk.submits("large", 16)
    desk.submits("array", 4, "--array=0-5%2")
    desk.submits("small", 1)
    desk.submits("after", 1, f"--dependency=afterok:{running}")
    desk.submits("held", 1, "--hold")
    desk.submits("tomorrow", 1, "--begin=tomorrow")
    alone = {name: desk.jobs()[name]["priority"] for name in ("after", "held", "tomorrow")}
    with demo.agent(desk.base, "easy-saf"):
        until(lambda: desk.order()[:3] == ["small", "array", "large"])
        desk.submits("middle", 2)
        until(lambda: desk.order()[:4] == ["small", "middle", "array", "large"])
        assert {name: desk.jobs()[name]["priority"] for name in alone} == alone

        slurmctld = int((desk.base / "slurmctld.pid").read_text())
        os.kill(slurmctld, signal.SIGTERM)
        until(lambda: "next try" in (desk.base / "agent.log").read_text())
        desk.types("slurmctld")
        until(lambda: "answers again" in (desk.base / "agent.log").read_text())
        desk.submits("late", 1, "--comment=after the restart", minutes=2)
        until(lambda: desk.order()[:2] == ["late", "small"])

        restd = int((desk.base / "restd.pid").read_text())
        os.kill(restd, signal.SIGTERM)
        until(lambda: "/jobs: ConnectError" in (desk.base / "agent.log").read_text())
        demo.start_restd(desk.base)
        desk.types("scancel", "--name=late")
        desk.submits("later", 1, minutes=1)
        until(lambda: desk.order()[:2] == ["later", "small"])
    before = {name: desk.jobs()[name]["priority"] for name in desk.order()}
    with demo.agent(desk.base, "easy-saf"):
        desk.submits("tiny", 1, minutes=1)
        until(lambda: desk.order()[:3] == ["later", "tiny", "small"])
        after = {name: desk.jobs()[name]["priority"] for name in desk.order()}
    assert before.items() <= after.items()  # what was in order was not set again
    desk.types("scontrol", "hold", "name=tiny")
    desk.types("scontrol", "release", "name=tiny")
    until(lambda: 0 < desk.jobs()["tiny"]["priority"] < min(LIVE_LEVELS))  # Slurm's own again


def test_shadow_and_advise(desk: Desk) -> None:
    desk.submits("running", 16)
    until(lambda: desk.jobs()["running"]["job_state"] == "RUNNING")
    desk.submits("large", 16)
    desk.submits("small", 1)
    with demo.agent(desk.base, "easy-saf", mode="shadow"):
        until(lambda: "would change 2 of 2 priorities" in (desk.base / "agent.log").read_text())
    assert desk.order() == ["large", "small"]
    with demo.agent(desk.base, "easy-saf", mode="advise"):
        until(lambda: desk.order() == ["small", "large"])
    nice = {name: job["nice"] or 0 for name, job in desk.jobs().items()}
    assert nice["running"] == 0 <= nice["small"] < nice["large"] <= Args.max_nice


def test_export_of_what_ran(desk: Desk) -> None:
    """The job completion log and `squeue --json` of the same jobs, as Slurm writes them, are the same trace."""
    for k in range(8):
        desk.submits(f"app{k % 2}", 1 + k % 4, seconds=1 + k % 3, minutes=1 + k)
    desk.slurm.wait()
    until(lambda: len((desk.base / "jobcomp.log").read_text().splitlines()) == 8)
    (desk.base / "squeue.json").write_text(desk.types("squeue", "--json", "-t", "all"))
    traces = []
    for name in ("jobcomp.log", "squeue.json"):
        export(Export((desk.base / name,), desk.base / f"{name}.swf", processors=16))
        traces.append(load_workload(str(desk.base / f"{name}.swf"), "all").jobs)
    for field in ("job_id", "submit_time", "run_time", "requested_time", "demand", "wait_time", "user", "executable"):
        assert getattr(traces[0], field).tolist() == getattr(traces[1], field).tolist(), field
    assert sorted(traces[0].demand[:, 0]) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert np.all(traces[0].run_time - [1 + (k - 1) % 3 for k in traces[0].job_id] <= 1)


def test_the_gain_is_there(tmp_path: Path) -> None:
    """`make slurm-demo` with 60 jobs and a short training: the policy waits less, about as long as was predicted.

    Seconds of a real clock: on a quiet machine predictions are off by less than 15 %, on a busy one by more.
    """
    results = demo.demo(tmp_path / "demo", demo.Args(num_jobs=60, orders=("fifo", "live"), training_steps=50_000))
    assert results["live"]["mean"] <= 0.75 * results["fifo"]["mean"]
    for order, row in results.items():
        assert row["mean_predicted"] == pytest.approx(row["mean"], rel=0.5), (order, row)
