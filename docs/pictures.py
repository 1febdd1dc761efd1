"""Draws docs/gantt.png, the same jobs on the same machine under FIFO and under a better order; and environment.png.

    python docs/pictures.py                                        # `make docs`
    python docs/pictures.py fifo easy-sjf runs/<run>/policy.onnx   # other policies, or more of them

Time runs to the right, a row is some processors, a rectangle is a job, its colour says how long it waited.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project's files, whatever folder this is called from

from policies import load_policy
from scheduler_env import Schedule, SchedulerVectorEnv
from workloads import load_workload

FIRST, JOBS = 1_000, 40  # forty jobs of the hpc preset that queue up
WIDTH, HEIGHT, LEFT, TOP, GAP = 1_400, 330, 30, 60, 24  # pixels: of a chart and around it
HOUR = 3_600.0
COLOURS, GRID, INK = np.array([(112, 184, 150), (240, 190, 90), (204, 62, 52)]), (228, 228, 228), (40, 40, 40)
TITLES = {"fifo": "FIFO", "easy-fifo": "EASY-FIFO", "easy-sjf": "EASY-SJF (shortest first, with backfilling)"}


def colour(wait: float, longest: float) -> np.ndarray:
    """uint8[3]: green where a job did not wait, red where it waited as long as any."""
    return np.array([np.interp(wait / longest, (0, 0.5, 1), channel) for channel in COLOURS.T]).astype(np.uint8)


def chart(schedule: Schedule, hours: float, longest: float) -> np.ndarray:
    """uint8[HEIGHT, WIDTH, 3]: what runs where in the first hours."""
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    begin = schedule.jobs.submit_time[0]
    image[:, (np.arange(0, hours, 3) / hours * WIDTH).astype(int)] = GRID
    capacity = int(schedule.cluster.capacity[0, 0])
    row = (np.arange(capacity + 1) / capacity * HEIGHT).astype(int)  # of every processor
    free_at = np.full(capacity, -np.inf)
    for i in np.argsort(schedule.start_time, kind="stable"):
        start, need = schedule.start_time[i], int(schedule.jobs.demand[i, 0])
        end = start + schedule.service_time[i]
        free = np.flatnonzero(free_at <= start)
        runs = [run for run in np.split(free, np.flatnonzero(np.diff(free) > 1) + 1) if len(run) >= need]
        lanes = (min(runs, key=len) if runs else free)[:need]  # in one piece where there is room
        free_at[lanes] = end
        left, right = (round((t - begin) / HOUR / hours * WIDTH) for t in (start, end))
        for piece in np.split(lanes, np.flatnonzero(np.diff(lanes) > 1) + 1):
            box = image[row[piece[0]] : row[piece[-1] + 1], left : max(right, left + 2)]
            box[:] = 255
            box[: max(1, box.shape[0] - 1), : max(1, box.shape[1] - 1)] = colour(schedule.wait[i], longest)
    return image


def picture(names: list[str]) -> Image.Image:
    workload = load_workload("hpc", "test", runs=1)
    segment = np.array([[FIRST, FIRST + JOBS]])
    schedules = {name: load_policy(name).schedule(workload, segment)[0] for name in names}
    hours = max(schedule.makespan for schedule in schedules.values()) / HOUR
    longest = max(schedule.wait.max() for schedule in schedules.values())
    height = (TOP + HEIGHT + GAP) * len(names)
    image = Image.new("RGB", (WIDTH + 2 * LEFT, height + 40), "white")
    draw, large, small = ImageDraw.Draw(image), ImageFont.load_default(26), ImageFont.load_default(20)
    for k, (name, schedule) in enumerate(schedules.items()):
        top = k * (TOP + HEIGHT + GAP) + TOP
        image.paste(Image.fromarray(chart(schedule, hours, longest)), (LEFT, top))
        draw.rectangle((LEFT - 1, top - 1, LEFT + WIDTH, top + HEIGHT), outline=INK)
        draw.text((LEFT, top - 12), TITLES.get(name, name), INK, large, anchor="ls")
        figures = f"mean wait {schedule.wait.mean() / HOUR:.1f} h, done after {schedule.makespan / HOUR:.0f} h"
        draw.text((LEFT + WIDTH, top - 12), figures, INK, large, anchor="rs")
    text = f"{JOBS} jobs on {workload.cluster.capacity[0, 0]:.0f} processors; a grid line every three hours"
    draw.text((LEFT, height + 14), text, INK, small, anchor="lm")
    for x in range(300):
        draw.line((LEFT + WIDTH - 350 + x, height + 4, LEFT + WIDTH - 350 + x, height + 24), tuple(colour(x, 300)))
    draw.text((LEFT + WIDTH - 360, height + 14), "waited 0 h", INK, small, anchor="rm")
    draw.text((LEFT + WIDTH, height + 14), f"{longest / HOUR:.0f} h", INK, small, anchor="rm")
    return image


def rendered() -> Image.Image:
    """Five hundred decisions into an episode of the cloud preset."""
    envs = SchedulerVectorEnv(1, "cloud", render_mode="rgb_array")
    envs.reset(seed=1)
    for _ in range(500):
        envs.step(envs.rule_actions())
    return Image.fromarray(envs.render()[0])


if __name__ == "__main__":
    for name, image in (("gantt", picture(sys.argv[1:] or ["fifo", "easy-sjf"])), ("environment", rendered())):
        path = Path(__file__).with_name(f"{name}.png")
        image.quantize(128).save(path, optimize=True)
        print(path)
