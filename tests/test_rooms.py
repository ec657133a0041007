"""The direction between the rooms of the library, computed from its imports: arrows point down, none in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. A room knows itself and what lies below it; rooms of one floor do not know each other.
FLOORS = (
    ("errors", "commands"),
    ("arrays", "bundle"),
    ("files", "metrics", "noise", "precision", "rates", "workers"),
    ("lora.layout", "diffusion", "plots", "populations", "placement"),
    ("weight_metric", "sight"),
    ("basis",),
    ("codecs", "flow", "lora", "start_network"),
    ("identity", "delta_basis", "evidence"),
    ("space",),
    ("encode_delta", "mixtures"),
    ("spacefile", "edits", "encode", "export", "attributes", "family", "mix"),
    ("inversion", "training"),
    ("imports", "likeness"),
    ("avatars.world", "avatars.places", "avatars.records"),
    ("avatars.stages",),
    ("avatars.build",),
    ("avatars.measure",),
    ("avatars",),
    ("cli",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def modules(package: str) -> dict[str, Path]:
    """Dotted names, without the package's own; a package is known by its name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(package: str) -> dict[str, set[str]]:
    """Which modules each module imports, inside functions and for type checkers included."""
    known = modules(package)
    return {name: set(_imported(name, path, known)) - {name} for name, path in known.items()}


def _imported(name: str, path: Path, known: dict[str, Path]) -> list[str]:
    here = name.split(".") if name else []
    if path.name != "__init__.py":
        here = here[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        if node.level > len(here) + 1:
            continue  # out of the package
        base = here[: len(here) - node.level + 1] + (node.module or "").split(".")
        target = ".".join(part for part in base if part)
        for alias in node.names:
            inner = f"{target}.{alias.name}".strip(".")
            found.append(inner if inner in known else target)
    return [module for module in found if module in known]


def room(module: str) -> str:
    """The room of a module: the longest name on the floors that it begins with."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    found = next((name for name in names if name in FLOOR), None)
    assert found, f"w2wpp/{parts[0]} is on no floor; give it one in FLOORS"
    return found


TABLE_OF_CONTENTS = {"", "__main__"}  # of no room
LIBRARY = {
    module: to - TABLE_OF_CONTENTS
    for module, to in arrows("w2wpp").items()
    if module not in TABLE_OF_CONTENTS
}


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return list(e.args[1])
    return []


@pytest.mark.parametrize("package", ["w2wpp", "nodes"])
def test_no_imports_run_in_a_circle(package: str) -> None:
    assert circle(arrows(package)) == []


@pytest.mark.parametrize("module", LIBRARY)
def test_rooms_know_only_what_lies_below_them(module: str) -> None:
    own = room(module)
    up = [
        other
        for other in LIBRARY[module]
        if room(other) != own and FLOOR[room(other)] >= FLOOR[own]
    ]
    assert not up, f"{module} is of the room {own} and imports {up}"


@pytest.mark.parametrize("module, to", arrows("nodes").items())
def test_the_room_that_knows_the_host_knows_no_node(module: str, to: set[str]) -> None:
    host = {m for m in modules("nodes") if m.split(".")[0] == "host"}
    if module in host:
        assert to <= host
    elif module:  # but for the table of contents, which lists them, no node knows another
        assert to <= {"types", "inputs", "bars", "curve", "likeness", "sheet"} | host


def test_the_checks_see_a_circle_and_an_arrow_upwards() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert FLOOR[room("inversion.driver")] < FLOOR[room("cli.main")]
    assert "space" in LIBRARY["spacefile"] and "files.container" in LIBRARY["spacefile"]
