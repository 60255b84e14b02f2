"""Who imports whom: every file's imports are read and held against the table below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FRAME = {"types", "errors", "describe", "adapters", "wrappers"}
# What each room may import of ours, besides itself. Rooms meet in `types`; the upper floors wire them.
# The one exception: compact proves its result by tracing it again with comb.
ROOMS = {
    "types": {"errors", "describe"},
    "describe": {"errors", "types"},  # the latter for its annotations
    "errors": set(),
    "adapters": set(),
    "wrappers": set(),
    "memory": {"errors"},
    "ops": {"kernels", "_native", "errors"},
    "kernels": set(),
    "comb": FRAME,
    "score": FRAME | {"ops", "memory"},
    "schedule": FRAME,
    "prune": FRAME | {"ops"},
    "distill": FRAME | {"ops"},
    "compact": FRAME | {"comb"},
    "losses": {"distill"},
}
STAGES = {"comb", "score", "schedule", "prune", "distill", "compact"}
LOWER = set(ROOMS) | {"_native"}
# Reports format results and compute nothing.
VIEWS = {"report": LOWER - FRAME}


def rooms_imported(path: Path) -> set[str]:
    """Rooms of cpd_fast that a file imports, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full, not relative"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "cpd_fast":
                rooms.add(parts[1] if len(parts) > 1 else "")
            assert parts[0] != "kernels", f"{path}: kernels are imported as cpd_fast.kernels"
    return rooms


def files() -> list[tuple[str, Path]]:
    found = []
    for base, prefix in ((ROOT / "cpd_fast", ""), (ROOT / "kernels", "kernels")):
        for path in sorted(base.rglob("*.py")):
            room = prefix or path.relative_to(base).parts[0].removesuffix(".py")
            found.append((room, path))
    return found


@pytest.mark.parametrize(("room", "path"), files(), ids=lambda v: v if isinstance(v, str) else v.stem)
def test_imports_keep_to_the_table(room, path):
    imported = rooms_imported(path) - {room}
    if room in ROOMS:
        assert imported <= ROOMS[room], f"{path.relative_to(ROOT)} may not import {sorted(imported - ROOMS[room])}"
    elif room in VIEWS:
        assert not imported & VIEWS[room], f"{path.relative_to(ROOT)} may not import {sorted(imported & VIEWS[room])}"


def test_stages_are_where_the_table_says():
    """A renamed room must not slip out of the table."""
    present = {room for room, _ in files()}
    assert present >= STAGES | {"ops", "kernels", "types", "errors"}


def test_the_reader_sees_imports(tmp_path):
    """The oracle itself: nested and aliased imports count."""
    bad = tmp_path / "bad.py"
    bad.write_text("import cpd_fast.prune.masked as m\ndef f():\n    from cpd_fast import compact\n")
    assert rooms_imported(bad) == {"prune", "compact"}
    bad.write_text("import kernels\n")
    with pytest.raises(AssertionError, match="imported as cpd_fast.kernels"):
        rooms_imported(bad)


def test_only_dispatch_touches_kernels():
    for room, path in files():
        if room not in ("kernels", "ops") or path.name == "_dispatch.py":
            continue
        if room == "ops":
            assert not rooms_imported(path) & {"kernels", "_native"}, f"{path}: backends are picked in _dispatch.py"
