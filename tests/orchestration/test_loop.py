"""The loop on a real Temporal server: rounds, failures, signals, updates, two workers. Trainings are stubs here."""

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from orchestration_helpers import SMALL, Running, Site, alive, eventually

from orchestration.config import Settings, TrainingConfig
from orchestration.store import Store


@pytest.fixture
def start(site: Site) -> Iterator[Any]:
    """Starts a loop of SMALL with other settings, on a worker that is there already."""
    site.worker("--trainings", "2")
    loops: list[Running] = []

    def begin(**settings: Any) -> Running:
        loops.append(Running(site, replace(SMALL, **settings)))
        return loops[-1]

    yield begin
    for loop in loops:
        loop.close()


def store(site: Site) -> Store:
    return Store(str(site.folder / "runs" / "store"))


def test_three_rounds_end_with_a_champion_and_everything_in_its_place(start: Any, site: Site) -> None:
    deployed = site.folder / "var" / "policy.onnx"
    loop = start(rounds=3, candidates=2, deploy_to=str(deployed))
    status = loop.result()
    assert [(found.number, found.status) for found in status.loop.rounds] == [
        (1, "promoted"), (2, "promoted"), (3, "promoted"),
    ]  # fmt: skip
    assert status.loop.champion.round == 3
    assert deployed.read_bytes() == (site.folder / "runs/store/rounds/000003/policy.onnx").read_bytes()
    names = {name.removeprefix("rounds/000002/") for name in store(site).names("rounds/000002/")}
    assert names == {
        "claim.json", "cluster.npz", "workload.npz", "policy.onnx", "policy.json", "args.json", "results.json",
        "report/index.html", "candidates/1/policy.onnx", "candidates/1/args.json", "candidates/1/weights.pt",
        "candidates/2/policy.onnx", "candidates/2/args.json", "candidates/2/weights.pt",
    }  # fmt: skip
    gains = status.loop.rounds[1].evaluation.gains
    assert gains["champion"].mean == pytest.approx(-10)
    assert gains["easy-fifo"].mean == pytest.approx(100 * (0.9 * 0.9 - 1))
    page = (site.folder / "runs/store/report/index.html").read_text()
    assert "In use: round 3" in page
    assert page.count(">promoted<") == 3
    assert not alive(loop.id)


@pytest.mark.slow
def test_candidates_train_side_by_side(start: Any, site: Site) -> None:
    loop = start(candidates=2, total_timesteps=10_000_000)
    eventually(lambda: len(list(site.folder.glob(f"runs/{loop.id}__000001__*/progress.json"))) == 2)
    seeds = {
        json.loads((run / "args.json").read_text())["seed"] for run in site.folder.glob(f"runs/{loop.id}__000001__*")
    }
    assert seeds == {1002, 1003}  # of the loop 1, the round and the candidate
    loop.tell("stop_now")
    assert loop.result().loop.rounds[0].status == "stopped"


@pytest.mark.slow
def test_without_a_surely_better_candidate_the_champion_stays(site: Site, start: Any) -> None:
    assert start().result().loop.champion.round == 1
    site.close()
    site.environment["STUB_GAIN"] = "-3"
    site.worker()
    status = start().result()
    assert (status.loop.rounds[0].number, status.loop.rounds[0].status) == (2, "kept")
    assert status.loop.rounds[0].why == "not surely better: +3.0 % to champion (+3.0 … +3.0)"
    assert status.loop.champion.round == 1
    assert store(site).champion().round == 1


def test_a_users_mistake_ends_the_round_with_its_line_and_the_loop_goes_on(start: Any, site: Site) -> None:
    loop = start(rounds=2, workload="nowhere.swf")
    rounds = loop.result().loop.rounds
    assert [found.status for found in rounds] == ["failed", "failed"]
    assert rounds[0].why.startswith("nowhere.swf: no such file or preset; the presets are cloud")
    assert "Traceback" not in (site.folder / "worker.log").read_text()


def test_exit_code_2_is_not_tried_again(start: Any) -> None:
    began = time.monotonic()
    [found] = start(training_flags="--fail 2").result().loop.rounds
    assert (found.status, found.why) == ("failed", "my_cluster.swf: line 7: not a number; mend it")
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_another_exit_code_is_tried_again(start: Any, site: Site) -> None:
    loop = start(training_flags="--fail 3")
    log = site.folder / f"runs/loop/{loop.id}/000001/1/training.log"
    eventually(lambda: log.exists() and log.read_text().count("$ ") >= 2)
    assert loop.status().state == "training"


@pytest.mark.slow
def test_stop_ends_after_the_round(start: Any) -> None:
    loop = start(rounds=0, total_timesteps=3_000)
    loop.training()
    loop.tell("stop")
    status = loop.result()
    assert (status.state, [found.status for found in status.loop.rounds]) == ("stopped", ["promoted"])


