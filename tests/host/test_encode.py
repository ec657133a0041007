"""Encode LoRA with files of other kinds: what needs the base model is converted where a MODEL is connected."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import w2wpp
from w2wpp.lora.write import kohya_tensors

from .graphs import AvatarGraph, Graph
from .server import REPO, Host, PromptFailed
from .test_edits import PCA, encoded, saved


def unet_weights() -> dict[str, torch.Tensor]:
    """The avatar base's weights [out, in] by diffusers' names."""
    stored = load_file(REPO / "models" / "avatar-base.safetensors")
    return {k.removeprefix("unet.").removesuffix(".weight"): t.float() for k, t in stored.items()}


@pytest.fixture(scope="module")
def person() -> tuple[w2wpp.Identity, dict]:
    space = w2wpp.load_space(REPO / "models" / PCA)
    drawn = space.sample(1, generator=torch.Generator().manual_seed(8))
    return drawn, space.layout.unpack(drawn.vectors(space)[0])


def put(host: Host, name: str, tensors: dict[str, torch.Tensor]) -> str:
    folder = host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / name)
    return name


def test_dora_is_converted_where_a_model_is_connected(host: Host, person) -> None:
    drawn, lora = person
    alpha = w2wpp.load_space(REPO / "models" / PCA).layout.alpha
    tensors, base = kohya_tensors(lora, alpha), unet_weights()
    for (
        name
    ) in lora:  # lengths of the base model itself, which ComfyUI divides by: the update is B A
        key = f"lora_unet_{name.replace('.', '_')}.dora_scale"
        tensors[key] = base[name].flatten(1).norm(dim=1, keepdim=True)
    file = put(host, "dora.safetensors", tensors)
    graph = AvatarGraph()
    encoder = encoded(graph, PCA, file=file, model=graph.model)
    found = saved(host, graph, [encoder, 0], "dora")
    torch.testing.assert_close(found.z, drawn.z, rtol=1e-3, atol=5e-3)
    alone = Graph()
    encoder = encoded(alone, PCA, file=file)
    alone.add("PreviewAny", source=[encoder, 1])
    with pytest.raises(PromptFailed, match="trained with DoRA"):
        host.run(alone.nodes)


def test_kinds_of_others_and_what_is_refused(host: Host, person) -> None:
    drawn, lora = person
    alpha = w2wpp.load_space(REPO / "models" / PCA).layout.alpha
    mixed: dict[str, torch.Tensor] = {}
    for i, (name, (a, b)) in enumerate(lora.items()):
        key, update = f"lora_unet_{name.replace('.', '_')}", alpha / len(a) * b
        if i % 3 == 0:
            mixed |= {f"{key}.diff": update @ a}
        elif i % 3 == 1:
            ones = torch.ones(len(b), 1), torch.ones(1, a.shape[1])
            names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
            mixed |= {f"{key}.{n}": t for n, t in zip(names, (update, a, *ones))}
        else:
            mixed |= {f"{key}.lokr_w1": torch.ones(1, 1), f"{key}.lokr_w2": update @ a}
    graph = Graph()
    encoder = encoded(graph, PCA, file=put(host, "mixed.safetensors", mixed))
    found = saved(host, graph, [encoder, 0], "mixed")
    torch.testing.assert_close(found.z, drawn.z, rtol=1e-3, atol=5e-3)
    first = next(k for k in mixed if k.endswith(".diff"))
    odd = {k: t for k, t in mixed.items() if k != first}
    odd[first.replace(".diff", ".oft_blocks")] = torch.zeros(4, 8, 8)
    graph = Graph()
    encoder = encoded(graph, PCA, file=put(host, "oft.safetensors", odd))
    graph.add("PreviewAny", source=[encoder, 1])
    with pytest.raises(PromptFailed, match="is OFT, which multiplies"):
        host.run(graph.nodes)
