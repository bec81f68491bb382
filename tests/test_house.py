"""The rules of the house: short files and functions, floors, no program that asks for a name."""

import ast
import re
from pathlib import Path

import pytest

import systems

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    *ROOT.glob("*.py"),
    *(x for d in ("util/**", "scripts", "tests") for x in ROOT.glob(f"{d}/*.py")),
]
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
PAPERS = {"gsmn", "gsmn_graphs", "gsmn_data", "pfan", "pfan_data", "chan", "vse"}


def functions(tree: ast.AST):
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    long = [f.name for f in functions(ast.parse(text)) if f.end_lineno - f.lineno >= 60]
    assert not long


def test_the_two_equations_fit_25_lines():
    tree = ast.parse((ROOT / "attention.py").read_text())
    bodies = {f.name: f for f in functions(tree)}
    for name in ("t2i", "i2t"):
        function = bodies[name]
        first = function.body[1].lineno  # behind the docstring
        assert function.end_lineno - first < 25


def imported(path: Path) -> set[str]:
    """The modules of the project's root that a file imports at its head."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name for name in found if (ROOT / f"{name}.py").exists()}


def test_a_file_imports_only_from_the_floors_above_it_in_the_readme():
    """The rows of the README's file map are the floors, in this order."""
    table = (ROOT / "README.md").read_text().partition("## Where things are")[2]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    floors = [re.findall(r"`(\w+)\.py`", row) for row in rows]
    floor = {name: k for k, names in enumerate(floors) for name in names}
    assert floor.keys() == {path.stem for path in ROOT.glob("*.py")}, "the map names all files"
    for path in ROOT.glob("*.py"):
        for name in imported(path):
            assert floor[name] <= floor[path.stem], f"{path.stem} imports {name}"
    for path in ROOT.glob("util/*.py"):
        assert imported(path) <= {"vocab"}, path


def test_no_program_compares_the_name_of_a_system():
    asks = re.compile(r"""\.(model|name)\s*(==|!=|in)\s|["'](gsmn|pfan|pfan_whole|chan|vse)["']""")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("util/*.py"), *ROOT.glob("scripts/*.py")]:
        if path.stem in PAPERS or path.stem == "benchmark_work":  # its table of reference loops
            continue
        lines = [line for line in path.read_text().splitlines() if asks.search(line)]
        assert not lines, f"{path.name}: {lines}"


def test_every_system_is_documented():
    page = (ROOT / "docs" / "models.md").read_text()
    for system in systems.SYSTEMS.values():
        assert f"`{system.name}`" in page
