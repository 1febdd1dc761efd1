"""What a run shows in TensorBoard and, with --track, in Weights and Biases. docs/ppo.md lists all tags."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from simulator.gantt import gantt
from simulator.schedule import Schedule

if TYPE_CHECKING:  # logs are for rules too, which need no more than this
    from training.validation import Validation

# charts/NAME is the mean of what the environment says of the episodes that ended, in `final_info`
CHARTS = {"episodic_return": "return", "episodic_length": "decisions", "latency": "latency", "wait": "wait"}
CHARTS |= {"bounded_slowdown": "bounded_slowdown", "utilization": "utilization"}
LAYOUT = {  # TensorBoard's Custom Scalars tab: what belongs together is in one chart
    "does it learn": {
        "improvement over the reference, per episode": ["Multiline", ["charts/episodic_return"]],
        "improvement over the best rule, validation": ["Multiline", ["eval/improvement", "eval/best_improvement"]],
    },
    "who waits, validation": {
        "wait (s)": ["Multiline", ["eval/wait", "eval/wait_median", "eval/wait_p95", "eval/wait_p99"]],
        "longest wait (s)": ["Multiline", ["eval/wait_max"]],
    },
}


def start_wandb(folder: Path, config: dict[str, Any], **options: Any) -> None:
    """Begin to track the run in this folder; options: as of `wandb.init`.

    Raises:
        ValueError: nobody is logged in, or W&B cannot be reached. The folder is gone again, if it was new.
    """
    import wandb

    try:
        wandb.init(
            project=config["wandb_project_name"], entity=config["wandb_entity"], config=config, name=folder.name,
            save_code=True, **options,
        )  # fmt: skip
    except wandb.Error as error:
        if {file.name for file in folder.iterdir()} <= {"lock"}:
            shutil.rmtree(folder)
        raise ValueError(f"--track: {error}; run wandb login, or set WANDB_MODE=offline") from error


def end_wandb(validation: Validation, title: str, policy: Path, metadata: dict[str, Any]) -> None:
    """Give W&B the closing table, and the policy with its metadata."""
    import wandb

    rows = [list(row) for row in validation.results(title)]
    wandb.log({"validation": wandb.Table([*validation.columns()], rows)})
    artifact = wandb.Artifact("policy", "model", metadata=metadata)
    artifact.add_file(str(policy))
    wandb.log_artifact(artifact)


def log_flags(writer: SummaryWriter, config: dict[str, Any]) -> None:
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in config.items()))


def log_start(
    writer: SummaryWriter, config: dict[str, Any], validation: Validation, health: dict[str, list[str]]
) -> None:
    """What TensorBoard shows of the run besides its curves; the HParams tab sets the last eval/ values beside it.

    Args:
        health: the algorithm's own charts of losses that tell whether its updates are healthy.
    """
    log_flags(writer, config)
    values = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in config.items()}
    metrics = dict.fromkeys(("eval/best_improvement", "eval/improvement", "eval/cost", "eval/wait_p99"))
    file: Any = writer.file_writer
    for summary in hparams(values, metrics)[:2]:  # the third one ends the session
        file.add_summary(summary)
    charts = {title: ["Multiline", [f"losses/{name}" for name in names]] for title, names in health.items()}
    writer.add_custom_scalars(LAYOUT | {"is the update healthy": charts})
    picture = snapshot(validation.example, validation.moment)
    writer.add_image(f"gantt/{validation.best_rule}", picture, 0, dataformats="HWC")


def log_validation(
    writer: SummaryWriter, validation: Validation, metrics: dict[str, float], schedule: Schedule, step: int
) -> None:
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)
    writer.add_image("gantt/policy", snapshot(schedule, validation.moment), step, dataformats="HWC")
    writer.flush()  # somebody may be waiting for it: TensorBoard, or a sweep that stops bad runs


def log_success(writer: SummaryWriter) -> None:
    """The HParams tab says so."""
    file: Any = writer.file_writer
    file.add_summary(hparams({}, {})[2])


def snapshot(schedule: Schedule, now: float) -> np.ndarray:
    """uint8[H, W, 3]: the Gantt chart of what has started by `now`, and beside it the queue at that time."""
    started = schedule.start_time <= now
    queue = schedule.jobs[~started & (schedule.jobs.submit_time <= now)]
    past = Schedule(schedule.jobs[started], schedule.cluster, schedule.start_time[started], schedule.node[started])
    return gantt(past, now, queue)
