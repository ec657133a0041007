"""Spaces of collected LoRAs in the running server: every family of models, exactly or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from w2wpp.lora.delta import Factors
from w2wpp.lora.families import split

from .graphs import AvatarGraph, Graph, Link
from .server import Host, PromptFailed

# The original code's names of some linear weights of each reduced model, [out, in].
WEIGHTS = {
    "SDXL": {
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k": (64, 2048),
        "input_blocks.8.1.transformer_blocks.0.ff.net.0.proj": (1024, 128),
        "middle_block.1.proj_in": (128, 128),
        "output_blocks.5.1.transformer_blocks.0.attn1.to_out.0": (64, 64),
    },
    "SD3": {
        "joint_blocks.0.x_block.attn.qkv": (384, 128),
        "joint_blocks.1.context_block.attn.qkv": (384, 128),
        "joint_blocks.1.x_block.mlp.fc1": (512, 128),
    },
    "Flux": {
        "double_blocks.0.img_attn.qkv": (288, 96),
        "double_blocks.1.txt_mlp.0": (384, 96),
        "single_blocks.1.linear1": (672, 96),
        "single_blocks.0.linear2": (96, 480),
    },
    "QwenImage": {
        "transformer_blocks.0.attn.to_q": (96, 96),
        "transformer_blocks.1.img_mlp.net.2": (96, 384),
    },
    "ZImage": {
        "layers.0.attention.qkv": (288, 96),
        "layers.1.attention.out": (96, 96),
    },
    "WAN21_T2V": {
        "blocks.0.self_attn.q": (96, 96),
        "blocks.1.ffn.0": (128, 96),
    },
}
RANKS = (1, 2, 4)


def write_collection(folder: Path, family: str) -> list[dict[str, torch.Tensor]]:
    """Three LoRA files: two in kohya's spelling and one as diffusers has it; their updates by weight."""
    g = torch.Generator().manual_seed(len(family))
    folder.mkdir(parents=True, exist_ok=True)
    updates = []
    for i, rank in enumerate(RANKS):
        tensors, update = {}, {}
        for weight, (size_out, size_in) in WEIGHTS[family].items():
            a = torch.randn(rank, size_in, generator=g).half().float()
            b = torch.randn(size_out, rank, generator=g).half().float()
            update[weight] = 2.0 / rank * b @ a
            if i < 2:
                key = "lora_unet_" + weight.replace(".", "_")
                tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = a, b
                tensors[f"{key}.alpha"] = torch.tensor(2.0)
                continue
            for name, f in split(weight, Factors(a, b, 2.0 / rank)).items():
                prefix = "diffusion_model." if name == weight else "transformer."
                tensors[f"{prefix}{name}.lora_A.weight"] = f.down.clone()
                tensors[f"{prefix}{name}.lora_B.weight"] = (f.up * f.scale).contiguous()
        save_file(tensors, folder / f"{i}.safetensors")
        updates.append(update)
    return updates


def mixture(graph: Graph, folder: str, **options) -> tuple[str, Link]:
    """(the node that makes the space, one mixture of it)."""
    made = graph.add(
        "W2WPP_SpaceFromLoras",
        **{
            "folder": folder,
            "files": "",
            "save_as": "",
            "rank": 64,
            "components": 0,
            "cut": 0,
            **options,
        },
    )
    drawn = graph.add(
        "W2WPP_SampleIdentity", space=[made, 0], seed=3, truncation=1.0, count=1, mixture=True
    )
    return made, [drawn, 0]


def dump(graph: Graph, model: Link, file: str) -> None:
    graph.add("Probe_Weights", model=model, file=file, endings="weight")


