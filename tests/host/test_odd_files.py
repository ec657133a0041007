"""Whatever lies in the folders: every node is there, and an odd file says what is wrong with it once it is chosen."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import w2wpp

from .graphs import Graph
from .server import PROBE, REPO, Host, PromptFailed, lay_out, serving
from .test_nodes import NAMES

SPACE = REPO / "models" / "avatars.safetensors"
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def with_config(change) -> bytes:
    """The shipped space with another configuration in its header."""
    raw = SPACE.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    config = json.loads(header["__metadata__"]["config"])
    change(config)
    header["__metadata__"]["config"] = json.dumps(config)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def headed(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


# What is in the file, and what choosing it says.
ODD = {
    "dropout": (with_config(lambda c: c["codec"].update(dropout="x")), "dropout"),
    "rank": (with_config(lambda c: c["layout"].update(rank=float("inf"))), "not a finite number"),
    "hidden": (with_config(lambda c: c["codec"].update(hidden=7)), "cannot be read"),
    "provenance": (with_config(lambda c: c.update(provenance=[])), "where it is from"),
    "future": (with_config(lambda c: c["codec"].update(name="vae-2031")), "vae-2031"),
    "empty": (b"", "empty"),
    "page": (b"<!DOCTYPE html><html><body>Log in</body></html>", "a web page"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
        "Git LFS pointer",
    ),
    "deep": (headed(b'{"a":' * 100_000), "nested too deeply|not JSON"),
    "giant": (headed(b" " * 9_000_000 + b"{}"), "without a format of ours"),
    "lying": (struct.pack("<Q", 2**62) + b"{}", "claims a header"),
    "constants": (
        headed(b'{"__metadata__":{"format":"w2wpp.space"},"a":NaN}'),
        "not a finite number",
    ),
    "half": (headed(b'{"__metadata__":{"format":"\\ud800"}}'), "not JSON|surrogates"),
    "number": (headed(b'{"__metadata__":{"format":7}}'), "table of strings"),
    "cut": (SPACE.read_bytes()[:5000], "truncated"),
}


def lay_odd_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, _) in ODD.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    (folder / "folder.safetensors").mkdir()
    (folder / "folder.safetensors" / "inside.safetensors").write_bytes(b"x")
    (folder / ".import-a1b2c3d4").mkdir()
    (folder / ".import-a1b2c3d4" / "draft.safetensors").write_bytes(SPACE.read_bytes())
    (folder / ".w2wpp-0123456789ab.part").write_bytes(b"x")
    (folder / "official" / "V.pt").mkdir(parents=True)
    if os.name != "nt":
        os.mkfifo(folder / "official" / "mean.pt")
        (folder / "official" / "std.pt").symlink_to(folder / "nothing")
        (folder / "official" / "a.png").symlink_to(folder / "official" / "a.png")
        (folder / "dangling.safetensors").symlink_to(folder / "nothing")
        (folder / "circle.safetensors").symlink_to(folder / "circle.safetensors")
        (folder / "up").symlink_to(folder, target_is_directory=True)
        os.mkfifo(folder / "pipe.safetensors")
        (folder / "locked.safetensors").write_bytes(b"x")
        os.chmod(folder / "locked.safetensors", 0)
    (folder / "ümläut 小明.safetensors").write_bytes(b"x")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("odd")
    lay_out(base, PROBE)
    for folder in ("models/w2wpp", "models/loras", "input", "output/w2wpp"):
        lay_odd_files(base / folder)
    with serving(base) as running:
        yield running


def choices(host: Host, node: str, name: str) -> list[str]:
    kind, options = host.json(f"/object_info/{node}")[node]["input"]["required"][name]
    return options["options"] if kind == "COMBO" else kind


def test_every_node_is_there(odd: Host) -> None:
    info = odd.json("/object_info")
    assert {name for name in info if name.startswith("W2WPP_")} >= set(NAMES)
    assert "IMPORT FAILED" not in odd.log()
    assert "avatars.safetensors" in choices(odd, "W2WPP_LoadSpace", "space")
    assert "beard" in choices(odd, "W2WPP_EditIdentity", "attribute")


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_listed_and_says_why(odd: Host, name: str) -> None:
    assert f"{name}.safetensors" in choices(odd, "W2WPP_LoadSpace", "space")
    graph = Graph()
    opened = graph.add("W2WPP_LoadSpace", space=f"{name}.safetensors")
    graph.add("W2WPP_SpaceInfo", space=[opened, 0])
    with pytest.raises(PromptFailed, match=ODD[name][1]) as failure:
        odd.run(graph.nodes)
    assert f"{name}.safetensors" in str(failure.value) and "FormatError" in str(failure.value)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dangling", "link to a place where nothing is"),
        ("circle", "can't be read"),
        ("pipe", "is a pipe"),
    ],
)
def test_what_is_no_file_is_listed_and_says_why(odd: Host, name: str, reason: str) -> None:
    assert f"{name}.safetensors" in choices(odd, "W2WPP_LoadSpace", "space")
    assert f"{name}.safetensors" in choices(odd, "W2WPP_EncodeLora", "file")
    graph = Graph()
    opened = graph.add("W2WPP_LoadSpace", space=f"{name}.safetensors")
    graph.add("W2WPP_SpaceInfo", space=[opened, 0])
    with pytest.raises(PromptFailed, match=reason):
        odd.run(graph.nodes)
    graph = Graph()
    opened = graph.add("W2WPP_LoadSpace", space="avatars.safetensors")
    graph.add(
        "W2WPP_EncodeLora", space=[opened, 0], file=f"{name}.safetensors", keep_residual=False
    )
    with pytest.raises(PromptFailed, match=reason):
        odd.run(graph.nodes)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
def test_official_files_that_are_none_are_listed_and_say_why(odd: Host) -> None:
    assert "official (official files)" in choices(odd, "W2WPP_LoadSpace", "space")
    assert "input/official" in choices(odd, "W2WPP_ImportFiles", "file")
    graph = Graph()
    graph.add(
        "W2WPP_SpaceInfo", space=[graph.add("W2WPP_LoadSpace", space="official.safetensors"), 0]
    )
    with pytest.raises(PromptFailed) as failure:
        odd.run(graph.nodes)
    message = str(failure.value)
    assert "V.pt: 0.00 MB of about 3,986 MB, is a folder" in message
    assert "mean.pt: 0.00 MB" in message and "a pipe" in message
    assert "std.pt: 0.00 MB" in message and "no such file" in message


def test_leftovers_of_killed_writers_are_never_listed(odd: Host) -> None:
    lists = [
        ("W2WPP_LoadSpace", "space"),
        ("W2WPP_EncodeLora", "file"),
        ("W2WPP_LoadIdentity", "file"),
    ]
    for node, name in lists:
        assert not [c for c in choices(odd, node, name) if ".import-" in c or ".part" in c]


def test_an_identity_that_can_not_be_read_is_listed_where_identities_are_saved(odd: Host) -> None:
    listed = choices(odd, "W2WPP_LoadIdentity", "file")
    assert "dropout.safetensors [output]" not in listed  # it says that it is a space
    assert "page.safetensors [output]" in listed and "page.safetensors [input]" not in listed
    graph = Graph()
    opened = graph.add("W2WPP_LoadSpace", space="avatars.safetensors")
    graph.add("W2WPP_LoadIdentity", space=[opened, 0], file="page.safetensors [output]")
    graph.add("W2WPP_SaveIdentity", identity=["2", 0], filename_prefix="x")
    with pytest.raises(PromptFailed, match="a web page"):
        odd.run(graph.nodes)


@pytest.mark.parametrize(
    "prefix",
    ["x" * 300, "nul\0byte", "two\nlines", "what?*", "aux", "nul.txt", "a/com1", "\ud800", "dot."],
)
def test_names_that_not_every_system_can_store_are_refused(odd: Host, prefix: str) -> None:
    before = sorted(p for p in odd.output.rglob("*") if not p.is_symlink())
    graph = Graph()
    opened = graph.add("W2WPP_LoadSpace", space="avatars.safetensors")
    who = graph.add("W2WPP_SampleIdentity", space=[opened, 0], seed=1, truncation=1.0, count=1)
    graph.add("W2WPP_SaveIdentity", identity=[who, 0], filename_prefix=prefix)
    with pytest.raises(PromptFailed, match="can't be that of a file on every system"):
        odd.run(graph.nodes)
    assert sorted(p for p in odd.output.rglob("*") if not p.is_symlink()) == before


def test_a_file_in_the_place_of_the_folder(odd: Host) -> None:
    (odd.output / "w2wpp" / "friends").write_bytes(b"x")
    graph = Graph()
    opened = graph.add("W2WPP_LoadSpace", space="avatars.safetensors")
    who = graph.add("W2WPP_SampleIdentity", space=[opened, 0], seed=1, truncation=1.0, count=1)
    graph.add("W2WPP_SaveIdentity", identity=[who, 0], filename_prefix="friends/anna")
    with pytest.raises(PromptFailed, match=r"Identities can.t be saved under"):
        odd.run(graph.nodes)
    assert (odd.output / "w2wpp" / "friends").read_bytes() == b"x"


def test_a_folder_that_vanishes_while_the_server_runs(odd: Host) -> None:
    folder = odd.base / "models" / "w2wpp" / "gone"
    folder.mkdir()
    space = w2wpp.load_space(SPACE)
    w2wpp.save_space(space, folder / "a.safetensors")
    assert "gone/a.safetensors" in choices(odd, "W2WPP_LoadSpace", "space")
    (folder / "a.safetensors").unlink()
    folder.rmdir()
    assert "gone/a.safetensors" not in choices(odd, "W2WPP_LoadSpace", "space")
    assert torch.equal(space.prior_mean, w2wpp.load_space(SPACE).prior_mean)
