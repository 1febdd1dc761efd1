"""The same short jobs on a real Slurm, in Slurm's order and in a policy's, beside what the simulator predicts.

    make slurm-demo                                   # 200 jobs, trains the policy first; about 10 minutes
    python tests/slurm/demo.py --num-jobs 60 --policy easy-saf

Root on Debian with slurm-wlm, munge and slurmrestd (`make slurm-packages`). Jobs sleep; a pool of 16 processors on four
nodes. Slurm's time limits are whole minutes, so a job of about a second asks for one minute, and so on: all
overestimate about sixtyfold, in training too. The jobs measure their waits: Slurm's own times are whole seconds.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from deployment.slurm import pool  # noqa: E402
from policies import load_policy  # noqa: E402
from workloads.generated import generate_jobs  # noqa: E402
from workloads.jobs import Jobs, Workload  # noqa: E402
from workloads.swf import write_swf  # noqa: E402

PROCESSORS, SIZES, WEIGHTS = 16, [[1], [2], [4], [8]], [40, 30, 20, 10]
LOAD = 2.0  # more work arrives than the cluster can do, its overhead included, until the last job is submitted
BURST = 200  # jobs of a burst in the training trace
# Bursts end: a longer tail than is wise for a queue that never empties is allowed.
TRAINING = (
    "--objective wait --num-jobs 100 --warmup-jobs 50 --followup-jobs 50 --validation-loads 1.0 "
    "--max-tail 1.5 --max-longest 4.5 --reference easy-saf"
).split()


@dataclass
class Order:
    """A way to run the jobs: Slurm's scheduler plugin, whether the agent gives the order, and what predicts it."""

    title: str
    scheduler: str
    live: bool
    policy: str  # what gives the order and predicts it: a rule, plan, or "policy", which is --policy's


ORDERS = {
    "fifo": Order("Slurm, strict FIFO (sched/builtin)", "builtin", False, "fifo"),
    "backfill": Order("Slurm, FIFO with backfilling (sched/backfill)", "backfill", False, "easy-fifo"),
    "live": Order("slurm_agent.py --mode live (sched/backfill)", "backfill", True, "policy"),
    "plan": Order("slurm_agent.py --mode live --policy plan", "backfill", True, "plan"),
}


@dataclass
class Args:
    num_jobs: int = 200
    """jobs to submit, in each order the same"""
    orders: tuple[str, ...] = tuple(ORDERS)
    """of fifo, backfill, live, plan"""
    policy: str | None = None
    """the path of a policy.onnx or the name of a rule; by default one is trained first"""
    training_steps: int = 400_000
    """decisions to train for"""
    seed: int = 1
    """draws the jobs"""
    output: Path | None = None
    """where to write the figures as JSON"""


def burst(seed: int, num_jobs: int, overhead: float) -> Jobs:
    """Short jobs, 1 to 10 s and heavy-tailed, of one user with many executables; LOAD includes the overhead."""
    rng = np.random.default_rng(seed)
    jobs = generate_jobs(
        rng, num_jobs, pool(PROCESSORS), flavours=SIZES, weights=WEIGHTS, run_time=(2.5, 1.0, 9.0), arrivals="poisson"
    )
    # Any fraction of a second: whole ones would beat with Slurm's scheduling, which goes once a second.
    run_time = jobs.run_time + rng.uniform(0, 1, num_jobs).round(2)
    span = ((run_time + overhead) * jobs.demand[:, 0]).sum() / PROCESSORS / LOAD
    submit_time = jobs.submit_time - jobs.submit_time[0]
    return replace(
        jobs, submit_time=submit_time * span / submit_time[-1], run_time=run_time,
        requested_time=60 * jobs.requested_time, user=np.zeros(num_jobs, np.int32), group=np.zeros(num_jobs, np.int32),
    )  # fmt: skip


