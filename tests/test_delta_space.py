"""A space of collected LoRAs: what it spans, how it reads others, and its file."""

import copy
import dataclasses
import pickle

import pytest
import torch
from safetensors.torch import save_file

from w2wpp import (
    ConfigError,
    DataError,
    FormatError,
    Identity,
    LayoutMismatch,
    encode_lora,
    load_space,
    lora_of_tensors,
    save_space,
)
from w2wpp.delta_basis import compute_grams
from w2wpp.encode_delta import as_member
from w2wpp.export import export_lora
from w2wpp.files.container import open_container
from w2wpp.lora.collection import collect, members_of
from w2wpp.lora.delta import Factors, Stack, cut, inner
from w2wpp.lora.members import member_of_tensors
from w2wpp.mixtures import members, mix, sample_mixtures
from w2wpp.training.collection_report import cosines, held_out_shares, mean_shares
from w2wpp.training.fit_delta import (
    CollectionSettings,
    collection_layout,
    compare_members,
    fit_delta,
    fitting,
    lora_files,
    open_members,
)

ATTENTION = "down_blocks.{}.attentions.0.transformer_blocks.0.attn{}.to_{}"
SIZES = {
    ATTENTION.format(1, 1, "q"): (24, 24),
    ATTENTION.format(1, 2, "k"): (24, 768),
    ATTENTION.format(2, 1, "q"): (32, 32),
    ATTENTION.format(2, 2, "v"): (32, 768),
}
RANKS = [1, 2, 4, 3, 2, 1, 8]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def half(t):
    return t.half().float()


def lora(g, rank, *, skip=()):
    """Numbers that half precision holds, so that nothing is rounded on the way into a space."""
    return {
        name: Factors(
            half(torch.randn(rank, size_in, generator=g)),
            half(0.1 * torch.randn(size_out, rank, generator=g)),
            0.5,
        )
        for name, (size_out, size_in) in SIZES.items()
        if name not in skip
    }


@pytest.fixture(scope="module")
def loras():
    g = generator(3)
    common = lora(g, 2)
    found = {}
    for i, rank in enumerate(RANKS):
        own = lora(g, rank, skip=list(SIZES)[:1] if i == 2 else ())
        found[f"file {i}"] = {
            n: Factors(
                torch.cat([f.down, common[n].down]), torch.cat([f.up, common[n].up], 1), f.scale
            )
            for n, f in own.items()
        }
    return found


@pytest.fixture(scope="module")
def made(loras):
    return fit_delta(members_of(loras), CollectionSettings(rank=30))


def dense(update):
    return torch.cat(
        [
            update[n].dense().flatten() if n in update else torch.zeros(o * i).double()
            for n, (o, i) in SIZES.items()
        ]
    )


def dense_vector(space, w):
    update = {n: Factors(a, b, space.layout.scale) for n, (a, b) in space.layout.unpack(w).items()}
    return dense(update)


@pytest.fixture(scope="module")
def built(loras):
    return torch.stack([dense(u) for u in loras.values()])


def test_it_is_pca_of_the_built_updates(made, built):
    space, report = made
    mean = built.mean(0)
    _, s, v = torch.linalg.svd((built - mean) / (len(built) - 1) ** 0.5, full_matrices=False)
    k = len(built) - 1
    assert space.basis.n_components == space.latent_size == k
    torch.testing.assert_close(space.basis.singular_values.double(), s[:k], rtol=1e-5, atol=0)
    expected = (built - mean) @ v[:k].T / s[:k]
    found = space.basis.member_coefficients().double()
    torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-4, rtol=1e-4)
    share = s[:k].square().cumsum(0) / s.square().sum()
    torch.testing.assert_close(torch.tensor(report.explained).double(), share, atol=1e-5, rtol=0)


class Watched:
    """A collection that tells of its reads, and fails at some."""

    def __init__(self, collection, fails_at=None):
        self.collection, self.fails_at, self.read = collection, fails_at, []
        self.count, self.ranks = collection.count, collection.ranks

    def stack(self, module, room=None):
        self.read.append(module)
        if module == self.fails_at:
            raise DataError("unreadable")
        return self.collection.stack(module, room)


def test_modules_are_read_once_and_errors_and_interrupts_come_through(loras, built):
    collection = collect(members_of(loras))
    layout = collection_layout(collection, 4)
    watched, seen = Watched(collection), []
    grams = compute_grams(layout, watched, lambda done, of: seen.append((done, of)))
    torch.testing.assert_close(grams.total, built @ built.T)
    assert sorted(watched.read) == list(range(len(SIZES)))
    assert seen == [(i + 1, len(SIZES)) for i in range(len(SIZES))]
    with pytest.raises(DataError, match="unreadable"):
        compute_grams(layout, Watched(collection, fails_at=2))

    def stop(done, of):
        raise InterruptedError

    stopped = Watched(collection)
    with pytest.raises(InterruptedError):
        compute_grams(layout, stopped, stop)
    # The modules that are multiplied at a time, and the one that is read ahead.
    assert len(stopped.read) <= torch.get_num_threads() + 1


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_inner_products_do_not_depend_on_the_number_of_cores(loras, cores):
    before = torch.get_num_threads()
    collection = collect(members_of(loras))
    layout = collection_layout(collection, 4)
    try:
        torch.set_num_threads(cores)
        found = compute_grams(layout, collection)
        again = compute_grams(layout, Watched(collection))
    finally:
        torch.set_num_threads(before)
    # Each module by itself, on one core and in memory of its own.
    alone = sum(inner(collection.stack(i)) for i in range(len(SIZES)))
    torch.testing.assert_close(found.total, alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.total, again.total)


