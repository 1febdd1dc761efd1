"""What the service has seen end: for planning, where the states do not say what has finished."""

from collections import deque
from pathlib import Path

import msgspec

from deployment.contract import FinishedJob, Id, RunningJob, State

KEPT_JOBS = 4_096
READ_BACK = 16_000_000  # bytes of the record that a restart looks at


class Recorded(msgspec.Struct, gc=False):
    """A line of the record, as far as it matters here."""

    state: State


RECORDED = msgspec.json.Decoder(Recorded)


class History:
    """The jobs that have ended between one state and the next, at most KEPT_JOBS, in order of their ends."""

    def __init__(self) -> None:
        self.finished: deque[FinishedJob] = deque(maxlen=KEPT_JOBS)
        self.running: dict[Id, tuple[RunningJob, float]] = {}  # each with the speed of its node
        self.now, self.resources = 0.0, 0

    def complete(self, state: State) -> bool:
        """Take note of a state that has been checked, and tell it what has finished if it says nothing of that; whether
        it was told anything.

        A job has ended that ran in the state before and neither runs nor waits any more: half-way between the two. A
        state from before the last one, or with other resources, is of another cluster: all starts anew.
        """
        resources = len(state.nodes[0].capacity)
        if state.now < self.now or resources != self.resources:
            self.running, self.resources = {}, resources
            self.finished.clear()
        present = {job.id for job in state.running} | {job.id for job in state.queued}
        end = 0.5 * (self.now + state.now)
        for job, speed in self.running.values():
            if job.id not in present and end > job.start_time:
                run_time = (end - job.start_time) * speed
                self.finished.append(
                    FinishedJob(
                        demand=job.demand, requested_time=job.requested_time, user=job.user,
                        executable=job.executable, run_time=run_time, id=job.id,
                    )
                )  # fmt: skip
        speeds = {node.name: node.speed for node in state.nodes}
        self.running, self.now = {job.id: (job, speeds[job.node]) for job in state.running}, state.now
        if state.finished or not self.finished:
            return False
        state.finished = list(self.finished)
        return True

    def read_back(self, record: Path) -> None:
        """Go through the end of the record of an earlier service, as far as it is one.

        Raises:
            OSError: the file is there, and cannot be read.
        """
        for line in _last_lines(record):
            try:
                self.complete(RECORDED.decode(line).state)
            except (msgspec.DecodeError, UnicodeDecodeError, KeyError):  # KeyError: a job on a node that is not there
                continue


def _last_lines(record: Path) -> list[bytes]:
    if not record.is_file():  # the first time there is none; a device may have no end
        return []
    with open(record, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - READ_BACK))
        return file.read(READ_BACK).splitlines()
