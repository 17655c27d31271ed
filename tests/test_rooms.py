"""A room of the package imports only from rooms above it, as docs/house.md lists them."""

import ast
import re

import pytest
from conftest import ROOT

PACKAGE = ROOT / "csm_nb"
ROOMS = re.findall(r"^\| `(\w+)/` \|", (ROOT / "docs" / "house.md").read_text(encoding="utf-8"), re.M)
FREE = {"ablate", "mini", "serve"}  # programs, which may use all


def list_imports(path):
    """The dotted names below csm_nb that a file imports, also inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write csm_nb.{node.module}, as everywhere else"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("csm_nb.") for name in found if name.startswith("csm_nb.")}


def find_room(name):
    """0 for a root file, else the room's place in the table."""
    room = name.split(".")[0]
    return ROOMS.index(room) + 1 if (PACKAGE / room).is_dir() else 0


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_above_it(path):
    parts = path.relative_to(PACKAGE).parts
    room = parts[0] if len(parts) > 1 else None
    if path.name == "__main__.py" or room in FREE:
        return
    mine = ROOMS.index(room) + 1 if room else 0
    below = {name for name in list_imports(path) if find_room(name) > mine}
    assert not below, f"{'/'.join(parts)} imports {', '.join(sorted(below))}, which lie below it in docs/house.md"


def test_every_room_is_on_the_map_and_says_in_its_docstring_alone_what_it_is_for():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(ROOMS)
    for room in rooms:
        tree = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) and len(tree.body) == 1, f"{room}/__init__.py holds more than a docstring"


def test_the_test_of_the_order_sees_an_import_inside_a_function(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("def f():\n    from csm_nb.runs import folders\n")
    assert list_imports(path) == {"runs.folders"} and find_room("runs.folders") > find_room("text.numbers") > find_room("audio")
