"""The house has an order: imports only go back to rooms that come before."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "explaind"
ROOMS = (
    "axes",
    "errors",
    "config",
    "rules",
    "store",
    "record",
    "tasks",
    "replay",
    "kernel",
    "ledger",
    "analysis",
    "report",
    "cli",
    "callbacks",
)
OPTIONAL = {"xarray", "sklearn", "h5py", "obstore", "transformers", "pytorch_lightning"}
FILES = sorted(PACKAGE.rglob("*.py"))
INSIDE = [path for path in FILES if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")]  # the front doors see every room


def name_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def imports(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", INSIDE, ids=name_of)
def test_imports_only_go_to_rooms_that_come_before(path):
    own = ROOMS.index(path.relative_to(PACKAGE).with_suffix("").parts[0])
    rooms = {name.split(".")[1] for name in imports(ast.walk(ast.parse(path.read_text()))) if name.startswith("explaind.")}
    assert all(ROOMS.index(room) <= own for room in rooms), f"{name_of(path)} imports {rooms}"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name != "callbacks"], ids=name_of)
def test_optional_packages_are_not_imported_at_the_top_of_a_file(path):
    assert OPTIONAL.isdisjoint(name.split(".")[0] for name in imports(ast.parse(path.read_text()).body))


def test_importing_the_package_loads_no_optional_package():
    code = "import sys, explaind; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert OPTIONAL.isdisjoint(loaded)
    assert "explaind.kernel.sweep" in loaded


def test_no_file_is_named_for_nothing():
    assert {path.stem for path in FILES}.isdisjoint({"utils", "util", "common", "helpers", "base", "core", "misc"})
