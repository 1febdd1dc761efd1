"""Where a loop keeps what it makes: a folder, or an object store (s3://, gs://, az://).

    champion.json                               which round's policy is in use, since when and why, and those before
    rounds/000012/policy.onnx, args.json, results.json, report/     the round's best candidate and its comparison
    rounds/000012/candidates/1/..., workload.npz                    and what it was made from

Files are put whole or not at all. What is read is held to the checksum of its Reference. champion.json changes only if
it is what it was when it was read, so that of two that change it at once one is refused.
"""

import fcntl
import hashlib
import json
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from orchestration.config import Champion, Reference
from workloads.files import replacing

CHAMPION = "champion.json"
BEFORE = 100  # former champions that champion.json remembers


class Conflict(Exception):
    """Somebody else has changed the file since it was read, or made it."""


class Damaged(ValueError):
    """A file in the store is not what was put there. The message is one line: the file, what is wrong, the remedy."""


class Backend(Protocol):
    """Bytes under names. A version is a text that is another one whenever the bytes are; "" where there is no file."""

    def read(self, name: str) -> tuple[bytes, str]:
        """Raises FileNotFoundError."""

    def write(self, name: str, data: bytes, expected: str | None) -> None:
        """Raises Conflict: the version is not the expected one (None: any)."""

    def names(self, prefix: str) -> list[str]:
        """Of the files whose names begin with the prefix, which ends with a slash."""


