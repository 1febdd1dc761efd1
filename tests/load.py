"""Load on a decision service that runs: latency with one client, throughput with several, and what it takes in memory.

    python serve.py --policy runs/RUN/policy.onnx
    python tests/load.py --seconds 60 --clients 16

The states are moments of a simulated cluster under EASY-SJF at which at least one job can start, with as many queued
jobs as asked for. Clients keep their connections, and send a state when the answer to the last one is there.
"""

import asyncio
import json
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httptools
import numpy as np
import tyro
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))
from simulator.replay import simulate
from simulator.schedule import Schedule
from workloads.generated import generate_jobs
from workloads.jobs import Cluster, Workload


@dataclass
class Args:
    host: str = "127.0.0.1"
    port: int = 8000
    jobs: int = 64
    """queued jobs in every state"""
    nodes: int = 16
    """nodes of the cluster"""
    clients: int = 1
    """connections side by side"""
    seconds: float = 10.0
    """how long"""
    requests: int = 10**9
    """or how many, if that comes first"""


def state_at(schedule: Schedule, now: float, history: bool = False) -> dict[str, Any]:
    """What an operator would send at that moment of a schedule, before anything starts."""
    jobs, start, end = schedule.jobs, schedule.start_time, schedule.start_time + schedule.service_time
    nodes = [{"name": f"n{m}", "capacity": row} for m, row in enumerate(schedule.cluster.capacity.tolist())]
    for node, speed in zip(nodes, schedule.cluster.speed.tolist(), strict=True):
        node["speed"] = speed

    def job(i: int) -> dict[str, Any]:
        return {
            "id": int(jobs.job_id[i]), "submit_time": float(jobs.submit_time[i]), "user": int(jobs.user[i]),
            "executable": int(jobs.executable[i]), "requested_time": float(jobs.requested_time[i]),
            "demand": jobs.demand[i].tolist(),
        }  # fmt: skip

    running, finished = np.flatnonzero((start < now) & (end > now)), np.flatnonzero(end <= now)
    finished = finished[np.lexsort((start[finished], end[finished]))] if history else finished[:0]
    return {
        "now": float(now),
        "finished": [
            {k: v for k, v in job(i).items() if k != "submit_time"} | {"run_time": float(jobs.run_time[i])}
            for i in finished
        ],
        "resources": list(schedule.cluster.resources),
        "nodes": nodes,
        "running": [job(i) | {"start_time": float(start[i]), "node": f"n{schedule.node[i]}"} for i in running],
        "queued": [job(i) for i in np.flatnonzero((jobs.submit_time <= now) & (start >= now))],
    }


def busy_states(jobs: int, nodes: int, count: int = 64) -> list[dict[str, Any]]:
    """Moments at which so many jobs are queued, and at least one starts."""
    rng = np.random.default_rng(0)
    cluster = Cluster(np.tile([[32.0, 128.0], [64.0, 256.0]], (nodes, 1))[:nodes], np.ones(nodes), ("cpu", "memory"))
    flavours = [[4, 16], [8, 32], [16, 64], [32, 128]]
    many = generate_jobs(rng, 20 * (jobs + 4 * nodes), cluster, flavours=flavours, load=1.3)
    [schedule] = simulate(Workload("load", cluster, many, np.array([[0, len(many)]]), {}), "easy-sjf")
    now = np.unique(schedule.start_time)
    queued = np.searchsorted(many.submit_time, now, "right") - np.searchsorted(
        np.sort(schedule.start_time), now, "left"
    )
    chosen = now[np.argsort(np.abs(queued - jobs), kind="stable")[:count]]
    return [state_at(schedule, moment) for moment in chosen]


class Client(asyncio.Protocol):
    """One connection that sends the requests in turn, and keeps how long each took in seconds."""

    def __init__(self, requests: list[bytes], until: float, most: int) -> None:
        self.requests, self.until, self.most = requests, until, most
        self.seconds: list[float] = []
        self.errors = 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self._send()

    def _send(self) -> None:
        self.parser, self.sent = httptools.HttpResponseParser(self), time.perf_counter()
        self.transport.write(self.requests[len(self.seconds) % len(self.requests)])

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.sent)
        self.errors += self.parser.get_status_code() != 200
        if now < self.until and len(self.seconds) < self.most:
            self._send()
        else:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.errors += error is not None
        self.done.set_result(None)


def wait_for_service(args: Args) -> None:
    """Until its port is open, for a minute at most."""
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex((args.host, args.port)) == 0:
                return
        time.sleep(0.1)
    sys.exit(f"error: nobody answers at {args.host}:{args.port}; start serve.py")


async def load(args: Args, states: list[dict[str, Any]]) -> tuple[np.ndarray, int, float]:
    """Seconds of every request, how many failed, and how long it took."""
    head = "POST /v1/decisions HTTP/1.1\r\nHost: load\r\nContent-Type: application/json\r\nContent-Length: "
    bodies = [json.dumps(state).encode() for state in states]
    requests = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]
    began, loop = time.perf_counter(), asyncio.get_running_loop()
    clients = []
    for c in range(args.clients):
        mine = requests[c:] + requests[:c]
        connect = lambda: Client(mine, began + args.seconds, -(-args.requests // args.clients))  # noqa: B023, E731
        clients.append((await loop.create_connection(connect, args.host, args.port))[1])
    await asyncio.gather(*(client.done for client in clients))
    return np.concatenate([c.seconds for c in clients]), sum(c.errors for c in clients), time.perf_counter() - began


def main(args: Args) -> None:
    states = busy_states(args.jobs, args.nodes)
    queued, running = (np.array([len(state[part]) for state in states]) for part in ("queued", "running"))
    print(f"{len(states)} states: {queued.mean():.0f} queued, {running.mean():.0f} running jobs, {args.nodes} nodes")
    wait_for_service(args)
    seconds, errors, took = uvloop.run(load(args, states))
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
    print(f"{len(seconds):,} requests, {errors} errors, {len(seconds) / took:,.0f}/s with {args.clients} client(s)")
    print(f"p50 {p50:.2f} ms   p99 {p99:.2f} ms   max {seconds.max() * 1e3:.2f} ms")


if __name__ == "__main__":
    main(tyro.cli(Args))