def training_trace(path: Path, overhead: float, bursts: int = 60) -> None:
    """A day of such bursts, with pauses in which the queue empties; run times with the overhead."""
    parts, begin = [], 0.0
    for seed in range(bursts):
        jobs = burst(1_000 + seed, BURST, overhead)
        parts.append(replace(jobs, submit_time=(jobs.submit_time + begin).round(2), run_time=jobs.run_time + overhead))
        begin += jobs.submit_time[-1] * LOAD + 60
    jobs = Jobs.concatenate(parts)
    write_swf(path, replace(jobs, job_id=np.arange(1, len(jobs) + 1)), pool(PROCESSORS))


# ----------------------------------------------------------------------------------------------------- the cluster
class Cluster:
    """A running Slurm. `started` holds a file for each job, with the instant at which it began."""

    def __init__(self, base: Path) -> None:
        self.base, self.started = base, base / "started"
        self.started.mkdir()
        transport = httpx.HTTPTransport(uds=str(base / "restd.sock"))
        self.client = httpx.Client(transport=transport, base_url="http://slurm/slurm/v0.0.38", timeout=30.0)

    def submit(self, run_time: float, processors: int, minutes: int = 1, name: str = "job") -> int:
        script = f"#!/bin/bash\ndate +%s.%N > {self.started}/$SLURM_JOB_ID\nexec sleep {run_time:.2f}\n"
        job = {
            "name": name, "tasks": processors, "time_limit": minutes, "current_working_directory": str(self.base),
            "standard_output": "/dev/null", "standard_error": "/dev/null", "environment": {"PATH": os.defpath},
        }  # fmt: skip
        return self.client.post("/job/submit", json={"script": script, "job": job}).json()["job_id"]

    def wait(self) -> None:
        """Until all jobs have ended."""
        while any(job["job_state"] in ("PENDING", "RUNNING") for job in self.client.get("/jobs").json()["jobs"]):
            time.sleep(0.5)

    def start_times(self, job_ids: Sequence[int]) -> np.ndarray:
        return np.array([float((self.started / str(job_id)).read_text()) for job_id in job_ids])


def start_restd(base: Path) -> None:
    subprocess.run([HERE / "restd.sh", base], check=True)


@contextmanager
def cluster(base: Path, scheduler: str = "backfill") -> Iterator[Cluster]:
    base.mkdir(parents=True)
    try:
        subprocess.run([HERE / "up.sh", base, scheduler], check=True, stdout=subprocess.DEVNULL)
        yield Cluster(base)
    finally:
        subprocess.run([HERE / "down.sh", base], check=True)