class Folder:
    """On a file system; several machines may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str) -> tuple[bytes, str]:
        data = (self.path / name).read_bytes()
        return data, hashlib.sha256(data).hexdigest()

    def write(self, name: str, data: bytes, expected: str | None) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as lock:  # kept by nobody who has died
            fcntl.flock(lock, fcntl.LOCK_EX)
            if expected is not None and self._version(name) != expected:
                raise Conflict(f"{path}: changed by somebody else")
            with replacing(path) as temporary:
                temporary.write_bytes(data)

    def _version(self, name: str) -> str:
        try:
            return self.read(name)[1]
        except FileNotFoundError:
            return ""

    def names(self, prefix: str) -> list[str]:
        found = (path for path in (self.path / prefix).rglob("*") if path.is_file() and path.name[0] != ".")
        return [path.relative_to(self.path).as_posix() for path in found]


class Bucket:
    """In an object store. Credentials come from where its own tools look for them: environment, files, the machine."""

    def __init__(self, url: str) -> None:
        import obstore  # here: a loop that keeps its things in a folder does without

        self.obstore = obstore
        # An outage is the activity's to survive: it says that it tries again, and when.
        self.store: Any = obstore.store.from_url(
            url, retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
        )

    def read(self, name: str) -> tuple[bytes, str]:
        found = self.obstore.get(self.store, name)
        return bytes(found.bytes()), found.meta["e_tag"] or ""

    def write(self, name: str, data: bytes, expected: str | None) -> None:
        mode: Any = {None: "overwrite", "": "create"}.get(expected, {"e_tag": expected})
        try:
            self.obstore.put(self.store, name, data, mode=mode, use_multipart=False)
        except (self.obstore.exceptions.AlreadyExistsError, self.obstore.exceptions.PreconditionError):
            raise Conflict(f"{name}: changed by somebody else") from None

    def names(self, prefix: str) -> list[str]:
        return [found["path"] for part in self.obstore.list(self.store, prefix) for found in part]


class Store:
    """Files by name and checksum, and who is the champion."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.backend: Backend = Bucket(self.url) if "://" in url else Folder(Path(url))

    def put(self, name: str, data: bytes) -> Reference:
        """Whole or not at all; it may be there already."""
        self.backend.write(name, data, None)
        return Reference(f"{self.url}/{name}", hashlib.sha256(data).hexdigest(), len(data))

    def put_folder(self, name: str, folder: Path) -> None:
        """All files in it, and in its folders."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def get(self, reference: Reference) -> bytes:
        """
        Raises:
            Damaged: the file is gone or not the one that was put.
        """
        try:
            data, _ = self.backend.read(reference.uri.removeprefix(f"{self.url}/"))
        except FileNotFoundError:
            raise Damaged(
                f"{reference.uri}: gone from the store; put it back from a back-up, or go on without"
            ) from None
        if hashlib.sha256(data).hexdigest() != reference.sha256:
            raise Damaged(f"{reference.uri}: not the file that was put there; put it back from a back-up")
        return data

    def fetch(self, reference: Reference, path: Path) -> Path:
        """Into a file, whole or not at all; see `get`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data = self.get(reference)
        with replacing(path) as temporary:
            temporary.write_bytes(data)
        return path

    def names(self, prefix: str) -> list[str]:
        return self.backend.names(prefix)

    # ------------------------------------------------------------------------------------------------ rounds
    def begin(self, loop: str, sequence: int) -> int:
        """A number for the loop's sequence-th round. No other round has it, and asked again it is the same."""
        taken = sorted({int(name.split("/")[1]) for name in self.names("rounds/") if name.split("/")[1].isdigit()})
        mine = {"loop": loop, "sequence": sequence}
        for number in reversed(taken[-100:]):
            if self._json(f"rounds/{number:06d}/claim.json")[0] == mine:
                return number
        number = taken[-1] + 1 if taken else 1
        while True:
            try:
                self.backend.write(f"rounds/{number:06d}/claim.json", _encoded(mine), "")
            except Conflict:
                number += 1
            else:
                return number

    def keep(self, number: int, policy: bytes, weights: Reference | None = None) -> Reference:
        """The policy of a round, which may be promoted from then on, and the weights that it came with."""
        folder = f"rounds/{number:06d}"
        reference = self.put(f"{folder}/policy.onnx", policy)
        kept = {"policy": asdict(reference), "weights": asdict(weights) if weights else None}
        self.put(f"{folder}/policy.json", _encoded(kept))
        return reference

    def round(self, number: int) -> tuple[Reference, Reference | None]:
        """The policy of a round and its weights.

        Raises:
            ValueError: there is none.
        """
        found, _ = self._json(f"rounds/{number:06d}/policy.json")
        if found is None:
            raise ValueError(f"round {number}: no policy in {self.url}; give a round that was trained to its end")
        return Reference(**found["policy"]), _reference(found["weights"])

    # --------------------------------------------------------------------------------------------- champion
    def champion(self) -> Champion | None:
        """
        Raises:
            Damaged: champion.json is not what was put there.
        """
        found, _ = self._champions()
        return found[0] if found else None

    def promote(self, number: int, why: str, expected: int | None = None) -> Champion:
        """The round's policy is the champion from now on; asked again, nothing changes.

        Args:
            expected: the round of the champion that is to be replaced, 0: none; None: whatever is.

        Raises:
            Conflict: the champion is another one than expected, or somebody changes it at this moment.
            ValueError: the round has no policy.
        """
        champions, version = self._champions()
        if champions and champions[0].round == number:
            return champions[0]
        if expected is not None and expected != (champions[0].round if champions else 0):
            now = champions[0].round if champions else "none"
            raise Conflict(f"the champion was round {expected or 'none'} and is now round {now}")
        policy, weights = self.round(number)
        new = Champion(number, policy, time.time(), why, weights)
        self._write([new, *champions][: BEFORE + 1], version)
        return new

    def rollback(self, why: str, expected: int | None = None) -> Champion:
        """The champion before this one is it again; `expected` as in `promote`: asked again, nothing changes.

        Raises:
            Conflict: somebody changes it at this moment.
            ValueError: there is none before.
        """
        champions, version = self._champions()
        if expected is not None and champions and champions[0].round != expected:
            return champions[0]
        if len(champions) < 2:
            raise ValueError(f"rollback: {self.url} knows no champion before this one; promote a round instead")
        champions = champions[1:]
        champions[0].since, champions[0].why = time.time(), why
        self._write(champions, version)
        return champions[0]

    def _champions(self) -> tuple[list[Champion], str]:
        found, version = self._json(CHAMPION)
        try:
            rows = [found, *found["before"]] if found else []
            fields = ("round", "since", "why")
            return [
                Champion(
                    policy=Reference(**row["policy"]), weights=_reference(row.get("weights")),
                    **{name: row[name] for name in fields},
                )
                for row in rows
            ], version  # fmt: skip
        except (KeyError, TypeError) as error:
            raise Damaged(f"{self.url}/{CHAMPION}: no champion ({error}); put it back from a back-up") from None

    def _write(self, champions: list[Champion], version: str) -> None:
        now, *before = (asdict(champion) for champion in champions)
        self.backend.write(CHAMPION, _encoded(now | {"before": before}), version)

    def _json(self, name: str) -> tuple[Any, str]:
        """What a JSON file says, None where there is none, and its version."""
        try:
            data, version = self.backend.read(name)
        except FileNotFoundError:
            return None, ""
        try:
            return json.loads(data), version
        except ValueError:
            raise Damaged(f"{self.url}/{name}: no JSON; put it back from a back-up") from None


def _reference(found: dict[str, Any] | None) -> Reference | None:
    return Reference(**found) if found else None


def _encoded(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def deploy(store: Store, champion: Champion, path: Path) -> None:
    """Write the champion where serve.py or slurm_agent.py look for it; they take it within a second."""
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == champion.policy.sha256:
        return
    store.fetch(champion.policy, path)
