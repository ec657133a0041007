"""Identities saved and loaded by the host: the same person comes back, nothing is replaced or leaves its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import w2wpp
from w2wpp import Identity, Space

from .graphs import AvatarGraph, Graph, Link
from .server import REPO, Host, PromptFailed

PCA = "avatars-pca.safetensors"


@pytest.fixture(scope="module")
def space() -> Space:
    return w2wpp.load_space(REPO / "models" / "avatars.safetensors")


def save(host: Host, prefix: str, *, seed: int = 1, count: int = 1) -> str:
    """Sample and save; returns the name that Load Identity lists."""
    graph = AvatarGraph()
    node = graph.add(
        "W2WPP_SaveIdentity", identity=graph.sample(seed, count=count), filename_prefix=prefix
    )
    return host.run(graph.nodes).outputs[node]["text"][0].removeprefix("saved ")


def load(graph: Graph, file: str, space: str = "avatars.safetensors") -> Link:
    opened = graph.add("W2WPP_LoadSpace", space=space)
    return [graph.add("W2WPP_LoadIdentity", space=[opened, 0], file=file), 0]


def listed(host: Host) -> list[str]:
    required = host.json("/object_info/W2WPP_LoadIdentity")["W2WPP_LoadIdentity"]["input"]
    kind, options = required["required"]["file"]
    return kind if isinstance(kind, list) else options["options"]


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("prefix", ["identity", "friends/anna", "Grüße/小明 №7", "back\\slash"])
def test_saved_people_paint_the_same_picture_when_loaded(
    host: Host, space: Space, prefix: str
) -> None:
    name = save(host, prefix, seed=41, count=2)
    assert name == f"{prefix.replace(chr(92), '/')}_00001_.safetensors [output]"
    assert name in listed(host)
    stored = w2wpp.load_identity(host.output / "w2wpp" / name.removesuffix(" [output]"))
    drawn = space.sample(2, generator=torch.Generator().manual_seed(41))
    assert torch.equal(stored.z, drawn.z) and stored.provenance["seed"] == 41

    graph = AvatarGraph()
    painted = [
        graph.paint([graph.apply(who), 0]) for who in (graph.sample(41, count=2), load(graph, name))
    ]
    before, after = map(host.run(graph.nodes).pictures, painted)
    assert len(before) == 2 and all(map(np.array_equal, before, after))


def test_saving_again_makes_another_file(host: Host) -> None:
    names = [save(host, "again", seed=seed) for seed in (1, 2, 3)]
    assert names == [f"again_{i:05}_.safetensors [output]" for i in (1, 2, 3)]
    contents = {(host.output / "w2wpp" / n.removesuffix(" [output]")).read_bytes() for n in names}
    assert len(contents) == 3


def test_a_file_of_another_kind_is_not_replaced_either(host: Host) -> None:
    taken = host.output / "w2wpp" / "taken_00001_.safetensors"
    taken.parent.mkdir(exist_ok=True)
    taken.write_bytes(b"mine")
    assert save(host, "taken") == "taken_00002_.safetensors [output]"
    assert taken.read_bytes() == b"mine"


@pytest.fixture
def link_out(host: Host, tmp_path: Path) -> Iterator[str]:
    """A folder in the output folder that really lies elsewhere."""
    link = host.output / "w2wpp" / "elsewhere"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path, target_is_directory=True)
    yield link.name
    link.unlink()


@pytest.mark.parametrize(
    "prefix",
    [
        "../out",
        "a/../../out",
        "/out",
        "C:\\out",
        "c:out",
        "..\\out",
        "\\\\server\\out",
        "x/../..",
    ],
)
def test_a_prefix_that_leads_out_writes_nothing(host: Host, prefix: str) -> None:
    before = files(host.base)
    with pytest.raises(PromptFailed, match=r"W2WPP_SaveIdentity: .*leads out of"):
        save(host, prefix)
    assert files(host.base) - before == set()


def test_a_link_that_leads_out_is_neither_written_nor_read(
    host: Host, space: Space, link_out: str, tmp_path: Path
) -> None:
    with pytest.raises(PromptFailed, match="leads out of"):
        save(host, f"{link_out}/secret")
    assert list(tmp_path.iterdir()) == []
    identity = space.sample(1, generator=torch.Generator().manual_seed(1))
    w2wpp.save_identity(identity, tmp_path / "secret.safetensors")
    (host.output / "w2wpp" / "alias.safetensors").symlink_to(tmp_path / "secret.safetensors")
    assert not [name for name in listed(host) if "secret" in name or "alias" in name]


@pytest.mark.parametrize(
    "file", ["../secret.safetensors [output]", "/etc/passwd", "C:\\secret.safetensors", "nobody"]
)
def test_a_name_that_is_not_listed_is_refused_with_what_to_do(host: Host, file: str) -> None:
    graph = AvatarGraph()
    graph.paint([graph.apply(load(graph, file)), 0])
    with pytest.raises(PromptFailed, match=r"There is no identity file.*Save one with W2W"):
        host.run(graph.nodes)


def test_files_of_the_input_and_model_folders_are_listed(host: Host, space: Space) -> None:
    identity = space.sample(1, generator=torch.Generator().manual_seed(5))
    w2wpp.save_identity(identity, host.base / "input" / "given.safetensors")
    w2wpp.save_identity(identity, host.base / "models" / "w2wpp" / "kept.safetensors")
    (host.base / "input" / "broken.safetensors").write_bytes(b"\x00" * 20)
    names = listed(host)
    assert {"given.safetensors [input]", "kept.safetensors [models]"} <= set(names)
    assert "broken.safetensors [input]" not in names
    assert not [name for name in names if name.startswith("avatar")]  # spaces, not people


def test_another_space_is_refused_and_the_right_one_named(host: Host) -> None:
    graph = AvatarGraph()
    graph.paint([graph.apply(load(graph, save(host, "belongs"), PCA)), 0])
    with pytest.raises(PromptFailed, match="SpaceMismatch") as failure:
        host.run(graph.nodes)
    message = str(failure.value)
    assert "belongs_00001_" in message and "Avatars (linear)" in message
    assert "Choose avatars.safetensors in W2W++ Load Space" in message


def test_a_residual_survives_the_file(host: Host, space: Space) -> None:
    generator = torch.Generator().manual_seed(6)
    z = torch.randn(1, space.latent_size, generator=generator)
    residual = 0.1 * torch.randn(1, space.basis.n_components, generator=generator)
    identity = Identity(z, space.fingerprint, residual)
    w2wpp.save_identity(identity, host.base / "input" / "residual.safetensors")
    graph = Graph()
    loaded = load(graph, "residual.safetensors [input]")
    graph.add("W2WPP_SaveIdentity", identity=loaded, filename_prefix="residual")
    host.run(graph.nodes)
    stored = w2wpp.load_identity(host.output / "w2wpp" / "residual_00001_.safetensors")
    assert stored.residual is not None and torch.equal(stored.residual, residual)
