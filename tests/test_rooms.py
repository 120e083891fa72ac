"""The rooms of the package: arrows go one way, down, lazy imports included."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qectomy"
FLOORS = [  # bottom first; a room imports from floors below its own, never from a neighbour
    {"errors"},
    {"progress", "versions", "modeling"},
    {"models"},
    {"checkpoint", "distributed"},
    {"runs", "record"},
    {"surgery", "calibrate", "text"},
    {"eval"},
    {"report"},
    {"conversion"},
    {"healing"},
    {"api"},
    {"commands"},
    {"cli"},
    {"__main__", "serving"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the rooms that a file imports from, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qectomy"):
            below = node.module.split(".")[1:2]
            rooms |= {*below} if below else {name.name for name in node.names} & FLOOR.keys()
        elif isinstance(node, ast.Import):
            rooms |= {name.name.split(".")[1] for name in node.names if name.name.startswith("qectomy.")}
    return rooms


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_a_room_imports_from_below_alone(room):
    files = [path for path in PACKAGE.rglob("*.py") if room_of(path) == room]
    assert files
    up = {
        f"{path.relative_to(PACKAGE)} -> {other}"
        for path in files
        for other in imported(path) - {room}
        if FLOOR[other] >= FLOOR[room]
    }
    assert not up


def test_every_file_is_in_a_room():
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"} == FLOOR.keys()


def test_an_arrow_that_goes_up_is_seen(tmp_path):
    (tmp_path / "module.py").write_text(
        "def f():\n    from qectomy.eval.reload import check_reload\n    import qectomy.cli\n"
    )
    assert imported(tmp_path / "module.py") == {"eval", "cli"}
