"""What README.md and docs/*.md say works: commands are run (with settings that take seconds), snippets executed.

A small trace stands in for the ones that the README names; `make`, which would build an environment, is only asked what
it would do.
"""

import gzip
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from load import state_at

from deployment.service import Args as ServeArgs
from deployment.service import Service
from docs.lines import with_lines
from evaluation.held_out import Compare
from ppo_scheduler import Args
from simulator.replay import simulate
from workloads.load import load_workload

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
SHARED = ROOT.parent / "shared"
TINY = (
    "--total-timesteps 256 --num-envs 8 --num-steps 32 --num-jobs 64 --warmup-jobs 16 --followup-jobs 32 "
    "--num-evaluations 1 --validation-jobs 600 --tune-generations 1"
)
SMALL = "--workload my_cluster.swf.gz"
# How a line begins -> what is appended to make it short. A line that begins otherwise fails the test.
COMMANDS = {
    "make": "--dry-run --no-print-directory --directory " + str(ROOT),
    "tensorboard": "--version",  # it would serve for ever
    "pytest": "--collect-only --quiet -p no:cacheprovider",  # these are tests of the suite itself
    "time python -c": "",
    "python ppo_scheduler.py --resume": "",
    "python ppo_scheduler.py": f"{TINY} --num-minibatches 2",
    "python dqn_scheduler.py": TINY,
    "python tuned_rule.py": "--generations 1",
    "python fifo_baseline.py": "",
    "python benchmark.py compare": "--runs 1 --max-jobs 300",
    "python benchmark.py rlscheduler": "",
    "python benchmark.py speed": "--repetitions 1 --seconds 0.01 --num-envs 8 --num-steps 32 " + SMALL,
    "python benchmark.py sweep": "--trials 0 || test $? = 2",  # reads the file; test_sweep.py runs trials
    "wandb sweep": "--help",  # these two want an account; test_sweep.py does what they do
    "wandb agent": "--help",
    "wandb sync": "--help",
    # It would serve for ever: started, asked for the state that docs/deploy.md shows, and told to end.
    "python serve.py": "--port 0 & sleep 6; kill $!; wait $!; test $? = 143",
    "curl": "--fail --retry 30 --retry-delay 1 --retry-connrefused",
    # Likewise; without a Slurm it tries again. tests/deployment/test_slurm_agent.py has one.
    "python slurm_agent.py --policy": "--socket nowhere.sock & sleep 10; kill $!; wait $!",
    "python slurm_agent.py export": "",
    "python tests/load.py": "--seconds 0.1 --jobs 8 --nodes 2",
}
ASK = ("curl", "python tests/load.py")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def blocks(language: str) -> list[str]:
    """Of all pages, the README's first."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [block for page in PAGES.values() for block in fence.findall(page)]


def bash_lines() -> list[str]:
    """The commands in order, each once, without comments."""
    lines = [line.split(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def short(command: str) -> str:
    """The command with short settings, and any trace replaced by the same small one.

    Raises:
        ValueError: no entry of COMMANDS covers it.
    """
    command = command.replace("NUMBA_CACHE_DIR=$(mktemp -d) ", "")  # compiling takes ten seconds
    for begin, flags in COMMANDS.items():
        if f"{command} ".startswith(f"{begin} "):
            command = re.sub(r"[\w.-]+\.swf\.gz", "my_cluster.swf.gz", command)
            command = re.sub(r"python (\w+\.py)", rf"python {ROOT}/\1", command)
            command = re.sub(r"(?<![\w/])(tests|sweeps)/", rf"{ROOT}/\1/", command)
            command = f"{command} {flags}"
            if begin in ASK:  # of a service that lives as long as the command takes
                port = free_port()
                command = command.replace("localhost:8000", f"localhost:{port}") + f" --port {port}" * (begin != "curl")
                command = f"python {ROOT}/serve.py --policy easy-sjf --port {port} & trap 'kill $!' EXIT; {command}"
            return command
    raise ValueError(f"no test covers the command {command!r}; add it to COMMANDS")


def workload_of(command: str) -> str:
    # Any run of a trace would do for these, and this one is the fastest.
    if any(word in command for word in ("--resume", "slurm_agent.py", "rlscheduler")):
        return "my_cluster.swf.gz"
    found = re.search(r"--workload (\S+)", command)
    return found[1] if found else "cloud"


def write_record(path: Path) -> None:
    """What the decision service would have recorded of 400 jobs."""
    [schedule] = simulate(load_workload("cloud", "test", runs=1, run_jobs=400), "easy-fifo")
    service = Service(ServeArgs("easy-fifo", record=path))
    for now in np.unique([schedule.jobs.submit_time, schedule.start_time + schedule.service_time]):
        service.decide(json.dumps(state_at(schedule, now)).encode())


class Reader:
    """Types the commands in a folder with the traces that the README names; what is typed twice runs once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, {}
        small = (ROOT / "tests" / "data" / "small.swf").read_bytes()
        (folder / "my_cluster.swf.gz").write_bytes(gzip.compress(small, 1))
        (folder / "state.json").write_text(next(block for block in blocks("json") if '"queued"' in block))
        write_record(folder / "decisions.jsonl")
        recorded = json.loads((ROOT / "tests" / "data" / "slurm_22_05.json").read_text())
        (folder / "jobcomp.log").write_text(recorded["jobcomp"])
        if SHARED.is_dir():
            (folder / "traces").symlink_to(SHARED / "traces")
            (folder / "rlscheduler.json").symlink_to(SHARED / "reference" / "rlscheduler.json")

    def types(self, line: str) -> subprocess.CompletedProcess[str]:
        command = short(line)
        if "runs/RUN" in command:
            command = command.replace("runs/RUN", self.run(workload_of(line)))
        if command not in self.done:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            self.done[command] = subprocess.run(
                ["bash", "-c", command], cwd=self.folder,
                env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"},
                capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
        return self.done[command]

    def run(self, workload: str) -> str:
        """The folder of the run that the pages' own command for the workload makes."""
        training = (line for line in bash_lines() if line.startswith("python ppo_scheduler.py") and "RUN" not in line)
        done = self.types(next(line for line in training if workload_of(line) == workload))
        assert done.returncode == 0, done.stderr
        name = re.sub(r"\S+\.swf\.gz", "my_cluster", workload).removesuffix(".jsonl")
        return f"runs/{min(path.name for path in (self.folder / 'runs').glob(f'{name}__ppo_scheduler__*'))}"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("reader"))


