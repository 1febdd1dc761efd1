"""The service's processes: the flags' check, the socket, workers and their supervision."""

import asyncio
import gc
import ipaddress
import logging
import multiprocessing
import os
import signal
import socket
import time
from contextlib import suppress
from multiprocessing.context import SpawnProcess
from tempfile import TemporaryDirectory

import uvicorn
import uvloop
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deployment.http_api import create_app
from deployment.service import Args, Service, log
from policies import Policy

PAUSE_SECONDS = 1.0  # before a worker that has ended is replaced: it may be one that cannot live
REQUEST_SECONDS = 10.0  # the head of a connection's first request has to arrive within
LEAST = {
    "port": 0, "workers": 1, "deadline_ms": 0.001, "plan_budget_ms": 0.001, "record_bytes": 0, "record_files": 1,
    "max_body_bytes": 1, "max_jobs": 1, "max_nodes": 1,
}  # fmt: skip


def check(args: Args) -> None:
    """
    Raises:
        ValueError: a number is out of its range, or two flags do not go together.
    """
    for name, least in LEAST.items():
        if not (value := getattr(args, name)) >= least:  # nor is NaN
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least {least}")
    if args.port > 65_535:
        raise ValueError(f"--port {args.port}: give at most 65535")
    if args.record and args.record.suffix != ".jsonl":
        raise ValueError(f"--record {args.record}: call it .jsonl, or --workload takes it for an SWF trace")
    if args.workers > 1 and args.record:
        raise ValueError(f"--workers {args.workers}: with --record give 1: it is one file")


def read_token(args: Args) -> bytes | None:
    """
    Raises:
        ValueError: the token is missing where one is needed, or empty.
        OSError: its file cannot be read.
    """
    if args.token_file is None:
        if args.unix_socket is None and not _is_loopback(args.host):
            raise ValueError(f"--host {args.host}: others can reach it; give a --token-file, or use 127.0.0.1")
        return None
    token = args.token_file.read_bytes().strip()
    if not token:
        raise ValueError(f"{args.token_file}: no token; write one: openssl rand -hex 32 > {args.token_file}")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(args: Args) -> socket.socket:
    """
    Raises:
        OSError: the address is taken or not ours.
    """
    if args.unix_socket is None:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        return socket.create_server((args.host, args.port), family=family, backlog=1024)
    if args.unix_socket.is_socket():  # what a killed service left; a living one is left alone
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(args.unix_socket)) == 0:
                raise OSError(f"{args.unix_socket}: another service listens there")
        args.unix_socket.unlink()
    listener, mask = socket.socket(socket.AF_UNIX), os.umask(0o117)
    try:
        listener.bind(str(args.unix_socket))
    finally:
        os.umask(mask)
    listener.listen(1024)
    return listener


class Connection(HttpToolsProtocol):
    """uvicorn's, that does not wait for ever for the first request: who says nothing counts towards its limit too."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self.loop.call_later(REQUEST_SECONDS, self.close_if_silent)

    def close_if_silent(self) -> None:
        if not self.cycle:  # no request yet, or half a one
            self.transport.close()


async def serve(service: Service, app: FastAPI, listener: socket.socket) -> None:
    """Until SIGTERM or Ctrl-C."""
    config = uvicorn.Config(
        app, http=Connection, ws="none", lifespan="off", access_log=False, log_config=None, server_header=False,
        proxy_headers=False, timeout_keep_alive=75, timeout_graceful_shutdown=5, limit_concurrency=1024,
    )  # fmt: skip
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, service.reload_wanted.set)
    watching = asyncio.create_task(service.watch())
    await uvicorn.Server(config).serve(sockets=[listener])
    watching.cancel()


def log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def work(service: Service, token: bytes | None, listener: socket.socket) -> None:
    """Decide until SIGTERM or Ctrl-C."""
    gc.collect()
    gc.freeze()  # or the collector goes through all that was imported, for tens of milliseconds, in some request
    with suppress(KeyboardInterrupt):
        uvloop.run(serve(service, create_app(service, token), listener))


def _work_for(args: Args, policy: Policy, seen: tuple[int, ...], token: bytes | None, listener: socket.socket) -> None:
    """`work` in another process than that of the service whose policy it is."""
    log_to_stderr()
    work(Service(args, policy, seen), token, listener)


def supervise(service: Service, token: bytes | None, listener: socket.socket) -> None:
    """Keep so many workers alive until SIGTERM or Ctrl-C. SIGHUP is for nobody here: they look for another policy
    all the time, and one that has just begun would end.

    The service of this process answers nobody. It keeps the newest policy that works for workers that start when the
    file has been damaged.
    """
    args = service.args
    spawn = multiprocessing.get_context("spawn")
    workers: list[SpawnProcess] = []
    stopping: list[int] = []  # the signals that came
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopping.append(number))
    with TemporaryDirectory(prefix="resourcerl-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        while not stopping:
            for worker in [worker for worker in workers if not worker.is_alive()]:
                log.error("worker %d has ended (%s); another one starts", worker.pid, worker.exitcode)
                workers.remove(worker)
            service.refresh()
            while len(workers) < args.workers and not stopping:
                handed = service.model.policy, service.seen
                worker = spawn.Process(target=_work_for, args=(args, *handed, token, listener))
                worker.start()
                workers.append(worker)
            time.sleep(PAUSE_SECONDS)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
