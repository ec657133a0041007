"""The check of photographs against a running server: rehearsed with avatars, and its Stable Diffusion prompt read."""

from __future__ import annotations

import importlib.util
import json
import shutil
from types import ModuleType

import pytest

from w2wpp.likeness import read_entries

from .server import REPO, Host, PromptFailed

PORTRAIT = REPO / "example_workflows" / "avatar_portrait.png"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("photographs", REPO / "benchmarks/photographs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_rehearsal_with_avatars_ends_in_a_table_and_goes_on_where_it_was(
    host: Host, script: ModuleType, tmp_path
) -> None:
    (tmp_path / "in" / "b").mkdir(parents=True)
    for name in ("a.png", "b/1.png", "b/2.png"):
        shutil.copy(PORTRAIT, tmp_path / "in" / name)
    arguments = [
        str(tmp_path / "in"), "--server", host.url, "--avatars", "--space", "avatars.safetensors", "--invert-steps",
        "1", "--paint-steps", "2", "--cfg", "2", "--scenes", "1", "2", "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    args = script.parser().parse_args(arguments)
    entries = read_entries(script.check(args))
    kinds = [(e.person, e.kind) for e in entries]
    assert kinds.count(("b", "photograph")) == 2 and kinds.count(("a", "photograph")) == 1
    assert kinds.count(("a", "painting")) == kinds.count(("b", "painting")) == 2
    assert all(e.confidence == -1 for e in entries if e.kind == "painting")  # nobody taught it
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.png")}
    (tmp_path / "out" / "b-1.png").unlink()
    script.check(args)
    now = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.png")}
    assert {p.name for p in now if now[p] != stamps[p]} == {"b-0.png", "b-1.png"}


def test_its_prompt_for_a_checkpoint_lacks_nothing_but_the_checkpoint(
    host: Host, script: ModuleType, tmp_path
) -> None:
    host_image = script.Server(host.url).upload(PORTRAIT, "x.png")
    arguments = ["in", "--checkpoint", "nothing.safetensors", "--space", "avatars.safetensors"]
    graph, _, saved = script.prompt_of(script.parser().parse_args(arguments), host_image, "x")
    assert len(saved) == 4
    with pytest.raises(PromptFailed) as refused:
        host.run(graph.nodes)
    errors = json.loads(str(refused.value))["node_errors"]
    assert {e["class_type"] for e in errors.values()} == {"CheckpointLoaderSimple"}
    (found,) = errors.values()
    assert [e["type"] for e in found["errors"]] == ["value_not_in_list"]
