"""Files of others in the running server: dropped among the models, or chosen in the node."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import w2wpp

from .graphs import Graph, Link
from .server import Host, PromptFailed

NAME, K = "published (official files)", 6  # components of the fixture `official`


@pytest.fixture
def dropped(host: Host, official: dict) -> Iterator[Path]:
    folder = host.base / "models" / "w2wpp" / "published"
    folder.mkdir()
    for name, value in official.items():
        torch.save(value, folder / name)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".safetensors").unlink(missing_ok=True)


def listed(host: Host, node: str, name: str) -> list[str]:
    kind, options = host.json(f"/object_info/{node}")[node]["input"]["required"][name]
    return options["options"] if kind == "COMBO" else kind


def described(space: Link, graph: Graph) -> str:
    return graph.add("W2WPP_SpaceInfo", space=space)


def load(host: Host, name: str) -> str:
    graph = Graph()
    opened = graph.add("W2WPP_LoadSpace", space=name)
    info = described([opened, 0], graph)
    return host.run(graph.nodes).outputs[info]["text"][0]


def test_a_dropped_folder_is_listed_and_imported_at_its_first_use(
    host: Host, dropped: Path
) -> None:
    assert NAME in listed(host, "W2WPP_LoadSpace", "space")
    text = load(host, NAME)
    assert "for non-commercial, academic use only" in text and f"over {K} components" in text
    made = dropped.with_suffix(".safetensors")
    assert f"fingerprint: {w2wpp.load_space(made).fingerprint}" in text
    assert "published.safetensors" in listed(host, "W2WPP_LoadSpace", "space")
    # The downloads may go; the graph still opens what was made of them.
    before = made.stat().st_mtime_ns
    shutil.rmtree(dropped)
    assert load(host, NAME) == text and made.stat().st_mtime_ns == before


def test_a_space_is_found_by_its_later_name_too(host: Host, dropped: Path) -> None:
    assert "licence: Derived from the official" in load(host, "published.safetensors")


def test_downloads_that_are_not_whole_are_named_with_their_sizes(host: Host, dropped: Path) -> None:
    (dropped / "V.pt").rename(dropped / "V.pt.part")
    (dropped / "std.pt").unlink()
    with pytest.raises(PromptFailed) as failure:
        load(host, NAME)
    message = str(failure.value)
    assert "in models/w2wpp/published are not complete" in message
    assert "V.pt: 2.39 MB of about 3,986 MB, still being downloaded" in message
    assert "std.pt: missing (about 0.40 MB)" in message and "mean.pt: whole" in message
    assert not list(dropped.parent.glob("published.safetensors*"))


def imported(graph: Graph, **inputs) -> str:
    given = {"file": "none", "path": "", "save_as": "", "components": 0, "labels": ""}
    return graph.add("W2WPP_ImportFiles", **given | {"keep_residual": False} | inputs)


def test_the_node_takes_fewer_components_a_table_and_saved_people(
    host: Host,
    dropped: Path,
    official: dict,
    tmp_path: Path,
) -> None:
    rows = official["proj_1000pc.pt"]
    lines = [f"{i},{1 if k[0] > 0 else -1}" for i, k in enumerate(rows)]
    (host.base / "input" / "labels.csv").write_text("\n".join(["name,smile", *lines]))
    torch.save(rows[:2], host.base / "input" / "w2wmodel.pt")
    assert "models/w2wpp/published" in listed(host, "W2WPP_ImportFiles", "file")
    assert "input/w2wmodel.pt" in listed(host, "W2WPP_ImportFiles", "file")
    graph = Graph()
    space = imported(graph, file="models/w2wpp/published", components=4, labels="input/labels.csv")
    info = described([space, 0], graph)
    people = imported(graph, path="input/w2wmodel.pt", space=[space, 0])
    saved = graph.add(
        "W2WPP_SaveIdentity", identity=[people, 1], filename_prefix="test/from official"
    )
    outputs = host.run(graph.nodes).outputs
    text = outputs[info]["text"][0]
    assert "attributes: smile" in text and "4, by the codec pca over 4 components" in text
    assert "2 people from the coefficients in w2wmodel.pt" in outputs[people]["text"][0]
    file = outputs[saved]["text"][0].removeprefix("saved ").removesuffix(" [output]")
    identity = w2wpp.load_identity(host.output / "w2wpp" / file)
    opened = w2wpp.load_space(dropped.with_suffix(".safetensors"))
    expected, share = w2wpp.read_coefficients(host.base / "input" / "w2wmodel.pt", opened)
    assert torch.equal(identity.z, expected.z) and share > 0
    # A space beside it that is of other components is not replaced.
    with pytest.raises(PromptFailed, match="made of something else"):
        load(host, NAME)


def vanilla(p: int) -> dict[str, torch.Tensor]:
    """Weights of the original w2w++'s smaller VAE, of widths 12 and 8."""
    g = torch.Generator().manual_seed(0)
    layers = {
        "encoder.0.0": (12, p), "encoder.1.0": (8, 12), "fc_mu": (5, 8), "fc_var": (5, 8),
        "decoder_input": (8, 5), "decoder.0.0": (12, 8), "final_layer.0": (p, 12),
    }  # fmt: skip
    weights = {f"{n}.weight": 0.1 * torch.randn(s, generator=g) for n, s in layers.items()}
    return weights | {f"{n}.bias": torch.zeros(s[0]) for n, s in layers.items()}


def test_the_node_takes_checkpoints(host: Host, tmp_path: Path) -> None:
    torch.save({"model_state_dict": vanilla(w2wpp.SD15.size)}, host.base / "input" / "vae.pt")
    graph = Graph()
    space = imported(graph, file="input/vae.pt", save_as="friends/original")
    sampled = graph.add("W2WPP_SampleIdentity", space=[space, 0], seed=1, truncation=1.0, count=1)
    graph.add("W2WPP_SaveIdentity", identity=[sampled, 0], filename_prefix="test/of a checkpoint")
    outputs = host.run(graph.nodes).outputs
    assert "imported the VAE of vae.pt\nlicence: Derived from" in outputs[space]["text"][0]
    assert "friends/original.safetensors" in listed(host, "W2WPP_LoadSpace", "space")
    (host.base / "models" / "w2wpp" / "friends" / "original.safetensors").unlink()


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, "needs something to import"),
        ({"path": "input/nothing.pt"}, "There is no file or folder 'input/nothing.pt'"),
        ({"path": "/etc/passwd"}, "lies outside of ComfyUI's folders"),
        ({"path": "input/../../../../etc/passwd"}, "no file or folder|outside of ComfyUI"),
        ({"path": "input/k.pt"}, "connect the space that they belong to"),
        ({"path": "input/table.pt"}, "holds a list"),
        ({"path": "input/page.pt"}, "a web page"),
    ],
)
def test_what_is_refused(host: Host, inputs: dict, message: str) -> None:
    torch.save(torch.ones(1, 3), host.base / "input" / "k.pt")
    torch.save([1, 2], host.base / "input" / "table.pt")
    (host.base / "input" / "page.pt").write_text("<html><body>Please log in</body></html>")
    graph = Graph()
    imported(graph, **inputs)
    with pytest.raises(PromptFailed, match=message):
        host.run(graph.nodes)
