"""The pack as the host finds it, without the host: what may import what, and the files beside the nodes."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pathspec
import pytest

REPO = Path(__file__).resolve().parents[1]
NODES = sorted((REPO / "nodes").rglob("*.py"))
SOURCES = [REPO / "__init__.py", *NODES, *sorted((REPO / "w2wpp").rglob("*.py"))]
WORKFLOWS = sorted((REPO / "example_workflows").glob("*.json"))


def imported(path: Path, *, inside_functions: bool = True) -> set[str]:
    """Top-level names of the absolute imports in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if inside_functions else tree.body
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).split(".")[0])
    return names


def test_the_root_imports_nothing_until_the_host_asks() -> None:
    assert imported(REPO / "__init__.py") == set()
    tree = ast.parse((REPO / "__init__.py").read_text(encoding="utf-8"))
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.name)
def test_only_one_room_knows_the_hosts_internals(path: Path) -> None:
    host = {
        "comfy",
        "comfy_execution",
        "execution",
        "folder_paths",
        "latent_preview",
        "nodes",
        "server",
    }
    assert path.parent.name == "host" or not imported(path) & host


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_sources_are_readable_everywhere_and_install_nothing(path: Path) -> None:
    path.read_text(encoding="utf-8").encode("cp1252")
    assert not imported(path) & {"subprocess", "pip", "requests", "urllib", "pickle"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_links_of_a_workflow_agree_with_its_nodes(path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, output, target, slot, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link
        assert nodes[source]["outputs"][output]["type"] == kind


def packed() -> set[str]:
    """What `comfy node pack` archives: the files of the repository without those that .comfyignore names."""
    lines = [*(REPO / ".gitignore").read_text("utf-8").splitlines(), ".git/"]
    lines += (REPO / ".comfyignore").read_text("utf-8").splitlines()
    ignored = pathspec.GitIgnoreSpec.from_lines(lines)
    found = set()
    for folder, below, names in os.walk(REPO):
        at = Path(folder).relative_to(REPO).as_posix()
        below[:] = [d for d in below if not ignored.match_file(f"{at}/{d}/".removeprefix("./"))]
        found |= {f"{at}/{name}".removeprefix("./") for name in names}
    return {name for name in found if not ignored.match_file(name)}


def test_the_archive_of_the_registry_holds_the_pack_and_no_tests() -> None:
    names = packed()
    assert not [n for n in names if n.startswith(("tests/", ".ci/")) or "heldout" in n]
    assert not [n for n in names if n.startswith("benchmarks/") and not n.endswith(".md")]
    code = {p.relative_to(REPO).as_posix() for p in SOURCES}
    beside = {"requirements.txt", "pyproject.toml", "LICENSE", "README.md", "models/README.md"}
    shipped = {f"models/{n}.safetensors" for n in ("avatars", "avatars-pca", "avatar-base")}
    assert code | beside | shipped <= names
    for folder in ("web/docs", "locales/en", "example_workflows"):
        assert {p.relative_to(REPO).as_posix() for p in (REPO / folder).iterdir()} <= names


def test_the_icon_is_a_square_drawing_of_our_own() -> None:
    icon = re.search(r'^Icon = "(.+)"$', (REPO / "pyproject.toml").read_text("utf-8"), re.M)[1]
    path = REPO / "docs" / "icon.svg"
    assert icon.endswith("/main/" + path.relative_to(REPO).as_posix())
    drawing = ElementTree.parse(path).getroot()
    assert drawing.attrib["width"] == drawing.attrib["height"] == "400"
    assert not [e for e in drawing.iter() if e.tag.endswith(("image", "script"))]


@pytest.mark.parametrize("path", NODES, ids=lambda path: str(path.relative_to(REPO)))
def test_what_a_node_imports_from_the_library_is_there(path: Path) -> None:
    """Without a host a node can't be imported; a name that moved would keep the whole pack from loading."""
    depth = len(path.relative_to(REPO).parts)  # dots that lead to the pack's folder
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.level != depth:
            continue
        module = node.module or ""
        if module.split(".")[0] == "w2wpp":
            found = importlib.import_module(module)
            for alias in node.names:
                has = hasattr(found, alias.name) or importlib.util.find_spec(
                    f"{module}.{alias.name}"
                )
                assert has, f"{path.name} imports {alias.name} from {module}"
