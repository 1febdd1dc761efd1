"""The steps of a round, one by one, without a server: done twice they leave what they leave done once."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from load import state_at
from places import SMALL as TRACE
from policy_files import write_policy
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from deployment.service import Args, Service
from orchestration import activities, config
from orchestration.activities import (
    begin_round,
    collect_records,
    generate_cluster,
    generate_jobs,
    promote,
    run_evaluation,
    run_policy,
)
from orchestration.config import (
    Begin,
    Candidate,
    Champion,
    Data,
    EvaluateRequest,
    JobsRequest,
    PolicyRequest,
    Promotion,
    Reference,
    Step,
    TrainingConfig,
)
from orchestration.store import Store
from simulator.replay import simulate
from workloads.load import load_workload

RunActivity = Callable[[Callable[..., Any], Any], Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunActivity:
    """Runs an activity in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda activity, asked: ActivityEnvironment().run(activity, asked)


def step(number: int = 1, **settings: Any) -> Step:
    return Step(TrainingConfig(**{"jobs": 300} | settings), number, f"rounds/{number:06d}")


def submitted(data: Data) -> np.ndarray:
    path = Path("fetched.npz")
    Store("runs/store").fetch(data.workload, path)
    return load_workload(str(path), "all").jobs.submit_time


@pytest.mark.parametrize("workload", ["generated", "hpc"])
def test_generated_jobs_are_others_in_every_round_and_the_same_when_made_again(run: RunActivity, workload: str) -> None:
    def jobs(number: int) -> np.ndarray:
        asked = step(number, workload=workload)
        return submitted(run(generate_jobs, JobsRequest(asked, run(generate_cluster, asked))))

    first, again, second = jobs(1), jobs(1), jobs(2)
    assert len(first) == 300
    assert (first == again).all()
    assert (first != second).any()


def test_the_cluster_is_the_same_in_all_rounds(run: RunActivity) -> None:
    first, second = (run(generate_cluster, step(number, workload="generated")) for number in (1, 2))
    assert first.sha256 == second.sha256
    assert first.uri != second.uri


def test_a_trace_is_collected_whole(run: RunActivity, tmp_path: Path) -> None:
    (tmp_path / "my_cluster.swf.gz").write_bytes(gzip.compress(TRACE.read_bytes()))
    data = run(collect_records, step(workload="my_cluster.swf.gz"))
    expected = load_workload("my_cluster.swf.gz", "all").jobs
    assert (data.jobs, data.recorded) == (len(expected), False)
    assert (submitted(data) == expected.submit_time).all()


def test_a_trace_that_cannot_be_read_is_the_users_to_mend(run: RunActivity, tmp_path: Path) -> None:
    (tmp_path / "bad.swf").write_text("nothing of the kind\n")
    with pytest.raises(ApplicationError) as caught:
        run(collect_records, step(workload="bad.swf"))
    assert (caught.value.type, caught.value.non_retryable) == (config.USER_ERROR, True)
    assert caught.value.message.startswith("bad.swf: ")


def test_a_table_is_collected_as_it_is_to_be_read(run: RunActivity, tmp_path: Path) -> None:
    rows = "".join(f"{k},{k + 9},{1 + k % 2}\n" for k in range(40))
    (tmp_path / "jobs.csv").write_text(f"made,gone,cores\n{rows}")
    flags = "--columns submit=made end=gone demand.cpu=cores --nodes 2xcpu=4"
    data = run(collect_records, step(workload="jobs.csv", reading_flags=flags))
    assert data.jobs == 40 and submitted(data).tolist() == list(range(40))
    with pytest.raises(ApplicationError, match="reading_flags '--column x': give --columns, --nodes, --partition or"):
        run(collect_records, step(workload="jobs.csv", reading_flags="--column x"))


def test_a_full_disk_is_tried_again_later(run: RunActivity, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "put", full)
    with pytest.raises(ApplicationError) as caught:
        run(generate_cluster, step())
    assert not caught.value.non_retryable
    assert caught.value.next_retry_delay.total_seconds() >= 2


def test_a_champion_is_deployed_again_where_its_file_is_gone(run: RunActivity) -> None:
    store = Store("runs/store")
    store.keep(1, b"policy of 1")
    settings = TrainingConfig(deploy_to="var/policy.onnx")
    champion = run(promote, Promotion(settings, 1, "better", 0))
    assert Path("var/policy.onnx").read_bytes() == b"policy of 1"
    Path("var/policy.onnx").unlink()
    assert run(begin_round, Begin(settings, "loop", 1)).champion == champion
    assert Path("var/policy.onnx").read_bytes() == b"policy of 1"


def test_inference_by_the_champion_or_easy_fifo(run: RunActivity) -> None:
    asked = step(0, workload="cloud", jobs=200)
    data = run(generate_jobs, JobsRequest(asked, run(generate_cluster, asked)))
    found = run(run_policy, PolicyRequest(asked, data, None, 5))
    assert (found.policy, found.jobs, len(found.placements)) == ("easy-fifo", 200, 5)
    assert found.wait == found.easy_fifo_wait
    Store("runs/store").keep(3, write_policy(Path("p/policy.onnx"), nodes=8, resources=2).read_bytes())
    Store("runs/store").promote(3, "")
    found = run(run_policy, PolicyRequest(asked, data, None, 5))
    assert found.policy == "the champion, round 3"
    assert all(job.started >= job.submitted for job in found.placements)


def recorded(path: Path) -> None:
    """What the service would have recorded of 400 jobs under EASY-FIFO."""
    [schedule] = simulate(load_workload("cloud", "test", runs=1, run_jobs=400), "easy-fifo")
    service = Service(Args("easy-fifo", record=path))
    for now in np.unique([schedule.jobs.submit_time, schedule.start_time + schedule.service_time]):
        service.decide(json.dumps(state_at(schedule, now)).encode())


@pytest.mark.slow
def test_an_evaluation_on_a_record_with_the_real_comparison(run: RunActivity, tmp_path: Path) -> None:
    recorded(tmp_path / "decisions.jsonl")
    asked = step(2, workload="decisions.jsonl", objective="wait")
    data = run(collect_records, asked)
    assert data.recorded and data.jobs > 350
    store = Store("runs/store")
    files = [
        write_policy(Path(f"{rule}/policy.onnx"), nodes=8, resources=2, reference=rule).read_bytes()
        for rule in ("easy-fifo", "easy-saf", "easy-ljf")
    ]
    champion = Champion(1, store.keep(1, files[0]), 0.0, "")
    nothing = Reference("", "", 0)
    candidates = [Candidate(n, n, store.put(f"c{n}/policy.onnx", files[n]), nothing) for n in (1, 2)]
    found = run(run_evaluation, EvaluateRequest(asked, data, candidates, champion))
    assert found.candidate == 1  # smallest area first is better than longest job first
    assert found.gains["champion"] == found.gains["easy-fifo"]  # the champion does what EASY-FIFO does
    assert found.standing["easy-fifo"].mean == pytest.approx(0, abs=1e-9)
    assert found.drift.jobs == data.jobs
    assert found.drift.difference.mean == pytest.approx(0, abs=5)  # it was recorded under that rule
    assert not found.drift.beyond
    names = store.names("rounds/000002/")
    assert "rounds/000002/report/index.html" in names
    assert not [name for name in names if "replays" in name]
    again = run(run_evaluation, EvaluateRequest(asked, data, candidates, champion))
    assert replace(again, results=found.results) == found


def test_checkpoints_are_asked_for_often_enough() -> None:
    assert activities.CHECKPOINT_SECONDS <= 30
