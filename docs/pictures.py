"""Draws gantt.png, environment.png and, where there is a Chromium, report.png into docs: `make docs`.

    python docs/pictures.py                                      # rules only
    python docs/pictures.py fifo easy-fifo easy-sjf runs/<run>   # what the report compares

The report is that of the hpc preset.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project's files, whatever folder this is called from

import report
from policies import load_policy
from scheduler_env import SchedulerVectorEnv
from workloads import load_workload

FIRST, JOBS = 1_000, 40  # forty jobs of the hpc preset that queue up
TITLES = {"fifo": "FIFO", "easy-sjf": "EASY-SJF (shortest first, with backfilling)"}
POLICIES = ("fifo", "easy-fifo", "easy-sjf", "easy-saf", "easy-wfp3")


def gantt(path: Path) -> None:
    """The same jobs on the same machine under FIFO and under a better order."""
    workload, segment = load_workload("hpc", "test", runs=1), np.array([[FIRST, FIRST + JOBS]])
    episode = {name: load_policy(name).schedule(workload, segment)[0] for name in TITLES}
    with matplotlib.rc_context(report.STYLE | {"savefig.dpi": 220}):
        report.gantt(episode, TITLES).figure.savefig(path, facecolor="white")


def environment(path: Path) -> None:
    """What the environment renders, five hundred decisions into an episode of the cloud preset."""
    envs = SchedulerVectorEnv(1, "cloud", render_mode="rgb_array")
    envs.reset(seed=1)
    for _ in range(500):
        envs.step(envs.rule_actions())
    Image.fromarray(envs.render()[0]).save(path)


def screenshot(path: Path, chromium: str, policies: list[str]) -> None:
    """The top of a report."""
    with TemporaryDirectory() as folder:
        benchmark = [sys.executable, Path(__file__).parents[1] / "benchmark.py", "compare", "--workload", "hpc"]
        subprocess.run([*benchmark, "--policies", *policies, "--report", folder], check=True)
        page = (Path(folder) / "index.html").as_uri()
        flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1200,1250"]
        subprocess.run([chromium, *flags, f"--screenshot={path}", page], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    folder = Path(__file__).parent
    gantt(folder / "gantt.png")
    environment(folder / "environment.png")
    if chromium := shutil.which("chromium"):
        screenshot(folder / "report.png", chromium, sys.argv[1:] or list(POLICIES))
    for path in (folder / f"{name}.png" for name in ("gantt", "environment", "report")):
        Image.open(path).quantize(256).save(path, optimize=True)
        print(path)
