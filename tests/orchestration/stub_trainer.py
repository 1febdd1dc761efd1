"""Stands in for a trainer where a test is about the loop: the same flags, files, signals and exit codes, no learning.

Its policy.onnx is a chain of checksums over all its steps: where one is left out or done twice, it is another file.
"""

import argparse
import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

STEPS_A_SECOND = float(os.environ.get("STUB_SPEED", "1000"))
EACH = 10  # steps an iteration


def write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def main() -> None:
    flags = argparse.ArgumentParser()
    for name in ("workload", "objective", "run-name", "resume", "weights"):
        flags.add_argument(f"--{name}")
    flags.add_argument("--seed", type=int)
    flags.add_argument("--total-timesteps", type=int)
    flags.add_argument("--checkpoint-seconds", type=float)
    flags.add_argument("--fail")
    args = flags.parse_args()
    if args.fail:
        fail(int(args.fail))
    folder = Path(args.resume or f"runs/{args.run_name}")
    if not args.resume:
        folder.mkdir(parents=True)
        write(folder / "args.json", json.dumps(vars(args)).encode())
    lock = open(folder / ".lock", "w")  # noqa: SIM115 for as long as the process lives
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    args = argparse.Namespace(**json.loads((folder / "args.json").read_text()))
    step, state = 0, hashlib.sha256(f"{args.seed} {Path(args.workload).read_bytes()!r}".encode()).hexdigest()
    if (folder / "checkpoint.pt").exists():
        step, state = json.loads((folder / "checkpoint.pt").read_text())
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    with (folder / "pids").open("a") as pids:
        print(os.getpid(), step, file=pids)
    saved = 0.0
    while step < args.total_timesteps and not stop:
        time.sleep(EACH / STEPS_A_SECOND)
        step, state = step + EACH, hashlib.sha256(f"{step} {state}".encode()).hexdigest()
        if time.monotonic() - saved > min(args.checkpoint_seconds, 0.5):
            write(folder / "checkpoint.pt", json.dumps([step, state]).encode())
            saved = time.monotonic()
        found = {"step": step, "total": args.total_timesteps, "best": -0.1, "decisions_per_second": STEPS_A_SECOND}
        write(folder / "progress.json", json.dumps(found).encode())
    write(folder / "checkpoint.pt", json.dumps([step, state]).encode())
    write(folder / "policy.onnx", policy(state))
    write(folder / "weights.pt", state.encode())
    sys.exit(128 + stop[0] if stop else 0)


def policy(state: str) -> bytes:
    """The state or, if STUB_POLICY names one, a policy.onnx with the state in its metadata: two messages of protobuf,
    one after the other, are one with the fields of both."""
    if "STUB_POLICY" not in os.environ:
        return state.encode()
    entry = b"".join(bytes([tag, len(text)]) + text.encode() for tag, text in ((0x0A, "state"), (0x12, state)))
    return Path(os.environ["STUB_POLICY"]).read_bytes() + bytes([0x72, len(entry)]) + entry


def fail(code: int) -> None:
    print("error: my_cluster.swf: line 7: not a number; mend it", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
