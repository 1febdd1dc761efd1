"""What README.md, CONTRIBUTING.md and docs/*.md say works.

Commands: their flags are read by the programs that they call; where there is time for all tests, every line is typed in
a shell, with settings that take seconds. Snippets are executed. A small trace stands in for the ones that the pages
name; `make`, which would build an environment, is only asked what it would do.
"""

import gzip
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import tyro
from load import state_at
from places import REFERENCE, ROOT, SHARED, SMALL, TRACES

import benchmark
import slurm_agent
import training_loop
from deployment.service import Args as ServeArgs
from deployment.service import Service
from docs.lines import with_lines
from simulator.replay import simulate
from workloads.load import load_workload

FILES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = {path: path.read_text() for path in FILES}
TINY = (
    "--total-timesteps 256 --num-envs 8 --num-steps 32 --num-jobs 64 --warmup-jobs 16 --followup-jobs 32 "
    "--num-evaluations 1 --validation-jobs 600 --tune-generations 1"
)
TRACE = "--workload my_cluster.swf.gz"
# In the background, until it says so; then it is told to end.
UNTIL = "2> said & until grep -qs '{}' said || ! kill -0 $!; do sleep 0.2; done; cat said >&2; kill $!; wait $!"
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
    "python benchmark.py speed": "--repetitions 1 --seconds 0.01 --num-envs 8 --num-steps 32 " + TRACE,
    "python benchmark.py sweep": "--trials 0 || test $? = 2",  # reads the file; test_sweep.py runs trials
    "wandb sweep": "--help",  # these two want an account; test_sweep.py does what they do
    "wandb agent": "--help",
    "wandb sync": "--help",
    # It would serve for ever: told to end when it serves.
    "python serve.py": f"--port 0 {UNTIL.format('at http')}; test $? = 143",
    "curl": "--fail --retry 30 --retry-delay 1 --retry-connrefused",
    # Likewise; without a Slurm it tries again. tests/test_slurm_agent.py has one.
    "python slurm_agent.py --policy": f"--socket nowhere.sock {UNTIL.format('next try')}",
    "python slurm_agent.py export": "",
    "python training_loop.py": "--help",  # they want a server; tests/orchestration has one
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
    command = command.replace("/var/lib/resourcerl/policy.onnx", "runs/RUN/policy.onnx")  # any policy will do
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


def write_tables(folder: Path) -> None:
    """The small trace's jobs as a table of one's own and in the form of openb, their nodes, and a mapping."""
    jobs = load_workload(str(SMALL), "all").jobs
    start, cpu = jobs.submit_time + jobs.wait_time, jobs.demand[:, 0] * 1000 / 4
    head, times = (
        "cpu_milli,creation_time,scheduled_time,deletion_time",
        (jobs.submit_time, start, start + jobs.run_time),
    )
    for name, more in (("jobs.csv", "owner,gpus"), ("openb_pod_list_default.csv", "memory_mib,num_gpu,gpu_milli")):
        rows = [f"{c},{s},{b},{e}{',1' * (more.count(',') + 1)}" for c, s, b, e in zip(cpu, *times, strict=True)]
        (folder / name).write_text("\n".join([f"{head},{more}", *rows]))
    (folder / "nodes.csv").write_text("name,cpu,gpu\n" + "n,64,8\n" * 4)
    (folder / "openb_node_list_all_node.csv").write_text("sn,cpu_milli,memory_mib,gpu\n" + "n,64000,65536,8\n" * 4)
    roles = "submit: creation_time\nstart: scheduled_time\nend: deletion_time\nuser: owner"
    (folder / "mapping.yaml").write_text(f"{roles}\ndemand: {{cpu: cpu_milli/1000, gpu: gpus}}\n")


class Reader:
    """Types the commands in a folder with the traces that the README names; what is typed twice runs once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, {}
        (folder / "my_cluster.swf.gz").write_bytes(gzip.compress(SMALL.read_bytes(), 1))
        (folder / "state.json").write_text(next(block for block in blocks("json") if '"queued"' in block))
        write_record(folder / "decisions.jsonl")
        recorded = json.loads((ROOT / "tests" / "data" / "slurm_22_05.json").read_text())
        (folder / "jobcomp.log").write_text(recorded["jobcomp"])
        write_tables(folder)
        if SHARED.is_dir():
            (folder / "traces").symlink_to(TRACES)
            (folder / "rlscheduler.json").symlink_to(REFERENCE)

    def types(self, line: str) -> subprocess.CompletedProcess[str]:
        command = short(line)
        if "runs/RUN" in command:
            command = command.replace("runs/RUN", self.run(workload_of(line)))
        if command not in self.done:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            self.done[command] = subprocess.run(
                ["bash", "-c", command], cwd=self.folder,
                env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"},
                capture_output=True, text=True, timeout=600, check=False,
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


def read_flags(line: str) -> None:
    """What the program of a line makes of its flags before it does anything.

    Raises:
        SystemExit: it does not know one, or not this value of it.
    """
    _, script, *flags = shlex.split(line)
    name = Path(script).stem
    if name == "benchmark":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *flags])
            benchmark.command_line()
    elif name == "training_loop":
        training_loop.command_line(flags)
    elif flags[:1] == ["export"]:
        tyro.cli(slurm_agent.Export, args=flags[1:])
    else:
        tyro.cli(import_module(name).Args, args=flags)


@pytest.mark.parametrize("line", [line for line in bash_lines() if re.match(r"python [\w/]+\.py\b", line)])
def test_the_flags_of_every_command_are_understood(line: str) -> None:
    read_flags(line)


@pytest.mark.parametrize("flags", ["--num-envz 8", "--num-envs many", "--objective makespan"])
def test_flags_that_are_not_understood_are_noticed(flags: str) -> None:
    with pytest.raises(SystemExit):
        read_flags(f"python ppo_scheduler.py {flags}")


@pytest.mark.parametrize("line", [line for line in bash_lines() if line.startswith("make")])
def test_every_target_is_there(line: str, reader: Reader) -> None:
    done = reader.types(line)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line", bash_lines())
def test_every_command_runs(line: str, reader: Reader) -> None:
    if "rlscheduler.json" in line and not (reader.folder / "rlscheduler.json").exists():
        pytest.skip("without the traces and rlscheduler.json")
    done = reader.types(line)
    assert done.returncode == 0, f"{done.args[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize(
    "snippet",
    [pytest.param(block, marks=[pytest.mark.slow] * ("runs/RUN" in block)) for block in blocks("python")],
)
def test_every_snippet_runs(snippet: str, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    if '"traces/' in snippet and not (reader.folder / "traces").exists():
        pytest.skip("without the traces")
    if "runs/RUN" in snippet:
        snippet = snippet.replace("runs/RUN", reader.run(workload_of(snippet)))
    monkeypatch.chdir(reader.folder)
    exec(compile(snippet, "README.md", "exec"), {})


def test_a_command_that_no_test_covers_is_noticed() -> None:
    assert all(short(line) for line in bash_lines())
    with pytest.raises(ValueError, match="no test covers"):
        short("python nothing_scheduler.py")


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
