"""Workers, the server and the store die and come back; what comes out is the same, byte for byte."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from orchestration_helpers import (
    ENVIRONMENT,
    S3,
    SMALL,
    STUB,
    Running,
    Site,
    Temporal,
    alive,
    environment,
    eventually,
)

from orchestration.store import Store

KILLS, AWAY_SECONDS = 10, 60.0
Outage = tuple[S3, Site, Running, float]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def without_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outage]:
    """A loop whose store goes away while it trains, and since when: the minute passes while the other tests run."""
    folder = tmp_path_factory.mktemp("without_store")
    temporal, s3 = Temporal(folder), S3()
    temporal.start()
    s3.start()
    site = Site(folder, temporal, **environment(s3))
    site.worker()
    loop = Running(site, replace(SMALL, store=s3.bucket("loop"), rounds=2, total_timesteps=1_000))
    loop.training()
    s3.pause()
    yield s3, site, loop, time.monotonic()
    loop.close()
    site.close()
    s3.stop()
    temporal.kill()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Temporal]:
    """A server that may be killed."""
    server = Temporal(tmp_path)
    server.start()
    yield server
    server.kill()


def policy(site: Site) -> bytes:
    return (site.folder / "runs/store/rounds/000001/policy.onnx").read_bytes()


def undisturbed(temporal: Temporal, folder: Path, **settings: object) -> bytes:
    """The policy of the first round where nothing happens."""
    folder.mkdir()
    site = Site(folder, temporal)
    site.worker()
    loop = Running(site, replace(SMALL, **settings))
    loop.result()
    loop.close()
    site.close()
    return policy(site)


def test_a_worker_killed_ten_times_in_a_training(own: Temporal, tmp_path: Path) -> None:
    """Lost each time: a checkpoint's interval of work at most, and the silence until a worker is taken for dead."""
    site = Site(tmp_path, own, STUB_SPEED="100", STUB_SILENCE="3")
    settings = {"total_timesteps": 2_000}
    worker = site.worker()
    loop = Running(site, replace(SMALL, **settings))
    run, rng = loop.training(), random.Random(1)
    for kill in range(1, KILLS + 1):
        pids = run / "pids"
        eventually(lambda: len(pids.read_text().splitlines()) == kill, 60)  # noqa: B023
        time.sleep(rng.uniform(0.2, 1.5))
        worker.kill()
        worker.wait()
        eventually(lambda: not alive(run.name), 5)  # nobody goes on without a worker
        at = json.loads((run / "progress.json").read_text())["step"]
        kept = json.loads((run / "checkpoint.pt").read_text())[0]
        assert at - kept <= 100, "more than a checkpoint's interval is lost"
        worker = site.worker()
    assert loop.result(120).loop.rounds[0].status == "promoted"
    starts = [int(line.split()[1]) for line in (run / "pids").read_text().splitlines()]
    assert len(starts) == KILLS + 1
    assert starts == sorted(starts)
    loop.close()
    site.close()
    assert policy(site) == undisturbed(own, tmp_path / "other", **settings)


def test_the_server_killed_and_started_again_on_its_file(own: Temporal, tmp_path: Path) -> None:
    site = Site(tmp_path, own, STUB_SPEED="100", STUB_SILENCE="5")
    settings = {"total_timesteps": 1_500}
    site.worker()
    loop = Running(site, replace(SMALL, **settings))
    run = loop.training()
    for _ in range(2):
        time.sleep(2)
        own.kill()
        time.sleep(1)
        own.start()
    assert loop.result(120).loop.rounds[0].status == "promoted"
    starts = [int(line.split()[1]) for line in (run / "pids").read_text().splitlines()]
    assert starts == sorted(starts)
    loop.close()
    site.close()
    assert policy(site) == undisturbed(own, tmp_path / "other", **settings)


def test_the_store_away_for_a_minute(without_store: Outage, monkeypatch: pytest.MonkeyPatch) -> None:
    s3, site, loop, since = without_store
    for name, value in environment(s3).items():
        monkeypatch.setenv(name, value)
    time.sleep(max(0.0, since + AWAY_SECONDS - time.monotonic()))
    assert [loop.status().loop.done, loop.status().state] == [0, "training"]  # trained, and not stored yet
    s3.go_on()
    status = loop.result(180)
    assert [found.status for found in status.loop.rounds] == ["promoted", "promoted"]
    store = Store(loop.status().loop.config.store)
    assert store.champion() == status.loop.champion
    assert store.get(status.loop.champion.policy)
    assert "secret-of-a-test" not in (site.folder / "worker.log").read_text()


def test_sigterm_of_one_that_a_shell_has_started_in_the_background(tmp_path: Path) -> None:
    """Ctrl-C is ignored then."""
    command = f"{sys.executable} {STUB} start --local --id background & echo $!; wait $!"
    shell = subprocess.Popen(
        ["sh", "-c", command], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "Temporal's page" in shell.stderr.readline()
    os.kill(int(shell.stdout.readline()), signal.SIGTERM)
    shell.communicate(timeout=60)
    assert shell.returncode == 130
    assert not alive("--id background")


def test_ctrl_c_of_everything_in_one_terminal(own: Temporal, tmp_path: Path) -> None:
    """At any moment, the server up, the first step done, in the training: nothing is left that runs."""
    for moment in ("runs", "runs/store", "runs/*/progress.json"):
        name = f"local-{moment.count('/')}"
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, str(STUB), "start", "--local", "--id", name, "--total-timesteps", "9999999"]
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        assert "Temporal's page" in process.stderr.readline()
        eventually(lambda: any(folder.glob(moment)))  # noqa: B023
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 130, said
        assert "Traceback" not in said
        assert not alive(str(folder))
        assert not alive(name)
