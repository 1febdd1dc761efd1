"""The loop with the real trainer and the real comparison, through a kill: the policy is that of an undisturbed run."""

import json
import shlex
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from orchestration_helpers import SMALL, Running, Site, Temporal, alive, eventually

FLAGS = (
    "--num-envs 64 --num-steps 32 --num-minibatches 2 --num-jobs 128 --warmup-jobs 32 --followup-jobs 64 "
    "--validation-jobs 300 --num-evaluations 2 --reference easy-sjf"
)
SETTINGS = replace(SMALL, jobs=2_000, total_timesteps=40_960, training_flags=FLAGS)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_training_the_policy_is_the_same(temporal: Temporal, tmp_path: Path) -> None:
    folder = tmp_path / "disturbed"
    folder.mkdir()
    site = Site(folder, temporal, REAL_TRAINER="yes", STUB_SILENCE="5", OMP_NUM_THREADS="1")
    worker = site.worker()
    loop = Running(site, SETTINGS)
    run = eventually(lambda: next(iter(folder.glob(f"runs/{loop.id}__*/checkpoint.pt")), None), 200).parent
    step = lambda: json.loads((run / "progress.json").read_text())["step"]  # noqa: E731
    before = step()
    time.sleep(0.5)
    worker.kill()
    worker.wait()
    eventually(lambda: not alive(run.name), 10)
    assert before <= step() < SETTINGS.total_timesteps, "the training was over before it was killed"
    mine = folder / "runs" / "loop" / loop.id / "000001" / "1"
    workload, log = (mine / "workload.npz").read_bytes(), mine / "training.log"
    command = log.read_text().splitlines()[0].removeprefix("$ ")  # gone after the round
    site.worker()
    eventually(lambda: step() > before, 200)
    [found] = loop.result(400).loop.rounds
    assert found.status in ("promoted", "kept"), found.why
    assert not alive(run.name)
    assert (folder / "runs/store/rounds/000001/report/index.html").stat().st_size > 10_000
    loop.close()
    site.close()

    # The same command in another folder, with nobody that kills it.
    other = tmp_path / "undisturbed"
    copy = other / mine.relative_to(folder) / "workload.npz"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(workload)
    subprocess.run(shlex.split(command), cwd=other, env=site.environment, check=True, capture_output=True)
    policy = (folder / "runs/store/rounds/000001/policy.onnx").read_bytes()
    assert (other / "runs" / run.name / "policy.onnx").read_bytes() == policy
