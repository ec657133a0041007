"""A space of the full SD 1.5 size, on UNets of the full size with random weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import w2wpp
from w2wpp import SD15, Basis, Space, build_codec
from w2wpp.lora.layout import Lora

from .graphs import SAMPLER, Graph, Link
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


SPACE = "mine/random-sd15.safetensors"
ENDS = "to_q.weight to_v.weight"


class SD15Graph(Graph):
    """Starts with an SD 1.5 UNet of random weights and the random space."""

    def __init__(self, dtype: str = "float32") -> None:
        super().__init__()
        self.model: Link = [self.add("Probe_RandomModel", family="SD15", dtype=dtype), 0]
        self.space: Link = [self.add("W2WPP_LoadSpace", space=SPACE), 0]

    def sample(self, seed: int) -> Link:
        drawn = self.add(
            "W2WPP_SampleIdentity", space=self.space, seed=seed, truncation=1.0, count=1
        )
        return [drawn, 0]

    def apply(self, model: Link, seed: int, strength: float = 1.0, start: float = 0.0) -> str:
        return self.add(
            "W2WPP_ApplyDecodedLora", model=model, identity=self.sample(seed), strength=strength,
            start_percent=start,
        )  # fmt: skip

    def dump(self, model: Link, name: str) -> None:
        self.add("Probe_Weights", model=model, file=f"{name}.safetensors", endings=ENDS)


def read(host: Host, name: str) -> dict[str, torch.Tensor]:
    return load_file(host.output / f"{name}.safetensors")


def lora_of(space: Space, seed: int) -> Lora:
    identity = space.sample(1, generator=torch.Generator().manual_seed(seed))
    return SD15.unpack(identity.vectors(space)[0])


def updates(space: Space, strengths: dict[int, float]) -> dict[str, torch.Tensor]:
    """What identities add to the host's weights, {seed: strength}."""
    total: dict[str, torch.Tensor] = {}
    for seed, strength in strengths.items():
        for module, (a, b) in lora_of(space, seed).items():
            key = host_key(module, SD15_BLOCKS)
            total[key] = total.get(key, 0) + strength * 27.0 * b @ a
    return total


def assert_updated(
    bare: dict[str, torch.Tensor],
    patched: dict[str, torch.Tensor],
    added: dict[str, torch.Tensor],
    rtol: float = 1e-5,
) -> None:
    assert len(bare) == 64 and bare.keys() == patched.keys() == added.keys()
    for key, update in added.items():
        assert update.abs().max() > 1e-3
        expected = bare[key].float() + update
        torch.testing.assert_close(patched[key].float(), expected, rtol=rtol, atol=rtol / 10)


def test_all_64_modules_of_sd15_are_patched_and_restored(host: Host, space: Space) -> None:
    graph = SD15Graph()
    graph.dump(graph.model, "bare")
    graph.dump([graph.apply(graph.model, 3, 0.8), 0], "patched")
    host.run(graph.nodes)
    graph.dump(graph.model, "restored")  # the same model, now that the patched copy is unloaded
    host.run(graph.nodes)
    assert_updated(read(host, "bare"), read(host, "patched"), updates(space, {3: 0.8}))
    bare, restored = read(host, "bare"), read(host, "restored")
    assert all(torch.equal(bare[key], restored[key]) for key in bare)


def test_a_checkpoint_in_half_precision_is_patched_to_its_own_precision(
    host: Host, space: Space
) -> None:
    graph = SD15Graph("float16")
    graph.dump(graph.model, "bare16")
    graph.dump([graph.apply(graph.model, 3), 0], "patched16")
    host.run(graph.nodes)
    bare, patched = read(host, "bare16"), read(host, "patched16")
    assert {t.dtype for t in patched.values()} == {torch.float16}
    # The host rounds to one of the two neighbours: 2^-10 apart at most.
    assert_updated(bare, patched, updates(space, {3: 1.0}), rtol=2**-10)


