"""A space of the full SD 1.5 size, on UNets of the full size with random weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import w2wpp
from w2wpp import SD15, Basis, Space, build_codec

from .graphs import Graph
from .server import Host, PromptFailed
from .test_apply import host_key

# Block names of diffusers and of the host, from the original SD 1.5 checkpoint and its conversion.
SD15_BLOCKS = {
    **{
        f"down_blocks.{i}.attentions.{j}": f"input_blocks.{1 + 3 * i + j}.1"
        for i in range(3)
        for j in range(2)
    },
    "mid_block.attentions.0": "middle_block.1",
    **{
        f"up_blocks.{i}.attentions.{j}": f"output_blocks.{3 * i + j}.1"
        for i in range(1, 4)
        for j in range(3)
    },
}


def random_space(components: int) -> Space:
    """A linear space over the SD 1.5 layout; its LoRAs are about as large as trained ones."""
    generator = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(SD15.size, components, generator=generator))
    basis = Basis(
        mean=0.01 * torch.randn(SD15.size, generator=generator),
        std=torch.full((SD15.size,), 0.02),
        components=directions.T,
        singular_values=torch.full((components,), 100.0),
    )
    codec = build_codec({"name": "pca", "coefficient_size": components, "latent_size": components})
    return Space(
        SD15, basis, codec, torch.zeros(components), torch.ones(components), {"name": "random"}
    )


@pytest.fixture(scope="module")
def space(host: Host) -> Space:
    path = host.base / "models" / "w2wpp" / "mine" / "random-sd15.safetensors"
    path.parent.mkdir(exist_ok=True)
    w2wpp.save_space(random_space(components=6), path)
    return w2wpp.load_space(path)


def applied(space_name: str, family: str, strength: float) -> tuple[Graph, str, str]:
    graph = Graph()
    model = graph.add("Probe_RandomModel", family=family)
    opened = graph.add("W2WPP_LoadSpace", space=space_name)
    drawn = graph.add("W2WPP_SampleIdentity", space=[opened, 0], seed=3, truncation=1.0, count=1)
    apply = graph.add(
        "W2WPP_ApplyDecodedLora", model=[model, 0], identity=[drawn, 0], strength=strength
    )
    return graph, model, apply


def test_all_64_modules_of_sd15_are_patched(host: Host, space: Space) -> None:
    strength = 0.8
    graph, model, apply = applied("mine/random-sd15.safetensors", "SD15", strength)
    for node, file in ((model, "sd15-bare.safetensors"), (apply, "sd15-patched.safetensors")):
        graph.add("Probe_Weights", model=[node, 0], file=file, endings="to_q.weight to_v.weight")
    host.run(graph.nodes)
    bare = load_file(host.output / "sd15-bare.safetensors")
    patched = load_file(host.output / "sd15-patched.safetensors")
    identity = space.sample(1, generator=torch.Generator().manual_seed(3))
    lora = SD15.unpack(identity.vectors(space)[0])
    assert len(lora) == len(bare) == 64
    for module, (a, b) in lora.items():
        key = host_key(module, SD15_BLOCKS)
        delta = strength * 27.0 * b @ a
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(patched[key], bare[key] + delta, rtol=1e-5, atol=1e-6)


def test_sd20_has_the_names_but_not_the_shapes(host: Host, space: Space) -> None:
    graph, _, apply = applied("mine/random-sd15.safetensors", "SD20", 1.0)
    graph.add("Probe_Weights", model=[apply, 0], file="never.safetensors", endings="to_q.weight")
    with pytest.raises(
        PromptFailed, match=r"SD20.*0 of them are missing and 16 have another shape"
    ):
        host.run(graph.nodes)
