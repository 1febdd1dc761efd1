"""Where things are: what lies at the top, and imports, which only point downwards and never in a circle."""

import ast
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
from places import ROOT

# From the bottom to the top. Those on one floor are apart: they may import what is below, and not each other.
FLOORS = (
    {"workloads"},
    {"simulator"},
    {"scheduler_env"},
    {"policies"},
    {"training"},
    {"fifo_baseline", "tuned_rule"},
    {"ppo_scheduler", "dqn_scheduler"},
    {"rllib_scheduler"},
    {"evaluation"},
    {"benchmark"},
    {"deployment"},
    {"serve", "slurm_agent"},
    {"orchestration"},
    {"training_loop"},
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
BESIDE = ("README.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "requirements*.txt", "pyproject.toml")
BESIDE += (".gitignore", ".ci", "docs", "sweeps", "tests")
Graph = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """The files of the table by the name that an import has for them; a folder's own name is its __init__.py."""
    found = {path.stem: path for path in root.glob("*.py")}
    for folder in (root / name for name in FLOOR if (root / name).is_dir()):
        for path in folder.glob("**/*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(root: Path) -> Graph:
    """What of the project each file imports, wherever in the file. (That a.b runs a/__init__.py first is left out.)"""
    known, graph = modules(root), {}
    for name, path in known.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: 1 - node.level or None] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                of_it = {f"{base}.{alias.name}" for alias in node.names}  # modules, or names in base
                named |= of_it & known.keys()
                if not of_it <= known.keys():
                    named.add(base)
        graph[name] = named & known.keys() - {name}
    return graph


def circle(graph: Graph) -> list[str]:
    """Some modules each of which imports the next, and the last the first; none if there is no circle."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name not in done:
            for other in sorted(graph[name]):
                if found := visit(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def upwards(graph: Graph) -> list[str]:
    """Imports that do not point downwards in the table."""
    rooms = [(name, other, name.split(".")[0], other.split(".")[0]) for name in graph for other in sorted(graph[name])]
    return [f"{name} -> {other}" for name, other, a, b in rooms if a != b and FLOOR[a] <= FLOOR[b]]


def strangers(names: list[str]) -> list[str]:
    """What is at the top without being in the table or beside it."""
    return [
        name
        for name in names
        if name.removesuffix(".py") not in FLOOR and not any(fnmatch(name, pattern) for pattern in BESIDE)
    ]


def test_no_module_imports_itself_by_a_detour() -> None:
    assert circle(imports(ROOT)) == []


def test_imports_point_downwards() -> None:
    graph = imports(ROOT)
    assert sum(map(len, graph.values())) > 100  # it does read them
    assert upwards(graph) == []


def test_nothing_else_lies_at_the_top() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git here, which knows what belongs to the repository")
    assert strangers(sorted({line.split("/")[0] for line in listed.stdout.splitlines()})) == []


# ------------------------------------------------------------------------------------------- that these can fail
def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


SOUND = {
    "workloads/__init__.py": "from workloads.jobs import Jobs\n",
    "workloads/jobs.py": "import numpy as np\n",
    "simulator/rules.py": "import workloads\nfrom workloads import jobs\n",
    "policies.py": "import simulator.rules as rules\n",
    "serve.py": "def main():\n    from policies import load_policy\n",
}


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("simulator/kernels.py", "import numba\n", []),
        ("workloads/jobs.py", "from workloads import load\n", ["workloads", "workloads.jobs"]),
        ("workloads/jobs.py", "from . import load\n", ["workloads", "workloads.jobs"]),
        ("simulator/rules.py", "def late():\n    import policies\n", ["policies", "simulator.rules"]),
        ("workloads/jobs.py", "from simulator.rules import x\n", ["simulator.rules", "workloads", "workloads.jobs"]),
    ],
)
def test_a_circle_is_found(tmp_path: Path, file: str, text: str, found: list[str]) -> None:
    assert circle(imports(tree(tmp_path, SOUND))) == []
    assert sorted(circle(imports(tree(tmp_path, {file: SOUND.get(file, "") + text})))) == found


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("simulator/rules.py", "import numpy\n", []),
        ("workloads/jobs.py", "def late():\n    from policies import x\n", ["workloads.jobs -> policies"]),
        ("simulator/rules.py", "import serve\n", ["simulator.rules -> serve"]),
        ("slurm_agent.py", "from serve import main\n", ["slurm_agent -> serve"]),
    ],
)
def test_an_import_upwards_is_found(tmp_path: Path, file: str, text: str, found: list[str]) -> None:
    assert upwards(imports(tree(tmp_path, SOUND))) == []
    assert upwards(imports(tree(tmp_path, {file: text}))) == found


def test_a_stranger_at_the_top_is_found() -> None:
    assert strangers(["policies.py", "simulator", "requirements-dev.txt", "runs", "helpers.py"]) == [
        "runs",
        "helpers.py",
    ]
