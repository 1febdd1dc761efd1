"""Gantt charts as pixels, for TensorBoard, `render` and reports."""

import numpy as np

from simulator.schedule import Schedule
from workloads.jobs import Jobs


def gantt(schedule: Schedule, now: float, queue: Jobs | None = None, rows: int = 256, columns: int = 640) -> np.ndarray:
    """uint8[rows, columns, 3]: a Gantt chart (see `gantt_chart`) of what runs where around `now`, queue at the right.

    A job's colour is its user's. The window of time ends a quarter after `now` (the black line); the part of a job to
    the right of it is what was requested. The bars of the queue tell requested times.
    """
    image = np.full((rows, columns, 3), 255, np.uint8)
    chart = int(columns * 0.8)
    begin = min(schedule.jobs.submit_time[-64:].min(initial=now), now - 1.0)
    end = schedule.start_time + schedule.service_time
    due = schedule.start_time + schedule.jobs.requested_time / schedule.cluster.speed[schedule.node]
    until = np.where(end > now, np.maximum(due, now), end)
    palette = np.random.default_rng(1).integers(60, 230, (64, 3)).astype(np.uint8)
    colours = palette[schedule.jobs.user % 64]
    image[:, :chart] = gantt_chart(schedule, begin, now + (now - begin) / 4, colours, rows, chart, until)
    image[:, int(0.8 * chart)] = 0
    image[:, chart + 2 : chart + 4] = 128
    if queue is not None and len(queue):
        asked = np.log1p(queue.requested_time) / np.log1p(queue.requested_time.max())
        height = max(rows // max(len(queue), 32), 1)
        for k in range(min(len(queue), rows // height)):
            width = max(1, int(asked[k] * (columns - chart - 6)))
            bar = image[k * height : (k + 1) * height - (height > 2), chart + 6 : chart + 6 + width]
            bar[:] = palette[queue.user[k] % 64]
    return image


def gantt_chart(
    schedule: Schedule,
    begin: float,
    end: float,
    colours: np.ndarray,
    rows: int = 256,
    columns: int = 640,
    until: np.ndarray | None = None,
) -> np.ndarray:
    """uint8[rows, columns, 3]: what runs where between two times; time runs to the right, each node is a band of rows.

    A job is a rectangle, in one piece where there is room, whose height is its dominant share of the node.

    Args:
        colours: uint8[N, 3], a colour a job.
        until: float64[N], where the rectangles end, by default where the jobs do.
    """
    image = np.full((rows, columns, 3), 255, np.uint8)
    capacity, nodes = schedule.cluster.capacity, len(schedule.cluster.speed)
    lanes = int(np.clip(capacity.max(), 1, 1024))  # of a node: its processors, if those are what it has
    edge = (np.arange(nodes * lanes + 1) * rows / (nodes * lanes)).astype(int)  # the row at which a lane begins
    share = (schedule.jobs.demand / np.maximum(capacity[schedule.node], 1e-9)).max(1)
    stop = schedule.start_time + schedule.service_time
    left, right = (
        (np.clip((t - begin) / (end - begin), 0, 1) * columns).astype(int)
        for t in (schedule.start_time, stop if until is None else until)
    )
    free_at = np.full((nodes, lanes), -np.inf)
    for i in np.argsort(schedule.start_time, kind="stable"):
        free = np.flatnonzero(free_at[schedule.node[i]] <= schedule.start_time[i])
        need = max(1, round(share[i] * lanes))
        holes = [hole for hole in np.split(free, np.flatnonzero(np.diff(free) > 1) + 1) if len(hole) >= need]
        used = (min(holes, key=len) if holes else free)[:need]
        free_at[schedule.node[i], used] = stop[i]
        if left[i] == columns or right[i] == 0 or len(used) == 0:
            continue
        for piece in np.split(used, np.flatnonzero(np.diff(used) > 1) + 1):
            top, bottom = edge[schedule.node[i] * lanes + piece[[0, -1]] + [0, 1]]
            box = image[top : max(bottom, top + 1), left[i] : max(right[i], left[i] + 2)]
            box[:] = 255
            box[: max(1, box.shape[0] - 1), : max(1, box.shape[1] - 1)] = colours[i]
    return image
