"""Independent pieces of work on a Ray cluster, for those to whom one machine is too small: `--ray [ADDRESS]`.

    with ray_map(("10.0.0.1:6379",)) as run:
        for index, result in run(function, first_arguments, second_arguments):
            ...

Ray is imported here and nowhere else. docs/ray.md says how to start a cluster and what has to be on its nodes.
"""

import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

from rich.console import Console

PATIENCE = 60.0  # seconds that a cluster may be without a free core
Run = Callable[..., Iterator[tuple[int, Any]]]


@contextmanager
def ray_map(address: tuple[str, ...]) -> Iterator[Run]:
    """Connect to a cluster, or start one on this machine where no address is given and end it afterwards.

    Yields a function like `map`, which calls a function with an element of each of its iterables. Its results come as
    they are ready, each with its number. An argument that occurs in several calls travels once. Ray repeats the calls
    of a node that is lost. A call has a core of its own.

    Raises:
        ValueError: Ray is not installed, there is no such cluster, it has other versions, or no core is free.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--ray: Ray is not installed here; run: make setup-ray") from None
    if len(address) > 1:
        raise ValueError(f"--ray {' '.join(address)}: give one address, such as 10.0.0.1:6379, or none")
    where = address[0] if address else "local"
    options: dict[str, Any] = {"include_dashboard": False} if where == "local" else {}
    try:
        if address:  # Ray itself tries for minutes
            host, _, port = where.partition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        with redirect_stderr(StringIO()):  # Ray's own words for what is said below in one line
            ray.init(address=where, logging_level="ERROR", log_to_driver=False, **options)
    except Exception as error:  # Ray raises whatever went wrong first, as a plain Exception too
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--ray {where}: {reason}; see docs/ray.md for what a cluster needs") from error
    console = Console(stderr=True)
    try:
        wait_for_a_core(ray, where, console)

        def run(function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[tuple[int, Any]]:
            stored: dict[int, Any] = {}  # an argument by its identity -> its reference in the object store
            remote = ray.remote(num_cpus=1)(function)
            calls = [
                remote.remote(*(stored.setdefault(id(a), a if a is None else ray.put(a)) for a in call))
                for call in zip(*arguments, strict=True)
            ]
            yield from as_they_are_ready(ray, calls, console)

        yield run
    finally:
        ray.shutdown()


def wait_for_a_core(ray: Any, where: str, console: Console) -> None:
    """Raises ValueError: a minute has passed, and no core is free."""
    first = ray.remote(num_cpus=1)(lambda: None).remote()
    began = time.monotonic()
    while not ray.wait([first], timeout=5.0)[0]:
        waited = time.monotonic() - began
        if waited > PATIENCE:
            raise ValueError(f"--ray {where}: no core was free for a minute; see `ray status`, and try again later")
        console.print(f"waiting for a free core of the cluster ({waited:.0f} s)")


def as_they_are_ready(ray: Any, calls: list[Any], console: Console) -> Iterator[tuple[int, Any]]:
    """The results of the calls, each with its number. A line says so where a node is lost."""
    number = {call: index for index, call in enumerate(calls)}
    nodes = alive(ray)
    while number:
        ready, _ = ray.wait(list(number), timeout=1.0)
        if lost := nodes - (now := alive(ray)):
            console.print(f"{len(lost)} of {len(nodes)} nodes of the cluster lost: what ran there is repeated")
        nodes = now
        for call in ready:
            yield number.pop(call), ray.get(call)


def alive(ray: Any) -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