def test_other_loras_and_adapters_stay_in_place(host: Host, space: Space) -> None:
    graph = SD15Graph()
    graph.dump(graph.model, "before")
    other = graph.apply(graph.model, 4)
    styled = graph.add(
        "LoraModelLoader", model=graph.model, lora=[other, 1], strength_model=0.5, bypass=False
    )
    adapted = graph.add("Probe_Adapters", model=[styled, 0], weight=0.5)
    applied = graph.apply([adapted, 0], 3)
    graph.dump([applied, 0], "with-other")
    graph.dump([graph.apply([applied, 0], 5, -0.3), 0], "with-two")
    late = graph.apply([adapted, 0], 3, start=0.5)
    graph.dump([late, 0], "with-other-late")
    host.run(graph.nodes)
    before = read(host, "before")
    assert_updated(before, read(host, "with-other"), updates(space, {3: 1.0, 4: 0.5}))
    assert_updated(before, read(host, "with-two"), updates(space, {3: 1.0, 4: 0.5, 5: -0.3}))
    assert_updated(before, read(host, "with-other-late"), updates(space, {4: 0.5}))


def test_identities_and_a_controlnet_both_act(host: Host, space: Space) -> None:
    graph = SD15Graph()
    base = graph.add("Probe_SD15", dtype="float32", inpaint=False)
    picture = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0x305080)
    control = graph.add("Probe_ControlNet")
    steered = graph.add(
        "ControlNetApply", conditioning=[base, 1], control_net=[control, 0], image=[picture, 0], strength=0.1,
    )  # fmt: skip
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    bare: Link = [base, 0]
    ways = {
        "bare": (bare, base, 1),
        "control": (bare, steered, 0),
        "identity": ([graph.apply(bare, 3), 0], base, 1),
        "both": ([graph.apply(bare, 3), 0], steered, 0),
        "both, late": ([graph.apply(bare, 3, start=0.5), 0], steered, 0),
        "both, at 0": ([graph.apply(bare, 3, strength=0.0), 0], steered, 0),
    }
    for name, (model, prompt, output) in ways.items():
        sampled = graph.add(
            "KSampler", model=model, positive=[prompt, output], negative=[base, 1],
            latent_image=[latent, 0], **{**SAMPLER, "steps": 4}, seed=1,
        )  # fmt: skip
        graph.add("SaveLatent", samples=[sampled, 0], filename_prefix=f"controlled-{name}")
    host.run(graph.nodes)
    found = {
        name: load_file(next(host.output.glob(f"controlled-{name}_*.latent")))["latent_tensor"]
        for name in ways
    }
    assert all(bool(torch.isfinite(t).all()) for t in found.values())
    assert torch.equal(found["both, at 0"], found["control"])
    distinct = [found[name] for name in ("bare", "control", "identity", "both", "both, late")]
    for i, one in enumerate(distinct):
        for other in distinct[i + 1 :]:
            assert (one - other).abs().max() > 1e-3


def test_a_saved_file_gives_the_same_weights_through_the_stock_loader(
    host: Host, space: Space
) -> None:
    folder = host.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sd15-kohya.safetensors"
    w2wpp.save_lora(lora_of(space, 3), path, format="kohya", alpha=SD15.alpha)
    graph = SD15Graph()
    applied = graph.apply(graph.model, 3, 0.8)
    graph.add("SaveLoRA", lora=[applied, 1], prefix="loras/sd15-saved")
    graph.dump([applied, 0], "by-apply")
    host.run(graph.nodes)
    saved = max((host.output / "loras").glob("sd15-saved*.safetensors")).name
    for name, file in (("saved", saved), ("kohya", path.name)):
        loaded = graph.add(
            "LoraLoaderModelOnly", model=graph.model, lora_name=file, strength_model=0.8
        )
        graph.dump([loaded, 0], f"by-{name}")
    host.run(graph.nodes)
    expected = read(host, "by-apply")
    assert all(torch.equal(expected[key], t) for key, t in read(host, "by-saved").items())
    for key, found in read(host, "by-kohya").items():  # decoded by another torch, perhaps
        torch.testing.assert_close(found, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("node", "family", "trouble"),
    [
        ("Probe_RandomModel", "SD20", "0 of them are missing and 16 have another shape"),
        ("Probe_OtherModel", "SDXL", "32 of them are missing and 17 have another shape"),
        ("Probe_OtherModel", "Flux", "64 of them are missing and 0 have another shape"),
    ],
)
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_other_families_are_refused_by_name(
    host: Host, space: Space, node: str, family: str, trouble: str, start: float
) -> None:
    graph = SD15Graph()
    model = graph.add(node, family=family)
    graph.dump([graph.apply([model, 0], 3, start=start), 0], "never")
    with pytest.raises(PromptFailed, match=f"the model is {family} .*: {trouble}"):
        host.run(graph.nodes)
    assert not (host.output / "never.safetensors").exists()
