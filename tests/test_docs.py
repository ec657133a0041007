"""What the library says of itself: public definitions have words, pages can be made of them, links lead somewhere."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

import w2wpp

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "w2wpp").rglob("*.py"), *(ROOT / "nodes" / "host").rglob("*.py")])
Definition = ast.FunctionDef | ast.ClassDef


@functools.cache
def definitions(path: Path) -> list[tuple[str, Definition]]:
    """Public functions, classes and methods of a file by their names."""

    def inside(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
        for node in body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                yield prefix + node.name, node
                if isinstance(node, ast.ClassDef):
                    yield from inside(node.body, f"{prefix}{node.name}.")

    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = [
        s for node in tree.body for s in (node.body if isinstance(node, ast.Try) else [node])
    ]
    return list(inside(statements, ""))


@functools.cache
def explained(folder: Path) -> set[str]:
    """Methods that some class in a folder documents: others of the same name do what that one says."""
    return {
        name.split(".")[-1]
        for path in folder.glob("*.py")
        for name, node in definitions(path)
        if "." in name and ast.get_docstring(node)
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_public_definition_has_words(path: Path) -> None:
    assert path.name == "__init__.py" or ast.get_docstring(ast.parse(path.read_text("utf-8")))
    shared = explained(path.parent)
    silent = [
        name
        for name, node in definitions(path)
        if not ast.get_docstring(node) and not ("." in name and node.name in shared)
    ]
    assert silent == []


def load(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def api():
    return load("api")


def test_pages_are_made_of_them(api, tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    names = ["w2wpp", "w2wpp.training", "w2wpp.imports", "w2wpp.inversion.objective"]
    assert set(names) <= set(api.modules())
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # of annotations and references that lead nowhere
        api.build(tmp_path, names)
    front = (tmp_path / "w2wpp.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in front for name in w2wpp.__all__)
    assert "MISSING" not in w2wpp.__all__ and (tmp_path / "w2wpp" / "training.html").is_file()


def test_the_page_list_has_every_public_module(api) -> None:
    assert {
        "w2wpp.space",
        "w2wpp.training.fit_vae",
        "w2wpp.imports.w2w",
        "w2wpp.lora.layout",
    } <= set(api.modules())
    assert not [n for n in api.modules() if n.startswith(("w2wpp.cli", "w2wpp.avatars"))]


PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_of_a_page_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)[)#]|src=\"([^\"]+)\"", text)
    for target in (unquote(a or b) for a, b in targets):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def publishing():
    return load("publishing")


METADATA = """
version = "1.2.3"
Repository = "https://github.com/somebody/ComfyUI-people"
PublisherId = "somebody"
Icon = "https://raw.githubusercontent.com/somebody/ComfyUI-people/main/docs/icon.svg"
"""


@pytest.mark.parametrize(
    "before, after, point",
    [
        ("", "", None),
        ('"somebody"', '"w2wpp"', "PublisherId is a placeholder: 'w2wpp'"),
        ('PublisherId = "somebody"\n', "", "PublisherId is a placeholder: ''"),
        ("github.com/somebody", "github.com/other", "Icon lies outside of the repository other/"),
        ("https://github.com", "ftp://github.com", "Repository is no address at GitHub: 'ftp:"),
        ('"1.2.3"', '"1.2"', "version has to be three numbers"),
        ('"1.2.3"', '"1.2.4"', "CHANGELOG.md has no chapter '## 1.2.4'"),
    ],
)
def test_what_is_open_before_publishing_is_said(publishing, before, after, point) -> None:
    points = publishing.open_points(METADATA.replace(before, after), "# Changes\n\n## 1.2.3\n")
    assert points == [] if point is None else points[0].startswith(point)


def test_this_version_has_its_chapter_and_its_placeholders_are_noticed(publishing) -> None:
    points = publishing.open_points(
        (ROOT / "pyproject.toml").read_text("utf-8"), (ROOT / "CHANGELOG.md").read_text("utf-8")
    )
    assert all("placeholder" in point for point in points)
