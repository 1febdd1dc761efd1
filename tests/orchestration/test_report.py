"""What is shown of a loop: its page, and W&B (offline)."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from orchestration_helpers import ENVIRONMENT

from orchestration.config import Champion, Drift, Evaluation, Figure, Reference, Report, Round, TrainingConfig
from orchestration.report import write_page
from orchestration.store import Store

GAIN = Figure(-10.0, -12.0, -8.0)
DRIFT = Drift(500, 200.0, 100.0, Figure(100.0, 90.0, 110.0), beyond=True)
EVALUATION = Evaluation(
    1, True, "-10.0 % to easy-fifo", "easy-sjf", {"easy-fifo": GAIN, "best rule": GAIN}, {}, 1.0, Reference("", "", 0)
)
PROMOTED = Round(1, 1.0, 2.0, "promoted", "-10.0 % to easy-fifo", 1_000, 1, EVALUATION, {"training": 3.0}, ["runs/a"])
FAILED = Round(2, 3.0, 4.0, "failed", "<b>.swf: line 7: not a number")
CHAMPION = Champion(1, Reference("", "", 0), 0.0, "better")


def page(folder: Path, *rounds: Round, champion: Champion | None = CHAMPION) -> str:
    write_page(Report(TrainingConfig(), rounds[-1], champion, list(rounds), 1), "my-loop", folder)
    return (folder / "index.html").read_text()


def test_the_page_has_every_round_the_last_one_first(tmp_path: Path) -> None:
    text = page(tmp_path, PROMOTED, FAILED)
    assert "In use: round 1, since 1970-01-01 00:00 UTC. better" in text
    assert text.index("&lt;b&gt;.swf: line 7: not a number") < text.index(">promoted<")
    assert "-12.0 … -8.0" in text
    assert "The policy in use after each round against EASY-FIFO" in text
    assert "Warning" not in text


def test_drift_of_the_last_round_is_a_warning(tmp_path: Path) -> None:
    drifted = replace(PROMOTED, evaluation=replace(EVALUATION, drift=DRIFT))
    text = page(tmp_path, drifted)
    assert "500 jobs recorded under the champion waited 200 s on average, where the simulator says 100 s" in text


def test_before_the_first_champion_the_page_says_so(tmp_path: Path) -> None:
    text = page(tmp_path, FAILED, champion=None)
    assert "No champion yet." in text
    assert "<svg" not in text


TRACK = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
from orchestration.config import TrainingConfig
from orchestration.report import Report, track
from orchestration.store import Store
from test_report import CHAMPION, PROMOTED
store = Store("runs/store")
store.keep(1, b"a policy")
track(Report(TrainingConfig(track=True), PROMOTED, CHAMPION, [PROMOTED], 0), "my-loop", Path("runs"))
"""


@pytest.mark.slow
def test_a_round_goes_to_wandb_with_its_policy(tmp_path: Path) -> None:
    path = f"{ENVIRONMENT['PYTHONPATH']}{os.pathsep}{Path(__file__).parent}"
    done = subprocess.run(
        [sys.executable, "-c", TRACK, __file__], cwd=tmp_path,
        env=ENVIRONMENT | {"WANDB_MODE": "offline", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [record] = tmp_path.glob("runs/wandb/offline-run-*-my-loop/*.wandb")
    data = record.read_bytes()
    for found in (b"candidate/to_easy_fifo", b"my-loop-policy", b"champion", b"policy.onnx"):
        assert found in data, found
    assert Store(str(tmp_path / "runs" / "store")).names("")
