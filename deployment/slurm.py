"""Slurm's REST interface (slurmrestd on a unix socket), and its jobs in our terms."""

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from simulator.moment import ClusterState
from workloads.jobs import DAY, Cluster, Jobs

VERSIONS = range(38, 44)  # of Slurm's REST API, v0.0.38 (Slurm 22.05) to v0.0.43 (25.05): what is known of them
FOREVER = 30 * DAY  # seconds, in place of a time limit that is not there
NO_VALUE = 0xFFFFFFFE  # Slurm's NO_VAL and INFINITE, where a version gives them as they are
UNCHANGED = 1900  # Slurm's error number (slurm_errno.h): nothing has changed since then


class SlurmError(Exception):
    """Slurm, or slurmrestd, did not answer, or not in the way that is known."""


class NotUnderstood(SlurmError):
    """There is an answer, and what it says is not known: trying again helps only if somebody is about to mend it."""


class Refused(Exception):
    """Slurm answered and will not change this job: it has started, ended, or been held in the meantime."""


class Slurm:
    """The few requests that are needed, over slurmrestd's unix socket, in a version of its REST API that it speaks."""

    def __init__(self, socket: Path) -> None:
        transport = httpx.HTTPTransport(uds=str(socket))
        self.client = httpx.Client(transport=transport, base_url="http://slurm", timeout=30.0)
        self.seconds = 0.0  # spent waiting for answers
        self.version = 0  # v0.0.VERSION, 0 as long as it is not known
        self.listings = dict.fromkeys(("jobs", "nodes"), "")  # their paths

    def jobs(self, since: float = 0.0) -> list[dict[str, Any]] | None:
        """All jobs that slurmctld knows, or None if nothing has changed since then."""
        return self._list("jobs", since)

    def nodes(self) -> list[dict[str, Any]]:
        return self._list("nodes", 0.0) or []

    def update(self, job_id: int, **properties: int) -> None:
        """Change a pending job (an array's id: all its pending tasks).

        Raises:
            Refused: Slurm does not change this one.
            SlurmError: no answer.
        """
        self._find_version()
        body: dict[str, Any] = dict(properties)
        if self.version > 38 and "priority" in body:
            body["priority"] = {"set": True, "infinite": False, "number": body["priority"]}
        answer = self._answer("POST", f"/slurm/v0.0.{self.version}/job/{job_id}", json=body)
        # Arrays are updated and come back with an error without a number.
        errors = [error for error in answer["errors"] if error.get("error_number")]
        if errors:
            raise Refused(f"{errors[0].get('error')} ({errors[0]['error_number']})")
        results = answer.get("results") or []  # from v0.0.39 on, one for each part of an array
        if results and all(isinstance(result, dict) and result.get("error_code") for result in results):
            raise Refused(f"{results[0].get('error')} ({results[0]['error_code']})")

    def _list(self, what: str, since: float) -> list[dict[str, Any]] | None:
        self._find_version()
        path = self.listings[what]
        answer = self._answer("GET", path, params={"update_time": int(since)} if since else {})
        if answer is None or any(error.get("error_number") == UNCHANGED for error in answer["errors"]):
            return None
        if answer["errors"]:
            raise SlurmError(f"GET {path}: {_first_error(answer)}")
        if not isinstance(answer.get(what), list):
            raise NotUnderstood(f"GET {path}: HTTP 200, {_first_error(answer)}, without a list of {what}")
        # From 23.02 on "not modified" is an empty list and a warning.
        if since and not answer[what] and "No job changes" in str(answer.get("warnings")):
            return None
        return answer[what]

    def _find_version(self) -> None:
        """Ask once which versions are spoken, and take the newest of them that is known.

        Raises:
            NotUnderstood: none of them can be.
        """
        if self.version:
            return
        response = self._request("GET", "/openapi/v3")
        try:
            paths = list(json.loads(response.text)["paths"])
        except (KeyError, TypeError, ValueError):  # without that page: see what is there
            paths = [path for v in VERSIONS if self._request("GET", path := f"/slurm/v0.0.{v}/jobs").status_code != 404]
        spoken = {int(found[1]) for path in paths if (found := re.fullmatch(r"/slurm/v0\.0\.(\d+)/jobs/?", path))}
        known = spoken & set(VERSIONS)
        if not known and not (newer := {version for version in spoken if version > max(VERSIONS)}):
            have = ", ".join(f"v0.0.{version}" for version in sorted(spoken)) or "none"
            raise NotUnderstood(
                f"GET /openapi/v3: HTTP {response.status_code}; this slurmrestd speaks {have} of Slurm's REST API, and "
                f"v0.0.{min(VERSIONS)} (Slurm 22.05) or later is needed; see its flags -s and -d"
            )
        self.version = max(known) if known else min(newer)
        for what in self.listings:  # as it spells them, with or without a slash at the end
            path = f"/slurm/v0.0.{self.version}/{what}"
            self.listings[what] = path + "/" * (path + "/" in paths)

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            began = time.perf_counter()
            response = self.client.request(method, path, **arguments)
            self.seconds += time.perf_counter() - began
            return response
        except httpx.HTTPError as error:
            raise SlurmError(f"{method} {path}: {type(error).__name__} {error}") from None

    def _answer(self, method: str, path: str, **arguments: Any) -> Any:
        """The JSON of an answer, its `errors` a list of objects; None for a listing that is "not modified"."""
        response = self._request(method, path, **arguments)
        if response.status_code == 304 and method == "GET":
            return None
        text = response.content.decode(errors="replace")  # jobs' names are any bytes
        try:
            answer = json.loads(text)
        except ValueError:  # no JSON, as from a slurmrestd that is going down, or has become another one: ask again
            self.version = 0
            raise NotUnderstood(f"{method} {path}: HTTP {response.status_code}, {text.strip()[:80]!r}") from None
        errors = (answer.get("errors") or []) if isinstance(answer, dict) else None
        if not isinstance(errors, list) or not all(isinstance(error, dict) for error in errors):
            problem = f"HTTP {response.status_code}, an answer of another form: {answer!r:.80}"
            raise NotUnderstood(f"{method} {path}: {problem}")
        answer["errors"] = errors
        # A job that is refused is a 500 like a slurmctld that does not answer: only its errors tell them apart.
        if response.status_code != 200 and not (method == "POST" and _is_refusal(answer)):
            kind = SlurmError if errors else NotUnderstood
            raise kind(f"{method} {path}: HTTP {response.status_code}, {_first_error(answer)}")
        return answer


