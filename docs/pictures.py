"""Draws gantt.png, environment.png, results.png and, where there is a Chromium, report.png into docs: `make docs`.

    python docs/pictures.py                                      # rules only
    python docs/pictures.py fifo easy-fifo easy-sjf runs/<run>   # what the report compares
    python docs/pictures.py results                              # only results.png, from docs/results/*.json
    python docs/pictures.py results compared.json                # and first keeps what it needs of a comparison there

The report is that of the hpc preset. A comparison is what `benchmark.py compare --objective X --policies easy-fifo fifo
all runs/<run> ... --output compared.json` has written, called in the folder that holds `runs`.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import fields
from datetime import date
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project's files, whatever folder this is called from

from evaluation import plots
from policies import OnnxPolicy, load_policy
from scheduler_env import SchedulerVectorEnv
from workloads.load import load_workload

ROOT = Path(__file__).parents[1]
FIRST, JOBS = 1_000, 40  # forty jobs of the hpc preset that queue up
TITLES = {"fifo": "FIFO", "easy-sjf": "EASY-SJF (shortest first, with backfilling)"}
POLICIES = ("fifo", "easy-fifo", "easy-sjf", "easy-saf", "easy-wfp3")
BASE = "EASY-FIFO"  # what results.png compares with
LOOKS = {"FIFO": ("#6e6e6e", "s"), "best rule": ("#e69f00", "D"), "PPO": ("#0072b2", "o"), "DQN": ("#009e73", "^")}
AGENTS = {"ppo_scheduler": "PPO", "dqn_scheduler": "DQN"}


def gantt(path: Path) -> None:
    """The same jobs on the same machine under FIFO and under a better order."""
    workload, segment = load_workload("hpc", "test", runs=1), np.array([[FIRST, FIRST + JOBS]])
    episode = {name: load_policy(name).schedule(workload, segment)[0] for name in TITLES}
    with matplotlib.rc_context(plots.STYLE | {"savefig.dpi": 220}):
        plots.gantt(episode, TITLES).figure.savefig(path, facecolor="white")


def environment(path: Path) -> None:
    """What the environment renders, five hundred decisions into an episode of the cloud preset."""
    envs = SchedulerVectorEnv(1, "cloud", render_mode="rgb_array")
    envs.reset(seed=1)
    for _ in range(500):
        envs.step(envs.rule_actions())
    frames = envs.render()
    assert frames is not None
    Image.fromarray(frames[0]).save(path)


def screenshot(path: Path, chromium: str, policies: list[str]) -> None:
    """The top of a report."""
    with TemporaryDirectory() as folder:
        compare: list[str | Path] = [sys.executable, ROOT / "benchmark.py", "compare", "--workload", "hpc"]
        subprocess.run([*compare, "--policies", *policies, "--report", folder], check=True)
        page = (Path(folder) / "index.html").as_uri()
        flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1200,1250"]
        subprocess.run([chromium, *flags, f"--screenshot={path}", page], check=True, stderr=subprocess.DEVNULL)


def command(args: dict[str, Any]) -> str:
    """What starts the run whose args.json this is: its flags that are not the defaults, files without folders.

    A reference is `tuned`, or else what `auto` has found: args.json does not say which rules were given by hand.
    """
    words = [f"python {args['exp_name']}.py", "--workload", Path(args["workload"]).name]
    filled_in = {"workload", "exp_name", "run_name", "batch_size", "minibatch_size", "num_iterations"}
    for field in fields(import_module(args["exp_name"]).Args):
        if field.name in filled_in or field.name not in args:
            continue
        value: Any = tuple(args[field.name]) if isinstance(args[field.name], list) else args[field.name]
        if field.name == "reference" and not value.startswith("tuned"):
            continue  # what `auto` has found
        if field.name == "reference":
            value = "tuned"
        if value != field.default:
            words += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return " ".join(words)


def kept(compared: dict[str, Any], objective: str, day: date) -> dict[str, Any]:
    """What the picture and the tables need of a comparison whose first policy is EASY-FIFO.

    Changes are percent of EASY-FIFO's mean, tails multiples of EASY-FIFO's. The best rule is the one with the lowest
    mean on these jobs.
    """
    metric = {"slowdown": "bounded_slowdown"}.get(objective, objective)
    means = {name: found[metric]["mean"] for name, found in compared["policies"].items()}
    runs = [name for name in means if name.endswith("/policy.onnx") or " (= " in name]
    rules = {name: mean for name, mean in means.items() if name not in runs}
    best = min(rules, key=rules.__getitem__)
    named: dict[str, tuple[str, str | None]] = {
        BASE: ("easy-fifo", "easy-fifo"), "FIFO": ("fifo", "fifo"), "best rule": (best, best)
    }  # fmt: skip
    commands = []
    for name in runs:
        folder = Path("runs") / name.partition(" (= ")[0].removesuffix("/policy.onnx")
        args = json.loads((folder / "args.json").read_text())
        policy = load_policy(str(folder))
        assert isinstance(policy, OnnxPolicy)
        named[AGENTS[args["exp_name"]]] = (name, policy.metadata.rule)
        commands.append(command(args))
    file = Path(compared["workload"]).name
    commands.append(
        f"python benchmark.py compare --workload {file} --objective {objective} --policies easy-fifo fifo all "
        + " ".join(f"runs/{label}" for label in named if label in AGENTS.values())
    )
    policies = {}
    for label, (name, rule) in named.items():
        found, change = compared["policies"][name][metric], compared["differences"][name][metric]
        tails = {
            key: round(value / compared["tails"]["easy-fifo"][key], 2) for key, value in compared["tails"][name].items()
        }
        policies[label] = {
            "rule": rule, "mean": round(found["mean"], 2), "ci95": [round(end, 2) for end in found["ci95"]],
            "change": round(change["mean"], 2), "change_ci95": [round(end, 2) for end in change["ci95"]], **tails,
        }  # fmt: skip
    revision = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return {
        "workload": file.split(".swf")[0], "objective": objective,
        **{key: compared[key] for key in ("protocol", "split", "load", "jobs", "counted_jobs")},
        "date": day.isoformat(), "revision": subprocess.check_output(revision, text=True).strip(),
        "commands": commands, "policies": policies,
        "change_of_every_rule": {
            name: round(100 * (mean / rules["easy-fifo"] - 1), 2)
            for name, mean in sorted(rules.items(), key=lambda rule: rule[1])
        },
    }  # fmt: skip


def called(label: str, found: dict[str, Any]) -> str:
    """A run whose file stands for a rule is called `PPO (= easy-sjf)`."""
    if label == BASE or label == "FIFO" or not found["rule"]:
        return label
    rule = found["rule"] if len(found["rule"]) < 24 else "tuned rule"
    return f"{label} ({rule})" if label == "best rule" else f"{label} (= {rule})"


def draw_results(everything: list[dict[str, Any]], path: Path) -> None:
    """Means and intervals relative to EASY-FIFO: at the left in percent, at the right, for FIFO, how many times."""
    rows = [
        (result, label, result["policies"][label])
        for result in everything for label in LOOKS if label in result["policies"]
    ]  # fmt: skip
    with matplotlib.rc_context(plots.STYLE | {"savefig.dpi": 200, "font.size": 9.0}):
        figure = Figure(figsize=(8.4, 0.6 + 0.23 * (len(rows) + len(everything))))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4.2, 1))
        y, ticks, names = 0.0, [], []
        for number, (result, label, found) in enumerate(rows):
            if number == 0 or result is not rows[number - 1][0]:
                y += 0.3 * (number > 0)
                ticks.append(y)
                names.append(f"{short(result['workload'])}, {result['objective']}")
                y += 1
            colour, marker = LOOKS[label]
            many = label == "FIFO"
            axis = right if many else left
            low, mean, high = (
                (1 + value / 100 if many else value)
                for value in (found["change_ci95"][0], found["change"], found["change_ci95"][1])
            )
            axis.hlines(y, low, high, color=colour, linewidth=2.6, alpha=0.55)
            axis.plot(mean, y, marker, color=colour, markersize=6)
            text = f"{mean:.0f} times" if mean >= 10 else f"{mean:.1f} times"
            axis.annotate(
                text if many else f"{mean:+.0f} %".replace("-", "\u2212"), (high, y), (5, 0), va="center",
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
            ticks.append(y)
            names.append(called(label, found))
            y += 1
        left.set_yticks(ticks, names)
        for text in left.get_yticklabels():
            text.set_fontweight("bold" if ", " in text.get_text() else "normal")
        left.set_ylim(y - 0.4, -0.7)
        left.axvline(0, color=plots.INK, linewidth=1.2)
        left.set_xlim(-85, max(20, left.get_xlim()[1]))
        left.xaxis.set_major_formatter(lambda x, _: f"{x:+.0f} %".replace("-", "\u2212") if x else "as EASY-FIFO")
        left.set_title("Mean and 95 % interval, compared with EASY-FIFO (further left is better)", loc="left")
        right.set_xscale("log")
        right.set_xlim(1, 300)
        right.set_xticks([1, 10, 100], ["1", "10", "100 times"])
        right.set_xticks([], minor=True)
        right.set_title("plain FIFO", loc="left")
        for axis in (left, right):
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0)
            axis.spines["left"].set_visible(False)
        figure.savefig(path, facecolor="white")


def short(workload: str) -> str:
    """`SDSC-SP2-1998-4.2-cln` is called SDSC-SP2."""
    words = workload.split("-")
    return "-".join(words[: next((i for i, word in enumerate(words) if word.isdigit()), len(words))])


def results(folder: Path, comparisons: Iterable[Path]) -> Path:
    """Keeps what comparisons say in docs/results, and draws all that is there."""
    for file in comparisons:
        compared = json.loads(file.read_text())
        runs = [name for name in compared["policies"] if name.endswith(".onnx")]
        objective = json.loads((Path("runs") / Path(runs[0]).parent / "args.json").read_text())["objective"]
        found = kept(compared, objective, date.fromtimestamp(file.stat().st_mtime))
        (folder / "results" / f"{found['workload']}.json").write_text(
            json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        )
    order = ("SDSC-SP2", "HPC2N", "cloud", "tasks", "hpc")
    everything = [json.loads(file.read_text()) for file in sorted((folder / "results").glob("*.json"))]
    everything.sort(key=lambda found: [*order, short(found["workload"])].index(short(found["workload"])))
    draw_results(everything, folder / "results.png")
    return folder / "results.png"


def smaller(path: Path) -> None:
    Image.open(path).quantize(256).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    folder = Path(__file__).parent
    if sys.argv[1:2] == ["results"]:
        smaller(results(folder, map(Path, sys.argv[2:])))
        sys.exit()
    gantt(folder / "gantt.png")
    environment(folder / "environment.png")
    results(folder, ())
    if chromium := shutil.which("chromium"):
        screenshot(folder / "report.png", chromium, sys.argv[1:] or list(POLICIES))
    for name in ("gantt", "environment", "results", "report"):
        smaller(folder / f"{name}.png")
