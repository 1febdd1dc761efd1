"""A small slurmrestd that gives answers recorded from Slurm 22.05.

A real Slurm is in deployment/test_slurm_cluster.py.
"""

import json
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from places import ROOT

from deployment.priorities import (
    Agent,
    Args,
    Metrics,
)
from deployment.slurm import Slurm, SlurmJob
from policies import load_policy

RECORDED = json.loads((ROOT / "tests" / "data" / "slurm_22_05.json").read_text())
JOBS = {record["job_id"]: record for record in RECORDED["jobs"]["jobs"]}
PENDING = next(record for record in JOBS.values() if record["job_state"] == "PENDING" and not record["dependency"])


# Answers as other versions write them: put together by hand, after their documentation and what others have recorded.
FORMS: dict[str, dict[str, Any]] = json.loads((ROOT / "tests" / "data" / "slurm_versions.json").read_text())


def as_in(example: Any, value: Any) -> Any:
    """A plain value in the form of the example: itself, in a list, or as a number that is set."""
    if isinstance(example, dict):
        return {"set": True, "infinite": False, "number": value}
    return [value] if isinstance(example, list) else value


def plain(value: Any) -> Any:
    """The contrary."""
    if isinstance(value, dict):
        return value["number"]
    return value[0] if isinstance(value, list) else value


class FakeSlurm(socketserver.ThreadingUnixStreamServer):
    """slurmrestd and slurmctld: lists jobs and nodes, takes priorities and nice values, remembers them.

    `version` is None, and all is as a real 22.05 has recorded it, or one of FORMS.
    """

    daemon_threads = True  # connections are kept alive

    def __init__(self, path: Path, version: str | None = None) -> None:
        self.form = FORMS[version or "22.05"]
        self.api = f"/slurm/v0.0.{self.form['api']}"
        self.openapi: tuple[int, Any] = 200, self.form["openapi"]
        self.answers = RECORDED if version is None else {"refused: held": self.form["held"], **self.form}
        if version is not None:
            self.answers |= {"refused: ended": self.form["ended"], "array updated": self.form["updated"]}
        named = {job["name"]: job for job in self.form["jobs"]["jobs"]}
        self.pending = PENDING if version is None else named["pending"]
        self.jobs: dict[int, dict[str, Any]] = {}
        self.nodes = self.answers["nodes"]["nodes"]
        self.updates: list[tuple[int, dict[str, int]]] = []
        self.listings: list[int] = []  # the status of each
        self.slurmctld = True
        self.changed = time.time()
        super().__init__(str(path), Answers)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def add(self, *job_ids: int, **fields: Any) -> None:
        now = int(time.time())
        for job_id in job_ids:
            own = {"job_id": job_id, "submit_time": now, "eligible_time": now, "priority": 4294901760 - job_id}
            self.jobs[job_id] = self.pending | self.formed(own | fields)
        self.changed = time.time()

    def formed(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {field: as_in(self.pending.get(field), value) for field, value in fields.items()}

    def change(self, job_id: int, **fields: Any) -> None:
        self.jobs[job_id] = self.jobs[job_id] | self.formed(fields)
        self.changed = time.time()

    def start(self, job_id: int) -> None:
        self.change(job_id, job_state="RUNNING", start_time=int(time.time()), state_reason="None")

    def by_priority(self) -> list[int]:
        pending = [job for job in self.jobs.values() if plain(job["job_state"]) == "PENDING" and plain(job["priority"])]
        return [job["job_id"] for job in sorted(pending, key=lambda job: -plain(job["priority"]))]

    def update(self, job_id: int, properties: dict[str, int]) -> tuple[int, dict[str, Any]]:
        self.updates.append((job_id, properties))
        job = self.jobs.get(job_id)
        if job is None or plain(job["priority"]) == 0 or plain(job["job_state"]) != "PENDING":
            return 500, self.answers["refused: held" if job and not plain(job["priority"]) else "refused: ended"]
        self.change(job_id, **{name: plain(value) for name, value in properties.items()})
        return 200, self.answers["array updated" if job["array_task_string"] else "updated"]


class Answers(BaseHTTPRequestHandler):
    server: FakeSlurm
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        path, _, query = self.path.partition("?")
        what = path.removeprefix(f"{server.api}/").rstrip("/")
        if path == "/openapi/v3":
            self.reply(*server.openapi)
        elif what not in ("jobs", "nodes"):
            self.reply(404, "Unable find requested URL. Please view /openapi/v3 for API reference.")
        elif not server.slurmctld:
            self.reply(500, server.answers["slurmctld down"])
        elif what == "nodes":
            self.reply(200, server.form["nodes"] | {"nodes": server.nodes})
        elif query and int(query.removeprefix("update_time=")) - 1 >= int(server.changed):
            server.listings.append(304)
            self.reply(200 if server.form["unchanged"] else 304, server.form["unchanged"])
        else:
            server.listings.append(200)
            self.reply(200, server.form["jobs"] | {"jobs": list(server.jobs.values())})

    def do_POST(self) -> None:
        properties = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.server.slurmctld:
            self.reply(500, self.server.answers["slurmctld down"])
        else:
            self.reply(*self.server.update(int(self.path.rsplit("/", 1)[1]), properties))

    def reply(self, status: int, answer: Any) -> None:
        """JSON of an object; text as it is."""
        text = answer or "" if isinstance(answer, str | None) else json.dumps(answer, ensure_ascii=False)
        body = text.encode(errors="surrogateescape")  # as slurmrestd: a name is bytes
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: a unix socket's peer has no address."""


def agent_for(slurm: FakeSlurm, **args: Any) -> Agent:
    args = {"mode": "live", "policy": "easy-saf"} | args
    settings = Args(socket=Path(str(slurm.server_address)), **args)
    return Agent(settings, Slurm(settings.socket), load_policy(settings.policy), Metrics(settings.mode))


def slurm_job(
    job_id: int, cpus: int, limit: float, eligible: float = 0.0, start: float = 0.0, end: float = 0.0
) -> SlurmJob:
    state = "COMPLETED" if end else "RUNNING" if start else "PENDING"
    return SlurmJob(job_id, state, "ann", "", "app", "main", eligible, start, end, limit, cpus)


def until(happened: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.02)
