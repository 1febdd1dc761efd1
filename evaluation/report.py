"""Writes the report of `benchmark.py compare --report`: index.html, report.md, and the plots as PNG and SVG.

    python benchmark.py compare --workload hpc --policies fifo easy-fifo easy-sjf runs/X --report report

Everything that is drawn or printed comes from the results that results.json holds, but for the schedules of one episode
(the Gantt charts). The HTML is one file that needs no network; its plots are SVG.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np

from evaluation.figures import add_figures, shown_policies, write_episodes
from evaluation.held_out import Compare
from evaluation.plots import (
    METRIC_NAMES,
    STYLE,
    Look,
    Plot,
    attention,
    by_size,
    duration,
    gantt,
    group_name,
    learning_curves,
    load_sweep,
    metric_bars,
    over_time,
    performance_profile,
    save,
    waits,
)
from evaluation.replays import Replays, Scenario
from evaluation.statistics import METRICS
from policies import Policy
from simulator.rules import RULES
from simulator.schedule import METRIC, Schedule
from workloads.files import replacing, write_json
from workloads.load import workload_name


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


def write_report(
    folder: Path, args: Compare, results: dict[str, Any], replays: dict[Scenario, Replays], policies: dict[str, Policy]
) -> None:
    """Add to the results what only a report needs, and write the folder: index.html, report.md, plots/*.{png,svg},
    episodes.csv and results.json."""
    add_figures(args, results, replays, policies)
    write_episodes(folder / "episodes.csv", replays, args.objective)
    write_pages(folder, results, _busy_window(args, results, replays))
    write_json(folder / "results.json", results)


def _busy_window(
    args: Compare, results: dict[str, Any], replays: dict[Scenario, Replays]
) -> dict[str, Schedule] | None:
    """A window where there is something to see, under three policies; None: there are no windows."""
    windows = replays.get(Scenario("windows", args.load))
    if windows is None:
        return None
    order = np.argsort(windows.per_block["fifo"][:, METRICS.index("wait")], kind="stable")
    busy = order[int(0.9 * len(order))]
    own = {*results["trained"], *results["planned"]}
    trained = [name for name in shown_policies(results) if name in own]
    drawn = list(dict.fromkeys(["fifo", *trained, results["best_rule"]]))[:3]
    return {name: windows.schedules[name][busy] for name in drawn}


def write_pages(folder: Path, results: dict[str, Any], episode: dict[str, Schedule] | None = None) -> None:
    """Write index.html, report.md and their plots into the folder.

    Args:
        results: what results.json holds.
        episode: schedules of the same jobs, for the Gantt charts.
    """
    look = Look(results, shown_policies(results))
    with matplotlib.rc_context(STYLE):
        sections = [
            _headline(results, look), _payers(results, look), _both_protocols(results, look),
            _inside(results, look, episode), _learning(results, look), _provenance(results, look),
        ]  # fmt: skip
        (folder / "plots").mkdir(exist_ok=True)
        for plot in (plot for section in sections for plot in section.plots):
            save(plot, folder / "plots")
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=lambda name: name == "report.html.jinja",
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    title = f"{workload_name(results['workload'])}: who waits how long"
    page = {"title": title, "verdict": _verdict(results, look), "sections": sections}
    for name, template in (("index.html", "report.html.jinja"), ("report.md", "report.md.jinja")):
        with replacing(folder / name) as temporary:
            temporary.write_text(templates.get_template(template).render(page))


def _number(value: float, metric: str) -> str:
    return f"{value:,.{ {'bounded_slowdown': 2, 'utilization': 3}.get(metric, 0) }f}"


def _cell(figure: dict[str, Any], form: Callable[[float], str], key: str = "mean") -> tuple[str, str] | str:
    """A figure and its interval."""
    if figure[key] is None:
        return "–"
    low, high = figure["ci95"]
    return form(figure[key]) if low is None else (form(figure[key]), f"{form(low)} … {form(high)}")


def _percent(value: float) -> str:
    return f"{value:+,.{0 if abs(value) >= 99.95 else 1}f}\u00a0%".replace("-", "−")


def share(value: float) -> str:
    """Of all: 12 %, 0.3 %."""
    text = f"{100 * value:.{0 if 0.0995 <= value <= 0.9 else 1}f}"
    return f"{text.removesuffix('.0')}\u00a0%"


def _verdict(results: dict[str, Any], look: Look) -> str:
    """The report in a sentence: the best policy that is trained or plans, or where there is none the best rule."""
    metric, best = METRIC[results["objective"]], results["best_rule"]
    mean = {name: figures[metric]["mean"] for name, figures in results["policies"].items()}
    standing = [name for name, about in results["trained"].items() if about["rule"]]
    contenders = [name for name in (*results["trained"], *results["planned"]) if name not in standing]
    winner = min(contenders, key=mean.__getitem__, default=best)
    text = f"{look.labels[winner]} has a mean {results['objective']} of {_with_unit(mean[winner], metric)}"
    for rule, figures in results["against"].items():
        figure = figures[winner][metric]
        if rule == winner or figure["mean"] is None:
            continue
        low, high = figure["ci95"]
        text += f"; to {'the best rule, ' * (rule == best)}{look.labels[rule]}: {_percent(figure['mean'])}"
        if low is not None:
            luck = "" if low * high > 0 else ", which may be luck"
            text += f" (95\u00a0% interval {_percent(low)} … {_percent(high)}{luck})"
    if len(contenders) > 1:
        kind = "policies that are trained or plan" if results["planned"] else "trained policies"
        text += f"; it is the best of {len(contenders)} {kind}, picked on these very jobs"
    if winner == best:
        text += f"; it is the best of the {len(mean)} policies compared, and of all rules"
    if standing:
        stand = "stand for rules" if len(standing) > 1 else "stands for a rule"
        names = ", ".join(look.labels[name] for name in standing)
        text += f"; {names} {stand}: training found nothing better"
    return f"{text}."


def _with_unit(value: float, metric: str) -> str:
    return _number(value, metric) + "\u00a0s" * METRIC_NAMES[metric].endswith("(s)")


def _headline(results: dict[str, Any], look: Look) -> Section:
    metric, rules, bound = METRIC[results["objective"]], list(results["against"]), results["bound"]
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
        row: list[Any] = [look.labels[name], _cell(figures[metric], partial(_number, metric=metric))]
        to = {rule: results["against"][rule][name][metric] for rule in rules}
        row += ["–" if name == rule else _cell(figure, _percent) for rule, figure in to.items()]
        row += ["–" if name == rule else _cell(figure["improvement"], share) for rule, figure in to.items()]
        closed = bound["closed"][name]
        rows.append([*row, "–" if closed is None else f"{100 * closed:.1f}\u00a0%"])
    head = ["policy", f"mean {METRIC_NAMES[metric]}", *(f"to {look.labels[rule]}" for rule in rules)]
    head += [*(f"P(better than {look.labels[rule]})" for rule in rules), "way to the bound"]
    tables = [Table(f"Mean {results['objective']} of a job", head, rows), _all_metrics(results, look)]
    tables += [_relative(results, look, rule) for rule in rules]
    plots = [metric_bars(results, look)] + [load_sweep(results, look)] * (len(results["loads"]) > 1)
    idle = [results["nothing_to_schedule"]] if "nothing_to_schedule" in results else []
    return Section("Headline", [text, *_at_loads(results, look)], idle, tables, _reading(results, look), plots)


def _reading(results: dict[str, Any], look: Look) -> list[str]:
    """How the headline is to be read."""
    metric, best = METRIC[results["objective"]], results["best_rule"]
    blocks = len(results["policies"][best][metric]["per_block"])
    intervals = "One episode, so there are no intervals: these figures may be luck."
    if blocks > 1:
        intervals = (
            f"Intervals (small) are 95 % bootstrap intervals over {blocks} blocks of consecutive jobs, paired: what is "
            "hard about a block cancels in the differences. P is the share of blocks in which the policy is better."
        )
    bound = (
        f"The best rule, {look.labels[best]}, is the best of all {len(RULES)} rules and of those named in --policies, "
        "picked with hindsight, on these very jobs. No schedule whatsoever has a mean "
        f"{results['objective']} below {_with_unit(results['bound']['mean'], metric)}; the last column is the share of "
        "the way from fifo to this lower bound. It is a Lagrangian relaxation (evaluation/lower_bound.py), and need "
        "not be reachable."
    )
    return [intervals, bound]


QUANTILES = {"latency": ["p50"], "wait": ["p50", "p95", "p99", "max"], "bounded_slowdown": ["p50"]}


def _all_metrics(results: dict[str, Any], look: Look) -> Table:
    head, rows = ["policy"], [[label] for label in look.labels.values()]
    for metric, heading in METRIC_NAMES.items():
        head += [heading if metric == "makespan" else f"mean {heading}"]
        head += [f"{ {'p50': 'median', 'max': 'longest'}.get(q, q) } {heading}" for q in QUANTILES.get(metric, [])]
        for row, name in zip(rows, look.labels, strict=True):
            quantiles = [results["quantiles"][name][metric][q] for q in QUANTILES.get(metric, [])]
            row.append(_cell(results["policies"][name][metric], partial(_number, metric=metric)))
            row += [_cell(quantile, partial(_number, metric=metric), "value") for quantile in quantiles]
    return Table("All metrics: means over blocks, quantiles over single jobs", head, rows, folded=True)


def _relative(results: dict[str, Any], look: Look, rule: str) -> Table:
    head = ["policy", *(f"{name.removesuffix(' (s)')}" for name in METRIC_NAMES.values())]
    rows = [
        [look.labels[name], *(_cell(figures[metric], _percent) for metric in METRIC_NAMES)]
        for name, figures in results["against"][rule].items()
        if name != rule
    ]
    return Table(f"Means relative to {look.labels[rule]}", head, rows, folded=True)


def _payers(results: dict[str, Any], look: Look) -> Section:
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
    warnings = [_warning(results, look, name) for name in starving if name in look.shown]
    plots = [waits(results, look), by_size(results, look)]
    return Section("Who pays for the gain", text, warnings, [Table("Who pays", head, rows)], [], plots)


def _warning(results: dict[str, Any], look: Look, name: str) -> str:
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


def _both_protocols(results: dict[str, Any], look: Look) -> Section:
    metric, found = METRIC[results["objective"]], results["protocols"]
    section = Section("The other protocol", [agreement(results, look)])
    if "windows" in found:
        rows = []
        for name in results["policies"]:
            row: list[Any] = [look.labels[name]]
            for protocol in ("continuous", "windows"):
                figures = found[protocol]["policies"][name]
                row += [_cell(figures, partial(_number, metric=metric)), _cell(figures["to_easy_fifo"], _percent)]
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
        text += f"; against easy-fifo, {look.labels[name]} is at {_percent(there)} there and at {_percent(here)} here"
    if more := len(found["change_sides"]) - len(named):
        text += f"; {more} more change sides against easy-fifo (see the table)"
    return f"{text}. Long queues and starvation only show in continuous operation, so that is what counts."


def _at_loads(results: dict[str, Any], look: Look) -> list[str]:
    """Where the load decides whether a policy waits longer than easy-fifo, in plain words."""
    text = []
    for name in dict.fromkeys((results["best_rule"], *results["trained"], *results["planned"])):
        figures = {point["factor"]: point["policies"][name]["to_easy_fifo"] for point in results["loads"]}
        better = [load for load, figure in figures.items() if figure["side"] < 0]
        worse = [load for load, figure in figures.items() if figure["side"] > 0]
        if better and worse:
            waits = ", ".join(f"{_percent(figures[load]['mean'])} at {load:g}" for load in sorted(better + worse))
            text.append(
                f"The load decides for {look.labels[name]}: against easy-fifo its mean wait is {waits} times the "
                "recorded arrivals."
            )
    return text


def _inside(results: dict[str, Any], look: Look, episode: dict[str, Schedule] | None) -> Section:
    plots = [over_time(results, look)]
    if episode:
        plots.append(gantt(episode, look.labels))
    return Section("What happens on the machine", plots=plots)


def _learning(results: dict[str, Any], look: Look) -> Section:
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
        section.text.append("None in this comparison. Name a run's folder in --policies.")
    section.plots += [attention(results, name, look) for name, found in results["plots"]["attention"].items() if found]
    curves = {name: found for name, found in results["plots"]["learning"].items() if found["scalars"]}
    if curves:
        section.plots.append(learning_curves(curves, look))
    section.text += [found["note"] for found in results["plots"]["learning"].values() if found["note"]]
    if results["seeds"]:
        section.tables.append(_seeds_table(results, look))
        section.plots.append(performance_profile(results, look))
        section.text.append(
            "Runs that differ only in seed are taken together with rliable (Agarwal et al. 2021): a score is the cost "
            f"of {look.labels[results['best_rule']]} over the policy's in a block: above 1 is better than that rule. "
            "The interquartile mean (IQM) leaves out the best and the worst quarter of all scores; its intervals come "
            "from rliable's bootstrap over seeds."
        )
    elif len(results["trained"]) == 1:
        section.text.append("One training seed: seeds differ, so give several runs to see by how much.")
    return section


def _seeds_table(results: dict[str, Any], look: Look) -> Table:
    metric, rows = METRIC[results["objective"]], []
    for group, found in results["seeds"]["groups"].items():
        means = ", ".join(_number(mean, metric) for mean in found["means"])
        iqm = _cell(
            {"mean": found["iqm"], "ci95": found["ci95"] if len(found["runs"]) > 1 else [None, None]},
            lambda x: f"{x:.3f}",
        )
        rows.append([group_name(group, found), str(len(found["runs"])), iqm, share(found["improvement"]), means])
    head = [
        "runs",
        "seeds",
        "IQM of the scores",
        f"P(better than {look.labels[results['best_rule']]})",
        f"mean {METRIC_NAMES[metric]} of each",
    ]
    return Table("Training seeds together", head, rows)


def _provenance(results: dict[str, Any], look: Look) -> Section:
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