def test_a_module_without_room_on_the_device_is_compared_on_the_cpu(loras, built, monkeypatch):
    collection = collect(members_of(loras))
    moved = []

    def to(stack, device):
        moved.append(device)
        if len(moved) == 2:
            raise torch.cuda.OutOfMemoryError
        return stack

    monkeypatch.setattr(Stack, "to", to)
    grams = compute_grams(collection_layout(collection, 4), collection, device="cuda:7")
    torch.testing.assert_close(grams.total, built @ built.T)
    assert moved == ["cuda:7"] * len(SIZES)


TEXT = "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj"


def with_texts(loras):
    """{name: tensors} of LoRAs that change text encoders as well, and {name: that part}."""
    g, tensors, parts = generator(8), {}, {}
    for i, (name, update) in enumerate(loras.items()):
        texts = {
            TEXT.format(layer): Factors(
                half(torch.randn(2, 24, generator=g)), half(torch.randn(24, 2, generator=g)), 0.5
            )
            for layer in range(2 if i else 1)
        }
        parts[name] = texts
        tensors[name] = {}
        for module, f in update.items():
            tensors[name][f"unet.{module}.lora_A.weight"] = f.down
            tensors[name][f"unet.{module}.lora_B.weight"] = f.up * f.scale
        for module, f in texts.items():
            key = module if i % 2 else "lora_te_" + module.partition(".")[2].replace(".", "_")
            tensors[name][f"{key}.lora_down.weight"] = f.down
            tensors[name][f"{key}.lora_up.weight"] = f.up
            tensors[name][f"{key}.alpha"] = torch.tensor(1.0)
    return tensors, parts


def test_text_encoders_make_a_space_of_their_own(loras, built, tmp_path):
    tensors, parts = with_texts(loras)
    members = [member_of_tensors(t, name, text_encoders=True) for name, t in tensors.items()]
    space, report = fit_delta(members, CollectionSettings(rank=16))
    assert [m.name for m in space.layout.modules] == [TEXT.format(0), TEXT.format(1)]
    assert space.base_model == "sd15"  # by the modules of the model beside them
    assert report.text_encoders and f"{len(loras)} files also change the model itself" in str(
        report
    )
    own = torch.stack(
        [
            torch.cat(
                [
                    u[TEXT.format(i)].dense().flatten()
                    if TEXT.format(i) in u
                    else torch.zeros(24 * 24).double()
                    for i in range(2)
                ]
            )
            for u in parts.values()
        ]
    )
    torch.testing.assert_close(space.basis.grams.total, own @ own.T)
    plain, _ = fit_delta([member_of_tensors(t, name) for name, t in tensors.items()])
    torch.testing.assert_close(plain.basis.grams.total, built @ built.T)  # nothing of them

    save_file(tensors["file 3"], tmp_path / "3.safetensors")
    for lora in (tensors["file 3"], tmp_path / "3.safetensors"):
        identity, encoded = encode_lora(space, lora)
        assert encoded.explained == pytest.approx(1.0, abs=1e-5)
        assert f"{len(loras['file 3'])} modules of the diffusion model left out" in str(encoded)
    with pytest.raises(ConfigError, match="read without its text encoders"):
        encode_lora(space, lora_of_tensors(tensors["file 3"]))
    with pytest.raises(FormatError, match="changes no text encoder"):
        member_of_tensors(
            {k: v for k, v in tensors["file 3"].items() if k.startswith("unet")},
            text_encoders=True,
        )
    for format, key in (("kohya", "lora_te_text_model"), ("diffusers", "text_encoder.text_model")):
        path = tmp_path / f"{format}.safetensors"
        export_lora(identity, space, path, format=format)
        assert all(k.startswith(key) for k in open_container(path).entries)
        back = encode_lora(space, path)[0]
        torch.testing.assert_close(back.z, identity.z, atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="adapter is of one model"):
        export_lora(identity, space, tmp_path / "adapter", format="peft")


