"""The plots of a report. Their ink takes the page's colour, so that they can be read by day and by night."""

import io
import re
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from evaluation.figures import CURVES, run_of
from simulator.gantt import gantt_chart
from simulator.schedule import METRIC, Schedule
from workloads.files import replacing
from workloads.jobs import DAY, HOUR

INK, GRID = "#1f2329", "#d9dce1"  # in the page these become its own colours
COLOURS = ("#e8710a", "#1a73e8", "#12a150", "#c2368d", "#8a5cf5", "#b8860b", "#0e9aa7", "#d13438")
BASELINE_COLOURS = {"fifo": "#9aa0a6", "easy-fifo": "#6b7c93"}
WIDTH = 5.6  # inches: on a telephone such a figure shrinks to two thirds and can still be read
STYLE: dict[RcKeyType, Any] = {
    "figure.figsize": (WIDTH, 3.4), "figure.constrained_layout.use": True, "font.size": 9.5, "axes.titlesize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.7, "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.8,
    "svg.hashsalt": "resourcerl", "savefig.dpi": 160,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK,
}  # fmt: skip
METRIC_NAMES = {
    "latency": "latency (s)", "wait": "wait (s)", "bounded_slowdown": "bounded slowdown", "utilization": "utilization",
    "makespan": "makespan (s)",
}  # fmt: skip


def duration(seconds: float) -> str:
    """In the largest unit that keeps it above one: 45 s, 12 min, 3.4 h, 27 d."""
    for unit, name in ((DAY, "d"), (HOUR, "h"), (60.0, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.{0 if seconds >= 100 * unit else 1}f} {name}"
    return f"{seconds:.0f} s"


@dataclass
class Plot:
    """A figure, what it shows in a sentence, and its SVG."""

    name: str
    caption: str
    figure: Figure
    svg: str = ""


def save(plot: Plot, folder: Path) -> None:
    """PNG and SVG files on white; the SVG that the page holds has no ground, and its ink is the page's."""
    stream = io.StringIO()
    with replacing(folder / f"{plot.name}.png") as temporary:
        plot.figure.savefig(temporary, format="png", facecolor="white")
    plot.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    with replacing(folder / f"{plot.name}.svg") as temporary:
        temporary.write_text(svg.replace(">", '><rect width="100%" height="100%" fill="white"/>', 1))
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{plot.name}-", svg)  # an id is the page's, not the figure's
    plot.svg = svg.replace(INK, "currentColor").replace(GRID, "var(--line)")


class Look:
    """How policies are called and coloured."""

    def __init__(self, results: dict[str, Any], shown: list[str]) -> None:
        self.shown = shown
        names = list(results["policies"])
        short = {name: short_name(name) for name in names}
        self.labels = {
            n: s if list(short.values()).count(s) == 1 else n.replace("/policy.onnx", "") for n, s in short.items()
        }
        free = cycle(COLOURS)
        self.colours = {name: BASELINE_COLOURS.get(name) or next(free) for name in shown}

    def line(self, name: str) -> dict[str, Any]:
        width = 2.4 if ".onnx" in name else 1.5
        return {"color": self.colours[name], "label": self.labels[name], "linewidth": width}


def short_name(name: str) -> str:
    """`hpc__ppo_scheduler__1__1700000000/policy.onnx` is called `ppo_scheduler (seed 1)`."""
    if not (run := run_of(name)):
        return name.replace("/policy.onnx", "")
    rule = f" {run['rule']}" if run["rule"] else ""
    return f"{run['exp_name']}{run['at'] or ''} (seed {run['seed']}){rule}"


def group_name(group: str, found: dict[str, Any]) -> str:
    """Of runs that differ only in the seed; where some stand for rules, how many."""
    rules = sum(bool((run := run_of(name)) and run["rule"]) for name in found["runs"])
    return group.split("__")[-1] + (f" ({rules} of {len(found['runs'])} = rules)" if rules else "")


def metric_bars(results: dict[str, Any], look: Look) -> Plot:
    names = look.shown[::-1]
    figure = Figure(figsize=(WIDTH, 1.2 + 0.6 * len(names)))
    axes = figure.subplots(2, 2, sharey=True)
    for axis, metric in zip(axes.flat, ("latency", "wait", "bounded_slowdown", "utilization"), strict=True):
        figures = [results["policies"][name][metric] for name in names]
        means = np.array([figure["mean"] for figure in figures])
        axis.barh([look.labels[n] for n in names], means, color=[look.colours[n] for n in names], height=0.65)
        if figures[0]["ci95"][0] is not None:
            axis.hlines(
                range(len(names)), *np.array([figure["ci95"] for figure in figures]).T, color=INK, linewidth=1.2
            )
        if metric == METRIC[results["objective"]]:
            axis.axvline(results["bound"]["mean"], color=INK, linestyle=":", linewidth=1.2)
        axis.grid(axis="y", visible=False)
        if _spread(means):
            axis.set_xscale("log")
        else:
            axis.set_xlim(0)
            axis.locator_params(axis="x", nbins=4)
            axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:,g}k" if x >= 10_000 else f"{x:,g}")
        axis.set_title(METRIC_NAMES[metric] + ", log" * _spread(means), loc="left")
    caption = "Means with 95 % intervals. Dotted: the lower bound on the "
    return Plot("metrics", f"{caption}{results['objective']}, which no schedule can pass.", figure)


