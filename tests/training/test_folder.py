"""Two runs never share a folder."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from places import ROOT

import training.folder
from training.folder import free_folder, lock, named_folder, new_folder


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.folder, "time", SimpleNamespace(time=lambda: 1_700_000_000.5))
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_folder("a/small.swf.gz", "ppo", 3), range(8)))
    behind = ["", *(f"-{number}" for number in range(2, 9))]
    assert sorted(map(str, folders)) == [f"runs/small__ppo__3__1700000000{suffix}" for suffix in behind]
    assert all(folder.is_dir() for folder in folders)


def test_a_name_is_taken_once() -> None:
    free_folder("a").mkdir(parents=True)
    with pytest.raises(ValueError, match="runs/a is there already; go on with it by --resume runs/a, or"):
        free_folder("a")
    assert free_folder("b") == Path("runs/b")


def test_a_name_is_free_again_if_its_run_was_killed_before_its_first_checkpoint() -> None:
    folder = free_folder("a")
    folder.mkdir(parents=True)
    alive = lock(folder)
    (folder / "args.json").write_text("{}")
    with pytest.raises(ValueError, match="runs/a: another process is at work on this run"):
        free_folder("a")
    alive.close()
    assert free_folder("a") == folder
    assert not folder.exists()


@pytest.mark.parametrize("name", ["checkpoint.pt", "progress.json", "weights.pt"])
def test_a_name_is_not_free_if_its_run_came_further(name: str) -> None:
    folder = free_folder("a")
    folder.mkdir(parents=True)
    lock(folder).close()
    (folder / name).write_text("")
    with pytest.raises(ValueError, match="runs/a is there already"):
        free_folder("a")


def test_of_all_that_take_the_same_name_at_once_one_gets_it() -> None:
    def take(_: int) -> str:
        try:
            return str(named_folder("a"))
        except ValueError as error:
            return str(error)[:22]

    with ThreadPoolExecutor(8) as pool:
        said = sorted(pool.map(take, range(8)))
    assert said == ["runs/a", *["runs/a is there already"[:22]] * 7]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a/"])
def test_a_name_is_that_of_a_folder_in_runs(name: str) -> None:
    with pytest.raises(ValueError, match="give a name without folders"):
        free_folder(name)


def test_the_lock_of_a_folder_goes_with_its_process(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from training.folder import lock\n"
    code += "file = lock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another process is at work on this run"):
            lock(tmp_path)
        process.kill()
        process.wait()
        lock(tmp_path).close()
        lock(tmp_path).close()
