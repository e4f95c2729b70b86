"""The rooms of `tools`: imports go downwards only, and no bundle or test is imported."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"losses", "layers"}  # of one file
FLOORS = (
    ("commands",),
    ("training", "results", "samples", "shipping"),
    ("data", "weights"),
    ("common", "losses", "layers"),
)


def imported(file: Path) -> set[str]:
    """Modules that a file imports, wherever in it the statement stands."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {f"{node.module}.{a.name}" for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names}


def test_imports_go_downwards():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for file in sorted(ROOT.glob("tools/*/*.py")):
        room = file.parent.name
        for name in imported(file):
            top, *parts = name.split(".")
            assert top not in ("bundles", "scripts", "tests", "benchmarks"), f"{file} imports {name}"
            if top == "tools":
                assert parts[0] == room or floor[parts[0]] > floor[room], f"{file} imports {name}"


def test_every_room_says_what_it_holds_and_is_otherwise_empty():
    for rooms in FLOORS:
        for room in rooms:
            if room not in MODULES:
                (statement,) = ast.parse((ROOT / f"tools/{room}/__init__.py").read_text(encoding="utf-8")).body
                assert isinstance(statement.value, ast.Constant)  # the docstring
    assert {file.stem for file in ROOT.glob("tools/*.py")} == {"__init__", "__main__", *MODULES}