@pytest.mark.parametrize("family", WEIGHTS)
def test_a_mixture_lands_exactly_in_every_family(host: Host, family: str) -> None:
    updates = write_collection(host.base / "models" / "loras" / family, family)
    graph = Graph()
    model: Link = [graph.add("Probe_ReducedModel", family=family), 0]
    _, drawn = mixture(graph, family)
    applied = graph.add("W2WPP_ApplyDecodedLora", model=model, identity=drawn, strength=0.8)
    loaded = graph.add(
        "LoraModelLoader", model=model, lora=[applied, 1], strength_model=0.8, bypass=False
    )
    graph.add("W2WPP_SaveIdentity", identity=drawn, filename_prefix=f"mix-{family}")
    for name, link in (("bare", model), ("mine", [applied, 0]), ("theirs", [loaded, 0])):
        dump(graph, link, f"{family}-{name}.safetensors")
    host.run(graph.nodes)
    (saved,) = (host.output / "w2wpp").glob(f"mix-{family}*.safetensors")
    shares = told(saved)["weights"][0]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5) and min(shares) > 0
    bare, mine, theirs = (
        load_file(host.output / f"{family}-{name}.safetensors")
        for name in ("bare", "mine", "theirs")
    )
    expected = {f"{weight}.weight": None for weight in WEIGHTS[family]}
    changed = {name for name in bare if not torch.equal(bare[name], mine[name])}
    assert changed == set(expected)
    for weight in WEIGHTS[family]:
        delta = sum(s * u[weight] for s, u in zip(shares, updates))
        whole = bare[f"{weight}.weight"] + 0.8 * delta.view_as(bare[f"{weight}.weight"])
        torch.testing.assert_close(mine[f"{weight}.weight"], whole, atol=1e-4, rtol=1e-4)
    for name in mine:
        torch.testing.assert_close(theirs[name], mine[name], atol=1e-6, rtol=0)


# Weights of the small SDXL text encoders [out, in]: (diffusers' name, the host's).
TEXTS = {
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (32, 32),
    "text_encoder.text_model.encoder.layers.1.mlp.fc1": (64, 32),
    "text_encoder_2.text_model.encoder.layers.1.self_attn.out_proj": (48, 48),
}


def host_name(name: str) -> str:
    encoder, rest = name.split(".", 1)
    return f"clip_{'g' if encoder.endswith('2') else 'l'}.transformer.{rest}.weight"