@contextmanager
def agent(base: Path, policy: str, mode: str = "live") -> Iterator[None]:
    """slurm_agent.py at work on the cluster in `base`; its log is base/agent.log."""
    command = [sys.executable, ROOT / "slurm_agent.py", "--policy", policy, "--mode", mode]
    with open(base / "agent.log", "w") as log:
        process = subprocess.Popen(
            [*command, "--socket", base / "restd.sock"],
            cwd=base,
            stderr=log,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        try:
            while "mode " not in (base / "agent.log").read_text():
                if process.poll() is not None:
                    raise RuntimeError((base / "agent.log").read_text())
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait(60)


def measured_latency(slurm: Cluster) -> float:
    """Seconds from a job's submission to an idle cluster to its start, at all fractions of a second alike.

    Slurm schedules once a second.
    """
    latencies = []
    for fraction in np.arange(8) / 8:
        time.sleep(1.5 + fraction - time.time() % 1)
        submitted = time.time()
        job_id = slurm.submit(0.1, 1)
        slurm.wait()
        latencies.append(slurm.start_times([job_id])[0] - submitted)
    return float(np.mean(latencies))


def measured_overhead(slurm: Cluster) -> float:
    """Seconds from the end of a job to the start of the next, which waits for its processors: jobs that need all.

    They last all fractions of a second alike.
    """
    run_times = np.random.default_rng(0).permutation(np.linspace(0.2, 1.2, 12, endpoint=False).round(2))
    job_ids = [slurm.submit(run_time, PROCESSORS) for run_time in [*run_times, 0.2]]
    slurm.wait()
    return float((np.diff(slurm.start_times(job_ids)) - run_times).mean())


def run(base: Path, order: Order, jobs: Jobs, policy: str) -> tuple[np.ndarray, float]:
    """float64[N]: the waits of the jobs on a real Slurm; and the overhead of a job, as it was before and after."""
    with cluster(base, order.scheduler) as slurm, agent(base, policy) if order.live else nullcontext():
        before = measured_overhead(slurm)
        job_ids, submitted, begin = [], [], time.time()
        for k in range(len(jobs)):
            time.sleep(max(0.0, begin + jobs.submit_time[k] - time.time()))
            submitted.append(time.time())
            minutes, name = int(jobs.requested_time[k] // 60), f"app{jobs.executable[k]}"
            job_ids.append(slurm.submit(jobs.run_time[k], int(jobs.demand[k, 0]), minutes, name))
        slurm.wait()
        waits = slurm.start_times(job_ids) - np.array(submitted)
        return waits, (before + measured_overhead(slurm)) / 2


def predicted(jobs: Jobs, policy: str, latency: float, overhead: float) -> np.ndarray:
    """float64[N]: the waits in the simulator, where Slurm hears of a job later and each job runs for longer."""
    slowed = replace(jobs, submit_time=jobs.submit_time + latency, run_time=jobs.run_time + overhead)
    workload = Workload("demo", pool(PROCESSORS), slowed, np.array([[0, len(jobs)]]), {})
    return load_policy(policy).schedule(workload)[0].start_time - jobs.submit_time


def train(folder: Path, overhead: float, steps: int) -> str:
    """The path of a policy.onnx that is trained on bursts of other jobs of the kind."""
    training_trace(folder / "bursts.swf.gz", overhead)
    command = ["nice", "-n", "20", sys.executable, ROOT / "ppo_scheduler.py", "--workload", "bursts.swf.gz", *TRAINING]
    command += ["--total-timesteps", str(steps)]
    subprocess.run(command, cwd=folder, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    [path] = folder.glob("runs/*/policy.onnx")
    return str(path)


def demo(folder: Path, args: Args) -> dict[str, dict[str, float]]:
    """For each order: mean and p95 of the waits, measured and predicted. All files are under `folder`."""
    folder.mkdir(parents=True)
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)  # Slurm's own time should not depend on what else the machine does
    with cluster(folder / "calibration") as slurm:
        latency, overhead = measured_latency(slurm), measured_overhead(slurm)
    print(f"Measured: a job starts after {latency:.2f} s, and costs {overhead:.2f} s beyond its own time.", flush=True)
    policy = args.policy or train(folder, overhead, args.training_steps)
    jobs = burst(args.seed, args.num_jobs, overhead)
    results = {}
    for name in args.orders:
        print(f"{args.num_jobs} jobs over {jobs.submit_time[-1]:.0f} s: {ORDERS[name].title}", flush=True)
        chooser = policy if ORDERS[name].policy == "policy" else ORDERS[name].policy
        real, overhead = run(folder / name, ORDERS[name], jobs, chooser)
        simulated = predicted(jobs, chooser, latency, overhead)
        results[name] = {
            "mean": real.mean(), "mean_predicted": simulated.mean(),
            "overhead": overhead, "p95": np.percentile(real, 95), "p95_predicted": np.percentile(simulated, 95),
        }  # fmt: skip
    return {name: {key: round(float(value), 2) for key, value in row.items()} for name, row in results.items()}


def table(results: dict[str, dict[str, float]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, caption="waits in seconds")
    for heading in ("order", "overhead", "mean", "simulator", "", "p95", "simulator", "mean to the first"):
        shown.add_column(heading, justify="left" if heading == "order" else "right")
    first = next(iter(results.values()))["mean"]
    for name, row in results.items():
        shown.add_row(
            ORDERS[name].title, f"{row['overhead']:.2f}", f"{row['mean']:.1f}", f"{row['mean_predicted']:.1f}",
            f"({row['mean_predicted'] / row['mean'] - 1:+.0%})", f"{row['p95']:.1f}", f"{row['p95_predicted']:.1f}",
            f"{row['mean'] / first - 1:+.0%}",
        )  # fmt: skip
    return shown


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    results = demo(ROOT / "runs" / f"slurm_demo__{int(time.time())}", args)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    Console(width=150).print(table(results))


if __name__ == "__main__":
    main()
