"""Imports point one way: the library knows neither ComfyUI nor the nodes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "execution",
    "folder_paths",
    "nodes",
    "server",
    "latent_preview",
}
LIBRARY = sorted((ROOT / "w2wpp").rglob("*.py"))


def imported(path):
    """(level, module) of every import statement, lazy ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_library_never_imports_the_host_and_itself_only_relatively(path):
    depth = len(path.relative_to(ROOT).parts) - 1
    for level, module in imported(path):
        top = module.split(".")[0]
        assert level or top not in HOST, f"{module} belongs to the host"
        # Run by its path the entry point has no package to be relative to.
        by_path = path == ROOT / "w2wpp" / "__main__.py"
        assert level or top != "w2wpp" or by_path, f"import {module} relatively"
        assert level <= depth, "a relative import leaves the library"


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").rglob("*.py")), ids=lambda p: p.name)
def test_nodes_import_the_pack_only_relatively(path):
    # An absolute `nodes` is the host's module, and only one room may know the host's internals.
    absolute = {"w2wpp"} if path.parent.name == "host" else {"w2wpp", "nodes"}
    for level, module in imported(path):
        assert level or module.split(".")[0] not in absolute, f"import {module} relatively"


def test_library_needs_only_torch_and_numpy():
    """A fresh interpreter imports all of the core without the extras."""
    code = (
        "import sys, w2wpp, w2wpp.training.fit_vae, w2wpp.training.fit_basis\n"
        "extra = {'diffusers', 'matplotlib', 'PIL', 'transformers', 'cma'} & set(sys.modules)\n"
        "assert not extra, extra"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_sources_hold_only_characters_of_cp1252(path):
    path.read_bytes().decode("utf-8").encode("cp1252")
