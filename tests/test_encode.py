"""LoRAs of any gauge and rank: what encodes them finds the gauge of the space again."""

import json

import pytest
import torch

from w2wpp import (
    DataError,
    LayoutMismatch,
    Space,
    build_codec,
    encode_lora,
    kohya_tensors,
    load_lora,
    save_lora,
    transformer_layout,
)
from w2wpp.lora.files import lora_of_tensors
from w2wpp.lora.gauge import factor
from w2wpp.training.dataset import VectorDataset
from w2wpp.training.fit_basis import fit_basis

N, COMPONENTS = 120, 10


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_world(rank):
    """LoRAs that were trained alike: a common start, a few directions of their own, and noise."""
    blocks = [(f"down_blocks.1.attentions.{i}.transformer_blocks.0", 32) for i in range(2)]
    layout = transformer_layout("small", "sd15", blocks, context_dim=24, rank=rank, alpha=8.0)
    g = generator(rank)
    start = 0.1 * torch.randn(layout.size, generator=g)
    own = torch.randn(N, 6, generator=g) @ torch.randn(6, layout.size, generator=g)
    w = start + 0.01 * own + 0.003 * torch.randn(N, layout.size, generator=g)
    data = VectorDataset(layout, w, torch.arange(N), torch.arange(N) >= 100)
    basis = fit_basis(data, COMPONENTS)
    sizes = {"coefficient_size": COMPONENTS, "latent_size": COMPONENTS}
    codec = build_codec({"name": "pca", **sizes})
    return Space(layout, basis, codec, torch.zeros(COMPONENTS), torch.ones(COMPONENTS)), w[100:]


@pytest.fixture(scope="module", params=[1, 2, 3])
def world(request):
    return make_world(request.param)


def scrambled(layout, w, g):
    """The same updates in a random gauge."""
    lora = {}
    for name, (a, b) in layout.unpack(w.double()).items():
        change = torch.randn(layout.rank, layout.rank, generator=g, dtype=torch.float64)
        change += 0.3 * torch.eye(layout.rank)
        lora[name] = ((torch.linalg.inv(change) @ a).float(), (b @ change).float())
    return lora


def test_exported_loras_come_back_as_they_were(world, tmp_path):
    space, _ = world
    identity = space.sample(3, generator=generator(4))
    for format in ("kohya", "diffusers", "peft"):
        for i, w in enumerate(identity.vectors(space)):
            path = tmp_path / f"{format}{i}.safetensors"
            save_lora(space.layout.unpack(w), path, format=format, alpha=8.0)
            found, report = encode_lora(space, path)
            assert report.gauge == "kept" and report.update_error < 1e-3
            torch.testing.assert_close(found.z, identity.z[i : i + 1], atol=5e-3, rtol=0)
            assert found.provenance == {"made_by": "encode"}, "a file's name may be a person's"


def test_any_gauge_of_an_exported_lora_gives_the_same_identity(world):
    space, _ = world
    identity, g = space.sample(4, generator=generator(5)), generator(6)
    for i, w in enumerate(identity.vectors(space)):
        lora = scrambled(space.layout, w, g)
        raw = space.encode(space.layout.pack(lora)[None]).mean
        assert (raw - identity.z[i]).norm() > 1, "the gauge matters here"
        found, report = encode_lora(space, kohya_tensors(lora, 8.0))
        assert report.gauge == "resolved" and report.update_error < 2e-3
        torch.testing.assert_close(found.z, identity.z[i : i + 1], atol=0.05, rtol=0)


def test_native_loras_stay_near_and_their_gauge_does_not_matter(world):
    """People who were not learned from: nearly as packed, and the very same in any other gauge."""
    space, native = world
    g = generator(7)
    for w in native[:4]:
        raw = space.encode(w[None]).mean
        found, _ = encode_lora(space, kohya_tensors(space.layout.unpack(w), 8.0))
        assert (found.z - raw).norm() < 0.2 * raw.norm()
        again, _ = encode_lora(space, kohya_tensors(scrambled(space.layout, w, g), 8.0))
        torch.testing.assert_close(again.z, found.z, atol=2e-3, rtol=0)


def test_a_higher_rank_is_cut_to_the_best_of_the_product(world):
    """Two orthogonal updates side by side: the weaker one is lost, and the report says how much."""
    space, _ = world
    layout = space.layout
    w = space.sample(1, generator=generator(8)).vectors(space)[0]
    lora, lost = {}, []
    for name, (a, b) in layout.unpack(w).items():
        down, up = beyond(a), beyond(b.T).T
        strength = 0.1 * (b @ a).norm() / layout.rank**0.5 / (up @ down).norm()
        lora[name] = (torch.cat([a, down]), torch.cat([b, strength * up], dim=1))
        s = torch.linalg.svdvals((lora[name][1] @ lora[name][0]).double())
        lost.append((s[layout.rank :].square().sum(), s.square().sum()))
    expected = float(sum(x for x, _ in lost) / sum(x for _, x in lost))
    found, report = encode_lora(space, kohya_tensors(lora, 8.0 * (layout.rank + 1) / layout.rank))
    assert expected > 1e-3 and report.rank_energy_lost == pytest.approx(expected, rel=1e-3)
    assert report.gauge == "resolved" and report.update_error >= expected**0.5 * 0.99
    if layout.rank == 1:  # the lost part is orthogonal to the kept one
        torch.testing.assert_close(found.z, space.encode(w[None]).mean, atol=0.05, rtol=0)


