"""The loop with the real trainer and the real comparison, undisturbed and through kills: the same policy."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from orchestration_helpers import ROOT, SMALL, Running, Site, Temporal, alive, eventually

FLAGS = (
    "--num-envs 64 --num-steps 32 --num-minibatches 2 --num-jobs 128 --warmup-jobs 32 --followup-jobs 64 "
    "--validation-jobs 600 --num-evaluations 2"
)
SETTINGS = replace(SMALL, jobs=2_000, total_timesteps=40_960, training_flags=FLAGS)
pytestmark = pytest.mark.slow


class RealSite(Site):
    def worker(self, *flags: str) -> subprocess.Popen[bytes]:
        with (self.folder / "worker.log").open("ab") as log:
            command = [sys.executable, str(ROOT / "training_loop.py"), "worker", *flags]
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)
        self.workers.append(process)
        return process


def one_round(temporal: Temporal, folder: Path, kills: int) -> bytes:
    """Its best candidate."""
    folder.mkdir()
    site = RealSite(folder, temporal, OMP_NUM_THREADS="1")
    worker = site.worker()
    loop = Running(site, SETTINGS)
    run = eventually(lambda: next(iter(folder.glob(f"runs/{loop.id}__*/checkpoint.pt")), None), 200).parent
    for _ in range(kills):
        before = json.loads((run / "progress.json").read_text())["step"]
        time.sleep(0.5)
        worker.kill()
        worker.wait()
        eventually(lambda: not alive(run.name), 10)
        worker = site.worker()
        eventually(lambda then=before: json.loads((run / "progress.json").read_text())["step"] > then, 200)
    [found] = loop.result(400).loop.rounds
    assert found.status in ("promoted", "kept"), found.why
    assert not alive(run.name)
    loop.close()
    site.close()
    assert (folder / "runs/store/rounds/000001/report/index.html").stat().st_size > 10_000
    return (folder / "runs/store/rounds/000001/policy.onnx").read_bytes()


def test_killed_in_the_middle_of_a_training_the_policy_is_the_same(temporal: Temporal, tmp_path: Path) -> None:
    undisturbed = one_round(temporal, tmp_path / "undisturbed", kills=0)
    disturbed = one_round(temporal, tmp_path / "disturbed", kills=1)
    same = b"/000001/1/workload.npz"  # the path, with the loop's name, is in the file's metadata
    assert same in undisturbed
    name = undisturbed[: undisturbed.index(same)].rpartition(b"runs/loop/")[2]
    other = disturbed[: disturbed.index(same)].rpartition(b"runs/loop/")[2]
    assert len(name) == len(other)
    assert undisturbed.replace(name, other) == disturbed