def test_latents_are_standardised_over_the_members(made):
    z = members(made[0]).z
    torch.testing.assert_close(z.mean(0), torch.zeros(z.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(z.shape[1]), atol=1e-4, rtol=0)


def test_the_members_come_back(made, built):
    space, _ = made
    w = space.decode(members(space).z)
    for row, truth in zip(w, built):
        torch.testing.assert_close(dense_vector(space, row), truth, atol=2e-4, rtol=0)


def test_points_are_combinations_whose_weights_sum_to_one(made, built):
    space, _ = made
    z = torch.randn(3, space.latent_size, generator=generator(5))
    shares = space.basis.shares(z)
    torch.testing.assert_close(shares.sum(1), torch.ones(3).double())
    for row, a in zip(space.decode(z), shares):
        torch.testing.assert_close(dense_vector(space, row), a @ built, atol=5e-4, rtol=0)


def test_encoding_undoes_decoding_and_does_not_see_the_gauge(made):
    space, _ = made
    g = generator(6)
    z = torch.randn(4, space.latent_size, generator=g)
    w = space.decode(z)
    torch.testing.assert_close(space.encode(w).mean, z, atol=1e-4, rtol=0)
    turned = {}
    for name, (a, b) in space.layout.unpack(w).items():
        q = torch.linalg.qr(torch.randn(30, 30, generator=g))[0]
        m = q * (0.5 + torch.rand(30, generator=g))
        turned[name] = (torch.linalg.solve(m, a), b @ m)
    again = space.encode(space.layout.pack(turned)).mean
    torch.testing.assert_close(again, z, atol=1e-4, rtol=0)


def test_a_lower_rank_is_the_nearest_and_its_energy_is_told(loras, built):
    space, _ = fit_delta(members_of(loras), CollectionSettings(rank=3))
    z = torch.randn(2, space.latent_size, generator=generator(7))
    c = z * space.prior_std + space.prior_mean
    w = space.decode(z)
    kept = space.basis.kept_energy(c, w)
    for row, a, share in zip(w, space.basis.shares(c), kept):
        truth, best, start = a @ built, [], 0
        for out, size in SIZES.values():
            block = truth[start : start + out * size].view(out, size)
            u, s, vt = torch.linalg.svd(block, full_matrices=False)
            best.append(((u[:, :3] * s[:3]) @ vt[:3]).flatten())
            start += out * size
        best = torch.cat(best)
        torch.testing.assert_close(dense_vector(space, row), best, atol=1e-3, rtol=0)
        assert float(share) == pytest.approx(float(best @ best / (truth @ truth)), rel=1e-4)
    assert 0.2 < float(kept.min()) and float(kept.max()) < 0.999


def test_gram_matrices_that_are_kept_change_nothing(loras, monkeypatch):
    z = torch.randn(3, 2, generator=generator(8))
    taken = []
    grams = Stack.column_grams
    monkeypatch.setattr(Stack, "column_grams", lambda s: taken.append(s) or grams(s))
    settings = CollectionSettings(rank=3, components=2)
    space, _ = fit_delta(members_of(loras), settings)
    first = space.decode(z)
    assert len(taken) == len(SIZES)
    one_by_one = torch.cat([space.decode(row[None]) for row in z])
    assert len(taken) == len(SIZES)  # once a module
    torch.testing.assert_close(one_by_one, first, atol=1e-6, rtol=0)
    monkeypatch.setattr("w2wpp.delta_basis.KEPT_BYTES", 0)
    poor, _ = fit_delta(members_of(loras), settings)
    torch.testing.assert_close(poor.decode(z), first, atol=1e-6, rtol=0)
    assert len(taken) == len(SIZES)


def test_mixtures_stay_inside(made, built):
    space, _ = made
    shares = torch.zeros(1, len(RANKS)).double()
    shares[0, 1], shares[0, 4] = 0.3, 0.7
    w = space.decode(space.basis.mixture(shares))
    expected = 0.3 * built[1] + 0.7 * built[4]
    torch.testing.assert_close(dense_vector(space, w[0]), expected, atol=3e-4, rtol=0)
    with pytest.raises(ConfigError, match="sum to one"):
        space.basis.mixture(shares * 2)
    torch.testing.assert_close(mix(space, {1: 3, 4: 7}).vectors(space), w, atol=1e-5, rtol=0)
    for bad in ({99: 1.0}, {0: -1.0}, {0: float("nan")}, {}):
        with pytest.raises(ConfigError):
            mix(space, bad)


def test_drawn_mixtures_have_weights_of_their_own_and_the_same_for_one_seed(made):
    space, _ = made
    drawn = sample_mixtures(space, 20, generator=generator(9))
    again = sample_mixtures(space, 3, generator=generator(9))
    assert torch.equal(drawn.z[:3], again.z)
    shares = space.basis.shares(drawn.z)
    assert float(shares.min()) > -1e-5
    told = torch.tensor(drawn.provenance["weights"]).double()
    torch.testing.assert_close(shares, told, atol=1e-5, rtol=0)
    assert ((shares > 1e-4).sum(1) <= 3).all() and len(set(map(tuple, told.tolist()))) == 20
    nearer = sample_mixtures(space, 20, generator=generator(9), truncation=0.5)
    torch.testing.assert_close(nearer.z, drawn.z / 2, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="truncation of 1"):
        sample_mixtures(space, 1, generator=generator(), truncation=1.5)


def test_only_a_collection_can_be_mixed(make_space):
    with pytest.raises(ConfigError, match="does not hold the LoRAs"):
        sample_mixtures(make_space("pca"), 1, generator=generator())


def test_weights_of_files_move_the_mean(loras, built):
    weights = {"file 0": 3.0, "file 6": 0.0}
    space, _ = fit_delta(members_of(loras), CollectionSettings(rank=30), weights=weights)
    p = torch.tensor([3.0, 1, 1, 1, 1, 1, 0]).double() / 8
    mean = dense_vector(space, space.decode(torch.zeros(1, space.latent_size))[0])
    torch.testing.assert_close(mean, p @ built, atol=2e-4, rtol=0)
    z = members(space).z.double()
    torch.testing.assert_close(p @ z, torch.zeros(z.shape[1]).double(), atol=1e-4, rtol=0)
    for bad in ({"nobody": 1.0}, {"file 0": float("nan")}, {"file 0": -1.0}):
        with pytest.raises(ConfigError):
            fit_delta(members_of(loras), weights=bad)


def test_shares_of_the_report_are_those_of_refits(made, built):
    _, report = made
    for i in (0, 3):
        rest = torch.cat([built[:i], built[i + 1 :]])
        mean = rest.mean(0)
        _, _, v = torch.linalg.svd(rest - mean, full_matrices=False)
        v = v[: len(rest) - 1]
        guess = mean + (built[i] - mean) @ v.T @ v
        share = 1 - (built[i] - guess).square().sum() / built[i].square().sum()
        assert report.held_out[i] == pytest.approx(float(share), abs=1e-4)
        cosine = (built[i] @ mean) / (built[i].norm() * mean.norm())
        assert report.mean_only[i] == pytest.approx(float(cosine) ** 2, abs=1e-4)


def test_file_round_trip_to_the_bit(made, tmp_path):
    space, _ = made
    path = tmp_path / "space.safetensors"
    save_space(space, path)
    read = load_space(path)
    z = torch.randn(2, space.latent_size, generator=generator(8))
    assert torch.equal(read.decode(z), space.decode(z))
    assert torch.equal(read.encode(space.decode(z)).mean, space.encode(space.decode(z)).mean)
    recomputed = dataclasses.replace(read, provenance={"name": "x"})
    assert read.fingerprint == space.fingerprint == recomputed.fingerprint
    file = open_container(path)
    assert file.metadata["format_version"] == "2"
    stored = {e.dtype for n, e in file.entries.items() if n.startswith("delta.")}
    assert stored == {torch.float16}
    again = tmp_path / "again.safetensors"
    save_space(read, again)
    assert again.read_bytes() == path.read_bytes()


def test_opening_reads_no_factors(made, tmp_path, monkeypatch):
    save_space(made[0], tmp_path / "s.safetensors")
    seen = []
    container = type(open_container(tmp_path / "s.safetensors"))
    original = container.read
    monkeypatch.setattr(
        container, "read", lambda self, n, **k: (seen.append(n), original(self, n, **k))[1]
    )
    space = load_space(tmp_path / "s.safetensors")
    space.sample(2, generator=generator())
    assert not [n for n in seen if n.startswith("delta.")]
    space.decode(torch.zeros(1, space.latent_size))
    assert len([n for n in seen if n.startswith("delta.")]) == 2 * len(SIZES)


def test_a_damaged_file_is_refused_by_name(made, tmp_path):
    import json
    import struct

    path = tmp_path / "s.safetensors"
    save_space(made[0], path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    for change in (
        lambda c: c["basis"].update(members=99),
        lambda c: c["basis"].update(rank="x"),
        lambda c: c["basis"].pop("blocks"),
        lambda c: c["layout"]["modules"].pop(),
    ):
        config = json.loads(header["__metadata__"]["config"])
        change(config)
        damaged = {
            **header,
            "__metadata__": {**header["__metadata__"], "config": json.dumps(config)},
        }
        text = json.dumps(damaged).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
        with pytest.raises(FormatError):
            load_space(path)


def test_members_cut_to_a_rank_and_the_error_of_it(loras):
    cut_to = CollectionSettings(rank=30, cut_to=2)
    space, report = fit_delta(members_of(loras), cut_to)
    expected = total = 0.0
    for update in loras.values():
        for f in update.values():
            size = float(f.dense().square().sum())
            total += size
            expected += size - cut(f, 2)[1]
    assert report.rounding == pytest.approx((expected / total) ** 0.5, rel=1e-2)
    assert int(space.basis.stacks.ranks.max()) == 2


def test_copies_pairs_and_outliers_are_named(loras):
    more = dict(loras)
    more["copy"] = {n: Factors(f.down, f.up, 2 * f.scale) for n, f in loras["file 1"].items()}
    more["giant"] = {n: Factors(f.down, f.up, 50 * f.scale) for n, f in loras["file 5"].items()}
    more["empty"] = {n: Factors(f.down, f.up * 0, 1.0) for n, f in loras["file 1"].items()}
    _, report = fit_delta(members_of(more))
    found = {(a, b): c for a, b, c in report.copies}
    assert found[("copy", "file 1")] == pytest.approx(2.0, rel=1e-3)
    assert "giant" in dict(report.outliers)
    assert "zero" in dict(report.refused)["empty"] and len(report.names) == 9
    fit_delta(members_of(more), weights={"empty": 2.0})  # left out, so its weight does not matter
    assert "mixtures" in report.expectation or "mix" in report.expectation
    text = str(report)
    assert "copies: copy is file 1" in text and "did not fit: empty" in text


def test_what_a_file_tells_keeps_names_to_itself(loras):
    space, _ = fit_delta(members_of(loras))
    assert "file 0" not in str(space.provenance)
    named, _ = fit_delta(members_of(loras), CollectionSettings(keep_names=True))
    assert named.provenance["members"] == list(loras)


def test_too_few_or_only_copies(loras):
    with pytest.raises(DataError, match="two LoRAs"):
        fit_delta(members_of({"one": loras["file 0"]}))
    twice = {"a": loras["file 0"], "b": loras["file 0"]}
    with pytest.raises(DataError, match="nothing between them"):
        fit_delta(members_of(twice))


def test_members_of_another_family_or_size_do_not_fit(loras):
    other = {"double_blocks.0.img_attn.qkv": Factors(torch.ones(1, 3072), torch.ones(9216, 1))}
    wide = {
        n: Factors(torch.ones(1, 1024 if f.down.shape[1] == 768 else f.down.shape[1]), f.up[:, :1])
        for n, f in loras["file 0"].items()
    }
    kept, refused = fitting(members_of({**loras, "flux": other, "wide": wide}))
    assert [m.name for m in kept] == list(loras)
    assert "flux" in dict(refused)["flux"] and "sd2" in dict(refused)["wide"]


def test_a_file_too_small_to_tell_its_model_fits_by_what_it_shares():
    fused = {"joint_blocks.0.x_block.attn.qkv": Factors(torch.ones(1, 128), torch.randn(384, 1))}
    other = {"joint_blocks.0.x_block.attn.qkv": Factors(torch.ones(1, 128), torch.randn(384, 1))}
    small = {"transformer_blocks.0.attn.to_v": Factors(torch.ones(1, 128), torch.randn(128, 1))}
    alien = {"transformer_blocks.0.attn.to_v": Factors(torch.ones(1, 64), torch.randn(64, 1))}
    given = members_of({"fused": fused, "other": other, "small": small, "alien": alien})
    assert [m.family for m in given] == ["sd3", "sd3", "unknown", "unknown"]
    kept, refused = fitting(given)
    assert [m.name for m in kept] == ["fused", "other", "small"]
    assert collect(kept).family == "sd3"
    assert dict(refused) == {"alien": "it is for unknown, most others are for sd3"}


def test_spellings_of_one_lora_are_one(loras, tmp_path):
    update = loras["file 1"]
    kohya, peft, older = {}, {}, {}
    for n, f in update.items():
        key = "lora_unet_" + n.replace(".", "_")
        kohya[key + ".lora_down.weight"], kohya[key + ".lora_up.weight"] = f.down, f.up
        kohya[key + ".alpha"] = torch.tensor(f.scale * f.rank)
        peft[f"base_model.model.{n}.lora_A.weight"] = f.down
        peft[f"base_model.model.{n}.lora_B.weight"] = f.up * f.scale
        stem, target = n.rsplit(".", 1)
        older[f"unet.{stem}.processor.{target}_lora.down.weight"] = f.down
        older[f"unet.{stem}.processor.{target}_lora.up.weight"] = f.up * f.scale
    kohya["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(1, 768)
    kohya["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.ones(768, 1)
    for name, tensors in (("kohya", kohya), ("peft", peft), ("older", older)):
        save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / f"{name}.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    save_file({"x.hada_w1_a": torch.ones(1)}, tmp_path / "loha.safetensors")
    opened, refused = open_members(lora_files([tmp_path]))
    assert [m.name for m in opened] == ["kohya", "older", "peft"]
    assert sorted(name for name, _ in refused) == ["broken", "loha"]
    assert "x lacks its part 'hada_w1_b'" in dict(refused)["loha"]
    assert opened[0].apart == 1 and {m.family for m in opened} == {"sd15"}
    together = collect(opened)
    assert set(together.shapes) == set(SIZES)
    from w2wpp.lora.delta import inner

    total = sum(inner(together.stack(i)) for i in range(len(SIZES)))
    torch.testing.assert_close(cosines(total), torch.ones(3, 3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(total, total[0, 0].expand(3, 3), rtol=1e-3, atol=0)


def other_kinds(g):
    """Files of other kinds for the modules of SIZES, and the updates that they mean, dense."""

    def numbers(*shape):
        return 0.3 * torch.randn(shape, generator=g)

    loha, lokr, whole, high = {}, {}, {}, {}
    updates = {"loha": {}, "lokr": {}, "whole": {}, "high": {}}
    for n, (o, i) in SIZES.items():
        key = "lycoris_" + n.replace(".", "_")
        a1, b1, a2, b2 = numbers(o, 2), numbers(2, i), numbers(o, 3), numbers(3, i)
        loha |= {
            f"{key}.hada_w1_a": a1,
            f"{key}.hada_w1_b": b1,
            f"{key}.hada_w2_a": a2,
            f"{key}.hada_w2_b": b2,
        }
        loha[f"{key}.alpha"] = torch.tensor(1.0)
        updates["loha"][n] = 0.5 * (a1 @ b1) * (a2 @ b2)
        w1, a, b = numbers(2, 2), numbers(o // 2, 2), numbers(2, i // 2)
        lokr |= {f"{key}.lokr_w1": w1, f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b}
        lokr[f"{key}.alpha"] = torch.tensor(1.0)
        updates["lokr"][n] = 0.5 * torch.kron(w1, a @ b)
        whole[f"diffusion_model.{n}.diff"] = updates["whole"][n] = numbers(o, i)
        w2 = numbers(o // 2, i // 2)
        high |= {f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2}
        updates["high"][n] = torch.kron(w1, w2)
    return {"loha": loha, "lokr": lokr, "whole": whole, "high": high}, updates


def flat(update):
    return torch.cat([update[n].double().flatten() for n in SIZES])


def test_other_kinds_are_members_by_their_updates(made, loras):
    files, updates = other_kinds(generator(41))
    together = [*members_of(loras), *(member_of_tensors(files[n], n) for n in ("loha", "lokr"))]
    space, report = fit_delta(together, CollectionSettings(rank=30))
    assert not report.refused and report.names[-2:] == ("loha", "lokr")
    expected = torch.stack(
        [dense(u) for u in loras.values()] + [flat(updates[n]) for n in ("loha", "lokr")]
    )
    torch.testing.assert_close(space.basis.grams.total, expected @ expected.T, rtol=2e-3, atol=2e-3)
    with_zero = torch.zeros(1, len(together), dtype=torch.float64)
    for i, n in ((-2, "loha"), (-1, "lokr")):
        shares = with_zero.clone()
        shares[0, i] = 1.0
        w = space.lift(space.basis.mixture(shares))[0]
        lost = dense_vector(space, w) - flat(updates[n])
        assert float(lost.norm()) < 2e-3 * float(flat(updates[n]).norm())
        # And a file of that kind is encoded as what it is.
        identity, told = encode_lora(space, lora_of_tensors(files[n]))
        assert told.explained == pytest.approx(1.0, abs=1e-3)
        torch.testing.assert_close(identity.z, space.basis.mixture(shares), atol=1e-2, rtol=0)


def test_whole_matrices_are_members_once_they_are_cut_and_refused_otherwise(loras):
    files, updates = other_kinds(generator(42))
    together = [*members_of(loras), *(member_of_tensors(files[n], n) for n in ("whole", "high"))]
    space, report = fit_delta(together)
    assert [name for name, _ in report.refused] == ["whole", "high"]
    assert "is a full difference that is a whole matrix" in dict(report.refused)["whole"]
    assert "is a LoKr that is a whole matrix" in dict(report.refused)["high"]
    compared = compare_members(together)
    assert len(compared.names) == len(loras) and len(compared.refused) == 2
    space, report = fit_delta(together, CollectionSettings(rank=30, cut_to=8))
    assert not report.refused and 0.05 < report.rounding < 1
    for i, n in ((-2, "whole"), (-1, "high")):
        kept = sum(
            float(torch.linalg.svdvals(updates[n][m].double())[:8].square().sum()) for m in SIZES
        )
        assert float(space.basis.grams.total[i, i]) == pytest.approx(kept, rel=1e-3)


def test_what_depends_on_the_base_is_refused_by_file_and_module(loras):
    module = next(iter(SIZES))
    size_out, size_in = SIZES[module]
    pair = {
        f"{module}.lora_A.weight": torch.ones(1, size_in),
        f"{module}.lora_B.weight": torch.ones(size_out, 1),
    }
    for extra, reason in (
        ({f"{module}.dora_scale": torch.ones(size_out, 1)}, "is trained with DoRA"),
        (
            {f"{module}.diff": torch.ones(size_out, size_in)},
            "is given as LoRA and as full difference",
        ),
    ):
        with pytest.raises(FormatError, match=f"mine.*{module}.*{reason}|mine.*{module} {reason}"):
            member_of_tensors({**pair, **extra}, "mine")
    with pytest.raises(FormatError, match=f"mine: {module} is OFT.*Merge it"):
        member_of_tensors({f"{module}.oft_blocks": torch.ones(2, 4, 4)}, "mine")
    with pytest.raises(FormatError, match="trained with DoRA"):
        space, _ = fit_delta(members_of(loras))
        encode_lora(
            space, lora_of_tensors({**pair, f"{module}.dora_scale": torch.ones(size_out, 1)})
        )


def test_the_shares_are_bounded(made):
    space, _ = made
    gram, p = space.basis.grams.total, space.basis.weights
    for shares in (held_out_shares(gram, p), mean_shares(gram, p)):
        assert bool(((shares >= 0) & (shares <= 1)).all())


def test_a_lora_from_outside_is_encoded_with_its_shares(made, built):
    space, _ = made
    g = generator(11)
    own = lora(g, 5)
    mixed = built[1] * 0.6 + built[3] * 0.4
    truth = mixed + 0.3 * dense(own)
    (member,) = members_of({"other": own})
    _, alone = encode_lora(space, as_member(member))
    target = {}
    start = 0
    for name, (out, size) in SIZES.items():
        block = truth[start : start + out * size].view(out, size)
        u, s, vt = torch.linalg.svd(block, full_matrices=False)
        target[name] = Factors((s[:, None] * vt).float(), u.float())
        start += out * size
    (member,) = members_of({"target": target})
    identity, report = encode_lora(space, member)
    mean = built.mean(0)
    _, _, v = torch.linalg.svd(built - mean, full_matrices=False)
    v = v[: len(built) - 1]
    guess = mean + (truth - mean) @ v.T @ v
    missed = float((truth - guess).square().sum())
    assert report.explained == pytest.approx(1 - missed / float(truth.square().sum()), abs=1e-4)
    assert report.weight_r2 == pytest.approx(
        1 - missed / float((truth - mean).square().sum()), abs=1e-4
    )
    cosine = float(truth @ mean / (truth.norm() * mean.norm()))
    assert report.mean_share == pytest.approx(cosine**2, abs=1e-4)
    assert alone.explained < 0.5 < report.explained
    blocks, start = {}, 0
    for name, (out, size) in SIZES.items():
        key = ".".join(name.split(".")[:2])
        t, q = (x[start : start + out * size] for x in (truth, guess))
        done = blocks.setdefault(key, [0.0, 0.0])
        done[0] += float((t - q).square().sum())
        done[1] += float(t.square().sum())
        start += out * size
    for key, (lost, whole) in blocks.items():
        assert report.by_block[key] == pytest.approx(1 - lost / whole, abs=1e-3)
    found = dense_vector(space, identity.vectors(space)[0])
    torch.testing.assert_close(found, guess, atol=2e-3, rtol=0)


def test_twins_of_any_rank_and_gauge_encode_alike(made, loras):
    space, _ = made
    g = generator(12)
    for rank in (1, 4, 16):
        own = {
            n: Factors(torch.cat([f.down, 0.3 * loras["file 2"].get(n, f).down]),
                       torch.cat([f.up, loras["file 2"].get(n, f).up], 1), f.scale)
            for n, f in lora(g, rank).items()
        }  # fmt: skip
        turned = {}
        for n, f in own.items():
            q = torch.linalg.qr(torch.randn(f.rank, f.rank, generator=g))[0].double()
            m = q * (0.2 + torch.rand(f.rank, generator=g).double())
            turned[n] = Factors(
                torch.linalg.solve(m, f.down.double()).float(),
                (f.up.double() @ m * 3).float(),
                f.scale / 3,
            )
        one, other = (encode_lora(space, x)[0].z for x in members_of({"a": own, "b": turned}))
        assert float((one - other).abs().max()) < 1e-4


def test_what_can_not_be_encoded(made):
    space, _ = made
    (flux,) = members_of(
        {"f": {"double_blocks.0.img_mlp.0": Factors(torch.ones(1, 8), torch.ones(8, 1))}}
    )
    with pytest.raises(LayoutMismatch, match="none of the 4 modules"):
        encode_lora(space, flux)
    zero = {n: Factors(torch.ones(1, i), torch.zeros(o, 1)) for n, (o, i) in SIZES.items()}
    with pytest.raises(DataError, match="nothing to encode"):
        encode_lora(space, members_of({"zero": zero})[0])
    wrong = {n: Factors(torch.ones(1, i), torch.ones(o + 1, 1)) for n, (o, i) in SIZES.items()}
    with pytest.raises(LayoutMismatch, match="another base model"):
        encode_lora(space, members_of({"wrong": wrong})[0])


def test_a_member_encodes_to_its_own_latent_from_a_file_or_tensors(made, loras):
    space, _ = made
    tensors = {}
    for n, f in loras["file 4"].items():
        key = "lora_unet_" + n.replace(".", "_")
        tensors[key + ".lora_down.weight"], tensors[key + ".lora_up.weight"] = f.down, f.up
        tensors[key + ".alpha"] = torch.tensor(f.scale * f.rank)
    expected = members(space).z[4:5]
    for given in (tensors, lora_of_tensors(tensors)):
        identity, report = encode_lora(space, given, residual=True)
        torch.testing.assert_close(identity.z, expected, atol=1e-4, rtol=0)
        assert report.explained == pytest.approx(1.0, abs=1e-4)
        assert float(identity.residual.abs().max()) < 1e-5


@pytest.mark.parametrize("rank, tolerance", [(30, 1e-3), (16, 0.1)])
def test_gradients_reach_the_latents(loras, rank, tolerance):
    """Of a loss of the updates, against finite differences; to first order where the cut loses something."""
    space, _ = fit_delta(members_of(loras), CollectionSettings(rank=rank))
    g = generator(21)
    targets = {n: torch.randn(o, i, generator=g) for n, (o, i) in SIZES.items()}

    def loss(z):
        lora = space.layout.unpack(space.decode(z)[0])
        parts = [(b @ a - t).square().sum() + (b @ a * t).sum() for (a, b), t in
                 ((lora[n], targets[n]) for n in SIZES)]  # fmt: skip
        return sum(parts)

    z = 0.5 * torch.randn(1, space.latent_size, generator=g)
    leaf = z.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    step = 3e-2
    moved = [
        (loss(z + step * e) - loss(z - step * e)) / (2 * step)
        for e in torch.eye(z.shape[1])[:, None]
    ]
    expected = torch.stack(moved)[None]
    assert float((gradient - expected).norm() / expected.norm()) < tolerance
    assert torch.nn.functional.cosine_similarity(gradient, expected) > 0.95


def test_uncut_the_coordinates_are_the_same_and_nothing_is_lost(loras, built):
    """Also where the space's own rank loses much, and with gradients that are exact."""
    space, _ = fit_delta(members_of(loras), CollectionSettings(rank=2))
    uncut = space.uncut()
    assert uncut.fingerprint == space.fingerprint and uncut.latent_size == space.latent_size
    z = torch.randn(2, space.latent_size, generator=generator(31), requires_grad=True)
    shares = space.basis.shares(space.codec.decode(space.codec_latent(z))).detach()
    for space_of in (uncut, uncut.to("cpu")):
        w = space_of.decode(z)
        for row, share in zip(w.detach(), shares):
            torch.testing.assert_close(
                dense_vector(uncut, row), share @ built, atol=1e-5, rtol=1e-4
            )
    target = dense_vector(uncut, uncut.decode(torch.ones(1, space.latent_size))[0]).float()
    updates = torch.stack([u.float() for u in built])
    lora = uncut.layout.unpack(uncut.decode(z)[0])
    whole = torch.cat([(lora[n][1] @ lora[n][0]).flatten() for n in SIZES])
    (gradient,) = torch.autograd.grad((whole - target).square().sum(), z)
    direct = space.basis.shares(space.codec.decode(space.codec_latent(z))).float() @ updates
    (expected,) = torch.autograd.grad((direct[0] - target).square().sum(), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


def test_uncut_is_offered_only_where_it_is_small(monkeypatch, made, make_space):
    linear = make_space("pca")
    assert linear.uncut() is linear
    monkeypatch.setattr("w2wpp.delta_basis.UNCUT_RANK", 8)
    assert made[0].uncut() is made[0]


def test_pickled_and_copied_it_needs_no_file(made, tmp_path):
    save_space(made[0], tmp_path / "s.safetensors")
    space = load_space(tmp_path / "s.safetensors")
    z = torch.randn(1, space.latent_size, generator=generator(30))
    copies = [pickle.loads(pickle.dumps(space)), copy.deepcopy(space), space.to("cpu")]
    expected = space.decode(z)
    for other in copies:
        assert torch.equal(other.decode(z), expected) and other.fingerprint == space.fingerprint
        torch.testing.assert_close(other.encode(expected).mean, z, atol=1e-4, rtol=0)
    assert "7 members" in repr(space.basis)


def test_what_a_cut_to_the_layouts_rank_keeps_counts_the_residual_too(loras, make_space):
    space, _ = fit_delta(members_of(loras), CollectionSettings(rank=3))
    z = torch.randn(1, space.latent_size, generator=generator(7))
    residual = 2 * torch.randn(1, space.basis.n_components, generator=generator(8))
    c = z * space.prior_std + space.prior_mean
    for rest, whole in ((None, c), (residual, c + residual)):
        identity = Identity(z, space.fingerprint, rest)
        w = space.decode(z, rest)
        expected = float(space.basis.kept_energy(whole, w)[0])
        assert space.kept_energy(identity, w) == expected and 0 < expected < 1
    plain = make_space("pca")
    who = plain.sample(1, generator=generator())
    assert plain.kept_energy(who, who.vectors(plain)) is None


def test_numbers_of_factors_are_not_compared_and_components_are_cut_from_the_end(made):
    space, _ = made
    with pytest.raises(ConfigError, match="compares updates"):
        space.basis.standardise(torch.zeros(1, space.layout.size))
    k = space.basis.n_components
    few = space.basis.truncated(2)
    c = torch.randn(1, 2, generator=generator(4))
    padded = torch.nn.functional.pad(c, (0, k - 2))
    torch.testing.assert_close(few.shares(c), space.basis.shares(padded))
    for wrong in (0, k + 1):
        with pytest.raises(ConfigError, match=f"truncated to {wrong}"):
            space.basis.truncated(wrong)
    assert space.basis.truncated(k).n_components == k