def _first_error(answer: dict[str, Any]) -> str:
    first = (answer["errors"] or [{}])[0]
    told = [str(first[key]) for key in ("description", "error") if first.get(key)]
    return ": ".join(told) or "an answer of another form"


def _is_refusal(answer: dict[str, Any]) -> bool:
    """Slurm's own errors about a job have numbers from 2000 on (slurm_errno.h); those of communication lie below."""
    return any(error.get("error_number") in range(2000, 5000) for error in answer["errors"])


# CONFIGURING: it has its processors, and waits for their nodes to wake up.
RUNNING, PENDING = ("CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED"), ("PENDING",)
FINISHED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
)  # fmt: skip


@dataclass(frozen=True)
class SlurmJob:
    """A job (or a job array's tasks that are still together), pending, running or finished."""

    job_id: int
    state: str
    user: str
    account: str
    name: str
    partition: str
    eligible: float  # since when it could have started: the later of its submission and the end of what it depended on
    start: float  # 0 where it has not
    end: float
    limit: float  # its time limit
    cpus: int
    priority: int = 0
    nice: int = 0
    endless: bool = False  # it has no time limit, and `limit` stands for that
    left_alone: str = ""  # why a pending job is not ordered, "" if it is

    @property
    def wait(self) -> float:
        return self.start - self.eligible

    @property
    def has_ended(self) -> bool:
        """Not all that are FINISHED: the end of a job that its node has lost may be unknown."""
        return self.state in FINISHED and self.end > 0

    @property
    def ran(self) -> bool:
        """Whether it has run to some end; jobs that are cancelled while they wait get equal start and end."""
        return self.has_ended and self.start > 0 and (self.end > self.start or self.state != "CANCELLED")

    @property
    def key(self) -> tuple[int, float]:
        """A job that is requeued runs several times under one id."""
        return self.job_id, self.start


