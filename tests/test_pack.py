"""The pack as the host finds it, without the host: what may import what, and the files beside the nodes."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pathspec
import pytest

REPO = Path(__file__).resolve().parents[1]
NODES = sorted((REPO / "nodes").rglob("*.py"))
SOURCES = [REPO / "__init__.py", *NODES, *sorted((REPO / "w2wpp").rglob("*.py"))]
WORKFLOWS = sorted((REPO / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((REPO / "subgraphs").glob("*.json"))


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


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_wires_run_left_to_right_and_nothing_overlaps(path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    boxes = {node["id"]: (*node["pos"], *node["size"]) for node in workflow["nodes"]}
    for _, source, _, target, *_ in workflow["links"]:
        left, _, width, _ = boxes[source]
        assert left + width < boxes[target][0], (source, target)
    title = 30  # lies above a node's position
    for (a, (x, y, w, h)), (b, (x2, y2, w2, h2)) in itertools.combinations(boxes.items(), 2):
        apart = x + w < x2 or x2 + w2 < x or y + h < y2 - title or y2 + h2 < y - title
        assert apart, (a, b)


def test_examples_are_numbered_and_titled_by_their_files() -> None:
    """The gallery shows the names as they are, a picture beside each, and the first has to run anywhere."""
    names = [path.stem for path in WORKFLOWS]
    assert all(re.fullmatch(r"\d\d [A-Z][\w ,.-]+", name) for name in names)
    assert [int(name[:2]) for name in names] == list(range(1, len(names) + 1))
    assert all(path.with_suffix(".jpg").is_file() for path in WORKFLOWS)
    assert "Stable Diffusion" not in names[0]
    text = "".join(
        page.read_text("utf-8") for page in (REPO / "README.md", *REPO.glob("docs/*.md"))
    )
    for name in re.findall(r"`(\d\d [A-Z][^`]*)`", " ".join(text.split())):
        assert name in names


def test_an_app_shows_widgets_and_results_that_its_graph_has() -> None:
    apps = [path for path in WORKFLOWS if path.stem.endswith(".app")]
    assert len(apps) == 2
    for path in WORKFLOWS:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        assert workflow["extra"].get("linearMode", False) == (path in apps)
        nodes = {node["id"]: node for node in workflow["nodes"]}
        shown = workflow["extra"].get("linearData", {"inputs": [], "outputs": []})
        assert all(nodes[id]["type"] == "SaveImage" for id in shown["outputs"])
        for id, widget in shown["inputs"]:
            assert widget in [slot["name"] for slot in nodes[id]["inputs"] if "widget" in slot]


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_is_one_node_wired_to_what_is_inside(path: Path) -> None:
    blueprint = json.loads(path.read_text(encoding="utf-8"))
    (outside,), (inside,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert outside["type"] == inside["id"] and inside["name"] == path.stem
    assert inside["category"] == "W2W++" and inside["description"].endswith(".")
    for kind in ("inputs", "outputs"):
        assert [s["name"] for s in outside[kind]] == [s["name"] for s in inside[kind]]
    nodes = {node["id"]: node for node in inside["nodes"]}
    assert all(node["type"].startswith("W2WPP_") for node in nodes.values())
    for link in inside["links"]:
        source, target = nodes.get(link["origin_id"]), nodes.get(link["target_id"])
        from_slot = (source["outputs"] if source else inside["inputs"])[link["origin_slot"]]
        into_slot = (target["inputs"] if target else inside["outputs"])[link["target_slot"]]
        assert from_slot["type"] == into_slot["type"] == link["type"]
        assert link["id"] in (from_slot["links"] if source else from_slot["linkIds"])
        assert link["id"] in ([into_slot["link"]] if target else into_slot["linkIds"])


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
    for folder in ("web/docs", "locales/en", "example_workflows", "subgraphs"):
        files = {p for p in (REPO / folder).rglob("*") if p.is_file()}
        assert {p.relative_to(REPO).as_posix() for p in files} <= names


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


def linted(folder: Path) -> str:
    """What the linter has against the scripts of a folder."""
    linter = Path(sys.executable).with_name("oxlint")
    found = subprocess.run(
        [shutil.which("oxlint") or linter, "--config", REPO / ".oxlintrc.json", folder],
        capture_output=True,
        text=True,
    )
    assert "Finished" in found.stdout, found.stdout + found.stderr  # it ran
    return found.stdout if found.returncode else ""


def test_scripts_are_clean() -> None:
    assert linted(REPO / "web" / "js") == ""


@pytest.mark.parametrize(
    "line, said",
    [
        ("runGrahp();", "no-undef"),
        ('import { left } from "./over.js";', "no-unused-vars"),
        ("const = 1;", "Unexpected token"),
        ("if (document.title == 1) window.stop();", "eqeqeq"),
    ],
)
def test_the_linter_sees_what_is_wrong(tmp_path: Path, line: str, said: str) -> None:
    source = (REPO / "web" / "js" / "family.js").read_text(encoding="utf-8")
    (tmp_path / "family.js").write_text(f"{source}\n{line}\n", encoding="utf-8")
    assert said in linted(tmp_path)