def write_with_texts(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Three LoRAs of SDXL and its text encoders; the updates of these by the host's names."""
    write_collection(folder, "SDXL")
    g, updates = torch.Generator().manual_seed(5), []
    for i, path in enumerate(sorted(folder.glob("*.safetensors"))):
        tensors, update = load_file(path), {}
        for name, (size_out, size_in) in TEXTS.items():
            a = torch.randn(2, size_in, generator=g).half().float()
            b = torch.randn(size_out, 2, generator=g).half().float()
            update[host_name(name)] = 0.5 * b @ a
            if i < 2:
                key = name.replace("text_encoder_2.", "lora_te2.").replace(
                    "text_encoder.", "lora_te1."
                )
                key = key.replace(".", "_")
                tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = a, b
                tensors[f"{key}.alpha"] = torch.tensor(1.0)
            else:
                tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, 0.5 * b
        save_file(tensors, path)
        updates.append(update)
    return updates


def test_text_encoders_have_a_space_of_their_own_that_lands_in_a_clip(host: Host) -> None:
    updates = write_with_texts(host.base / "models" / "loras" / "texts")
    graph = Graph()
    model: Link = [graph.add("Probe_ReducedModel", family="SDXL"), 0]
    clip: Link = [graph.add("Probe_Texts"), 0]
    made, drawn = mixture(graph, "texts", text_encoders=True)
    applied = graph.add(
        "W2WPP_ApplyDecodedLora", model=model, identity=drawn, strength=0.8, clip=clip
    )
    _, of_model = mixture(graph, "texts")
    untouched = graph.add(
        "W2WPP_ApplyDecodedLora", model=model, identity=of_model, strength=0.8, clip=clip
    )
    graph.add("W2WPP_SaveIdentity", identity=drawn, filename_prefix="mix-texts")
    for name, link in (("bare", clip), ("mine", [applied, 2]), ("same", [untouched, 2])):
        graph.add("Probe_TextWeights", clip=link, file=f"texts-{name}.safetensors")
    dump(graph, model, "texts-model.safetensors")
    dump(graph, [applied, 0], "texts-model-applied.safetensors")
    report = host.run(graph.nodes).outputs[made]["text"][0]
    assert "3 LoRAs for sdxl, their text encoders: 3 modules" in report
    assert "3 files also change the model itself" in report
    (saved,) = (host.output / "w2wpp").glob("mix-texts*.safetensors")
    shares = told(saved)["weights"][0]
    files = ("bare", "mine", "same", "model", "model-applied")
    bare, mine, same, before, after = (
        load_file(host.output / f"texts-{name}.safetensors") for name in files
    )
    assert {n for n in bare if not torch.equal(bare[n], mine[n])} == set(updates[0])
    for name in updates[0]:
        delta = sum(s * u[name] for s, u in zip(shares, updates))
        torch.testing.assert_close(mine[name], bare[name] + 0.8 * delta, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(bare[n], same[n]) for n in bare)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_an_identity_of_text_encoders_asks_for_a_clip_that_fits(host: Host) -> None:
    write_with_texts(host.base / "models" / "loras" / "texts")
    graph = Graph()
    model: Link = [graph.add("Probe_ReducedModel", family="SDXL"), 0]
    _, drawn = mixture(graph, "texts", text_encoders=True)
    graph.add(
        "PreviewAny",
        source=[graph.add("W2WPP_ApplyDecodedLora", model=model, identity=drawn, strength=1.0), 0],
    )
    with pytest.raises(PromptFailed, match="changes a CLIP, not a MODEL"):
        host.run(graph.nodes)


def test_an_identity_of_text_encoders_has_no_start(host: Host) -> None:
    write_with_texts(host.base / "models" / "loras" / "texts")
    graph = Graph()
    model: Link = [graph.add("Probe_ReducedModel", family="SDXL"), 0]
    clip: Link = [graph.add("Probe_Texts"), 0]
    _, drawn = mixture(graph, "texts", text_encoders=True)
    applied = graph.add(
        "W2WPP_ApplyDecodedLora",
        model=model,
        identity=drawn,
        strength=1.0,
        clip=clip,
        start_percent=0.2,
    )
    graph.add("Probe_TextWeights", clip=[applied, 2], file="texts-late.safetensors")
    with pytest.raises(PromptFailed, match=r"start_percent is 0\.2.*Set start_percent to 0"):
        host.run(graph.nodes)
    assert not (host.output / "texts-late.safetensors").exists()
    graph.nodes[applied]["inputs"]["start_percent"] = 0.0
    host.run(graph.nodes)
    assert (host.output / "texts-late.safetensors").exists()


def told(path: Path) -> dict:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return json.loads(header["__metadata__"]["config"])["provenance"]


@pytest.mark.parametrize(
    "family, other", [("Flux", "SDXL"), ("SDXL", "QwenImage"), ("ZImage", "SD3")]
)
def test_a_foreign_family_is_refused_and_named(host: Host, family: str, other: str) -> None:
    write_collection(host.base / "models" / "loras" / family, family)
    graph = Graph()
    model: Link = [graph.add("Probe_ReducedModel", family=other), 0]
    _, drawn = mixture(graph, family)
    applied = graph.add("W2WPP_ApplyDecodedLora", model=model, identity=drawn, strength=1.0)
    dump(graph, [applied, 0], "never.safetensors")
    with pytest.raises(PromptFailed, match=f"(?s){other}.*missing"):
        host.run(graph.nodes)


def test_a_saved_space_paints_what_the_unsaved_one_painted(host: Host) -> None:
    shipped = "eight avatars (shipped)"
    graph = AvatarGraph()
    made, drawn = mixture(graph, shipped, save_as="party")
    walked = graph.add("W2WPP_PickIdentity", identity=[made, 1], index=4)
    pictures = [graph.paint([graph.apply(link), 0]) for link in (drawn, [walked, 0])]
    first = host.run(graph.nodes)
    assert (host.base / "models" / "w2wpp" / "party.safetensors").is_file()
    report = first.outputs[made]["text"][0]
    assert report.startswith("8 LoRAs for avatar") and "saved as party.safetensors" in report

    again = AvatarGraph()
    opened = again.add("W2WPP_LoadSpace", space="party.safetensors")
    drawn_again = again.add(
        "W2WPP_SampleIdentity", space=[opened, 0], seed=3, truncation=1.0, count=1, mixture=True
    )
    encoded = again.add(
        "W2WPP_SpaceFromLoras", folder=shipped, files="", save_as="", rank=64, components=0, cut=0
    )
    picked = again.add("W2WPP_PickIdentity", identity=[encoded, 1], index=4)
    repeated = [again.paint([again.apply([n, 0]), 0]) for n in (drawn_again, picked)]
    second = host.run(again.nodes)
    for a, b in zip(pictures, repeated):
        (one,), (other,) = first.pictures(a), second.pictures(b)
        assert np.abs(one.astype(int) - other).max() <= 1
    assert (
        np.abs(first.pictures(pictures[0])[0].astype(int) - first.pictures(pictures[1])[0]).mean()
        > 1
    )


def test_what_is_saved_replaces_nothing_of_others(host: Host) -> None:
    folder = host.base / "models" / "w2wpp"
    (folder / "taken.safetensors").write_bytes(b"something of the user's")
    for name, reason in (("taken", "is there already"), ("../../out", "leads out of it")):
        graph = Graph()
        mixture(graph, "eight avatars (shipped)", save_as=name)
        with pytest.raises(PromptFailed, match=reason):
            host.run(graph.nodes)
    assert (folder / "taken.safetensors").read_bytes() == b"something of the user's"
    (folder / "taken.safetensors").unlink()


def test_loras_from_other_nodes_lines_and_folders_join_and_misfits_are_named(host: Host) -> None:
    loras = host.base / "models" / "loras"
    write_collection(loras / "Flux", "Flux")
    graph = AvatarGraph()
    applied = graph.apply(graph.sample(5, count=3))
    made = graph.add(
        "W2WPP_SpaceFromLoras", folder="eight avatars (shipped)", save_as="", rank=0, components=0, cut=0,
        files="Flux/0.safetensors\navatar-2.safetensors | 3 | Berta", loras=[applied, 1],
    )  # fmt: skip
    compared = graph.add(
        "W2WPP_CompareLoras", folder="none", files="Flux/0.safetensors\nFlux/1.safetensors"
    )
    graph.add("SaveImage", images=[compared, 0], filename_prefix="matrix")
    graph.add("SaveImage", images=[compared, 1], filename_prefix="map")
    result = host.run(graph.nodes)
    report = result.outputs[made]["text"][0]
    assert (
        report.startswith("11 LoRAs for avatar") and "did not fit: Flux/0: it is for flux" in report
    )
    assert "Berta" in report or "avatar-1" in report
    assert "2 LoRAs for flux" in result.outputs[compared]["text"][0]
    assert all(picture.std() > 2 for picture in result.pictures())  # a few dots on white


@pytest.mark.parametrize(
    "files, reason",
    [("nowhere.safetensors", "no LoRA 'nowhere"), ("Flux/0.safetensors | much", "FILE . WEIGHT")],
)
def test_a_wrong_line_is_refused_before_anything_runs(host: Host, files: str, reason: str) -> None:
    write_collection(host.base / "models" / "loras" / "Flux", "Flux")
    graph = Graph()
    graph.add(
        "W2WPP_SpaceFromLoras", folder="none", files=files, save_as="", rank=0, components=0, cut=0
    )
    with pytest.raises(PromptFailed, match=reason):
        host.run(graph.nodes)
