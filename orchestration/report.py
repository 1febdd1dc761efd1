"""What is shown of a loop: a point a round in TensorBoard, Prometheus' metrics, a page in the store, W&B."""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from temporalio import activity

from orchestration.config import Figure, Report, Round
from orchestration.store import Store

PREFIX = "resourcerl_loop"


def show(asked: Report, loop: str, folder: Path) -> None:
    """Everywhere; `folder` is the loop's in TensorBoard."""
    log(asked, folder)
    measure(asked, loop)
    with_page = folder / "report"
    write_page(asked, loop, with_page)
    Store(asked.config.store).put_folder("report", with_page)
    if asked.config.track:
        track(asked, loop, folder)


def scalars(found: Round) -> Iterator[tuple[str, float]]:
    """What a round is in figures; percent, seconds, jobs."""
    yield "loop/jobs", float(found.jobs)
    yield "loop/champion_round", float(found.champion)
    yield "loop/promoted", float(found.status == "promoted")
    for name, seconds in found.seconds.items():
        yield f"seconds/{name}", seconds
    if evaluation := found.evaluation:
        for rival, gain in evaluation.gains.items():
            yield from named(f"candidate/to_{rival.replace(' ', '_').replace('-', '_')}", gain)
        yield "candidate/wait_p99_to_easy_fifo", evaluation.p99
        if drift := evaluation.drift:
            yield from named("drift/wait", drift.difference)


def named(name: str, figure: Figure) -> Iterator[tuple[str, float]]:
    yield name, figure.mean
    yield f"{name}_low", figure.low
    yield f"{name}_high", figure.high


def log(asked: Report, folder: Path) -> None:
    from tensorboard.summary import Writer  # PyTorch's would load PyTorch

    writer = Writer(str(folder))
    for name, value in scalars(asked.round):
        writer.add_scalar(name, value, asked.round.number, wall_time=asked.round.ended)
    writer.close()


def measure(asked: Report, loop: str) -> None:
    """On the port of the worker that does it, beside Temporal's own."""
    found, meter = asked.round, activity.metric_meter().with_additional_attributes({"loop": loop})

    def gauge(name: str, value: float, what: str, **labels: str) -> None:
        meter.create_gauge_float(f"{PREFIX}_{name}", what).set(value, labels)

    gauge("round", found.number, "the last round")
    gauge("failures", asked.failures, "rounds that failed since the loop began")
    gauge("jobs", found.jobs, "jobs of the last round's workload")
    gauge("last_round_timestamp_seconds", found.ended, "when the last round ended, Unix time")
    if asked.champion:
        gauge("champion_round", asked.champion.round, "the round of the policy in use")
        gauge("champion_since_timestamp_seconds", asked.champion.since, "since when it is in use, Unix time")
    for name, seconds in found.seconds.items():
        gauge("step_seconds", seconds, "how long a step of the last round took", step=name)
    # As ratios: a metric of Temporal's SDK is never negative.
    if evaluation := found.evaluation:
        for rival, gain in evaluation.gains.items():
            for bound, value in asdict(gain).items():
                what = "the last candidate's cost over a rival's"
                gauge("cost_ratio", 1 + value / 100, what, rival=rival, bound=bound)
        if drift := evaluation.drift:
            for bound, value in asdict(drift.difference).items():
                what = "mean wait recorded under the champion over the simulator's"
                gauge("drift_ratio", 1 + value / 100, what, bound=bound)


