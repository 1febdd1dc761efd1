"""Draws and writes the report of `benchmark.py compare --report`: index.html, report.md, and the plots as PNG and SVG.

    python benchmark.py compare --workload hpc --policies fifo easy-fifo easy-sjf runs/X --report report

Everything that is drawn or printed comes from the results that results.json holds, but for the schedules of one episode
(the Gantt charts). The HTML is one file that needs no network; its plots are SVG whose ink takes the page's colour, so
that they can be read by day and by night.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

from scheduler_env import Schedule, gantt_chart
from workloads import replacing, workload_name

HOUR, DAY = 3_600.0, 86_400.0
INK, GRID = "#1f2329", "#d9dce1"  # in the page these become its own colours
COLOURS = ("#e8710a", "#1a73e8", "#12a150", "#c2368d", "#8a5cf5", "#b8860b", "#0e9aa7", "#d13438")
BASELINE_COLOURS = {"fifo": "#9aa0a6", "easy-fifo": "#6b7c93"}
WIDTH = 5.6  # inches: on a telephone such a figure shrinks to two thirds and can still be read
STYLE = {
    "figure.figsize": (WIDTH, 3.4), "figure.constrained_layout.use": True, "font.size": 9.5, "axes.titlesize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.7, "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.8,
    "svg.hashsalt": "resourcerl", "savefig.dpi": 160,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK),
}  # fmt: skip
METRIC_NAMES = {
    "latency": "latency (s)", "wait": "wait (s)", "bounded_slowdown": "bounded slowdown", "utilization": "utilization",
    "makespan": "makespan (s)",
}  # fmt: skip


@dataclass
class Plot:
    """A figure, what it shows in a sentence, and its SVG."""

    name: str
    caption: str
    figure: Figure
    svg: str = ""


@dataclass
class Table:
    """A cell is a text, or (text, small print)."""

    caption: str
    head: list[str]
    rows: list[list[str | tuple[str, str]]]
    folded: bool = False


@dataclass
class Section:
    title: str
    text: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # below the tables
    plots: list[Plot] = field(default_factory=list)


def write(folder: Path, results: dict[str, Any], shown: list[str], episode: dict[str, Schedule] | None = None) -> None:
    """Write index.html, report.md and plots/*.{png,svg} into the folder.

    Args:
        results: what results.json holds.
        shown: the policies that the plots show; the tables hold all.
        episode: schedules of the same jobs, for the Gantt charts.
    """
    look = Look(results, shown)
    with matplotlib.rc_context(STYLE):
        sections = [
            headline(results, look), payers(results, look), both_protocols(results, look),
            inside(results, look, episode), learning(results, look), provenance(results, look),
        ]  # fmt: skip
        (folder / "plots").mkdir(exist_ok=True)
        for plot in (plot for section in sections for plot in section.plots):
            save(plot, folder / "plots")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = {"title": title(results), "verdict": verdict(results, look), "sections": sections}
    for name, template, escape in (("index.html", HTML, True), ("report.md", MARKDOWN, False)):
        with replacing(folder / name) as temporary:
            temporary.write_text(environment.overlay(autoescape=escape).from_string(template).render(page))


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


# ---------------------------------------------------------------------------------------------------- words and figures
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
    run = re.fullmatch(r"(.+)__(.+)__(\d+)__\d+/policy\.onnx(@.+)?", name)
    return f"{run[2]}{run[4] or ''} (seed {run[3]})" if run else name.replace("/policy.onnx", "")


def duration(seconds: float) -> str:
    """In the largest unit that keeps it above one: 45 s, 12 min, 3.4 h, 27 d."""
    for unit, name in ((DAY, "d"), (HOUR, "h"), (60.0, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.{0 if seconds >= 100 * unit else 1}f} {name}"
    return f"{seconds:.0f} s"


def number(value: float, metric: str) -> str:
    return f"{value:,.{ {'bounded_slowdown': 2, 'utilization': 3}.get(metric, 0) }f}"


def cell(figure: dict[str, Any], form: Callable[[float], str], key: str = "mean") -> tuple[str, str] | str:
    """A figure and its interval."""
    if figure[key] is None:
        return "–"
    low, high = figure["ci95"]
    return form(figure[key]) if low is None else (form(figure[key]), f"{form(low)} … {form(high)}")


def percent(value: float) -> str:
    return f"{value:+,.{0 if abs(value) >= 99.95 else 1}f}\u00a0%".replace("-", "−")


def share(value: float) -> str:
    """Of all: 12 %, 0.3 %."""
    text = f"{100 * value:.{0 if 0.0995 <= value <= 0.9 else 1}f}"
    return f"{text.removesuffix('.0')}\u00a0%"


def title(results: dict[str, Any]) -> str:
    return f"{workload_name(results['workload'])}: who waits how long"


def verdict(results: dict[str, Any], look: Look) -> str:
    """The report in a sentence: the best trained policy, or where there is none the best rule."""
    metric, best = metric_of(results), results["best_rule"]
    mean = {name: figures[metric]["mean"] for name, figures in results["policies"].items()}
    winner = min(results["trained"] or mean, key=lambda name: mean[name])
    text = f"{look.labels[winner]} has a mean {results['objective']} of {with_unit(mean[winner], metric)}"
    for rule, figures in results["against"].items():
        figure = figures[winner][metric]
        if rule == winner or figure["mean"] is None:
            continue
        low, high = figure["ci95"]
        text += f"; to {'the best rule, ' * (rule == best)}{rule}: {percent(figure['mean'])}"
        if low is not None:
            luck = "" if low * high > 0 else ", which may be luck"
            text += f" (95\u00a0% interval {percent(low)} … {percent(high)}{luck})"
    if len(results["trained"]) > 1:
        text += f"; it is the best of {len(results['trained'])} trained policies, picked on these very jobs"
    if winner == best:
        text += f"; it is the best of the {len(mean)} policies compared"
    return f"{text}."


def with_unit(value: float, metric: str) -> str:
    return number(value, metric) + "\u00a0s" * METRIC_NAMES[metric].endswith("(s)")


def metric_of(results: dict[str, Any]) -> str:
    return {"slowdown": "bounded_slowdown"}.get(results["objective"], results["objective"])


# -------------------------------------------------------------------------------------------------------- the sections
def headline(results: dict[str, Any], look: Look) -> Section:
    metric, rules, bound = metric_of(results), list(results["against"]), results["bound"]
    runs = "in continuous operation (the first 5 % are not counted: the machine starts empty)"
    if results["protocol"] == "windows":
        runs = "in windows, each from an empty machine"
    arrivals = "as recorded" if results["load"] == 1 else f"{results['load']:g} times as fast as recorded"
    text = (
        f"{results['counted_jobs']:,} jobs of the {results['split']} split, which no training has seen, {runs}. "
        f"They arrive {arrivals}, and are the same for all policies."
    )
    rows = []
    for name, figures in results["policies"].items():
        row: list[Any] = [look.labels[name], cell(figures[metric], lambda x: number(x, metric))]
        to = {rule: results["against"][rule][name][metric] for rule in rules}
        row += ["–" if name == rule else cell(figure, percent) for rule, figure in to.items()]
        row += ["–" if name == rule else cell(figure["improvement"], share) for rule, figure in to.items()]
        closed = bound["closed"][name]
        rows.append([*row, "–" if closed is None else f"{100 * closed:.1f}\u00a0%"])
    head = ["policy", f"mean {METRIC_NAMES[metric]}", *(f"to {rule}" for rule in rules)]
    head += [*(f"P(better than {rule})" for rule in rules), "way to the bound"]
    tables = [Table(f"Mean {results['objective']} of a job", head, rows), all_metrics(results, look)]
    tables += [relative(results, look, rule) for rule in rules]
    plots = [metric_bars(results, look)] + [load_sweep(results, look)] * (len(results["loads"]) > 1)
    return Section("Headline", [text, *at_loads(results, look)], [], tables, reading(results), plots)


def reading(results: dict[str, Any]) -> list[str]:
    """How the headline is to be read."""
    metric, best = metric_of(results), results["best_rule"]
    blocks = len(results["policies"][best][metric]["per_block"])
    intervals = "One episode, so there are no intervals: these figures may be luck."
    if blocks > 1:
        intervals = (
            f"Intervals (small) are 95 % bootstrap intervals over {blocks} blocks of consecutive jobs, paired: what is "
            "hard about a block cancels in the differences. P is the share of blocks in which the policy is better."
        )
    bound = (
        f"The best rule, {best}, was picked with hindsight, on these very jobs. No schedule whatsoever has a mean "
        f"{results['objective']} below {with_unit(results['bound']['mean'], metric)}; the last column is the share of "
        "the way from fifo to this lower bound. It is a Lagrangian relaxation (lower_bound.py), and need not be "
        "reachable."
    )
    return [intervals, bound]


QUANTILES = {"latency": ["p50"], "wait": ["p50", "p95", "p99", "max"], "bounded_slowdown": ["p50"]}


def all_metrics(results: dict[str, Any], look: Look) -> Table:
    head, rows = ["policy"], [[label] for label in look.labels.values()]
    for metric, heading in METRIC_NAMES.items():
        head += [heading if metric == "makespan" else f"mean {heading}"]
        head += [f"{ {'p50': 'median', 'max': 'longest'}.get(q, q) } {heading}" for q in QUANTILES.get(metric, [])]
        for row, name in zip(rows, look.labels, strict=True):
            quantiles = [results["quantiles"][name][metric][q] for q in QUANTILES.get(metric, [])]
            row.append(cell(results["policies"][name][metric], lambda x, m=metric: number(x, m)))
            row += [cell(quantile, lambda x, m=metric: number(x, m), "value") for quantile in quantiles]
    return Table("All metrics: means over blocks, quantiles over single jobs", head, rows, folded=True)


def relative(results: dict[str, Any], look: Look, rule: str) -> Table:
    head = ["policy", *(f"{name.removesuffix(' (s)')}" for name in METRIC_NAMES.values())]
    rows = [
        [look.labels[name], *(cell(figures[metric], percent) for metric in METRIC_NAMES)]
        for name, figures in results["against"][rule].items()
        if name != rule
    ]
    return Table(f"Means relative to {rule}", head, rows, folded=True)


def payers(results: dict[str, Any], look: Look) -> Section:
    """Fairness."""
    found = results["fairness"]
    text = [
        "A mean can be bought with the waits of a few. Under easy-fifo no job may delay the first of the queue, so it "
        "is the measure here: a policy starves somebody where its p99 of the wait is more than 1.2 times easy-fifo's, "
        "or its longest wait more than twice."
    ]
    starving = [name for name in found if found[name]["starves"]]
    if not starving:
        text.append("No policy in this comparison starves anybody by that measure.")
    if others := [look.labels[name] for name in starving if name not in look.shown]:
        text.append(f"Of the policies that are not drawn, these starve somebody as well: {', '.join(others)}.")
    head = ["policy", "p99 of the wait", "longest wait", "jobs that wait longer than under fifo"]
    head += ["jobs beyond easy-fifo's longest wait", "starves"]
    rows = [
        [
            look.labels[name], duration(own["wait_p99"]), duration(own["wait_max"]), share(own["longer_than_fifo"]),
            f"{own['beyond_easy_fifo_max']:,}", "yes" if own["starves"] else "no",
        ]
        for name, own in found.items()
    ]  # fmt: skip
    warnings = [warning(results, look, name) for name in starving if name in look.shown]
    plots = [waits(results, look), by_size(results, look)]
    return Section("Who pays for the gain", text, warnings, [Table("Who pays", head, rows)], [], plots)


def warning(results: dict[str, Any], look: Look, name: str) -> str:
    """Whom the policy starves, spelled out."""
    own, easy, classes = results["fairness"][name], results["fairness"]["easy-fifo"], results["plots"]["classes"]
    ratio = np.array(classes["wait"][name]) / np.maximum(classes["wait"]["easy-fifo"], 1.0)
    worst = int(np.argmax(ratio))
    return (
        f"{look.labels[name]} starves somebody: the longest wait is {duration(own['wait_max'])} (under easy-fifo "
        f"{duration(easy['wait_max'])}), and one job in a hundred waits longer than {duration(own['wait_p99'])} "
        f"({duration(easy['wait_p99'])}). {own['beyond_easy_fifo_max']:,} jobs wait longer than any does under "
        f"easy-fifo. Jobs of {classes['labels'][worst]} {classes['unit']} fare worst: they wait {ratio[worst]:.1f} "
        "times as long as under easy-fifo, in the mean."
    )


def both_protocols(results: dict[str, Any], look: Look) -> Section:
    metric, found = metric_of(results), results["protocols"]
    section = Section("The other protocol", [agreement(results, look)])
    if "windows" in found:
        rows = []
        for name in results["policies"]:
            row: list[Any] = [look.labels[name]]
            for protocol in ("continuous", "windows"):
                figures = found[protocol]["policies"][name]
                row += [cell(figures, lambda x: number(x, metric)), cell(figures["to_easy_fifo"], percent)]
            rows.append([*row, "yes" if name in found["change_sides"] else ""])
        head = ["policy", "continuous", "to easy-fifo", "windows", "to easy-fifo", "changes sides"]
        section.tables.append(Table(f"Mean {METRIC_NAMES[metric]} under both protocols", head, rows))
    return section


def agreement(results: dict[str, Any], look: Look) -> str:
    """Whether the protocols agree, in plain words."""
    found = results["protocols"]
    if len(found) < 2:
        return "There are too few jobs in a row for windows, so there is only one protocol here."
    continuous, windows = found["continuous"], found["windows"]
    best, best_there = look.labels[continuous["best"]], look.labels[windows["best"]]
    what = f"{windows['blocks']} windows of {windows['jobs'] // windows['blocks']} jobs, each from an empty machine"
    if best == best_there and not found["change_sides"]:
        return (
            f"The protocols agree: {best} is the best in continuous operation and in {what}, and no policy changes "
            "sides against easy-fifo."
        )
    text = f"The protocols disagree. In {what}, as in the literature, {best_there} is the best; "
    text += "so it is in continuous operation" if best == best_there else f"in continuous operation it is {best}"
    named = sorted(found["change_sides"], key=lambda name: name not in look.shown)[:3]
    for name in named:
        there, here = (found[p]["policies"][name]["to_easy_fifo"]["mean"] for p in ("windows", "continuous"))
        text += f"; against easy-fifo, {look.labels[name]} is at {percent(there)} there and at {percent(here)} here"
    if more := len(found["change_sides"]) - len(named):
        text += f"; {more} more change sides against easy-fifo (see the table)"
    return f"{text}. Long queues and starvation only show in continuous operation, so that is what counts."


def at_loads(results: dict[str, Any], look: Look) -> list[str]:
    """Where the load decides whether a policy waits longer than easy-fifo, in plain words."""
    text = []
    for name in dict.fromkeys((results["best_rule"], *results["trained"])):
        figures = {point["factor"]: point["policies"][name]["to_easy_fifo"] for point in results["loads"]}
        better = [load for load, figure in figures.items() if figure["side"] < 0]
        worse = [load for load, figure in figures.items() if figure["side"] > 0]
        if better and worse:
            waits = ", ".join(f"{percent(figures[load]['mean'])} at {load:g}" for load in sorted(better + worse))
            text.append(
                f"The load decides for {look.labels[name]}: against easy-fifo its mean wait is {waits} times the "
                "recorded arrivals."
            )
    return text


def inside(results: dict[str, Any], look: Look, episode: dict[str, Schedule] | None) -> Section:
    plots = [over_time(results, look)]
    if episode:
        plots.append(gantt(episode, look.labels))
    return Section("What happens on the machine", plots=plots)


def learning(results: dict[str, Any], look: Look) -> Section:
    """What the policies look at, how they learnt, and how much seeds differ."""
    section = Section("The trained policies")
    for name, about in results["trained"].items():
        text = (
            f"{look.labels[name]}: {about['algorithm']}, trained on {Path(about['workload']).name} for "
            f"{about['steps']:,} decisions, objective {about['objective']}, seed {about['seed']}."
        )
        if about["rule"]:
            text += (
                f" Training found nothing better than {about['rule']} on validation, so it does what that rule does."
            )
        if about["objective"] != results["objective"]:
            text += f" It was not trained for the {results['objective']}, which this report is about."
        section.text.append(text)
    if not results["trained"]:
        section.text.append("None in this comparison: all are rules. Name a run's folder in --policies.")
    section.plots += [attention(results, name, look) for name, found in results["plots"]["attention"].items() if found]
    curves = {name: found for name, found in results["plots"]["learning"].items() if found["scalars"]}
    if curves:
        section.plots.append(learning_curves(curves, look))
    section.text += [found["note"] for found in results["plots"]["learning"].values() if found["note"]]
    if results["seeds"]:
        section.tables.append(seeds_table(results, look))
        section.plots.append(performance_profile(results, look))
        section.text.append(
            "Runs that differ only in seed are taken together with rliable (Agarwal et al. 2021): a score is the cost "
            f"of {results['best_rule']} over the policy's in a block, so above 1 is better than that rule. The "
            "interquartile mean (IQM) leaves out the best and the worst quarter of all scores; its intervals come "
            "from rliable's bootstrap over seeds."
        )
    elif len(results["trained"]) == 1:
        section.text.append("One training seed: seeds differ, so give several runs to see by how much.")
    return section


def seeds_table(results: dict[str, Any], look: Look) -> Table:
    metric, rows = metric_of(results), []
    for group, found in results["seeds"]["groups"].items():
        means = ", ".join(number(mean, metric) for mean in found["means"])
        iqm = cell(
            {"mean": found["iqm"], "ci95": found["ci95"] if len(found["runs"]) > 1 else [None, None]},
            lambda x: f"{x:.3f}",
        )
        rows.append([group.split("__")[-1], str(len(found["runs"])), iqm, share(found["improvement"]), means])
    head = [
        "runs",
        "seeds",
        "IQM of the scores",
        f"P(better than {results['best_rule']})",
        f"mean {METRIC_NAMES[metric]} of each",
    ]
    return Table("Training seeds together", head, rows)


def provenance(results: dict[str, Any], look: Look) -> Section:
    made = results["made"]
    rows: list[list[Any]] = [["command", made["command"]], ["git commit", made["commit"]]]
    if made["trace_sha256"]:
        rows.append(["SHA-256 of the trace", made["trace_sha256"]])
    rows += [
        ["SHA-256 of the jobs replayed", made["jobs_sha256"]],
        ["seed of windows and bootstrap", f"{made['seed']}; {made['resamples']:,} resamples"],
        ["versions", ", ".join(f"{name} {version}" for name, version in made["versions"].items())],
        ["machine, date", f"{made['machine']}, {made['date']}"],
        *(
            [f"policy {look.labels[name]}", f"{about['file']}, SHA-256 {about['sha256']}"]
            for name, about in results["trained"].items()
        ),
        *(["left out", line] for line in results["left_out"]),
    ]  # fmt: skip
    text = (
        "The same command on the same jobs gives the same figures. results.json holds all of them, episodes.csv a row "
        "for each policy and episode, plots/ every plot as PNG and SVG."
    )
    return Section("How this was made", [text], tables=[Table("", ["what", "value"], rows)])


# ----------------------------------------------------------------------------------------------------------- the plots
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
        if metric == metric_of(results):
            axis.axvline(results["bound"]["mean"], color=INK, linestyle=":", linewidth=1.2)
        axis.grid(axis="y", visible=False)
        if spread(means):
            axis.set_xscale("log")
        else:
            axis.set_xlim(0)
            axis.locator_params(axis="x", nbins=4)
            axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:,g}k" if x >= 10_000 else f"{x:,g}")
        axis.set_title(METRIC_NAMES[metric] + ", log" * spread(means), loc="left")
    caption = "Means with 95 % intervals. Dotted: the lower bound on the "
    return Plot("metrics", f"{caption}{results['objective']}, which no schedule can pass.", figure)


def spread(values: Any) -> bool:
    """Whether a linear axis would show only the largest."""
    return bool(min(values) > 0 and max(values) > 20 * np.median(values))


def legend(figure: Figure, axis: Axes) -> None:
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
    log_durations(axis, at[0], at[-1])
    legend(figure, axis)
    caption = "How many jobs wait longer than a time. At the lower right is the tail: the few that wait for very long."
    return Plot("waits", caption, figure)


TIMES = {1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", HOUR: "1 h", 6 * HOUR: "6 h", DAY: "1 d", 7 * DAY: "1 w"}


def log_durations(axis: Axes, low: float, high: float) -> None:
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
    scale = log_if_spread(axis, [wait for name in look.shown for wait in found["wait"][name] if wait > 0])
    jobs = [f"{label}\n{jobs:,} jobs" for label, jobs in zip(found["labels"], found["jobs"], strict=True)]
    axis.set_xticks(place, jobs)
    axis.grid(axis="x", visible=False)
    axis.set(xlabel=found["unit"], ylabel=f"mean wait (h{scale})")
    legend(figure, axis)
    return Plot("classes", "Mean wait by the size of the job: who pays for the gain.", figure)


def log_if_spread(axis: Axes, values: list[float]) -> str:
    if not values or not spread(values):
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
    scale = log_if_spread(axis, [p["policies"][name]["wait"]["mean"] for p in results["loads"] for name in look.shown])
    axis.set(xlabel="offered load (work that arrives / capacity)", ylabel=f"mean wait (h{scale})")
    legend(figure, axis)
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
    legend(figure, queue)
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
            log_durations(axis, 0.9 * x.min(), 1.1 * x.max())
    axes[0].set_ylabel("score of the job")
    place = list(results["trained"]).index(name) + 1
    caption = (
        f"What {look.labels[name]} looks at: the score of a job beside the others that could start, against what it "
        "asks for and how long it has waited (mean and quartiles)."
    )
    return Plot(f"attention-{place}", caption, figure)


CURVES = {"eval/improvement": "validation (%)", "charts/episodic_return": "training (%)"}


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
    legend(figure, axis)
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
        axis.plot(results["seeds"]["levels"], found["profile"], color=colour, label=group.split("__")[-1])
        if len(found["runs"]) > 1:
            axis.fill_between(results["seeds"]["levels"], *found["band"], color=colour, alpha=0.2, linewidth=0)
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.set(xlabel=f"score: cost of {results['best_rule']} / cost", ylim=(0, 1.02))
    axis.set_ylabel("share of blocks and seeds above")
    legend(figure, axis)
    caption = "Performance profiles (rliable): higher is better; right of 1 is better than the best rule."
    return Plot("profiles", caption, figure)


# ------------------------------------------------------------------------------------------------- TensorBoard's events
def learning_curve(folder: Path) -> dict[str, Any]:
    """{"scalars": {tag: [[step, value], ...]}, "note": what is missing or None}, as far as the events can be read."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        return {"scalars": {}, "note": f"{folder}: no TensorBoard events, so there is no learning curve."}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    known = [tag for tag in CURVES if tag in events.Tags()["scalars"]]
    scalars = {tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in known}
    cut = [file for file in files if readable_bytes(file) < file.stat().st_size]
    points = max(map(len, scalars.values()), default=0)
    note = f"{cut[0]}: cut short or damaged; {points} points of the learning curve can be read." if cut else None
    return {"scalars": scalars, "note": note}


def readable_bytes(file: Path) -> int:
    """A record is its length (8 bytes), the length's checksum (4), the event, and the event's checksum (4)."""
    return sum(len(event) + 16 for event in RawEventFileLoader(str(file)).Load())


# -------------------------------------------------------------------------------------------------------- the templates
HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root { --ground: #ffffff; --card: #f7f8fa; --ink: #1f2329; --soft: #5f6672; --line: #d9dce1; --accent: #1a73e8;
  --alarm: #b3261e; --alarm-ground: #fdecea; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171c; --card: #1c2027; --ink: #e6e9ee; --soft: #9aa3b0;
  --line: #343a44; --accent: #8ab4f8; --alarm: #f7b4ae; --alarm-ground: #3a1d1b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.2rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .6rem 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
.verdict { font-size: 1.1rem; border-left: 4px solid var(--accent); padding: .2rem 0 .2rem .9rem; margin: .8rem 0; }
p { max-width: 62rem; margin: .5rem 0; }
nav a { color: var(--accent); margin-right: 1rem; white-space: nowrap; }
.warning { background: var(--alarm-ground); color: var(--alarm); padding: .6rem .8rem; border-radius: 8px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1rem;
  margin: 1rem 0; align-items: start; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem; }
figure svg { width: 100%; height: auto; display: block; }
figcaption, caption, .soft { color: var(--soft); font-size: .85rem; text-align: left; }
figcaption { margin-top: .4rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .3rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); }
td:first-child { font-weight: 600; }
td small { color: var(--soft); display: block; font-size: .78rem; }
.made td { text-align: left; white-space: normal; overflow-wrap: anywhere; font-weight: 400; min-width: 9rem; }
.made th { display: none; }
summary { cursor: pointer; color: var(--accent); margin: .6rem 0; }
@media (max-width: 40rem) { body { padding: .8rem; } figure { padding: .4rem; } th, td { padding: .3rem .45rem; }
  td:first-child { white-space: normal; min-width: 6.5rem; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="verdict">{{ verdict }}</p>
<nav>{% for section in sections %}<a href="#s{{ loop.index }}">{{ section.title }}</a> {% endfor %}</nav>
{% macro grid(table) %}
<div class="scroll{{ ' made' if table.head == ['what', 'value'] }}"><table>
{% if table.caption and not table.folded %}<caption>{{ table.caption }}</caption>{% endif %}
<thead><tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}
<td>{% if cell is string %}{{ cell }}{% else %}{{ cell[0] }}<small>{{ cell[1] }}</small>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% for section in sections %}
<section id="s{{ loop.index }}">
<h2>{{ section.title }}</h2>
{% for text in section.text %}<p>{{ text }}</p>
{% endfor %}
{% for text in section.warnings %}<p class="warning"><strong>Warning.</strong> {{ text }}</p>
{% endfor %}
{% for table in section.tables if not table.folded %}{{ grid(table) }}{% endfor %}
{% for text in section.notes %}<p class="soft">{{ text }}</p>
{% endfor %}
{% if section.plots %}<div class="plots">
{% for plot in section.plots %}
<figure role="img" aria-label="{{ plot.caption }}">{{ plot.svg | safe }}
<figcaption>{{ plot.caption }}</figcaption></figure>
{% endfor %}
</div>{% endif %}
{% for table in section.tables if table.folded %}
<details><summary>{{ table.caption }}</summary>{{ grid(table) }}</details>
{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""

MARKDOWN = """# {{ title }}

**{{ verdict }}**
{% macro text_of(cell) %}
{{ (cell if cell is string else cell[0] ~ " (" ~ cell[1] ~ ")") | replace("|", "\\\\|") }}
{%- endmacro %}
{% for section in sections %}

## {{ section.title }}
{% for text in section.text %}

{{ text }}
{% endfor %}
{% for text in section.warnings %}

> **Warning.** {{ text }}
{% endfor %}
{% for table in section.tables %}

{% if table.caption %}
{{ table.caption }}:

{% endif %}
| {{ table.head | join(" | ") }} |
|{{ " --- |" * (table.head | length) }}
{% for row in table.rows %}
| {% for cell in row %}{{ text_of(cell) }} | {% endfor %}

{% endfor %}
{% endfor %}
{% for text in section.notes %}

{{ text }}
{% endfor %}
{% for plot in section.plots %}

![{{ plot.caption }}](plots/{{ plot.name }}.png)
{% endfor %}
{% endfor %}
"""
