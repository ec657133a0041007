"""A space of the full SD 1.5 size, on UNets of the full size with random weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import w2wpp
from w2wpp.layout import SD15

from .graphs import Graph
from .server import Host, PromptFailed
from .spaces import random_space
from .test_apply import host_key

# Block names of diffusers and of the host, from the original SD 1.5 checkpoint and its conversion.
SD15_BLOCKS = {
    **{f"down_blocks.{i}.attentions.{j}": f"input_blocks.{1 + 3 * i + j}.1" for i in range(3) for j in range(2)},
    "mid_block.attentions.0": "middle_block.1",
    **{f"up_blocks.{i}.attentions.{j}": f"output_blocks.{3 * i + j}.1" for i in range(1, 4) for j in range(3)},
}


@pytest.fixture(scope="module")
def space(host: Host) -> w2wpp.Space:
    path = host.base / "models" / "w2wpp" / "mine" / "random-sd15.safetensors"
    path.parent.mkdir(exist_ok=True)
    w2wpp.save_space(random_space(SD15, components=6), path)
    return w2wpp.load_space(path)


def applied(space_name: str, family: str, strength: float) -> tuple[Graph, str, str]:
    graph = Graph()
    model = graph.add("Probe_RandomModel", family=family)
    opened = graph.add("W2WPP_LoadSpace", space=space_name)
    drawn = graph.add("W2WPP_SampleIdentity", space=[opened, 0], seed=3, truncation=1.0, count=1)
    apply = graph.add("W2WPP_ApplyDecodedLora", model=[model, 0], identity=[drawn, 0], strength=strength)
    return graph, model, apply


def test_all_64_modules_of_sd15_are_patched(host: Host, space: w2wpp.Space) -> None:
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


def test_sd20_has_the_names_but_not_the_shapes(host: Host, space: w2wpp.Space) -> None:
    graph, _, apply = applied("mine/random-sd15.safetensors", "SD20", 1.0)
    graph.add("Probe_Weights", model=[apply, 0], file="never.safetensors", endings="to_q.weight")
    with pytest.raises(PromptFailed, match=r"SD20.*0 of them are missing and 16 have another shape"):
        host.run(graph.nodes)