def test_stop_now_ends_within_ten_seconds_with_a_checkpoint(start: Any) -> None:
    loop = start(rounds=0, total_timesteps=10_000_000)
    run = loop.training()
    began = time.monotonic()
    loop.tell("stop_now")
    status = loop.result()
    assert time.monotonic() - began < 10
    assert [found.status for found in status.loop.rounds] == ["stopped"]
    step = json.loads((run / "progress.json").read_text())["step"]
    assert json.loads((run / "checkpoint.pt").read_text())[0] == step  # saved at the end, as by Ctrl-C
    assert not alive(run.name)


@pytest.mark.slow
def test_a_cancelled_workflow_ends_like_that_too(start: Any) -> None:
    loop = start(rounds=0, total_timesteps=10_000_000)
    run = loop.training()
    loop.do(loop.handle.cancel())
    assert [found.status for found in loop.result().loop.rounds] == ["stopped"]
    assert not alive(run.name)


@pytest.mark.slow
def test_a_pause_a_wait_and_retrain_now(start: Any) -> None:
    loop = start(rounds=3, interval=3_600.0)
    loop.until("waiting")  # for the second round
    loop.tell("pause")
    loop.until("paused")
    loop.tell("retrain_now")
    assert loop.status().state == "paused"
    loop.tell("resume")
    eventually(lambda: loop.status().loop.done == 2)
    loop.until("waiting")
    loop.update("configure", Settings({"interval": "0"}), answer=TrainingConfig)
    assert loop.result().loop.done == 3


@pytest.mark.slow
def test_the_commands_say_what_they_do(start: Any, site: Site) -> None:
    loop = start(rounds=0, total_timesteps=10_000_000)
    loop.training()
    named = ("--id", loop.id)
    eventually(lambda: "% of 10,000,000, best -10.0%" in site.run("status", *named), 120)
    assert "candidates=3" in site.run("configure", "candidates=3", *named)
    refused = site.run("configure", "candidates=0", *named, code=2)
    assert refused == "training_loop.py: candidates 0: give 1 or more\n"
    assert "ends" in site.run("stop", "--now", *named)
    assert "ppo_scheduler.py --resume runs/" in site.run("status", *named)
    gone = site.run("rollback", *named, code=2)
    assert (
        gone
        == f"training_loop.py: {loop.id}: no such loop, or it has ended; start it with python training_loop.py start\n"
    )


@pytest.mark.slow
def test_a_worker_that_is_told_to_end_saves_and_the_next_one_goes_on(start: Any, site: Site) -> None:
    loop = start(total_timesteps=4_000)
    run = loop.training()
    [worker] = site.workers
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) in (0, 130)
    assert not alive(run.name)
    assert "Traceback" not in (site.folder / "worker.log").read_text()
    site.worker()
    assert loop.result().loop.rounds[0].status == "promoted"
    (_, first), *more = (line.split() for line in (run / "pids").read_text().splitlines())
    assert first == "0"
    assert [int(step) > 0 for _, step in more] == [True]  # resumed, once


def test_without_a_loop_the_champion_is_changed_in_the_store(site: Site) -> None:
    deployed, kept = site.folder / "policy.onnx", store(site)
    for number in (1, 2):
        kept.keep(number, f"policy of {number}".encode())
        kept.promote(number, "")
    flags = ("--store", "runs/store", "--deploy-to", "policy.onnx")
    assert "round 1 is the champion again" in site.run("rollback", *flags)
    assert deployed.read_bytes() == b"policy of 1"
    assert "round 2 is the champion" in site.run("promote", "2", *flags)
    assert deployed.read_bytes() == b"policy of 2"
    assert "round 3: no policy" in site.run("promote", "3", *flags, code=2)


def test_where_no_temporal_is_the_line_says_what_to_do(site: Site) -> None:
    said = site.run("status", "--address", "127.0.0.1:1", code=2)
    assert said.startswith("training_loop.py: 127.0.0.1:1: no Temporal answers (")
    assert said.endswith("start python training_loop.py server, or give --address\n")


@pytest.mark.slow
def test_candidates_start_from_the_champions_weights(start: Any, site: Site) -> None:
    loop = start(rounds=2, start_from="champion")
    loop.result()
    runs = sorted(site.folder.glob(f"runs/{loop.id}__*"))
    first, second = (json.loads((run / "args.json").read_text())["weights"] for run in runs)
    assert first is None
    assert second == f"runs/loop/{loop.id}/000002/1/weights.pt"
    log = site.folder / "runs" / "store" / "rounds" / "000001" / "candidates" / "1" / "weights.pt"
    assert store(site).champion().weights.sha256
    assert log.read_bytes() == (runs[0] / "weights.pt").read_bytes()
