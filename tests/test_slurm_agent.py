"""slurm_agent.py as a process, its flags, and what it refuses."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm, until
from places import ROOT

import slurm_agent as sa
from deployment.priorities import (
    Agent,
    Args,
)


def start_agent(slurm: FakeSlurm, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "slurm_agent.py"), "--policy", "easy-saf", "--mode", "live", *flags]
    return subprocess.Popen([*command, "--socket", str(slurm.server_address)], stderr=subprocess.PIPE)


def test_killed_and_started_again(slurm: FakeSlurm) -> None:
    """The order stays; the next agent goes on from it, and sends nothing that is set already."""
    slurm.add(1, 2, 3, cpus=16)
    process = start_agent(slurm)
    until(lambda: len(slurm.updates) == 3, 60)
    process.kill()
    process.wait()
    order = slurm.by_priority()
    slurm.add(4, cpus=1)
    process = start_agent(slurm)
    until(lambda: len(slurm.updates) == 4, 60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert slurm.updates[3][0] == 4 and slurm.by_priority() == [4, *order]


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "slurm_agent.py"), "--policy", "nonsense"], cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("slurm_agent.py: unknown rule 'nonsense'")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--metrics-port", "99999"), ("--metrics-port", "-1"), ("--max-nice", "-5"), ("--max-nice", "0"),
        ("--hindsight", "-1"), ("--hindsight", "nan"),
        ("--interval", "0"), ("--interval", "nan"), ("--interval", "inf"), ("--max-wait", "nan"), ("--max-wait", "-1"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_work_are_refused(
    flag: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["slurm_agent.py", flag, value])
    monkeypatch.setattr(Agent, "run", lambda *_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="2"):
        sa.main()
    said = capsys.readouterr().err
    assert said.startswith(f"slurm_agent.py: {flag} {value}") and ": give " in said and said.count("\n") == 1


def test_the_documented_flags_have_the_documented_defaults() -> None:
    section = (ROOT / "docs" / "deploy.md").read_text().partition("## Slurm")[2]
    rows = re.findall(r"^\| `--([\w-]+)` \| `(.*?)` \|", section, re.MULTILINE)
    assert len(rows) >= 7
    for flag, default in rows:
        assert default == str(getattr(Args, flag.replace("-", "_"))), flag