def beyond(rows):
    """A unit row [1, n] that is orthogonal to rows [r, n]."""
    more = torch.cat([rows, torch.randn(1, rows.shape[1], generator=generator(9))])
    return torch.linalg.qr(more.T).Q[:, -1:].T


def test_alpha_belongs_to_the_update(world):
    space, _ = world
    lora = space.layout.unpack(space.sample(1, generator=generator(1)).vectors(space)[0])
    one, _ = encode_lora(space, kohya_tensors(lora, 8.0))
    half = {name: (a, 0.5 * b) for name, (a, b) in lora.items()}
    two, _ = encode_lora(space, kohya_tensors(half, 16.0))
    torch.testing.assert_close(one.z, two.z)


def test_what_is_outside_and_what_is_missing_is_told(world):
    space, _ = world
    lora = dict(space.layout.unpack(space.sample(1, generator=generator(2)).vectors(space)[0]))
    gone = next(iter(lora))
    extra = {n.replace("to_v", "to_k"): pair for n, pair in lora.items() if "to_v" in n}
    del lora[gone]
    tensors = kohya_tensors({**lora, **extra}, 8.0)
    tensors["lora_te_text_model.lora_down.weight"] = torch.ones(1, 3)
    identity, report = encode_lora(space, tensors)
    assert report.missing_modules == (gone,) and report.ignored_modules == tuple(sorted(extra))
    assert report.unread_tensors == ("lora_te_text_model.lora_down.weight",)
    assert bool(torch.isfinite(identity.z).all()) and "1 modules missing" in str(report)


def test_nothing_in_common_is_an_error(world):
    space, _ = world
    a, b = torch.ones(1, 32), torch.ones(32, 1)
    with pytest.raises(LayoutMismatch, match="has none of the 8 modules"):
        encode_lora(space, kohya_tensors({"mid_block.attentions.0.proj_in": (a, b)}, 1.0))
    name = space.layout.modules[0].name
    with pytest.raises(LayoutMismatch, match="maps 31 to 32 numbers"):
        encode_lora(space, kohya_tensors({name: (torch.ones(1, 31), b)}, 1.0))


def test_next_to_nothing_is_nobody(world):
    """An empty LoRA, and one that was trained with a learning rate of next to nothing."""
    space, _ = world
    lora = space.layout.unpack(space.sample(1, generator=generator(2)).vectors(space)[0])
    for strength in (0.0, 1e-3):
        weak = {name: (a, strength * b) for name, (a, b) in lora.items()}
        with pytest.raises(DataError, match="changes next to nothing"):
            encode_lora(space, kohya_tensors(weak, 8.0))
    half = {name: (a, 0.5 * b) for name, (a, b) in lora.items()}
    assert encode_lora(space, kohya_tensors(half, 8.0))[1].update_error < 1


def test_the_mean_lora_is_the_origin(world):
    space, _ = world
    lora = space.layout.unpack(space.basis.mean)
    identity, report = encode_lora(space, kohya_tensors(lora, 8.0))
    assert float(identity.z.abs().max()) < 1e-2 and report.update_error < 1e-3
    assert report.weight_r2 > 0.99
    json.dumps(report.to_json(), allow_nan=False)


def test_the_residual_keeps_what_latents_cannot_say(make_space):
    space = make_space("vae-skip")
    w = space.sample(1, generator=generator(3)).vectors(space)[0] + 0.001
    lora = kohya_tensors(space.layout.unpack(w), space.layout.alpha)
    plain, with_rest = encode_lora(space, lora), encode_lora(space, lora, residual=True)
    assert plain[0].residual is None and with_rest[0].residual is not None
    assert with_rest[1].update_error < plain[1].update_error


def test_a_space_of_raw_vectors_resolves_the_sign(make_space):
    """The seed's space has no mean and no basis: the LoRA of latent zero stands in for them."""
    space = make_space("original")
    w = space.decode(0.1 * torch.randn(1, space.latent_size, generator=generator(1)))[0]
    lora = space.layout.unpack(w)
    turned = {name: (-a, -b) for name, (a, b) in lora.items()}
    one, two = (encode_lora(space, kohya_tensors(x, 4.0))[0] for x in (lora, turned))
    raw = space.encode(space.layout.pack(turned)[None]).mean
    assert (two.z - one.z).norm() < 0.5 * (raw - one.z).norm()


def test_factors_are_the_best_of_their_rank():
    g = generator(2)
    a, b = torch.randn(5, 30, generator=g), torch.randn(20, 5, generator=g)
    new_a, new_b, lost = factor(a, b, 2)
    u, s, vt = torch.linalg.svd((b @ a).double())
    torch.testing.assert_close(new_b @ new_a, u[:, :2] * s[:2] @ vt[:2], atol=1e-4, rtol=1e-4)
    assert lost == pytest.approx(float(s[2:].square().sum()), rel=1e-5)
    torch.testing.assert_close(new_a.norm(), new_b.norm())
    new_a, new_b, lost = factor(a[:1], b[:, :1], 3)
    assert new_a.shape == (3, 30) and lost == 0
    torch.testing.assert_close(new_b @ new_a, (b[:, :1] @ a[:1]).double(), atol=1e-5, rtol=1e-5)


def test_a_lora_in_memory_reads_as_the_file_does(tmp_path, layout, dataset):
    lora = layout.unpack(dataset.vectors()[0])
    save_lora(lora, tmp_path / "a.safetensors", alpha=layout.alpha)
    file = load_lora(tmp_path / "a.safetensors")
    memory = lora_of_tensors(kohya_tensors(lora, layout.alpha))
    assert torch.equal(file.vector(layout), memory.vector(layout)) and file.alphas == memory.alphas