def job_from_rest(record: dict[str, Any]) -> SlurmJob:
    """From an element of `jobs` in an answer of slurmrestd, or of `squeue --json`, of Slurm 22.05 or later."""
    minutes, state = number(record.get("time_limit")), state_of(record["job_state"])
    submitted, eligible = number(record["submit_time"]), number(record.get("eligible_time"))
    if submitted is None:
        raise ValueError("submit_time is not set")
    # Of pending jobs Slurm gives a start that it expects, of running ones an end.
    return SlurmJob(
        job_id=int(record["job_id"]),
        state=state,
        user=record.get("user_name") or str(record.get("user_id", "")),
        account=record.get("account") or "",
        name=record.get("name") or "",
        partition=record.get("partition") or "",
        eligible=max(submitted, eligible or 0.0),
        start=0.0 if state in PENDING else number(record.get("start_time")) or 0.0,
        end=(number(record.get("end_time")) or 0.0) if state in FINISHED else 0.0,
        limit=60.0 * minutes if minutes else FOREVER,
        endless=not minutes,
        cpus=int(number(record.get("cpus")) or 1),
        priority=int(number(record.get("priority")) or 0),
        nice=int(number(record.get("nice")) or 0),
        left_alone=_left_alone(record) if state in PENDING else "",
    )


def job_from_accounting(record: dict[str, Any]) -> SlurmJob:
    """From an element of `jobs` in what `sacct --json` writes, of Slurm 22.05 or later."""
    times, minutes = record["time"], number(record["time"].get("limit"))
    counts = {item["type"]: item["count"] for item in record.get("tres", {}).get("allocated") or ()}
    submitted, eligible = number(times["submission"]), number(times.get("eligible"))
    return SlurmJob(
        job_id=int(record["job_id"]),
        state=state_of(record["state"]["current"]),
        user=record.get("user") or record.get("association", {}).get("user") or "",
        account=record.get("account") or "",
        name=record.get("name") or "",
        partition=record.get("partition") or "",
        eligible=max(submitted or 0.0, eligible or 0.0),
        start=number(times.get("start")) or 0.0,
        end=number(times.get("end")) or 0.0,
        limit=60.0 * minutes if minutes else FOREVER,
        endless=not minutes,
        cpus=int(counts.get("cpu") or number(record.get("required", {}).get("CPUs")) or 0),
    )


def number(value: Any) -> float | None:
    """What 22.05 gives as a number or null, and later versions as {"set", "infinite", "number"}: None where there is
    none, and where there is no end to it.

    Raises:
        ValueError, TypeError: it is something else.
    """
    if isinstance(value, dict):
        known = value.get("set", True) and not value.get("infinite")
        value = value["number"] if known else None
    if value is None:
        return None
    value = float(value)
    return None if value >= NO_VALUE else value


def state_of(states: Any) -> str:
    """A job's state, of a name or (from 23.11 on) of a list of a base state and flags."""
    if isinstance(states, str):
        return states.partition(" ")[0].upper()  # CANCELLED by 1000
    names = [str(name).upper() for name in states]
    if not names:
        raise ValueError("no state")
    # A job that is completing still has its processors, one that is configuring already.
    first = [name for name in ("COMPLETING", "CONFIGURING") if name in names]
    known = [name for name in names if name in (*PENDING, *RUNNING, *FINISHED)]
    return (first + known + names)[0]


