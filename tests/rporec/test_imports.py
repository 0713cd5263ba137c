"""Who may import whom: the floors of the house, and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "vllm", "ray", "transformers", "deepspeed", "sklearn", "matplotlib")

# Ground first; a part imports from its own floor and those below it.
FLOORS = (
    ("rporec", "rporec.config", "rporec.files"),
    ("rporec.data", "rporec.evaluation", "rporec.engine"),
    ("rporec.text", "rporec.run", "rporec.status", "rporec.promotion"),
    ("rporec.models", "rporec.report"),
    ("rporec.rl", "rporec.baselines"),
    (
        "rporec.recipes",
        "rporec.envs",
        "rporec.export",
        "rporec.doctor",
        "rporec.plan",
        "rporec.study",
        "rporec.study_tables",
    ),
    ("actors",),
    ("serve",),
    ("rporec.arguments", "rporec.cli"),
)
# (importing module, imported part) -> why it is so for now; one that is gone must leave the list.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def part_of(module: str) -> str:
    """`rporec.data.samples` -> `rporec.data`; the whole of `actors` and of `serve` is one part."""
    names = module.split(".")
    return ".".join(names[:2]) if names[0] == "rporec" else names[0]


def modules() -> dict[str, Path]:
    found = {}
    for package in ("rporec", "actors", "serve"):
        for path in sorted((ROOT / package).rglob("*.py")):
            names = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


def imported(path: Path) -> set[str]:
    """Absolute names that a file imports anywhere, in functions and for type checking too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the whole name"
            assert node.module is not None
            # `from rporec import config` names a module, `from rporec.config import Config` a thing in one.
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (whole & ALL.keys()) or {node.module}
    return names


ALL = modules()
OURS = {
    module: {n for n in imported(path) if n.split(".")[0] in ("rporec", "actors", "serve")}
    for module, path in ALL.items()
}


@pytest.mark.parametrize("module", ["rporec.config", "rporec.data", "rporec.cli", "rporec.status", "rporec.doctor"])
def test_importing_it_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def test_the_library_knows_no_ray():
    knows = [
        module
        for module, path in ALL.items()
        if module.startswith("rporec")
        for name in imported(path)
        if name.split(".")[0] == "ray"
    ]
    assert knows == []


def test_every_part_has_a_floor():
    homeless = {part_of(module) for module in ALL} - {part for floor in FLOORS for part in floor}
    assert not homeless, f"place them in FLOORS: {sorted(homeless)}"


def test_no_arrow_goes_up():
    floor = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    upward = {
        (module, part_of(name))
        for module, names in OURS.items()
        for name in names
        if floor[part_of(name)] > floor[part_of(module)]
    }
    assert upward == EXCEPTIONS.keys()


def test_the_parts_form_no_circle():
    graph: dict[str, set[str]] = {}
    for module, names in OURS.items():
        parts = {part_of(name) for name in names if (module, part_of(name)) not in EXCEPTIONS}
        graph.setdefault(part_of(module), set()).update(parts - {part_of(module)})
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