@pytest.mark.parametrize("line", bash_lines())
def test_every_command_runs(line: str, reader: Reader) -> None:
    if "rlscheduler.json" in line and not (reader.folder / "rlscheduler.json").exists():
        pytest.skip("without the traces and rlscheduler.json")
    done = reader.types(line)
    assert done.returncode == 0, f"{done.args[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("snippet", blocks("python"))
def test_every_snippet_runs(snippet: str, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    if '"traces/' in snippet and not (reader.folder / "traces").exists():
        pytest.skip("without the traces")
    if "runs/RUN" in snippet:
        snippet = snippet.replace("runs/RUN", reader.run(workload_of(snippet)))
    monkeypatch.chdir(reader.folder)
    exec(compile(snippet, "README.md", "exec"), {})


def test_a_command_that_no_test_covers_is_noticed() -> None:
    with pytest.raises(ValueError, match="no test covers"):
        short("python nothing_scheduler.py")


def test_defaults_are_those_of_the_scripts() -> None:
    known = {field.name: field.default for script in (Args, Compare) for field in fields(script)}
    rows = re.findall(r"^\| `--([\w-]+)` \| `(.*?)` \|", README, re.MULTILINE)
    assert len(rows) >= 15
    for flag, default in rows:
        value = known[flag.replace("-", "_")]
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert default.replace("_", "") == text.replace("_", ""), f"--{flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_into_the_repository_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]*)", PAGES[page])
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_line_that_is_quoted_is_where_the_link_leads(page: Path) -> None:
    """`make docs` puts the numbers right; a quotation that is nowhere any more has to be written anew."""
    assert with_lines(page.read_text(), page) == page.read_text()


def test_every_figure_is_measured() -> None:
    assert not [page.name for page, text in PAGES.items() if "TBD" in text]