def write_page(asked: Report, loop: str, folder: Path) -> None:
    """index.html: what was in use when, against the rules, and what came of every round."""
    import jinja2
    import matplotlib

    from evaluation import report as pages
    from evaluation.plots import STYLE, save

    rounds = asked.rounds
    with matplotlib.rc_context(STYLE):
        plots = [plot for plot in [over_rounds(rounds)] if plot]
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        for plot in plots:
            save(plot, folder / "plots")
    head = ["round", "ended", "came of it", "to champion", "to EASY-FIFO", "to best rule", "p99", "jobs", "why"]
    rows = [
        [str(found.number), when(found.ended), found.status, *gains(found), f"{found.jobs:,}", found.why]
        for found in reversed(rounds)
    ]
    caption = f"{asked.config.objective} of each round's best candidate on held-out jobs, negative is better"
    section = pages.Section("Rounds", tables=[pages.Table(caption, head, rows)], plots=plots)
    section.warnings = [warning for found in rounds[-1:] if (warning := drift_warning(found))]
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(pages.__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    champion = asked.champion
    verdict = (
        f"In use: round {champion.round}, since {when(champion.since)}. {champion.why}"
        if champion
        else "No champion yet."
    )
    page = {"title": f"{loop}: {asked.config.workload}", "verdict": verdict, "sections": [section]}
    (folder / "index.html").write_text(templates.get_template("report.html.jinja").render(page))


def when(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")


def percent(figure: Figure) -> tuple[str, str]:
    return f"{figure.mean:+.1f} %", f"{figure.low:+.1f} … {figure.high:+.1f}"


def gains(found: Round) -> list[str | tuple[str, str]]:
    """To the champion, EASY-FIFO and the best rule, and the tail."""
    if not (evaluation := found.evaluation):
        return ["–"] * 4
    rivals = ("champion", "easy-fifo", "best rule")
    cells = [percent(evaluation.gains[rival]) if rival in evaluation.gains else "–" for rival in rivals]
    return [*cells, f"{evaluation.p99:.2f}"]


def drift_warning(found: Round) -> str:
    """Empty where there is no drift beyond the bound."""
    drift = found.evaluation and found.evaluation.drift
    if not (drift and drift.beyond):
        return ""
    mean, interval = percent(drift.difference)
    return (
        f"{drift.jobs:,} jobs recorded under the champion waited {drift.recorded:,.0f} s on average, where the "
        f"simulator says {drift.predicted:,.0f} s ({mean}, {interval})."
    )


def in_use(found: Round) -> dict[str, Figure]:
    """Of the policy in use after the round: its differences to EASY-FIFO and the best rule in that round."""
    if not found.evaluation:
        return {}
    return found.evaluation.gains if found.status == "promoted" else found.evaluation.standing


def over_rounds(rounds: list[Round]) -> Any:
    """None where there is nothing to show yet."""
    from matplotlib.figure import Figure as Picture
    from matplotlib.ticker import MaxNLocator

    from evaluation.plots import COLOURS, Plot

    shown = [(found, in_use(found)) for found in rounds if "easy-fifo" in in_use(found)]
    if not shown:
        return None
    picture = Picture()
    axis = picture.subplots()
    numbers = [found.number for found, _ in shown]
    for rival, colour in zip(("easy-fifo", "best rule"), COLOURS, strict=False):
        means = [figures[rival].mean for _, figures in shown]
        ends = [
            [abs(getattr(figures[rival], bound) - figures[rival].mean) for _, figures in shown]
            for bound in ("low", "high")
        ]
        axis.errorbar(numbers, means, ends, label=f"to {rival}", color=colour, marker="o", markersize=4, capsize=3)
    for found, _ in shown:
        if found.status == "promoted":
            axis.axvline(found.number, color="0.6", linestyle=":", linewidth=1)
    axis.axhline(0, color="0.6", linewidth=1)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="round (dotted: a promotion)", ylabel="difference in percent")
    axis.legend()
    caption = "The policy in use after each round against EASY-FIFO and the best rule, with 95 % intervals."
    return Plot("rounds", caption, picture)


def track(asked: Report, loop: str, folder: Path) -> None:
    """One run in W&B for the loop, and the round's policy as an artifact with aliases."""
    import wandb

    found, store = asked.round, Store(asked.config.store)
    with wandb.init(project="resourcerl", name=loop, id=loop, resume="allow", dir=str(folder)) as run:
        run.log(dict(scalars(found)), step=found.number)
        if found.evaluation:
            artifact = wandb.Artifact(f"{loop}-policy", "model", metadata={"round": found.number, "why": found.why})
            path = store.fetch(store.round(found.number)[0], folder / "policy.onnx")
            artifact.add_file(str(path), "policy.onnx")
            aliases = ["candidate", *(["champion"] if found.status == "promoted" else [])]
            run.log_artifact(artifact, aliases=aliases)
