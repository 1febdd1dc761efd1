"""What docs/*.md list is all there is: arguments, features, flags, and every tag that a run logs."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from learners import events, train
from places import ROOT

from docs.lines import with_lines
from evaluation.held_out import Compare
from evaluation.speed import Speed
from evaluation.sweep import Sweep
from scheduler_env import SchedulerVectorEnv
from simulator import kernels

DOCS = ROOT / "docs"
SCRIPTS = ("ppo", "dqn")


def rows(page: str, key: str, heading: str = "") -> dict[str, str]:
    """The first two cells of the rows of a page's tables whose first cell is a `key`; of the table under a heading."""
    text = (DOCS / page).read_text()
    if heading:
        text = text.split(f"| {heading} |")[1].split("\n\n")[0]
    return dict(re.findall(rf"^\| `({key})` \| `?(.*?)`? \|", text, re.MULTILINE))


def written(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_tag_of_a_run_is_in_the_table_and_the_reverse(name: str, tmp_path: Path) -> None:
    tags = events(train(import_module(f"{name}_scheduler"), tmp_path)).Tags()
    logged = {re.sub(r"^gantt/(?!policy$).*", "gantt/RULE", tag) for tag in (*tags["scalars"], *tags["images"])}
    assert logged == set(rows(f"{name}.md", r"\w+/\w+"))


def test_every_argument_of_the_environment_is_in_the_table_with_its_default() -> None:
    parameters = inspect.signature(SchedulerVectorEnv).parameters
    expected = {name: written(p.default) for name, p in parameters.items() if name != "num_envs"}
    assert rows("environment.md", r"\w+", "argument") == expected


@pytest.mark.parametrize("kind", ["job", "node", "cluster"])
def test_every_feature_is_in_the_table_in_its_place(kind: str) -> None:
    heading = f"of {'the' if kind == 'cluster' else 'a'} {kind}"
    assert tuple(rows("environment.md", r"\w+", heading)) == getattr(kernels, f"{kind.upper()}_FEATURES")


@pytest.mark.parametrize(
    ("page", "classes"),
    [("benchmark.md", [Compare, Speed, Sweep]), ("ppo.md", ["ppo_scheduler"])],  # which dqn.md refers to
)
def test_defaults_are_those_of_the_scripts(page: str, classes: list[type | str]) -> None:
    known: dict[str, set[str]] = {}
    for found in classes:
        for field in fields(import_module(found).Args if isinstance(found, str) else found):
            known.setdefault(f"--{field.name.replace('_', '-')}", set()).add(written(field.default))
    found = rows(page, r"--[\w-]+")
    assert len(found) >= 15
    for flag, default in found.items():
        assert default in known[flag], flag


def test_quotations_are_found_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\ny = 2\nx = 3\n")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    assert with_lines("[a.py:1](../a.py#L1) `y =` end", page) == "[a.py:2](../a.py#L2) `y =` end"
    for code in ("x =", "z ="):
        with pytest.raises(ValueError, match="exactly one"):
            with_lines(f"[a.py:1](../a.py#L1) `{code}`", page)
