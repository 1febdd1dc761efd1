"""The store, in a folder and on a real S3 server: whole or not at all, checksums, races of promotions, outages."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from orchestration_helpers import ENVIRONMENT, S3

from orchestration.config import Reference
from orchestration.store import Conflict, Damaged, Store, deploy


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return Store(str(tmp_path / "store"))
    return Store(request.getfixturevalue("s3_environment").bucket(f"bucket-{time.monotonic_ns()}"))


def with_rounds(store: Store, *numbers: int) -> None:
    for number in numbers:
        store.keep(number, f"policy of {number}".encode())


def test_what_is_put_is_there_and_its_reference_says_what_it_is(store: Store) -> None:
    reference = store.put("rounds/000001/args.json", b"{}")
    assert reference.uri == f"{store.url}/rounds/000001/args.json"
    assert reference.size == 2
    assert store.get(reference) == b"{}"
    assert store.names("rounds/") == ["rounds/000001/args.json"]


def test_a_file_that_is_another_one_is_refused(store: Store) -> None:
    reference = store.put("a", b"one")
    store.put("a", b"two")
    with pytest.raises(Damaged, match="not the file that was put there"):
        store.get(reference)


def test_a_file_that_is_gone_is_named(store: Store) -> None:
    with pytest.raises(Damaged, match=r"nothing\.onnx: gone from the store"):
        store.get(Reference(f"{store.url}/nothing.onnx", "0" * 64, 1))


def test_a_folder_is_put_with_its_folders(store: Store, tmp_path: Path) -> None:
    (tmp_path / "report" / "plots").mkdir(parents=True)
    (tmp_path / "report" / "index.html").write_text("<p>")
    (tmp_path / "report" / "plots" / "a.svg").write_text("<svg>")
    store.put_folder("rounds/000001/report", tmp_path / "report")
    names = ["rounds/000001/report/index.html", "rounds/000001/report/plots/a.svg"]
    assert sorted(store.names("rounds/000001/report/")) == names


def test_rounds_are_counted_on_and_asked_again_they_are_the_same(store: Store) -> None:
    assert [store.begin("loop", 1), store.begin("loop", 2), store.begin("other", 1)] == [1, 2, 3]
    assert [store.begin("loop", 1), store.begin("loop", 2), store.begin("other", 1)] == [1, 2, 3]
    assert store.begin("loop", 3) == 4


def test_two_loops_that_begin_at_once_get_different_rounds(store: Store) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda n: store.begin(f"loop {n}", 1), range(8)))
    assert sorted(found) == list(range(1, 9))


def test_promotions_and_a_rollback(store: Store) -> None:
    with_rounds(store, 1, 2)
    assert store.champion() is None
    assert store.promote(1, "first", expected=0).round == 1
    second = store.promote(2, "better", expected=1)
    assert store.champion() == second
    assert store.get(second.policy) == b"policy of 2"
    assert store.promote(2, "again", expected=1) == second  # a retry
    back = store.rollback("worse in use", expected=2)
    assert (back.round, back.why) == (1, "worse in use")
    assert store.rollback("worse in use", expected=2) == back  # a retry
    with pytest.raises(ValueError, match="no champion before"):
        store.rollback("further")


def test_a_promotion_over_another_champion_than_the_compared_one_is_refused(store: Store) -> None:
    with_rounds(store, 1, 2, 3)
    store.promote(1, "", expected=0)
    store.promote(2, "", expected=1)
    with pytest.raises(Conflict, match="was round 1 and is now round 2"):
        store.promote(3, "", expected=1)
    assert store.champion().round == 2


def test_a_round_without_a_policy_cannot_be_promoted(store: Store) -> None:
    with pytest.raises(ValueError, match="round 7: no policy"):
        store.promote(7, "")
    assert store.champion() is None


def test_of_promotions_at_once_one_wins_and_the_others_hear_of_it(store: Store) -> None:
    with_rounds(store, *range(1, 10))
    store.promote(9, "")

    def attempt(number: int) -> bool:
        try:
            Store(store.url).promote(number, "", expected=9)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(attempt, range(1, 9)))
    assert sum(won) == 1
    assert store.champion().round == won.index(True) + 1


def test_a_champion_that_is_no_champion_is_named(store: Store) -> None:
    store.put("champion.json", b'{"round": 1}')
    with pytest.raises(Damaged, match=r"champion\.json: no champion \('before'\)"):
        store.champion()


def test_the_champion_is_deployed_whole(store: Store, tmp_path: Path) -> None:
    with_rounds(store, 1)
    path = tmp_path / "var" / "policy.onnx"
    deploy(store, store.promote(1, ""), path)
    assert path.read_bytes() == b"policy of 1"
    before = path.stat().st_mtime_ns
    deploy(store, store.champion(), path)
    assert path.stat().st_mtime_ns == before  # nothing to load again


WRITER = """
import sys
from orchestration.store import Store
store, n = Store(sys.argv[1]), 0
while True:
    n += 1
    store.put("large", bytes([n % 256]) * 3_000_000)
    print(n, flush=True)
"""


@pytest.mark.parametrize("after", [0.0, 0.003, 0.006, 0.01, 0.02])
def test_killed_while_it_writes_a_file_is_the_old_or_the_new_one(tmp_path: Path, after: float) -> None:
    store = Store(str(tmp_path))
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, env=ENVIRONMENT, text=True
    )
    writer.stdout.readline()
    time.sleep(after)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    data, _ = store.backend.read("large")
    assert len(data) == 3_000_000
    assert len(set(data)) == 1
    assert store.names("") == ["large"]  # what the kill left is no file of the store


def test_a_store_that_is_away_is_an_error_that_can_be_tried_again(s3_environment: S3) -> None:
    own = S3()
    own.start()
    os.environ["AWS_ENDPOINT_URL"] = own.url
    store = Store(own.bucket("away"))
    store.put("a", b"1")
    own.stop()
    try:
        began = time.monotonic()
        with pytest.raises(Exception) as caught:
            store.put("a", b"2")
        assert not isinstance(caught.value, ValueError | Conflict)
        assert time.monotonic() - began < 60
        assert "secret-of-a-test" not in str(caught.value)
        own.start()
        own.bucket("away")
        store.put("a", b"2")
    finally:
        own.stop()