def _spread(values: Any) -> bool:
    """Whether a linear axis would show only the largest."""
    return bool(min(values) > 0 and max(values) > 20 * np.median(values))


def _legend(figure: Figure, axis: Axes) -> None:
    """Above the plot, where no line is."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper left", ncols=3)


def waits(results: dict[str, Any], look: Look) -> Plot:
    figure = Figure()
    axis = figure.subplots()
    found = results["plots"]["waits"]
    at = np.array(found["seconds"])
    shares = {name: np.array(found["share"][name]) for name in look.shown}
    for name, values in shares.items():
        axis.plot(at, np.where(values > 0, values, np.nan), **look.line(name))
    scale = "log" if any(values.any() for values in shares.values()) else "linear"  # nobody waits
    axis.set(xscale="log", yscale=scale, xlabel="wait", ylabel="share of jobs that wait longer")
    axis.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")
    _log_durations(axis, at[0], at[-1])
    _legend(figure, axis)
    caption = "How many jobs wait longer than a time. At the lower right is the tail: the few that wait for very long."
    return Plot("waits", caption, figure)


TIMES = {1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", HOUR: "1 h", 6 * HOUR: "6 h", DAY: "1 d", 7 * DAY: "1 w"}


def _log_durations(axis: Axes, low: float, high: float) -> None:
    """Ticks that people use on a logarithmic axis of seconds."""
    ticks = {seconds: text for seconds, text in (TIMES | {30 * DAY: "30 d"}).items() if low <= seconds <= high}
    axis.set_xticks(list(ticks), list(ticks.values()), fontsize=8.5)
    axis.minorticks_off()


def by_size(results: dict[str, Any], look: Look) -> Plot:
    figure = Figure()
    axis = figure.subplots()
    found, width = results["plots"]["classes"], 0.8 / len(look.shown)
    place = np.arange(len(found["labels"]))
    for k, name in enumerate(look.shown):
        offset = (k + 0.5) * width - 0.4
        hours = np.array(found["wait"][name]) / HOUR
        axis.bar(place + offset, hours, width, color=look.colours[name], label=look.labels[name])
    scale = _log_if_spread(axis, [wait for name in look.shown for wait in found["wait"][name] if wait > 0])
    jobs = [f"{label}\n{jobs:,} jobs" for label, jobs in zip(found["labels"], found["jobs"], strict=True)]
    axis.set_xticks(place, jobs)
    axis.grid(axis="x", visible=False)
    axis.set(xlabel=found["unit"], ylabel=f"mean wait (h{scale})")
    _legend(figure, axis)
    return Plot("classes", "Mean wait by the size of the job: who pays for the gain.", figure)


def _log_if_spread(axis: Axes, values: list[float]) -> str:
    if not values or not _spread(values):
        return ""
    axis.set_yscale("log")
    return ", log"


def load_sweep(results: dict[str, Any], look: Look) -> Plot:
    figure = Figure()
    axis = figure.subplots()
    for name in look.shown:
        points = [(p["offered_load"], p["policies"][name]["wait"]) for p in results["loads"]]
        load, mean = np.array([(x, figure["mean"]) for x, figure in points]).T
        axis.plot(load, mean / HOUR, marker="o", markersize=4, **look.line(name))
        if points[0][1]["ci95"][0] is not None:
            low, high = np.array([figure["ci95"] for _, figure in points]).T / HOUR
            axis.fill_between(load, low, high, color=look.colours[name], alpha=0.12, linewidth=0)
    scale = _log_if_spread(axis, [p["policies"][name]["wait"]["mean"] for p in results["loads"] for name in look.shown])
    axis.set(xlabel="offered load (work that arrives / capacity)", ylabel=f"mean wait (h{scale})")
    _legend(figure, axis)
    caption = (
        "Mean wait against offered load with 95 % intervals: continuous operation, arrivals compressed or stretched."
    )
    return Plot("loads", caption, figure)


def over_time(results: dict[str, Any], look: Look) -> Plot:
    figure = Figure(figsize=(WIDTH, 4.6))
    queue, used = figure.subplots(2, sharex=True)
    found = results["plots"]["time"]
    days = np.array(found["hours"]) / 24
    unit, x = ("days", days) if days[-1] > 3 else ("hours", days * 24)
    largest = max(max(found["queue"][name]) for name in look.shown)
    for name in look.shown:
        queue.plot(x, found["queue"][name], **look.line(name) | {"linewidth": 1.1})
        used.plot(x, 100 * np.array(found["utilization"][name]), **look.line(name) | {"linewidth": 0.8})
    if largest > 20 * np.median([max(np.median(found["queue"][name]), 1) for name in look.shown]):
        queue.set_yscale("symlog", linthresh=10)
    queue.set(ylabel="jobs in the queue", ylim=(0, None))
    used.set(ylabel="utilization (%)", xlabel=unit, ylim=(0, 102))
    _legend(figure, queue)
    return Plot("time", "Queue length and utilization over the first run.", figure)


WAITED = np.array([(112, 184, 150), (240, 190, 90), (204, 62, 52)])  # not at all, half as long as any, as long as any


def gantt(episode: dict[str, Schedule], labels: dict[str, str]) -> Plot:
    """The same jobs under several policies, one above the other, with the same axis and colours."""
    first = next(iter(episode.values()))
    begin = first.jobs.submit_time[0]
    makespan = max(schedule.makespan for schedule in episode.values())
    longest = max(schedule.wait.max() for schedule in episode.values()) or 1.0
    figure = Figure(figsize=(WIDTH, 0.7 + 1.75 * len(episode)))
    axes = np.atleast_1d(figure.subplots(len(episode), sharex=True))
    for axis, (name, schedule) in zip(axes, episode.items(), strict=True):
        waited = schedule.wait / longest
        colours = np.column_stack([np.interp(waited, (0, 0.5, 1), channel) for channel in WAITED.T]).astype(np.uint8)
        image = gantt_chart(schedule, begin, begin + makespan, colours, 360, 1_400)
        axis.imshow(image, extent=(0, makespan / HOUR, 0, 1), aspect="auto", interpolation="none")
        axis.set_title(labels.get(name, name), loc="left")
        axis.set_title(
            f"mean wait {duration(schedule.wait.mean())}, done after {duration(schedule.makespan)}",
            loc="right",
            fontsize=9,
        )
        axis.set_yticks([])
        axis.grid(False)
    axes[-1].set_xlabel("hours")
    scale = matplotlib.colors.LinearSegmentedColormap.from_list("waited", WAITED / 255)
    shown = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, longest / HOUR), scale)
    figure.colorbar(shown, ax=axes, orientation="horizontal", aspect=50, pad=0.02, label="hours waited")
    machine = "a band a node, each rectangle a job" if len(first.cluster.speed) > 1 else "each rectangle is a job"
    return Plot(
        "gantt",
        f"A busy window (one in ten is busier under fifo), {len(first.jobs)} jobs from an empty machine: {machine}.",
        figure,
    )


def attention(results: dict[str, Any], name: str, look: Look) -> Plot:
    found = results["plots"]["attention"][name]
    figure = Figure(figsize=(WIDTH, 2.6))
    axes = figure.subplots(1, 3, sharey=True)
    names = {"requested": "requested time", "size": "size", "waited": "has waited"}
    for axis, (feature, curve) in zip(axes, found.items(), strict=True):
        x = np.maximum(curve["x"], 1.0)
        axis.plot(x, curve["mean"], color=look.colours[name], marker="o", markersize=3)
        axis.fill_between(x, curve["low"], curve["high"], color=look.colours[name], alpha=0.2, linewidth=0)
        axis.set(xscale="log", xlabel=names[feature])
        if feature == "size":
            axis.xaxis.set_major_formatter("{x:g}")
        else:
            _log_durations(axis, 0.9 * x.min(), 1.1 * x.max())
    axes[0].set_ylabel("score of the job")
    place = list(results["trained"]).index(name) + 1
    caption = (
        f"What {look.labels[name]} looks at: the score of a job beside the others that could start, against what it "
        "asks for and how long it has waited (mean and quartiles)."
    )
    return Plot(f"attention-{place}", caption, figure)


def learning_curves(curves: dict[str, Any], look: Look) -> Plot:
    tags = [tag for tag in CURVES if any(tag in found["scalars"] for found in curves.values())]
    figure = Figure(figsize=(WIDTH, 0.4 + 2.1 * len(tags)))
    free = cycle(COLOURS)
    colours = {name: look.colours.get(name) or next(free) for name in curves}
    for axis, tag in zip(figure.subplots(len(tags), sharex=True, squeeze=False)[:, 0], tags, strict=True):
        for name, found in curves.items():
            if points := found["scalars"].get(tag):
                steps, values = np.array(points).T
                axis.plot(steps / 1e6, 100 * values, color=colours[name], label=look.labels[name])
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set_ylabel(CURVES[tag])
    axis.set_xlabel("million decisions")
    _legend(figure, axis)
    caption = (
        "Learning curves from TensorBoard's events: how much better than the best rule on the validation split, and "
        "than the reference rule in training episodes."
    )
    return Plot("learning", caption, figure)


def performance_profile(results: dict[str, Any], look: Look) -> Plot:
    figure = Figure()
    axis = figure.subplots()
    colours = cycle(COLOURS)
    for group, found in results["seeds"]["groups"].items():
        colour = BASELINE_COLOURS.get(group) or next(colours)
        axis.plot(results["seeds"]["levels"], found["profile"], color=colour, label=group_name(group, found))
        if len(found["runs"]) > 1:
            axis.fill_between(results["seeds"]["levels"], *found["band"], color=colour, alpha=0.2, linewidth=0)
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.set(xlabel=f"score: cost of {look.labels[results['best_rule']]} / cost", ylim=(0, 1.02))
    axis.set_ylabel("share of blocks and seeds above")
    _legend(figure, axis)
    caption = "Performance profiles (rliable): higher is better; right of 1 is better than the best rule."
    return Plot("profiles", caption, figure)
