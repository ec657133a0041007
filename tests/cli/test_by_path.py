"""The command line run by its path, as a clone among the host's nodes has to: from any folder, isolated or not."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from w2wpp import commands, save_lora
from w2wpp.cli.main import build_parser
from w2wpp.training.dataset import write_dataset

ROOT = Path(__file__).parents[2]
# Alone, as the embedded Python of a portable build starts (-I), and as its batch files start it (-s).
WAYS = ((), ("-I",), ("-s", "-E"))


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """A clone under a name that no module could have."""
    folder = tmp_path_factory.mktemp("custom nodes") / "w2wpp-1.0 (copy)"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "w2wpp", folder / "w2wpp", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(command, cwd):
    """(exit status, output, errors); no module lies where Python looks, but for the installed ones."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("flags", WAYS, ids=" ".join)
def test_it_runs_from_any_folder(pack, tmp_path, flags):
    command = [sys.executable, *flags, pack / "w2wpp"]
    assert run([*command, "--version"], tmp_path)[0] == 0
    torch.save(torch.zeros(3), tmp_path / "k.pt")
    status, out, err = run([*command, "info", "k.pt"], tmp_path)
    assert (status, out) == (1, "") and err.startswith("w2wpp: k.pt")


def test_what_a_message_names_can_be_pasted(pack, tmp_path, dataset):
    """It names the copy that spoke, wherever that lies and whatever else is installed."""
    write_dataset(
        tmp_path / "data.safetensors", dataset.vectors(), dataset.layout, dataset.identity
    )
    command = [sys.executable, "-I", pack / "w2wpp"]
    status, _, err = run([*command, "train", "data.safetensors", "-o", "space"], tmp_path)
    assert status == 1
    line = shlex.split(re.search(r"run '(.+)' on it first", err)[1])
    assert line == [sys.executable, str(pack / "w2wpp"), "fit-basis"]
    more = ["data.safetensors", "--components", "2", "-o", "basis.safetensors"]
    status, _, err = run([*line, *more], tmp_path)
    assert status == 0 and (tmp_path / "basis.safetensors").is_file(), err


def spoken(path):
    """(line, text) of every string of a source that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, described) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                yield node.lineno, node.value


@pytest.mark.parametrize("room", ["w2wpp", "nodes"])
def test_messages_name_commands_in_the_form_that_works(room):
    """`commands.command` knows where the pack lies; a bare `w2wpp fit-start` runs only where it is installed."""
    (verbs,) = (a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    bare = re.compile(rf"w2wpp ({'|'.join(map(re.escape, verbs))})\b")
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for line, text in spoken(path)
        if path.name != "commands.py" and bare.search(text) and not bare.fullmatch(text)
    ]
    # A whole string is what a file says it was made by.
    assert [line for line in found if "avatars" not in line.split(":")[0]] == []


def test_the_search_for_bare_commands_finds_one(tmp_path):
    (tmp_path / "a.py").write_text('"""w2wpp info"""\nX = f"run w2wpp info {1} first"\n')
    assert [text for _, text in spoken(tmp_path / "a.py")] == ["run w2wpp info ", " first"]


def test_its_processes_find_it_too(pack, tmp_path, dataset):
    for i, w in enumerate(dataset.vectors()[:40]):
        lora = dataset.layout.unpack(w)
        save_lora(lora, tmp_path / "loras" / f"{i}.safetensors", alpha=dataset.layout.alpha)
    (tmp_path / "layout.json").write_text(json.dumps(dataset.layout.to_json()))
    arguments = "dataset loras --layout layout.json --workers 2 --json -o data.safetensors".split()
    status, out, err = run([sys.executable, "-I", pack / "w2wpp", *arguments], tmp_path)
    assert status == 0 and json.loads(out)["rows"] == 40, err


def test_the_script_calls_itself_by_its_name(tmp_path, monkeypatch):
    script = tmp_path / "w2wpp"
    script.write_text("")
    monkeypatch.setattr(sys, "argv", [str(script), "info"])
    assert commands.command("info FILE") == "w2wpp info FILE"


def test_an_extra_is_installed_from_the_checkout_that_speaks(pack, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(pack)!r})\n"
        "from w2wpp.commands import installation; print(installation('avatars'))"
    )
    _, out, _ = run([sys.executable, "-c", code], tmp_path)
    assert shlex.split(out) == [sys.executable, "-m", "pip", "install", f"{pack}[avatars]"]
