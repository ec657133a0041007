"""Edit, Pick, Encode and Space Info, in the running server against the library."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import w2wpp
from w2wpp import Space

from .graphs import AvatarGraph, Graph, Link
from .server import REPO, Host, PromptFailed

PCA = "avatars-pca.safetensors"
LABELLED = "labelled.safetensors"
ATTRIBUTES = ("shoe size", "zest")


@pytest.fixture(scope="module")
def labelled(host: Host) -> Space:
    """The shipped space with two attributes of its own, installed in the host."""
    space = w2wpp.load_space(REPO / "models" / "avatars.safetensors")
    vectors = torch.randn(2, space.latent_size, generator=torch.Generator().manual_seed(0))
    directions = dict(zip(ATTRIBUTES, 0.3 * vectors))
    path = host.base / "models" / "w2wpp" / LABELLED
    w2wpp.save_space(replace(space, directions=directions), path)
    return w2wpp.load_space(path)


def edit(graph: Graph, identity: Link, attribute: str, strength: float) -> Link:
    node = graph.add(
        "W2WPP_EditIdentity", identity=identity, attribute=attribute, strength=strength
    )
    return [node, 0]


def saved(host: Host, graph: Graph, identity: Link, name: str) -> w2wpp.Identity:
    """Run the graph and read the identity that it ends in."""
    node = graph.add("W2WPP_SaveIdentity", identity=identity, filename_prefix=name)
    label = host.run(graph.nodes).outputs[node]["text"][0].removeprefix("saved ")
    return w2wpp.load_identity(host.output / "w2wpp" / label.removesuffix(" [output]"))


def test_edits_in_a_row_add_up(host: Host, labelled: Space) -> None:
    graph = AvatarGraph()
    who = graph.sample(61, count=2, space=LABELLED)
    changed = edit(graph, edit(graph, who, ATTRIBUTES[0], 2.0), ATTRIBUTES[1], -1.5)
    found = saved(host, graph, changed, "edited")
    drawn = labelled.sample(2, generator=torch.Generator().manual_seed(61))
    a, b = (labelled.directions[name] for name in ATTRIBUTES)
    torch.testing.assert_close(found.z, drawn.z + 2.0 * a - 1.5 * b)
    assert found.provenance["made_by"] == "edit"


def test_a_strength_of_zero_paints_the_same_picture_and_others_do_not(
    host: Host, labelled: Space
) -> None:
    graph = AvatarGraph()
    who = graph.sample(62, space=LABELLED)
    people = [who, *(edit(graph, who, ATTRIBUTES[0], strength) for strength in (0.0, 4.0, -4.0))]
    painted = [graph.paint([graph.apply(person), 0]) for person in people]
    result = host.run(graph.nodes)
    (plain,), (zero,), (more,), (less,) = map(result.pictures, painted)
    assert np.array_equal(plain, zero)
    assert not np.array_equal(plain, more) and not np.array_equal(more, less)


def test_an_attribute_of_another_space_is_refused_with_those_there_are(
    host: Host, labelled: Space
) -> None:
    graph = AvatarGraph()
    graph.paint([graph.apply(edit(graph, graph.sample(1, space=PCA), ATTRIBUTES[1], 1.0)), 0])
    with pytest.raises(PromptFailed, match=r"Avatars .linear.' has no direction 'zest'"):
        host.run(graph.nodes)


def test_an_unknown_attribute_is_refused_before_anything_runs(host: Host, labelled: Space) -> None:
    graph = AvatarGraph()
    graph.paint([graph.apply(edit(graph, graph.sample(1), "charisma", 1.0)), 0])
    with pytest.raises(PromptFailed, match=r"attribute 'charisma'.*shoe size.*zest") as failure:
        host.run(graph.nodes)
    assert "custom_validation_failed" in str(failure.value)


def test_attributes_of_all_installed_spaces_are_listed(host: Host, labelled: Space) -> None:
    info = host.json("/object_info/W2WPP_EditIdentity")["W2WPP_EditIdentity"]
    kind, options = info["input"]["required"]["attribute"]
    assert set(ATTRIBUTES) <= set(kind if isinstance(kind, list) else options["options"])


def test_one_person_is_picked_out_of_many(host: Host) -> None:
    graph = AvatarGraph()
    many = graph.sample(63, count=3)
    picked = [graph.add("W2WPP_PickIdentity", identity=many, index=2), 0]
    painted = [graph.paint([graph.apply(who), 0]) for who in (many, picked)]
    all_three, alone = map(host.run(graph.nodes).pictures, painted)
    assert len(alone) == 1 and np.array_equal(alone[0], all_three[2])

    nobody = graph.add("W2WPP_PickIdentity", identity=many, index=3)
    graph.paint([graph.apply([nobody, 0]), 0])
    message = r"nobody with index 3: the 3 people connected to W2W\+\+ Pick Identity go from 0 to 2"
    with pytest.raises(PromptFailed, match=message):
        host.run(graph.nodes)


def encoded(graph: Graph, space: str, **inputs) -> str:
    opened = graph.add("W2WPP_LoadSpace", space=space)
    settings = {"file": "none", "keep_residual": False, **inputs}
    return graph.add("W2WPP_EncodeLora", space=[opened, 0], **settings)


def test_a_lora_of_the_space_comes_back_from_a_wire_and_from_a_file(host: Host) -> None:
    graph = AvatarGraph()
    applied = graph.apply(graph.sample(64, space=PCA))
    encoder = encoded(graph, PCA, lora=[applied, 1])
    graph.add("SaveLoRA", lora=[applied, 1], prefix="loras/encode-me")
    again = graph.paint([graph.apply([encoder, 0]), 0])
    before = graph.paint([applied, 0])
    found = saved(host, graph, [encoder, 0], "encoded")
    space = w2wpp.load_space(REPO / "models" / PCA)
    drawn = space.sample(1, generator=torch.Generator().manual_seed(64))
    torch.testing.assert_close(found.z, drawn.z, rtol=1e-3, atol=1e-3)
    result = host.run(graph.nodes)
    (got,), (expected,) = result.pictures(again), result.pictures(before)
    assert np.abs(got.astype(int) - expected).max() <= 2

    file = max((host.output / "loras").glob("encode-me*.safetensors"))
    from_file = Graph()
    reread = encoded(from_file, PCA, file=file.name)
    shown = from_file.add("PreviewAny", source=[reread, 2])
    same = saved(host, from_file, [reread, 0], "encoded-file")
    torch.testing.assert_close(same.z, found.z, rtol=1e-4, atol=1e-4)
    outputs = host.run(from_file.nodes).outputs
    assert outputs[reread]["text"][0].startswith("reconstruction error of the update 0.")
    assert float(outputs[shown]["text"][0]) < 0.01


@pytest.mark.parametrize("both", [False, True])
def test_encoding_takes_one_lora_not_none_and_not_two(host: Host, both: bool) -> None:
    graph = AvatarGraph()
    applied = graph.apply(graph.sample(65))
    graph.add("SaveLoRA", lora=[applied, 1], prefix="loras/one")
    host.run(graph.nodes)
    file = max((host.output / "loras").glob("one*.safetensors")).name
    encoded(graph, PCA, **({"lora": [applied, 1], "file": file} if both else {}))
    with pytest.raises(PromptFailed, match="takes one LoRA"):
        host.run(graph.nodes)


@pytest.mark.parametrize("file", ["../../secret.safetensors", "/etc/passwd", "gone.safetensors"])
def test_a_lora_file_that_is_not_listed_is_refused(host: Host, file: str) -> None:
    graph = Graph()
    encoded(graph, PCA, file=file)
    with pytest.raises(PromptFailed, match="There is no LoRA"):
        host.run(graph.nodes)


def test_space_info_tells_licence_prompt_attributes_and_training(
    host: Host, labelled: Space
) -> None:
    graph = Graph()
    opened = graph.add("W2WPP_LoadSpace", space=LABELLED)
    info = graph.add("W2WPP_SpaceInfo", space=[opened, 0])
    prompt = graph.add("PreviewAny", source=[info, 1])
    outputs = host.run(graph.nodes).outputs
    text = outputs[info]["text"][0]
    for line in (
        "name: Avatars 1",
        "licence: Apache-2.0",
        "trigger prompt: person",
        "attributes: shoe size, zest",
        f"fingerprint: {labelled.fingerprint}",
    ):
        assert line in text.splitlines()
    assert "training: weight_r2 heldout: 0.7" in text and "history" not in text
    assert outputs[prompt]["text"] == ["person"]


def test_a_space_that_is_not_there_is_refused_with_where_to_get_one(host: Host) -> None:
    graph = Graph()
    opened = graph.add("W2WPP_LoadSpace", space="w2w.safetensors")
    graph.add("W2WPP_SpaceInfo", space=[opened, 0])
    with pytest.raises(PromptFailed) as failure:
        host.run(graph.nodes)
    message = str(failure.value)
    assert "There is no space 'w2w.safetensors'" in message and "avatars.safetensors" in message
    assert "https://huggingface.co/snap-research/weights2weights" in message
    assert "choose 'w2w (official files)'" in message