def _left_alone(record: dict[str, Any]) -> str:
    reason = record.get("state_reason") or ""
    if number(record.get("priority")) == 0 or record.get("hold") is True:
        return "held"
    if "unfulfilled" in (record.get("dependency") or "") or reason.startswith("Dependency"):
        return "dependency"
    return "begin time" if reason == "BeginTime" else ""


def processors_in_use(nodes: Iterable[dict[str, Any]], partition: str | None, asked: str = "nodes") -> int:
    """CPUs of the nodes that take jobs, and those still taken on nodes that do not any more; `asked`: for messages.

    Raises:
        NotUnderstood: a node is not as expected.
    """
    try:
        ours = [node for node in nodes if partition is None or partition in node.get("partitions", ())]
        return sum(map(_processors_of, ours))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NotUnderstood(f"GET {asked}: HTTP 200, a node that is not as expected ({error!r})") from None


def _processors_of(node: dict[str, Any]) -> int:
    """22.05 has a state and flags beside it, later versions both in one list, and in capital letters."""
    state = node.get("state") or ()
    words = {word.lower() for word in ([state] if isinstance(state, str) else state)}
    words |= {flag.lower() for flag in node.get("state_flags", ())}
    if words & {"powered_down", "powering_down", "powering_up"}:  # to save power: Slurm wakes it up for jobs
        words.discard("not_responding")
    works = words & {"idle", "mixed", "allocated"} and not words & {
        "drain", "fail", "not_responding", "maintenance", "reserved", "reboot_requested", "reboot_issued",
    }  # fmt: skip
    return int(number(node.get("cpus" if works else "alloc_cpus")) or 0)


def jobs_of(records: Sequence[SlurmJob], origin: float = 0.0) -> Jobs:
    """The jobs in arrays, times from `origin` on; what has not ended has its time limit as its run time.

    A job is submitted when it becomes eligible; its executable is known by the job's name.
    """

    def numbered(values: list[str]) -> np.ndarray:
        return np.unique(np.array(values, dtype=str), return_inverse=True)[1].astype(np.int32)

    def column(value: Callable[[SlurmJob], float]) -> np.ndarray:
        return np.array([value(job) for job in records], float)

    return Jobs(
        submit_time=column(lambda job: job.eligible) - origin,
        run_time=column(lambda job: max(job.end - job.start, 1.0) if job.state in FINISHED else job.limit),
        requested_time=column(lambda job: job.limit),
        demand=column(lambda job: job.cpus)[:, None],
        user=numbered([job.user for job in records]),
        group=numbered([job.account for job in records]),
        executable=numbered([job.name for job in records]),
        queue=numbered([job.partition for job in records]),
        wait_time=column(lambda job: max(job.wait, 0.0) if job.start else 0.0),
        job_id=np.array([job.job_id for job in records], np.int64),
    )


def pool(processors: int) -> Cluster:
    """The cluster as policies see it: one node that holds all processors, as an SWF trace's machine."""
    return Cluster(np.array([[float(processors)]]), np.ones(1), ("processors",))


@dataclass(frozen=True)
class Snapshot:
    """What is known of the cluster at one moment."""

    now: float
    processors: int
    pending: list[SlurmJob]  # those that are ordered
    running: list[SlurmJob]
    finished: list[SlurmJob]  # by the time of their end

    def state(self) -> ClusterState:
        """As policies see it: one node that holds all processors. Times start at the eldest job's."""
        records = self.pending + self.running + self.finished
        jobs = jobs_of(records, origin := min((job.eligible for job in records), default=self.now))
        queued, running, finished = np.split(np.arange(len(jobs)), np.cumsum([len(self.pending), len(self.running)]))
        start = np.array([job.start - origin for job in self.running])
        node = np.zeros(len(running), np.int64)
        return ClusterState(
            self.now - origin, pool(self.processors), jobs[queued], jobs[running], start, node, jobs[finished]
        )
